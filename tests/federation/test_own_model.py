"""Models of a user's own: the same bytes in every way to run them, and mistakes named with the user's file and line."""

import copy
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score

from flapp import client_app
from flapp.config.load import compose
from flapp.config.schema import Config, ConfigError, NodeConfig
from flapp.custom import enable, read_code, resolve
from flapp.data.offline import OfflineDataset
from flapp.server.roster import FederationError
from flapp.server.run import initial_model
from flapp.strategy.fedavg import FedAvg
from flapp.training import outputs_of
from tests.conftest import Broken, LocalGrid, read_lines, run_app
from tests.support.projects import BERT, EDITED, new_project, settings_in, write_task
from tools.checkpoints import main as checkpoints
from tools.new import CHOICES, TEMPLATES

SMALL = ("num_rounds=2", "evaluate.personal_epochs=0")
TASK = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    def build_model(width=8):
        return nn.Sequential(nn.Flatten(), nn.Linear(1024, width), nn.BatchNorm1d(width), nn.Linear(width, 10))

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets)

    def sgd(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)

    def count(outputs, targets):
        return {"right": (outputs.argmax(1) == targets).sum(), "all": len(targets)}

    def score(sums):
        return {"share": sums["right"] / sums["all"]}

    def noise(inputs, generator):
        return inputs + torch.randn(*inputs.shape, generator=generator)
"""
DIGITS = ("model=custom", "model.target=task:build_model", "dataset=digits", "partition=iid", "clients=3", *SMALL)


@pytest.fixture(autouse=True)
def imports() -> Iterator[None]:
    """Forget the folders of projects afterwards."""
    before = list(sys.path)
    yield
    sys.path[:] = before
    for name in ("task", "network", "texts", "rows", "bert", "mods", "helper"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_task(tmp_path / "mine", TASK)


def run(config: Config, nodes: Any = None, **grid: Any) -> tuple[dict[str, Any], Path]:
    """Run a federation, in a simulation unless nodes are given."""
    simulated = [{"partition-id": i, "num-partitions": config.clients} for i in range(config.clients)]
    local = LocalGrid({}, nodes or simulated, **grid)
    local.clients_here = nodes is None
    return run_app(config, local)


def break_off(config: Config, server_round: int) -> None:
    """Run until a round is to be averaged, and break off there."""
    real = FedAvg.aggregate_train

    def aggregate(strategy: FedAvg, number: int, replies: Any) -> Any:
        if strategy.phase.server_round == server_round:
            raise Broken("the power is gone")
        return real(strategy, number, replies)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedAvg, "aggregate_train", aggregate)
        with pytest.raises(Broken):
            run(config)


def refusal(config: Config) -> str:
    """Return the line with which a run is refused before its first round; no folder is left."""
    with pytest.raises(ValueError, match=".") as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not (config.runs_dir / config.run_name).exists()
    return str(caught.value)


@pytest.mark.parametrize("template", CHOICES)
def test_each_template_learns_and_ends_in_the_same_bytes_in_groups_and_after_a_crash(
    template: str, tmp_path: Path
) -> None:
    project = new_project(tmp_path / "mine", template)
    words = ("partition=iid", "clients=40", "num_rounds=3", "train.epochs=4")
    config = settings_in(project, tmp_path, "run_name=whole", *words)
    whole, _ = run(config)
    assert whole["accuracy"] > 0.6
    assert 0 < min(whole["scores"].values()) <= 1
    grouped, _ = run(settings_in(project, tmp_path, "run_name=grouped", *words), any_node=True, order=5)
    assert grouped["model_sha256"] == whole["model_sha256"]
    break_off(settings_in(project, tmp_path, "run_name=broken", *words), 2)
    resumed, _ = run(settings_in(project, tmp_path, "run_name=broken", "resume=true", *words))
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert checkpoints(["verify", str(tmp_path / "checkpoints")]) == 0


@pytest.mark.parametrize(
    ("own", "built_in"),
    [
        (
            ("model=custom", "model.target=flapp.model.networks:LeafCNN", "train.steps=2")
            + ("model.kwargs={image_size:32,channels:1,classes:10}",),
            ("model=cnn", "train.steps=2"),
        ),
        (("train.loss=task:loss",), ()),
        (("train.optimizer=task:sgd",), ("train.optimizer=sgd", "train.momentum=0.9")),
    ],
)
def test_what_flapp_has_itself_gives_the_same_bytes_as_ones_own(
    folder: Path, tmp_path: Path, own: tuple[str, ...], built_in: tuple[str, ...]
) -> None:
    base = ("dataset=digits", "partition=iid", "clients=2", *SMALL, "num_rounds=1", "train.weight_decay=0")
    first, one = run(settings_in(folder, tmp_path, *base, *own, "run_name=own"))
    second, two = run(settings_in(folder, tmp_path, *base, *built_in, "run_name=built_in"))
    models = [load_file(path / "model.safetensors") for path in (one, two)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)


ADAPTED = {  # the module of each model, and the settings that adapt it
    "cnn": "model.target=task:build_other model.kwargs={} train.loss=task:focal lora.targets=[all-linear]",
    "gru": "model.target=texts:build_model dataset=custom dataset.name=texts dataset.shape=[16] dataset.classes=2 "
    "dataset.target=texts:make_data lora.targets=[head] train.loss=null",
    "bert": "model.target=bert:build_model model.kwargs={} dataset=custom dataset.name=greetings dataset.shape=[12] "
    "dataset.classes=2 dataset.target=bert:make_data lora.targets=[q_lin,v_lin] train.loss=null",
    "mlp": "model.target=rows:build_model dataset=custom dataset.name=rows dataset.shape=[8] dataset.classes=2 "
    "dataset.target=rows:make_data train.loss=rows:loss lora.targets=[all-linear]",
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Return a project with the models of all templates in it, and a mod that fails for client 1 in round 2."""
    folder = new_project(tmp_path / "mine", "vision")
    for template, module in (("text", "texts"), ("tabular", "rows")):
        shutil.copy(TEMPLATES / template / "task.py", folder / f"{module}.py")
    (folder / "bert.py").write_text(BERT)
    with (folder / "task.py").open("a") as file:
        file.write(EDITED)
    (folder / "mods.py").write_text(
        "def mod(message, context, call_next):\n"
        "    order = message.content['order']\n"
        "    if order['server-round'] == 2 and order['client-id'] == '1':\n        raise OSError('no disk')\n"
        "    return call_next(message, context)\n"
    )
    return folder


@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_on_each_model_end_in_the_same_bytes_and_peft_takes_them(
    models: Path, tmp_path: Path, case: str
) -> None:
    shared = "partition=iid num_rounds=3 train.epochs=1 train.steps=2 evaluate.every=3 dataset.augment=false"
    shared += " evaluate.metrics=null evaluate.scores=null train.mods=[mods:mod] lora=default lora.rank=2"
    words = f"clients=33 strategy=fedlora {shared} {ADAPTED[case]}".split()
    config = settings_in(models, tmp_path, "run_name=whole", *words)
    whole, path = run(config)
    (failure,) = read_lines(path, "train")[1]["failures"]
    assert (failure["client"], "mods.py, line 4" in failure["reason"]) == ("1", True)
    grouped, _ = run(settings_in(models, tmp_path, "run_name=grouped", *words), any_node=True, order=5)
    break_off(settings_in(models, tmp_path, "run_name=broken", *words), 3)
    resumed, _ = run(settings_in(models, tmp_path, "run_name=broken", "resume=true", *words))
    assert whole["model_sha256"] == grouped["model_sha256"] == resumed["model_sha256"]
    assert checkpoints(["verify", str(tmp_path / "checkpoints")]) == 0
    merged = initial_model(replace(config, lora=replace(config.lora, enabled=False)))
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(merged), str(path / "adapter")).eval()
    merged.load_state_dict(load_file(path / "model.safetensors"))
    dataset = OfflineDataset(tmp_path / "data" / config.dataset.name / "test")
    inputs = torch.stack([dataset[i][0] for i in range(8)])
    with torch.no_grad():
        assert torch.allclose(outputs_of(adapted, inputs), outputs_of(merged.eval(), inputs), atol=1e-5)


def test_scores_of_sums_are_those_of_all_samples_at_once(tmp_path: Path) -> None:
    project = new_project(tmp_path / "mine", "vision")
    config = settings_in(project, tmp_path, "run_name=scored", "num_rounds=1", "evaluate.central=true")
    summary, path = run(config)
    enable(config)
    import task  # type: ignore[import-not-found]

    model = task.build_model()
    model.load_state_dict(load_file(path / "model.safetensors"))
    folder = tmp_path / "data" / "digits" / "test"
    images = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.no_grad():
        found = model.eval()(images).argmax(1).numpy()
    expected = balanced_accuracy_score(np.load(folder / "labels.npy"), found)
    assert summary["scores"]["balanced_accuracy"] == pytest.approx(expected, abs=1e-9)
    (line,) = read_lines(path, "central")[-1:]
    assert line["scores"]["balanced_accuracy"] == pytest.approx(expected, abs=1e-9)


def test_augmentation_depends_on_seed_and_client_only(folder: Path, tmp_path: Path) -> None:
    words = (*DIGITS, "dataset.augment=task:noise")
    digests = [
        run(settings_in(folder, tmp_path, *words, f"run_name=augmented{order}"), order=order)[0]["model_sha256"]
        for order in (0, 1)
    ]
    plain, _ = run(settings_in(folder, tmp_path, *DIGITS, "run_name=plain"))
    assert digests[0] == digests[1] != plain["model_sha256"]


def test_mods_wrap_training_and_evaluation_of_each_client_in_order(folder: Path, tmp_path: Path) -> None:
    with (folder / "task.py").open("a") as file:
        file.write(
            "\nCALLS = []\n"
            "def outer(message, context, call_next):\n    CALLS.append('outer')\n"
            "    return call_next(message, context)\n"
            "def inner(message, context, call_next):\n    CALLS.append('inner')\n"
            "    return call_next(message, context)\n"
        )
    config = settings_in(
        folder, tmp_path, *DIGITS, "run_name=mods", "num_rounds=1", "train.mods=[task:outer,task:inner]"
    )
    run(config)
    assert sys.modules["task"].CALLS == ["outer", "inner"] * 6


def test_a_strategy_of_ones_own_combines_the_models(folder: Path, tmp_path: Path) -> None:
    with (folder / "task.py").open("a") as file:
        file.write(
            "\nfrom flapp.strategy.fedavg import FedAvg\n"
            "class Stubborn(FedAvg):\n"
            "    def combine_sum(self, total, weight):\n        return self.current, {}\n"
        )
    words = (*DIGITS, "strategy.target=task:Stubborn")
    _, one = run(settings_in(folder, tmp_path, *words, "num_rounds=1", "run_name=one"))
    _, two = run(settings_in(folder, tmp_path, *words, "num_rounds=2", "run_name=two"))
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    assert all(torch.equal(first[key], second[key]) for key in first)
    text = refusal(settings_in(folder, tmp_path, *DIGITS, "run_name=no", "strategy.target=task:build_model"))
    assert "not a subclass of FedAvg" in text


MODEL_MISTAKES = [
    ("x = 1 +", "task.py, line 1", "SyntaxError"),
    ("import nothere", "task.py, line 1", "nothere"),
    ("build = 3", "task.py", "has no build_model"),
    ("def build_model():\n    pass", "task.py, line 1", "return an nn.Module"),
    ("def build_model():\n    return 1 / 0", "task.py, line 2: return 1 / 0", "division by zero"),
    ("def build_model(x):\n    pass", "task.py, line 1", "argument"),
    ("import torch\ndef build_model():\n    return torch.nn.Linear(7, 10)", "task.py, line 2", "[8, 1, 32, 32]"),
    ("import torch\ndef build_model():\n    return torch.nn.Flatten()", "task.py, line 2", "without parameters"),
    ("import torch\ndef build_model():\n    return torch.nn.LazyLinear(10)", "task.py, line 2", "no shape yet"),
]
MISTAKES = [
    ("train.loss", "def f(outputs, targets):\n    return outputs.mean(1)", "task.py, line 1", "mean over the batch"),
    ("train.loss", "def f(outputs, targets):\n    return 3.0", "task.py, line 1", "returned float"),
    ("train.loss", "def f(outputs, targets):\n    return outputs.detach().mean()", "task.py, line 1", "depend"),
    ("train.loss", "def f(outputs, targets):\n    return outputs.abs().sum()", "task.py, line 1", "sum over the batch"),
    ("train.loss", "def f(outputs, targets):\n    return outputs.mean() / 0", "task.py, line 1", "check it"),
    ("train.loss", "def f(outputs, targets):\n    raise SystemExit(3)", "task.py, line 2", "SystemExit"),
    ("train.loss", "def f(outputs, targets):\n    return outputs.nope", "task.py, line 2", "nope"),
    ("evaluate.metrics", "def f(o, t):\n    return {'a': (o.argmax(1) == t).float().mean()}", "line 1", "not a sum"),
    ("evaluate.metrics", "def f(o, t):\n    return 5", "task.py, line 1", "dict"),
    ("evaluate.metrics", "def f(o, t):\n    return {'a b': 5}", "task.py, line 1", "a b"),
    ("evaluate.metrics", "def f(o, t):\n    return {'a': t}", "task.py, line 1", "number"),
    ("evaluate.metrics", "def f(o, t):\n    return {'a': float('inf')}", "task.py, line 1", "finite"),
    ("dataset.augment", "def f(inputs, generator):\n    return inputs[:1]", "task.py, line 1", "return inputs"),
    ("train.optimizer", "def f(parameters, lr):\n    pass", "task.py, line 1", "Optimizer"),
    ("train.mods", "f = [1]", "train.mods=task:f", "cannot be called"),
    ("dataset.name=made dataset.target", "def f():\n    return [1]", "made", "return ({"),
    ("dataset.name=digits dataset.target", "def f():\n    pass", "dataset.name=digits", "choose a name"),
    ("dataset.name=made dataset.target", "def f():\n    return open('/no')", "task.py, line 2", "No such file"),
]


@pytest.mark.parametrize(("code", "place", "what"), MODEL_MISTAKES)
def test_a_mistake_in_the_model_is_one_line_with_file_and_line_before_round_1(
    tmp_path: Path, code: str, place: str, what: str
) -> None:
    folder = write_task(tmp_path / "mine", code)
    text = refusal(settings_in(folder, tmp_path, *DIGITS, "run_name=bad"))
    assert place in text
    assert what in text


@pytest.mark.parametrize(("setting", "code", "place", "what"), MISTAKES)
def test_a_mistake_in_other_code_is_one_line_with_file_and_line_before_round_1(
    tmp_path: Path, setting: str, code: str, place: str, what: str
) -> None:
    folder = write_task(tmp_path / "mine", code)
    (folder / "network.py").write_text(dedent(TASK))
    target = "[task:f]" if setting == "train.mods" else "task:f"
    words = (*DIGITS, "model.target=network:build_model", *f"{setting}={target}".split(), "run_name=bad")
    text = refusal(settings_in(folder, tmp_path, *words))
    assert place in text
    assert what in text


def test_scores_that_fail_are_refused_before_round_1_and_later_do_not_end_the_run(folder: Path, tmp_path: Path) -> None:
    task = folder / "task.py"
    task.write_text(task.read_text() + "\ndef bad(sums):\n    return {'x': 1 / 0 if sums['all'] < 9 else 1}\n")
    words = (*DIGITS, "evaluate.metrics=task:count", "evaluate.scores=task:bad")
    assert "division by zero" in refusal(settings_in(folder, tmp_path, *words, "run_name=bad"))
    task.write_text(task.read_text().replace("< 9", "> 9"))
    summary, path = run(settings_in(folder, tmp_path, *words, "run_name=late"))
    assert summary["status"] == "finished"
    assert "task.py, line" in read_lines(path, "evaluate")[-1]["scores_error"]


def test_a_client_whose_code_fails_is_left_out_with_the_users_own_line(folder: Path, tmp_path: Path) -> None:
    with (folder / "task.py").open("a") as file:
        file.write(
            "\ndef mod(message, context, call_next):\n"
            "    if context.node_config['partition-id'] == 1:\n        raise KeyError('nothing')\n"
            "    return call_next(message, context)\n"
        )
    _, path = run(settings_in(folder, tmp_path, *DIGITS, "run_name=fails", "train.mods=[task:mod]"))
    for line in read_lines(path, "train"):
        (failure,) = line["failures"]
        assert failure["client"] == "1"
        assert "task.py, line" in failure["reason"]
        assert "raise KeyError('nothing')" in failure["reason"]


def test_edited_code_is_refused_on_resume_by_the_names_of_the_files(folder: Path, tmp_path: Path) -> None:
    (folder / "helper.py").write_text("X = 1\n")
    (folder / "task.py").write_text("import helper\n" + (folder / "task.py").read_text())
    words = (*DIGITS, "run_name=edited")
    break_off(settings_in(folder, tmp_path, *words), 2)
    (folder / "helper.py").write_text("X = 2\n")
    with pytest.raises(ConfigError, match=r"helper\.py changed"):
        run(settings_in(folder, tmp_path, *words, "resume=true"))
    (folder / "helper.py").write_text("X = 1\n")
    undisturbed, _ = run(settings_in(folder, tmp_path, *DIGITS, "run_name=undisturbed"))
    resumed, _ = run(settings_in(folder, tmp_path, *words, "resume=true"))
    assert resumed["model_sha256"] == undisturbed["model_sha256"]


def test_sites_with_other_files_and_sites_that_do_not_allow_the_code_are_refused_by_name(
    folder: Path, tmp_path: Path
) -> None:
    other = write_task(tmp_path / "other", TASK + "\n    # another version\n")
    nodes = [
        {"client-id": "0", "allow-code": str(folder)},
        {"client-id": "1", "allow-code": str(other)},
        {"client-id": "2"},
    ]
    config = settings_in(
        folder, tmp_path, *DIGITS, "run_name=sites", "strategy.min_clients=1", "strategy.wait_for_clients=1"
    )
    _, path = run(config, nodes=nodes)
    refused = json.loads((path / "metrics.json").read_text())["refused"]
    assert refused.keys() == {"1", "2"}
    assert "code of task here has the digest" in refused["1"]
    assert "allow-code" in refused["2"]


def test_a_site_tries_the_code_on_its_own_samples_before_the_first_round(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "mine", TASK.replace("1024", "99"))
    nodes = [{"client-id": str(i), "allow-code": str(folder)} for i in range(3)]
    config = settings_in(folder, tmp_path, *DIGITS, "run_name=tried", "strategy.wait_for_clients=1")
    with pytest.raises((FederationError, ConfigError), match=r"fails on inputs .*task\.py, line"):
        run(config, nodes=nodes)


def test_code_beside_packages_is_known_by_its_files_and_large_packages_by_version(tmp_path: Path) -> None:
    config = compose(
        ["model=custom", "model.target=torchvision.models:resnet18", "model.kwargs.num_classes=10"], tmp_path
    )
    assert any(name.startswith("torchvision/models/") for name in read_code(config))
    config = compose(["model=custom", "model.target=torch.nn:Linear"], tmp_path)
    assert read_code(config).keys() == {f"torch=={version('torch')}"}


@pytest.mark.parametrize(
    ("target", "allowed", "what"),
    [
        ("task:subprocess.check_output", True, "is defined in subprocess"),
        ("task:run", True, "is defined in subprocess"),
        ("flapp.config.load:os.system", False, "does not allow code of flapp"),
        ("os:system", False, "does not allow code of os"),
        ("task:build_model", False, "no module task"),
    ],
)
def test_a_site_builds_nothing_but_what_its_own_modules_define(
    tmp_path: Path, target: str, allowed: bool, what: str
) -> None:
    folder = write_task(
        tmp_path / "mine", "import subprocess\nfrom subprocess import run\ndef build_model():\n    pass\n"
    )
    config = settings_in(folder, tmp_path, "model=custom", f"model.target={target}")
    for site in ({"client_id": "3"}, {"partition_id": 0, "num_partitions": 2}):
        kind = replace(config.deployment, kind="superlink" if "partition_id" in site else "inline")
        node = NodeConfig(allow_code=(str(folder),) if allowed else (), **site)
        with pytest.raises(ConfigError, match=what):
            resolve("model.target", target if enable(replace(config, deployment=kind), node) else "")


def test_what_is_imported_is_what_was_compared(tmp_path: Path) -> None:
    """Helpers in folders without __init__.py count; edits show, also of the same length within a second."""
    folder = write_task(tmp_path / "mine", "from parts.net import WIDTH\ndef build_model():\n    return WIDTH\n")
    (folder / "parts").mkdir()
    config = settings_in(folder, tmp_path, "model=custom", "model.target=task:build_model")
    digests = set()
    for width in (1, 2):
        (folder / "parts" / "net.py").write_text(f"WIDTH = {width}\n")
        digests.add(enable(config))
        assert read_code(config).keys() == {"task.py", "parts/net.py"}
        assert resolve("model.target", "task:build_model")() == width
    other = write_task(tmp_path / "other", "def build_model():\n    return 'other'\n")
    for code, expected in ((other, "other"), (folder, 2), (other, "other")):
        digests.add(enable(settings_in(code, tmp_path, "model=custom", "model.target=task:build_model")))
        assert resolve("model.target", "task:build_model")() == expected
    assert len(digests) == 3
    for name in ("parts", "parts.net"):
        sys.modules.pop(name, None)


def test_a_model_that_changes_its_arguments_and_draws_buffers_is_the_same_everywhere(tmp_path: Path) -> None:
    code = """
        import torch
        from torch import nn

        class Features(nn.Module):
            def __init__(self, widths):
                super().__init__()
                self.register_buffer("random", torch.randn(1024, widths.pop()), persistent=False)
                self.fc = nn.Linear(64, 10)

            def forward(self, x):
                return self.fc(torch.cos(x.flatten(1) @ self.random))
    """
    folder = write_task(tmp_path / "mine", code)
    words = (*DIGITS, "model.target=task:Features", "model.kwargs={widths:[64]}", "evaluate.every=1")
    config = settings_in(folder, tmp_path, *words, "run_name=one", "evaluate.central=true")
    summary, path = run(config)
    client_app.cached_model.cache_clear()
    torch.manual_seed(99)
    again, _ = run(settings_in(folder, tmp_path, *words, "run_name=two"))
    assert summary["model_sha256"] == again["model_sha256"]
    assert read_lines(path, "central")[-1]["accuracy"] == pytest.approx(summary["accuracy"])


def test_a_dataset_is_not_taken_for_that_of_an_edited_function(tmp_path: Path) -> None:
    folder = new_project(tmp_path / "mine", "tabular")
    words = ("num_rounds=1", "train.steps=1")
    run(settings_in(folder, tmp_path, *words, "run_name=first"))
    task = folder / "task.py"
    task.write_text(task.read_text().replace("WEIGHTS = (1.0, 4.0)", "WEIGHTS = (1.0, 3.0)"))
    run(settings_in(folder, tmp_path, *words, "run_name=other_loss"))
    task.write_text(task.read_text().replace("risk > 1.2", "risk > 1.0"))
    text = refusal(settings_in(folder, tmp_path, *words, "run_name=other_data"))
    assert str(tmp_path / "data" / "mine") in text
    shutil.rmtree(tmp_path / "data" / "mine")
    run(settings_in(folder, tmp_path, *words, "run_name=other_data"))


def test_sums_of_hostile_clients_are_left_out_by_name_or_dropped(tmp_path: Path, folder: Path) -> None:
    sent = {"0": {"sum-right": 1.7e308}, "1": {"sum-<b>": 1.0}, "2": {"sum-extra": 1.0}}

    def tamper(name: str, reply: Any) -> Any:
        if "loss-sum" in reply.content.metric_records.get("metrics", {}):
            reply.content.metric_records["metrics"].update(sent.get(name, {}))
        return reply

    words = (*DIGITS, "clients=5", "evaluate.metrics=task:count", "evaluate.scores=task:score")
    _, path = run(settings_in(folder, tmp_path, *words, "run_name=hostile"), tamper=tamper)
    line = read_lines(path, "evaluate")[-1]
    assert [failure["client"] for failure in line["failures"]] == ["0", "1"]
    assert line["sums"].keys() == {"right", "all"}
    assert 0 <= line["scores"]["share"] <= 1
