"""Make a folder with a project of your own: a network, its loss and metrics, and one experiment that runs as it is.

    python -m tools.new mine                       images: a small network on the digits
    python -m tools.new mine --template text       token ids: a GRU on made-up texts
    python -m tools.new mine --template tabular    rows of a table: class weights, precision and recall

Then `cd mine` and `flapp run`. Edit mine/task.py and mine/conf/experiment/mine.yaml. The folder is a Flower app too:
`flwr run .` runs it.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from flapp.config.load import CONF
from flapp.files import replacing_folder
from tools.cli import as_called, errors_in_one_line, new_parser

TEMPLATES = Path(__file__).with_name("templates")
CHOICES = ("vision", "text", "tabular")
# The files that all templates share, with their names in a project. project.md is not named README.md here, because
# flapp's own app would then contain it (fab-include in pyproject.toml).
SHARED = {"project.md": "README.md", "pyproject.toml": "pyproject.toml"}
PLACEHOLDER = "NAME"
FITTING = re.compile(r"[a-z][a-z0-9_]{0,60}")  # a name of a package, of an experiment and of a dataset
RESERVED = ("flapp", "tools", "task", "conf")


@errors_in_one_line(OSError, ValueError)
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folder and print how to try the project."""
    parser = new_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="NAME", help="a new folder; its name becomes the project's")
    parser.add_argument("--template", choices=CHOICES, default=CHOICES[0], help="what it starts from; default: vision")
    given = parser.parse_args(arguments)
    make(given.folder, given.template)
    print(as_called(f"made {given.folder}; try it with: cd {given.folder} && python -m tools.run"))


def make(folder: Path, template: str) -> None:
    """Write a project into a new folder, whole or not at all; raises ValueError for a name that does not fit."""
    name = folder.name
    if not FITTING.fullmatch(name) or name in RESERVED:
        fix = "use small letters, digits and _, beginning with a letter"
        raise ValueError(f"{name} cannot be the name of a project ({', '.join(RESERVED)} are taken): {fix}")
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another name, or remove it")
    if any((CONF / group / f"{name}.yaml").exists() for group in ("experiment", "dataset")):
        raise ValueError(f"{name} is the name of an experiment or dataset of flapp's own: choose another")
    sources = [TEMPLATES / each for each in SHARED]
    sources += [path for kind in ("*.py", "*.yaml") for path in sorted((TEMPLATES / template).rglob(kind))]
    with replacing_folder(folder) as partial:
        for source in sources:
            place = SHARED.get(source.name) or str(source.relative_to(TEMPLATES / template))
            target = partial / place.replace(PLACEHOLDER, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source.read_text().replace(PLACEHOLDER, name))


if __name__ == "__main__":
    sys.exit(main())
