"""Make poisoned variants of real files, drawn from a seed, and check how the tools react to them."""

import contextlib
import io
import json
import random
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flapp.data.artifact import write_artifact
from flapp.data.decode import Decoded
from flapp.data.partition import make_partition, save_partition
from flapp.data.shards.build import write_shards
from flapp.data.shards.source import Kind, Source
from flapp.model.adapter_files import export_adapter
from flapp.model.split.factory import ModelFactory
from tests.support.adapters import adapted
from tests.support.cifar_files import write_cifar
from tests.support.html_page import write_sweep
from tests.support.leaf_files import as_leaf, draw_samples, write_leaf
from tests.support.pictures import encode
from tests.support.run_files import write_run
from tests.support.split_models import write_vit_run
from tests.support.tables import as_dataset, write_parquet

DEEP = "[" * 5000 + "]" * 5000
RAW = {  # JSON texts that json.dumps would not write, by placeholder
    "@huge": "1" + "0" * 5000,
    "@big": str(10**30),
    "@deep": DEEP,
    "@nan": "NaN",
    "@infinity": "-1e999",
    "@surrogate": '"\\ud800x"',
    "@control": '"\\u001b[2Jgone\\n\\u0000"',
    "@twice": '{"a": 1, "a": [2]}',
}
NUMBERS: tuple[Any, ...] = (-1, True, 1.5, 0, 2**63)
OTHERS = ("text", "", None, [], {}, [[]], [None], {"": -1}, "../../x", "/etc/passwd", "x" * 100_000)
VALUES = (*NUMBERS, *OTHERS, *RAW)
SHAPES = ("(-1,)", "(True, 2)", "(2.0,)", "(10**9, 10**9)", "(1000000000000,)", "()", "(0,)", "(-3, -4)", "('a',)")
KINDS = ("'V1000000000'", "'S0'", "'O'", "'<M8[s]'", "'>i8'", "[('a', '<i8')]", "'U100000000'", "'|u1'", "1", "'<c16'")
TEXTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut off": lambda content, rng: content[: rng.randrange(max(1, len(content)))],
    "empty": lambda content, rng: b"",
    "a zero byte": lambda content, rng: b"\0",
    "binary": lambda content, rng: rng.randbytes(300),
    "in UTF-16": lambda content, rng: content.decode(errors="replace").encode("utf-16"),
    "nested deeply": lambda content, rng: DEEP.encode(),
    "nested objects": lambda content, rng: b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a number": lambda content, rng: b"7",
    "a list": lambda content, rng: b"[1, 2]",
    "a huge number": lambda content, rng: b"9" * 5000,
    "twice": lambda content, rng: content + content,
    "a bit changed": lambda content, rng: flipped(content, rng),
}


def flipped(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(max(1, len(content)))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to everything in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> str:
    """Return JSON text with another value at `path`."""
    whole = json.loads(json.dumps(value))
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    text = json.dumps(whole)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text


def poisoned_json(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return what was done to a JSON file, and its poisoned content."""
    value = json.loads(content)
    if rng.random() < 0.2:
        name = rng.choice(sorted(TEXTS))
        return name, TEXTS[name](content, rng)
    path, new = rng.choice(list(places(value))), rng.choice(VALUES)
    return f"{path} is {str(new)[:20]!r}", with_value(value, path, new).encode()


def poisoned_lines(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Poison one line of a JSON lines file in the same way."""
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    name, lines[at] = poisoned_json(lines[at], rng)
    return f"line {at}: {name}", b"".join(line.rstrip(b"\n") + b"\n" for line in lines)


def poisoned_safetensors(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Change the header of a safetensors file, or all of it."""
    if rng.random() < 0.2:
        return poisoned_bytes(content, rng)
    size = int.from_bytes(content[:8], "little")
    name, header = poisoned_json(content[8 : 8 + size], rng)
    length = rng.choice([len(header)] * 6 + [2**63, 2**40, 0])
    return f"header of {length}: {name}", struct.pack("<Q", length) + header + content[8 + size :]


def poisoned_npy(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Give a .npy file another header."""
    if rng.random() < 0.2:
        return poisoned_bytes(content, rng)
    shape, kind = rng.choice(SHAPES), rng.choice(KINDS)
    fortran = rng.choice(("False", "True", "1"))
    return f"{kind} {shape}", npy(kind, shape, fortran) + content[-64:]


def npy(kind: str, shape: str, fortran: str = "False") -> bytes:
    header = f"{{'descr': {kind}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def poisoned_bytes(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    name = rng.choice(["cut off", "empty", "a zero byte", "binary", "a bit changed", "twice"])
    return name, TEXTS[name](content, rng)


POISONS = {".json": poisoned_json, ".jsonl": poisoned_lines, ".safetensors": poisoned_safetensors, ".npy": poisoned_npy}


def poison(path: Path, rng: random.Random) -> str:
    """Poison a file in place and say how."""
    act = POISONS.get(path.suffix, poisoned_bytes)
    name, content = act(path.read_bytes(), rng)
    path.write_bytes(content)
    return f"{path.name}: {name}"


def ask(main: Callable[[list[str]], int], *arguments: object) -> list[str]:
    """Run a tool, which must succeed or fail in one line for each error; return what it printed."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()  # as strict as a terminal is
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*map(str, arguments)])
        out.flush()
    printed, said = out.buffer.getvalue().decode(), err.getvalue()  # type: ignore[attr-defined]
    errors = [line for line in said.split("\n") if line and "%|" not in line]
    failed = any(line.strip().startswith("FAILED") for line in printed.split("\n"))
    assert status in (0, 1)
    assert all(line.startswith("error: ") for line in errors), errors
    assert bool(errors or failed) == bool(status), (status, errors, printed)
    lines = (printed + said).replace("\r", "").split("\n")
    assert all(char.isprintable() for line in lines for char in line), ascii(lines)
    assert all(len(line) < 5000 for line in lines)
    return lines


def refuses(error: type[Exception], function: Callable[..., object], *arguments: Any) -> str:
    """Call a function, which must return, or raise an error of one line; return that line."""
    try:
        function(*arguments)
    except error as caught:
        text = str(caught)
        assert text.splitlines()[1:] == []
        assert len(text) < 5000
        return text
    return ""


def peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_real_files(folder: Path) -> None:
    """Write one real file or folder of every kind that is fuzzed."""
    run = write_run(folder / "run" / "runs" / "r", 2, 3, 4)
    seen = {"round": 1, "rounds": 2, "phase": "train", "replies": 1, "asked": 3}
    (run / "progress.json").write_text(json.dumps(seen))
    write_sweep(folder / "sweep", 1)
    rng, labels = np.random.default_rng(0), np.arange(40, dtype=np.int64) % 4
    for i, split in enumerate(("train", "test")):
        images = rng.integers(1, 255, (40, 8, 8, 1)).astype(np.uint8)
        write_artifact(folder / "set" / split, images, np.roll(labels, i), list("abcd"), "a" * 64)
    save_partition(folder / "set" / "part.safetensors", make_partition("iid", labels, labels, 3, 0))
    leaf = write_leaf(folder / "leaf", as_leaf(draw_samples(6, 5, 7)))
    write_shards(leaf, folder / "shards", "round_robin", clients=2, seed=1)
    pixels, of = rng.integers(1, 255, (40, 6, 7, 3)).astype(np.uint8), [f"w{label}" for label in labels]
    own = Source(Kind("own", (6, 7, 3), tuple("abcd"), "half"), {"train": Decoded(pixels, labels, of)})
    write_shards(own, folder / "own_shards", "round_robin", clients=2, seed=1)
    write_parquet(folder / "tables" / "train.parquet", image=[encode(image) for image in pixels], label=labels)
    as_dataset(pixels, labels % 3).save_to_disk(folder / "saved")
    write_cifar(folder / "cifar", images=4)
    export_adapter(adapted(), folder / "adapter" / "a", "base")
    mine = write_vit_run(folder / "whole" / "mine", size=8)
    ModelFactory.create_split_models("vit", mine / "model.safetensors", 1, 2, "cpu", folder / "split", True)
    up = {"token": "ab" * 16, "address": "127.0.0.1:9", "tls": False, "clients": ["0", "1"], "shards": None}
    (folder / "up").mkdir()
    (folder / "up" / "federation.json").write_text(json.dumps(up | {"homes": False, "threads": 1}))
    programs = {"superlink": {"pid": None, "restarts": 0}}
    (folder / "up" / "supervisor.json").write_text(json.dumps({"pid": 2**22 + 1, "ready": True, "programs": programs}))
