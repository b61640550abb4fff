"""The benchmarks of whole models, on the toy DINO."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_step
from benchmarks.common import count_flops, flops_by_kind, random_batch
from models import build_model
from ops import ms_deform_attn

TOY = ["-c", "configs/toy/dino.py", "--size", "96", "128", "--repeats", "2", "--device", "cpu"]
TOY += ["--batch_size", "4", "--eval_batch_size", "1"]
# At strides 8, 16 and 32 of 96 x 128, of the backbone's stages and a further convolution.
TOKENS = 12 * 16 + 6 * 8 + 3 * 4


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *more: str) -> dict:
    monkeypatch.setattr("sys.argv", [bench_step.__file__, *TOY, "--json", str(path), *more])
    bench_step.main()
    return json.loads(path.read_text())


def test_profile_adds_up(tmp_path):
    """In a process of its own, whose peak it is; without the packages that models do not need."""
    names = "pycocotools", "tensorboard", "matplotlib", "submitit"
    code = f"import sys; sys.modules.update(dict.fromkeys({names}))\n"  # imports of these fail
    code += "from benchmarks import bench_step, profile_model, steps; profile_model.main()"
    command = [sys.executable, "-c", code, *TOY, "--json", tmp_path / "profile.json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads((tmp_path / "profile.json").read_text())
    flops = report["multiply_adds"]
    assert sum(flops.values()) == sum(report["multiply_adds_by_kind"].values())
    assert flops.keys() == report["median_ms"].keys() and min(report["median_ms"].values()) > 0
    model, _, _ = build_model("toy/dino")
    assert sum(report["parameters"].values()) == sum(p.numel() for p in model.parameters())
    assert report["parameters"]["backbone"] == sum(p.numel() for p in model.backbone.parameters())
    # The last class head and the first ones share their shape: 3 layers, 40 queries, 128 x 91.
    assert flops["class heads"] == 3 * 40 * 128 * 91
    sampling = 4 * 32 * 4 * 3 * 4  # pixels, channels of a head, heads, levels, points
    assert report["multiply_adds_by_kind"]["deformable sampling"] == sampling * (
        2 * TOKENS + 3 * 40
    )
    assert 0 < report["peak_MiB"] < 2000
    assert f"| total | {sum(flops.values()) / 1e9:.2f} |" in printed


@pytest.mark.full
def test_training_steps_of_two_sides(monkeypatch, tmp_path, capsys):
    more = "--mode", "train", "--side=", "--side=--amp --batch_size 2"
    report = run(monkeypatch, tmp_path / "step.json", *more)
    entries = report["modes"]["train"]
    assert [entry["side"] for entry in entries] == ["ours", "ours --amp --batch_size 2"]
    for entry, batch_size in zip(entries, (4, 2), strict=True):
        assert len(entry["runs"]) == 2 and entry["min_ms"] <= entry["median_ms"]
        assert entry["images_per_s"] == pytest.approx(1e3 * batch_size / entry["median_ms"])
        rates, flops = entry["flops_per_s"], entry["flops"]
        products = flops["matrix product"] + flops["attention"]
        floor = products / rates["product"] + flops["convolution"] / rates["convolution"]
        assert 0 < entry["floor_ms"] == pytest.approx(1e3 * floor)
        assert entry["peak_MiB"] > 0
    queries = 40 + 6 * 2 * 20  # the decoder's: 6 groups of each object's positive and negative
    samples = 4 * (2 * TOKENS + 3 * queries) * 4 * 3 * 4
    assert entries[0]["flops"]["deformable sampling"] == 3 * 2 * 4 * 32 * samples
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| train")]
    assert [line.split(" | ")[1] for line in printed] == [entry["side"] for entry in entries]


def test_flops_of_gradients():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8, 9, requires_grad=True)
    weight = torch.randn(6, 2, 3, 3, requires_grad=True)
    with count_flops() as counter:
        F.conv2d(x, weight, padding=1, groups=3).sum().backward()
    assert flops_by_kind(counter) == {"convolution": 3 * 2 * (6 * 8 * 9) * (2 * 9)}

    q, k, v = (torch.randn(2, 4, n, 16, requires_grad=True) for n in (5, 7, 7))
    with count_flops() as counter:
        F.scaled_dot_product_attention(q, k, v).sum()
    assert flops_by_kind(counter) == {"attention": 2 * 2 * (2 * 4 * 5 * 7 * 16)}

    value = torch.randn(2, 20, 3, 8, requires_grad=True)
    shapes, starts = torch.tensor([[4, 4], [2, 2]]), torch.tensor([0, 16])
    locations, weights = torch.rand(2, 5, 3, 2, 4, 2), torch.rand(2, 5, 3, 2, 4)
    with count_flops() as counter:
        ms_deform_attn(value, shapes, starts, locations, weights).sum().backward()
    assert flops_by_kind(counter) == {"deformable sampling": 3 * 2 * 4 * 8 * weights.numel()}


def test_released_needs_a_model_of_that_code(monkeypatch, tmp_path, capsys):
    more = "--released", ".", "-c", "configs/toy/dab_detr.py"
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, tmp_path / "step.json", *more)
    assert "released: it has to be one of" in capsys.readouterr().err


def test_batches_are_always_the_same():
    (images, targets), (again, _) = (random_batch(2, (32, 48), 5, 91) for _ in range(2))
    assert torch.equal(torch.stack(images), torch.stack(again)) and images[0].shape == (3, 32, 48)
    centres, sides = targets[1]["boxes"].split(2, dim=1)
    assert (centres - sides / 2 >= 0).all() and (centres + sides / 2 <= 1 + 1e-6).all()
