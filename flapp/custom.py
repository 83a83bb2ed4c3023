"""What code runs here: the digest of flapp's source, and the user's own code, named by targets such as `task:build`.

A module of the user's is looked for in the folder of the command (the setting `code`), and then among the installed
packages. Server and clients compare the digests of its source before any of it runs. A deployed client imports only
what its node-config allows, and what lies in Flower's copy of the app.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import math
import platform
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from flapp.config.load import app_folders
from flapp.config.schema import Config, ConfigError, NodeConfig
from flapp.untrusted import printable

INSTALLED = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib")}
MOST_FILES = 500  # of a package whose source is compared; a larger one is known by its version
NAME = re.compile(r"[A-Za-z0-9_]{1,60}")  # of a metric
# Packages inside the app. A site must allow them by name, because most of their code is not meant to be a target.
RESERVED = ("flapp", "tools")
LONGEST_TEXT = 300  # characters of an error of the user's own code
PACKAGE = Path(__file__).resolve().parent

_imported: dict[str, str] = {}  # by top-level module: the digest of the run's own code when `enable` last saw it
_own_files: set[str] = set()  # that were compared, and whose lines are shown where an error comes from
_allowed: set[str] = set()  # modules that targets may use at a deployed site; empty elsewhere


def read_source() -> dict[str, bytes]:
    """Return flapp's source files by their path in it, sorted."""
    return {str(path.relative_to(PACKAGE)): path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))}


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Return the SHA-256 of flapp's source files: server and clients must run the same."""
    digest = hashlib.sha256()
    for name, content in read_source().items():
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def versions() -> str:
    """Return the versions that decide a client's bytes, as one line."""
    packages = " ".join(f"{name}={version(name)}" for name in ("flwr", "torch", "numpy"))
    return f"python={platform.python_version()} {packages}"


def enable(config: Config, node: NodeConfig | None = None) -> str:
    """Make the run's own code importable, and return the digest of its source, empty if the run has none.

    Raises ConfigError for a module that is not there, and at a deployed client for one that the site does not allow.
    """
    _own_files.clear()
    _allowed.clear()
    if not config.targets:
        return ""
    node = node or NodeConfig()
    at_site = node.client_id is not None or (node.num_partitions > 0 and config.deployment.kind == "superlink")
    folders = _folders_of_command(config)
    if at_site:  # code may come from Flower's copy of the app, and from what the site allows
        folders = [*app_folders(), *(each for each in node.allow_code if Path(each).is_absolute())]
    found = {_top(target): _find(setting, target, folders, at_site) for setting, target in config.targets}
    if at_site:
        allowed = [Path(each).resolve() for each in folders]
        for name, spec in found.items():
            if name not in node.allow_code and (name in RESERVED or _home_of(spec).resolve() not in allowed):
                fix = f'add it to its node-config as allow-code="{name}", or the folder of {name}.py'
                raise ConfigError(f"this site does not allow code of {name}: {fix}")
        _allowed.update(found, node.allow_code)
    files = _read(found.values(), folders)
    lines = (f"{name}\0{_sha256(name, path)}\n" for name, path in sorted(files.items()))
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    for folder in reversed(folders):
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)
    _own_files.update(str(path) for path in files.values() if path is not None)
    for name, spec in found.items():
        _drop_stale(name, spec, digest)
    return digest


def read_code(config: Config) -> dict[str, str]:
    """Return the SHA-256 of each file of the run's own code by its name.

    A large package has a single entry, the SHA-256 of its name and version.
    """
    folders = _folders_of_command(config)
    found = {_top(target): _find(setting, target, folders) for setting, target in config.targets}
    return {name: _sha256(name, path) for name, path in _read(found.values(), folders).items()}


def whole_digest(config: Config) -> str:
    """Return the digest of all source that a run stands on: flapp's and, if it has any, its own."""
    digest = enable(config)
    return hashlib.sha256(f"{source_digest()}{digest}".encode()).hexdigest() if digest else source_digest()


def resolve(setting: str, target: str) -> Callable[..., Any]:
    """Import what a setting names; raises ConfigError when it cannot be imported or called. `enable` comes first."""
    place, _, name = target.partition(":")
    with blaming(f"{setting}={target} cannot be imported"):
        try:
            found: Any = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name and (place == error.name or place.startswith(f"{error.name}.")):
                raise ConfigError(f"{setting}={target}: there is no module {error.name}: correct the name") from error
            raise
    file = getattr(found, "__file__", None) or place
    is_known = file in _own_files or any(Path(file).resolve().is_relative_to(each) for each in (*INSTALLED, PACKAGE))
    if file.endswith(".py") and not is_known:
        fix = "rename your module, or remove the other one from the import path"
        found = f"Python would import {file} under that name, which is not your module"
        raise ConfigError(f"{setting}={target}: {found}: {fix}")
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{setting}={target}: {file} has no {part}: correct the name, or define it there")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{setting}={target} is {type(found).__name__}, which cannot be called: name a function")
    home = str(getattr(found, "__module__", "")).partition(".")[0]
    if _allowed and home not in _allowed:
        fix = f"name a function that {file} defines itself, or add {home} to allow-code in the site's node-config"
        what = f"{setting}={target} is defined in {home or 'no module'}"
        raise ConfigError(f"{what}, whose code this site does not allow: {fix}")
    return found


def own(config: Config, setting: str) -> Callable[..., Any] | None:
    """Return what a setting names in the user's own code, or None where it names nothing of the kind."""
    group, _, key = setting.partition(".")
    value = getattr(getattr(config, group), key)
    return resolve(setting, value) if isinstance(value, str) and ":" in value else None


def describe(error: BaseException, function: object = None) -> str:
    """Return an error in one line, with the file and line of the user's own code that it comes from.

    function: what was called, whose own place is given when the error did not pass through it.
    """
    text = printable(" ".join(str(error).split()), LONGEST_TEXT)
    return f"{type(error).__name__}: {text}{place_of(error) or place_of_code(function)}"


def place_of(error: BaseException) -> str:
    """Return ` (task.py, line 12: x = self.fc(x))` for an error that passed through the user's own code, or nothing."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _own_files]
    return f" ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def place_of_code(function: object) -> str:
    """Return ` (task.py, line 12)`, where a function or class is defined, or nothing for one that is not Python's."""
    code = getattr(function, "__code__", None) or getattr(getattr(function, "__init__", None), "__code__", None)
    return f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""


def source_of(function: Callable[..., Any], name: str) -> str:
    """Return the text of a function, or `name` where it has none, such as a functools.partial."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return name


@contextmanager
def blaming(text: str, function: object = None) -> Iterator[None]:
    """Turn an error of the user's own code into ConfigError; function: see describe."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{text}: {describe(error, function)}") from error


def scores_of(config: Config, sums: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of evaluate.scores for sums over all clients; none without that setting.

    Raises ConfigError for a function that fails or does not return finite numbers by name.
    """
    function = own(config, "evaluate.scores")
    if function is None:
        return {}
    with blaming(f"evaluate.scores={config.evaluate.scores} fails on the sums {printable(dict(sums), 200)}", function):
        return numbers_of(f"evaluate.scores={config.evaluate.scores}", function, function(dict(sums)))


def numbers_of(setting: str, function: object, found: Any) -> dict[str, float]:
    """Return what a function of the user's own gives as plain numbers by name; raises ConfigError for anything else."""
    place = place_of_code(function)
    if not isinstance(found, Mapping):
        raise ConfigError(f"{setting} returned {type(found).__name__}{place}: return a dict of numbers")
    if odd := [name for name in found if not isinstance(name, str) or not NAME.fullmatch(name)]:
        raise ConfigError(f"{setting} returned the name {odd[0]!r}{place}: use at most 60 letters, digits and _")
    numbers = {}
    for name, value in found.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{setting} returned {name} as {type(value).__name__}{place}: return a number") from error
        if not math.isfinite(numbers[name]):
            raise ConfigError(f"{setting} returned {name}={numbers[name]}{place}: return a finite number")
    return numbers


def _folders_of_command(config: Config) -> list[str]:
    """Return the folder of the command, in which targets are looked for before the installed packages."""
    return [config.code] if config.code is not None and Path(config.code).is_dir() else []


def _top(target: str) -> str:
    return target.partition(":")[0].partition(".")[0]


def _find(setting: str, target: str, folders: list[str], at_site: bool = False) -> ModuleSpec:
    """Return where the module of a target is, without importing it."""
    name = _top(target)
    spec = PathFinder.find_spec(name, folders)
    with suppress(ValueError):  # a module that was made by hand has no spec
        spec = spec or importlib.util.find_spec(name)
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        where = f"{folders[0]} has no {name}.py, and no package {name} is installed" if folders else "nothing has it"
        fix = f"give the command in the folder of {name}.py, set code=DIR to that folder, or install the package"
        if at_site:
            where = "no package of that name is installed at this site"
            fix = f"set allow-code to the folder of {name}.py in its node-config, or install {name} and allow it"
        raise ConfigError(f"{setting}={target}: there is no module {name} ({where}): {fix}")
    return spec


def _home_of(spec: ModuleSpec) -> Path:
    """Return the folder in which a top-level module or package lies."""
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).parent
    return Path(str(spec.origin)).parent


def _read(specs: Iterable[ModuleSpec], folders: list[str]) -> dict[str, Path | None]:
    """Return the files of modules and of what these import from their own folder or `folders`, by their names.

    A large installed package, or a module without a file, is listed as `name==version`, with None as its path.
    """
    found: dict[str, Path | None] = {}
    waiting = list(specs)
    while waiting:
        spec = waiting.pop()
        home, name = _home_of(spec), spec.name
        if home == PACKAGE.parent and name == PACKAGE.name:
            continue  # source_digest covers it
        paths = _files_of(home / name) if spec.submodule_search_locations else [Path(str(spec.origin))]
        is_large = len(paths) > MOST_FILES and home.resolve() in INSTALLED
        if is_large or not paths or not paths[0].is_file():
            found[f"{name}=={_version(name)}"] = None
            continue
        new = [path for path in paths if found.setdefault(str(path.relative_to(home)), path) is path]
        if home.resolve() in INSTALLED:
            continue  # other modules there are other packages
        known = {Path(each).parts[0].removesuffix(".py") for each in found} | {PACKAGE.name}
        tops = {top for path in new for top in _facts_of(path)[1]} - known
        inner = (PathFinder.find_spec(top, [str(home), *folders]) for top in sorted(tops))
        waiting += [spec for spec in inner if spec is not None and (spec.origin or spec.submodule_search_locations)]
    return found


def _files_of(package: Path) -> list[Path]:
    """Return the Python files of a package, without those in hidden folders such as .venv."""
    found = package.rglob("*.py")
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(package).parts))


def _sha256(name: str, path: Path | None) -> str:
    return hashlib.sha256(name.encode()).hexdigest() if path is None else _facts_of(path)[0]


def _facts_of(path: Path) -> tuple[str, frozenset[str]]:
    """Return the SHA-256 of a file and what it imports; it is read again only when it has changed."""
    facts = path.stat()
    return _read_facts(path, facts.st_mtime_ns, facts.st_size, facts.st_ino)


@lru_cache(maxsize=4096)
def _read_facts(path: Path, *_: int) -> tuple[str, frozenset[str]]:
    content = path.read_bytes()
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError):
        nodes = []  # importing it gives the error with its line
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return hashlib.sha256(content).hexdigest(), frozenset(name.partition(".")[0] for name in names)


@lru_cache(maxsize=64)
def _version(name: str) -> str:
    try:
        return version(packages_distributions().get(name, [name])[0])
    except PackageNotFoundError:
        return "unknown"


def _drop_stale(name: str, spec: ModuleSpec, digest: str) -> None:
    """Forget a module that was imported from another file, or before its source changed, so that it is read anew."""
    module = sys.modules.get(name)
    if module is not None and _home_of(spec).resolve() not in INSTALLED:
        is_other = (module.__spec__.origin if module.__spec__ else None) != spec.origin
        if is_other or _imported.get(name, digest) != digest:
            for key, each in list(sys.modules.items()):
                file = getattr(each, "__file__", None)
                if key.partition(".")[0] == name or file in _own_files:
                    del sys.modules[key]
                    if file in _own_files:  # old bytecode looks valid after an edit of equal size in the same second
                        Path(importlib.util.cache_from_source(file)).unlink(missing_ok=True)
            importlib.invalidate_caches()
    _imported[name] = digest
