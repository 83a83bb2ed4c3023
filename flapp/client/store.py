"""What a client keeps from round to round: <checkpoints>/<run_name>/client_<id>/client_<id>_chunks.db.

A round holds the tensors of the client's reply, its private tensors (those that never travel, named in the round's
metrics), the reply's numbers, and by digest what it was trained from.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message

from flapp.checkpoint.chunks import Round, Saved
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.tensors import digest_of
from flapp.client.data import open_client_data
from flapp.config.load import config_digest
from flapp.config.schema import Config, NodeConfig
from flapp.messages import Claim, Instructions, pack, pack_reply, unpack_arrays, unpack_reply, views


def private_key(client_id: str) -> str:
    """Name the ArrayRecord of `context.state` in which an app leaves what a client keeps to itself."""
    return f"private-{client_id}"


@dataclass(frozen=True)
class ClientStore:
    """One client's store while it handles one message; every method may raise CheckpointError."""

    config: Config
    site: NodeConfig
    order: Instructions
    context: Context

    @property
    def path(self) -> Path:
        """Say where the store lies: below the site's checkpoint-dir, or home/checkpoints."""
        root = Path(self.site.checkpoint_dir or Path(self.config.home) / "checkpoints")
        name = f"client_{self.order.client_id}"
        return root / self.config.run_name / name / f"{name}_chunks.db"

    def restore_private(self) -> None:
        """Put the client's private tensors back as of the last round that the server took from it; or none."""
        self.context.state.pop(private_key(self.order.client_id), None)
        if self.order.private and self.order.accepted_round and self.path.exists():
            with self._open() as store:
                kept = store.find_round(self.order.accepted_round)
                if kept is not None and kept.config_digest == config_digest(self.config):
                    self._put_back(store, kept)

    def find_trained(self, message: Message, received: str) -> Message | None:
        """Return the reply to this very message if it is kept: same model, data, settings and source."""
        if not self.path.exists():
            return None
        with self._open() as store:
            kept = store.find_round(self.order.server_round)
            if kept is None or kept.config_digest != config_digest(self.config):
                return None
            claim = open_client_data(self.config, self.site, self.order.client_id).claim
            if kept.input_digest != self._digest_input(claim, received):
                return None
            trained = self._put_back(store, kept)
        metrics = {name: value for name, value in kept.metrics.items() if name != "private"}
        return pack_reply(message, claim, metrics, trained)

    def save(self, reply: Message, received: str) -> Saved:
        """Save a reply, and the private tensors in context.state, as this round's."""
        _, metrics = unpack_reply(reply.content)
        claim = open_client_data(self.config, self.site, self.order.client_id).claim
        private = self.context.state.array_records.get(private_key(self.order.client_id), ArrayRecord())
        tensors = views(unpack_arrays(reply.content)) | views(private)
        with self._open() as store:
            return store.save_model_chunks(
                tensors,
                self.order.server_round,
                metrics | ({"private": sorted(private)} if private else {}),
                config_digest=config_digest(self.config),
                input_digest=self._digest_input(claim, received),
                pinned=(self.order.accepted_round,) if private else (),
            )

    def _open(self) -> ChunkManager:
        cut = self.config.checkpoint
        return ChunkManager(self.path, cut.keep_rounds, cut.chunk_bytes, cut.chunk_num)

    def _put_back(self, store: ChunkManager, kept: Round) -> ArrayRecord:
        """Load a round, leave its private tensors in context.state, and return the others."""
        tensors = store.reconstruct_model_from_chunks(kept.round)
        arrays = {key: pack(tensor.numpy()) for key, tensor in tensors.items()}
        private = {key: arrays.pop(key) for key in kept.metrics.get("private", [])}
        if private:
            self.context.state[private_key(self.order.client_id)] = ArrayRecord(private)
        return ArrayRecord(arrays)

    def _digest_input(self, claim: Claim, received: str) -> str:
        """Return the SHA-256 of what this round's training starts from, besides the settings."""
        order = self.order
        facts: list[str | int] = [received, order.base, order.accepted_round, order.source_digest]
        facts += [claim.shard_digest, claim.train, claim.versions]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def digest_received(message: Message) -> str:
    """Return the digest of the model in a message."""
    return digest_of(views(unpack_arrays(message.content)))
