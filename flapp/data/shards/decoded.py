"""Decoded images with clients, as a source of shards."""

from collections.abc import Mapping

import numpy as np

from flapp.data.decode import Decoded
from flapp.data.shards.source import ALL, Kind, Rows, Source


class DecodedSource(Source):
    """The samples of decoded splits by client; those of a split test, if there is one, are clients' test samples."""

    def __init__(self, kind: Kind, splits: Mapping[str, Decoded], progress: bool = False) -> None:
        self.kind = kind
        self.has_test = "test" in splits
        self._splits = [splits[name] for name in ("train", "test") if name in splits]
        self._rows = [_rows_of(split) for split in self._splits]
        names = {name for rows in self._rows for name in rows}
        held_out = self._rows[1] if self.has_test else {}
        self.describe_writers({name: len(held_out.get(name, ())) for name in names}, progress)

    def labels(self, writer: str) -> np.ndarray:
        held = zip(self._splits, self._rows, strict=True)
        return np.concatenate([split.labels[rows[writer]] for split, rows in held if writer in rows])

    def images(self, writer: str, rows: Rows = ALL) -> np.ndarray:
        train, *test = (found.get(writer, np.empty(0, np.int64)) for found in self._rows)
        chosen = np.arange(sum(map(len, (train, *test))))[rows]
        images = np.empty((len(chosen), *self.kind.shape), np.uint8)
        own = chosen < len(train)
        images[own] = self._splits[0].images[train[chosen[own]]]
        if test:
            images[~own] = self._splits[1].images[test[0][chosen[~own] - len(train)]]
        return images.reshape(-1, *self.kind.stored)


def _rows_of(split: Decoded) -> dict[str, np.ndarray]:
    """Return the rows of each client, in their order."""
    names, of = np.unique(np.array(split.clients), return_inverse=True)
    order = np.argsort(of, kind="stable")
    parts = np.split(order, np.searchsorted(of[order], np.arange(1, len(names))))
    return dict(zip(map(str, names), parts, strict=True))
