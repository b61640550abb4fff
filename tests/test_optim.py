"""Which parameter learns at which rate, and the rates over a run."""

import pytest
import torch
from torch import nn

from util.config import load_config
from util.optim import build_optimizer, build_scheduler, parameter_groups


class Tiny(nn.Module):
    """Names as a deformable detector has them."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)])
        self.sampling_offsets = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def settings(param_dict_type: str) -> dict[str, tuple[float, float]]:
    """{parameter: (learning rate, weight decay)}."""
    model = Tiny()
    cfg = load_config(None, {"param_dict_type": param_dict_type})
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, cfg)
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert not any(name.startswith("frozen") for name in found)
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    return found


def test_default_slows_the_backbone():
    found = settings("default")
    assert found["backbone.0.weight"] == found["backbone.1.bias"] == (1e-5, 1e-4)
    assert found["sampling_offsets.weight"] == found["norm.weight"] == (1e-4, 1e-4)


def test_ddetr_in_mmdet_slows_sampling_offsets():
    found = settings("ddetr_in_mmdet")
    assert found["sampling_offsets.weight"] == (pytest.approx(1e-5), 1e-4)
    assert found["norm.weight"] == (1e-4, 1e-4)


def test_large_wd_spares_norms_and_biases():
    found = settings("large_wd")
    assert found["backbone.0.weight"] == (1e-5, 1e-4)
    assert found["backbone.1.weight"] == found["backbone.0.bias"] == (1e-5, 0)
    assert found["norm.weight"] == found["sampling_offsets.bias"] == (1e-4, 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr_drop": 2}, [1e-4, 1e-4, 1e-5, 1e-5, 1e-6]),
        ({"multi_step_lr": True, "lr_drop_list": [1, 4]}, [1e-4, 1e-5, 1e-5, 1e-5, 1e-6]),
    ],
)
def test_step_schedules(options: dict, expected: list[float]):
    cfg = load_config(None, options)
    optimizer = build_optimizer(Tiny(), cfg)
    scheduler, every_step = build_scheduler(optimizer, cfg, steps_per_epoch=7)
    assert not every_step
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[1]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)


def test_one_cycle_keeps_the_ratio_of_the_groups():
    cfg = load_config(None, {"onecyclelr": True, "epochs": 2})
    optimizer = build_optimizer(Tiny(), cfg)
    scheduler, every_step = build_scheduler(optimizer, cfg, steps_per_epoch=50)
    assert every_step
    rates = []
    for _ in range(99):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    backbone, rest = torch.tensor(rates).T
    torch.testing.assert_close(rest, 10 * backbone)
    assert rest.max() == pytest.approx(1e-4)
    assert 18 <= rest.argmax() <= 20
    assert rest[-1] < 1e-6


def test_muon_steps_are_orthogonal_between_hidden_layers_only():
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("linear1", "class_embed")})
    cfg = load_config(None, {"optimizer": "muon", "lr": 1e-2, "weight_decay": 0})
    optimizer = build_optimizer(model, cfg)
    spread = torch.logspace(0, -1, 16)  # of the gradients' singular values
    steps = {}
    for name, layer in model.items():
        layer.weight.grad = (torch.linalg.qr(torch.randn(16, 16))[0] * spread).contiguous()
        layer.bias.grad = torch.randn(16)
        steps[name] = layer.weight.detach().clone()
    optimizer.step()
    steps = {name: before - model[name].weight.detach() for name, before in steps.items()}
    values = torch.linalg.svdvals(steps["linear1"])
    assert values.max() / values.min() < 4  # of the gradient: 10
    assert values.mean() == pytest.approx(3e-2 * 0.2 * 16**0.5, rel=0.3)
    adamw = 1e-2 * model["class_embed"].weight.grad.sign()  # its first step
    torch.testing.assert_close(steps["class_embed"], adamw, rtol=1e-3, atol=0)


def test_muon_groups_keep_their_rates():
    model = Tiny()
    cfg = load_config(None, {"optimizer": "muon", "param_dict_type": "ddetr_in_mmdet"})
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, cfg)
    hidden = {names[id(p)]: g["lr"] for g in groups if g["hidden"] for p in g["params"]}
    assert hidden == {"backbone.0.weight": pytest.approx(3e-5)}
    assert len({(g["lr"], g["weight_decay"], g["hidden"]) for g in groups}) == len(groups)
