"""Inspect a checkpoint store: its rounds, their tensors, what changed, and whether every byte is still as saved.

    python -m tools.checkpoints list DB                     rounds, metrics, digests, and their size on disk
    python -m tools.checkpoints show DB ROUND               the tensors of a round
    python -m tools.checkpoints verify DB                   check every byte; exits 1 with one line for each problem
    python -m tools.checkpoints diff DB ROUND ROUND         which tensors changed, and by how much
    python -m tools.checkpoints export DB ROUND FILE        write a round to FILE, in safetensors format
    python -m tools.checkpoints compact DB                  free the disk space of dropped rounds

DB is a *_chunks.db file; list, verify and compact also accept a folder that contains stores. --json prints this as
JSON. Exits 0, or 1 with one line on standard error.
"""

import argparse
import json
import math
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.files import finite
from flapp.untrusted import printable
from tools.cli import Found, by_number, count, errors_in_one_line, in_bytes, new_parser, table

PATTERN = "*_chunks.db"
MOST_TEXT = 1000  # characters to print of any one text from a store


def find_stores(path: Path) -> list[Path]:
    """Return the store at `path`, or those below the folder `path`, client 2 before client 10."""
    if not path.exists():
        raise CheckpointError(f"{path} is not there: give a store, or a folder with stores")
    found = sorted(path.rglob(PATTERN), key=lambda db: by_number(str(db))) if path.is_dir() else [path]
    if not found:
        raise CheckpointError(f"{path} holds no {PATTERN}: give a store, or a folder with stores")
    return found


def open_store(path: Path) -> ChunkManager:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name one of the stores in it ({len(find_stores(path))})")
    return ChunkManager(path, create=False)


def visit(path: Path, act: Callable[[ChunkManager], Any]) -> tuple[list[Any], list[str]]:
    """Return what `act` returns for every store at `path`, and the errors of stores that cannot be read."""
    results, problems = [], []
    for db in find_stores(path):
        try:
            with open_store(db) as store:
                results.append(act(store))
        except CheckpointError as error:
            problems.append(str(error))
    return results, problems


def list_rounds(given: argparse.Namespace) -> Found:
    """List the rounds of a store, or the stores in a folder."""
    if given.db.is_dir():
        return list_stores(given.db)
    with open_store(given.db) as store:
        rounds, stats = store.rounds(), store.get_storage_stats()
    heads = ("round", "created (UTC)", "chunks", "bytes", "model", "config", "input", "metrics")
    rows = []
    for row in rounds:
        digests = [digest[:8] or "-" for digest in (row.model_digest, row.config_digest, row.input_digest)]
        created = row.created_at.removesuffix("+00:00")
        rows.append([row.round, created, f"{row.chunks:,}", in_bytes(row.bytes), *digests, in_words(row.metrics)])
    total = (
        f"{count(stats['rounds'], 'round')} of {in_bytes(stats['logical_bytes'])} in all, stored as "
        f"{count(stats['unique_chunks'], 'chunk')} of {in_bytes(stats['stored_bytes'])} "
        f"(x {stats['dedup_ratio']:.2f}), file of {in_bytes(stats['storage_size_bytes'])}"
    )
    return {"rounds": list(map(asdict, rounds)), "statistics": stats}, [*table(heads, rows, (0, 2, 3)), total]


def list_stores(folder: Path) -> Found:
    stores, problems = visit(folder, ChunkManager.get_storage_stats)
    heads = ("store", "client", "rounds", "first", "last", "chunks", "logical", "stored", "dedup", "file")
    rows = []
    for row in stores:
        logical, stored, file = (in_bytes(row[f"{name}_bytes"]) for name in ("logical", "stored", "storage_size"))
        of_rounds = [row["rounds"], *(row["round_range"] or ("-", "-")), f"{row['unique_chunks']:,}"]
        rows.append(
            [row["db_path"], row["client_id"], *of_rounds, logical, stored, f"x {row['dedup_ratio']:.2f}", file]
        )
    return {"stores": stores, "problems": problems}, table(heads, rows, range(2, 10))


def show(given: argparse.Namespace) -> Found:
    """Show a round and its tensors, read and verified."""
    with open_store(given.db) as store:
        tensors = store.reconstruct_model_from_chunks(given.round)
        chunks = Counter(key for chunk in store.load_chunks_by_round(given.round) for key in chunk.parts)
        row = store.find_round(given.round)
    assert row is not None
    facts, rows = [], []
    for key, tensor in tensors.items():
        dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        facts.append({"key": key, "dtype": dtype, "shape": shape, "bytes": tensor.nbytes, "chunks": chunks[key]})
        rows.append([key, dtype, tuple(shape), in_bytes(tensor.nbytes), chunks[key]])
    about = {"metrics": in_words(row.metrics, MOST_TEXT)}
    about |= {name: getattr(row, name) or "-" for name in ("model_digest", "config_digest", "input_digest")}
    lines = [
        *table(("tensor", "dtype", "shape", "bytes", "chunks"), rows, (3, 4)),
        f"round {row.round}, {printable(row.created_at)}: {count(len(rows), 'tensor')}, {in_bytes(row.bytes)}",
        *(f"{name:<13}  {printable(text, MOST_TEXT)}" for name, text in about.items()),
    ]
    return asdict(row) | {"tensors": facts}, lines


def verify(given: argparse.Namespace) -> Found:
    checks, problems = visit(given.db, ChunkManager.verify)
    problems += [problem for check in checks for problem in check.problems]
    found = {name: sum(getattr(check, name) for check in checks) for name in ("rounds", "chunks", "bytes")}
    found = {"stores": len(find_stores(given.db)), **found}
    checked = ", ".join(count(found[f"{what}s"], what) for what in ("store", "round", "chunk"))
    verdict = count(len(problems), "problem") if problems else "ok"
    return {**found, "problems": problems}, [f"{checked}, {in_bytes(found['bytes'])}: {verdict}"]


def diff(given: argparse.Namespace) -> Found:
    with open_store(given.db) as store:
        changes = store.diff(given.first, given.second)
    found = {"first": given.first, "second": given.second, "changes": list(map(asdict, changes))}
    if not changes:
        return found, [f"rounds {given.first} and {given.second} hold the same tensors"]
    rows = []
    for change in changes:
        norms = ("-" if math.isnan(norm) else f"{norm:.4g}" for norm in (change.norm, change.relative_norm))
        rows.append([change.key, change.kind, f"{change.changed:,}", *norms])
    total = f"{count(len(changes), 'changed tensor')} from round {given.first} to round {given.second}"
    return found, [*table(("tensor", "change", "elements", "norm of change", "relative"), rows, (2, 3, 4)), total]


def export(given: argparse.Namespace) -> Found:
    with open_store(given.db) as store:
        sha256 = store.export(given.round, given.file)
    return {"round": given.round, "file": str(given.file), "sha256": sha256}, [f"{sha256}  {given.file}"]


def compact(given: argparse.Namespace) -> Found:
    sizes, problems = visit(given.db, lambda store: (str(store.path), *store.compact()))
    stores = [{"db_path": path, "bytes_before": before, "bytes_after": after} for path, before, after in sizes]
    lines = [f"{path}: {in_bytes(before)} -> {in_bytes(after)}" for path, before, after in sizes]
    return {"stores": stores, "problems": problems}, lines


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Found], list[str]]] = {  # with the names of ROUND arguments
    "list": (list_rounds, []),
    "show": (show, ["round"]),
    "verify": (verify, []),
    "diff": (diff, ["first", "second"]),
    "export": (export, ["round"]),
    "compact": (compact, []),
}


def in_words(metrics: dict[str, Any], width: int = 60) -> str:
    """Return metrics on one line, cut off at `width`."""
    words = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in metrics.items())
    text = printable(" ".join(" ".join(words).split()), width + 1)
    return text if len(text) <= width else text[: width - 3] + "..."


@errors_in_one_line(CheckpointError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, numbers) in COMMANDS.items():
        add = commands.add_parser(name).add_argument
        add("db", type=Path)
        for number in numbers:
            add(number, type=int, metavar="ROUND")
        if name == "export":
            add("file", type=Path)
        add("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    found, lines = COMMANDS[given.command][0](given)
    for problem in found.get("problems", ()):
        print(f"error: {printable(problem, MOST_TEXT)}", file=sys.stderr)
    print(json.dumps(finite(found), indent=1) if given.json else "\n".join(lines))
    return int(bool(found.get("problems")))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it silently
    sys.exit(main())
