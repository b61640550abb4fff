"""Times multi-scale deformable attention: our backends, grid_sample, and torch-ms-deform-attn.

    python benchmarks/bench_ms_deform_attn.py                 # on the CPU
    python benchmarks/bench_ms_deform_attn.py --device cuda   # on a GPU, in fp32 and bf16

Every contestant gets the same tensors, and all must agree before any is timed. Repetitions are
interleaved, so that whatever else the machine does meets all alike; a time is their median. The
machine's ceilings, copying memory and multiplying matrices, are measured in the same run: bytes and
operations that no implementation can avoid, at these rates, are the floor.

The two sets of locations: `near` has each query look around its reference point, as a trained model
does, at a spread of 4 pixels of each level; `anywhere` is uniform over the image.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from ops import ms_deform_attn, native

M, D, P = 8, 32, 4
PACKAGE = "torch-ms-deform-attn"


@dataclass(frozen=True)
class Shape:
    name: str
    B: int
    levels: tuple[tuple[int, int], ...]
    Q: int | None = None  # None: every pixel is a query, as in the encoder

    @property
    def S(self) -> int:
        return sum(height * width for height, width in self.levels)


SMALL = ((60, 80), (30, 40), (15, 20), (8, 10))  # an image of 480 x 640
LARGE = ((100, 134), (50, 67), (25, 34), (13, 17))  # of 800 x 1066
SHAPES = {
    "cpu": [Shape("E: encoder", 1, SMALL), Shape("Dc: decoder", 1, SMALL, 900)],
    "cuda": [Shape("encoder", 2, LARGE), Shape("decoder", 2, LARGE, 1100)],
}


def make_inputs(shape: Shape, near: bool, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The op's five inputs; the floating ones ask for gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.tensor(shape.levels)
    sizes = shapes.prod(1)
    L, Q = len(shapes), shape.Q or shape.S
    value = torch.randn(shape.B, shape.S, M, D, generator=generator)
    if near and shape.Q is None:
        grids = [
            torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
            for h, w in shape.levels
        ]
        centres = [(grid.flip(-1) + 0.5) / torch.tensor(grid.shape[1::-1]) for grid in grids]
        centres = torch.cat([c.flatten(0, 1) for c in centres]).expand(shape.B, -1, -1)
    else:
        centres = torch.rand(shape.B, Q, 2, generator=generator)
    size = (shape.B, Q, M, L, P, 2)
    if near:
        offsets = 4 * torch.randn(size, generator=generator) / shapes.flip(-1)[:, None]
        locations = centres[:, :, None, None, None] + offsets
    else:
        locations = torch.rand(size, generator=generator)
    weights = torch.rand((*size[:3], L * P), generator=generator).softmax(-1).view(size[:5])
    value, locations, weights = (
        t.to(device, dtype).requires_grad_() for t in (value, locations, weights)
    )
    return [value, shapes.to(device), (sizes.cumsum(0) - sizes).to(device), locations, weights]


def by_grid_sample(value, spatial_shapes, level_start_index, locations, weights) -> Tensor:
    """The usual PyTorch form: one grid_sample for each level, then a weighted sum."""
    del level_start_index
    B, _, M, D = value.shape
    levels = spatial_shapes.tolist()
    images = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in levels], dim=-1)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * M, Q, L, P, 2)
    samples = [
        F.grid_sample(image.unflatten(-1, level), grids[:, :, i], align_corners=False)
        for i, (image, level) in enumerate(zip(images, levels, strict=True))
    ]  # each (B * M, D, Q, P)
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(2)[:, None]  # (B * M, 1, Q, L * P)
    output = (torch.cat(samples, dim=-1) * weights).sum(-1)
    return output.view(B, M * D, -1).transpose(1, 2).contiguous()


def with_backend(name: str) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        os.environ["MS_DEFORM_ATTN_BACKEND"] = name
        return ms_deform_attn(*inputs)

    return run


def find_contestants(device: str) -> dict[str, Callable[..., Tensor]]:
    contestants = {"grid_sample": by_grid_sample, "reference": with_backend("reference")}
    compiled = "cpp" if device == "cpu" else "cuda"
    try:
        native.load(compiled)
        contestants[compiled] = with_backend(compiled)
    except native.Unavailable as problem:
        print(f"{compiled} is left out: {problem}")
    try:
        from torch_ms_deform_attn import ms_deform_attn as package

        contestants[PACKAGE] = package
    except ImportError:
        print(f"{PACKAGE} is left out: not installed")
    return contestants


def forward(function: Callable, inputs: list[Tensor]) -> Callable[[], Tensor]:
    inputs = [t.detach() for t in inputs]
    return lambda: function(*inputs)


def forward_backward(function: Callable, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    value, _, _, locations, weights = inputs
    size = value.shape[0], locations.shape[1], M * D
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(size, generator=generator).to(value)
    return lambda: torch.autograd.grad(function(*inputs), (value, locations, weights), grad)


DIRECTIONS = {"forward": forward, "forward + backward": forward_backward}


def disagreement(runs: dict[str, Callable]) -> float:
    """The largest difference from the reference, as a fraction of its largest number."""
    results = {name: run() for name, run in runs.items()}
    as_tuple = {n: r if isinstance(r, tuple) else (r,) for n, r in results.items()}
    return max(
        ((a - b).abs().max() / b.abs().max()).item()
        for result in as_tuple.values()
        for a, b in zip(result, as_tuple["reference"], strict=True)
    )


def milliseconds(run: Callable, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return round(1e3 * (time.perf_counter() - start), 4)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def time_all(runs: dict[str, Callable], device: str, repetitions: int) -> dict[str, list[float]]:
    for run in runs.values():
        for _ in range(3):
            run()
    times = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            times[name].append(milliseconds(run, device))
    return times


def unavoidable(inputs: list[Tensor], direction: str) -> tuple[int, int]:
    """Bytes read and written once, and multiply-adds, of one call.

    Forward reads value, locations and weights and writes the output; one multiply-add for each of
    4 pixels, sample and channel. Backward reads the three and the output's gradient, writes three
    gradients, and needs two multiply-adds where forward needs one.
    """
    value, _, _, locations, weights = inputs
    size = value.element_size()
    read = value.numel() + locations.numel() + weights.numel()
    output = value.shape[0] * locations.shape[1] * M * D
    adds = 4 * weights.numel() * D
    if direction == "forward":
        return size * (read + output), adds
    return size * (read + output + read + output + read), 3 * adds


def measure_ceilings(n_bytes: int, dtype: torch.dtype, device: str, repetitions: int) -> dict:
    """Bytes a second of a copy that moves n_bytes, multiply-adds a second of a matrix product."""
    source = torch.ones(n_bytes // 2 // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    runs = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = time_all(runs, device, repetitions)
    copy, product = (1e-3 * statistics.median(times[name]) for name in runs)
    return {"bytes_per_s": n_bytes / copy, "multiply_adds_per_s": n**3 / product}


def peak_memory(name: str, shape: Shape) -> float:
    """MiB that the first forward + backward of a fresh process adds on the CPU."""
    small = make_inputs(Shape("warm-up", 1, ((2, 2),)), False, torch.float32, "cpu")
    function = find_contestants("cpu")[name]
    forward_backward(function, small)()
    run = forward_backward(function, make_inputs(shape, False, torch.float32, "cpu"))
    before = peak_of_process()
    run()
    return peak_of_process() - before


def peak_of_process() -> float:
    """MiB of memory that this process has held at most; Linux."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def peak_memory_in_process(name: str, index: int) -> float:
    command = [sys.executable, __file__, "--peak", name, str(index)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def describe_machine(device: str) -> dict:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory
        name = properties.name
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_GiB": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found[PACKAGE] = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        found[PACKAGE] = None
    return found


def measure(device: str, repetitions: int) -> list[dict]:
    """One entry for each shape, type, set of locations and direction; prints a row for each."""
    contestants = find_contestants(device)
    print(f"| shape | type | locations | direction | {' | '.join(contestants)} | floor | ours is |")
    print("|---" * (6 + len(contestants)) + "|")
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
    entries = []
    for shape in SHAPES[device]:
        for dtype in dtypes:
            for near in (True, False):
                inputs = make_inputs(shape, near, dtype, device)
                for direction, prepare in DIRECTIONS.items():
                    runs = {name: prepare(f, inputs) for name, f in contestants.items()}
                    entries.append(
                        {
                            "shape": shape.name,
                            "dtype": str(dtype).removeprefix("torch."),
                            "locations": "near" if near else "anywhere",
                            "direction": direction,
                            **measure_one(runs, inputs, direction, device, repetitions),
                        }
                    )
                    print_row(entries[-1])
    return entries


def measure_one(runs, inputs, direction, device, repetitions) -> dict:
    error = disagreement(runs)
    # The kernels add in another order, in bf16 grid_sample and the package round in other places.
    allowed = 1e-4 if inputs[0].dtype == torch.float32 else 1e-1
    if not error <= allowed:
        raise SystemExit(f"the contestants disagree by {error:.1e}, more than {allowed}")
    times = time_all(runs, device, repetitions)
    n_bytes, multiply_adds = unavoidable(inputs, direction)
    ceilings = measure_ceilings(n_bytes, inputs[0].dtype, device, repetitions)
    moving = 1e3 * n_bytes / ceilings["bytes_per_s"]
    adding = 1e3 * multiply_adds / ceilings["multiply_adds_per_s"]
    return {
        "median_ms": {name: statistics.median(values) for name, values in times.items()},
        "times_ms": times,
        "largest_disagreement": error,
        "bytes": n_bytes,
        "multiply_adds": multiply_adds,
        "ceilings": ceilings,
        "floor_ms": {"bytes": moving, "multiply_adds": adding, "sum": moving + adding},
    }


def print_row(entry: dict) -> None:
    medians = entry["median_ms"]
    ours = medians.get("cpp") or medians.get("cuda")
    said = []
    if ours:
        said.append(f"{ours / entry['floor_ms']['sum']:.1f} x floor")
        said.append(f"{entry['bytes'] / ours / 1e6:.0f} GB/s")
    if ours and PACKAGE in medians:
        said.append(f"{medians[PACKAGE] / ours:.1f} x as fast as the package")
    cells = [entry[key] for key in ("shape", "dtype", "locations", "direction")]
    cells += [f"{ms:.2f} ms" for ms in medians.values()]
    print(f"| {' | '.join(cells)} | {entry['floor_ms']['sum']:.2f} ms | {', '.join(said)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repetitions", type=int, default=15, help="of each time; at least 7")
    parser.add_argument("--threads", type=int, help="of the CPU; default: what torch takes")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # of a child process
    args = parser.parse_args()
    if args.peak:
        print(peak_memory(args.peak[0], SHAPES["cpu"][int(args.peak[1])]))
        return
    if args.repetitions < 7:
        parser.error("--repetitions must be at least 7")
    if args.threads:
        torch.set_num_threads(args.threads)
    report = {
        "command": f"python {' '.join(sys.argv)}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(args.device),
        "versions": versions(),
        "cases": measure(args.device, args.repetitions),
    }
    if args.device == "cpu":
        report["peak_MiB_forward_backward"] = {
            shape.name: {
                name: peak_memory_in_process(name, index) for name in find_contestants("cpu")
            }
            for index, shape in enumerate(SHAPES["cpu"])
        }
        for name, peaks in report["peak_MiB_forward_backward"].items():
            rounded = ", ".join(f"{key} {peak:.0f} MiB" for key, peak in peaks.items())
            print(f"peak memory of forward + backward, {name}: {rounded}")
    output = args.output or Path(__file__).parent / "results" / f"ms_deform_attn_{args.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report) + "\n")
    print(f"written: {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
