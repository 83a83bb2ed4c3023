"""Who may be which client: names that nodes are registered under, sites that come back, and impostors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flapp.roster import FederationError
from tests.conftest import LocalGrid, read_lines

Federate = Callable[..., tuple[dict[str, Any], Path]]
TOY = ("experiment=toy_regression", "num_rounds=2", "checkpoint=off")
SHORT = ("strategy.min_clients=2", "strategy.wait_for_clients=0.1")


def at(*ids: str) -> list[dict[str, Any]]:
    return [{"client-id": name} for name in ids]


def test_a_node_that_claims_anothers_id_is_refused_and_the_owner_takes_part(federate: Federate) -> None:
    names = ["client_0", "client_1", "client_2", "client_3"]
    honest, _ = federate(*TOY, nodes=at("0", "1", "2"), names=names[:3])
    cheated, path = federate(*TOY, nodes=at("0", "1", "2", "0"), names=names)
    assert cheated["model_sha256"] == honest["model_sha256"]
    refused = read_lines(path, "roster")[0]["refused"]
    assert refused == {"node client_3": "claims client 0, its key is registered as client_3"}


def test_an_impostor_does_not_stand_for_the_client_that_is_missing(federate: Federate) -> None:
    said = "missing after 0.1 s: 0, 2, refused: node client_2: claims client 0, its key is registered as client_2"
    with pytest.raises(FederationError, match=said):
        federate(*TOY, *SHORT[1:], nodes=at("0", "1"), names=["client_2", "client_1"])


def test_where_clients_are_named_a_node_without_a_name_is_refused(federate: Federate) -> None:
    nodes, names = at("0", "1", "2"), ["client_0", "client_1", "hospital"]
    summary, _ = federate(*TOY, nodes=nodes, names=names)
    assert summary["status"] == "finished"
    _, path = federate(*TOY, *SHORT, "deployment.named_clients=true", nodes=nodes, names=names)
    assert "flwr supernode register KEY --name client_2" in read_lines(path, "roster")[0]["refused"]["node hospital"]


def test_of_two_claims_for_one_id_a_faulty_one_does_not_keep_the_sound_one_out(federate: Federate) -> None:
    alone, _ = federate(*TOY, nodes=at("0", "1", "2"))
    nodes = [*at("0", "1", "2"), {"client-id": "2", "home": "/dev/null/home"}]
    twins, path = federate(*TOY, nodes=nodes)
    assert twins["model_sha256"] == alone["model_sha256"]
    assert read_lines(path, "roster")[0]["refused"] == {}


def test_a_site_that_comes_back_as_a_new_node_is_let_in_once_its_old_node_is_gone(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter(range(1000))

    def online(grid: LocalGrid) -> list[int]:
        *first, old, new = grid.nodes
        look = next(asked)
        return [*first, old] if look == 0 else [*first, old, new] if look == 1 else [*first, new]

    monkeypatch.setattr(LocalGrid, "get_node_ids", online)
    _, path = federate(*TOY, "evaluate.every=1", nodes=at("0", "1", "2", "2"))
    first, second = read_lines(path, "train")
    assert (first["replies"], second["replies"]) == (3, 3)
    assert [line["absent"] for line in read_lines(path, "train")] == [[], []]
