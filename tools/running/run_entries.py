"""Read the runs below home/runs: their names, status, sizes and settings, and the commands that resume them."""

import glob
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.config.load import compose
from flapp.config.schema import ConfigError
from flapp.server.run_names import find_holder
from tools.cli import as_called
from tools.page.reading import METRICS, STORE, flat, read_config, read_json

RUN = "python -m tools.run"
REPLACED = ("run_name=", "resume=", "resume_from=")
BARE = re.compile(r"[A-Za-z_/][A-Za-z0-9_./:-]*")  # needs no quotes in Hydra's grammar
# Settings that are not shown as changed.
OWN = ("home", "run_name", "experiment", "resume", "resume_from", "resume_anyway")


class RunsError(ValueError):
    """A command cannot be done; the message is one line."""


def find_runs(runs: Path) -> list[str]:
    """Return the names of all runs below the folder `runs`, sorted; the jobs of a sweep are sorted by number."""
    found = []
    for folder, below, files in os.walk(runs):
        is_run = "config.yaml" in files
        below[:] = [] if is_run else [name for name in below if not name.startswith(".")]
        if is_run:
            found.append(str(Path(folder).relative_to(runs)))
    return sorted(found, key=lambda name: [part.zfill(9) if part.isdigit() else part for part in name.split("/")])


def describe(home: Path, name: str) -> dict[str, Any]:
    """Return the entry of a run in the list. Sizes are in bytes; `started` is its last start in local time."""
    path = home / "runs" / name
    config, summary = read_config(path / "config.yaml", []), read_json(path / "metrics.json", {})
    begun = path / "environment.jsonl" if (path / "environment.jsonl").exists() else path / "config.yaml"
    ended = 0 if summary.get("status") == "failed" else int(summary.get("rounds") or 0)
    return {
        "name": name,
        "status": "running" if find_holder(path) is not None else str(summary.get("status", "interrupted")),
        "rounds": last_round(path) or ended,
        "num_rounds": int(config.get("num_rounds", 0)),
        "accuracy": summary.get("accuracy"),
        "loss": summary.get("loss"),
        "started": f"{datetime.fromtimestamp(begun.stat().st_mtime):%Y-%m-%d %H:%M}",
        "run_bytes": size_of(path),
        "store_bytes": size_of(home / "checkpoints" / name),
        "split_bytes": sum(file.stat().st_size for file in split_files(config, name)),
    }


def last_round(path: Path) -> int:
    """Return the last complete round in metrics.jsonl, 0 before the first."""
    try:
        lines = (path / METRICS).read_text().splitlines(keepends=True)
    except OSError:
        return 0
    ends = (line for line in reversed(lines) if line.endswith("\n") and '"kind": "round"' in line)
    return int(json.loads(next(ends, '{"round": 0}'))["round"])


def size_of(path: Path) -> int:
    """Return the bytes of all files below a folder, 0 if there is none."""
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def split_files(config: dict[str, Any], name: str) -> list[Path]:
    """List the files of the split model that a run has stored (see flapp.model.StorageManager)."""
    folder = config.get("split.model_storage_dir")
    if not config.get("split.auto_save_split_models") or not folder:
        return []
    begin = glob.escape(f"{name.replace('/', '-')}_{config.get('split.split_config')}_")
    return sorted(Path(folder).glob(f"*/{begin}*"))


def jobs_of(home: Path, name: str) -> list[str]:
    """Return the plain form of the name of a run, or the names of the runs of a sweep.

    Raises RunsError when there are none, or when the name leads out of home/runs.
    """
    parts, runs = PurePosixPath(name).parts, home / "runs"
    if not parts or any(part == "/" or part.startswith(".") for part in parts):
        raise RunsError(f"{name!r} is not the name of a run: give it as `python -m tools.runs list` shows it")
    name = "/".join(parts)
    found = [name] if (runs / name / "config.yaml").is_file() else [f"{name}/{job}" for job in find_runs(runs / name)]
    if not found:
        raise RunsError(f"{name} is not a run in {runs}: see the names with `python -m tools.runs list`")
    return found


def changed_words(path: Path) -> list[str]:
    """Return the settings of a run that differ from the defaults of its experiment, as words of the command line.

    Raises RunsError when they cannot be read.
    """
    notes: list[str] = []
    settings = read_config(path / "config.yaml", notes)
    if notes:
        raise RunsError(f"{path}: {notes[0]}")
    home, words = f"home={word(settings.get('home', str(path)))}", [f"experiment={settings.get('experiment')}"]
    code = settings.get("code")
    try:
        defaults = compose([*words, home], Path(code) if code else None)
    except ConfigError:  # the experiment has settings without defaults, or does not exist any more
        defaults = compose([home])
    plain = flat(json.loads(json.dumps(asdict(defaults))))
    if code:
        plain.pop("code", None)  # the command may be given in any folder
    changed = {key: value for key, value in settings.items() if key not in OWN and value != plain.get(key)}
    return words + [f"{key}={word(value)}" for key, value in changed.items()]


def word(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(word, value))}]"
    text = json.dumps(value) if isinstance(value, bool | None) else str(value)
    is_plain = BARE.fullmatch(text) and text.lower() not in ("null", "true", "false", "inf", "nan")
    if not isinstance(value, str) or is_plain:
        return text
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def complete_rounds(path: Path) -> int:
    """Return the number of the last complete round of the run directory `path`, 0 if there is none."""
    if not (path / STORE).exists():
        return 0
    try:
        with ChunkManager(path / STORE, create=False) as store:
            rounds = store.rounds()
    except CheckpointError:
        return 0
    return rounds[-1].round if rounds else 0


def resume_command(words: Sequence[str], run_name: str) -> str:
    """Return the command that resumes a run or sweep that was started with `words`."""
    kept = [word for word in words if not word.startswith(REPLACED)]
    return as_called(f"{RUN} {shlex.join([*kept, f'run_name={run_name}', 'resume=true'])}")


def advice(words: Sequence[str], run_name: str, done: int, is_interrupted: bool) -> str:
    """Return how to continue a run whose last complete round is `done`."""
    if done:
        once = "" if is_interrupted else "once that is fixed, "
        return f"rounds 1 to {done} are kept; {once}resume with: {resume_command(words, run_name)}"
    if not is_interrupted:
        return f"no round was complete; run_name={run_name} can be used again once that is fixed"
    return as_called(f"no round was complete; to start again: {RUN} {shlex.join(words)}".rstrip())
