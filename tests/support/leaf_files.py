"""Small FEMNIST sources in LEAF's format, and functions that read a folder of shards."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from flapp.data.shards.manifest import Manifest

Samples = dict[str, tuple[np.ndarray, np.ndarray]]
SPLITS = ("train", "val", "test")


def draw_samples(*counts: int, seed: int = 0, prefix: str = "f") -> Samples:
    """Draw images, uint8 (n, 784), and labels for one writer per count; most pixels are white, as in FEMNIST."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for number, count in enumerate(counts):
        images = np.where(rng.random((count, 784)) < 0.8, 255, rng.integers(0, 256, (count, 784))).astype(np.uint8)
        drawn[f"{prefix}{number:04d}_{number:02d}"] = (images, rng.integers(0, 62, count))
    return drawn


def as_leaf(samples: Samples, scale: float = 255) -> dict[str, Any]:
    """Return these samples as LEAF's JSON object; pixels are divided by scale, and whole numbers if scale=1."""
    data = {
        name: {"x": (images.astype(int) if scale == 1 else images / scale).tolist(), "y": labels.tolist()}
        for name, (images, labels) in samples.items()
    }
    return {"users": list(data), "num_samples": [len(user["y"]) for user in data.values()], "user_data": data}


def write_leaf(folder: Path, content: Any, name: str = "all_data_0.json") -> Path:
    """Write one JSON file into `folder` and return the folder."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def write_arrays(folder: Path, samples: Samples, writers: list[Any] | None = None) -> Path:
    """Write the same samples as images.npy, labels.npy and writers.npy, writers interleaved."""
    folder.mkdir(parents=True)
    names = writers or list(samples)
    pairs = zip(names, samples.values(), strict=True)
    rows = [(name, *sample) for name, pair in pairs for sample in zip(*pair, strict=True)]
    rows = [rows[i] for i in np.argsort([i % 7 for i in range(len(rows))], kind="stable")]
    np.save(folder / "images.npy", np.stack([row[1] for row in rows]).reshape(-1, 28, 28))
    np.save(folder / "labels.npy", np.array([row[2] for row in rows], dtype=np.int64))
    np.save(folder / "writers.npy", np.array([row[0] for row in rows]))
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    """Return every file under `folder` by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(images: np.ndarray, labels: np.ndarray) -> Counter[tuple[int, bytes]]:
    """Count samples by their label and pixels."""
    return Counter((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))


def rows_of(manifest: Manifest, *splits: str) -> Counter[tuple[int, bytes]]:
    """Count every sample in the given splits of all shards, read without flapp."""
    found: Counter[tuple[int, bytes]] = Counter()
    for client in manifest:
        for split in splits:
            tensors = load_file(manifest.shard_path(client) / f"{split}.safetensors")
            found += rows(tensors["images"], tensors["labels"])
    return found


def writers_of(manifest: Manifest) -> dict[str, list[str]]:
    """Return the writers in each client's meta.json."""
    return {c: json.loads((manifest.shard_path(c) / "meta.json").read_text())["writers"] for c in manifest}


def change_meta(folder: Path, **values: Any) -> None:
    """Change values in a folder's meta.json."""
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | values))


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
