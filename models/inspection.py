"""Where the queries of a detector look, and what denoising makes of them, as numbers for figures.

    detector = load_detector("checkpoint.pth")
    (view,) = look(detector, [read_image("street.jpg")])
    layer, query = view.layers[-1], view.best(1)[0]
    layer.locations[query], layer.weights[query]  # deformable attention
    layer.maps[0][query]  # dense attention

They are those of the forward pass, recorded while it runs. All coordinates are (x, y) in pixels of
the image as it was given: resizing is undone, and padding left out, by the rule that the detector
has for boxes: a feature map's pixels that are not padding divide the image evenly.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from .anchor_detr import RowColumnAttention
from .deformable_attention import MSDeformAttn
from .deformable_transformer import LevelTokens
from .detector import Detector, Encoded
from .dn_components import Denoising
from .errors import UserError
from .original_deformable_detr import DeformableDETR
from .predictor import Predictor
from .query_selection import Selection, take


@dataclass
class LayerView:
    """A decoder layer's Q matching queries, with M heads of attention to the image.

    boxes (Q, 4) xyxy, scores and labels (Q,): what it predicts, of each query the best class.
    references: the boxes (Q, 4) xyxy or points (Q, 2) that it starts from; DETR has none.
    locations (Q, M, L, P, 2), weights (Q, M, L, P): of deformable attention, P samples on each of L
        levels. The weights of a head add up to 1. Locations may be outside the image.
    maps: of dense attention, for each level (Q, M, h, w), the weights of h x w equal parts of the
        image. Over all levels those of a head add up to 1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    references: Tensor | None = None
    locations: Tensor | None = None
    weights: Tensor | None = None
    maps: list[Tensor] | None = None


@dataclass
class SelectionView:
    """The tokens that became queries, in the order of these: points (Q, 2), the feature level
    (Q,), 0 is the finest, scores (Q,), by which they were selected, and boxes (Q, 4) xyxy, the
    queries' anchors."""

    points: Tensor
    levels: Tensor
    scores: Tensor
    boxes: Tensor


@dataclass
class DenoisingView:
    """The denoising queries of an image's n objects, in G groups.

    boxes (n, 4) xyxy, labels (n,): the objects. noised (G, K, n, 4) xyxy: K is 2 with contrastive
    denoising, positives and negatives, else 1. restored (layers, G, K, n, 4) xyxy, scores and
    labels_restored (layers, G, K, n): the layers' predictions, of each query the best class.
    """

    boxes: Tensor
    labels: Tensor
    noised: Tensor
    restored: Tensor
    scores: Tensor
    labels_restored: Tensor


@dataclass
class View:
    """An image (3, H, W) uint8 RGB, the decoder's layers, selected tokens and denoising, if any."""

    image: Tensor
    layers: list[LayerView]
    selection: SelectionView | None
    denoising: DenoisingView | None

    def best(self, number: int) -> list[int]:
        """The queries with the highest scores, best first."""
        scores = self.layers[-1].scores
        return scores.topk(min(number, len(scores))).indices.tolist()


@torch.no_grad()
def look(
    predictor: Predictor,
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]] | None = None,
) -> list[View]:
    """What the detector does on images (3, H_i, W_i) uint8 RGB, in one padded batch, on the CPU.

    targets: each image's objects, "boxes" (n, 4) xyxy in pixels and "labels" (n,), for denoising as
    in training, with torch's random numbers, but without dropout. A detector without denoising
    ignores them. UserError for a Faster R-CNN.
    """
    device = predictor.device
    model: Any = getattr(predictor.model, "detr", predictor.model)  # without its mask head
    if not model.has_queries:
        raise UserError("inspect: a Faster R-CNN has no queries")
    sizes = torch.tensor([image.shape[:0:-1] for image in images], device=device)  # width, height
    known = None
    if targets is not None:
        known = [
            {
                "labels": target["labels"].to(device),
                "boxes": box_convert(target["boxes"].to(device), "xyxy", "cxcywh") / size.repeat(2),
            }
            for target, size in zip(targets, sizes, strict=True)
        ]
    with ExitStack() as stack:
        record = lambda owner, name: stack.enter_context(calls_of(owner, name))
        decoded = record(model, "decode")
        selected = record(model, "select") if hasattr(model, "select") else []
        attention = [recorded_attention(layer, record) for layer in model.decoder_layers]
        stack.callback(setattr, model, "training", model.training)
        model.training = known is not None  # the detector's own flag, not those of its parts
        outputs = predictor.forward(predictor.prepare(images), known)
    encoded, dn = outputs["encoded"], outputs.get("dn")
    predictions = [*outputs["aux_outputs"], outputs]
    ((_, result),) = decoded
    masks, views = level_masks(encoded), []
    for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
        extents = [mask_extent(mask[i]) for mask in masks]
        layers = []
        for number, prediction in enumerate(predictions):
            scores, labels = best_class(predictor, prediction["pred_logits"][i])
            layer = LayerView(to_pixels(prediction["pred_boxes"][i], size), scores, labels)
            if result.anchors is not None:
                references = result.anchors[number, i][-len(scores) :]
                if starts_from_points(model, number):
                    references = references[:, :2]
                layer.references = to_pixels(references, size)
            for name, value in attention[number](encoded, i, len(scores), extents, size).items():
                setattr(layer, name, value)
            layers.append(layer)
        selection = denoising = None
        if selected:
            (((_, tokens), chosen),) = selected
            selection = view_selection(model, tokens, chosen, i, size)
        if targets is not None and dn is not None and len(targets[i]["labels"]):
            denoising = view_denoising(predictor, dn, targets[i], i, size)
        views.append(View(image.cpu(), layers, selection, denoising))
    return views


@contextmanager
def calls_of(owner: Any, name: str) -> Iterator[list[tuple[tuple, Any]]]:
    """Arguments and result of every call of a method while the context lasts."""
    calls, method = [], getattr(owner, name)

    def call(*args: Any) -> Any:
        result = method(*args)
        calls.append((args, result))
        return result

    own = {name: method} if name in vars(owner) else {}
    vars(owner)[name] = call  # of this object, in front of its class's
    try:
        yield calls
    finally:
        del vars(owner)[name]
        vars(owner).update(own)


def recorded_attention(
    layer: nn.Module, record: Callable
) -> Callable[[Encoded, int, int, list[Tensor], Tensor], dict[str, Any]]:
    """Have a decoder layer's attention to the image recorded. Returns a function to call after the
    forward pass: of the batch's image `i`, the last `number` queries, each level's extent in its
    pixels and the image's size -> fields of `LayerView`."""
    cross = getattr(layer, "multihead_attn", None) or layer.cross_attn  # the former in DETR
    if isinstance(cross, MSDeformAttn):
        samples = record(cross, "operator")

        def locate(encoded, i, number, extents, size):
            (((_, shapes, _, locations, weights), _),) = samples
            inside = torch.stack(extents) / shapes.flip(-1)  # of the padded level, (L, 2)
            locations = locations[i][-number:] / inside[:, None] * size
            return {"locations": locations.cpu(), "weights": weights[i][-number:].float().cpu()}

        return locate

    if isinstance(cross, RowColumnAttention):
        axes = record(cross.dropout, "forward")

        def multiply(encoded, i, number, extents, size):
            x, y = (weights[i][:, -number:].transpose(0, 1) for _, weights in axes)
            return {"maps": [crop(y[..., None] * x[..., None, :], extents[0])]}

        return multiply

    heads, calls = record(cross, "split_heads"), record(cross, "forward")
    of_levels = record(layer.lvl_attn, "forward") if hasattr(layer, "lvl_attn") else []

    def compare(encoded, i, number, extents, size):
        maps = []
        for level, (args, _) in enumerate(calls):
            query, key = (heads[3 * level + part][1][i] for part in (0, 1))
            similarity = query[:, -number:] @ key.mT / query.shape[-1] ** 0.5
            weights = (similarity + args[3][i]).float().softmax(-1).transpose(0, 1)  # (Q, M, S)
            for _, logits in of_levels:
                weights = weights * logits[i].softmax(-1)[-number:, level, None, None]
            shape = level_masks(encoded)[level].shape[1:]
            maps.append(crop(weights.unflatten(-1, shape), extents[level]))
        return {"maps": maps}

    return compare


def level_masks(encoded: Encoded) -> list[Tensor]:
    """The padding (B, h, w) of each feature level that the decoder attends to."""
    tokens = encoded.tokens
    if not isinstance(tokens, LevelTokens):
        return [encoded.features[-1].mask]
    parts = tokens.mask.split([height * width for height, width in tokens.sizes], dim=1)
    return [mask.unflatten(1, size) for mask, size in zip(parts, tokens.sizes, strict=True)]


def mask_extent(mask: Tensor) -> Tensor:
    """(h, w), True on padding -> width and height of the rest, (2,)."""
    return torch.stack([(~mask[0]).sum(), (~mask[:, 0]).sum()])


def crop(maps: Tensor, extent: Tensor) -> Tensor:
    """Without padding, on the CPU."""
    width, height = extent.tolist()
    return maps[..., :height, :width].float().cpu()


def to_pixels(places: Tensor, size: Tensor) -> Tensor:
    """cxcywh (..., 4) in [0, 1] -> xyxy in pixels; points (..., 2) likewise."""
    if places.shape[-1] == 4:
        places, size = box_convert(places, "cxcywh", "xyxy"), size.repeat(2)
    return (places.float() * size).cpu()


def best_class(predictor: Predictor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (..., C) -> scores and labels (...) of the best class."""
    each = logits.reshape(-1, 1, logits.shape[-1])
    scores, _, labels = predictor.postprocess.classes.best(each, 1)
    return scores.view(logits.shape[:-1]).float().cpu(), labels.view(logits.shape[:-1]).cpu()


def starts_from_points(model: Detector, layer: int) -> bool:
    """Whether the queries' references are boxes only in name."""
    if not isinstance(model, DeformableDETR) or model.selection != "static":
        return False
    return layer == 0 or not model.transformer.decoder.refines


def view_selection(
    model: Any, tokens: LevelTokens, chosen: Selection, i: int, size: Tensor
) -> SelectionView:
    level = torch.arange(len(tokens.sizes), device=size.device)[:, None]
    index = chosen.index[i]
    logits = take(chosen.logits, chosen.index) if model.trains_all_tokens else chosen.logits
    return SelectionView(
        points=to_pixels(tokens.locations()[i, index], size),
        levels=tokens.per_token(level)[index, 0].cpu(),
        scores=model.token_score(logits[i]).sigmoid().float().cpu(),
        boxes=to_pixels(chosen.anchors[i].sigmoid(), size),
    )


def view_denoising(
    predictor: Predictor, dn: Denoising, target: dict[str, Tensor], i: int, size: Tensor
) -> DenoisingView:
    image, query = dn.noised_at
    mine = (image == i).nonzero()[:, 0]
    mine = mine[query[mine].argsort()]  # by group, positives first, in the order of the objects
    shape = dn.num_groups, -1, len(target["labels"])
    noised, query = dn.noised[mine].unflatten(0, shape), query[mine]
    scores, labels = best_class(predictor, dn.pred_logits[:, i, query])
    return DenoisingView(
        boxes=target["boxes"].cpu(),
        labels=target["labels"].cpu(),
        noised=to_pixels(noised, size),
        restored=to_pixels(dn.pred_boxes[:, i, query], size).unflatten(1, shape),
        scores=scores.unflatten(1, shape),
        labels_restored=labels.unflatten(1, shape),
    )
