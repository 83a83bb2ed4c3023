"""Killed savers lose nothing that they have acknowledged, and several of them get along on one file."""

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flapp.checkpoint import store
from flapp.checkpoint.manager import ChunkManager
from tests.support.checkpoint_rounds import digests_of, expected, is_sound, model_of
from tests.support.saving_child import Nursery, nursery

ENGINES = ["stdlib", "fast"]
KEEP = 3


@pytest.fixture(scope="module")
def children() -> Iterator[Nursery]:
    """Return what starts saving processes."""
    with nursery() as started:
        yield started


def kill_at_a_random_moment(children: Nursery, rng: random.Random) -> int | None:
    """Kill the saving process after some rounds, in the middle of another; return the last one it acknowledged."""
    word, pid = children.hear()
    assert word == "child"
    wait = rng.randrange(0, 4)
    heard, begin = [], time.monotonic()
    for _ in range(wait):
        heard.append(children.hear())
    duration = (time.monotonic() - begin) / max(wait, 1)
    time.sleep(rng.uniform(0, max(1.5 * duration, 0.02)))
    os.kill(int(pid), signal.SIGKILL)
    heard += children.hear_until_gone()
    assert all(word == "saved" for word, _ in heard), heard
    return int(heard[-1][1]) if heard else None


def kill_often(children: Nursery, path: Path, engine: str, times: int, size: int, seed: int) -> int:
    """Save and be killed again and again; return how often the kill met a save that was not acknowledged yet."""
    rng = random.Random(seed)
    last, unfinished = -1, 0
    for _ in range(times):
        order = {"path": str(path), "engine": engine, "rounds": list(range(last + 1, last + 100)), "keep": KEEP}
        children.start(order | {"size": size})
        acknowledged = kill_at_a_random_moment(children, rng)
        last = last if acknowledged is None else acknowledged
        journal = path.with_name(path.name + "-journal")
        unfinished += journal.exists() and journal.stat().st_size > 0
        with ChunkManager(path, engine=engine) as manager:
            found = digests_of(manager)
        allowed = [expected(range(max(0, top - KEEP + 1), top + 1), size) for top in (last, last + 1)]
        assert found in allowed, f"after the kill that followed round {last}"
        assert is_sound(path)
        last = max(found, default=-1)
    return unfinished


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_save_keeps_every_acknowledged_round(tmp_path: Path, children: Nursery, engine: str) -> None:
    kill_often(children, tmp_path / "store.db", engine, 6, 9000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("size", "times"), [(9000, 100), (400_000, 40)])
def test_a_hundred_killed_saves_keep_every_acknowledged_round(
    tmp_path: Path, children: Nursery, engine: str, size: int, times: int
) -> None:
    unfinished = kill_often(children, tmp_path / "store.db", engine, times, size, seed=size)
    assert unfinished > times // 10, "the kills must meet saves that have begun"


def test_four_processes_of_both_engines_save_into_one_file_while_it_is_read(tmp_path: Path, children: Nursery) -> None:
    path, rounds = tmp_path / "store.db", 8
    orders = [
        {
            "path": str(path),
            "engine": ENGINES[i % 2],
            "rounds": list(range(i, 4 * rounds, 4)),
            "keep": None,
            "size": 5000,
        }
        for i in range(4)
    ]
    whole = expected(range(4 * rounds), 5000)
    children.start(*orders)
    with ChunkManager(path, engine="fast") as reader:
        for _ in range(5):
            assert digests_of(reader).items() <= whole.items()
    heard = children.hear_until_gone()
    assert [line for line in heard if line[0] == "error"] == []
    assert sorted(int(number) for word, number in heard if word == "saved") == sorted(whole)
    with ChunkManager(path) as manager:
        assert digests_of(manager) == whole
        assert [row.round for row in manager.rounds()] == sorted(whole)
    assert is_sound(path)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shared", [True, False], ids=["one manager", "a manager each"])
def test_threads_save_into_one_file(tmp_path: Path, engine: str, shared: bool) -> None:
    whole = expected(range(20), 2000)
    with ChunkManager(tmp_path / "store.db", engine=engine) as manager:

        def save(first: int) -> None:
            mine = manager if shared else ChunkManager(tmp_path / "store.db", engine=engine)
            for number in range(first, 20, 4):
                mine.save_model_chunks(model_of(number, 2000), number)
                assert digests_of(mine).items() <= whole.items()
            if not shared:
                mine.close()

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(save, range(4)))
        assert digests_of(manager) == whole
    assert is_sound(tmp_path / "store.db")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("before", [0, 3])
def test_a_save_that_is_interrupted_by_the_keyboard_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, before: int
) -> None:
    def interrupt(parts: object) -> str:
        nonlocal before
        before -= 1
        if before < 0:
            raise KeyboardInterrupt
        return encode_parts(parts)  # type: ignore[arg-type]

    with ChunkManager(tmp_path / "store.db", keep_rounds=1, chunk_bytes=6000, engine=engine) as manager:
        manager.save_model_chunks(model_of(1), 1)
        encode_parts = store.encode_parts
        with monkeypatch.context() as patch:
            patch.setattr(store, "encode_parts", interrupt)
            with pytest.raises(KeyboardInterrupt):
                manager.save_model_chunks(model_of(2), 2)
        assert digests_of(manager) == expected([1])
        manager.save_model_chunks(model_of(2), 2)
        assert digests_of(manager) == expected([2])
    assert is_sound(tmp_path / "store.db")
