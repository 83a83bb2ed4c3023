"""Every reader refuses a file with wrong content in one line."""

import itertools
import json
import os
import random
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Array

from flapp.config.load import compose, read_yaml, to_yaml
from flapp.config.schema import ConfigError
from flapp.data.artifact import DataError, open_array
from flapp.data.partition import load_partition
from flapp.data.shards.leaf import open_source
from flapp.data.sources import read_cifar
from flapp.messages import view
from flapp.model.files import load_tensors
from flapp.model.weight_files import read_state
from flapp.server.run_dir import RunDirectory, check_resumable
from flapp.server.summary import read_line, sound_summary
from flapp.untrusted import parse_json, printable, read_json
from tests.support.cifar_files import CIFAR_BOMBS, write_cifar
from tests.support.leaf_files import write_leaf
from tests.support.poison import DEEP, ask, npy, peak, poison, poisoned_json, write_real_files
from tests.support.poison_readers import FUZZED
from tests.support.refusals import refused
from tests.support.run_files import write_run
from tools import report
from tools.deployment.submit import check_summary

MIB = 1 << 20
DEEP_JSON = [DEEP, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 101 + "]" * 101]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((text, "deep") for text in DEEP_JSON),
        ("[" + "[]," * 1_000_001 + "1]", "lists and objects"),
        ('"' + "x" * (33 * MIB) + '"', "at most"),
        (f'{{"a": {2**64}}}', "64 bits"),
        ("1" + "0" * 5000, "64 bits"),
        ('{"\\ud800": 1}', "surrogate"),
        ('["\\uDFFF"]', "surrogate"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_json_beyond_its_limits_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_json_within_its_limits_is_what_json_reads() -> None:
    value = {"a": [1, -(2**63), 2**64 - 1, 1.5, None, True, "\u00fc\U0001f600"], "b": {"1" * 30: "2" * 30}}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * 100 + "]" * 100)
    assert printable("a\x1b[2J\n\ud800b") == "a\\x1b[2J\\n\\ud800b"


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    os.mkfifo(path) if kind == "a pipe" else path.mkdir()
    with pytest.raises(OSError, match="regular file|directory"):
        read_json(Path("/dev/zero") if kind == "a device" else path)


SHAPES = ["(-1,)", "(-2, -2)", "(True, 4)", "(4.0,)", "(10**12,)", "(4000000000000,)", "('4',)", "4", "(4, -1)", "(5,)"]
KINDS = [
    *("'V1000000000'", "'V4'", "'S0'", "'S4'", "'U1'", "'O'", "'<M8[s]'", "'<m8[s]'", "'>f4'", "'<c8'", "'<f16'"),
    *("[('a', '<f4')]", "('<f4', (1,))", "'(2,)<f2'", "1", "None", "'nonsense'"),
]


@pytest.mark.parametrize(("kind", "shape"), [*(("'<f4'", s) for s in SHAPES), *((k, "(4,)") for k in KINDS)])
def test_an_array_of_no_plain_numbers_is_refused_in_messages_and_files(tmp_path: Path, kind: str, shape: str) -> None:
    data = npy(kind, shape) + bytes(16)
    before = peak()
    with refused(ValueError, "not a plain array of float32"):
        view(Array("float32", (4,), "numpy.ndarray", data))
    (tmp_path / "images.npy").write_bytes(data)
    for facts in ({"shape": [4], "dtype": "float32"}, {"shape": [-1], "dtype": "float32"}):
        with refused(DataError, r"images.npy is damaged .*prepare it again"):
            open_array(tmp_path / "images.npy", facts)
    assert peak() - before < 50 * MIB


def test_a_message_cannot_break_the_line_that_refuses_it() -> None:
    with pytest.raises(ValueError, match="not a plain array") as error:
        view(Array("\x1b[2J\n" * 9, (4,) * 10_000, "numpy.ndarray", b"no array"))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "anchor or alias"),
        ("a: &a [*a]", "anchor or alias"),
        ("a: " + DEEP, "nested more than 100 deep"),
        ("".join("  " * i + "a:\n" for i in range(120)), "nested more than 100 deep"),
        ("a: [" + "1, " * 50_000 + "1]", "more than 20,000"),
        ("a: " + "1:" * 3000 + "1", "plain value of|digits"),
        ("a: 0x" + "f" * 4000, "digits"),
        ("a: " + "x" * 300_000, "at most 262,144 are expected"),
        ("a: !!python/object/apply:os.system [touch poisoned]", "could not determine a constructor"),
        ("a: !!binary aGVsbG8=", "not JSON serializable"),
        ("- 1", "it holds list"),
        ("a: 1\na: 2", "duplicate key"),
        ("a: ${", "no viable alternative"),
        ("\x1b[2J", "not allowed"),
    ],
    ids=lambda value: value[:20],
)
def test_yaml_that_to_yaml_never_writes_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as error:
        read_yaml(path)
    assert str(error.value).isprintable()
    assert str(error.value).startswith(f"{path} is damaged")
    assert "restore the file from a copy" in str(error.value)


NOT_NUMBERS: list[Any] = ["text", "1e3", [1], {"a": 1}, True, float("inf"), None]


@pytest.mark.slow
def test_other_things_in_place_of_numbers_are_named_in_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", 2, 2, 2)
    summary = json.loads((run / "metrics.json").read_text())
    keys = ("bytes_up", "bytes_down", "seconds", "best_round", "best_value", "accuracy", "loss", "selected_round")
    wrong = dict(zip(keys, itertools.cycle(NOT_NUMBERS), strict=False))
    (run / "metrics.json").write_text(json.dumps(summary | wrong))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for value in NOT_NUMBERS:
        each = {"0": value, "1": value}
        objects = "client_bytes_up client_seconds phases store accuracy_by_client label_hist samples"
        odd = dict.fromkeys(objects.split(), each) | dict.fromkeys(
            ("loss", "bytes_up", "seconds", "round", "kind"), value
        )
        lines += [lines[2] | {key: wrong} for key, wrong in (odd | {"failures": [each], "absent": [value]}).items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clients = [json.loads(line) for line in (run / "clients.jsonl").read_text().splitlines()]
    for value in (each for each in NOT_NUMBERS if each != [1]):
        clients += [clients[0] | {key: value} for key in ("train", "val", "test", "labels")]
    (run / "clients.jsonl").write_text("".join(json.dumps(line) + "\n" for line in clients))
    ask(report.main, run, "--out", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "lines of metrics.jsonl are not lines of a run and are left out" in page
    assert "lines of clients.jsonl are not lines of a run and are left out" in page
    said = "bytes_up, bytes_down, seconds, best_round, selected_round, best_value"
    assert f"metrics.json has values of wrong types, which are left out: {said}" in page


def test_lines_with_wrong_types_are_told_from_lines_of_a_run() -> None:
    sound = {"kind": "train", "round": 1, "time": 0.5, "loss": float("nan"), "failures": [], "bytes_up": 3}
    assert read_line(json.dumps(sound))["bytes_up"] == 3
    for key, value in {"round": -1, "kind": 3, "loss": "x", "failures": [{"client": 1}], "bytes_up": None}.items():
        with pytest.raises(ValueError, match=f"its {key} is not of the right type"):
            read_line(json.dumps(sound | {key: value}))
    good = {"status": "finished", "bytes_up": 1}
    assert sound_summary(good | {"loss": "x"}) == (good, ["loss"])


@pytest.mark.parametrize("name", CIFAR_BOMBS)
def test_a_cifar_file_that_would_fill_memory_or_time_is_refused(tmp_path: Path, name: str) -> None:
    path = write_cifar(tmp_path, images=2) / "test_batch"
    path.write_bytes(CIFAR_BOMBS[name])
    before = peak()
    with refused(DataError, f"^{path}", longest=1000):
        read_cifar("cifar10", tmp_path, "test")
    assert peak() - before < 200 * MIB


def test_a_pth_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"encoder.pos_embedding": torch.zeros(1).expand(1, 1 + 3000**2, 64)}, path)
    with pytest.raises(ValueError, match="not a dense tensor with bytes of its own"):
        read_state(path)
    torch.save({"a": torch.zeros(20 * MIB)}, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in stored.namelist():
            bomb.writestr(entry, stored.read(entry))
    with pytest.raises(ValueError, match="compressed, which torch.save never does"):
        read_state(tmp_path / "bomb.pth")


@pytest.mark.parametrize("length", [1 << 62, 1 << 40, 100 * MIB, 9 * MIB, 17])
def test_a_safetensors_header_beyond_its_file_or_any_use_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(8 if length == 17 else 200 * MIB)  # sparse
    before = peak()
    for read in (load_tensors, read_state):
        with pytest.raises(ValueError, match=r"m.safetensors .*header claims"):
            read(path)
    with pytest.raises(DataError, match=r"m.safetensors is damaged .*header claims"):
        load_partition(path)
    assert peak() - before < 100 * MIB


def test_leaf_labels_without_images_take_no_memory_for_them(tmp_path: Path) -> None:
    user = {"x": [], "y": [0] * 2_000_000}
    write_leaf(tmp_path, {"users": ["a"], "num_samples": [len(user["y"])], "user_data": {"a": user}})
    before = peak()
    with pytest.raises(DataError, match="0 images in x and 2000000 labels in y"):
        open_source(tmp_path)
    assert peak() - before < 400 * MIB


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    write_real_files(folder)
    return folder


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("run", "sweep"))) for kind in FUZZED]
)
def test_poisoned_files_are_read_or_refused(
    tmp_path: Path, real: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, read, count = FUZZED[kind]
    source = real / ("set" if kind == "partition" else kind)
    rng, before = random.Random(kind), peak()
    monkeypatch.chdir(tmp_path)
    for i in range(count):
        folder = tmp_path / "home" / str(i)
        shutil.copytree(source, folder)
        path = folder / rng.choice(files.split())
        if path.suffix == ".yaml":
            name, content = poisoned_json(json.dumps(yaml.safe_load(path.read_text())).encode(), rng)
            path.write_bytes(content)
        else:
            name = poison(path, rng)
        try:
            read(folder)
        except BaseException as error:
            raise AssertionError(f"{path.name}, variant {i}: {name}") from error
        shutil.rmtree(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["home"], "something was written elsewhere"
    assert peak() - before < 500 * MIB


def test_what_is_poisoned_in_a_run_is_named_in_its_report_or_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "r", 1, 2, 2)
    for name in ("config.yaml", "metrics.json", "metrics.jsonl", "progress.json"):
        (run / name).write_text(DEEP + "\n")
    ask(report.main, run, "--out", tmp_path / "r.html")
    assert "config.yaml cannot be read" in (tmp_path / "r.html").read_text()


def test_a_poisoned_run_that_is_resumed_is_refused_in_one_line_or_cut_before_the_poison(tmp_path: Path) -> None:
    settings = compose([f"home={tmp_path}", "run_name=r", "resume=true"])
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    for text in (DEEP, BOMB, "- 1"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"config.yaml is damaged .*restore the file from a copy"):
            check_resumable(settings)
    (run / "config.yaml").write_text(to_yaml(settings))
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"metrics.jsonl is not a regular file: restore"):
        check_resumable(settings)
    for line in (DEEP, '{"kind": "train", "round": 0, "time": 0.1, "bytes_up": "x"}', "[1]", '{"round": "x"}'):
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").write_text(f"{line}\n")
        RunDirectory.reopen(settings).close()
        assert (run / "metrics.jsonl").read_text() == ""
    for summary in ({"seconds": "x"}, {"rounds": None}, {"model_sha256": 7}):
        sound = {"status": "finished", "rounds": 1, "seconds": 1.0, "model_sha256": "m", "run_dir": "r"}
        with pytest.raises(ConfigError, match=rf"metrics.json has no usable {next(iter(summary))}: restore"):
            check_summary(sound | summary, run / "metrics.json")
