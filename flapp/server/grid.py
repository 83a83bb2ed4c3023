"""A Grid that polls with a back-off of its own and tells as replies come in."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 0.02, 1.0, 1.1  # seconds; Flower's own grid polls a SuperLink every 3


class PolledGrid(Grid):
    """Pass everything on to Flower's grid, but poll for replies quickly at first and ever more slowly.

    A grid that has a method `wait(seconds)` is not polled: it returns when a reply is there. One that has
    `forget(message_ids)` is told which replies are no longer wanted.

    on_reply is called with (new replies, replies so far, messages sent) whenever replies have come in, on_sent when all
    messages have been handed over. any_node: whether any node can serve any client.
    """

    def __init__(self, grid: Grid, any_node: bool = False) -> None:
        self.grid = grid
        self.any_node = any_node
        self.on_reply: Callable[[list[Message], int, int], None] = lambda new, done, sent: None
        self.on_sent: Callable[[], None] = lambda: None

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send all messages and return the replies that come within `timeout` seconds (None: wait for all)."""
        sent = list(messages)
        if not sent:
            return []
        waiting = {message_id for message_id in self.grid.push_messages(sent) if message_id}
        self.on_sent()
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        replies: list[Message] = []
        pause = FIRST_PAUSE
        while waiting:
            new = list(self.grid.pull_messages(waiting))
            replies += new
            waiting -= {reply.metadata.reply_to_message_id for reply in new}
            if new:
                self.on_reply(new, len(replies), len(sent))
            if not waiting:
                break
            if time.monotonic() >= end:
                getattr(self.grid, "forget", _ignore)(waiting)
                break
            left = max(0.0, end - time.monotonic())
            if (wait := getattr(self.grid, "wait", None)) is not None:
                wait(min(LONGEST_PAUSE, left))
                continue
            pause = FIRST_PAUSE if new else min(LONGEST_PAUSE, pause * GROWTH)
            time.sleep(min(pause, left))
        return replies

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)


def _ignore(message_ids: Iterable[str]) -> None:
    """Stand in for a grid that cannot give up on messages."""
