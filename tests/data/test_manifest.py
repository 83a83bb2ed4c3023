"""The manifest: found by client, read lazily, and never trusted further than its digests go."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from flapp.data.artifact import DataError
from flapp.data.shards import manifest
from flapp.data.shards.manifest import Manifest, ShardRecord, check_claim, load_manifest


def record(client_id: str, shard: str | None = None) -> ShardRecord:
    hist = (1, 2, *[0] * 60)
    digest = hashlib.sha256(client_id.encode()).hexdigest()
    return ShardRecord(client_id, shard or f"client_{client_id}", {"train": 3, "val": 1, "test": 2}, hist, 1, digest)


@pytest.fixture
def written(tmp_path: Path) -> Manifest:
    return manifest.write_manifest(tmp_path, [record(str(i)) for i in range(300)], {"strategy": "natural", "seed": 4})


def test_every_client_is_found_in_counting_order(written: Manifest, tmp_path: Path) -> None:
    found = load_manifest(tmp_path / "manifest.json")
    assert list(found) == [str(i) for i in range(300)]
    assert all(found[str(i)] == record(str(i)) for i in range(300))
    assert found.facts["totals"] == {"clients": 300, "writers": 300, "train": 900, "val": 300, "test": 600}
    assert found.facts["seed"] == 4
    found.verify()


def test_an_unknown_client_is_a_key_error(written: Manifest) -> None:
    assert "300" not in written
    assert written.get("../1") is None
    with pytest.raises(KeyError):
        written["client_1"]


def test_a_record_cannot_be_changed(written: Manifest) -> None:
    with pytest.raises(FrozenInstanceError):
        written["1"].digest = ""  # type: ignore[misc]


def test_a_look_up_reads_one_line(written: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    parse = manifest._parse
    monkeypatch.setattr(manifest, "_parse", lambda line, path: parsed.append(line) or parse(line, path))
    assert written["250"].client_id == "250"
    assert len(parsed) == 1


def test_clients_whose_index_keys_collide_are_still_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_key", lambda client_id: client_id[-1:].encode() * 8)
    written = manifest.write_manifest(tmp_path, [record(str(i)) for i in range(60)], {})
    assert [written[str(i)].client_id for i in range(60)] == [str(i) for i in range(60)]
    assert "65" not in written


def test_shards_are_found_beside_the_manifest_wherever_it_was_copied(written: Manifest, tmp_path: Path) -> None:
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert load_manifest(moved).shard_path("7") == moved.resolve() / "client_7"


@pytest.mark.parametrize("shard", ["../client_1", "/etc", "client_1/../../x", "a/../.."])
def test_a_shard_outside_the_manifests_folder_is_refused(tmp_path: Path, shard: str) -> None:
    written = manifest.write_manifest(tmp_path, [record("1", shard)], {})
    for use in (lambda: written["1"], lambda: written.shard_path("1"), written.verify):
        with pytest.raises(DataError, match="outside the manifest's folder"):
            use()


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(written: Manifest, tmp_path: Path) -> None:
    (tmp_path / "client_1").symlink_to("/etc")
    with pytest.raises(DataError, match="outside"):
        written.shard_path("1")


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


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (edit("manifest.json", lambda content: content[:-30]), r"manifest\.json is damaged"),
        (edit("manifest.json", lambda content: b"\xff\xfe"), r"manifest\.json is damaged"),
        (edit("manifest.json", lambda content: b"[]"), "is not a manifest of format 1"),
        (edit("manifest.json", lambda content: b'{"fab": 1}'), "is not a manifest of format 1"),
        (facts(format_version=2), "found 2"),
        (facts(totals=None), "lacks totals"),
        (facts(totals={"clients": "300"}), "lacks totals"),
        (facts(seed=5), "does not have the digest it states"),
        (restated(totals={"clients": 299}), r"clients\.idx is damaged"),
        (restated(index_sha256="0" * 64), r"clients\.idx is damaged"),
        (edit("clients.idx", lambda content: content[:-32]), r"clients\.idx is damaged"),
        (edit("clients.idx", lambda content: content[:40] + b"\1" + content[41:]), r"clients\.idx is damaged"),
        (lambda folder: (folder / "clients.idx").unlink(), r"clients\.idx cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest at"),
    ],
)
def test_a_damaged_or_foreign_manifest_is_refused_in_one_line(
    written: Manifest, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(tmp_path)
    with pytest.raises(DataError, match=said) as refusal:
        load_manifest(tmp_path / "manifest.json")
    assert "\n" not in str(refusal.value)


def test_a_changed_line_is_refused_when_it_is_looked_up(written: Manifest, tmp_path: Path) -> None:
    edit("clients.jsonl", lambda content: content.replace(b'"train": 3', b'"train": 4', 1))(tmp_path)
    changed = load_manifest(tmp_path)
    assert changed["299"] == record("299")
    with pytest.raises(DataError, match=r"clients\.jsonl is damaged at byte 0"):
        changed["0"]
    with pytest.raises(DataError, match="another SHA-256"):
        changed.verify()


def test_verify_finds_totals_that_do_not_add_up(written: Manifest, tmp_path: Path) -> None:
    restated(totals=written.facts["totals"] | {"train": 901})(tmp_path)
    with pytest.raises(DataError, match="adds up to"):
        load_manifest(tmp_path).verify()


def test_a_claim_that_fits_its_record_is_accepted() -> None:
    known = record("5")
    assert check_claim(known, "5", 3, 1, 2, list(known.label_hist), known.digest) is None
    assert check_claim(known, "5", 3, None, 2, known.label_hist, known.digest) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
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
def test_a_claim_that_differs_is_told_apart_in_words(change: dict[str, object], said: str) -> None:
    known = record("5")
    claim = {"record": known, "client_id": "5", "train": 3, "val": 1, "test": 2}
    claim |= {"label_hist": known.label_hist, "shard_digest": known.digest}
    assert said in str(check_claim(**claim | change))  # type: ignore[arg-type]
