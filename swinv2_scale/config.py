"""Compose a run's configuration from conf/ and the command line. The only module that imports hydra and omegaconf.

compose("pretrain", argv)   conf/pretrain.yaml + its defaults + overrides -> a locked configuration
instantiate(node)           `_target_` and its arguments -> the object
"""

import difflib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swinv2_scale import limits

# In a checkout conf/ lies beside the package; in a wheel, inside it.
CONF = next(path for path in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if path.is_dir())
# What DeepSpeed's launcher and old torch launchers add to the command line. The rank is read from the environment.
LAUNCHER_ARGUMENT = re.compile(r"--local[_-]rank(=\d+)?")


def compose(
    config_name: str, argv: Sequence[str], model: Sequence[str] = (), fill: dict[str, Any] | None = None
) -> DictConfig:
    """The resolved, locked configuration of conf/{config_name}.yaml with the overrides of argv.

    `model` are overrides to which conf and experiments give way, and which give way to argv; `fill` has values for keys
    that would otherwise be missing.

    Raises ValueError that names the key or choice that does not exist, on the command line or in an experiment's file,
    and what was probably meant; and for a value that its setting cannot have (limits.py).
    """
    overrides = [*model, *_without_launcher_arguments(argv)]
    wrong = [argument for argument in overrides if not re.match(r"[A-Za-z_][\w.]*=", argument)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not a setting: write key=value, for example micro_batch=8 or model=t")
    try:
        cfg, known = _compose(config_name, overrides), _known_keys(config_name, overrides)
        for key, value in (fill or {}).items():
            if _settings(cfg)[key] == "???":
                OmegaConf.update(cfg, key, value)
        settings = _settings(cfg)
        unknown = [key for key in settings if key not in known]
        if unknown:
            hint = _suggest(unknown[0], known)
            raise ValueError(f"the experiment sets {unknown[0]!r}, which is not a setting.{hint}")
        if missing := sorted(key for key, value in settings.items() if value == "???"):
            given = "".join(f" {key}=…" for key in missing)
            raise ValueError(
                f"conf/{config_name}.yaml needs a value for {', '.join(missing)}: add{given} to the command"
            )
        OmegaConf.resolve(cfg)
        for key, value in limits.check(_settings(cfg)).items():
            OmegaConf.update(cfg, key, value)
        _refuse_what_has_no_effect(cfg, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, config_name, overrides)) from error
    return cfg


def compose_saved(
    config_name: str, argv: Sequence[str], saved: dict[str, Any], left_open: Sequence[str] = ()
) -> tuple[DictConfig, str]:
    """As compose, with the model that a file of weights is of, and one line on where the model came from.

    The command line (model=…, model.key=…) wins over what the file says, and that over conf and experiments, which fill
    in what it leaves open. Raises ValueError for what conf/model does not know: a file's word is not executed.
    """
    given = [argument for argument in argv if re.match(r"model[.=]", argument)]
    if whole := [argument for argument in given if argument.startswith("model=")]:
        return compose(config_name, argv), f"model: {whole[-1]}, not what the checkpoint says, because it was given"
    settings = {key: value for key, value in saved.items() if key != "_target_"}
    known = compose(config_name, argv).model
    strange = [key for key, value in settings.items() if key not in known or not _is_plain(value)]
    if strange:
        raise ValueError(
            f"the checkpoint says model.{strange[0]}={settings[strange[0]]!r}, which is unknown here: give model=…"
        )
    cfg = compose(config_name, argv, [f"model.{key}={json.dumps(value)}" for key, value in settings.items()])
    keys = [argument.partition("=")[0] for argument in given]
    guessed = [f"model.{key}={cfg.model[key]}" for key in left_open if f"model.{key}" not in keys]
    origin = f"model: as the checkpoint says{', but ' * bool(given)}{' '.join(given)}"
    return cfg, origin + f"; it leaves open what conf has as {' '.join(guessed)}" * bool(guessed)


def saved_task(copy: Path) -> list[str]:
    """A run's task as overrides, from its config.yaml: one of conf/task, and its plain settings but for training's.

    A file's word is not executed: what is called comes from conf/task. Raises ValueError for a file without a task that
    is known there.
    """
    try:
        task = yaml.safe_load(copy.read_text())["task"]
        names = {yaml.safe_load(path.read_text())["_target_"]: path.stem for path in (CONF / "task").glob("[!_]*.yaml")}
        overrides = [f"task={names[task['_target_']]}"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(
            f"{copy} is no run's configuration with a task of conf/task ({type(error).__name__}: {error}): "
            "give task=… and its settings yourself"
        ) from error
    settings = _settings(OmegaConf.create({"task": {key: task[key] for key in task if not key.startswith("train_")}}))
    plain = {key: value for key, value in settings.items() if not isinstance(value, dict) and _is_plain(value)}
    return overrides + [f"{key}={json.dumps(value)}" for key, value in plain.items() if not key.endswith("_")]


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


@functools.cache
def memory_policies() -> dict[str, dict[str, Any]]:
    """The policies of conf/memory by name, as arguments of memory.apply; first `none`, which changes nothing."""
    names = sorted(
        (path.stem for path in (CONF / "memory").glob("[!_]*.yaml")), key=lambda name: (name != "none", name)
    )
    return {name: plain(_compose(f"memory/{name}", []).memory) for name in names}


def own_settings(config_name: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments that set keys of conf/{config_name}.yaml, and the others; a key that is almost one of them is an error.

    Raises ValueError that names the key which was probably meant.
    """
    known = _defaults_keys(config_name)
    own = [argument for argument in argv if argument.partition("=")[0] in known]
    others = [argument for argument in argv if argument not in own]
    elsewhere = {*_groups(), *_defaults_keys("pretrain")}
    for argument in others:
        key = argument.partition("=")[0]
        close = [] if key in elsewhere else difflib.get_close_matches(key, [*known, *elsewhere], n=1, cutoff=0.6)
        if close and close[0] in known:
            raise ValueError(f"{key!r} in {argument!r} is not a setting. Did you mean {close[0]!r}?")
    return own, others


def stage_of(argv: Sequence[str]) -> str:
    """The script of an experiment, by the command in its file's head: pretrain or finetune; pretrain without one."""
    for argument in argv:
        path = CONF / "experiment" / f"{argument.removeprefix('experiment=')}.yaml"
        if argument.startswith("experiment=") and path.exists():
            return "finetune" if "launch/finetune.py" in path.read_text() else "pretrain"
    return "pretrain"


def data_defaults() -> Any:
    """conf/data/shards.yaml."""
    return _compose("data/shards", []).data


def reading(data: Any) -> dict[str, Any]:
    """What conf/data says of how shards are read: the arguments of sources.Reader."""
    return {str(key): data[key] for key in data if key not in ("train", "validation", "weights", "open_shards")}


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


def changes(cfg: DictConfig, copy: Path) -> list[str]:
    """Settings that differ from an earlier copy of the configuration, as "key: old -> new"; none without a copy."""
    if not copy.exists():
        return []
    old, new = (_settings(OmegaConf.create(tree)) for tree in (yaml.safe_load(copy.read_text()), plain(cfg)))
    leaves = [key for key in new if not isinstance(new[key], dict) and old.get(key) != new[key]]
    return [f"{key}: {old.get(key)} -> {new[key]}" for key in leaves]


def help_text(config_name: str) -> str:
    """What can be set: the head of conf/{config_name}.yaml, the choices of each group, and the common knobs."""
    head = [line for line in (CONF / f"{config_name}.yaml").read_text().splitlines() if line.startswith("#")]
    groups = [group for group in _groups() if group != "cluster"]  # which is conf/submit.yaml's
    choices = [f"{g}= {' '.join(sorted(p.stem for p in (CONF / g).glob('[!_]*.yaml')))}" for g in groups]
    return "\n".join([*head, "", *choices, "", (CONF / "_run.yaml").read_text()])


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


def _refuse_what_has_no_effect(cfg: DictConfig, overrides: list[str]) -> None:
    """Raises ValueError for epochs that are given where an experiment has steps, and for an empty checkpoint."""
    given = [override.partition("=")[0] for override in overrides]
    if "epochs" in given and "steps" not in given and cfg.get("steps") and cfg.epochs:
        raise ValueError(f"epochs={cfg.epochs} has no effect beside the experiment's steps={cfg.steps}: add steps=null")
    if cfg.get("checkpoint") == "":
        raise ValueError("checkpoint= is empty: name the weights to start from, or write checkpoint=null for none")


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
    try:
        known = _known_keys(config_name, [o for o in overrides if o.partition("=")[0] in _groups()])
    except (HydraException, OmegaConfBaseException):
        return " ".join(message.split())
    for override in overrides:
        key = override.partition("=")[0]
        if key not in known + _groups():
            hint = _suggest(key, known + _groups())
            return f"{key!r} in {override!r} is not a setting of conf/{config_name}.yaml.{hint}"
    return f"{' '.join(overrides)}: {' '.join(message.split())}"


def _known_keys(config_name: str, overrides: list[str]) -> list[str]:
    """Every key that the chosen groups define; an experiment may choose groups, but adds no key."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        choices = hydra.compose(config_name, overrides, return_hydra_config=True).hydra.runtime.choices
        chosen = [f"{group}={choices[group]}" for group in _groups() if group in choices and group != "experiment"]
        return list(_settings(hydra.compose(config_name, chosen)))


@functools.cache
def _defaults_keys(config_name: str) -> list[str]:
    """Every key of conf/{config_name}.yaml with the groups that it chooses by itself."""
    return list(_settings(_compose(config_name, [])))


def _groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """Every key of a configuration, dotted, with its value as written; groups stand before their keys."""

    def walk(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            yield f"{prefix}{key}", value
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    tree = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(tree, dict)
    return dict(walk(tree, ""))


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a word or a list of them: neither an interpolation nor a `_target_`."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float) or bool(re.fullmatch(r"\w+", str(value)))


def _suggest(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    close = close or [choice for choice in choices if choice.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    return f" Did you mean {close[0]!r}?" if close else ""
