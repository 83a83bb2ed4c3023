"""The same settings end in the same bytes in every runtime, also when clients fail and when the run is killed."""

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Error, Message

from flapp.config.load import compose, to_json
from flapp.messages import TRAIN, HeldArray
from tests.conftest import read_lines
from tests.support.commands import PYTORCHS, SECONDS, in_shared_memory, left_running, starting_runs
from tests.support.replies import Federate
from tests.support.waiting import wait_for, wait_for_end
from tools.deployment import submit
from tools.deployment.superlink import CONNECTION, PrivateSuperLink

Run = Callable[..., Path]
TOY = ("experiment=toy_regression", "partition.min_size=1", "num_rounds=2", "evaluate.every=2", "checkpoint=off")
WIDE = (*TOY, "clients=70")  # in groups of 4
LORA = (
    *("experiment=digits_fedlora", "model.pretrained=null", "model=vit_tiny", "num_rounds=2", "evaluate.every=2"),
    *("train.epochs=1", "train.steps=1", "partition=iid", "partition.min_size=1", "evaluate.personal_epochs=0"),
    *("strategy.fraction_evaluate=0.1", "checkpoint=recent", "checkpoint.on_error=fail", "model.image_size=16"),
)


def digest_of(path: Path) -> str:
    summary = json.loads((path / "metrics.json").read_text())
    assert summary["status"] == "finished"
    return str(summary["model_sha256"])


@pytest.fixture(scope="module")
def compose_run(data_home: Path) -> Callable[..., Any]:
    """Return a function that composes settings of a run with a name of its own, over the home of all tests."""
    numbers = iter(range(1000))
    return lambda *words: compose([f"home={data_home}", f"run_name=runtimes-{next(numbers)}", *words])


@pytest.fixture(scope="module")
def run_inline(compose_run: Callable[..., Any]) -> Run:
    """Return a function that runs settings with deployment=inline and returns the run's folder."""

    def run(*words: str, workers: int = 2) -> Path:
        return Path(submit.run_once(compose_run(*words, f"deployment.workers={workers}"))["run_dir"])

    return run


@pytest.fixture(scope="module")
def superlink() -> Iterator[PrivateSuperLink]:
    """Return a SuperLink for all simulations."""
    with PrivateSuperLink() as superlink:
        yield superlink
    assert superlink.processes.running() == []


def flwr_run(superlink: PrivateSuperLink, path: Path, *words: str) -> Path:
    """Have `flwr run` run the app from another folder, wait until it has ended, and return the run's folder."""
    run_id = superlink.flwr("run", str(submit.APP), CONNECTION, *words)["run-id"]
    assert wait_for_end(superlink, run_id) == "finished:completed"
    return path


@pytest.fixture
def simulate(superlink: PrivateSuperLink, compose_run: Callable[..., Any], tmp_path: Path) -> Run:
    """Return a function that runs settings in Ray with so many nodes and returns the run's folder."""

    def run(*words: str, nodes: int) -> Path:
        settings = compose_run(*words, "deployment=simulation")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(submit, "count_messages", lambda _: nodes)
            size = submit.simulation_words(settings)
        file = tmp_path / f"{settings.run_name}.toml"
        file.write_text(f"config-json = {json.dumps(to_json(settings))}\n")
        path = settings.runs_dir / settings.run_name
        return flwr_run(superlink, path, "-c", str(file), "--federation-config", size)

    return run


# One settings file, one SHA-256


@pytest.fixture(scope="module")
def wide(run_inline: Run) -> Path:
    """Return the folder of WIDE, run without workers."""
    return run_inline(*WIDE, workers=0)


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(run_inline: Run, wide: Path) -> None:
    assert digest_of(run_inline(*WIDE, workers=3)) == digest_of(wide)


@pytest.mark.slow
def test_flwr_run_with_its_two_nodes_gives_the_same_bytes_and_files(
    superlink: PrivateSuperLink, data_home: Path, wide: Path
) -> None:
    words = " ".join([*WIDE, f"home={data_home}", "run_name=runtimes-plain"])
    path = flwr_run(superlink, data_home / "runs" / "runtimes-plain", "-c", f'overrides="{words}"')
    assert digest_of(path) == digest_of(wide)
    assert {p.name for p in path.iterdir()} == {p.name for p in wide.iterdir()} - {"log.txt"}


def test_an_array_over_a_models_numbers_travels_as_a_plain_array() -> None:
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
def test_one_failing_client_in_ten_is_named_and_the_others_give_the_same_bytes(
    run_inline: Run, spoiled: Callable[[str, set[str]], str], federate: Federate
) -> None:
    words = (*TOY, "clients=50", "checkpoint=recent", "checkpoint.on_error=fail")  # in groups of 3
    failing = {str(i) for i in range(3, 50, 10)}
    path = run_inline(*words, spoiled("failing", failing))
    check_failures(path, failing, 45)

    def silence(name: str, reply: Message) -> Message:
        is_left_out = name in failing and reply.metadata.message_type == TRAIN
        return Message(Error(code=1, reason="left"), reply_to=reply) if is_left_out else reply

    without, _ = federate(*words, "checkpoint=off", tamper=silence)
    assert digest_of(path) == without["model_sha256"]


@pytest.mark.slow
def test_adapters_in_groups_with_failing_clients_are_the_same_bytes_inline_and_simulated(
    run_inline: Run, simulate: Run, spoiled: Callable[[str, set[str]], str]
) -> None:
    words = (*LORA, "clients=33", "strategy.aggregation=flora")  # whose groups send each client's tensors
    failing = {"3", "13", "23"}
    simulated = simulate(*words, spoiled("simulated", failing), nodes=3)
    inline = run_inline(*words, spoiled("inline", failing))
    for path in (simulated, inline):
        check_failures(path, failing, 30)
    assert digest_of(simulated) == digest_of(inline)


# kill -9


KILLS, ROUNDS = 3, 15


@pytest.fixture
def start_run(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Return a function that starts tools.run with a home and a temporary folder of its own."""
    with starting_runs(tmp_path) as start, (tmp_path / "said.txt").open("wb") as said:
        yield partial(start, stdout=said, stderr=said)


@pytest.mark.slow
def test_a_run_killed_three_times_at_random_moments_ends_in_the_undisturbed_bytes(
    start_run: Callable[..., subprocess.Popen[str]], tmp_path: Path, run_inline: Run
) -> None:
    words = (
        *(*WIDE, f"num_rounds={ROUNDS}", f"evaluate.every={ROUNDS}", "train.steps=10", "train.momentum=0.9"),
        *("strategy.fraction_train=0.8", "strategy.server_optimizer=fedavgm", "strategy.server_momentum=0.5"),
    )
    command = (*words, "run_name=killed", "deployment.workers=2")
    draw, path = random.Random(0), tmp_path / "runs" / "killed"
    metrics = path / "metrics.jsonl"

    def trained() -> int:
        return metrics.read_text().count('"kind": "train"') if metrics.exists() else 0

    for kill in range(KILLS):
        before = trained()
        process = start_run(*command, *(["resume=true"] if kill else []))
        if kill == 1:  # also while it is starting
            time.sleep(draw.uniform(0, 2))
        else:
            wait_for(lambda: process.poll() is not None or trained() > before, SECONDS)  # noqa: B023
            time.sleep(draw.uniform(0, 0.2))
        assert process.poll() is None, (tmp_path / "said.txt").read_text()
        shared = in_shared_memory(left_running(tmp_path))
        process.kill()
        process.wait()
        wait_for(lambda: not left_running(tmp_path))
        assert not shared & set(os.listdir("/dev/shm"))
    run_inline(*words, f"home={tmp_path}", "run_name=killed", "resume=true")
    assert digest_of(path) == digest_of(run_inline(*words))
    assert [line["round"] for line in read_lines(path, "train")] == list(range(1, ROUNDS + 1))
    wait_for(lambda: {each.name for each in (tmp_path / "tmp").iterdir()} <= PYTORCHS, SECONDS)
