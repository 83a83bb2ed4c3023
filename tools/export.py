"""Write the final model of a finished run as another library loads it.

    python -m tools.export RUN_DIR --to torchvision --out DIR      a ViT: model.pth, a state dict of torchvision's
    python -m tools.export RUN_DIR --to transformers --out DIR     a ViT: a folder as save_pretrained writes it
    python -m tools.export RUN_DIR --to timm --out DIR             a ViT: a folder that timm loads as local-dir:DIR
    python -m tools.export RUN_DIR --to peft --out DIR             the adapter, and in base/ the model for it
    python -m tools.export RUN_DIR --to onnx --out DIR             any model: model.onnx, checked with onnxruntime

In all but peft, adapters are merged into the model. The outputs of model.onnx in onnxruntime are compared with
PyTorch's. DIR must be new or empty. Prints how to load what was written. Exits 0, or 1 with one line on standard error.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flapp.files import replacing_folder, write_json
from tools.cli import errors_in_one_line, new_parser
from tools.running.finished import FinishedRun, open_run

LIBRARIES = ("torchvision", "transformers", "timm", "peft", "onnx")


def export(run: FinishedRun, library: str, out: Path) -> str:
    """Write the model for a library into `out`, whole or not at all, and return how to load it; raises ValueError."""
    from tools.exporting import adapters, onnx_file, vits

    writers = {
        "torchvision": vits.write_torchvision,
        "transformers": vits.write_transformers,
        "timm": vits.write_timm,
        "peft": adapters.write_peft,
        "onnx": onnx_file.write_onnx,
    }
    missing = [folder for folder in out.parents if not os.path.exists(folder)]
    try:
        is_empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir()) and not out.samefile(".")
        if os.path.lexists(out) and not is_empty:
            raise ValueError(f"--out {out} is not a new or empty folder: name a new folder with --out")
        with replacing_folder(out, is_new=True) as partial:
            usage = writers[library](run, partial)
            write_json(partial / "classes.json", list(run.classes))
    except BaseException as error:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise ValueError(f"--out {out} cannot be written ({reason}): name a new folder with --out") from error
        raise
    # `usage` writes the path between single quotes. The double quote in front makes repr escape the path for these.
    return usage.format(out=repr(f'"{out}')[2:-1])


@errors_in_one_line(OSError, ValueError)
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model and print how to load it."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("run_dir", type=Path)
    add("--to", choices=LIBRARIES, required=True, help="the library that should load the model")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    given = parser.parse_args(arguments)
    usage = export(open_run(given.run_dir), given.to, given.out)
    print(f"wrote {given.out}\n{usage}")


if __name__ == "__main__":
    sys.exit(main())
