"""TensorBoard events: every number of metrics.jsonl as a scalar <kind>/<key> over rounds."""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flapp.config.schema import ConfigError
from flapp.server.metrics_csv import scalars


def check_installed() -> None:
    """Raise ConfigError when the package tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "results.tensorboard=true needs the package tensorboard, which is not installed: "
            'pip install -e ".[tensorboard]", or set results.tensorboard=false'
        )


class Events:
    """Write events into `folder`, those of the lines that are there already first; TensorBoard drops older ones.

    began: when the run began, in seconds since the epoch, without the pauses between its starts. Raises ConfigError
    without the package tensorboard.
    """

    def __init__(self, folder: Path, began: float, lines: Iterable[Mapping[str, Any]]) -> None:
        check_installed()
        from torch.utils.tensorboard import SummaryWriter  # only who asks for events pays for it

        self._began = began
        self._writer = SummaryWriter(str(folder), purge_step=0 if folder.exists() else None)
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Write the numbers of a line; at the end of a round they are on disk."""
        for tag, value in scalars(line, "/").items():
            self._writer.add_scalar(tag, value, line["round"], walltime=self._began + line["time"])
        if line["kind"] == "round":
            self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
