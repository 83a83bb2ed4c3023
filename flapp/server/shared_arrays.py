"""Models in memory that processes of one machine share, so that a model is written once however many read it.

The memory has no name: it is passed on as a file descriptor. The system frees it when the last process that maps it has
closed it or has ended, even by kill -9. So nothing is left behind in /dev/shm, and its size does not matter.
"""

import itertools
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from flapp.messages import parts_of, size_of_array, view

LEAST_BYTES = 1 << 16  # of an ArrayRecord; smaller ones are cheaper to send through the pipe
ALIGNMENT = 64  # of each array
_tokens = itertools.count(1)

Place = tuple[str, str, tuple[int, ...], str, int, int]  # key, dtype, shape, stype, offset and length of an array


class SharedArray(Array):
    """An Array whose bytes lie in shared memory: `data` is a read-only memoryview."""

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, data: memoryview) -> None:
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data)  # Array's own takes only bytes

    def numpy(self) -> np.ndarray:
        """Return a writable copy; Array's own would copy twice."""
        return view(self).copy(order="K")

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, bytes(self.data))


@dataclass(frozen=True, eq=False)
class Block:
    """Some ArrayRecords in shared memory: its descriptor and size, and for each record where its arrays lie."""

    token: int
    fd: int
    size: int
    places: list[list[Place]]

    def close(self) -> None:
        """Close the memory. A process that has mapped it keeps it."""
        os.close(self.fd)


def share(records: Sequence[ArrayRecord]) -> Block:
    """Copy records into new shared memory."""
    places: list[list[Place]] = []
    fd, offset = _new_memory(), 0
    with open(fd, "wb", closefd=False) as file:
        for record in records:
            places.append([])
            for key, array in record.items():
                file.write(bytes(-offset % ALIGNMENT))
                offset += -offset % ALIGNMENT
                size = sum(map(file.write, parts_of(array)))
                places[-1].append((key, array.dtype, tuple(array.shape), array.stype, offset, size))
                offset += size
    return Block(next(_tokens), fd, offset, places)


def open_records(fd: int, size: int, places: list[list[Place]]) -> list[ArrayRecord]:
    """Map the memory of a block, whose descriptor is closed, and return its records; they keep it mapped."""
    memory = memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
    os.close(fd)
    return [_record_over(memory, listed) for listed in places]


def _record_over(memory: memoryview, places: list[Place]) -> ArrayRecord:
    record = ArrayRecord()
    for key, dtype, shape, stype, offset, length in places:
        record[key] = SharedArray(dtype, shape, stype, memory[offset : offset + length])
    return record


def large_records(message: Message) -> dict[str, ArrayRecord]:
    """Return the records of a message that are worth sharing, by their names."""
    if not message.has_content():
        return {}
    arrays = {name: record for name, record in message.content.items() if isinstance(record, ArrayRecord)}
    return {name: record for name, record in arrays.items() if _bytes_of(record) >= LEAST_BYTES}


def send(
    connection: Connection, message: Message, shared: Sequence[tuple[list[str], Block]], known: set[int], extra: Any
) -> None:
    """Send a message with `extra`; its records of the given names travel in the blocks beside them.

    known: the tokens of the blocks that the receiver has mapped since the last message; those of this one afterwards.
    """
    names = {name for listed, _ in shared for name in listed}
    if names:
        rest = {name: record for name, record in message.content.items() if name not in names}
        message = Message(RecordDict(rest), metadata=message.metadata)  # type: ignore[call-overload]
    new = [block for _, block in shared if block.token not in known]
    used = [(listed, block.token) for listed, block in shared]
    connection.send((message, extra, used, [(block.token, block.size, block.places) for block in new]))
    for block in new:
        send_handle(connection, block.fd, None)
    known.clear()
    known.update(block.token for _, block in shared)


def receive(connection: Connection, mapped: dict[int, list[ArrayRecord]]) -> tuple[Message, Any]:
    """Receive what `send` sends; `mapped` holds the records of the last message's blocks, then of this one's.

    Raises EOFError or OSError when the sender has ended.
    """
    message, extra, used, new = connection.recv()
    for token, size, places in new:
        mapped[token] = open_records(recv_handle(connection), size, places)
    for gone in mapped.keys() - {token for _, token in used}:
        del mapped[gone]
    for names, token in used:
        for name, record in zip(names, mapped[token], strict=True):
            message.content[name] = record.copy()  # a change to it stays in one message
    return message, extra


def _bytes_of(record: ArrayRecord) -> int:
    return sum(map(size_of_array, record.values()))


def _new_memory() -> int:
    """Return the descriptor of empty memory without a name; where the system has none, of a file without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("flapp", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
