"""The releases of a run with central privacy: what each round makes known, kept before anybody sees it, and counted.

A round's release is the noisy average of its updates. It becomes known when clients are sent the new model, to evaluate
it or to train it. Before that, `keep` does two things, in this order:

1. release.safetensors gets the noisy average, the next clipping norm, and what the round's train line in metrics.jsonl
   will say, in one step.
2. releases.jsonl gets a line: the round, the digest of the average, the noise multiplier, and the source of the noise.

A run that was broken off before 1 has made nothing known, and does the round again with new noise. After 1 it takes the
average from the file, and asks no client. So a round is released once, and a line for a digest that has one already is
not written again. With seeded noise there is no file: the round is done again, with the same noise and result.

Lines are never removed, not even by resume_from: rounds that are trained anew are releases, too. A resumed run takes
the noise multiplier from the first line, even if another version of dp-accounting computes another.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flapp.base import digest_of
from flapp.central import Plan, affordable, plan_of, spent
from flapp.config.schema import Config, ConfigError
from flapp.model.files import load_tensors, save_tensors, to_numpy
from flapp.server import LOGGER
from flapp.server.journals import open_releases, releases_of
from flapp.server.publish import published

if TYPE_CHECKING:
    from flapp.server.run_dir import RunDirectory

RELEASE = "release.safetensors"


@dataclass(frozen=True)
class Release:
    """A round's noisy average, by tensor, the values of its line, and the clipping norm of the next round."""

    average: Mapping[str, np.ndarray]
    line: Mapping[str, Any]
    next_clip: float


class CentralLedger:
    """Keep and count releases, and keep the epsilon so far among the totals that metrics.json gets.

    plan: the noise of every round. Raises ConfigError when releases.jsonl lacks a round of the run.
    """

    def __init__(self, run: "RunDirectory") -> None:
        self.settings = run.config.privacy
        self.totals = run.observer.summary.totals
        self.path = run.path / RELEASE
        self.journal, lines = open_releases(run)
        self.known = {(line["round"], line["released"]) for line in lines}
        self.plan = _plan_of(run.config, lines)
        for left in self.path.parent.glob(f".{RELEASE}*"):  # of a start that was killed while it wrote
            left.unlink()
        self.totals |= self.spent()
        if self.known:
            LOGGER.info("so far the run has released %d averages, epsilon %.4g", len(self.known), self.epsilon())

    def kept(self, server_round: int, sent: Mapping[str, np.ndarray]) -> Release | None:
        """Return the release that an earlier start kept for this round and the model `sent`, or None. Count it if new.

        Raises ConfigError when that cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            tensors, facts = load_tensors(self.path)
            average = {key: to_numpy(tensor.clone()) for key, tensor in tensors.items()}
            release = Release(average, json.loads(facts["line"]), float(facts["next_clip"]))
            is_meant = facts["round"] == server_round and facts["sent"] == digest_of(sent)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path} is damaged ({error}): bring it back from a copy, or remove it (the round may then "
                "count twice)"
            ) from error
        if not is_meant:
            return None
        self._count(server_round, average)
        return release

    def keep(self, server_round: int, sent: Mapping[str, np.ndarray], release: Release) -> None:
        """Keep and count a release that is about to be made known; `sent` is the model that the clients trained."""
        from torch import from_numpy  # slow

        if self.settings.noise == "seeded":
            self._count(server_round, release.average)
            return
        line = published(self.settings, {"kind": "train", **release.line})
        del line["kind"]
        facts = {"line": json.dumps(line), "next_clip": release.next_clip, "sent": digest_of(sent)}
        tensors = {key: from_numpy(np.ascontiguousarray(values)) for key, values in release.average.items()}
        save_tensors(tensors, self.path, round=server_round, **facts)
        self._count(server_round, release.average)

    def has_counted(self, server_round: int, kept: Release | None) -> bool:
        """Say whether the first round of this start is counted already.

        It is if an earlier start kept its release, or if the noise is seeded and releases.jsonl has the round.
        """
        is_known = any(each == server_round for each, _ in self.known)
        return kept is not None or (self.settings.noise == "seeded" and is_known)

    def epsilon(self, more: int = 0) -> float:
        """Return the epsilon of all releases so far and of `more` further ones."""
        return spent(self.settings, self.plan, len(self.known) + more)

    def spent(self) -> dict[str, Any]:
        """Return the epsilon so far, its delta, and where the noise comes from, as in metrics.json."""
        facts = {"privacy": "central", "privacy_noise": self.settings.noise}
        return {**facts, "epsilon": self.epsilon(), "delta": self.settings.delta}

    def rounds_left(self, most: int) -> int:
        """Return for how many more releases, at most `most`, the budget privacy.epsilon is enough."""
        done = len(self.known)
        return max(0, affordable(self.settings, self.plan, done + most) - done)

    def _count(self, server_round: int, average: Mapping[str, np.ndarray]) -> None:
        entry = server_round, digest_of(average)
        if entry not in self.known:
            noise = {"noise_multiplier": self.plan.multiplier, "noise": self.settings.noise}
            self.journal.append([{"round": server_round, "released": entry[1], **noise}])
            self.known.add(entry)
        self.totals |= self.spent()


def check_budget(config: Config, path: Path) -> None:
    """Raise ConfigError when a run would go back to round resume_from, but has no budget to train a round again."""
    if config.privacy.kind != "central":
        return
    lines = releases_of(path).read()
    plan = _plan_of(config, lines)
    if affordable(config.privacy, plan, len(lines) + 1) > len(lines):
        return
    raise ConfigError(
        f"resume_from={config.resume_from} would train rounds again, which counts again, and the {len(lines)} rounds "
        f"so far have used up privacy.epsilon={config.privacy.epsilon:g}: leave resume_from out, or start a new run"
    )


def _plan_of(config: Config, lines: Sequence[Mapping[str, Any]]) -> Plan:
    """Return the noise of a run whose releases.jsonl has these lines."""
    return plan_of(config, lines[0]["noise_multiplier"] if lines else None)
