"""Averages of LoRA adapters by eight rules, one layer at a time: pure maths in numpy.

Client k has A_k (rank_k, in), B_k (out, rank_k) and a weight w_k; p_k = w_k / sum w. Its layer adds scaling * B_k A_k
to the frozen base (LoRA, Hu et al. 2021, arXiv:2106.09685), and scaling = alpha / lora.rank is one number for all
clients whatever their own rank, so the maths here are on B A alone. The ideal is sum_k p_k B_k A_k, and RULES lists how
each rule combines the factors. Sums are taken in float64 and rounded once to the dtype that came in. If the clients are
sorted by id, equal input gives equal bits. Clients of weight zero are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Factors(NamedTuple):
    """One client's factors of one layer: A (rank, in), B (out, rank) or None if the client keeps it, and its weight."""

    A: np.ndarray
    B: np.ndarray | None
    weight: float


@dataclass(frozen=True, eq=False)
class Aggregated:
    """The new layer: adapter factors, and the matrices whose product goes into the base.

    A is None when the caller makes a fresh adapter (A from its seed, B zero); B is None then, and when every client
    keeps its own. `folded` is (left, right), or (dense,) once that is smaller; the caller adds scaling times
    their product, shape (out, in), to the base weight.
    """

    A: np.ndarray | None
    B: np.ndarray | None
    folded: tuple[np.ndarray, ...] | None = None


class Layer:
    """One layer of the clients that count: factors as received, shares p_k > 0 that sum to 1, and the requested rank.

    B is empty where clients keep it. Raises ValueError for weights that are negative, not finite or all zero.
    """

    def __init__(self, clients: Sequence[Factors], rank: int | None = None) -> None:
        weights = np.array([client.weight for client in clients], np.float64)
        if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise ValueError(f"weights must be finite, not negative and not all zero, got {weights.tolist()}")
        used = [client for client in clients if client.weight > 0]
        self.A = [client.A for client in used]
        self.B = [client.B for client in used if client.B is not None]
        self.shares = weights[weights > 0] / weights[weights > 0].sum()
        self.rank = max(map(len, self.A)) if rank is None else rank

    def stacked(self) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 (out, ranks) and (ranks, in) whose product is the ideal, sum_k p_k B_k A_k."""
        left = [np.multiply(B, share, dtype=np.float64) for B, share in zip(self.B, self.shares, strict=True)]
        return np.hstack(left), np.vstack(self.A).astype(np.float64)


def fedit(layer: Layer) -> Aggregated:
    """Average A and B separately, which is inexact (FedIT, Zhang et al. 2023, arXiv:2305.05644)."""
    return Aggregated(_mean(layer.A, layer.shares), _mean(layer.B, layer.shares))


def ffa(layer: Layer) -> Aggregated:
    """Average B; all have the same A, never trained, so this is exact (FFA-LoRA, Sun et al. 2024, arXiv:2403.12313)."""
    if not _all_equal(layer.A):
        raise ValueError("ffa needs the same A from every client, bit for bit: freeze A and give all one seed")
    return Aggregated(layer.A[0], _mean(layer.B, layer.shares))


def rolora(layer: Layer) -> Aggregated:
    """Average the trained factor; all have the same other one: exact (RoLoRA, Chen et al. 2024, arXiv:2409.02346)."""
    if _all_equal(layer.A):
        return Aggregated(layer.A[0], _mean(layer.B, layer.shares))
    if _all_equal(layer.B):
        return Aggregated(_mean(layer.A, layer.shares), layer.B[0])
    raise ValueError("rolora needs the same A or the same B from every client: freeze the factor that does not travel")


def fedsa(layer: Layer) -> Aggregated:
    """Average A; every client keeps its B and applies B_k A (FedSA-LoRA, Guo et al. 2024, arXiv:2410.01463)."""
    return Aggregated(_mean(layer.A, layer.shares), None)


def flora(layer: Layer) -> Aggregated:
    """Stack [B_1 ...] and [p_1 A_1; ...] and fold all of it: exact (FLoRA, Wang et al. 2024, arXiv:2409.05976)."""
    right = [np.multiply(A, share, dtype=np.float64) for A, share in zip(layer.A, layer.shares, strict=True)]
    return Aggregated(None, None, _fold(np.hstack(layer.B), np.vstack(right), layer.A[0].dtype))


def fedex(layer: Layer) -> Aggregated:
    """Average A and B separately and fold the residual (FedEx-LoRA, Singhal et al. 2024, arXiv:2410.09432); exact.

    The residual sum_k p_k B_k A_k - B A is computed with the rounded B and A, so what rounding loses is folded too.
    """
    A, B = _mean(layer.A, layer.shares), _mean(layer.B, layer.shares)
    left, right = layer.stacked()
    return Aggregated(A, B, _fold(np.hstack([left, -B]), np.vstack([right, A]), A.dtype))


def flexlora(layer: Layer) -> Aggregated:
    """Return the best adapter of the rank asked: a truncated SVD of the ideal (FlexLoRA, Bai et al., arXiv:2402.11505).

    B = U sqrt(S) and A = sqrt(S) V^T, the largest singular value first, and the largest entry of each column of U
    positive. Directions that the ideal lacks are zero in both: see `refill`.
    """
    left, right = layer.stacked()
    u, s, vt = _truncated_svd(left, right, layer.rank)
    peaks = np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0)
    root = np.sqrt(s) * np.where(peaks < 0, -1.0, 1.0)  # signed, (1, rank)
    A, B = _pad(root.T * vt, 0, layer.rank), _pad(u * root, 1, layer.rank)
    return Aggregated(A.astype(layer.A[0].dtype), B.astype(layer.B[0].dtype))


def hetlora(layer: Layer) -> Aggregated:
    """Pad to the rank asked and average A and B, weighted by p_k ||B_k A_k||_F; all-zero products fall back to p_k.

    This is the sparsity-weighted aggregation of HetLoRA (Cho et al. 2024, arXiv:2401.06432, section 4), which weighs
    client k by S_k / sum S, S_k = ||B_k A_k||_F. The paper writes it for one weight matrix; here each adapted matrix
    has the S_k of its own product. The paper's clients all count the same: equal p_k (strategy.weighting=uniform) give
    its weights exactly, other p_k multiply them. Each client is sent the result cut to its own rank.
    """
    norms = [_norm(B, A) for A, B in zip(layer.A, layer.B, strict=True)]
    weights = layer.shares * norms
    shares = weights / weights.sum() if weights.sum() > 0 else layer.shares
    A, B = [_pad(A, 0, layer.rank) for A in layer.A], [_pad(B, 1, layer.rank) for B in layer.B]
    return Aggregated(_mean(A, shares), _mean(B, shares))


@dataclass(frozen=True)
class Rule:
    """One value of `strategy.aggregation`, and what a strategy must know about it."""

    combine: Callable[[Layer], Aggregated]
    even: str = "AB"  # the factors trained by clients and sent up in rounds 2, 4, ...
    odd: str = "AB"  # and in rounds 1, 3, ...
    any_rank: bool = False  # clients may have different ranks
    folds: bool = False  # the base weight changes every round
    private_b: bool = False  # clients train B too, but keep it
    averages: bool = False  # each factor that travels is an average, so a sum over clients is enough

    def travels(self, server_round: int) -> frozenset[str]:
        """Return which of 'A' and 'B' go up in a round (from 1); clients freeze the other, unless it is private."""
        return frozenset(self.odd if server_round % 2 else self.even)

    def aggregate(self, clients: Sequence[Factors], rank: int | None = None) -> Aggregated:
        """Combine one layer of several clients; `rank` is what flexlora and hetlora return (default: the largest).

        Factors must fit together, and have one rank unless any_rank. Raises ValueError for invalid weights
        (see Layer), and if clients differ in a factor that must be equal.
        """
        return self.combine(Layer(clients, rank))


RULES = {
    "fedit": Rule(fedit, averages=True),
    "ffa": Rule(ffa, even="B", odd="B", averages=True),
    "rolora": Rule(rolora, even="A", odd="B", averages=True),
    "fedsa": Rule(fedsa, even="A", odd="A", private_b=True, averages=True),
    "flora": Rule(flora, any_rank=True, folds=True),
    "fedex": Rule(fedex, folds=True),
    "flexlora": Rule(flexlora, any_rank=True),
    "hetlora": Rule(hetlora, any_rank=True),
}


def refill(A: np.ndarray, B: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Return A with its dead rows replaced by those of `fresh`.

    A row is dead, and never gets a gradient, if it and its column in B are zero. The product B A stays the same.
    flexlora and hetlora may leave such rows when no client of the largest rank took part.
    """
    alive = A.any(axis=1) | B.any(axis=0)
    return np.where(np.expand_dims(alive, 1), A, fresh)


def error_norms(aggregated: Aggregated, clients: Sequence[Factors]) -> tuple[float, float]:
    """Return ||applied - ideal||_F and ||ideal||_F of one layer, without scaling; squares add up over layers.

    Applied is B A plus what is folded; with private B (fedsa) it is sum_k p_k B_k A. Both norms come from QR of the
    stacked factors in float64. Matrices of size out x in are made only if a dense matrix is folded, or if the stacked
    ranks are at least min(out, in). Gram matrices are avoided: they lose half the digits.
    """
    layer = Layer(clients)
    left, right = layer.stacked()
    pairs, count = [(left, right)], len(right)
    dense: np.ndarray | float = 0.0
    if aggregated.folded is not None and len(aggregated.folded) == 1:
        (dense,) = aggregated.folded
    elif aggregated.folded is not None:
        pairs.append((aggregated.folded[0], aggregated.folded[1]))
    if aggregated.A is not None:
        B = _total(layer.B, layer.shares) if aggregated.B is None else aggregated.B
        pairs.append((B, aggregated.A))
    lefts, rights = zip(*pairs, strict=True)
    left, right = np.hstack(lefts), np.vstack(rights)
    if isinstance(dense, float):
        left, right = _reduce(left, right)
    ideal, applied = left[:, :count] @ right[:count], left[:, count:] @ right[count:]
    return float(np.linalg.norm(applied + dense - ideal)), float(np.linalg.norm(ideal))


def _total(arrays: Sequence[np.ndarray], shares: np.ndarray) -> np.ndarray:
    total = np.multiply(arrays[0], shares[0], dtype=np.float64)
    for array, share in zip(arrays[1:], shares[1:], strict=True):
        total += np.multiply(array, share, dtype=np.float64)
    return total


def _mean(arrays: Sequence[np.ndarray], shares: np.ndarray) -> np.ndarray:
    return _total(arrays, shares).astype(arrays[0].dtype)


def _all_equal(arrays: Sequence[np.ndarray]) -> bool:
    first = arrays[0].tobytes()
    return all(array is arrays[0] or array.tobytes() == first for array in arrays)


def _pad(factor: np.ndarray, axis: int, rank: int) -> np.ndarray:
    missing = rank - factor.shape[axis]
    return np.pad(factor, [(0, missing if axis == each else 0) for each in range(2)])


def _fold(left: np.ndarray, right: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """Return the two factors or their product, whichever has fewer numbers."""
    if left.size + right.size > len(left) * right.shape[1]:
        return ((left @ right).astype(dtype),)
    return left.astype(dtype), right.astype(dtype)


def _truncated_svd(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return u, s, vt of left @ right from QR of each, so that only a core of ranks x ranks is decomposed.

    At most `rank` singular values come back; those within rounding of zero are zero.
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    s[s <= s[0] * max(len(left), right.shape[1]) * np.finfo(np.float64).eps] = 0.0
    return q_left @ u[:, :rank], s[:rank], vt[:rank] @ q_right.T


def _norm(left: np.ndarray, right: np.ndarray) -> float:
    left, right = _reduce(left.astype(np.float64), right.astype(np.float64))
    return float(np.linalg.norm(left @ right))


def _reduce(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return factors for which left[:, S] @ right[S] has the same Frobenius norm, S being any set of ranks.

    They are smaller factors where that saves work.
    """
    if left.shape[1] >= min(len(left), right.shape[1]):  # the product itself is smaller than its factors
        return left, right
    return np.asarray(np.linalg.qr(left, "r")), np.asarray(np.linalg.qr(right.T, "r")).T
