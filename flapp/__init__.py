"""flapp: a Flower application for federated training, of image models and of your own."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a __getattr__ for a package that imports each public name on first use; homes: the module of each name."""

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package} has no attribute {name}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find
