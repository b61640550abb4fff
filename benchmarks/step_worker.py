"""One side of bench_step.py, in its own process, as two sides have modules of the same names and
memory is counted by process.

    python benchmarks/step_worker.py JOB       # JSON; see `main` of bench_step.py

Answers each line of standard input with a line of JSON: "run" takes one step and times it, "finish"
reports memory and, for this repository, FLOPs.
"""

import json
import os
import re
import sys
import types
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import count_flops, flops_by_kind, milliseconds, random_batch


def ours(job: dict) -> Callable[[], Callable]:
    """Imports this repository; returns what builds the model and returns a step."""
    from engine import autocast, to_device, train_steps
    from models import build_model
    from models.class_map import ClassMap
    from models.nested_tensor import nested_tensor_from_tensor_list
    from train_state import TrainState
    from util.config import parse_command_line
    from util.distributed import choose_device, seed_everything

    cfg, device = parse_command_line(job["options"]), choose_device(job["device"])

    def build() -> Callable:
        seed_everything(cfg.seed)
        model, criterion, postprocess = build_model(cfg)
        classes = ClassMap.identity([{"id": i} for i in range(cfg.num_labels)], cfg.num_labels)
        state = TrainState(cfg, model.to(device), classes)
        images, targets = random_batch(job["images"], job["size"], job["objects"], cfg.num_labels)
        batch = nested_tensor_from_tensor_list(images), targets
        if job["mode"] == "train":
            steps = train_steps(state, model, criterion, repeat(batch))
            return lambda: next(steps)
        model.eval().requires_grad_(False)  # FlopCounterMode's hooks fail under no_grad otherwise

        @torch.no_grad()
        def evaluate() -> None:
            images, targets = to_device(batch, device)
            with autocast(device, cfg):
                outputs = model(images)
            postprocess(outputs, torch.stack([t["orig_size"] for t in targets]).to(device))

        return evaluate

    return build


def released(job: dict) -> Callable[[], Callable]:
    """The same of a checkout of DN-DETR or DINO, on the CPU. Options that exist there under the
    same name get our values; its deformable attention is its own one in PyTorch."""
    sys.path[:] = [job["released"], *sys.path[2:]]  # without this repository
    os.chdir(job["released"])
    torchvision.__version__ = "0.9.0"  # of which they compare three characters with 0.7
    sys.modules["MultiScaleDeformableAttention"] = types.ModuleType("compiled")
    to = torch.Tensor.to
    on_cpu = lambda x: "cpu" if isinstance(x, str) and x == "cuda" else x
    torch.Tensor.to = lambda self, *args, **kwargs: to(self, *map(on_cpu, args), **kwargs)
    torch.Tensor.cuda = lambda self: self
    import util.misc

    util.misc.is_main_process = lambda: False  # which loads no pretrained backbone
    import engine
    import main

    for name, module in list(sys.modules.items()):
        if name.endswith("ms_deform_attn_func"):
            core = module.ms_deform_attn_core_pytorch
            forward = lambda value, shapes, starts, *rest, f=core: f(value, shapes, *rest[:2])
            module.MSDeformAttnFunction.apply = forward

    def build() -> Callable:
        values = job["values"]
        parser = main.get_args_parser()
        if (config := Path("config/DINO/DINO_4scale.py")).exists():
            from util.slconfig import SLConfig

            args = parser.parse_args(["-c", str(config)])
            vars(args).update(SLConfig.fromfile(str(config))._cfg_dict.to_dict())
        else:
            args = parser.parse_args(["-m", values["modelname"], "--coco_path", ""])
        vars(args).update({k: v for k, v in values.items() if k in vars(args)})
        args.use_ema = args.onecyclelr = args.amp = False
        torch.manual_seed(args.seed)
        model, criterion, postprocess = main.build_model_main(args)
        images, targets = random_batch(job["images"], job["size"], job["objects"], 91)
        samples = util.misc.nested_tensor_from_tensor_list(images)
        if job["mode"] == "train":
            groups: tuple[list, list] = [], []
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups["backbone" in name].append(parameter)
            rates = [{"params": groups[0]}, {"params": groups[1], "lr": args.lr_backbone}]
            optimizer = torch.optim.AdamW(rates, lr=args.lr, weight_decay=args.weight_decay)
            loop = model, criterion, [(samples, targets)], optimizer, torch.device("cpu"), 0
            return lambda: engine.train_one_epoch(*loop, args.clip_max_norm, args=args)
        model.eval()
        is_dn_detr = "dn_args" in type(model).forward.__code__.co_varnames
        sizes = torch.stack([t["orig_size"] for t in targets])

        @torch.no_grad()
        def evaluate() -> None:
            if is_dn_detr:
                outputs, _ = model(samples, dn_args=args.num_patterns)
            else:
                outputs = model(samples)
            postprocess["bbox"](outputs, sizes)

        return evaluate

    return build


def resident(what: str) -> int:
    """This process's VmRSS, or its peak VmHWM, in bytes; Linux."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    build = (released if job["released"] else ours)(job)
    device, before = torch.device(job["device"]), resident("VmRSS")
    step = build()
    answer: dict = {}  # that it is built
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        command = sys.stdin.readline().strip()
        if command == "run":
            answer = {"ms": milliseconds(step, device)}
        elif command == "finish":
            on_gpu = device.type == "cuda"
            peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - before
            answer = {"peak_MiB": peak / 2**20}
            if not job["released"]:
                with torch.compiler.set_stance("force_eager"), count_flops() as counter:
                    step()
                answer["flops"] = flops_by_kind(counter)
        else:
            return


if __name__ == "__main__":
    main()
