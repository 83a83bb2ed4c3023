"""Look into a checkpoint store: its rounds, their tensors, what changed, and whether every byte is as it was saved.

    python -m tools.checkpoints list DB                     rounds, metrics, digests, and what they take on disk
    python -m tools.checkpoints show DB ROUND               the tensors of a round
    python -m tools.checkpoints verify DB                   every byte; exits 1 with one line a problem
    python -m tools.checkpoints diff DB ROUND ROUND         which tensors changed, and by how much
    python -m tools.checkpoints export DB ROUND FILE        a round as FILE.safetensors
    python -m tools.checkpoints compact DB                  give the space of dropped rounds back

DB is a *_chunks.db; list, verify and compact also take a folder, and then speak of every store below it. --json prints
the same for machines. Exits 0, or 1 with one line on standard error.
"""

import argparse
import json
import math
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.untrusted import printable
from tools.running.called import as_called, new_parser

PATTERN = "*_chunks.db"
MOST_TEXT = 1000  # characters of one thing that a store says of itself
Cells = Sequence[str]


def find_stores(path: Path) -> list[Path]:
    """Return the store at `path`, or those below the folder `path`, client 2 before client 10."""
    if not path.exists():
        raise CheckpointError(f"{path} is not there: give a store, or a folder with stores")
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob(PATTERN), key=lambda db: [_by_number(part) for part in db.parts])
    if not found:
        raise CheckpointError(f"{path} holds no {PATTERN}: give a store, or a folder with stores")
    return found


def _by_number(name: str) -> list[tuple[str, int]]:
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def open_store(path: Path) -> ChunkManager:
    """Open one store that must be there."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name one of the {len(find_stores(path))} stores in it")
    return ChunkManager(path, create=False)


def visit(path: Path, act: Callable[[ChunkManager], Iterable[str] | None]) -> list[str]:
    """Let `act` see every store at `path`; return the problems it finds, and those of stores that cannot be read."""
    problems: list[str] = []
    for db in find_stores(path):
        try:
            with open_store(db) as store:
                problems += act(store) or ()
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def list_rounds(given: argparse.Namespace) -> dict[str, Any]:
    """Return the rounds and statistics of a store."""
    with open_store(given.db) as store:
        return {"rounds": [asdict(row) for row in store.rounds()], "statistics": store.get_storage_stats()}


def list_stores(given: argparse.Namespace) -> dict[str, Any]:
    """Return the statistics of every store in a folder, and what is wrong with those that cannot be read."""
    stores: list[dict[str, Any]] = []
    problems = visit(given.db, lambda store: stores.append(store.get_storage_stats()))
    return {"stores": stores, "problems": problems}


def show(given: argparse.Namespace) -> dict[str, Any]:
    """Return a round and its tensors, read and verified."""
    with open_store(given.db) as store:
        tensors = store.reconstruct_model_from_chunks(given.round)
        chunks = Counter(key for chunk in store.load_chunks_by_round(given.round) for key in chunk.parts)
        row = store.find_round(given.round)
    assert row is not None
    rows = [
        {
            "key": key,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "chunks": chunks[key],
        }
        for key, tensor in tensors.items()
    ]
    return asdict(row) | {"tensors": rows}


def verify(given: argparse.Namespace) -> dict[str, Any]:
    """Return how much of every store was checked, and all problems."""
    totals = Counter(rounds=0, chunks=0, bytes=0)

    def check(store: ChunkManager) -> tuple[str, ...]:
        found = store.verify()
        totals.update(rounds=found.rounds, chunks=found.chunks, bytes=found.bytes)
        return found.problems

    problems = visit(given.db, check)
    return {"stores": len(find_stores(given.db)), **totals, "problems": problems}


def diff(given: argparse.Namespace) -> dict[str, Any]:
    """Return the tensors that differ between two rounds."""
    with open_store(given.db) as store:
        changes = [asdict(change) for change in store.diff(given.first, given.second)]
    return {"first": given.first, "second": given.second, "changes": changes}


def export(given: argparse.Namespace) -> dict[str, Any]:
    """Write a round as a safetensors file and return its SHA-256."""
    with open_store(given.db) as store:
        return {"round": given.round, "file": str(given.file), "sha256": store.export(given.round, given.file)}


def compact(given: argparse.Namespace) -> dict[str, Any]:
    """Shrink every store and return its bytes before and after, and what is wrong with those that cannot be read."""
    stores: list[dict[str, Any]] = []

    def shrink(store: ChunkManager) -> None:
        before, after = store.compact()
        stores.append({"db_path": str(store.path), "bytes_before": before, "bytes_after": after})

    problems = visit(given.db, shrink)
    return {"stores": stores, "problems": problems}


def list_lines(found: dict[str, Any]) -> Iterator[str]:
    digests = ("model_digest", "config_digest", "input_digest")
    heads = ("round", "created (UTC)", "chunks", "bytes", "model", "config", "input", "metrics")
    rows: list[Cells] = [
        (
            str(row["round"]),
            row["created_at"].removesuffix("+00:00"),
            f"{row['chunks']:,}",
            in_bytes(row["bytes"]),
            *(row[name][:8] or "-" for name in digests),
            in_words(row["metrics"]),
        )
        for row in found["rounds"]
    ]
    yield from table(heads, rows, right=(0, 2, 3))
    stats = found["statistics"]
    yield (
        f"{count(stats['rounds'], 'round')} of {in_bytes(stats['logical_bytes'])} in all, stored as "
        f"{count(stats['unique_chunks'], 'chunk')} of {in_bytes(stats['stored_bytes'])} "
        f"(x {stats['dedup_ratio']:.2f}), file of {in_bytes(stats['storage_size_bytes'])}"
    )


def stores_lines(found: dict[str, Any]) -> Iterator[str]:
    heads = ("store", "client", "rounds", "first", "last", "chunks", "logical", "stored", "dedup", "file")
    rows: list[Cells] = [
        (
            row["db_path"],
            row["client_id"],
            str(row["rounds"]),
            *map(str, row["round_range"] or ("-", "-")),
            f"{row['unique_chunks']:,}",
            *(in_bytes(row[name]) for name in ("logical_bytes", "stored_bytes")),
            f"x {row['dedup_ratio']:.2f}",
            in_bytes(row["storage_size_bytes"]),
        )
        for row in found["stores"]
    ]
    yield from table(heads, rows, right=range(2, 10))


def show_lines(found: dict[str, Any]) -> Iterator[str]:
    tensors = found["tensors"]
    rows: list[Cells] = [
        (row["key"], row["dtype"], str(tuple(row["shape"])), in_bytes(row["bytes"]), str(row["chunks"]))
        for row in tensors
    ]
    yield from table(("tensor", "dtype", "shape", "bytes", "chunks"), rows, right=(3, 4))
    created = printable(found["created_at"])
    yield f"round {found['round']}, {created}: {count(len(tensors), 'tensor')}, {in_bytes(found['bytes'])}"
    for name in ("metrics", "model_digest", "config_digest", "input_digest"):
        said = in_words(found[name], MOST_TEXT) if name == "metrics" else printable(found[name] or "-", MOST_TEXT)
        yield f"{name:<13}  {said}"


def verify_lines(found: dict[str, Any]) -> Iterator[str]:
    checked = ", ".join(count(found[f"{what}s"], what) for what in ("store", "round", "chunk"))
    verdict = count(len(found["problems"]), "problem") if found["problems"] else "ok"
    yield f"{checked}, {in_bytes(found['bytes'])}: {verdict}"


def diff_lines(found: dict[str, Any]) -> Iterator[str]:
    changes = found["changes"]
    if not changes:
        yield f"rounds {found['first']} and {found['second']} hold the same tensors"
        return
    rows: list[Cells] = [
        (row["key"], row["kind"], f"{row['changed']:,}", *map(in_digits, (row["norm"], row["relative_norm"])))
        for row in changes
    ]
    yield from table(("tensor", "change", "elements", "norm of change", "relative"), rows, right=(2, 3, 4))
    yield f"{count(len(changes), 'changed tensor')} from round {found['first']} to round {found['second']}"


def export_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['sha256']}  {found['file']}"


def compact_lines(found: dict[str, Any]) -> Iterator[str]:
    for row in found["stores"]:
        yield f"{row['db_path']}: {in_bytes(row['bytes_before'])} -> {in_bytes(row['bytes_after'])}"


def table(heads: Cells, rows: Sequence[Cells], right: Sequence[int]) -> Iterator[str]:
    """Yield aligned lines; the columns in `right` hold numbers."""
    rows = [[printable(cell, MOST_TEXT) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        cells = (
            f"{cell:>{w}}" if i in right else f"{cell:<{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def in_bytes(size: int) -> str:
    """Return a size as people read it, in powers of ten."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} B"


def in_digits(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def in_words(metrics: dict[str, Any], width: int = 60) -> str:
    """Return metrics on one line, cut off at `width`."""
    words = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in metrics.items())
    text = printable(" ".join(" ".join(words).split()), width + 1)
    return text if len(text) <= width else text[: width - 3] + "..."


def finite(value: Any) -> Any:
    """Return what JSON can hold: null for NaN and infinities, which standard JSON has not."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Command = tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[dict[str, Any]], Iterator[str]]]
COMMANDS: dict[str, Command] = {
    "list": (list_rounds, list_lines),
    "show": (show, show_lines),
    "verify": (verify, verify_lines),
    "diff": (diff, diff_lines),
    "export": (export, export_lines),
    "compact": (compact, compact_lines),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    numbers = {"show": ("round",), "diff": ("first", "second"), "export": ("round",)}
    for name in COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("db", type=Path)
        for number in numbers.get(name, ()):
            command.add_argument(number, type=int, metavar="ROUND")
        if name == "export":
            command.add_argument("file", type=Path)
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = parse(arguments)
    act, lines = COMMANDS[given.command]
    if given.command == "list" and given.db.is_dir():
        act, lines = list_stores, stores_lines
    try:
        found = act(given)
    except CheckpointError as error:
        print(as_called(f"error: {printable(error, MOST_TEXT)}"), file=sys.stderr)
        return 1
    for problem in found.get("problems", ()):
        print(f"error: {printable(problem, MOST_TEXT)}", file=sys.stderr)
    print(json.dumps(finite(found), indent=1) if given.json else "\n".join(lines(found)))
    return int(bool(found.get("problems")))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word, as it ends every other tool
    sys.exit(main())
