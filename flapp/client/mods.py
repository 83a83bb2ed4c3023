"""Client mods: what wraps every message that a client handles."""

import traceback
from collections.abc import Callable, Mapping
from logging import DEBUG, ERROR, INFO, WARNING
from typing import TypeVar

import numpy as np
from flwr.app import Array, Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import log
from flwr.common.constant import ErrorCode

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.tensors import digest_of
from flapp.checks import RAISE_LIMIT, TOO_LONG, check_update, find_answer_fault, find_metric_fault
from flapp.client.store import ClientStore, private_key
from flapp.client.task import TASK, Task, message_for_one, read_task
from flapp.custom import place_of, resolve
from flapp.groups import GROUP, UPDATE_NORM, Asked, Group, cut_rank, pack_answers, unpack_group
from flapp.messages import (
    ARRAYS,
    EVALUATE,
    METRICS,
    REPLAYED,
    TRAIN,
    WITHIN_CLIP,
    Answer,
    Claim,
    HeldArray,
    MessageError,
    as_record,
    describe_error,
    one_line,
    pack,
    settle,
    unpack_arrays,
    unpack_reply,
    views,
)
from flapp.privacy import check_floating, find_sigma, perturb
from flapp.sums import WeightedSum, clip, clip_update

T = TypeVar("T")


def group_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Handle a group's message: call the app once for each client of the group, and send one reply for all of them.

    If a client fails, the reply says which one and why, and the other clients are still used. Everything inside this
    mod is an app for a single client.
    """
    if not message.has_content() or GROUP not in message.content:
        return call_next(message, context)
    task, group, arrays = read_task(message, context), unpack_group(message), unpack_arrays(message.content)
    fix = TOO_LONG if task.instructions.clipping_norm else RAISE_LIMIT
    total, answers = WeightedSum(), []
    for asked in group.asked:
        received = cut_rank(arrays, asked.rank) if asked.rank else arrays
        try:
            reply = call_next(message_for_one(message, asked, received), context)
            expected = {key: received[key] for key in task.instructions.returns or received}
            answer = examine(reply, message.metadata.message_type, group, asked, expected, fix)
            if group.is_summed and answer.arrays is not None:
                norm = answer.metrics[UPDATE_NORM]
                is_long = norm > group.clip
                counted = clip_update(answer.arrays, expected, group.clip / norm) if is_long else answer.arrays
                total.add([(counted, asked.weight)])
                answer.arrays = None
            else:
                settle(reply)
        except MessageError as error:
            answer = Answer(asked.client_id, failure=one_line(str(error)))
        # The tensors are in the client's store; another node may handle its next message.
        context.state.pop(private_key(asked.client_id), None)
        answers.append(answer)
    return pack_answers(message, answers, total.arrays or None)


def examine(reply: Message, kind: str, group: Group, asked: Asked, expected: Mapping[str, Array], fix: str) -> Answer:
    """Return a client's answer; raises MessageError for a reply that the server would reject, with the same reason.

    fix: the end of the reason for an update that is too long; it says what to do about it.

    Numbers and tensors are examined here only for a sum. Otherwise the server, which receives them, does it.
    """
    if reply.has_error():
        raise MessageError(f"failed: {describe_error(reply.error)}")
    answer = unpack_reply(reply.content, kind)
    if fault := find_answer_fault(answer, asked.client_id, asked.shard_digest):
        raise MessageError(fault)
    if group.is_summed and answer.arrays is not None:
        if fault := find_metric_fault(kind, Claim(asked.client_id, asked.examples), answer.metrics, validates=False):
            raise MessageError(fault)
        answer.metrics[UPDATE_NORM] = check_update(answer.arrays, expected, group.norm_limit, fix=fix)
    return answer


def name_errors_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """When handling a message raises, answer with the fault in one line, and log its traceback here.

    Flower itself would send an error of many lines, in a simulation with its traceback.
    """
    try:
        return call_next(message, context)
    except Exception as error:  # noqa: BLE001 - the boundary of a client or node: no message may end its process
        task: Task | None = message.__dict__.get(TASK)
        whole = "".join(traceback.format_exception(error))
        if task is None:  # the message could not be read
            log(ERROR, whole)
        else:
            # The errors' texts are left out, because they may contain values from the client's data.
            places = "".join(traceback.format_tb(error.__traceback__)).rstrip()
            task.log(ERROR, "%s", whole, instead=f"a client failed:\n{places}\n{type(error).__name__}")
        return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=describe(error)), reply_to=message)


def checkpoint_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Save what a client trains, before the reply leaves; the reply stays as it is.

    First, the private state is restored from the round that the server names. A client that is asked again for a round
    which it has trained from the same model, data and settings answers from its store. With privacy=local it says so,
    because sending the same bytes again releases nothing. If the store cannot be used, a warning is logged. With
    checkpoint.on_error=fail, or with private tensors, the client fails instead.
    """
    kind = message.metadata.message_type
    if kind not in (TRAIN, EVALUATE):
        return call_next(message, context)
    task = read_task(message, context)
    config = task.config
    if not config.checkpoint.enabled:
        return call_next(message, context)
    store = ClientStore(task, context)
    tolerate(store, store.restore_private)
    if kind == EVALUATE:
        return call_next(message, context)
    received = digest_of(views(unpack_arrays(message.content)))
    if config.checkpoint.replay and (kept := tolerate(store, lambda: store.find_trained(message, received))):
        task.log(INFO, "client %s answers round %d from its store", task.client_id, task.instructions.server_round)
        if config.privacy.kind == "local":
            kept.content.metric_records[METRICS][REPLAYED] = 1
        return kept
    reply = call_next(message, context)
    if not reply.has_error() and (saved := tolerate(store, lambda: store.save(reply, received))):
        task.log(DEBUG, "client %s: %s in %s", task.client_id, saved, store.path)
    return reply


def privacy_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clip a client's update if the config says so; with privacy=local, also add noise to it.

    This mod is inside checkpoint_mod. So a client's store holds only what leaves the client. If the client is asked
    again, it sends exactly the same bytes. Flower's LocalDpMod is not used. Its sigma is right only for an epsilon
    below 1. It fails for an update of zero. It does not change tensors without dimensions, and does not clip an update
    with a NaN.
    """
    if message.metadata.message_type != TRAIN or (task := read_task(message, context)).config.privacy.kind == "none":
        return call_next(message, context)
    privacy = task.config.privacy
    sigma = find_sigma(privacy) if privacy.kind == "local" else 0.0  # fails without its package, before training
    sent = views(unpack_arrays(message.content))
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    trained = views(unpack_arrays(reply.content))
    if privacy.kind == "central":
        clip_reply(reply, sent, trained, task)
        return reply
    released = perturb(sent, trained, privacy.clipping_norm, sigma)
    reply.content[ARRAYS] = as_record({key: pack(values) for key, values in released.items()})
    return reply


def clip_reply(reply: Message, sent: Mapping[str, np.ndarray], trained: Mapping[str, np.ndarray], task: Task) -> None:
    """Clip the update in a reply to the length that the server names; with adaptive clipping, say whether it was short.

    Raises MessageError when the server names no length, and what `clip` raises.
    """
    norm = task.instructions.clipping_norm
    if not norm > 0:
        raise MessageError("privacy=central clips updates, but the message names no clipping norm")
    check_floating(trained)
    clipped = clip(sent, trained, norm)
    if task.config.privacy.clipping == "adaptive":
        reply.content.metric_records[METRICS][WITHIN_CLIP] = int(clipped is None)
    if clipped is not None:
        reply.content[ARRAYS] = as_record({key: HeldArray(values) for key, values in clipped.items()})


def own_mods_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Call the user's own mods, train.mods; they are inside privacy_mod, so noise is added to what they return."""
    if message.metadata.message_type in (TRAIN, EVALUATE):
        for target in reversed(read_task(message, context).config.train.mods or ()):
            call_next = _wrapped(resolve("train.mods", target), call_next)
    return call_next(message, context)


def _wrapped(mod: Callable[..., Message], call_next: ClientAppCallable) -> ClientAppCallable:
    return lambda message, context: mod(message, context, call_next)


def tolerate(store: ClientStore, action: Callable[[], T]) -> T | None:
    """Return the result of an action on a store. Its failure is logged and gives None, or is raised, as on_error says.

    It is always raised if the client has private tensors, because the server relies on the client to save them.
    """
    try:
        return action()
    except CheckpointError as error:
        task = store.task
        if task.config.checkpoint.on_error == "fail" or task.instructions.private:
            raise
        text = "client %s continues without its store: %s"
        task.log(WARNING, text, task.client_id, error, instead="a client continues without its store")
        return None


def describe(error: Exception) -> str:
    """Return an error in one line: its type, unless it is written for users; its text; the user's line that raised."""
    text = " ".join(str(error).split())
    plain = isinstance(error, ValueError | FloatingPointError) and text
    return (text if plain else f"{type(error).__name__}: {text}") + place_of(error)
