"""Gated activations against float64 references that share no code: every gradient, shapes, strides and types, Triton."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from supertrainer.kernels import activations
from supertrainer.kernels.activations import ACTIVATIONS, activate, glu, glu_slopes, glu_step

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = [(), (1,), (7, 31), (2, 3, 5, 8), (0, 5), (3, 0), (65, 130)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(activations, "BLOCK_ELEMENTS", 300)


def near(got, wanted, dtype, seed, what=""):
    """Close relative to the largest value, or to 1: a slope near its root is a difference of numbers of that size."""
    tolerance = TOLERANCE[dtype]
    bound = tolerance * max(wanted.abs().max().item() if wanted.numel() else 0, 1.0)
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=bound,
                               msg=lambda text: f"{what}, seed {seed}: {text}")


def one(x, activation):
    """Value and slope of one number, by Python's own mathematics."""
    sigmoid = lambda z: 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))  # noqa: E731
    if activation in ("silu", "quick_gelu"):
        c = 1.0 if activation == "silu" else 1.702
        return x * sigmoid(c * x), sigmoid(c * x) + c * x * sigmoid(c * x) * sigmoid(-c * x)
    if activation == "gelu":
        density = math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return x * math.erfc(-x / math.sqrt(2)) / 2, math.erfc(-x / math.sqrt(2)) / 2 + x * density
    if activation == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = math.tanh(c * (x + 0.044715 * x**3))
        return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) / 2 * c * (1 + 3 * 0.044715 * x * x)
    if activation == "sigmoid":
        return sigmoid(x), sigmoid(x) * sigmoid(-x)
    return (max(x, 0.0), float(x > 0)) if activation == "relu" else (max(x, 0.0) ** 2, 2 * max(x, 0.0))


def exact(x, activation):
    """Values and slopes of a whole tensor in float64."""
    pairs = [one(value, activation) for value in x.detach().double().flatten().tolist()]
    columns = list(zip(*pairs, strict=True)) or [(), ()]
    return [torch.tensor(column, dtype=torch.float64).reshape(x.shape) for column in columns]


def leaf(*shape, dtype):
    return (torch.randn(shape, dtype=torch.float64) * 3).to(dtype).requires_grad_()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_and_alone_with_all_gradients(small_blocks, seed, shape, dtype, activation):
    gate, up = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype)
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    value, slope = exact(gate, activation)
    wide = up.detach().double()
    what = f"{activation} {shape} {dtype}"
    product = glu(gate, up, activation)
    assert product.dtype == dtype and product.shape == gate.shape and product.is_contiguous()
    near(product, value * wide, dtype, seed, what)
    d_gate, d_up = torch.autograd.grad(product, (gate, up), grad)
    near(d_gate, grad.double() * wide * slope, dtype, seed, what)
    near(d_up, grad.double() * value, dtype, seed, what)
    y = activate(gate, activation)
    near(y, value, dtype, seed, what)
    near(torch.autograd.grad(y, gate, grad)[0], grad.double() * slope, dtype, seed, what)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_steps_are_what_autograd_gives(small_blocks, seed, activation):
    gate, up, grad = (torch.randn(9, 50) for _ in range(3))
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    product = glu(*leaves, activation)
    assert torch.equal(glu_step(*leaves, activation), product) and not glu_step(*leaves, activation).requires_grad
    d_gate, d_up, hidden = glu_slopes(grad, *leaves, activation)
    assert torch.equal(hidden, product)
    for got, wanted in zip((d_gate, d_up), torch.autograd.grad(product, leaves, grad), strict=True):
        assert torch.equal(got, wanted) and not got.requires_grad
    for trained in (0, 1):
        frozen = [t.detach().requires_grad_(index == trained) for index, t in enumerate(leaves)]
        got, = torch.autograd.grad(glu(*frozen, activation), frozen[trained], grad)
        assert torch.equal(got, (d_gate, d_up)[trained])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(3, 4) + 0.1  # not at the corner of a ReLU
    torch.autograd.gradcheck(lambda *args: glu(*args, activation), (x.clone().requires_grad_(), x.cos().requires_grad_()))
    torch.autograd.gradcheck(lambda arg: activate(arg, activation), (x.clone().requires_grad_(),))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_large_and_special_values(dtype, activation):
    x = torch.tensor([-200.0, -30.0, -0.0, 0.0, 30.0, 200.0, float("nan")], dtype=dtype).requires_grad_()
    y = glu(x, torch.ones_like(x), activation)
    slope, = torch.autograd.grad(y.sum(), x)
    value, wanted = exact(x[:-1], activation)
    near(y[:-1], value, dtype, "none", activation)
    near(slope[:-1], wanted, dtype, "none", activation)
    assert torch.isnan(y[-1])


def test_errors_are_no_larger_than_two_operations_own(seed):
    """The proof's own measure, norm of the difference over the norm, against PyTorch's silu and product."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gate, up, grad = (torch.randn(400, 300).to(dtype) for _ in range(3))
        results = []
        for function, kind in ((glu, dtype), (lambda g, u: torch.nn.functional.silu(g) * u, dtype),
                               (lambda g, u: torch.nn.functional.silu(g) * u, torch.float64)):
            leaves = [t.to(kind).requires_grad_() for t in (gate, up)]
            y = function(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(kind))])
        for got, own, truth in zip(*results, strict=True):
            error, base = (float((t.double() - truth).norm() / truth.norm()) for t in (got, own))
            assert error <= max(1.1 * base, torch.finfo(dtype).eps / 2), f"{dtype}: {error} {base}, seed {seed}"


def test_the_halves_of_one_projection_and_other_strides(small_blocks, seed):
    store = torch.randn(6, 5, 40).requires_grad_()
    before = store.detach().clone()
    for pair in (lambda t: t.chunk(2, -1), lambda t: (t[..., ::2], t[..., 1::2]), lambda t: (t.transpose(0, 1), t.permute(1, 0, 2)),
                 lambda t: (t[:1].expand(6, 5, 40), t), lambda t: (t[0, 0, 0].expand(4), t[0, 0, :4])):
        gate, up = pair(store)
        value, _ = exact(gate, "silu")
        near(glu(gate, up), value * up.detach().double(), torch.float32, seed)
        got, = torch.autograd.grad(glu(gate, up).sum(), store)  # the gradient that arrives is one number, expanded
        wide = store.detach().double().requires_grad_()
        g, u = pair(wide)
        wanted, = torch.autograd.grad((g * torch.sigmoid(g) * u).sum(), wide)
        near(got, wanted, torch.float32, seed)
    assert torch.equal(store, before)


def test_types_that_differ_meet_in_the_wider_one(seed):
    gate, up = leaf(4, 6, dtype=torch.bfloat16), leaf(4, 6, dtype=torch.float32)
    y = glu(gate, up)
    assert y.dtype == torch.float32
    near(y, exact(gate, "silu")[0] * up.detach().double(), torch.float32, seed)
    d_gate, d_up = torch.autograd.grad(y.sum(), (gate, up))
    assert d_gate.dtype == torch.bfloat16 and d_up.dtype == torch.float32


def test_only_the_two_inputs_are_kept_and_each_once():
    gate, up = leaf(4, 6, dtype=torch.float32), leaf(4, 6, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        glu(gate, up)
        for activation in ("relu2", "quick_gelu", "gelu_tanh"):
            activate(gate, activation)
    assert kept == [gate.data_ptr(), up.data_ptr()] + [gate.data_ptr()] * 3


class Created(TorchDispatchMode):
    """The largest number of values in any tensor that an operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        written = any(isinstance(value, torch.Tensor) for value in (kwargs or {}).values())  # into what was there
        if isinstance(result, torch.Tensor) and not (written or func.is_view or "empty" in func.__name__):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_large_is_made_but_the_results(small_blocks, activation):
    gate, up, grad = (torch.randn(40, 50) for _ in range(3))
    with Created() as made:
        glu_step(gate, up, activation)
        glu_slopes(grad, gate, up, activation)
    assert made.largest <= 300


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_torch_compile_goes_through(seed, activation):
    gate, up = leaf(6, 10, dtype=torch.float32), leaf(6, 10, dtype=torch.float32)

    def both(gate, up):
        return glu(gate, up, activation) + activate(up, activation)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)(gate, up)
    plain = both(gate, up)
    near(compiled, plain, torch.float32, seed)
    for got, wanted in zip(torch.autograd.grad(compiled.sum(), (gate, up)), torch.autograd.grad(plain.sum(), (gate, up)),
                           strict=True):
        near(got, wanted, torch.float32, seed)


def test_what_is_wrong_is_said():
    x = torch.randn(3, 4, requires_grad=True)
    for function in (lambda: glu(x, x, "swish"), lambda: activate(x, "swish"), lambda: glu_step(x, x, "swish")):
        with pytest.raises(ValueError, match="unknown activation 'swish'; there are silu, gelu"):
            function()
    with pytest.raises(ValueError, match="must be alike"):
        glu(x, x[:2])
    with pytest.raises(ValueError, match="must be alike"):
        glu_slopes(x, x, x.double())
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(glu(x, x).sum(), x, create_graph=True)[0].sum().backward()


# --- the Triton version, in its interpreter; the environment must know before triton is imported

INTERPRETED = r"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = sys.argv[2:]
import torch
import test_activations as t
from supertrainer.kernels import activations
launches = []
launch = activations._launch
activations._use_triton = lambda x: x.dtype != torch.float64
activations._launch = lambda *args, **kwargs: (launches.append(1), launch(*args, **kwargs))
t.activate = lambda x, activation: activations._Activation.apply(x, activation)
assert type(activations._glu_kernel).__name__ == "InterpretedFunction"
seed = int(sys.argv[1])
torch.manual_seed(seed)
for activation in t.ACTIVATIONS:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((), (7, 31), (0, 5)):
            t.test_gated_and_alone_with_all_gradients(None, seed, shape, dtype, activation)
        t.test_large_and_special_values(dtype, activation)
    t.test_steps_are_what_autograd_gives(None, seed, activation)
t.test_gated_and_alone_with_all_gradients(None, seed, (3, 1025), torch.float32, "silu")  # more than one block
t.test_the_halves_of_one_projection_and_other_strides(None, seed)
t.test_types_that_differ_meet_in_the_wider_one(seed)
print("launches", len(launches))
"""

COMPILED = r"""
import triton
from triton.backends.compiler import GPUTarget
from supertrainer.kernels import activations
for element in ("fp32", "bf16", "fp16"):
    for activation in activations.ACTIVATIONS:
        constants = dict(ACTIVATION=activation, GATED=True, HIDDEN=True, D_GATE=True, D_UP=True, BLOCK=1024)
        signature = {**dict.fromkeys("gate up grad hidden d_gate d_up".split(), "*" + element),
                     **dict.fromkeys("gate_stride up_stride grad_stride width blocks".split(), "i64"),
                     **dict.fromkeys(constants, "constexpr")}
        source = triton.compiler.ASTSource(fn=activations._glu_kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
print("compiled")
"""


def test_the_triton_version_in_its_interpreter(seed, in_a_new_process):
    done = in_a_new_process(INTERPRETED, seed, Path(__file__).parent)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    assert int(done.stdout.split()[-1]) > 200  # it was the Triton version


def test_the_triton_version_compiles_for_a_gpu(tmp_path, in_a_new_process):
    done = in_a_new_process(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]
