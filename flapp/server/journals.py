"""The journals of a run, kept across restarts: its source, its clients' data, and what it released with privacy.

Each line has a round: in releases.jsonl the round under way, in the others the last complete one. If lines contradict
each other, the last one counts. A run that goes back to a round drops later lines, but never those of releases.jsonl.
docs/formats.md describes the files.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapp.config.schema import Config, ConfigError
from flapp.custom import read_code, read_source, versions, whole_digest
from flapp.files import replacing, sync
from flapp.listing import by_number, list_names
from flapp.server import LOGGER
from flapp.server.publish import is_whole
from flapp.untrusted import parse_json

if TYPE_CHECKING:
    from flapp.messages import Claim
    from flapp.server.run_dir import RunDirectory

FIX = "bring its data back, or use the other data with resume=true resume_anyway=true"
Line = dict[str, Any]


class Journal:
    """A file of JSON lines. `otherwise` says what to do if it is damaged and there is no copy."""

    def __init__(self, path: Path, otherwise: str = "remove it to resume without comparing") -> None:
        self.path = path
        self.otherwise = otherwise

    def read(self, before: int | None = None) -> list[Line]:
        """Return the complete lines; with `before`, those of rounds below it. Raises ConfigError for a damaged file."""
        try:
            whole = [text for text in self.path.read_text().splitlines(keepends=True) if text.endswith("\n")]
            lines = [parse_json(text) for text in whole]
            return [line for line in lines if before is None or line["round"] < before]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path} is damaged ({error}): restore a copy, or {self.otherwise}") from error

    def append(self, lines: Iterable[Line]) -> None:
        """Add lines and wait until they are on disk."""
        is_new = not self.path.exists()
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(self.path.parent)

    def cut(self, before: int | None) -> None:
        """Keep only the lines that `read` returns."""
        if self.path.exists():
            kept = self.read(before)
            with replacing(self.path) as partial:
                Journal(partial).append(kept)


class Origin:
    """The environment that a run began in, recorded in its folder: flapp's source, the user's own, and versions."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.config = config
        self.environment = Journal(folder / "environment.jsonl")
        self.clients = Journal(folder / "clients.jsonl")

    def record(self, server_round: int) -> None:
        """Record the environment of this process."""
        facts = {"source_digest": whole_digest(self.config), "versions": versions(), "files": self._digests()}
        self.environment.append([{"round": server_round, **facts}])

    def source_change(self, before: int | None) -> str | None:
        """Return how the source differs from the recorded one, or None; before: see Journal.read."""
        lines = self.environment.read(before)
        here = whole_digest(self.config)
        if not lines or lines[-1]["source_digest"] == here:
            return None
        old, new = lines[-1]["files"], self._digests()
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        was = lines[-1]["source_digest"][:12]
        return f"source digest was {was}, is {here[:12]}: {list_names(changed, 5)} changed"

    def doubt(self, before: int | None) -> str | None:
        """Return why the final model may still differ: other versions, or no recorded environment."""
        lines = self.environment.read(before)
        if not lines:
            return f"there is no {self.environment.path}, so it cannot be checked whether the source is the same"
        if (old := lines[-1]["versions"]) != versions():
            return f"the versions were {old}, are {versions()}, so the final bytes may differ"
        return None

    def _digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file of flapp, by its path in it, and of the user's own code."""
        own = read_code(self.config)
        return {name: hashlib.sha256(content).hexdigest() for name, content in read_source().items()} | own


class ClientLedger:
    """Compare the data of clients that join with what they had before, and record it when it is new.

    With resume_anyway, changed data is accepted, recorded and noted in metrics.jsonl. changed: for
    each client that is refused because of its data, what has changed.
    """

    def __init__(self, run: "RunDirectory") -> None:
        self.run = run
        self.journal = run.origin.clients
        self.digests: dict[str, str] = {line["client"]: line["shard_digest"] for line in self.journal.read()}
        self.changed: dict[str, str] = {}
        if not self.digests and run.last_round():
            text = "there is no %s, so it cannot be checked whether the clients' data is the same"
            LOGGER.warning(text, self.journal.path)

    def find_fault(self, client_id: str, shard_digest: str) -> str | None:
        """Return why a client with this data may not join, or None."""
        before = self.digests.get(client_id, shard_digest)
        if before == shard_digest or self.run.config.resume_anyway:
            self.changed.pop(client_id, None)
            return None
        change = f"its data changed since the run began: shard digest was {before[:12]}, is {shard_digest[:12]}"
        self.changed[client_id] = change
        return f"{change}; {FIX}"

    def record(self, claims: "Mapping[str, Claim]") -> None:
        """Record the data of clients that have joined, by id."""
        new = [name for name, claim in claims.items() if self.digests.get(name) != claim.shard_digest]
        if not new:
            return
        done = self.run.last_round()
        new.sort(key=by_number)
        change = "client {}: shard digest was {:.12}, is {:.12}".format
        held, is_short = self.digests, not is_whole(self.run.config.privacy)
        if changed := [change(name, held[name], claims[name].shard_digest) for name in new if name in held]:
            told = [f"the data of {len(changed)} of the clients"] if is_short else changed
            self.run.observer.append("resumed_anyway", done, changed=told)
        self.journal.append(_line_of(claims[name], done, is_short) for name in new)
        self.digests |= {name: claims[name].shard_digest for name in new}

    def refuse_changes(self, members: Collection[str]) -> None:
        """Raise ConfigError when clients that are not members have other data than they had before."""
        if names := sorted(self.changed.keys() - set(members), key=by_number):
            found = "; ".join(f"client {name}: {self.changed[name]}" for name in names[:3])
            more = f"; and {len(names) - 3} more clients" if len(names) > 3 else ""
            raise ConfigError(f"the run cannot continue: {found}{more}; {FIX}")


def _line_of(claim: "Claim", done: int, is_short: bool) -> Line:
    """Return a client's line, or with is_short only what a later start compares."""
    held = {"train": claim.train, "val": claim.val, "test": claim.test, "labels": list(claim.label_hist)}
    compared = {"kind": "client", "round": done, "client": claim.client_id, "shard_digest": claim.shard_digest}
    return compared if is_short else compared | held


def open_releases(run: "RunDirectory") -> tuple[Journal, list[Line]]:
    """Return the journal of a run's releases, cut to its complete lines, and these lines.

    Raises ConfigError if a round is missing.
    """
    journal = releases_of(run.path)
    lines = journal.read()
    if missing := set(range(1, run.last_round() + 1)) - {line["round"] for line in lines}:
        found = f"{journal.path} lacks round {min(missing)}, so what was released cannot be counted"
        raise ConfigError(f"{found}: bring it back from a copy, or start a new run")
    journal.cut(None)
    return journal, lines


def releases_of(path: Path) -> Journal:
    """Return the journal of the releases of the run at `path`."""
    return Journal(path / "releases.jsonl", otherwise="start a new run")


class ReleaseLedger:
    """Count releases: each time a client is asked to train, unless it answers with an update that it sent before.

    A release is counted as soon as the client is asked, because its reply may be on its way when the server crashes. So
    the count is never too low. Lines are never removed, not even by resume_from: what was released stays released. The
    epsilon so far, of the client with the most releases, is among the totals that metrics.json gets. Raises ConfigError
    if a round is missing.
    """

    def __init__(self, run: "RunDirectory") -> None:
        self.settings = run.config.privacy
        self.totals = run.observer.summary.totals
        self.journal, lines = open_releases(run)
        self.asked: Counter[tuple[str, int]] = Counter()
        self.replayed: Counter[tuple[str, int]] = Counter()
        self._count(lines)
        if lines:
            text = "so far no client has released more than %d updates, epsilon %.4g"
            LOGGER.info(text, self.most(), self.spent()["epsilon"])

    def ask(self, server_round: int, names: Collection[str]) -> None:
        """Record that clients are about to be asked to train."""
        self._add({"round": server_round, "asked": sorted(names)})

    def replay(self, server_round: int, names: Collection[str]) -> None:
        """Record that clients have answered with what they had sent before."""
        if names:
            self._add({"round": server_round, "replayed": sorted(names)})

    def most(self) -> int:
        """Return how often the client with the most releases has released.

        Each round in which a client was asked counts once or more, because its first answer is never a replay.
        """
        releases: Counter[str] = Counter()
        for (name, server_round), asked in self.asked.items():
            releases[name] += max(1, asked - self.replayed[name, server_round])
        return max(releases.values(), default=0)

    def spent(self) -> dict[str, float]:
        """Return the epsilon so far of the client with the most releases, and its delta, as in metrics.json."""
        from flapp.privacy import total_epsilon

        return {"epsilon": total_epsilon(self.settings, self.most()), "delta": self.settings.delta}

    def _add(self, line: Line) -> None:
        self.journal.append([line])
        self._count([line])

    def _count(self, lines: Iterable[Line]) -> None:
        for line in lines:
            for counter, key in ((self.asked, "asked"), (self.replayed, "replayed")):
                counter.update((name, line["round"]) for name in line.get(key, ()))
        self.totals |= self.spent()
