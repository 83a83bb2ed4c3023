"""How often each client of a run may have released an update, kept in releases.jsonl from start to start."""

from collections import Counter
from collections.abc import Collection
from logging import INFO
from typing import Any

from flwr.common import log

from flapp.config.schema import ConfigError
from flapp.privacy import total_epsilon
from flapp.server.origin import Journal
from flapp.server.run_dir import RunDirectory

RELEASES = "releases.jsonl"


class ReleaseLedger:
    """Count releases: every time that a client is asked to train, unless it answers with an update it sent before.

    A client that is asked counts before it answers, because its reply may be on its way when the server fails. So the
    count is never too low. Lines are never removed, also not by resume_from: what was released stays released. The
    epsilon so far, of the client with the most releases, goes into metrics.json at once. Raises ConfigError when the
    file lacks a round of the run.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.settings = run.config.privacy
        self.journal = Journal(run.path / RELEASES, otherwise="start a new run")
        self.asked: Counter[tuple[str, int]] = Counter()
        self.replayed: Counter[tuple[str, int]] = Counter()
        lines = self.journal.read()
        for line in lines:
            self._count(line)
        known = {server_round for _, server_round in self.asked}
        if missing := set(range(1, run.last_round() + 1)) - known:
            raise ConfigError(
                f"{self.journal.path} lacks round {min(missing)}, so what clients have released cannot be counted: "
                "bring it back from a copy, or start a new run"
            )
        self.journal.cut(None)
        run.summary.totals |= self.spent()
        if lines:
            log(INFO, "up to now a client has released %d updates, epsilon %.4g", self.most(), self.spent()["epsilon"])

    def ask(self, server_round: int, names: Collection[str]) -> None:
        """Record that clients are about to be asked to train."""
        self._add({"round": server_round, "asked": sorted(names)})

    def replay(self, server_round: int, names: Collection[str]) -> None:
        """Record that clients have answered with what they had sent before."""
        if names:
            self._add({"round": server_round, "replayed": sorted(names)})

    def most(self) -> int:
        """Return the releases of the client that has the most; the first of a round is never a replay."""
        releases: Counter[str] = Counter()
        for (name, server_round), asked in self.asked.items():
            releases[name] += max(1, asked - self.replayed[name, server_round])
        return max(releases.values(), default=0)

    def spent(self) -> dict[str, float]:
        """Return what metrics.json says: the epsilon so far of the client with the most releases, and its delta."""
        return {"epsilon": total_epsilon(self.settings, self.most()), "delta": self.settings.delta}

    def _add(self, line: dict[str, Any]) -> None:
        self.journal.append([line])
        self._count(line)
        self.run.summary.totals |= self.spent()

    def _count(self, line: dict[str, Any]) -> None:
        for name in line.get("asked", ()):
            self.asked[name, line["round"]] += 1
        for name in line.get("replayed", ()):
            self.replayed[name, line["round"]] += 1
