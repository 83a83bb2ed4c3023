"""Models in memory shared by processes of one machine: a model is written once, however many processes read it.

The memory has no name; it is passed on as a file descriptor. The system frees it when the last process that maps it
has closed it or has ended, even by kill -9. So nothing is left behind in /dev/shm, and it does not matter how
large /dev/shm is.
"""

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

from flapp.messages import parts_of, size_of, view

LEAST_BYTES = 1 << 16  # of an ArrayRecord; smaller ones are cheaper to send through the pipe
ALIGNMENT = 64  # of each array

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
    """ArrayRecords in shared memory: its descriptor and size, and for each record where its arrays lie."""

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
    return Block(fd, offset, places)


def open_records(fd: int, size: int, places: list[list[Place]]) -> list[ArrayRecord]:
    """Map a block's memory, close its descriptor, and return its records.

    The memory stays mapped as long as the records exist.
    """
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
    return {name: record for name, record in arrays.items() if size_of(record) >= LEAST_BYTES}


def send(connection: Connection, message: Message, shared: Sequence[tuple[list[str], Block]], extra: Any) -> None:
    """Send a message and `extra`. shared: names of the message's records, with the block that carries them."""
    names = {name for listed, _ in shared for name in listed}
    if names:
        rest = {name: record for name, record in message.content.items() if name not in names}
        message = Message(RecordDict(rest), metadata=message.metadata)  # type: ignore[call-overload]
    connection.send((message, extra, [(listed, block.size, block.places) for listed, block in shared]))
    for _, block in shared:
        send_handle(connection, block.fd, None)


def receive(connection: Connection) -> tuple[Message, Any]:
    """Receive what `send` sends; raises EOFError or OSError when the sender has ended."""
    message, extra, shared = connection.recv()
    for names, size, places in shared:
        records = open_records(recv_handle(connection), size, places)
        message.content.update(zip(names, records, strict=True))
    return message, extra


def _new_memory() -> int:
    """Return the descriptor of new memory without a name, or of a file without a name on a system without memfd."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("flapp", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
