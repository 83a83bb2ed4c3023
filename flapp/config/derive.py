"""Fill in settings that follow from others: the shape from the prepared data, the model from its weights, and so on."""

from pathlib import Path
from typing import Any

from flapp.config.schema import ConfigError
from flapp.model.layout import PLAIN, SIZES
from flapp.model.vit_weights import describe
from flapp.untrusted import printable

OF_DATASET = ("shape", "classes", "normalization")
NORMALIZATION = "half"  # where neither the settings nor the prepared dataset say one


def leave_open(values: dict[str, Any]) -> bool:
    """Replace null settings of a dataset that is about to be prepared: by shape [], 0 classes and the usual scaling.

    Returns whether there are any. Such settings cannot be checked together with others.
    """
    unset = _unset(values)
    _refuse_own(values)
    nothing = {"shape": [], "classes": 0, "normalization": NORMALIZATION}
    for key in unset:
        values["dataset"][key] = nothing[key]
    return bool(unset)


def derive(values: dict[str, Any], reads_weights: bool = True) -> None:
    """Fill in settings, plain nested values that are not checked yet, in place; raises ConfigError.

    reads_weights: whether pretrained weights may be read. An app may not: each machine has its own, and server and
    clients must build the same model.
    """
    if isinstance(values.get("dataset"), dict):
        _fill_dataset(values)
    if isinstance(values.get("model"), dict):
        _fill_model(values["model"], reads_weights)
    if isinstance(values.get("privacy"), dict):
        _fill_noise(values)


def _fill_noise(values: dict[str, Any]) -> None:
    """Fill in where noise comes from, so that a run that is resumed in another runtime cannot change it unnoticed."""
    privacy, deployment = values["privacy"], values.get("deployment")
    if privacy.get("kind") == "central" and privacy.get("noise") is None and isinstance(deployment, dict):
        privacy["noise"] = "secure" if deployment.get("kind") == "superlink" else "seeded"


def _fill_dataset(values: dict[str, Any]) -> None:
    """Fill in shape, classes and normalization, where they are null, from the prepared artifact or shards."""
    dataset, unset = values["dataset"], _unset(values)
    if not unset or not isinstance(dataset.get("name"), str) or not isinstance(values.get("home"), str):
        return  # there is nothing to do, or the check of types says what is wrong
    _refuse_own(values)
    target = dataset.get("target")
    found = {"normalization": NORMALIZATION} | ({} if target else _read_facts(values))
    if set(unset) <= found.keys():
        dataset |= {key: found[key] for key in unset}
    elif target:
        raise ConfigError(f"dataset.target={target} makes the data on first use: set dataset.shape and dataset.classes")
    else:
        folder, name = Path(values["home"]) / "data" / dataset["name"], dataset["name"]
        raise ConfigError(
            f"dataset {name} is not prepared in {folder}: prepare it with python -m tools.prepare_data dataset=custom "
            f"dataset.name={name} dataset.source=DIR, or set dataset.shape and dataset.classes if it lies elsewhere"
        )


def _refuse_own(values: dict[str, Any]) -> None:
    """Raise ConfigError if dataset.name is one of flapp's own but its shape, classes or normalization is null."""
    from flapp.data.sources import is_own  # not needed for most settings

    name = values["dataset"].get("name") if _unset(values) else None
    if name is not None and is_own(name):
        fix = f"choose another dataset.name, or use dataset={name}"
        raise ConfigError(f"dataset.name={name} is a dataset of flapp's own: {fix}")


def _unset(values: dict[str, Any]) -> list[str]:
    dataset = values.get("dataset")
    return [key for key in OF_DATASET if key in dataset and dataset[key] is None] if isinstance(dataset, dict) else []


def _read_facts(values: dict[str, Any]) -> dict[str, Any]:
    """Return what the prepared dataset says of itself, nothing if it is not on this machine."""
    from flapp.data.artifact import DataError, read_meta  # not needed for most settings
    from flapp.data.shards.manifest import read_facts

    folder, settings = Path(values["home"]) / "data" / values["dataset"]["name"], values.get("distributed_data")
    shards = settings if isinstance(settings, dict) else {}
    manifest = Path(str(shards.get("manifest") or shards.get("shard_path") or folder / "shards"))
    manifest = manifest / "manifest.json" if manifest.is_dir() else manifest
    try:
        if manifest.exists() and (shards.get("enabled") is True or not (folder / "train" / "meta.json").exists()):
            shape, classes, normalization = read_facts(manifest)[1].settings
        elif (folder / "train" / "meta.json").exists():
            meta = read_meta(folder / "train")
            shape, classes, normalization = meta["images"]["shape"][1:], len(meta["classes"]), meta.get("normalization")
        else:
            return {}
    except DataError as error:
        raise ConfigError(str(error)) from error
    return {"shape": list(shape), "classes": classes} | ({"normalization": normalization} if normalization else {})


def _fill_model(model: dict[str, Any], reads_weights: bool) -> None:
    """Fill in what pretrained weights say of the model that they are for.

    With model=pretrained, weights that cannot be used are refused here. Otherwise the server refuses them before the
    first round. It also refuses settings that contradict them.
    """
    path, name = model.get("pretrained"), model.get("name")
    if name == "pretrained" and not reads_weights:
        raise ConfigError("model=pretrained is for commands, which read the weights: name the model, such as vit_b_16")
    if name == "pretrained" and path is None:
        raise ConfigError("model=pretrained takes its size from a file of weights: set model.pretrained=PATH")
    if not isinstance(path, str) or not reads_weights or name not in ("pretrained", *SIZES):
        return
    if name != "pretrained" and not Path(path).exists():
        return
    try:
        weights = describe(Path(path))
    except ValueError as error:
        if name == "pretrained":
            said = printable(error, 1000)
            raise ConfigError(f"model=pretrained takes its size from model.pretrained: {said}") from error
        return
    if name == "pretrained":
        model |= {"name": weights.size, "channels": model.get("channels") or weights.channels}
        model["image_size"] = model.get("image_size") or weights.image_size
    for key, value in weights.variant.given().items():
        if model.get(key) is None and value != vars(PLAIN)[key]:
            model[key] = value
