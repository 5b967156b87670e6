"""What `run` decides before anything is trained."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from swinv2_scale import config, distributed
from swinv2_scale.ops import native, selfcheck
from swinv2_scale.run import build_schedule, check_kernel, open_run_dir

BASE = ["name=x", "data.train=somewhere", "global_batch=512"]


def test_rates_are_scaled_to_the_batch_and_epochs_become_steps() -> None:
    cfg = config.compose("pretrain", [*BASE, "optim.lr=1e-3", "optim.lr_batch=1024", "optim.warmup_epochs=2"])
    schedule = build_schedule(cfg.optim, global_batch=512, steps=100, steps_per_epoch=10)
    assert (schedule.lr, schedule.minimum_lr, schedule.warmup_steps) == (5e-4, 5e-6, 20)
    cfg = config.compose("pretrain", [*BASE, "optim.lr=1e-3", "optim.lr_batch=null", "optim.warmup_steps=7"])
    schedule = build_schedule(cfg.optim, global_batch=512, steps=100, steps_per_epoch=10)
    assert (schedule.lr, schedule.warmup_steps) == (1e-3, 7)


@pytest.mark.usefixtures("one_rank")
def test_a_run_directory_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    settings = SimpleNamespace(run_dir=tmp_path / "x", resume=True)
    open_run_dir(settings)
    with pytest.raises(ValueError, match="is in use by another run: choose another name"):
        open_run_dir(settings)
    (tmp_path / "y").mkdir()
    (tmp_path / "y/metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds a run, and resume=false"):
        open_run_dir(SimpleNamespace(run_dir=tmp_path / "y", resume=False))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        open_run_dir(SimpleNamespace(run_dir=tmp_path / "file/z", resume=True))


def test_data_must_have_the_classes_of_the_model_and_of_each_other() -> None:
    cfg = config.compose("finetune", [*BASE, "model.num_classes=2"])
    task = config.instantiate(cfg.task)
    task.check_classes(("cat", "dog"), ("cat", "dog"), ())
    with pytest.raises(ValueError, match=r"3 classes and the model 2: set model\.num_classes=3"):
        task.check_classes(("cat", "dog", "fox"))
    with pytest.raises(ValueError, match=r"number their classes differently \(\['dog', 'fox'\]\)"):
        task.check_classes(("cat", "dog"), ("cat", "fox"))
    config.instantiate(config.compose("pretrain", BASE).task).check_classes(("cat",), ("dog", "fox"))


def test_help_lists_choices_and_knobs() -> None:
    text = config.help_text("pretrain")
    assert "model= b debug g giant h l s t" in text
    assert "global_batch" in text


def test_changed_settings_are_told(tmp_path: Path) -> None:
    config.write_copy(config.compose("pretrain", BASE), tmp_path)
    changed = config.compose("pretrain", [*BASE, "optim.lr=0.5"])
    assert config.changes(changed, tmp_path / "config.yaml") == ["optim.lr: 0.001 -> 0.5"]
    assert config.changes(changed, tmp_path / "none.yaml") == []


@pytest.mark.usefixtures("one_rank")
@pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", ""))
def test_training_refuses_a_kernel_that_fails_unless_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    check_kernel("auto", "bf16")
    right = native.cosine_window_attention
    monkeypatch.setattr(native, "cosine_window_attention", lambda *inputs: 1.1 * right(*inputs))
    for attention in ("auto", "cpu"):
        with pytest.raises(ValueError, match=r"rank 0: the cpu attention kernel fails .* memory\.attention=reference"):
            check_kernel(attention, "bf16")
    for attention in ("reference", "sequential"):
        assert attention in selfcheck.REMEDY
        check_kernel(attention, "bf16")
    monkeypatch.setitem(native.missing, "cpu", "it is not built")
    check_kernel("auto", "bf16")
