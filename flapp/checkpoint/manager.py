"""ChunkManager: save a model for each round, look rounds up, and rebuild models from them, verified."""

import json
import operator
import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapp.checkpoint import audit
from flapp.checkpoint.audit import TensorChange, Verification
from flapp.checkpoint.chunks import (
    CheckpointError,
    Chunk,
    Cut,
    Entry,
    Part,
    Round,
    Saved,
    cut_evenly,
    cut_tensors,
    ranges_of,
)
from flapp.checkpoint.store import CHUNKS, VERIFY_BYTES, Store, pieces_of
from flapp.untrusted import parse_json

if TYPE_CHECKING:
    from torch import Tensor, nn


class ChunkManager(AbstractContextManager["ChunkManager"]):
    """The checkpoint store of one client, or of the server, in one SQLite file."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        keep_rounds: int | None = None,
        chunk_bytes: int | None = None,
        chunk_num: int | None = None,
        create: bool = True,
    ) -> None:
        """Open the store at `path`, or make it if it is missing and `create` is set.

        keep_rounds: how many rounds to keep, all if None. chunk_bytes: the size of a full chunk (about 1 MiB if None);
        chunk_num: cut the whole model into this many equal chunks instead. An existing store keeps its way of cutting
        unless chunk_bytes or chunk_num is given. Raises CheckpointError for a file that is not a store.
        """
        for name, value in {"keep_rounds": keep_rounds, "chunk_bytes": chunk_bytes, "chunk_num": chunk_num}.items():
            if value is not None:
                _integer(name, value, 1)
        self.path = Path(path)
        self.keep_rounds, self.chunk_bytes, self.chunk_num = keep_rounds, chunk_bytes, chunk_num
        self._store = Store(self.path, create)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database; a second time does nothing."""
        self._store.close()

    @staticmethod
    def model_to_params(model: "nn.Module | Mapping[str, Any]") -> "dict[str, Tensor]":
        """Return every parameter and buffer of a model or state dict by name, on the CPU."""
        from flapp.checkpoint.tensors import model_to_params

        return model_to_params(model)

    def split_model(self, params: Mapping[str, Any], chunk_num: int) -> list[Cut]:
        """Cut a model into `chunk_num` chunks of near-equal element count, none of them empty."""
        from flapp.checkpoint.tensors import specs_of

        chunks = cut_evenly(specs_of(self.model_to_params(params)), _integer("chunk_num", chunk_num, 1))
        return [
            {"chunk_id": i, "parts": ranges_of(parts), "flat_size": sum(part.end - part.start for part in parts)}
            for i, parts in enumerate(chunks)
        ]

    def extract_chunk_data(self, params: Mapping[str, Any], chunk: Cut) -> bytes:
        """Return the raw bytes of one chunk of split_model."""
        from flapp.checkpoint.tensors import raw, specs_of

        chosen = self.model_to_params({key: params[key] for key in chunk["parts"]})
        specs = specs_of(chosen)
        ranges = [(key, start, end) for key, rows in chunk["parts"].items() for start, end, _ in rows]
        return b"".join(Part(key, start, end, specs[key]).of(raw(chosen[key])) for key, start, end in ranges)

    def save_model_chunks(
        self,
        model: "nn.Module | Mapping[str, Any]",
        round_num: int,
        metrics: Mapping[str, Any] | None = None,
        *,
        config_digest: str = "",
        input_digest: str = "",
        pinned: Collection[int] = (),
    ) -> Saved:
        """Store a model as a round, replacing one of the same number, and drop the rounds that keep_rounds excludes.

        metrics: plain values for JSON. pinned: rounds to keep anyway. After a CheckpointError nothing has changed.
        """
        from flapp.checkpoint.tensors import raw, specs_of

        round_num = _integer("round_num", round_num, 0)
        facts = (_json(round_num, metrics), config_digest, input_digest)
        params = self.model_to_params(model)
        specs = specs_of(params)
        buffers = {key: raw(tensor) for key, tensor in params.items()}
        size = sum(spec.nbytes for spec in specs.values())
        with self._store.saving(round_num, size, self.chunk_bytes, self.chunk_num):
            meta = self._store.meta
            chunk_num = self.chunk_num or (None if self.chunk_bytes else meta.get("chunk_num"))
            most = self.chunk_bytes or meta["chunk_bytes"]
            cut = cut_evenly(specs, chunk_num) if chunk_num else cut_tensors(specs, most)
            chunks = ((parts, pieces_of(parts, buffers)) for parts in cut)
            return self._store.put_round(round_num, chunks, facts, self.keep_rounds, pinned)

    def rounds(self) -> list[Round]:
        """Return the stored rounds by their number."""
        with self._store.transaction():
            return self._store.rounds()

    def find_round(self, round_num: int) -> Round | None:
        """Return a stored round, None if it is not there."""
        with self._store.transaction():
            record = self._store.records().get(round_num)
            return self._store.round(record) if record else None

    def load_chunks_by_round(self, round_num: int) -> list[Chunk]:
        """Return all chunks of a round, verified."""
        with self._store.transaction():
            return [self._chunk(round_num, entry) for entry in self._checked(round_num)[0]]

    def get_chunk_by_id(self, round_num: int, chunk_id: int) -> Chunk:
        """Return one chunk of a round, verified."""
        with self._store.transaction():
            found = [entry for entry in self._checked(round_num)[0] if entry.chunk_id == chunk_id]
            if not found:
                raise CheckpointError(f"{self.path}: round {round_num} has no chunk {chunk_id}")
            return self._chunk(round_num, found[0])

    def _chunk(self, round_num: int, entry: Entry) -> Chunk:
        data = bytes(self._store.read_chunk(round_num, entry))
        return Chunk(entry.chunk_id, entry.hash.hex(), ranges_of(entry.parts), entry.size, data)

    def _checked(self, round_num: int, bounded: bool = True) -> tuple[list[Entry], dict[str, Any]]:
        """Check a round's metadata; return its chunks' entries and its tensors' specs. bounded: see Store.check."""
        records = self._store.records()
        if round_num not in records:
            stored = ", ".join(map(str, records)) or "none"
            raise CheckpointError(f"{self.path} has no round {round_num}: it holds {stored[:200]}")
        found = self._store.round(records[round_num])
        entries = [self._store.entry(round_num, row) for row in self._store.execute(CHUNKS, round_num)]
        return entries, self._store.check(round_num, found.model_digest, entries, bounded)

    def reconstruct_model_from_chunks(self, round_num: int, model: "nn.Module | None" = None) -> Any:
        """Return a round's tensors by name, or load them into `model`, in place, and return it.

        The model must have the same names, shapes and dtypes. Without one, a round that claims far more bytes than the
        file holds is refused (see chunks.py). Every byte is verified before it is used, so damage in the file leaves
        the model unchanged. If the disk fails after that, or another program writes to the file, the model is partly
        overwritten, and the error says so.
        """
        from flapp.checkpoint.tensors import new_tensors, raw, reject_foreign, shares_memory, written

        with self._store.transaction():
            entries, specs = self._checked(round_num, bounded=model is None)
            if model is not None:
                params = self.model_to_params(model)
                reject_foreign(f"{self.path}: round {round_num}", specs, params)
                largest = max((entry.size for entry in entries), default=0)
                if largest <= VERIFY_BYTES and shares_memory(model, params, specs):
                    written(model)
                    self._store.load_into(round_num, entries, {key: raw(tensor) for key, tensor in params.items()})
                    return model
            tensors = new_tensors(specs)
            self._store.read_into(round_num, entries, {key: raw(tensor) for key, tensor in tensors.items()})
        if model is None:
            return tensors
        model.load_state_dict(tensors, strict=True)
        return model

    def cleanup_old_rounds(self, keep: int) -> None:
        """Drop all rounds but the `keep` that were saved last."""
        self._store.expire(keep=_integer("keep", keep, 1))

    def drop_rounds_after(self, round_num: int) -> None:
        """Drop all rounds with a higher number."""
        self._store.expire(after=_integer("round_num", round_num, 0))

    def get_storage_stats(self) -> dict[str, Any]:
        """Return what the store holds and what it takes on disk, in bytes."""
        with self._store.transaction():
            rounds = self._store.rounds()
            entries, chunks, stored = self._store.totals()
        logical, size = sum(row.bytes for row in rounds), self.path.stat().st_size
        return {
            "client_id": self.path.stem.removeprefix("client_").removesuffix("_chunks"),
            "db_path": str(self.path),
            "total_metadata_entries": entries,
            "unique_chunks": chunks,
            "storage_size_bytes": size,
            "storage_size_mb": size / 2**20,
            "round_range": (rounds[0].round, rounds[-1].round) if rounds else None,
            "logical_bytes": logical,
            "stored_bytes": stored,
            "dedup_ratio": logical / stored if stored else 1.0,
            "rounds": len(rounds),
        }

    def verify(self) -> Verification:
        """Check the file's structure and every round, each chunk once, and return the problems found."""
        return audit.verify(self._store)

    def diff(self, first: int, second: int) -> list[TensorChange]:
        """Return the tensors that differ between two rounds; tensors with equal chunks are not read."""
        with self._store.transaction():
            return audit.diff(self._store, (first, second), [self._checked(number)[0] for number in (first, second)])

    def export(self, round_num: int, path: str | os.PathLike[str]) -> str:
        """Write a round as a safetensors file, whole or not at all, and return the file's SHA-256."""
        return audit.export(self.reconstruct_model_from_chunks(round_num), round_num, Path(path))

    def compact(self) -> tuple[int, int]:
        """Give the space of dropped rounds back to the file system; returns the file's bytes before and after."""
        before = self.path.stat().st_size
        self._store.vacuum()
        return before, self.path.stat().st_size


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise CheckpointError(f"{name}={value!r} must be an integer") from None
    if not least <= number < 1 << 63:
        raise CheckpointError(f"{name}={number} must be at least {least} and fit into 64 bits")
    return number


def _json(round_num: int, metrics: Mapping[str, Any] | None) -> str:
    try:
        text = json.dumps(dict(metrics or {}))
        parse_json(text, surrogates=True)  # what cannot be read must not be saved
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"metrics of round {round_num} are not JSON ({error}): pass plain numbers") from None
