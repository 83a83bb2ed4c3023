"""Saving and loading ViT-B by the chunk store, against whole files and against flat pickled chunks."""

import hashlib
import pickle
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, cycle
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flapp.checkpoint.manager import ChunkManager
from flapp.files import sync
from flapp.model.build import build_model
from tools.bench import Row, measure

RANK, LORA_ROUNDS = 8, 10
State = dict[str, Tensor]
Save = Callable[[State], None]


def rows() -> list[Row]:
    """Measure in a temporary folder on a real disk: fsync costs nothing in memory."""
    in_memory = [Path(part.mountpoint) for part in psutil.disk_partitions(all=True) if part.fstype == "tmpfs"]
    choices = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    disk = next((path for path in choices if not any(path.is_relative_to(each) for each in in_memory)), choices[0])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="flapp-bench-", dir=disk) as folder:
        return [row for measured in (saving, saving_lora, loading) for row in measured(Path(folder))]


def save_torch(path: Path, state: State) -> None:
    torch.save(state, path)
    sync(path)


def save_safetensors(path: Path, state: State) -> None:
    save_file(state, path)
    sync(path)


def save_flat_pickled(path: Path, state: State) -> None:
    """Save the flat model as ten equal numpy chunks, pickled and keyed by SHA-256, in SQLite with its defaults."""
    flat = np.concatenate([tensor.numpy().ravel() for tensor in state.values()])
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE IF NOT EXISTS chunk_metadata (id INTEGER PRIMARY KEY, chunk_id INTEGER, hash TEXT)")
        db.execute("CREATE TABLE IF NOT EXISTS chunk_data (hash TEXT PRIMARY KEY, data BLOB)")
        old = db.execute("SELECT max(id) FROM chunk_metadata").fetchone()[0] or 0
        for chunk_id, values in enumerate(np.array_split(flat, 10)):
            data = pickle.dumps(values)  # only the baseline pickles; nothing ever unpickles this
            digest = hashlib.sha256(data).hexdigest()
            db.execute("INSERT INTO chunk_metadata (chunk_id, hash) VALUES (?, ?)", (chunk_id, digest))
            db.execute("INSERT OR IGNORE INTO chunk_data VALUES (?, ?)", (digest, data))
        db.execute("DELETE FROM chunk_metadata WHERE id <= ?", (old,))
        db.execute("DELETE FROM chunk_data WHERE hash NOT IN (SELECT hash FROM chunk_metadata)")
    db.close()


def chunk_saver(store: ChunkManager, whole: bool = False) -> Save:
    """Return a function that saves one round after another.

    With `whole`, it raises an error if some bytes of a round were already in the store.
    """
    rounds = count()

    def save(state: State) -> None:
        saved = store.save_model_chunks(state, next(rounds))
        if whole and saved.new_bytes != saved.bytes:
            raise RuntimeError(
                f"only {saved.new_bytes} of {saved.bytes} bytes were new: the comparison would be unfair"
            )

    return save


def save_next(save: Save, states: Iterator[State]) -> None:
    save(next(states))


def random_like(state: State) -> State:
    return {key: torch.randn_like(tensor) for key, tensor in state.items()}


def saving(folder: Path) -> list[Row]:
    """Save two models in turn, so that every tensor changes from one round to the next; only the last is kept."""
    shapes = build_model("vit_b_16", (224, 224, 3), 1000).state_dict()
    states = [random_like(shapes), random_like(shapes)]
    ways: dict[str, Save] = {
        "torch.save + fsync": partial(save_torch, folder / "model.pt"),
        "safetensors + fsync": partial(save_safetensors, folder / "model.safetensors"),
        "flat pickled chunks": partial(save_flat_pickled, folder / "flat.db"),
        "store": chunk_saver(ChunkManager(folder / "store.db", keep_rounds=1), whole=True),
    }
    seconds = measure({name: partial(save_next, save, cycle(states)) for name, save in ways.items()}, warmup=3)
    return [
        Row("save ViT-B, all changed", against, seconds[against] / seconds["store"], target)
        for against, target in zip(ways, (2.2, 1.9, 25.0), strict=False)
    ]


def with_adapters(model: nn.Module) -> State:
    """Return a model's state with LoRA factors of every attention's qkv and proj as tensors of their own."""
    state = dict(model.state_dict())
    for key, weight in model.state_dict().items():
        if key.endswith(("qkv.weight", "proj.weight")) and "attention" in key:
            name = key.removesuffix("weight")
            state[f"{name}lora_A"] = torch.randn(RANK, weight.shape[1])
            state[f"{name}lora_B"] = torch.randn(weight.shape[0], RANK)
    return state


def saving_lora(folder: Path) -> list[Row]:
    """Save a frozen ViT-B whose adapters and head change with every round."""
    state = with_adapters(build_model("vit_b_16", (224, 224, 3), 100))
    changing = [key for key in state if "lora_" in key or "head." in key]
    changed, whole = (sum(state[key].nbytes for key in keys) for keys in (changing, state))

    def change() -> State:
        return state | random_like({key: state[key] for key in changing})

    store = ChunkManager(folder / "lora.db")
    save = chunk_saver(store)
    seconds = measure(
        {"torch": lambda: save_torch(folder / "model.pt", change()), "store": lambda: save(change())},
        repeats=LORA_ROUNDS - 1,
    )
    new = store.save_model_chunks(change(), LORA_ROUNDS).new_bytes
    store.cleanup_old_rounds(LORA_ROUNDS)
    stored = store.get_storage_stats()["storage_size_bytes"]
    kept = f"{LORA_ROUNDS} rounds kept, {stored:,} bytes"
    what = f"save ViT-B + LoRA (r={RANK})"
    return [
        Row(what, "torch.save + fsync", seconds["torch"] / seconds["store"], 5),
        Row(f"{what}, new bytes of a round", "changed bytes", new / changed, 1.01, False),
        Row(f"{what}, the file", "the model", stored / whole, 1.10, False, note=kept),
    ]


def loading(folder: Path) -> list[Row]:
    """Load the stored model into a live one, verified, against torch.load without any check."""
    model = build_model("vit_b_16", (224, 224, 3), 1000)
    save_torch(folder / "model.pt", model.state_dict())
    store = ChunkManager(folder / "load.db")
    store.save_model_chunks(model, 0)
    ways: dict[str, Callable[[], object]] = {
        "torch": lambda: model.load_state_dict(torch.load(folder / "model.pt")),
        "torch only": lambda: torch.load(folder / "model.pt"),
        "store": lambda: store.reconstruct_model_from_chunks(0, model),
    }
    seconds = measure(ways, repeats=9, warmup=2)
    what, against = "verified load into the live ViT-B", "torch.load + load_state_dict, unverified"
    note = f"{seconds['torch only'] / seconds['store']:.2f}x against torch.load alone"
    return [Row(what, against, seconds["torch"] / seconds["store"], 2.8, note=note)]
