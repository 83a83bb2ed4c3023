"""The same settings end in the same bytes in every runtime, also when clients fail and when the run is killed."""

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array

from flapp.messages import HeldArray
from tests.conftest import read_lines
from tests.support.commands import PYTORCHS, SECONDS, in_shared_memory, left_running, starting_runs
from tests.support.projects import BERT, BERT_WORDS, EDITED, EDITED_WORDS, add_to_task, new_project, settings_in
from tests.support.waiting import wait_for, wait_for_end
from tools.checkpoints import main as checkpoints
from tools.deployment import submit
from tools.deployment.superlink import CONNECTION, PrivateSuperLink

Run = Callable[..., Path]
SHORT = (*EDITED_WORDS.split(), "partition=iid", "train.epochs=1", "train.steps=2", "evaluate.personal_epochs=0")
ADAPTERS = (  # in groups that send sums
    *(*SHORT, "clients=33", "num_rounds=2", "evaluate.every=2", "strategy.fraction_evaluate=0.1", "strategy=fedlora"),
    *("strategy.aggregation=fedit", "lora=default", "lora.rank=2", "lora.targets=[all-linear]"),
    *("checkpoint=recent", "checkpoint.on_error=fail"),
)


def digest_of(path: Path) -> str:
    summary = json.loads((path / "metrics.json").read_text())
    assert summary["status"] == "finished"
    return str(summary["model_sha256"])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project that its user has edited."""
    folder = new_project(tmp_path_factory.mktemp("projects") / "mine", "vision")
    add_to_task(folder, EDITED)
    (folder / "bert.py").write_text(BERT)
    return folder


@pytest.fixture(scope="module")
def run_inline(project: Path, data_home: Path) -> Run:
    """Return a function that runs settings with deployment=inline in the project and returns the run's folder."""
    numbers = iter(range(1000))

    def run(*words: str, workers: int = 2) -> Path:
        name = f"run_name=runtimes-{next(numbers)}"
        settings = settings_in(project, data_home, name, f"deployment.workers={workers}", *words)
        return Path(submit.run_once(settings)["run_dir"])

    return run


# One settings file, one SHA-256


@pytest.mark.slow
@pytest.mark.usefixtures("in_pairs")
def test_any_number_of_workers_gives_the_same_bytes_of_adapters_on_a_model_of_transformers(run_inline: Run) -> None:
    words = f"{BERT_WORDS} clients=5 partition=iid num_rounds=2 train.steps=1 evaluate.every=2 lora.rank=2".split()
    words += ["evaluate.personal_epochs=0", "checkpoint=off"]
    words += ["strategy.aggregation=flora"]  # in groups that send each client's tensors
    assert digest_of(run_inline(*words, workers=2)) == digest_of(run_inline(*words, workers=0))


def test_a_view_of_a_models_memory_travels_as_a_plain_array() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    held, plain = HeldArray(values), Array(values)
    assert held.deflate() == plain.deflate()
    assert held.object_id == plain.object_id


# Failing clients


@pytest.fixture
def spoiled(data_home: Path) -> Callable[[str, set[str]], str]:
    """Return a function that makes the stores of some clients of a run unusable, and returns the run's name."""

    def spoil(name: str, clients: set[str]) -> str:
        stores = data_home / "checkpoints" / f"runtimes-{name}"
        stores.mkdir(parents=True)
        for client in clients:  # a file in the place of the folder in which the client keeps its store
            (stores / f"client_{client}").touch()
        return f"run_name={stores.name}"

    return spoil


def check_failures(path: Path, failing: set[str], replies: int) -> None:
    """Check that these clients are named in every round with what has failed, and that the others have answered."""
    for line in read_lines(path, "train"):
        assert {failure["client"] for failure in line["failures"]} == failing
        assert line["replies"] == replies
        for failure in line["failures"]:
            assert f"checkpoints/{path.name}/client_{failure['client']}" in failure["reason"]


@pytest.mark.slow
def test_flwr_run_of_an_edited_project_gives_the_bytes_files_and_failures_of_workers(
    run_inline: Run, spoiled: Callable[[str, set[str]], str], project: Path, data_home: Path
) -> None:
    failing, path = {"3", "13", "23"}, data_home / "runs" / "runtimes-simulated"
    words = ["experiment=mine", f"home={data_home}", *ADAPTERS, spoiled("simulated", failing)]
    with PrivateSuperLink() as superlink:  # it simulates two nodes
        overrides = f"overrides={json.dumps(' '.join(words))}"
        run_id = superlink.flwr("run", str(project), CONNECTION, "-c", overrides)["run-id"]
        assert wait_for_end(superlink, run_id) == "finished:completed"
    assert superlink.processes.running() == []
    inline = run_inline(*ADAPTERS, spoiled("inline", failing))
    for each in (path, inline):
        check_failures(each, failing, 30)
    assert digest_of(path) == digest_of(inline)
    assert {p.name for p in path.iterdir()} == {p.name for p in inline.iterdir()} - {"log.txt"}


# kill -9


ROUNDS = 8


@pytest.fixture
def start_run(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Return a function that starts tools.run with a home and a temporary folder of its own."""
    with starting_runs(tmp_path) as start, (tmp_path / "said.txt").open("wb") as said:
        yield partial(start, stdout=said, stderr=said)


@pytest.mark.slow
def test_a_project_killed_in_a_round_and_while_starting_ends_in_the_undisturbed_bytes_and_its_stores_verify(
    start_run: Callable[..., subprocess.Popen[str]], tmp_path: Path, project: Path, run_inline: Run
) -> None:
    words = (
        *(*SHORT, "clients=36", f"num_rounds={ROUNDS}", f"evaluate.every={ROUNDS}", "strategy.fraction_evaluate=0.1"),
        *("strategy.fraction_train=0.8", "strategy.server_optimizer=fedavgm", "strategy.server_momentum=0.1"),
    )
    command = (*words, "run_name=killed", "deployment.workers=2")
    draw, path = random.Random(0), tmp_path / "runs" / "killed"
    metrics = path / "metrics.jsonl"
    for kill in range(2):
        process = start_run(*command, *(["resume=true"] if kill else []), cwd=project)
        if kill:
            time.sleep(draw.uniform(0, 2))
        else:
            wait_for(lambda: metrics.exists() and '"kind": "round"' in metrics.read_text(), SECONDS)
            time.sleep(draw.uniform(0, 0.5))
        assert process.poll() is None, (tmp_path / "said.txt").read_text()
        shared = in_shared_memory(left_running(tmp_path))
        process.kill()
        process.wait()
        wait_for(lambda: not left_running(tmp_path))
        assert not shared & set(os.listdir("/dev/shm"))
    run_inline(*words, f"home={tmp_path}", "run_name=killed", "resume=true")
    assert digest_of(path) == digest_of(run_inline(*words))
    assert [line["round"] for line in read_lines(path, "train")] == list(range(1, ROUNDS + 1))
    assert checkpoints(["verify", str(tmp_path / "checkpoints")]) == 0
    wait_for(lambda: {each.name for each in (tmp_path / "tmp").iterdir()} <= PYTORCHS, SECONDS)
