"""What hostile clients send: they are named and left out, and the others' result does not change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord
from safetensors.torch import load_file

from flapp.checks import update_norm
from flapp.config.schema import ConfigError
from flapp.messages import ARRAYS, CLAIMS, METRICS, NUM_EXAMPLES, Claim, pack_claims, unpack_claims
from flapp.server.roster import FederationError
from flapp.strategy.bounds import NormBound, cap_shares
from tests.conftest import break_off, read_clients, read_lines
from tests.support.claims import set_claim

Federate = Callable[..., tuple[dict[str, Any], Path]]
Change = Callable[[Message], None]
DIGITS = ("model=linear", "clients=4", "num_rounds=2", "train.epochs=1", "evaluate.every=1")
TEN = ("model=linear", "num_rounds=6", "evaluate.every=6", "evaluate.personal_epochs=0")


class Hostile:
    """Stands between clients and the server; `received` is the model that the clients were sent."""

    def __init__(self, **changes: Change) -> None:
        self.changes = {name.removeprefix("c"): change for name, change in changes.items()}

    def __call__(self, name: str, reply: Message) -> Message:
        if name in self.changes and reply.has_content() and ARRAYS in reply.content.array_records:
            self.changes[name](reply)
        return reply


def fill(value: float) -> Change:
    """Set every weight to `value`."""

    def change(reply: Message) -> None:
        record = reply.content.array_records[ARRAYS]
        for key, array in list(record.items()):
            record[key] = Array(np.full_like(array.numpy(), value))

    return change


def scale(factor: float, origin: dict[str, np.ndarray]) -> Change:
    """Send `factor` times the honest update, which started from `origin`."""

    def change(reply: Message) -> None:
        record = reply.content.array_records[ARRAYS]
        for key, array in list(record.items()):
            record[key] = Array(origin[key] + np.float32(factor) * (array.numpy() - origin[key]))

    return change


def drop(reply: Message) -> None:
    """Leave the reply without the model, as a client that failed."""
    del reply.content[ARRAYS]


def names_of(path: Path) -> list[set[str]]:
    return [{failure["client"] for failure in line["failures"]} for line in read_lines(path, "train")]


def received_by(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Return the global model of the round under way, which clients start from."""
    from flapp.strategy.fedavg import FedAvg

    origin: dict[str, np.ndarray] = {}
    real = FedAvg.configure_train

    def configure(strategy: FedAvg, server_round: int, arrays: ArrayRecord, *rest: Any) -> Any:
        origin.update({key: array.numpy() for key, array in arrays.items()})
        return real(strategy, server_round, arrays, *rest)

    monkeypatch.setattr(FedAvg, "configure_train", configure)
    return origin


def claiming(client_id: str, samples: int) -> Callable[[str, Message], Message]:
    """Return a tamper function: a client claims so many training samples, when it joins and in each reply."""

    def tamper(name: str, reply: Message) -> Message:
        set_claim(reply.content, client_id, train=samples, label_hist=[samples] + [0] * 9)
        if name == client_id and "train-loss" in reply.content.metric_records.get(METRICS, {}):
            reply.content.metric_records[METRICS][NUM_EXAMPLES] = samples
        return reply

    return tamper


def test_three_hostile_clients_of_ten_are_named_and_change_nothing(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = received_by(monkeypatch)
    lie = claiming("5", 10**12)
    hostile = Hostile(c2=fill(3e38), c8=scale(-100.0, origin))

    def attack(name: str, reply: Message) -> Message:
        return hostile(name, lie(name, reply))

    absent = Hostile(c2=drop, c8=drop)
    without, _ = federate(*TEN, tamper=lambda name, reply: absent(name, lie(name, reply)))
    attacked, path = federate(*TEN, tamper=attack)
    assert names_of(path) == [{"2", "8"}] * 6
    (roster,) = read_lines(path, "roster")
    assert roster["refused"].keys() == {"5"}
    assert "claims 1000000000000 training samples, the partition gives it" in roster["refused"]["5"]
    assert attacked["model_sha256"] == without["model_sha256"]
    everyone, _ = federate(*TEN)
    assert abs(attacked["accuracy"] - everyone["accuracy"]) < 0.05


def test_one_huge_but_finite_model_in_round_one_is_left_out(federate: Federate) -> None:
    without, _ = federate(*DIGITS, tamper=Hostile(c1=drop))
    attacked, path = federate(*DIGITS, tamper=Hostile(c1=fill(3e38)))
    assert attacked["model_sha256"] == without["model_sha256"]
    for line in read_lines(path, "train"):
        (failure,) = line["failures"]
        assert failure["client"] == "1"
        assert "whose squares overflow float32" in failure["reason"]


@pytest.mark.parametrize("first", [1, 2])
def test_an_update_far_longer_than_the_others_is_left_out_in_any_round(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    origin = received_by(monkeypatch)
    rounds = iter(range(1, 10))
    flip = scale(-100.0, origin)
    loud = Hostile(c3=lambda reply: flip(reply) if next(rounds) >= first else None)
    _, path = federate(*DIGITS, tamper=loud)
    assert names_of(path) == [{"3"} if number >= first else set() for number in (1, 2)]
    reason = read_lines(path, "train")[-1]["failures"][0]["reason"]
    assert "raise strategy.norm_limit" in reason
    rounds = iter(range(1, 10))
    _, path = federate(*DIGITS, "strategy.norm_limit=null", tamper=loud)
    assert names_of(path) == [set(), set()]


def test_a_resumed_run_bounds_updates_as_the_undisturbed_one_does(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[list[float]] = []  # what each round measures updates by
    real = NormBound.limit

    def limit(bound: NormBound, norms: dict[str, float]) -> float:
        limits.append(list(bound.medians))
        return real(bound, norms)

    settings = (*DIGITS, "num_rounds=4")
    monkeypatch.setattr(NormBound, "limit", limit)
    whole, _ = federate(*settings)
    assert len(limits) == 4
    expected = limits[2]
    assert len(expected) == 2
    break_off(federate, 3, "aggregate_train", *settings, "run_name=bounded")
    limits.clear()
    resumed, _ = federate(*settings, "run_name=bounded", "resume=true")
    assert limits[0] == expected
    assert resumed["model_sha256"] == whole["model_sha256"]


def test_where_the_server_has_no_data_a_claim_counts_for_half_at_most(
    federate: Federate, data_home: Path, tmp_path: Path
) -> None:
    seen: dict[str, np.ndarray] = {}
    lie = claiming("0", 10**12)

    def tamper(name: str, reply: Message) -> Message:
        if reply.has_content() and ARRAYS in reply.content.array_records:
            seen[name] = reply.content.array_records[ARRAYS]["fc.weight"].numpy()
            counts[name] = int(reply.content.metric_records[METRICS][NUM_EXAMPLES])
        return lie(name, reply)

    counts: dict[str, int] = {}
    nodes = [{"client-id": str(i), "home": str(data_home)} for i in range(4)]
    settings = (*DIGITS, "num_rounds=1", f"home={tmp_path}", "strategy.norm_limit=null")
    _, path = federate(*settings, nodes=nodes, tamper=tamper)
    (line,) = read_lines(path, "train")
    assert line["capped"] == {"0": 1.0}
    assert line["failures"] == []
    others = sum(counts[name] for name in "123")
    expected = 0.5 * seen["0"].astype(np.float64)
    expected += 0.5 * sum(seen[name].astype(np.float64) * counts[name] / others for name in "123")
    np.testing.assert_allclose(load_file(path / "model.safetensors")["fc.weight"].numpy(), expected, rtol=1e-6)


def test_a_client_that_fails_does_not_change_what_the_others_count_for(federate: Federate) -> None:
    seen: dict[str, np.ndarray] = {}

    def tamper(name: str, reply: Message) -> Message:
        if reply.has_content() and ARRAYS in reply.content.array_records:
            seen[name] = reply.content.array_records[ARRAYS]["fc.weight"].numpy().astype(np.float64)
        return Hostile(c3=drop)(name, reply)

    _, path = federate(*DIGITS, "num_rounds=1", tamper=tamper)
    counts = {name: line["train"] for name, line in read_clients(path).items()}
    assert counts["1"] + counts["2"] < counts["0"] < sum(counts[name] for name in "123")  # half only of what is left
    (line,) = read_lines(path, "train")
    assert "capped" not in line
    expected = sum(seen[name] * counts[name] for name in "012") / sum(counts[name] for name in "012")
    np.testing.assert_allclose(load_file(path / "model.safetensors")["fc.weight"].numpy(), expected, rtol=1e-6)


def test_a_claim_on_the_test_samples_cannot_own_the_accuracy(
    federate: Federate, data_home: Path, tmp_path: Path
) -> None:
    def tamper(name: str, reply: Message) -> Message:
        set_claim(reply.content, "0", test=10**12)
        if name == "0" and "loss-sum" in (numbers := reply.content.metric_records.get(METRICS, MetricRecord())):
            numbers[NUM_EXAMPLES] = numbers["correct"] = 10**12
        return reply

    nodes = [{"client-id": str(i), "home": str(data_home)} for i in range(4)]
    settings = (*DIGITS, "num_rounds=1", f"home={tmp_path}", "evaluate.personal_epochs=0", "train.steps=1")
    _, path = federate(*settings, nodes=nodes, tamper=tamper)
    (line,) = read_lines(path, "evaluate")
    honest = [line["accuracy_by_client"][name] for name in "123"]
    assert line["accuracy_by_client"]["0"] == 1.0
    assert line["capped"] == {"0": 1.0}
    assert 0.5 + 0.5 * min(honest) <= line["accuracy"] <= 0.5 + 0.5 * max(honest)


def set_metric(name: str, value: float) -> Change:
    def change(reply: Message) -> None:
        reply.content.metric_records[METRICS][name] = value

    return change


def add_record(reply: Message) -> None:
    reply.content["\x1b[31mextra"] = MetricRecord({"a": 1})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_metric("train-loss", -0.5), "sent train-loss=-0.5, which is never below 0"),
        (set_metric("train-loss", 1e300), "sent train-loss=1e+300, more than"),
        (set_metric("seconds", -1.0), "sent seconds=-1.0, which is never below 0"),
        (set_metric("seconds", float("inf")), "sent seconds=inf"),
        (add_record, "sent 1 records that nobody asked for, such as \\x1b[31mextra"),
        (lambda reply: [set_metric(f"m{i}", 1.0)(reply) for i in range(100)] and None, "metrics, at most 64 are read"),
    ],
    ids=["negative", "beyond", "past", "infinite", "record", "many"],
)
def test_numbers_that_cannot_be_are_refused_by_name(federate: Federate, change: Change, reason: str) -> None:
    _, path = federate(*DIGITS, "num_rounds=1", "evaluate.personal_epochs=0", tamper=Hostile(c2=change))
    (failure,) = read_lines(path, "train")[0]["failures"]
    assert failure["client"] == "2"
    assert reason in failure["reason"]


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"loss-sum": -1.0}, "sent loss-sum=-1.0, which is never below 0"),
        ({"loss-sum": 1e300}, "sent loss-sum=1e+300, more than"),
        ({"personal-loss-sum": -1.0}, "sent personal-loss-sum=-1.0"),
        ({"correct": 10**6}, "more correct answers than its"),
        ({"personal-correct": -1}, "more correct answers than its"),
    ],
)
def test_evaluations_that_cannot_be_are_refused_by_name(
    federate: Federate, metrics: dict[str, float], reason: str
) -> None:
    def tamper(name: str, reply: Message) -> Message:
        if name == "2" and "loss-sum" in reply.content.metric_records.get(METRICS, {}):
            for metric, value in metrics.items():
                set_metric(metric, value)(reply)
        return reply

    _, path = federate(*DIGITS, "num_rounds=1", tamper=tamper)
    (failure,) = read_lines(path, "evaluate")[0]["failures"]
    assert failure["client"] == "2"
    assert reason in failure["reason"]


def test_a_model_in_an_evaluation_is_refused(federate: Federate) -> None:
    def tamper(name: str, reply: Message) -> Message:
        if name == "2" and "loss-sum" in reply.content.metric_records.get(METRICS, {}):
            reply.content[ARRAYS] = ArrayRecord({"w": Array(np.zeros(3))})
        return reply

    _, path = federate(*DIGITS, "num_rounds=1", tamper=tamper)
    assert "nobody asked for, such as arrays" in read_lines(path, "evaluate")[0]["failures"][0]["reason"]


def test_reasons_are_cut_to_one_printable_line(federate: Federate) -> None:
    def tamper(name: str, reply: Message) -> Message:
        trained = reply.has_content() and ARRAYS in reply.content.array_records
        if name != "1" or not trained:
            return reply
        return Message(Error(code=1, reason="\x1b[2J\nbroken " + "x" * 10**6), reply_to=reply)

    _, path = federate(*DIGITS, "num_rounds=1", tamper=tamper)
    reason = read_lines(path, "train")[0]["failures"][0]["reason"]
    assert len(reason) < 520
    assert reason.isprintable()
    assert "broken xxx" in reason


def test_a_node_cannot_speak_for_clients_that_the_run_does_not_have(federate: Federate) -> None:
    def tamper(name: str, reply: Message) -> Message:
        if CLAIMS in reply.content.config_records and (claims := unpack_claims(reply.content, 4))[0].client_id == "1":
            reply.content = pack_claims(reply, [*claims, Claim("\x1b[2Jghost", fault="x" * 1000)]).content
        return reply

    _, path = federate(*DIGITS, "num_rounds=1", tamper=tamper)
    (line,) = read_lines(path, "roster")
    assert line["clients"] == 4
    ((key, reason),) = line["refused"].items()
    assert key.startswith("node ")
    assert len(reason) < 600
    assert reason.isprintable()


def test_an_aggregate_that_nobody_can_train_from_does_not_become_a_round(federate: Federate, data_home: Path) -> None:
    settings = ("strategy.server_optimizer=fedavgm", "strategy.server_lr=1e35", "run_name=overflown")
    with pytest.raises(FederationError, match=r"round 1: the aggregated fc\.\w+ has .* the round is not kept"):
        federate(*DIGITS, *settings)
    path = data_home / "runs" / "overflown"
    assert read_lines(path, "train") == []
    assert json.loads((path / "metrics.json").read_text())["status"] == "failed"


def test_metrics_are_strict_json_whatever_a_loss_is(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    from flapp.server import run
    from flapp.training import Evaluation

    monkeypatch.setattr(run, "evaluate", lambda *_: Evaluation(float("inf"), 0, 10))
    _, path = federate(*DIGITS, "num_rounds=1", "evaluate.central=true")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "central"] == [None, None]


def test_the_length_of_an_update_is_numpys() -> None:
    rng = np.random.default_rng(0)
    pairs = [
        (rng.normal(size=s).astype(t), rng.normal(size=s).astype(t)) for s, t in (((1 << 17) + 3, "f4"), ((2, 3), "f2"))
    ]
    exact = np.concatenate([(a.astype(np.float64) - b).ravel() for a, b in pairs])
    assert update_norm(pairs) == pytest.approx(np.linalg.norm(exact), rel=1e-12)
    assert update_norm([(np.float32([3e38]), np.float32([-3e38]))]) == pytest.approx(6e38, rel=1e-6)
    assert update_norm([]) == 0.0


def too_long(bound: NormBound, norms: dict[str, float]) -> set[str]:
    return set(bound.faults(norms, bound.limit(norms)))


def test_the_limit_follows_the_medians_of_the_last_two_rounds() -> None:
    bound = NormBound(10.0)
    assert bound.known_limit() is None  # until a round has been accepted
    assert too_long(bound, {"a": 1.0, "b": 1.2, "c": 13.0}) == {"c"}
    assert too_long(bound, {"a": 1.0, "b": 11.0}) == {"b"}  # of two, the shorter is the median
    bound.accept({"a": 1.0, "b": 3.0, "c": 9.0})
    assert bound.limit({"a": 1e9}) == bound.known_limit() == 30.0
    bound.accept({"a": 0.5})
    assert bound.limit({"a": 1e9}) == 30.0
    bound.accept({"a": 0.4})
    assert bound.limit({"a": 1e9}) == 5.0


def test_nobody_is_too_long_where_nobody_has_moved() -> None:
    assert too_long(NormBound(10.0), {"a": 0.0, "b": 1.0}) == set()
    assert too_long(NormBound(None), {"a": 1.0, "b": 1.0, "c": 1e30}) == set()


@pytest.mark.parametrize("most", [0.5, 0.3, 0.25])
def test_no_share_exceeds_the_bound_and_the_rest_keep_their_proportions(most: float) -> None:
    weights = [5.0, 1e12, 7.0, 300.0, 2.0, 11.0]
    capped = cap_shares(weights, most)
    assert max(capped) / sum(capped) == pytest.approx(most)
    small = [i for i, weight in enumerate(capped) if weight == weights[i]]
    assert len(small) >= 3
    assert all(capped[i] == max(capped) for i in range(6) if i not in small)


def test_weights_within_the_bound_and_too_few_for_it_stay_as_they_are() -> None:
    assert cap_shares([3, 2, 1], 0.5) == [3, 2, 1]
    assert cap_shares([9, 1], 0.5) == [9, 1]
    assert cap_shares([9, 1, 1], None) == [9, 1, 1]
    assert cap_shares([1.0, 0.0, 0.0], 0.5) == [1.0, 1.0, 1.0]


def test_a_norm_limit_that_refuses_the_median_itself_is_refused(federate: Federate) -> None:
    with pytest.raises(ConfigError, match=r"strategy.norm_limit=1.* more than 1"):
        federate(*DIGITS, "strategy.norm_limit=1")
