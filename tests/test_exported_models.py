"""`dn-dino export`: detectors as ONNX and .pt2 files, in onnxruntime, OpenVINO and torch."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from datasets.toy import CATEGORIES
from models import build_model, export, load_detector
from models.backbones import BACKBONES, BackboneSpec, ConvNeXt, Swin, convnext, swin
from models.build import read_config
from models.class_map import ClassMap
from models.cli import main
from models.coco import CocoAnnotations
from models.errors import UserError
from models.export import Exportable, Target, TopK, average_precision, export_detector
from models.options import DetectorOptions
from models.preprocess import normalize
from ops import ms_deform_attn_by_gathers, ms_deform_attn_reference
from tests.conftest import full

SMALL = {
    "hidden_dim": 32,
    "nheads": 4,
    "dim_feedforward": 32,
    "enc_layers": 1,
    "dec_layers": 2,
    "num_queries": 10,
    "num_select": 20,
    "num_classes": 6,
    "data_aug_scales": [64],
    "data_aug_max_size": 96,
}
FAMILIES = {
    "dab_detr": {"backbone": "resnet18"},
    "dn_dab_detr": {"dilation": True, "num_patterns": 2},
    "dab_deformable_detr": {"backbone": "small_swin"},
    "dn_dab_deformable_detr": {"backbone": "small_convnext"},
    "dn_dab_deformable_detr_deformable_encoder_only": {"num_patterns": 3},
    "dn_dab_dino_deformable_detr": {},
    "dino": {},
}
QUICK = ("dab_detr", "dn_dab_deformable_detr_deformable_encoder_only", "dino")  # part of make test


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a checkpoint with random weights: model, options -> its path."""
    monkeypatch.setitem(swin.VARIANTS, "small_swin", swin.Variant(32, 2, 3, ""))
    monkeypatch.setitem(convnext.VARIANTS, "small_convnext", convnext.Variant(8, (1, 1, 1, 1), ""))
    monkeypatch.setitem(BACKBONES, "small_swin", BackboneSpec(Swin))
    monkeypatch.setitem(BACKBONES, "small_convnext", BackboneSpec(ConvNeXt))

    def write(name: str, **options) -> Path:
        torch.manual_seed(0)
        config = read_config(f"toy/{name}") | SMALL | options
        model, _, _ = build_model(DetectorOptions.of(config))
        for weight in model.parameters():  # heads and offsets start at zero
            weight.data += 0.05 * torch.randn_like(weight)
        class_map = ClassMap.from_categories([{"id": i, "name": f"c{i}"} for i in CATEGORIES])
        state = {"config": config, "class_map": class_map.state_dict()}
        torch.save(state | {"model": model.state_dict()}, tmp_path / f"{name}.pth")
        return tmp_path / f"{name}.pth"

    return write


def run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]


def picture(height: int, width: int) -> Tensor:
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(5)).byte()


def test_gathers_equal_the_reference():
    torch.manual_seed(0)
    shapes = torch.tensor([[5, 7], [3, 4]])
    value, starts = torch.randn(2, 47, 3, 8), torch.tensor([0, 35])
    locations = torch.rand(2, 11, 3, 2, 4, 2) * 1.6 - 0.3  # many outside
    locations[0, 0, 0, 0, 0] = torch.nan
    inputs = value, shapes, starts, locations, torch.rand(2, 11, 3, 2, 4)
    expected = ms_deform_attn_reference(*inputs)
    torch.testing.assert_close(ms_deform_attn_by_gathers(*inputs), expected)


@pytest.mark.parametrize("name", [*QUICK, *full(*(n for n in FAMILIES if n not in QUICK))])
def test_every_family_in_onnx(name: str, make, tmp_path: Path):
    """In both runtimes by `export_detector`, and once more, from the file, here."""
    path, output = make(name, **FAMILIES[name]), tmp_path / "model.onnx"
    predictor = load_detector(path)
    figures = export_detector(predictor, path, output, Target(size=(64, 80), batch_size=1))
    assert figures["difference"] < 1e-3 and figures["OpenVINO ms"] > 0
    image = normalize(picture(64, 80))
    with torch.no_grad():
        expected = predictor.model([image])
    logits, boxes = run_onnx(output, image[None])
    torch.testing.assert_close(logits, expected["pred_logits"], atol=1e-3, rtol=0)
    torch.testing.assert_close(boxes, expected["pred_boxes"], atol=1e-3, rtol=0)
    operators = {node.op_type for node in onnx.load(output).graph.node}
    is_dense = name in ("dab_detr", "dn_dab_detr")
    assert ("Gather" in operators or is_dense) and "GridSample" not in operators


def test_any_size_and_batch_with_processing(make, tmp_path: Path, toy: Path, capsys):
    """The command's defaults; the file describes itself, and detects what the detector does."""
    path = make("dn_dab_detr")
    output = path.with_suffix(".onnx")
    command = ["export", str(path), "--with_processing", "--coco_path", str(toy)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"{output}: " in printed and "OpenVINO ms" in printed and "onnxruntime AP" in printed
    predictor = load_detector(path)
    for height, width in ((64, 64), (50, 70)):
        images = torch.stack([picture(height, width)] * 3)
        scores, labels, boxes = run_onnx(output, images)
        batch = [normalize(x) for x in images]
        with torch.no_grad():
            found = predictor.postprocess(predictor.model(batch), torch.tensor([[height, width]]))
        assert scores.shape == (3, 20)
        torch.testing.assert_close(scores[0], found[0]["scores"], atol=1e-4, rtol=0)
        assert labels[0].equal(found[0]["labels"])
        torch.testing.assert_close(boxes[0], found[0]["boxes"], atol=0.02, rtol=0)
    (entry,) = onnx.load(output).metadata_props
    told = json.loads(entry.value)
    assert entry.key == "dn_dino.json" and told["checkpoint"] == "dn_dab_detr.pth"
    assert told["classes"] == [[label, i, f"c{i}"] for label, i in enumerate(CATEGORIES)]
    assert told["model"] == "dn_dab_detr" and told["with_processing"] and told["size"] is None
    assert len(told["sha256"]) == 64 and told["mean"][0] == 0.485


def test_torch_keeps_the_operator(make, tmp_path: Path):
    path, output = make("dino"), tmp_path / "model.pt2"
    predictor = load_detector(path)
    target = Target("torch", size=(64, 96))
    figures = export_detector(predictor, path, output, target)
    assert figures["difference"] < 1e-5
    told = {export.DESCRIPTION: ""}
    program = torch.export.load(output, extra_files=told)
    assert json.loads(told[export.DESCRIPTION])["model"] == "dino"
    assert "dn_dino_ops.ms_deform_attn" in program.graph_module.code
    images = torch.stack([normalize(picture(64, 96))] * 3)
    with torch.no_grad():
        expected = predictor.model(list(images))
    logits, _ = program.module()(images)
    torch.testing.assert_close(logits, expected["pred_logits"], atol=1e-4, rtol=0)


def test_a_wrong_export_is_not_written(make, tmp_path: Path, monkeypatch):
    wrong = lambda *inputs: 1.1 * ms_deform_attn_by_gathers(*inputs)
    monkeypatch.setattr(export, "ms_deform_attn_by_gathers", wrong)
    path = make("dab_deformable_detr")
    with pytest.raises(UserError, match=r"not written, because onnxruntime differs .* 1 x 3 x 64"):
        target = Target(size=(64, 64), batch_size=1)
        export_detector(load_detector(path), path, tmp_path / "x.onnx", target)
    assert list(tmp_path.iterdir()) == [path]


def test_errors(make, tmp_path: Path, capsys, monkeypatch):
    path = str(make("dab_detr"))
    for flags, message in (
        (["--size", "64"], "size: 64 is neither H W nor dynamic"),
        (["--size", "64", "0"], "size: 64 0 is neither H W nor dynamic"),
        (["--batch_size", "many"], "batch_size: many is neither N nor dynamic"),
        (["--opset", "16"], "opset: 16 is less than 18"),
        (["--output", path], "is the checkpoint itself"),
    ):
        assert main(["export", path, *flags]) == 2
        assert message in capsys.readouterr().err
    predictor = load_detector(path)
    predictor.postprocess.nms_iou_threshold = 0.5
    with pytest.raises(UserError, match="NMS is not exported"):
        export_detector(predictor, path, tmp_path / "x.onnx", Target(with_processing=True))
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", path]) == 2
    assert "this needs the package onnx: pip install dn_dino[export]" in capsys.readouterr().err


def test_a_choice_of_topk_is_made_again():
    scores = torch.tensor([[3.0, 1.0, 2.9, 2.0]])
    with TopK() as top:
        assert scores.topk(2, dim=1).indices.tolist() == [[0, 2]]
    assert [x.tolist() for x in top.choices] == [[[0, 2]]]
    with TopK([torch.tensor([[2, 0]])]) as top:
        assert scores.topk(2, dim=1).indices.tolist() == [[2, 0]]
    assert top.loss == pytest.approx(0.1)


def test_a_wrong_label_is_a_difference(make):
    predictor = load_detector(make("dab_detr"))
    module = Exportable(predictor, Target(with_processing=True))
    images = export.example(module.target, 1, (64, 64))
    with torch.no_grad(), TopK() as top:
        scores, labels, boxes = module.detect(images)
    assert export.difference(lambda _: (scores, labels, boxes, *top.choices), module, images) == 0
    run = lambda _: (scores, labels, boxes + 6.4, *top.choices)
    assert export.difference(run, module, images) == pytest.approx(0.1)
    run = lambda _: (scores, 1 - labels, boxes, *top.choices)
    assert export.difference(run, module, images) == np.inf


def test_average_precision_of_the_truth_is_1(toy: Path):
    truth = json.loads((toy / "annotations" / "instances_val2017.json").read_text())
    class_map = ClassMap.from_categories(truth["categories"])
    rows = iter(
        [[a for a in truth["annotations"] if a["image_id"] == i["id"]] for i in truth["images"]]
    )

    def predict(image: Tensor) -> tuple[Tensor, ...]:
        found = next(rows)
        boxes = torch.tensor([a["bbox"] for a in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([class_map.label_of[a["category_id"]] for a in found])
        return torch.ones(len(found)), labels, boxes

    file = toy / "annotations" / "instances_val2017.json"
    dataset = CocoAnnotations(toy / "val2017", file, class_map)
    assert average_precision(predict, dataset) == pytest.approx(1)


@pytest.mark.full
def test_int8(make, toy, capsys, monkeypatch):
    """The convolutions' weights are bytes; what costs too much AP is not written."""
    path = make("dino")
    output = path.with_suffix(".onnx")
    command = ["export", str(path), "--size", "64", "96", "--batch_size", "1", "--int8"]
    assert main(command) == 2
    assert "int8: only for ONNX, and with a data set" in capsys.readouterr().err
    command += ["--coco_path", str(toy)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "onnxruntime AP" in printed and "OpenVINO" not in printed
    model = onnx.load(output)
    bytes_ = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    producers = {name: node for node in model.graph.node for name in node.output}
    weights = [producers[node.input[1]] for node in model.graph.node if node.op_type == "Conv"]
    assert weights and all(node.op_type == "DequantizeLinear" for node in weights)
    assert all(node.input[0] in bytes_ for node in weights)
    assert json.loads(model.metadata_props[0].value)["int8"] is True
    logits, boxes = run_onnx(output, torch.randn(1, 3, 64, 96))
    assert logits.shape == (1, 10, 6) and boxes.shape == (1, 10, 4)

    aps = iter([0.40, 0.43])
    monkeypatch.setattr(export, "average_precision", lambda *_: next(aps))
    output.unlink()
    assert main(command) == 2
    assert "AP is 0.4000, but the detector's 0.4300" in capsys.readouterr().err
    assert not output.exists()
