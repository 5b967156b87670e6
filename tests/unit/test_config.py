"""Composition: what launchers add is removed, typos are named, everything in conf/ composes."""

import shutil
from pathlib import Path

import pytest

from swinv2_scale import config

BASE = ["name=x", "epochs=1", "global_batch=8", "data.train=somewhere"]


def test_launcher_arguments_are_removed() -> None:
    for argument in (["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]):
        assert config.compose("pretrain", [*argument, *BASE]).name == "x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["experimnt=demo_simmim"], r"'experimnt' .* Did you mean 'experiment'\?"),
        (["experiment=demo_simmin"], r"experiment=demo_simmin: no such choice. Did you mean 'demo_simmim'\?"),
        (["model=xl"], r"model=xl: no such choice.* Choices: b, debug, g, giant, h, l, s, t, video_b"),
        ([*BASE, "optim.weigth_decay=0"], r"'optim.weigth_decay' .* Did you mean 'optim.weight_decay'\?"),
        ([*BASE, "lr=1"], r"'lr' .* Did you mean 'optim.lr'\?"),
        ([*BASE, "micro_batch"], r"'micro_batch' is not a setting: write key=value"),
        ([*BASE, "+steps=3"], r"'\+steps=3' is not a setting: write key=value"),
        ([*BASE, "--steps=3"], r"'--steps=3' is not a setting: write key=value"),
        ([*BASE, "model.depths=[2,2"], r"model.depths=\[2,2"),
        (["epochs=1"], r"needs a value for data.train, global_batch, name: add data.train=… global_batch=… name=…"),
    ],
)
def test_mistakes_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config.compose("pretrain", argv)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("path", sorted((config.CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiments_compose_and_say_how_they_are_run(path: Path) -> None:
    command = next(line for line in path.read_text().splitlines() if "launch/" in line)
    assert f"experiment={path.stem}" in command
    kind = command.split("launch/")[1].split(".py")[0]
    overrides = [
        f"experiment={path.stem}",
        *(word for word in command.split() if "=" in word and "experiment" not in word),
    ]
    cfg = config.compose(kind, overrides)
    config.instantiate(cfg.task)


GROUPS = sorted(p for p in config.CONF.glob("*/*.yaml") if p.parent.name != "experiment" and p.stem[0] != "_")


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_choice_composes(path: Path) -> None:
    choice = f"{path.parent.name}={path.stem}"
    if path.parent.name == "cluster":
        config.compose("submit", [choice, "cluster.accelerators=8", "cluster.time=0-01:00:00"])
    else:
        config.compose("pretrain", [*BASE, choice])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  weigth_decay: 0.5\n", r"the experiment sets 'optim.weigth_decay'.* 'optim.weight_decay'\?"),
        ("log_evry: 3\n", r"the experiment sets 'log_evry'.* Did you mean 'log_every'\?"),
        ("defaults:\n  - override /modle: t\n", "modle"),
    ],
)
def test_a_typo_in_an_experiment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(config.CONF, conf)
    (conf / "experiment/mine.yaml").write_text("# @package _global_\n" + text)
    monkeypatch.setattr(config, "CONF", conf)
    with pytest.raises(ValueError, match=message):
        config.compose("pretrain", [*BASE, "experiment=mine"])


def test_written_copy_is_the_resolved_configuration(tmp_path: Path) -> None:
    cfg = config.compose("pretrain", BASE)
    text = config.write_copy(cfg, tmp_path).read_text()
    assert "run_dir: runs/x" in text
    assert "${" not in text
