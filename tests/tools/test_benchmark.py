"""The benchmark's table shows the verdict on each ratio, even when a topic fails; nothing is measured here."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.html_page import report_on
from tests.support.run_files import write_run
from tests.tools.conftest import Refusal
from tools import benchmark, report
from tools.bench import Row, bytes
from tools.benchmark import describe_machine

GOOD, NEAR, BAD = Row("a", "b", 2.0, 2), Row("near", "b", 1.7, 2, note="noisy"), Row("bad", "<b>", 1.6, 2)


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., list[Row]]], None]:
    """Return a function that puts rows() in a topic's place."""
    monkeypatch.setattr(benchmark, "in_own_process", benchmark.rows_of)
    return lambda name, rows: monkeypatch.setitem(sys.modules, f"tools.bench.{name}", SimpleNamespace(rows=rows))


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (GOOD, "met"),
        (NEAR, "within limit"),
        (BAD, "MISSED"),
        (Row("", "", 1.0, 1, False), "met"),
        (Row("", "", 1.19, 1, False), "within limit"),
        (Row("", "", 1.21, 1, False), "MISSED"),
        (Row("", "", 150.0, 200, limit=150), "within limit"),
        (Row("", "", 149.0, 200, limit=150), "MISSED"),
        (Row("", "", None, 1), "not measured"),
    ],
)
def test_a_verdict_follows_from_ratio_target_limit_and_direction(row: Row, verdict: str) -> None:
    assert row.verdict == verdict
    assert row.passed == (verdict in ("met", "within limit"))


def test_the_table_shows_ratio_target_limit_and_verdict(
    topic: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    topic("lora", lambda: [NEAR, Row("bytes", "all", 0.5, 1, False, " ms"), Row("none", "-", None, 3)])
    assert benchmark.main(["lora"]) == 1
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[-4:]] == [
        "what against ratio target limit verdict note",
        "near b 1.70x 2x 1.67x within limit noisy",
        "bytes all 0.50 ms at most 1 ms at most 1.2 ms met",
        "none - - 3x 2.5x not measured",
    ]


def test_a_missed_limit_or_a_topic_that_raises_fails_and_the_others_keep_their_rows(
    topic: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> list[Row]:
        raise RuntimeError("no disk\nis left")

    topic("bytes", lambda: [GOOD])
    for rows, status in ((lambda: [NEAR], 0), (lambda: [BAD], 1), (fail, 1)):
        topic("lora", rows)
        assert benchmark.main(["lora", "bytes", "--json", str(tmp_path / "out.json")]) == status
    assert capsys.readouterr().err.splitlines()[:2] == ["lora ...", "lora: 0 s"]
    failed, kept = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (failed["what"], failed["verdict"]) == ("all of `lora`", "not measured")
    assert failed["note"] == "RuntimeError: no disk is left"
    assert (kept["what"], kept["verdict"]) == ("a", "met")


def test_all_runs_every_topic_and_its_json_has_machine_seconds_and_rows(
    topic: Callable[..., None], tmp_path: Path
) -> None:
    for name in benchmark.TOPICS:
        topic(name, lambda name=name: [Row(name, "b", 2.0, 2)])
    assert benchmark.main(["all", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found) == ["machine", "seconds", "rows"]
    assert found["machine"].keys() == describe_machine().keys()
    assert {"processor", "cores usable", "memory", "GPU", "python", "torch", "flwr", "date"} <= found["machine"].keys()
    assert tuple(row["what"] for row in found["rows"]) == benchmark.TOPICS
    assert found["rows"][0].items() >= {"ratio": 2.0, "target": 2, "verdict": "met", "higher_is_better": True}.items()
    assert found["rows"][0]["limit"] == pytest.approx(2 / 1.2)


def test_words_that_cannot_be_followed_are_refused_before_anything_is_measured(
    topic: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topic("bytes", lambda: pytest.fail("measured"))
    for words, message in (
        (["bytes", "--json", str(tmp_path / "none" / "out.json")], "does not exist: make it first"),
        (["simulation", "bytes", "--short"], "bytes has no short form: leave out --short"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(words)
        assert message in capsys.readouterr().err
    topic("simulation", lambda short=False: [GOOD if short else BAD])
    assert (benchmark.main(["simulation", "--short"]), benchmark.main(["simulation"])) == (0, 1)


def test_every_topic_exists_and_is_a_module_of_its_own() -> None:
    folder = Path(benchmark.__file__).parent / "bench"
    helpers = {"__init__", "usage", "bare", "stock"}
    assert {path.stem for path in folder.glob("*.py")} - helpers == set(benchmark.TOPICS)


def test_bytes_are_those_of_the_tensors_that_travel() -> None:
    """Of vit_tiny, adapters and head of each rule, counted from the model itself; an array has 128 bytes of header."""
    from flapp.config.load import compose
    from flapp.model.lora import lora_state_dict
    from flapp.server.run import initial_model

    words = ("model=vit_tiny", "model.image_size=32", "dataset.augment=false")
    fedit, ffa, rolora = bytes.rows(*words)
    model = initial_model(compose([*bytes.WORDS, *words]))
    state = lora_state_dict(model)
    sizes = {part: sum(t.nbytes + 128 for k, t in state.items() if k.endswith(part)) for part in ("_A", "_B")}
    head = sum(t.nbytes + 128 for k, t in state.items() if ".lora_" not in k)
    a, b = sizes["_A"] + head, sizes["_B"] + head
    assert fedit.note.startswith(f"{a + b - head:,} of ")
    assert ffa.note.startswith(f"{b:,} of ")
    assert rolora.note.startswith(f"{b:,} and {a:,} in turn of ")
    whole = sum(t.nbytes + 128 for k, t in model.state_dict().items() if ".lora_" not in k)
    assert fedit.ratio == pytest.approx(whole / (a + b - head))
    assert rolora.ratio == pytest.approx(2 * whole / (a + b))


def test_both_starts_give_a_first_batch_of_the_images_that_were_written(tmp_path: Path) -> None:
    pytest.importorskip("flwr_datasets", reason="the extra `benchmark` is not installed")
    from tools.bench import start

    images = np.random.default_rng(0).integers(0, 256, (start.IMAGES, 28, 28), dtype=np.uint8)
    start.write_theirs(tmp_path / "theirs", images, 3)
    config = start.write_ours(tmp_path, images)
    written = {image.tobytes() for image in images}
    for batch in (start.start_theirs(tmp_path / "theirs", 2), start.start_ours(config, 2)):
        start.assert_batch(batch)
        pixels = ((batch.numpy() * 0.5 + 0.5) * 255).round().astype(np.uint8)
        assert len({image.tobytes() for image in pixels} & written) == start.BATCH


def test_without_its_package_a_row_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (row,) = benchmark.rows_of("start")
    assert row.verdict == "not measured"
    assert row.note == "no datasets: pip install -e '.[benchmark]'"


def test_the_report_shows_the_table_and_the_machine(topic: Callable[..., None], tmp_path: Path) -> None:
    topic("lora", lambda: [GOOD, NEAR, BAD, Row("none", "-", None, 3, note="no disk")])
    benchmark.main(["lora", "--json", str(tmp_path / "out.json")])
    run = write_run(tmp_path / "runs" / "one", rounds=2)
    page = report_on(tmp_path / "page.html", run, "--benchmark", tmp_path / "out.json")
    assert page.open == []
    assert "near b 1.70x 2x 1.67x within limit noisy bad <b> 1.60x 2x 1.67x MISSED" in page.said
    assert "none - - 3x 2.5x not measured no disk" in page.said
    assert describe_machine()["processor"] in page.said
    verdicts = ('"status finished">met', '"status unfinished">within', '"status failed">MISSED', '"status failed">not')
    assert all(verdict in page.html for verdict in verdicts)


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{"what": 1}]}', '{"rows": [], "machine": {}}'])
def test_a_file_that_is_not_a_benchmark_is_refused_in_one_line(content: str, tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "out.json").write_text(content)
    run = write_run(tmp_path / "runs" / "one", rounds=2)
    error = refusal(report.main, run, "--out", tmp_path / "page.html", "--benchmark", tmp_path / "out.json")
    assert "out.json is not a file of tools.benchmark: " in error
    assert not (tmp_path / "page.html").exists()


def test_a_topic_is_measured_in_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    (row,) = benchmark.in_own_process("nowhere")
    assert row.note == "ModuleNotFoundError: No module named 'tools.bench.nowhere'"
    assert "tools.bench.nowhere" not in sys.modules
    assert capfd.readouterr().err.startswith("nowhere ...")
