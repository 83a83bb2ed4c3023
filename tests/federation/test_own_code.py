"""Code of a user's own: mistakes are named with file and line, and only what was compared and allowed runs."""

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from flapp.config.load import compose
from flapp.config.schema import ConfigError, NodeConfig
from flapp.custom import enable, read_code, resolve
from flapp.data.artifact import DataError
from flapp.partitions import prepared
from flapp.server.roster import FederationError
from tests.conftest import read_lines
from tests.support.own_runs import DIGITS, TASK, refusal, run
from tests.support.projects import add_to_task, settings_in, write_task

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
    ("dataset.name=unmade dataset.target", "def f():\n    return [1]", "unmade", "return ({"),
    ("dataset.name=digits dataset.target", "def f():\n    pass", "dataset.name=digits", "choose another dataset.name"),
    ("dataset.name=unmade dataset.target", "def f():\n    return open('/no')", "task.py, line 2", "No such file"),
]


@pytest.mark.parametrize(("code", "place", "what"), MODEL_MISTAKES)
def test_a_mistake_in_the_model_gives_a_one_line_error_with_file_and_line_before_round_1(
    tmp_path: Path, data_home: Path, code: str, place: str, what: str
) -> None:
    folder = write_task(tmp_path / "mine", code)
    text = refusal(settings_in(folder, data_home, *DIGITS, "run_name=bad"))
    assert place in text
    assert what in text


@pytest.mark.parametrize(("setting", "code", "place", "what"), MISTAKES)
def test_a_mistake_in_other_code_gives_a_one_line_error_with_file_and_line_before_round_1(
    tmp_path: Path, data_home: Path, setting: str, code: str, place: str, what: str
) -> None:
    folder = write_task(tmp_path / "mine", code)
    (folder / "network.py").write_text(dedent(TASK))
    target = "[task:f]" if setting == "train.mods" else "task:f"
    words = (*DIGITS, "model.target=network:build_model", *f"{setting}={target}".split(), "run_name=bad")
    text = refusal(settings_in(folder, data_home, *words))
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
    mod = """
        def mod(message, context, call_next):
            if context.node_config['partition-id'] == 1:
                raise KeyError('nothing')
            return call_next(message, context)
    """
    add_to_task(folder, mod)
    _, path = run(settings_in(folder, tmp_path, *DIGITS, "run_name=fails", "train.mods=[task:mod]"))
    for line in read_lines(path, "train"):
        (failure,) = line["failures"]
        assert failure["client"] == "1"
        assert "task.py, line" in failure["reason"]
        assert "raise KeyError('nothing')" in failure["reason"]


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


@pytest.mark.slow
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


def test_a_dataset_is_refused_if_its_function_was_edited_but_not_if_a_partial_was_made_anew(tmp_path: Path) -> None:
    code = """
        import functools
        import numpy as np

        def make_data(number=1):
            rows = np.full((4, 2), number, "float32")
            return {"train": (rows, rows[:, 0]), "test": (rows, rows[:, 0])}, []

        make = functools.partial(make_data, 3)
    """
    words = "model=linear dataset=custom dataset.shape=[2] dataset.classes=0 partition=iid evaluate.objective=loss"
    configs = {
        target: settings_in(
            tmp_path, tmp_path, *words.split(), f"dataset.name={target}", f"dataset.target=task:{target}"
        )
        for target in ("make_data", "make")
    }
    made = {}
    for number in (1, 2):
        write_task(tmp_path, code.replace("number=1", f"number={number}"))
        enable(configs["make"])
        made[number] = resolve("dataset.target", "task:make")
        prepared(configs["make"])
        if number == 1:
            prepared(configs["make_data"])
    assert made[1] is not made[2]
    with pytest.raises(DataError, match=r"make_data was made by another function, .*: remove that folder"):
        prepared(configs["make_data"])


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
