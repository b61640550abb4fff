"""Detectors as files for other programs: ONNX, or torch.export's .pt2; `export_detector`.

An exported model takes a batch (B, 3, H, W) of images of one size, without padding, and gives, as
its detector does, `logits` (B, Q, C) and `boxes` (B, Q, 4) cxcywh in [0, 1], for images that are
normalised, float32. With processing inside, images are uint8 RGB, and it gives `scores` (B, k),
best first, `labels` (B, k) and `boxes` (B, k, 4) xyxy in pixels of the input.

ONNX has no deformable attention: it becomes gathers and products. A .pt2 contains this package's
operator, which has to be imported before `torch.export.load`.
"""

import dataclasses
import hashlib
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2 import functional as F

from .coco import CocoAnnotations
from .deformable_attention import MSDeformAttn, ms_deform_attn_by_gathers
from .errors import UserError, import_extra
from .masks import MaskDetector
from .nested_tensor import NestedTensor
from .predictor import Predictor
from .preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize, resized_size
from .registry import MODELS

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
DESCRIPTION = "dn_dino.json"  # the metadata of an ONNX file, the extra file of a .pt2
TOLERANCE = 1e-3  # of logits, scores, and boxes as fractions of the image
AP_TOLERANCE, INT8_AP_TOLERANCE = 5e-4, 0.02
CALIBRATION = 32  # images from which the ranges of 8-bit numbers are measured
Run = Callable[[Tensor], Sequence[Tensor]]  # an exported model: images -> its outputs


@dataclass(frozen=True)
class Target:
    """What to export: `size` (height, width) and `batch_size`, None where any; `opset` of ONNX;
    `int8`: convolutions in 8 bits."""

    format: str = "onnx"
    size: tuple[int, int] | None = None
    batch_size: int | None = None
    with_processing: bool = False
    opset: int = 18
    int8: bool = False

    @property
    def outputs(self) -> list[str]:
        return ["scores", "labels", "boxes"] if self.with_processing else ["logits", "boxes"]


class TopK(TorchFunctionMode):
    """Inside it, `topk` records its choices, or makes the `given` ones; `loss` is then how much the
    values of a given choice differ, at most, from those of the best, in their order."""

    def __init__(self, given: Sequence[Tensor] = ()):
        super().__init__()
        self.given, self.loss = iter(given), 0.0
        self.choices: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not Tensor.topk:
            return result
        values, index = result
        if (given := next(self.given, None)) is not None:
            values, index = args[0].gather(kwargs["dim"], given), given
            self.loss = max(self.loss, float((values - result.values).abs().max()))
        self.choices.append(index)
        return torch.return_types.topk((values, index))


class Exportable(nn.Module):
    """Images -> the outputs of the target, and in ONNX, until it is verified, the choices made by
    `topk`: see `difference`."""

    mean: Tensor
    std: Tensor

    def __init__(self, predictor: Predictor, target: Target):
        super().__init__()
        self.predictor, self.target = predictor, target
        self.model = predictor.model  # a module's parameters have to be below it
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with TopK() as top:
            outputs = self.detect(images)
        return (*outputs, *top.choices) if self.target.format == "onnx" else outputs

    def detect(self, images: Tensor) -> tuple[Tensor, ...]:
        batch_size, _, height, width = images.shape
        if self.target.with_processing:
            images = (images.float() / 255 - self.mean) / self.std
        mask = torch.zeros(batch_size, height, width, dtype=torch.bool, device=images.device)
        found = self.model(NestedTensor(images, mask))
        if self.target.with_processing:
            size = torch.tensor([[height, width]], device=images.device)
            return self.predictor.postprocess.select(found, size)[:3]
        return found["pred_logits"], found["pred_boxes"]


@contextmanager
def gathers(model: nn.Module) -> Iterator[None]:
    """Inside it, the deformable attention of a model consists of operators that ONNX has."""
    modules = [module for module in model.modules() if isinstance(module, MSDeformAttn)]
    for module in modules:
        module.operator = ms_deform_attn_by_gathers
    try:
        yield
    finally:
        for module in modules:
            del module.operator


def example(target: Target, batch_size: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """A batch of smooth random images, as the target takes them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch_size, 3, 12, 12, generator=generator)
    images = F.resize(coarse, list(size)).mul(255).round().to(torch.uint8)
    return images if target.with_processing else torch.stack([normalize(x) for x in images])


def cases(predictor: Predictor, target: Target) -> list[tuple[int, tuple[int, int]]]:
    """Batch sizes and image sizes to verify: two and three of them, where they are not fixed."""
    side = predictor.size
    sizes = [(side, side), (side, side * 3 // 4), (side * 5 // 8 + 1, side)]
    batch_sizes = [1, 2] if target.batch_size is None else [target.batch_size]
    return [(n, s) for s in ([target.size] if target.size else sizes) for n in batch_sizes]


@torch.no_grad()
def difference(run: Run, module: Exportable, images: Tensor) -> float:
    """The largest difference of an exported model's outputs from the detector's, infinite if a
    label or a shape differs; boxes as fractions of the image.

    Where scores are nearly equal, rounding decides which token or detection `topk` takes, and a
    query's learned content meets another anchor. So the exported model tells its choices, the
    detector makes the same, and how much worse these are than the best counts as a difference.
    """
    outputs = run(images)
    names = module.target.outputs
    with TopK(outputs[len(names) :]) as top:
        expected = module.detect(images)
    largest = top.loss
    scale = max(images.shape[-2:]) if module.target.with_processing else 1
    for name, actual, wanted in zip(names, outputs, expected, strict=False):
        if name == "labels" or actual.shape != wanted.shape:
            gap = 0.0 if torch.equal(actual, wanted) else torch.inf
        else:
            gap = float((actual - wanted).abs().max()) / (scale if name == "boxes" else 1)
        largest = max(largest, gap if gap == gap else torch.inf)
    return largest


def export_detector(
    predictor: Predictor,
    checkpoint: str | Path,
    output: str | Path,
    target: Target,
    dataset: CocoAnnotations | None = None,
    calibration: CocoAnnotations | None = None,
) -> dict[str, float]:
    """Export a detector, verify the file, and only then move it to `output`.

    ONNX is run by onnxruntime, and by OpenVINO if it is installed. Returns the largest `difference`
    of all `cases`, the milliseconds of each runtime and of the detector for a batch of the last
    case, and with a data set the AP on it of both. `checkpoint`: the file to describe. In 8 bits,
    ranges are measured on images of `calibration` once the file in float32 has passed.

    UserError, and no file, if a difference exceeds TOLERANCE or AP differs in the third digit, in 8
    bits by INT8_AP_TOLERANCE, if a package is missing, for a mask head, a Faster R-CNN, or for
    processing inside with non-maximum suppression.
    """
    if isinstance(predictor.model, MaskDetector):
        raise UserError("masks: a mask head is not exported; export the detector it was trained on")
    if not predictor.model.has_queries:
        raise UserError("export: of a Faster R-CNN the number of regions depends on the image")
    if target.with_processing and predictor.postprocess.nms_iou_threshold > 0:
        raise UserError("with_processing: NMS is not exported; leave it out, or nms_iou_threshold")
    if target.int8 and not (target.format == "onnx" and dataset and calibration):
        raise UserError("int8: only for ONNX, and with a data set to measure ranges and AP on")
    output, module = Path(output), Exportable(predictor, target).eval()
    told = json.dumps(description(predictor, Path(checkpoint), target))
    figures = {"difference": 0.0}
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        file = Path(folder) / output.name
        write = write_onnx if target.format == "onnx" else write_torch
        runs = write(module, file, told)
        for batch_size, size in cases(predictor, target):
            images = example(target, batch_size, size, seed=1)
            for name, run in runs.items():
                gap = difference(run, module, images)
                if gap > TOLERANCE:
                    raise UserError(
                        f"{output}: not written, because {name} differs from the detector by "
                        f"{gap:.2g} for {batch_size} x 3 x {size[0]} x {size[1]}"
                    )
                figures["difference"] = max(figures["difference"], gap)
        if target.int8 and calibration:
            number = min(CALIBRATION, len(calibration))
            images_of = (prepared(predictor, target, calibration.image(i)) for i in range(number))
            runs = quantize(file, images_of, told)
        runs["detector"] = torch.no_grad()(module.detect)
        figures |= {f"{name} ms": milliseconds(run, images) for name, run in runs.items()}
        if dataset:
            both = {name: runs[name] for name in (next(iter(runs)), "detector")}
            for name, run in both.items():
                predict = partial(detect, run, predictor, target)
                figures[f"{name} AP"] = average_precision(predict, dataset)
            ours, theirs = (figures[f"{name} AP"] for name in both)
            if abs(ours - theirs) >= (INT8_AP_TOLERANCE if target.int8 else AP_TOLERANCE):
                problem = f"AP is {ours:.4f}, but the detector's {theirs:.4f}"
                raise UserError(f"{output}: not written, because its {problem}")
        os.replace(file, output)
    return figures


def trace(module: Exportable) -> torch.export.ExportedProgram:
    """torch.export's program, with symbols where the target's sizes are free."""
    # Named dimensions fail: torch cannot solve all relations of the sizes inside for them.
    target = module.target
    batch_size, size = cases(module.predictor, target)[-1]
    free = [0] * (target.batch_size is None) + [2, 3] * (target.size is None)
    dynamic = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
    images = example(target, batch_size, size)
    with torch.no_grad():
        return torch.export.export(module, (images,), dynamic_shapes=(dynamic,), strict=False)


def write_torch(module: Exportable, file: Path, told: str) -> dict[str, Run]:
    """Write a .pt2. Returns it, loaded."""
    torch.export.save(trace(module), file, extra_files={DESCRIPTION: told})
    return {"torch.export": torch.export.load(file).module()}


def write_onnx(module: Exportable, file: Path, told: str) -> dict[str, Run]:
    """Write an ONNX file. Returns it as each runtime runs it, with the choices of `topk`, which the
    file does not give, as further outputs."""
    onnx, target = import_extra("onnx", "export"), module.target
    optimizer = import_extra("onnxscript.optimizer", "export")
    with gathers(module.model):
        program = trace(module)
    outputs = len(program.graph_signature.user_outputs)
    names = target.outputs + [f"choice_{i}" for i in range(outputs - len(target.outputs))]
    exported: Any = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=names,
        opset_version=target.opset,
        optimize=False,  # onnxscript 0.7 gives two clamps of one tensor, as in a decoder, one bound
        verbose=False,
    )
    with silence():
        optimizer.fold_constants(exported.model)
        optimizer.remove_unused_nodes(exported.model)
    model = exported.model_proto
    if (opset := model.opset_import[0].version) != target.opset:
        raise UserError(f"opset: torch.onnx wrote {opset}, not {target.opset}; use --opset {opset}")
    onnx.helper.set_model_props(model, {DESCRIPTION: told})
    onnx.save(model, file)
    runs = {"onnxruntime": onnxruntime_session(file)}
    if find_spec("openvino"):
        runs["OpenVINO"] = openvino_model(file)
    del model.graph.output[len(target.outputs) :]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)
    return runs


@contextmanager
def silence() -> Iterator[None]:
    """No warnings of other packages: they tell steps left out, and options that change nothing."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def quantize(file: Path, batches: Iterator[Tensor], told: str) -> dict[str, Run]:
    """Put the convolutions of an ONNX file into 8 bits (onnxruntime's static quantisation), with
    ranges measured on these inputs; all else stays float32. Returns it as onnxruntime runs it."""
    onnx = import_extra("onnx", "export")
    library: Any = import_extra("onnxruntime.quantization", "export")

    class Reader(library.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {"images": batch.numpy()}

    types = library.QuantType
    options = {"activation_type": types.QUInt8, "weight_type": types.QInt8, "per_channel": True}
    with silence():
        library.quantize_static(file, file, Reader(), op_types_to_quantize=["Conv"], **options)
    model = onnx.load(file)
    onnx.helper.set_model_props(model, {DESCRIPTION: told})
    onnx.save(model, file)
    return {"onnxruntime": onnxruntime_session(file)}


def onnxruntime_session(file: str | Path) -> Run:
    """An ONNX file, run by onnxruntime on the CPU with torch's number of threads."""
    onnxruntime = import_extra("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: it warns of constants that it does not fold
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]

    return run


def openvino_model(file: str | Path) -> Run:
    """An ONNX file, run by OpenVINO on the CPU in float32 with torch's number of threads."""
    openvino = import_extra("openvino", "export")
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(file, "CPU", options)

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x.copy()) for x in compiled(images.numpy()).values()]

    return run


def description(predictor: Predictor, checkpoint: Path, target: Target) -> dict[str, Any]:
    """What an exported file says of itself."""
    try:
        release = version("dn_dino")
    except PackageNotFoundError:  # a checkout
        release = ""
    return {
        "checkpoint": checkpoint.name,
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "model": next(k for k, v in MODELS.items() if v.detector is type(predictor.model)),
        "dn_dino": release,
        "classes": predictor.class_map.state_dict()["categories"],  # label, category id, name
        "channels": "RGB",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "resize": {"shorter": predictor.size, "longer": predictor.max_size},
        **dataclasses.asdict(target),
    }


def milliseconds(run: Run, images: Tensor, repeats: int = 5) -> float:
    """The median time of a batch."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(images)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def detect(run: Run, predictor: Predictor, target: Target, image: Tensor) -> tuple[Tensor, ...]:
    """Scores (k,), labels (k,) and boxes (k, 4) xyxy in pixels of an image (3, H, W) uint8 RGB."""
    images = prepared(predictor, target, image)
    outputs, (height, width), size = run(images), image.shape[-2:], images.shape[-2:]
    if not target.with_processing:
        raw = dict(zip(("pred_logits", "pred_boxes"), outputs, strict=False))
        outputs = predictor.postprocess.select(raw, torch.tensor([size]))
    scores, labels, boxes = (x[0] for x in outputs[:3])
    return scores, labels, boxes * torch.tensor([width / size[1], height / size[0]] * 2)


def prepared(predictor: Predictor, target: Target, image: Tensor) -> Tensor:
    """An image (3, H, W) uint8 RGB as an exported model takes it, a batch of equal ones."""
    height, width = image.shape[-2:]
    size = target.size or resized_size(height, width, predictor.size, predictor.max_size)
    resized = F.resize(image, list(size), antialias=True)
    resized = resized if target.with_processing else normalize(resized)
    return resized.expand(target.batch_size or 1, -1, -1, -1).contiguous()


def average_precision(
    predict: Callable[[Tensor], Sequence[Tensor]], dataset: CocoAnnotations
) -> float:
    """COCO's AP on a data set.

    predict: an image (3, H, W) uint8 RGB -> scores (k,), labels (k,), boxes (k, 4) xyxy in pixels.
    """
    import_extra("pycocotools", "eval")
    from .evaluation import CocoEvaluator

    evaluator = CocoEvaluator(dataset)
    for i, id_ in enumerate(dataset.image_ids.tolist()):
        found = zip(("scores", "labels", "boxes"), predict(dataset.image(i)), strict=True)
        evaluator.update({id_: dict(found)})
    return evaluator.summarize()[0]
