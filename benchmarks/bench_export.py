"""Size, largest difference and latency of exported detectors:

    python benchmarks/bench_export.py dino_4scale_r50 toy/dino --size 480 640

Each config's detector, with random weights, is exported for one image of this size, as `dn-dino
export` does it; the rows are a Markdown table.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import build_model, load_detector
from models.build import read_config
from models.errors import UserError
from models.export import FORMATS, Target, export_detector
from models.machine import describe_machine
from models.options import DetectorOptions

COLUMNS = ["detector ms", "onnxruntime ms", "OpenVINO ms", "torch.export ms"]


def main() -> None:
    parser = argparse.ArgumentParser("bench_export.py", description="Export detectors, time them.")
    parser.add_argument("configs", nargs="+", metavar="NAME", help="configs, without .py")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("H", "W"))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    args = parser.parse_args()
    print(f"{describe_machine('cpu')['name']}, {torch.get_num_threads()} threads, {args.size}\n")
    print("| config | format | MB | largest difference |", " | ".join(COLUMNS), "|")
    print("|---" * (4 + len(COLUMNS)) + "|")
    for name in args.configs:
        torch.manual_seed(0)
        config = read_config(name) | {"pretrained_backbone": False}
        model, _, _ = build_model(DetectorOptions.of(config))
        for weight in model.parameters():  # offsets and the last layers of heads start at zero
            weight.data += 0.02 * torch.randn_like(weight)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint.pth"
            torch.save({"config": config, "model": model.state_dict()}, checkpoint)
            del model
            detector = load_detector(checkpoint)
            for kind in args.formats:
                file = checkpoint.with_suffix(FORMATS[kind])
                target = Target(kind, size=tuple(args.size), batch_size=1)
                try:
                    figures = export_detector(detector, checkpoint, file, target)
                except UserError as error:
                    print(f"| {name} | {kind} | {error} |", flush=True)
                    continue
                times = [f"{figures[c]:.0f}" if c in figures else "-" for c in COLUMNS]
                head = f"{file.stat().st_size / 1e6:.1f} | {figures['difference']:.1e}"
                print(f"| {name} | {kind} | {head} |", " | ".join(times), "|", flush=True)


if __name__ == "__main__":
    main()
