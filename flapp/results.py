"""The run directory: everything a run leaves behind, under home/runs/<run_name>.

config.yaml        the resolved config
metrics.jsonl      one line a round and kind (roster, train, evaluate, central), flushed as it is written
progress.json      where the run is now: round, phase, replies; for progress bars
model.safetensors  the final global model
metrics.json       the summary, written last: status, rounds, accuracy, loss, personal_accuracy, objective,
                   bytes_up, bytes_down, seconds, model_sha256, or status failed and the error
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flapp.config import to_yaml
from flapp.model import save_tensors
from flapp.settings import Config, ConfigError


class RunDirectory:
    """Write the files of one run; `path` is its folder."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self.started = time.monotonic()
        self.totals: dict[str, Any] = {"rounds": 0, "bytes_up": 0, "bytes_down": 0}
        self._metrics = (path / "metrics.jsonl").open("a")

    @classmethod
    def create(cls, config: Config) -> "RunDirectory":
        """Make the folder of a new run and write its config; raises ConfigError when the name is taken."""
        path = config.runs_dir / config.run_name
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(f"run_name={config.run_name} is taken: {path} exists; choose another name") from None
        except OSError as error:
            raise ConfigError(f"the run directory {path} cannot be made ({error.strerror}): set home") from error
        (path / "config.yaml").write_text(to_yaml(config))
        return cls(path, config)

    def append(self, kind: str, server_round: int, **values: Any) -> None:
        """Add a line to metrics.jsonl; later lines of a kind do not replace earlier ones."""
        line = {"kind": kind, "round": server_round, "time": round(time.time(), 3), **values}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        self.totals["rounds"] = max(self.totals["rounds"], server_round)
        for key in ("bytes_up", "bytes_down"):
            self.totals[key] += values.get(key, 0)
        if kind == "evaluate":
            self.totals |= {key: values.get(key) for key in ("accuracy", "loss", "personal_accuracy")}

    def show_progress(self, server_round: int, phase: str, done: int, asked: int) -> None:
        """Say where the run is, for whoever watches."""
        rounds = self.config.num_rounds
        _write_json(
            self.path / "progress.json",
            {"round": server_round, "rounds": rounds, "phase": phase, "replies": done, "asked": asked},
        )

    def save_model(self, state: Mapping[str, Tensor]) -> str:
        """Write model.safetensors and return its SHA-256; the same model is always the same bytes."""
        facts = {"model": self.config.model.name, "shape": self.config.dataset.shape}
        return save_tensors(state, self.path / "model.safetensors", **facts, classes=self.config.dataset.classes)

    def finish(self, model_sha256: str) -> dict[str, Any]:
        """Write metrics.json of a run that went to its end, and return it."""
        objective = self.totals.get(self.config.evaluate.objective)
        return self._summarize(status="finished", objective=objective, model_sha256=model_sha256)

    def fail(self, error: BaseException) -> dict[str, Any]:
        """Write metrics.json of a run that broke off, and return it."""
        return self._summarize(status="failed", error=_one_line(error))

    def _summarize(self, **values: Any) -> dict[str, Any]:
        seconds = round(time.monotonic() - self.started, 3)
        summary = {**values, **self.totals, "seconds": seconds, "run_dir": str(self.path)}
        self._metrics.close()
        _write_json(self.path / "metrics.json", summary)
        return summary


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | RuntimeError) and text else f"{type(error).__name__}: {text}"


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(values, indent=1))
    os.replace(partial, path)
