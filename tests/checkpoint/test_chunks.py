"""How tensors are cut, what the JSON of their parts may say, and what the digest of a model depends on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flapp.checkpoint.chunks import (
    CheckpointError,
    Part,
    Spec,
    cut_evenly,
    cut_tensors,
    decode_parts,
    encode_parts,
    join,
)
from flapp.checkpoint.database import chunk_bytes_for
from flapp.checkpoint.manager import ChunkManager
from flapp.checkpoint.tensors import digest_of

SPECS = {
    "a": Spec("float32", (3, 5)),
    "scalar": Spec("int64", ()),
    "empty": Spec("float16", (0, 4)),
    "b": Spec("bfloat16", (7,)),
    "last": Spec("bool", (2,)),
}
TOTAL = sum(spec.numel for spec in SPECS.values())


@pytest.mark.parametrize("chunk_num", [*range(1, 12), TOTAL - 1, TOTAL, TOTAL + 1, 1000])
def test_equal_chunks_differ_by_at_most_one_element_and_none_is_empty(chunk_num: int) -> None:
    chunks = cut_evenly(SPECS, chunk_num)
    sizes = [sum(part.end - part.start for part in parts) for parts in chunks]
    assert len(chunks) == min(chunk_num, TOTAL)
    assert sum(sizes) == TOTAL
    assert max(sizes) - min(sizes) <= 1
    assert join(chunks) == SPECS


@pytest.mark.parametrize("chunk_bytes", [1, 7, 8, 64, 1 << 20])
def test_a_chunk_of_the_default_cutting_never_spans_two_tensors(chunk_bytes: int) -> None:
    chunks = cut_tensors(SPECS, chunk_bytes)
    assert all(len(parts) == 1 for parts in chunks)
    assert all(part.nbytes <= max(chunk_bytes, 8) for parts in chunks for part in parts)
    assert join(chunks) == SPECS


def test_a_model_without_elements_has_one_chunk_and_one_without_tensors_none() -> None:
    assert cut_evenly({"empty": SPECS["empty"]}, 3) == [[Part("empty", 0, 0, SPECS["empty"])]]
    assert cut_evenly({}, 3) == cut_tensors({}, 8) == []


@pytest.mark.parametrize("page_size", [512, 1024, 4096, 16384, 32768, 65536])
def test_a_full_chunk_leaves_as_little_in_the_leaf_page_as_sqlite_allows(page_size: int) -> None:
    size = chunk_bytes_for(page_size)
    row = size + 32 + 12  # the hash, the header of the record and its sizes
    least, most = (page_size - 12) * 32 // 255 - 23, page_size - 35
    local = least + (row - least) % (page_size - 4)
    assert row > most
    assert local <= least or local > most, "the last overflow page would not be full"
    assert size % 16 == 0
    assert 1 << 20 <= size + 64 < (1 << 20) + 2 * page_size


def test_parts_survive_json_whatever_the_key() -> None:
    keys = ["layer.weight", 'quote"and\\slash', "ünïcode", "\ud800 lone", "", "new\nline"]
    parts = [Part(key, 1, 4, Spec("float32", (2, 2), "tied" if i % 2 else None)) for i, key in enumerate(keys)]
    text = encode_parts(parts)
    assert text.isascii()
    assert decode_parts(text) == parts


ROWS: list[object] = [
    [0, 4, [2, 2]],
    [0, 4, [2, 2], "object"],
    [0, 4, [2, 2], ["float32"]],
    [4, 0, [2, 2], "float32"],
    [-4, 0, [2, 2], "float32"],
    [0, True, [2, 2], "float32"],
    [0, 4.0, [2, 2], "float32"],
    [0, 4, [2, -2], "float32"],
    [0, 4, [2**62, 2**62], "float32"],
    [0, 0, [0, 2**62, 2**62], "float32"],
    [0, 1, [1] * 65, "float32"],
    [0, 4, {"2": 2}, "float32"],
    [0, 4, "22", "float32"],
    [0, 4, [2, 2], "float32", 5],
    [0, 4, [2, 2], "float32", "tied", "more"],
    "abcd",
    None,
]
TEXTS = ["", "[]", "null", "5", "{", "[" * 100_000, '{"a": 5}', None, b"{}", 7, '{"a": [[' + "9" * 9999]


@pytest.mark.parametrize("text", [*(json.dumps({"a": [row]}) for row in ROWS), *TEXTS], ids=lambda text: str(text)[:30])
def test_parts_that_flapp_does_not_write_are_refused(text: object) -> None:
    assert decode_parts(json.dumps({"a": [[0, 4, [2, 2], "float32"]]}))
    with pytest.raises(ValueError, match="its parts are not what flapp writes"):
        decode_parts(text)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Part("a", 1, 4, Spec("float32", (4,)))], "tensor a continues at element 1, not at 0"),
        ([Part("a", 0, 3, Spec("float32", (4,)))], "tensor a ends at element 3 of 4"),
        ([Part("a", 0, 5, Spec("float32", (4,)))], "tensor a ends at element 5 of 4"),
        ([Part("a", 0, 2, Spec("float32", (4,))), Part("a", 2, 4, Spec("int32", (4,)))], "tensor a is float32"),
        ([Part("a", 0, 4, Spec("float32", (4,), "b"))], "tensor a is tied to b, which is missing"),
        ([Part("a", 0, 4, Spec("float32", (4,), "a"))], "tensor a is tied to a"),
    ],
)
def test_tensors_with_holes_or_of_two_kinds_are_refused(parts: list[Part], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join([parts])


def test_the_digest_of_a_model_depends_on_names_dtypes_shapes_and_bytes_but_not_on_order_or_library() -> None:
    values = np.arange(6, dtype=np.float32)
    digest = digest_of({"a": values, "b": torch.ones(2)})
    assert digest == digest_of({"b": np.ones(2, np.float32), "a": torch.from_numpy(values)})
    assert digest == digest_of({"a": np.arange(6, dtype=">f4"), "b": torch.ones(4)[::2]})
    others = [{"a": values}, {"a": values.reshape(2, 3), "b": torch.ones(2)}, {"a": values, "c": torch.ones(2)}]
    others += [{"a": values.view(np.int32), "b": torch.ones(2)}, {"a": values * -1, "b": torch.ones(2)}]
    assert len({digest, *map(digest_of, others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "value",
    [np.array(["text"]), np.array([None]), 5, "text", torch.ones(2).to_sparse(), torch.ones(2, device="meta")],
    ids=["texts", "objects", "int", "str", "sparse", "meta"],
)
def test_a_value_without_raw_bytes_is_refused_by_name(value: object) -> None:
    with pytest.raises(CheckpointError, match="tensor odd"):
        digest_of({"odd": value})  # type: ignore[dict-item]


def test_read_only_arrays_are_not_copied() -> None:
    array = np.frombuffer(np.arange(6, dtype=np.float32).tobytes(), np.float32).reshape(2, 3)
    tensor = ChunkManager.model_to_params({"w": array, "scalar": np.frombuffer(b"\7", np.uint8).reshape(())})["w"]
    assert not array.flags.writeable
    assert tensor.data_ptr() == array.__array_interface__["data"][0]
    assert tensor.tolist() == array.tolist()
    assert digest_of({"w": array}) == digest_of({"w": array.copy()})


def test_a_model_can_be_cut_and_its_chunks_extracted_by_hand(tmp_path: Path) -> None:
    params = {"w": torch.arange(10.0).reshape(2, 5), "n": torch.tensor(3)}
    with ChunkManager(tmp_path / "store.db") as store:
        chunks = store.split_model(params, 2)
        assert chunks[0] == {"chunk_id": 0, "parts": {"w": [(0, 5, (2, 5))]}, "flat_size": 5}
        assert chunks[1] == {"chunk_id": 1, "parts": {"w": [(5, 10, (2, 5))], "n": [(0, 1, ())]}, "flat_size": 6}
        last = np.arange(5, 10, dtype=np.float32).tobytes() + np.int64(3).tobytes()
        assert store.extract_chunk_data(params, chunks[1]) == last
