"""Runs with central privacy that are resumed: every round is released and counted once."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from flapp import central
from flapp.config.load import compose
from flapp.config.schema import ConfigError
from flapp.server.releases import CentralLedger
from flapp.strategy.central import Central, PrivateRounds
from tests.conftest import Broken, Federate, break_and_resume, break_off, read_lines
from tests.support.leaf_files import content_of

pytest.importorskip("dp_accounting", reason='needs pip install -e ".[privacy]"')

TOY = ("experiment=toy_regression", "num_rounds=3", "privacy=central")


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool, server_round: int = 2) -> None:
    """Break off in a round, before or after the call of a method or function."""
    real, calls = getattr(owner, name), itertools.count(1)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        is_due = next(calls) == server_round
        if is_due and not after:
            raise Broken("the power is gone")
        found = real(*args, **kwargs)
        if is_due:
            raise Broken("the power is gone")
        return found

    monkeypatch.setattr(owner, name, stand_in)


PLACES = [  # whose call is broken off, and whether before or after it has done its work; each leaves other files
    (Central, "draw", True),  # drawn, nobody asked
    (CentralLedger, "keep", False),  # clients have trained and noise is added, nothing kept
    (CentralLedger, "_count", False),  # kept, not counted
    (CentralLedger, "_count", True),  # counted, not made known
    (PrivateRounds, "aggregate_train", True),
    (PrivateRounds, "aggregate_evaluate", True),  # clients have the new model
    (PrivateRounds, "facts", True),  # before the round is saved
    (CentralLedger, "keep", False, 1),
    (CentralLedger, "_count", False, 1),
    (CentralLedger, "_count", True, 1),
    (PrivateRounds, "aggregate_evaluate", True, 1),
]


@pytest.fixture(scope="module")
def whole(federate: Federate) -> tuple[dict[str, Any], Path]:
    """Return the summary and folder of a run with seeded noise that is not broken off."""
    return federate(*TOY, "privacy.clipping=adaptive", "privacy.noise=seeded")


@pytest.mark.parametrize("place", PLACES, ids=lambda place: "-".join(map(str, place[1:])))
@pytest.mark.parametrize("source", ["seeded", "secure"])
def test_a_resumed_run_releases_every_round_once_wherever_it_was_broken_off(
    federate: Federate, data_home: Path, whole: tuple[dict[str, Any], Path], source: str, place: tuple[Any, ...]
) -> None:
    name = f"broken-{source}-" + "-".join(map(str, place[1:]))
    words = (*TOY, "privacy.clipping=adaptive", f"privacy.noise={source}", f"run_name={name}")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, *place)
        with pytest.raises(Broken):
            federate(*words)
    folder = data_home / "runs" / name
    before = released_in(folder)
    done, path = federate(*words, "resume=true")
    after = released_in(path)
    assert [line["round"] for line in after] == [1, 2, 3]
    assert after[: len(before)] == before
    assert done["epsilon"] == central.epsilon_of(multiplier(), 1.0, 3, 1e-5, "rdp")
    assert [line["round"] for line in read_lines(path, "train")] == [1, 2, 3]
    if source == "seeded":
        assert done["model_sha256"] == whole[0]["model_sha256"]
        told = [[(x["epsilon"], x["clipping_norm"]) for x in read_lines(p, "train")] for p in (path, whole[1])]
        assert told[0] == told[1]


def released_in(path: Path) -> list[dict[str, Any]]:
    file = path / "releases.jsonl"
    return [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []


@functools.cache
def multiplier() -> float:
    return central.plan_of(compose([*TOY])).multiplier


def test_rounds_dropped_by_resume_from_still_count_as_released_and_against_the_budget(federate: Federate) -> None:
    words = (*TOY, "privacy.noise=secure", "privacy.noise_multiplier=2", "run_name=dropped", "checkpoint=all")
    spent = central.epsilon_of(2.0, 1.0, 4, 1e-5, "rdp")
    words = (*words, f"privacy.epsilon={spent}")  # of four releases
    federate(*words)
    back, path = federate(*words, "resume=true", "resume_from=1")
    assert back["rounds"] == 2
    assert read_lines(path, "stop")[-1]["metric"] == "epsilon"
    assert back["epsilon"] == spent
    assert [line["round"] for line in released_in(path)] == [1, 2, 3, 2]
    before = content_of(path)
    with pytest.raises(ConfigError, match=r"resume_from=1 would train rounds again.* used up .*: leave"):
        federate(*words, "resume=true", "resume_from=1")
    assert content_of(path) == before
    (path / "releases.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"releases.jsonl lacks round 1.*bring it back from a copy, or start a new"):
        federate(*words, "resume=true")


def test_a_resumed_run_keeps_its_noise_even_if_the_accountant_would_now_compute_another(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = federate(*TOY)
    words = (*TOY, "run_name=upgraded")
    break_off(federate, 2, "aggregate_evaluate", *words)
    planned = multiplier()
    monkeypatch.setattr(central, "_least_multiplier", lambda *_: 99.0)
    done, path = federate(*words, "resume=true")
    assert done["model_sha256"] == whole["model_sha256"]
    assert {line["noise_multiplier"] for line in released_in(path)} == {planned}


def test_leftovers_of_a_start_killed_while_writing_a_release_are_removed(federate: Federate) -> None:
    words = (*TOY, "privacy.noise=secure", "run_name=half-released")
    _, path = break_and_resume(federate, 2, "aggregate_evaluate", *words)
    left = path / ".release.safetensors.0123abcd.tmp"
    left.write_bytes(b"half")
    federate(*words, "resume=true")
    assert not left.exists()


def test_a_release_that_was_damaged_is_not_made_again_unasked(federate: Federate, data_home: Path) -> None:
    words = (*TOY, "privacy.noise=secure", "run_name=damaged")
    break_off(federate, 2, "aggregate_evaluate", *words)
    (data_home / "runs" / "damaged" / "release.safetensors").write_bytes(b"gone")
    with pytest.raises(ConfigError, match=r"release.safetensors is damaged .* bring it back from a copy, or remove it"):
        federate(*words, "resume=true")
