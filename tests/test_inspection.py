"""Where queries look: `inspection.look` and the pictures of `dn-dino inspect --image`."""

import json
import math
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_convert

from datasets.toy import CATEGORIES
from models import Predictor, build_model
from models.build import read_config
from models.class_map import ClassMap
from models.cli import main
from models.errors import UserError
from models.inspection import DenoisingView, LayerView, calls_of, look
from models.inspection_pictures import attention_map, draw_query, draw_selection
from models.options import DetectorOptions
from models.registry import MODELS

SMALL = {
    "backbone": "timm/test_resnet",
    "pretrained_backbone": False,
    "hidden_dim": 32,
    "nheads": 4,
    "dim_feedforward": 32,
    "enc_layers": 1,
    "dec_layers": 2,
    "num_queries": 9,
    "num_classes": 6,
}
# Each is resized, and padded to the other's longer side.
SIZES = (60, 80), (50, 100)
WITH_QUERIES = [name for name, spec in MODELS.items() if spec.detector.has_queries]
RESIZED, PADDED = ((64, 85), (48, 96)), (64, 96)
IMAGES = [torch.full((3, *size), 90, dtype=torch.uint8) for size in SIZES]
OBJECTS = {
    "boxes": torch.tensor([[30.0, 25, 45, 35], [20, 20, 35, 30], [40, 22, 50, 34]]),
    "labels": torch.tensor([0, 4, 2]),
}
TARGETS = [OBJECTS, {key: value[:1] for key, value in OBJECTS.items()}]
PIXEL = 70.5, 13.5  # the centre of a pixel of the first image
X, Y = PIXEL[0] / 80, PIXEL[1] / 60  # in fractions of either image


def make_predictor(name: str, **options) -> Predictor:
    torch.manual_seed(0)
    config = read_config(f"toy/{name}") | (SMALL if name in WITH_QUERIES else {}) | options
    model, _, postprocess = build_model(DetectorOptions.of(config))
    class_map = ClassMap.from_categories([{"id": i, "name": n} for i, n in CATEGORIES.items()])
    return Predictor(model.eval(), postprocess, class_map, size=64, max_size=96)


def centres(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., -2:]) / 2 if boxes.shape[-1] == 4 else boxes


def valid(level: Tensor, image: int) -> Tensor:
    """A level (h, w, ...) without the padding of an image."""
    pairs = zip(level.shape, RESIZED[image], PADDED, strict=False)
    height, width = (math.ceil(n * inside / whole) for n, inside, whole in pairs)
    return level[:height, :width]


def read_samples(seen: LayerView, levels: list[Tensor], image: int) -> Tensor:
    """What deformable attention reads (Q, M, D) from the values of the levels (h, w, M, D)."""
    total = torch.zeros(())
    for i, level in enumerate(levels):
        maps = valid(level, image).permute(2, 3, 0, 1)
        grid = 2 * seen.locations[:, :, i] / torch.tensor(SIZES[image][::-1]) - 1  # (Q, M, P, 2)
        sampled = F.grid_sample(maps, grid.transpose(0, 1), align_corners=False)  # (M, D, Q, P)
        total = total + torch.einsum("mdqp,qmp->qmd", sampled, seen.weights[:, :, i])
    return total


def read_maps(seen: LayerView, levels: list[Tensor], image: int) -> Tensor:
    """What dense attention reads."""
    pairs = zip(seen.maps, levels, strict=True)
    return sum(torch.einsum("qmhw,hwmd->qmd", m, valid(x, image)) for m, x in pairs)


@pytest.mark.parametrize("name", WITH_QUERIES)
def test_attention_follows_from_what_is_seen(name):
    """With every detector: the weighted sums of the values at the places of the view, in pixels of
    the image, are what the last layer's attention returned."""
    predictor = make_predictor(name)
    layer = predictor.model.decoder_layers[-1]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    cross = getattr(layer, "multihead_attn", None) or layer.cross_attn
    dense = not hasattr(cross, "operator")
    owner, method, project, read = cross, "operator", nn.Identity(), read_samples
    if dense:
        method, project, read = "forward", cross.out_proj, read_maps
    if hasattr(layer, "lvl_attn"):
        owner, method, project = layer, "attend_to_memory", layer.ca_out_v_proj
    with torch.no_grad(), ExitStack() as stack:
        record = lambda *method: stack.enter_context(calls_of(*method))
        calls, encoding = record(owner, method), record(predictor.model, "encode")
        heads = record(cross, "split_heads") if dense else []
        views = look(predictor, IMAGES)
    ((args, expected),), ((_, encoded),) = calls, encoding
    tokens = encoded.tokens
    sizes = getattr(tokens, "sizes", None) or [encoded.features[-1].mask.shape[1:]]
    if dense:
        inputs = len(heads) // len(sizes)  # the last is the value
        levels = [value.transpose(1, 2) for _, value in heads[inputs - 1 :: inputs]]
    else:
        levels = args[0].split([h * w for h, w in sizes], dim=1)
    for i, view in enumerate(views):
        grids = [x[i].unflatten(0, size) for x, size in zip(levels, sizes, strict=True)]
        result = project(read(view.layers[-1], grids, i).flatten(1))
        torch.testing.assert_close(result, expected[i], atol=1e-4, rtol=1e-3)


DINOS = "dino", "dn_dab_dino_deformable_detr"  # select queries and have contrastive denoising
TWO_STAGES = {"query_selection": "pure", "with_box_refine": True}
REFINING = [name for name in WITH_QUERIES if name not in ("detr", "dn_detr")]


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in WITH_QUERIES), ("dn_deformable_detr", TWO_STAGES)],
)
def test_boxes_references_selection_and_denoising(name, options):
    predictor = make_predictor(name, **options)
    model = predictor.model
    if name in REFINING:  # by nothing
        head = model.transformer.bbox_embed if "anchor" in name else model.bbox_embed
        for part in head if isinstance(head, nn.ModuleList) else [head]:
            for parameter in part.layers[-1].parameters():
                nn.init.zeros_(parameter)
    scales = [torch.tensor([w, h, w, h]) for h, w in SIZES]
    with torch.no_grad():
        outputs = predictor.forward(predictor.prepare(IMAGES))
    views = look(predictor, IMAGES, TARGETS)
    assert not model.training and not {"decode", "select"} & vars(model).keys()
    for i, (view, scale) in enumerate(zip(views, scales, strict=True)):
        layers = [*outputs["aux_outputs"], outputs]
        for seen, layer in zip(view.layers, layers, strict=True):
            boxes = box_convert(layer["pred_boxes"][i], "cxcywh", "xyxy") * scale
            torch.testing.assert_close(seen.boxes, boxes, atol=1e-3, rtol=1e-3)
            logits = layer["pred_logits"][i]
            scores = logits.sigmoid() if logits.shape[-1] == 6 else logits.softmax(-1)[:, :-1]
            torch.testing.assert_close(seen.scores, scores.amax(-1), atol=1e-4, rtol=1e-3)
            if name in REFINING:
                torch.testing.assert_close(centres(seen.boxes), centres(seen.references))
        best = view.best(2)
        assert draw_query(view, 1, best[0]) != draw_query(view, 0, best[1])
        assert view.layers[-1].scores[best[0]] == view.layers[-1].scores.max() and len(best) == 2
        assert (view.selection is not None) == (name in DINOS or bool(options))
        if view.selection is not None:
            torch.testing.assert_close(view.selection.boxes, view.layers[0].references)
            assert (view.selection.points > 0).all()
            torch.testing.assert_close(view.selection.points, centres(view.selection.boxes))
            assert (view.selection.scores.diff() <= 0).all()
            assert draw_selection(view).width > 600
        assert (view.denoising is not None) == name.startswith(("dn_", "dino"))
        if view.denoising is not None:
            # One by one, as DINO in DN-DETR's code mixes up the objects of several images.
            (view,) = look(predictor, IMAGES[i : i + 1], TARGETS[i : i + 1])
            check_denoising(view.denoising, TARGETS[i], predictor, name)


def check_denoising(
    seen: DenoisingView, objects: dict[str, Tensor], predictor: Predictor, name: str
) -> None:
    """Corners move as far as in the paper, and the boxes that are restored are the noised ones."""
    size = (objects["boxes"][:, 2:] - objects["boxes"][:, :2]).repeat(1, 2) / 2
    ratio = ((seen.noised - objects["boxes"]) / size).abs()  # (G, K, n, 4)
    assert ratio.shape[1:] == (1 + (name in DINOS), len(size), 4) and ratio.max() > 0.1
    assert torch.equal(seen.labels, objects["labels"])
    if name in DINOS:
        scale = predictor.model.prepare_denoising.keywords["box_noise_scale"]
        assert (ratio[:, 0] <= scale + 1e-4).all() and (ratio[:, 1] >= scale - 1e-4).all()
    if name in REFINING:
        for restored in seen.restored:
            torch.testing.assert_close(centres(restored), centres(seen.noised), atol=1e-2, rtol=0)


def plant_offset(predictor: Predictor, level: int, offset: tuple[float, float]) -> None:
    """The first decoder layer's first head attends to its point 2 on a level only."""
    attention = predictor.model.decoder_layers[0].cross_attn
    for parameter in (*attention.sampling_offsets.parameters(), attention.attention_weights.weight):
        nn.init.zeros_(parameter)
    points = 2 + attention.n_points * level
    attention.sampling_offsets.bias.data[2 * points : 2 * points + 2] = torch.tensor(offset)
    attention.attention_weights.bias.data[points] = 50


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("reference", ["box", "point"])
def test_a_planted_offset_lands_on_its_pixel(reference, level):
    """In the image as it was given, though resized and padded. Around a box offsets count parts of
    it, around a point the level's pixels."""
    centre, size = (0.5, 0.4), (0.3, 0.5)
    if reference == "box":
        predictor = make_predictor("dino", query_selection="static")
        planted = torch.tensor([*centre, *size]).logit()
        predictor.model.refpoint_embed.weight.data[0] = planted
        unit = [side / 2 / 4 for side in size]
    else:
        predictor = make_predictor("deformable_detr")
        points = predictor.model.transformer.reference_points
        nn.init.zeros_(points.weight)
        points.bias.data = torch.tensor(centre).logit()
        stride = 8 * 2**level
        unit = [1 / math.ceil(n / stride) for n in RESIZED[0][::-1]]
    plant_offset(predictor, level, ((X - centre[0]) / unit[0], (Y - centre[1]) / unit[1]))
    view, other = look(predictor, IMAGES)
    seen = view.layers[0]
    place = seen.locations[0, 0, level, 2]
    torch.testing.assert_close(place, torch.tensor(PIXEL), atol=1e-3, rtol=0)
    assert seen.weights[0, 0, level, 2] > 0.99
    expected = torch.tensor(centre) * torch.tensor([80, 60])
    torch.testing.assert_close(centres(seen.references)[0], expected, atol=1e-3, rtol=0)
    assert seen.references.shape == (9, 4 if reference == "box" else 2)
    if reference == "box":  # at the same place of the other image
        expected = torch.tensor([X * 100, Y * 50])
        torch.testing.assert_close(other.layers[0].locations[0, 0, level, 2], expected)
    picture = draw_query(view, 0, 0)
    scale = picture.width / 80
    assert picture.getpixel([round(scale * at - 0.5) for at in PIXEL]) == (255, 0, 0)


def identity(layer: nn.Linear, factor: float = 1.0, bias: float = 0.0) -> None:
    layer.weight.data = factor * torch.eye(len(layer.weight))
    layer.bias.data.fill_(bias)


@pytest.mark.parametrize("name", ["dab_detr", "anchor_detr"])
def test_dense_attention_to_a_planted_place(name):
    """Attention that only compares positions is highest at the pixel of the query's anchor."""
    scales = {"pe_temperatureH": 10000, "pe_temperatureW": 10000, "pe_offset": -0.5}
    predictor = make_predictor(name, return_interm_indices=[1], **scales)
    transformer = predictor.model.transformer
    layer = predictor.model.decoder_layers[0]
    if name == "dab_detr":
        predictor.model.refpoint_embed.weight.data[0] = torch.tensor([X, Y, 0.3, 0.5]).logit()
        for part in (
            layer.ca_qcontent_proj,
            layer.ca_qpos_proj,
            transformer.decoder.ref_anchor_head,
        ):
            for parameter in part.parameters():
                nn.init.zeros_(parameter)
        identity(layer.ca_qpos_sine_proj, 3)
        identity(layer.ca_kpos_proj, 3)
    else:
        transformer.position.weight.data[0] = torch.tensor([X, Y])
        first, _, second = transformer.adapt_pos1d
        identity(first, bias=1)  # sines are positive then, and ReLU does nothing
        identity(second, bias=-1)
        for norm in (layer.norm2, transformer.encoder_layers[-1].ffn.norm2):
            for parameter in norm.parameters():
                nn.init.zeros_(parameter)  # the content of queries and of the memory
        for weight in layer.cross_attn.in_proj_weight.data.chunk(5)[:4]:
            weight.copy_(3 * torch.eye(32))
        nn.init.zeros_(layer.cross_attn.in_proj_bias)
    for view, (height, width) in zip(look(predictor, IMAGES), SIZES, strict=True):
        (weights,) = view.layers[0].maps
        rows, columns = weights.shape[2:]
        best = int(weights[0].mean(0).argmax())
        assert (best // columns, best % columns) == (int(Y * rows), int(X * columns))
        heat = attention_map(view, 0, 0, (width, height))
        y, x = divmod(int(heat.argmax()), width)
        assert abs(x - X * width) < width / columns and abs(y - Y * height) < height / rows
        picture = draw_query(view, 0, 0)
        colour = picture.getpixel(
            (round((x + 0.5) * picture.width / width), round((y + 0.5) * picture.height / height))
        )
        assert colour[0] > 200 and colour[2] < 60


@pytest.fixture
def command(saved: Path, toy: Path, tmp_path: Path) -> list[str]:
    image = sorted((toy / "val2017").glob("*.jpg"))[0]
    options = ["--device", "cpu", "--output", str(tmp_path / "seen")]
    return ["inspect", str(saved), "--image", str(image), *options]


def test_pictures(command, toy, tmp_path, capsys):
    annotations = toy / "annotations" / "instances_val2017.json"
    data = json.loads(annotations.read_text())
    (id_,) = [x["id"] for x in data["images"] if x["file_name"] == Path(command[3]).name]
    number = sum(x["image_id"] == id_ for x in data["annotations"])
    assert main([*command, "--annotations", str(annotations)]) == 0
    printed, files = capsys.readouterr().out, tmp_path / "seen"
    assert printed.endswith(f"denoising of {number} annotated objects\n")
    names = ["denoising_1.png", "denoising_2.png", "layer_1.png", "layer_2.png"]
    assert sorted(path.name for path in files.iterdir()) == names
    widths = [Image.open(files / name).width for name in names]
    assert widths[0] == widths[2]  # three columns each
    first = (files / names[0]).read_bytes()
    again = [*command, "--annotations", str(annotations), "--queries", "4", "--groups", "1"]
    assert main(again) == 0
    assert Image.open(files / "layer_1.png").width < widths[2] / 2
    assert (files / "denoising_1.png").read_bytes() == first  # the noise is the same
    capsys.readouterr()
    assert main([*command, "--threshold", "0", "--queries", "4", "--groups", "1"]) == 0
    assert "denoising of 20 detections with score 0 or more" in capsys.readouterr().out
    assert (files / "denoising_1.png").read_bytes() != first
    assert main([*command, "--threshold", "1", "--queries", "4"]) == 0
    assert "denoising" not in capsys.readouterr().out


def test_errors(command, toy, tmp_path, capsys):
    other = toy / "annotations" / "instances_train2017.json"
    for argv, message in (
        ([*command, "--queries", "3", "12"], "queries: the detector has queries 0 to 11"),
        (command[:4], "both --image and --output"),
        ([*command, "--annotations", str(other)], "are missing"),
        (["inspect"], "name a checkpoint"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    assert main(["inspect", command[1], "--image", str(text), "--output", str(tmp_path)]) == 2
    assert "text.jpg: cannot be read as an image" in capsys.readouterr().err


def test_a_reader_that_is_gone_is_no_error(saved, monkeypatch, capsys):
    """As of `dn-dino inspect x.pth | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["inspect", str(saved)]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_faster_rcnn_is_refused():
    with pytest.raises(UserError, match="a Faster R-CNN has no queries"):
        look(make_predictor("faster_rcnn"), IMAGES)


def test_detector_under_a_mask_head():
    predictor = make_predictor("dn_detr", masks=True)
    views = look(predictor, IMAGES, TARGETS)
    assert all(view.denoising is not None for view in views)
    assert not predictor.model.detr.training
