"""Files in the format of CIFAR's python version: protocol 2 as Python 2 wrote it, where keys and texts are bytes."""

import io
import os
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
    """Return `content` pickled as in the real files, with the old name of numpy's module."""
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


def reduced(call: tuple[str, str], argument: bytes) -> bytes:
    """Return pickle code that calls a global with one argument, a tuple of what `argument` pushes."""
    module, name = call
    return f"c{module}\n{name}\n".encode() + b"(" + argument + b"tR"


ENCODE = ("_codecs", "encode")
TEXT = b"X" + struct.pack("<I", 10_485_760) + b"a" * 10_485_760
CIFAR_BOMBS = {  # files that would fill memory or time, or run code
    "a memo slot far away": b"\x80\x02K\x01r" + struct.pack("<I", 500_000_000) + b".",
    "a text encoded again and again": b"\x80\x02]("
    + reduced(ENCODE, TEXT + b"q\x01X\x06\x00\x00\x00latin1q\x02")
    + reduced(ENCODE, b"h\x01h\x02") * 200
    + b"e.",
    "bytes from a number": b"\x80\x02"
    + reduced(("numpy.core.multiarray", "_reconstruct"), b"")
    + b"(K\x01(\x8a\x05\x00\x00\x00\x00\x02t"
    + reduced(("numpy", "dtype"), b"U\x02u1")
    + b"I00\n\x8a\x05\x00\x00\x00\x00\x02tb.",
    "tuples of tuples": b"\x80\x02})" + b"".join(b"q%ch%ch%c\x87" % (i, i, i) for i in range(1, 60)) + b"K\x01s.",
    "tuples nested": b"\x80\x02}K\x01" + b"\x85" * 1_000_000 + b"K\x01s.",
    "lists of lists": b"\x80\x02}(U\x06labels]q\x01K\x00a"
    + b"".join(b"0]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(2, 60))
    + b"u.",
    "a length beyond the file": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "a huge number": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".",
    "nested": b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b".",
    "opcodes without end": b"\x80\x02" + b"N0" * 1_500_000 + b"N.",
    "code": pickle.dumps(os.system, 2)[:-1] + b"(U\x05echo tR.",
}
