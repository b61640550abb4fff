"""A training step on a GPU waits for it only where the host has to know a value.

This needs no GPU: the tensors on "cuda" are fake ones, which have a shape but no values. All others
are real, so that a whole step runs, except for its backward pass.
"""

import traceback
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import train_steps
from models import build_model
from models.class_map import ClassMap
from models.nested_tensor import NestedTensor
from train_state import TrainState
from util.config import load_config

ROOT = Path(__file__).resolve().parent.parent
DIRECTORIES = {ROOT, *(ROOT / name for name in ("models", "ops", "util", "tests"))}
aten = torch.ops.aten


class FakeGPU(TorchDispatchMode):
    """Runs operators on "cuda" without values, and lists in `waits` the lines of this project where
    the host would wait for the GPU: for values, which are ones, or for a copy to it."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        devices = [x.device if isinstance(x, FakeTensor) else x for x in leaves]
        if not any(isinstance(x, torch.device) and x.type == "cuda" for x in devices):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.note()
            return 1.0 if args[0].is_floating_point() else 1
        with self.fake:
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not result.is_cuda:
            self.note()
            return torch.ones(result.shape, dtype=result.dtype)
        is_copy = func in (aten._to_copy.default, aten.copy_.default)
        from_host = is_copy and not args[func is aten.copy_.default].is_cuda
        if from_host and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            self.note()
        return result

    def note(self) -> None:
        stack = traceback.extract_stack()[:-2]
        stack = [
            f for f in stack if Path(f.filename).parent in DIRECTORIES and f.name != "<lambda>"
        ]
        self.waits.append(f"{Path(stack[-1].filename).name}: {stack[-1].line}")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)  # there need not be a driver
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: x.cpu().tolist())
    return FakeGPU()


def put_on_gpu(model: nn.Module) -> None:
    """Replace parameters and buffers by fake ones."""
    memo: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in memo:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    memo[tensor] = (
                        nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                    )
                tensors[name] = memo.get(tensor)


def test_waits_are_found(gpu: FakeGPU):
    with gpu:
        x = torch.zeros(3, device="cuda")
        torch.zeros(2).to("cuda", non_blocking=True)
        assert gpu.waits == []
        assert x.tolist() == [1, 1, 1]
        x.sum().item()
        x.copy_(torch.zeros(3))
        assert len(gpu.waits) == 3
        assert gpu.waits[1] == "test_host_transfers.py: x.sum().item()"
        with pytest.raises(DynamicOutputShapeException):
            x[x > 0]


TOY = [path.stem for path in (ROOT / "configs/toy").glob("d*.py")]


# Not torchvision's Faster R-CNN, which reads from the GPU for each image.
@pytest.mark.parametrize("name", [name for name in TOY if "rcnn" not in name])
def test_training_step_waits_twice(name: str, gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch):
    options = {"num_classes": 3, "use_ema": True, "accumulate": 2}
    cfg = load_config(ROOT / f"configs/toy/{name}.py", overrides=options)
    model, criterion, _ = build_model(cfg)

    def backward(loss: Tensor) -> None:  # autograd needs a real GPU
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(Tensor, "backward", backward)
    with gpu:
        put_on_gpu(model)
        state = TrainState(cfg, model, ClassMap.identity([{"id": 0}], 3))
        state.begin_average()
        images = NestedTensor(torch.rand(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool))
        targets = [
            {"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.rand(n, 4)} for n in (3, 2)
        ]
        gpu.waits.clear()
        assert len(list(train_steps(state, model, criterion, [(images, targets)] * 2))) == 1
    # Each batch's matching is solved on the host; the figures of the step are read together.
    matching, figures = "matcher.py: on_host = ", "engine.py: norm, *values = "
    expected = [matching, matching, figures]
    assert len(gpu.waits) == len(expected), gpu.waits
    assert all(w.startswith(e) for w, e in zip(gpu.waits, expected, strict=True)), gpu.waits
