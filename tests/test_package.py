"""The package `dn_dino`: the contents of its wheel, and its use outside the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image

from main import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, built from a copy so that the repository stays clean."""
    copy = tmp_path_factory.mktemp("sdist") / "copy"
    for name in ("models", "ops", "configs", "datasets", "util"):
        built = shutil.ignore_patterns("__pycache__", "build", "*.so")
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(copy.parent)!r})"
    subprocess.run([sys.executable, "-c", make], cwd=copy, capture_output=True, check=True)
    return next(copy.parent.glob("*.tar.gz"))


def install(sdist: Path, folder: Path, **environment: str) -> tuple[Path, list[str], str]:
    """Builds the wheel and installs it into a new virtual environment with the dependencies of this
    one. Returns its Python, the names in the wheel, and the output of the build."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    build += ["-w", str(folder)]
    env = os.environ | {"MS_DEFORM_ATTN_CPU_ONLY": "1"} | environment
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    built = subprocess.run([*build, str(sdist)], env=env, **streams)
    assert built.returncode == 0, built.stdout
    wheel = next(folder.glob("*.whl"))
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    Path(site, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    put = [*pip, "install", "--no-deps", "--no-compile", "--target", site, str(wheel)]
    subprocess.run(put, capture_output=True, check=True)
    return python, ZipFile(wheel).namelist(), built.stdout


def run(python: Path, folder: Path, *arguments: str) -> str:
    """The output, stderr included, of Python run in a directory without the repository's files."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(python), *arguments], cwd=empty, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


TRAIN = """
import sys, torch
from dn_dino import build_model, load_detector, prepare_for_dn
from dn_dino.ops import choose_backend
print("backend", choose_backend(torch.device("cpu")))
model, criterion, _ = build_model("{config}", num_classes=3, num_queries=20, **{options})
targets = [{{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}}]
losses = criterion(model([torch.rand(3, 64, 64)], targets), targets)
sum(value for name, value in losses.items() if name in criterion.weight_dict).backward()
offsets = model.transformer.encoder.layers[0].self_attn.sampling_offsets
print("gradient", bool(offsets.weight.grad.abs().sum() > 0))
"""
LOAD = """
detector = load_detector(sys.argv[1])
found = detector.predict([torch.zeros(3, 40, 60, dtype=torch.uint8)], threshold=0.0)
print("boxes", found[0]["boxes"].shape[1], detector.class_map.num_classes)
print("from", sys.modules["dn_dino"].__file__, {"models", "ops"} & set(sys.modules))
"""
BASE = """
import sys
extras = ["av", "hotcoco", "matplotlib", "pycocotools", "simplejpeg", "supervision"]
sys.modules.update(dict.fromkeys(extras))  # cannot be imported
from dn_dino.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.full
def test_the_wheel_is_one_package_that_works_anywhere(sdist, tmp_path, small):
    quick = tmp_path / "c++"  # -O3 would take as long as all the rest
    quick.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    quick.chmod(0o755)
    python, names, _ = install(sdist, tmp_path, CXX=str(quick))
    assert {name.split("/")[0] for name in names} == {"dn_dino", "dn_dino-0.1.0.dist-info"}
    expected = {
        f"dn_dino/{path.relative_to(ROOT / 'models')}" for path in ROOT.glob("models/**/*.py")
    }
    expected |= {f"dn_dino/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/**/*.py")}
    expected |= {f"dn_dino/{path.relative_to(ROOT)}" for path in ROOT.glob("ops/*.py")}
    expected ^= {"dn_dino/ops/setup.py", "dn_dino/ops/libms_deform_attn_cpu.so"}
    assert {name for name in names if name.startswith("dn_dino/")} == expected

    assert main(small) == 0
    program = TRAIN.format(config="dino_4scale_r50", options={}) + LOAD
    checkpoint = str(tmp_path / "out" / "checkpoint.pth")
    printed = run(python, tmp_path, "-c", program, checkpoint)
    assert "backend cpp" in printed and "gradient True" in printed and "boxes 4 6" in printed
    assert f"from {tmp_path}/venv/" in printed and "dn_dino/__init__.py set()" in printed

    command = [str(next(tmp_path.rglob("bin/dn-dino"))), "inspect", checkpoint]
    assert "model      dn_dab_detr, backbone timm/resnet10t" in run(python, tmp_path, *command)
    Image.new("RGB", (40, 30)).save(tmp_path / "black.png")
    command = ["predict", checkpoint, "--source", str(tmp_path / "black.png"), "--output", "found"]
    assert "in 1 images" in run(python, tmp_path, "-c", BASE, *command)
    assert (tmp_path / "empty" / "found" / "black.jpg").exists()


def test_without_a_compiler_it_installs_and_runs_on_the_reference(sdist, tmp_path):
    python, names, printed = install(sdist, tmp_path, CXX="/bin/false")
    assert "Deformable attention will run on its PyTorch reference: /bin/false" in printed
    assert not [name for name in names if name.endswith(".so")]
    printed = run(
        python, tmp_path, "-c", TRAIN.format(config="toy/dino", options={"backbone": "resnet18"})
    )
    assert "backend reference" in printed and "gradient True" in printed
    assert "pip install --force-reinstall --no-deps, with c++ or nvcc available" in printed
