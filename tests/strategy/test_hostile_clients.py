"""What hostile clients send: they are named and left out, and the others' result does not change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord
from safetensors.torch import load_file

from flapp.messages import ARRAYS, CLAIM, CLAIMS, METRICS, MOST_METRICS, NUM_EXAMPLES, Claim, pack_claims, unpack_claims
from flapp.server.roster import FederationError
from flapp.strategy.aggregation import NormBound
from flapp.strategy.fedavg import FedAvg
from tests.conftest import Federate, Tamper, break_and_resume, read_clients, read_lines
from tests.support.replies import Sent, changing, drop, failures, listen, set_claim, trained_in

Change = Callable[[Message], object]
DIGITS = (
    *("model=linear", "clients=4", "num_rounds=2", "train.epochs=1"),
    *("evaluate.every=1", "evaluate.personal_epochs=0"),
)
ONE_ROUND = (*DIGITS, "num_rounds=1")
TEN = ("model=linear", "num_rounds=2", "train.epochs=1", "evaluate.every=2", "evaluate.personal_epochs=0")


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


@pytest.fixture
def origin(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Return the global model of the round under way, which clients start from."""
    found: dict[str, np.ndarray] = {}
    real = FedAvg.configure_train

    def configure(strategy: FedAvg, server_round: int, arrays: ArrayRecord, *rest: Any) -> Any:
        found.update({key: array.numpy() for key, array in arrays.items()})
        return real(strategy, server_round, arrays, *rest)

    monkeypatch.setattr(FedAvg, "configure_train", configure)
    return found


@pytest.fixture
def sites(data_home: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the arguments of a federation whose server has no data to check claims with."""
    return {"nodes": [{"client-id": str(i), "home": str(data_home)} for i in range(4)]}


def claiming(client_id: str, samples: int) -> Tamper:
    """Return a tamper function: a client claims so many training samples, when it joins and in each reply."""

    def tamper(name: str, reply: Message) -> Message:
        set_claim(reply.content, client_id, train=samples, label_hist=[samples] + [0] * 9)
        if name == client_id and "train-loss" in reply.content.metric_records.get(METRICS, {}):
            reply.content.metric_records[METRICS][NUM_EXAMPLES] = samples
        return reply

    return tamper


@pytest.mark.slow
def test_three_hostile_clients_of_ten_are_named_and_change_nothing(
    federate: Federate, origin: dict[str, np.ndarray]
) -> None:
    lie = claiming("5", 10**12)
    huge, flipped = changing("2", change=fill(3e38)), changing("8", change=scale(-100.0, origin))
    absent = changing("2", "8", change=drop)
    without, _ = federate(*TEN, tamper=lambda name, reply: absent(name, lie(name, reply)))
    attacked, path = federate(*TEN, tamper=lambda name, reply: huge(name, flipped(name, lie(name, reply))))
    for number in (1, 2):
        assert failures(path, number).keys() == {"2", "8"}
        assert "whose squares overflow float32" in failures(path, number)["2"]
    (roster,) = read_lines(path, "roster")
    assert roster["refused"].keys() == {"5"}
    assert "claims 1000000000000 training samples, the partition gives it" in roster["refused"]["5"]
    assert attacked["model_sha256"] == without["model_sha256"]


@pytest.mark.parametrize("first", [1, 2])
def test_an_update_far_longer_than_the_others_is_left_out_in_any_round(
    federate: Federate, origin: dict[str, np.ndarray], first: int
) -> None:
    flip, rounds = scale(-100.0, origin), iter(range(1, 5))
    loud = changing("3", change=lambda reply: flip(reply) if next(rounds) % 2 == 0 or first == 1 else None)
    _, path = federate(*DIGITS, tamper=loud)
    assert [set(failures(path, number)) for number in (1, 2)] == [
        {"3"} if number >= first else set() for number in (1, 2)
    ]
    assert "raise strategy.norm_limit" in failures(path, 2)["3"]
    if first == 1:
        _, path = federate(*DIGITS, "strategy.norm_limit=null", tamper=loud)
        assert not failures(path, 1) | failures(path, 2)


@pytest.mark.slow
def test_a_resumed_run_bounds_updates_as_before(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[list[float]] = []  # what each round measures updates by
    real = NormBound.limit

    def limit(bound: NormBound, norms: dict[str, float]) -> float:
        if norms:  # a round asks before, too
            limits.append(list(bound.medians))
        return real(bound, norms)

    settings = (*DIGITS, "num_rounds=3", "evaluate.every=3")
    monkeypatch.setattr(NormBound, "limit", limit)
    whole, _ = federate(*settings)
    assert len(limits) == 3
    expected = limits[2]
    assert len(expected) == 2
    resumed, _ = break_and_resume(federate, 3, "aggregate_train", *settings, "run_name=bounded")
    assert limits[-1] == expected
    assert resumed["model_sha256"] == whole["model_sha256"]


def test_where_the_server_has_no_data_a_claim_counts_for_half_at_most(
    federate: Federate, sites: dict[str, Any], tmp_path: Path
) -> None:
    seen: Sent = []
    hear, lie = listen(seen), claiming("0", 10**12)
    settings = (*ONE_ROUND, f"home={tmp_path}", "strategy.norm_limit=null")
    _, path = federate(*settings, **sites, tamper=lambda name, reply: lie(name, hear(name, reply)))
    (line,) = read_lines(path, "train")
    assert line["capped"] == {"0": 1.0}
    assert line["failures"] == []
    counts = {name: facts["train"] for name, facts in read_clients(path).items()} | {"0": 0}
    sent = {name: arrays["fc.weight"].astype(np.float64) for name, arrays in seen}
    expected = 0.5 * sent["0"] + 0.5 * sum(sent[name] * counts[name] / sum(counts.values()) for name in "123")
    np.testing.assert_allclose(load_file(path / "model.safetensors")["fc.weight"].numpy(), expected, rtol=1e-6)


def test_a_client_that_fails_does_not_change_what_the_others_count_for(federate: Federate) -> None:
    seen: Sent = []
    hear, fail = listen(seen), changing("3", change=set_tensor(np.full(10, np.nan, np.float32)))
    _, path = federate(*ONE_ROUND, tamper=lambda name, reply: fail(name, hear(name, reply)))
    counts = {name: line["train"] for name, line in read_clients(path).items()}
    assert counts["1"] + counts["2"] < counts["0"] < sum(counts[name] for name in "123")  # half only of the rest
    assert "capped" not in read_lines(path, "train")[0]
    sent = {name: arrays["fc.weight"].astype(np.float64) for name, arrays in seen}
    expected = sum(sent[name] * counts[name] for name in "012") / sum(counts[name] for name in "012")
    np.testing.assert_allclose(load_file(path / "model.safetensors")["fc.weight"].numpy(), expected, rtol=1e-6)


def test_a_claim_on_the_test_samples_cannot_dominate_the_accuracy(
    federate: Federate, sites: dict[str, Any], tmp_path: Path
) -> None:
    def tamper(name: str, reply: Message) -> Message:
        set_claim(reply.content, "0", test=10**12)
        set_claim(reply.content, "1", val=10**12)
        if "loss-sum" in (numbers := reply.content.metric_records.get(METRICS, MetricRecord())):
            if name == "0":
                numbers[NUM_EXAMPLES] = numbers["correct"] = 10**12
            elif name == "1":
                numbers["val-correct"] = 10**12
        return reply

    settings = (f"home={tmp_path}", "train.steps=1", "evaluate.validation_fraction=0.2")
    _, path = federate(*ONE_ROUND, *settings, **sites, tamper=tamper)
    (line,) = read_lines(path, "evaluate")
    for kind, liar in (("", "0"), ("val_", "1")):
        honest = [value for name, value in line[f"{kind}accuracy_by_client"].items() if name != liar]
        assert len(honest) == 3
        assert line[f"{kind}accuracy_by_client"][liar] == 1.0
        assert line[f"{kind}capped"] == {liar: 1.0}
        assert 0.5 + 0.5 * min(honest) <= line[f"{kind}accuracy"] <= 0.5 + 0.5 * max(honest)


def set_tensor(value: np.ndarray) -> Change:
    return lambda reply: reply.content.array_records[ARRAYS].update({"fc.bias": Array(value)})


def set_metric(name: str, value: float) -> Change:
    return lambda reply: reply.content.metric_records[METRICS].update({name: value})


def drop_metric(name: str) -> Change:
    return lambda reply: reply.content.metric_records[METRICS].pop(name)


MANY = [f"m{i}" for i in range(MOST_METRICS)]
FAULTS: dict[str, list[tuple[Change, str]]] = {  # of client 0, 1, ...: the change, and how the reason begins
    "train": [
        (set_tensor(np.full(10, np.nan, np.float32)), "sent fc.bias with 10 NaN or infinite values of 10"),
        (set_tensor(np.zeros(11, np.float32)), "sent fc.bias as float32 [11], the model has float32 [10]"),
        (set_tensor(np.zeros(10, np.float64)), "sent fc.bias as float64 [10], the model has float32 [10]"),
        (lambda reply: reply.content.array_records[ARRAYS].pop("fc.bias"), "has other tensors than the model (1 diff"),
        (set_metric("num-examples", 10**9), "sent num-examples=1000000000, attested"),
        (set_metric("train-loss", float("nan")), "sent train-loss=nan"),
        (lambda reply: reply.content.config_records[CLAIM].update({"shard-digest": "0" * 64}), "its data changed"),
        (set_metric("train-loss", -1e300), "sent train-loss=-1e+300, which is beyond the largest"),
        (set_metric("train-loss", 1e300), "sent train-loss=1e+300, which is beyond the largest"),
        (set_metric("seconds", -1.0), "sent seconds=-1.0, which is never below 0"),
        (
            lambda reply: reply.content.update({"\x1b[31mextra": MetricRecord({"a": 1})}),
            "sent 1 records that nobody asked for, such as \\x1b[31mextra",
        ),
        (lambda reply: reply.content.metric_records[METRICS].update(dict.fromkeys(MANY, 1.0)), "sent "),
    ],
    "evaluate": [
        (set_metric("val-correct", 10**6), "sent val-correct=1000000, which must be from 0 to its"),
        (set_metric("loss-sum", float("-inf")), "sent loss-sum=-inf"),
        (set_metric("loss-sum", 1e300), "sent loss-sum=1e+300, which is beyond the largest"),
        (set_metric("personal-loss-sum", -1e300), "sent personal-loss-sum=-1e+300, which is beyond the largest"),
        (set_metric("correct", 10**6), "sent correct=1000000, which must be from 0 to its"),
        (set_metric("personal-correct", -1), "sent personal-correct=-1, which must be from 0 to its"),
        (drop_metric("personal-correct"), "sent no personal-correct"),
        (lambda reply: reply.content.update({ARRAYS: ArrayRecord({"w": Array(np.zeros(3))})}), "sent 1 records that"),
        (set_metric("val-loss-sum", float("nan")), "sent val-loss-sum=nan"),
        (set_metric("val-loss-sum", 1e300), "sent val-loss-sum=1e+300, which is beyond the largest"),
        (set_metric("val-personal-correct", 10**6), "sent val-personal-correct=1000000, which must be from 0 to its"),
        (drop_metric("val-loss-sum"), "sent no val-loss-sum"),
        (drop_metric("val-correct"), "sent no val-correct"),
        (drop_metric("val-personal-loss-sum"), "sent no val-personal-loss-sum"),
    ],
}


@pytest.mark.slow
def test_impossible_replies_are_left_out_by_name_and_change_nothing(federate: Federate) -> None:
    train, evaluate = ({str(i): fault for i, fault in enumerate(faults)} for faults in FAULTS.values())

    def tamper(name: str, reply: Message) -> Message:
        if trained_in(reply) is not None and name in train:
            train[name][0](reply)
        elif name in evaluate and "loss-sum" in reply.content.metric_records.get(METRICS, {}):
            evaluate[name][0](reply)
        return reply

    settings = (*DIGITS, "clients=15", "train.steps=2")
    settings = (*settings, "evaluate.personal_epochs=1", "evaluate.validation_fraction=0.5")
    without, _ = federate(*settings, tamper=changing(*train, change=drop))
    bad, path = federate(*settings, tamper=tamper)
    assert bad["model_sha256"] == without["model_sha256"]
    for kind, faults in (("train", train), ("evaluate", evaluate)):
        for number, line in enumerate(read_lines(path, kind), 1):
            reasons = failures(path, number, kind)
            assert reasons.keys() == faults.keys()
            assert [reasons[name] for name, (_, reason) in faults.items() if not reasons[name].startswith(reason)] == []
            assert line["replies"] == 15 - len(faults)
        assert number == 2
    assert f"at most {MOST_METRICS} are read" in failures(path)["11"]
    held = read_clients(path)["0"]
    assert held["val"] != held["test"]
    assert f"to its {held['val']} samples" in failures(path, kind="evaluate")["0"]


def test_reasons_are_cut_to_one_printable_line(federate: Federate) -> None:
    def tamper(name: str, reply: Message) -> Message:
        if name != "1" or trained_in(reply) is None:
            return reply
        return Message(Error(code=1, reason="\x1b[2J\nbroken " + "x" * 10**6), reply_to=reply)

    _, path = federate(*ONE_ROUND, tamper=tamper)
    reason = failures(path)["1"]
    assert len(reason) < 520
    assert reason.isprintable()
    assert "broken xxx" in reason


def test_a_node_cannot_speak_for_clients_that_the_run_does_not_have(federate: Federate) -> None:
    def tamper(name: str, reply: Message) -> Message:
        if CLAIMS in reply.content.config_records and (claims := unpack_claims(reply.content, 4))[0].client_id == "1":
            reply.content = pack_claims(reply, [*claims, Claim("\x1b[2Jghost", fault="x" * 1000)]).content
        return reply

    _, path = federate(*ONE_ROUND, tamper=tamper)
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
