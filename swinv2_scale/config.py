"""Compose a run's configuration from conf/ and the command line. The only module that imports hydra and omegaconf.

compose("pretrain", argv)   conf/pretrain.yaml + its defaults + overrides -> a locked configuration
instantiate(node)           `_target_` and its arguments -> the object
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# In a checkout conf/ lies beside the package; in a wheel, inside it.
CONF = next(path for path in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if path.is_dir())
# What DeepSpeed's launcher and old torch launchers add to the command line. The rank is read from the environment.
LAUNCHER_ARGUMENT = re.compile(r"--local[_-]rank(=\d+)?")


def compose(config_name: str, argv: Sequence[str]) -> DictConfig:
    """The resolved, locked configuration of conf/{config_name}.yaml with the overrides of argv.

    Raises ValueError that names the key or choice that does not exist and what was probably meant.
    """
    overrides = _without_launcher_arguments(argv)
    wrong = [argument for argument in overrides if argument.startswith("-") or "=" not in argument]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not a setting: write key=value, for example micro_batch=8 or model=t")
    try:
        cfg = _compose(config_name, overrides)
        missing = sorted(OmegaConf.missing_keys(cfg))
        OmegaConf.resolve(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, config_name, overrides)) from error
    if missing:
        given = "".join(f" {key}=…" for key in missing)
        raise ValueError(f"conf/{config_name}.yaml needs a value for {', '.join(missing)}: add{given} to the command")
    return cfg


def compose_model(size: str, **arguments: Any) -> DictConfig:
    """conf/model/{size}.yaml with constructor arguments replaced. Raises ValueError for an unknown size or argument."""
    sizes = sorted(path.stem for path in (CONF / "model").glob("[!_]*.yaml"))
    if size not in sizes:
        raise ValueError(f"model size {size!r} is not one of {', '.join(sizes)}")
    cfg = _compose(f"model/{size}", []).model
    for key, value in arguments.items():
        if key not in cfg:
            names = [str(name) for name in cfg if name != "_target_"]
            raise ValueError(
                f"{key!r} is not an argument of the model.{_suggest(key, names)} Arguments: {', '.join(names)}"
            )
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def instantiate(node: Any, **arguments: Any) -> Any:
    """The object that node's `_target_` makes of its other keys and the keyword arguments; lists become Python lists.

    Raises the constructor's own ValueError.
    """
    try:
        return hydra.utils.instantiate(node, _convert_="all", **arguments)
    except hydra.errors.InstantiationException as error:
        if isinstance(error.__cause__, ValueError):  # the constructor's own message says it better
            raise error.__cause__ from None
        raise


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as nested dicts and lists."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def write_copy(cfg: DictConfig, directory: Path) -> Path:
    """Write the resolved configuration to directory/config.yaml."""
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(plain(cfg), sort_keys=False, allow_unicode=True))
    return path


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose(config_name, overrides)
    OmegaConf.set_struct(cfg, True)
    return cfg


def _without_launcher_arguments(argv: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip_value = False
    for argument in argv:
        if skip_value:
            skip_value = False
        elif match := LAUNCHER_ARGUMENT.fullmatch(argument):
            skip_value = match.group(1) is None
        else:
            kept.append(argument)
    return kept


def _explain(error: Exception, config_name: str, overrides: list[str]) -> str:
    """Hydra's message, shortened, with the closest existing key where a key was misspelt."""
    message = str(error).strip()
    if missing := re.search(r"[Cc]ould not (?:find|load) '?([\w/]+)'?", message):
        group, _, choice = missing.group(1).rpartition("/")
        choices = sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))
        return f"{group}={choice}: no such choice.{_suggest(choice, choices)} Choices: {', '.join(choices)}"
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    keys = _keys(_compose(config_name, [o for o in overrides if o.startswith("experiment=")])) + groups
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if key not in keys:
            return f"{key!r} in {override!r} is not a setting of conf/{config_name}.yaml.{_suggest(key, keys)}"
    return f"{' '.join(overrides)}: {' '.join(message.split())}"


def _keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in map(str, cfg):
        keys.append(f"{prefix}{key}")
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            keys += _keys(node, f"{prefix}{key}.")
    return keys


def _suggest(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    close = close or [choice for choice in choices if choice.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    return f" Did you mean {close[0]!r}?" if close else ""
