"""The dashboards show what is logged; without a network they become files."""

import json
from pathlib import Path

import pytest

from swinv2_scale import dashboard
from swinv2_scale.cli import main
from swinv2_scale.tasks.classification import Classification
from swinv2_scale.tasks.simmim import MaskedImageModelling


def test_held_out_metrics_are_those_of_the_tasks() -> None:
    for kind, task in (("pretraining", MaskedImageModelling), ("fine-tuning", Classification)):
        shown = {key for plots in dashboard.WORKSPACES[kind].values() for keys in plots.values() for key in keys}
        found = {key.removeprefix("evaluation/") for key in shown if key.startswith("evaluation/")}
        assert found == set(task.metrics), kind


def test_without_a_server_specifications_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    command = ["log", "dashboard", "--entity", "lab", "--folder", str(tmp_path)]
    assert main(command) == 0
    assert "pretraining.json, since there is no WANDB_API_KEY" in capsys.readouterr().out
    for kind, sections in dashboard.WORKSPACES.items():
        text = (tmp_path / f"{kind}.json").read_text()
        assert json.loads(text)["entity"] == "lab"
        for plots in sections.values():
            for title, keys in plots.items():
                assert json.dumps(title) in text and all(json.dumps(key) in text for key in keys)
        assert dashboard.PICTURES[kind] in text
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "wandb_workspaces.workspaces.Workspace.save", lambda self: (_ for _ in ()).throw(OSError("down"))
    )
    assert main(command) == 0
    assert "fine-tuning.json, since OSError: down" in capsys.readouterr().out
