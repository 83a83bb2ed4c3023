"""Central differential privacy: the clip bounds every client, the noise is as stated, and rounds are counted once."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message
from torch import nn, zeros

from flapp import central
from flapp.config.load import compose
from flapp.config.schema import Config, ConfigError
from flapp.messages import ARRAYS, METRICS, WITHIN_CLIP, pack
from flapp.server.releases import Release
from flapp.server.roster import FederationError
from flapp.server.run import initial_model
from flapp.strategy.central import Central
from flapp.sums import WeightedSum, clip
from tests.conftest import Federate, LocalGrid, read_lines, run_app
from tests.support.federations import nodes
from tests.support.noise import START, check_noise, length
from tests.support.replies import Sent, changing, drop, failures, listen

pytest.importorskip("dp_accounting", reason='needs pip install -e ".[privacy]"')

TOY = ("experiment=toy_regression", "num_rounds=3", "privacy=central")
LORA = ("model=vit_tiny", "lora=default", "strategy=fedlora", "num_rounds=2", "clients=2", "train.steps=2")
LORA_TOY = (*LORA, "train.batch_size=2", "evaluate.personal_epochs=0", "privacy=central", "evaluate.every=2")
MODEL = {"a": np.full(3, 2.0, np.float32), "b": np.zeros((2, 2), np.float32), "c": np.array(1.0, np.float32)}
Tensors = Mapping[str, np.ndarray]


def noisy(*words: str) -> Central:
    """Return the server's part of a toy run, with a ledger that keeps nothing."""
    config = compose([*TOY, *words])
    ledger: Any = SimpleNamespace(plan=central.plan_of(config), kept=lambda *_: None)
    return Central(config, ledger)


def released(
    server: Central, updates: Sequence[Tensors], number: int = 1, short: Sequence[int] = (), model: Tensors = MODEL
) -> Release:
    """Return the release of a round in which clients trained a model to it plus these updates."""
    total, current = WeightedSum(), ArrayRecord({key: Array(values) for key, values in model.items()})
    if updates:
        trained = [{key: pack((model[key] + each[key]).astype(np.float32)) for key in model} for each in updates]
        total.add([(each, 1.0) for each in trained])
    bits = short or [1] * len(updates)
    metrics = {str(i): {WITHIN_CLIP: bit} for i, bit in enumerate(bits)}
    return server.make_release(number, current, list(model), total, metrics, {"loss": None})


@pytest.mark.parametrize(
    ("z", "sampling", "rounds", "delta", "kind"),
    [(1.0, 0.01, 1000, 1e-6, "rdp"), (2.0, 1.0, 20, 1e-5, "rdp"), (2.0, 1.0, 20, 1e-5, "pld")],
)
def test_epsilon_is_that_of_dp_accounting(z: float, sampling: float, rounds: int, delta: float, kind: str) -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    event = SelfComposedDpEvent(PoissonSampledDpEvent(sampling, GaussianDpEvent(z)), rounds)
    theirs = {"rdp": RdpAccountant, "pld": PLDAccountant}[kind]().compose(event).get_epsilon(delta)
    assert central.epsilon_of(z, sampling, rounds, delta, kind) == pytest.approx(theirs, rel=1e-6)


def test_epsilon_of_the_cifar10_benchmark_of_pfl_research_is_the_one_it_is_published_with() -> None:
    """Its baseline.yaml: epsilon 2, delta 1e-6, 1,500 rounds of 1,000 out of 10^6 clients, and its PLD accountant.

    For these, pfl 0.6.0's PLDPrivacyAccountant returns the noise parameter 0.616145, its RDPPrivacyAccountant 0.713778.
    """
    assert central.epsilon_of(0.616145, 0.001, 1500, 1e-6, "pld") == pytest.approx(2.0, rel=0.01)
    assert central.epsilon_of(0.713778, 0.001, 1500, 1e-6, "rdp") == pytest.approx(2.0, rel=0.01)


def test_a_budget_that_no_noise_meets_is_refused_with_a_line() -> None:
    with pytest.raises(ConfigError, match=r"privacy.epsilon=1e\+06 needs a noise multiplier below 0.1 or above 1e8"):
        central.plan_of(compose([*TOY, "privacy.epsilon=1e6"]))


def test_the_least_noise_spends_the_budget_in_the_planned_rounds_and_less_would_exceed_it() -> None:
    for accountant in ("rdp", "pld"):
        config = compose([*TOY, "privacy.epsilon=0.5", f"privacy.accountant={accountant}"])
        z = central.plan_of(config).multiplier
        assert central.epsilon_of(z, 1.0, 3, 1e-5, accountant) <= 0.5
        assert central.epsilon_of(z - 4e-4, 1.0, 3, 1e-5, accountant) > 0.5


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 10.0, 100.0, 1e30])
@pytest.mark.parametrize("start", [0.0, 3.0, 1e6])
def test_an_update_moves_the_sum_by_the_clip_at_most_over_all_tensors_together(factor: float, start: float) -> None:
    random = np.random.default_rng(1)
    sent = {"a": np.full(500, start, np.float32), "b": np.full((20, 3), -start, np.float32)}
    step = {key: random.normal(size=values.shape) for key, values in sent.items()}
    unit = length(list(step.values()))
    trained = {key: (sent[key] + factor * step[key] / unit).astype(np.float32) for key in sent}
    clipped = clip(sent, trained, 1.0) or trained
    moved = {key: np.subtract(clipped[key], sent[key], dtype=np.float64) for key in sent}
    assert length(list(moved.values())) <= 1.0 + 1e-9
    assert all(values.dtype == np.float32 for values in clipped.values())
    if start < 10 and factor >= 1:
        expected = np.concatenate([values.ravel() / unit for values in step.values()])
        assert np.concatenate([values.ravel() for values in moved.values()]) == pytest.approx(expected, abs=4e-6)


def test_an_update_that_is_short_enough_stays_as_it_is_and_one_that_is_not_finite_is_refused() -> None:
    assert clip(MODEL, {key: values + np.float32(0.1) for key, values in MODEL.items()}, 1.0) is None
    with pytest.raises(FloatingPointError, match="not finite, so it cannot be clipped: lower train.lr"):
        clip(MODEL, MODEL | {"c": np.array(np.nan, np.float32)}, 1.0)


@pytest.mark.parametrize("source", ["seeded", "secure"])
def test_noise_has_the_stated_variance_on_every_tensor(source: str) -> None:
    server = noisy("privacy.noise_multiplier=1.5", "privacy.clipping_norm=0.4", f"privacy.noise={source}")
    check_noise([dict(released(server, [], number, model=START).average) for number in range(3)], START, 1.5 * 0.4 / 3)


def test_secure_noise_is_never_the_same_and_seeded_noise_depends_on_round_and_tensor() -> None:
    secure, seeded = (noisy("privacy.noise_multiplier=1", f"privacy.noise={source}") for source in ("secure", "seeded"))
    assert not np.array_equal(released(secure, []).average["a"], released(secure, []).average["a"])
    assert np.array_equal(released(seeded, []).average["a"], released(seeded, []).average["a"])
    drawn = [central.drawer(seeded.config, *where)(4).tobytes() for where in ((1, "a"), (1, "b"), (2, "a"))]
    assert len(set(drawn)) == 3


def test_the_sum_is_divided_by_the_expected_number_of_clients_whoever_takes_part() -> None:
    server = noisy("privacy.noise_multiplier=1e-9", "clients=8", "strategy.fraction_train=0.5", "privacy.epsilon=1e9")
    update = {key: np.full(values.shape, 0.25) for key, values in MODEL.items()}
    for count in (1, 4, 6):
        average = released(server, [update] * count).average
        for key, start in MODEL.items():
            assert average[key] == pytest.approx(start + count * 0.25 / 4, abs=1e-6)


def test_adaptive_clipping_follows_the_quantile_and_its_noise_is_paid_for() -> None:
    words = ("privacy.clipping=adaptive", "privacy.noise_multiplier=1", "privacy.count_noise=2", "clients=40")
    server = noisy(*words, "privacy.quantile=0.8", "privacy.clipping_lr=0.3", "privacy.clipping_norm=2")
    assert server.plan.update_multiplier == pytest.approx((1 - 4.0**-2) ** -0.5)  # z_delta of algorithm 1
    update = {key: np.zeros(values.shape) for key, values in MODEL.items()}
    release = released(server, [update] * 4, short=[1, 0, 1, 1])
    noise = 2 * np.random.default_rng(central.derive_seed(0, "noise", 1, WITHIN_CLIP)).standard_normal(1)[0]
    within = ((0.5 - 0.5 + 0.5 + 0.5) + noise) / 40 + 0.5
    assert release.line["within_clip"] == pytest.approx(within)
    assert release.line["clipping_norm"] == 2
    assert release.next_clip == pytest.approx(2 * math.exp(-0.3 * (within - 0.8)))
    with pytest.raises(ConfigError, match=r"count_noise=0.5 alone spends more .* raise it above 0.5, or set"):
        noisy("privacy.clipping=adaptive", "privacy.noise_multiplier=1", "privacy.count_noise=0.5")
    assert noisy("privacy.clipping=adaptive", "privacy.noise_multiplier=3").plan.count_noise == 3


@pytest.mark.parametrize("rule", ["fedavg", "fedit", "ffa", "rolora"])
def test_what_clients_send_is_clipped_over_all_tensors_by_every_rule(federate: Federate, rule: str) -> None:
    words = LORA_TOY if rule != "fedavg" else (*TOY, "evaluate.every=3")
    words = (*words, f"strategy.aggregation={rule}") if rule != "fedavg" else words
    seen: Sent = []
    done, path = federate(*words, "privacy.clipping_norm=0.003", "train.lr=0.1", "num_rounds=1", tamper=listen(seen))
    assert done["status"] == "finished"
    assert not any(line["failures"] for line in read_lines(path, "train"))
    start = initial_model(compose([*words])).state_dict()
    for _, trained in seen:
        moved = [np.subtract(values, start[key].numpy(), dtype=np.float64) for key, values in trained.items()]
        assert length(moved) == pytest.approx(0.003, rel=1e-3)
        assert length(moved) <= 0.003 * (1 + 1e-9)


@pytest.mark.parametrize("factor", [10.0, 100.0, 1e15])
def test_a_client_that_does_not_clip_adds_nothing_and_the_rest_count(federate: Federate, factor: float) -> None:
    def stretch(reply: Message) -> None:
        arrays = reply.content.array_records[ARRAYS]
        reply.content[ARRAYS] = ArrayRecord({k: Array(a.numpy() + np.float32(factor)) for k, a in arrays.items()})

    _, path = federate(*TOY, "evaluate.every=3", tamper=changing("1", change=stretch))
    assert failures(path).keys() == {"1"}
    assert "the limit is 1: run unchanged flapp on its node, which then clips" in failures(path)["1"]
    _, without = federate(*TOY, "evaluate.every=3", tamper=changing("1", change=drop))
    models = [(folder / "model.safetensors").read_bytes() for folder in (path, without)]
    assert models[0] == models[1]


def test_a_client_that_lies_about_the_clip_is_left_out(federate: Federate) -> None:
    def lie(reply: Message) -> None:
        reply.content.metric_records[METRICS][WITHIN_CLIP] = 1000

    _, path = federate(*TOY, "privacy.clipping=adaptive", tamper=changing("2", change=lie))
    assert failures(path) == {"2": "sent within-clip=1000, which must be 0 or 1"}


@pytest.mark.usefixtures("in_pairs")
@pytest.mark.parametrize("words", [("clients=5",), ("clients=5", "privacy.clipping=adaptive")])
def test_groups_on_any_node_and_on_nodes_of_their_own_end_alike(federate: Federate, words: Sequence[str]) -> None:
    words = (*words, "checkpoint=off", "strategy.fraction_train=0.9", "strategy.server_optimizer=fedavgm")
    words = (*words, "privacy.noise_multiplier=3")  # no search for the one that the budget allows
    runs = [federate(*TOY, *words, **options) for options in ({"any_node": True}, {"any_node": False, "order": 7})]
    assert runs[0][0]["model_sha256"] == runs[1][0]["model_sha256"]
    lines = [[line["clipping_norm"] for line in read_lines(path, "train")] for _, path in runs]
    assert lines[0] == lines[1]
    assert (len(set(lines[0])) == 3) == ("privacy.clipping=adaptive" in words)


@pytest.mark.slow
def test_clients_are_drawn_independently_and_a_round_without_any_is_noise_only(federate: Federate) -> None:
    words = ("strategy.fraction_train=0.2", "num_rounds=12", "evaluate.every=12", "privacy.noise_multiplier=3")
    done, path = federate(*TOY, *words)
    counts = [line["asked"] for line in read_lines(path, "train")]
    assert {0, 1} <= set(counts)
    assert (done["status"], done["rounds"]) == ("finished", 12)
    empty = next(line for line in read_lines(path, "train") if not line["asked"])
    assert empty["loss"] is None


def test_a_run_stops_before_its_budget_is_exceeded_and_every_round_says_the_epsilon_so_far(federate: Federate) -> None:
    words = ("privacy.noise_multiplier=2", "privacy.epsilon=3", "num_rounds=5", "evaluate.every=5", "run_name=spent")
    done, path = federate(*TOY, *words)
    *said, more = (central.epsilon_of(2.0, 1.0, rounds, 1e-5, "rdp") for rounds in range(1, done["rounds"] + 2))
    assert [line["epsilon"] for line in read_lines(path, "train")] == said
    assert said[-1] <= 3 < more
    assert (done["epsilon"], done["delta"]) == (said[-1], 1e-5)
    assert (done["stopped_early"], [line["round"] for line in read_lines(path, "evaluate")]) == (True, [done["rounds"]])
    assert read_lines(path, "stop")[0]["metric"] == "epsilon"
    again, _ = federate(*TOY, *words, "resume=true")
    assert (again["rounds"], again["model_sha256"]) == (done["rounds"], done["model_sha256"])
    with pytest.raises(ConfigError, match=r"spends epsilon .* in one round, privacy.epsilon=0.1 is the budget: raise"):
        federate(*TOY, "privacy.noise_multiplier=2", "privacy.epsilon=0.1")


def test_a_round_in_which_all_clients_fail_is_noise_only(federate: Federate) -> None:
    done, path = federate(*TOY, "evaluate.every=3", tamper=changing(change=drop))
    lines = read_lines(path, "train")
    assert (done["status"], done["rounds"], done["epsilon"]) == ("finished", 3, lines[-1]["epsilon"])
    assert [(len(line["failures"]), line["loss"]) for line in lines] == [(3, None)] * 3


def test_a_federation_that_all_clients_have_left_ends_with_its_budget_unspent(data_home: Path) -> None:
    settings = compose([f"home={data_home}", "run_name=deserted", *TOY, "clients=3", "evaluate.every=3"])
    replies = itertools.count(1)

    def leave(_: str, reply: Message) -> Message:
        if next(replies) == 2 * 3:  # each has sent its claim, and its update of round 1
            grid.nodes.clear()
        return reply

    grid = LocalGrid({}, nodes(3), tamper=leave)
    with pytest.raises(FederationError, match="round 2: no client is present"):
        run_app(settings, grid)
    assert len((data_home / "runs" / "deserted" / "releases.jsonl").read_text().splitlines()) == 1


@pytest.mark.usefixtures("in_pairs")
def test_a_client_in_a_group_that_does_not_clip_is_told_so(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flapp.client.mods.clip", lambda *_: None)
    words = ("clients=5", "privacy.clipping_norm=1e-6", "evaluate.every=3", "checkpoint=off")
    _, path = federate(*TOY, *words, any_node=True)
    assert len(failures(path)) == 5
    assert all("run unchanged flapp on its node" in reason for reason in failures(path).values())


def test_the_clipping_norm_stays_within_bounds_whatever_the_noise_says() -> None:
    settings = compose([*TOY, "privacy.clipping=adaptive", "privacy.clipping_lr=10000"]).privacy
    assert central.next_clip(1.0, settings, -5.0) == pytest.approx(central.LONGEST_CLIP)
    assert central.next_clip(1.0, settings, 5.0) == pytest.approx(central.SHORTEST_CLIP)


def tie(model: nn.Module) -> None:
    model.again = nn.Linear(1, 1)
    model.again.weight = next(model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tie, r" and again.weight are one tensor.*: use a model without tied weights, or"),
        (lambda model: model.register_buffer("centre", zeros(2)), "and centre is not trained .* such as GroupNorm in"),
        (lambda model: model.add_module("norm", nn.BatchNorm1d(2)), "num_batches_tracked, which is of int64: choose a"),
    ],
)
def test_a_tensor_that_central_privacy_does_not_cover_is_refused_by_name(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], object], message: str
) -> None:
    def changed(config: Config) -> nn.Module:
        model = initial_model(config)
        change(model)
        return model

    monkeypatch.setattr("flapp.server.run.initial_model", changed)
    with pytest.raises(ValueError, match=message):
        federate(*TOY)
