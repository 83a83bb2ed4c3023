"""What metrics.jsonl has with privacy.publish=totals: sums over clients and counts, and nothing of a single client.

A field that is not named here is withheld, so a new field is private until somebody names it. Texts of reasons are
withheld too: clients write some of them, and others have numbers of a client's data in them. In their place there are a
few fixed kinds of reasons.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from flapp.config.schema import PrivacyConfig
from flapp.listing import WITHHELD
from flapp.server.summary import STARTS

FAILED, LATE, ODD = "failed", "sent no reply in time", "sent a reply that does not count"
COUNTS = {  # what names clients, and what counts them in its place
    **{"refused": "refused_count", "warnings": "warning_count", "failures": "failure_count"},
    **{"capped": "capped_count", "val_capped": "val_capped_count"},
    **{"clipped": "clipped_count", "left_out": "left_out_count"},
}
FIGURES = tuple(
    f"{start}{figure}" for start in STARTS for figure in ("accuracy", "loss", "sums", "scores", "scores_error")
)
PHASE = ("asked", "replies", "absent_count", "bytes_down", "bytes_up", "seconds", "failure_kinds")
PUBLIC = {  # the fields of each kind of line
    "roster": ("clients", "source_digest"),
    "train": (*PHASE, "loss", "epsilon", "clipping_norm", "within_clip", "aggregation_error"),
    "evaluate": (*PHASE, *FIGURES),
    "central": FIGURES,
    "stop": ("metric", "best_round", "patience", "value", "budget"),
    "round": ("seconds", "phases", "store"),
    "resumed_anyway": ("changed",),
}
ANY_LINE = ("kind", "round", "time", *COUNTS.values())
PUBLIC_REFUSALS = (  # the beginnings of reasons that are about software, keys and ids, and say nothing about data
    *("runs other source", "holds base", "did not receive base", "gave no answer", "has no pinned key"),
    *("is registered as client", "has a key that is pinned for no client", "claims client "),
)


def is_whole(privacy: PrivacyConfig) -> bool:
    """Say whether everything is written down."""
    return privacy.publish == "all"


def published(privacy: PrivacyConfig, line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a line of metrics.jsonl that are written.

    A line that has been through this function comes back unchanged.
    """
    if is_whole(privacy):
        return dict(line)
    counts: dict[str, Any] = {count: len(line[key]) for key, count in COUNTS.items() if key in line}
    if "failures" in line:
        counts["failure_kinds"] = count_kinds(each["reason"] for each in line["failures"])
    public = (*ANY_LINE, *PUBLIC.get(line["kind"], ()))
    return {key: value for key, value in line.items() if key in public} | counts


def count_kinds(reasons: Iterable[str]) -> dict[str, int]:
    """Return how many clients a phase left out for each kind of reason."""
    return dict(sorted(Counter(map(_kind_of, reasons)).items()))


def tell_reason(privacy: PrivacyConfig, reason: str) -> str:
    """Return what is told of the reason why a client or node was refused, or warned."""
    if is_whole(privacy) or reason.startswith(PUBLIC_REFUSALS) or _is_of_flower(reason):
        return reason
    return WITHHELD.format("why")


def _kind_of(reason: str) -> str:
    start, _, rest = reason.partition(": ")
    if start == FAILED:
        return reason if _is_of_flower(rest) else FAILED
    return LATE if reason == LATE else ODD


def _is_of_flower(reason: str) -> bool:
    """Say whether a reason is one of the fixed texts about nodes that died or left."""
    from flapp.messages import LOST  # imports Flower, which commands do without

    return reason in LOST.values()
