"""A trained detector, ready for images."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from .build import build_model, read_config
from .class_map import ClassMap
from .detections import Detections
from .detector import Detector
from .download import local_file
from .errors import UserError
from .images import read_source
from .nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from .options import DetectorOptions
from .postprocess import PostProcess
from .preprocess import preprocess, resized_size
from .registry import find_model
from .weights import load_weights, num_classes_of, read_checkpoint, state_dict_of

WINDOW = 8  # batches of images that may wait for others of their size


@dataclass
class Predictor:
    """A trained detector with its pre- and post-processing and class map; see `load_detector`.

    size, max_size: the shorter side of resized images, and the limit of the longer side, in pixels.
    labels_are_ids: the checkpoint has no class map, so labels are used as category ids.
    half: compute in bfloat16, or in float16 on a GPU that lacks it.
    """

    model: Detector
    postprocess: PostProcess
    class_map: ClassMap
    size: int = 800
    max_size: int = 1333
    labels_are_ids: bool = False
    half: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def predict(self, source: Any, threshold: float = 0.3, batch_size: int = 4) -> list[Detections]:
        """Detect objects on all images of a source, in its order; see `stream`."""
        return list(self.stream(source, threshold, batch_size))

    def stream(
        self, source: Any, threshold: float = 0.3, batch_size: int = 4
    ) -> Iterator[Detections]:
        """Detect objects on one image after another, for videos and for more images than memory
        can hold.

        source: a path, URL, directory, pattern, video, webcam, PIL image, array (H, W, 3) or tensor
        (3, H, W), both uint8 RGB, or an iterable of these; see `images.read_source`. Images of
        equal size after resizing are batched, so that none is padded; results are in the source's
        order and have scores of at least `threshold`, the best first, and boxes clipped to the
        image.
        """
        for name, image, result in self.batched(read_source(source), batch_size, threshold):
            found = {key: value.cpu() for key, value in result.items()}
            found["boxes"] = clip_boxes_to_image(found["boxes"], tuple(image.shape[-2:]))
            known = torch.isin(found["labels"], torch.tensor(list(self.class_map.ids)))
            keep = known & (found["scores"] >= threshold)
            kept = {key: value[keep] for key, value in found.items()}
            yield Detections(**kept, class_map=self.class_map, image=image, source=name)

    def batched(
        self, images: Iterable[tuple[Any, Tensor]], batch_size: int, threshold: float = 0.0
    ) -> Iterator[tuple[Any, Tensor, dict[str, Tensor]]]:
        """The results of `detect` for (name, image), in their order; a batch has images of one size
        after resizing."""
        waiting: dict[tuple[int, ...], list[tuple[int, Any, Tensor]]] = {}
        ready: dict[int, tuple[Any, Tensor, dict[str, Tensor]]] = {}
        given = 0

        def run(items: list[tuple[int, Any, Tensor]]) -> None:
            results = self.detect([image for *_, image in items], threshold)
            for (number, *item), result in zip(items, results, strict=True):
                ready[number] = (*item, result)

        for number, (name, image) in enumerate(images):
            height, width = image.shape[-2:]
            size = tuple(resized_size(height, width, self.size, self.max_size))
            waiting.setdefault(size, []).append((number, name, image))
            if len(waiting[size]) == batch_size:
                run(waiting.pop(size))
            elif number - given >= WINDOW * batch_size:
                run(waiting.pop(next(iter(waiting))))  # the size that has waited longest
            while given in ready:
                yield ready.pop(given)
                given += 1
        for items in waiting.values():
            run(items)
        yield from (ready[number] for number in sorted(ready))

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], threshold: float = 0.0) -> list[dict[str, Tensor]]:
        """All detections on images (3, H_i, W_i) uint8 RGB, as one padded batch, before selection:
        for each image, on the model's device, "scores" (k,), best first, "labels" (k,), and "boxes"
        (k, 4) xyxy in pixels. With a mask head also "masks" (k, H_i, W_i) bool, and no detections
        with a score below `threshold`."""
        outputs = self.forward(self.prepare(images))
        sizes = torch.tensor([image.shape[-2:] for image in images])
        return self.postprocess(outputs, sizes.to(self.device), threshold)

    def prepare(self, images: Sequence[Tensor]) -> NestedTensor:
        """Images (3, H_i, W_i) uint8 RGB, resized and normalised, as the model's input."""
        batch = [preprocess(image, self.size, self.max_size) for image in images]
        return nested_tensor_from_tensor_list(batch).to(self.device)

    def forward(
        self, batch: NestedTensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> Any:
        """The model's outputs, computed in half precision on request; see `Detector.forward`."""
        type_, dtype = self.device.type, torch.bfloat16
        if type_ == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = torch.float16
        with torch.autocast(type_, dtype, enabled=self.half):
            return self.model(batch, targets)


def load_detector(
    path: str | os.PathLike,
    config: str | Path | Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    ema: bool = False,
    half: bool = False,
    compile: bool = False,
) -> Predictor:
    """A detector from a checkpoint, a file or a URL. `ema`: use the averaged weights.

    config: replaces the checkpoint's own config, which released ones lack: the name of a published
    config, a file, or option values. UserError if the checkpoint cannot be read, or config
    or weights do not fit.
    half: compute in half precision, faster where the hardware has it; scores change by rounding.
    compile: compile backbone and encoder (`torch.compile`) at the first image, which takes minutes.
    """
    checkpoint = read_checkpoint(local_file(path))
    if config is None and "config" not in checkpoint:
        raise UserError(f"{path}: holds no config; name the one it was trained with, by -c or -m")
    if ema and not checkpoint.get("ema_model"):
        raise UserError(f"{path}: holds no averaged weights (ema_model); leave out --ema")
    values = checkpoint["config"] if config is None else config
    values = read_config(values) if isinstance(values, str | Path) else values
    if labels_are_ids := "class_map" not in checkpoint:
        class_loss = values.get("class_loss", DetectorOptions.class_loss)
        # If there is no class head, loading will fail.
        count = num_classes_of(checkpoint, class_loss) or 1
        first = find_model(values.get("modelname", DetectorOptions.modelname)).detector.first_id
        class_map = ClassMap.identity([{"id": first + i} for i in range(count)], count, first)
    else:
        class_map = ClassMap.from_state_dict(checkpoint["class_map"])
    # Which released configs do not say.
    masks = any("mask_head." in name for name in state_dict_of(checkpoint, str(path)))
    found: dict[str, Any] = {"num_classes": class_map.num_classes, "masks": masks}
    options = DetectorOptions.of(dict(values) | found)
    model, _, postprocess = build_model(options)
    load_weights(model, checkpoint["ema_model"] if ema else checkpoint, source=str(path))
    model.place(device).eval()
    if compile:
        model.compile_parts()
    size = max(values.get("data_aug_scales", [Predictor.size]))
    max_size = values.get("data_aug_max_size", Predictor.max_size)
    return Predictor(model, postprocess, class_map, size, max_size, labels_are_ids, half)
