"""Multi-scale deformable attention: every backend against the definition, and the build."""

import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ops import MSDeformAttn, choose_backend, ms_deform_attn, native
from ops.ms_deform_attn import _choose
from tests.conftest import full

ROOT = Path(__file__).parents[1]
LEVELS = [(7, 5), (3, 4), (1, 2), (2, 1), (4, 3)]


@pytest.fixture(params=["reference", *(f"cpp {name}" for name in native.CPU_VARIANTS), "cuda"])
def device(request, monkeypatch) -> torch.device:
    """Each backend's device, with the backend and its variant forced. The C++ one must be built."""
    backend, _, variant = request.param.partition(" ")
    if backend == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if variant and variant not in native.cpu_variants():
        pytest.skip(f"needs a processor with {variant}")
    monkeypatch.setenv("MS_DEFORM_ATTN_BACKEND", backend)
    monkeypatch.setenv("MS_DEFORM_ATTN_CPU", variant)
    return torch.device("cuda" if backend == "cuda" else "cpu")


def make_inputs(B=2, Q=9, M=3, D=5, L=3, P=2, *, dtype=torch.float64, device="cpu", seed=0):
    """Inputs with locations inside, on the border of, outside and far outside the levels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor(LEVELS)[:L]
    sizes = shapes.prod(1)
    starts = sizes.cumsum(0) - sizes
    value = torch.randn(B, int(sizes.sum()), M, D, generator=generator, dtype=torch.float64)
    locations = torch.rand(B, Q, M, L, P, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    kind = torch.rand(locations.shape, generator=generator)
    locations = torch.where(kind < 0.1, locations.round(), locations)  # 0 or 1: on the border
    locations = torch.where(kind > 0.95, locations * 1e6, locations)
    weights = torch.rand(B, Q, M, L, P, generator=generator, dtype=torch.float64)
    floating = [t.to(device, dtype).requires_grad_() for t in (value, locations, weights)]
    return floating[0], shapes.to(device), starts.to(device), floating[1], floating[2]


def by_loops(value, spatial_shapes, level_start_index, locations, weights) -> Tensor:
    """The definition, one pixel at a time."""
    B, _, M, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    output = value.new_zeros(B, Q, M, D)
    for b, q, m, level, p in itertools.product(*map(range, (B, Q, M, L, P))):
        height, width = spatial_shapes[level].tolist()
        x = locations[b, q, m, level, p, 0] * width - 0.5
        y = locations[b, q, m, level, p, 1] * height - 0.5
        for row, column in itertools.product(range(height), range(width)):
            near = max(0, 1 - abs(x.item() - column)) * max(0, 1 - abs(y.item() - row))
            if near > 0:
                bilinear = (1 - (x - column).abs()) * (1 - (y - row).abs())
                pixel = value[b, level_start_index[level] + row * width + column, m]
                output[b, q, m] += weights[b, q, m, level, p] * bilinear * pixel
    return output.flatten(2)


def grads_of(function, inputs, seed=1) -> tuple[Tensor, ...]:
    output = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return torch.autograd.grad(output, (inputs[0], *inputs[3:]), grad)


def assert_close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        scale = max(1.0, b.detach().abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance * scale, rtol=tolerance)


def test_backend_matches_the_definition(device):
    inputs = make_inputs(device=device)
    output, expected = ms_deform_attn(*inputs), by_loops(*(t.cpu() for t in inputs))
    torch.testing.assert_close(output.cpu(), expected, atol=1e-12, rtol=1e-12)
    inside = make_inputs(device=device, seed=2)  # not on kinks, where the gradient is undefined
    with torch.no_grad():
        inside[3].copy_(torch.rand(inside[3].shape, generator=torch.manual_seed(3)) * 1.2 - 0.1)
    cpu = [t.detach().cpu().requires_grad_(t.is_floating_point()) for t in inside]
    grads = [g.cpu() for g in grads_of(ms_deform_attn, inside)]
    assert_close(grads, grads_of(by_loops, cpu), 1e-11)


SIZES = [
    # B, Q, M, D, L, P
    (1, 1, 1, 1, 1, 1),
    (2, 3, 2, 3, 2, 5),
    (3, 17, 1, 8, 3, 7),
    (1, 40, 4, 16, 4, 4),
    (2, 11, 3, 17, 5, 3),
    (2, 700, 2, 32, 4, 4),
    (1, 13, 2, 33, 2, 8),
    (1, 9, 2, 48, 5, 1),
    (2, 5, 2, 64, 1, 6),
    (1, 6, 1, 100, 3, 2),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_backends_agree_for_all_sizes(sizes, dtype, device, monkeypatch):
    inputs = make_inputs(*sizes, dtype=dtype, device=device, seed=sum(sizes))
    actual = [ms_deform_attn(*inputs), *grads_of(ms_deform_attn, inputs)]
    assert [t.dtype for t in actual] == [dtype] * 4
    exact = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    exact = [t.cpu().requires_grad_(t.is_floating_point()) for t in exact]
    monkeypatch.setenv("MS_DEFORM_ATTN_BACKEND", "reference")
    expected = [ms_deform_attn(*exact), *grads_of(ms_deform_attn, exact)]
    # Half types: `expected` has the same rounded inputs, so only the output's rounding differs.
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert_close([t.cpu() for t in actual], expected, tolerance)


def test_half_values_accept_float32_locations(device):
    value, shapes, starts, locations, weights = make_inputs(
        1, 40, 4, 16, dtype=torch.float32, device=device
    )
    expected = ms_deform_attn(value, shapes, starts, locations, weights)
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        output = ms_deform_attn(value.to(dtype), shapes, starts, locations, weights)
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("coordinate", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_nonfinite_or_far_location_adds_nothing(coordinate, device):
    inputs = make_inputs(1, 30, 2, 16, dtype=torch.float32, device=device)
    with torch.no_grad():
        inputs[3][:, ::2] = coordinate
        inputs[3][:, 1, :, :, :, 1] = coordinate
    output, grads = ms_deform_attn(*inputs), grads_of(ms_deform_attn, inputs)
    assert (output[:, ::2] == 0).all() and (output[:, 1] == 0).all()
    assert output[:, 3::2].abs().min() > 0
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][:, ::2] == 0).all() and (grads[2][:, ::2] == 0).all()
    assert (grads[1][:, 1] == 0).all()


@pytest.mark.parametrize("empty", ["B", "Q", "M", "D", "L", "P"])
def test_empty_inputs_give_zeros(empty, device):
    inputs = make_inputs(**{empty: 0}, device=device)
    value, locations = inputs[0], inputs[3]
    output = ms_deform_attn(*inputs)
    assert output.shape == (value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    assert (output == 0).all()
    assert all((g == 0).all() for g in grads_of(ms_deform_attn, inputs))


def test_memory_layout_does_not_matter(device):
    inputs = make_inputs(device=device, dtype=torch.float32)
    expected = [ms_deform_attn(*inputs), *grads_of(ms_deform_attn, inputs)]
    strided = [torch.stack([t.detach()] * 2, dim=-1)[..., 1] for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    strided = [t.requires_grad_(t.is_floating_point()) for t in strided]
    actual = [ms_deform_attn(*strided), *grads_of(ms_deform_attn, strided)]
    assert_close(actual, expected, 1e-6)
    shifted = torch.cat([inputs[0].detach().new_zeros(1), inputs[0].detach().flatten()])[1:]
    shifted = shifted.view(inputs[0].shape)  # not aligned to 16 bytes
    torch.testing.assert_close(ms_deform_attn(shifted, *inputs[1:]), expected[0])


def test_rows_outside_all_levels_get_no_gradient(device):
    inputs = list(make_inputs(device=device))
    inputs[0] = torch.cat([inputs[0].detach(), inputs[0].detach()], dim=1).requires_grad_()
    inputs[2] = inputs[2] + torch.arange(3, device=device)  # also gaps between levels
    grad = grads_of(ms_deform_attn, inputs)[0]
    used = torch.zeros(grad.shape[1], dtype=torch.bool)
    for (height, width), start in zip(inputs[1].tolist(), inputs[2].tolist(), strict=True):
        used[start : start + height * width] = True
    assert (grad[:, ~used] == 0).all() and (grad[:, used] != 0).any()


def test_gradcheck(device):
    inputs = make_inputs(1, 3, 2, 3, 2, 2, device=device)
    with torch.no_grad():
        inputs[3].copy_(torch.rand(inputs[3].shape, generator=torch.manual_seed(0)) * 1.2 - 0.1)
    assert torch.autograd.gradcheck(ms_deform_attn, inputs, nondet_tol=1e-12)


def test_second_derivative_raises(device):
    inputs = make_inputs(device=device)
    (grad,) = torch.autograd.grad(ms_deform_attn(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("variant", native.CPU_VARIANTS)
def test_results_are_bit_identical_across_runs_and_thread_counts(variant, monkeypatch):
    if variant not in native.cpu_variants():
        pytest.skip(f"needs a processor with {variant}")
    monkeypatch.setenv("MS_DEFORM_ATTN_BACKEND", "cpp")
    monkeypatch.setenv("MS_DEFORM_ATTN_CPU", variant)
    inputs = make_inputs(1, 600, 3, 32, 4, 4, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 1, 2, 3, 7):  # 7 exceeds the heads, so levels are split too
            torch.set_num_threads(n)
            results.append([ms_deform_attn(*inputs), *grads_of(ms_deform_attn, inputs)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_operator_registration_passes_opcheck(device):
    inputs = make_inputs(device=device, dtype=torch.float32)
    torch.library.opcheck(torch.ops.dn_dino_ops.ms_deform_attn, inputs)
    grad = ms_deform_attn(*inputs).detach()
    detached = [t.detach() for t in inputs]
    torch.library.opcheck(torch.ops.dn_dino_ops.ms_deform_attn_backward, (grad, *detached))


def make_module_inputs(device, ref_dim=2, Q=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor([(6, 8), (3, 4)])
    mask = torch.zeros(2, 60, dtype=torch.bool)
    mask[1, 40:48] = True
    inputs = (
        torch.randn(2, Q, 32, generator=generator),
        torch.rand(2, Q, 2, ref_dim, generator=generator),
        torch.randn(2, 60, 32, generator=generator),
        shapes,
        torch.tensor([0, 48]),
        mask,
    )
    return [t.to(device) for t in inputs]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_module_compiles_into_one_graph(dynamic, device):
    module = MSDeformAttn(32, 2, 4, 3).to(device)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for Q in (6, 9):
        inputs = make_module_inputs(device, Q=Q)
        expected, actual = module(*inputs), compiled(*inputs)
        torch.testing.assert_close(actual, expected)
        parameters = list(module.parameters())
        grads = [torch.autograd.grad(output.sum(), parameters) for output in (actual, expected)]
        torch.testing.assert_close(*grads)


def test_module_compiles_with_the_default_compiler(device):
    module = MSDeformAttn(32, 2, 4, 3).to(device)
    inputs = make_module_inputs(device)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(*inputs), module(*inputs))


def test_module_exports_with_the_operator_in_the_graph(device, tmp_path):
    module = MSDeformAttn(32, 2, 4, 3).to(device).eval()
    inputs = make_module_inputs(device)
    queries = torch.export.Dim("queries", min=2, max=900)
    program = torch.export.export(
        module, tuple(inputs), dynamic_shapes=[{1: queries}, {1: queries}, None, None, None, None]
    )
    torch.export.save(program, tmp_path / "module.pt2")
    program = torch.export.load(tmp_path / "module.pt2")
    assert torch.ops.dn_dino_ops.ms_deform_attn.default in {
        node.target for node in program.graph.nodes
    }
    for Q in (6, 11):
        inputs = make_module_inputs(device, Q=Q)
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_module_under_autocast(device):
    module = MSDeformAttn(32, 2, 4, 3).to(device)
    inputs = make_module_inputs(device)
    expected = module(*inputs)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = module(*inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)
    output.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_module_is_initialised_as_released():
    module = MSDeformAttn(256, 4, 8, 4)
    assert sorted(module.state_dict()) == [
        "attention_weights.bias",
        "attention_weights.weight",
        "output_proj.bias",
        "output_proj.weight",
        "sampling_offsets.bias",
        "sampling_offsets.weight",
        "value_proj.bias",
        "value_proj.weight",
    ]
    offsets = module.sampling_offsets.bias.detach().view(8, 4, 4, 2)
    corners = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, point in itertools.product(range(8), range(4)):
        expected = torch.tensor(corners[head]) * (point + 1.0)
        torch.testing.assert_close(
            offsets[head, :, point], expected.expand(4, 2), atol=1e-5, rtol=0
        )
    for zero in ("sampling_offsets.weight", "attention_weights.weight", "attention_weights.bias"):
        assert (module.state_dict()[zero] == 0).all()
    bound = math.sqrt(6 / 512)
    assert 0.9 * bound < module.value_proj.weight.abs().max() <= bound
    assert (module.output_proj.bias == 0).all()


@pytest.mark.parametrize("ref_dim", [2, 4])
def test_module_samples_around_its_reference_points(ref_dim):
    """Against a direct call of the op, following Deformable DETR's equation 3 and appendix A.4."""
    torch.manual_seed(0)
    module = MSDeformAttn(32, 2, 4, 3)
    torch.nn.init.normal_(module.sampling_offsets.weight)
    torch.nn.init.normal_(module.attention_weights.weight)
    query, points, memory, shapes, starts, mask = make_module_inputs("cpu", ref_dim)
    output = module(query, points, memory, shapes, starts, mask)
    value = module.value_proj(memory)
    value[mask] = 0
    offsets = module.sampling_offsets(query).view(2, 6, 4, 2, 3, 2)
    weights = module.attention_weights(query).view(2, 6, 4, 6).softmax(-1).view(2, 6, 4, 2, 3)
    locations = torch.empty_like(offsets)
    for level, point, axis in itertools.product(range(2), range(3), range(2)):
        offset = offsets[..., level, point, axis]
        if ref_dim == 2:
            step = 1 / shapes[level, 1 - axis]
        else:
            step = points[:, :, level, 2 + axis, None] / (2 * 3)
        centre = points[:, :, level, axis, None]
        locations[..., level, point, axis] = centre + offset * step
    expected = ms_deform_attn(value.view(2, 60, 4, 8), shapes, starts, locations, weights)
    torch.testing.assert_close(output, module.output_proj(expected))


def test_module_rejects_invalid_sizes():
    with pytest.raises(ValueError, match=r"d_model=30 .* n_heads=4"):
        MSDeformAttn(30, 2, 4)
    inputs = make_module_inputs("cpu", ref_dim=3)
    with pytest.raises(ValueError, match="reference_points must have 2 or 4"):
        MSDeformAttn(32, 2, 4, 3)(*inputs)


NAMES = ["value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"]


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("value", lambda t: t[0], ValueError),
        ("value", lambda t: t.long(), TypeError),
        ("spatial_shapes", lambda t: t.float(), TypeError),
        ("spatial_shapes", lambda t: t[:, :1], ValueError),
        ("spatial_shapes", lambda t: t - 3, ValueError),
        ("spatial_shapes", lambda t: t + torch.tensor([[0], [0], [9]]), ValueError),
        ("level_start_index", lambda t: t[:-1], ValueError),
        ("level_start_index", lambda t: t.int(), TypeError),
        ("level_start_index", lambda t: t - 1, ValueError),
        ("level_start_index", lambda t: t.flip(0), ValueError),
        ("sampling_locations", lambda t: t[..., 0], ValueError),
        ("sampling_locations", lambda t: t[:1], ValueError),
        ("sampling_locations", lambda t: t.double(), TypeError),
        ("sampling_locations", lambda t: t.to("meta"), ValueError),
        ("attention_weights", lambda t: t[:, :, :1], ValueError),
        ("attention_weights", lambda t: t.bool(), TypeError),
        ("attention_weights", lambda t: t.to("meta"), ValueError),
    ],
)
def test_errors_name_the_argument(name, change, error, device):
    inputs = dict(zip(NAMES, make_inputs(dtype=torch.float32, device=device), strict=True))
    inputs[name] = change(inputs[name].detach())
    if device.type == "cuda" and name in ("spatial_shapes", "level_start_index"):
        pytest.skip("level contents are checked on the CPU only")
    with pytest.raises(error, match=name):
        ms_deform_attn(**inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_level_out_of_bounds_gives_nan_on_a_gpu():
    inputs = make_inputs(dtype=torch.float32, device="cuda")
    inputs[1][1] *= 100
    assert ms_deform_attn(*inputs).isnan().all()
    assert all(g.isfinite().all() for g in grads_of(ms_deform_attn, inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_deterministic_algorithms_raise_on_a_gpu(monkeypatch):
    monkeypatch.setenv("MS_DEFORM_ATTN_BACKEND", "cuda")
    inputs = make_inputs(dtype=torch.float32, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="not deterministic"):
            ms_deform_attn(*inputs).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


# Choosing a backend


@pytest.fixture
def fresh_choice():
    """Clears the caches of loaded libraries before and after the test."""
    native.load.cache_clear()
    _choose.cache_clear()
    yield
    native.load.cache_clear()
    _choose.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch, fresh_choice) -> Path:
    """An empty folder, the only one searched for libraries."""
    monkeypatch.delenv("MS_DEFORM_ATTN_BACKEND", raising=False)
    monkeypatch.setattr(native, "_folders", lambda: [tmp_path])
    return tmp_path


CPU = torch.device("cpu")


def test_compiled_backend_is_used_if_built(monkeypatch):
    monkeypatch.delenv("MS_DEFORM_ATTN_BACKEND", raising=False)
    assert choose_backend(CPU) == "cpp"
    assert choose_backend(torch.device("mps")) == "reference"


def test_missing_build_warns_in_one_line_and_uses_the_reference(folder, caplog):
    for _ in range(3):
        assert choose_backend(CPU) == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "make op" in caplog.text and len(caplog.text.splitlines()) == 1
    inputs = make_inputs(1, 2, 1, 2, 1, 1)
    torch.testing.assert_close(ms_deform_attn(*inputs), by_loops(*inputs))


@pytest.mark.parametrize("content", [b"not a library", None])
def test_broken_build_falls_back_to_the_reference(folder, caplog, content):
    library = folder / "libms_deform_attn_cpu.so"
    if content is None:  # a library with another ABI
        source = folder / "other.c"
        source.write_text("int ms_deform_attn_cpu_abi(void) { return -1; }\n")
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    else:
        library.write_bytes(content)
    assert choose_backend(CPU) == "reference"
    assert str(library) in caplog.text and "make op" in caplog.text


@pytest.mark.parametrize("backend", ["cpp", "cuda"])
def test_forcing_an_unbuilt_backend_names_the_build_command(folder, backend, monkeypatch):
    monkeypatch.setenv("MS_DEFORM_ATTN_BACKEND", backend)
    with pytest.raises(RuntimeError, match=rf"{backend}.*make op \(or: pip install ./ops\)"):
        ms_deform_attn(*make_inputs())


def test_forcing_an_unknown_backend_lists_the_choices(monkeypatch):
    monkeypatch.setenv("MS_DEFORM_ATTN_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="triton: choose one of reference, cpp, cuda"):
        ms_deform_attn(*make_inputs())


def test_forcing_an_unknown_variant_lists_the_choices(monkeypatch):
    monkeypatch.setenv("MS_DEFORM_ATTN_BACKEND", "cpp")
    monkeypatch.setenv("MS_DEFORM_ATTN_CPU", "sse9")
    with pytest.raises(RuntimeError, match="must be one of avx512, avx2, neon, baseline"):
        ms_deform_attn(*make_inputs())


def test_status_command():
    status = subprocess.run(
        [sys.executable, "-m", "ops"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "libms_deform_attn_cpu.so" in status.stdout
    assert "tensors on cpu use: cpp" in status.stdout


# The build


def build(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs setup.py on a copy of ops/, so that the current build is unchanged."""
    copy = tmp_path / "ops"
    shutil.copytree(
        ROOT / "ops", copy, ignore=shutil.ignore_patterns("*.so", "build", "*.egg-info")
    )
    return subprocess.run(
        [sys.executable, str(copy / "setup.py"), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def make_toolkit(folder: Path, release: str, compiles: bool = True) -> dict[str, str]:
    """A fake nvcc of that release that records its command, a fake c++ that only creates its
    output, and the environment that selects both."""
    (folder / "bin").mkdir()
    touch = 'for last; do :; done; touch "$last"'
    scripts = {
        "nvcc": f"""case "$*" in
            *--version*) echo "release {release}, V{release}.1";;
            *--list-gpu-arch*) printf "compute_80\\ncompute_90\\n";;
            *) echo "$@" > {folder}/command; {touch if compiles else "exit 1"};;
            esac""",
        "c++": touch,
    }
    for name, script in scripts.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    return {
        "CUDA_HOME": str(folder),
        "CXX": str(folder / "bin" / "c++"),
        "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX",
    }


@pytest.mark.full
def test_build_without_cuda_has_only_the_cpu_library(tmp_path):
    result = build(tmp_path, "build_ext", "--inplace", MS_DEFORM_ATTN_CPU_ONLY="1")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "ops").glob("*.so")] == ["libms_deform_attn_cpu.so"]


@pytest.mark.parametrize(
    ("release", "compiles", "architectures", "message"),
    [
        ("99.1", True, "9.0", "install CUDA toolkit"),
        ("11.8", False, "9.0", "install an older one and select it"),
        ("11.8", True, "12.0", "does not support compute capability 12.0"),
        ("11.8", True, "Hopper", "write it like '8.0;9.0"),
    ],
)
def test_incompatible_toolkit_is_explained(tmp_path, release, compiles, architectures, message):
    environment = make_toolkit(tmp_path, release, compiles) | {
        "TORCH_CUDA_ARCH_LIST": architectures
    }
    result = build(tmp_path, "build_ext", "--inplace", **environment)
    assert result.returncode == 0, result.stderr
    paragraph = next(p for p in result.stdout.split("\n\n") if "is not built" in p)
    assert message in paragraph and "The CPU kernel is." in paragraph
    assert (tmp_path / "ops" / "libms_deform_attn_cpu.so").exists()


def test_requested_architectures_are_compiled(tmp_path):
    build(tmp_path, "build_ext", "--inplace", **make_toolkit(tmp_path, "11.8"))
    command = (tmp_path / "command").read_text()
    for kind in ("80,code=sm_80", "90,code=sm_90", "90,code=compute_90"):
        assert f"arch=compute_{kind}" in command
    assert command.count("-gencode") == 3


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernel_compiles(tmp_path):
    result = build(tmp_path, "build_ext", "--inplace", TORCH_CUDA_ARCH_LIST="9.0")
    library = tmp_path / "ops" / "libms_deform_attn_cuda.so"
    assert library.exists(), result.stdout + result.stderr
    symbols = library.read_bytes()
    for name in ("abi", "error", "forward", "backward"):
        assert f"ms_deform_attn_cuda_{name}".encode() in symbols


@pytest.fixture(scope="module")
def run_on_arm(tmp_path_factory) -> Callable[..., list[Tensor]]:
    """The kernel for aarch64 with NEON, built by setup.py and run in an emulator: a function from
    the op's inputs and the gradient of its output to its output and three gradients."""
    for tool in ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-gcc", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}: apt-get install g++-aarch64-linux-gnu qemu-user")
    folder = tmp_path_factory.mktemp("arm")
    environment = {"CXX": "aarch64-linux-gnu-g++", "MS_DEFORM_ATTN_CPU_ONLY": "1"}
    result = build(folder, "build_ext", "--inplace", **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    library, program = folder / "ops/libms_deform_attn_cpu.so", folder / "run_op"
    compiler = ["aarch64-linux-gnu-gcc", str(ROOT / "tests/run_op.c"), str(library)]
    subprocess.run([*compiler, f"-Wl,-rpath,{library.parent}", "-o", str(program)], check=True)

    def run(*tensors: Tensor, variant: str = "neon") -> list[Tensor]:
        value, _, _, locations, weights, grad = tensors
        sizes = [
            value.dtype == torch.float64,
            *value.shape,
            locations.shape[1],
            *locations.shape[3:5],
        ]
        parts = [torch.tensor(sizes, dtype=torch.int64), *tensors]
        source, target = folder / "input", folder / "output"
        source.write_bytes(b"".join(t.detach().contiguous().numpy().tobytes() for t in parts))
        emulator = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(program)]
        environment = os.environ | {"MS_DEFORM_ATTN_CPU": variant}
        subprocess.run([*emulator, str(source), str(target)], env=environment, check=True)
        results = grad, value, locations, weights
        flat = torch.frombuffer(bytearray(target.read_bytes()), dtype=value.dtype)
        split = flat.split([t.numel() for t in results])
        return [part.view(t.shape) for part, t in zip(split, results, strict=True)]

    return run


def reference_results(*tensors: Tensor) -> list[Tensor]:
    *inputs, grad = tensors
    output = ms_deform_attn(*inputs)
    return [output, *torch.autograd.grad(output, (inputs[0], *inputs[3:]), grad)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_neon_matches_the_reference(run_on_arm, dtype, monkeypatch):
    monkeypatch.setenv("MS_DEFORM_ATTN_BACKEND", "reference")
    for sizes in SIZES[1::2]:
        inputs = make_inputs(*sizes, dtype=dtype, seed=sum(sizes))
        with torch.no_grad():
            inputs[3][:, ::3] = math.nan
        tensors = *inputs, torch.randn(sizes[0], sizes[1], sizes[2] * sizes[3], dtype=dtype)
        tolerance = 1e-11 if dtype == torch.float64 else 1e-5
        assert_close(run_on_arm(*tensors), reference_results(*tensors), tolerance)


def test_neon_multiplies_infinity_by_zero_as_the_reference(run_on_arm, monkeypatch):
    """A location without any pixel samples the first one of its level, with weight 0."""
    monkeypatch.setenv("MS_DEFORM_ATTN_BACKEND", "reference")
    inputs = make_inputs(1, 12, 2, 8, 2, 2, dtype=torch.float32)
    with torch.no_grad():
        inputs[0][:, inputs[2]] = math.inf
        inputs[3].copy_(0.5 + torch.rand(inputs[3].shape, generator=torch.manual_seed(0)) * 0.1)
        inputs[3][0, :3] = torch.tensor([math.nan, -math.inf, -9]).view(3, 1, 1, 1, 1)
    tensors = *inputs, torch.ones(1, 12, 16)
    actual, expected = run_on_arm(*tensors), reference_results(*tensors)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert expected[0][:, :3].isnan().any() and expected[0][:, 3:].isfinite().all()


def test_arm_has_no_other_variant(run_on_arm):
    inputs = make_inputs(1, 2, 1, 2, 1, 1)
    with pytest.raises(subprocess.CalledProcessError):
        run_on_arm(*inputs, torch.ones(1, 2, 2, dtype=torch.float64), variant="avx2")


@pytest.mark.parametrize("method", ["pip", *full("setup.py")])
def test_installs_as_a_standalone_package(tmp_path, method):
    """`pip install ./ops` and the released `python setup.py build install`, into a folder."""
    target = tmp_path / "site"
    if method == "pip":
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--quiet",
            str(ROOT / "ops"),
        ]
        command += ["--target", str(target)]
        env = os.environ | {"MS_DEFORM_ATTN_CPU_ONLY": "1"}
        result = subprocess.run(command, env=env, capture_output=True, text=True)
    else:
        result = build(
            tmp_path,
            *("build", "install", "--single-version-externally-managed"),
            *("--record", str(tmp_path / "record"), "--install-lib", str(target)),
            MS_DEFORM_ATTN_CPU_ONLY="1",
        )
    assert result.returncode == 0, result.stderr
    program = (
        "from ms_deform_attn import MSDeformAttn, choose_backend; import torch, ms_deform_attn;"
        "print(choose_backend(torch.device('cpu')), ms_deform_attn.__file__)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.split() == ["cpp", str(target / "ms_deform_attn" / "__init__.py")]
    both = """
import torch, ms_deform_attn, ops
attention = [package.MSDeformAttn(8, 1, 2, 1) for package in (ops, ms_deform_attn)]
attention[1].load_state_dict(attention[0].state_dict())
shapes, starts = torch.tensor([[2, 3]]), torch.tensor([0])
inputs = torch.rand(1, 4, 8), torch.rand(1, 4, 1, 2), torch.rand(1, 6, 8), shapes, starts
outputs = [module(*inputs) for module in attention]
outputs[1].sum().backward()
print(torch.equal(*outputs))
"""
    output = subprocess.run(
        [sys.executable, "-c", both],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert output.stdout.split() == ["True"], output.stderr
