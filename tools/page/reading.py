"""Read run directories for the report. Missing or damaged data are left out.

`notes` lists damaged files, and a missing config.yaml or metrics.jsonl; `Stores.problems` lists damaged stores.

What single clients did is gathered as lines are read, so that 500 rounds of 1,000 clients take little memory: sums of
bytes and seconds, the last accuracies, failures by reason.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.config.load import read_yaml
from flapp.server.run_names import METRICS, STORE
from flapp.server.summary import read_line, sound_summary
from flapp.untrusted import MOST_BYTES, check_regular, printable
from flapp.untrusted import read_json as parse_file
from tools.cli import by_number
from tools.deployment.superlink import ANSI
from tools.page.run import Clients, Job, Run, Stores, names_of, number

HELD = "clients.jsonl"  # as flapp.server.journals names it
RUN_FILES = ("config.yaml", METRICS, "metrics.json")
STORES_OPENED = 50
LOG_BYTES, LOG_LINES = 32_768, 40


class ReportError(ValueError):
    """A file or folder on the command line is not what it should be; the message is one line."""


def read_all(paths: list[Path]) -> tuple[list[Run], list[Job]]:
    """Return the runs at `paths`, and the jobs of those paths that are sweeps; raises ReportError."""
    folders, jobs = list[tuple[Path, str]](), list[Job]()
    for path in paths:
        found, of_sweep = ([(path, "")], []) if is_run(path) else _read_sweep(path)
        folders += found
        jobs += of_sweep
    taken = Counter(label for _, label in folders)
    labels = [label if label and taken[label] == 1 else letters(i) for i, (_, label) in enumerate(folders)]
    runs = [read_run(folder, label) for (folder, _), label in zip(folders, labels, strict=True)]
    if len(runs) > 1:
        runs = [replace(run, differs=name) for run, name in zip(runs, names_of(runs), strict=True)]
    return runs, jobs


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in RUN_FILES)


def letters(index: int) -> str:
    """Name the runs A to Z, then A1, B1 and so on."""
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


def _read_sweep(path: Path) -> tuple[list[tuple[Path, str]], list[Job]]:
    """Return the folders and labels of the runs of a sweep, and its jobs; raises ReportError if it is not a sweep."""
    if not path.is_dir():
        raise ReportError(
            f"{path} is not a folder: give a run directory (home/runs/<run_name>) or the folder of a sweep"
        )
    below = sorted((folder for folder in path.iterdir() if is_run(folder)), key=lambda folder: by_number(folder.name))
    outcomes = read_json(path / "sweep.json", [])
    jobs = []
    for index, outcome in enumerate(outcome for outcome in outcomes if isinstance(outcome, dict)):
        overrides, status, error = (str(outcome.get(key) or "") for key in ("overrides", "status", "error"))
        jobs.append(Job(str(outcome.get("job", index)), overrides, status, error, number(outcome, "objective")))
    if not below and not jobs:
        raise ReportError(
            f"{path} is neither a run nor a folder of runs (none of {', '.join(RUN_FILES)} is there): "
            "give a folder below home/runs"
        )
    return [(folder, folder.name) for folder in below], jobs


def read_run(path: Path, label: str = "A") -> Run:
    """Read one run directory without writing to it."""
    notes: list[str] = []
    config = read_config(path / "config.yaml", notes)
    summary, odd = sound_summary(read_json(path / "metrics.json", {}, notes))
    if odd:
        notes.append(f"metrics.json has values of wrong types, which are left out: {', '.join(odd)}")
    clients = Clients()
    lines = _read_lines(path / METRICS, clients, notes)
    if lines and not summary:
        written = datetime.fromtimestamp((path / METRICS).stat().st_mtime, UTC)
        notes.append(f"{METRICS} was last written at {written:%H:%M:%S on %d %B %Y, UTC}")
    if (path / HELD).exists():
        lines |= _read_lines(path / HELD, clients, notes, "client")
    return Run(
        path,
        label,
        config,
        summary,
        read_json(path / "progress.json", {}, notes),
        lines,
        clients,
        add_up([path / STORE]) if (path / STORE).is_file() else None,
        _client_stores(path, config),
        tail(path / "log.txt"),
        tuple(notes),
    )


def add_up(paths: list[Path]) -> Stores:
    """Add up the sizes of all checkpoint stores, and the contents of at most STORES_OPENED of them, spread evenly."""
    opened, problems, digest = [], [], ""
    for path in paths[:: math.ceil(len(paths) / STORES_OPENED)]:
        if not path.is_file():
            problems.append(f"{path.name}: it is not a regular file")
            continue
        journal = Path(f"{path}-journal")
        if journal.exists() and journal.stat().st_size:  # SQLite would roll it back, which writes to the file
            problems.append(f"{path.name}: a save is under way or was cut short (it has a journal)")
            continue
        try:
            with ChunkManager(path, create=False) as store:
                opened.append(store.get_storage_stats())
                digest = next((row.config_digest for row in reversed(store.rounds())), digest)
        except CheckpointError as error:
            problems.append(printable(error, 1000))
    sums = {key: sum(stats[key] for stats in opened) for key in ("rounds", "logical_bytes", "stored_bytes")}
    size = sum(path.stat().st_size for path in paths)
    return Stores(len(paths), size, len(opened), **sums, config_digest=digest, problems=tuple(problems))


def read_json(path: Path, missing: Any, notes: list[str] | None = None) -> Any:
    """Return the content of a JSON file, or `missing`; a file that does not hold JSON of that type is noted."""
    said = notes if notes is not None else []
    try:
        values = parse_file(path)
        if isinstance(values, type(missing)):
            return values
        said.append(f"{path.name} holds {type(values).__name__} and is left out")
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as error:
        said.append(f"{path.name} cannot be read ({printable(error)})")
    return missing


def read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the settings in a config.yaml by dotted name; if it cannot be read, nothing and a note."""
    try:
        return flat(read_yaml(path))
    except FileNotFoundError:
        notes.append("config.yaml is missing, so there are no settings")
    except (OSError, ValueError) as error:
        notes.append(f"config.yaml cannot be read ({printable(error)}), so there are no settings")
    return {}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _read_lines(
    path: Path, clients: Clients, notes: list[str], kind: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of a file by kind, gather what they say about single clients, and note damaged lines.

    kind: the only kind of line in the file.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    odd, torn = 0, False
    try:
        check_regular(path)
        with path.open("rb") as file:
            while raw := file.readline(MOST_BYTES):
                try:
                    line = read_line(raw, kind)
                    lines.setdefault(line["kind"], []).append(clients.fold(line))
                except ValueError:
                    if len(raw) == MOST_BYTES:
                        notes.append(
                            f"{path.name} has a line of more than {MOST_BYTES:,} bytes and is left out from there"
                        )
                        break
                    torn = not raw.endswith(b"\n")
                    odd += not torn
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror}), so its lines are missing here")
    if torn:
        notes.append(f"the last line of {path.name} was cut off and is left out")
    if odd:
        notes.append(f"{odd} lines of {path.name} are not lines of a run and are left out")
    return lines


def _client_stores(path: Path, config: Mapping[str, Any]) -> Stores | None:
    """Add up the client stores of a run if they are on this machine."""
    name = Path(str(config.get("run_name") or path.name))
    if not str(name).isprintable() or name.is_absolute() or ".." in name.parts:
        return None
    given = str(config.get("home") or "")
    above = path.absolute().parents[len(name.parts) :]  # home/runs/<run_name>, wherever home is now
    for home in ([Path(given)] if given and given.isprintable() else []) + list(above[:1]):
        if found := sorted((home / "checkpoints" / name).glob("client_*/*_chunks.db")):
            return add_up(found)
    return None


def tail(path: Path) -> tuple[str, ...]:
    """Return the last lines of a log without terminal colours."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    return tuple(ANSI.sub("", text).splitlines()[-LOG_LINES:])
