"""Whole runs with robust averages: two bad clients of ten, groups, any order of replies, resume."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message
from safetensors.numpy import load_file

from flapp.groups import GROUP, SUM, cut
from flapp.messages import ARRAYS, TRAIN, view
from flapp.server.roster import FederationError
from flapp.strategy.robust import PER_CLIENT
from flapp.sums import update_length
from tests.conftest import Federate, LocalGrid, break_and_resume, read_clients, read_lines
from tests.support.federations import nodes, note_groups
from tests.support.replies import Sent, changing, drop, failures, listen
from tests.test_docs import PAGES, ROOT

DIGITS = ("model=linear", "partition=iid", "num_rounds=2", "train.steps=4", "evaluate.every=2")
FAST = (*DIGITS, "evaluate.personal_epochs=0", "checkpoint=off", "strategy.norm_limit=null", "strategy.malicious=2")
NAMES = ("norm_bound", *PER_CLIENT)
MANY = (*FAST, "clients=9")  # in groups of two, and a last one, with in_pairs
TWO_OF_TEN = ("0", "1")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the attack of the page on trust."""
    folder = tmp_path_factory.mktemp("project")
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGES[ROOT / "docs" / "trust.md"], re.DOTALL | re.MULTILINE)
    (folder / "attack.py").write_text(block)
    return folder


@pytest.fixture
def bad(project: Path) -> tuple[str, ...]:
    """Return the settings with which clients 0 and 1 send an update five times as long in the opposite direction."""
    return (f"code={project}", "train.mods=[attack:flip]")


def last_model(path: Path) -> np.ndarray:
    return np.concatenate([each.reshape(-1) for _, each in sorted(load_file(path / "model.safetensors").items())])


@pytest.fixture(scope="module")
def honest(federate: Federate) -> np.ndarray:
    """Return the weights after two rounds of eight honest clients."""
    return last_model(federate(*FAST, "num_rounds=1", tamper=changing(*TWO_OF_TEN, change=drop))[1])


@pytest.mark.slow
def test_two_of_ten_clients_cannot_pull_a_robust_average_away(
    federate: Federate, project: Path, honest: np.ndarray
) -> None:
    words = (*FAST, "num_rounds=1", f"code={project}", "train.mods=[attack:constant]")
    apart = {}
    for name in ("none", *NAMES):
        _, path = federate(*words, f"strategy.robust={name}")
        apart[name] = np.linalg.norm(last_model(path) - honest)
        (line,) = read_lines(path, "train")
        if name == "norm_bound":
            assert set(line["clipped"]) == {"0", "1"}
        if "krum" in name:
            assert {"0", "1"} <= set(line["left_out"])
        assert line["replies"] == 10
    assert all(apart[name] < apart["none"] / 2 for name in ("median", "trimmed_mean", "multi_krum")), apart
    assert apart["norm_bound"] < 0.6 * apart["none"], apart  # bad updates still count with twice the median length
    assert apart["krum"] < apart["none"], apart  # one client's model is as far from the mean as that client is


def test_norm_bound_is_the_mean_of_clipped_updates_in_float64(federate: Federate, bad: tuple[str, ...]) -> None:
    seen: Sent = []
    words = (*FAST, *bad, "num_rounds=1", "strategy.robust=norm_bound", "strategy.clip_multiple=0.9")
    sent: dict[str, np.ndarray] = {}
    real = LocalGrid.handle

    def handle(grid: LocalGrid, message: Message) -> Message:
        if message.metadata.message_type == TRAIN:
            sent.update({key: np.array(view(array)) for key, array in message.content.array_records[ARRAYS].items()})
        return real(grid, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalGrid, "handle", handle)
        _, path = federate(*words, tamper=listen(seen))
    norms = {name: update_length(sent, arrays) for name, arrays in seen}
    bound = 0.9 * sorted(norms.values())[4]  # the lower of the two in the middle
    factors = {name: min(1.0, bound / norm) for name, norm in norms.items()}
    counts = {name: line["train"] for name, line in read_clients(path).items()}
    for key, tensor in load_file(path / "model.safetensors").items():
        updates = (counts[name] * factors[name] * (arrays[key].astype(np.float64) - sent[key]) for name, arrays in seen)
        np.testing.assert_allclose(tensor, sent[key] + sum(updates) / sum(counts.values()), rtol=1e-5, atol=1e-7)
    (line,) = read_lines(path, "train")
    assert line["clipped"] == pytest.approx({name: f for name, f in factors.items() if f < 1}, rel=1e-3)
    assert {"0", "1"} < line["clipped"].keys()
    assert line["update_norm"] == pytest.approx(sorted(norms.values())[4], rel=1e-4)  # before clipping


@pytest.mark.slow
@pytest.mark.usefixtures("in_pairs")
@pytest.mark.parametrize("name", NAMES)
def test_groups_and_single_nodes_end_in_the_same_bytes_in_any_order(
    federate: Federate, bad: tuple[str, ...], name: str
) -> None:
    words = (*MANY, *bad, f"strategy.robust={name}")
    single, path = federate(*words, order=1)
    lines = read_lines(path, "train")
    for order, count in ((2, 1), (3, 4)):
        grouped, other = federate(*words, nodes=nodes(count), any_node=True, order=order)
        assert grouped["model_sha256"] == single["model_sha256"]
        for one, two in zip(lines, read_lines(other, "train"), strict=True):
            for key in ("clipped", "left_out", "loss", "update_norm"):
                assert one.get(key) == two.get(key)
    assert all(("clipped" in line) == (name == "norm_bound") for line in lines)
    assert all(("left_out" in line) == ("krum" in name) for line in lines)


@pytest.mark.usefixtures("in_pairs")
@pytest.mark.parametrize(("name", "rule"), [("norm_bound", "fedit"), ("median", "ffa"), ("multi_krum", "rolora")])
def test_robust_averages_of_adapters_are_the_same_in_groups(
    federate: Federate, bad: tuple[str, ...], name: str, rule: str
) -> None:
    words = (
        *("experiment=digits_fedlora", "model=linear", "model.pretrained=null", "lora.targets=[fc]", "lora.rank=4"),
        *(*MANY, *bad, f"strategy.robust={name}", f"strategy.aggregation={rule}"),
    )
    single, path = federate(*words)
    grouped, _ = federate(*words, nodes=nodes(2), any_node=True)
    assert grouped["model_sha256"] == single["model_sha256"]
    line = read_lines(path, "train")[0]
    assert {"0", "1"} <= set(line["clipped"] if name == "norm_bound" else line.get("left_out", "01"))


def test_a_server_optimizer_steps_along_the_robust_average(federate: Federate, bad: tuple[str, ...]) -> None:
    words = (*FAST, *bad, "strategy.server_optimizer=fedavgm", "num_rounds=1")
    _, robust = federate(*words, "strategy.robust=median")
    _, plain = federate(*words)
    _, alone = federate(*FAST, *bad, "num_rounds=1", "strategy.robust=median")
    assert not np.array_equal(last_model(robust), last_model(plain))
    np.testing.assert_allclose(last_model(robust), last_model(alone), rtol=1e-5, atol=1e-7)  # as its first step is


@pytest.mark.slow
@pytest.mark.usefixtures("in_pairs")
@pytest.mark.parametrize(("name", "grid"), [("norm_bound", {"nodes": nodes(2), "any_node": True}), ("krum", {})])
def test_a_run_that_broke_off_is_resumed_to_the_same_bytes(
    federate: Federate, bad: tuple[str, ...], name: str, grid: dict[str, Any]
) -> None:
    words = (*(MANY if grid else FAST), *bad, "checkpoint=recent", f"strategy.robust={name}")
    whole, _ = federate(*words, **grid)
    words = (*words, f"run_name=broken-{name}")
    resumed, _ = break_and_resume(partial(federate, **grid), 2, "aggregate_train", *words)
    assert resumed["model_sha256"] == whole["model_sha256"]


def test_only_groups_with_an_update_to_clip_are_asked_again_and_nobody_trains_twice(
    federate: Federate, bad: tuple[str, ...], trained: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = note_groups(monkeypatch)
    words = (*MANY, *bad, "clients=34", "num_rounds=1", "checkpoint=recent", "strategy.robust=norm_bound")
    federate(*words, "strategy.fraction_evaluate=0.1", nodes=nodes(2), any_node=True)
    names = sorted(map(str, range(34)))
    groups = [list(group) for group in cut(names)]
    assert asked[: len(groups)] == groups
    assert asked[len(groups) :] == [group for group in groups if {"0", "1"} & set(group)]
    assert sorted(client for client, _ in trained) == names


def test_a_node_that_repeats_its_unclipped_sum_costs_its_group(federate: Federate, bad: tuple[str, ...]) -> None:
    first: list[ArrayRecord] = []

    def tamper(_: str, reply: Message) -> Message:
        if reply.metadata.message_type == TRAIN and "0" in reply.content.config_records[GROUP]["client-id"]:
            if first:
                reply.content[SUM] = first[0]
            first.append(reply.content.array_records[SUM])
        return reply

    words = (*MANY, *bad, "clients=34", "num_rounds=1", "strategy.robust=norm_bound")
    _, path = federate(*words, nodes=nodes(2), any_node=True, tamper=tamper)
    assert len(first) == 2
    assert failures(path).keys() == set(next(group for group in cut(sorted(map(str, range(34)))) if "0" in group))
    assert all("moves the model" in reason for reason in failures(path).values())


def test_too_few_replies_for_krum_end_the_run_in_a_line_that_says_so(federate: Federate) -> None:
    with pytest.raises(FederationError, match="6 of 10 clients gave a valid train reply, strategy.robust=krum needs 7"):
        federate(*FAST, "strategy.robust=krum", tamper=changing("2", "3", "4", "5", change=drop))


def test_updates_beyond_norm_limit_are_still_refused_and_do_not_count_for_the_median(
    federate: Federate, project: Path
) -> None:
    words = (*FAST, "num_rounds=1", "strategy.robust=norm_bound", "strategy.clip_multiple=0.9")
    without, _ = federate(*words, tamper=changing("0", "1", change=drop))
    attacked, path = federate(*words, f"code={project}", "train.mods=[attack:scale]", "strategy.norm_limit=10")
    assert failures(path).keys() == {"0", "1"}
    assert {"0", "1"}.isdisjoint(read_lines(path, "train")[0]["clipped"])
    assert attacked["model_sha256"] == without["model_sha256"]
