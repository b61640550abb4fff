"""Masks: read, transformed, predicted, trained, evaluated, drawn. The head itself is compared with
transformers' in test_oracle.py."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from datasets.coco import CocoDetection, collate
from datasets.toy import encode_rle
from datasets.transforms import eval_transforms, train_transforms
from main import main
from models import load_detector
from models.cli import main as dn_dino
from models.draw import class_colour, draw_boxes
from models.errors import UserError
from models.evaluation import CocoEvaluator, curves_by_hotcoco, curves_by_pycocotools
from models.export import Target, export_detector
from models.options import DetectorOptions
from tests.test_coco import annotation, coco_dict, image_entry
from tests.test_coco import make as make  # a fixture
from tests.test_main import read_log
from tests.test_models import make_targets, small_model
from util.checkpoint import read_checkpoint

TRIANGLE = [10, 5, 30, 5, 10, 35]  # in an image of 60 x 40
DISC = np.hypot(*(np.mgrid[:40, :60] - [[[20]], [[30]]])) < 12


def compressed(mask: np.ndarray) -> dict:
    found = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {**found, "counts": found["counts"].decode()}


def masks_of(make, *shapes, **fields) -> tuple[CocoDetection, list[Tensor]]:
    """A data set of one image with an object of each shape, and its masks, unchanged in size."""
    objects = [annotation(i, segmentation=s, **fields) for i, s in enumerate(shapes, 1)]
    dataset = make(coco_dict([image_entry()], objects), masks=True)
    return dataset, list(dataset[0][1]["masks"])


def test_polygons_and_both_rles_are_read(make):
    shapes = [TRIANGLE], encode_rle(DISC), compressed(DISC), [TRIANGLE, [40, 5, 50, 5, 50, 15]]
    _, (triangle, first, second, both) = masks_of(make, *shapes)
    assert torch.equal(first, torch.from_numpy(DISC)) and torch.equal(second, first)
    assert (
        triangle[6, 11] and not triangle[34, 29] and triangle.sum() == pytest.approx(300, rel=0.1)
    )
    assert torch.equal(both[:, :35], triangle[:, :35]) and both[6, 48]


def test_bad_polygons_are_counted_and_left_out(make, caplog):
    odd, few, outside = [*TRIANGLE, 3], TRIANGLE[:4], [70, 5, 90, 5, 70, 35]
    other = [outside, [0.0, None, *TRIANGLE], [float("nan"), *TRIANGLE[1:]], "text"]
    wrong_size, wrong_sum = encode_rle(DISC.T), encode_rle(DISC) | {"counts": [5, 5]}
    shapes = [
        [odd, TRIANGLE, few, *other],
        [odd],
        wrong_size,
        wrong_sum,
        None,
        [],
        compressed(DISC),
    ]
    dataset, masks = masks_of(make, *shapes)
    assert (dataset.shapes.bad, (~dataset.shapes.exist).sum()) == (9, 5)
    assert "left out 9 bad polygons or RLEs; 5 annotations have no mask" in caplog.text
    assert [int(m.sum()) for m in masks] == [int(masks[0].sum()), DISC.sum()]
    truth = dataset.mask_truth([1])
    assert len(truth["segmentation"]) == 2 and len(dataset.ground_truth([1])["bbox"]) == 7
    with pytest.raises(UserError, match="no usable object has a mask: --masks needs"):
        masks_of(make, [odd], None)


def test_masks_need_the_size_of_the_image(make):
    with pytest.raises(UserError, match="an image has no 'height' or 'width': masks need both"):
        objects = [annotation(segmentation=[TRIANGLE])]
        make(coco_dict([{"id": 1, "file_name": "1.png"}], objects), masks=True)
    dataset = make(coco_dict([image_entry(height=41)], objects), masks=True)
    with pytest.raises(UserError, match=r"1.png is \(40, 60\), not \(41.0, 60.0\)"):
        dataset[0]


def test_without_the_option_segmentations_are_not_read(make):
    data = coco_dict([image_entry()], [annotation(segmentation="anything")])
    dataset = make(data)
    assert "masks" not in dataset[0][1] and not hasattr(dataset, "shapes")


def test_masks_stay_with_boxes(make):
    """After flips, crops and resizes a mask's extent is its box; images without objects have none;
    crowds are left out."""
    boxes = [(10, 5, 20, 30), (35, 20, 15, 12), (2, 25, 6, 10)]
    corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    polygons = [[[a, b, c, b, c, d, a, d]] for a, b, c, d in corners]
    pairs = enumerate(zip(boxes, polygons, strict=True), 1)
    objects = [annotation(i, bbox=box, segmentation=shape) for i, (box, shape) in pairs]
    objects.append(annotation(9, segmentation=encode_rle(DISC), iscrowd=1))
    transforms = train_transforms([60, 90], 200, [50], [30, 40])
    images = [image_entry(), image_entry(2)]
    dataset = make(coco_dict(images, objects), transforms=transforms, train=True, masks=True)
    counts = set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        image, target = dataset[0]
        counts.add(len(target["masks"]))
        assert target["masks"].shape[1:] == image.shape[1:] and target["masks"].dtype == torch.bool
        size = torch.tensor(image.shape[:0:-1]).repeat(2)
        for mask, (cx, cy, w, h) in zip(target["masks"], target["boxes"], strict=True):
            ys, xs = mask.nonzero().unbind(1)
            extent = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            box = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * size
            assert (extent - box).abs().max() <= 4  # pixels were enlarged 3 times
    assert len(counts) > 1  # crops remove objects
    image, target = dataset[1]
    assert target["masks"].shape == (0, *image.shape[1:])


def mask_targets(*counts: int, size: tuple[int, int] = (64, 96)) -> list[dict]:
    targets = make_targets(*counts)
    return [t | {"masks": torch.rand(len(t["labels"]), *size) > 0.5} for t in targets]


MODELS = ["detr_r50", "dn_detr_r50", "dab_detr_r50", "dn_dab_detr_r50"]


@pytest.mark.parametrize("config", MODELS)
def test_every_parameter_of_the_head_trains(config: str):
    """Also for a batch without objects, for which DDP waits as well; recomputed activations give
    the same gradients."""
    gradients = []
    for recompute in (False, True):
        model, criterion, _ = small_model(
            config, masks=True, dropout=0.0, pretrained_backbone=False, use_checkpoint=recompute
        )
        for counts in ((0, 0), (2, 1)):
            targets = mask_targets(*counts)
            torch.manual_seed(1)
            losses = criterion(model.train()([torch.ones(3, 64, 96)] * 2, targets), targets)
            model.zero_grad()
            sum(losses[k] * w for k, w in criterion.weight_dict.items()).backward()
            assert all(p.grad is not None for p in model.parameters()), counts
            assert (losses["loss_mask"] > 0) == (losses["loss_dice"] > 0) == (counts[0] > 0)
        gradients.append([p.grad for p in model.mask_head.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
        assert first.any()


def test_losses_by_their_definition():
    model, criterion, _ = small_model("detr_r50", masks=True)
    images, targets = [torch.randn(3, 64, 96), torch.randn(3, 60, 70)], mask_targets(2, 1)
    targets[1]["masks"] = targets[1]["masks"][:, :60, :70]  # padded, as the images
    with torch.no_grad():
        outputs = model.eval()(images)
        losses = criterion(outputs, targets)
    matching = criterion.matcher.match(
        [(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets)]
    )[0][0]
    focal, dice = [], []
    for i, query, mask in zip(
        (0, 0, 1), matching, [*targets[0]["masks"], *targets[1]["masks"]], strict=True
    ):
        logits = F.interpolate(
            outputs["pred_masks"][i, query][None, None], (64, 96), mode="bilinear"
        )
        p, t = logits[0, 0].sigmoid(), torch.zeros(64, 96)
        t[: mask.shape[0], : mask.shape[1]] = mask
        right = torch.where(t > 0, p, 1 - p)
        alpha = torch.where(t > 0, 0.25, 0.75)
        focal.append((-alpha * (1 - right) ** 2 * right.log()).mean())
        dice.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    torch.testing.assert_close(losses["loss_mask"], sum(focal) / 3)
    torch.testing.assert_close(losses["loss_dice"], sum(dice) / 3)


def test_released_names_and_shapes():
    """Those of DETR's head on a ResNet-50, and its detector under `detr.`."""
    model, _, _ = small_model("detr_r50", masks=True, backbone="resnet50", hidden_dim=256, nheads=8)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.startswith("detr.")}
    layers = [(264, 264), (264, 128), (128, 64), (64, 32), (32, 16)]
    expected = {f"mask_head.lay{i}.weight": (b, a, 3, 3) for i, (a, b) in enumerate(layers, 1)}
    adapters = [(1024, 128), (512, 64), (256, 32)]
    for i, (a, b) in enumerate(adapters, 1):
        expected[f"mask_head.adapter{i}.weight"] = (b, a, 1, 1)
    expected["mask_head.out_lay.weight"] = (1, 16, 3, 3)
    expected |= {f"mask_head.gn{i}.weight": (b,) for i, (_, b) in enumerate(layers, 1)}
    expected |= {f"bbox_attention.{k}_linear.weight": (256, 256) for k in "qk"}
    expected |= {k.replace("weight", "bias"): v[:1] for k, v in expected.items()}
    assert shapes == expected
    plain, _, _ = small_model("detr_r50", backbone="resnet50", hidden_dim=256, nheads=8)
    assert {f"detr.{k}" for k in plain.state_dict()} == model.state_dict().keys() - shapes.keys()


def test_masks_are_computed_for_selected_queries_only():
    """In pieces, once for a query with several classes, in the precision of the outputs."""
    model, _, postprocess = small_model("dab_detr_r50", masks=True, num_queries=40)
    computed: list[int] = []
    model.mask_head.register_forward_hook(lambda *args: computed.append(len(args[2])))
    images = [torch.randn(3, 64, 96)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model.eval()(images)
    assert not computed
    (result,) = postprocess(outputs, torch.tensor([[32, 48]]))
    assert result["masks"].shape == (200, 32, 48) and sum(computed) == 40 and max(computed) == 32
    assert outputs["pred_masks"].dtype == torch.bfloat16
    scores = result["scores"]
    (best,) = postprocess(outputs, torch.tensor([[32, 48]]), float(scores[0]))
    count = int((scores == scores[0]).sum())
    assert torch.equal(best["masks"], result["masks"][:count]) and count < 200
    with pytest.raises(KeyError):
        outputs["pred_mask"]


def plain_stats(truth: Path, found: list[dict], kind: str) -> list[float]:
    """pycocotools' own run on files."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth)
        evaluation = COCOeval(coco, coco.loadRes(found), kind)
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return evaluation.stats.tolist()


@pytest.mark.parametrize("curves", [curves_by_hotcoco, curves_by_pycocotools])
def test_figures_are_those_of_pycocotools(toy: Path, tmp_path: Path, curves):
    """For shifted and shrunken objects, crowds among them."""
    data = json.loads((toy / "annotations" / "instances_train2017.json").read_text())
    for item, size in ((data["annotations"][k], (9, 9)) for k in (3, 11)):
        image = next(i for i in data["images"] if i["id"] == item["image_id"])
        mask = np.zeros((image["height"], image["width"]))
        mask[: size[0], : size[1]] = 1
        item.update(iscrowd=1, segmentation=encode_rle(mask), bbox=[0, 0, *size])
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    dataset = CocoDetection(toy / "train2017", path, None, masks=True)
    evaluator, random = CocoEvaluator(dataset, curves), np.random.default_rng(0)
    for id_ in dataset.image_ids.tolist():
        truth = dataset.drawable_truth(id_)
        count = len(truth["labels"])
        shift = random.integers(-3, 4, count).tolist()
        masks = [m.roll(s, 1) for m, s in zip(truth["masks"], shift, strict=True)]
        height, width = dataset._sizes[dataset.image_ids.tolist().index(id_)].astype(int)
        result = {
            "scores": torch.from_numpy(random.random(count)),
            "labels": torch.tensor(truth["labels"]),
            "boxes": truth["boxes"] + torch.tensor(shift)[:, None],
            "masks": torch.stack(masks).bool() if masks else torch.zeros(0, height, width).bool(),
        }
        evaluator.update({id_: result})
    figures = {kind: evaluator.summarize(kind) for kind in ("bbox", "segm")}
    results = json.loads(json.dumps([evaluator.detections, evaluator.segmentations]))
    assert figures["bbox"] == plain_stats(path, results[0], "bbox")
    assert figures["segm"] == plain_stats(path, results[1], "segm")
    assert 0.2 < figures["segm"][0] < 0.9 and figures["segm"] != figures["bbox"]
    assert evaluator.table().count("\n") == 25 and "\nmasks\n Average" in evaluator.table()


def test_drawn_masks_cover_their_pixels():
    """Half of the colour of the class, inside the mask only; the most important on top."""
    image = torch.zeros(3, 640, 640, dtype=torch.uint8)
    masks = torch.zeros(2, 640, 640, dtype=torch.bool)
    masks[:, 100:300, 100:300] = True
    masks[1, 300:500, 100:300] = True
    boxes = torch.tensor([[600.0, 600, 610, 610]] * 2)
    pixels = np.asarray(draw_boxes(image, boxes, [1, 2], masks=masks))
    first, second = (np.array(class_colour(label)) / 255 * 128 for label in (1, 2))
    assert np.abs(pixels[400, 200] - second).max() <= 2 and not pixels[50, 50].any()
    assert np.abs(pixels[200, 200] - (first + second * 127 / 255)).max() <= 2


@pytest.fixture(scope="module")
def runs(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained detector, and with it, frozen, a mask head, in one run and in a resumed one."""
    from tests.conftest import SMALL

    folder = tmp_path_factory.mktemp("runs")
    out = {name: folder / name for name in ("boxes", "whole", "resumed")}
    more = ["--coco_path", str(toy), "--onecyclelr", "false", "--lr_drop", "1"]
    argv = lambda name: [*SMALL, *more, "--output_dir", str(out[name])]
    assert main(argv("boxes")) == 0
    frozen = ["--masks", "--frozen_weights", str(out["boxes"] / "checkpoint.pth")]
    written = ["--draw_images", "2", "--save_results", "--eval_per_class"]
    assert main([*argv("whole"), *frozen, *written, "--epochs", "2"]) == 0
    assert main([*argv("resumed"), *frozen]) == 0
    assert main([*argv("resumed"), *frozen, "--epochs", "2"]) == 0
    return out


def test_frozen_detector_does_not_change(runs: dict[str, Path]):
    before = read_checkpoint(runs["boxes"] / "checkpoint.pth")["model"]
    state = read_checkpoint(runs["whole"] / "checkpoint.pth")["model"]
    assert all(torch.equal(state[f"detr.{k}"], v) for k, v in before.items())
    first = read_checkpoint(runs["whole"] / "checkpoint0000.pth")["model"]
    head = state.keys() - {f"detr.{name}" for name in before}
    assert head and all(not torch.equal(state[k], first[k]) for k in head)
    again = read_checkpoint(runs["resumed"] / "checkpoint.pth")["model"]
    assert all(torch.equal(v, again[k]) for k, v in state.items())


def test_run_writes_figures_of_masks(runs: dict[str, Path], toy: Path):
    log = read_log(runs["whole"])
    assert all(len(line["test_coco_eval_masks"]) == 12 for line in log)
    assert log[1]["train_loss_dice"] > 0 and "train_loss_ce_dn" not in log[1]
    results = json.loads((runs["whole"] / "results_segm.json").read_text())
    assert set(results[0]) == {"image_id", "category_id", "score", "segmentation"}
    truth = toy / "annotations" / "instances_val2017.json"
    assert log[1]["test_coco_eval_masks"] == plain_stats(truth, results, "segm")
    assert len(list((runs["whole"] / "pictures").glob("*.jpg"))) == 2


def test_predictions_have_masks(runs: dict[str, Path], toy: Path, tmp_path: Path):
    """In Python, in files and in the command; the config need not mention them."""
    path = runs["whole"] / "checkpoint.pth"
    checkpoint = read_checkpoint(path)
    detector = load_detector(path, checkpoint["config"] | {"masks": False, "frozen_weights": None})
    (found,) = detector.predict(toy / "val2017" / "000001000001.jpg", threshold=0.0)
    assert found.masks.shape == (len(found), *found.image.shape[1:]) and len(found)
    rows = found.to_coco()
    assert [row["area"] for row in rows] == [int(m.sum()) for m in found.masks]
    assert np.array_equal(rle.decode(rows[0]["segmentation"]), found.masks[0])
    assert np.array_equal(found.to_supervision().mask, found.masks)
    assert isinstance(found.draw(), Image.Image)
    out = ["--output", str(tmp_path), "--threshold", "0.01", "--num_images", "2"]
    assert dn_dino(["predict", str(path), "--coco_path", str(toy), "--device", "cpu", *out]) == 0
    written = json.loads((tmp_path / "detections.json").read_text())
    assert all("counts" in row["segmentation"] for row in written["annotations"])
    with pytest.raises(UserError, match="masks: a mask head is not exported"):
        export_detector(detector, path, tmp_path / "model.onnx", Target())


def test_check_data_counts_bad_polygons(toy: Path, small: list[str], tmp_path: Path, capsys):
    data = json.loads((toy / "annotations" / "instances_train2017.json").read_text())
    polygons = [a["segmentation"] for a in data["annotations"] if not a["iscrowd"]]
    polygons[0].append([1, 2, 3, 4, 5])
    polygons[1][0] = polygons[1][0][:4]
    (tmp_path / "bad.json").write_text(json.dumps(data))
    argv = ["--train_images", str(toy / "train2017"), "--train_annotations"]
    assert main([*small, *argv, str(tmp_path / "bad.json"), "--check_data", "--masks"]) == 0
    text = capsys.readouterr().out
    assert "bad polygons and RLEs left out: 2; annotations without a mask: 1" in text
    assert "polygons and RLEs left out: 0" in text


def test_frozen_detector_is_trained_without_denoising():
    options = DetectorOptions(use_dn=True, masks=True, frozen_weights="detector.pth")
    assert not options.use_dn
    model, _, _ = small_model("detr_r50", masks=True, frozen_weights="detector.pth")
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "bbox_attention",
        "mask_head",
    }
    modules = model.train().detr.modules()
    assert any(isinstance(m, nn.Dropout) and m.training for m in modules)  # as released


def test_collated_masks_are_those_of_the_samples(toy: Path):
    files = toy / "val2017", toy / "annotations" / "instances_val2017.json"
    dataset = CocoDetection(*files, eval_transforms([64], 64), masks=True)
    images, targets = collate([dataset[0], dataset[1]])
    for i, target in enumerate(targets):
        height, width = target["size"].tolist()
        assert target["masks"].shape[1:] == (height, width)
        assert not images.mask[i, :height, :width].any()
