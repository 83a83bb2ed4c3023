"""Who may be which client: keys that are pinned, intruders, and sites that leave and come back."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from flapp.config.load import compose, differences, to_json
from flapp.config.schema import ConfigError
from flapp.server.client_keys import ClientKeys
from flapp.server.roster import FederationError
from tests.conftest import Federate, LocalGrid, read_lines
from tests.support.federations import sites
from tools.certificates import make_site_keys
from tools.deployment.submit import failure, refusals

TOY = ("experiment=toy_regression", "num_rounds=2", "checkpoint=off", "deployment=local")
SHORT = ("strategy.min_clients=2", "strategy.wait_for_clients=0.1")


def make_key(path: Path) -> bytes:
    """Make a site's key pair, leave its site.pub at `path`, and return the public key as Flower sends it."""
    make_site_keys(path.parent / "made" / path.name)
    content = (path.parent / "made" / path.name / "site.pub").read_bytes()
    path.write_bytes(content)
    return load_ssh_public_key(content).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    (tmp_path / "keys").mkdir()
    return tmp_path / "keys"


@pytest.fixture
def own(pins: Path) -> list[bytes]:
    """Return the keys of clients "0" to "2", pinned."""
    return [make_key(pins / f"client_{i}.pub") for i in range(3)]


@pytest.fixture
def stolen(tmp_path: Path) -> bytes:
    """Return a key that is pinned for nobody."""
    return make_key(tmp_path / "intruder.pub")


@pytest.fixture(scope="module")
def honest(federate: Federate) -> str:
    """Return the SHA-256 of the model that clients "0" to "2" train."""
    return str(federate(*TOY, nodes=sites("012"))[0]["model_sha256"])


def pinned(pins: Path) -> tuple[str, ...]:
    return (*TOY, f"deployment.client_keys={pins}")


def nodes_of(path: Path) -> dict[str, str]:
    """Return whom the run's summary says it refused."""
    return json.loads((path / "metrics.json").read_text())["refused"]


@pytest.mark.parametrize("place", [0, 3], ids=["first", "last"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("named", "is registered as client 0 with a different key from the one pinned in {pins}/client_0.pub"),
        ("unnamed", "has a key that is pinned for no client in {pins}"),
        ("another client", "claims client 0 with the key pinned for client 3"),
    ],
)
def test_who_claims_to_be_another_client_is_refused_and_the_holder_of_the_key_takes_part(
    federate: Federate,
    monkeypatch: pytest.MonkeyPatch,
    pins: Path,
    own: list[bytes],
    stolen: bytes,
    honest: str,
    place: int,
    kind: str,
    reason: str,
) -> None:
    grids = []
    push = LocalGrid.push_messages
    monkeypatch.setattr(LocalGrid, "push_messages", lambda grid, sent: (grids.append(grid), push(grid, sent))[1])
    key = make_key(pins / "client_3.pub") if kind == "another client" else stolen
    keys, names = list(own), ["client_0", "client_1", "client_2"]
    keys.insert(place, key)
    names.insert(place, "client_0")
    ids = ["0", "1", "2"]
    ids.insert(place, "0")
    summary, path = federate(*pinned(pins), nodes=sites(ids), keys=keys, names=names if kind == "named" else None)
    assert summary["model_sha256"] == honest
    (intruder,) = (node for node, held in grids[0].keys.items() if held == key)
    refused = {f"node {intruder}": reason.format(pins=pins)}
    assert nodes_of(path) == read_lines(path, "roster")[0]["refused"] == refused
    assert refusals(summary) == f"refused: node {intruder}: {reason.format(pins=pins)}"
    asked = {message.metadata.dst_node_id for message in grids[0].sent}
    assert (intruder in asked) == (kind == "another client")  # the others are sent nothing at all


@pytest.mark.slow
def test_without_its_holder_a_client_is_missing_and_not_the_intruder(
    federate: Federate, pins: Path, own: list[bytes], stolen: bytes
) -> None:
    two, _ = federate(*TOY, *SHORT, nodes=sites("12"))
    nodes, keys, names = sites("012"), [stolen, *own[1:]], ["client_0", "client_1", "client_2"]
    summary, path = federate(*pinned(pins), *SHORT, nodes=nodes, keys=keys, names=names)
    assert summary["model_sha256"] == two["model_sha256"]
    assert [line["absent"] for line in read_lines(path, "train")] == [["0"], ["0"]]
    said = r"start: node \d+: is registered as client 0 .*; missing after 0.1 s: client 0 \(2 of 3 clients joined\)"
    with pytest.raises(FederationError, match=said):
        federate(*pinned(pins), SHORT[1], nodes=nodes, keys=keys, names=names)


def test_an_intruder_that_comes_during_the_run_is_reported_and_the_client_returns_with_its_key(
    federate: Federate, pins: Path, own: list[bytes], stolen: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack: in round 2 the honest node is unregistered and another comes by its name; in round 4 it is back."""
    asked = iter(range(1000))

    def online(grid: LocalGrid) -> list[int]:
        zero, one, two, intruder = grid.nodes
        look = next(asked)
        return [zero, one, two] if look < 2 else [intruder, one, two] if look < 4 else [intruder, zero, one, two]

    monkeypatch.setattr(LocalGrid, "get_node_ids", online)
    settings = (*pinned(pins), "num_rounds=5", "evaluate.every=5")
    names = ["client_0", "client_1", "client_2", "client_0"]
    _, path = federate(*settings, nodes=sites("0120"), keys=[*own, stolen], names=names)
    assert [line["absent"] for line in read_lines(path, "train")] == [[], ["0"], ["0"], [], []]
    assert [line["replies"] for line in read_lines(path, "train")] == [3, 2, 2, 3, 3]
    assert read_lines(path, "roster")[0]["refused"] == {}
    (line,) = read_lines(path, "refused")
    assert line["round"] == 2
    assert line["refused"] == nodes_of(path)
    assert list(line["refused"].values()) == [
        f"is registered as client 0 with a different key from the one pinned in {pins}/client_0.pub"
    ]


def test_a_client_without_a_pinned_key_is_refused_by_name(federate: Federate, pins: Path, own: list[bytes]) -> None:
    (pins / "client_1.pub").unlink()
    reason = f"has no pinned key: copy its site.pub to {pins}/client_1.pub"
    summary, path = federate(*pinned(pins), nodes=sites("012"), keys=own)
    assert nodes_of(path)["1"] == reason
    assert read_lines(path, "train")[0]["replies"] == 2
    assert f"refused: client 1: {reason}" in refusals(summary)
    own[1] = make_key(pins / "client_1.pub")  # the fix
    _, path = federate(*pinned(pins), nodes=sites("012"), keys=own)
    assert read_lines(path, "train")[0]["replies"] == 3


def test_a_folder_of_keys_that_cannot_be_used_is_refused_with_the_fix(pins: Path) -> None:
    def refusal() -> str:
        with pytest.raises(ConfigError) as caught:
            ClientKeys(pins)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refusal().endswith("has no client_<id>.pub file: copy each site's site.pub into it")
    make_key(pins / "client_0.pub")
    ClientKeys(pins)
    (pins / "client_1.pub").write_bytes((pins / "client_0.pub").read_bytes())
    assert refusal().endswith("client_1.pub are the same key: give each site a key of its own")
    other = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    for content in (b"", b"nonsense", other, b"ssh-rsa AAAA", (pins / "client_0.pub").read_bytes()[:60]):
        (pins / "client_1.pub").write_bytes(content)
        assert refusal().startswith(f"{pins}/client_1.pub is not a public key of an elliptic curve (")
    (pins / "client_1.pub").unlink()
    (pins / "client_1.pub").mkdir()
    assert f"{pins}/client_1.pub cannot be read (Is a directory)" in refusal()
    pins.rename(pins.parent / "elsewhere")
    assert refusal() == (
        f"deployment.client_keys={pins}: {pins} cannot be read (No such file or directory): "
        "give a folder of client_<id>.pub files"
    )


def test_keys_of_nodes_that_cannot_be_read_belong_to_nobody(pins: Path, own: list[bytes]) -> None:
    kind, text = (pins / "client_0.pub").read_text().split()
    (pins / "client_0.pub").write_text(f"{kind} {text}   a comment, and blanks, do not matter\n\n")
    (pins / "README").write_text("other files are left alone")
    keys = ClientKeys(pins)
    assert [keys.owner(key) for key in own] == ["0", "1", "2"]
    assert keys.owner(own[0].strip() + b"\n\n") == "0"
    other = ec.generate_private_key(ec.SECP384R1()).public_key()
    assert keys.owner(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)) is None
    assert keys.owner(b"") is None
    assert keys.owner(own[0][:40]) is None


def test_a_run_with_the_former_setting_for_names_can_be_resumed() -> None:
    config = compose(["deployment=local"])
    before = json.loads(to_json(config))
    before["deployment"].pop("client_keys")
    before["deployment"]["named_clients"] = True
    assert differences(before, config) == []


def test_a_summary_names_the_first_refused_and_counts_the_rest(federate: Federate) -> None:
    summary, path = federate(*TOY, "clients=30", *SHORT, nodes=sites(["0", "1", *map(str, range(100, 125))]))
    assert len(summary["refused"]) == 20
    assert refusals(summary).endswith("; and 5 more")
    assert len(read_lines(path, "roster")[0]["refused"]) == 25


def test_the_error_of_a_failed_run_says_who_was_refused_once() -> None:
    refused = {"node 7": "has a key that is pinned for no client in /keys"}
    said = "refused: node 7: has a key that is pinned for no client in /keys"
    summary = {"error": "round 3: no client is present", "refused": refused, "refused_count": 1}
    assert str(failure(summary)) == f"round 3: no client is present ({said})"
    assert str(failure(summary | {"error": f"the run cannot start, {said}"})) == f"the run cannot start, {said}"
    assert str(failure({"error": "no disk"})) == "no disk"
