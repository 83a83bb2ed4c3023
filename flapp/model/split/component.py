"""What the components of every type of model share: what each is part of, its tensors, and how it is saved.

    bottom   the modules that turn inputs into tokens, and layers 0 to p1 - 1
    trunk    layers p1 to p2 - 1
    top      layers p2 to the last, and the modules that turn tokens into outputs

top(trunk(bottom(x))) is the whole model bit for bit (on a CPU, in eval mode). Tensors keep the whole model's names.
vit.py and gpt2.py have the types of models, factory.py splits and loads them, files.py has the files.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flapp.model.split.files import COMPONENTS, Metadata, write_components


@dataclass(frozen=True)
class Part:
    """Which part of which model a component is, and the JSON values that it can be built from."""

    model_type: str
    name: str
    component: str
    split_points: tuple[int, int]
    num_layers: int
    config: Mapping[str, Any]
    model_sha256: str

    @property
    def layers(self) -> tuple[int, int]:
        """Return the first layer and the one after the last."""
        bounds = (0, *self.split_points, self.num_layers)
        place = COMPONENTS.index(self.component)
        return bounds[place], bounds[place + 1]


class SplitModel(nn.Module):
    """A component; `tied` names its parameters that are another component's: {own name: "component:name there"}."""

    part: Part
    tied: Mapping[str, str] = {}

    def save_split_model(self, path: str | Path, save_metadata: bool = True, *, overwrite: bool = False) -> Metadata:
        """Write weights to `path`, which ends in .safetensors, and metadata beside; raises ValueError."""
        if not save_metadata:
            raise ValueError(f"{path} cannot be checked without its metadata: leave save_metadata out")
        return write_components({Path(path): (self.state_dict(), self.facts())}, overwrite)[0]

    def facts(self) -> dict[str, Any]:
        """Return the metadata that does not depend on the files."""
        tensors = self.state_dict().values()
        start, end = self.part.layers
        return asdict(self.part) | {
            "split_points": list(self.part.split_points),
            "model_class": type(self).__name__,
            "start_layer": start,
            "end_layer": end,
            "num_parameters": sum(p.numel() for name, p in self.named_parameters() if name not in self.tied),
            "tied": dict(self.tied),
            "dtype": "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
            "memory_mb": sum(tensor.nbytes for tensor in tensors) / 2**20,
        }


@dataclass(frozen=True)
class Whole:
    """A whole model that was read: its name, tensors and digest, and the JSON values to build components from."""

    name: str
    config: Mapping[str, Any]
    num_layers: int
    tensors: Mapping[str, Tensor]
    sha256: str


@dataclass(frozen=True)
class ModelType:
    """A type of model: read(source, **settings) returns a Whole; components are built from (config, start, end)."""

    read: Callable[..., Whole]
    components: Mapping[str, Callable[[Mapping[str, Any], int, int], SplitModel]]
