"""Killed savers lose no round that they have acknowledged, and several savers can share a file."""

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flapp.checkpoint.manager import ChunkManager
from tests.support.checkpoint_rounds import digests_of, expected, is_sound, save_rounds
from tests.support.saving_child import Nursery, nursery

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
    begin, wait = time.monotonic(), rng.randrange(0, 4)
    heard = [children.hear() for _ in range(wait)]
    duration = (time.monotonic() - begin) / max(wait, 1)
    time.sleep(rng.uniform(0, max(1.5 * duration, 0.02)))
    os.kill(int(pid), signal.SIGKILL)
    heard += children.hear_until_gone()
    assert all(word == "saved" for word, _ in heard), heard
    return int(heard[-1][1]) if heard else None


@pytest.mark.slow
@pytest.mark.parametrize(("size", "times"), [(9000, 15), (400_000, 5)])
def test_killed_saves_keep_every_acknowledged_round(path: Path, children: Nursery, size: int, times: int) -> None:
    """Kill so many times, or more if none of the kills has met a save that has begun."""
    rng, last, unfinished = random.Random(size), -1, 0
    journal = path.with_name(path.name + "-journal")
    for kill in range(60):
        if kill >= times and unfinished:
            break
        rounds = list(range(last + 1, last + 100))
        children.start({"path": str(path), "rounds": rounds, "keep": KEEP, "size": size})
        acknowledged = kill_at_a_random_moment(children, rng)
        last = last if acknowledged is None else acknowledged
        unfinished += journal.exists() and journal.stat().st_size > 0
        with ChunkManager(path) as manager:
            found = digests_of(manager)
        allowed = [expected(range(max(0, top - KEEP + 1), top + 1), size) for top in (last, last + 1)]
        assert found in allowed, f"after the kill that followed round {last}"
        assert is_sound(path)
        last = max(found, default=-1)
    assert unfinished > 0, "the kills must meet saves that have begun"


def test_four_processes_save_into_one_file_while_it_is_read(path: Path, children: Nursery) -> None:
    whole = expected(range(32), 5000)
    rounds = [list(range(first, 32, 4)) for first in range(4)]
    children.start(*({"path": str(path), "rounds": each, "keep": None, "size": 5000} for each in rounds))
    with ChunkManager(path) as reader:
        for _ in range(5):
            assert digests_of(reader).items() <= whole.items()
    heard = children.hear_until_gone()
    assert [line for line in heard if line[0] == "error"] == []
    assert sorted(int(number) for word, number in heard if word == "saved") == sorted(whole)
    with ChunkManager(path) as manager:
        assert digests_of(manager) == whole
        assert [row.round for row in manager.rounds()] == sorted(whole)
    assert is_sound(path)


@pytest.mark.parametrize("shared", [True, False], ids=["one manager", "a manager each"])
def test_threads_save_into_one_file(path: Path, shared: bool) -> None:
    whole = expected(range(20), 2000)
    with ChunkManager(path) as manager:

        def save(first: int) -> None:
            mine = manager if shared else ChunkManager(path)
            for number in range(first, 20, 4):
                save_rounds(mine, number, size=2000)
                assert digests_of(mine).items() <= whole.items()
            if not shared:
                mine.close()

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(save, range(4)))
        assert digests_of(manager) == whole
    assert is_sound(path)
