"""The report reads run directories correctly, damaged ones too."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.html_page import report_on
from tests.support.run_files import add_lines, add_store, write_lines, write_run
from tools.cli import by_number
from tools.page import reading
from tools.page.charts import by_traffic
from tools.page.drawing import grouped
from tools.page.sections import rounds


def test_the_page_names_stores_that_cannot_be_read_or_are_being_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=1, classes=0, old=True)
    (run / "server_chunks.db").write_bytes(b"no database" * 100)
    assert "Not read: " in report_on(tmp_path / "r.html", run).said
    (run / "server_chunks.db").unlink()
    add_store(run / "server_chunks.db", 1)
    (run / "server_chunks.db-journal").write_bytes(b"hot")
    assert "it has a journal" in report_on(tmp_path / "r.html", run).said
    assert (run / "server_chunks.db-journal").read_bytes() == b"hot"


def test_a_folder_of_runs_without_sweep_json_is_one_of_several_runs(tmp_path: Path) -> None:
    for job in (10, 2):
        write_run(tmp_path / "plain" / str(job), 1, 2, 0, old=True)
    runs, jobs = reading.read_all([tmp_path / "plain"])
    assert ([run.label for run in runs], jobs) == (["2", "10"], [])


def test_odd_files_are_noted_not_fatal(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train"}\nnot json\n[1]\n{"kind": "evaluate", "round": 2, "accuracy": NaN, "loss": "x"}\n')
    (run / "metrics.json").write_text("{")
    (run / "config.yaml").write_text(": :\n- {")
    page = report_on(tmp_path / "r.html", run)
    for words in ("4 lines of metrics.jsonl", "metrics.json cannot be read", "config.yaml cannot be read"):
        assert words in page.said


def test_the_best_round_is_by_the_objective_of_the_run(tmp_path: Path) -> None:
    for objective, best in (("accuracy", 2), ("loss", 1)):
        run = write_run(tmp_path / objective, 3, old=True, evaluate={"objective": objective})
        figures = [{"accuracy": 0.5, "loss": 0.1}, {"accuracy": 0.9, "loss": 0.5}, {"accuracy": 0.7, "loss": 0.3}]
        write_lines(run, [{"kind": "evaluate", "round": i + 1, **found} for i, found in enumerate(figures)])
        assert reading.read_run(run).best() == (best, figures[best - 1][objective])


def test_a_run_with_validation_figures_is_judged_by_them_and_shows_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", 3, evaluate={"objective": "loss"})
    (run / "metrics.json").unlink()
    write_lines(run, [{"kind": "evaluate", "round": i, "loss": 1.0 * i, "val_loss": 4.0 - i} for i in (1, 2, 3)])
    assert reading.read_run(run).best() == (3, 1.0)
    page = report_on(tmp_path / "r.html", run)
    assert "The objective is validation loss. It also decides which round is the best." in page.said


def test_accuracy_is_set_against_all_bytes_up_to_its_round(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", 3, old=True)
    lines = [{"kind": "train", "round": i, "bytes_up": 1_000_000, "bytes_down": 2_000_000} for i in (1, 2, 3)]
    lines.append({"kind": "evaluate", "round": 2, "accuracy": 0.5, "bytes_up": 0, "bytes_down": 4_000_000})
    write_lines(run, lines)
    megabytes, accuracy = by_traffic(reading.read_run(run))
    assert (megabytes.tolist(), accuracy.tolist()) == ([10.0], [0.5])


def test_failures_are_grouped_by_reason(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=1, clients=3)
    failures = [{"client": str(i), "reason": "sent NaN"} for i in range(2)]
    line = {"kind": "train", "failures": failures, "absent": ["2"]}
    add_lines(run, *(line | {"round": server_round} for server_round in (2, 3, 5)))
    found = reading.read_run(run).clients
    failed = found.failures["train", "sent NaN"]
    assert sorted(failed) == [(at, client) for at in (2, 3, 5) for client in ("0", "1")]
    assert found.absent == {"2": 3}
    assert rounds(at for at, _ in failed) == "2, 3, 5"


def test_what_clients_hold_is_read_from_clients_jsonl_or_the_roster_of_an_earlier_version(tmp_path: Path) -> None:
    run = reading.read_run(write_run(tmp_path / "new", rounds=1, clients=12, classes=4))
    assert list(run.roster("samples")) == [str(i) for i in range(12)]
    for name, labels in run.roster("label_hist").items():
        assert run.roster("samples")[name] == {"train": sum(labels), "val": 0, "test": 25}
    path = write_run(tmp_path / "old", rounds=1, clients=2, old=True)
    held = {"samples": {"0": {"train": 5, "val": 1, "test": 2}}, "label_hist": {"0": [2, 3]}}
    write_lines(path, [{"kind": "roster", "round": 0, **held}])
    write_lines(path, [{"round": 0, "client": "0", "shard_digest": "d"}], "clients.jsonl")
    run = reading.read_run(path)
    assert {key: run.roster(key) for key in held} == held
    assert run.notes == ()


def test_lines_of_clients_jsonl_that_are_odd_are_noted_and_replace_nothing(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", rounds=2, clients=2)
    before = reading.read_run(path)
    with (path / "clients.jsonl").open("a") as file:
        file.write('{"kind": "train", "round": 9, "failures": []}\n{"round": 0, "client": 3}\n[]\n{"round": 0, "cl')
    after = reading.read_run(path)
    assert after.lines == before.lines
    cut = "the last line of clients.jsonl was cut off and is left out"
    assert after.notes == (cut, "3 lines of clients.jsonl are not lines of a run and are left out")
    for name in ("metrics.jsonl", "metrics.json"):
        (path / name).unlink()
    assert len(reading.read_run(path).roster("samples")) == 2


@pytest.mark.parametrize(("count", "rows", "together"), [(1000, 100, 10), (250, 84, 3)])
def test_many_clients_are_drawn_as_sums_of_neighbours(count: int, rows: int, together: int) -> None:
    table = np.random.default_rng(0).integers(0, 9, (count, 62)).astype(float)
    found, size = grouped(table, 100)
    assert (found.shape, size) == ((rows, 62), together)
    assert np.array_equal(found[3], table[3 * size : 4 * size].sum(axis=0))
    assert found.sum() == table.sum()


def test_names_are_sorted_by_their_numbers_however_long() -> None:
    names = ["10", "2", "9" * 5000, "007", "site 10", "site 9"]
    assert sorted(names, key=by_number) == ["2", "007", "10", "9" * 5000, "site 9", "site 10"]
