"""Datasets of the Hugging Face hub, downloaded once by the `datasets` library."""

import re
import shutil
from pathlib import Path

from flapp.data.artifact import DataError, locked, remove_leftovers
from flapp.files import replacing_folder
from flapp.untrusted import printable

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def download_dataset(name: str, raw: Path, again: bool = False) -> Path:
    """Download a dataset of the hub, such as flwrlabs/femnist, into `raw` and return its folder there.

    It is saved by save_to_disk, with its images in it. A folder that is there already is kept, or with `again`
    replaced. Raises DataError if the hub cannot be reached or has no such dataset.
    """
    if not _NAME.fullmatch(name):
        raise DataError(f"dataset.hub={printable(name, 100)} is not a name on the hub: give owner/name")
    folder = raw / name.replace("/", "--")
    with locked(folder.with_name(f"{folder.name}.lock")):
        remove_leftovers(folder)
        if again or not folder.exists():
            with replacing_folder(folder) as partial:
                _save(name, partial)
    return folder


def _save(name: str, folder: Path) -> None:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from huggingface_hub import logging as hub_logging
        from pyarrow import ArrowException
    except ImportError:
        fix = 'install what it needs with pip install -e ".[data]", or download the files and set dataset.source'
        raise DataError(f"{name} is downloaded by the datasets library, which is missing: {fix}") from None
    hub_logging.set_verbosity_error()  # each retry would be two lines; the error below says what failed
    try:
        load_dataset(name, cache_dir=str(folder / "cache")).save_to_disk(str(folder))
    except (OSError, ValueError, RuntimeError, DatasetsError, ArrowException) as error:
        said = printable(" ".join(str(error).split()) or type(error).__name__)
        fix = "check the name and the network, or download the files elsewhere and set dataset.source to their folder"
        raise DataError(f"{name} cannot be downloaded ({said}): {fix}") from error
    shutil.rmtree(folder / "cache")
