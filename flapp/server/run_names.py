"""Which folder of home/runs a run may have: a new one, or that of a failed start of its name.

A run that ended before its first round was complete is a failed start. The next start of its name replaces its folder,
all but log.txt, whatever the settings of either.
"""

import shutil
from pathlib import Path
from typing import Any

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.config.schema import Config, ConfigError
from flapp.server.metric_lines import read_line, sound_summary
from flapp.server.run_lock import METRICS, held_lock
from flapp.untrusted import read_json

STORE = "server_chunks.db"


def taken(config: Config) -> str:
    """Say that a new run cannot have the name it asks for."""
    path = config.runs_dir / config.run_name
    return f"run_name={config.run_name} is taken: {path} exists; choose another name, or set resume=true to continue it"


def restarts(config: Config) -> bool:
    """Say whether the name of this run is that of a failed start, whose folder the new start replaces."""
    return config.resume_from is None and is_failed_start(config.runs_dir / config.run_name)


def is_failed_start(path: Path) -> bool:
    """Say whether a run ended before its first round was complete. A run that is still running did not."""
    if not is_run(path):
        return False
    try:
        with held_lock(path) as held:
            return held and _has_no_round(path)
    except (OSError, ValueError):
        return False  # a folder that we may not write, or a file that is damaged


def check_new(config: Config) -> Path:
    """Return the folder that a new run will have; raises ConfigError when it is taken, or inside another run's."""
    path = config.runs_dir / config.run_name
    if path.exists() and not restarts(config):
        fix = f"{path} exists and is not a run (a sweep's folder has runs inside): choose another name"
        raise ConfigError(taken(config) if is_run(path) else f"run_name={config.run_name} is taken: {fix}")
    for outer in path.parents[: len(Path(config.run_name).parts) - 1]:
        if is_run(outer):
            raise ConfigError(
                f"run_name={config.run_name} lies inside the folder of run {outer.relative_to(config.runs_dir)}, "
                "which writes and removes files there: choose another name"
            )
    return path


def is_run(path: Path) -> bool:
    return (path / "config.yaml").exists()


def _has_no_round(path: Path) -> bool:
    """Say whether no file in the folder of a run tells of a complete round."""
    summary = path / "metrics.json"
    if summary.exists() and sound_summary(read_json(summary))[0].get("status") != "failed":
        return False
    if any((path / name).exists() for name in ("model.safetensors", "releases.jsonl")):
        return False  # what clients have released privately is counted for ever
    lines = [parse(text) for text in (path / METRICS).read_text().splitlines(keepends=True)]
    if any(line.get("kind") == "round" or line.get("round", 0) > 1 for line in lines if line is not None):
        return False
    if not (path / STORE).exists():
        return not lines  # it was killed before it made one; otherwise the store was taken away
    try:
        with ChunkManager(path / STORE, create=False) as store:
            return not store.rounds()
    except CheckpointError:
        return False


def put_in_place(made: Path, path: Path, config: Config) -> None:
    """Give the folder of a new run its name; a failed start of that name is removed, and leaves its log.txt.

    Raises ConfigError when something else has that name by now.
    """
    if not path.exists():
        made.rename(path)
        return
    with held_lock(path) as held:
        if not held or not _has_no_round(path):
            raise ConfigError(taken(config))
        if (path / "log.txt").exists():
            shutil.copy(path / "log.txt", made)
        old = made.with_name(made.name.replace(".new-", ".old-"))
        path.rename(old)
        made.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def parse(text: str) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, or None when it was torn off or is not a line of a run."""
    try:
        return read_line(text) if text.endswith("\n") else None
    except ValueError:
        return None
