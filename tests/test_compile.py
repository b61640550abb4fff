"""Backbones and encoders compiled by torch.compile (--compile)."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models import build_model
from models.nested_tensor import nested_tensor_from_tensor_list


@pytest.mark.slow
def test_images_of_many_sizes_need_few_compilations():
    torch.compiler.reset()
    torch.manual_seed(0)
    plain, compiled = (build_model("toy/dino", num_classes=3)[0] for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    counter = CompileCounterWithBackend("eager")  # traces as others do, without generating code
    compiled.compile_parts(backend=counter)
    sizes = random.Random(0)
    for i in range(200):
        images = [torch.randn(3, *(sizes.randint(32, 128) for _ in range(2))) for _ in range(2)]
        batch = nested_tensor_from_tensor_list(images)
        memory = compiled.encode(batch).memory
        if i % 40 == 0:
            torch.testing.assert_close(memory, plain.encode(batch).memory)
    assert 2 <= counter.frame_count <= 8
