"""A Grid that polls with increasing pauses and reports replies as they arrive."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 0.02, 1.0, 1.1  # seconds; Flower's own grid polls a SuperLink every 3


def is_simulated(grid: Grid) -> bool:
    """Return whether Flower simulates the clients; if so, it starts Ray from this process."""
    return type(grid).__name__ == "InMemoryGrid"


class PolledGrid:
    """Pass everything on to Flower's grid, but poll for replies quickly at first and then ever more slowly.

    A grid with a method `wait(seconds)` is not polled, because `wait` returns when a reply arrives. A grid with a
    method `forget(message_ids)` is told which replies are no longer wanted.

    on_reply is called when replies have come in, with the list of new replies, the number of replies so far and the
    number of messages sent. on_sent is called when all messages have been handed over. any_node says whether any node
    can serve any client.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.any_node: bool = getattr(grid, "any_node", is_simulated(grid))
        self.on_reply: Callable[[list[Message], int, int], None] = lambda new, done, sent: None
        self.on_sent: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send all messages and return the replies that come within `timeout` seconds (None: wait for all)."""
        sent = list(messages)
        if not sent:
            return []
        waiting = {message_id for message_id in self.grid.push_messages(sent) if message_id}
        self.on_sent()
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        wait, forget = getattr(self.grid, "wait", None), getattr(self.grid, "forget", None)
        replies: list[Message] = []
        pause = FIRST_PAUSE
        while waiting:
            new = list(self.grid.pull_messages(waiting))
            replies += new
            waiting -= {reply.metadata.reply_to_message_id for reply in new}
            if new:
                self.on_reply(new, len(replies), len(sent))
            left = end - time.monotonic()
            if not waiting or left <= 0:
                break
            pause = FIRST_PAUSE if new else min(LONGEST_PAUSE, pause * GROWTH)
            (wait or time.sleep)(min(LONGEST_PAUSE if wait else pause, left))
        if waiting and forget:
            forget(waiting)
        return replies
