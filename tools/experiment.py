"""Runs a comparison of experiments/ and writes its tables and plots:

    python tools/experiment.py convergence_toy --seeds 1

Every arm is trained once for each seed, several runs at a time, or as a Slurm array with --slurm
and the options of run_with_submitit.py. Interrupted, the same command goes on: finished runs are
kept, others resumed. Checkpoints are in outputs/experiments/, logs, tables and plots in results/,
and docs/RESULTS.md is written anew from all results.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_with_submitit
from datasets.toy import make_toy_coco
from experiments import Experiment, Toy, load, names
from models.cli import Parser
from models.errors import UserError
from models.machine import describe_machine
from tools.results import complete_log, duplicates_per_object, slug, write_page, write_results

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """An arm trained with one seed. `settings` decide its outcome: program, config, options and
    seed. `data`: its data set; `outputs`: where checkpoints go; `results`: where the log goes when
    it is finished."""

    arm: str
    settings: dict[str, Any]
    data: Path
    outputs: Path
    results: Path

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.settings['seed']}"

    @property
    def finished(self) -> bool:
        """Whether a run with the same settings is among the results."""
        path = self.results / "run.json"
        return path.exists() and json.loads(path.read_text())["settings"] == self.settings

    @property
    def begun(self) -> bool:
        """Whether a run with the same settings is among the outputs."""
        path = self.outputs / "settings.json"
        return path.exists() and json.loads(path.read_text()) == self.settings

    def prepare(self) -> list[str]:
        """Make the output directory, removing a run with other settings; returns main.py's
        arguments but for that directory."""
        if self.outputs.exists() and not self.begun:
            print(f"{self}: its options have changed, starting again")
            shutil.rmtree(self.outputs)
        self.outputs.mkdir(parents=True, exist_ok=True)
        (self.outputs / "settings.json").write_text(json.dumps(self.settings))
        config = str(ROOT / "configs" / f"{self.settings['config']}.py")
        argv = ["-c", config, "--seed", str(self.settings["seed"]), "--coco_path", str(self.data)]
        options = self.settings["options"]
        return [*argv, "--options", *options] if options else argv

    def collect(self) -> bool:
        """Copy the log of a complete run to the results, with what else was measured, and where."""
        lines = complete_log(self.outputs) if self.begun else []
        if not lines:
            return False
        if (self.outputs / "results.json").exists():
            lines[-1]["duplicates"] = duplicates_per_object(self.data, self.outputs)
        self.results.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.results / "log.txt").write_text(text)
        machine = describe_machine("cuda" if torch.cuda.is_available() else "cpu")
        origin = {"settings": self.settings, "commit": commit(), "processor": machine["name"]}
        origin |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        (self.results / "run.json").write_text(json.dumps(origin, indent=2) + "\n")
        return True


def commit() -> str:
    """The checkout's commit, with a + if files other than results have changed since."""
    git = lambda *words: subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    written = ":!results", ":!docs/RESULTS.md"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *written)
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def is_here(data: Toy | str, folder: Path) -> bool:
    """Whether a data set is in `folder`, or is a toy data set, which can be made."""
    return isinstance(data, Toy) or (folder / data).is_dir()


def find_data(data: Toy | str, folder: Path, root: Path) -> Path:
    """The directory of a data set in `folder`, or of a toy data set, made in outputs/ if it is not
    there yet."""
    if not is_here(data, folder):
        raise UserError(f"data: {folder / data} is not there; --data names its parent directory")
    if isinstance(data, str):
        return folder / data
    path = root / "outputs/experiments" / str(data)
    if not (path / "annotations/instances_val2017.json").exists():
        make_toy_coco(path, **dataclasses.asdict(data))
    return path


def list_runs(
    name: str, experiment: Experiment, data: Path, more: Sequence[str], root: Path
) -> list[Run]:
    """All runs, one seed after the other, so that an interrupted comparison has complete seeds.
    `more`: options of every arm that override the description's; `root`: has outputs and results.
    """
    runs = []
    for seed in experiment.seeds:
        for arm_name, arm in experiment.arms.items():
            options = {**experiment.options, **arm.options}
            if experiment.epochs is not None:
                options.setdefault("epochs", experiment.epochs)
            settings = {"program": arm.program, "config": arm.config, "seed": seed}
            settings["options"] = [*(f"{k}={v}" for k, v in options.items()), *more]
            place = f"{name}/{slug(arm_name)}/seed_{seed}"
            outputs, results = root / "outputs/experiments" / place, root / "results" / place
            runs.append(Run(arm_name, settings, data, outputs, results))
    return runs


def free_places(jobs: int | None, processes: int) -> SimpleQueue[dict[str, str]]:
    """The environments of the runs that go at a time, by default as many as there are GPUs for, or
    cores: GPUs of their own, or OMP_NUM_THREADS, a share of the cores where it is not set."""
    gpus = range(0, torch.cuda.device_count() - processes + 1, processes)
    names = [",".join(map(str, range(first, first + processes))) for first in gpus][:jobs]
    places = [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    if not places:
        cores = os.cpu_count() or 1
        share = str(max(cores // (jobs or cores), 1))
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share)}
        places = [threads] * (jobs or cores)
    queue: SimpleQueue[dict[str, str]] = SimpleQueue()
    for place in places:
        queue.put(place)
    return queue


def run_here(runs: Sequence[Run], jobs: int | None, processes: int) -> None:
    """Run `jobs` at a time. UserError if one fails; the others end first. A signal to stop reaches
    all of them, and they save."""
    places = free_places(jobs, processes)
    running: set[subprocess.Popen] = set()
    begun, stopped = time.monotonic(), []

    def train(run: Run) -> str:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else [])]
        command += ["-m", run.settings["program"], "--output_dir", str(run.outputs), *run.prepare()]
        place = places.get()
        with open(run.outputs / "output.txt", "a") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | place, **streams)
            running.add(process)
            status = process.wait()
            running.discard(process)
        places.put(place)
        if status or not run.collect():
            return f"{run}: exit status {status}, see {run.outputs / 'output.txt'}"
        seconds = timedelta(seconds=int(time.monotonic() - begun))
        print(f"{run}: finished, {seconds} since the start", flush=True)
        return ""

    def stop(signum: int, _) -> None:
        stopped.append(signum)
        for process in list(running):
            process.send_signal(signum)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    with ThreadPoolExecutor(places.qsize()) as pool:
        failures = [text for text in pool.map(lambda r: "" if stopped else train(r), runs) if text]
    for signum, handler in before.items():
        signal.signal(signum, handler)
    if stopped:
        raise UserError("stopped; the same command goes on from there")
    if failures:
        raise UserError("\n".join(failures))


def run_on_slurm(runs: Sequence[Run], argv: Sequence[str]) -> None:
    """Submit the runs as an array."""
    args = run_with_submitit.build_parser().parse_args(argv)
    make = run_with_submitit.Job
    jobs = [make(run.prepare(), str(run.outputs), run.settings["program"]) for run in runs]
    submitted = run_with_submitit.submit(args, jobs)
    for run, job in zip(runs, submitted, strict=True):
        print(f"{run}: job {job.job_id}, {job.paths.stdout}")
    print("when they are finished, the same command with --report writes tables and plots")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a user error or a run that failed."""
    head, *_, tail = __doc__.split("\n\n")
    parser = Parser("experiment.py", description=head.split(":")[0] + ".", epilog=tail)
    add = parser.add_argument
    add(
        "name",
        nargs="*",
        metavar="NAME",
        help=f"one or several of {', '.join(names())}; default: all but those for COCO",
    )
    add("--seeds", type=int, metavar="N", help="use the first N of the seeds")
    add("--jobs", type=int, metavar="N", help="runs at a time; default: one per GPU or core")
    add("--data", default="data", metavar="DIR", help="directory of the data sets (%(default)s)")
    add("--output_dir", default=ROOT, metavar="DIR", help="where to write (repository)")
    add("--report", action="store_true", help="train nothing, only write tables and plots")
    add("--slurm", action="store_true", help="submit; options of run_with_submitit.py may follow")
    add("--options", nargs="+", default=[], metavar="NAME=VALUE", help="for main.py, of every arm")
    try:
        args, rest = parser.parse_known_args(argv)
        if rest and not args.slurm:
            raise UserError(f"unknown arguments {' '.join(rest)}")
        root, folder = Path(args.output_dir).resolve(), Path(args.data).resolve()
        for name in args.name or names():
            experiment = load(name)
            if not args.name and (
                experiment.data == "coco" or not is_here(experiment.data, folder)
            ):
                reason = "name it to run it" if experiment.data == "coco" else "it is not there"
                print(f"{name}: left out: {folder / str(experiment.data)}: {reason}")
                continue
            data = find_data(experiment.data, folder, root)
            runs = list_runs(name, experiment, data, args.options, root)
            missing = [run for run in runs if not run.finished and not run.collect()]
            seeds = experiment.seeds[: args.seeds]
            missing = [run for run in missing if run.settings["seed"] in seeds]
            if args.slurm:
                run_on_slurm(missing, rest)
                continue
            if not args.report:
                print(f"{name}: {len(missing)} runs to go")
                run_here(missing, args.jobs, experiment.processes)
            finished = [run for run in runs if run.finished]
            print(write_results(name, experiment, finished, root / "results" / name))
        write_page(root)
    except (UserError, OSError) as e:
        print(f"experiment.py: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
