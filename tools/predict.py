"""Classify images with the final model of a finished run.

    python -m tools.predict RUN_DIR IMAGE...            the classes of each image, the most probable first
    python -m tools.predict RUN_DIR IMAGE... --top 3    the three most probable classes
    python -m tools.predict RUN_DIR IMAGE... --json     all classes, one JSON object per image

Images are read, resized and normalized as the run's own. For an image that cannot be read, the reason is printed on
standard error; the others are classified. Exits 0, or 1 if there was such an image or the run cannot be used.
"""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from flapp.untrusted import printable
from tools.cli import errors_in_one_line, new_parser
from tools.running.finished import FinishedRun, open_run

Scores = list[tuple[str, float]]  # classes and their probabilities, the most probable first


def predict(run: FinishedRun, paths: Sequence[Path]) -> Iterator[tuple[Path, Scores | str]]:
    """Yield for each image its path with the classes and their probabilities, or with why it cannot be classified.

    Raises ValueError for a run whose model does not classify images.
    """
    config = run.config
    if len(config.dataset.shape) != 3 or not config.dataset.classes:
        raise ValueError(f"{run.path} was not trained on images with classes, which this command is for")
    import torch

    from flapp.data.decode import decode, read_image
    from flapp.data.images import normalize, resize
    from flapp.training import outputs_of

    model, size = run.model(), config.model.image_size
    for path in paths:
        pixels = decode(read_image(path), config.dataset.shape)
        if isinstance(pixels, str):
            yield path, pixels
            continue
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        image = normalize(resize(image, size) if size else image, config.dataset.normalization)
        with torch.inference_mode():
            outputs = outputs_of(model, image).float()
        if outputs.shape != (1, config.dataset.classes):
            found = tuple(outputs.shape)
            raise ValueError(f"the model of {run.path} gives outputs of shape {found}, not one for each class")
        shares = outputs[0].softmax(0).tolist()
        yield path, sorted(zip(run.classes, shares, strict=True), key=lambda pair: -pair[1])


@errors_in_one_line(ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the classes of each image; returns the exit status."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("run_dir", type=Path)
    add("images", type=Path, nargs="+", metavar="IMAGE")
    add("--top", type=int, default=5, help="how many classes to print for each image (default 5)")
    add("--json", action="store_true", help="print one JSON object a line, with all classes")
    given = parser.parse_intermixed_args(arguments)  # options may stand between images
    status = 0
    for path, found in predict(open_run(given.run_dir), given.images):
        if isinstance(found, str):
            status = 1
            print(f"error: {printable(path)} cannot be read ({found})", file=sys.stderr)
        elif given.json:
            print(json.dumps({"image": str(path), "classes": dict(found)}))
        else:
            shown = ", ".join(f"{name} {share:.4f}" for name, share in found[: max(1, given.top)])
            print(f"{printable(path)}: {shown}")
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.exit(main())
