"""What shards are made of: images of one shape in named classes, read by writer, some rows at a time."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import AfterValidator, Field, Strict
from tqdm import tqdm

if TYPE_CHECKING:
    from flapp.data.decode import Decoded  # imports PIL, which clients do without

MOST_CLASSES = 1 << 16  # also the limit of a message, see flapp.messages
LONGEST_SIDE = 1 << 16
BLOCK_BYTES = 16 << 20
NONE = np.empty(0, np.int64)


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has control characters")
    return text


Text = Annotated[str, AfterValidator(_check_printable)]
_Side = Annotated[int, Field(gt=0, le=LONGEST_SIDE)]


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True})
class Kind:
    """What all samples of a dataset are: images, uint8 (H, W, C), in classes with names.

    normalization: the one that runs must use, None if they may use any.
    """

    dataset: Text
    shape: Annotated[tuple[_Side, _Side, _Side], Strict(False)]  # JSON has lists
    classes: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MOST_CLASSES), Strict(False)]
    normalization: Literal["none", "half", "imagenet"] | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """Return the shape of an image in a shard: grey ones are (H, W)."""
        return self.shape[:2] if self.shape[2] == 1 else self.shape

    @property
    def pixels(self) -> int:
        """Return the number of bytes of an image."""
        return int(np.prod(self.shape))

    @property
    def settings(self) -> tuple[Sequence[int], int, str | None]:
        """Return what the settings of a run must say: shape, number of classes, normalization."""
        return self.shape, len(self.classes), self.normalization

    def facts(self) -> dict[str, Any]:
        """Return what meta.json and manifest.json say. For FEMNIST, the oldest dataset, this is only its name."""
        if self.dataset == FEMNIST.dataset:
            return {"dataset": self.dataset}
        shape, classes = list(self.shape), list(self.classes)
        return {"dataset": self.dataset, "shape": shape, "classes": classes, "normalization": self.normalization}


FEMNIST = Kind("femnist", (28, 28, 1), tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"))


def read_kind(facts: Mapping[str, Any]) -> Kind:
    """Return the kind that meta.json or manifest.json states, by default FEMNIST; raises ValueError for a bad one."""
    if facts.get("dataset", FEMNIST.dataset) == FEMNIST.dataset:
        return FEMNIST
    return Kind(**facts)


@dataclass(frozen=True)
class Writer:
    """What a source holds of one writer: `count` samples, the last `held_out` of them its own test samples."""

    count: int
    held_out: int
    sha256: str


class Source:
    """The samples of decoded splits by writer.

    Samples of the split named test are the writers' test samples. has_test: whether that split exists. names: further
    writers, who may have no samples.
    """

    def __init__(
        self, kind: Kind, splits: Mapping[str, "Decoded"], progress: bool = False, names: Iterable[str] = ()
    ) -> None:
        self.kind = kind
        self.has_test = "test" in splits
        self._splits = [splits[name] for name in ("train", "test") if name in splits]
        self._rows = [_rows_of(split.clients) for split in self._splits]
        self.writers: dict[str, Writer] = {}
        names = sorted({*names}.union(*self._rows))
        for name in tqdm(names, "hashing", unit="writer", disable=None if progress else True):
            digest, labels = hashlib.sha256(), self.labels(name)
            for images, _ in self.blocks(name, np.arange(len(labels))):
                digest.update(images.data)
            digest.update(labels.astype("<i8").data)
            held_out = len(self._rows[1].get(name, ())) if self.has_test else 0
            self.writers[name] = Writer(len(labels), held_out, digest.hexdigest())

    def blocks(self, writer: str, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield images and labels of a writer's rows, in this order, some at a time."""
        labels, size = self.labels(writer), block_rows(self.kind)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield self.images(writer, part), labels[part]

    def labels(self, writer: str) -> np.ndarray:
        """Return a writer's labels, int64 (n,), in the order of the files, test samples last."""
        held = zip(self._splits, self._rows, strict=True)
        return np.concatenate([split.labels[rows.get(writer, NONE)] for split, rows in held])

    def images(self, writer: str, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Return rows of a writer's images, uint8 (n, *kind.stored), in the same order."""
        train, *test = (found.get(writer, NONE) for found in self._rows)
        chosen = np.arange(sum(map(len, (train, *test))))[rows]
        images = np.empty((len(chosen), *self.kind.shape), np.uint8)
        own = chosen < len(train)
        images[own] = self._splits[0].images[train[chosen[own]]]
        if test:
            images[~own] = self._splits[1].images[test[0][chosen[~own] - len(train)]]
        return images.reshape(-1, *self.kind.stored)


def _rows_of(clients: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the rows of each client, in their order."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(clients):
        rows.setdefault(name, []).append(row)
    return {name: np.array(held) for name, held in rows.items()}


def block_rows(kind: Kind, most: int = 4096) -> int:
    """Return how many images are read at a time: `most`, fewer if they are large."""
    return max(1, min(most, BLOCK_BYTES // kind.pixels))
