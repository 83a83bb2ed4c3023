"""The run directory: everything a run leaves behind, under home/runs/<run_name>.

config.yaml        the resolved config
environment.jsonl  the source and the versions that the run began with (origin.py)
clients.jsonl      the data of each client when it first joined (ledger.py)
metrics.jsonl      one line a round and kind (roster, refused, train, evaluate, central, stop, round, resumed_anyway),
                   flushed as it is written; a line `refused` follows whenever the refused clients change; time is in
                   seconds since the run began, without the pauses between its starts
metrics.csv        its numbers, a row a round (metrics_csv.py)
tensorboard/       events, if results.tensorboard is set (tensorboard.py)
progress.json      where the run is now: round, phase, replies; for progress bars
server_chunks.db   the global model after each of the last rounds, and what the server must know to go on from there;
                   after the best round too if evaluate.select is best
running.json       only while a process writes here: its pid and Flower's id of the run (run_lock.py)
releases.jsonl     with privacy.enabled, who was asked to train in which round (releases.py); never cut
model.safetensors  the final global model: of the last round, or of the best one
metrics.json       the summary, written last: status, rounds, accuracy, loss, personal_accuracy (of the clients' test
                   samples), val_accuracy, val_loss, val_personal_accuracy (of their validation samples, if the run
                   has any) and objective, all of the last evaluation or of the selected round; objective_metric (the
                   figure that objective, best_round and best_value are of: evaluate.objective, of validation samples
                   if there are any), best_round, best_value, selected_round, stopped_early, bytes_up, bytes_down,
                   seconds, model_sha256, aggregation_error (FedLoRA, of the last round), epsilon and delta (with
                   privacy.enabled, of the client that has released the most updates), refused (client or node and
                   the reason, the first 20) and refused_count, resumed_anyway (what had changed when the run was
                   resumed with resume_anyway, by round), or status failed and the error

A run that ended before its first round was complete is a failed start: a new start of its name replaces all of it but
log.txt, which tools.run adds to.

A round is over when server_chunks.db holds it. A resumed run drops the lines of rounds that were not, and goes on. With
resume_from it drops the rounds after that one as well, from every file.
"""

import difflib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from logging import WARNING
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flapp.checkpoint.manager import ChunkManager
from flapp.config.load import config_digest, differences, read_yaml, to_yaml
from flapp.config.schema import Config, ConfigError
from flapp.model.files import save_tensors
from flapp.server.metrics_csv import MetricsCsv
from flapp.server.origin import Origin
from flapp.server.run_lock import RUNNING, lock_run, name_holder
from flapp.server.run_names import STORE, check_new, is_run, parse, put_in_place, restarts
from flapp.server.stopwatch import Stopwatch
from flapp.server.summary import Summary
from flapp.server.tensorboard import Events

if TYPE_CHECKING:
    from torch import Tensor

UNFINISHED, UNFINISHED_SECONDS = ".new-", 600  # a folder that will be a run's in a moment, or whose maker was killed
SHOWN_SECONDS = 0.2  # between two of what progress.json says
SUMMARY = "summary of the run: "  # before metrics.json in the ServerApp's log, for those who have no access to the file


class RunDirectory:
    """Write the files of one run, of which no other process may be writing.

    path: the run's folder; run_id: Flower's id of the run.
    """

    def __init__(self, path: Path, config: Config, run_id: int | None = None) -> None:
        self.path = path
        self.config = config
        self.started = time.monotonic()
        self.clock = Stopwatch()
        self._shown = 0.0
        self.summary = Summary(config)
        self.table = MetricsCsv(path / "metrics.csv")
        self.events: Events | None = None
        self.origin = Origin(path)
        self._metrics = lock_run(path, config.run_name)
        name_holder(path, run_id)
        self.store = _open_store(path, config)

    @classmethod
    def create(cls, config: Config, run_id: int | None = None) -> "RunDirectory":
        """Make the folder of a new run with its config in it; raises ConfigError when the name is taken."""
        path = check_new(config)
        made: Path | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(path.parent)
            made = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path.parent))
            _write_text(made / "config.yaml", to_yaml(config))
            Origin(made).record(0)
            made.chmod(0o755)
            put_in_place(made, path, config)  # so that a run's folder always has its config and origin
        except OSError as error:
            raise ConfigError(f"the run directory {path} cannot be made ({error.strerror}): set home") from error
        finally:
            if made:
                shutil.rmtree(made, ignore_errors=True)
        return cls(path, config, run_id)

    @classmethod
    def reopen(cls, config: Config, run_id: int | None = None) -> "RunDirectory":
        """Open the folder of a run, cut back to its last complete round or to resume_from; raises ConfigError.

        A failed start has nothing to go back to, and is replaced.
        """
        if restarts(config):
            return cls.create(config, run_id)
        path = check_resumable(config)
        check_source(config)
        run = cls(path, config, run_id)
        done = config.resume_from or run.last_round()
        change, doubt = run.origin.source_change(config.resume_from), run.origin.doubt(config.resume_from)
        run._drop_rounds_after(done)
        run.table.rewrite(run._lines())
        (run.path / "metrics.json").unlink(missing_ok=True)
        if doubt:
            from flwr.common import log  # takes 0.3 s: only a run that resumes with a doubt needs it

            log(WARNING, "%s", doubt)
        if change:
            run.append("resumed_anyway", done, changed=[change])
        if change or doubt:
            run.origin.record(done)
        _write_text(run.path / "config.yaml", to_yaml(config))
        return run

    def open_events(self) -> None:
        """Write TensorBoard events from now on, if the config says so; raises ConfigError without its package."""
        if self.config.results.tensorboard:
            began = time.time() - (time.monotonic() - self.started)
            self.events = Events(self.path / "tensorboard", began, self._lines())

    def last_round(self) -> int:
        """Return the number of the last complete round, 0 before the first."""
        rounds = self.store.rounds()
        return rounds[-1].round if rounds else 0

    def save_round(
        self, server_round: int, state: "Mapping[str, Tensor | np.ndarray]", facts: Mapping[str, Any]
    ) -> None:
        """Complete a round: keep the global model and the facts that the next rounds need; raises CheckpointError."""
        self.clock.enter("save")
        if self.summary.stops_after(server_round):
            watched, patience = self.summary.watched, self.config.stopping.patience
            self.append("stop", server_round, metric=watched.metric, best_round=watched.round, patience=patience)
        os.fsync(self._metrics.fileno())
        pinned, digest = {self.summary.selected_round()}, config_digest(self.config)
        saved = self.store.save_model_chunks(state, server_round, dict(facts), config_digest=digest, pinned=pinned)
        store = {"bytes": self.store.path.stat().st_size, "stored": saved.new_bytes, "total": saved.bytes}
        seconds, phases = self.clock.end()
        self.append("round", server_round, seconds=seconds, phases=phases, store=store)

    def load_round(self, server_round: int) -> "tuple[dict[str, Tensor], dict[str, Any]]":
        """Return the tensors and facts that were saved with a round."""
        kept = self.store.find_round(server_round)
        if kept is None or kept.config_digest != config_digest(self.config):
            raise ConfigError(f"{self.store.path} is not of the settings in config.yaml: start a new run")
        return self.store.reconstruct_model_from_chunks(server_round), kept.metrics

    def append(self, kind: str, server_round: int, **values: Any) -> None:
        """Add a line to metrics.jsonl; later lines of a kind do not replace earlier ones."""
        line = {"kind": kind, "round": server_round, "time": self._seconds(), **values}
        line = _finite(line)
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self._metrics.flush()
        self.summary.add(line)
        self.table.add(line)
        if self.events:
            self.events.add(line)

    def show_progress(self, server_round: int, phase: str, done: int, asked: int) -> None:
        """Write where the run is to progress.json; within a phase at most every SHOWN_SECONDS."""
        now = time.monotonic()
        if done not in (0, asked) and now < self._shown + SHOWN_SECONDS:
            return
        self._shown, rounds = now, self.config.num_rounds
        _write_json(
            self.path / "progress.json",
            {"round": server_round, "rounds": rounds, "phase": phase, "replies": done, "asked": asked},
        )

    def save_model(self, state: "Mapping[str, Tensor]") -> str:
        """Write model.safetensors and return its SHA-256; the same model is always the same bytes."""
        facts = {"model": self.config.model.name, "shape": self.config.dataset.shape}
        return save_tensors(state, self.path / "model.safetensors", **facts, classes=self.config.dataset.classes)

    def finish(self, model_sha256: str) -> dict[str, Any]:
        """Write metrics.json of a run that went to its end, and return it."""
        objective = self.summary.totals.get(self.summary.best.metric)
        selected = self.summary.selected_round()
        return self._summarize(
            status="finished", objective=objective, model_sha256=model_sha256, selected_round=selected
        )

    def fail(self, error: BaseException) -> dict[str, Any]:
        """Write metrics.json of a run that broke off, and return it."""
        return self._summarize(status="failed", error=_one_line(error))

    def _summarize(self, **values: Any) -> dict[str, Any]:
        found = self.summary.best
        best = {"objective_metric": found.metric, "best_round": found.round, "best_value": found.value}
        summary = {**values, **self.summary.totals, **best, "seconds": self._seconds(), "run_dir": str(self.path)}
        _write_json(self.path / "metrics.json", summary)
        self.close()
        return summary

    def _seconds(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def close(self) -> None:
        """Let go of the folder."""
        if self.events:
            self.events.close()
        self.store.close()
        (self.path / RUNNING).unlink(missing_ok=True)
        self._metrics.close()

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of metrics.jsonl, which are whole."""
        self._metrics.seek(0)
        return map(json.loads, self._metrics)

    def _drop_rounds_after(self, server_round: int) -> None:
        """Cut every file back to the end of a round; raises ConfigError, and changes nothing, when that cannot be."""
        try:
            if self.config.resume_from:
                self.load_round(server_round)  # which has to be whole before others go
            self._drop_lines_after(server_round)
        except ValueError:
            self.close()
            raise
        for journal in (self.origin.environment, self.origin.clients):
            journal.cut(self.config.resume_from)
        self.store.drop_rounds_after(server_round)

    def _is_kept(self, line: Mapping[str, Any], server_round: int) -> bool:
        """Say whether a line is of rounds up to this one, and not of a start after it that resume_from undoes."""
        undone = self.config.resume_from is not None and line["kind"] in ("roster", "resumed_anyway")
        return bool(line["round"] < server_round + (not undone))

    def _drop_lines_after(self, server_round: int) -> None:
        """Cut metrics.jsonl before the first line of a later round, or one that was not written to its end.

        Raises ConfigError when it ends before that round, or, without resume_from, has rounds beyond the one that was
        under way, or when a best round that the run would end with is gone.
        """
        self._metrics.seek(0)
        written = [(text, parse(text)) for text in self._metrics.read().splitlines(keepends=True)]
        newest = max((line["round"] for _, line in written if line is not None), default=0)
        whole = takewhile(lambda pair: pair[1] is not None and self._is_kept(pair[1], server_round), written)
        kept = [(text, line) for text, line in whole if line is not None]
        last = max((line["round"] for _, line in kept), default=0)
        if (newest > server_round + 1 and not self.config.resume_from) or last < server_round:
            told = last if last < server_round else newest
            raise ConfigError(
                f"{self.path / STORE} ends with round {server_round}, metrics.jsonl goes on to round {told}: bring "
                "the right ones back from a copy, go back by resume_from to a round that both have, or start a new run"
            )
        for _, line in kept:
            self.summary.add(line)
        if self.config.resume_from and not self.store.find_round(selected := self.summary.selected_round()):
            raise ConfigError(
                f"resume_from={server_round}: the best round until then was {selected}, which {self.path / STORE} no "
                "longer holds: choose a later round"
            )
        if kept:
            self.started -= kept[-1][1]["time"]
        self._metrics.truncate(sum(len(text.encode()) for text, _ in kept))
        self._metrics.seek(0, os.SEEK_END)


def _remove_unfinished(folder: Path) -> None:
    """Remove folders of runs that were killed while their folder was made, which takes a moment."""
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
        raise ConfigError(f"resume=true finds no run {config.run_name} in {config.runs_dir}: give run_name{hint}")
    if not is_run(path):
        raise ConfigError(f"run_name={config.run_name} is no run: {path} has no config.yaml")
    if changed := differences(read_yaml(path / "config.yaml"), config):
        raise ConfigError(
            f"run_name={config.run_name} was run with other settings ({'; '.join(changed)}): "
            "resume with those it began with, or give the new ones another run_name"
        )
    lock_run(path, config.run_name).close()
    if config.resume_from:
        with ChunkManager(path / STORE, create=False) as store:
            held = [kept.round for kept in store.rounds()]
        if config.resume_from not in held:
            listed = ", ".join(map(str, held)) or "none"
            raise ConfigError(
                f"resume_from={config.resume_from} is not among the rounds that {path / STORE} holds: choose one of "
                f"{listed}"
            )
    return path


def check_source(config: Config) -> None:
    """Raise ConfigError when the run to be resumed began with other source, unless resume_anyway is set."""
    change = Origin(config.runs_dir / config.run_name).source_change(config.resume_from)
    if change and not config.resume_anyway:
        raise ConfigError(
            f"run_name={config.run_name} began with other source ({change}): bring that source back, set "
            "resume_anyway=true to use this one, or start a new run"
        )


def _open_store(path: Path, config: Config) -> ChunkManager:
    cut = config.checkpoint
    return ChunkManager(path / STORE, cut.keep_rounds, cut.chunk_bytes, cut.chunk_num)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | RuntimeError) and text else f"{type(error).__name__}: {text}"


def _finite(value: Any) -> Any:
    """Return plain values with null for NaN and the infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(_finite(values), indent=1, allow_nan=False))


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    os.replace(partial, path)
