"""What a client trains on: the pixels of PIL and torchvision, in a seeded order, made ahead of time."""

import gc
import mmap
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional

from flapp.data.artifact import DataError
from flapp.data.images import resize
from flapp.data.loader import ClientLoader, will_need
from flapp.data.offline import OfflineDataset
from tests.support.images import COUNT, photographs, pil_resize, torchvision_batch, write_resized, write_split


def epoch(loader: ClientLoader) -> tuple[Tensor, Tensor]:
    inputs, labels = zip(*((x.clone(), y) for x, y in loader), strict=True)
    return torch.cat(inputs), torch.cat(labels)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("flapp-loader")]


ANY = [(3, (20, 28), size, 2) for size in (40, 30, 28, 20)]  # not square, or of sizes that are not multiples of four
SQUARE = [(channels, (32, 32), size, 0) for channels in (1, 3) for size in (224, 128, 96, 64, 48, 16)]


@pytest.mark.parametrize(("channels", "shape", "size", "apart"), SQUARE + ANY)
def test_resized_batches_equal_the_bytes_of_pil(
    tmp_path: Path, channels: int, shape: tuple[int, int], size: int, apart: int
) -> None:
    images = np.ascontiguousarray(photographs(channels=channels)[:, : shape[0], : shape[1]])
    dataset = OfflineDataset(write_split(tmp_path / "train", images))
    found, _ = epoch(ClientLoader(dataset, np.arange(COUNT), 8, image_size=size, output="uint8"))
    expected = np.stack([pil_resize(image, size) for image in images]).transpose(0, 3, 1, 2)
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy().astype(int) - expected).max() <= apart


@pytest.mark.parametrize("size", [224, 32])
def test_exact_batches_equal_the_bits_of_torchvision(dataset: OfflineDataset, size: int) -> None:
    found, labels = epoch(ClientLoader(dataset, np.arange(COUNT), 8, image_size=size, exact=True))
    assert torch.equal(found, torchvision_batch(photographs(), size))
    assert labels.tolist() == dataset.targets


@pytest.mark.parametrize("normalization", ["none", "half", "imagenet"])
def test_the_fast_normalization_stays_within_a_millionth(folder: Path, normalization: str) -> None:
    dataset = OfflineDataset(folder, normalization=normalization)
    fast, exact = (epoch(ClientLoader(dataset, np.arange(COUNT), 8, exact=exact))[0] for exact in (False, True))
    assert (fast - exact).abs().max() <= 1e-6
    assert fast.is_contiguous()


@pytest.mark.parametrize("output", ["float32", "uint8"])
@pytest.mark.parametrize("size", [None, 64])
def test_prefetching_changes_no_bit(dataset: OfflineDataset, output: str, size: int | None) -> None:
    indices = np.arange(1, COUNT, 2)
    epochs = []
    for prefetch in (0, 1, 2, 5, 100):
        loader = ClientLoader(dataset, indices, 4, 7, size, output=output, prefetch=prefetch, augment=True)
        for _ in zip(range(2), loader, strict=False):  # an epoch that is left early
            pass
        epochs.append([epoch(loader) for _ in range(2)])
    for found in epochs[1:]:
        for (x, y), (expected_x, expected_y) in zip(found, epochs[0], strict=True):
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)


def test_a_batch_is_valid_until_the_next_is_asked_for_and_its_buffer_is_used_again(dataset: OfflineDataset) -> None:
    expected = torchvision_batch(photographs(), 32).split(4)
    addresses = []
    for (inputs, _), wanted in zip(
        ClientLoader(dataset, np.arange(COUNT), 4, exact=True, prefetch=2), expected, strict=True
    ):
        for _ in range(100):
            assert torch.equal(inputs, wanted)
        addresses.append(inputs.data_ptr())
    assert len(addresses) == 10
    assert len(set(addresses)) == 3


def test_without_prefetch_batches_stay_valid_and_no_thread_is_started(dataset: OfflineDataset) -> None:
    loader = ClientLoader(dataset, np.arange(COUNT), 4, exact=True, prefetch=0)
    batches = [(inputs, loader_threads()) for inputs, _ in loader]
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), torchvision_batch(photographs(), 32))
    assert not any(threads for _, threads in batches)


def test_the_order_is_drawn_from_the_seed_anew_each_epoch(dataset: OfflineDataset) -> None:
    indices = np.arange(3, COUNT)
    first, again, other = (ClientLoader(dataset, indices, 8, seed, output="uint8") for seed in (1, 1, 2))
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        expected = torch.from_numpy(indices)[torch.randperm(len(indices), generator=generator)]
        images, labels = epoch(first)
        assert torch.equal(labels, torch.from_numpy(dataset.artifact.labels)[expected])
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), photographs()[expected.numpy()])
        assert torch.equal(epoch(again)[1], labels)
        assert not torch.equal(epoch(other)[1], labels)
    unseeded = ClientLoader(dataset, indices, 8)
    assert epoch(unseeded)[1].tolist() == [dataset.targets[i] for i in indices]


def test_augmentation_is_a_crop_from_the_padded_image_and_a_mirror(dataset: OfflineDataset) -> None:
    padded = functional.pad(torch.from_numpy(photographs()).permute(0, 3, 1, 2), [4] * 4)
    crops = [functional.crop(padded, top, left, 32, 32) for top in range(9) for left in range(9)]
    choices = torch.stack([*crops, *(crop.flip(-1) for crop in crops)])
    drawn = set()
    loader = ClientLoader(dataset, np.arange(COUNT), 8, 1, output="uint8", augment=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        order = torch.randperm(COUNT, generator=generator)  # the order is that of a loader which augments nothing
        for source, image in zip(order, epoch(loader)[0], strict=True):
            fits = (choices[:, source] == image).flatten(1).all(1).nonzero()
            assert len(fits)
            drawn.add(int(fits[0]))
    assert {k // 81 for k in drawn} == {0, 1}
    assert {k % 81 // 9 for k in drawn} == {k % 9 for k in drawn} == set(range(9))


def test_augmentation_depends_on_the_seed_and_comes_before_any_resize(folder: Path) -> None:
    def loader(seed: int, size: int | None = None) -> ClientLoader:
        dataset = OfflineDataset(folder, normalization="imagenet")
        return ClientLoader(dataset, np.arange(COUNT), 8, seed, size, output="uint8", augment=True)

    small = loader(1)
    images = epoch(small)[0]
    assert torch.equal(images, epoch(loader(1))[0])
    assert not torch.equal(images, epoch(loader(2))[0])
    assert not torch.equal(images, epoch(small)[0])
    expected = np.stack([pil_resize(image, 64) for image in images.permute(0, 2, 3, 1).numpy()])
    for _ in range(2):
        assert np.array_equal(epoch(loader(1, 64))[0].permute(0, 2, 3, 1).numpy(), expected)
        write_resized(folder, 64, photographs())  # which is not what augmented images are read from


def test_uint8_batches_become_the_same_input_wherever_they_are_normalized(dataset: OfflineDataset) -> None:
    expected = torchvision_batch(photographs(), 64)
    resized = ClientLoader(dataset, np.arange(COUNT), 8, image_size=64, output="uint8")
    assert torch.equal(torch.cat([resized.to_input(pixels) for pixels, _ in resized]), expected)
    native = ClientLoader(dataset, np.arange(COUNT), 8, output="uint8")
    assert torch.equal(torch.cat([native.to_input(resize(pixels, 64)) for pixels, _ in native]), expected)


@pytest.mark.parametrize(("output", "size"), [("float32", 96), ("float32", 128), ("uint8", 96)])
def test_an_artifact_resized_ahead_gives_the_same_batches(folder: Path, output: str, size: int) -> None:
    def batches() -> Tensor:
        loader = ClientLoader(OfflineDataset(folder), np.arange(COUNT)[::-1], 8, 3, size, output=output)
        sources.append((loader.source.path.name, loader.source.layout))
        return epoch(loader)[0]

    sources: list[tuple[str, str]] = []
    on_the_fly = batches()
    sample = OfflineDataset(folder, image_size=size)[4][0]
    write_resized(folder, size, photographs())
    assert torch.equal(batches(), on_the_fly)
    assert torch.equal(OfflineDataset(folder, image_size=size)[4][0], sample)
    assert sources == [("train", "NHWC"), (f"train@{size}", "NCHW")]
    assert OfflineDataset(folder, image_size=64).artifact_at(64).path == folder


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_while_making_a_batch_reaches_the_consumer(dataset: OfflineDataset, prefetch: int) -> None:
    seen = 0
    with pytest.raises(IndexError):  # noqa: PT012
        for _ in ClientLoader(dataset, np.array([0, 1, 2, COUNT]), 2, prefetch=prefetch):
            seen += 1
    assert seen == 1
    assert not loader_threads()


def test_the_thread_ends_however_the_iteration_does(dataset: OfflineDataset) -> None:
    loader = ClientLoader(dataset, np.arange(COUNT), 2)
    for turn, _ in enumerate(loader):
        assert len(loader_threads()) == 1 or turn > 0
    assert not loader_threads()

    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        for inputs, _ in loader:
            len(inputs) / 0
    assert not loader_threads()

    closed = iter(loader)
    next(closed)
    closed.close()  # type: ignore[attr-defined]
    assert not loader_threads()

    dropped = iter(loader)
    next(dropped)
    alive = weakref.ref(dropped)
    del dropped
    gc.collect()
    assert alive() is None
    assert not loader_threads()


@pytest.mark.slow
def test_a_program_may_end_in_the_middle_of_an_epoch(folder: Path) -> None:
    program = (
        "import sys, numpy; from flapp.data import OfflineDataset; from flapp.data.loader import ClientLoader\n"
        "batches = iter(ClientLoader(OfflineDataset(sys.argv[1]), numpy.arange(30), 2))\n"
        "next(batches); print('done'); assert 'torchvision' not in sys.modules"
    )
    command = [sys.executable, "-c", program, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_settings_that_contradict_are_refused(dataset: OfflineDataset) -> None:
    wrong = (({"output": "float16"}, "output=float16 is unknown"), ({"augment": True}, "set seed"))
    for settings, reason in (*wrong, ({"batch_size": 0}, "batch_size=0"), ({"prefetch": -1}, "prefetch=-1")):
        with pytest.raises(DataError, match=reason):
            ClientLoader(dataset, np.arange(4), **{"batch_size": 2} | settings)  # type: ignore[arg-type]


def test_the_kernel_is_told_of_every_page_that_the_next_rows_are_on() -> None:
    advised = []

    class Recorder(mmap.mmap):
        def madvise(self, option: int, start: int, length: int) -> None:  # type: ignore[override]
            assert option == mmap.MADV_WILLNEED
            advised.append((start, start + length))

    images = np.ndarray.__new__(np.memmap, (9, 5000), np.uint8, buffer=Recorder(-1, 50_000), offset=128)
    images.offset = 128
    will_need(images, torch.tensor([1, 8]))
    assert advised == [(4096, 128 + 10_000), (36864, 128 + 45_000)]


def test_a_loader_and_its_buffers_are_freed_when_nobody_uses_it(dataset: OfflineDataset) -> None:
    loader = ClientLoader(dataset, np.arange(COUNT), 8)
    epoch(loader)
    alive = weakref.ref(loader)
    gc.disable()
    try:
        del loader
        assert alive() is None
    finally:
        gc.enable()


def test_a_client_without_samples_has_no_batch(dataset: OfflineDataset) -> None:
    loader = ClientLoader(dataset, np.array([], dtype=np.int64), 4, 1, augment=True)
    assert (len(loader), list(loader)) == (0, [])


def test_batches_made_in_inference_mode_and_out_of_it_share_a_loader(dataset: OfflineDataset) -> None:
    loader = ClientLoader(dataset, np.arange(COUNT), 8, image_size=64)
    with torch.inference_mode():
        first = epoch(loader)[0]
    assert torch.equal(epoch(loader)[0], first)
