"""Several real processes give the same results as one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from pycocotools.cocoeval import COCOeval

from datasets.coco import CocoDetection
from datasets.loader import EpochBatches
from datasets.toy import make_toy_coco
from datasets.transforms import eval_transforms
from engine import train_steps
from main import main
from models import build_model
from models.class_map import ClassMap
from models.criterion import SetCriterion
from models.errors import UserError
from models.nested_tensor import nested_tensor_from_tensor_list
from tests.conftest import SMALL, Pair, children_of, wait_for_first_epoch
from tests.kill_runs import kill, start_main, start_ranks
from tests.test_main import assert_same_state, read_log
from train_state import TrainState
from util.checkpoint import read_checkpoint
from util.config import parse_command_line
from util.distributed import join_processes, leave_processes, world_size

# Neither noise, whose random numbers differ between processes, nor batch statistics.
PLAIN = ["--batch_norm_type", "FrozenBatchNorm2d", "--use_dn", "--dn_label_noise_ratio", "0"]
PLAIN += ["--dn_box_noise_scale", "0", "--onecyclelr", "FALSE", "--fix_size"]


def launch(processes: int, args: list[str], output: Path) -> subprocess.Popen:
    """torchrun, printing to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "main.py", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(output, "w") as file:
        streams = {"stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=environment, **streams)


def start_named(args: list[str], tmp_path: Path, *names: str) -> list[BaseProcess]:
    """`main` in a new process for each name, which prints to `tmp_path / name`.txt."""
    return start_ranks(args, tmp_path / "ranks", [tmp_path / f"{name}.txt" for name in names])


def statuses(ranks: list[BaseProcess]) -> list[int | None]:
    """Those that the processes exit with."""
    for process in ranks:
        process.join(300)
    return [process.exitcode for process in ranks]


def run_both(pair: Pair, args: list[str], tmp_path: Path) -> None:
    """`main` in two running processes, which is faster than torchrun."""
    store = tmp_path / f"store{len(list(tmp_path.glob('store*')))}"  # a new one each time
    args = [*args, "--dist_url", f"file://{store}"]
    assert pair.call(main, args, args) == [0, 0]
    store.touch()


def run(processes: int, args: list[str], output: Path) -> None:
    assert launch(processes, args, output).wait(300) == 0, output.read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training images, 5 steps of 4, and 7 to evaluate, not divisible by 2 or 3."""
    return make_toy_coco(tmp_path_factory.mktemp("toy"), num_train=20, num_val=7, size=64)


@pytest.fixture(scope="module")
def squares(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with images of one size, as padding would depend on the batch."""
    root = tmp_path_factory.mktemp("squares") / "coco"
    shutil.copytree(data, root)
    for path in root.glob("annotations/instances_*.json"):
        content = json.loads(path.read_text())
        for image in content["images"]:
            file = root / path.stem.removeprefix("instances_") / image["file_name"]
            Image.open(file).resize((64, 64)).save(file)
            scale = (64 / image["width"], 64 / image["height"])
            image |= {"width": 64, "height": 64}
            for box in (a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]):
                box[:] = [value * s for value, s in zip(box, scale * 2, strict=True)]
        path.write_text(json.dumps(content))
    return root


def arguments(data: Path, out: Path, batch_size: int, *more: str) -> list[str]:
    args = [*SMALL, *PLAIN, "--coco_path", str(data), "--output_dir", str(out)]
    return [*args, "--batch_size", str(batch_size), "--epochs", "1", *more]


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(pair: Pair, squares: Path, tmp_path: Path):
    """As do accumulated batches: losses of 5 steps within 0.1%, weights on average within 2% of a
    step. Does not hold for DN-DETR's per-process normalisation of denoising losses."""
    one, two, accumulated = (tmp_path / name for name in ("one", "two", "accumulated"))
    mean = ["--dn_num_boxes", "mean"]
    assert main(arguments(squares, one, 4, *mean)) == 0
    run_both(pair, arguments(squares, two, 2, *mean), tmp_path)
    assert main(arguments(squares, accumulated, 2, *mean, "--accumulate", "2")) == 0
    expected = read_checkpoint(one / "checkpoint.pth")["model"]
    lr = read_log(one)[0]["train_lr"]
    for other in (two, accumulated):
        weights = read_checkpoint(other / "checkpoint.pth")["model"]
        error = torch.cat([(weights[k] - v).abs().flatten() for k, v in expected.items()])
        # AdamW's first steps have length lr for any gradient, so rounding errors flip steps where
        # it nearly vanishes; on average this must not matter.
        assert error.mean() < 0.02 * lr, error.mean()
        log, reference = read_log(other)[0], read_log(one)[0]
        for key in (k for k in reference if k.startswith("train_loss")):
            assert log[key] == pytest.approx(reference[key], rel=1e-3, abs=1e-3), key


def test_evaluation_does_not_depend_on_the_number_of_processes(
    pair: Pair, data: Path, tmp_path: Path
):
    assert main(arguments(data, tmp_path / "run", 2)) == 0
    resume = ["--eval", "--resume", str(tmp_path / "run" / "checkpoint.pth"), "--save_results"]
    results = []
    for processes in (1, 2, 3):
        out = tmp_path / f"of {processes}"
        args = arguments(data, out, 2, *resume)
        if processes == 1:
            assert main(args) == 0
        elif processes == 2:
            run_both(pair, args, tmp_path)
        else:
            ranks = start_named(args, tmp_path, "first", "second", "third")
            assert statuses(ranks) == [0, 0, 0]
        metrics = json.loads((out / "eval.json").read_text())["test_coco_eval_bbox"]
        results.append((metrics, json.loads((out / "results.json").read_text())))
    assert results[0] == results[1] == results[2]
    assert len({d["image_id"] for d in results[0][1]}) == 7


def count_evaluations(argv: list[str]) -> tuple[int, int, list[tuple]]:
    """The exit status of `main`, its number of COCO evaluations, and directories and titles of the
    reports that it asked for."""
    how = {"autospec": True, "side_effect": COCOeval.summarize}
    with patch.object(COCOeval, "summarize", **how) as spy, patch("trainer.write_report") as report:
        status = main(argv)
    return status, spy.call_count, [call.args[1:] for call in report.call_args_list]


def test_coco_evaluation_runs_once_in_two_processes(pair: Pair, data: Path, tmp_path: Path):
    """In the first, for the model and for its average, which have a report each."""
    assert main(arguments(data, tmp_path / "run", 2, "--use_ema")) == 0
    checkpoint, page = str(tmp_path / "run" / "checkpoint.pth"), tmp_path / "page"
    resume = ["--eval", "--resume", checkpoint, "--eval_per_class", "--eval_report", str(page)]
    resume += ["--dist_url", f"file://{tmp_path}/store", "--use_ema"]
    args = arguments(data, tmp_path / "out", 2, *resume)
    reports = [(page, checkpoint), (page / "ema", f"{checkpoint} (EMA)")]
    assert pair.call(count_evaluations, args, args) == [(0, 2, reports), (0, 0, [])]


def test_first_process_decides_where_all_resume(pair: Pair, data: Path, tmp_path: Path):
    """Even if only its directory holds a run, as with local disks."""
    outs = [tmp_path / "0", tmp_path / "1"]
    assert main(arguments(data, outs[0], 2)) == 0
    more = ["--epochs", "2", "--resume", "auto", "--dist_url", f"file://{tmp_path}/store"]
    assert pair.call(main, *(arguments(data, out, 1, *more) for out in outs)) == [0, 0]
    assert [line["epoch"] for line in read_log(outs[0])] == [0, 1]


def denoising_losses(task: tuple[int, str, str]) -> dict[str, float]:
    """Stats of a step of `train_steps` in two processes, with one and four objects."""
    rank, url, divisor = task
    join_processes(2, rank, url, 5)
    try:
        state, criterion, batches = one_batch_each(divisor)
        (step,) = train_steps(state, state.model, criterion, [batches[rank]])
        return step.stats
    finally:
        leave_processes()


def one_batch_each(divisor: str) -> tuple[TrainState, SetCriterion, list]:
    """A training state, its criterion and a one-image batch for each of two processes."""
    more = ["--dn_num_boxes", divisor, "--num_classes", "3", "--lr", "0", "--lr_backbone", "0"]
    cfg = parse_command_line([*SMALL, *PLAIN, *more, "--optimizer", "adamw"])
    torch.manual_seed(1)
    model, criterion, _ = build_model(cfg)
    state = TrainState(cfg, model, ClassMap.identity([{"id": 0}], 3))
    batches = []
    for count in (1, 4):
        target = {"labels": torch.arange(count) % 3, "boxes": 0.2 + 0.3 * torch.rand(count, 4)}
        batches.append((nested_tensor_from_tensor_list([torch.randn(3, 64, 64)]), [target]))
    return state, criterion, batches


@pytest.mark.parametrize("divisor", ["process", "mean"])
def test_denoising_loss_normalisation(divisor: str, pair: Pair, tmp_path: Path):
    """DN-DETR: by each process's own objects; DINO: by their mean over the processes."""
    state, criterion, batches = one_batch_each(divisor)
    model = state.model.train()
    separate = [criterion(model(images, targets), targets) for images, targets in batches]
    url = f"file://{tmp_path}/store"
    logged = pair.call(denoising_losses, (0, url, divisor), (1, url, divisor))
    assert logged[0]["loss_bbox_dn"] == logged[1]["loss_bbox_dn"]
    for name in ("loss_ce_dn", "loss_bbox_dn", "loss_giou_dn_0"):
        one, four = (float(losses[name].detach()) for losses in separate)
        expected = {"process": (one + four) / 2, "mean": (one + 4 * four) / 5}[divisor]
        assert one != pytest.approx(four, rel=0.01)
        assert logged[0][f"{name}_unscaled"] == pytest.approx(expected, rel=1e-4), name
    one, four = (float(losses["loss_bbox"].detach()) for losses in separate)
    assert logged[0]["loss_bbox_unscaled"] == pytest.approx((one + 4 * four) / 5, rel=1e-4)


def test_processes_connect_without_torchrun(data: Path, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    args = arguments(data, tmp_path / "out", 2, "--dist_url", url)
    assert statuses(start_named(args, tmp_path, "first", "second")) == [0, 0]
    assert [line["epoch"] for line in read_log(tmp_path / "out")] == [0]
    assert len(read_checkpoint(tmp_path / "out" / "checkpoint.pth")["rng"]) == 2


def load_data(task: tuple[int, Path, Path]) -> tuple[int, str | list]:
    """In two processes: how often this one parsed the annotations, and the error or the data."""
    rank, temporary, images = task
    temporary.mkdir(exist_ok=True)
    join_processes(2, rank, f"file://{images.parent}/store", 5)
    parse = patch.object(json, "loads", side_effect=json.loads)
    try:
        with parse as spy, patch.object(tempfile, "tempdir", str(temporary)):
            data: str | list = contents(images)
    except UserError as e:
        data = str(e)
    finally:
        leave_processes()
    assert not list(temporary.iterdir())
    return spy.call_count, data


def contents(images: Path) -> list:
    """All that a data set gives, as lists."""
    annotations = images.parent / "annotations" / f"instances_{images.name}.json"
    dataset = CocoDetection(images, annotations, eval_transforms([64], 64))
    assert world_size() == 1 or not dataset.image_ids.flags.writeable  # mapped, not copied
    names = [dataset.file_name(i) for i in range(len(dataset))]
    samples = [
        (image.sum().item(), str(target))
        for image, target in map(dataset.__getitem__, range(len(dataset)))
    ]
    truth = dataset.ground_truth(dataset.image_ids.tolist())
    truth = {key: column.tolist() for key, column in truth.items()}
    return [names, samples, truth, dataset.class_map, dataset.most_objects()]


@pytest.mark.parametrize("nodes", [1, 2])
def test_annotations_are_read_once_a_node(nodes: int, pair: Pair, data: Path, tmp_path: Path):
    """Processes with different directories for temporary files do not share memory."""
    root = shutil.copytree(data, tmp_path / "coco")
    images, annotations = root / "val2017", root / "annotations" / "instances_val2017.json"
    tasks = [(rank, tmp_path / f"of node {rank % nodes}", images) for rank in range(2)]
    expected = contents(images)
    assert pair.call(load_data, *tasks) == [(1, expected), (nodes - 1, expected)]
    (root / "store").unlink(missing_ok=True)
    annotations.write_text("{}")
    (first, error), (second, same) = pair.call(load_data, *tasks)
    assert (first, second) == (1, nodes - 1) and error == same
    assert error.startswith(f"{annotations}: 'images' is missing")


@pytest.mark.parametrize(("size", "processes"), [(10, 1), (10, 2), (11, 3), (3, 4)])
def test_batches_of_all_processes_make_up_an_epoch(size: int, processes: int, monkeypatch):
    def batches(train: bool, **kwargs) -> list[list[list[int]]]:
        shares = []
        for rank in range(processes):
            monkeypatch.setattr("datasets.loader.rank", lambda rank=rank: rank)
            monkeypatch.setattr("datasets.loader.world_size", lambda: processes)
            sampler = EpochBatches(size, 2, train, **kwargs)
            shares.append(list(sampler))
            assert len(sampler) == len(shares[-1])
        return shares

    images = [i for share in batches(train=False) for batch in share for i in batch]
    assert sorted(images) == list(range(size))
    shares = batches(train=True)
    assert len({len(share) for share in shares}) == 1  # else one would wait forever
    images = [i for share in shares for batch in share for i in batch]
    assert len(set(images)) == len(images) == size // (2 * processes) * 2 * processes


def test_signal_saves_and_the_run_resumes(pair: Pair, data: Path, tmp_path: Path):
    """SIGTERM to torchrun in mid-epoch: all stop; resumed, they end in the same state."""
    args = ["--epochs", "3", "--dropout", "0.1", "--dn_box_noise_scale", "0.4"]
    run_both(pair, arguments(data, tmp_path / "whole", 1, *args), tmp_path)
    stopped = arguments(data, tmp_path / "stopped", 1, *args, "--resume", "auto")
    output = tmp_path / "output.txt"
    process = launch(2, stopped, output)
    wait_for_first_epoch(output, lambda: process.poll() is None)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) != 0
    assert "stopped by SIGTERM; --resume auto continues" in output.read_text()
    state = read_checkpoint(tmp_path / "stopped" / "checkpoint.pth")
    assert state["epoch"] < 2
    run_both(pair, stopped, tmp_path)
    states = [read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "stopped")]
    for state in states:
        state["ema_model"] = {}
    assert_same_state(*states)
    logs = [read_log(tmp_path / name) for name in ("whole", "stopped")]
    assert [line["epoch"] for line in logs[1]] == [0, 1, 2]
    for first, second in zip(*logs, strict=True):
        assert {k: v for k, v in first.items() if "loss" in k} == {
            k: v for k, v in second.items() if "loss" in k
        }


def test_killed_process_stops_the_others(data: Path, tmp_path: Path):
    args, output = arguments(data, tmp_path / "out", 1, "--epochs", "100"), tmp_path / "output.txt"
    process = launch(2, args, output)
    wait_for_first_epoch(output, lambda: process.poll() is None)
    os.kill(children_of(process)[-1], signal.SIGKILL)
    assert process.wait(300) != 0
    assert "Signal 9 (SIGKILL)" in output.read_text()  # torchrun's final message names the cause


@pytest.mark.slow
def test_hung_process_stops_the_others(data: Path, tmp_path: Path):
    args = arguments(data, tmp_path / "out", 1, "--epochs", "100", "--dist_timeout", "0.15")
    first, second = start_named(args, tmp_path, "first", "second")
    wait_for_first_epoch(tmp_path / "first.txt", first.is_alive)
    os.kill(second.pid, signal.SIGSTOP)
    first.join(300)
    kill(second)
    assert first.exitcode == 1
    printed = (tmp_path / "first.txt").read_text()
    assert "lost contact with another process, which died or hangs" in printed


def test_second_run_in_one_directory_is_rejected(data: Path, tmp_path: Path):
    args = arguments(data, tmp_path / "out", 1, "--epochs", "100")
    running = start_main(args, tmp_path / "running.txt")
    wait_for_first_epoch(tmp_path / "running.txt", running.is_alive)
    found = statuses(start_named(args, tmp_path, "first", "second"))
    kill(running)
    assert all(found)
    assert "is in use by process" in (tmp_path / "first.txt").read_text()
