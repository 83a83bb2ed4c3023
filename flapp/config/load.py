"""Settings: from conf/ by Hydra, through Flower's run_config and node_config, to one checked, read-only Config.

schema.py names every setting with its type and range; the values are in conf/ only. Commands compose once and send the
result as `config-json`, which the apps read without importing Hydra.
"""

import hashlib
import io
import json
import os
import re
import shlex
import sys
import threading
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from flapp.config.derive import derive, leave_open
from flapp.config.plain import from_plain, hint, setting_types
from flapp.config.rules import PATHS, check_together
from flapp.config.schema import Config, ConfigError, NodeConfig
from flapp.untrusted import DEEPEST, parse_json, printable, read_bytes

PACKAGE = Path(__file__).resolve().parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # of a wheel, or of a checkout
CHANGEABLE_ON_RESUME = (  # a resumed run may change these: they do not affect the final model
    *("home", "code", "run_name", "resume", "resume_from", "resume_anyway", "deployment", "checkpoint", "split"),
    "results",
    *("strategy.wait_for_clients", "strategy.timeout"),
    *("dataset.source", "dataset.download", "dataset.hub", "dataset.test_fraction", "dataset.skip_unreadable"),
    *("dataset.image_column", "dataset.label_column", "dataset.client_column"),
    *("distributed_data.shard_path", "distributed_data.manifest"),
    *("model.pretrained", "lora.adapter"),  # paths of the files to start from; a base is compared by its digest
)
# A resumed run must keep this setting, though it does not affect the model. Runs of an older flapp lack it: they
# behaved as with this value.
KEPT_ON_RESUME = {"privacy.publish": "all"}
MOST_YAML = 256 << 10  # bytes of a run's config.yaml, which has a few kB
MOST_NODES = 20_000  # keys and values in it; OmegaConf takes seconds for as many
MOST_SCALAR = 4096  # characters of a value without quotes: a number of more digits takes quadratic time
PLAIN = re.compile(r"[A-Za-z0-9._-]+")  # a value that can be part of a run's name: one choice, not several of a sweep
HOME = re.compile(r"(\+{0,2}[\w.]+=)~((?:/[^\s,'\"\[\]{}]*)?)")  # key=~ or key=~/..., one value
SERVER_APP = "flapp.server_app:app"
_compose_lock = threading.Lock()  # GlobalHydra is one per process and not thread-safe


def load(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> tuple[Config, NodeConfig]:
    """Return the checked config of a run and the facts of this node; the node's home wins. Raises ConfigError.

    run_config holds `config-json`, which wins, or `overrides`, words of Hydra's grammar separated by spaces.
    """
    text, overrides = (str(run_config.get(key, "")) for key in ("config-json", "overrides"))
    site = read_node_config(node_config)
    config = _config_of(text, overrides, os.environ.get("FLAPP_HOME", ""), site.home or "")
    return (replace(config, home=site.home) if site.home else config), site


@lru_cache(maxsize=8)
def _config_of(text: str, overrides: str, home: str, own_home: str) -> Config:
    """Return the config of a run; home is part of the key, because conf/ reads it from the environment.

    own_home: the node's own, whose data decide what the overrides leave open.
    """
    if not text:
        return compose(shlex.split(overrides), home=own_home)
    try:
        return from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"config-json is not JSON ({error}): let tools.run write it") from error


def read_node_config(node_config: Mapping[str, Any]) -> NodeConfig:
    """Read a node's own facts from Flower's node_config; raises ConfigError for a key that nothing reads."""
    paths = ("shard-path", "checkpoint-dir", "home")
    known: dict[str, Any] = {"client-id": str, "partition-id": int, "num-partitions": int, **dict.fromkeys(paths, str)}
    known["allow-code"] = lambda text: tuple(str(text).split())
    for key, value in node_config.items():
        if key not in known:
            otherwise = f"choose one of {', '.join(known)}"
            raise ConfigError(f"node-config has {key}, which is not a setting{hint(key, known, otherwise)}")
        if key in paths and not Path(str(value)).is_absolute():
            raise ConfigError(f"{key}={value} is relative: give an absolute path")
    return NodeConfig(**{key.replace("-", "_"): known[key](value) for key, value in node_config.items()})


def compose(overrides: Sequence[str], base: Path | None = None, home: str = "", preparing: bool = False) -> Config:
    """Compose conf/ with Hydra overrides and check it.

    Relative paths are taken from `base`, or refused without it. The folder base/conf, or without base the conf/ of an
    app that Flower has put on the import path, adds to the choices of each group. home: the folder whose data fill in
    settings that are null; by default the home in the settings. preparing: the dataset is yet to be prepared, see
    leave_open.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with _compose_lock:
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                words = [*own_choices([base] if base else app_folders()), *expand_words(overrides)]
                tree = hydra_compose("config", overrides=[*words, *name_override(words)])
            return from_tree(tree, base, home, preparing)
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error) from error


def own_choices(folders: Iterable[Path | str]) -> list[str]:
    """Return an override that adds the user's conf/ folders, looked for in `folders`, to Hydra's search path.

    The list is empty if there are none. Raises ConfigError for a choice with the name of one of flapp's own, which
    Hydra would take instead.
    """
    urls = []
    for conf in (Path(folder).absolute() / "conf" for folder in folders):
        groups = [path.name for path in CONF.iterdir() if path.is_dir() and (conf / path.name).is_dir()]
        if not groups or conf.resolve() == CONF.resolve() or (conf.parent / PACKAGE.name).is_dir():
            continue  # not made for flapp, or flapp itself
        for path in (path for group in groups for path in (conf / group).glob("*.yaml")):
            if (CONF / path.parent.name / path.name).exists():
                raise ConfigError(f"{path} has the name of a choice of flapp's own: rename it")
        urls.append("'file://{}'".format(str(conf).replace("\\", "\\\\").replace("'", "\\'")))
    return [f"hydra.searchpath=[{','.join(urls)}]"] if urls else []


def project_words(folder: Path, given: Sequence[str]) -> list[str]:
    """Return the overrides in the pyproject.toml of a Flower app that runs flapp, without keys that are given.

    Raises ConfigError for a file that is not TOML.
    """
    try:
        app = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
        if app["components"]["serverapp"] != SERVER_APP:
            return []
        words = shlex.split(str(app["config"].get("overrides", "")))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{folder / 'pyproject.toml'} is not TOML ({error}): correct it") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []  # the file of another project
    keys = {word.partition("=")[0].lstrip("+") for word in given}
    return [word for word in words if word.partition("=")[0].lstrip("+") not in keys]


def app_folders() -> list[str]:
    """Return the folders on the import path in which Flower keeps the apps that it runs."""
    apps = (Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "apps").resolve()
    return [each for each in sys.path if each and Path(each).resolve().is_relative_to(apps)]


def expand_words(words: Sequence[str]) -> list[str]:
    """Replace ~ at the start of a value by the home folder, and let model.kwargs take keys that conf/ does not list.

    Many shells leave key=~/file as it is. Hydra takes a key that its files do not have only with + or ++ before it.
    """
    expanded = []
    for word in words:
        if match := HOME.fullmatch(word):
            word = f"{match[1]}'{Path.home()}{match[2]}'"
        if word.startswith("model.kwargs="):
            expanded += ["~model.kwargs", f"+{word}"]
        else:
            expanded.append(f"++{word}" if word.startswith("model.kwargs.") else word)
    return expanded


def name_override(words: Sequence[str]) -> list[str]:
    """Return an override of run_name for a command that chooses a dataset, model or strategy, or sweeps experiments.

    The name consists of the experiment (unless a dataset is chosen without one), dataset, model and strategy, without
    choices that a sweep varies. Returns nothing when run_name is given, or when the default in conf/config.yaml fits.
    """
    given = {key: value.strip("'\"") for key, _, value in (word.partition("=") for word in words)}
    chosen = [given.get("dataset.name", given.get("dataset")), given.get("model"), given.get("strategy")]
    experiment = given.get("experiment")
    is_swept = experiment is not None and not PLAIN.fullmatch(experiment)
    if "run_name" in given or not (is_swept or any(chosen)):
        return []
    parts = [] if is_swept or (chosen[0] and experiment is None) else ["${experiment}"]
    parts += [value for value in chosen if value and PLAIN.fullmatch(value)]
    return [f"run_name='{'_'.join(parts) or 'sweep'}-${{now:%Y%m%d-%H%M%S}}'"]


def from_tree(tree: Any, base: Path | None = None, home: str = "", preparing: bool = False) -> Config:
    """Check a composed DictConfig and turn it into a Config with absolute paths; an app has no `base`, see derive.

    home, preparing: see compose.
    """
    from omegaconf import OmegaConf

    values = typing.cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True, throw_on_missing=True))
    for setting in PATHS:
        group, _, key = setting.rpartition(".")
        node = values.get(group) if group else values
        if isinstance(node, dict) and node.get(key) is not None:
            given = Path(str(node[key])).expanduser()
            node[key] = str(given if base is None else base / given)
    is_open = preparing and leave_open(values)
    if not preparing:
        # derive changes the groups of settings in place, and both dicts share them.
        derive(values | {"home": home or values.get("home")}, reads_weights=base is not None)
    config = from_plain(Config, values) if is_open else from_dict(values)
    return replace(config, code=str(base)) if config.targets and config.code is None and base is not None else config


def from_dict(values: Mapping[str, Any]) -> Config:
    """Check plain nested values and return them as a Config; raises ConfigError."""
    config = from_plain(Config, _renamed(values))
    check_together(config)
    return config


def _renamed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return values with privacy.kind in place of privacy.enabled, which older runs have."""
    privacy = values.get("privacy") if isinstance(values, Mapping) else None
    if not isinstance(privacy, Mapping) or type(privacy.get("enabled")) is not bool or "kind" in privacy:
        return values
    rest = {key: value for key, value in privacy.items() if key != "enabled"}
    return {**values, "privacy": {"kind": "local" if privacy["enabled"] else "none", **rest}}


def to_json(config: Config) -> str:
    """Return the whole config as JSON, the text that `config-json` carries."""
    return json.dumps(asdict(config))


def to_yaml(config: Config) -> str:
    """Return the whole config as YAML, for people."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(json.loads(to_json(config))))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the plain values of a file of to_yaml, unchecked: another version of flapp may have written it.

    Raises OSError for a file that cannot be read, and ConfigError for what to_yaml never writes, such as anchors,
    aliases and deep nesting.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = read_bytes(path, MOST_YAML).decode()
        _check_yaml(text)
        values = parse_json(json.dumps(OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {type(values).__name__}, not settings")
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        said = printable(" ".join(str(error).split()))
        raise ConfigError(f"{path} is damaged ({said}): restore the file from a copy") from error
    return typing.cast(dict[str, Any], values)


def _check_yaml(text: str) -> None:
    """Raise ValueError for YAML that could exhaust the parser: nested deeply, very long, or with anchors."""
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))):
        if count > MOST_NODES:
            raise ValueError(f"it has more than {MOST_NODES:,} keys and values")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError(f"line {event.start_mark.line + 1} has an anchor or alias")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"line {event.start_mark.line + 1} is nested more than {DEEPEST} deep")
        if isinstance(event, yaml.ScalarEvent) and event.style is None and len(event.value) > MOST_SCALAR:
            raise ValueError(f"line {event.start_mark.line + 1} has a plain value of {len(event.value):,} characters")


@lru_cache(maxsize=8)
def config_digest(config: Config) -> str:
    """Return the SHA-256 of every setting that a run's bytes may depend on."""
    deciding = {key: value for key, value in _deciding(asdict(config)).items() if key not in KEPT_ON_RESUME}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, Any], config: Config) -> list[str]:
    """List how `config` differs from the plain values `before`, in settings that a resumed run must keep."""
    old = KEPT_ON_RESUME | _deciding(json.loads(json.dumps(before)))
    new = _deciding(json.loads(to_json(config)))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key)}, is {new.get(key)}" for key in changed]


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part, for example (seed, client_id, server_round, "shuffle")."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def explain(error: Exception) -> ConfigError:
    """Turn an error of Hydra or OmegaConf, several lines long, into one line that names the key and the fix."""
    text = (str(error) or str(error.__cause__ or "") or repr(error)).strip()
    first = text.splitlines()[0]
    if first.startswith("Could not override '"):
        key = first.split("'")[1]
        if key == "privacy.enabled":
            return ConfigError("privacy.enabled is now a choice: set privacy=local in place of privacy.enabled=true")
        return ConfigError(f"{key} is not a setting{hint(key, setting_types())}")
    if first.startswith(("Ambiguous value for argument '", "Sweep parameters '")):
        word = first.split("'", 1)[1].rpartition("'")[0]
        key, _, values = word.partition("=")
        takes_list = first.startswith("Ambiguous") and "tuple" in str(setting_types().get(key))
        listed = f", or write a list as {key}=[{values}]" if takes_list else ""
        sweep = f"add -m for a sweep, a run with each of them (python -m tools.run -m {shlex.quote(word)})"
        return ConfigError(f"{word} is several values: {sweep}{listed}")
    if "Could not find '" in first:
        group, _, choice = first.split("Could not find '")[1].split("'")[0].rpartition("/")
        if group.startswith("hydra/"):
            return ConfigError(f"{group}={choice} is not installed: pip install -e '.[sweep]' brings joblib and optuna")
        choices = sorted({path.stem for conf in (CONF, Path("conf")) for path in (conf / group).glob("*.yaml")})
        return ConfigError(f"{group}={choice} is not known: choose one of {', '.join(choices)}")
    if first.startswith("Missing mandatory value: "):
        key = getattr(error, "full_key", None) or first.split(": ")[1]
        return ConfigError(f"{key} must be given: add {key}=VALUE to the command")
    return ConfigError(f"{first} (settings are written key=value; see conf/config.yaml)")


def _deciding(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names, leaving out those in CHANGEABLE_ON_RESUME."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if name not in CHANGEABLE_ON_RESUME:
            flat |= _deciding(value, name + ".") if isinstance(value, Mapping) else {name: value}
    return flat
