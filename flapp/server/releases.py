"""The releases of a run with central privacy: what each round makes known, kept before anybody sees it, and counted.

A round's release is the noisy average of its updates. It becomes known when clients are sent the new model, first to
evaluate it. Before that, `keep` does two things, in this order:

1. release.safetensors gets the noisy average, the round's line and the next clipping norm, in one step.
2. releases.jsonl gets a line with the round and the digest of the average.

A run that was broken off before 1 has made nothing known, and does the round again with new noise. After 1 it takes the
average from the file, and asks no client. So a round is released once, and a line for a digest that has one already is
not written again. Lines are never removed, not even by resume_from: rounds that are trained anew are releases, too.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flapp.central import Plan, affordable, epsilon_of
from flapp.config.schema import ConfigError
from flapp.model.files import load_tensors, save_tensors, to_numpy
from flapp.server.journals import Journal
from flapp.server.publish import published

if TYPE_CHECKING:
    from flapp.server.run_dir import RunDirectory

LOGGER = logging.getLogger("flwr")
RELEASE = "release.safetensors"


@dataclass(frozen=True)
class Release:
    """A round's noisy average, by tensor, the values of its line, and the clipping norm of the next round."""

    average: Mapping[str, np.ndarray]
    line: Mapping[str, Any]
    next_clip: float


class CentralLedger:
    """Keep and count releases. The epsilon so far goes into metrics.json at once.

    Raises ConfigError when releases.jsonl lacks a round of the run.
    """

    def __init__(self, run: "RunDirectory", plan: Plan) -> None:
        self.settings, self.plan = run.config.privacy, plan
        self.totals = run.observer.summary.totals
        self.path = run.path / RELEASE
        self.journal = Journal(run.path / "releases.jsonl", otherwise="start a new run")
        self.known = {(line["round"], line["released"]) for line in self.journal.read()}
        if missing := set(range(1, run.last_round() + 1)) - {server_round for server_round, _ in self.known}:
            raise ConfigError(
                f"{self.journal.path} lacks round {min(missing)}, so what the run has released cannot be counted: "
                "bring it back from a copy, or start a new run"
            )
        self.journal.cut(None)
        self.totals |= self.spent()
        if self.known:
            LOGGER.info("so far the run has released %d averages, epsilon %.4g", len(self.known), self.epsilon())

    def kept(self, server_round: int, sent: Mapping[str, np.ndarray]) -> Release | None:
        """Return what an earlier start released, or was about to, in this round from the model `sent`, if it did.

        Raises ConfigError when that cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            tensors, facts = load_tensors(self.path)
            average = {key: to_numpy(tensor.clone()) for key, tensor in tensors.items()}
            release = Release(average, json.loads(facts["line"]), float(facts["next_clip"]))
            is_meant = facts["round"] == server_round and facts["sent"] == _digest(sent)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path} is damaged ({error}): bring it back from a copy, or remove it, and the round may "
                "count twice"
            ) from error
        if not is_meant:
            return None
        self._count(server_round, average)
        return release

    def keep(self, server_round: int, sent: Mapping[str, np.ndarray], release: Release) -> None:
        """Keep and count a release that is about to be made known; `sent` is the model that the clients trained."""
        from torch import from_numpy  # slow

        line = published(self.settings, {"kind": "train", **release.line})
        del line["kind"]
        facts = {"line": json.dumps(line), "next_clip": release.next_clip, "sent": _digest(sent)}
        tensors = {key: from_numpy(np.ascontiguousarray(values)) for key, values in release.average.items()}
        save_tensors(tensors, self.path, round=server_round, **facts)
        self._count(server_round, release.average)

    def epsilon(self, more: int = 0) -> float:
        """Return the epsilon of all releases so far, and of `more` of them."""
        plan, settings = self.plan, self.settings
        rounds = len(self.known) + more
        return epsilon_of(plan.multiplier, plan.sampling, rounds, settings.delta, settings.accountant)

    def spent(self) -> dict[str, Any]:
        """Return the epsilon so far and its delta, as in metrics.json."""
        return {"privacy": "central", "epsilon": self.epsilon(), "delta": self.settings.delta}

    def rounds_left(self, most: int) -> int:
        """Return for how many more releases, at most `most`, the budget privacy.epsilon is enough."""
        done = len(self.known)
        return max(0, affordable(self.settings, self.plan, done + most) - done)

    def _count(self, server_round: int, average: Mapping[str, np.ndarray]) -> None:
        entry = server_round, _digest(average)
        if entry not in self.known:
            self.journal.append([{"round": server_round, "released": entry[1]}])
            self.known.add(entry)
        self.totals |= self.spent()


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    from flapp.checkpoint.tensors import digest_of  # imports PyTorch, which commands do without

    return digest_of(tensors)
