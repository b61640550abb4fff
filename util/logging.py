"""What a run reports: progress, averages, log.txt and TensorBoard files."""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from models.errors import UserError
from models.machine import peak_memory_mb
from util.loggers import Service

logger = logging.getLogger(__name__)


def setup_logging() -> None:
    """Send messages to stdout, above the progress bar if there is one."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Handler()], force=True)


class Averages:
    """Means over an epoch, each value weighted by the number of images it covers."""

    def __init__(self, sums: Mapping[str, float] = {}, weights: Mapping[str, float] = {}):
        self.sums, self.weights = Counter(sums), Counter(weights)  # by name

    def update(self, values: dict[str, float], weight: float = 1.0) -> None:
        self.sums.update({name: weight * value for name, value in values.items()})
        self.weights.update(dict.fromkeys(values, weight))

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"sums": dict(self.sums), "weights": dict(self.weights)}

    def join(self, parts: Sequence[dict[str, dict[str, float]]]) -> None:
        """Replace the contents by the `state_dict`s of several averages, merged."""
        self.sums, self.weights = Counter(), Counter()
        for part in parts:
            self.sums.update(part["sums"])
            self.weights.update(part["weights"])

    def means(self) -> dict[str, float]:
        return {name: total / self.weights[name] for name, total in self.sums.items()}


class ProgressBar:
    """Iterates over `total` items: a bar on a terminal, elsewhere a line every `interval` seconds.
    The caller counts `images` and sets `note`, which is shown with speed, time left and memory."""

    def __init__(self, items: Iterable, title: str, total: int, interval: float = 20.0):
        self.items, self.title, self.total, self.interval = items, title, total, interval
        self.note = ""
        self.images = 0
        self.start = time.perf_counter()

    def __iter__(self) -> Iterator:
        bar = None
        if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
            bar = tqdm(total=self.total, desc=self.title, leave=False, dynamic_ncols=True)
        shown = self.start
        for done, item in enumerate(self.items, 1):
            yield item
            if bar:
                bar.set_postfix_str(f"{self.note}  {self.images_per_second:.1f} images/s")
                bar.update()
            elif time.perf_counter() - shown > self.interval or done == self.total:
                shown = time.perf_counter()
                left = timedelta(seconds=int((shown - self.start) / done * (self.total - done)))
                logger.info(
                    f"{self.title}  {done}/{self.total}  {self.note}  {self.images_per_second:.1f} "
                    f"images/s  left {left}  memory {peak_memory_mb():.0f} MB"
                )
            if done == self.total:
                break
        if bar:
            bar.close()

    @property
    def images_per_second(self) -> float:
        return self.images / (time.perf_counter() - self.start)


class RunLog:
    """Writes log.txt, one JSON line per epoch with the released keys, and the same to TensorBoard
    and `services`. Removes lines from `first_epoch` on, left by an earlier process: these epochs
    are redone."""

    def __init__(
        self, output_dir: str | Path, first_epoch: int = 0, services: Sequence[Service] = ()
    ):
        from torch.utils.tensorboard import SummaryWriter  # only runs that are saved need it

        self.path, self.services = Path(output_dir) / "log.txt", services
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if is_before(line, first_epoch)]
            if kept != lines:
                temporary = self.path.with_name(".log.txt.tmp")
                temporary.write_text("".join(kept))
                temporary.replace(self.path)
        self.writer = SummaryWriter(str(output_dir), purge_step=first_epoch)

    def write(self, stats: dict) -> None:
        """UserError if the file cannot be written."""
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(stats) + "\n")
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written: {e.strerror}") from e
        scalars: dict[str, float] = {}
        for name, value in stats.items():
            if isinstance(value, list) and value:  # COCO's figures, AP and AP50 first
                scalars |= {f"{name}/AP": value[0], f"{name}/AP50": value[1]}
            elif isinstance(value, int | float):
                scalars[name] = value
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, stats["epoch"])
        self.writer.flush()
        for service in self.services:
            try:
                service.log(scalars, stats["epoch"])
            except Exception as e:  # a service that is away must not end the training
                logger.warning("logger: %s lacks epoch %d: %s", service.name, stats["epoch"], e)

    def close(self) -> None:
        self.writer.close()
        for service in self.services:
            service.close()


def is_before(line: str, epoch: int) -> bool:
    """Whether a line of log.txt is complete and of an earlier epoch."""
    try:
        return line.endswith("\n") and json.loads(line)["epoch"] < epoch
    except (ValueError, KeyError, TypeError):
        return False
