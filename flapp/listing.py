"""Describe any number of clients in one line."""

from collections.abc import Mapping, Sequence

WITHHELD = "privacy.publish=totals hides {}: a trial run with privacy.publish=all shows it"


def by_reason(reasons: Mapping[str, str], most: int | None = None) -> str:
    """List reasons in one line with their clients (or nodes). If `most` is given, only so many, the most frequent."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    if most is not None:
        groups = dict(sorted(groups.items(), key=lambda group: -len(group[1])))
    shown = [f"{name_clients(names)}: {reason}" for reason, names in groups.items()][:most]
    left = len(groups) - len(shown)
    more = [f"and {left} more reason{'s' * (left > 1)}"] if left else []
    return "; ".join(shown + more)


def by_kind(kinds: Mapping[str, int]) -> str:
    """List in one line how many clients there are for each kind of reason, when it may not be said which."""
    shown = [f"{count} client{'s' * (count != 1)} {kind}".rstrip() for kind, count in kinds.items()]
    return f"{'; '.join(shown)} ({WITHHELD.format('who and why')})" if shown else ""


def name_clients(names: Sequence[str]) -> str:
    """Name clients by their ids, and nodes, in one clause."""
    nodes = [name for name in names if name.startswith("node ")]
    clients = sorted((name for name in names if not name.startswith("node ")), key=by_number)
    parts = [f"client{'s' * (len(clients) > 1)} {list_names(clients)}"] if clients else []
    return ", ".join(parts + ([list_names(nodes)] if nodes else []))


def by_number(name: str) -> tuple[int, str]:
    """Return the key that sorts ids by number."""
    return len(name), name


def list_names(names: Sequence[str], most: int = 12) -> str:
    """List names, with three or more consecutive numbers as `0 to 9`; a long list ends with the number of the rest."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _is_next(name, runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    parts: list[tuple[str, int]] = []  # what is written, and how many names it stands for
    for run in runs:
        parts += [(f"{run[0]} to {run[-1]}", len(run))] if len(run) > 2 else [(name, 1) for name in run]
    left = sum(count for _, count in parts[most:])
    return ", ".join(text for text, _ in parts[:most]) + (f" and {left} more" if left else "")


def _is_next(name: str, before: str) -> bool:
    """Say whether two names are consecutive numbers; int() refuses those of more than 4,300 digits."""
    are_numbers = all(each.isdecimal() and len(each) < 20 for each in (name, before))
    return are_numbers and int(name) == int(before) + 1
