"""Killed savers lose no round that they have acknowledged, and several savers can share a file."""

import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from flapp.checkpoint import store
from flapp.checkpoint.manager import ChunkManager
from tests.support.checkpoint_rounds import digests_of, expected, is_sound, save_rounds

KEEP = 3
FORK = get_context("fork")  # such processes start at once, because torch is imported already


def start_saving(
    path: Path, rounds: Iterable[int], size: int, keep: int | None = None
) -> tuple[BaseProcess, Connection]:
    """Start a process that saves rounds, and says the number of each for which save_model_chunks has returned."""
    heard, said = FORK.Pipe(duplex=False)

    def save() -> None:
        torch.set_num_threads(1)  # OpenMP's threads are not copied
        store.WRITEBACK_BYTES = 10_000
        with ChunkManager(path, keep_rounds=keep, chunk_bytes=6000) as manager:
            for number in rounds:
                save_rounds(manager, number, size=size)
                said.send(number)

    process = FORK.Process(target=save)
    process.start()
    said.close()
    return process, heard


def hear_to_the_end(heard: Connection) -> list[int]:
    """Return what a process says before it ends."""
    numbers = []
    with suppress(EOFError):
        while True:
            numbers.append(heard.recv())
    return numbers


def kill_at_a_random_moment(process: BaseProcess, heard: Connection, rng: random.Random) -> int | None:
    """Kill the saving process after some rounds, in the middle of another; return the last one it acknowledged."""
    begin, wait = time.monotonic(), rng.randrange(0, 4)
    numbers = [heard.recv() for _ in range(wait)]
    duration = (time.monotonic() - begin) / max(wait, 1)
    time.sleep(rng.uniform(0, max(1.5 * duration, 0.02)))
    process.kill()
    process.join()
    numbers += hear_to_the_end(heard)
    return numbers[-1] if numbers else None


@pytest.mark.slow
@pytest.mark.parametrize(("size", "times"), [(9000, 12), (200_000, 4)])
def test_killed_saves_keep_every_acknowledged_round(path: Path, size: int, times: int) -> None:
    """Kill so many times, or more if none of the kills has met a save that has begun."""
    rng, last, unfinished = random.Random(size), -1, 0
    journal = path.with_name(path.name + "-journal")
    for kill in range(60):
        if kill >= times and unfinished:
            break
        saving = start_saving(path, range(last + 1, last + 100), size, KEEP)
        acknowledged = kill_at_a_random_moment(*saving, rng)
        last = last if acknowledged is None else acknowledged
        unfinished += journal.exists() and journal.stat().st_size > 0
        with ChunkManager(path) as manager:
            found = digests_of(manager)
        allowed = [expected(range(max(0, top - KEEP + 1), top + 1), size) for top in (last, last + 1)]
        assert found in allowed, f"after the kill that followed round {last}"
        assert is_sound(path)
        last = max(found, default=-1)
    assert unfinished > 0, "the kills must meet saves that have begun"


def test_four_processes_save_into_one_file_while_it_is_read(path: Path) -> None:
    whole = expected(range(32), 5000)
    started = [start_saving(path, range(first, 32, 4), 5000) for first in range(4)]
    with ChunkManager(path) as reader:
        for _ in range(5):
            assert digests_of(reader).items() <= whole.items()
    assert sorted(number for _, heard in started for number in hear_to_the_end(heard)) == sorted(whole)
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
