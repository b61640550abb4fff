"""`dn-dino convert`: checkpoints of other projects, safetensors, and what is refused."""

import json
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    ConditionalDetrConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    DetrConfig,
    PreTrainedModel,
    ResNetConfig,
)

from main import main as train
from models import load_detector
from models.backbones.swin import VARIANTS, Swin
from models.class_map import COCO_IDS, COCO_NAMES, ClassMap
from models.cli import main
from models.conversion.mmdet import reorder_merged
from models.dn_components import with_indicator
from models.nested_tensor import NestedTensor
from models.options import DetectorOptions
from models.weights import read_checkpoint
from tests.test_export import make_state

D, HIDDEN, QUERIES = 32, 16, 7  # of the small models below, with 1 encoder and 2 decoder layers
NAMES = [*"abcdefghijk", "N/A"]  # more than ten, whose numbers JSON sorts as strings


def convert(source: Path, output: Path, *flags: str) -> int:
    return main(["convert", str(source), "--output", str(output), *flags])


def error_of(capsys, source: Path, output: Path, *flags: str) -> str:
    """The line that a failing conversion prints. It writes nothing."""
    before = sorted(output.parent.iterdir()) if output.parent.exists() else []
    capsys.readouterr()
    assert convert(source, output, *flags) == 2
    error = capsys.readouterr().err
    assert re.fullmatch("dn-dino convert: error: .*\n", error)
    assert before == (sorted(output.parent.iterdir()) if output.parent.exists() else [])
    return error


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "running" in name:
            tensor.add_(0.2 * torch.rand_like(tensor))
        elif tensor.is_floating_point():
            scale = 0.2 if "bbox_predictor" in name else 0.05
            scale = 1 if re.search("refpoint|query_position|pos_trans", name) else scale
            tensor.add_(scale * torch.randn_like(tensor))


def batch() -> NestedTensor:
    """Two images, the second 70 pixels wide."""
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 70:] = True
    return NestedTensor(torch.randn(2, 3, 64, 96).masked_fill(mask[:, None], 0), mask)


class TestTransformers:
    @staticmethod
    def resnet(*stages: int) -> ResNetConfig:
        return ResNetConfig(
            layer_type="basic",
            depths=[2, 2, 2, 2],
            hidden_sizes=[64, 128, 256, 512],
            out_features=[f"stage{i}" for i in stages],
        )

    named = {"backbone": "resnet18", "id2label": dict(enumerate(NAMES))}
    dab = partial(DabDetrConfig, hidden_size=D)
    deformable = partial(DeformableDetrConfig, d_model=64)  # GroupNorm has 32 groups
    refining = partial(deformable, with_box_refine=True)
    selecting = partial(refining, two_stage=True, two_stage_num_proposals=QUERIES)
    VARIANTS = {
        "timm": partial(dab, **named),
        "patterns": partial(dab, backbone="resnet10t", num_patterns=2, temperature_width=30),
        "resnet": partial(dab, backbone_config=resnet(4), activation_function="relu"),
        "dilated": partial(dab, backbone="resnet50", dilation=True),
        "detr": partial(DetrConfig, d_model=D, **named, activation_function="prelu"),
        "deformable": partial(deformable, **named),
        "one level": partial(deformable, backbone="resnet18", num_feature_levels=1),
        "refining": partial(refining, backbone="resnet18", encoder_n_points=3, decoder_n_points=2),
        "selecting": partial(selecting, backbone="resnet18", num_feature_levels=3),
        "selecting resnet": partial(selecting, backbone_config=resnet(3, 4)),
    }

    @pytest.fixture(params=VARIANTS)
    def theirs(self, request, tmp_path) -> PreTrainedModel:
        """A random model, saved in tmp_path / "theirs"."""
        torch.manual_seed(0)
        config = self.VARIANTS[request.param](
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=HIDDEN,
            decoder_ffn_dim=HIDDEN,
            num_queries=QUERIES,
            **{} if "id2label" in self.VARIANTS[request.param].keywords else {"num_labels": 5},
        )
        model = AutoModelForObjectDetection.from_config(config)
        randomise(model)
        model.save_pretrained(tmp_path / "theirs")
        return AutoModelForObjectDetection.from_pretrained(tmp_path / "theirs").eval()

    def test_equal_outputs_there_and_back(self, theirs, tmp_path):
        images = batch()
        inputs = {"pixel_values": images.tensors, "pixel_mask": ~images.mask}
        ours, back = tmp_path / "ours.safetensors", tmp_path / "back"
        assert convert(tmp_path / "theirs", ours) == 0
        detector = load_detector(ours)
        assert convert(ours, back, "--to", "transformers") == 0
        again = AutoModelForObjectDetection.from_pretrained(back).eval()
        assert type(again) is type(theirs)
        state, other = theirs.state_dict(), again.state_dict()
        if theirs.config.backbone_config.model_type == "timm_backbone":  # back it always is
            assert state.keys() == other.keys()
            assert all(torch.equal(state[name], other[name]) for name in state)
        assert theirs.config.id2label == again.config.id2label
        with torch.no_grad():
            expected, found, returned = theirs(**inputs), detector.model(images), again(**inputs)
        assert expected.pred_boxes.std() > 0.1
        torch.testing.assert_close(found["pred_logits"], expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, rtol=0, atol=1e-5)
        assert torch.equal(returned.logits, expected.logits)
        if theirs.config.num_labels == len(NAMES):  # of N/A there are no detections
            assert detector.class_map.names == dict(enumerate(NAMES[:-1]))

    @pytest.mark.parametrize(
        ("name", "flags"),
        [
            ("dn_dab_detr", ["--num_patterns", "2"]),
            ("detr", []),
            ("dn_deformable_detr", ["--hidden_dim", "64"]),
        ],
    )
    def test_images_through_its_processor(self, name, flags, small, tmp_path):
        """From images to boxes in pixels. DN-DETR's label embedding becomes a pattern; class heads
        of Deformable DETR that differ are kept."""
        source, there = tmp_path / "ours.pth", tmp_path / "there"
        make_state(small, name, *flags).save(source)
        assert convert(source, there, "--to", "transformers") == 0
        model = AutoModelForObjectDetection.from_pretrained(there).eval()
        processor = AutoImageProcessor.from_pretrained(there)
        image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
        detector = load_detector(source)
        expected = detector.predict([image], threshold=0)[0]
        with torch.no_grad():
            outputs = model(**processor(image, return_tensors="pt"))
        (found,) = processor.post_process_object_detection(outputs, 0, [(64, 64)])
        best = found["scores"].sort(descending=True).indices[:20]
        number = len(best)
        scores, labels = expected["scores"][:number], expected["labels"][:number].tolist()
        torch.testing.assert_close(found["scores"][best], scores, rtol=0, atol=1e-4)
        names = [model.config.id2label[label] for label in found["labels"][best].tolist()]
        assert names == [detector.class_map.names[label] for label in labels]
        theirs, state = model.state_dict(), read_checkpoint(source)["model"]
        if name == "dn_dab_detr":
            content = theirs["model.patterns.weight"]
            label = with_indicator(state["label_enc.weight"][-1:], content.shape[1], 0.0)
            assert torch.equal(content, label + state["transformer.patterns.weight"])
        if name == "dn_deformable_detr":
            heads = [n for n in state if n.startswith("class_embed.")]
            assert all(torch.equal(theirs[n], state[n]) for n in heads)
            assert not torch.equal(state[heads[0]], state[heads[2]])
        assert convert(there, tmp_path / "back.pth") == 0
        back = load_detector(tmp_path / "back.pth")
        assert (back.size, back.max_size) == (detector.size, detector.max_size) == (64, 64)

    def test_what_has_no_counterpart(self, tmp_path, capsys):
        output = tmp_path / "out.pth"
        source = tmp_path / "conditional"
        ConditionalDetrConfig().save_pretrained(source)
        save_file({"a": torch.zeros(1)}, source / "model.safetensors")
        assert (
            "no detector here corresponds to 'conditional_detr', only to dab-detr, detr, deformable"
            in error_of(capsys, source, output)
        )
        file = source / "config.json"
        for content, expected in (
            ({"normalize_before": True}, "normalize_before: True is not supported, only False"),
            ({"encoder_ffn_dim": 3}, "ffn_dim of encoder and decoder differ"),
            ({"backbone_config": {"model_type": "swin"}}, "backbone_config: only timm's models"),
            ({"model_type": "detr", "position_embedding_type": "learned"}, "only 'sine'"),
            ({"model_type": "deformable_detr", "d_model": 32}, "hidden_dim: in transformers it is"),
            ({}, "it does not fit dab_detr: unexpected a; missing "),
        ):
            file.write_text(json.dumps({"model_type": "dab-detr", "id2label": {}} | content))
            assert expected in error_of(capsys, source, output)
        file.write_text("{")
        assert "config.json: no JSON" in error_of(capsys, source, output)
        file.unlink()
        assert "config.json" in error_of(capsys, source, output)


# The names and shapes of other projects' files, as their modules make them.


def linear(name: str, *shape: int) -> dict[str, Tensor]:
    """Weight and bias of a linear layer or a convolution, out, in, ..."""
    return {f"{name}.weight": 0.1 * torch.randn(shape), f"{name}.bias": 0.1 * torch.randn(shape[0])}


def norm(name: str, dim: int = D) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + 0.1 * torch.randn(dim), f"{name}.bias": torch.randn(dim)}


def mlp(name: str, *dims: int, step: int = 1) -> dict[str, Tensor]:
    layers = zip(dims[1:], dims[:-1], strict=True)
    return {k: v for i, s in enumerate(layers) for k, v in linear(f"{name}.{step * i}", *s).items()}


def attention(name: str) -> dict[str, Tensor]:
    joined = {
        f"{name}.in_proj_{k}": v
        for k, v in zip(("weight", "bias"), linear("", 3 * D, D).values(), strict=True)
    }
    return joined | linear(f"{name}.out_proj", D, D)


def deformable(name: str, levels: int) -> dict[str, Tensor]:
    """With 8 heads and 4 points."""
    samples = 8 * levels * 4
    offsets = linear(f"{name}.sampling_offsets", 2 * samples, D)
    weights = linear(f"{name}.attention_weights", samples, D)
    return (
        offsets | weights | linear(f"{name}.value_proj", D, D) | linear(f"{name}.output_proj", D, D)
    )


def feed_forward(name: str, activation: str = "") -> dict[str, Tensor]:
    """MMCV's; a PReLU is listed twice."""
    slope = torch.rand(1)
    prelu = {f"{name}.{activation}.weight": slope, f"{name}.layers.0.1.weight": slope}
    layers = linear(f"{name}.layers.0.0", HIDDEN, D) | linear(f"{name}.layers.1", D, HIDDEN)
    return layers | (prelu if activation else {})


def frozen(name: str, dim: int) -> dict[str, Tensor]:
    return norm(name, dim) | {
        f"{name}.running_mean": torch.randn(dim),
        f"{name}.running_var": torch.rand(dim) + 0.5,
    }


def resnet18(
    conv: str, batch_norm: str, stage: str, shortcut: tuple[str, str], first: int
) -> dict[str, Tensor]:
    """A ResNet-18 with these patterns of names; `first` is the number of the first stage."""
    state = {}
    for i in range(4):
        dim = 64 * 2**i
        for block in range(2):
            name, wide = f"{stage.format(i + first)}.{block}", dim if block or not i else dim // 2
            for k, width in ((1, wide), (2, dim)):
                state[f"{name}.{conv.format(k)}.weight"] = 0.05 * torch.randn(dim, width, 3, 3)
                state |= frozen(f"{name}.{batch_norm.format(k)}", dim)
            if wide != dim:
                state[f"{name}.{shortcut[0]}.weight"] = 0.1 * torch.randn(dim, wide, 1, 1)
                state |= frozen(f"{name}.{shortcut[1]}", dim)
    return state


def detrex_backbone() -> dict[str, Tensor]:
    stem = {"backbone.stem.conv1.weight": 0.1 * torch.randn(64, 3, 7, 7)}
    stem |= frozen("backbone.stem.conv1.norm", 64)
    names = "conv{}", "conv{}.norm", "backbone.res{}", ("shortcut", "shortcut.norm"), 2
    return stem | resnet18(*names)


def mmdet_backbone() -> dict[str, Tensor]:
    stem = {"backbone.conv1.weight": 0.1 * torch.randn(64, 3, 7, 7)} | frozen("backbone.bn1", 64)
    names = "conv{}", "bn{}", "backbone.layer{}", ("downsample.0", "downsample.1"), 1
    state = stem | resnet18(*names)
    counters = [k.replace("running_var", "num_batches_tracked") for k in state if "var" in k]
    return state | dict.fromkeys(counters, torch.tensor(5))


def neck(group_norm: str) -> dict[str, Tensor]:
    """A `ChannelMapper` of three stages and a fourth level."""
    state = {}
    for i, dim in enumerate((128, 256, 512)):
        state |= linear(f"neck.convs.{i}.conv", D, dim, 1, 1) | norm(f"neck.convs.{i}.{group_norm}")
    extra = linear("neck.extra_convs.0.conv", D, 512, 3, 3)
    return state | extra | norm(f"neck.extra_convs.0.{group_norm}")


def detrex_deformable(heads: int = 2) -> dict[str, Tensor]:
    """What its deformable models share, with this number of heads of each kind."""
    state = detrex_backbone() | neck("norm")
    state["transformer.level_embeds"] = torch.randn(4, D)
    encoder, decoder = "transformer.encoder.layers.0", "transformer.decoder.layers"
    state |= deformable(f"{encoder}.attentions.0", 4) | feed_forward(f"{encoder}.ffns.0")
    state |= norm(f"{encoder}.norms.0") | norm(f"{encoder}.norms.1")
    for i in range(2):
        layer = f"{decoder}.{i}"
        state |= attention(f"{layer}.attentions.0.attn") | deformable(f"{layer}.attentions.1", 4)
        state |= feed_forward(f"{layer}.ffns.0")
        state |= {k: v for n in range(3) for k, v in norm(f"{layer}.norms.{n}").items()}
    state |= mlp("transformer.decoder.ref_point_head.layers", 2 * D, D, D)
    for i in range(heads):
        pair = linear(f"class_embed.{i}", 80, D) | mlp(f"bbox_embed.{i}.layers", D, D, D, 4)
        state |= pair | {
            f"transformer.decoder.{k}": v for k, v in pair.items() if "bbox" in k or heads > 2
        }
    return state


def detrex_dino() -> dict[str, Tensor]:
    state = detrex_deformable(heads=3) | norm("transformer.decoder.norm")
    state |= linear("transformer.enc_output", D, D) | norm("transformer.enc_output_norm")
    state["transformer.tgt_embed.weight"] = torch.randn(QUERIES, D)
    return state | {"label_enc.weight": torch.randn(80, D)}


def detrex_dab_deformable() -> dict[str, Tensor]:
    state = detrex_deformable() | mlp("transformer.decoder.query_scale.layers", D, D, D)
    state["tgt_embed.weight"] = torch.randn(QUERIES, D)
    return state | {"refpoint_embed.weight": torch.randn(QUERIES, 4)}


def detrex_dn_deformable() -> dict[str, Tensor]:
    state = detrex_dab_deformable() | {"label_encoder.weight": torch.randn(81, D - 1)}
    return state | {"tgt_embed.weight": torch.randn(QUERIES, D - 1)}


def detrex_dab() -> dict[str, Tensor]:
    state = detrex_backbone() | linear("input_proj", D, 512, 1, 1)
    layer, decoder = "transformer.encoder.layers.0", "transformer.decoder"
    state |= attention(f"{layer}.attentions.0.attn") | feed_forward(f"{layer}.ffns.0", "activation")
    state |= norm(f"{layer}.norms.0") | norm(f"{layer}.norms.1")
    state |= mlp("transformer.encoder.query_scale.layers", D, D, D)
    parts = [
        f"{p}_proj"
        for p in ("query_content", "query_pos", "key_content", "key_pos", "value", "out")
    ]
    for i in range(2):
        layer = f"{decoder}.layers.{i}"
        for k, more in ((0, []), (1, ["query_pos_sine_proj"])):
            for part in [*parts, *more]:
                if (k, i, part) != (1, 1, "query_pos_proj"):  # only in the first layer
                    state |= linear(f"{layer}.attentions.{k}.{part}", D, D)
        state |= feed_forward(f"{layer}.ffns.0", "activation")
        state |= {k: v for n in range(3) for k, v in norm(f"{layer}.norms.{n}").items()}
    state |= norm(f"{decoder}.post_norm_layer") | mlp(f"{decoder}.query_scale.layers", D, D, D)
    state |= mlp(f"{decoder}.ref_point_head.layers", 2 * D, D, D)
    state |= mlp(f"{decoder}.ref_anchor_head.layers", D, D, 2)
    boxes = mlp("bbox_embed.layers", D, D, D, 4)
    state |= boxes | {f"{decoder}.{k}": v for k, v in boxes.items()} | linear("class_embed", 80, D)
    return state | {"anchor_box_embed.weight": torch.randn(QUERIES, 4)}


def detrex_dn() -> dict[str, Tensor]:
    return detrex_dab() | {"denoising_generator.label_encoder.weight": torch.randn(81, D - 1)}


def mmdet_dab() -> dict[str, Tensor]:
    state = mmdet_backbone() | linear("neck.convs.0.conv", D, 512, 1, 1)
    layer = "encoder.layers.0"
    state |= attention(f"{layer}.self_attn.attn") | feed_forward(f"{layer}.ffn", "activate")
    state |= norm(f"{layer}.norms.0") | norm(f"{layer}.norms.1")
    state |= mlp("encoder.query_scale.layers", D, D, D)
    parts = [f"{part}_proj" for part in ("qcontent", "qpos", "kcontent", "kpos", "v", "out")]
    for i in range(2):
        layer = f"decoder.layers.{i}"
        for kind, more in (("self_attn", []), ("cross_attn", ["qpos_sine_proj"])):
            for part in [*parts, *more]:
                if (kind, i, part) != ("cross_attn", 1, "qpos_proj"):
                    state |= linear(f"{layer}.{kind}.{part}", D, D)
        state |= feed_forward(f"{layer}.ffn", "activate")
        state |= {k: v for n in range(3) for k, v in norm(f"{layer}.norms.{n}").items()}
    state |= norm("decoder.post_norm") | mlp("decoder.query_scale.layers", D, D, D)
    state |= mlp("decoder.ref_point_head.layers", 2 * D, D, D)
    state |= mlp("decoder.ref_anchor_head.layers", D, D, 2)
    state |= linear("bbox_head.fc_cls", 80, D) | mlp("bbox_head.fc_reg.layers", D, D, D, 4)
    return state | {"query_embedding.weight": torch.randn(QUERIES, 4)}


def mmdet_transformer(is_deformable: bool) -> dict[str, Tensor]:
    """Encoder and decoder of DETR and of Deformable DETR."""
    attend = partial(deformable, levels=4) if is_deformable else attention
    encoder, joined = "encoder.layers.0", "" if is_deformable else ".attn"
    state = attend(f"{encoder}.self_attn{joined}") | feed_forward(f"{encoder}.ffn")
    state |= norm(f"{encoder}.norms.0") | norm(f"{encoder}.norms.1")
    for i in range(2):
        layer = f"decoder.layers.{i}"
        state |= attention(f"{layer}.self_attn.attn") | attend(f"{layer}.cross_attn{joined}")
        state |= feed_forward(f"{layer}.ffn")
        state |= {k: v for n in range(3) for k, v in norm(f"{layer}.norms.{n}").items()}
    return state


def mmdet_detr() -> dict[str, Tensor]:
    state = mmdet_backbone() | linear("neck.convs.0.conv", D, 512, 1, 1)
    state |= mmdet_transformer(is_deformable=False) | norm("decoder.post_norm")
    state |= linear("bbox_head.reg_ffn.layers.0.0", D, D) | linear(
        "bbox_head.reg_ffn.layers.1", D, D
    )
    state |= linear("bbox_head.fc_cls", 81, D) | linear("bbox_head.fc_reg", 4, D)
    return state | {"query_embedding.weight": torch.randn(QUERIES, D)}


def mmdet_heads(number: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for i in range(number):
        state |= linear(f"bbox_head.cls_branches.{i}", 80, D)
        state |= mlp(f"bbox_head.reg_branches.{i}", D, D, D, 4, step=2)
    return state


def mmdet_refine() -> dict[str, Tensor]:
    state = mmdet_backbone() | neck("gn") | {"level_embed": torch.randn(4, D)} | mmdet_heads(2)
    state |= mmdet_transformer(is_deformable=True) | linear("reference_points_fc", 2, D)
    return state | {"query_embedding.weight": torch.randn(QUERIES, 2 * D)}


def mmdet_plain() -> dict[str, Tensor]:
    heads = mmdet_heads(1)
    return mmdet_refine() | heads | {k.replace("s.0.", "s.1.", 1): v for k, v in heads.items()}


def mmdet_two_stage() -> dict[str, Tensor]:
    learned = ("reference_points_fc", "query_embedding")
    state = {k: v for k, v in mmdet_refine().items() if not k.startswith(learned)}
    state |= mmdet_heads(3) | linear("memory_trans_fc", D, D) | norm("memory_trans_norm")
    return state | linear("pos_trans_fc", 2 * D, 2 * D) | norm("pos_trans_norm", 2 * D)


def mmdet_dino() -> dict[str, Tensor]:
    state = mmdet_refine() | mmdet_heads(3) | norm("decoder.norm")
    del state["reference_points_fc.weight"], state["reference_points_fc.bias"]
    state |= mlp("decoder.ref_point_head.layers", 2 * D, D, D)
    state |= linear("memory_trans_fc", D, D) | norm("memory_trans_norm")
    state["query_embedding.weight"] = torch.randn(QUERIES, D)
    return state | {"dn_query_generator.label_embedding.weight": torch.randn(80, D)}


FILES = {
    "dino": (detrex_dino, mmdet_dino),
    "detr": (mmdet_detr,),
    "deformable_detr": (mmdet_plain, mmdet_refine, mmdet_two_stage),
    "dab_detr": (detrex_dab, mmdet_dab),
    "dn_dab_detr": (detrex_dn,),
    "dab_deformable_detr": (detrex_dab_deformable,),
    "dn_dab_deformable_detr": (detrex_dn_deformable,),
}


@pytest.mark.parametrize(
    ("model", "make"), [(model, make) for model, makers in FILES.items() for make in makers]
)
def test_a_file_of_detrex_or_mmdetection_becomes_a_detector(model, make, tmp_path):
    """All of its weights are used, its sizes, positions and classes are known, and it runs."""
    torch.manual_seed(0)
    theirs, source, output = make(), tmp_path / "theirs.pth", tmp_path / "ours.pth"
    is_detrex = make.__name__.startswith("detrex")
    meta = {"cfg": f"model = dict(num_queries={QUERIES})"}  # in two stages no weight tells it
    torch.save({"model": theirs} if is_detrex else {"meta": meta, "state_dict": theirs}, source)
    assert convert(source, output) == 0
    config, ours = (read_checkpoint(output)[key] for key in ("config", "model"))
    assert (config["modelname"], config["backbone"]) == (model, "resnet18")
    sizes = {"num_queries": QUERIES, "hidden_dim": D, "enc_layers": 1, "dec_layers": 2}
    assert config.items() >= sizes.items()
    of_deformable = model == "deformable_detr" or (is_detrex and "dab_detr" not in model)
    positions = (10000, -0.5) if of_deformable else (10000 if model == "detr" else 20, 0)
    assert (config["pe_temperatureW"], config["pe_offset"]) == positions
    sums = lambda state: sorted({round(t.double().sum().item(), 4) for t in state.values()})
    padded = {"label_enc.weight"} if model == "dino" else set()
    counters = {name for name in theirs if name.endswith("num_batches_tracked")}
    used = {name: tensor for name, tensor in theirs.items() if name not in counters}
    assert sums(ours) == sums(used)  # zeros are appended to some
    detector = load_detector(output)
    assert list(detector.class_map.ids.values()) == sorted(COCO_IDS)
    assert list(detector.class_map.names.values()) == COCO_NAMES
    if model == "deformable_detr":
        name = make.__name__
        assert config["with_box_refine"] == (name != "mmdet_plain")
        assert (config["query_selection"] == "pure") == (name == "mmdet_two_stage")
    (found,) = detector.predict([torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)], 0.0)
    assert found["boxes"].isfinite().all() and len(found["scores"]) > 0
    assert not padded or len(ours["label_enc.weight"]) == 81


def test_a_deformable_decoder_layer_computes_the_same(tmp_path):
    """Self-attention, norm 0, cross-attention, norm 1, feed-forward, norm 2: as in MMCV."""
    torch.manual_seed(0)
    theirs = detrex_dino()
    torch.save({"model": theirs}, tmp_path / "theirs.pth")
    assert convert(tmp_path / "theirs.pth", tmp_path / "ours.pth") == 0
    model = load_detector(tmp_path / "ours.pth").model
    part = lambda name: {
        key.removeprefix(f"{prefix}{name}."): value
        for key, value in theirs.items()
        if key.startswith(f"{prefix}{name}.")
    }
    prefix = "transformer.decoder.layers.1."
    attend = nn.MultiheadAttention(D, 8, batch_first=True)
    attend.load_state_dict(part("attentions.0.attn"))
    ours = model.transformer.decoder.layers[1]
    normalise = lambda x, i: F.layer_norm(x, (D,), *part(f"norms.{i}").values())
    captured = []
    ours.register_forward_hook(lambda _, inputs, output: captured.append((inputs, output)))
    with torch.no_grad():
        model([torch.randn(3, 64, 96)])
        ((x, pos, boxes, _, memory, tokens), expected) = captured[0]
        y = normalise(x + attend(x + pos, x + pos, x, need_weights=False)[0], 0)
        y = normalise(y + ours.cross_attn(y + pos, boxes, memory, *tokens.levels), 1)
        w = part("ffns.0.layers")
        hidden = F.linear(y, w["0.0.weight"], w["0.0.bias"]).relu()
        y = normalise(y + F.linear(hidden, w["1.weight"], w["1.bias"]), 2)
    torch.testing.assert_close(expected, y)
    for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        converted = getattr(ours.cross_attn, name).weight
        assert torch.equal(converted, theirs[f"{prefix}attentions.1.{name}.weight"])


def mmdet_swin() -> tuple[dict[str, Tensor], Swin]:
    """A Swin-T under MMDetection's names, and the same one here."""
    torch.manual_seed(0)
    options = DetectorOptions(backbone="swin_T_224_1k", return_interm_indices=[1, 2, 3])
    ours, theirs = Swin(options, [2, 3, 4]), {}
    for name, tensor in ours.state_dict().items():
        name = name.replace("layers.", "stages.", 1).replace(
            "patch_embed.proj", "patch_embed.projection"
        )
        name = name.replace(".attn.", ".attn.w_msa.").replace(".mlp.fc1", ".ffn.layers.0.0")
        if ".downsample." in name:  # pixels, C -> C, pixels in the order of nn.Unfold
            dim = tensor.shape[-1] // 4
            index = [[column * 2 + row for row, column in ((0, 0), (0, 1), (1, 0), (1, 1))]]
            order = (torch.tensor(index) * dim + torch.arange(dim)[:, None]).flatten()
            tensor = tensor[..., order]
        theirs[f"backbone.{name.replace('.mlp.fc2', '.ffn.layers.1')}"] = tensor
    return theirs, ours


def test_swin_of_mmdetection(tmp_path):
    backbone, swin = mmdet_swin()
    state = {k: v for k, v in mmdet_dino().items() if not k.startswith("backbone.")} | backbone
    for i, dim in enumerate((192, 384, 768)):
        state |= linear(f"neck.convs.{i}.conv", D, dim, 1, 1)
    state |= linear("neck.extra_convs.0.conv", D, 768, 3, 3)
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    assert convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors") == 0
    found = load_detector(tmp_path / "ours.safetensors").model.backbone[0].state_dict()
    expected = swin.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert read_checkpoint(tmp_path / "ours.safetensors")["config"]["backbone"] in VARIANTS


def test_patch_merging_in_the_order_of_unfold():
    image, weight = torch.randn(1, 3, 4, 6), torch.randn(5, 12)
    unfolded = F.unfold(image, kernel_size=2, stride=2).transpose(1, 2)  # (1, 6, 12)
    x = image.permute(0, 2, 3, 1)  # the authors' order
    merged = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    merged = torch.cat(merged, dim=-1).flatten(1, 2)
    torch.testing.assert_close(merged @ reorder_merged(weight).T, unfolded @ weight.T)


CONFIG = """
dataset_type = 'CocoDataset'
lang = f()
model = dict(
    type='DINO',
    backbone=dict(type='ResNet', depth=18, style='{style}'),
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675], std={std}, bgr_to_rgb=False),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(embed_dims=32, num_heads=4))),
    positional_encoding=dict(num_feats=16, normalize={normalize}, offset=-0.25, temperature=50),
    bbox_head=dict(loss_cls=[dict(type='FocalLoss')]))
"""


class Foreign:
    """An object that a checkpoint of mmengine holds, and what its unpickling would run."""

    ran = False

    def __reduce__(self):
        return setattr, (Foreign, "ran", True)


def test_settings_in_a_file_of_mmdetection(tmp_path, capsys):
    """They are parsed; objects of foreign classes are dropped and not executed."""
    torch.manual_seed(0)
    state, source, output = mmdet_dino(), tmp_path / "theirs.pth", tmp_path / "ours.pth"

    def save(style: str = "pytorch", normalize: bool = True, text: str = CONFIG) -> None:
        text = text.replace("{style}", style).replace("{std}", "[1.0, 1.0, 1.0]")
        text = text.replace("{normalize}", str(normalize))
        classes = {"classes": tuple(f"thing {i}" for i in range(80))}
        meta = {"cfg": text, "dataset_meta": classes, "hook": Foreign()}
        torch.save({"meta": meta, "state_dict": state, "message_hub": {"log": Foreign()}}, source)

    save()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(source, weights_only=True)
    assert convert(source, output) == 0
    assert not Foreign.ran
    converted = read_checkpoint(output)
    settings = {"nheads": 4, "enc_n_points": 8, "pe_offset": -0.25, "pe_temperatureH": 50}
    assert converted["config"].items() >= settings.items()
    assert load_detector(output).class_map == ClassMap.of_names([f"thing {i}" for i in range(80)])
    # Images are BGR with a standard deviation of 1 there, RGB and normalised here.
    image = torch.randint(0, 256, (1, 3, 32, 32)).float()
    mean, std = (
        torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    ours = F.conv2d((image / 255 - mean) / std, converted["model"]["backbone.0.body.conv1.weight"])
    theirs = F.conv2d((image - 255 * mean).flip(1), state["backbone.conv1.weight"])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)

    for change, expected in (
        ({"style": "caffe"}, "style='caffe' and dilations are not supported"),
        ({"normalize": False}, "positional_encoding: normalize=False"),
        ({"text": CONFIG.replace("103.53", "90.0")}, "is not ImageNet's"),
        ({"text": "model = dict(type=unknown)"}, "its config cannot be read"),
    ):
        save(**change)
        assert expected in error_of(capsys, source, tmp_path / "new.pth")


def test_what_detrex_files_do_not_tell(tmp_path, caplog):
    """A config and --bgr do; without one, positions are those of its configs of 12 epochs."""
    theirs, source, output = detrex_dino(), tmp_path / "theirs.pth", tmp_path / "ours.pth"
    torch.save({"model": {f"module.{name}": value for name, value in theirs.items()}}, source)
    config = tmp_path / "config.py"
    config.write_text("modelname = 'dino'\nnheads = 4\n")
    named = {"nheads": 4, "enc_n_points": 8, "pe_offset": 0, "pe_temperatureH": 20}
    published = {"nheads": 8, "enc_n_points": 4, "pe_offset": 0, "pe_temperatureH": 20}
    for flags, expected in ((["-c", str(config), "--bgr"], named), (["-m", "dino"], published)):
        assert convert(source, output, *flags) == 0
        converted = read_checkpoint(output)
        assert DetectorOptions.of(converted["config"]).__dict__.items() >= expected.items()
        assert converted["config"]["num_queries"] == QUERIES
        stem = converted["model"]["backbone.0.body.conv1.weight"]
        order = [2, 1, 0] if "--bgr" in flags else [0, 1, 2]
        assert torch.equal(stem, theirs["backbone.stem.conv1.weight"][:, order])
        assert "position encoding" not in caplog.text
    with caplog.at_level("INFO"):
        assert convert(source, output) == 0
    assert "position encoding as in detrex's configs of 12 epochs" in caplog.text


def test_unknown_names_and_shapes(tmp_path, capsys):
    source, output = tmp_path / "theirs.pth", tmp_path / "ours.pth"
    good = detrex_dino()
    wrong = {
        "unexpected a.0, a.1, a.2 and 1 more": good | {f"a.{i}": torch.zeros(1) for i in range(4)},
        "missing transformer.decoder.norm.weight": {
            k: v for k, v in good.items() if k != "transformer.decoder.norm.weight"
        },
        "mismatched label_enc.weight": good | {"label_enc.weight": torch.zeros(7, D)},
        "differs from another tensor that is class_embed.0.weight": good
        | linear("transformer.decoder.class_embed.0", 80, D),
        "it does not fit detr: unexpected a": mmdet_detr() | {"a": torch.zeros(1)},
        "in two stages needs with_box_refine": mmdet_two_stage()
        | {k.replace("s.0", f"s.{i}", 1): v for k, v in mmdet_heads(1).items() for i in range(3)},
        "it has no ResNet 18, 34, 50 or 101": {
            k: v for k, v in good.items() if not k.startswith("backbone.res4.1")
        },
    }
    for expected, state in wrong.items():
        torch.save({"model": state}, source)
        assert expected in error_of(capsys, source, output)
    torch.save({"model": {"a": torch.zeros(1)}}, source)
    assert "holds no config" in error_of(capsys, source, output)
    assert "it does not fit dino" in error_of(capsys, source, output, "-m", "dino")
    assert "holds no averaged weights" in error_of(capsys, source, output, "--ema")
    assert "No such file" in error_of(capsys, tmp_path / "absent.pth", output)


class TestOwn:
    @pytest.fixture
    def trained(self, small, tmp_path) -> Path:
        path = tmp_path / "checkpoint.pth"
        make_state(small, "dino", "--use_ema").save(path)
        return path

    def test_safetensors(self, trained, toy, tmp_path, capsys):
        """The same detector, in every place that reads a checkpoint, without further options."""
        output = tmp_path / "averaged.safetensors"
        assert convert(trained, output, "--ema") == 0
        expected, found = load_detector(trained, ema=True), load_detector(output)
        image = torch.randint(0, 255, (3, 50, 64), dtype=torch.uint8)
        for a, b in zip(*(d.predict([image], 0.0) for d in (expected, found)), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in ("boxes", "scores", "labels"))
        assert found.class_map == expected.class_map and found.size == expected.size == 64
        # Heads that are shared are stored once.
        assert len(load_file(output)) < len(read_checkpoint(trained)["model"])
        back = tmp_path / "back.pth"
        assert convert(output, back) == 0
        figures = []
        for path in (output, back):
            run = ["--eval", "--coco_path", str(toy), "--num_workers", "0", "--device", "cpu"]
            assert train([*run, "--resume", str(path), "--output_dir", str(tmp_path / "eval")]) == 0
            content = json.loads((tmp_path / "eval" / "eval.json").read_text())
            figures.append(content["test_coco_eval_bbox"])
        assert figures[0] == figures[1]
        size = output.stat().st_size
        for damage in (size - 100, 200, 9):
            output.write_bytes(output.read_bytes()[:damage])
            message = "truncated, corrupt or not a checkpoint"
            assert message in error_of(capsys, output, tmp_path / "new.pth")

    def test_training_resumes_from_it(self, trained, toy, tmp_path):
        output = tmp_path / "weights.pth"
        assert convert(trained, output) == 0
        run = ["--coco_path", str(toy), "--num_workers", "0", "--device", "cpu"]
        run += ["--debug", "--output_dir", str(tmp_path / "again"), "--epochs", "5"]
        assert train([*run, "--resume", str(output)]) == 0
        state = read_checkpoint(tmp_path / "again" / "checkpoint.pth")
        assert (state["config"]["modelname"], state["config"]["hidden_dim"]) == ("dino", 32)
        assert state["epoch"] == 4  # that of the checkpoint is 3

    def test_errors(self, trained, tmp_path, capsys):
        before = trained.read_bytes()
        there = tmp_path / "there"
        assert "transformers has no dino, only" in error_of(
            capsys, trained, there, "--to", "transformers"
        )
        assert "is the checkpoint itself" in error_of(capsys, trained, trained)
        assert "is a directory; name a file" in error_of(capsys, trained, tmp_path)
        absent = tmp_path / "absent" / "x.safetensors"
        assert "checkpoint not saved: No such file or directory" in error_of(
            capsys, trained, absent
        )
        assert trained.read_bytes() == before


def test_classes():
    """COCO's as labels of 80 and of 91, and those of others."""
    eighty, ninety_one = ClassMap.of_count(80), ClassMap.of_count(91)
    assert eighty.ids[79] == 90 and ninety_one.ids[90] == 90
    assert eighty.names[79] == ninety_one.names[90] == "toothbrush"
    assert set(ninety_one.ids) == COCO_IDS
    named = ["nothing"] * 91  # of the unused labels of 91
    for id_, name in zip(sorted(COCO_IDS), COCO_NAMES, strict=True):
        named[id_] = name
    assert ClassMap.of_names(named) == ninety_one
    assert ClassMap.of_names(["a", "b"]) == ClassMap(2, {0: 0, 1: 1}, {0: "a", 1: "b"})
