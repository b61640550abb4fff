"""Train, evaluate or test a detector: `python main.py --help`."""

import logging
import re
import signal
import sys
from collections.abc import Sequence

from engine import NonFiniteLoss
from models.errors import UserError
from models.machine import choose_device
from trainer import check_only, evaluate_only, train
from util.config import parse_command_line
from util.distributed import (
    join_processes,
    leave_processes,
    rank,
    seed_everything,
    world_size,
)
from util.logging import setup_logging
from util.signals import Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 for a non-finite loss or a lost process; 2 for a user or file-system error;
    128 + its number for a stop signal."""
    setup_logging()
    argv = sys.argv[1:] if argv is None else list(argv)
    report = lambda text: print(f"main.py: {text}", file=sys.stderr)
    try:
        cfg = parse_command_line(argv)
        local_rank = join_processes(cfg.world_size, cfg.rank, cfg.dist_url, cfg.dist_timeout)
        if rank() > 0:
            logging.getLogger().setLevel(logging.WARNING)
        device = choose_device(cfg.device, local_rank)
        seed_everything(cfg.seed)
        if cfg.check_data:
            check_only(cfg)
        elif cfg.eval or cfg.test:
            evaluate_only(cfg, device)
        else:
            train(cfg, device, argv)
    except (UserError, OSError) as e:  # an OSError names its file
        report(f"error: {e}")
        return 2
    except NonFiniteLoss as e:
        report(f"stopped: {e}")
        return 1
    except Stopped as e:
        hint = "; --resume auto continues from there" if cfg.output_dir else ""
        report(f"stopped by {e}{hint}")
        return 128 + (e.signum or signal.SIGTERM)
    except RuntimeError as e:
        if lost := lost_process(e):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # do not report further workers
            report(f"stopped: {lost}: {str(e).splitlines()[0]}")
            return 1
        raise
    finally:
        leave_processes()
    return 0


def lost_process(error: RuntimeError) -> str | None:
    """The process loss that `error` is about, if it is about one."""
    if "DataLoader worker" in str(error):
        return "a data-loading worker died"
    if world_size() > 1 and re.search(r"gloo|NCCL|Connection|Timed out|peer", str(error)):
        return f"process {rank()} lost contact with another process, which died or hangs"
    return None


if __name__ == "__main__":
    sys.exit(main())
