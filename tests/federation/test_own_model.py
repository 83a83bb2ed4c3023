"""Models of a user's own: the same bytes in every way to run them, and mistakes named with the user's file and line."""

import copy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score

from flapp import client_app
from flapp.config.schema import ConfigError
from flapp.custom import enable
from flapp.data.offline import OfflineDataset
from flapp.server.run import initial_model
from flapp.training import outputs_of
from tests.conftest import read_lines
from tests.support.own_runs import DIGITS, SMALL, break_off, refusal, run
from tests.support.projects import BERT, EDITED, add_to_task, new_project, settings_in, write_task
from tools.checkpoints import main as checkpoints
from tools.new import CHOICES, TEMPLATES


@pytest.mark.slow
@pytest.mark.usefixtures("in_pairs")
@pytest.mark.parametrize("template", CHOICES)
def test_each_template_learns_and_ends_in_the_same_bytes_in_groups_and_after_a_crash(
    template: str, tmp_path: Path
) -> None:
    project = new_project(tmp_path / "mine", template)
    words = ("partition=iid", "num_rounds=2", "evaluate.every=2")
    learned, _ = run(settings_in(project, tmp_path, "run_name=learned", *words, "clients=3", "train.epochs=2"))
    assert learned["accuracy"] > 0.6
    assert 0 < min(learned["scores"].values()) <= 1
    words += ("clients=5", "train.steps=1", "evaluate.personal_epochs=0")
    whole, _ = run(settings_in(project, tmp_path, "run_name=whole", *words))
    grouped, _ = run(settings_in(project, tmp_path, "run_name=grouped", *words), any_node=True, order=5)
    assert grouped["model_sha256"] == whole["model_sha256"]
    break_off(settings_in(project, tmp_path, "run_name=broken", *words), 2)
    resumed, _ = run(settings_in(project, tmp_path, "run_name=broken", "resume=true", *words))
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert checkpoints(["verify", str(tmp_path / "checkpoints")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "built_in"),
    [
        (
            ("model=custom", "model.target=flapp.model.networks:LeafCNN")
            + ("model.kwargs={image_size:32,channels:1,classes:10}",),
            ("model=cnn",),
        ),
        (("train.loss=task:loss",), ()),
        (("train.optimizer=task:sgd",), ("train.optimizer=sgd", "train.momentum=0.9")),
    ],
)
def test_a_copy_of_a_built_in_function_gives_the_same_bytes(
    folder: Path, tmp_path: Path, own: tuple[str, ...], built_in: tuple[str, ...]
) -> None:
    base = ("dataset=digits", "partition=iid", "clients=2", *SMALL, "num_rounds=1", "train.weight_decay=0")
    base += ("train.steps=3",)
    first, one = run(settings_in(folder, tmp_path, *base, *own, "run_name=own"))
    second, two = run(settings_in(folder, tmp_path, *base, *built_in, "run_name=built_in"))
    models = [load_file(path / "model.safetensors") for path in (one, two)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)


@pytest.mark.usefixtures("in_pairs")
def test_a_loss_may_be_negative(folder: Path, tmp_path: Path) -> None:
    words = (*DIGITS, "num_rounds=1", "train.steps=2")
    usual, _ = run(settings_in(folder, tmp_path, *words, "train.loss=task:loss", "run_name=usual"))
    lowered, path = run(settings_in(folder, tmp_path, *words, "train.loss=task:lowered_loss", "run_name=lowered"))
    assert lowered["refused"] == {}
    assert lowered["loss"] == pytest.approx(usual["loss"] - 10)
    assert read_lines(path, "train")[0]["loss"] < 0


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
    add_to_task(folder, EDITED)
    (folder / "mods.py").write_text(
        "def mod(message, context, call_next):\n"
        "    order = message.content['order']\n"
        "    if order['server-round'] == 2 and order['client-id'] == '1':\n        raise OSError('no disk')\n"
        "    return call_next(message, context)\n"
    )
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("in_pairs")
@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_on_each_model_end_in_the_same_bytes_and_peft_takes_them(
    models: Path, tmp_path: Path, case: str
) -> None:
    shared = "partition=iid num_rounds=2 train.epochs=1 train.steps=2 evaluate.every=2 dataset.augment=false"
    shared += " evaluate.metrics=null evaluate.scores=null train.mods=[mods:mod] lora=default lora.rank=2"
    words = f"clients=5 strategy=fedlora evaluate.personal_epochs=0 {shared} {ADAPTED[case]}".split()
    config = settings_in(models, tmp_path, "run_name=whole", *words)
    whole, path = run(config)
    (failure,) = read_lines(path, "train")[1]["failures"]
    assert (failure["client"], "mods.py, line 4" in failure["reason"]) == ("1", True)
    grouped, _ = run(settings_in(models, tmp_path, "run_name=grouped", *words), any_node=True, order=5)
    break_off(settings_in(models, tmp_path, "run_name=broken", *words), 2)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_augmentation_depends_on_seed_and_client_only(folder: Path, tmp_path: Path) -> None:
    words = (*DIGITS, "dataset.augment=task:noise")
    digests = [
        run(settings_in(folder, tmp_path, *words, f"run_name=augmented{order}"), order=order)[0]["model_sha256"]
        for order in (0, 1)
    ]
    plain, _ = run(settings_in(folder, tmp_path, *DIGITS, "run_name=plain"))
    assert digests[0] == digests[1] != plain["model_sha256"]


def test_mods_wrap_training_and_evaluation_of_each_client_in_order(folder: Path, tmp_path: Path) -> None:
    mods = """
        CALLS = []

        def outer(message, context, call_next):
            CALLS.append("outer")
            return call_next(message, context)

        def inner(message, context, call_next):
            CALLS.append("inner")
            return call_next(message, context)
    """
    add_to_task(folder, mods)
    config = settings_in(
        folder, tmp_path, *DIGITS, "run_name=mods", "num_rounds=1", "train.mods=[task:outer,task:inner]"
    )
    run(config)
    assert sys.modules["task"].CALLS == ["outer", "inner"] * 6


@pytest.mark.slow
def test_a_strategy_of_ones_own_combines_the_models(folder: Path, tmp_path: Path) -> None:
    stubborn = """
        from flapp.strategy.fedavg import FedAvg

        class Stubborn(FedAvg):
            def combine_sum(self, total, weight):
                return self.current, {}
    """
    add_to_task(folder, stubborn)
    words = (*DIGITS, "strategy.target=task:Stubborn")
    _, one = run(settings_in(folder, tmp_path, *words, "num_rounds=1", "run_name=one"))
    _, two = run(settings_in(folder, tmp_path, *words, "num_rounds=2", "run_name=two"))
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    assert all(torch.equal(first[key], second[key]) for key in first)
    text = refusal(settings_in(folder, tmp_path, *DIGITS, "run_name=no", "strategy.target=task:build_model"))
    assert "not a subclass of FedAvg" in text


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_data_made_before_a_function_was_edited_are_not_reused(tmp_path: Path) -> None:
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
