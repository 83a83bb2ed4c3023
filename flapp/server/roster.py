"""The members of the federation: the node of each client, its claim, and the clients drawn for a round.

Flower's node ids are random and differ from run to run; client ids stay. Each client is attested by one
node; a node may attest several, as in a simulation, which has fewer nodes than clients. There, any node can serve any
client once all are attested.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import Any

from flwr.app import Message
from flwr.common import log
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from flapp.base import DAMAGED, Base
from flapp.config.load import derive_seed
from flapp.config.rules import sample_size
from flapp.custom import source_digest
from flapp.listing import by_reason, list_names, name_clients
from flapp.messages import (
    ATTEST,
    BASE,
    Claim,
    Instructions,
    MessageError,
    as_record,
    describe_error,
    one_line,
    pack,
    pack_instructions,
    size_of,
    unpack_claims,
)
from flapp.model.files import to_numpy
from flapp.server.client_keys import ClientKeys
from flapp.server.journals import ClientLedger

POLL_SECONDS = 0.5
BYTES_PER_TIMEOUT = 16 << 20  # for each 16 MiB of a base, sending it may take the timeout once more


class FederationError(RuntimeError):
    """The run cannot continue; the reason is one line."""


@dataclass(frozen=True)
class Member:
    """A client that was let in: its claim, and the node that speaks for it."""

    claim: Claim
    node_id: int


@dataclass(eq=False)
class Roster:
    """Attest nodes as they come and keep the clients that may take part.

    expected: the ids of all clients of this run; classes: of the dataset, 0 for regression; check_claim: returns what
    is wrong with a claim, or None; strict: refuse a client with such a fault, instead of only warning; timeout: seconds
    for an answer to attest; base: the frozen tensors, sent to clients that lack them; keys: each client's pinned key.
    With keys, a node is the client whose key it has; a node with any other key is refused, and is sent nothing.
    ledger: compares and records the data of clients that join; any_node: whether any node can serve any client;
    code: the digest of the user's own code; tell: returns what may be told of a reason.
    `members` maps client id to Member, `refused` maps a client or a node to the reason, `warnings` maps clients that
    were let in to what is odd about them.
    """

    grid: Grid
    expected: Sequence[str]
    classes: int
    check_claim: Callable[[Claim], str | None] = lambda claim: None
    strict: bool = True
    timeout: float = 120.0
    base: Base | None = None
    keys: ClientKeys | None = None
    ledger: ClientLedger | None = None
    any_node: bool = False
    code: str = ""
    tell: Callable[[str], str] = lambda reason: reason
    members: dict[str, Member] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base_digest = self.base.digest if self.base else ""
        if keys := self.keys:
            fix = "has no pinned key: copy its site.pub to"
            self.refused |= {name: f"{fix} {keys.path(name)}" for name in self.expected if name not in keys}
        self._known = frozenset(self.expected)
        self._reported: dict[str, str] = {}  # the refused as metrics.jsonl has them
        self._nodes: dict[int, NodeInfo] = {}  # those online by id, sorted
        self._asked: set[int] = set()  # the nodes that were asked who they are
        self._rivals: dict[int, str] = {}  # nodes that claim a client that another node has
        self._present: list[str] = []  # the ids of members, sorted
        self._missing = [name for name in self.expected if name not in self.refused]

    def refresh(self) -> None:
        """Drop clients whose node has left, and attest nodes that are new or claim the id of a client that has left."""
        online = {node.node_id: node for node in self.grid.get_nodes()}
        if online.keys() == self._nodes.keys() == self._asked and not self._rivals:
            return
        self.members = {name: member for name, member in self.members.items() if member.node_id in online}
        self._nodes = {node_id: online[node_id] for node_id in sorted(online)}
        self._asked -= {node_id for node_id, name in self._rivals.items() if name not in self.members}
        self._asked &= online.keys()
        self._rivals = {node_id: name for node_id, name in self._rivals.items() if node_id in self._asked}
        if new := [node_id for node_id in self._nodes if node_id not in self._asked]:
            self._attest_new(new)
        self._present = sorted(self.members)
        self._missing = [name for name in self.expected if name not in self.members and name not in self.refused]

    def _attest_new(self, new: Sequence[int]) -> None:
        """Ask nodes who they are, send the base to those that lack it, and let in whoever may take part."""
        self._asked.update(new)
        found = self._attest([node_id for node_id in new if self._is_known(node_id)])
        if self.base and (lacking := sorted({member.node_id for member in found if _lacks_base(member.claim)})):
            self._send_base(lacking)
            again = self._attest(lacking)
            found = [member for member in found if member.node_id not in lacking] + again
            self._asked -= {m.node_id for m in again if _lacks_base(m.claim)}  # the next refresh sends it again
        self._admit(found)

    def wait(self, seconds: float, min_clients: int | None) -> None:
        """Wait until every expected client has been let in or refused; raises FederationError after `seconds`.

        With min_clients, that many are enough when the time is over; without it, nobody may be missing.
        """
        end = time.monotonic() + seconds
        self.refresh()
        while self.missing() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            self.refresh()
        if self.ledger:
            self.ledger.refuse_changes(self.members)
        if self.members and (not self.missing() if min_clients is None else len(self.members) >= min_clients):
            return
        told = {name: self.tell(reason) for name, reason in self.refused.items()}
        reasons = [by_reason(told)] if told else []
        if self.missing():
            reasons.append(f"missing after {seconds:g} s: {name_clients(self.missing())}")
        joined = f"{len(self.members)} of {len(self.expected)} clients joined"
        raise FederationError(f"the run cannot start: {'; '.join(reasons)} ({joined})")

    def missing(self) -> list[str]:
        """Return the expected clients that were neither let in nor refused."""
        return self._missing

    def facts(self) -> dict[str, Any]:
        """Return the values of the line `roster` in metrics.jsonl: how many clients are in, and who was refused."""
        self._reported = dict(self.refused)
        facts = {"clients": len(self.members), "refused": self.refused, "warnings": self.warnings}
        return facts | {"source_digest": source_digest()}

    def refusals_changed(self) -> bool:
        """Say whether the refused have changed since the last call of this or of `facts`."""
        changed = self._reported != self.refused
        self._reported = dict(self.refused)
        return changed

    def sample(self, fraction: float, *seed: object) -> list[str]:
        """Draw a fraction of all expected clients from those present, sorted by id; the same seed draws the same."""
        count = min(sample_size(fraction, len(self.expected)), len(self._present))
        return sorted(random.Random(derive_seed(*seed)).sample(self._present, count))

    def draw(self, probability: float, generator: random.Random) -> list[str]:
        """Draw every expected client with this probability, independently, and return those present, sorted by id."""
        drawn = {name for name in self.expected if generator.random() < probability}
        return [name for name in self._present if name in drawn]

    def order(self, server_round: int, **rest: Any) -> Instructions:
        """Return the instructions of a round, without the fields of a single client; rest: as in Instructions."""
        return Instructions("", server_round, source_digest(), base=self.base_digest, code=self.code, **rest)

    def node_of(self, client_id: str, index: int) -> int:
        """Return the node that serves a member; in a simulation they take turns by the index of the message."""
        if self.any_node:
            return list(self._nodes)[index % len(self._nodes)]
        return self.members[client_id].node_id

    def _attest(self, node_ids: list[int]) -> list[Member]:
        messages = [pack_instructions(node_id, ATTEST, self.order(0)) for node_id in node_ids]
        silent = {f"node {node_id}": f"gave no answer in {self.timeout:g} s" for node_id in node_ids}
        found: list[Member] = []
        for node_id, reply in self._answers(messages):
            silent.pop(f"node {node_id}", None)
            try:
                if reply.has_error():
                    raise MessageError(describe_error(reply.error))
                found += [Member(claim, node_id) for claim in unpack_claims(reply.content, len(self.expected))]
            except MessageError as error:
                self.refused[f"node {node_id}"] = str(error)
        self.refused |= silent
        return found

    def _answers(self, messages: list[Message], share: int = 1) -> list[tuple[int, Message]]:
        """Send messages and return the answers that come within `share` times the timeout, each with the node asked.

        Flower itself answers for nodes that left.
        """
        replies = self.grid.send_and_receive(messages, timeout=self.timeout * share)
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        return [(asked[reply.metadata.reply_to_message_id], reply) for reply in replies]

    def _send_base(self, node_ids: list[int]) -> None:
        """Send the base to nodes that lack it; failures show when the nodes are attested again."""
        assert self.base is not None
        log(INFO, "sending base %s to %d nodes", self.base_digest[:12], len(node_ids))
        arrays = as_record({key: pack(to_numpy(tensor)) for key, tensor in self.base.tensors.items()})
        sent = [pack_instructions(node_id, BASE, self.order(0), arrays) for node_id in node_ids]
        for node_id, reply in self._answers(sent, share=1 + size_of(arrays) // BYTES_PER_TIMEOUT):
            if reply.has_error():
                log(WARNING, "node %d did not take the base: %s", node_id, self.tell(describe_error(reply.error)))

    def _admit(self, found: list[Member]) -> None:
        """Accept expected clients with valid claims; if two new nodes claim the same id, accept neither."""
        for member in found:
            self.refused.pop(f"node {member.node_id}", None)  # it may have failed to answer before
        sound = [member for member in found if self._is_sound(member)]
        claimed = Counter(member.claim.client_id for member in sound)
        for member in sound:
            name = member.claim.client_id
            if name in self.members:
                self.refused[f"node {member.node_id}"] = f"claims client {name}, which another node already has"
                self._rivals[member.node_id] = name
            elif claimed[name] > 1:
                self.refused[name] = f"{claimed[name]} nodes claim this client id: give each site its own"
            else:
                self.members[name] = member
                self.refused.pop(name, None)
        if self.ledger:
            self.ledger.record({name: member.claim for name, member in self.members.items()})

    def _is_sound(self, member: Member) -> bool:
        """Say whether a claim has no fault and its node may make it; record the reason if not."""
        name, node = member.claim.client_id, member.node_id
        if self.keys and name != (owner := self.keys.owner(self._nodes[node].public_key)):
            self.refused[f"node {node}"] = f"claims client {one_line(name)} with the key pinned for client {owner}"
            return False
        if name not in self._known:
            clients = f"{len(self.expected)} clients of this run ({list_names(self.expected)})"
            fault = member.claim.fault or f"is not one of the {clients}"
            self.refused[f"node {node}"] = f"client {one_line(name)}: {fault}"
            return False
        reason = self._fault(member.claim)
        if reason is None and (doubt := self.check_claim(member.claim)):
            if not self.strict:
                self.warnings[name] = doubt
                log(WARNING, "client %s: %s", name, self.tell(doubt))
                return True
            reason = doubt
        if reason is not None:
            self.refused[f"node {node}" if name in self.members else name] = reason
        return reason is None

    def _is_known(self, node_id: int) -> bool:
        """Say whether a node may be asked who it is: its key must be pinned, if keys are. Record the reason if not."""
        node = self._nodes[node_id]
        if self.keys is None or self.keys.owner(node.public_key) is not None:
            return True
        name = node.name.removeprefix("client_")
        if node.name.startswith("client_") and name in self.keys:
            pinned = self.keys.path(name)
            reason = f"is registered as client {name} with a different key from the one pinned in {pinned}"
        else:
            reason = f"has a key that is pinned for no client in {self.keys.folder}"
        self.refused[f"node {node_id}"] = reason
        return False

    def _fault(self, claim: Claim) -> str | None:
        if claim.fault:
            return claim.fault
        if claim.source_digest != source_digest():
            return f"runs other source ({claim.source_digest[:12]}) than the server ({source_digest()[:12]})"
        if claim.base_digest != self.base_digest:
            own, found = self.base_digest, claim.base_digest[:12]
            if not found:
                return f"did not receive base {own[:12]}: see its own log; the server soon sends it again"
            fix = f"remove models/{own} from its home and restart the client, which then receives it again"
            if claim.base_digest == DAMAGED:
                return f"holds base {own[:12]} in a damaged file: {fix}"
            return f"holds base {found} of the model, the server's is {own[:12]}: {fix}"
        if claim.train < 1 or claim.val < 0 or claim.test < 0:
            return f"has {claim.train} training, {claim.val} validation and {claim.test} test samples"
        if len(claim.label_hist) != self.classes:
            return f"claims a histogram of {len(claim.label_hist)} classes, the dataset has {self.classes}"
        if claim.label_hist and sum(claim.label_hist) != claim.train:
            return f"claims {claim.train} training samples but a histogram of {sum(claim.label_hist)}"
        return self.ledger.find_fault(claim.client_id, claim.shard_digest) if self.ledger else None


def _lacks_base(claim: Claim) -> bool:
    return not claim.fault and not claim.base_digest
