"""Times multi-scale deformable attention: our backends, grid_sample, and torch-ms-deform-attn.

    python benchmarks/bench_ms_deform_attn.py                 # on the CPU, OMP_NUM_THREADS threads
    python benchmarks/bench_ms_deform_attn.py --device cuda   # on a GPU, in fp32 and bf16

All implementations get the same tensors and must agree before they are timed. Repetitions are
interleaved, so that other load affects all of them equally; results are medians. The floor of a
variant is the time for the unavoidable bytes and operations at the machine's ceilings for copying
memory and for multiplying matrices with the variant's instructions, measured in the same run.

Locations: `near` is around the query's reference point, as in a trained model, with a standard
deviation of 4 pixels in each level; `anywhere` is uniform over the image.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from timeit import timeit

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.machine import describe_machine
from ops import ms_deform_attn, native

M, D, P = 8, 32, 4
PACKAGE = "torch-ms-deform-attn"
# What MKL may use in the matrix product of a variant's floor; for others, what it chooses.
MKL_INSTRUCTIONS = {"avx512": "AVX512", "avx2": "AVX2", "baseline": "SSE4_2"}
SMALL = ((60, 80), (30, 40), (15, 20), (8, 10))  # an image of 480 x 640
LARGE = ((100, 134), (50, 67), (25, 34), (13, 17))  # of 800 x 1066
# B, levels and Q of each shape; Q None: every pixel is a query, as in the encoder.
SHAPES = {
    "cpu": {"E: encoder": (1, SMALL, None), "Dc: decoder": (1, SMALL, 900)},
    "cuda": {"encoder": (2, LARGE, None), "decoder": (2, LARGE, 1100)},
}


def make_tensors(shape: tuple, where: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The op's five inputs and the gradient of its output."""
    torch.manual_seed(0)
    B, levels, Q = shape
    shapes = torch.tensor(levels)
    sizes = shapes.prod(1)
    L, S = len(levels), int(sizes.sum())
    value = torch.randn(B, S, M, D)
    locations = torch.rand(B, Q or S, M, L, P, 2)
    if where == "near":
        centres = torch.rand(B, Q or S, 2)
        if Q is None:
            axes = [[(torch.arange(n) + 0.5) / n for n in level] for level in levels]
            centres = torch.cat([torch.cartesian_prod(*yx).flip(-1) for yx in axes])[None]
        offsets = 4 * torch.randn_like(locations) / shapes.flip(-1)[:, None]
        locations = centres[:, :, None, None, None] + offsets
    weights = torch.rand(B, Q or S, M, L * P).softmax(-1).view(B, -1, M, L, P)
    tensors = value, locations, weights, torch.randn(B, Q or S, M * D)
    value, *others = (t.to(device, dtype) for t in tensors)
    return [value, shapes.to(device), (sizes.cumsum(0) - sizes).to(device), *others]


def by_grid_sample(value, spatial_shapes, level_start_index, locations, weights) -> Tensor:
    """The usual PyTorch implementation: one grid_sample per level, then a weighted sum."""
    B, _, M, D = value.shape
    levels = spatial_shapes.tolist()
    images = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in levels], dim=-1)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1).unbind(2)  # each (B * M, Q, P, 2)
    samples = [
        F.grid_sample(image.unflatten(-1, level), grid, align_corners=False)
        for image, level, grid in zip(images, levels, grids, strict=True)
    ]  # each (B * M, D, Q, P)
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(2)[:, None]  # (B * M, 1, Q, L * P)
    output = (torch.cat(samples, dim=-1) * weights).sum(-1)
    return output.view(B, M * D, -1).transpose(1, 2).contiguous()


def by_backend(name: str, *inputs: Tensor, variant: str = "") -> Tensor:
    os.environ |= {"MS_DEFORM_ATTN_BACKEND": name, "MS_DEFORM_ATTN_CPU": variant}
    return ms_deform_attn(*inputs)


def find_implementations(device: str) -> dict[str, Callable[..., Tensor]]:
    functions = {"grid_sample": by_grid_sample, "reference": partial(by_backend, "reference")}
    compiled = "cpp" if device == "cpu" else "cuda"
    try:
        native.load(compiled)
        for variant in native.cpu_variants() if compiled == "cpp" else [""]:
            name = f"{compiled} {variant}".strip()
            functions[name] = partial(by_backend, compiled, variant=variant)
    except native.Unavailable as problem:
        print(f"skipping {compiled}: {problem}")
    try:
        functions[PACKAGE] = importlib.import_module("torch_ms_deform_attn").ms_deform_attn
    except ImportError:
        print(f"skipping {PACKAGE}: not installed")
    return functions


def prepare(function: Callable, direction: str, tensors: list[Tensor]) -> Callable:
    """A call that returns a tuple: the output, or the gradients of value, locations, weights."""
    *inputs, grad = tensors
    if direction == "forward":
        return lambda: (function(*inputs),)
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    return lambda: torch.autograd.grad(function(*inputs), (inputs[0], *inputs[3:]), grad)


def disagreement(runs: dict[str, Callable]) -> float:
    """The maximum difference from the reference, relative to its maximum."""
    results = {name: run() for name, run in runs.items()}
    pairs = (zip(result, results["reference"], strict=True) for result in results.values())
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in itertools.chain(*pairs))
    # Kernels sum in a different order; in bf16, grid_sample and the package round elsewhere.
    allowed = 1e-4 if results["reference"][0].dtype == torch.float32 else 1e-1
    if not error <= allowed:
        raise SystemExit(f"the implementations disagree by {error:.1e}, more than {allowed}")
    return error


def milliseconds(run: Callable, device: str) -> float:
    if device == "cpu":
        return round(1e3 * timeit(run, number=1), 4)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def time_all(runs: dict[str, Callable], device: str, repetitions: int) -> dict[str, list[float]]:
    times = {name: [] for name in runs}
    for name, run in (3 + repetitions) * list(runs.items()):
        times[name].append(milliseconds(run, device))
    return {name: values[3:] for name, values in times.items()}  # without the three warm-ups


@functools.cache
def make_matrices(n: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(2, n, n, device=device).to(dtype)


def multiply(*matrices) -> None:
    a, b = make_matrices(*matrices)
    a @ b


def find_products(
    functions: dict[str, Callable], device: str, processes: ExitStack
) -> dict[str, Callable[..., None]]:
    """For each of our implementations, `multiply` with its instructions: on the CPU in a process of
    its own, which ends with `processes`, since MKL chooses when it is loaded."""
    if device == "cuda":
        return {"cuda": multiply}
    products = {}
    for name in functions:
        if name.startswith("cpp "):
            variant = name.removeprefix("cpp ")
            os.environ["MKL_ENABLE_INSTRUCTIONS"] = MKL_INSTRUCTIONS.get(variant, "")
            pool = processes.enter_context(multiprocessing.get_context("spawn").Pool(1))
            products[name] = lambda *matrices, pool=pool: pool.apply(multiply, matrices)
            products[name](2, torch.float32, device)
    os.environ.pop("MKL_ENABLE_INSTRUCTIONS", None)
    return products


def find_floor(
    tensors: list[Tensor], direction: str, device: str, repetitions: int, products: dict
) -> dict:
    """Bytes and multiply-adds of a call, and the time of an equivalent copy and matrix product, for
    each of `products`.

    Forward reads value, locations and weights, writes the output, and does one multiply-add for
    each of 4 pixels, sample and channel. Backward reads these three and the output's gradient,
    writes three gradients, and does two multiply-adds per forward one.
    """
    value, _, _, locations, weights, grad = tensors
    read, adds = value.numel() + locations.numel() + weights.numel(), 4 * weights.numel() * D
    moved = read + grad.numel()
    if direction != "forward":
        moved, adds = moved + 2 * read + grad.numel(), 3 * adds
    source, target = grad.new_ones(2, moved // 2)
    n = 1024 if device == "cpu" else 8192
    runs = {name: partial(product, n, grad.dtype, device) for name, product in products.items()}
    times = time_all({"copy": lambda: target.copy_(source), **runs}, device, repetitions)
    medians = {name: statistics.median(values) for name, values in times.items()}
    copy, n_bytes = medians.pop("copy"), moved * grad.element_size()
    arithmetic = {name: product * adds / n**3 for name, product in medians.items()}
    return {
        "bytes": n_bytes,
        "multiply_adds": adds,
        "bytes_per_s": 1e3 * n_bytes / copy,
        "multiply_adds_per_s": {name: 1e3 * n**3 / product for name, product in medians.items()},
        "floor_ms": {
            name: {"copy": copy, "product": product, "sum": copy + product}
            for name, product in arithmetic.items()
        },
    }


def peak_memory(function: Callable, shape: tuple) -> float:
    """MiB added by the first forward + backward of a new process; CPU, Linux."""
    peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    for case in ((1, ((2, 2),), None), shape):  # a tiny one first, for one-time allocations
        tensors = make_tensors(case, "anywhere", torch.float32, "cpu")
        run = prepare(function, "forward + backward", tensors)
        before = peak()
        run()
    return (peak() - before) / 1024


def measure(functions: dict[str, Callable], device: str, repetitions: int) -> list[dict]:
    """An entry for each shape, dtype, kind of locations and direction; prints them as rows."""
    print("| shape | type | locations | direction | implementation | ms | package / it", end="")
    print(" | floor: copy + product, ms | it / floor |")
    print("|---" * 9 + "|")
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
    cases = itertools.product(
        SHAPES[device], dtypes, ("near", "anywhere"), ("forward", "forward + backward")
    )
    entries = []
    with ExitStack() as processes:
        products = find_products(functions, device, processes)
        for shape, dtype, where, direction in cases:
            tensors = make_tensors(SHAPES[device][shape], where, dtype, device)
            runs = {name: prepare(f, direction, tensors) for name, f in functions.items()}
            error, times = disagreement(runs), time_all(runs, device, repetitions)
            medians = {name: statistics.median(values) for name, values in times.items()}
            entry = {"shape": shape, "dtype": str(dtype).removeprefix("torch.")}
            entry |= {"locations": where, "direction": direction, "median_ms": medians}
            entry |= {"times_ms": times, "largest_disagreement": error}
            entry |= find_floor(tensors, direction, device, repetitions, products)
            print_rows(entry)
            entries.append(entry)
    return entries


def print_rows(entry: dict) -> None:
    """A row for each implementation; ours have a floor."""
    case = " | ".join(entry[key] for key in ("shape", "dtype", "locations", "direction"))
    package = entry["median_ms"].get(PACKAGE, math.nan)
    for name, ms in entry["median_ms"].items():
        cells = [case, name, f"{ms:.2f}", f"{package / ms:.1f}"]
        if floor := entry["floor_ms"].get(name):
            cells.append(f"{floor['copy']:.2f} + {floor['product']:.2f} = {floor['sum']:.2f}")
            cells.append(f"{ms / floor['sum']:.1f}")
        else:
            cells += ["", ""]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repetitions", type=int, default=15, help="per median; at least 7")
    parser.add_argument("--output", type=Path, help="JSON file; default: in benchmarks/results")
    args = parser.parse_args()
    if args.repetitions < 7:
        parser.error("--repetitions must be at least 7")
    functions = find_implementations(args.device)
    package = importlib.metadata.version(PACKAGE) if PACKAGE in functions else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, PACKAGE: package}
    report = {"command": f"python {' '.join(sys.argv)}", "date": time.strftime("%Y-%m-%d")}
    report |= {"machine": describe_machine(args.device), "versions": versions}
    report["cases"] = measure(functions, args.device, args.repetitions)
    if args.device == "cpu":
        peaks = report["peak_MiB_forward_backward"] = {}
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for name, shape in SHAPES["cpu"].items():
                peaks[name] = {n: pool.apply(peak_memory, (f, shape)) for n, f in functions.items()}
                rounded = ", ".join(f"{n} {peak:.0f} MiB" for n, peak in peaks[name].items())
                print(f"peak memory of forward + backward, {name}: {rounded}")
    output = args.output or Path(__file__).parent / "results" / f"ms_deform_attn_{args.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report) + "\n")
    print(f"written: {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
