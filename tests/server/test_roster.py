"""The roster: who is in, and what it costs to look again."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import pytest
from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from flapp.custom import source_digest
from flapp.messages import Claim, pack_claims
from flapp.server.roster import Roster

EXPECTED = [str(i) for i in range(6)]


def claim_of(name: str) -> Claim:
    return Claim(name, train=5, val=0, test=1, label_hist=(3, 2), shard_digest=name * 64, source_digest=source_digest())


class Nodes:
    """What a roster needs of a grid: nodes, each of which answers with its claims. `asked` notes who was asked."""

    def __init__(self, **claims: list[Claim] | None) -> None:
        self.claims = {int(name.removeprefix("n")): found for name, found in claims.items()}
        self.asked: list[int] = []

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node_id) for node_id in self.claims]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self.answer(message) for message in messages]

    def answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        self.asked.append(node_id)
        message.metadata.__dict__["_message_id"] = f"message-{len(self.asked)}"
        claims = self.claims[node_id]
        if claims is None:
            return Message(Error(code=1, reason="out of order"), reply_to=message)
        return pack_claims(message, claims)


@pytest.fixture
def nodes() -> Nodes:
    """Return three nodes with two clients each."""
    return Nodes(**{f"n{i}": [claim_of(str(2 * i)), claim_of(str(2 * i + 1))] for i in range(3)})


def gather(nodes: Nodes, expected: list[str] = EXPECTED, **options: Any) -> Roster:
    roster = Roster(cast(Grid, nodes), expected, classes=2, **options)
    roster.refresh()
    return roster


def test_looking_again_does_no_work_when_no_node_came_or_went(nodes: Nodes) -> None:
    roster = gather(nodes, [*EXPECTED, "6"])
    assert sorted(nodes.asked) == [0, 1, 2]
    held, missing, drawn = roster.members, roster.missing(), roster.sample(1.0, 0)
    checked: list[Claim] = []
    roster.check_claim = lambda claim: checked.append(claim)  # type: ignore[func-returns-value]
    for _ in range(3):
        roster.refresh()
    assert len(nodes.asked) == 3
    assert checked == []
    assert roster.members is held  # nor is it made anew
    assert roster.missing() is missing
    assert missing == ["6"]
    assert roster.sample(1.0, 0) == drawn


def test_what_is_refused_is_neither_asked_again_nor_missing_nor_drawn(nodes: Nodes) -> None:
    nodes.claims[7] = None
    assert nodes.claims[2] is not None
    nodes.claims[2][0] = replace(claim_of("4"), fault="its data is missing")
    roster = gather(nodes)
    assert roster.refused == {"node 7": "out of order", "4": "its data is missing"}
    roster.refresh()
    assert len(nodes.asked) == 4
    assert roster.missing() == []
    assert roster.sample(1.0, 0) == ["0", "1", "2", "3", "5"]


def test_clients_whose_node_left_are_missing_and_not_drawn_until_it_is_back(nodes: Nodes) -> None:
    roster = gather(nodes)
    assert roster.missing() == []
    before = [roster.sample(0.5, "seed", server_round) for server_round in range(20)]
    gone = nodes.claims.pop(1)
    roster.refresh()
    assert roster.missing() == ["2", "3"]
    assert roster.members.keys() == {"0", "1", "4", "5"}
    drawn = [roster.sample(0.5, "seed", server_round) for server_round in range(20)]
    assert all(len(names) == 3 for names in drawn)  # half of all that are expected
    assert {name for names in drawn for name in names} == {"0", "1", "4", "5"}
    assert roster.sample(1.0, "seed") == ["0", "1", "4", "5"]
    nodes.claims[1] = gone
    roster.refresh()
    assert nodes.asked.count(1) == 2
    assert roster.missing() == []
    assert [roster.sample(0.5, "seed", server_round) for server_round in range(20)] == before
    nodes.claims.clear()
    roster.refresh()
    assert roster.missing() == EXPECTED
    assert roster.sample(1.0, 0) == []


def test_two_nodes_with_one_client_id_are_both_left_out_and_the_rest_goes_on(nodes: Nodes) -> None:
    nodes.claims[7] = [claim_of("4")]
    roster = gather(nodes)
    assert roster.refused == {"4": "2 nodes claim this client id: give each site its own"}
    assert roster.members.keys() == {"0", "1", "2", "3", "5"}


def test_of_two_claims_for_one_id_a_faulty_one_does_not_keep_the_sound_one_out(nodes: Nodes) -> None:
    nodes.claims[7] = [replace(claim_of("4"), fault="its data is missing")]
    roster = gather(nodes)
    assert roster.refused == {}
    assert roster.node_of("4", 0) == 2


def test_a_site_that_comes_back_as_a_new_node_is_let_in_once_its_old_node_is_gone(nodes: Nodes) -> None:
    roster = gather(nodes)
    nodes.claims[7] = nodes.claims[2]
    roster.refresh()
    assert "claims client 5, which another node already has" in roster.refused["node 7"]
    assert roster.node_of("5", 0) == 2
    del nodes.claims[2]
    roster.refresh()
    assert (roster.refused, roster.missing()) == ({}, [])
    assert [roster.node_of(name, 0) for name in "45"] == [7, 7]


def test_only_nodes_that_are_there_serve_clients(nodes: Nodes) -> None:
    roster = gather(nodes, any_node=True)
    assert [roster.node_of("0", index) for index in range(4)] == [0, 1, 2, 0]
    del nodes.claims[1]
    roster.refresh()
    assert [roster.node_of("0", index) for index in range(4)] == [0, 2, 0, 2]
    own = gather(nodes)
    assert [own.node_of(name, 1) for name in "0145"] == [0, 0, 2, 2]


def test_a_claim_without_a_histogram_is_refused(nodes: Nodes) -> None:
    nodes.claims[0] = [replace(claim_of("0"), label_hist=()), claim_of("1")]
    assert gather(nodes).refused == {"0": "claims a histogram of 0 classes, the dataset has 2"}


def test_a_node_with_unreadable_claims_keeps_only_its_own_clients_out(nodes: Nodes) -> None:
    assert nodes.claims[0] is not None
    nodes.claims[0].append(replace(claim_of("0"), versions="v" * 501))
    roster = gather(nodes)
    assert roster.members.keys() == {"2", "3", "4", "5"}
    assert roster.missing() == ["0", "1"]
    assert "a versions of over 500 characters" in roster.refused["node 0"]
