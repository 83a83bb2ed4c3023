"""Split models, store their components, and load them again, each alone if wished."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flapp.model.files import FORMAT_VERSION, mismatch, shapes_of
from flapp.model.split.component import ModelType, Part, SplitModel
from flapp.model.split.files import (
    COMPONENTS,
    StorageManager,
    check_component,
    check_points,
    read_component,
    write_components,
)
from flapp.model.split.vit import VIT
from flapp.untrusted import printable

# What torch and transformers raise for sizes and names that make no sense.
BUILD_ERRORS = (ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError, AssertionError)


def _gpt2() -> ModelType:
    try:
        from flapp.model.split.gpt2 import GPT2
    except ModuleNotFoundError as error:
        raise ValueError(f"model_type=gpt2 needs {error.name}: pip install 'flapp[split]'") from error
    return GPT2


class ModelFactory:
    """Split models, and build components from their files."""

    types: dict[str, Callable[[], ModelType]] = {"vit": lambda: VIT, "gpt2": _gpt2}  # noqa: RUF012 - filled by register

    @classmethod
    def register(cls, model_type: str, load: Callable[[], ModelType]) -> None:
        """Add a type of model; load() is called whenever the type is used."""
        cls.types[model_type] = load

    @classmethod
    def create_split_models(
        cls,
        model_type: str,
        model_name_or_path: str | Path,
        split_point_1: int,
        split_point_2: int,
        device: str | torch.device = "cpu",
        storage_path: str | Path | None = None,
        auto_save: bool = False,
        *,
        name: str | None = None,
        overwrite: bool = False,
        **settings: Any,
    ) -> tuple[SplitModel, SplitModel, SplitModel]:
        """Return bottom, trunk and top of a model, in eval mode; with auto_save, also store them in storage_path.

        model_name_or_path: of a `vit`, a file of weights that load_pretrained takes, or a run's folder; of a `gpt2`, a
        folder or a name on the hub. settings: `dropout` for `vit`, `attn_implementation` for `gpt2`. name: what the
        files are called, by default the model's name. Raises ValueError unless 0 < split_point_1 < split_point_2 <
        layers, and if reading or storing fails.
        """
        if auto_save and storage_path is None:
            raise ValueError("auto_save=True needs storage_path: say where the components are to be stored")
        place = storage_path if auto_save else None
        kind, points = cls._type(model_type), (split_point_1, split_point_2)
        check_points(*points)
        whole = kind.read(model_name_or_path, **settings)
        check_points(*points, whole.num_layers)
        name = name or whole.name
        if place is not None:
            StorageManager.check(place, name, *points, overwrite)
        about = (points, whole.num_layers, whole.config, whole.sha256)
        parts = [Part(model_type, name, component, *about) for component in COMPONENTS]
        bottom, trunk, top = models = [_fill(_skeleton(kind, part), part, whole.tensors) for part in parts]
        if lost := whole.tensors.keys() - {key for model in models for key in model.state_dict()}:
            found = f"{model_name_or_path} has {len(lost)} tensors that belong to no component, first {min(lost)}"
            raise ValueError(f"{found}: save the weights without them")
        for model in models:
            model.to(device)
        _join(models)
        if place is not None:
            paths = [StorageManager.get_split_model_path(place, name, *points, component) for component in COMPONENTS]
            contents = [(model.state_dict(), model.facts()) for model in models]
            write_components(dict(zip(paths, contents, strict=True)), overwrite)
        return bottom, trunk, top

    @classmethod
    def load_split_models(
        cls,
        storage_path: str | Path,
        model_name: str | None = None,
        split_point_1: int | None = None,
        split_point_2: int | None = None,
        components: Sequence[str] = COMPONENTS,
        device: str | torch.device = "cpu",
    ) -> tuple[SplitModel, ...]:
        """Return components of one split, in eval mode; name and points are needed where several splits are stored.

        The whole model is never built. Raises ValueError when a file is missing, damaged or not what its name says, or
        when the components are not from one split of one model.
        """
        name, p1, p2 = _choose(storage_path, model_name, split_point_1, split_point_2)
        models = []
        for component in components:
            path = StorageManager.get_split_model_path(storage_path, name, p1, p2, component)
            model = cls.load_component(path, device)
            found = model.part
            if (found.name, found.split_points, found.component) != (name, (p1, p2), component):
                what = f"the {found.component} of {found.name} split at {'{}-{}'.format(*found.split_points)}"
                raise ValueError(f"{path} holds {what}: give the file its own name back, or store the split again")
            models.append(model)
        _join(models)
        return tuple(models)

    @classmethod
    def load_component(cls, path: str | Path, device: str | torch.device = "cpu") -> SplitModel:
        """Build the component stored at `path`, in eval mode, after checking its metadata and digest."""
        found, tensors = read_component(path)
        check_component(found.component)
        kind = cls._type(found.model_type)
        try:
            p1, p2 = found.split_points
            check_points(p1, p2, found.num_layers)
            about = ((p1, p2), found.num_layers, found.config, found.model_sha256)
            part = Part(found.model_type, found.name, found.component, *about)
            first, end = part.layers
            if end - first > len(tensors):
                raise ValueError(f"it claims {end - first:,} layers, but has only {len(tensors)} tensors")
            model = _skeleton(kind, part)
        except BUILD_ERRORS as error:
            said = printable(repr(error))
            raise ValueError(f"{path} has metadata from which no {found.component} can be built ({said})") from error
        if fault := mismatch(shapes_of(model.state_dict()), shapes_of(tensors)):
            raise ValueError(f"{path} does not fit its metadata: {fault}")
        model = _fill(model, part, tensors)
        if {"format_version": FORMAT_VERSION, **model.facts()} != found.facts():
            raise ValueError(f"{path} is not what its metadata says: it was stored by another program")
        return model.to(device)

    @classmethod
    def _type(cls, model_type: str) -> ModelType:
        if model_type not in cls.types:
            model_type = printable(model_type, 60)
            raise ValueError(f"model_type={model_type} is not known: choose one of {', '.join(sorted(cls.types))}")
        return cls.types[model_type]()


def _skeleton(kind: ModelType, part: Part) -> SplitModel:
    """Build a component without memory for its tensors."""
    with torch.device("meta"):
        return kind.components[part.component](part.config, *part.layers)


def _fill(model: SplitModel, part: Part, tensors: Mapping[str, Tensor]) -> SplitModel:
    """Give a skeleton its tensors, without copying them."""
    own = model.state_dict()
    found = {name: tensors[name] for name in own if name in tensors}
    if fault := mismatch(shapes_of(own), shapes_of(found)):
        raise ValueError(f"{part.name} does not fit {type(model).__name__}: {fault}")
    model.load_state_dict(found, assign=True)
    model.part = part
    return model.eval()


def _join(models: Sequence[SplitModel]) -> None:
    """Let components of one model share their tied parameters.

    Raises ValueError if these differ, or if the components are of different models.
    """
    by_component = {model.part.component: model for model in models}
    for model in models:
        first, other = models[0].part, model.part
        if first.model_sha256 != other.model_sha256 or first.config != other.config:
            digests = f"{first.model_sha256[:12]} and {other.model_sha256[:12]}"
            found = f"{first.component} and {other.component} of {first.name} are of different models ({digests})"
            raise ValueError(f"{found}: store the split again")
        for name, source in model.tied.items():
            component, _, there = source.partition(":")
            if component not in by_component:
                continue
            shared = by_component[component].get_parameter(there)
            owner, _, leaf = name.rpartition(".")
            if not torch.equal(model.get_parameter(name), shared):
                found = f"{name} of {other.component} differs from {source}, which it is tied to"
                raise ValueError(f"{found}: store the split again")
            setattr(model.get_submodule(owner), leaf, shared)


def _choose(base: str | Path, name: str | None, p1: int | None, p2: int | None) -> tuple[str, int, int]:
    """Return the only split below `base` that fits what is given; raises ValueError for none or several."""
    wanted = (name, p1, p2)
    splits = StorageManager.find_splits(base)
    found = [s for s in splits if all(w is None or w == f for w, f in zip(wanted, s, strict=True))]
    there = ", ".join(f"{n} {a}-{b}" for n, a, b in found or splits)
    if len(found) > 1:
        raise ValueError(f"{base} has several splits ({there}): give the name and the points of one")
    if not splits:
        raise ValueError(f"{base} has no split model: name the folder that split models were stored in")
    if not found:
        wanted_split = f"name={name} with points {p1} and {p2}"
        raise ValueError(f"{base} has {there}, but not {wanted_split}: give the name and the points of a stored split")
    return found[0]
