"""Which data each client of a run had when it first joined, kept in clients.jsonl from start to start."""

from collections.abc import Collection, Mapping
from logging import WARNING
from typing import Any

from flwr.common import log

from flapp.config.schema import ConfigError
from flapp.messages import Claim
from flapp.server.run_dir import RunDirectory

FIX = "bring its data back, or use the other data with resume=true resume_anyway=true"


class ClientLedger:
    """Compare the data of clients that join with what they had before, and record it when it is their first time.

    With resume_anyway, other data is let in, recorded, and noted in metrics.jsonl. `changed` maps the clients that were
    refused to what changed.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.digests: dict[str, str] = {line["client"]: line["shard_digest"] for line in run.origin.clients.read()}
        self.changed: dict[str, str] = {}
        if not self.digests and run.last_round():
            path = run.origin.clients.path
            log(WARNING, "there is no %s, so whether the clients' data is the same cannot be compared", path)

    def find_fault(self, client_id: str, shard_digest: str) -> str | None:
        """Return why a client with this data may not join, or None."""
        before = self.digests.get(client_id, shard_digest)
        if before == shard_digest:
            self.changed.pop(client_id, None)
            return None
        change = f"its data changed since the run began: shard digest was {before[:12]}, is {shard_digest[:12]}"
        if self.run.config.resume_anyway:
            return None
        self.changed[client_id] = change
        return f"{change}; {FIX}"

    def record(self, claims: Mapping[str, Claim]) -> None:
        """Record the data of clients that have joined, by id."""
        changed_names = (name for name, claim in claims.items() if self.digests.get(name) != claim.shard_digest)
        new = {name: claims[name].shard_digest for name in sorted(changed_names, key=_by_number)}
        if not new:
            return
        done = self.run.last_round()
        changed = [
            f"client {name}: shard digest was {self.digests[name][:12]}, is {digest[:12]}"
            for name, digest in new.items()
            if name in self.digests
        ]
        if changed:
            self.run.append("resumed_anyway", done, changed=changed)
        lines = [{"kind": "client", "round": done, "client": name, **_held(claims[name])} for name in new]
        self.run.origin.clients.append(lines)
        self.digests |= new

    def refuse_changes(self, members: Collection[str]) -> None:
        """Raise ConfigError when clients that are not members have other data than they had before."""
        names = sorted(self.changed.keys() - set(members), key=_by_number)
        found = [f"client {name}: {self.changed[name]}" for name in names]
        if found:
            more = f"; and {len(found) - 3} more clients" if len(found) > 3 else ""
            raise ConfigError(f"the run cannot go on: {'; '.join(found[:3])}{more}; {FIX}")


def _held(claim: Claim) -> dict[str, Any]:
    """Return what a line says of a client's data."""
    samples = {"train": claim.train, "val": claim.val, "test": claim.test}
    return {"shard_digest": claim.shard_digest, **samples, "labels": list(claim.label_hist)}


def _by_number(client_id: str) -> tuple[int, str]:
    return len(client_id), client_id
