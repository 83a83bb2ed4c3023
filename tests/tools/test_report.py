"""The report shows runs in one page that needs no other file, and names what it has not found."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.html_page import Page, report_on, write_sweep
from tests.support.run_files import MODEL_BYTES, add_lines, add_store, change_train, lines_in, write_lines, write_run
from tests.tools.conftest import Refusal
from tools import report
from tools.page import reading, several
from tools.page.charts import compare
from tools.page.drawing import PALETTE
from tools.page.markup import tag


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with a whole run, its stores and those of its clients."""
    home = tmp_path_factory.mktemp("home")
    run = write_run(home / "runs" / "whole", rounds=6, clients=4)
    add_store(run / "server_chunks.db", 6)
    for client in range(4):
        add_store(home / "checkpoints" / "whole" / f"client_{client}" / f"client_{client}_chunks.db", 6)
    add_lines(run, {"kind": "stop", "round": 6, "time": 7, "metric": "accuracy", "best_round": 5, "patience": 1})
    return home


@pytest.fixture(scope="module")
def whole(home: Path) -> Page:
    return report_on(home / "whole.html", home / "runs" / "whole", drawn=True)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a sweep of three runs and a job that failed."""
    folder = tmp_path_factory.mktemp("sweep")
    out = folder / "sweep.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(several, "MOST_DRAWN", 1)
        report_on(out, write_sweep(folder / "runs" / "three", jobs=3), drawn=True)
    return out


def adjoining(*heads: str) -> str:
    """Return these heads of columns of numbers as they stand in a table."""
    return "".join(tag("th", head, class_="right") for head in heads)


def test_a_page_needs_nothing_else_and_describes_every_picture(whole: Page, sweep: Path) -> None:
    for page in (whole, Page(sweep)):
        assert page.open == []
        assert [url for url in page.fetched if not url.startswith("data:")] == []
        assert len(page.alts) > 10
        assert all(re.search(r"\d", alt) for alt in page.alts)
        assert not re.search(r"url\((?!#)|@import", page.html)


def test_a_whole_run_is_shown_from_curves_to_digests(whole: Page) -> None:
    pictures = " ".join(whole.alts)
    for title in (
        *("Accuracy. global", "Loss. global", "Accuracy over clients", "Samples by client and class"),
        *("Bytes of a round", "Bytes so far", "Time by phase", "The server's store"),
    ):
        assert title in pictures
    assert "on the server" not in pictures
    for words in ("best, selected", "configure", "aggregate", "The phases add up to 99.0% of", "patience is 1"):
        assert words in whole.said
    assert "m" * 64 in whole.said
    assert "c" * 64 in whole.said
    assert "not recorded" in whole.said.partition("source")[2]


def test_every_colour_follows_light_and_dark(sweep: Path) -> None:
    style, _, body = sweep.read_text().partition("</style>")
    assert not [light for light in PALETTE.values() if light in body]
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", style + body))
    assert {"--c0", "--ink", "--page", "--bad"} <= used
    for name in used:
        assert style.count(f"{name}:#") == 2, name


def test_nothing_is_written_into_what_is_reported(home: Path, tmp_path: Path) -> None:
    def state() -> list[tuple[str, int, str]]:
        files = sorted(path for path in home.rglob("*") if path.is_file())
        return [(str(f), f.stat().st_mtime_ns, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]

    before = state()
    report_on(tmp_path / "out.html", home / "runs" / "whole")
    assert state() == before


def test_stores_are_added_up_and_opened_stores_are_counted_if_only_some_are_opened(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = reading.read_run(home / "runs" / "whole")
    assert run.server is not None
    assert (run.server.rounds, run.server.logical_bytes, run.server.stored_bytes) == (2, 80_000, 60_000)
    assert run.homes is not None
    assert (run.homes.files, run.homes.opened, run.homes.rounds) == (4, 4, 8)
    monkeypatch.setattr(reading, "STORES_OPENED", 2)
    sampled = reading.read_run(home / "runs" / "whole").homes
    assert sampled is not None
    assert (sampled.files, sampled.opened, sampled.file_bytes) == (4, 2, run.homes.file_bytes)


def test_a_run_that_has_only_a_config_says_what_it_lacks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "empty", rounds=1, status=None)
    for file in ("metrics.jsonl", "clients.jsonl"):
        (run / file).unlink()
    page = report_on(tmp_path / "empty.html", run)
    for words in (
        *("No round has begun", "metrics.jsonl cannot be read", "Nothing has been evaluated", "No bytes are recorded"),
        *("No times are recorded", "store is not in the run", "model not recorded"),
    ):
        assert words in page.said
    assert page.alts == []


def test_a_crashed_run_shows_its_error_first_its_log_last_and_the_lines_that_are_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "crashed", rounds=3, classes=0, status="failed")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines[: lines.rindex("{") + 30])
    (run / "log.txt").write_text("the beginning\n" + "\x1b[91mline\x1b[0m\n" * 100 + "ValueError: <x>\n")
    page = report_on(tmp_path / "crashed.html", run)
    assert page.said.index("1 of 3 clients gave") < page.said.index("Summary")
    assert "ValueError: <x>" in page.said.partition("Digests")[2]
    assert "\x1b" not in page.said
    assert "the beginning" not in page.said
    assert "was cut off" in page.said


def test_a_running_run_says_where_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "running", rounds=2, classes=0, status=None)
    progress = {"round": 3, "rounds": 9, "phase": "train", "replies": 1, "asked": 4}
    (run / "progress.json").write_text(json.dumps(progress))
    page = report_on(tmp_path / "running.html", run)
    assert "still running, or it was killed. progress.json: round 3 of 9, train, 1 of 4 replies" in page.said
    assert "The data have no classes" in page.said
    assert "metrics.jsonl was last written at" in page.said


def test_a_run_of_an_older_flapp_is_shown_with_what_it_does_not_record(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "old", rounds=3, old=True)
    page = report_on(tmp_path / "old.html", run)
    for words in (
        "Only the times of training and evaluation",
        "No growth by round",
        "samples of each client and class",
    ):
        assert words in page.said
    assert "names no best round" in page.said
    assert "Time by phase. Medians: train 0.5, evaluate 0.5" in page.alts


def test_a_resumed_run_is_read_through_all_its_starts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "resumed", rounds=4, classes=0)
    lines = lines_in(run)
    again = lines[0] | {"round": 2, "refused": {"9": "is <not> known"}, "warnings": {"1": "odd"}}
    write_lines(run, [*lines[:7], again, *lines[7:]])
    read = reading.read_run(run)
    assert read.series("train", "loss")[0].tolist() == [1, 2, 3, 4]
    page = report_on(tmp_path / "resumed.html", run)
    for words in ("Resumed after round 2.", "is <not> known", "let in with a warning"):
        assert words in page.said


def test_names_and_errors_of_runs_are_text_not_markup(tmp_path: Path) -> None:
    name = "<script>alert('$x$')</script>"
    run = write_run(tmp_path / "runs" / "r", rounds=2, classes=0, status="failed", run_name=name)
    for file in ("metrics.jsonl", "clients.jsonl"):
        (run / file).write_text((run / file).read_text().replace('"0"', json.dumps(name)))
    summary = json.loads((run / "metrics.json").read_text()) | {"error": f"client {name} & <b>"}
    (run / "metrics.json").write_text(json.dumps(summary))
    page = report_on(tmp_path / "r.html", run)
    assert page.said.count(name) >= 5
    assert "alert('$x$')</script>" not in page.html


def test_several_runs_are_compared_in_what_they_differ(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "runs" / name, 3, 3, 4, old=True, train={"lr": lr}, model={"name": name})
        for name, lr in (("vit_tiny", 0.1), ("cnn", 0.5))
    ]
    page = report_on(tmp_path / "two.html", *runs)
    section = page.said.partition("Differences")[2].partition("Time of a round")[0]
    assert section.split() == ["setting", "A", "B", "model.name", "vit_tiny", "cnn", "train.lr", "0.1", "0.5"]
    assert any(alt.startswith("Accuracy. A ") and "; B " in alt for alt in page.alts)
    per_megabyte = 0.9 / (3 * 3 * 3 * MODEL_BYTES / 1e6)
    assert page.said.count(f"{per_megabyte:.3g}") == 2
    overview = page.said.partition("Runs")[2].partition("Side by side")[0]
    assert "run settings name model status" in overview
    assert "clients 3" in overview


def test_the_summary_names_model_dataset_clients_and_strategy(tmp_path: Path) -> None:
    settings = {
        "model": {"name": "vit_tiny", "image_size": 28},
        "lora": {"enabled": True, "rank": 4},
        "partition": {"kind": "dirichlet"},
        "strategy": {"name": "fedlora", "aggregation": "fedit", "fraction_train": 0.25},
    }
    runs = [write_run(tmp_path / "runs" / str(seed), 1, 8, 4, seed=seed, **settings) for seed in (0, 1)]
    said = report_on(tmp_path / "one.html", runs[0]).said.partition("Summary")[2]
    for words in (
        "model vit_tiny at 28 pixels with adapters of rank 4",
        "dataset made (dirichlet)",
        "clients 8, 25% in a round",
        "strategy fedlora, fedit",
    ):
        assert words in said
    assert "strategy fedlora, fedit" in report_on(tmp_path / "two.html", *runs).said


def test_an_objective_without_a_column_of_its_own_gets_one(tmp_path: Path) -> None:
    for objective, heads in (("val_accuracy", ["loss", "objective", "best round"]), ("loss", ["loss", "best round"])):
        runs = [
            write_run(tmp_path / objective / str(seed), 1, 3, 4, seed=seed, evaluate={"objective": objective})
            for seed in (0, 1)
        ]
        assert adjoining("personal", *heads) in several.overview(reading.read_all(runs)[0])


def test_legends_name_the_settings_in_which_runs_differ_or_else_the_runs(tmp_path: Path) -> None:
    settings = [(0, 0.1, True), (0, 0.5, True), (1, 0.5, False)]
    runs = [
        write_run(tmp_path / "runs" / f"r{i}", 2, 3, 4, seed=seed, partition={"seed": seed}, train={"lr": lr, "x": x})
        for i, (seed, lr, x) in enumerate(settings)
    ]
    accuracy = compare(reading.read_all(runs)[0])[0]
    (legend,) = accuracy.figure.legends
    for name in ("A (seed=0, lr=0.1, x=true)", "B (seed=0, lr=0.5, x=true)", "C (seed=1, lr=0.5, x=false)"):
        assert f"{name} " in accuracy.alt
        assert name in [text.get_text() for text in legend.get_texts()]
    runs = [write_run(tmp_path / "runs" / name, 2, 3, 4) for name in ("mine", "other")]
    alt = compare(reading.read_all(runs)[0])[0].alt
    assert ". A (mine) " in alt
    assert "; B (other) " in alt


def test_refused_and_capped_clients_and_ignored_changes_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=3, clients=3)
    for number in (1, 2, 3):
        change_train(run, number, capped={"1": 0.5 + number / 10}, update_norm=2.5, client_ranks={"2": 3})
    add_lines(run, {"kind": "refused", "round": 3, "time": 4.0, "refused": {"node 7": "has an <odd> key"}})
    add_lines(run, {"kind": "resumed_anyway", "round": 2, "time": 4.0, "changed": ["source digest was 1, is 2"]})
    page = report_on(tmp_path / "r.html", run)
    head, left_out = page.said.partition("Summary")[0], page.said.partition("Left out")[2].partition("Digests")[0]
    assert "Resumed anyway after round 2, though this had changed: source digest was 1, is 2." in head
    assert "Clients or nodes refused: 1." in head
    assert "node 7 has an <odd> key" in left_out
    assert "capped claimed share of the samples rounds 1 80.0% 1 to 3" in left_out
    assert any(alt.startswith("Length of updates. median 2.5 at 1") for alt in page.alts)
    assert "accuracy personal rank training s failures" in page.said


@pytest.mark.parametrize("name", ["norm_bound", "multi_krum"])
def test_clients_that_a_robust_average_clipped_or_did_not_take_are_shown(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=3, clients=3, strategy={"name": "fedavg", "robust": name})
    for number in (1, 2, 3):
        clipped = {"1": 0.5 / number} | ({"2": 0.25} if number == 3 else {})
        left_out = ["0", "2"] if number == 2 else ["2"]
        change_train(run, number, **({"clipped": clipped} if name == "norm_bound" else {"left_out": left_out}))
    left_out = report_on(tmp_path / "r.html", run).said.partition("Left out")[2].partition("Digests")[0]
    if name == "norm_bound":
        assert "clipped times smallest factor rounds 1 3 0.167 1 to 3 2 1 0.25 3" in left_out
    else:
        assert "not taken by multi_krum times rounds 2 3 1 to 3 0 1 2" in left_out
    assert "No client failed" not in left_out


def test_the_privacy_that_was_spent_is_in_the_summary_and_in_the_overview_of_runs_that_have_one(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs" / name, 3, 3, seed=seed) for seed, name in enumerate(("private", "plain"))]
    for number in (1, 2, 3):
        change_train(runs[0], number, epsilon=1.25 * number)
    add_lines(runs[0], {"kind": "stop", "round": 3, "time": 7, "metric": "epsilon", "value": 3.75, "budget": 4.0})
    said = [report_on(tmp_path / "one.html", run).said for run in runs]
    assert "epsilon 3.75" in said[0].partition("Summary")[2]
    assert "Stopped early after round 3: epsilon is 3.75, one more round would exceed 4" in said[0]
    assert "epsilon" not in said[1]
    private, plain = reading.read_all(runs)[0]
    assert adjoining("loss", "epsilon", "best round") in several.overview([private, plain])
    assert "epsilon" not in several.overview([plain, plain])


def test_a_run_without_lines_has_refusals_and_changes_of_its_summary(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=1)
    (run / "metrics.jsonl").unlink()
    told = {"refused": {"4": "runs other source"}, "refused_count": 25}
    told["resumed_anyway"] = [{"round": 1, "changed": ["client 0: shard digest was a, is b"]}]
    (run / "metrics.json").write_text(json.dumps(json.loads((run / "metrics.json").read_text()) | told))
    said = report_on(tmp_path / "r.html", run).said
    changed = "after round 1, though this had changed: client 0: shard digest"
    assert all(words in said for words in ("refused: 25.", "runs other source", changed))


def test_only_the_first_runs_have_figures_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "MOST_DRAWN", 0)
    runs = [write_run(tmp_path / "runs" / str(i), 2, 2, 0, seed=i) for i in range(9)]
    page = report_on(tmp_path / "nine.html", *runs)
    assert "Only the first 0 runs have figures" in page.said
    assert not [words for words in ("No bytes", "No growth", "No times", "are not recorded") if words in page.said]
    best = min(runs, key=lambda run: reading.read_run(run).final("loss") or 0)
    assert f"only the best by its objective, run {'ABCDEFGHI'[runs.index(best)]}, has a colour" in page.said


def test_a_sweep_shows_its_settings_and_the_jobs_that_failed(sweep: Path) -> None:
    page = Page(sweep)
    assert "train.lr=-1 must be > 0 <b>" in page.said
    assert "1 of 4 jobs failed" in page.said
    for key in ("seed", "train.lr"):
        assert any(alt.startswith(f"Accuracy by {key}. Medians") for alt in page.alts)
    assert not any("run_name" in alt for alt in page.alts)


@pytest.mark.slow
def test_pictures_are_exported_as_png(tmp_path: Path) -> None:
    from PIL import Image

    run = write_run(tmp_path / "runs" / "r", rounds=1)
    report_on(tmp_path / "r.html", run, "--png", tmp_path / "png")
    found = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert {"accuracy.png", "loss.png", "classes.png", "phases.png", "bytes.png", "store.png"} <= set(found)
    with Image.open(tmp_path / "png" / "accuracy.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0] == 255).all()
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_other_files_and_folders_are_refused_in_one_line(tmp_path: Path, refusal: Refusal) -> None:
    run = write_run(tmp_path / "runs" / "r", rounds=1, classes=0)
    (tmp_path / "nothing").mkdir()
    for arguments, reason in (
        ([tmp_path / "nothing"], "is neither a run nor a folder of runs"),
        ([tmp_path / "absent"], "is not a folder"),
        ([run / "config.yaml"], "is not a folder"),
        ([run, "--out", tmp_path / "no" / "out.html"], "/no does not exist: make it first"),
    ):
        assert reason in refusal(report.main, *arguments)


@pytest.mark.slow
def test_60_rounds_of_1000_clients_are_rendered(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "big", rounds=60, clients=1000, classes=62)
    page = report_on(tmp_path / "big.html", run, drawn=True)
    assert "Each row is the sum of up to 10 of the 1,000 clients" in page.said
    assert "20 of 1,000 clients" in page.said
    assert len(page.html) < 500_000
