"""One side of bench_step.py, in its own process, as two sides have modules of the same names and
memory is counted by process.

    python benchmarks/step_worker.py JOB       # JSON; see bench_step.py

Answers each line of standard input with a line of JSON: "run" takes one step and times it, "finish"
reports memory and, for this repository, FLOPs.
"""

import importlib
import json
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from time import process_time

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import count_flops, flops_by_kind, memory, random_batch
from models.machine import seconds


def ours(job: dict) -> Callable[[], Callable]:
    """Imports this repository; returns what builds the model and returns a step."""
    from benchmarks.steps import make_step
    from models.machine import choose_device
    from util.config import parse_command_line

    cfg, device = parse_command_line(job["options"]), choose_device(job["device"])
    return lambda: make_step(job["mode"], cfg, device, job["size"], job["objects"])[1]


BUILDERS = {
    "dino": "build_dino",
    "dn_dab_detr": "build_DABDETR",
    "dn_dab_deformable_detr": "build_dab_deformable_detr",
}


def released(job: dict) -> Callable[[], Callable]:
    """The same for a checkout of DINO or DN-DETR, on the CPU, without main.py and engine.py, which
    import much that is not needed. Deformable attention is its own in PyTorch."""
    sys.path[:2] = [job["released"]]  # instead of this repository and this folder
    warnings.simplefilter("ignore")  # about functions of old versions
    torchvision.__version__ = "0.9"  # they compare its first three characters with 0.7
    sys.modules["MultiScaleDeformableAttention"] = types.ModuleType("compiled")
    to, on_cpu = torch.Tensor.to, lambda x: "cpu" if isinstance(x, str) else x
    torch.Tensor.to = lambda self, *args, **kwargs: to(self, *map(on_cpu, args), **kwargs)
    torch.Tensor.cuda = lambda self: self
    misc = importlib.import_module("util.misc")
    misc.is_main_process = lambda: False  # which downloads no backbone
    models = importlib.import_module("models")
    for name in [name for name in sys.modules if name.endswith("ms_deform_attn_func")]:
        run_in_pytorch(sys.modules[name])

    def build() -> Callable:
        args = types.SimpleNamespace(**job["values"])
        torch.manual_seed(args.seed)
        model, criterion, postprocess = getattr(models, BUILDERS[args.modelname])(args)
        images, targets = random_batch(job["images"], job["size"], job["objects"], 91)
        samples, parameters = misc.nested_tensor_from_tensor_list(images), [[], []]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameters["backbone" in name].append(parameter)
        groups = [{"params": parameters[0]}, {"params": parameters[1], "lr": args.lr_backbone}]
        optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
        sizes, is_dino = torch.stack([t["orig_size"] for t in targets]), args.modelname == "dino"
        noise = args.scalar, args.label_noise_scale, args.box_noise_scale, args.num_patterns

        def train() -> None:
            if is_dino:
                losses = criterion(model(samples, targets), targets)
            else:
                outputs, denoising = model(samples, dn_args=(targets, *noise))
                losses = criterion(outputs, targets, denoising)
            weights = criterion.weight_dict
            loss = sum(losses[name] * weights[name] for name in losses if name in weights)
            loss.item()  # for its log
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_max_norm)
            optimizer.step()

        @torch.no_grad()
        def evaluate() -> None:
            outputs = model(samples) if is_dino else model(samples, dn_args=args.num_patterns)[0]
            postprocess["bbox"](outputs, sizes)

        model.train(job["mode"] == "train")
        return train if model.training else evaluate

    return build


def run_in_pytorch(module: types.ModuleType) -> None:
    core = module.ms_deform_attn_core_pytorch
    apply = lambda value, shapes, _, locations, weights, __: core(value, shapes, locations, weights)
    module.MSDeformAttnFunction.apply = apply


def main() -> None:
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    build = (released if job["released"] else ours)(job)
    device = torch.device(job["device"])
    before, _ = memory(device)
    step = build()
    answer: dict = {}  # that it is built
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        command = sys.stdin.readline().strip()
        if command == "run":
            cpu_start, start = process_time(), seconds(device)
            step()
            end, cpu_end = seconds(device), process_time()
            answer = {"ms": 1e3 * (end - start), "cpu_ms": 1e3 * (cpu_end - cpu_start)}
        elif command == "finish":
            answer = {"peak_MiB": (memory(device)[1] - before) / 2**20}
            if not job["released"]:
                with torch.compiler.set_stance("force_eager"), count_flops() as counter:
                    step()
                answer["flops"] = flops_by_kind(counter)
        else:
            return


if __name__ == "__main__":
    main()
