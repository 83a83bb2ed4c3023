"""The command that resumes a run, in the words that the user gave."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from flapp.checkpoint import CheckpointError, ChunkManager
from tools.page.reading import STORE

REPLACED = ("run_name=", "resume=", "resume_from=")


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


def run_command() -> str:
    """Return how runs are started here: flapp run, unless python -m tools.run was the command."""
    return "flapp run" if Path(sys.argv[0]).name.startswith("flapp") else "python -m tools.run"


def resume_command(words: Sequence[str], run_name: str) -> str:
    """Return the command that resumes a run (or sweep) which was started with `words`."""
    kept = [word for word in words if not word.startswith(REPLACED)]
    return f"{run_command()} {shlex.join([*kept, f'run_name={run_name}', 'resume=true'])}"


def advice(words: Sequence[str], run_name: str, done: int) -> str:
    """Say how to go on with a run whose last complete round is `done`."""
    if done:
        return f"rounds 1 to {done} are kept; resume with: {resume_command(words, run_name)}"
    return f"no round was complete; to start again: {run_command()} {shlex.join(words)}".rstrip()
