"""CONTRIBUTING.md, followed to add a detector, a loss term, a backbone and an option."""

import dataclasses
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models.build
import util.config
from models import build_model
from models.backbones import BACKBONES, BackboneSpec
from models.backbones.base import Backbone
from models.criterion import LossTerm, standard_terms
from models.detector import Detector, Encoded, Queries
from models.dn_components import Assignment
from models.errors import UserError
from models.heads import box_head, class_head
from models.nested_tensor import NestedTensor
from models.options import DetectorOptions, option
from models.registry import MODELS, ModelSpec
from models.transformer import Decoded
from util.config import Config, load_config

ROOT = Path(__file__).parents[1]
FILES = {
    "A detector": [
        *("models/detector.py", "models/transformer.py", "models/deformable_transformer.py"),
        *("models/query_selection.py", "models/heads.py", "models/registry.py", "README.md"),
        *("docs/denoising.md", "tests/test_models.py"),
    ],
    "A loss term": ["models/criterion.py", "models/options.py", "tests/test_criterion.py"],
    "A backbone": [
        *("models/backbones/base.py", "models/backbones/__init__.py", "tests/test_models.py")
    ],
    "An option": ["models/options.py", "util/config.py", "tests/test_config.py", "README.md"],
}
NEW = {
    "A detector": ["models/NAME.py", "configs/NAME.py", "configs/toy/NAME.py"],
    "A backbone": ["models/backbones/NAME.py"],
}


@pytest.mark.parametrize("section", FILES)
def test_named_files_exist(section):
    sections = re.split(r"^## (.+)\n", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    text = dict(zip(sections[1::2], sections[2::2], strict=True))[section]
    named = set(re.findall(r"`([\w/]+\.(?:py|md))`", text))
    assert named == {*FILES[section], *NEW.get(section, [])}
    assert all((ROOT / name).exists() for name in FILES[section])
    assert all((ROOT / name).parent.is_dir() for name in NEW.get(section, []))


class Plain(Detector):
    """Minimal DETR: learned queries and one layer of cross-attention."""

    has_denoising = True

    def __init__(self, options: DetectorOptions, backbone: Backbone):
        super().__init__(options, backbone)
        dim = options.hidden_dim
        self.backbone = nn.ModuleList([backbone])
        self.input_proj = nn.Conv2d(self.num_channels[-1], dim, kernel_size=1)
        self.content, self.anchors = (nn.Embedding(options.num_queries, n) for n in (dim, 4))
        self.attention = nn.MultiheadAttention(dim, options.nheads, batch_first=True)
        self.class_embed, self.bbox_embed = class_head(options), box_head(options)
        self.label_enc = nn.Embedding(options.num_labels + 1, dim)

    def encode(self, images: NestedTensor) -> Encoded:
        features = self.backbone[0](images)
        memory = self.input_proj(features[-1].tensors).flatten(2).transpose(1, 2)
        return Encoded(features, memory, features[-1].mask.flatten(1))

    def queries(self, encoded: Encoded) -> Queries:
        size = (len(encoded.memory), -1, -1)
        return Queries(self.content.weight.expand(size), self.anchors.weight.expand(size), {})

    def decode(
        self, content: Tensor, anchors: Tensor, blocked: Tensor | None, encoded: Encoded
    ) -> Decoded:
        mask, memory = encoded.tokens, encoded.memory
        attended, _ = self.attention(content, memory, memory, key_padding_mask=mask)
        state = content + attended
        boxes = (anchors + self.bbox_embed(state)).sigmoid()
        return Decoded(state[None], boxes[None], anchors.sigmoid().detach()[None])

    def classify(self, states: Tensor) -> Tensor:
        return self.class_embed(states)


class Patches(Backbone):
    """One convolution per level."""

    def __init__(self, options: DetectorOptions, levels: list[int]):
        super().__init__()
        self.num_channels = [8 * level for level in levels]
        strides = [2 ** (level + 1) for level in levels]
        pairs = zip(self.num_channels, strides, strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(3, c, stride, stride) for c, stride in pairs)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        return [conv(images) for conv in self.convs]


def centre_loss(assignment: Assignment, power: float) -> Tensor:
    distance = (assignment.predicted_boxes - assignment.boxes)[..., :2].abs() ** power
    return distance.sum((1, 2))


def terms(options: DetectorOptions) -> list[LossTerm]:
    compute = partial(centre_loss, power=2)
    centre = LossTerm("loss_centre", "centre_loss_coef", compute, parts=("decoder", "denoising"))
    return [*standard_terms(options), centre]


CENTRE_WEIGHT = "weight of the distance of centres"


@dataclass
class WithCentre(DetectorOptions):
    centre_loss_coef: float = option(1.0, CENTRE_WEIGHT, low=0)


@dataclass
class ConfigWithCentre(Config):
    centre_loss_coef: float = option(1.0, CENTRE_WEIGHT, low=0)


@pytest.fixture
def additions(monkeypatch) -> None:
    """Makes the changes listed in CONTRIBUTING.md by patching the modules."""
    monkeypatch.setitem(MODELS, "plain", ModelSpec(Plain, "plain"))
    monkeypatch.setitem(BACKBONES, "patches", BackboneSpec(Patches))
    monkeypatch.setattr(models.build, "standard_terms", terms)
    monkeypatch.setattr(models.build, "DetectorOptions", WithCentre)
    monkeypatch.setattr(util.config, "Config", ConfigWithCentre)
    fields = {f.name: f for f in dataclasses.fields(ConfigWithCentre)}
    monkeypatch.setattr(util.config, "FIELDS", fields)


def test_additions_train(additions, tmp_path):
    config = tmp_path / "plain.py"
    config.write_text('modelname, backbone, hidden_dim = "plain", "patches", 32\ndec_layers = 1\n')
    small = {"num_classes": 3, "num_queries": 5, "use_dn": True, "centre_loss_coef": "2"}
    cfg = load_config(config, small)
    torch.manual_seed(0)
    model, criterion, postprocess = build_model(cfg)
    assert isinstance(model, Plain) and isinstance(model.backbone[0], Patches)
    assert criterion.weight_dict["loss_centre"] == criterion.weight_dict["loss_centre_dn"] == 2

    images = [torch.rand(3, 64, 96), torch.rand(3, 80, 64)]
    targets = [
        {"labels": torch.tensor([0, 2]), "boxes": torch.rand(2, 4) * 0.5 + 0.25},
        {"labels": torch.tensor([1]), "boxes": torch.rand(1, 4) * 0.5 + 0.25},
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(2):
        torch.manual_seed(1)  # the same noise
        losses = criterion(model(images, targets), targets)
        total = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[1] < totals[0]
    assert all(p.grad is not None for p in model.parameters())

    model.eval()
    found = postprocess(model(images), torch.tensor([[64, 96], [80, 64]]))
    assert [set(image) for image in found] == [{"scores", "labels", "boxes"}] * 2


def test_new_option_is_checked(additions):
    with pytest.raises(UserError, match=r"centre_loss_coef: -1\.0 is less than 0"):
        load_config(overrides={"centre_loss_coef": -1})
    with pytest.raises(UserError, match="did you mean centre_loss_coef"):
        load_config(overrides={"center_loss_coef": 1})
