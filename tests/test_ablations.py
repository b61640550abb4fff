"""Every ablation a model supports trains in two real processes, where DDP requires a gradient for
each trainable parameter."""

import io
import math
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from datasets.toy import make_toy_coco
from main import main
from models.anchor_detr import AnchorDETR
from models.backbones import build_backbone, convnext
from models.dab_detr import DABDETR
from models.detr import DETR
from models.errors import UserError
from models.nested_tensor import nested_tensor_from_tensor_list
from models.original_deformable_detr import DeformableDETR
from models.registry import MODELS
from tests.conftest import SMALL, Pair, without_queries
from tests.test_main import read_log
from train_state import TrainState
from util.config import Config, parse_command_line

TINY = [
    *SMALL[2:],  # without -c: -m selects the published config
    *("--backbone", "timm/test_resnet", "--batch_norm_type", "BatchNorm2d"),
    *("--pretrained_backbone", "FALSE", "--num_feature_levels", "3", "--batch_size", "2"),
    *("--data_aug_scales2_crop", "[]", "--dist_timeout", "1"),
]

# Two steps each, as DDP reports missing gradients only at the next.
ALL = ["--dec_layers 1", "--use_ema --eval_batch_size 2", "--accumulate 2 --batch_size 1", "--amp"]
ALL += ["--aux_loss FALSE", "--hidden_dim 48", "--optimizer muon"]
CLASSES = ["--class_loss focal", "--class_loss softmax --eos_coef 0.2"]
DENSE = ["--num_patterns 2", "--random_refpoints_xy", *CLASSES]
ANCHOR = ["--num_patterns 2", "--spatial_prior grid"]
DEFORMABLE = ["--query_selection static", "--query_selection pure", "--query_selection mixed"]
DEFORMABLE += ["--look_forward_twice", "--look_forward_twice FALSE"]
DEFORMABLE += ["--query_selection static --random_refpoints_xy"]
REFERENCES = ["--with_box_refine", "--with_box_refine FALSE"]
REFERENCES += ["--with_box_refine --query_selection pure"]
WITHOUT_DENOISING = ["--use_dn FALSE", "--dn_number 0"]
REGIONS = ["--hidden_dim 48", "--use_ema --eval_batch_size 2", "--accumulate 2 --batch_size 1"]
REGIONS += ["--amp", "--optimizer muon"]
REGIONS_DENOISING = ["--dn_number 1", "--dn_number 100", "--dn_box_noise_scale 0"]
REGIONS_DENOISING += WITHOUT_DENOISING
DENOISING = ["--contrastive", "--contrastive FALSE", "--dn_number 1", "--dn_number 10"]
DENOISING += ["--dn_label_noise_ratio 0 --dn_box_noise_scale 0"]
DENOISING += ["--dn_num_boxes mean", "--dn_num_boxes process", *WITHOUT_DENOISING]

DENSE_MODELS = [name for name, spec in MODELS.items() if issubclass(spec.detector, DABDETR)]
DETR_MODELS = [name for name, spec in MODELS.items() if issubclass(spec.detector, DETR)]
REFERENCE_MODELS = [n for n, spec in MODELS.items() if issubclass(spec.detector, DeformableDETR)]
ANCHOR_MODELS = [name for name, spec in MODELS.items() if issubclass(spec.detector, AnchorDETR)]
REGION_MODELS = [name for name, spec in MODELS.items() if not spec.detector.has_queries]
PLAIN_MODELS = [name for name, spec in MODELS.items() if not spec.detector.has_denoising]


def ablations(model: str) -> list[str]:
    if model in REGION_MODELS:
        return REGIONS + ([] if model in PLAIN_MODELS else REGIONS_DENOISING)
    decoder = DENSE if model in DENSE_MODELS else DEFORMABLE
    decoder = CLASSES if model in DETR_MODELS else decoder
    decoder = REFERENCES if model in REFERENCE_MODELS else decoder
    decoder = ANCHOR if model in ANCHOR_MODELS else decoder
    return ALL + decoder + ([] if model in PLAIN_MODELS else DENOISING)


def run_main(argv: list[str]) -> tuple[int | str, str]:
    """The exit status of `main`, or "traceback", and its stderr."""
    status, printed = "traceback", io.StringIO()
    # Saving checkpoints, which other tests cover, would take half of the time.
    saving = patch.object(TrainState, "save")
    with redirect_stderr(printed), redirect_stdout(io.StringIO()), saving:
        try:
            status = main(argv)
        except Exception:
            traceback.print_exc()
    return status, printed.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_coco(tmp_path_factory.mktemp("toy"), num_train=8, num_val=2, size=64)


@pytest.mark.parametrize("model", MODELS)
def test_ablations_train_in_two_processes(model: str, pair: Pair, data: Path, tmp_path: Path):
    """Each exits with 0 and a finite loss, and logs denoising losses only if it denoises."""
    failures = []
    for i, options in enumerate(ablations(model)):
        out, command = tmp_path / f"{i}", f"-m {model} {options}"
        regions = [*without_queries(TINY), "--num_regions", "32"]
        tiny = regions if model in REGION_MODELS else TINY
        argv = ["-m", model, *tiny, *options.split(), "--coco_path", str(data)]
        argv += ["--output_dir", str(out), "--dist_url", f"file://{tmp_path}/{i}.store"]
        results = pair.call(run_main, argv, argv)
        if None in results:  # although --dist_timeout is a minute
            pytest.fail("\n".join([*failures, f"{command}: a process returned nothing: {results}"]))
        if any(status != 0 for status, _ in results):
            for rank, (status, text) in enumerate(results):
                failures.append(f"{command}: process {rank}: {status}\n{text}")
            continue
        (line,) = read_log(out)
        if not math.isfinite(line["train_loss"]):
            failures.append(f"{command}: train_loss {line['train_loss']}")
        denoises = model not in PLAIN_MODELS and options not in WITHOUT_DENOISING
        name = "loss_classifier_dn" if model in REGION_MODELS else "loss_ce_dn"
        if (f"train_{name}" in line) != denoises:
            failures.append(f"{command}: logs {sorted(line)}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("model", MODELS)
def test_unsupported_options_are_rejected(model: str):
    """In one line. (`-m dab_deformable_detr --use_dn` selects the model with denoising.)"""
    rejected = ["--num_patterns 2", "--query_selection pure --random_refpoints_xy"]
    if model in DENSE_MODELS + DETR_MODELS:
        rejected = ["--query_selection pure", "--query_selection mixed", "--look_forward_twice"]
    if model in DETR_MODELS:
        rejected += ["--num_patterns 2", "--random_refpoints_xy"]
    if model in ANCHOR_MODELS:
        rejected = ["--query_selection pure", "--look_forward_twice", "--random_refpoints_xy"]
        rejected.append("--num_patterns 0")
    if model in REGION_MODELS:
        rejected = ["--num_queries 50", "--dec_layers 3", "--query_selection pure", "--dilation"]
        rejected += ["--class_loss softmax", "--contrastive", "--log_matching", "--dropout 0.1"]
        rejected += ["--dn_label_noise_ratio 0.5", "--return_interm_indices 1 2 3"]
    if model in ("dab_detr", "detr", "anchor_detr", "faster_rcnn"):
        rejected.append("--use_dn")
    for options in rejected:
        name = options.split("--")[-1].split()[0]
        with pytest.raises(UserError, match=name) as error:
            parse_command_line(["-m", model, *options.split()])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["swin_T_224_1k", "convnext_xlarge_22k"])
def test_backbone_with_an_unused_last_stage(name: str, monkeypatch: pytest.MonkeyPatch):
    """All its trainable parameters get gradients."""
    monkeypatch.setitem(
        convnext.VARIANTS, "convnext_xlarge_22k", convnext.Variant(8, (1, 1, 2, 1), "")
    )
    backbone = build_backbone(Config(backbone=name, return_interm_indices=[1, 2]))
    features = backbone(nested_tensor_from_tensor_list([torch.randn(3, 64, 64)]))
    assert [x.tensors.shape[1] for x in features] == backbone.num_channels
    sum(x.tensors.sum() for x in features).backward()
    trainable = {k: p for k, p in backbone.named_parameters() if p.requires_grad}
    assert [k for k, p in trainable.items() if p.grad is None] == []
