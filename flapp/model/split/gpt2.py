"""The components of GPT-2 with its language head, over transformers' own blocks.

config is transformers' GPT2Config as a dict, and `attn_implementation`. All components take an attention mask (N, T)
and position ids as GPT2LMHeadModel does; none keeps a cache. Where word embeddings are tied, bottom and top each store
them, so that either loads alone, and the top's metadata says that they are the bottom's.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import create_causal_mask
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from flapp.model.split.component import ModelType, SplitModel, Whole

EMBEDDING = "transformer.wte.weight"


class GPT2Trunk(SplitModel):
    """Some layers of GPT-2: hidden states (N, T, width) to hidden states."""

    def __init__(self, config: Mapping[str, Any], start: int, end: int) -> None:
        super().__init__()
        self.config = GPT2Config.from_dict({k: v for k, v in config.items() if k != "attn_implementation"})
        self.config._attn_implementation = config["attn_implementation"]
        self.transformer = nn.Module()
        self.transformer.h = nn.ModuleDict({str(i): GPT2Block(self.config, layer_idx=i) for i in range(start, end)})

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        places = _positions(hidden) if position_ids is None else position_ids
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=places,
        )
        for block in self.transformer.get_submodule("h").children():
            hidden = block(hidden, None, mask, use_cache=False, position_ids=places)
        return hidden


class GPT2Bottom(GPT2Trunk):
    """Embeddings and the first layers: token ids (N, T) to hidden states (N, T, width)."""

    def __init__(self, config: Mapping[str, Any], start: int, end: int) -> None:
        super().__init__(config, start, end)
        self.transformer.wte = nn.Embedding(self.config.vocab_size, self.config.n_embd)
        self.transformer.wpe = nn.Embedding(self.config.n_positions, self.config.n_embd)
        self.transformer.drop = nn.Dropout(self.config.embd_pdrop)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        words, places, drop = (self.transformer.get_submodule(name) for name in ("wte", "wpe", "drop"))
        embedded = words(input_ids) + places(_positions(input_ids) if position_ids is None else position_ids)
        return super().forward(drop(embedded), attention_mask, position_ids)


class GPT2Top(GPT2Trunk):
    """The last layers, norm and language head: hidden states to logits (N, T, vocabulary)."""

    def __init__(self, config: Mapping[str, Any], start: int, end: int) -> None:
        super().__init__(config, start, end)
        self.transformer.ln_f = nn.LayerNorm(self.config.n_embd, eps=self.config.layer_norm_epsilon)
        self.lm_head = nn.Linear(self.config.n_embd, self.config.vocab_size, bias=False)
        self.tied = {"lm_head.weight": f"bottom:{EMBEDDING}"} if self.config.tie_word_embeddings else {}

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        hidden = super().forward(hidden, attention_mask, position_ids)
        return self.lm_head(self.transformer.get_submodule("ln_f")(hidden))


def read_gpt2(source: str | Path, attn_implementation: str | None = None) -> Whole:
    """Read GPT-2 from a folder of save_pretrained's or by its name on the hub; raises ValueError.

    Only safetensors are read, and a file without all of the model's tensors is refused. attn_implementation is as in
    from_pretrained; kernels differ in rounding.
    """
    try:
        config = AutoConfig.from_pretrained(source)
        plain = config.model_type == "gpt2" and not config.add_cross_attention
        loaded: Any = plain and GPT2LMHeadModel.from_pretrained(
            source,
            config=config,
            dtype="auto",
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{source} cannot be read as a GPT-2 ({reason})") from error
    if not plain:
        raise ValueError(f"{source} is a {config.model_type}: only GPT-2 without cross-attention can be split")
    model, info = loaded
    if missing := {*info["missing_keys"], *info["mismatched_keys"]}:
        raise ValueError(f"{source} lacks {len(missing)} of the model's tensors, first {min(missing)}")
    values = json.loads(json.dumps({key: v for key, v in config.to_dict().items() if key != "_name_or_path"}))
    values["attn_implementation"] = model.config._attn_implementation
    tensors = model.state_dict()
    name = Path(source).resolve().name if Path(source).is_dir() else str(source).replace("/", "--")
    return Whole(name, values, config.n_layer, tensors, _digest_of(tensors))


def _positions(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).unsqueeze(0)


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


GPT2 = ModelType(read_gpt2, {"bottom": GPT2Bottom, "trunk": GPT2Trunk, "top": GPT2Top})
