"""The progress of a run: bars of rounds and replies on a terminal, JSON lines if asked for, otherwise plain lines."""

import json
import os
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flapp.config.load import compose
from flapp.config.schema import Config, ConfigError
from tests.conftest import read_lines
from tests.support.commands import Terminal
from tests.support.run_files import lines_of, write_lines
from tools import run
from tools.running.progress import FORMAT, Progress, RoundReader, take_format, watched

TOY = ("experiment=toy_regression", "num_rounds=3", "evaluate.every=2")


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return compose([f"home={tmp_path}", "run_name=watched", *TOY])


@pytest.fixture
def folder(settings: Config) -> Path:
    """Return the empty folder of the run that is watched."""
    path = settings.runs_dir / settings.run_name
    path.mkdir(parents=True)
    return path


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Return the lines of a run of three rounds, the first of which was not evaluated."""
    written = (line for line in lines_of(3, 3, 0, seed=0) if (line["kind"], line["round"]) != ("evaluate", 1))
    return [f"{json.dumps(line)}\n" for line in written]


@pytest.fixture(autouse=True)
def as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the format that others may have left."""
    monkeypatch.setenv(FORMAT, "text")


def write_rounds(folder: Path, *trained: dict[str, Any]) -> None:
    """Write a round for each of these lines about its training."""
    rounds = [({"kind": "train", "loss": 0.5} | train, {"kind": "round", "seconds": 0.5}) for train in trained]
    write_lines(folder, (line | {"round": number} for number, lines in enumerate(rounds, 1) for line in lines))


def look_at(settings: Config, folder: Path) -> str:
    """Show all rounds of a run as new, and return the bar of rounds."""
    with Progress(settings, settings.runs_dir / "none") as progress:
        progress.reader.path = folder / "metrics.jsonl"
        progress.look()
        return str(progress.rounds)


@pytest.mark.parametrize(
    ("words", "left", "form"),
    [
        (["run", "seed=1"], ["run", "seed=1"], "text"),
        (["run", "--format", "json", "-m", "seed=1"], ["run", "-m", "seed=1"], "json"),
        (["run", "seed=1", "--format=json"], ["run", "seed=1"], "json"),
        (["run", "--format=text", "seed=1"], ["run", "seed=1"], "text"),
    ],
)
def test_the_format_is_taken_out_of_the_command_line_and_others_are_refused(
    monkeypatch: pytest.MonkeyPatch, words: list[str], left: list[str], form: str
) -> None:
    monkeypatch.setenv(FORMAT, "json")
    take_format(words)
    assert [word for word in words if not word.startswith("hydra.")] == left
    assert os.environ[FORMAT] == form

    for wrong in (["--format"], ["--format", "yaml"], ["--format="]):
        with pytest.raises(ConfigError, match=r"--format=(yaml)? is not known: choose one of text, json"):
            take_format(wrong)


def test_a_growing_file_is_read_a_round_at_a_time_also_when_lines_are_dropped(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    reader, found = RoundReader(path), []
    for character in range(0, len("".join(lines)), 97):
        path.write_text("".join(lines)[:character])
        found += reader.read()
    path.write_text("".join(lines))
    found += reader.read()
    assert [values["round"] for values in found] == [1, 2, 3]

    ends = [number for number, line in enumerate(lines, 1) if json.loads(line)["kind"] == "round"]
    path.write_text("".join(lines[: ends[0] + 1]))  # round 1, and the training of round 2
    reader = RoundReader(path)
    assert len(reader.read()) == 1
    path.write_text("".join(lines[: ends[0]]))  # what a resumed run keeps
    assert reader.read() == []
    path.write_text("".join([*lines[: ends[0]], lines[0], *lines[ends[0] :]]))  # a roster, and round 2 anew
    assert [values["round"] for values in reader.read()] == [2, 3]


def test_json_lines_say_what_each_round_reached(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: Config,
    folder: Path,
    lines: list[str],
) -> None:
    (folder / "metrics.jsonl").write_text("".join(lines))
    monkeypatch.setenv(FORMAT, "json")
    with Progress(settings, folder) as resumed:
        resumed.look()
    assert capsys.readouterr() == ("", "")
    look_at(settings, folder)
    said, errors = capsys.readouterr()
    assert errors == ""
    found = [json.loads(line) for line in said.splitlines()]
    assert [(line["event"], line["run_name"], line["round"]) for line in found] == [
        ("round", "watched", number) for number in (1, 2, 3)
    ]
    assert found[0]["loss"] is None
    train, evaluated, ended = (read_lines(folder, kind) for kind in ("train", "evaluate", "round"))
    assert [line["loss"] for line in found[1:]] == [line["loss"] for line in evaluated]
    assert [line["train_loss"] for line in found] == [line["loss"] for line in train]
    assert [line["seconds"] for line in found] == [line["seconds"] for line in ended]
    assert found[1]["failures"] == {"2": "sent no reply in time"}
    assert found[1]["bytes_down"] == train[1]["bytes_down"] + evaluated[0]["bytes_down"]


def test_without_a_terminal_each_round_is_one_line(
    capsys: pytest.CaptureFixture[str], settings: Config, folder: Path, lines: list[str]
) -> None:
    with Progress(settings, folder) as progress:
        (folder / "metrics.jsonl").write_text("".join(lines))
        progress.look()
        progress.look()
    out, said = capsys.readouterr()
    assert out == ""
    train = r"train loss \d+\.\d{4}"
    figures = {1: train, 2: rf"{train}, test loss \d+\.\d{{4}}", 3: rf"{train}, test loss \d+\.\d{{4}}"}
    expected = [rf"round {number} of 3: {found}, \d+\.\d s" for number, found in figures.items()]
    expected.insert(2, "round 2 left out client 2: sent no reply in time")
    assert all(re.fullmatch(*pair) for pair in zip(expected, said.splitlines(), strict=True))


@pytest.mark.parametrize("bars", [False, True])
def test_clients_that_a_round_leaves_out_are_named_with_the_reason_until_others_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: Config, folder: Path, bars: bool
) -> None:
    failures = [{}, {"1": "sent no reply in time"}, {"1": "sent no reply in time"}, {}, {"0": "NaN", "2": "NaN"}]
    if bars:
        monkeypatch.setattr(sys, "stderr", Terminal())
    failed = [[{"client": client, "reason": reason} for client, reason in each.items()] for each in failures]
    write_rounds(folder, *({"failures": each} for each in failed))
    look_at(settings, folder)
    said = sys.stderr.getvalue() if isinstance(sys.stderr, Terminal) else capsys.readouterr().err
    told = re.findall(r"round \d+ left out .*", said)
    assert told == ["round 2 left out client 1: sent no reply in time", "round 5 left out clients 0, 2: NaN"]


def test_clients_that_a_robust_average_clips_or_does_not_take_are_named_until_others_are(
    capsys: pytest.CaptureFixture[str], settings: Config, folder: Path
) -> None:
    found = [{}, {"clipped": {"1": 0.1}}, {"clipped": {"1": 0.3}}, {}, {"left_out": ["0", "1", "2"]}]
    write_rounds(folder, *found)
    look_at(replace(settings, strategy=replace(settings.strategy, robust="krum")), folder)
    said = capsys.readouterr().err
    assert re.findall(r".* clipped .*|.*not take.*", said) == [
        "round 2 clipped client 1",
        "round 5: krum did not take clients 0 to 2",
    ]


@pytest.mark.parametrize(
    ("rounds", "told"), [(20, [*range(1, 21)]), (21, [*range(2, 21, 2), 21]), (1000, [*range(50, 1001, 50)])]
)
def test_a_long_run_prints_about_twenty_lines(
    capsys: pytest.CaptureFixture[str], settings: Config, folder: Path, rounds: int, told: list[int]
) -> None:
    write_lines(folder, ({"kind": "round", "round": number, "seconds": 0.5} for number in range(1, rounds + 1)))
    look_at(replace(settings, num_rounds=rounds), folder)
    assert capsys.readouterr().err.splitlines() == [f"round {number} of {rounds}: 0.5 s" for number in told]


def test_bars_show_rounds_with_figures_and_the_replies_of_the_phase(
    monkeypatch: pytest.MonkeyPatch, settings: Config, folder: Path, lines: list[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(settings, folder) as progress:
        progress.look()
        assert "waiting for clients" in str(progress.replies)
        tell = {"rounds": 3, "asked": 3}
        (folder / "progress.json").write_text(json.dumps({"round": 0, "phase": "join", "replies": 2, **tell}))
        progress.look()
        assert "clients join: 2/3" in str(progress.replies)
        (folder / "metrics.jsonl").write_text("".join(lines[:-2]))  # round 3 has not been evaluated
        (folder / "progress.json").write_text(json.dumps({"round": 3, "phase": "train", "replies": 1, **tell}))
        progress.look()
        assert "round 3 train: 1/3" in str(progress.replies)
        assert " 2/3 " in str(progress.rounds)
        written = [json.loads(line) for line in reversed(lines[:-2])]
        train, test = (next(line["loss"] for line in written if line["kind"] == kind) for kind in ("train", "evaluate"))
        sent = sum(line.get("bytes_up", 0) + line.get("bytes_down", 0) for line in written if line["round"] < 3)
        figures = f"train loss={train:.4f}, test loss={test:.4f}, all bytes={sent / 1000:.0f}kB"
        assert figures in str(progress.rounds)


def test_epsilon_so_far_is_in_json_lines_in_plain_lines_and_beside_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: Config, folder: Path
) -> None:
    write_rounds(folder, {"epsilon": 3.0741})
    look_at(settings, folder)
    assert capsys.readouterr() == ("", "round 1 of 3: train loss 0.5000, epsilon 3.074, 0.5 s\n")
    monkeypatch.setenv(FORMAT, "json")
    look_at(settings, folder)
    assert json.loads(capsys.readouterr().out)["epsilon"] == 3.0741
    monkeypatch.setenv(FORMAT, "text")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert "epsilon=3.074" in look_at(settings, folder)


def test_the_last_lines_say_epsilon_whose_it_is_and_that_seeded_noise_is_for_experiments() -> None:
    summary = {"rounds": 3, "seconds": 1.0, "loss": 1.0, "model_sha256": "ab", "run_dir": "/r", "selected_round": 3}
    spent = {"epsilon": 7.99936, "delta": 1e-5}

    def line(**more: object) -> str:
        text = run.final_line(summary | {"stopped_early": False} | spent | more)
        return next(each for each in text.splitlines() if each.startswith("epsilon"))

    assert line() == "epsilon 7.999 (delta 1e-05) for the client that released the most updates"
    assert line(privacy="central", privacy_noise="secure") == "epsilon 7.999 (delta 1e-05)"
    assert "seeded noise, for experiments only" in line(privacy="central", privacy_noise="seeded")


def test_the_last_round_is_shown_before_an_error_of_the_run_goes_on(
    capsys: pytest.CaptureFixture[str], settings: Config, folder: Path
) -> None:
    def fail() -> None:
        with watched(settings, before=()):
            write_rounds(folder, {})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "round 1 of 3" in capsys.readouterr().err
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_a_resumed_run_is_not_shown_what_the_earlier_start_said(
    monkeypatch: pytest.MonkeyPatch, settings: Config, folder: Path, lines: list[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    (folder / "metrics.jsonl").write_text("".join(lines[:3]))
    (folder / "progress.json").write_text(json.dumps({"round": 2, "phase": "train", "replies": 1, "asked": 3}))
    with Progress(settings, folder) as progress:
        progress.look()
        assert "waiting for clients" in str(progress.replies)
        assert " 1/3 " in str(progress.rounds)


def test_the_last_lines_say_that_a_run_stopped_early_and_whose_model_it_ends_with() -> None:
    summary = {"rounds": 3, "seconds": 12.3, "loss": 1.25, "model_sha256": "ab", "run_dir": "/r", "stopped_early": True}
    text = "finished 3 rounds (stopped early) in 12 s: test loss 1.2500\nmodel /r/model.safetensors"
    assert run.final_line(summary | {"selected_round": 3}).startswith(
        f"{text} (of the last round, sha256 ab)\nresults in /r\n"
    )
    assert run.final_line(summary | {"selected_round": 2}).startswith(
        f"{text} (of round 2, sha256 ab)\nresults in /r\n"
    )
