"""The eight rules against dense float64 numpy, written without any of their code."""

import itertools
from collections.abc import Sequence
from functools import reduce

import numpy as np
import pytest

from flapp.groups import cut_rank
from flapp.messages import pack, view
from flapp.strategy.lora_rules import RULES, Aggregated, Factors, error_norms, refill

SHAPES = [(96, 24), (24, 96), (48, 48), (7, 5)]  # (out, in): tall, wide, square, and smaller than the ranks stacked
EXACT = ["ffa", "rolora", "flora", "fedex"]
MIXED = ["flora", "flexlora", "hetlora"]


def clients(
    word: str, shape: tuple[int, int], count: int, ranks: Sequence[int] = (4,), dtype: str = "float32"
) -> list[Factors]:
    """Return clients of unequal weights that a rule accepts: one A for ffa, one B for rolora (its even rounds)."""
    rng = np.random.default_rng((0, count, *shape))

    def factor(rows: int, columns: int) -> np.ndarray:
        return rng.normal(size=(rows, columns)).astype(dtype)

    made = []
    for number in range(count):
        rank = ranks[number % len(ranks)]
        made.append(Factors(factor(rank, shape[1]), factor(shape[0], rank), float(rng.integers(10, 100))))
    if word == "ffa":
        return [Factors(made[0].A.copy(), client.B, client.weight) for client in made]
    if word == "rolora":
        return [Factors(client.A, b_of(made[0]).copy(), client.weight) for client in made]
    return made


def b_of(client: Factors) -> np.ndarray:
    assert client.B is not None
    return client.B


def shares(group: Sequence[Factors]) -> list[float]:
    total = sum(client.weight for client in group)
    return [client.weight / total for client in group]


def product(client: Factors) -> np.ndarray:
    return b_of(client).astype(np.float64) @ client.A.astype(np.float64)


def ideal(group: Sequence[Factors]) -> np.ndarray:
    return np.sum([share * product(client) for share, client in zip(shares(group), group, strict=True)], axis=0)


def applied(result: Aggregated, group: Sequence[Factors]) -> np.ndarray:
    """Return what the new layer adds to the old base, and for private B the mean of what it adds at each client."""
    total = np.zeros((len(b_of(group[0])), group[0].A.shape[1]))
    if result.folded is not None:
        total += reduce(np.matmul, [part.astype(np.float64) for part in result.folded])
    if result.A is not None and result.B is not None:
        total += result.B.astype(np.float64) @ result.A.astype(np.float64)
    elif result.A is not None:
        total += np.sum([s * product(Factors(result.A, c.B, 1)) for s, c in zip(shares(group), group, strict=True)], 0)
    return total


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def arrays(result: Aggregated) -> list[np.ndarray]:
    return [part for part in (result.A, result.B, *(result.folded or ())) if part is not None]


def same_bits(one: Aggregated, other: Aggregated) -> bool:
    pairs = zip(arrays(one), arrays(other), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def relative_error(result: Aggregated, group: Sequence[Factors]) -> float:
    found, wanted = error_norms(result, group)
    return found / wanted if wanted else found


@pytest.mark.parametrize(("word", "count"), [*itertools.product(RULES, [1]), *itertools.product(EXACT, [3, 10])])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_rules_and_any_with_one_client_apply_the_mean_product(
    word: str, shape: tuple[int, int], count: int
) -> None:
    group = clients(word, shape, count, [1, 4, 8] if word in MIXED else [4])
    assert error(applied(RULES[word].aggregate(group), group), ideal(group)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 10])
def test_fedit_is_the_product_of_the_means_and_not_the_mean_of_the_products(shape: tuple[int, int], count: int) -> None:
    group = clients("fedit", shape, count)
    result = RULES["fedit"].aggregate(group)
    mean_a = np.average([client.A for client in group], axis=0, weights=shares(group))
    mean_b = np.average([b_of(client) for client in group], axis=0, weights=shares(group))
    assert error(applied(result, group), mean_b @ mean_a) < 1e-6
    assert error(applied(result, group), ideal(group)) > 0.01


def test_rolora_averages_whichever_factor_is_not_common() -> None:
    odd, even = (RULES["rolora"].aggregate(clients(word, (9, 6), 3)) for word in ("ffa", "rolora"))
    assert np.array_equal(odd.A, clients("ffa", (9, 6), 3)[0].A)
    assert np.array_equal(even.B, clients("rolora", (9, 6), 3)[0].B)


def test_fedsa_averages_a_and_needs_nobodys_b() -> None:
    group = clients("fedsa", (9, 6), 5)
    kept = [client._replace(B=None) for client in group]
    result = RULES["fedsa"].aggregate(kept)
    assert result.B is None
    assert same_bits(result, RULES["fedsa"].aggregate(group))
    wanted = np.average([client.A for client in group], axis=0, weights=shares(group))
    assert error(np.asarray(result.A), wanted) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_flexlora_is_the_best_adapter_of_its_rank(shape: tuple[int, int], count: int, rank: int) -> None:
    group = clients("flexlora", shape, count, [2, 4, 8])
    result = RULES["flexlora"].aggregate(group, rank)
    assert result.A is not None
    assert result.B is not None
    assert (len(result.A), result.B.shape[1]) == (rank, rank)
    u, s, vt = np.linalg.svd(ideal(group), full_matrices=False)  # Eckart and Young 1936
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert np.linalg.norm(applied(result, group) - best) < 1e-6 * s[0]
    balance = np.linalg.norm(result.A, axis=1), np.linalg.norm(result.B, axis=0)
    np.testing.assert_allclose(*balance, rtol=1e-5)
    np.testing.assert_allclose(balance[0] ** 2, np.append(s, np.zeros(rank))[:rank], rtol=1e-5, atol=1e-5 * s[0])
    assert all(column[np.abs(column).argmax()] >= 0 for column in result.B.T)


def test_flexlora_cut_to_a_clients_rank_is_still_the_best_of_that_rank() -> None:
    group = clients("flexlora", (48, 30), 5, [2, 8])
    whole = RULES["flexlora"].aggregate(group)
    assert whole.A is not None
    assert whole.B is not None
    cut = cut_rank({"x.lora_A": pack(whole.A), "x.lora_B": pack(whole.B)}, 2)
    A, B = (view(cut[f"x.lora_{part}"]) for part in "AB")
    assert (A.shape, B.shape) == ((2, 30), (48, 2))
    assert same_bits(RULES["flexlora"].aggregate(group, 2), Aggregated(A, B))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("equal", [False, True])
def test_hetlora_pads_and_weighs_by_the_norm_of_each_product(shape: tuple[int, int], equal: bool) -> None:
    group = clients("hetlora", shape, 7, [1, 2, 6])
    if equal:  # the paper's weights: the norms alone
        group = [client._replace(weight=1.0) for client in group]
    result = RULES["hetlora"].aggregate(group, 8)
    weights = [(1 if equal else client.weight) * np.linalg.norm(product(client)) for client in group]
    wanted_a, wanted_b = np.zeros((8, shape[1])), np.zeros((shape[0], 8))
    for client, weight in zip(group, weights, strict=True):
        rank = len(client.A)
        wanted_a[:rank] += weight / sum(weights) * client.A
        wanted_b[:, :rank] += weight / sum(weights) * b_of(client)
    np.testing.assert_allclose(result.A, wanted_a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.B, wanted_b, rtol=1e-5, atol=1e-6)
    assert len(np.asarray(RULES["hetlora"].aggregate(group).A)) == 6


@pytest.mark.parametrize("word", RULES)
def test_equal_input_gives_equal_bits_and_a_client_of_weight_zero_changes_nothing(word: str) -> None:
    group = clients(word, (40, 30), 6, [3, 4] if word in MIXED else [4])
    idle = Factors(np.full((9, 30), np.nan, np.float32), np.full((40, 9), np.nan, np.float32), 0.0)
    copies = [client._replace(A=client.A.copy()) for client in group]
    with_idle = [copies[0], idle, *copies[1:]]
    result = RULES[word].aggregate(group)
    assert same_bits(RULES[word].aggregate(with_idle), result)
    assert relative_error(result, with_idle) == relative_error(result, group)


@pytest.mark.parametrize("word", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_that_were_never_trained_add_nothing_and_have_no_error(word: str, shape: tuple[int, int]) -> None:
    group = [client._replace(B=np.zeros_like(b_of(client))) for client in clients(word, shape, 3)]
    result = RULES[word].aggregate(group)
    assert not applied(result, group).any()
    assert all(np.isfinite(part).all() for part in arrays(result))
    assert relative_error(result, group) == 0.0


@pytest.mark.parametrize("word", RULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 10])
def test_the_error_without_big_matrices_is_the_error_with_them(word: str, shape: tuple[int, int], count: int) -> None:
    group = clients(word, shape, count)
    result = RULES[word].aggregate(group)
    found, wanted = applied(result, group), ideal(group)
    assert relative_error(result, group) == pytest.approx(error(found, wanted), rel=1e-6, abs=1e-14)
    assert error_norms(result, group)[1] == pytest.approx(np.linalg.norm(wanted))


@pytest.mark.parametrize("word", RULES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_dtype_that_came_in_goes_out(word: str, dtype: str) -> None:
    group = clients(word, (20, 30), 3, dtype=dtype)
    result = RULES[word].aggregate(group)
    assert {str(part.dtype) for part in arrays(result)} == {dtype}
    assert word not in EXACT or relative_error(result, group) < 4 * np.finfo(dtype).eps


def test_what_is_folded_is_sent_as_factors_until_the_product_is_smaller() -> None:
    small = RULES["fedex"].aggregate(clients("fedex", (96, 80), 3))
    assert [part.shape for part in small.folded or ()] == [(96, 16), (16, 80)]
    large = RULES["flora"].aggregate(clients("flora", (24, 96), 10))
    assert [part.shape for part in large.folded or ()] == [(24, 96)]


@pytest.mark.parametrize("word", ["flexlora", "hetlora"])
def test_directions_that_nobody_trained_come_back_to_life_without_changing_the_product(word: str) -> None:
    group = clients(word, (20, 30), 1, [2]) * 3  # of rank 2 all together, though six rows are stacked
    result = RULES[word].aggregate(group, 5)
    assert result.A is not None
    assert result.B is not None
    fresh = np.ones_like(result.A)
    alive = refill(result.A, result.B, fresh)
    assert np.array_equal(alive[2:], fresh[2:])
    assert np.array_equal(alive[:2], result.A[:2])
    assert np.array_equal(result.B @ alive, result.B @ result.A)
    for A, B in ((0 * fresh, result.B + 1), (fresh + 1, 0 * result.B)):  # one zero factor gets gradients
        assert np.array_equal(refill(A, B, fresh), A)


def test_factors_that_should_be_common_and_are_not_are_refused() -> None:
    group = clients("fedit", (20, 30), 3)
    with pytest.raises(ValueError, match="ffa needs the same A"):
        RULES["ffa"].aggregate(group)
    with pytest.raises(ValueError, match="rolora needs the same A or the same B"):
        RULES["rolora"].aggregate(group)
    zeros = np.zeros((4, 30), np.float32)
    with pytest.raises(ValueError, match="bit for bit"):
        RULES["ffa"].aggregate([Factors(each, np.ones((20, 4), np.float32), 1) for each in (zeros, -zeros)])


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_without_a_mean_are_refused(weights: list[float]) -> None:
    group = [client._replace(weight=w) for client, w in zip(clients("fedit", (5, 6), 2), weights, strict=False)]
    with pytest.raises(ValueError, match="weights must be finite"):
        RULES["fedit"].aggregate(group)


def test_rules_say_what_travels_and_what_they_change() -> None:
    up = {word: ["".join(sorted(rule.travels(number))) for number in (1, 2, 3)] for word, rule in RULES.items()}
    only = {"ffa": ["B", "B", "B"], "rolora": ["B", "A", "B"], "fedsa": ["A", "A", "A"]}
    assert up == {word: only.get(word, ["AB"] * 3) for word in RULES}
    assert [word for word, rule in RULES.items() if rule.any_rank] == MIXED
    assert [word for word, rule in RULES.items() if rule.folds] == ["flora", "fedex"]
    assert [word for word, rule in RULES.items() if rule.private_b] == ["fedsa"]
    for word, rule in RULES.items():
        result = rule.aggregate(clients(word, (20, 30), 2))
        assert (result.folded is not None) == rule.folds
        assert (result.B is None and result.A is not None) == rule.private_b
