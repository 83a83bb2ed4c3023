"""Client mods: what wraps every message that a client handles."""

import traceback
from collections.abc import Callable
from logging import DEBUG, ERROR, INFO, WARNING
from typing import TypeVar

from flwr.app import ArrayRecord, Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import log
from flwr.common.constant import ErrorCode

from flapp.checkpoint.chunks import CheckpointError
from flapp.checks import find_answer_fault, find_metric_fault, find_norm_fault, measure_update
from flapp.client.data import check_lives_here, files_looked_up_once
from flapp.client.store import ClientStore, digest_received, private_key
from flapp.config.load import load
from flapp.groups import GROUP, UPDATE_NORM, Asked, Group, Outcome, cut_rank, for_one, pack_outcomes, unpack_group
from flapp.messages import (
    ARRAYS,
    EVALUATE,
    METRICS,
    REPLAYED,
    TRAIN,
    Claim,
    Instructions,
    MessageError,
    describe_error,
    one_line,
    pack,
    settle,
    unpack_arrays,
    unpack_instructions,
    unpack_reply,
    views,
)
from flapp.privacy import find_sigma, perturb
from flapp.sums import WeightedSum

T = TypeVar("T")


def group_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Serve the clients of a group one after another, each with a message of its own, and answer for all of them.

    A client that fails is named with its reason, and the others count. This mod is the outermost one: everything inside
    is an app for a single client.
    """
    if not message.has_content() or GROUP not in message.content.config_records:
        return call_next(message, context)
    with files_looked_up_once(context.run_id, message.metadata.group_id, message.metadata.message_type):
        return name_errors_mod(message, context, lambda message, context: serve_group(message, context, call_next))


def serve_group(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Return the answer to a group's message; raises MessageError for one that cannot be read."""
    order, group, arrays = unpack_instructions(message), unpack_group(message), unpack_arrays(message.content)
    total, outcomes = WeightedSum(), []
    for asked in group.asked:
        received = cut_rank(arrays, asked.rank) if asked.rank else arrays
        try:
            reply = call_next(for_one(message, order, asked, received), context)
            outcome = examine(reply, message.metadata.message_type, order, group, asked, received)
            if group.is_summed and outcome.arrays is not None:
                total.add([(outcome.arrays, asked.weight)])
                outcome.arrays = None
            else:
                settle(reply)
        except MessageError as error:
            outcome = Outcome(asked.client_id, failure=one_line(str(error)))
        context.state.pop(private_key(asked.client_id), None)  # its store has it, and another node may be next
        outcomes.append(outcome)
    return pack_outcomes(message, outcomes, total.arrays or None)


def examine(
    reply: Message, kind: str, order: Instructions, group: Group, asked: Asked, received: ArrayRecord
) -> Outcome:
    """Return what came of a client; raises MessageError for a reply that cannot count, with the server's reasons.

    Only tensors for a sum are examined here, others by the server, which gets them.
    """
    if reply.has_error():
        raise MessageError(f"failed: {describe_error(reply.error)}")
    answer, metrics = unpack_reply(reply.content, kind)
    if fault := find_answer_fault(answer, asked.client_id, asked.shard_digest):
        raise MessageError(fault)
    arrays = unpack_arrays(reply.content) if kind == TRAIN else None
    if arrays is not None and group.is_summed:
        if fault := find_metric_fault(kind, Claim(asked.client_id, train=asked.examples), metrics, validates=False):
            raise MessageError(fault)
        norm = measure_update(arrays, {key: received[key] for key in order.returns or received})
        if fault := find_norm_fault(norm, group.norm_limit, None):
            raise MessageError(fault)
        metrics |= {UPDATE_NORM: norm}
    return Outcome(asked.client_id, "", answer.shard_digest, metrics, arrays)


def name_errors_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer with the fault in one line when handling a message raises.

    Flower would answer with a whole traceback; that goes to the client's own log.
    """
    try:
        return call_next(message, context)
    except Exception as error:  # noqa: BLE001 - the boundary of a client: no message may end its process
        log(ERROR, traceback.format_exc())
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return Message(Error(code=code, reason=describe(error)), reply_to=message)


def checkpoint_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Save what a client trains, before the reply leaves; the reply stays as it is.

    Private state is put back first, as of the round that the server names. Asked again for a round that it has
    trained from the same model, data and settings, a client answers from its store; with privacy.enabled it says so,
    because the same bytes again release nothing. A store that cannot be used is a warning, or with
    checkpoint.on_error=fail the client's failure.
    """
    kind = message.metadata.message_type
    if kind not in (TRAIN, EVALUATE):
        return call_next(message, context)
    order = unpack_instructions(message)  # before the settings, which other source code may not know
    config, site = load(context.run_config, context.node_config)
    if not config.checkpoint.enabled:
        return call_next(message, context)
    check_lives_here(order.client_id, config, site)
    store = ClientStore(config, site, order, context)
    tolerate(store, store.restore_private)
    if kind == EVALUATE:
        return call_next(message, context)
    received = digest_received(message)
    if config.checkpoint.replay and (kept := tolerate(store, lambda: store.find_trained(message, received))):
        log(INFO, "client %s answers round %d from its store", order.client_id, order.server_round)
        if config.privacy.enabled:
            kept.content.metric_records[METRICS][REPLAYED] = 1
        return kept
    reply = call_next(message, context)
    if not reply.has_error() and (saved := tolerate(store, lambda: store.save(reply, received))):
        log(DEBUG, "client %s: %s in %s", order.client_id, saved, store.path)
    return reply


def privacy_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clip a client's update and add noise to it, if the config says so.

    This mod is inside checkpoint_mod. So a client's store holds the noisy update only, and sends the same one again.
    Flower's LocalDpMod is not used: its sigma is right for an epsilon below 1 only, an update of zero fails, one with a
    NaN leaves unclipped, and a tensor without dimensions leaves as it is.
    """
    config, _ = load(context.run_config, context.node_config)
    if not config.privacy.enabled or message.metadata.message_type != TRAIN:
        return call_next(message, context)
    sigma = find_sigma(config.privacy)  # before the work, which would be in vain without the package
    sent = views(unpack_arrays(message.content))
    reply = call_next(message, context)
    if not reply.has_error():
        released = perturb(sent, views(unpack_arrays(reply.content)), config.privacy.clipping_norm, sigma)
        reply.content[ARRAYS] = ArrayRecord({key: pack(values) for key, values in released.items()})
    return reply


def tolerate(store: ClientStore, action: Callable[[], T]) -> T | None:
    """Return what `action` does with the store; its failure is logged and None, or raised, as on_error says.

    It is raised wherever private tensors are at stake: a reply that is taken promises that they are kept.
    """
    try:
        return action()
    except CheckpointError as error:
        if store.config.checkpoint.on_error == "fail" or store.order.private:
            raise
        log(WARNING, "client %s goes on without its store: %s", store.order.client_id, error)
        return None


def describe(error: Exception) -> str:
    """Say an error in one line, with its type where the text was not written for people."""
    text = " ".join(str(error).split())
    plain = isinstance(error, ValueError | FloatingPointError) and text
    return text if plain else f"{type(error).__name__}: {text}"
