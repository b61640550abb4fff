import copy

import pytest
import torch
from torch import nn

from util.ema import ModelEma

DECAY, STEPS = 0.9, 7


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.heads = nn.ModuleList([self.first, nn.Linear(3, 2)])  # `first` under two names
        self.norm = nn.BatchNorm1d(3)  # floating-point and integer buffers
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("unsaved", torch.randn(2), persistent=False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().double().train()


def randomise(model):
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(torch.randn(tensor.shape) * 10)


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def test_closed_form(model):
    ema = ModelEma(model, DECAY)
    history = [copy.deepcopy(tensors(model))]
    for _ in range(STEPS):
        randomise(model)
        ema.update(model)
        history.append(copy.deepcopy(tensors(model)))
    # ema_T = decay^T x_0 + sum over t of (1 - decay) decay^(T - t) x_t
    weights = [DECAY**STEPS] + [(1 - DECAY) * DECAY ** (STEPS - t) for t in range(1, STEPS + 1)]
    for name, average in tensors(ema.module).items():
        if average.is_floating_point():
            values = zip(weights, history, strict=True)
            expected = sum(weight * state[name] for weight, state in values)
            torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(average, history[-1][name]), name
    assert "unsaved" in tensors(ema.module) and "frozen" in tensors(ema.module)


def test_decay_warms_up(model):
    """1/10, 2/11, 3/12, ... up to the given one."""
    ema = ModelEma(model, 0.3, warmup=True)
    for decay in (0.1, 2 / 11, 3 / 12, 0.3, 0.3):
        before = ema.module.first.weight.clone()
        randomise(model)
        ema.update(model)
        expected = decay * before + (1 - decay) * model.first.weight
        torch.testing.assert_close(ema.module.first.weight, expected, rtol=1e-12, atol=1e-12)


def test_shared_parameter_is_averaged_once_and_stays_shared(model):
    ema = ModelEma(model, DECAY)
    before = model.first.weight.detach().clone()
    randomise(model)
    ema.update(model)
    assert ema.module.first.weight is ema.module.heads[0].weight
    expected = DECAY * before + (1 - DECAY) * model.first.weight
    torch.testing.assert_close(ema.module.first.weight, expected, rtol=1e-12, atol=1e-12)


def test_equal_values_stay_bit_exact(model):
    model = model.float()
    ema = ModelEma(model)
    for _ in range(100):
        ema.update(model)
    for name, value in model.state_dict().items():
        assert torch.equal(ema.module.state_dict()[name], value), name


def test_module_is_independent_of_the_model(model):
    ema = ModelEma(model)
    assert not any(module.training for module in ema.module.modules())
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert model.training and model.first.weight.requires_grad
    before = ema.module.first.weight.clone()
    randomise(model)
    assert torch.equal(ema.module.first.weight, before)
    randomise(model)
    after = copy.deepcopy(model.state_dict())
    ema.update(model)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_state_dict_round_trip(model):
    ema = ModelEma(model, DECAY)
    randomise(model)
    ema.update(model)
    assert list(ema.state_dict()) == list(model.state_dict())
    resumed = ModelEma(copy.deepcopy(model), DECAY)
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    resumed.module.unsaved.copy_(ema.module.unsaved)  # not in a state dict
    randomise(model)
    ema.update(model)
    resumed.update(model)
    for name, value in tensors(ema.module).items():
        assert torch.equal(tensors(resumed.module)[name], value), name


def test_model_without_buffers():
    model = nn.Linear(2, 2)
    ModelEma(model).update(model)


def test_distributed_wrapper_is_unwrapped(model, tmp_path):
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", rendezvous, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        ema = ModelEma(wrapped, DECAY)
        assert list(ema.state_dict()) == list(model.state_dict())
        expected = DECAY * model.first.weight.detach() + (1 - DECAY)
        with torch.no_grad():
            model.first.weight.fill_(1)
        ema.update(wrapped)
        torch.testing.assert_close(ema.module.first.weight, expected, rtol=1e-12, atol=1e-12)
    finally:
        torch.distributed.destroy_process_group()
