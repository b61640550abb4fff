"""Each parameter's learning rate, and the schedules."""

import pytest
import torch
from torch import nn

from models import build_model
from util.config import load_config
from util.optim import (
    MUON_MOMENTUM,
    Muon,
    build_optimizer,
    build_scheduler,
    load_released_state,
    parameter_groups,
)


class Tiny(nn.Module):
    """Parameter names as in a deformable detector."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)])
        self.hidden = nn.Linear(4, 4)
        self.input_proj = nn.GroupNorm(2, 4)  # a norm not called "norm"
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


def test_default_lowers_the_backbone_rate():
    found = settings("default")
    assert found["backbone.0.weight"] == found["backbone.1.bias"] == (1e-5, 1e-4)
    assert found["sampling_offsets.weight"] == found["norm.weight"] == (1e-4, 1e-4)


def test_ddetr_in_mmdet_lowers_the_sampling_offsets_rate():
    found = settings("ddetr_in_mmdet")
    assert found["sampling_offsets.weight"] == (pytest.approx(1e-5), 1e-4)
    assert found["norm.weight"] == (1e-4, 1e-4)


def test_large_wd_exempts_norms_and_biases_by_name():
    """As released, so neither the backbone's bn1 nor the norms in input_proj."""
    found = settings("large_wd")
    assert found["backbone.0.weight"] == found["backbone.1.weight"] == (1e-5, 1e-4)
    assert found["backbone.0.bias"] == (1e-5, 0)
    assert found["norm.weight"] == found["sampling_offsets.bias"] == (1e-4, 0)
    assert found["input_proj.weight"] == (1e-4, 1e-4)


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


def test_one_cycle_peaks_at_the_same_rate_in_every_group():
    """As released, including the backbone."""
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
    torch.testing.assert_close(rest, backbone)
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
    assert values.max() / values.min() < 4  # the gradient's: 10
    assert values.mean() == pytest.approx(3e-2 * 0.2 * 16**0.5, rel=0.3)
    adamw = 1e-2 * model["class_embed"].weight.grad.sign()  # its first step
    torch.testing.assert_close(steps["class_embed"], adamw, rtol=1e-3, atol=0)


def test_muon_groups_keep_their_rates():
    model = Tiny()
    cfg = load_config(None, {"optimizer": "muon", "param_dict_type": "ddetr_in_mmdet"})
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, cfg)
    hidden = {names[id(p)]: g["lr"] for g in groups if g["hidden"] for p in g["params"]}
    assert hidden == {"hidden.weight": 1e-4, "backbone.2.weight": 1e-5}
    assert len({(g["lr"], g["weight_decay"], g["hidden"]) for g in groups}) == len(groups)


def test_muon_leaves_embeddings_stem_and_heads_to_adamw():
    names = ("patterns", "tgt_embed", "label_enc", "level_embed", "class_embed", "bbox_embed")
    overrides = {"optimizer": "muon", "num_queries": 20, "backbone": "resnet18"}
    overrides |= {"pretrained_backbone": False}
    models = ("dino_4scale_r50", "dn_dab_deformable_detr_deformable_encoder_only_r50_3pat")
    for name in models:
        cfg = load_config(f"configs/{name}.py", overrides)
        model, _, _ = build_model(cfg)
        hidden = {id(p) for g in parameter_groups(model, cfg) if g["hidden"] for p in g["params"]}
        found = {n for n, p in model.named_parameters() if id(p) in hidden}
        assert not [n for n in found if any(name in n for name in names)]
        assert "backbone.0.body.conv1.weight" not in found
        assert {"backbone.0.body.layer1.0.conv1.weight", "input_proj.0.0.weight"} <= found
        assert "transformer.encoder.layers.0.linear1.weight" in found


def test_muon_steps_match_torch(monkeypatch: pytest.MonkeyPatch):
    """With torch's iteration in place of ours, up to its bfloat16 rounding."""
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12 * 20).view(12, 20)) for _ in range(2))
    monkeypatch.setattr("util.optim.COEFFICIENTS", [(3.4445, -4.775, 2.0315)] * 5)
    monkeypatch.setattr("util.optim.MUON_RATE", 1)
    rates = {"lr": 0.02, "weight_decay": 0.3}
    muon = Muon([{"params": [ours], "hidden": True, **rates}])
    options = {"momentum": MUON_MOMENTUM, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
    oracle = torch.optim.Muon([theirs], **rates, **options)
    for seed in range(3):
        gradient = torch.randn(12, 20, generator=torch.Generator().manual_seed(seed))
        before = theirs.detach().clone()
        for parameter, optimizer in ((ours, muon), (theirs, oracle)):
            parameter.grad = gradient.clone()
            optimizer.step()
        length = (theirs - before).norm()
        assert (ours - theirs).norm() < 0.05 * length


@pytest.mark.parametrize(("number", "has_offsets"), [(2, True), (3, True), (3, False)])
def test_released_optimizer_state_follows_its_own_parameter_order(number: int, has_offsets: bool):
    """Its groups are "not backbone" and "backbone", and in some projects `LOW_RATE`, to which
    Anchor DETR has no parameter; frozen weights are in none."""
    torch.manual_seed(0)
    theirs, ours = Tiny(), Tiny()
    if not has_offsets:
        del theirs.sampling_offsets, ours.sampling_offsets
    names = list(theirs.state_dict())[::-1]  # as if their model were built in reverse order
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    groups: list[list] = [[] for _ in range(number)]
    for name in (n for n in names if n in trained):
        is_low = number == 3 and "sampling_offsets" in name
        groups[2 if is_low else "backbone" in name].append(trained[name])
    released = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-4)
    for _ in range(2):
        for parameter in trained.values():
            parameter.grad = torch.randn_like(parameter)
        released.step()
    weights = {n: theirs.state_dict()[n] for n in names}
    checkpoint = {"model": weights, "optimizer": released.state_dict()}
    optimizer = build_optimizer(ours, load_config())
    assert load_released_state(optimizer, ours, checkpoint)
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            for key, value in released.state[trained[name]].items():
                torch.testing.assert_close(optimizer.state[parameter][key], value)
    del checkpoint["optimizer"]["param_groups"][1]
    assert not load_released_state(build_optimizer(ours, load_config()), ours, checkpoint)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 6, 10, 11])
def test_one_cycle_of_any_length(steps: int):
    cfg = load_config(None, {"onecyclelr": True, "epochs": steps, "lr": 1e-3})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule, every_step = build_scheduler(optimizer, cfg, 1)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert every_step and all(0 < rate <= 1e-3 for rate in rates)
