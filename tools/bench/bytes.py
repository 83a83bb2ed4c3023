"""Bytes that a client sends up in a round of FedLoRA on ViT-B/16 at rank 8, against FedAvg of the same model.

Counted from the reply that a client makes of the tensors that the strategy asks for; their values do not matter, so
nothing is trained and no pretrained file is read.
"""

from typing import Any

from flwr.app import ArrayRecord
from flwr.supercore.task_identity import TaskIdentity

from flapp.config.load import compose
from flapp.config.schema import Config
from flapp.messages import (
    TRAIN,
    Claim,
    Instructions,
    pack,
    pack_instructions,
    pack_reply,
    size_of,
    source_digest,
    unpack_arrays,
)
from flapp.server.run import build_strategy, initial_model, keys_of
from tools.bench import Row

WORDS = ("experiment=cifar10_fedlora", "model.pretrained=null")
FEDAVG = ("strategy=fedavg", "strategy.aggregation=null", "lora=none")
RULES = ("fedit", "ffa", "rolora")


def rows(*words: str) -> list[Row]:
    """Count what each rule sends up; `words` change the experiment."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # needed to create messages
    whole, *_ = bytes_up(compose([*WORDS, *words, *FEDAVG]))
    found = []
    for rule in RULES:
        sent = bytes_up(compose([*WORDS, *words, f"strategy.aggregation={rule}"]))
        in_turn = " and ".join(f"{count:,}" for count in dict.fromkeys(sent))
        note = f"{in_turn}{' in turn' if len(set(sent)) > 1 else ''} of {whole:,} bytes per client and round"
        ratio = len(sent) * whole / sum(sent)
        found.append(Row(f"bytes up, FedLoRA r=8, {rule}", "FedAvg, same ViT-B", ratio, 200, note=note, limit=150))
    return found


def bytes_up(config: Config) -> list[int]:
    """Return the bytes of the model in one client's replies to the first two rounds.

    There are two, because some rules send A and B in alternate rounds.
    """
    model = initial_model(config)
    state = model.state_dict()
    sent, private = keys_of(config, model)
    nobody: Any = None  # as roster and observer: the strategy asks no client and keeps no result here
    strategy = build_strategy(config, nobody, nobody, model, private)
    strategy.current = ArrayRecord({key: pack(state[key].numpy()) for key in sent})
    return [reply_bytes(strategy.current, strategy.instructions(TRAIN, number)) for number in (1, 2)]


def reply_bytes(current: ArrayRecord, instructions: dict[str, Any]) -> int:
    """Return the bytes of a client's reply: the tensors that the order asks for, of the global model."""
    order = Instructions("0", 1, source_digest(), **instructions)
    returned = ArrayRecord({key: current[key] for key in order.returns or current})
    reply = pack_reply(pack_instructions(1, TRAIN, order), Claim("0"), {}, returned)
    return size_of(unpack_arrays(reply.content))
