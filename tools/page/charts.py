"""Choose the pictures of a run, of several runs side by side, and of a sweep."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from tools.page.drawing import (
    COLOURS,
    GREY,
    MOST_LINES,
    Curve,
    Picture,
    draw_classes,
    draw_curves,
    draw_setting,
    draw_spread,
    draw_stack,
)
from tools.page.run import Points, Run, differing

MB = 1e6
MOST_SETTINGS = 12
ACCURACY = "accuracy (share of test samples)"
LOSS = "loss (mean of a sample)"
SPREADS = {
    "accuracy": "Accuracy over clients",
    "personal_accuracy": "Personalised accuracy over clients",
    "loss": "Loss over clients",
    "personal_loss": "Personalised loss over clients",
}


def pictures_of(run: Run) -> dict[str, list[Picture]]:
    """Return the pictures of one run, by section of the page; sections of which nothing is recorded are empty."""
    marks = marks_of(run)
    drawn: dict[str, Iterable[Picture | None]] = {
        "Learning": [
            draw_curves("accuracy", "Accuracy", ACCURACY, _measured(run, "accuracy"), marks),
            draw_curves("loss", "Loss", LOSS, [*_measured(run, "loss"), _trained(run)], marks),
            *(draw_spread(run, key, title, marks) for key, title in SPREADS.items()),
        ],
        "Clients and classes": [draw_classes(run)],
        "Traffic": _traffic(run),
        "Time of a round": [draw_stack("phases", "Time by phase", "seconds of a round", run.phases())],
        "Checkpoints": _stores(run),
    }
    return {section: [picture for picture in pictures if picture] for section, pictures in drawn.items()}


def by_name(drawn: Mapping[str, list[Picture]], start: str = "") -> dict[str, Picture]:
    return {f"{start}{picture.name}": picture for pictures in drawn.values() for picture in pictures}


def marks_of(run: Run) -> dict[int, str]:
    """Return the words that mark rounds: where it was best, which model was kept, where it stopped early."""
    words: dict[int, list[str]] = {}
    if (best := run.best()[0]) is not None:
        words.setdefault(best, []).append("best")
    if (selected := run.summary.get("selected_round")) is not None:
        words.setdefault(selected, []).append("selected")
    if stops := run.lines.get("stop"):
        words.setdefault(stops[-1]["round"], []).append("stopped")
    return {at: ", ".join(said) for at, said in words.items()}


def compare(runs: list[Run]) -> list[Picture]:
    """Return the curves of several runs, one over the other."""
    drawn = [
        draw_curves("runs-accuracy", "Accuracy", ACCURACY, _overlaid(runs, "evaluate", "accuracy")),
        draw_curves(
            "runs-personal", "Personalised accuracy", ACCURACY, _overlaid(runs, "evaluate", "personal_accuracy")
        ),
        draw_curves("runs-loss", "Loss", LOSS, _overlaid(runs, "evaluate", "loss")),
        draw_curves("runs-train-loss", "Training loss", LOSS, _overlaid(runs, "train", "loss")),
        draw_curves(
            "runs-accuracy-by-mb",
            "Accuracy by traffic",
            ACCURACY,
            _curves(runs, [by_traffic(run) for run in runs]),
            xlabel="MB up and down so far",
        ),
        draw_curves("runs-seconds", "Time of a round", "seconds", _overlaid(runs, "round", "seconds"), zero=True),
    ]
    return [picture for picture in drawn if picture]


def swept(runs: list[Run]) -> list[Picture]:
    """Return a picture for each setting in which runs differ, if they are few: the objective over its values."""
    if len(runs) < 3 or len(differing(runs)) > MOST_SETTINGS:
        return []
    ended = [(run, value) for run in runs if (value := run.final(run.objective)) is not None]
    drawn = []
    for key in differing([run for run, _ in ended]):
        values = [(str(run.config.get(key)), value) for run, value in ended]
        drawn.append(draw_setting(key, values, runs[0].objective.replace("_", " ")))
    return drawn


def by_traffic(run: Run) -> Points:
    """Return the accuracy of each evaluation over the MB sent up and down until then."""
    rounds, accuracy = run.series("evaluate", "accuracy")
    sent, megabytes = _per_round(run, "bytes_up", "bytes_down")
    so_far = np.concatenate([[0.0], np.cumsum(megabytes)])
    return so_far[np.searchsorted(sent, rounds, side="right")], accuracy


def colour_of(runs: list[Run], index: int) -> str:
    """Return the colour of a run among several; beyond MOST_LINES only the best has one."""
    if len(runs) <= MOST_LINES:
        return COLOURS[index]
    return COLOURS[0] if index == best_of(runs) else GREY


def best_of(runs: list[Run]) -> int:
    """Return the index of the run with the best objective."""
    sign = -1 if runs[0].objective == "loss" else 1
    values = [value if (value := run.final(run.objective)) is not None else -sign * np.inf for run in runs]
    return max(range(len(runs)), key=lambda i: sign * values[i])


def _measured(run: Run, key: str) -> list[Curve]:
    return [
        Curve("global", run.series("evaluate", key), COLOURS[0]),
        Curve("personalised", run.series("evaluate", f"personal_{key}"), COLOURS[1], 1),
        Curve("on the server", run.series("central", key), COLOURS[2], 2),
    ]


def _trained(run: Run) -> Curve:
    return Curve("training", run.series("train", "loss"), COLOURS[7], 3)


def _overlaid(runs: list[Run], kind: str, key: str) -> list[Curve]:
    return _curves(runs, [run.series(kind, key) for run in runs])


def _curves(runs: list[Run], points: list[Points]) -> list[Curve]:
    curves = [
        Curve(
            run.label if len(runs) <= MOST_LINES else f"{run.label} (best)",
            found,
            colour_of(runs, i),
            i // 4 if len(runs) <= MOST_LINES else 0,
        )
        for i, (run, found) in enumerate(zip(runs, points, strict=True))
    ]
    if len(runs) <= MOST_LINES:
        return curves
    best = best_of(runs)
    rest = [Curve("", curve.points, GREY) for i, curve in enumerate(curves) if i != best]
    return [*rest, curves[best]]


def _traffic(run: Run) -> list[Picture | None]:
    up, down = (_per_round(run, key) for key in ("bytes_up", "bytes_down"))
    sums = [(x, np.cumsum(y)) for x, y in (up, down)]
    return [
        draw_curves("bytes", "Bytes of a round", "MB", _up_and_down(up, down), zero=True),
        draw_curves("bytes-sum", "Bytes so far", "MB", _up_and_down(*sums), zero=True),
        draw_curves(
            "accuracy-by-mb",
            "Accuracy by traffic",
            ACCURACY,
            [Curve("global", by_traffic(run), COLOURS[0])],
            xlabel="MB up and down so far",
        ),
    ]


def _up_and_down(up: Points, down: Points) -> list[Curve]:
    return [Curve("up", up, COLOURS[0]), Curve("down", down, COLOURS[1], 1)]


def _per_round(run: Run, *keys: str) -> Points:
    """Return the MB of each round, all its exchanges together."""
    total: Counter[int] = Counter()
    for kind in run.lines:
        for key in keys:
            rounds, values = run.series(kind, key)
            total.update(dict(zip(rounds.tolist(), values.tolist(), strict=True)))
    rounds = np.array(sorted(total), int)
    return rounds, np.array([total[at] for at in rounds.tolist()]) / MB


def _stores(run: Run) -> list[Picture | None]:
    size, stored, total = (run.series("round", f"store.{key}") for key in ("bytes", "stored", "total"))
    sums = [
        Curve("size of the file", _in_mb(size), COLOURS[0]),
        Curve("new bytes, so far", _in_mb(stored, so_far=True), COLOURS[1], 1),
        Curve("models, so far", _in_mb(total, so_far=True), COLOURS[7], 2),
    ]
    return [draw_curves("store", "The server's store", "MB", sums, zero=True)]


def _in_mb(points: Points, so_far: bool = False) -> Points:
    rounds, values = points
    return rounds, (np.cumsum(values) if so_far else values) / MB
