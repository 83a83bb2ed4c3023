"""Groups of clients: one message and one sum for several clients, with the bytes that single messages give."""

import inspect
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message

from flapp import client_app
from flapp.checkpoint.tensors import digest_of
from flapp.client import task
from flapp.groups import GROUP, SUM, cut
from flapp.messages import ARRAYS, METRICS, TRAIN, Claim
from flapp.strategy.lora_rules import RULES
from flapp.strategy.phase import FOLDED_AT_ONCE, Phase
from tests.conftest import Federate, read_lines
from tests.support.federations import nodes, note_groups, state_after
from tests.support.replies import changing, failures

TOY = ("experiment=toy_regression", "num_rounds=2", "checkpoint=off", "partition.min_size=1")
WIDE, ALL = (*TOY, "clients=46", "strategy.fraction_train=0.7"), (*TOY, "clients=48")
ASKED = cut(sorted(map(str, range(48))))  # three clients in each group
LORA = (
    *("experiment=digits_fedlora", "model=linear", "model.pretrained=null", "lora.targets=[fc]", "lora.rank=4"),
    *("clients=5", "num_rounds=2", "train.steps=2", "partition=iid", "checkpoint=off"),
    *("evaluate.every=2", "evaluate.personal_epochs=0"),
)


@pytest.mark.parametrize("count", [1, 5, 10, 31, 32, 33, 50, 64, 100, 1000, 12345])
def test_a_cut_has_every_client_once_in_order_and_at_most_31_groups(count: int) -> None:
    names = [f"{i:05}" for i in range(count)]
    found = cut(names)
    assert [name for group in found for name in group] == names
    assert len(found) == count if count < 32 else 16 <= len(found) <= 31


@pytest.mark.slow
@pytest.mark.parametrize(("weighting", "counts"), [("num-examples", (1, 30)), ("alignment", (2,))])
def test_groups_and_messages_end_in_the_same_bytes(federate: Federate, weighting: str, counts: tuple[int, ...]) -> None:
    words = (*WIDE, f"strategy.weighting={weighting}")
    single, _ = federate(*words)
    for count in counts:
        grouped, path = federate(*words, nodes=nodes(count), any_node=True)
        assert grouped["model_sha256"] == single["model_sha256"]
        assert {line["replies"] for line in read_lines(path, "train")} == {32}


@pytest.mark.slow
@pytest.mark.usefixtures("in_pairs")
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_ends_in_the_same_bytes_in_groups(federate: Federate, rule: str) -> None:
    words = [*LORA, f"strategy.aggregation={rule}"]
    if rule == "fedsa":
        words += ["checkpoint=recent", "evaluate.objective=personal_accuracy"]
    if rule == "hetlora":
        words += ["lora.rank_by_client=[1,2,4]"]
    single, alone = federate(*words)
    grouped, path = federate(*words, nodes=nodes(3), any_node=True)
    assert digest_of(state_after(path)) == digest_of(state_after(alone))  # fedsa's adapters are in no model
    assert grouped["model_sha256"] == single["model_sha256"]
    assert grouped["accuracy"] == single["accuracy"]
    error = read_lines(path, "train")[-1]["aggregation_error"]
    if rule in ("fedit", "fedsa"):  # not known from sums
        assert error is None
    else:
        assert error < (0.9 if rule in ("flexlora", "hetlora") else 1e-5)


GROUPED: dict[str, Any] = {"nodes": nodes(2), "any_node": True}


@pytest.fixture
def break_clients(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Return a function that has clients fail in their own ways, whether they are asked alone or in a group."""
    fit, opened = client_app.fit, task.open_client_data
    faults: dict[str, str] = {}

    def broken_fit(model: Any, asked: task.Task, *rest: Any, **options: Any) -> Any:
        fault = faults.get(asked.client_id)
        if fault == "raises":
            raise RuntimeError("out of memory")
        result = fit(model, asked, *rest, **options)
        with torch.no_grad():
            if fault == "nan":
                next(model.parameters()).fill_(float("nan"))
            if fault == "long":
                next(model.parameters()).add_(1e6)
        return result

    def other_data(config: Any, node_config: Any, client_id: str, *rest: Any) -> Any:
        data = opened(config, node_config, client_id, *rest)
        if faults.get(client_id) == "data" and not any(frame.function == "attest" for frame in inspect.stack()):
            return replace(data, claim=replace(data.claim, shard_digest="f" * 64))
        return data

    monkeypatch.setattr(client_app, "fit", broken_fit)
    monkeypatch.setattr(task, "open_client_data", other_data)
    return faults.update


@pytest.mark.slow
def test_failing_clients_are_named_and_cost_their_group_nothing(
    federate: Federate, break_clients: Callable[[dict[str, str]], None]
) -> None:
    break_clients({"17": "raises", "18": "nan", "19": "data", "3": "long"})
    grouped, path = federate(*ALL, **GROUPED)
    named = failures(path)
    assert named.keys() == {"17", "18", "19", "3"}
    for name, word in {"17": "out of memory", "18": "NaN", "19": "its data changed", "3": "norm_limit"}.items():
        assert word in named[name]
    assert failures(path, 2).keys() == named.keys()

    break_clients(dict.fromkeys(named, "nothing"))
    without, _ = federate(*ALL, tamper=changing(*named, change=lambda reply: reply.content.pop(ARRAYS)))
    assert grouped["model_sha256"] == without["model_sha256"]


def test_a_group_with_a_long_update_in_round_1_is_asked_again_without_that_client(
    federate: Federate, break_clients: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = note_groups(monkeypatch)
    break_clients({"3": "long"})
    federate(*ALL, "num_rounds=1", **GROUPED)
    again = next([name for name in group if name != "3"] for group in ASKED if "3" in group)
    assert sent == [*map(list, ASKED), again]


def in_sum(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message], None]:
    def tamper(reply: Message) -> None:
        record = reply.content.array_records[SUM]
        key = next(iter(record))
        record[key] = Array(change(record[key].numpy()))

    return tamper


def in_column(name: str, value: Any) -> Callable[[Message], None]:
    def tamper(reply: Message) -> None:
        reply.content.config_records[GROUP][name] = value

    return tamper


def in_metrics(name: str, value: float) -> Callable[[Message], object]:
    return lambda reply: reply.content.metric_records[METRICS].update({name: [value] * 3})


BAD_ANSWERS: list[tuple[Callable[[Message], object], str]] = [  # of the groups in their order, and the reason
    (in_sum(lambda values: values * np.nan), "NaN"),
    (in_sum(lambda values: values * 2), "moves the model"),
    (in_sum(lambda values: values.astype(np.float32)), "float64"),
    (in_sum(lambda values: values.reshape(-1)[:0]), "float64"),
    (in_column("client-id", ["17", "18"]), "other clients"),
    (in_column("client-id", ["17", "18", "99"]), "other clients"),
    (in_column("failure", ["", ""]), "does not fit"),
    (in_column("failure", [1, 2, 3]), "does not fit"),
    (lambda reply: reply.content.pop(SUM), "too many or too few"),
    (lambda reply: reply.content.pop(METRICS), "lacks"),
    (lambda reply: reply.content.update({"more": ArrayRecord()}), "too many or too few"),
    (in_metrics("seconds", -1.0), "never below 0"),
    (in_metrics("num-examples", 9.0), "attested"),
    (in_metrics("update-norm", -1.0), "negative"),
    (lambda reply: Message(Error(code=1, reason="left on purpose"), reply_to=reply), "failed: left on purpose"),
]


def test_a_bad_answer_or_a_failed_node_costs_its_group_only(federate: Federate) -> None:
    def spoil(_: str, reply: Message) -> Message:
        if reply.metadata.message_type != TRAIN:
            return reply
        number = ASKED.index(tuple(reply.content.config_records[GROUP]["client-id"]))  # type: ignore[arg-type]
        changed = BAD_ANSWERS[number][0](reply) if number < len(BAD_ANSWERS) else None
        return changed if isinstance(changed, Message) else reply

    _, path = federate(*ALL, "num_rounds=1", **GROUPED, tamper=spoil)
    named = failures(path)
    assert named.keys() == {name for group in ASKED[: len(BAD_ANSWERS)] for name in group}
    for group, (_, word) in zip(ASKED, BAD_ANSWERS, strict=False):
        assert all(word in named[name] for name in group), word


def test_the_server_holds_few_models_however_many_groups_there_are() -> None:
    names = [f"{i:03}" for i in range(400)]
    phase = Phase(TRAIN, 1, {name: Claim(name) for name in names}, dict.fromkeys(names, 1.0))
    phase.waiting = {str(index): (index, group) for index, group in enumerate(phase.groups)}
    size = 1 << 17  # numbers: a megabyte in float64
    tracemalloc.start()
    try:
        for index in (*reversed(range(FOLDED_AT_ONCE)), *range(FOLDED_AT_ONCE, len(phase.groups))):
            phase.sums[index] = ArrayRecord({"weight": Array(np.full(size, 1.0))})
            del phase.waiting[str(index)]
            phase.fold()
        phase.fold(is_over=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(phase.groups) > 2 * FOLDED_AT_ONCE
    assert peak < (FOLDED_AT_ONCE + 3 + 2) * 8 * size  # those that have just come, ours, and what making one takes
    np.testing.assert_array_equal(phase.total.arrays["weight"].numpy(), float(len(phase.groups)))
