"""Checks before a run starts, so that a mistake costs seconds and leaves no run folder behind.

tools.run checks before it starts any process, and the ServerApp before it makes the run's folder and waits for clients.
Each check is one that the server or a client would make later. Almost all work without PyTorch, whose import takes
seconds: models are checked by their layout (flapp/model/layout.py). Only a device, a .pth file of
weights, torch.compile and the user's own code need it.
"""

import ctypes
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from flapp.architecture import choose_device, plan, split_place
from flapp.config.schema import WRITER_PARTITIONS, Config, ConfigError
from flapp.custom import enable, resolve
from flapp.data.artifact import Artifact, is_verified, open_artifact
from flapp.data.partition import check_enough
from flapp.data.shards.client import read_meta
from flapp.data.shards.manifest import open_manifest
from flapp.model.adapter_files import check_adapter
from flapp.model.pretrained import check_pretrained
from flapp.model.split.files import StorageManager
from flapp.model.vit_weights import check_normalization_of
from flapp.partitions import check_splits, open_partition, prepared
from flapp.server.client_keys import ClientKeys
from flapp.server.observer import check_tensorboard

QUICK_BYTES = 1 << 30  # of images that are hashed for the first time
QUICK_SHARES = 15_000  # clients x classes: a thousand Dirichlet draws of so many shares take a second
RUN_WEIGHTS = "model.safetensors"
DIGITS_BASE = "digits_base"  # the run that conf/experiment/digits_fedlora.yaml starts from


def check_run(config: Config, clients_here: bool, quick: bool = False) -> None:
    """Raise ConfigError or another ValueError, in one line with the fix, for a fault that would stop every client.

    clients_here: whether the clients run on this machine and read their data from the run's home. quick: leave out
    checks that may take more than a second. Datasets that need no download are prepared, and a new partition is saved.
    """
    check_home(config)
    enable(config)
    if config.results.tensorboard:
        check_tensorboard()
    check_files(config)
    if config.deployment.client_keys is not None:
        ClientKeys(Path(config.deployment.client_keys))
    if config.distributed_data.enabled:
        check_shards(config, clients_here)
    is_divided = clients_here and not config.distributed_data.enabled
    if is_divided or config.evaluate.central:
        check_dataset(config, is_divided)
    check_model(config)
    check_own_code(config, clients_here)
    check_device(config, clients_here)
    if is_divided:
        check_partition(config, quick)


def check_home(config: Config) -> None:
    """Refuse a home in which the run's folder cannot be made."""
    nearest = next(folder for folder in (config.runs_dir, *config.runs_dir.parents) if os.path.exists(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        fault = f"{nearest} is not {'writable' if nearest.is_dir() else 'a folder'}"
        raise ConfigError(f"home={config.home} cannot be used: {fault}; set home to a folder that you may write")


def check_files(config: Config) -> None:
    """Refuse missing files of weights and adapters to start from."""
    weights, adapter = config.model.pretrained, config.lora.adapter
    if weights is not None:
        _check_weights(Path(weights), config)
    if adapter is not None and not Path(adapter).is_dir():
        raise ConfigError(f"lora.adapter={adapter} is not a folder: {_origin_of(Path(adapter), config)}")


def _check_weights(path: Path, config: Config) -> None:
    """Refuse starting weights that do not exist, perhaps because the run that writes them has not finished."""
    if path.parent == config.runs_dir or (path.is_dir() and path.is_relative_to(config.runs_dir)):
        if not (path / RUN_WEIGHTS).is_file():
            fix = _origin_of(path / RUN_WEIGHTS, config)
            raise ConfigError(f"model.pretrained={path} has no {RUN_WEIGHTS}: {fix}")
    elif not path.is_file() and not path.is_dir():
        raise ConfigError(f"model.pretrained={path} is not a file: {_origin_of(path, config)}")


def check_dataset(config: Config, is_divided: bool) -> None:
    """Refuse a dataset that is not prepared, has other samples than the settings say, or too few to divide them."""
    splits = _open_splits(config)
    check_splits(config, *splits)
    if is_divided and config.partition.kind not in WRITER_PARTITIONS:
        check_enough(config.partition.kind, len(splits[0].labels), config.clients, config.partition.min_size)


def check_shards(config: Config, clients_here: bool) -> None:
    """Refuse a manifest of other clients, and a run without any shard; a client without its shard is refused later."""
    data = config.dataset.samples
    manifest = open_manifest(config.manifest_path, config.clients, config.partition.kind, data)
    folders = [config.shards_dir / f"client_{client}" for client in manifest]
    if clients_here and not any((folder / "meta.json").exists() for folder in folders):
        read_meta(folders[0])


def check_partition(config: Config, quick: bool) -> None:
    """Refuse a partition that cannot be made for so many clients; otherwise save it."""
    unread = sum(split.images.nbytes for split in _open_splits(config) if not is_verified(split.path))
    if quick and (unread > QUICK_BYTES or config.clients * config.dataset.classes > QUICK_SHARES):
        return
    open_partition(config)


def check_own_code(config: Config, clients_here: bool) -> None:
    """Refuse code of the user's own that cannot be imported or, if the data are here, fails on the first samples."""
    for setting, target in config.targets:
        resolve(setting, target)
    if not config.targets or (dataset := _find_samples(config, clients_here)) is None:
        return
    from flapp.data.loader import ClientLoader
    from flapp.probe import SAMPLES, probe

    rows = np.arange(min(SAMPLES, len(dataset)))
    probe(config, next(iter(ClientLoader(dataset, rows, len(rows), image_size=config.model.image_size, prefetch=0))))


def _find_samples(config: Config, clients_here: bool) -> Any:
    """Return training samples that are on this machine, or None."""
    from flapp.data.offline import OfflineDataset
    from flapp.data.shards.client import DistributedShardLoader

    normalization = config.dataset.normalization
    if not config.distributed_data.enabled and (clients_here or config.evaluate.central):
        return OfflineDataset(prepared(config) / "train", normalization=normalization)
    folder = next(iter(sorted(config.shards_dir.glob("client_*"))), None) if clients_here else None
    if folder is None:
        return None
    return DistributedShardLoader(folder, normalization=normalization).split("train")


def check_device(config: Config, clients_here: bool) -> None:
    """Refuse a missing device or compiler, if the server or the clients need it on this machine."""
    settings, gpus = config.train, config.deployment.client_gpus
    is_plain = settings.device != "cuda" and not gpus and not settings.compile
    if is_plain or not (clients_here or config.evaluate.central):
        return
    if settings.device == "cuda" and not has_gpu_driver():
        fix = "set train.device=auto or cpu"
        raise ConfigError(f"train.device=cuda, but without a GPU driver there is no CUDA device here: {fix}")
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but PyTorch finds no CUDA device here: set train.device=auto or cpu")
    if config.deployment.kind != "superlink" and clients_here and gpus > torch.cuda.device_count():
        found = f"deployment.client_gpus={gpus:g} is more than the {torch.cuda.device_count()} GPUs there are"
        raise ConfigError(f"{found}: lower it")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch.compile does
    if settings.compile and choose_device(settings.device) == "cpu" and clients_here and not shutil.which(compiler):
        found = f"train.compile=true needs a C++ compiler, and {compiler} is not on the PATH"
        raise ConfigError(f"{found}: install one, name one in CXX, or set train.compile=false")


def has_gpu_driver() -> bool:
    """Say whether there may be a GPU for PyTorch's `cuda`, without the seconds that importing PyTorch takes.

    On Linux that needs NVIDIA's driver library or, for a ROCm build, AMD's device file. Elsewhere PyTorch must say.
    """
    if sys.platform != "linux" or os.path.exists("/dev/kfd"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def check_model(config: Config) -> None:
    """Refuse a model that cannot be built, loaded from its files, adapted, or stored split as the settings say.

    The values of tensors are not read. Their names and shapes, what the weights of a ViT say, and the rank and alpha of
    an adapter are compared with the settings.
    """
    if config.split.auto_save_split_models:
        left = config.resume and (config.runs_dir / config.run_name / "model.safetensors").exists()
        StorageManager.check(*split_place(config), overwrite=left)
    if config.model.pretrained is not None:
        weights = check_pretrained(plan(config.model, config.dataset), Path(config.model.pretrained))
        if weights is not None:
            check_normalization_of(weights, config.dataset.normalization, config.dataset.shape[-1])
    layout = plan(config.model, config.dataset, config.lora)
    if config.lora.adapter is not None:
        check_adapter(layout, Path(config.lora.adapter))


def _open_splits(config: Config) -> tuple[Artifact, Artifact]:
    folder = prepared(config)
    return open_artifact(folder / "train"), open_artifact(folder / "test")


def _origin_of(path: Path, config: Config) -> str:
    if not path.is_relative_to(config.runs_dir) or path.parent == config.runs_dir:
        return "give the path of one that exists"
    run = path.parent
    name = run.relative_to(config.runs_dir)
    default = Path(os.environ.get("FLAPP_HOME") or Path.home() / ".flapp")
    home = "" if Path(config.home) == default else f" home={config.home}"
    if (run / "config.yaml").exists():
        return f"run {name} has not written it; finish that run, with its settings and run_name={name} resume=true"
    if str(name) == DIGITS_BASE:
        return f"make it first with python -m tools.run run_name={name}{home}"
    return f"there is no run {name}; make it first, or give the path of one that exists"
