"""A client app for tests of the inline grid: each message says what the app should do."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from flapp import client_app
from flapp.groups import GROUP
from flapp.messages import INSTRUCTIONS

SHORT = 0.05  # seconds
FIT = client_app.fit


def app(message: Message, context: Context) -> Message:
    """Answer with this process's id and a copy of the arrays, after doing what the message says."""
    if "say" not in message.content.config_records:
        return federated(message, context)
    action = message.content.config_records["say"]["action"]
    if action == "print":
        os.write(1, b"printed by a client\n")
        sys.stderr.write("and on stderr\n")
    if action == "raise":
        raise OSError("no disk")
    if action == "exit":
        os._exit(3)
    if action == "break":
        breakpoint()
    if action == "change":
        message.content["arrays"].clear()
    if action == "hang":
        time.sleep(600)
    if action == "work":
        time.sleep(SHORT)
    arrays = message.content.array_records.get("arrays", ArrayRecord())
    content = {"process": MetricRecord({"pid": os.getpid()}), "arrays": ArrayRecord(arrays.to_torch_state_dict())}
    return Message(RecordDict(content), reply_to=message)


def federated(message: Message, context: Context) -> Message:
    """Handle a message of flapp, but die once: in round 2, just before the last client of a group trains."""
    marker = Path(json.loads(str(context.run_config["config-json"]))["home"]) / "died"
    if message.metadata.message_type == "train" and message.metadata.group_id == "2":
        records = message.content.config_records
        last = records[GROUP]["client-id"][-1] if GROUP in records else records[INSTRUCTIONS]["client-id"]  # type: ignore[index]

        def fit_or_die(model: Any, task: Any, *rest: Any) -> Any:
            if task.client_id == last:
                with suppress(FileExistsError):
                    marker.touch(exist_ok=False)
                    os.kill(os.getpid(), 9)
            return FIT(model, task, *rest)

        client_app.fit = fit_or_die
    return client_app.app(message, context)


def say(node_id: int, action: str, arrays: ArrayRecord | None = None) -> Message:
    """Return a message that tells the app what to do."""
    content = RecordDict({"say": ConfigRecord({"action": action})})
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, dst_node_id=node_id, message_type="train")
