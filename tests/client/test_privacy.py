"""Local differential privacy: updates are clipped and get the right noise, and all that is released is counted."""

import json
import sys
from collections.abc import Callable
from math import exp, sqrt
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from scipy.stats import norm

from flapp import messages, privacy
from flapp.checkpoint.manager import ChunkManager
from flapp.client import mods
from flapp.config.load import compose, to_json
from flapp.config.schema import Config, ConfigError, PrivacyConfig
from tests.conftest import Federate, break_and_resume, break_off, read_lines
from tests.support.noise import START, check_noise, length
from tests.support.replies import Sent, changing, listen

pytest.importorskip("dp_accounting", reason='needs pip install -e ".[privacy]"')

Tensors = dict[str, np.ndarray]
DIGITS = ("model=linear", "clients=2", "num_rounds=1", "evaluate.personal_epochs=0", "privacy=local")
TOY = ("experiment=toy_regression", "num_rounds=3", "privacy=local", "privacy.clipping_norm=0.01")
GRID = [(e, d, t) for e in (0.1, 1.0, 10.0) for d in (1e-9, 1e-5, 1e-2) for t in (1, 20, 300)]


def delta_of(epsilon: float, multiplier: float) -> float:
    """Return the delta of the Gaussian mechanism: theorem 8 of Balle and Wang 2018, with sensitivity 1."""
    half, tail = 1 / (2 * multiplier), epsilon * multiplier
    return float(norm.cdf(half - tail) - exp(epsilon + norm.logcdf(-half - tail)))


def settings_of(epsilon: float, delta: float, clipping_norm: float = 1.0) -> PrivacyConfig:
    return PrivacyConfig(kind="local", clipping_norm=clipping_norm, epsilon=epsilon, delta=delta)


def spent(releases: int) -> float:
    """Return the epsilon of a toy run's client after so many releases."""
    return privacy.total_epsilon(settings_of(10.0, 1e-5), releases)


@pytest.mark.parametrize(("epsilon", "delta", "releases"), GRID)
def test_the_total_epsilon_has_the_stated_delta_by_the_formula(epsilon: float, delta: float, releases: int) -> None:
    settings = settings_of(epsilon, delta)
    multiplier = privacy.find_sigma(settings) / 2
    assert delta_of(epsilon, multiplier) == pytest.approx(delta, rel=1e-6)
    total = privacy.total_epsilon(settings, releases)
    assert delta_of(total, multiplier / sqrt(releases)) == pytest.approx(delta, rel=1e-6)


def test_noise_has_the_stated_variance_on_every_tensor() -> None:
    settings = settings_of(2.0, 1e-6, clipping_norm=0.3)
    sigma = privacy.find_sigma(settings)
    check_noise([privacy.perturb(START, START, settings.clipping_norm, sigma) for _ in range(3)], START, sigma)


def test_twice_the_clipping_norm_is_the_sensitivity_of_any_two_updates() -> None:
    start = {"w": np.zeros(4)}
    ends = [privacy.perturb(start, {"w": np.array([x, 0, 0, 0])}, 0.5, 0.0)["w"] for x in (9.0, -9.0)]
    settings = settings_of(1.0, 1e-5, clipping_norm=0.5)
    apart = float(np.linalg.norm(ends[0] - ends[1]))
    assert delta_of(1.0, privacy.find_sigma(settings) / apart) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 10.0, 1e30])
def test_an_update_moves_the_model_by_the_clipping_norm_at_most_over_all_tensors_together(factor: float) -> None:
    before = {"a": np.full(3, 2.0, np.float32), "b": np.zeros((2, 2), np.float32), "c": np.array(1.0, np.float32)}
    update = {"a": np.array([1.0, -2.0, 2.0]), "b": np.full((2, 2), 2.0), "c": np.array(4.0)}  # of length sqrt(41)
    trained = {key: (before[key] + factor * update[key]).astype(np.float32) for key in before}
    moved = privacy.perturb(before, trained, sqrt(41), 0.0)
    found = {key: moved[key].astype(np.float64) - before[key] for key in moved}
    assert length(list(found.values())) <= sqrt(41) * (1 + 1e-6)
    for key in before:
        assert found[key] == pytest.approx(min(factor, 1.0) * update[key], abs=1e-5)


@pytest.mark.parametrize(
    ("start", "trained", "refusal"),
    [
        ({"w": np.zeros(2)}, {"w": np.array([np.nan, 100.0])}, "not finite, so it cannot be clipped: lower train.lr"),
        ({"w": np.zeros(2)}, {"w": np.array([np.inf, 100.0])}, "not finite, so it cannot be clipped: lower train.lr"),
        ({"n": np.array(3)}, {"n": np.array(3)}, "cannot add noise to n, which is of int64"),
        ({"w": np.zeros(2)}, {}, "only one of the sent and the trained model has w"),
    ],
)
def test_an_update_that_cannot_be_protected_is_not_released(start: Tensors, trained: Tensors, refusal: str) -> None:
    with pytest.raises((FloatingPointError, ValueError), match=refusal):
        privacy.perturb(start, trained, 1.0, 1.0)


def release(train: Callable[[Tensors], Tensors], settings: Config, size: int = 2) -> Tensors:
    """Send privacy_mod two tensors of `size` numbers and train with `train`.

    Return the difference between what it sends and what it received.
    """
    order = messages.Instructions("0", 1, messages.source_digest())
    start = {"a": np.full(size, 3.0, np.float32), "b": np.zeros(size, np.float32)}
    message = messages.pack_instructions(1, messages.TRAIN, order, ArrayRecord({k: Array(v) for k, v in start.items()}))
    message.metadata.__dict__["_message_id"] = "1"

    def app(message: Message, context: Context) -> Message:
        received = {key: array.numpy() for key, array in messages.unpack_arrays(message.content).items()}
        trained = ArrayRecord({key: Array(values) for key, values in train(received).items()})
        return messages.pack_reply(message, messages.Claim("0"), {}, trained)

    context = Context(1, 1, {"client-id": "0"}, RecordDict(), {"config-json": to_json(settings)})
    reply = mods.privacy_mod(message, context, app)
    return {key: array.numpy() - start[key] for key, array in messages.unpack_arrays(reply.content).items()}


def test_the_mod_clips_and_adds_the_noise_as_the_config_says() -> None:
    settings = compose([*TOY, "privacy.epsilon=1e7", "privacy.clipping_norm=5.0"])  # so there is hardly any noise
    found = release(lambda model: {k: v + np.float32(1e6) for k, v in model.items()}, settings)
    assert np.concatenate(list(found.values())) == pytest.approx(np.full(4, 2.5), abs=0.01)

    settings = compose([*TOY, "privacy.epsilon=0.5", "privacy.delta=0.001", "privacy.clipping_norm=4.0"])
    variance = length(list(release(lambda model: model, settings, 1200).values())) ** 2 / 2400
    assert delta_of(0.5, sqrt(variance) / 8.0) == pytest.approx(0.001, rel=0.35)
    assert variance == pytest.approx(privacy.find_sigma(settings_of(0.5, 0.001, 4.0)) ** 2, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("strategy=fedlora", "lora=default", "lora.targets=[fc]", "train.steps=1")])
def test_noise_is_added_and_the_run_goes_to_its_end(federate: Federate, settings: tuple[str, ...]) -> None:
    noisy, path = federate(*DIGITS, *settings)
    again, _ = federate(*DIGITS, *settings)
    assert noisy["status"] == "finished"
    assert not any(line["failures"] for line in read_lines(path, "train"))
    assert noisy["model_sha256"] != again["model_sha256"]


def test_a_clients_store_holds_the_noisy_update_only(federate: Federate, data_home: Path) -> None:
    seen: Sent = []
    federate(*TOY, "num_rounds=1", "run_name=stored", tamper=listen(seen))
    store = data_home / "checkpoints" / "stored" / "client_1" / "client_1_chunks.db"
    with ChunkManager(store, create=False) as kept:
        tensors = kept.reconstruct_model_from_chunks(1)
    assert {k: t.numpy().tobytes() for k, t in tensors.items()} == {k: v.tobytes() for k, v in dict(seen)["1"].items()}


def test_the_client_that_was_asked_most_often_counts(federate: Federate) -> None:
    words = ("strategy.fraction_train=0.34", "num_rounds=5")
    done, path = federate(*TOY, *words)
    asked = [set(line["client_bytes_down"]) for line in read_lines(path, "train")]
    most = max(sum(str(client) in names for names in asked) for client in range(3))
    assert 1 < most < 5
    assert done["epsilon"] == spent(most)


@pytest.mark.slow
def test_a_resumed_run_whose_clients_replay_has_the_epsilon_of_an_undisturbed_one(federate: Federate) -> None:
    whole, whole_path = federate(*TOY)
    for place in ("_receive", "aggregate_train", "facts"):
        resumed, path = break_and_resume(federate, 2, place, *TOY, f"run_name=private{place}")
        assert resumed["epsilon"] == whole["epsilon"]
        told = [[line["epsilon"] for line in read_lines(each, "train")] for each in (path, whole_path)]
        assert told[0] == told[1]


@pytest.mark.parametrize("setting", ["checkpoint=off", "checkpoint=recent"])
def test_a_round_that_is_trained_again_counts_twice(federate: Federate, data_home: Path, setting: str) -> None:
    name = f"again-{setting.replace('=', '-')}"
    break_off(federate, 2, "aggregate_train", *TOY, setting, f"run_name={name}")
    if setting == "checkpoint=recent":
        (data_home / "checkpoints" / name / "client_1" / "client_1_chunks.db").unlink()
    resumed, _ = federate(*TOY, setting, f"run_name={name}", "resume=true")
    assert resumed["epsilon"] == spent(4)


@pytest.mark.slow
def test_rounds_dropped_by_resume_from_still_count_as_released(federate: Federate) -> None:
    federate(*TOY, "checkpoint=all", "run_name=back", "checkpoint.replay=false")
    words = ("checkpoint=all", "run_name=back", "resume=true", "resume_from=1")
    replayed, _ = federate(*TOY, *words)
    assert replayed["epsilon"] == spent(3)
    anew, path = federate(*TOY, *words, "checkpoint.replay=false")
    assert anew["epsilon"] == spent(5)
    again, _ = federate(*TOY, "checkpoint=all", "run_name=back", "resume=true")
    assert again["epsilon"] == anew["epsilon"]
    (path / "releases.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"releases.jsonl lacks round 1.*bring it back from a copy, or start a new"):
        federate(*TOY, "checkpoint=all", "run_name=back", "resume=true")


def test_a_failed_run_says_what_was_released_before_it_failed(federate: Federate, data_home: Path) -> None:
    break_off(federate, 1, "_receive", *TOY, "run_name=failed")
    said = json.loads((data_home / "runs" / "failed" / "metrics.json").read_text())
    assert said["status"] == "failed"
    assert said["epsilon"] == pytest.approx(10.0)


def test_without_its_package_both_sides_refuse_to_start(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    fix = r'needs the package dp-accounting \(.*\): pip install -e "\.\[privacy\]", or set privacy=none'
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "dp_accounting", None)
        privacy.total_epsilon.cache_clear()
        privacy._noise_multiplier.cache_clear()
        with pytest.raises(ConfigError, match=fix):
            federate(*TOY)

    def fail(settings: PrivacyConfig) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "dp_accounting", None)
            privacy._noise_multiplier.cache_clear()
            return privacy.find_sigma(settings)

    monkeypatch.setattr("flapp.client_app.find_sigma", fail)
    with pytest.raises(RuntimeError, match=f"the run cannot start: clients 0 to 2: privacy.*{fix}"):
        federate(*TOY)


def test_the_server_says_before_round_one_what_is_protected_and_then_the_epsilon_so_far(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("flapp.server.run.log", lambda level, text, *values: said.append(text % values))
    lie = changing(change=lambda reply: reply.content.metric_records[messages.METRICS].update({messages.REPLAYED: 1}))
    done, path = federate(*TOY, tamper=lie)  # clients that say that they only replay count all the same
    expected = [spent(releases) for releases in range(1, 4)]
    assert [line["epsilon"] for line in read_lines(path, "train")] == expected
    assert (done["epsilon"], done["delta"]) == (expected[-1], 1e-5)
    assert f"epsilon is 10 for one round and {expected[-1]:.4g} for a client that trains in all 3 rounds" in said[0]
    for what in ("numbers of samples", "label histograms", "training losses", "evaluation results", "errors"):
        assert what in said[1]
