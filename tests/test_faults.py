"""Full disks, damaged files, deleted directories, dead workers: files left, messages printed."""

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from datasets.toy import make_toy_coco
from main import main
from tests import kill_runs
from tests.conftest import SMALL, children_of, full, wait_for_first_epoch
from tests.test_main import read_log
from util.checkpoint import read_checkpoint

PLAIN = ["--onecyclelr", "FALSE", "--resume", "auto"]


def arguments(toy: Path, out: Path, *more: str) -> list[str]:
    return [*SMALL, *PLAIN, "--coco_path", str(toy), "--output_dir", str(out), *more]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, *full(2)])
def test_kills_at_random_times(processes: int, tmp_path: Path):
    """`python -m tests.kill_runs` runs more of the same."""
    assert kill_runs.test(2, processes, tmp_path, random.Random(1)) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A 16 MB file system, with room for one 11 MB checkpoint."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_full_disk(toy: Path, small_disk: Path, capsys: pytest.CaptureFixture):
    """The first checkpoint stays intact and is resumed once there is space."""
    out = small_disk / "out"
    assert main(arguments(toy, out, "--epochs", "3")) == 2
    error = capsys.readouterr().err
    assert "checkpoint.pth: checkpoint not saved: No space left on device" in error
    assert error.count("\n") == 1
    state = read_checkpoint(out / "checkpoint.pth")
    assert (state["epoch"], state["trained"] is None) == (0, False)  # before its evaluation
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    assert main(arguments(toy, out, "--epochs", "2")) == 0
    assert [line["epoch"] for line in read_log(out)] == [0, 1]


def test_deleted_directory(toy: Path, tmp_path: Path):
    out, output = tmp_path / "out", tmp_path / "output.txt"
    process = kill_runs.start_main(arguments(toy, out, "--epochs", "50"), output)
    wait_for_first_epoch(output, process.is_alive)
    shutil.rmtree(out)
    process.join(300)
    assert process.exitcode == 2
    printed = output.read_text()
    assert str(out) in printed.splitlines()[-1]
    assert "No such file or directory" in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_damaged_checkpoints_are_skipped(toy: Path, tmp_path: Path, capsys):
    """Truncated at every tenth of its length, or with a flipped bit: the previous one is resumed,
    with the same result."""
    whole = tmp_path / "whole"
    assert main(arguments(toy, whole, "--epochs", "2")) == 0
    half = tmp_path / "half"
    assert main(arguments(toy, half, "--epochs", "1")) == 0
    newest = (half / "checkpoint.pth").read_bytes()
    assert (half / "checkpoint_previous_1.pth").exists()
    damaged = [newest[: len(newest) * tenth // 10] for tenth in range(10)]
    generator = random.Random(0)
    for _ in range(5):
        content = bytearray(newest)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        damaged.append(bytes(content))
    for number, content in enumerate(damaged):
        out = tmp_path / str(number)
        shutil.copytree(half, out)
        (out / "checkpoint.pth").unlink()  # hard-linked to others
        (out / "checkpoint.pth").write_bytes(content)
        (out / "checkpoint_best.pth").unlink()
        capsys.readouterr()
        last = number == len(damaged) - 1
        assert main(arguments(toy, out, "--epochs", "2" if last else "1")) == 0
        if "skipping" not in capsys.readouterr().out:  # an unused bit
            assert number >= 10
        elif last:
            assert kill_runs.compare(whole, out) == []
    assert [line["epoch"] for line in read_log(out)] == [0, 1]


def test_killed_data_worker_stops_the_run(toy: Path, tmp_path: Path):
    args = arguments(toy, tmp_path / "out", "--epochs", "100", "--num_workers", "1")
    process = kill_runs.start_main(args, tmp_path / "output.txt")
    wait_for_first_epoch(tmp_path / "output.txt", process.is_alive)
    for child in children_of(process):  # one for training, one for evaluation
        os.kill(child, signal.SIGKILL)
    process.join(300)
    assert process.exitcode == 1
    last = (tmp_path / "output.txt").read_text().splitlines()[-1]
    assert last.startswith("main.py: stopped: a data-loading worker died: DataLoader worker")


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.full
def test_fifty_resumes_leak_nothing(tmp_path: Path):
    """Each trains and evaluates one more epoch, in this process."""
    tiny = make_toy_coco(tmp_path / "toy", num_train=2, num_val=1, size=48)
    out, measured = tmp_path / "out", []
    for epochs in range(1, 51):
        more = ["--batch_size", "2", "--epochs", str(epochs), "--use_ema", "--dec_layers", "1"]
        assert main(arguments(tiny, out, *more, "--backbone", "timm/test_resnet")) == 0
        files = len(list(Path("/proc/self/fd").iterdir()))
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        measured.append((files, len(children), resident_mb()))
    assert [line["epoch"] for line in read_log(out)] == list(range(50))
    assert measured[-1][:2] == measured[10][:2]
    assert measured[-1][2] < measured[10][2] + 25, measured
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
