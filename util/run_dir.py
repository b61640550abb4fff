"""The output directory of a run: created, locked, cleared, and searched for a checkpoint."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shlex
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from models import report
from models.errors import UserError
from util.checkpoint import latest_checkpoint
from util.config import Config
from util.distributed import on_rank0

logger = logging.getLogger(__name__)

RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # above 0 after a restart


def prepare_output_dir(cfg: Config, argv: Sequence[str] | None = None) -> Path | None:
    """Create the output directory, if one is given, and that of the report; with `argv`, save
    config and command in the former."""
    if cfg.eval_report:
        report.prepare(cfg.eval_report)
    if not cfg.output_dir:
        return None
    path = Path(cfg.output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if argv is not None:
            (path / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
            with open(path / "command.txt", "a") as file:
                file.write(shlex.join(["python", "main.py", *argv]) + "\n")
    except OSError as e:
        raise UserError(f"output_dir: {path} cannot be written: {e.strerror}") from e
    return path


@contextlib.contextmanager
def claimed(output_dir: Path | None) -> Iterator[None]:
    """Hold the output directory's lock, which the operating system releases however the process
    ends. UserError if another run holds it."""
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            file = stack.enter_context(open(output_dir / "run.lock", "a+"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by data workers
            except (BlockingIOError, PermissionError):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"output_dir: {output_dir} is in use by {holder}; use another directory"
                ) from None
            except OSError as e:  # some network file systems do not support locks
                problem = f"{output_dir} cannot be locked ({e.strerror})"
                logger.warning("%s: make sure that no other run uses it", problem)
            with contextlib.suppress(OSError):  # if the disk is full, saving will report it
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()

        if output_dir:
            on_rank0(claim)
        yield


def should_overwrite(cfg: Config) -> bool:
    """Whether to delete the run in the output directory; not if this is that run, restarted."""
    return cfg.overwrite and not any(int(os.environ.get(name) or 0) for name in RESTARTS)


def remove_run(output_dir: Path) -> None:
    """Delete a run's checkpoints and logs."""
    logs = "log.txt", "log.csv", "loggers.json", "events.out.tfevents.*"
    for pattern in ("checkpoint*.pth", *logs):
        for path in output_dir.glob(pattern):
            path.unlink(missing_ok=True)


def find_resume(cfg: Config, training: bool = False) -> str:
    """The file or URL of the checkpoint to load: --resume, the newest if that is auto, or "". As in
    DINO's code, training resumes the run in the output directory whatever --resume says, unless
    --resume names another checkpoint of that run or --overwrite discards it."""
    auto, output_dir = cfg.resume == "auto", Path(cfg.output_dir)
    if auto and not cfg.output_dir:
        raise UserError("resume: auto needs --output_dir")
    is_own = bool(cfg.resume) and output_dir.resolve() == Path(cfg.resume).parent.resolve()
    if training and should_overwrite(cfg):
        if is_own:
            raise UserError(f"overwrite: would remove {cfg.resume}; use another --output_dir")
        return cfg.resume
    if not auto and (is_own or not training or not cfg.output_dir):
        return cfg.resume
    path, state = latest_checkpoint(output_dir) or (None, {})
    if auto:
        logger.info("resume: %s", path or "no checkpoint found, starting from scratch")
        return str(path or "")
    if path is None:
        return cfg.resume
    how = f"after epoch {state.get('epoch')}" + (f" instead of {cfg.resume}" if cfg.resume else "")
    message = "output_dir: %s contains a run; resuming it %s; --overwrite starts over"
    logger.warning(message, output_dir, how)
    return str(path)
