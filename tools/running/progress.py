"""Show the progress of a run: bars on a terminal, otherwise plain lines, or JSON lines with --format json.

Every JSON line has `event` and `run_name` (null if an error ended the whole command, or came before the run had a
name), and:

    started    rounds, and what the run is about to do: see running/overview.py
    round      round, rounds, train_loss; loss, accuracy, personal_accuracy (null unless evaluated); scores by name;
               bytes_up, bytes_down and seconds of this round; failures, the reason for each client that was left out;
               with strategy.robust, if any: clipped (factors by client), left_out (clients that Krum did not take);
               with privacy, epsilon so far; with privacy.publish=totals, in place of what names clients,
               failure_kinds (how many clients for each kind of reason), clipped_count and left_out_count
    finished   summary: what metrics.json says
    failed     error; summary, or null if the run wrote none
"""

import argparse
import json
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flapp.config.schema import Config, ConfigError
from flapp.files import Stamp, stamp
from flapp.listing import by_kind, by_reason, name_clients
from flapp.server.summary import in_short, read_line
from flapp.untrusted import printable
from flapp.untrusted import read_json as parse_file

FORMAT, FORMATS = "FLAPP_FORMAT", ("text", "json")  # in the environment, for a launcher's other processes too
HYDRA_TO_STDERR = "hydra.hydra_logging.handlers.console.stream=ext://sys.stderr"
CONFIG, LOOK_SECONDS = ("config.yaml",), 0.3
MOST_LINES = 20  # for a whole run without bars
MOST_REASONS = 3  # of the clients that a round left out
STARTING, COUNTING = "{desc}[{elapsed}]", "{desc}{n_fmt}/{total_fmt} |{bar}|"


def take_format(words: list[str]) -> None:
    """Take --format out of a command line, for this process and those it starts; raises ConfigError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--format", nargs="?", const="", default=FORMATS[0])
    given, words[:] = parser.parse_known_args(words)
    if given.format not in FORMATS:
        raise ConfigError(f"--format={given.format} is not known: choose one of {', '.join(FORMATS)}")
    os.environ[FORMAT] = given.format
    if is_json():
        words.append(HYDRA_TO_STDERR)


def is_json() -> bool:
    """Return whether stdout is for JSON lines only."""
    return os.environ.get(FORMAT) == "json"


def announce(event: str, run_name: str | None, **values: Any) -> None:
    """Print an event as a JSON line with --format json, otherwise nothing."""
    if is_json():
        print(json.dumps({"event": event, "run_name": run_name, **values}), flush=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if there is no file; raises ValueError when it is damaged."""
    try:
        values = parse_file(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({printable(error)}): restore it from a copy, or remove it") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object: restore it from a copy, or remove it")
    return values


class RoundReader:
    """Read metrics.jsonl round by round as it grows; `current` has the lines of the round that is not complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.current: list[dict[str, Any]] = []
        self._offset = 0  # end of the last complete round: later lines are dropped when the run is resumed

    def read(self, last_round: int | None = None) -> list[dict[str, Any]]:
        """Return the figures of the rounds that have ended since the last call, up to last_round if it is given."""
        ended: list[dict[str, Any]] = []
        self.current = []
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._offset)
            for text in file:
                if not text.endswith(b"\n"):
                    break
                try:
                    line = read_line(text)
                except ValueError:
                    break  # a resumed run cuts the file there
                if last_round is not None and line["round"] > last_round:
                    break
                self.current.append(line)
                if self.current[-1]["kind"] == "round":
                    ended.append(figures(self.current))
                    self.current, self._offset = [], file.tell()
        return ended


def figures(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures in the lines of a round. A missing loss, accuracy or time is None; missing bytes are 0."""
    number = lines[-1]["round"]
    kinds = {line["kind"]: line for line in lines if line["round"] == number}
    train, evaluated = kinds.get("train", {}), kinds.get("evaluate", {})
    return {
        "round": number,
        "train_loss": train.get("loss"),
        **({"epsilon": train["epsilon"]} if "epsilon" in train else {}),
        **{key: evaluated.get(key) for key in ("loss", "accuracy", "personal_accuracy")},
        "scores": evaluated.get("scores", {}),
        **{key: train.get(key, 0) + evaluated.get(key, 0) for key in ("bytes_up", "bytes_down")},
        "seconds": kinds.get("round", {}).get("seconds"),
        **_left_out((train, evaluated)),
        **{key: train[key] for key in ("clipped", "left_out", "clipped_count", "left_out_count") if key in train},
    }


def _left_out(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return which clients a round left out and why; with privacy.publish=totals, only how many for each kind."""
    kinds = Counter[str]()
    for phase in phases:
        kinds.update(phase.get("failure_kinds", {}))
    if any("failure_kinds" in phase for phase in phases):
        return {"failure_kinds": dict(kinds)}
    return {"failures": {each["client"]: each["reason"] for phase in phases for each in phase.get("failures", ())}}


def latest(found: dict[str, Any]) -> dict[str, str]:
    """Return the losses, the accuracy and the user's own scores of a round, as people read them."""
    values = {"train loss": found["train_loss"], "test loss": found["loss"], "accuracy": found["accuracy"]}
    shown = {key: f"{value:.4f}" for key, value in values.items() if value is not None}
    spent = {"epsilon": f"{found['epsilon']:.4g}"} if found.get("epsilon") is not None else {}
    return shown | spent | in_short(found["scores"])


class Progress:
    """Show the progress of a run at each `look`: bars of rounds and replies on a terminal, otherwise lines.

    Up to 20 rounds have a line each. A longer run prints 11 to 20 lines. plain: print lines on a terminal too, because
    a debugger may ask for input there.
    """

    def __init__(self, config: Config, path: Path, plain: bool = False) -> None:
        self.config, self.path = config, path
        self.reader = RoundReader(path / "metrics.jsonl")
        earlier = self.reader.read(config.resume_from)  # by an earlier start
        self.stale = read_json(path / "progress.json")
        self.bytes = sum(found["bytes_up"] + found["bytes_down"] for found in earlier)
        self.shown: dict[str, str] = {}
        self.told: dict[str, Any] = {}  # of the last round: who failed, and whom its robust average clipped or left out
        off = True if plain or is_json() else None
        done = earlier[-1]["round"] if earlier else 0
        common: dict[str, Any] = {"disable": off, "file": sys.stderr, "dynamic_ncols": True}
        self.rounds = tqdm(total=config.num_rounds, initial=done, unit="round", desc="rounds", **common)
        self.replies = tqdm(total=0, desc="starting", bar_format=STARTING, leave=False, **common)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.replies.close()
        self.rounds.close()

    def look(self) -> None:
        """Show what is new since the last look."""
        for found in self.reader.read():
            announce("round", self.config.run_name, rounds=self.config.num_rounds, **found)
            self.bytes += found["bytes_up"] + found["bytes_down"]
            self._show_figures(found, refresh=False)
            self.rounds.update(found["round"] - self.rounds.n)
            self.rounds.refresh()
            number, rounds = found["round"], self.config.num_rounds
            is_told = number % ceil(rounds / MOST_LINES) == 0 or number == rounds
            if self.rounds.disable and not is_json() and is_told:
                values = [f"{key} {value}" for key, value in latest(found).items()] + [f"{found['seconds']:.1f} s"]
                print(f"round {number} of {rounds}: {', '.join(values)}", file=sys.stderr)
            self._tell_failures(found)
            self._tell_bounded(found)
        if self.reader.current:
            self._show_figures(figures(self.reader.current))
        if not self.rounds.disable:
            self._show_replies()

    def _tell_failures(self, found: dict[str, Any]) -> None:
        """Print which clients a round left out and why, or only how many for each kind of reason."""
        failures, kinds = found.get("failures", {}), found.get("failure_kinds", {})
        text = f": {by_kind(kinds)}" if kinds else f" left out {by_reason(failures, MOST_REASONS)}"
        self._tell("failures", kinds or failures, f"round {found['round']}{text}")

    def _tell_bounded(self, found: dict[str, Any]) -> None:
        """Print whom, or only how many, a robust average clipped or left out."""
        clipped = found.get("clipped") or found.get("clipped_count")
        whom = clipped or found.get("left_out") or found.get("left_out_count") or ()
        did = " clipped" if clipped else f": {self.config.strategy.robust} did not take"
        clients = by_kind({"": whom}) if isinstance(whom, int) else name_clients(sorted(whom))
        whom = whom if isinstance(whom, int) else sorted(whom)
        self._tell("bounded", whom, f"round {found['round']}{did} {clients}")

    def _tell(self, what: str, value: Any, text: str) -> None:
        """Print a line about a round, unless its value is empty or the same as that of the round before."""
        if value and value != self.told.get(what) and not is_json():
            tqdm.write(printable(text), file=sys.stderr)
        self.told[what] = value

    def _show_figures(self, found: dict[str, Any], refresh: bool = True) -> None:
        """Show the latest losses, the accuracy and all bytes so far beside the bar of rounds."""
        self.shown |= latest(found)
        self.rounds.set_postfix(self.shown | {"all bytes": tqdm.format_sizeof(self.bytes, "B")}, refresh=refresh)

    def _show_replies(self) -> None:
        now = read_json(self.path / "progress.json")
        if now is None or now == self.stale:
            self.replies.set_description("waiting for clients" if self.path.is_dir() else "starting")
            return
        if self.replies.bar_format == STARTING and now["phase"] != "join":
            self.rounds.unpause()  # so that only rounds count for the time left
        self.replies.bar_format = COUNTING
        self.replies.total, self.replies.n = now["asked"], now["replies"]
        self.replies.set_description(f"round {now['round']} {now['phase']}" if now["round"] else "clients join")


@contextmanager
def watched(config: Config, before: Stamp, plain: bool = False) -> Iterator[None]:
    """Show a run's progress from a thread while the block runs.

    before: the stamp of config.yaml when the command began. A resumed run writes that file again when it has dropped
    the rounds after the one it resumes from; until then the files are those of an earlier start.
    """
    path = config.runs_dir / config.run_name
    progress, ended = Progress(config, path, plain), threading.Event()

    def watch() -> None:
        is_last = False
        with progress:
            while not is_last:
                is_last = ended.wait(LOOK_SECONDS)
                try:
                    if stamp(path, CONFIG) != before:
                        progress.look()
                except Exception as error:  # noqa: BLE001 - watching must not end the run, which may be writing
                    logging.getLogger("flwr").debug("progress: %s", error)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
