"""The in-process grid: the real ServerApp, strategy and ClientApp, without processes in between."""

import copy
import itertools
import json
import logging.config
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity
from hydra._internal import config_loader_impl as loader
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from flapp import client_app, groups, server_app
from flapp.config.load import CONF, compose, to_json
from flapp.config.schema import Config, ConfigError
from flapp.data.shards.build import write_shards
from flapp.data.shards.manifest import Manifest
from flapp.messages import INSTRUCTIONS
from flapp.server.inline import InlineGrid
from flapp.strategy.fedavg import FedAvg
from tests.support.leaf_files import Samples, as_leaf, draw_samples, write_leaf
from tests.support.refusals import refused

Tamper = Callable[[str, Message], Message]
Federate = Callable[..., tuple[dict[str, Any], Path]]  # what the fixture `federate` gives


class LocalGrid(InlineGrid):
    """Handle all messages in this process when replies are pulled, and return the replies in a random order.

    tamper(client_id, reply) may change each reply on its way to the server; names and keys are those under which nodes
    are registered. Each node serves its own clients, as in a deployment; with any_node, each serves all clients, as in
    a simulation.
    """

    clients_here = False  # a test may give each node a home of its own

    def __init__(
        self,
        run_config: dict[str, Any],
        nodes: list[dict[str, Any]],
        order: int = 0,
        tamper: Tamper | None = None,
        names: list[str] | None = None,
        keys: list[bytes] | None = None,
        any_node: bool = False,
    ) -> None:
        super().__init__(run_config, ())
        self.any_node = any_node
        self.random = random.Random(order)
        self.nodes = {self.random.randrange(1, 1 << 62): node for node in nodes}
        self.names = dict(zip(self.nodes, names or [], strict=False))
        self.keys = dict(zip(self.nodes, keys or [], strict=False))
        self.tamper = tamper
        self.sent: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        self.sent += pushed
        return super().push_messages(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        pulled = [reply for _ in ids for reply in InlineGrid.pull_messages(self, ids)]  # each call handles one
        self.random.shuffle(pulled)
        return pulled

    def handle(self, message: Message) -> Message:
        reply = super().handle(message)
        if self.tamper is not None:
            client_id = message.content.config_records[INSTRUCTIONS]["client-id"]
            reply = self.tamper(str(client_id), reply)
            reply.metadata.__dict__["_reply_to_message_id"] = message.metadata.message_id
        return reply

    def get_nodes(self) -> Iterable[NodeInfo]:
        names, keys = self.names, self.keys
        ids = self.get_node_ids()
        return [NodeInfo(node_id=i, name=names.get(i, ""), public_key=keys.get(i, b"")) for i in ids]


def run_app(settings: Config, grid: InlineGrid) -> tuple[dict[str, Any], Path]:
    """Run the ServerApp with these settings over a grid, and return (metrics.json, run directory)."""
    grid.run_config = {"config-json": to_json(settings)}
    server_app.app(grid, Context(1, 1, {}, RecordDict(), grid.run_config))
    path = settings.runs_dir / settings.run_name
    return json.loads((path / "metrics.json").read_text()), path


def refusal_of(overrides: list[str]) -> str:
    """Return the one-line error with which settings are refused."""
    with refused(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders whose tests start programs, so that with -n no process is left alone with a long file."""
    items.sort(key=lambda item: item.path.parent.name not in ("federation", "tests", "tools"))


@pytest.fixture(scope="session", autouse=True)
def keep_log_handlers() -> Iterator[None]:
    """Keep Hydra from closing every log handler of this process: closing absl's would also close pytest's output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.config, "_clearExistingHandlers", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def identify_task() -> None:
    """Give this process the identity without which Flower makes no message."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@pytest.fixture(scope="session", autouse=True)
def compose_each_choice_once() -> Iterator[None]:
    """Keep what Hydra composes from our own conf/ for each choice of files: this takes most of the time of compose.

    Other overrides are applied anew each time, and a search path with another conf/ is read each time.
    """
    list_files, compose_files = loader.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
    lists: dict[str, DefaultsList] = {}
    trees: dict[str, DictConfig] = {}

    def is_own(repository: IConfigRepository) -> bool:
        return all(source.path == str(CONF) for source in repository.get_sources() if source.scheme() == "file")

    def create_defaults_list(
        repo: IConfigRepository, config_name: str, overrides_list: list[Override], **how: bool
    ) -> DefaultsList:
        if not is_own(repo):
            return list_files(repo, config_name, overrides_list, **how)
        chosen = Overrides(repo, overrides_list)
        key = str((vars(chosen) | {"config_overrides": None}, config_name, how))
        if key not in lists:
            lists[key] = list_files(repo, config_name, overrides_list, **how)
        return replace(lists[key], config_overrides=chosen.config_overrides)

    def compose_config(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        if not is_own(repo):
            return compose_files(self, defaults, repo)
        key = str(defaults)
        if key not in trees:
            trees[key] = compose_files(self, defaults, repo)
        return copy.deepcopy(trees[key])  # because Hydra changes it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "create_defaults_list", create_defaults_list)
        patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", compose_config)
        yield


@pytest.fixture(autouse=True)
def keep_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the folders of users' own code off the import path after each test."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="session")
def data_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home shared by all tests, so that the digits are prepared once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def federate(data_home: Path) -> Federate:
    """Return a function that runs a whole federation in this process and returns (metrics.json, run directory)."""
    numbers = itertools.count()

    def run(
        *overrides: str,
        nodes: list[dict[str, Any]] | None = None,
        order: int = 0,
        tamper: Tamper | None = None,
        names: list[str] | None = None,
        keys: list[bytes] | None = None,
        any_node: bool = False,
    ) -> tuple[dict[str, Any], Path]:
        name = f"run-{next(numbers)}"
        settings = compose([f"home={data_home}", f"run_name={name}", *overrides])
        clients = settings.clients
        nodes = nodes or [{"partition-id": i, "num-partitions": clients} for i in range(clients)]
        return run_app(settings, LocalGrid({}, nodes, order, tamper, names, keys, any_node))

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list that grows by (client, round) whenever a client really trains."""
    found: list[tuple[str, int]] = []
    real = client_app.fit

    def fit(*args: Any) -> Any:
        if args[-1] == "train":
            found.append((args[1].client_id, args[1].instructions.server_round))
        return real(*args)

    monkeypatch.setattr(client_app, "fit", fit)
    return found


@pytest.fixture
def in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut clients into groups of two, as 32 or more are, so that a few clients show what groups do."""
    monkeypatch.setattr(groups, "group_size", lambda clients: 2)


class Broken(RuntimeError):
    """The error with which tests break off a run."""


def break_off(run: Callable[..., Any], server_round: int, place: str, *overrides: str) -> None:
    """Run a federation, such as by `federate`, that breaks off where its strategy calls `place` in this round."""
    real = getattr(FedAvg, place)

    def stand_in(strategy: FedAvg, *args: Any) -> Any:
        if strategy.phase.server_round == server_round:
            raise Broken("the power is gone")
        return real(strategy, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedAvg, place, stand_in)
        with pytest.raises(Broken):
            run(*overrides)


def break_and_resume(run: Federate, server_round: int, place: str, *overrides: str) -> tuple[dict[str, Any], Path]:
    """Run a federation that breaks off as in break_off, resume it, and return what the resumed run gives."""
    break_off(run, server_round, place, *overrides)
    return run(*overrides, "resume=true")


def read_lines(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind from a run directory's metrics.jsonl."""
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def read_clients(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of clients.jsonl in a run directory, by client."""
    lines = map(json.loads, (path / "clients.jsonl").read_text().splitlines())
    return {line["client"]: line for line in lines}


@pytest.fixture(scope="session")
def samples() -> Samples:
    """Return images and labels of seven writers."""
    return draw_samples(20, 12, 30, 11, 10, 16, 25)


@pytest.fixture(scope="session")
def source(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with those samples as LEAF writes them."""
    return write_leaf(tmp_path_factory.mktemp("leaf"), as_leaf(samples))


@pytest.fixture
def shards(source: Path, tmp_path: Path) -> Manifest:
    """Return the manifest of shards of three clients."""
    return write_shards(source, tmp_path / "shards", "round_robin", clients=3, seed=1)
