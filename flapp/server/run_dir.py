"""The run directory: everything that a run leaves behind, under home/runs/<run_name>; docs/formats.md describes it.

A round is complete when server_chunks.db holds it. A resumed run drops the lines of later rounds and continues. With
resume_from it also drops the rounds after that one, except from log.txt and from the files of releases: what was
released stays counted.
"""

import difflib
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flapp.checkpoint.manager import ChunkManager
from flapp.config.load import config_digest, differences, read_yaml, to_yaml
from flapp.config.schema import Config, ConfigError
from flapp.files import finite, write_json, write_text
from flapp.model.files import save_tensors
from flapp.partitions import class_names
from flapp.server.journals import LOGGER, Origin
from flapp.server.observer import Observer
from flapp.server.releases import check_budget
from flapp.server.run_names import (
    CLASSES,
    RUNNING,
    STORE,
    check_new,
    is_run,
    lock_run,
    name_holder,
    put_in_place,
    restarts,
)
from flapp.server.summary import read_whole_line

if TYPE_CHECKING:
    from torch import Tensor

UNFINISHED, UNFINISHED_SECONDS = ".new-", 600  # a new run's folder until it is complete
SUMMARY = "summary of the run: "  # before metrics.json in the ServerApp's log, for readers without access to the file


class RunDirectory:
    """Write the files of one run; no other process may write there meanwhile."""

    def __init__(self, path: Path, config: Config, run_id: int | None = None) -> None:
        self.path = path
        self.config = config
        self.origin = Origin(path, config)
        self.observer = Observer(path, config, lock_run(path, config.run_name))
        name_holder(path, run_id)
        cut = config.checkpoint
        self.store = ChunkManager(path / STORE, cut.keep_rounds, cut.chunk_bytes, cut.chunk_num)

    @classmethod
    def create(cls, config: Config, run_id: int | None = None) -> "RunDirectory":
        """Make the folder of a new run with its config in it; raises ConfigError when the name is taken."""
        path = check_new(config)
        made: Path | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(path.parent)
            made = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path.parent))
            write_text(made / "config.yaml", to_yaml(config))
            Origin(made, config).record(0)
            if names := class_names(config):
                write_json(made / CLASSES, names)
            made.chmod(0o755)
            put_in_place(made, path, config)  # so that a run's folder always has its config and origin
        except OSError as error:
            found = f"the run directory {path} cannot be made ({error.strerror})"
            raise ConfigError(f"{found}: set home to a folder that you may write") from error
        finally:
            if made:
                shutil.rmtree(made, ignore_errors=True)
        return cls(path, config, run_id)

    @classmethod
    def reopen(cls, config: Config, run_id: int | None = None) -> "RunDirectory":
        """Open the folder of a run, cut back to its last complete round or to resume_from; raises ConfigError.

        A failed start has no round to go back to, and is replaced.
        """
        if restarts(config):
            return cls.create(config, run_id)
        path = check_resumable(config)
        check_source(config)
        run = cls(path, config, run_id)
        done = config.resume_from or run.last_round()
        change, doubt = run.origin.source_change(config.resume_from), run.origin.doubt(config.resume_from)
        run._drop_rounds_after(done)
        (path / "metrics.json").unlink(missing_ok=True)
        if doubt:
            LOGGER.warning("%s", doubt)
        if change:
            run.observer.append("resumed_anyway", done, changed=[change])
        if change or doubt:
            run.origin.record(done)
        write_text(path / "config.yaml", to_yaml(config))
        return run

    def last_round(self) -> int:
        """Return the number of the last complete round, 0 before the first."""
        rounds = self.store.rounds()
        return rounds[-1].round if rounds else 0

    def save_round(
        self, server_round: int, state: "Mapping[str, Tensor | np.ndarray]", facts: Mapping[str, Any]
    ) -> None:
        """Complete a round: store the global model and the facts that the next rounds need; raises CheckpointError."""
        self.observer.enter("save")
        summary = self.observer.summary
        if summary.stops_after(server_round):
            watched, patience = summary.watched, self.config.stopping.patience
            facts_of_stop = {"metric": watched.metric, "best_round": watched.round, "patience": patience}
            self.observer.append("stop", server_round, **facts_of_stop)
        self.observer.sync()
        pinned, digest = {summary.selected_round()}, config_digest(self.config)
        saved = self.store.save_model_chunks(state, server_round, dict(facts), config_digest=digest, pinned=pinned)
        store = {"bytes": self.store.path.stat().st_size, "stored": saved.new_bytes, "total": saved.bytes}
        self.observer.end_round(server_round, store)

    def load_round(self, server_round: int) -> "tuple[dict[str, Tensor], dict[str, Any]]":
        """Return the tensors and facts that were saved with a round."""
        kept = self.store.find_round(server_round)
        if kept is None:
            found = f"{self.store.path} does not hold round {server_round}"
            raise ConfigError(f"{found}: restore a copy, or start a new run")
        if kept.config_digest != config_digest(self.config):
            raise ConfigError(f"{self.store.path} does not belong to the settings in config.yaml: start a new run")
        return self.store.reconstruct_model_from_chunks(server_round), kept.metrics

    def save_model(self, state: "Mapping[str, Tensor]") -> str:
        """Write model.safetensors and return its SHA-256; the same model always gives the same bytes."""
        facts: dict[str, Any] = {"model": self.config.model.name, "shape": self.config.dataset.shape}
        facts |= {"classes": self.config.dataset.classes, **self.config.model.variant.given()}
        return save_tensors(state, self.path / "model.safetensors", **facts)

    def finish(self, model_sha256: str) -> dict[str, Any]:
        """Write metrics.json of a finished run, and return it."""
        summary = self.observer.summary
        values = {"objective": summary.totals.get(summary.best.metric), "model_sha256": model_sha256}
        return self._summarize(status="finished", **values, selected_round=summary.selected_round())

    def fail(self, error: BaseException) -> dict[str, Any]:
        """Write metrics.json of a failed run, and return it."""
        text = " ".join(str(error).split())
        is_plain = isinstance(error, ValueError | RuntimeError) and text
        return self._summarize(status="failed", error=text if is_plain else f"{type(error).__name__}: {text}")

    def close(self) -> None:
        """Close the files and give up the lock."""
        self.store.close()
        (self.path / RUNNING).unlink(missing_ok=True)
        self.observer.close()

    def _summarize(self, **values: Any) -> dict[str, Any]:
        found, seconds = self.observer.summary, self.observer.seconds()
        best = {"objective_metric": found.best.metric, "best_round": found.best.round, "best_value": found.best.value}
        summary = finite({**values, **found.totals, **best, "seconds": seconds, "run_dir": str(self.path)})
        write_json(self.path / "metrics.json", summary)
        self.close()
        return summary

    def _drop_rounds_after(self, server_round: int) -> None:
        """Drop later rounds from the store, metrics.jsonl and the journals of source and clients.

        Raises ConfigError, or CheckpointError for a damaged store, and changes nothing, if that is not possible.
        """
        journals = (self.origin.environment, self.origin.clients)
        try:
            if self.config.resume_from:
                self.load_round(server_round)  # it must be whole before others are dropped
            for journal in journals:
                journal.read(self.config.resume_from)  # a damaged one must be found before anything is cut
            self._drop_lines_after(server_round)
        except ValueError:
            self.close()
            raise
        for journal in journals:
            journal.cut(self.config.resume_from)
        self.store.drop_rounds_after(server_round)

    def _drop_lines_after(self, server_round: int) -> None:
        """Cut metrics.jsonl before the first line of a later round, or the first line that is incomplete.

        Raises ConfigError in three cases: it ends before that round; without resume_from, it has lines beyond the next
        round; with resume_from, the store no longer has the round that the run would select.
        """
        resume_from, summary = self.config.resume_from, self.observer.summary
        written = [(text, read_whole_line(text)) for text in self.observer.texts()]
        newest = max((line["round"] for _, line in written if line is not None), default=0)

        def is_kept(line: Mapping[str, Any]) -> bool:
            """Say whether a line stays: it is of this round or before, and not of a start that resume_from undoes."""
            is_undone = resume_from is not None and line["kind"] in ("roster", "resumed_anyway")
            return bool(line["round"] < server_round + (not is_undone))

        whole = takewhile(lambda pair: pair[1] is not None and is_kept(pair[1]), written)
        kept = [(text, line) for text, line in whole if line is not None]
        last = max((line["round"] for _, line in kept), default=0)
        if (newest > server_round + 1 and not resume_from) or last < server_round:
            found = last if last < server_round else newest
            fix = "restore both from one copy, use resume_from with a round that both have, or start a new run"
            holds = f"{'holds' if resume_from else 'ends with'} round {server_round}"
            raise ConfigError(f"{self.path / STORE} {holds}, metrics.jsonl ends with round {found}: {fix}")
        for _, line in kept:
            summary.add(line)
        if resume_from and not self.store.find_round(selected := summary.selected_round()):
            lost = f"the best round until then was {selected}, which {self.path / STORE} no longer holds"
            raise ConfigError(f"resume_from={server_round}: {lost}: choose a later round")
        self.observer.keep([text for text, _ in kept], kept[-1][1]["time"] if kept else 0.0)


def _remove_unfinished(folder: Path) -> None:
    """Remove the unfinished folders of starts that were killed, except recent ones, which may still be in use."""
    for left in folder.glob(f"{UNFINISHED}*"):
        with suppress(FileNotFoundError):  # another start removes it too
            if time.time() - left.stat().st_mtime > UNFINISHED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def check_resumable(config: Config) -> Path:
    """Return the folder of the run that config.run_name names; raises ConfigError when the run cannot be resumed."""
    path = config.runs_dir / config.run_name
    if not path.is_dir():
        known = [folder.name for folder in config.runs_dir.glob("[!.]*/")]
        near = difflib.get_close_matches(config.run_name, known, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        found = f"resume=true finds no run {config.run_name} in {config.runs_dir}{hint}"
        raise ConfigError(f"{found}: give the run_name of one that exists (python -m tools.runs list)")
    if not is_run(path):
        raise ConfigError(f"run_name={config.run_name} is not a run directory: {path} has no config.yaml")
    if changed := differences(read_yaml(path / "config.yaml"), config):
        fix = f"resume with its original settings (python -m tools.runs show {config.run_name} prints the command)"
        found = f"run_name={config.run_name} was run with other settings ({'; '.join(changed)})"
        raise ConfigError(f"{found}: {fix}, or use a new run_name for these")
    lock_run(path, config.run_name).close()
    if config.resume_from:
        with ChunkManager(path / STORE, create=False) as store:
            held = [kept.round for kept in store.rounds()]
        if config.resume_from not in held:
            listed = ", ".join(map(str, held)) or "none"
            found = f"resume_from={config.resume_from} is not among the rounds that {path / STORE} holds"
            raise ConfigError(f"{found}: choose one of {listed}")
        check_budget(config, path)
    return path


def check_source(config: Config) -> None:
    """Raise ConfigError when the run to be resumed last ran with other source, unless resume_anyway is set."""
    change = Origin(config.runs_dir / config.run_name, config).source_change(config.resume_from)
    if change and not config.resume_anyway:
        fix = "bring that source back, set resume_anyway=true to use this one, or start a new run"
        raise ConfigError(f"run_name={config.run_name} last ran with other source ({change}): {fix}")
