"""A real Slurm on this machine: a job preempted and timed out loses no progress."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments import load
from run_with_submitit import main
from tests.conftest import SMALL
from tests.test_distributed import run
from tests.test_experiments import TINY
from tests.test_main import assert_same_state, read_log
from tools import experiment
from util.checkpoint import read_checkpoint

SCRIPT = Path(__file__).parent / "slurm_cluster.sh"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
STATEFUL = ["--use_dn", "--dropout", "0.1", "--epochs", "4", "--batch_size", "1"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    missing = [
        name
        for name in NEEDED
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing or os.geteuid() != 0:
        pytest.skip(f"Slurm needs {', '.join(missing) or 'root'}")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm" / "slurm.conf"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # threads are what the job sets
    subprocess.run([SCRIPT, "start", tmp_path / "slurm"], check=True, timeout=60)
    yield tmp_path
    subprocess.run([SCRIPT, "stop", tmp_path / "slurm"], check=True)


def wait_for(condition: Callable[[], bool], seconds: float, job: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            printed = [path.read_text()[-2000:] for path in job.glob("*_log.*")]
            pytest.fail("\n".join(["timed out; the job printed:", *printed]))
        time.sleep(0.2)


@pytest.mark.slow
def test_preempted_and_timed_out_job_equals_an_uninterrupted_run(
    cluster: Path, toy: Path, capsys: pytest.CaptureFixture
):
    """Two tasks; `scontrol requeue`, then the signal Slurm sends before the time limit. Restarted
    by Slurm, the job resumes despite --overwrite."""
    args = [*SMALL, *STATEFUL, "--coco_path", str(toy), "--overwrite"]
    slurm = ["--ngpus", "0", "--ntasks_per_node", "2", "--cpus_per_task", "1", "--mem_gb", "2"]
    slurm += ["--timeout", "30", "--comment", "a test", "--job_dir", str(cluster / "job_%j")]
    slurm += ["--requeue", "--mail_user", "someone@example.org", "--mail_type", "END"]
    assert main([*slurm, *args]) == 0
    job_id = re.search(r"job (\d+), checkpoints", capsys.readouterr().out)[1]
    job = cluster / f"job_{job_id}"
    show = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True)
    assert "MailUser=someone@example.org MailType=END" in show.stdout
    epochs = lambda: len(read_log(job)) if (job / "log.txt").exists() else 0

    def state() -> str:
        show = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True)
        return re.search(r"JobState=(\w+)", show.stdout)[1]

    for done, stop in enumerate((["scontrol", "requeue"], ["scancel", "--signal=USR2"]), start=1):
        wait_for(lambda done=done: epochs() >= done, 300, job)
        subprocess.run([*stop, job_id], check=True)
        wait_for(lambda: state() == "PENDING", 300, job)
        # Slurm delays requeued jobs by two minutes.
        subprocess.run(["scontrol", "update", f"JobId={job_id}", "StartTime=now"], check=True)
    wait_for(lambda: state() == "COMPLETED", 300, job)

    printed = "".join(path.read_text() for path in job.glob("*_log.*"))
    assert "SIGUSR2" in printed and "requeu" in printed.lower()
    run(2, [*args, "--output_dir", str(cluster / "whole")], cluster / "output.txt")
    checkpoints = [read_checkpoint(out / "checkpoint.pth") for out in (job, cluster / "whole")]
    for checkpoint in checkpoints:
        checkpoint["ema_model"] = {}
    assert_same_state(*checkpoints)
    logs = [read_log(out) for out in (job, cluster / "whole")]
    losses = [
        [(line["epoch"], line["train_loss"], line["test_loss"]) for line in log] for log in logs
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_local_job_and_unknown_option(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    args = [*SMALL, "--coco_path", str(toy), "--debug"]
    slurm = ["--local", "--ngpus", "0", "--ntasks_per_node", "2", "--job_dir", str(tmp_path / "%j")]
    command = [sys.executable, "run_with_submitit.py", *slurm, *args]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job = Path(re.search(r"log.txt in (.*)", printed)[1])
    assert [line["epoch"] for line in read_log(job)] == [0]
    assert len(read_checkpoint(job / "checkpoint.pth")["rng"]) == 2
    assert main([*slurm, "--num_querys", "100"]) == 2
    assert "did you mean num_queries?" in capsys.readouterr().err


def test_a_comparison_is_an_array(cluster: Path, toy: Path, capsys: pytest.CaptureFixture):
    """tools/experiment.py --slurm: a job for each arm, and tables of what they reached."""
    place = ["mask_toy", "--seeds", "1", "--output_dir", str(cluster)]
    place += ["--options", *TINY, "epochs=1"]
    shutil.copytree(toy, cluster / f"outputs/experiments/{load('mask_toy').data}")
    slurm = ["--slurm", "--ngpus", "0", "--cpus_per_task", "1", "--mem_gb", "2"]
    assert experiment.main([*place, *slurm, "--job_dir", str(cluster / "%j")]) == 0
    jobs = re.findall(r"job (\d+)_(\d), ", capsys.readouterr().out)
    assert [task for _, task in jobs] == ["0", "1"] and jobs[0][0] == jobs[1][0]
    logs = lambda: list(cluster.glob("outputs/experiments/mask_toy/*/seed_0/log.txt"))
    wait_for(lambda: len(logs()) == 2, 300, cluster / jobs[0][0])
    assert experiment.main([*place, "--report"]) == 0
    assert "| without the mask - with the mask |" in capsys.readouterr().out
