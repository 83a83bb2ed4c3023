"""The command that resumes a run, in the words that the user gave."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from tools.page.reading import STORE
from tools.running.called import as_called

RUN = "python -m tools.run"
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


def resume_command(words: Sequence[str], run_name: str) -> str:
    """Return the command that resumes a run (or sweep) which was started with `words`."""
    kept = [word for word in words if not word.startswith(REPLACED)]
    return as_called(f"{RUN} {shlex.join([*kept, f'run_name={run_name}', 'resume=true'])}")


def advice(words: Sequence[str], run_name: str, done: int, is_interrupted: bool) -> str:
    """Say how to continue a run whose last complete round is `done`: after a failure, once its cause is removed."""
    if done:
        once = "" if is_interrupted else "once that is fixed, "
        return f"rounds 1 to {done} are kept; {once}resume with: {resume_command(words, run_name)}"
    if not is_interrupted:
        return f"no round was complete; run_name={run_name} can be used again once that is fixed"
    return as_called(f"no round was complete; to start again: {RUN} {shlex.join(words)}".rstrip())
