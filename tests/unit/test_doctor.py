"""What the doctor says of installations that are whole, broken, or not what they seem."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from swinv2_scale import cli, doctor
from swinv2_scale.ops import native, selfcheck, selfcheck_block

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
with_kernel = pytest.mark.skipif("cpu" in native.missing, reason=native.missing.get("cpu", ""))


def package(folder: Path, *files: str) -> None:
    for name in files:
        path = folder / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise AssertionError('imported')")


def apex(folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> tuple[str, list[str]]:
    package(folder, *files)
    monkeypatch.syspath_prepend(folder)
    facts, problems = doctor.apex()
    return facts["apex"], problems


def test_nvidias_apex_is_welcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fact, problems = apex(tmp_path, monkeypatch, "__init__.py", "optimizers/__init__.py")
    assert fact.startswith("NVIDIA's") and not problems


def test_pypis_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fact, problems = apex(tmp_path, monkeypatch, "__init__.py", "lib/__init__.py", "lib/libapex.py", "models.py")
    assert "not NVIDIA's: PyPI's toolkit for the web framework Pyramid" in fact
    assert len(problems) == 1 and "pip uninstall apex" in problems[0]


def test_an_unknown_apex_is_not_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fact, problems = apex(tmp_path, monkeypatch, "__init__.py")
    assert "unknown" in fact and "pip uninstall apex" in problems[0]


def test_a_folder_named_apex_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert apex(tmp_path, monkeypatch, "setup.py") == ("none (not needed)", [])


def test_packages_that_are_missing_old_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    names = {"no-such-package": "no_such_package", "rich": "broken_library", "pyyaml": "yaml", "torch": "torch"}
    monkeypatch.setattr(doctor, "PACKAGES", names)
    wanted = {name: Requirement(f"{name}>={least}") for name, least in (("pyyaml", 999), ("torch", 2))}
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    facts, (missing, broken, old) = doctor.packages()
    assert facts["no-such-package"] == "none" and facts["torch"].startswith("2.")
    assert missing == "no-such-package is not installed: pip install 'no-such-package'"
    assert "fails on import (undefined symbol): pip install --force-reinstall rich" in broken
    assert "does not fit: pip install 'pyyaml>=999'" in old


@without_gpu
def test_a_gpu_that_pytorch_does_not_see_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 470.10\necho 470.10\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts, (problem,) = doctor.gpu()
    assert facts["driver"] == "470.10" and "lists 2 GPU(s), driver 470.10" in problem and "update the driver" in problem
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.gpu()[1] == []


@without_gpu
def test_what_is_missing_is_information(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(native.missing, "cpu", "the cpu kernel is not built")
    monkeypatch.setattr(doctor.shutil, "which", lambda *_: None)
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for part in ("reference, the cpu kernel is not built", "install g++ or clang++", "install the CUDA toolkit"):
        assert part in text


@without_gpu
def test_a_gpu_that_is_asked_for_must_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--quick", "--device", "cuda"]) == 1
    assert "problem: --device cuda: PyTorch sees no GPU. Install NVIDIA's driver" in capsys.readouterr().out


@with_kernel
def test_a_whole_installation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(selfcheck, "matrix", lambda: selfcheck.short()[:1])
    monkeypatch.setitem(doctor.SHAPES, "cpu", ("float32", 1, 16, 8, 1))
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"7x9 on 10x11 shifted.* ok ", text) and "Everything that is installed works." in text
    assert re.search(r"SDPA +[\d.]+ ms \([\d.]+ x\)", text) and "float32, bfloat16, float16: kernel" in text
    assert f"{native.instruction_sets()[-1]}, the best of portable" in text


@with_kernel
def test_json_is_one_object_of_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--quick", "--json", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["versions", "kernels", "device", "checks", "block", "speed", "problems"]
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0] and facts["speed"] == {}
    cases = len(selfcheck.short()) * len(native.TYPES) * (len(selfcheck.TENSORS) + 1)
    assert len(facts["checks"]) == cases and all(check["passed"] for check in facts["checks"])
    of_block = len(selfcheck_block.cases()) * len(native.TYPES) * (len(selfcheck_block.TENSORS) + 1)
    multiplied = [dtype for dtype in native.TYPES if torch.ops.swinv2_scale.products(dtype) != "none"]
    of_block += len(multiplied) * (len(selfcheck_block.PRODUCTS) + 1)
    of_block += len(native.TYPES) * (len(selfcheck_block.STEP) + 1) + len(selfcheck_block.TABLE) + 1
    assert len(facts["block"]) == of_block and all(check["passed"] for check in facts["block"])


@with_kernel
def test_a_broken_kernel_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = native.cosine_window_attention
    monkeypatch.setattr(native, "cosine_window_attention", lambda *inputs: right(*inputs) * math.nan)
    assert cli.main(["doctor", "--quick", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text and "works" not in text
    assert "problem: the cpu attention kernel fails 45 checks, the first: window 7x9" in text
    assert "memory.attention=reference" in text
    assert cli.main(["doctor", "--quick", "--json", "--device", "cpu"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"][0]["error"] is None


def test_the_instruction_sets_are_those_that_are_compiled() -> None:
    source = (Path(__file__).parents[2] / "setup.py").read_text()
    assert set(native.INSTRUCTION_SETS) == set(re.findall(r'"(portable|avx\w+|amx\w+)"', source))
    if "cpu" not in native.missing:
        assert set(native.instruction_sets()) <= set(native.INSTRUCTION_SETS)
