"""Reading lines of metrics.jsonl and the summary in metrics.json, in which anything may stand where a number should."""

import math
from collections.abc import Callable
from typing import Any, TypeGuard

from flapp.untrusted import parse_json

Check = Callable[[Any], bool]
LAST_ROUND = 1 << 31


def is_number(value: Any) -> TypeGuard[int | float]:
    """Say whether a value is a number; True and False are not, NaN and infinities are."""
    return type(value) in (int, float)


def is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def is_round(value: Any) -> bool:
    return type(value) is int and 0 <= value < LAST_ROUND


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _object_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_failure(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("client")) and is_text(value.get("reason"))


def _is_change(value: Any) -> bool:
    return isinstance(value, dict) and is_round(value.get("round")) and _list_of(is_text)(value.get("changed"))


LINE: dict[str, Check] = {
    **{"kind": is_text, "round": is_round, "time": is_finite, "seconds": is_number, "source_digest": is_text},
    **dict.fromkeys(("bytes_up", "bytes_down"), is_finite),
    **dict.fromkeys(
        ("phases", "store", "client_seconds", "client_bytes_up", "client_bytes_down"), _object_of(is_number)
    ),
    **dict.fromkeys(("loss", "accuracy", "personal_loss", "personal_accuracy"), _or_none(is_number)),
    **dict.fromkeys(("accuracy_by_client", "personal_accuracy_by_client"), _object_of(_or_none(is_number))),
    **dict.fromkeys(("loss_spread", "accuracy_spread"), _object_of(_or_none(is_number))),
    **dict.fromkeys(("personal_loss_spread", "personal_accuracy_spread"), _object_of(_or_none(is_number))),
    **dict.fromkeys(("refused", "warnings"), _object_of(is_text)),
    **{"aggregation_error": _or_none(is_number), "absent": _list_of(is_text), "failures": _list_of(_is_failure)},
    **{"samples": _object_of(_object_of(is_number)), "label_hist": _object_of(_list_of(is_finite))},
    **{"capped": _object_of(is_finite), "client_ranks": _object_of(is_number), "update_norm": _or_none(is_number)},
    **{"changed": _list_of(is_text), "absent_count": is_round},
    **{"client": is_text, "train": is_number, "val": is_number, "test": is_number, "labels": _list_of(is_finite)},
}
SUMMARY: dict[str, Check] = {
    **dict.fromkeys(("status", "error", "model_sha256", "run_dir"), is_text),
    **dict.fromkeys(("bytes_up", "bytes_down", "seconds"), is_finite),
    **dict.fromkeys(("rounds", "best_round", "selected_round"), is_round),
    **dict.fromkeys(("accuracy", "loss", "personal_accuracy", "personal_loss", "objective"), is_number),
    **dict.fromkeys(("best_value", "aggregation_error"), is_number),
    **{"refused": _object_of(is_text), "refused_count": is_round, "resumed_anyway": _list_of(_is_change)},
}


def read_line(text: bytes | str, kind: str | None = None) -> dict[str, Any]:
    """Return a line of metrics.jsonl; raises ValueError unless it is JSON and its known keys hold the right types.

    With `kind` it is a line of a file in which all lines are of this kind, and those of earlier versions do not say so.
    """
    line = parse_json(text, surrogates=True)  # the reasons for failures come from clients
    if kind is not None and isinstance(line, dict) and line.setdefault("kind", kind) != kind:
        raise ValueError(f"it is not of kind {kind}")
    if not isinstance(line, dict) or not {"kind", "round"} <= line.keys():
        raise ValueError("it is not an object with a kind and a round")
    if odd := [key for key, check in LINE.items() if key in line and not check(line[key])]:
        raise ValueError(f"its {odd[0]} is not of the right type")
    return line


def sound_summary(values: Any) -> tuple[dict[str, Any], list[str]]:
    """Return what can be used of metrics.json, and the keys whose values were left out."""
    if not isinstance(values, dict):
        return {}, ["everything"]
    odd = [key for key, check in SUMMARY.items() if values.get(key) is not None and not check(values[key])]
    return {key: value for key, value in values.items() if key not in odd}, odd
