"""What a client keeps from round to round: <checkpoints>/<run_name>/client_<id>/client_<id>_chunks.db.

A round contains the tensors and numbers of the client's reply, its private tensors (which are never sent; the round's
metrics name them), and digests of what it was trained from.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message

from flapp.checkpoint.chunks import Round, Saved
from flapp.checkpoint.manager import ChunkManager
from flapp.client.task import Task
from flapp.config.load import config_digest
from flapp.messages import as_record, pack, pack_reply, unpack_reply, views
from flapp.model.files import to_numpy


def private_key(client_id: str) -> str:
    """Name the ArrayRecord of `context.state` that holds the tensors which a client keeps to itself."""
    return f"private-{client_id}"


@dataclass(frozen=True)
class ClientStore:
    """One client's store while it handles one message; every method may raise CheckpointError."""

    task: Task
    context: Context

    @property
    def path(self) -> Path:
        """Return where the store lies: below the node's checkpoint-dir, or home/checkpoints."""
        config, name = self.task.config, f"client_{self.task.client_id}"
        root = Path(self.task.node_config.checkpoint_dir or Path(config.home) / "checkpoints")
        return root / config.run_name / name / f"{name}_chunks.db"

    def restore_private(self) -> None:
        """Restore the client's private tensors from the last round that the server accepted from it."""
        instructions = self.task.instructions
        self.context.state.pop(private_key(self.task.client_id), None)
        if instructions.private and instructions.accepted_round and self.path.exists():
            with self._open() as store:
                if kept := self._find(store, instructions.accepted_round):
                    self._put_back(store, kept)

    def find_trained(self, message: Message, received: str) -> Message | None:
        """Return the saved reply to this message if there is one with the same model, data, settings and source."""
        if not self.path.exists():
            return None
        with self._open() as store:
            kept = self._find(store, self.task.instructions.server_round)
            if kept is None or kept.input_digest != self._digest_input(received):
                return None
            trained = self._put_back(store, kept)
        metrics = {name: value for name, value in kept.metrics.items() if name != "private"}
        return pack_reply(message, self.task.data.claim, metrics, trained)

    def save(self, reply: Message, received: str) -> Saved:
        """Save a reply, and the private tensors in context.state, as this round's."""
        answer = unpack_reply(reply.content)
        private = self.context.state.array_records.get(private_key(self.task.client_id), ArrayRecord())
        tensors = views(answer.arrays or {}) | views(private)
        with self._open() as store:
            return store.save_model_chunks(
                tensors,
                self.task.instructions.server_round,
                answer.metrics | ({"private": sorted(private)} if private else {}),
                config_digest=config_digest(self.task.config),
                input_digest=self._digest_input(received),
                pinned=(self.task.instructions.accepted_round,) if private else (),
            )

    def _open(self) -> ChunkManager:
        cut = self.task.config.checkpoint
        return ChunkManager(self.path, cut.keep_rounds, cut.chunk_bytes, cut.chunk_num)

    def _find(self, store: ChunkManager, number: int) -> Round | None:
        """Return a round if it is kept and was trained with the same settings."""
        kept = store.find_round(number)
        return kept if kept is not None and kept.config_digest == config_digest(self.task.config) else None

    def _put_back(self, store: ChunkManager, kept: Round) -> ArrayRecord:
        """Load a round, leave its private tensors in context.state, and return the others."""
        tensors = store.reconstruct_model_from_chunks(kept.round)
        arrays = {key: pack(to_numpy(tensor)) for key, tensor in tensors.items()}
        private = {key: arrays.pop(key) for key in kept.metrics.get("private", [])}
        if private:
            self.context.state[private_key(self.task.client_id)] = as_record(private)
        return as_record(arrays)

    def _digest_input(self, received: str) -> str:
        """Return the SHA-256 of what this round's training starts from, besides the settings."""
        instructions, claim = self.task.instructions, self.task.data.claim
        facts: list[str | int] = [received, instructions.base, instructions.accepted_round, instructions.source_digest]
        facts += [claim.shard_digest, claim.train, claim.versions]
        facts += [instructions.code] if instructions.code else []
        facts += [str(instructions.clipping_norm)] if instructions.clipping_norm else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
