"""List, show, stop and remove the runs below home/runs.

    python -m tools.runs list                      every run: status, rounds, figures, last start, sizes on disk
    python -m tools.runs show NAME                 its changed settings, its figures, the end of its log unless it is
                                                   finished, and how to resume it
    python -m tools.runs stop NAME                 stop it if it is running, even if its command was killed
    python -m tools.runs remove NAME... [--yes]    its folder and client stores, after asking; for a sweep, all its runs

A run is finished, failed, running, or interrupted (it is not running and left no result). Sizes are those of the run's
folder and of its client stores: the clients' checkpoints in home/checkpoints. Stores in other places are not counted.
Split models (split=auto) are counted, but are kept when a run is removed. --json prints this as JSON.
Exits 0, or 1 with one line on standard error.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from flapp.files import finite
from flapp.server.run_names import held_lock
from flapp.server.summary import in_short
from tools.cli import Found, as_called, count, default_home, errors_in_one_line, in_bytes, new_parser, table
from tools.page.reading import read_json, tail
from tools.running.run_entries import (
    RunsError,
    changed_words,
    complete_rounds,
    describe,
    find_runs,
    jobs_of,
    resume_command,
)

SWEEP_FILES = ("sweep.json", "multirun.yaml", "optimization_results.yaml")
LAST_LINES, LOG_WIDTH = 5, 150
EMPTY = "INFO 2026-11-21 10:00:00,123:"  # an empty line in Flower's log
FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {  # of metrics.json: how `show` names and formats them
    "error": ("error", lambda text: as_called(str(text))),
    "accuracy": ("accuracy", "{:.4f}".format),
    "personal_accuracy": ("personal accuracy", "{:.4f}".format),
    "loss": ("loss", "{:.4f}".format),
    "scores": ("your scores", lambda scores: ", ".join(" ".join(each) for each in in_short(scores).items())),
    "bytes_up": ("sent by clients", lambda size: f"{in_bytes(size)} in all, evaluation and headers included"),
    "bytes_down": ("received by them", lambda size: f"{in_bytes(size)} in all, evaluation and headers included"),
    "seconds": ("time", "{:.0f} s".format),
    "model_sha256": ("model sha256", str),
}


def list_runs(given: argparse.Namespace) -> Found:
    """Return the entries of all runs, and a table of them with the jobs of a sweep below its name."""
    runs = [describe(given.home, name) for name in find_runs(given.home / "runs")]
    if not runs:
        return {"runs": runs}, ["no runs"]
    heads = ("run", "status", "rounds", "accuracy", "loss", "started", "folder", "client stores")
    rows, group = [], ""
    for run in runs:
        folder, _, job = run["name"].rpartition("/")
        if folder and folder != group:
            rows.append([f"{folder}/", *[""] * 7])
        group = folder
        figures = ("-" if run[key] is None else f"{run[key]:.4f}" for key in ("accuracy", "loss"))
        sizes = (in_bytes(run[key]) for key in ("run_bytes", "store_bytes"))
        name, rounds = f"  {job}" if folder else job, f"{run['rounds']}/{run['num_rounds']}"
        rows.append([name, run["status"], rounds, *figures, run["started"], *sizes])
    split = sum(run["split_bytes"] for run in runs)
    total = split + sum(run["run_bytes"] + run["store_bytes"] for run in runs)
    splits = f", {in_bytes(split)} of that in split models" if split else ""
    end = f"{count(len(runs), 'run')}, {in_bytes(total)} in all{splits}"
    return {"runs": runs}, [*table(heads, rows, right=(2, 3, 4, 6, 7)), end]


def show(given: argparse.Namespace) -> Found:
    """Return all facts about one run."""
    name = only_run(given)
    path = given.home / "runs" / name
    entry, words, resume = describe(given.home, name), changed_words(path), None
    if entry["status"] in ("interrupted", "failed") and complete_rounds(path):
        place = [] if given.home == default_home() else [f"home={given.home}"]
        resume = resume_command([*words, *place], entry["name"])
    log = [line for line in tail(path / "log.txt") if len(line.split()) > len(EMPTY.split())]
    more = {"summary": read_json(path / "metrics.json", {}), "log": log[-LAST_LINES:]}
    stores = str(given.home / "checkpoints" / name)
    found = {**entry, "path": str(path), "store_folder": stores, "changed": words, **more, "resume": resume}
    return found, show_lines(found)


def only_run(given: argparse.Namespace) -> str:
    """Return the name of the run that the command line names; raises RunsError for a sweep."""
    names = jobs_of(given.home, given.name)
    if len(names) > 1 or names[0] != str(PurePosixPath(given.name)):
        raise RunsError(f"{given.name} is a sweep: name one of its runs, such as {names[0]}")
    return names[0]


def show_lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the facts about a run, one per line."""
    yield f"{found['name']}: {found['status']}, {found['rounds']} of {found['num_rounds']} rounds"
    sizes = {"folder": "run_bytes", "client stores": "store_bytes", "split models": "split_bytes"}
    held = ", ".join(f"{name} {in_bytes(found[key])}" for name, key in sizes.items() if found[key])
    facts = {"folder": found["path"], "size": held, "started": found["started"]}
    if found["store_bytes"]:
        facts["client stores"] = f"{found['store_folder']} (the clients' saved state; removed with the run)"
    facts["settings"] = " ".join(found["changed"])
    summary = found["summary"]
    facts |= {name: write(summary[key]) for key, (name, write) in FIGURES.items() if summary.get(key) is not None}
    yield from (f"  {key:<18} {value}" for key, value in facts.items())
    if found["log"] and found["status"] != "finished":
        yield "last lines of log.txt:"
        yield from (f"  {textwrap.shorten(line, LOG_WIDTH, placeholder=' ...')}" for line in found["log"])
    if found["resume"]:
        yield f"resume with: {found['resume']}"


def remove(given: argparse.Namespace) -> Found:
    """Remove runs and their clients' stores; if one of them cannot be removed, none is."""
    runs, stores = given.home / "runs", given.home / "checkpoints"
    names = list(dict.fromkeys(each for name in given.names for each in jobs_of(given.home, name)))
    entries = [describe(given.home, name) for name in names]
    folders = [folder / name for name in names for folder in (runs, stores)]
    if links := [place for folder in folders for place in links_on(given.home, folder)]:
        raise RunsError(f"{links[0]} is a symbolic link: remove the link and its target by hand")
    with ExitStack() as locks:
        for name in names:
            if not locks.enter_context(held_lock(runs / name)):
                raise RunsError(f"{name} is running: stop it first with `python -m tools.runs stop {name}`")
        freed = sum(entry["run_bytes"] + entry["store_bytes"] for entry in entries)
        confirm(given.yes, names, freed)
        for folder in filter(Path.is_dir, folders):
            # Renamed first, so that a crash cannot leave half a run under its name.
            hidden = folder.rename(folder.with_name(f".removed-{folder.name}-{os.getpid()}"))
            shutil.rmtree(hidden)
    sweeps = {parent for name in names for parent in PurePosixPath(name).parents[:-1]}
    for folder in [above / sweep for sweep in sweeps for above in (runs, stores)]:
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= set(SWEEP_FILES):
            shutil.rmtree(folder)  # nothing but the files about the sweep is left in it
    kept = sum(entry["split_bytes"] for entry in entries)
    lines = [f"removed {', '.join(names)}: {in_bytes(freed)} freed"]
    lines += [f"split models are kept: {in_bytes(kept)}"] if kept else []
    return {"removed": names, "freed_bytes": freed, "kept_split_bytes": kept}, lines


def links_on(home: Path, folder: Path) -> list[Path]:
    """List the symbolic links among a folder and its parent folders, below home/runs or home/checkpoints."""
    below = folder.relative_to(home).parts
    places = [home.joinpath(*below[:depth]) for depth in range(2, len(below) + 1)]
    return [place for place in places if place.is_symlink()]


def confirm(is_sure: bool, names: list[str], size: int) -> None:
    """Ask before anything is removed; raises RunsError if the answer is no or there is no terminal."""
    if is_sure:
        return
    what = names[0] if len(names) == 1 else f"{len(names)} runs ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
    if not sys.stdin.isatty():
        raise RunsError(f"nothing was removed, because there is no terminal to ask on: add --yes to remove {what}")
    print(f"Remove {what} and their client stores, {in_bytes(size)}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RunsError("nothing was removed")


def stop(given: argparse.Namespace) -> Found:
    """Stop a run, whether or not the command that started it still waits; pids is null if it was not running."""
    from tools.running.stop import stop_run  # imports Flower

    name = only_run(given)
    if links := links_on(given.home, given.home / "runs" / name):
        raise RunsError(f"{links[0]} is a symbolic link: stop the run that it points to by its own name and home")
    pids = stop_run(given.home / "runs" / name)
    if pids is None:
        return {"name": name, "pids": None}, [f"{name} is not running"]
    how = f"continue it with the same settings and run_name={name} resume=true"
    return {"name": name, "pids": pids}, [f"stopped {name} (pids {', '.join(map(str, pids))})", how]


COMMANDS = {"list": list_runs, "show": show, "stop": stop, "remove": remove}


@errors_in_one_line(OSError, RuntimeError, ValueError)
def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        add = commands.add_parser(name).add_argument
        add("--home", type=Path, default=default_home(), help="default: %(default)s")
        add("--json", action="store_true", help="print JSON")
    for name in ("show", "stop"):
        commands.choices[name].add_argument("name", metavar="NAME")
    commands.choices["remove"].add_argument("names", nargs="+", metavar="NAME")
    commands.choices["remove"].add_argument("--yes", action="store_true", help="do not ask")
    given = parser.parse_args(arguments)
    given.home = given.home.absolute()
    found, lines = COMMANDS[given.command](given)
    print(json.dumps(finite(found), indent=1) if given.json else "\n".join(lines))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
