"""Values that a setting cannot have are refused when a configuration is composed."""

import pytest

from swinv2_scale import config, limits

BASE = ["name=x", "data.train=somewhere", "global_batch=512"]
SUBMITTED = ["cluster.accelerators=1", "cluster.time=1"]


def test_what_is_limited_exists() -> None:
    known = set()
    for name, settings in [("pretrain", BASE), ("plan", []), ("submit", SUBMITTED)]:
        known |= set(config._settings(config.compose(name, settings)))
    named = {*limits.CHOICES, *limits.WHOLE, *limits.POSITIVE, *limits.NOT_NEGATIVE, *limits.LISTS, *limits.MAY_BE_NULL}
    assert named <= known


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("checkpoint_every=null", "checkpoint_every=None must be a whole number of at least 0$"),
        ("log_every=-1", "log_every=-1 must be a whole number of at least 0"),
        ("steps=0.5", "steps=0.5 must be a whole number of at least 1, or null"),
        ("micro_batch=true", "micro_batch=True must be a whole number"),
        ("micro_batch=nan", "micro_batch=nan must be a whole number"),
        ("workers=two", "workers=two must be a whole number"),
        ("memory.every=0", r"memory\.every=0 must be a whole number of at least 1"),
        ("memory.stages=0", r"memory\.stages=0 must be a list: \[0\], or null"),
        ("stall_minutes=null", "stall_minutes=None must be a number above 0"),
        ("epochs=0", "epochs=0 must be a number above 0, or null"),
        ("optim.gradient_clip=-1", r"optim\.gradient_clip=-1 must be a number of at least 0"),
        ("optim.lr=nan", r"optim\.lr=nan must be a number of at least 0"),
        ("optim.warmup_epochs=null", "are both null: write 0 for no warm-up"),
        ("precision=float16", "precision=float16 must be one of bf16, fp16, fp32"),
        ("checkpoint=", "checkpoint= is empty: name the weights"),
    ],
)
def test_values_that_a_setting_cannot_have(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.compose("pretrain", [*BASE, setting])


def test_lists_of_a_cluster() -> None:
    with pytest.raises(ValueError, match=r"cluster\.exclude=gpu007 must be a list: \[gpu007\]"):
        config.compose("submit", [*SUBMITTED, "cluster.exclude=gpu007"])


def test_whole_numbers_may_be_written_otherwise() -> None:
    cfg = config.compose("pretrain", [*BASE[:2], "global_batch=1e3", "steps=1e5"])
    assert (cfg.global_batch, cfg.steps) == (1000, 100_000) and isinstance(cfg.steps, int)


def test_epochs_beside_the_steps_of_an_experiment() -> None:
    settings = ["experiment=demo_simmim", "data.train=somewhere", "epochs=2"]
    with pytest.raises(ValueError, match=r"epochs=2 has no effect beside the experiment's steps=\d+: add steps=null"):
        config.compose("pretrain", settings)
    assert config.compose("pretrain", [*settings, "steps=null"]).epochs == 2
