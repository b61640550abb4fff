"""Resuming: from a directory's run, from a released file, with other settings."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from main import main
from tests.test_main import assert_same_state, fails_with, read_log
from util.checkpoint import read_checkpoint

# Per-epoch schedule and published optimiser, unlike the toy config's.
PLAIN = ["--onecyclelr", "FALSE", "--optimizer", "adamw", "--use_dn", "--lr", "1e-3"]
PLAIN += ["--lr_backbone", "1e-4", "--save_checkpoint_interval", "1"]


@pytest.fixture
def plain(small: list[str]) -> list[str]:
    return [*small[:-2], *PLAIN, *small[-2:]]


def rates(out: Path) -> list[float]:
    return [line["train_lr"] for line in read_log(out)]


def test_run_in_the_output_directory_is_resumed(plain: list[str], tmp_path: Path, capsys):
    """As in DINO's code, for any --resume, and logged in one line."""
    out, other = tmp_path / "out", tmp_path / "other"
    assert main([*plain, "--epochs", "2", "--output_dir", str(other)]) == 0
    assert main(plain) == 0
    assert "contains a run" not in capsys.readouterr().out
    assert main([*plain, "--epochs", "2", "--resume", str(other / "checkpoint.pth")]) == 0
    printed = capsys.readouterr().out
    assert f"{out} contains a run; resuming it after epoch 0 instead of {other}" in printed
    assert "--overwrite starts over" in printed
    assert [line["epoch"] for line in read_log(out)] == [0, 1]
    states = [read_checkpoint(directory / "checkpoint.pth") for directory in (out, other)]
    for state in states:
        state["ema_model"] = {}
    assert_same_state(*states)
    # --resume may name another of its checkpoints.
    assert main([*plain, "--epochs", "2", "--resume", str(out / "checkpoint0000.pth")]) == 0
    assert "contains a run" not in capsys.readouterr().out
    assert [line["epoch"] for line in read_log(out)] == [0, 1]


def test_overwrite_starts_over(plain: list[str], tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main([*plain, "--epochs", "2"]) == 0
    before = {path: path.read_bytes() for path in out.glob("checkpoint*.pth")}
    assert len(before) == 5  # latest, previous, best and one per epoch
    # Errors remove nothing.
    fails_with(capsys, [*plain, "--overwrite", "--coco_path", str(tmp_path)], "annotations")
    own = str(out / "checkpoint.pth")
    fails_with(capsys, [*plain, "--overwrite", "--resume", own], f"overwrite: would remove {own}")
    fails_with(capsys, [*plain, "--overwrite", "--resume", "auto"], "mutually exclusive")
    assert {path: path.read_bytes() for path in out.glob("checkpoint*.pth")} == before
    # Neither does a restart by Slurm or torchrun.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main([*plain, "--overwrite", "--epochs", "3"]) == 0
    assert [line["epoch"] for line in read_log(out)] == [0, 1, 2]
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert main([*plain, "--overwrite"]) == 0
    assert [line["epoch"] for line in read_log(out)] == [0]
    assert not (out / "checkpoint0001.pth").exists()
    assert len(list(out.glob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize("keeps_optimizer", [True, False])
def test_released_checkpoint_resumes_at_the_rate_of_its_epoch(
    plain: list[str], tmp_path: Path, capsys, keeps_optimizer: bool
):
    """With its two-group optimiser state, if that fits."""
    assert main([*plain, "--output_dir", str(tmp_path / "before")]) == 0
    ours = read_checkpoint(tmp_path / "before" / "checkpoint.pth")
    weights = ours["model"]
    trained = [k for k, v in weights.items() if v.is_floating_point() and "running" not in k]
    trained = [k for k in trained if not k.startswith("bbox_embed")]  # shared, so duplicates
    rest, backbone = ([k for k in trained if ("backbone" in k) == b] for b in (False, True))
    rest += [] if keeps_optimizer else ["extra"]
    moment = lambda name: torch.full_like(weights.get(name, torch.zeros(1)), 0.5)
    state = {
        i: {"step": 7, "exp_avg": moment(k), "exp_avg_sq": moment(k)}
        for i, k in enumerate([*rest, *backbone])
    }
    indices = list(range(len(rest))), list(range(len(rest), len(state)))
    groups = [{"lr": 1e-9, "params": n} for n in indices]
    released = {"model": weights, "optimizer": {"state": state, "param_groups": groups}}
    released |= {"lr_scheduler": {"step_size": 40}, "epoch": 44, "class_map": ours["class_map"]}
    path = tmp_path / "released.pth"
    torch.save(released | {"args": argparse.Namespace(lr=1e-4)}, path)
    more = ["--resume", str(path), "--epochs", "46", "--lr_drop", "40"]
    assert main([*plain, *more]) == 0
    how = "the optimiser state of" if keeps_optimizer else "a new optimiser, as no state fits in"
    assert f"resume: next is epoch 45, with {how} {path}" in capsys.readouterr().out
    assert [line["epoch"] for line in read_log(tmp_path / "out")] == [45]
    assert rates(tmp_path / "out") == pytest.approx([1e-4])
    final = read_checkpoint(tmp_path / "out" / "checkpoint.pth")["optimizer"]
    assert sorted(group["lr"] for group in final["param_groups"]) == pytest.approx([1e-5, 1e-4])
    steps = {int(state["step"]) for state in final["state"].values()}
    assert steps == {6 + 7 * keeps_optimizer}


def test_other_rates_are_ignored_with_a_message(plain: list[str], tmp_path: Path, capsys):
    out, start = tmp_path / "out", [*plain, "--lr_drop", "2"]
    assert main(start) == 0
    capsys.readouterr()
    others = ["--lr", "5e-3", "--weight_decay", "0.5", "--lr_drop", "1"]
    assert main([*start, "--epochs", "2", *others]) == 0
    assert (
        "resume: keeping lr 0.001, weight_decay 0.0001, lr_drop 2 from the checkpoint; ignoring lr "
        "0.005, weight_decay 0.5, lr_drop 1 (--override_resumed_lr_drop changes the drops)"
    ) in capsys.readouterr().out
    assert rates(out) == pytest.approx([1e-3, 1e-3])
    # The kept values are saved, so the message recurs.
    assert json.loads((out / "config.json").read_text())["lr_drop"] == 2
    assert main([*start, "--epochs", "3", "--lr", "5e-3"]) == 0
    printed = capsys.readouterr().out
    assert "resume: keeping lr 0.001 from the checkpoint; ignoring lr 0.005\n" in printed
    assert rates(out) == pytest.approx([1e-3, 1e-3, 1e-4])
    assert main([*start, "--epochs", "4"]) == 0
    assert "from the checkpoint" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--override_resumed_lr_drop", "--lr_drop", "1"], [1e-3, 1e-4, 1e-5]),
        (["--override_resumed_lr_drop", "--multi_step_lr", "--lr_drop_list", "2"], [1e-3, 1e-3]),
        (["--drop_lr_now"], [1e-3, 1e-4, 1e-4]),
        (["--drop_lr_now", "--override_resumed_lr_drop", "--lr_drop", "2"], [1e-3, 1e-4, 1e-5]),
    ],
)
def test_resumed_schedule_can_be_changed(
    plain: list[str], tmp_path: Path, capsys, options: list[str], expected: list[float]
):
    """By the released flags, once: not again when the changed run is resumed."""
    assert main([*plain, "--lr_drop", "10"]) == 0
    for epochs in range(2, len(expected) + 1):
        assert main([*plain, "--lr_drop", "10", *options, "--epochs", str(epochs)]) == 0
    assert "from the checkpoint" not in capsys.readouterr().out
    assert rates(tmp_path / "out") == pytest.approx(expected)


def test_average_starts_from_the_weights_of_its_epoch(plain: list[str], tmp_path: Path):
    """With decay 1 it keeps them; before, the best checkpoint is the model's."""
    args = [*plain, "--use_ema", "--ema_epoch", "1", "--ema_decay", "1"]
    out = tmp_path / "out"
    assert main(args) == 0
    assert read_checkpoint(out / "checkpoint.pth")["ema_model"] is None
    assert (out / "checkpoint_best.pth").exists()
    assert main([*args, "--epochs", "2"]) == 0
    first, second = read_log(out)
    assert "ema_test_coco_eval_bbox" not in first and "ema_test_coco_eval_bbox" in second
    assert second["ema_test_coco_eval_bbox"] == first["test_coco_eval_bbox"]
    average = read_checkpoint(out / "checkpoint.pth")["ema_model"]
    before = read_checkpoint(out / "checkpoint0000.pth")["model"]
    same = {k: torch.equal(v, average[k]) for k, v in before.items() if v.is_floating_point()}
    assert all(same.values())
