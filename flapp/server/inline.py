"""A Grid inside one machine: the ClientApp handles each message in a worker process, or in this very process.

Nothing listens on the network. Any worker handles any message, because the node's context travels with it. A worker
that dies loses only the message that it was handling: the answer to that is an Error, and a new worker takes its place.
Models travel through shared memory (shared_arrays.py).
"""

import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging import WARNING
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.common import log
from flwr.common.constant import ErrorCode
from flwr.common.logger import update_console_handler
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from flapp.messages import settle
from flapp.server.grid import PolledGrid
from flapp.server.shared_arrays import Block, large_records, receive, send, share

CLIENT_APP = "flapp.client_app"
SERVER_NODE = 1  # Flower's id of the server; nodes are numbered from the next on
STARTS = 3  # attempts to hand a message to a worker: one that was idle may have died


@dataclass(eq=False)
class Worker:
    """A worker process, this end of its pipe, and the message it is handling."""

    number: int
    process: BaseProcess
    pipe: connection.Connection
    message: Message | None = None


class InlineGrid(Grid):
    """Hand messages to `workers` processes in the order they were pushed, or with 0 handle them here.

    nodes: the node_config of each node; log_file: for what workers print; devices: the CUDA_VISIBLE_DEVICES of each
    worker, None to leave it alone; on_start: called before the first message is handled; client_app: the module whose
    `app` handles messages. Use it as a context manager: the workers end with it.
    """

    clients_here = True  # they read their data from the run's home
    any_node = True  # every node serves every client

    def __init__(
        self,
        run_config: dict[str, Any],
        nodes: Sequence[Mapping[str, Any]],
        workers: int = 0,
        run_id: int = 1,
        log_file: Path | None = None,
        devices: Sequence[str] | None = None,
        on_start: Callable[[], None] = lambda: None,
        client_app: str = CLIENT_APP,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SERVER_NODE, 1
        self.run_config = run_config
        self.run_id = run_id
        self.nodes = {SERVER_NODE + 1 + i: dict(node) for i, node in enumerate(nodes)}
        self.log_file = log_file
        self.devices = devices
        self.on_start: Callable[[], None] | None = on_start
        self.client_app = client_app
        self.blocks_made = 0
        self._count = workers
        self._workers: list[Worker] = []
        self._queue: deque[Message] = deque()
        self._replies: dict[str, Message] = {}
        self._blocks: dict[int, tuple[ArrayRecord, list[Any], Block]] = {}
        self._ids = itertools.count(1)

    def __enter__(self) -> "InlineGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Number the messages, start work on them and return their ids."""
        pushed = list(messages)
        if self.on_start is not None:
            start, self.on_start = self.on_start, None
            start()
        for message in pushed:
            message.metadata.__dict__["_message_id"] = str(next(self._ids))
        self._queue += pushed
        self._drop_blocks()
        self._hand_out()
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there; without workers, handle the next message first."""
        self._collect(0)
        return [self._replies.pop(each) for each in message_ids if each in self._replies]

    def wait(self, seconds: float) -> None:
        """Wait until another reply is there, at most `seconds`."""
        if self._count:
            self._collect(seconds)

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop messages whose replies are no longer wanted, and end the workers that are handling them."""
        gone = set(message_ids)
        self._queue = deque(message for message in self._queue if message.metadata.message_id not in gone)
        for each in gone:
            self._replies.pop(each, None)
        for worker in list(self._workers):
            if worker.message is not None and worker.message.metadata.message_id in gone:
                self._end(worker)

    def close(self) -> None:
        """End the workers, whatever they are doing, and release the memory."""
        self._queue.clear()
        for worker in list(self._workers):
            self._end(worker)
        self._drop_blocks()

    def handle(self, message: Message) -> Message:
        """Handle a message in this process."""
        app = importlib.import_module(self.client_app).app
        # It gets records of its own; the bytes of arrays, which cannot be changed, are shared.
        records = RecordDict({name: record.copy() for name, record in message.content.items()})
        own = Message(records, metadata=message.metadata)  # type: ignore[call-overload]
        reply = answer(app, own, self._context(message))
        settle(reply)  # before the next message trains the same model
        return reply

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node_id) for node_id in self.get_node_ids()]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return PolledGrid(self).send_and_receive(messages, timeout=timeout)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError("an inline run has no record at a SuperLink")

    @property
    def run(self) -> Any:
        raise NotImplementedError("an inline run has no record at a SuperLink")

    def _context(self, message: Message) -> Context:
        node_id = message.metadata.dst_node_id
        return Context(self.run_id, node_id, self.nodes[node_id], RecordDict(), self.run_config)

    def _collect(self, seconds: float) -> None:
        """Take the answers of workers, waiting for the first one; without workers, handle one message."""
        if not self._count:
            if self._queue:
                message = self._queue.popleft()
                self._replies[message.metadata.message_id] = self.handle(message)
            return
        busy = {worker.pipe: worker for worker in self._workers if worker.message is not None}
        if not busy:
            time.sleep(seconds)  # no worker is busy, so no reply can come
            return
        for pipe in connection.wait(list(busy), seconds):
            self._take_answer(busy[pipe])  # type: ignore[index]
        self._hand_out()

    def _take_answer(self, worker: Worker) -> None:
        message, worker.message = worker.message, None
        assert message is not None
        try:
            reply, _ = receive(worker.pipe)
        except (EOFError, OSError):
            self._end(worker)
            log(WARNING, "worker %d ended with exit code %s", worker.process.pid, worker.process.exitcode)
            reply = Message(Error(ErrorCode.CLIENT_APP_CRASHED, "its worker process ended"), reply_to=message)
        self._replies[message.metadata.message_id] = reply

    def _hand_out(self) -> None:
        """Give waiting messages to idle workers; start workers as they are needed."""
        while self._count and self._queue:
            idle = next((worker for worker in self._workers if worker.message is None), None)
            if idle is None and len(self._workers) == self._count:
                return
            self._give(self._queue.popleft(), idle)

    def _give(self, message: Message, worker: Worker | None) -> None:
        """Send a message to a worker, or to a new one if it has died meanwhile."""
        shared = [([name], self._block_of(record)) for name, record in large_records(message).items()]
        for _ in range(STARTS):
            worker = worker or self._start()
            try:
                send(worker.pipe, message, shared, self._context(message))
            except OSError:
                self._end(worker)
                worker = None
                continue
            worker.message = message
            return
        place = f": see {self.log_file}" if self.log_file else ""
        raise RuntimeError(f"{STARTS} workers died before they could take a message{place}")

    def _block_of(self, record: ArrayRecord) -> Block:
        """Return the record in shared memory; it is written there once for all messages that carry it."""
        held = [array.data for array in record.values()]
        if known := self._blocks.get(id(record)):
            if len(held) == len(known[1]) and all(map(lambda a, b: a is b, held, known[1])):
                return known[2]
            known[2].close()
        block = share([record])
        self.blocks_made += 1
        self._blocks[id(record)] = (record, held, block)  # while the record is held, no other gets its id
        return block

    def _drop_blocks(self) -> None:
        """Release the memory of records that no waiting message carries."""
        wanted = {id(record) for message in self._queue for record in message.content.values()}
        for key in self._blocks.keys() - wanted:
            self._blocks.pop(key)[2].close()

    def _start(self) -> Worker:
        number = min(set(range(self._count)) - {worker.number for worker in self._workers})
        context = start_forkserver(self.client_app)
        here, there = context.Pipe()
        device = self.devices[number] if self.devices else None
        arguments = (there, self.client_app, self.log_file, device)
        process = context.Process(target=serve, args=arguments, name=f"worker-{number}")
        with _plain_start(context.get_start_method()):
            process.start()
        there.close()
        worker = Worker(number, process, here)
        self._workers.append(worker)
        return worker

    def _end(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()


def start_forkserver(*modules: str) -> Any:
    """Start the process that workers are forked from, unless it runs, and return its multiprocessing context.

    It imports `modules` once for all workers, while this process does something else.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None  # Ctrl-C is for this process only
    try:
        forkserver.ensure_running()
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
    return context


def serve(pipe: connection.Connection, client_app: str, log_file: Path | None, device: str | None) -> None:
    """Handle messages until the other end of the pipe is closed: the main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if log_file is not None:
        _print_to(log_file)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    app = importlib.import_module(client_app).app
    update_console_handler(timestamps=True, colored=False)
    with suppress(EOFError, OSError):
        while True:
            message, context = receive(pipe)
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = context.run_id, context.node_id, 1
            reply = answer(app, message, context)
            _send_back(pipe, reply)
            del message, context, reply  # free them before waiting for the next message, which may take long


def answer(app: Callable[[Message, Context], Message], message: Message, context: Context) -> Message:
    """Return the app's reply, or an Error where it raises, as Flower does."""
    try:
        return app(message, context)
    except Exception as error:  # noqa: BLE001 - the boundary of a client, whose mods may fail too
        reason = f"{type(error).__name__}: {error}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _send_back(pipe: connection.Connection, reply: Message) -> None:
    large = large_records(reply)
    shared = [(list(large), share(list(large.values())))] if large else []
    try:
        send(pipe, reply, shared, None)
    finally:
        for _, block in shared:
            block.close()


def _end_with_parent() -> None:
    """End this process, whatever it is doing, when the one that started it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _print_to(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


@contextmanager
def _plain_start(method: str) -> Iterator[None]:
    """Hide this process's main module and default start method from new processes.

    They would import the main module again. In joblib's processes the start method is one that only joblib knows.
    """
    main, default = sys.modules["__main__"], multiprocessing.get_start_method(allow_none=True)
    sys.modules["__main__"] = ModuleType("__main__")
    multiprocessing.set_start_method(method, force=True)
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        multiprocessing.set_start_method(default, force=True)
