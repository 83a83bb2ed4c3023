"""Shards after a crash, damage or a change of settings: the same bytes, or a refusal."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flapp.data.artifact import DataError
from flapp.data.shards.build import write_shards
from flapp.data.shards.manifest import Manifest
from tests.support.leaf_files import Samples, as_leaf, content_of, flip, write_leaf

KILLED = """
import os, signal, sys
from pathlib import Path
from flapp.data.shards.build import write_shards
event, part, count = sys.argv[3], sys.argv[4], int(sys.argv[5])
def die(name, args):
    global count
    if name == event and part in str(args[0]):
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
write_shards(Path(sys.argv[1]), Path(sys.argv[2]), "natural", seed=1)
"""


@pytest.mark.parametrize(
    ("event", "part", "count"),
    [
        ("open", ".client_2.tmp/val.safetensors", 1),
        ("open", ".client_4.tmp/meta.json", 1),
        ("os.rename", ".client_", 6),
        ("open", ".clients.idx.tmp", 1),
        ("os.rename", ".manifest.json.tmp", 1),
    ],
)
def test_kill_9_and_the_same_command_again_end_in_identical_bytes(
    source: Path, tmp_path: Path, event: str, part: str, count: int
) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(source), str(out), event, part, str(count)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    finished = {path.name: (path / "meta.json").stat().st_mtime_ns for path in out.glob("client_*")}
    write_shards(source, out, "natural", seed=1)
    write_shards(source, tmp_path / "whole", "natural", seed=1)
    assert content_of(out) == content_of(tmp_path / "whole")
    assert {name: (out / name / "meta.json").stat().st_mtime_ns for name in finished} == finished


def test_a_second_run_writes_only_the_shard_that_was_damaged(source: Path, shards: Manifest, tmp_path: Path) -> None:
    before = content_of(shards.folder)
    times = {client: (shards.shard_path(client) / "meta.json").stat().st_mtime_ns for client in shards}
    flip(shards.shard_path("1") / "val.safetensors", 500)
    write_shards(source, shards.folder, "round_robin", clients=3, seed=1)
    assert content_of(shards.folder) == before
    again = {client: (shards.shard_path(client) / "meta.json").stat().st_mtime_ns for client in shards}
    assert {client for client in again if again[client] != times[client]} == {"1"}


@pytest.mark.parametrize(
    "settings",
    [
        {"clients": 3, "seed": 2},
        {"clients": 2, "seed": 1},
        {"clients": 3, "seed": 1, "val_fraction": 0.2},
    ],
)
def test_shards_of_other_settings_are_kept_unless_overwrite_is_set(
    source: Path, shards: Manifest, tmp_path: Path, settings: dict[str, Any]
) -> None:
    before = content_of(shards.folder)
    with pytest.raises(DataError, match="overwrite=true"):
        write_shards(source, shards.folder, "round_robin", **settings)
    assert content_of(shards.folder) == before
    write_shards(source, shards.folder, "round_robin", overwrite=True, **settings)
    write_shards(source, tmp_path / "fresh", "round_robin", **settings)
    assert content_of(shards.folder) == content_of(tmp_path / "fresh")


def test_a_source_that_changed_is_noticed(samples: Samples, shards: Manifest, tmp_path: Path) -> None:
    name = sorted(samples)[0]
    images = samples[name][0].copy()
    images[0, 0] ^= 255
    changed = write_leaf(tmp_path / "changed", as_leaf(samples | {name: (images, samples[name][1])}))
    with pytest.raises(DataError, match=r"client_0 comes from another source.*overwrite=true"):
        write_shards(changed, shards.folder, "round_robin", clients=3, seed=1)


def test_a_full_disk_is_noticed_before_anything_is_written_or_removed(
    source: Path, shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content_of(shards.folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 10}))
    with pytest.raises(DataError, match="make room"):
        write_shards(source, tmp_path / "new", "natural")
    with pytest.raises(DataError, match="make room"):
        write_shards(source, shards.folder, "natural", overwrite=True)
    assert list((tmp_path / "new").iterdir()) == []
    assert content_of(shards.folder) == before
