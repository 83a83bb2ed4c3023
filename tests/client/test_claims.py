"""A node answers an attest message with columns of claims. Columns that do not fit together are refused."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from flapp.messages import (
    ATTEST,
    CLAIMS,
    LONGEST_TEXT,
    MOST_CLASSES,
    Claim,
    MessageError,
    pack_claims,
    unpack_claims,
)
from tests.support.replies import set_claim

THREE = [
    Claim("0", 5, 1, 2, (2, 0, 3), "a" * 64, "b" * 64, "c" * 64, "Python 3"),
    Claim("1", fault="its data is missing"),
    Claim("2", 4, 0, 1, (4, 0, 0), "d" * 64, "b" * 64, "c" * 64, "Python 3"),
]
Change = Callable[[RecordDict], object]


def answer(claims: list[Claim]) -> RecordDict:
    """Return what a node with these clients answers."""
    return pack_claims(Message(RecordDict(), dst_node_id=1, message_type=ATTEST), claims).content


def column(name: str, value: Any) -> Change:
    """Replace a column, all of it."""
    return lambda content: content.config_records[CLAIMS].update({name: value})


def entry(name: str, value: Any) -> Change:
    """Change one client's claim."""
    return lambda content: set_claim(content, "2", **{name: value})


def without(name: str) -> Change:
    return lambda content: content.config_records[CLAIMS].pop(name)


def test_claims_arrive_as_they_were_sent() -> None:
    assert unpack_claims(answer(THREE), 3) == THREE
    assert unpack_claims(answer([]), 3) == []


HISTOGRAM = "a label histogram that is not of counts"
LONG = "x" * (LONGEST_TEXT + 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *(
            (column("train", wrong), "mistyped entry: train")
            for wrong in ([5, 0], [5, 0, 4, 4], [5.0, 0.0, 4.0], [True, False, True], 5)
        ),
        (column("val", ["1", "0", "0"]), "mistyped entry: val"),
        (column("shard-digest", [1, 2, 3]), "mistyped entry: shard_digest"),
        (column("fault", ["", ""]), "mistyped entry: fault"),
        (column("client-id", ["0", "1", "2", "3"]), HISTOGRAM),
        *(
            (column("classes", wrong), HISTOGRAM)
            for wrong in ([3, 3], [3, 0, 4], [3, 0, 2], [4, -1, 3], [3.0, 0.0, 3.0], 6)
        ),
        *(
            (column("label-hist", wrong), HISTOGRAM)
            for wrong in ([2, 0, 3, 4, 0], [2.0, 0.0, 3.0, 4.0, 0.0, 0.0], ["a"] * 6, 6)
        ),
        (entry("label_hist", [-1, 5, 0]), HISTOGRAM),
        (entry("label_hist", [0] * (MOST_CLASSES + 1)), HISTOGRAM),
        *(
            (entry(name, LONG), f"a {name} of over 500 characters")
            for name in ("client_id", "shard_digest", "base_digest", "source_digest", "versions")
        ),
        *(
            (without(name.replace("_", "-")), f"a missing or foreign entry: {name}")
            for name in ("val", "client_id", "classes")
        ),
        (column("x" * 10**5, [1, 2, 3]), "a missing or foreign entry: xxx"),
        (column("\x1b[2Jghost", [1, 2, 3]), r"a missing or foreign entry: \\x1b\[2Jghost"),
        (lambda content: content.update({"claim-0": ConfigRecord()}), "1 records that are not claims, such as claim-0"),
        (lambda content: content.update({"arrays": ArrayRecord({"w": Array(np.zeros(9))})}), "such as arrays"),
        (lambda content: content.pop(CLAIMS), "carries no claims"),
        (lambda content: content.update({CLAIMS: MetricRecord()}), "carries no claims"),
    ],
)
def test_columns_that_are_not_of_claims_are_refused_by_name(change: Change, reason: str) -> None:
    content = answer(THREE)
    change(content)
    with pytest.raises(MessageError, match=reason) as caught:
        unpack_claims(content, 4)
    assert len(str(caught.value)) < 700
    assert str(caught.value).isprintable()


def test_a_node_cannot_claim_more_clients_than_the_run_has() -> None:
    claims = [Claim(str(i), train=5) for i in range(9)]
    assert len(unpack_claims(answer(claims), 9)) == 9
    with pytest.raises(MessageError, match="claims 9 clients, the run has 4"):
        unpack_claims(answer(claims), 4)


def test_faults_are_cut_to_one_printable_line() -> None:
    (claim,) = unpack_claims(answer([Claim("0", fault="\x1b[2J\nbroken " + "x" * 10**5)]), 1)
    assert claim.fault.isprintable()
    assert claim.fault.startswith("\\x1b[2J broken xxx")
    assert len(claim.fault) <= LONGEST_TEXT


def test_the_time_to_read_claims_grows_with_their_number_and_not_with_its_square() -> None:
    def seconds(count: int) -> float:
        claims = [Claim(str(i), 10, 0, 2, (1,) * 10, "a" * 64, "", "c" * 64, "Python 3") for i in range(count)]
        content = answer(claims)
        started = time.process_time()
        assert unpack_claims(content, count) == claims
        return time.process_time() - started

    few, many = (min(seconds(count) for _ in range(3)) for count in (500, 8_000))
    assert many < 64 * few  # 16 times as many; the square would be 256
