"""The benchmark of simulations measures what it says: the same work everywhere, and all processes of a run."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file

from tests.support.waiting import wait_for
from tools.bench import bare, simulation, stock, usage
from tools.bench.simulation import NO_EVALUATION, Workload, cnn, linear
from tools.bench.usage import CommandError, ProcessTree, Usage, count_lines, watch

BURN = "import time\nwhile time.process_time() < 0.6: pass\n"
DIGITS = ("experiment=digits_fedavg", "clients=12", "strategy.fraction_train=0.17", "checkpoint=off", "train.epochs=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda home: cnn(home, 4, 2, 1), 1e-6),
        (lambda home: linear(home, 6, 3, 1), 1e-6),
        # AdamW makes much of the smallest gradients' rounding.
        (lambda home: Workload("digits", home, DIGITS, 1), 2e-3),
    ],
    ids=["W1", "W2", "W3"],
)
def test_the_bare_loop_ends_with_the_model_that_flapp_ends_with(
    make: Callable[[Path], Workload], tolerance: float, data_home: Path, federate: Callable[..., Any], tmp_path: Path
) -> None:
    workload = make(data_home)
    _, path = federate(*workload.words, *NO_EVALUATION, f"num_rounds={workload.rounds}")
    work, ends = bare.read_work(workload.work()), tmp_path / "ends"
    start, final, ours = load_file(work.start), bare.run(work, ends), load_file(path / "model.safetensors")
    assert len(ends.read_text().splitlines()) == workload.rounds == 3
    for key, tensor in final.items():
        torch.testing.assert_close(tensor, ours[key], rtol=0, atol=tolerance)
    assert max((final[key] - start[key]).abs().max() for key in final) > 10 * tolerance


def test_a_client_of_the_stock_app_trains_as_the_bare_loop_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # no message is made without them
    stock.write_app(tmp_path / "app")
    path = linear(tmp_path, 6, 3, 1).work()
    work = bare.read_work(path)
    state = load_file(work.start)
    monkeypatch.syspath_prepend(tmp_path / "app")
    for name in ("stock", "stock.app", "stock.bare", "stock.networks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from stock.app import client  # type: ignore[import-not-found]

    content = RecordDict({"arrays": ArrayRecord(state), "config": ConfigRecord({"server-round": 2})})
    context = Context(1, 1, {"partition-id": 4, "num-partitions": 6}, RecordDict(), {"work": str(path)})
    reply = client(Message(content, dst_node_id=1, message_type="train"), context)
    model = sys.modules["stock.app"].build(work)
    model.load_state_dict(state)
    bare.train_client(model, work, bare.load_data(work), 4, 2)
    returned = reply.content["arrays"].to_torch_state_dict()
    assert all(torch.equal(tensor, returned[key]) for key, tensor in model.state_dict().items())
    assert reply.content["metrics"]["num-examples"] == 10


def test_the_cpu_time_of_children_and_of_processes_that_have_ended_counts(tmp_path: Path) -> None:
    script = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {BURN!r} + 'time.sleep(1)'])"
    command = f"{script}; open({str(tmp_path / 'done')!r}, 'w'); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", command]) as process:
        tree = ProcessTree(process.pid)
        wait_for(lambda: tree.cpu() >= 0.6, 60)
        wait_for((tmp_path / "done").exists, 60)
        assert tree.cpu() >= 0.6
        tree.kill()
    assert tree.cpu() >= 0.6


@pytest.mark.slow
def test_a_watched_command_is_measured_between_its_first_round_and_the_last_but_one(tmp_path: Path) -> None:
    ends = tmp_path / "ends"
    command = (
        "import time\n"
        f"file = open({str(ends)!r}, 'a', buffering=1)\n"
        "for seconds in (0.5, 0.2, 0.2, 0.5):\n"
        "    end = time.process_time() + seconds\n"
        "    while time.process_time() < end: pass\n"
        "    print('end', file=file)\n"
        "    time.sleep(0.3)\n"
    )
    used = watch([sys.executable, "-c", command], ends, b"end", 4, 60)
    assert 0.1 < used.cpu < 0.4
    assert used.wall > used.cpu
    assert used.start > 0.4
    assert used.pss > 1 << 20


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("raise SystemExit('error: no disk')", "it was to finish 4 rounds, but ended with status 1: error: no disk"),
        ("print('only this')", "it was to finish 4 rounds, but ended with status 0: only this"),
        ("import time; time.sleep(60)", "the command had finished 0 of 4 rounds after 2 s: raise LIMIT_SECONDS"),
    ],
)
def test_a_command_without_its_rounds_is_an_error_that_says_why(
    command: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "KILL_SECONDS", 1)  # what a shell starts in the background ignores interrupts
    with pytest.raises(CommandError, match=f"^{error}$"):
        watch([sys.executable, "-c", command], tmp_path / "ends", b"end", 4, 2)


def test_a_line_counts_once_it_is_whole(tmp_path: Path) -> None:
    path, mark = tmp_path / "lines", b'"round"'
    assert count_lines(path, mark) == 0
    for text, count in (('{"round"', 0), ("}\n{}\n", 1), ('{"round"}\n{"round"}\n', 3), ("", 3)):
        with path.open("a") as file:
            file.write(text)
        assert count_lines(path, mark) == count


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Put made-up figures in the place of every run, and return the runs of each way."""
    runs: dict[str, list[str]] = {"bare": [], "stock": [], "flapp": []}

    def use(way: str, used: Usage) -> Callable[..., Usage]:
        def run(work: Workload, *runtime: str) -> Usage:
            runs[way].append(work.name)
            return used

        return run

    for way, cpu in (("bare", 2.0), ("stock", 8.0), ("flapp", 3.0)):
        monkeypatch.setattr(Workload, f"run_{way}", use(way, Usage(10 * cpu, cpu, cpu, 1 << 30)))
    monkeypatch.setattr(simulation, "cnn", lambda home, *_: Workload("w1", home, (), 1))
    monkeypatch.setattr(simulation, "linear", lambda home, *_, **__: Workload("w2", home, (), 1))
    monkeypatch.setattr(simulation, "line_bytes", lambda *_: 5000.0)
    return runs


def test_every_row_names_what_is_compared_and_has_a_ratio_and_a_target(measured: dict[str, list[str]]) -> None:
    rows = simulation.rows()
    assert [(row.what, row.against, row.ratio, row.target) for row in rows] == [
        ("W1, inline, 10 of 1,000 clients, 1 worker", "bare PyTorch loop", 1.5, 1.10),
        ("W1, inline, 10 of 1,000 clients, 2 workers", "bare PyTorch loop", 1.5, 1.15),
        ("W1, inline, 10 of 1,000 clients, 2 workers, wall time", "1 worker", 1.0, 0.65),
        ("W1, inline, 10 clients, privacy=central, wall time", "privacy=none", 1.0, 1.10),
        ("W2, inline, 50 of 1,000 clients, 1 worker", "bare PyTorch loop", 1.5, 1.25),
        ("W2, inline, 50 of 1,000 clients: metrics.jsonl per client and round", "-", 100.0, 150),
        ("W3, inline, 10 clients with stores, 1 worker", "bare PyTorch loop without stores", 1.5, 1.10),
        ("W1, Ray, 10 of 1,000 clients", "stock Flower", 0.375, 1.0),
        ("W2, Ray, 50 of 1,000 clients", "stock Flower", 0.375, 1.0),
        ("W2, inline, 1,000 clients: command to first round", "stock Flower", 0.375, 0.15),
        ("20 of 10,000 clients, inline", "20 of 100 clients", 1.0, 1.2),
        ("100,000 clients, inline: command to first round", "1,000 clients", 1.0, 3.3),
    ]
    assert not any(row.higher_is_better for row in rows)
    assert "bare 2 s CPU, 2 s, 1024 MiB, first round done after 20.0 s; one worker 3 s CPU" in rows[0].note
    assert measured["stock"] == ["w1", "w2"]


def test_the_short_form_measures_fewer_rows_and_a_run_that_fails_leaves_only_its_own_unmeasured(
    measured: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = simulation.rows(short=True)
    assert rows[0].what == "W1, inline, 4 of 100 clients, 1 worker"
    assert len(rows) == 10
    assert (measured["bare"], measured["stock"]) == (["w1", "w2", "w3"], ["w2"])

    def fail(work: Workload, *runtime: str) -> Usage:
        if runtime == simulation.RAY:
            return Usage(1, 1, 1, 1)
        raise CommandError("it was to finish 3 rounds, but ended with status 1: no such runtime")

    monkeypatch.setattr(Workload, "run_flapp", fail)
    ratios = {row.what: row.ratio for row in simulation.rows(short=True)}
    assert [what for what, ratio in ratios.items() if ratio is not None] == ["W2, Ray, 50 of 100 clients"]
    notes = {row.note for row in simulation.rows(short=True) if row.ratio is None}
    assert notes == {"it was to finish 3 rounds, but ended with status 1: no such runtime"}


def test_the_growth_of_metrics_jsonl_leaves_out_the_first_and_the_last_round(tmp_path: Path) -> None:
    work = Workload("w2", tmp_path, (), 2)
    (tmp_path / "w2-1").mkdir()
    lines = [f'{{"round": {number}, "kind": "{"x" * 10 * number}"}}\n' for number in range(5)]
    (tmp_path / "w2-1" / "metrics.jsonl").write_text("".join(lines))
    assert simulation.line_bytes(tmp_path, work) == (len(lines[2]) + len(lines[3])) / 2


def test_ways_run_in_turn_and_their_medians_count() -> None:
    order, cpu = [], {"bare": [1, 9, 2], "ours": [5, 4, 30]}

    def run(name: str) -> Usage:
        order.append(name)
        return Usage(1, cpu[name].pop(), 1, 1)

    found = simulation.in_turns(3, **{name: partial(run, name) for name in cpu})
    assert order == ["bare", "ours"] * 3
    assert (found["bare"].cpu, found["ours"].cpu) == (2, 5)
