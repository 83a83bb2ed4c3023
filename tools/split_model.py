"""Split the final ViT of a finished run into bottom, trunk and top, and save each as a file.

    python -m tools.split_model RUN_DIR --points 2 10 --out DIR [--check] [--overwrite]

In RUN_DIR/model.safetensors, adapters are already merged into the model. --check loads the three from their files again
and compares their output with that of the whole model, bit for bit. Prints the files; exits 0, or 1 with one line on
standard error.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flapp.config.plain import from_plain
from flapp.config.schema import DatasetConfig, ModelConfig
from flapp.model.split.files import COMPONENTS, StorageManager
from tools.cli import errors_in_one_line, new_parser
from tools.running.finished import MODEL, load_model, read_finished

if TYPE_CHECKING:
    from torch import nn

    from flapp.model.split.component import SplitModel


def split_run(run: Path, points: Sequence[int], out: Path, check: bool, overwrite: bool) -> Iterator[str]:
    """Split the model of the run directory `run` and yield lines to print; raises ValueError."""
    config = read_finished(run)
    from flapp.model.split.factory import ModelFactory  # imports PyTorch

    model = from_plain(ModelConfig, config["model"], "model.")
    name, (p1, p2) = StorageManager.get_model_name(str(config["run_name"])), points
    for part in ModelFactory.create_split_models(
        "vit", run / MODEL, p1, p2, "cpu", out, True, name=name, overwrite=overwrite, dropout=model.dropout
    ):
        component, (start, end) = part.part.component, part.part.layers
        count = sum(parameter.numel() for parameter in part.parameters())
        path = StorageManager.get_split_model_path(out, name, p1, p2, component)
        yield f"{component:<6}  layers {start} to {end - 1}  {count:>11,} parameters  {path}"
    if check:
        whole = load_model(run, model, from_plain(DatasetConfig, config["dataset"], "dataset."))
        yield compare(whole, ModelFactory.load_split_models(out, name, p1, p2))


def compare(whole: "nn.Module", models: Sequence["SplitModel"]) -> str:
    """Compare outputs for random images bit for bit; raises ValueError when one differs."""
    import torch

    bottom, trunk, top = models
    config = bottom.part.config
    images = torch.rand(4, config["channels"], config["image_size"], config["image_size"])
    with torch.no_grad():
        found, expected = top(trunk(bottom(images))), whole(images)
    if not torch.equal(found, expected):
        worst = (found - expected).abs().max().item()
        raise ValueError(f"the components do not give the whole model's output: it differs by up to {worst:g}")
    return f"checked: top(trunk(bottom(x))) is the whole model's output, bit for bit, for {len(images)} images"


@errors_in_one_line(ValueError)
def main(arguments: Sequence[str] | None = None) -> None:
    """Split the model of a run and print the files."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("run_dir", type=Path)
    add("--points", type=int, nargs=2, required=True, metavar=("P1", "P2"), help="first layer of trunk and of top")
    add("--out", type=Path, required=True, help=f"folder of {', '.join(COMPONENTS)}")
    add("--check", action="store_true", help="reload the files and compare with the whole model")
    add("--overwrite", action="store_true", help="replace files of the same name and points")
    given = parser.parse_args(arguments)
    print("\n".join(split_run(given.run_dir, given.points, given.out, given.check, given.overwrite)))


if __name__ == "__main__":
    sys.exit(main())
