"""The pictures of one run, of several runs in comparison, and of a sweep."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from flapp.server.summary import in_words
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
ACCURACY = "share of samples"
LOSS = "mean over samples"
SENT = "MB up and down so far"
SPREADS = {
    "accuracy": "Accuracy over clients",
    "personal_accuracy": "Personalised accuracy over clients",
    "loss": "Loss over clients",
    "personal_loss": "Personalised loss over clients",
}


def pictures_of(run: Run) -> dict[str, list[Picture]]:
    """Return the pictures of one run by section of the page; a section without data is empty."""
    marks, training = marks_of(run), Curve("training", run.series("train", "loss"), GREY, 3)
    updates = Curve("median", run.series("train", "update_norm"), COLOURS[0])
    drawn: dict[str, Iterable[Picture | None]] = {
        "Learning": [
            draw_curves("accuracy", "Accuracy", ACCURACY, _measured(run, "accuracy"), marks),
            draw_curves("loss", "Loss", LOSS, [*_measured(run, "loss"), training], marks),
            *(draw_spread(run, key, title, marks) for key, title in SPREADS.items()),
            draw_curves("updates", "Length of updates", "median over clients", [updates], zero=True),
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
    """Return the words that mark rounds: the best one, the one whose model was kept, the one of early stopping."""
    found = [(run.best()[0], "best"), (run.summary.get("selected_round"), "selected")]
    found += [(line["round"], "stopped") for line in run.lines.get("stop", ())[-1:]]
    words: dict[int, list[str]] = {}
    for at, word in found:
        if at is not None:
            words.setdefault(at, []).append(word)
    return {at: ", ".join(said) for at, said in words.items()}


def compare(runs: list[Run]) -> list[Picture]:
    accuracy, personal = (_overlaid(runs, "evaluate", key) for key in ("accuracy", "personal_accuracy"))
    reached, seconds = _curves(runs, [by_traffic(run) for run in runs]), _overlaid(runs, "round", "seconds")
    drawn = [
        draw_curves("runs-accuracy", "Accuracy", ACCURACY, accuracy),
        draw_curves("runs-personal", "Personalised accuracy", ACCURACY, personal),
        draw_curves("runs-loss", "Loss", LOSS, _overlaid(runs, "evaluate", "loss")),
        draw_curves("runs-train-loss", "Training loss", LOSS, _overlaid(runs, "train", "loss")),
        draw_curves("runs-accuracy-by-mb", "Accuracy by traffic", ACCURACY, reached, xlabel=SENT),
        draw_curves("runs-seconds", "Time of a round", "seconds", seconds, zero=True),
    ]
    return [picture for picture in drawn if picture]


def swept(runs: list[Run]) -> list[Picture]:
    """Return a chart of the objective over the values of each setting in which runs differ, unless there are many."""
    if len(runs) < 3 or len(differing(runs)) > MOST_SETTINGS:
        return []
    ended = [(run, value) for run in runs if (value := run.final(run.objective)) is not None]
    alike: dict[tuple[str, ...], list[str]] = {}  # settings that change together, such as seed and partition.seed
    for key in differing([run for run, _ in ended]):
        alike.setdefault(tuple(str(run.config.get(key)) for run, _ in ended), []).append(key)
    figures, objective = [value for _, value in ended], in_words(runs[0].objective)
    return [draw_setting(" = ".join(keys), names, figures, objective) for names, keys in alike.items()]


def by_traffic(run: Run) -> Points:
    """Return the accuracy of each evaluation against the MB sent up and down until then."""
    rounds, accuracy = run.series("evaluate", "accuracy")
    sent, megabytes = _per_round(run, "bytes_up", "bytes_down")
    so_far = np.concatenate([[0.0], np.cumsum(megabytes)])
    return so_far[np.searchsorted(sent, rounds, side="right")], accuracy


def colour_of(runs: list[Run], index: int) -> str:
    """Return the colour of a run in comparisons; of more than MOST_LINES runs only the best has one."""
    if len(runs) <= MOST_LINES:
        return COLOURS[index]
    return COLOURS[0] if index == best_of(runs) else GREY


def best_of(runs: list[Run]) -> int:
    sign = -1 if runs[0].objective.endswith("loss") else 1
    values = [value if (value := run.final(run.objective)) is not None else -sign * np.inf for run in runs]
    return max(range(len(runs)), key=lambda i: sign * values[i])


def _measured(run: Run, key: str) -> list[Curve]:
    return [
        Curve("global", run.series("evaluate", key), COLOURS[0]),
        Curve("personalised", run.series("evaluate", f"personal_{key}"), COLOURS[1], 1),
        Curve("on the server", run.series("central", key), COLOURS[2], 2),
        Curve("validation", run.series("evaluate", f"val_{key}"), COLOURS[3], 3),
    ]


def _overlaid(runs: list[Run], kind: str, key: str) -> list[Curve]:
    return _curves(runs, [run.series(kind, key) for run in runs])


def _curves(runs: list[Run], points: list[Points]) -> list[Curve]:
    if len(runs) <= MOST_LINES:
        return [Curve(runs[i].title, found, COLOURS[i], i // 4) for i, found in enumerate(points)]
    best = best_of(runs)
    rest = [Curve("", found, GREY) for i, found in enumerate(points) if i != best]
    return [*rest, Curve(f"{runs[best].title}, the best", points[best], COLOURS[0])]


def _traffic(run: Run) -> list[Picture | None]:
    each = [
        Curve("up", _per_round(run, "bytes_up"), COLOURS[0]),
        Curve("down", _per_round(run, "bytes_down"), COLOURS[1], 1),
    ]
    so_far = [replace(curve, points=_so_far(curve.points)) for curve in each]
    reached = [Curve("global", by_traffic(run), COLOURS[0])]
    return [
        draw_curves("bytes", "Bytes of a round", "MB", each, zero=True),
        draw_curves("bytes-sum", "Bytes so far", "MB", so_far, zero=True),
        draw_curves("accuracy-by-mb", "Accuracy by traffic", ACCURACY, reached, xlabel=SENT),
    ]


def _per_round(run: Run, *keys: str) -> Points:
    """Return the MB of each round in all its steps."""
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
        Curve("new bytes, so far", _so_far(_in_mb(stored)), COLOURS[1], 1),
        Curve("models, so far", _so_far(_in_mb(total)), COLOURS[7], 2),
    ]
    return [draw_curves("store", "The server's store", "MB", sums, zero=True)]


def _in_mb(points: Points) -> Points:
    return points[0], points[1] / MB


def _so_far(points: Points) -> Points:
    return points[0], np.cumsum(points[1])
