"""A local step of LoRA on a small ViT, against the full fine-tuning step and against PEFT's, on the CPU."""

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

from flapp.model.build import build_model
from flapp.model.lora import add_lora, mark_only_lora_as_trainable
from flapp.training import StepRules, build_optimizer, train
from tools.bench import Row, measure

MODEL, SIZE, BATCH, CLASSES = "vit_s_16", 64, 32, 10
RANK, ALPHA, TARGETS = 8, 16, ["qkv", "proj"]


def adapted(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    add_lora(model, RANK, ALPHA, TARGETS)
    mark_only_lora_as_trainable(model)
    return model


def in_peft(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, modules_to_save=["heads.head"])
    return get_peft_model(copy.deepcopy(model), config)


def stepper(model: nn.Module, precision: str = "float32") -> Callable[[], object]:
    """Return a function that takes one step of the local loop, with AdamW, on one fixed batch."""
    batches = [(torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(0, CLASSES, (BATCH,)))]
    optimizer, rules = build_optimizer(model, "adamw", 1e-4), StepRules(precision=precision)
    return partial(train, model, batches, optimizer, steps=1, rules=rules)


def rows() -> list[Row]:
    """Time the steps in turn; every contender starts from the same weights and does the same work."""
    base = build_model(MODEL, (SIZE, SIZE, 3), CLASSES)
    contenders = {"full": stepper(base), "lora": stepper(adapted(base))}
    if has_peft := find_spec("peft") is not None:
        contenders["peft"] = stepper(in_peft(base))
    contenders["bf16"] = stepper(adapted(base), precision="bfloat16")
    seconds = measure(contenders, repeats=9)
    what = f"LoRA step, {MODEL} at {SIZE} pixels, {', '.join(TARGETS)}, r={RANK}"
    note = f"bfloat16 autocast takes {seconds['bf16'] / seconds['lora']:.2f}x of its time on this CPU"
    against_peft = seconds["peft"] / seconds["lora"] if has_peft else None
    missing = "" if has_peft else "no peft: pip install -e '.[benchmark]'"
    return [
        Row(what, "full fine-tuning step", seconds["full"] / seconds["lora"], 1.3, note=note),
        Row(what, "PEFT on the same model", against_peft, 1.0, note=missing),
    ]
