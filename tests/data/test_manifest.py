"""The manifest: read whole once, and never trusted further than its digests go."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flapp.data.artifact import DataError
from flapp.data.shards import manifest
from flapp.data.shards.manifest import Manifest, ShardRecord, check_claim, load_manifest, open_manifest, write_manifest
from tests.support.refusals import refused


def record(client_id: str, shard: str | None = None) -> ShardRecord:
    hist = (1, 2, *[0] * 60)
    digest = hashlib.sha256(client_id.encode()).hexdigest()
    return ShardRecord(client_id, shard or f"client_{client_id}", {"train": 3, "val": 1, "test": 2}, hist, 1, digest)


@pytest.fixture
def written(tmp_path: Path) -> Manifest:
    write_manifest(tmp_path, [record(str(i)) for i in range(300)], {"strategy": "natural", "seed": 4})
    return load_manifest(tmp_path)


def test_every_client_is_found_in_counting_order(written: Manifest) -> None:
    assert list(written) == [str(i) for i in range(300)]
    assert all(written[str(i)] == record(str(i)) for i in range(300))
    assert written.facts["totals"] == {"clients": 300, "writers": 300, "train": 900, "val": 300, "test": 600}
    assert written.facts["seed"] == 4
    assert written.get("../1") is None
    with pytest.raises(KeyError):
        written["300"]


def test_many_clients_are_read_once_and_fast_but_not_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(tmp_path, [record(str(i)) for i in range(3000)], {"strategy": "natural"})
    started = time.process_time()
    found = load_manifest(tmp_path)
    assert time.process_time() - started < 0.6  # 0.1 s on a quiet machine
    assert load_manifest(tmp_path / "manifest.json") is found
    monkeypatch.setattr(manifest, "MOST_LINES", 1000)
    manifest._load.cache_clear()
    with pytest.raises(DataError, match=r"clients\.jsonl is damaged .it has .* bytes, at most 1,000 are expected"):
        load_manifest(tmp_path)


def test_shards_are_found_beside_the_manifest_wherever_it_was_copied(written: Manifest, tmp_path: Path) -> None:
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert load_manifest(moved).shard_path("7") == moved.resolve() / "client_7"


@pytest.mark.parametrize("shard", ["../client_1", "/etc", "client_1/../../x", "a/../..", "a link"])
def test_a_shard_outside_the_manifests_folder_is_refused(tmp_path: Path, shard: str) -> None:
    (tmp_path / "a link").symlink_to("/etc")
    write_manifest(tmp_path, [record("1", shard)], {"strategy": "natural"})
    with pytest.raises(DataError, match="outside"):
        load_manifest(tmp_path).shard_path("1")


@pytest.mark.parametrize(("clients", "strategy", "fix"), [(3, "natural", "clients=300"), (300, "random", "natural")])
def test_a_manifest_of_other_settings_is_refused(written: Manifest, clients: int, strategy: str, fix: str) -> None:
    with pytest.raises(DataError, match=f"set .*{fix}"):
        open_manifest(written.path, clients, strategy, ((28, 28, 1), 62, "half"))


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def facts(**values: object) -> Callable[[Path], None]:
    return edit("manifest.json", lambda content: json.dumps(json.loads(content) | values).encode())


def restated(**values: object) -> Callable[[Path], None]:
    """Return a change of manifest.json by someone who also corrects the digest it states."""

    def change(content: bytes) -> bytes:
        changed = json.loads(content) | values
        return json.dumps(changed | {"digest": manifest.digest_of(changed)}).encode()

    return edit("manifest.json", change)


def twice(folder: Path) -> None:
    lines = (folder / "clients.jsonl").read_bytes() * 2
    (folder / "clients.jsonl").write_bytes(lines)
    restated(clients_sha256=hashlib.sha256(lines).hexdigest())(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (edit("manifest.json", lambda content: content[:-30]), r"manifest\.json is damaged"),
        (edit("manifest.json", lambda content: b"\xff\xfe"), r"manifest\.json is damaged"),
        (edit("manifest.json", lambda content: b"[]"), "is not a manifest of format 2"),
        (facts(format_version=1), r"found 1\): make the shards with .*prepare_data .*overwrite=true"),
        (facts(totals=None), "lacks totals"),
        (facts(seed=5), "does not have the digest it states"),
        (restated(totals={"clients": "300"}), "its clients add up to"),
        (restated(clients_sha256="0" * 64), r"clients\.jsonl is damaged .it has a different SHA-256"),
        (edit("clients.jsonl", lambda content: content[:-32]), r"clients\.jsonl is damaged .it has a different"),
        (edit("clients.jsonl", lambda content: content.replace(b'"train": 3', b'"train": 4', 1)), "different SHA-256"),
        (twice, r"clients\.jsonl is damaged .it has client 0 twice"),
        (lambda folder: (folder / "clients.jsonl").unlink(), r"clients\.jsonl cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest at"),
    ],
)
def test_a_damaged_manifest_is_refused(
    written: Manifest, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(tmp_path)
    with refused(DataError, said):
        load_manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"val": None, "label_hist": [1, 2, *[0] * 60]}, None),
        ({"record": None}, "client 5 is not in the manifest"),
        ({"record": record("6")}, "the manifest's record is of client 6"),
        ({"train": 4}, "claims 4 train samples, the manifest says 3"),
        ({"val": 0}, "claims 0 val samples, the manifest says 1"),
        ({"test": 3}, "claims 3 test samples, the manifest says 2"),
        ({"label_hist": [2, 1, *[0] * 60]}, "first at class 0"),
        ({"label_hist": [1, 2]}, "2 classes"),
        ({"shard_digest": "abc"}, "digest abc, the manifest says"),
    ],
)
def test_a_claim_fits_its_record_or_differs_in_words(change: dict[str, object], said: str | None) -> None:
    known = record("5")
    claim = {"record": known, "client_id": "5", "train": 3, "val": 1, "test": 2}
    claim |= {"label_hist": known.label_hist, "shard_digest": known.digest}
    found = check_claim(**claim | change)  # type: ignore[arg-type]
    assert (found is None) == (said is None)
    assert (said or "") in (found or "")
