"""tools.checkpoints shows what a store holds, for people and machines, and exits 1 when something is wrong."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.tensors import digest_of
from tests.support.checkpoint_rounds import model_of
from tools.checkpoints import main

CONFIG, INPUT = "ab" * 32, "cd" * 32


def fill(path: Path, rounds: int = 3) -> Path:
    with ChunkManager(path, chunk_bytes=6000) as store:
        for number in range(1, rounds + 1):
            metrics = {"loss": 1 / number, "num-examples": 120}
            store.save_model_chunks(model_of(number), number, metrics, config_digest=CONFIG, input_digest=INPUT)
    return path


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Return a store of rounds 1 to 3."""
    return fill(tmp_path / "client_7" / "client_7_chunks.db")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a folder with the stores of three clients and the server."""
    for client in (10, 2, 1):
        fill(tmp_path / "run" / f"client_{client}" / f"client_{client}_chunks.db", rounds=client % 4)
    fill(tmp_path / "run" / "server_chunks.db")
    return tmp_path / "run"


def damage(path: Path, key: str, round_num: int) -> None:
    """Flip a bit of a tensor's stored bytes."""
    content, data = path.read_bytes(), model_of(round_num)[key].numpy().tobytes()[:500]
    assert content.count(data) == 1
    path.write_bytes(content.replace(data, bytes([data[0] ^ 1]) + data[1:]))


class Tool:
    """Run tools.checkpoints and look at what it prints."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: object, status: int = 0) -> list[str]:
        """Return the lines on standard output."""
        assert main(list(map(str, words))) == status
        return self.capsys.readouterr().out.splitlines()

    def json(self, *words: object, status: int = 0) -> Any:
        """Return what --json prints, as strict JSON."""
        text = "\n".join(self(*words, "--json", status=status))
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    def refused(self, *words: object, printed: int = 0, problems: int = 1) -> list[str]:
        """Return the lines on standard error of a command that fails, sorted, after so many on standard output."""
        assert main(list(map(str, words))) == 1
        out, err = self.capsys.readouterr()
        lines = err.splitlines()
        assert (len(out.splitlines()), len(lines)) == (printed, problems)
        assert all(line.startswith("error: ") for line in lines)
        return sorted(lines)


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(capsys)


def test_list_shows_rounds_with_metrics_and_short_digests_and_the_storage(db: Path, tool: Tool) -> None:
    lines = tool("list", db)
    assert lines[0].split() == ["round", "created", "(UTC)", "chunks", "bytes", "model", "config", "input", "metrics"]
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert "58.5 kB" in lines[1]
    assert "abababab  cdcdcdcd  loss=0.3333 num-examples=120" in lines[3]
    assert lines[4].startswith("3 rounds of 175.5 kB in all, stored as ")
    ends = {line.index("abababab") for line in lines[1:4]}
    assert ends == {lines[0].index("config")}, "columns are aligned"
    assert lines[1].startswith("    1  20"), "numbers to the right"


def test_list_of_a_folder_shows_each_store_in_the_order_of_the_clients_and_fails_for_a_damaged_one(
    run: Path, tool: Tool
) -> None:
    assert [line.split()[1] for line in tool("list", run)[1:]] == ["1", "2", "10", "server"]
    assert [store["rounds"] for store in tool.json("list", run)["stores"]] == [1, 2, 2, 3]
    (run / "client_2" / "client_2_chunks.db").write_bytes(b"no store" * 1000)
    assert [line.split()[1] for line in tool("list", run, status=1)[1:]] == ["1", "10", "server"]
    assert "client_2_chunks.db" in tool.refused("list", run, printed=4)[0]


def test_show_lists_the_tensors_and_facts_of_a_round(db: Path, tool: Tool) -> None:
    lines = tool("show", db, 2)
    assert lines[2].split() == ["body.weight", "float32", "(90,", "100)", "36.0", "kB", "6"]
    assert "half" in lines[3]
    assert lines[3].split()[1] == "bfloat16"
    assert lines[6].startswith("round 2, 20")
    assert lines[6].endswith("5 tensors, 58.5 kB")
    assert lines[7].split() == ["metrics", "loss=0.5", "num-examples=120"]
    assert lines[9].split() == ["config_digest", CONFIG]
    found = tool.json("show", db, 2)
    expected = {key: (str(t.dtype)[6:], list(t.shape), t.nbytes) for key, t in model_of(2).items()}
    assert {row["key"]: (row["dtype"], row["shape"], row["bytes"]) for row in found["tensors"]} == expected
    assert found["metrics"] == {"loss": 0.5, "num-examples": 120}


def test_verify_says_how_much_was_checked_or_prints_a_line_for_each_problem_in_any_store(run: Path, tool: Tool) -> None:
    assert tool("verify", run / "server_chunks.db")[0].endswith(": ok")
    assert tool("verify", run)[0].startswith("4 stores, 8 rounds, ")
    assert tool.json("verify", run)["problems"] == []
    damage(run / "client_10" / "client_10_chunks.db", "body.weight", 2)
    damage(run / "server_chunks.db", "body.weight", 3)
    (run / "client_1" / "client_1_chunks.db").write_bytes(b"no store" * 1000)
    assert tool("verify", run, status=1)[0].endswith(": 3 problems")
    first, second, third = tool.refused("verify", run, printed=1, problems=3)
    assert "client_1_chunks" in first
    assert "client_10_chunks" in second
    assert "server_chunks" in third
    assert "round 3" in third
    assert "(body.weight)" in third
    assert len(tool.json("verify", run, status=1)["problems"]) == 3


def test_diff_gives_the_norm_of_what_changed_and_leaves_out_what_did_not(db: Path, tool: Tool) -> None:
    old, new = model_of(2), model_of(3)
    change = float((new["body.weight"].double() - old["body.weight"].double()).norm())
    relative = change / float(old["body.weight"].double().norm())
    lines = tool("diff", db, 2, 3)
    assert lines[1].split() == ["body.weight", "changed", "9,000", f"{change:.4g}", f"{relative:.4g}"]
    assert lines[-1] == "3 changed tensors from round 2 to round 3"
    assert not any("frozen" in line for line in lines)
    row = tool.json("diff", db, 2, 3)["changes"][0]
    assert math.isclose(row["norm"], change)
    assert math.isclose(row["relative_norm"], relative)
    assert tool("diff", db, 2, 2) == ["rounds 2 and 2 hold the same tensors"]


def test_a_diff_in_json_has_null_for_a_change_from_zero_and_where_there_is_no_norm(tmp_path: Path, tool: Tool) -> None:
    with ChunkManager(tmp_path / "s.db") as store:
        store.save_model_chunks({"a": torch.zeros(2), "b": torch.ones(3)}, 0)
        store.save_model_chunks({"a": torch.ones(2), "b": torch.ones(3, 1)}, 1)
    changes = tool.json("diff", tmp_path / "s.db", 0, 1)["changes"]
    assert [(row["kind"], row["relative_norm"]) for row in changes] == [("changed", None), ("reshaped", None)]
    assert len(tool("diff", tmp_path / "s.db", 0, 1)) == 4


def test_export_writes_a_file_that_plain_safetensors_reads(db: Path, tmp_path: Path, tool: Tool) -> None:
    line = tool("export", db, 2, tmp_path / "out.safetensors")[0]
    assert line.split()[1] == str(tmp_path / "out.safetensors")
    assert digest_of(load_file(tmp_path / "out.safetensors")) == digest_of(model_of(2))
    assert tool.json("export", db, 2, tmp_path / "out.safetensors")["sha256"] == line.split()[0]


def test_compact_makes_the_file_smaller_and_keeps_its_rounds(db: Path, tool: Tool) -> None:
    with ChunkManager(db) as store:
        store.cleanup_old_rounds(1)
    (row,) = tool.json("compact", db)["stores"]
    assert row["bytes_after"] == db.stat().st_size < row["bytes_before"]
    assert "client_7_chunks.db: " in tool("compact", db)[0]
    assert tool("verify", db)[0].endswith(": ok")


def test_a_store_without_rounds_is_listed(tmp_path: Path, tool: Tool) -> None:
    ChunkManager(tmp_path / "client_0_chunks.db").close()
    assert tool("list", tmp_path / "client_0_chunks.db")[-1].startswith("0 rounds of 0 B")
    assert tool("list", tmp_path)[1].split()[2:5] == ["0", "-", "-"]


def test_a_missing_store_round_or_folder_gives_one_line_and_nothing_is_made(
    db: Path, run: Path, tmp_path: Path, tool: Tool
) -> None:
    for command in (["list"], ["show", 1], ["verify"], ["diff", 1, 2], ["export", 1, tmp_path / "x"], ["compact"]):
        assert "none.db is not there" in tool.refused(command[0], tmp_path / "none.db", *command[1:])[0]
    assert not (tmp_path / "none.db").exists()
    assert not (tmp_path / "x").exists()
    (tmp_path / "empty").mkdir()
    for words, message in (
        (["show", db, 9], "has no round 9: it holds 1, 2, 3"),
        (["diff", db, 1, 9], "has no round 9"),
        (["show", run, 1], "is a folder: name one of the stores in it (4)"),
        (["list", tmp_path / "empty"], "holds no *_chunks.db"),
        (["export", db, 1, tmp_path / "no folder" / "x"], "cannot be exported to"),
    ):
        assert message in tool.refused(*words)[0]
    damage(db, "body.weight", 2)
    assert "round 2, chunk " in tool.refused("show", db, 2)[0]
