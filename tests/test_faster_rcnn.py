"""Faster R-CNN against torchvision's own, and denoising in its box head."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import detection, resnet18
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import box_convert, box_iou

from main import main
from models import build_model, load_detector
from models.class_map import COCO
from models.cli import main as cli
from models.errors import UserError
from models.export import Target, export_detector
from models.weights import load_backbone
from tests.test_main import assert_same_state, read_log
from tests.test_models import make_targets
from util.checkpoint import read_checkpoint
from util.config import load_config, parse_command_line
from util.optim import parameter_groups

SMALL = {
    "backbone": "resnet18",
    "pretrained_backbone": False,
    "batch_norm_type": "BatchNorm2d",
    "hidden_dim": 32,
    "dim_feedforward": 64,
    "num_classes": 5,
    "num_regions": 64,
}
MAIN = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")


def small_model(config: str = "dn_faster_rcnn_r50_fpn", seed: int = 0, **overrides):
    torch.manual_seed(seed)
    return build_model(load_config(f"configs/{config}.py", SMALL | overrides))


def torchvision_model(num_rows: int = SMALL["num_classes"] + 1) -> detection.FasterRCNN:
    """torchvision's model of SMALL's sizes; images are already resized and normalised."""
    resnet = resnet18(norm_layer=torch.nn.BatchNorm2d)
    backbone = _resnet_fpn_extractor(resnet, 5)
    backbone.fpn = small_model()[0].backbone.fpn
    backbone.out_channels = 32
    head = detection.faster_rcnn.TwoMLPHead(32 * 49, 64)
    predictor = detection.faster_rcnn.FastRCNNPredictor(64, num_rows)
    model = detection.FasterRCNN(
        backbone,
        box_head=head,
        box_predictor=predictor,
        box_batch_size_per_image=64,
        image_mean=[0] * 3,
        image_std=[1] * 3,
    )
    model.transform.resize = lambda image, target: (image, target)
    return model


@pytest.fixture
def pair() -> tuple:
    """Our model and torchvision's with equal weights, of which the last layers find objects."""
    model, criterion, postprocess = small_model()
    for part in (model.rpn.head, model.roi_heads.box_predictor):
        for parameter in part.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    theirs = torchvision_model()
    theirs.load_state_dict(model.state_dict())
    return model, theirs, criterion, postprocess


IMAGES = [torch.randn(3, 90, 121), torch.randn(3, 128, 100)]  # no multiples of 32
SIZES = torch.tensor([image.shape[1:] for image in IMAGES])


def test_names_and_shapes_are_those_of_torchvision():
    with torch.device("meta"):
        options = {"num_classes": 90, "batch_norm_type": "BatchNorm2d"}
        model, _, _ = build_model(load_config("configs/dn_faster_rcnn_r50_fpn.py", options))
        theirs = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, theirs)]
    assert shapes[0] == shapes[1]


def test_detections_are_those_of_torchvision(pair):
    """Also of images that were resized; padding, batch and targets change nothing else."""
    model, theirs, _, postprocess = pair
    original = 3 * SIZES
    with torch.no_grad():
        expected = theirs.eval()(IMAGES)
        outputs = model.eval()(IMAGES, make_targets(3, 1))
    assert torch.equal(outputs["sizes"], SIZES)
    for result, wanted in zip(postprocess(outputs, SIZES), expected, strict=True):
        assert len(result["scores"]) > 20
        for key in ("scores", "boxes"):
            assert torch.equal(result[key], wanted[key])
        assert torch.equal(result["labels"] + 1, wanted["labels"])
    resized = [[tuple(size) for size in sizes.tolist()] for sizes in (SIZES, original)]
    scaled = theirs.transform.postprocess([dict(x) for x in expected], *resized)
    for result, wanted in zip(postprocess(outputs, original), scaled, strict=True):
        assert torch.equal(result["boxes"], wanted["boxes"])


@pytest.mark.parametrize("counts", [(3, 1), (0, 2)])
def test_losses_are_those_of_torchvision(pair, counts: tuple[int, ...]):
    """With the same samples; denoising comes on top and changes none of them."""
    model, theirs, criterion, _ = pair
    targets = make_targets(*counts)
    scale = SIZES.flip(1).repeat(1, 2)
    absolute = [
        {"labels": t["labels"] + 1, "boxes": box_convert(t["boxes"], "cxcywh", "xyxy") * s}
        for t, s in zip(targets, scale, strict=True)
    ]
    torch.manual_seed(7)
    expected = theirs.train()(IMAGES, absolute)
    gradient = torch.autograd.grad(sum(expected.values()), theirs.backbone.body.conv1.weight)
    for prepare in (model.prepare_denoising, None):
        model.prepare_denoising = prepare
        torch.manual_seed(7)
        losses = criterion(model.train()(IMAGES, targets), targets)
        assert losses.keys() == criterion.weight_dict.keys() - (
            set() if prepare else {"loss_classifier_dn", "loss_box_reg_dn"}
        )
        assert all(torch.equal(losses[name], expected[name]) for name in MAIN)
        total = sum(losses[name] for name in MAIN)
        (ours,) = torch.autograd.grad(total, model.backbone.body.conv1.weight)
        assert torch.equal(ours, gradient[0])


def denoised(model, targets: list[dict]) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """The losses, and the regions of the denoising part (R, 4) with its class logits and codes."""
    seen: dict[str, list] = {"regions": [], "outputs": []}
    hooks = [
        model.roi_heads.box_roi_pool.register_forward_pre_hook(
            lambda module, inputs: seen["regions"].append(torch.cat(inputs[1]))
        ),
        model.roi_heads.box_predictor.register_forward_hook(
            lambda module, inputs, outputs: seen["outputs"].append(outputs)
        ),
    ]
    losses = model.train()(IMAGES, targets)["losses"]
    for hook in hooks:
        hook.remove()
    assert len(seen["regions"]) == 2  # the sampled ones come first
    return losses, seen["regions"][1], seen["outputs"][1]


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.9])
def test_denoising_restores_the_object_of_each_region(noise: float):
    """Not the one it overlaps most, nor background where it overlaps little."""
    model, _, _ = small_model(dn_number=4, dn_box_noise_scale=noise)
    targets = make_targets(3, 1)
    for target in targets:
        target["boxes"][:, 2:] /= 2  # inside the image
    losses, regions, (logits, codes) = denoised(model, targets)
    scale = SIZES.flip(1).repeat(1, 2)
    boxes = torch.cat(
        [
            (box_convert(t["boxes"], "cxcywh", "xyxy") * s).repeat(4, 1)
            for t, s in zip(targets, scale, strict=True)
        ]
    )
    labels = torch.cat([t["labels"].repeat(4) + 1 for t in targets])
    assert len(regions) == 4 * (3 + 1)
    overlap = box_iou(regions, boxes).diagonal()
    assert overlap.min() > (0.99 if noise == 0 else 0.02)
    assert (noise == 0.9) == bool((overlap < 0.5).any())
    aims = model.roi_heads.box_coder.encode_single(boxes, regions)
    mean_of_class, mean_of_box = detection.roi_heads.fastrcnn_loss(logits, codes, [labels], [aims])
    share = len(regions) / (2 * 64)  # a region weighs as much as one of the 64 of each image
    torch.testing.assert_close(losses["loss_classifier_dn"], mean_of_class * share)
    torch.testing.assert_close(losses["loss_box_reg_dn"], mean_of_box * share, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("noise", [0.4, 3.0])
@pytest.mark.parametrize("counts", [(2, 3), (0, 0), (0, 4)])
def test_every_parameter_gets_a_finite_gradient(counts: tuple[int, ...], noise: float):
    """As DDP requires; much noise leaves some regions without area, which are dropped."""
    model, criterion, _ = small_model(dn_box_noise_scale=noise)
    targets = make_targets(*counts)
    losses, regions, _ = denoised(model, targets)
    assert (len(regions) < 10 * sum(counts)) == (noise > 1 and sum(counts) > 0)
    sum(losses[k] * w for k, w in criterion.weight_dict.items()).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if sum(counts) == 0:
        assert losses["loss_classifier_dn"] == losses["loss_box_reg_dn"] == 0


def test_half_precision_keeps_boxes_precise():
    """bfloat16 has 8 bits: pixels of large images would be off by 4."""
    model, _, _ = small_model()
    proposals = []
    model.roi_heads.box_roi_pool.register_forward_pre_hook(
        lambda module, inputs: proposals.append(torch.cat(inputs[1]))
    )
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(IMAGES, make_targets(2, 1))["losses"]
        found = model.eval()(IMAGES)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    for boxes in (*proposals, *found["boxes"]):
        assert boxes.dtype == torch.float32
        assert not torch.equal(boxes, boxes.bfloat16().float())


def test_learning_rates_and_hidden_matrices():
    """The pyramid is no part of the pretrained backbone; heads are not for Muon."""
    model, _, _ = small_model()
    cfg = load_config(None, {"lr": 1.0, "lr_backbone": 0.5, "optimizer": "muon"})
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: group for group in parameter_groups(model, cfg) for p in group["params"]}
    rates = {name: group["lr"] for name, group in found.items()}
    assert {n for n, r in rates.items() if r == 0.5} == {n for n in rates if ".body." in n}
    heads = ("cls_score", "bbox_pred", "cls_logits")
    hidden = {name for name, group in found.items() if group["hidden"]}
    assert "roi_heads.box_head.fc6.weight" in hidden
    assert not any(head in name for name in hidden for head in heads)


def written(directory: Path) -> Path:
    """SMALL as a config file, but for the number of classes."""
    path = directory / "small.py"
    lines = [f"{k} = {v!r}\n" for k, v in SMALL.items() if k != "num_classes"]
    path.write_text("".join(['modelname = "faster_rcnn"\n', *lines]))
    return path


def old_name(name: str) -> str:
    """In torchvision's released file, which is older than the names of today."""
    name = re.sub(r"(fpn\.\w+_blocks\.\d)\.0\.", r"\1.", name)
    return name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")


def test_released_file(toy: Path, tmp_path: Path):
    """Its 91 rows are the background and COCO's ids from 1; it has no class map."""
    theirs = torchvision_model(num_rows=91).eval()
    theirs.roi_heads.box_predictor.cls_score.weight.data *= 20
    path = tmp_path / "fasterrcnn_coco.pth"
    torch.save({old_name(k): v for k, v in theirs.state_dict().items()}, path)
    config = written(tmp_path)
    detector = load_detector(path, config)
    assert all(
        torch.equal(v, detector.model.state_dict()[k]) for k, v in theirs.state_dict().items()
    )
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    (found,) = detector.predict(image, threshold=0)
    with torch.no_grad():
        (wanted,) = theirs([detector.prepare([image]).tensors[0]])
    ids = [detector.class_map.ids[label] for label in found.labels.tolist()]
    assert ids == wanted["labels"].tolist() and len(set(ids)) > 1
    assert (
        cli(["convert", str(path), "--output", str(tmp_path / "ours.pth"), "-c", str(config)]) == 0
    )
    named = load_detector(tmp_path / "ours.pth").class_map
    assert {named.ids[label]: name for label, name in named.names.items()} == COCO
    assert all(id_ == label + 1 for label, id_ in named.ids.items())
    argv = ["-c", str(config), "--resume", str(path), "--eval", "--device", "cpu"]
    argv += ["--coco_path", str(toy), "--num_workers", "0", "--data_aug_scales", "64"]
    assert main(argv) == 0


def test_pretrained_weights_of_a_swin_leave_out_the_pyramid(tmp_path: Path):
    model, _, _ = small_model(backbone="swin_T_224_1k")
    weights = {k: v for k, v in model.backbone.state_dict().items() if not k.startswith("fpn")}
    torch.save({"model": weights}, tmp_path / "swin.pth")
    other, _, _ = small_model(backbone="swin_T_224_1k", seed=1)
    before = other.backbone.fpn.state_dict()["inner_blocks.0.0.weight"].clone()
    load_backbone(other.image_backbone, "swin_T_224_1k", str(tmp_path / "swin.pth"))
    assert all(torch.equal(v, other.backbone.state_dict()[k]) for k, v in weights.items())
    assert torch.equal(other.backbone.fpn.state_dict()["inner_blocks.0.0.weight"], before)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-m faster_rcnn --use_dn", "use -m dn_faster_rcnn"),
        ("-m faster_rcnn --num_queries 50", "num_queries: faster_rcnn makes no use of it"),
        ("-m faster_rcnn --log_matching", "log_matching: faster_rcnn has no queries to match"),
    ],
)
def test_options_without_effect_are_rejected(line: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_command_line(line.split())


def test_unsuitable_backbone_and_export_are_rejected(tmp_path: Path):
    with pytest.raises(UserError, match=r"backbone: timm/vit_tiny_patch16_224 has no strides"):
        small_model(backbone="timm/vit_tiny_patch16_224")
    model, _, _ = small_model("faster_rcnn_r50_fpn")
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    detector = load_detector(tmp_path / "model.pth", written(tmp_path))
    with pytest.raises(UserError, match=r"export: .* depends on the image"):
        export_detector(detector, tmp_path / "model.pth", tmp_path / "model.onnx", Target())


def test_resumed_run_is_the_same(toy: Path, tmp_path: Path):
    """Bit for bit, with denoising."""
    argv = ["-c", "configs/toy/dn_faster_rcnn.py", "--coco_path", str(toy), "--device", "cpu"]
    argv += ["--hidden_dim", "16", "--dim_feedforward", "32", "--data_aug_scales", "96"]
    argv += ["--batch_size", "12"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*argv, "--epochs", "2", "--output_dir", str(whole), "--onecyclelr", "false"]) == 0
    for epochs in ("1", "2"):
        line = ["--epochs", epochs, "--output_dir", str(parts), "--onecyclelr", "false"]
        assert main([*argv, *line]) == 0
    states = [read_checkpoint(out / "checkpoint.pth") for out in (whole, parts)]
    for state in states:
        state["ema_model"] = {}
    assert_same_state(*states)
    first, _ = read_log(parts)
    assert first["train_loss_box_reg_dn"] > 0 and "test_loss" not in first
