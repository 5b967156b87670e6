"""Evaluation: exact sums, each sample once, and the model that a file says it is of."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swinv2_scale import config
from swinv2_scale.evaluation import write_per_class
from swinv2_scale.train import Evaluation, evaluate

BASE = ["data.validation=somewhere"]
CLASSES = 7


def classification(*settings: str) -> Any:
    cfg = config.compose("evaluate", [*BASE, "model=debug", f"model.num_classes={CLASSES}", *settings])
    return config.instantiate(cfg.task)


@pytest.fixture
def batches() -> list[dict[str, Any]]:
    """103 samples in batches of 10; class 6 has none."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(103, 3, 4, 4, generator=generator)
    labels = torch.randint(0, CLASSES - 1, (103,), generator=generator)
    return [
        {"image": images[i : i + 10], "label": labels[i : i + 10], "key": [str(n) for n in range(i, min(i + 10, 103))]}
        for i in range(0, 103, 10)
    ]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("flip", [False, True])
def test_means_are_those_of_all_samples_and_of_each_class(batches, model, flip):
    task = classification(f"task.evaluation_flip={flip}")
    outcome = evaluate(model, task, batches, 103)
    images, labels = (torch.cat([batch[name] for batch in batches]) for name in ("image", "label"))
    with torch.no_grad():
        logits = (model(images) + model(images.flip(3))) / 2 if flip else model(images)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)  # how many classes are preferred to the right one
    assert outcome.samples == 103
    assert outcome.means["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert outcome.means["top1"] == (ranks < 1).sum().item() / 103
    assert outcome.means["top5"] == (ranks < 5).sum().item() / 103
    assert outcome.per_class[:, 0].tolist() == labels.bincount(minlength=CLASSES).tolist()
    assert outcome.per_class[:, 2].tolist() == labels[ranks < 1].bincount(minlength=CLASSES).tolist()
    assert outcome.images_per_second is not None and outcome.images_per_second > 0
    assert task.settings["flip"] is flip


@pytest.mark.usefixtures("one_rank")
def test_a_missing_or_repeated_sample_is_an_error(batches, model):
    with pytest.raises(RuntimeError, match="93 samples were evaluated of 103"):
        evaluate(model, classification(), batches[1:], 103)
    with pytest.raises(RuntimeError, match="113 samples were evaluated of 103"):
        evaluate(model, classification(), [*batches, batches[0]], 103)
    assert evaluate(model, classification(), batches[:1], 10).images_per_second is None


def test_the_file_of_classes(tmp_path):
    table = torch.zeros(CLASSES, 4, dtype=torch.float64)
    table[0] = torch.tensor([4.0, 2.0, 1.0, 3.0])
    table[2] = torch.tensor([12_345_678.0, 0.0, 0.0, 0.0])
    columns = classification().per_class(Evaluation({}, 4, table, None))
    write_per_class(tmp_path / "a.csv", columns, ["tench, fish", *"bcdefg"])
    assert (tmp_path / "a.csv").read_text().splitlines()[:4] == [
        "class,name,samples,loss,top1,top5",
        '0,"tench, fish",4,0.5,0.25,0.75',
        "1,b,0,,,",
        "2,c,12345678,0,0,0",
    ]
    write_per_class(tmp_path / "b.csv", columns, [])
    assert (tmp_path / "b.csv").read_text().splitlines()[1] == "0,,4,0.5,0.25,0.75"


def test_numbered_classes_fit_any_names_but_not_fewer_classes():
    task = classification()
    task.check_classes([*"abcdefg"], (), highest_label=CLASSES - 1)
    with pytest.raises(ValueError, match=r"numbers, which are its labels, up to 7, and the model has classes 0 to 6"):
        task.check_classes([*"abcdefg"], (), highest_label=CLASSES)


def test_a_saved_model_gives_way_to_the_command_line_only():
    saved = config.plain(config.compose("evaluate", [*BASE, "model=t", "model.num_classes=20"]).model)
    saved = json.loads(json.dumps(saved))  # as it lies in a file
    cfg, origin = config.compose_saved("evaluate", BASE, saved)
    assert config.plain(cfg.model) == saved
    assert cfg.task.num_classes == 20
    assert origin == "model: as the checkpoint says"
    cfg, origin = config.compose_saved("evaluate", [*BASE, "model.image_size=320", "model.window_size=10"], saved)
    assert config.plain(cfg.model) == saved | {"image_size": 320, "window_size": 10}
    assert cfg.task.evaluation_transform.image_size == 320
    assert origin == "model: as the checkpoint says, but model.image_size=320 model.window_size=10"
    cfg, _ = config.compose_saved("evaluate", [*BASE, "experiment=demo_classification"], saved)
    assert config.plain(cfg.model) == saved
    assert cfg.task.evaluation_transform.crop is False
    cfg, origin = config.compose_saved("evaluate", [*BASE, "model=s", "model.num_classes=3"], saved)
    assert cfg.model == config.compose("evaluate", [*BASE, "model=s", "model.num_classes=3"]).model
    assert origin.startswith("model: model=s, not what the checkpoint says")
    argv = [*BASE, "model.image_size=384"]
    cfg, origin = config.compose_saved("evaluate", argv, {"depths": [1, 1]}, ["window_size", "image_size"])
    assert (cfg.model.depths, cfg.model.window_size, cfg.model.image_size) == ([1, 1], 8, 384)
    assert origin.endswith("but model.image_size=384; it leaves open what conf has as model.window_size=8")


@pytest.mark.parametrize(
    "value", [{"_target_": "os.system", "command": "true"}, "${oc.env:HOME}", ["${oc.env:HOME}"], [{"a": 1}]]
)
def test_a_files_word_is_not_executed(value):
    with pytest.raises(ValueError, match=r"says model\.depths=.* which is unknown here"):
        config.compose_saved("evaluate", BASE, {"depths": value})
    cfg, _ = config.compose_saved("evaluate", BASE, {"_target_": "os.system", "embed_dim": 32})
    assert cfg.model._target_ == "swinv2_scale.models.swin_v2.SwinTransformerV2"
    with pytest.raises(ValueError, match=r"says model\.colour='blue', which is unknown here"):
        config.compose_saved("evaluate", BASE, {"colour": "blue"})


def test_published_evaluations_are_set_where_recipes_are():
    resize = {}
    for path in (config.CONF / "experiment").glob("in1k_*.yaml"):
        cfg = config.compose("finetune", ["data.train=x", f"experiment={path.stem}"])
        resize[path.stem] = config.instantiate(cfg.task).evaluation_transform.resize
    assert resize == {"in1k_t_w8": [292], "in1k_b_w16_finetune": [292], "in1k_b_w24_finetune": [384, 384]}
