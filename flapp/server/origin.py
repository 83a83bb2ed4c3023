"""What a run began with, so that a later start notices when something else takes its place.

    environment.jsonl   a line at the first start, and at each start that found another environment: source_digest,
                        files (the SHA-256 of each source file) and versions (of Python, Flower, PyTorch and NumPy)
    clients.jsonl       a line for each client when it first joins: client, shard_digest, samples (train, val
                        and test) and labels (training samples of each class) (ledger.py)

Each line also has the round that was complete when it was written: it is about the rounds after that one. Of several
lines the last one counts. A run that goes back to a round drops the lines that are about the rounds after it only.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flapp.config.schema import ConfigError
from flapp.source import read_source, source_digest, versions
from flapp.untrusted import parse_json

ENVIRONMENT, CLIENTS = "environment.jsonl", "clients.jsonl"
Line = dict[str, Any]


class Journal:
    """A file of JSON lines, each with the round that was complete when it was written.

    otherwise: what to do when the file is damaged and there is no copy.
    """

    def __init__(self, path: Path, otherwise: str = "remove it to resume without comparing") -> None:
        self.path = path
        self.otherwise = otherwise

    def read(self, before: int | None = None) -> list[Line]:
        """Return the lines, or only those written before round `before` was complete; raises ConfigError for damage.

        A last line that was cut off while it was written is left out.
        """
        try:
            whole = [text for text in self.path.read_text().splitlines(keepends=True) if text.endswith("\n")]
            lines = [parse_json(text) for text in whole]
            return [line for line in lines if before is None or line["round"] < before]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path} is damaged ({error}): bring it back from a copy, or {self.otherwise}"
            ) from error

    def append(self, lines: Iterable[Line]) -> None:
        """Add lines and wait until they are on disk."""
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def cut(self, before: int | None) -> None:
        """Remove all lines but those of `read`."""
        if not self.path.exists():
            return
        partial = self.path.with_name(self.path.name + ".tmp")
        partial.unlink(missing_ok=True)
        Journal(partial).append(self.read(before))
        os.replace(partial, self.path)


class Origin:
    """The environment that a run began in, recorded in its folder."""

    def __init__(self, folder: Path) -> None:
        self.environment = Journal(folder / ENVIRONMENT)
        self.clients = Journal(folder / CLIENTS)

    def record(self, server_round: int) -> None:
        """Record the environment of this process."""
        files = {name: hashlib.sha256(content).hexdigest() for name, content in read_source().items()}
        facts = {"source_digest": source_digest(), "versions": versions(), "files": files}
        self.environment.append([{"round": server_round, **facts}])

    def source_change(self, before: int | None) -> str | None:
        """Say how the source differs from the recorded one (see Journal.read); None if it does not, or none is."""
        lines = self.environment.read(before)
        if not lines or lines[-1]["source_digest"] == source_digest():
            return None
        old, new = lines[-1]["files"], {name: hashlib.sha256(data).hexdigest() for name, data in read_source().items()}
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        return f"source digest was {lines[-1]['source_digest'][:12]}, is {source_digest()[:12]}: {listed} changed"

    def doubt(self, before: int | None) -> str | None:
        """Say what else may lead to other bytes, as a warning: other versions, or a run that recorded nothing."""
        lines = self.environment.read(before)
        if not lines:
            return f"there is no {self.environment.path}, so whether the source is the same cannot be compared"
        if (old := lines[-1]["versions"]) != versions():
            return f"the versions were {old}, are {versions()}, so the final bytes may differ"
        return None
