"""Files in the format of CIFAR's python version: protocol 2 as Python 2 wrote it, where keys and texts are bytes."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flapp.data.sources import CIFAR


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Write bytes as Python 2 wrote its strings, instead of through a call of _codecs.encode."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, text: bytes) -> None:
        short = len(text) < 256
        self.write(pickle.SHORT_BINSTRING + bytes([len(text)]) if short else b"T" + struct.pack("<i", len(text)))
        self.write(text)
        self.memoize(text)

    dispatch[bytes] = save_string


def python2_pickle(content: Any) -> bytes:
    """Return `content` as the real files hold theirs, numpy's module being called as it was then."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar(root: Path, name: str = "cifar10", images: int = 20, seed: int = 0) -> Path:
    """Write random images and labels, `images` in each file, and return the folder in `root`."""
    facts, rng = CIFAR[name], np.random.default_rng(seed)
    folder = root / facts.folder
    folder.mkdir(parents=True)
    classes = 100 if name == "cifar100" else 10
    for file in (*facts.train, *facts.test):
        content: dict[bytes, Any] = {
            b"data": rng.integers(0, 256, (images, 3072), dtype=np.uint8),
            facts.labels: rng.permutation(np.arange(images) % classes).tolist(),
            b"batch_label": b"a batch of " + file.encode(),
            b"filenames": [b"image_%d.png" % i for i in range(images)],
        }
        if name == "cifar100":
            content[b"coarse_labels"] = [label // 5 for label in content[facts.labels]]
        (folder / file).write_bytes(python2_pickle(content))
    names = [b"class_%d" % i for i in range(classes)]
    (folder / facts.meta).write_bytes(python2_pickle({facts.names: names, b"num_vis": 3072}))
    return folder
