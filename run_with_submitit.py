"""Submit training to Slurm: `python run_with_submitit.py --help`.

    python run_with_submitit.py --ngpus 8 --nodes 2 --timeout 2880 --job_dir logs/%j \\
        -c configs/dino_4scale_r50.py --coco_path COCO --batch_size 1

Each GPU gets one task. At the time limit or when preempted, the job saves after the current step,
requeues itself, and later resumes from there.
"""

import argparse
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import submitit
import torch

from models.cli import Parser
from models.errors import UserError
from util.config import parse_command_line

ROOT = str(Path(__file__).resolve().parent)
SLURM_OPTIONS = ("partition", "comment", "qos", "account", "constraint")  # passed on unchanged
SIGNAL_DELAY = 120  # seconds before the time limit at which the job gets a signal


class Job(submitit.helpers.Checkpointable):
    """Runs main.py, or another module with such a `main`, in every task; the default output
    directory is the job's."""

    def __init__(self, argv: Sequence[str], output_dir: str, program: str = "main"):
        self.argv, self.output_dir, self.program = list(argv), output_dir, program

    def __call__(self) -> None:
        """Exit with main.py's status; if it is not 0, Slurm terminates the other tasks."""
        task = submitit.JobEnvironment()
        os.environ |= {
            "RANK": str(task.global_rank),
            "LOCAL_RANK": str(task.local_rank),
            "WORLD_SIZE": str(task.num_tasks),
            "MASTER_ADDR": task.hostnames[0],
            "MASTER_PORT": str(20000 + int(task.raw_job_id) % 20000),
        }
        if "OMP_NUM_THREADS" not in os.environ:  # which is too late to set: torch is imported
            torch.set_num_threads(int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
        sys.path.insert(0, ROOT)
        main = importlib.import_module(self.program).main
        status = main([*self.argv, "--output_dir", self.output_dir or str(task.paths.folder)])
        if status == 128 + signal.SIGUSR2:
            time.sleep(SIGNAL_DELAY)  # until the first task has requeued the job
        if status:
            sys.exit(status)


def build_parser() -> Parser:
    parser = Parser(
        "run_with_submitit.py",
        description="Run main.py on Slurm, with its options and these (defaults in parentheses).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ngpus", type=int, default=8, metavar="N", help="GPUs per node, each with one task (8)")
    add("--nodes", type=int, default=1, metavar="N", help="number of nodes (1)")
    add("--ntasks_per_node", type=int, metavar="N", help="CPU tasks per node with --ngpus 0 (1)")
    add("--timeout", type=int, default=60, metavar="MINUTES", help="time until requeueing (60)")
    add("--job_dir", default="outputs/%j", metavar="DIR", help="output; %%j: job id (outputs/%%j)")
    add("--job_name", default="dn_dino", metavar="NAME", help="Slurm's job name (dn_dino)")
    for name in SLURM_OPTIONS:
        add(f"--{name}", metavar="TEXT", help=f"Slurm's --{name}")
    add("--cpus_per_task", type=int, default=10, metavar="N", help="CPUs per task (10)")
    add("--mem_gb", type=int, metavar="N", help="memory per node in GB (40 per task)")
    add("--mail_user", metavar="ADDRESS", help="recipient of Slurm's mail")
    add("--mail_type", default="ALL", metavar="TEXT", help="events that Slurm mails about (ALL)")
    add("--requeue", action="store_true", help=argparse.SUPPRESS)  # always on
    add("--local", action="store_true", help="run on this machine, without Slurm")
    return parser


def submit(args: argparse.Namespace, functions: Sequence[Job]) -> list[submitit.Job]:
    """Submit the jobs, several as an array. UserError if Slurm rejects them."""
    tasks = args.ngpus or args.ntasks_per_node or 1
    cluster = "local" if args.local else "slurm"
    executor = submitit.AutoExecutor(args.job_dir, cluster, slurm_max_num_timeout=1000)
    options = {f"slurm_{name}": getattr(args, name) for name in SLURM_OPTIONS}
    additional: dict = {"requeue": True, "open-mode": "append"}
    if args.mail_user:
        additional |= {"mail-user": args.mail_user, "mail-type": args.mail_type}
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
        slurm_additional_parameters=additional,
        **{name: value for name, value in options.items() if value is not None},
    )
    try:
        if len(functions) == 1:
            return [executor.submit(functions[0])]
        with executor.batch():
            return [executor.submit(function) for function in functions]
    except (submitit.core.utils.FailedJobError, FileNotFoundError) as e:
        raise UserError(f"job not submitted: {str(e).strip().splitlines()[-1]}") from e


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a user error, including errors in main.py's options."""
    try:
        args, rest = build_parser().parse_known_args(argv)
        (job,) = submit(args, [Job(rest, parse_command_line(rest).output_dir)])
    except UserError as e:
        print(f"run_with_submitit.py: error: {e}", file=sys.stderr)
        return 2
    print(f"job {job.job_id}, checkpoints and log.txt in {job.paths.folder}")
    print(f"output: {job.paths.stdout}, errors: {job.paths.stderr}")
    if args.local:
        job.wait()
        return job.exception() is not None
    return 0


if __name__ == "__main__":
    sys.exit(main())
