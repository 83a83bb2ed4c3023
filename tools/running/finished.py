"""Open the final model of a finished run, for commands that use it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapp.config.load import from_dict, read_yaml
from flapp.config.schema import Config, ConfigError, DatasetConfig, ModelConfig
from flapp.custom import enable, read_code
from flapp.files import sha256_of_file
from flapp.server.journals import Journal
from flapp.server.run_names import CLASSES
from flapp.untrusted import check_safetensors, printable, read_json

if TYPE_CHECKING:
    from torch import nn

MODEL = "model.safetensors"


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its settings, and the names of its classes, which are numbers if the run did not know them."""

    path: Path
    config: Config
    classes: Sequence[str]

    def model(self) -> "nn.Module":
        """Return the final model, ready to evaluate."""
        return load_model(self.path, self.config.model, self.config.dataset)


def load_model(run: Path, model: ModelConfig, dataset: DatasetConfig) -> "nn.Module":
    """Return the final model of the run directory `run`, ready to evaluate."""
    from flapp.architecture import build  # imports PyTorch
    from flapp.model.files import read_tensors

    whole = build(model, dataset)
    whole.load_state_dict(read_tensors(run / MODEL)[0])
    return whole.eval()


def open_run(run: Path) -> FinishedRun:
    """Open a finished run; raises ValueError when it is not one, or when its own code has changed since."""
    values = read_finished(run)
    try:
        config = from_dict(values)
    except ConfigError as error:
        raise ValueError(f"{run} was made by another version of flapp: {error}") from error
    if config.strategy.aggregation == "fedsa":
        raise ValueError(
            f"{run} was trained with fedsa, which keeps a part of each client's model at the client: its "
            "model.safetensors lacks it"
        )
    enable(config)
    lines = Journal(run / "environment.jsonl").read()
    recorded = lines[-1].get("files", {}) if lines else {}
    if changed := sorted(name for name, sha256 in read_code(config).items() if recorded.get(name) != sha256):
        raise ValueError(f"{changed[0]} has changed since {run} was trained: bring back the file as it was")
    return FinishedRun(run, config, _read_classes(run, config.dataset.classes))


def read_finished(run: Path) -> dict[str, Any]:
    """Return the settings of a finished run after checking its model's SHA-256 against its summary.

    Raises ValueError for anything else than the directory of a finished run.
    """
    try:
        config, summary = read_yaml(run / "config.yaml"), read_json(run / "metrics.json")
        check_safetensors(run / MODEL)
        digest = sha256_of_file(run / MODEL)
        if not isinstance(summary, dict) or not {"run_name", "model", "dataset"} <= config.keys():
            raise ValueError("its config.yaml or metrics.json is damaged")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{run} is not the directory of a finished run ({reason})") from error
    status, said = (printable(summary.get(key)) for key in ("status", "model_sha256"))
    if status != "finished":
        raise ValueError(f"the run in {run} is not finished (status {status}): resume it with resume=true")
    if said != digest:
        raise ValueError(
            f"{run / MODEL} has SHA-256 {digest[:12]}, metrics.json says {said[:12]}: restore it from a copy"
        )
    return config


def _read_classes(run: Path, count: int) -> list[str]:
    path = run / CLASSES
    if not path.exists():
        return [str(number) for number in range(count)]
    try:
        names = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({printable(error)}): remove it to have numbers instead") from error
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} does not hold {count} names: remove it to have numbers instead")
    return [printable(name) for name in names]
