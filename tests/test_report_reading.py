"""What the report reads from run directories is right, also when they are odd."""

import json
from pathlib import Path

import numpy as np

from tests.html_page import report_on
from tests.run_files import add_store, write_run
from tools.page import reading
from tools.page.charts import by_traffic
from tools.page.drawing import grouped
from tools.page.sections import ranges


def test_a_store_that_cannot_be_read_or_is_being_written_is_said_in_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=1, classes=0, old=True)
    (run / "server_chunks.db").write_bytes(b"no database" * 100)
    assert "Not read: " in report_on(tmp_path / "r.html", run).said
    (run / "server_chunks.db").unlink()
    add_store(run / "server_chunks.db", 1)
    (run / "server_chunks.db-journal").write_bytes(b"hot")
    assert "it has a journal" in report_on(tmp_path / "r.html", run).said
    assert (run / "server_chunks.db-journal").read_bytes() == b"hot"


def test_a_folder_of_runs_without_sweep_json_is_one_of_several_runs(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "plain"
    for job in (10, 2):
        write_run(folder / str(job), 1, 2, 0, old=True)
    runs, jobs = reading.read_all([folder])
    assert [run.label for run in runs] == ["2", "10"]
    assert jobs == []


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
        lines = [{"kind": "evaluate", "round": i + 1, **found} for i, found in enumerate(figures)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert reading.read_run(run).best() == (best, figures[best - 1][objective])


def test_a_run_with_validation_figures_is_judged_by_them_and_shows_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", 3, evaluate={"objective": "loss"})
    (run / "metrics.json").unlink()
    lines = [{"kind": "evaluate", "round": i, "loss": 1.0 * i, "val_loss": 4.0 - i} for i in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert reading.read_run(run).best() == (3, 1.0)
    page = report_on(tmp_path / "r.html", run)
    assert "The objective, and what makes a round the best, is validation loss." in page.said


def test_accuracy_is_set_against_all_bytes_up_to_its_round(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", 3, old=True)
    lines = [{"kind": "train", "round": i, "bytes_up": 1_000_000, "bytes_down": 2_000_000} for i in (1, 2, 3)]
    lines.append({"kind": "evaluate", "round": 2, "accuracy": 0.5, "bytes_up": 0, "bytes_down": 4_000_000})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    megabytes, accuracy = by_traffic(reading.read_run(run))
    assert (megabytes.tolist(), accuracy.tolist()) == ([10.0], [0.5])


def test_failures_are_grouped_by_reason(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=1, clients=3)
    for server_round in (2, 3, 5):
        failures = [{"client": str(i), "reason": "sent NaN"} for i in range(2)]
        line = {"kind": "train", "round": server_round, "failures": failures, "absent": ["2"]}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    found = reading.read_run(run).clients
    failed = found.failures["train", "sent NaN"]
    assert (failed.count, failed.rounds, failed.clients) == (6, {2, 3, 5}, {"0", "1"})
    assert found.absent == {"2": 3}
    assert ranges(failed.rounds) == "2-3, 5"


def test_many_clients_are_drawn_as_sums_of_neighbours() -> None:
    table = np.random.default_rng(0).integers(0, 9, (1000, 62)).astype(float)
    rows, together = grouped(table, 100)
    assert (rows.shape, together) == ((100, 62), 10)
    assert np.array_equal(rows[3], table[30:40].sum(axis=0))
    assert rows.sum() == table.sum()
    uneven, together = grouped(table[:250], 100)
    assert (len(uneven), together) == (84, 3)
    assert uneven.sum() == table[:250].sum()
