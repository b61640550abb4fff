"""Submit a training to Slurm: `python run_with_submitit.py --help`.

    python run_with_submitit.py --ngpus 8 --nodes 2 --timeout 2880 --job_dir logs/%j \\
        -c configs/dino_4scale_r50.py --coco_path COCO --batch_size 1

One task is started for each GPU. When the time is up or the job is preempted, it saves at the next
step, goes back into the queue, and goes on from that step.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import submitit

from models.errors import UserError
from util.config import Parser, parse_command_line

ROOT = str(Path(__file__).resolve().parent)
SLURM_OPTIONS = ("partition", "comment", "qos", "account", "constraint")  # passed on as they are
SIGNAL_DELAY = 120  # seconds before the end of its time at which a job is told


class Job:
    """What every task runs: main.py with these arguments, by default into the job's directory."""

    def __init__(self, argv: Sequence[str], output_dir: str):
        self.argv, self.output_dir = list(argv), output_dir

    def __call__(self) -> None:
        """Exits with main.py's status; Slurm ends the other tasks with one that fails."""
        task = submitit.JobEnvironment()
        os.environ |= {
            "RANK": str(task.global_rank),
            "LOCAL_RANK": str(task.local_rank),
            "WORLD_SIZE": str(task.num_tasks),
            "MASTER_ADDR": task.hostnames[0],
            "MASTER_PORT": str(20000 + int(task.raw_job_id) % 20000),
        }
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        sys.path.insert(0, ROOT)
        from main import main

        status = main([*self.argv, "--output_dir", self.output_dir or str(task.paths.folder)])
        if status == 128 + signal.SIGUSR2:
            time.sleep(SIGNAL_DELAY)  # the first task is requeueing the job, which ends this one
        if status:
            sys.exit(status)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What is to run when the job comes out of the queue again."""
        return submitit.helpers.DelayedSubmission(self)


def build_parser() -> Parser:
    parser = Parser(
        "run_with_submitit.py",
        description="Submit a training to Slurm. All other options are main.py's; see its --help.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ngpus", type=int, default=8, metavar="N", help="GPUs of a node, a task for each (8)")
    add("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    add("--ntasks_per_node", type=int, metavar="N", help="with --ngpus 0: CPU tasks a node (1)")
    add("--timeout", type=int, default=60, metavar="MINUTES", help="time until it requeues (60)")
    add("--job_dir", default="outputs/%j", metavar="DIR", help="logs and checkpoints; %%j: the id")
    add("--job_name", default="dn_dino", metavar="NAME", help="name in the queue (dn_dino)")
    for name in SLURM_OPTIONS:
        add(f"--{name}", metavar="TEXT", help=f"Slurm's --{name}")
    add("--cpus_per_task", type=int, default=10, metavar="N", help="CPUs of a task (10)")
    add("--mem_gb", type=int, metavar="N", help="memory of a node; by default 40 GB a task")
    add("--mail_user", metavar="ADDRESS", help="whom Slurm writes to")
    add("--mail_type", default="ALL", metavar="TEXT", help="about what (ALL)")
    add("--requeue", action="store_true", help=argparse.SUPPRESS)  # a job always is requeued
    add("--local", action="store_true", help="run here, without Slurm")
    return parser


def submit(args: argparse.Namespace, function: Job) -> submitit.Job:
    """Put the job into the queue; UserError if Slurm refuses it."""
    tasks = args.ngpus or args.ntasks_per_node or 1
    cluster = "local" if args.local else "slurm"
    executor = submitit.AutoExecutor(args.job_dir, cluster, slurm_max_num_timeout=1000)
    given = {f"slurm_{name}": getattr(args, name) for name in SLURM_OPTIONS}
    more: dict = {"requeue": True, "open-mode": "append"}
    if args.mail_user:
        more |= {"mail-user": args.mail_user, "mail-type": args.mail_type}
    executor.update_parameters(
        name=args.job_name,
        nodes=args.nodes,
        tasks_per_node=tasks,
        gpus_per_node=args.ngpus,
        cpus_per_task=args.cpus_per_task,
        mem_gb=args.mem_gb or 40 * tasks,
        timeout_min=args.timeout,
        slurm_signal_delay_s=SIGNAL_DELAY,
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_additional_parameters=more,
        **{name: value for name, value in given.items() if value is not None},
    )
    try:
        return executor.submit(function)
    except (submitit.core.utils.FailedJobError, FileNotFoundError) as e:
        raise UserError(f"the job was not taken: {str(e).strip().splitlines()[-1]}") from e


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for a mistake of the user, main.py's options included."""
    try:
        args, rest = build_parser().parse_known_args(argv)
        job = submit(args, Job(rest, parse_command_line(rest).output_dir))
    except UserError as e:
        print(f"run_with_submitit.py: error: {e}", file=sys.stderr)
        return 2
    print(f"job {job.job_id}, checkpoints and log.txt in {job.paths.folder}")
    print(f"what it prints: {job.paths.stdout}, errors: {job.paths.stderr}")
    if args.local:
        job.wait()
        return job.exception() is not None
    return 0


if __name__ == "__main__":
    sys.exit(main())
