"""A trained detector, ready for images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from .build import build_model, read_config
from .class_map import ClassMap
from .detector import Detector
from .errors import UserError
from .options import DetectorOptions
from .preprocess import preprocess
from .weights import load_weights, num_classes_of, read_checkpoint


@dataclass
class Predictor:
    """A trained detector with its pre- and post-processing and class map; see `load_detector`.

    size, max_size: the shorter side of resized images, and the limit of the longer side, in pixels.
    labels_are_ids: the checkpoint has no class map, so labels are used as category ids.
    """

    model: Detector
    postprocess: nn.Module
    class_map: ClassMap
    size: int = 800
    max_size: int = 1333
    labels_are_ids: bool = False

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor], threshold: float = 0.3) -> list[dict[str, Tensor]]:
        """Detect objects on images (3, H_i, W_i) uint8 RGB, as one batch.

        Returns for each image, on the CPU, "scores" (k,), at least `threshold` and best first,
        "labels" (k,), and "boxes" (k, 4) xyxy in pixels of that image, clipped to it.
        """
        device = next(self.model.parameters()).device
        batch = [preprocess(image, self.size, self.max_size).to(device) for image in images]
        sizes = torch.tensor([image.shape[-2:] for image in images])
        results = self.postprocess(self.model(batch), sizes.to(device))
        for i, size in enumerate(sizes.tolist()):
            found = {key: value.cpu() for key, value in results[i].items()}
            found["boxes"] = clip_boxes_to_image(found["boxes"], size)
            known = torch.isin(found["labels"], torch.tensor(list(self.class_map.ids)))
            keep = known & (found["scores"] >= threshold)
            results[i] = {key: value[keep] for key, value in found.items()}
        return results


def load_detector(
    path: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    ema: bool = False,
) -> Predictor:
    """A detector from a checkpoint file. `ema`: use the averaged weights.

    config: replaces the checkpoint's own config, which released ones lack: the name of a published
    config, a file, or option values. UserError if the checkpoint cannot be read, or config
    or weights do not fit.
    """
    checkpoint = read_checkpoint(path)
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
        class_map = ClassMap.identity([{"id": i} for i in range(count)], count)
    else:
        class_map = ClassMap.from_state_dict(checkpoint["class_map"])
    options = DetectorOptions.of(dict(values) | {"num_classes": class_map.num_classes})
    model, _, postprocess = build_model(options)
    load_weights(model, checkpoint["ema_model"] if ema else checkpoint, source=str(path))
    model.to(device).eval()
    size = max(values.get("data_aug_scales", [Predictor.size]))
    max_size = values.get("data_aug_max_size", Predictor.max_size)
    return Predictor(model, postprocess, class_map, size, max_size, labels_are_ids)
