"""What one message asks of one client, read once: the mods and the handlers pass it along with the message."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common import log

from flapp.client.data import ClientData, check_lives_here, open_client_data
from flapp.config.load import load
from flapp.config.schema import Config, NodeConfig
from flapp.custom import enable
from flapp.files import Stamp
from flapp.groups import Asked
from flapp.listing import WITHHELD
from flapp.messages import ARRAYS, INSTRUCTIONS, Instructions, MessageError, unpack_instructions
from flapp.partitions import stamp_of_shared_files

TASK = "task"  # attribute of a message that has been read


@dataclass(frozen=True, eq=False)
class Task:
    """The instructions in a message, the run's settings and this node's own; the client's data open on first use.

    shared_files looks up the files that all clients share, once for all clients of a message: for many clients, doing
    so each time may take longer than training.
    """

    instructions: Instructions
    config: Config
    node_config: NodeConfig
    shared_files: Callable[[], Stamp]

    @classmethod
    def of(cls, instructions: Instructions, config: Config, node_config: NodeConfig) -> "Task":
        """Return the task of a message that has just come."""
        return cls(instructions, config, node_config, cache(partial(stamp_of_shared_files, config)))

    def for_client(self, client_id: str, **own: Any) -> "Task":
        """Return the task of one of the message's clients; own: other fields of its instructions."""
        return replace(self, instructions=replace(self.instructions, client_id=client_id, **own))

    @property
    def client_id(self) -> str:
        """Return the client that the message is for."""
        return self.instructions.client_id

    @cached_property
    def data(self) -> ClientData:
        """Open the client's data; raises ConfigError for an unknown client and DataError for unusable data."""
        with silenced() if self.withholds else nullcontext():
            return open_client_data(self.config, self.node_config, self.client_id, self.shared_files)

    @property
    def withholds(self) -> bool:
        """Say whether nothing of a single client may be logged: simulated clients log where the server does."""
        return self.config.privacy.publish == "totals" and self.node_config.num_partitions > 0

    def log(self, level: int, text: str, *values: object, instead: str = "") -> None:
        """Log a line about the client; where that is withheld, log `instead`, if there is one."""
        if not self.withholds:
            log(level, text, *values)
        elif instead:
            log(level, "%s (%s)", instead, WITHHELD.format("the rest"))


@contextmanager
def silenced() -> Iterator[None]:
    """Log nothing while data are opened: the lines would name clients and their samples."""
    logger = logging.getLogger("flapp.data")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def read_task(message: Message, context: Context) -> Task:
    """Return a message's task. The first call reads it; later calls return the same.

    Raises MessageError for a server with other source code, flapp's or the user's own. Raises ConfigError for settings
    that this node cannot use and for a message that reached the node of another client.
    """
    task: Task | None = message.__dict__.get(TASK)
    if task is None:
        instructions = unpack_instructions(message)  # first: other source code may not know the settings
        config, node_config = load(context.run_config, context.node_config)
        check_lives_here(instructions.client_id, config, node_config)
        task = Task.of(instructions, config, node_config)
        check_code(task)
        message.__dict__[TASK] = task
    return task


def check_code(task: Task) -> None:
    """Make the user's own code importable; raises MessageError if the server's differs, and what `enable` raises."""
    here, there = enable(task.config, task.node_config), task.instructions.code
    if here != there:
        modules = ", ".join(sorted({target.partition(":")[0] for _, target in task.config.targets}))
        raise MessageError(
            f"the code of {modules} here has the digest {here[:12]}, the server's has {there[:12]}: install the same "
            "files on both, or start again if they were edited since the run began"
        )


def message_for_one(message: Message, asked: Asked, arrays: ArrayRecord) -> Message:
    """Return the message that a client would get if it were asked alone, with its task attached."""
    task: Task = message.__dict__[TASK]
    record = cast(ConfigRecord, message.content[INSTRUCTIONS]).copy()
    record["client-id"], record["accepted-round"] = asked.client_id, asked.accepted_round
    content = RecordDict({INSTRUCTIONS: record, ARRAYS: arrays})
    single = Message(content=content, metadata=message.metadata)  # type: ignore[call-overload]
    single.__dict__[TASK] = task.for_client(asked.client_id, accepted_round=asked.accepted_round)
    return cast(Message, single)
