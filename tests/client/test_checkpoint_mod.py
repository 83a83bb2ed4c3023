"""checkpoint_mod: what a client trained is kept as it was sent, and what it keeps to itself comes back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict

from flapp.checkpoint.chunks import CheckpointError
from flapp.checkpoint.manager import ChunkManager
from flapp.client.data import open_client_data
from flapp.client.mods import checkpoint_mod
from flapp.client.store import private_key
from flapp.config.load import compose, to_json
from flapp.config.schema import Config, NodeConfig
from flapp.messages import EVALUATE, TRAIN, Instructions, pack_instructions, pack_reply, source_digest, unpack_arrays


@pytest.fixture
def settings(data_home: Path, tmp_path: Path) -> Config:
    """Return the settings of a toy run whose stores lie in this test's folder."""
    return compose([f"home={data_home}", "experiment=toy_regression", "run_name=mod", "checkpoint.chunk_num=null"])


def model(value: float) -> ArrayRecord:
    return ArrayRecord({"weight": Array(np.full((3, 2), value, np.float32)), "steps": Array(np.array(7))})


class Client:
    """A client whose app adds 1 to the model, and `private` to what it keeps to itself."""

    def __init__(self, settings: Config, folder: Path, private: bool = False) -> None:
        self.settings = settings
        self.node_config: dict[str, Any] = {"client-id": "0", "checkpoint-dir": str(folder)}
        self.private = private
        self.base = ""
        self.calls = 0
        self.seen: float | None = None
        self.path = folder / "mod" / "client_0" / "client_0_chunks.db"

    def ask(self, server_round: int, value: float, accepted: int = 0, kind: str = TRAIN, fail: bool = False) -> Message:
        """Send one message as a process of its own would get it: with an empty context."""
        private = ("own",) if self.private else ()
        asked = Instructions("0", server_round, source_digest(), accepted, self.base, private=private)
        message = pack_instructions(1, kind, asked, model(value))
        message.metadata.__dict__["_message_id"] = "1"
        run_config = {"config-json": to_json(self.settings)}
        context = Context(1, 1, self.node_config, RecordDict(), run_config)

        def app(message: Message, context: Context) -> Message:
            self.calls += 1
            if fail:
                return Message(Error(code=1, reason="no"), reply_to=message)
            kept = context.state.array_records.get(private_key("0"))
            self.seen = None if kept is None else float(kept["own"].numpy()[0])
            if self.private and kind == TRAIN:
                own = (self.seen or 0.0) + server_round
                context.state[private_key("0")] = ArrayRecord({"own": Array(np.array([own], np.float32))})
            claim = open_client_data(self.settings, NodeConfig(client_id="0"), "0").claim
            received = unpack_arrays(message.content)["weight"].numpy()
            trained = ArrayRecord({"weight": Array(received + 1), "steps": Array(np.array(8))})
            return pack_reply(message, claim, {"num-examples": 5, "train-loss": 0.1 + server_round}, trained)

        return checkpoint_mod(message, context, app)


@pytest.fixture
def client(settings: Config, tmp_path: Path) -> Client:
    return Client(settings, tmp_path)


@pytest.fixture
def private(settings: Config, tmp_path: Path) -> Client:
    """Return a client that keeps tensors to itself."""
    return Client(settings, tmp_path, private=True)


def values(reply: Message) -> dict[str, list[Any]]:
    return {key: array.numpy().tolist() for key, array in unpack_arrays(reply.content).items()}


def test_the_store_holds_what_was_sent_to_the_bit(client: Client) -> None:
    reply = client.ask(1, 0.1)
    with ChunkManager(client.path, create=False) as store:
        kept = store.reconstruct_model_from_chunks(1)
        assert store.rounds()[0].metrics == {"num-examples": 5, "train-loss": 1.1}
    for key, array in unpack_arrays(reply.content).items():
        assert kept[key].numpy().tobytes() == array.numpy().tobytes()
        assert kept[key].numpy().dtype == array.numpy().dtype


def test_the_same_message_again_is_answered_from_the_store(client: Client) -> None:
    first, again = client.ask(1, 0.1), client.ask(1, 0.1)
    assert client.calls == 1
    assert values(again) == values(first)
    assert again.content.metric_records == first.content.metric_records
    assert again.content.config_records == first.content.config_records


@pytest.mark.parametrize(
    "change",
    [
        lambda client: client.ask(1, 0.2),
        lambda client: client.ask(2, 0.1),
        lambda client: client.ask(1, 0.1, accepted=1),
        lambda client: (setattr(client, "settings", replace(client.settings, seed=9)), client.ask(1, 0.1)),
        lambda client: (setattr(client, "base", "f" * 64), client.ask(1, 0.1)),
    ],
    ids=["model", "round", "accepted round", "settings", "base"],
)
def test_another_message_is_trained(client: Client, change: Callable[[Client], object]) -> None:
    client.ask(1, 0.1)
    change(client)
    assert client.calls == 2


def test_private_state_is_put_back_as_of_the_round_that_the_server_took(private: Client) -> None:
    private.ask(1, 0.0)  # own = 1
    private.ask(2, 1.0, accepted=1)  # own = 3; the server never gets this one
    private.ask(3, 1.0, accepted=1)
    assert private.seen == 1.0
    private.ask(4, 2.0, accepted=3)
    assert private.seen == 4.0
    private.ask(4, 2.0, accepted=4, kind=EVALUATE)
    assert private.seen == 8.0
    private.ask(5, 0.0, accepted=0)
    assert private.seen is None


def test_retention_never_drops_the_private_state_that_the_server_counts_on(settings: Config, tmp_path: Path) -> None:
    client = Client(replace(settings, checkpoint=replace(settings.checkpoint, keep_rounds=1)), tmp_path, private=True)
    client.ask(1, 0.0)
    for number in (2, 3, 4):
        client.ask(number, float(number), accepted=1)
        assert client.seen == 1.0


def test_a_failed_reply_an_evaluation_and_checkpoint_off_leave_no_store(client: Client, settings: Config) -> None:
    client.ask(1, 0.1, fail=True)
    client.ask(1, 0.1, kind=EVALUATE)
    client.settings = replace(settings, checkpoint=replace(settings.checkpoint, enabled=False))
    client.ask(1, 0.1)
    client.ask(1, 0.1)
    assert client.calls == 4
    assert not client.path.exists()


def test_a_store_that_cannot_be_written_is_a_warning_or_the_clients_failure(client: Client, settings: Config) -> None:
    client.path.mkdir(parents=True)  # a folder where the database should be
    assert values(client.ask(1, 0.0))["weight"] == [[1.0, 1.0]] * 3
    client.private = True  # it always fails, or the server would count on what is not kept
    with pytest.raises(CheckpointError, match=r"client_0_chunks\.db"):
        client.ask(1, 0.0)
    client.private = False
    client.settings = replace(settings, checkpoint=replace(settings.checkpoint, on_error="fail"))
    with pytest.raises(CheckpointError, match=r"client_0_chunks\.db"):
        client.ask(1, 0.0)


def test_private_state_of_another_run_of_that_name_is_not_taken(private: Client, settings: Config) -> None:
    private.ask(1, 0.0)
    private.settings = replace(settings, seed=9)
    private.ask(2, 0.0, accepted=1)
    assert private.seen is None
