"""Robust averages against their definitions in float64, against stock Flower, and under attack."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum

from flapp.config.load import compose
from flapp.config.rules import fewest_replies
from flapp.messages import view, views
from flapp.strategy import robust
from flapp.strategy.robust import krum_scores, median, robust_average, select, trimmed_mean
from flapp.sums import clip_update, update_length, weighted_average

SHAPES = {"weight": (300, 2), "bias": (5,), "scalar": (), "empty": (0, 3)}
Models = list[ArrayRecord]


def record(values: dict[str, Any]) -> ArrayRecord:
    return ArrayRecord({key: Array(np.asarray(each)) for key, each in values.items()})


@pytest.fixture
def sent() -> ArrayRecord:
    """Return the model that all clients began with."""
    rng = np.random.default_rng(1)
    return record({key: rng.normal(size=shape).astype(np.float32) for key, shape in SHAPES.items()})


@pytest.fixture
def honest(sent: ArrayRecord) -> Models:
    """Return eight models near each other."""
    rng = np.random.default_rng(2)
    step = {key: rng.normal(size=shape) for key, shape in SHAPES.items()}

    def draw(key: str) -> np.ndarray:
        return (view(sent[key]) + 0.1 * step[key] + 0.03 * rng.normal(size=SHAPES[key])).astype(np.float32)

    return [record({key: draw(key) for key in sent}) for _ in range(8)]


ATTACKS = {
    "scaled": lambda trained, sent: trained * np.float32(1000),
    "flipped": lambda trained, sent: sent - 5 * (trained - sent),
    "constant": lambda trained, sent: np.full_like(trained, 0.5),
    "huge": lambda trained, sent: np.full_like(trained, 1e18),
}


def attacked(honest: Models, sent: ArrayRecord, name: str) -> dict[str, ArrayRecord]:
    """Return ten models by client: clients 3 and 7 are bad."""
    change, found, good = ATTACKS[name], {}, iter(honest)
    for client in "0123456789":
        if client in "37":
            values = {key: change(view(honest[0][key]), view(sent[key])) for key in sent}
            found[client] = record(values)
        else:
            found[client] = next(good)
    return found


def vector(model: Any, keys: ArrayRecord) -> np.ndarray:
    return np.concatenate([view(model[key]).astype(np.float64).reshape(-1) for key in keys])


def settings(name: str, *more: str) -> Any:
    return compose(["clients=10", f"strategy.robust={name}", "strategy.malicious=2", *more]).strategy


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", robust.PER_CLIENT)
def test_two_bad_clients_of_ten_hardly_move_the_average(
    honest: Models, sent: ArrayRecord, attack: str, name: str
) -> None:
    trained = attacked(honest, sent, attack)
    found, left_out = robust_average(settings(name), trained, sent, dict.fromkeys(trained, 1.0))
    goal = np.mean([vector(model, sent) for model in honest], axis=0)
    apart = max(np.linalg.norm(vector(model, sent) - goal) for model in honest)
    assert np.linalg.norm(vector(found, sent) - goal) <= apart  # no farther than the honest clients themselves
    assert {key: view(found[key]).dtype for key in found} == dict.fromkeys(sent, np.float32)
    plain = weighted_average(list(trained.values()), [1.0] * 10)
    assert np.linalg.norm(vector(plain, sent) - goal) > 2 * apart
    if "krum" in name:
        assert {"3", "7"} <= set(left_out)
        assert len(left_out) == (9 if name == "krum" else 4)


@pytest.mark.parametrize("count", [3, 4, 7, 10])
@pytest.mark.parametrize("cut", [0, 1])
def test_trimmed_mean_and_median_are_numpys_and_flowers(count: int, cut: int) -> None:
    rng = np.random.default_rng(count)
    values = rng.normal(size=(count, robust.NUMBERS // count + 3)).astype(np.float32)
    records = [record({"w": each}) for each in values]
    expected = np.sort(values.astype(np.float64), axis=0)[cut : count - cut].mean(axis=0).astype(np.float32)
    np.testing.assert_array_equal(view(trimmed_mean(records, cut)["w"]), expected)
    flower = trim_mean(values.astype(np.float64), cut / count)
    np.testing.assert_allclose(view(trimmed_mean(records, cut)["w"]), flower.astype(np.float32), rtol=1e-6, atol=1e-9)
    middle = np.median(values.astype(np.float64), axis=0).astype(np.float32)
    np.testing.assert_array_equal(view(median(records)["w"]), middle)


def test_krum_scores_are_those_of_the_paper_and_choose_as_flower_does(honest: Models, sent: ArrayRecord) -> None:
    trained = attacked(honest, sent, "flipped")
    vectors = [vector(model, sent) for model in trained.values()]
    expected = []
    for i, one in enumerate(vectors):
        distances = sorted(float(np.sum((one - other) ** 2)) for j, other in enumerate(vectors) if j != i)
        expected.append(sum(distances[: 10 - 2 - 2]))
    scores = krum_scores(list(trained.values()), sent, malicious=2)
    np.testing.assert_allclose(scores, expected, rtol=1e-9)
    contents = [RecordDict({"arrays": record({"w": each})}) for each in vectors]
    for count in (1, 3, 6):
        chosen = select_multikrum(contents, num_malicious_nodes=2, num_nodes_to_select=count)
        assert [contents[index] for index in select(scores, count)] == sorted(chosen, key=contents.index)


def test_krum_tells_models_apart_that_float32_products_do_not(sent: ArrayRecord) -> None:
    """Eight models differ in the seventh digit; two are a little farther off."""
    base, rng = np.full(1000, 100.0, np.float32), np.random.default_rng(0)
    steps = [np.float32(1e-4) * rng.normal(size=1000) * (20 if i in (3, 7) else 1) for i in range(10)]
    models = [record({"w": (base + step).astype(np.float32)}) for step in steps]
    scores = krum_scores(models, record({"w": base}), malicious=2)
    assert set(np.argsort(scores)[-2:]) == {3, 7}


def test_the_first_of_equal_scores_wins() -> None:
    same = [record({"w": np.ones(3, np.float32)}) for _ in range(7)]
    scores = krum_scores(same, record({"w": np.zeros(3, np.float32)}), malicious=2)
    assert not scores.any()
    assert select(scores, 3) == [0, 1, 2]


@pytest.mark.parametrize("name", robust.PER_CLIENT)
def test_integers_and_booleans_keep_their_dtype_and_come_from_most_clients(name: str) -> None:
    sent = record({"w": np.zeros(2, np.float32), "n": np.int64(0), "b": np.array([False, True])})
    good = {"w": np.ones(2, np.float32), "n": np.int64(7), "b": np.array([True, False])}
    trained = {str(i): record(good) for i in range(8)}
    trained |= {str(i): record({"w": np.full(2, 9, np.float32), "n": np.int64(2**62), "b": ~good["b"]}) for i in (8, 9)}
    found, _ = robust_average(settings(name), trained, sent, dict.fromkeys(trained, 1.0))
    for key, value in good.items():
        np.testing.assert_array_equal(view(found[key]), value)
        assert view(found[key]).dtype == np.asarray(value).dtype


def test_multi_krum_weighs_whom_it_takes_and_caps_their_shares(honest: Models, sent: ArrayRecord) -> None:
    trained = attacked(honest, sent, "scaled")
    weights = {name: float(index + 1) for index, name in enumerate(trained)}
    chosen = settings("multi_krum", "strategy.selected=3", "strategy.max_weight_share=null")
    found, left_out = robust_average(chosen, trained, sent, weights)
    kept = [name for name in trained if name not in left_out]
    assert len(kept) == 3
    expected = sum(weights[n] * vector(trained[n], sent) for n in kept) / sum(weights[n] for n in kept)
    np.testing.assert_allclose(vector(found, sent), expected, rtol=1e-6)
    capped, _ = robust_average(settings("multi_krum", "strategy.selected=3"), trained, sent, weights | {kept[0]: 1e9})
    rest = sum(weights[n] * vector(trained[n], sent) for n in kept[1:]) / sum(weights[n] for n in kept[1:])
    np.testing.assert_allclose(vector(capped, sent), (vector(trained[kept[0]], sent) + rest) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("attack", ["scaled", "flipped", "huge"])
def test_a_clipped_update_has_the_length_that_it_is_clipped_to(honest: Models, sent: ArrayRecord, attack: str) -> None:
    bad = attacked(honest, sent, attack)["3"]
    norm = update_length(views(sent), views(bad))
    clipped = clip_update(bad, sent, 2.0 / norm)
    assert update_length(views(sent), views(clipped)) == pytest.approx(2.0, rel=1e-5)
    direction = vector(bad, sent) - vector(sent, sent)
    np.testing.assert_allclose(vector(clipped, sent) - vector(sent, sent), direction * (2.0 / norm), atol=1e-6)


def test_clipping_leaves_integers_and_booleans_as_they_are() -> None:
    sent = record({"w": np.zeros(2, np.float16), "n": np.int64(3), "b": np.array(True)})
    clipped = clip_update(record({"w": np.ones(2, np.float16), "n": np.int64(9), "b": np.array(False)}), sent, 0.25)
    assert [view(clipped[key]).tolist() for key in sent] == [[0.25, 0.25], 9, False]
    assert view(clipped["w"]).dtype == np.float16


def test_a_round_needs_as_many_replies_as_its_average() -> None:
    found = {name: fewest_replies(settings(name)) for name in ("none", "norm_bound", "median", "trimmed_mean", "krum")}
    assert found == {"none": 1, "norm_bound": 3, "median": 3, "trimmed_mean": 5, "krum": 7}
    assert fewest_replies(settings("multi_krum", "strategy.selected=6")) == 10
    assert fewest_replies(settings("krum", "strategy.min_replies=9")) == 9
