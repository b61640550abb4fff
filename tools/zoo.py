"""Trains all toy models, one after another, and prints the results as a Markdown table:

    python tools/zoo.py --coco_path outputs/toy_coco --output_dir outputs/zoo

`make zoo` generates the data set first. Interrupted runs are resumed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[1]
HEAD = "| model | config | M parameters | AP | AP50 | minutes | images/s |\n" + "| --- " * 7 + "|\n"


def row(name: str, lines: list[dict]) -> str:
    """A row of the table, from the lines of a run's log.txt."""
    last = lines[-1]
    ap, ap50, *_ = last["test_coco_eval_bbox"]
    times = (map(int, line["epoch_time"].split(":")) for line in lines)
    total = sum(60 * h + m + s / 60 for h, m, s in times)
    speed = fmean(line["train_images_per_second"] for line in lines)
    return (
        f"| `{name}` | `configs/toy/{name}.py` | {last['n_parameters'] / 1e6:.1f} | {ap:.3f} |"
        f" {ap50:.3f} | {total:.1f} | {speed:.0f} |\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser("zoo.py", description="Train all toy models, print a table.")
    parser.add_argument("--coco_path", required=True, metavar="DIR", help="toy data set")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="directory for the runs")
    args = parser.parse_args()
    table = HEAD
    for name in sorted(p.stem for p in (ROOT / "configs/toy").glob("*.py") if p.stem != "base"):
        out = Path(args.output_dir).resolve() / name
        config = ["-c", str(ROOT / f"configs/toy/{name}.py"), "--resume", "auto"]
        paths = ["--coco_path", str(Path(args.coco_path).resolve()), "--output_dir", str(out)]
        command = [sys.executable, str(ROOT / "main.py"), *config, *paths]
        if status := subprocess.run(command).returncode:
            return status
        table += row(name, [json.loads(line) for line in (out / "log.txt").open()])
    (Path(args.output_dir) / "table.md").write_text(table)
    print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
