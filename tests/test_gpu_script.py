"""benchmarks/gpu.py on the CPU: the parts, their isolation and the report."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from benchmarks import gpu

CPU = argparse.Namespace(device="cpu", size=[64, 64])


def run(folder: Path, *arguments: str, missing: tuple[str, ...] = ()) -> tuple[dict, str]:
    """The parts of gpu.py's JSON report and its Markdown, without the packages `missing`."""
    names = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
    (folder / "sitecustomize.py").write_text(names)
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--size", "64", "64"]
    command += ["--output", str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    result = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "gpu_cpu.json").read_text())
    return report["parts"], (folder / "gpu_cpu.md").read_text()


@pytest.mark.full
def test_parts_run_without_optional_packages(tmp_path):
    missing = "pycocotools", "hotcoco", "tensorboard", "matplotlib", "submitit", "pytest"
    names = "op_build", "op_tests", "train_dino", "syncs", "amp", "ddp"
    parts, text = run(tmp_path, "--minutes", "60", "--parts", *names, missing=missing)
    outcomes = {name: part["outcome"] for name, part in parts.items()}
    assert outcomes.pop("op_tests") == "skipped: pytest is not installed"
    assert outcomes.pop("syncs").startswith("skipped: ")
    assert set(outcomes.values()) == {"ok"}, parts
    sides = [row["side"] for row in parts["train_dino"]["rows"]]
    assert sides == ["ours --batch_size 1", "ours --batch_size 1 --amp"]
    assert parts["amp"]["rows"][0].keys() == {"steps", "fp32", "bf16", "fp16"}
    assert all(row["alone"] == row["DDP"] for row in parts["ddp"]["rows"])
    assert text.count("\n| configs/toy/dn_dab_detr.py |") == 4


def test_a_part_that_fails_stops_no_other(tmp_path):
    parts, text = run(tmp_path, "--parts", "amp", "op_build", missing=("timm",))
    assert parts["amp"]["outcome"].startswith("failed: ModuleNotFoundError: import of timm")
    assert "Traceback" in parts["amp"]["output"]
    assert parts["op_build"]["outcome"] == "ok"
    assert "| op_build | ok |" in text


def test_time_limits(tmp_path):
    parts, _ = run(tmp_path, "--parts", "ddp", "amp", "--minutes", "0.05")
    assert re.fullmatch("failed: stopped after [123] s", parts["ddp"]["outcome"])
    assert parts["amp"]["outcome"] == "skipped: no time is left"


def test_reason_of_a_failure():
    text = "RuntimeError: CUDA error: an illegal access\nCompile with TORCH_USE_CUDA_DSA\n"
    assert gpu.outcome(1, text, 9) == "failed: RuntimeError: CUDA error: an illegal access"
    assert gpu.outcome(2, "usage: x\nx: error: no such option", 9).endswith("no such option")
    assert gpu.outcome(-signal.SIGSEGV, text, 9) == "failed: SIGSEGV"


def test_losses_must_be_close():
    gpu.check_close({"fp32": 10.0, "bf16": 10.9}, 0.1)
    for other in (8.9, float("nan")):
        with pytest.raises(RuntimeError, match="bf16"):
            gpu.check_close({"fp32": 10.0, "bf16": other}, 0.1)


def test_synchronisations_are_counted_by_line():
    def step() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)

    ((place, times),) = gpu.count_syncs(step).items()
    line = step.__code__.co_firstlineno + 2
    assert place.startswith(f"tests/test_gpu_script.py:{line} `warnings.warn(") and times == 2


def test_tests_of_the_operator_are_counted():
    (row,) = gpu.op_tests(CPU)
    assert row["tests"] > 0 and not row["failures"] and not row["errors"]


def test_times_of_the_operator(monkeypatch):
    """From a recorded report, as measuring takes minutes."""
    recorded = gpu.ROOT / "benchmarks/results/ms_deform_attn_cpu.json"
    monkeypatch.setattr(gpu, "call", lambda *command: shutil.copy(recorded, command[-1]))
    rows = list(gpu.op_times(CPU))
    assert len(rows) == len(json.loads(recorded.read_text())["cases"])
    assert all(0 < row["cpp baseline"] < row["grid_sample"] for row in rows)
