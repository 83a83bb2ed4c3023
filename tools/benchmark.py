"""Measure flapp against other software, and print each ratio beside its target and its limit.

    python -m tools.benchmark lora aggregate         some topics
    python -m tools.benchmark all --json OUT         every topic, also as JSON, which tools.report --benchmark shows
    python -m tools.benchmark simulation --short     the short form of a long topic, in under 3 minutes

Ratios of times compare medians of interleaved measurements. Each topic runs in a new process; `deployment`,
`simulation` and the memory row of `data` start further ones. A row is `met` if it reaches its target, `within limit` if
it misses its target but not its limit, and `MISSED` otherwise. It is `not measured` if its topic failed or a package is
missing (pip install -e '.[benchmark]' installs all packages). The JSON is {"machine": {...}, "seconds": total,
"rows": [...]}. Exits 1 only when a row misses its limit or was not measured.
"""

import importlib
import json
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import psutil

from flapp.files import write_text
from tools.bench import HEADS, Row
from tools.cli import new_parser, table
from tools.deployment.processes import available_cpus

# each a module of tools.bench with rows() -> list[Row]
TOPICS = ("data", "checkpoint", "lora", "aggregate", "bytes", "start", "deployment", "simulation")
WITH_SHORT_FORM = ("simulation",)  # their rows() take short
EXTRA = ("datasets", "flwr_datasets")  # packages without which a topic is not measured
CPU_INFO = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, str]:
    """Return the facts that affect ratios (processor, usable cores, memory, GPU, versions) and the date in UTC."""
    import torch

    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores usable": str(available_cpus()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPU": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "flwr")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def rows_of(topic: str, short: bool = False) -> list[Row]:
    """Measure a topic; if it raises, return one row with the error, so that the other topics still run."""
    print(f"{topic} ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        measure = importlib.import_module(f"tools.bench.{topic}").rows
        rows: list[Row] = measure(short=True) if short else measure()
    except Exception as error:  # noqa: BLE001 - the table shows any error
        said = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRA:
            said = f"no {error.name}: pip install -e '.[benchmark]'"
        rows = [Row(f"all of `{topic}`", "-", None, 0, note=said)]
    print(f"{topic}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def in_own_process(topic: str, short: bool = False) -> list[Row]:
    """Measure a topic in a new process, so that memory freed by one topic does not make the next one faster."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(rows_of, topic, short).result()


def main(words: list[str] | None = None) -> int:
    """Run the given topics; returns 1 when a row misses its limit or was not measured."""
    parser = new_parser(__doc__)
    parser.add_argument("topics", nargs="+", choices=[*TOPICS, "all"])
    parser.add_argument("--json", type=Path, metavar="OUT", help="write machine and rows to this file too")
    parser.add_argument("--short", action="store_true", help=f"the short form of {', '.join(WITH_SHORT_FORM)}")
    arguments = parser.parse_args(words)
    if arguments.short and (odd := sorted(set(arguments.topics) - set(WITH_SHORT_FORM))):
        parser.error(f"{odd[0]} has no short form: leave out --short")
    if arguments.json and not (folder := arguments.json.absolute().parent).is_dir():
        parser.error(f"the folder {folder} does not exist: make it first")
    machine, started = describe_machine(), time.monotonic()
    topics = TOPICS if "all" in arguments.topics else arguments.topics
    rows = [row for topic in topics for row in in_own_process(topic, arguments.short)]
    seconds = round(time.monotonic() - started, 1)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{seconds:.0f} s in all\n")
    print("\n".join(table(HEADS, [row.cells() for row in rows], ())))
    if arguments.json:
        as_json = [asdict(row) | {"limit": row.least, "verdict": row.verdict} for row in rows]
        found = {"machine": machine, "seconds": seconds, "rows": as_json}
        write_text(arguments.json, json.dumps(found, indent=1) + "\n")
    return int(not all(row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
