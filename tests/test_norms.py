"""Norms against float64 references that share no code: every gradient, odd shapes, strides and types, Triton too."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from supertrainer.kernels import norm_rows, norms
from supertrainer.kernels.norms import add_rms_norm, layer_norm, rms_norm, rms_norm_reference

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = [(1, 1), (7, 31), (2, 3, 5, 8), (65, 130), (0, 5), (3, 0, 4), (9,)]
VARIANTS = list(itertools.product((0.0, 1.0), ("input", "float32"), (True, False)))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(norms, "BLOCK_ELEMENTS", 300)


def near(got, wanted, dtype, seed, what="", least=0.1):
    """Close relative to the largest value, or `least`: a rounding error is as big as what was rounded."""
    tolerance = TOLERANCE[dtype]
    bound = tolerance * max(wanted.abs().max().item() if wanted.numel() else 0, least)
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=bound,
                               msg=lambda text: f"{what}, seed {seed}: {text}")


def leaf(*shape, dtype, scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def wide(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def by_rows(x, weight, bias, eps, offset, centred):
    """The formula for one row after another, in float64."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        row = row - row.sum() / len(row) if centred else row
        size = (sum((value * value for value in row), torch.zeros((), dtype=row.dtype)) / len(row) + eps) ** 0.5
        row = row / size
        row = row if weight is None else row * (weight + offset)
        rows.append(row if bias is None else row + bias)
    return torch.stack(rows).reshape(x.shape) if rows else x * 1.0


def through_autograd(x, weight, bias, eps, offset, centred):
    """The formula on whole tensors: F.layer_norm's float64 kernel, or the Euclidean norm of the rows."""
    if centred:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    size = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / max(1, x.shape[-1]) + eps).sqrt()
    return x / size if weight is None else x / size * (weight + offset)


def compare(got, leaves, wanted, wide_leaves, dtype, seed, what):
    """Outputs, and the gradients of all leaves under random directions."""
    slopes = [torch.randn(w.shape, dtype=torch.float64) for w in wanted]
    for g, w in zip(got, wanted, strict=True):
        near(g, w, dtype, seed, what)
    grads = torch.autograd.grad(got, leaves, [s.to(g.dtype) for s, g in zip(slopes, got, strict=True)])
    slopes = [s.to(g.dtype).double() for s, g in zip(slopes, got, strict=True)]
    for index, (g, w) in enumerate(zip(grads, torch.autograd.grad(wanted, wide_leaves, slopes), strict=True)):
        assert g.dtype == leaves[index].dtype and g.shape == leaves[index].shape
        near(g, w, dtype, seed, f"{what}, gradient {index}", least=1.0)  # of width 1, it is a difference of equals


def test_the_two_references_agree(seed):
    for centred in (True, False):
        x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 6), (6,), (6,)))
        bias = bias if centred else None
        near(by_rows(x, weight, bias, 1e-3, 0.0, centred), through_autograd(x, weight, bias, 1e-3, 0.0, centred),
             torch.float64, seed)


@pytest.mark.parametrize("offset,cast,weighted", VARIANTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_and_all_gradients(small_blocks, seed, shape, dtype, offset, cast, weighted):
    x, weight = leaf(*shape, dtype=dtype, scale=3), leaf(shape[-1], dtype=dtype) if weighted else None
    exact = wide(x, weight)
    got = rms_norm(x, weight, 0.1, offset=offset, cast=cast)
    assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
    compare([got], [x] + [weight] * weighted, [through_autograd(*exact, None, 0.1, offset, False)],
            exact[:1 + weighted], dtype, seed, f"{shape} {dtype} {offset} {cast}")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_and_all_gradients(small_blocks, seed, shape, dtype):
    x, residual, weight = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype), leaf(shape[-1], dtype=dtype)
    total = (x + residual).detach().double() - x.detach().double() - residual.detach().double()  # its rounding
    exact = wide(x, residual, weight)
    joined = exact[0] + exact[1] + total
    compare(add_rms_norm(x, residual, weight, 0.1, offset=1.0), [x, residual, weight],
            (through_autograd(joined, exact[2], None, 0.1, 1.0, False), joined), exact, dtype, seed, str(shape))


def test_only_one_of_the_two_results_is_used(seed):
    x, residual, weight = (leaf(*shape, dtype=torch.float64) for shape in ((5, 6), (5, 6), (6,)))
    normed, total = add_rms_norm(x, residual, weight)
    grads = torch.autograd.grad(total.sum(), (x, residual, weight), allow_unused=True)
    assert torch.equal(grads[0], torch.ones(5, 6)) and torch.equal(grads[1], grads[0]) and grads[2] is None
    exact = wide(x, residual, weight)
    wanted = torch.autograd.grad(rms_norm_reference(exact[0] + exact[1], exact[2]).sin().sum(), exact)
    normed, total = add_rms_norm(x, residual, weight)
    for got, value in zip(torch.autograd.grad(normed.sin().sum(), (x, residual, weight)), wanted, strict=True):
        near(got, value, torch.float64, seed)


@pytest.mark.parametrize("weighted,biased", [(True, True), (True, False), (False, False), (False, True)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[-1] > 1 and 0 not in shape[1:]], ids=str)
def test_layer_norm_and_all_gradients(small_blocks, seed, shape, dtype, weighted, biased):
    x = leaf(*shape, dtype=dtype, scale=3)
    weight, bias = (leaf(shape[-1], dtype=dtype) if wanted else None for wanted in (weighted, biased))
    exact = wide(x, weight, bias)
    compare([layer_norm(x, weight, bias, 1e-3)], [t for t in (x, weight, bias) if t is not None],
            [through_autograd(*exact, 1e-3, 0.0, True)], [t for t in exact if t is not None], dtype, seed, f"{shape} {dtype}")


def test_gradcheck(small_blocks, seed):
    x, residual, weight, bias = (leaf(*shape, dtype=torch.float64) for shape in ((3, 2, 5), (3, 2, 5), (5,), (5,)))
    torch.autograd.gradcheck(lambda *args: rms_norm(*args, 1e-2, offset=1.0), (x, weight))
    torch.autograd.gradcheck(lambda *args: add_rms_norm(*args, 1e-2), (x, residual, weight))
    torch.autograd.gradcheck(norms._LayerNorm.apply, (x, weight, bias, 1e-2))


def test_a_wider_weight_in_each_order(seed):
    x, weight = leaf(6, 10, dtype=torch.bfloat16), leaf(10, dtype=torch.float32)
    for cast, dtype in (("input", torch.float32), ("float32", torch.bfloat16)):
        got, original = rms_norm(x, weight, cast=cast), rms_norm_reference(x, weight, cast=cast)
        assert got.dtype == original.dtype == dtype
        torch.testing.assert_close(got, original, rtol=2**-7, atol=1e-6)
        d_x, d_weight = torch.autograd.grad(got.float().sin().sum(), (x, weight))
        assert d_x.dtype == torch.bfloat16 and d_weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_orders_round_as_the_models_do(seed, dtype):
    """Bit for bit what transformers' modules give, up to the last bit of the statistic: at most one value in a hundred."""
    x, weight = torch.randn(60, 64).to(dtype), torch.randn(64).to(dtype)
    normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    llama, gemma = weight * normal.to(dtype), (normal * (1 + weight.float())).to(dtype)
    assert (rms_norm(x, weight) != llama).float().mean() < 1e-2, f"seed {seed}"
    assert (rms_norm(x, weight, offset=1.0, cast="float32") != gemma).float().mean() < 1e-2, f"seed {seed}"
    assert (rms_norm(x, weight, cast="float32") != llama).float().mean() > 0.05  # the two orders do differ


def test_errors_are_no_larger_than_the_plain_modules_own(seed):
    """The proof's own measure (norm of the difference over the norm) on shapes of real models, twice the own error."""
    for dtype, width in ((torch.float32, 576), (torch.float32, 8192), (torch.bfloat16, 576), (torch.bfloat16, 4096)):
        x, weight, grad = torch.randn(300, width).to(dtype), torch.randn(width).to(dtype), torch.randn(300, width).to(dtype)
        results = []
        for function, kind in ((rms_norm, dtype), (rms_norm_reference, dtype), (rms_norm_reference, torch.float64)):
            leaves = [t.to(kind).requires_grad_() for t in (x, weight)]
            y = function(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(kind))])
        for got, own, truth in zip(*results, strict=True):
            error, base = (float((t.double() - truth).norm() / truth.norm()) for t in (got, own))
            assert error <= max(2 * base, torch.finfo(dtype).eps / 2), f"{dtype} {width}: {error} {base}, seed {seed}"


def test_the_weights_gradient_in_16_bits_keeps_its_digits_where_pytorchs_does_not(seed):
    x, weight, bias = (leaf(*shape, dtype=torch.bfloat16) for shape in ((3000, 8), (8,), (8,)))
    grad = torch.randn(3000, 8).bfloat16()
    exact = wide(x, weight, bias)
    wanted = torch.autograd.grad(F.layer_norm(exact[0], (8,), *exact[1:]), exact, grad.double())
    ours = torch.autograd.grad(layer_norm(x, weight, bias), (x, weight, bias), grad)
    for got, value in zip(ours[1:], wanted[1:], strict=True):
        assert (got.double() - value).abs().max() <= 2**-8 * value.abs().max(), f"seed {seed}"


def test_strided_inputs_are_read_and_never_written(seed):
    store = torch.randn(24, 33).requires_grad_()
    before = store.detach().clone()
    for view in (lambda t: t.t()[::2], lambda t: t[:, 3:20], lambda t: t[::3], lambda t: t.view(4, 6, 33).transpose(0, 1),
                 lambda t: t[:1].expand(7, 33)):
        x, exact = view(store), view(store.detach().double().requires_grad_())
        leaf_ = store.detach().double().requires_grad_()
        exact = through_autograd(view(leaf_), None, None, 1e-6, 0.0, False)
        near(rms_norm(x), exact, torch.float32, seed)
        got, = torch.autograd.grad(rms_norm(x).sin().sum(), store)
        near(got, torch.autograd.grad(exact.sin().sum(), leaf_)[0], torch.float32, seed)
    assert torch.equal(store, before)


def test_blocks_do_not_change_the_result(monkeypatch, seed):
    x, weight = torch.randn(50, 91).requires_grad_(), torch.randn(91).requires_grad_()
    whole = rms_norm(x, weight)
    slopes = torch.autograd.grad(whole.sin().sum(), (x, weight))
    monkeypatch.setattr(norms, "BLOCK_ELEMENTS", 91 * 7)
    assert torch.equal(rms_norm(x, weight), whole)
    for got, wanted in zip(torch.autograd.grad(rms_norm(x, weight).sin().sum(), (x, weight)), slopes, strict=True):
        near(got, wanted, torch.float32, seed)  # BLAS orders its sums by the number of rows


def test_only_what_is_asked_for_is_computed(seed):
    x, weight = torch.randn(5, 6), torch.randn(6)
    for trained in (0, 1):
        leaves = [t.clone().requires_grad_(index == trained) for index, t in enumerate((x, weight))]
        exact = wide(*leaves)
        got, = torch.autograd.grad(rms_norm(*leaves).sin().sum(), leaves[trained])
        near(got, torch.autograd.grad(rms_norm_reference(*exact).sin().sum(), exact[trained])[0], torch.float32, seed)
    assert not rms_norm(x, weight).requires_grad


def test_what_is_saved_is_the_input_and_one_number_a_row():
    x, weight = leaf(40, 16, dtype=torch.bfloat16), leaf(16, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight)
    assert sorted((t.numel(), t.data_ptr() == x.data_ptr()) for t in kept) == [(16, False), (40, False), (640, True)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_torch_compile_goes_through(seed, dtype):
    x, residual, weight, bias = (leaf(*shape, dtype=dtype) for shape in ((6, 10), (6, 10), (10,), (10,)))

    def both(x, residual, weight, bias):
        normed, total = add_rms_norm(x, residual, weight, offset=1.0)
        return layer_norm(rms_norm(normed, weight), weight, bias) + total

    plain = both(x, residual, weight, bias)
    grads = torch.autograd.grad(plain.sum(), (x, residual, weight, bias))
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)(x, residual, weight, bias)
    near(compiled, plain, dtype, seed)
    for got, wanted in zip(torch.autograd.grad(compiled.sum(), (x, residual, weight, bias)), grads, strict=True):
        near(got, wanted, dtype, seed)


def test_autocast_leaves_the_inputs_types_alone():
    x, weight = torch.randn(3, 8), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(x, weight).dtype == torch.float32 and rms_norm(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


def test_what_is_wrong_is_said():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="cast is 'bfloat16'"):
        rms_norm(x, cast="bfloat16")
    with pytest.raises(ValueError, match=r"rows of 8 values need \(8,\)"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match="must be alike"):
        add_rms_norm(x, x.double())
    y = rms_norm(x.requires_grad_())
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum().backward()


# --- the Triton version, in its interpreter; the environment must know before triton is imported

INTERPRETED = r"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = sys.argv[2:]
import torch
import test_norms as t
from supertrainer.kernels import norm_rows, norms
launches = []
for name in ("forward", "backward"):
    plain = getattr(norm_rows, name)
    setattr(norm_rows, name, lambda *args, plain=plain: (launches.append(1), plain(*args))[1])
norm_rows.use_triton = lambda x: x.dtype != torch.float64
layer = norms.layer_norm
t.layer_norm = lambda x, weight=None, bias=None, eps=1e-5: (
    layer if x.dtype == torch.float64 else norms._LayerNorm.apply)(x, weight, bias, eps)
assert type(norm_rows._forward_kernel).__name__ == "InterpretedFunction"
seed = int(sys.argv[1])
torch.manual_seed(seed)
types = [dtype for dtype in t.TOLERANCE if dtype != torch.float64]
for longest in (8192, 16):  # rows in registers, and rows in several blocks
    norm_rows.LONGEST = longest
    for dtype in types:
        for shape in ((1, 1), (2, 3, 17), (0, 5)):
            for offset, cast, weighted in t.VARIANTS[::1 if dtype == torch.bfloat16 else 5]:
                t.test_rms_norm_and_all_gradients(None, seed, shape, dtype, offset, cast, weighted)
            t.test_add_rms_norm_and_all_gradients(None, seed, shape, dtype)
            for weighted, biased in ((True, True), (True, False), (False, False), (False, True)):
                if shape[-1] > 1 and 0 not in shape[1:]:
                    t.test_layer_norm_and_all_gradients(None, seed, shape, dtype, weighted, biased)
    t.test_only_one_of_the_two_results_is_used(seed)
    t.test_only_what_is_asked_for_is_computed(seed)
    t.test_strided_inputs_are_read_and_never_written(seed)
    t.test_a_wider_weight_in_each_order(seed)
    t.test_orders_round_as_the_models_do(seed, torch.float16)  # the interpreter cuts bfloat16 off instead of rounding
    x, weight = torch.randn(20, 20).bfloat16().requires_grad_(), torch.randn(20).bfloat16().requires_grad_()
    first, second = (torch.autograd.grad(norms.rms_norm(x, weight).sum(), weight)[0] for _ in range(2))
    assert torch.equal(first, second)
norm_rows.LONGEST = 8192
t.test_rms_norm_and_all_gradients(None, seed, (3, 20001), torch.float32, 0.0, "input", True)
print("launches", len(launches))
"""

COMPILED = r"""
import triton
from triton.backends.compiler import GPUTarget
from supertrainer.kernels import norm_rows
for element in ("fp32", "bf16", "fp16"):
    for centred, weighted in ((False, True), (True, True), (False, False)):
        flags = dict(OFFSET=0.0, CENTRED=centred, WEIGHT=weighted, BLOCK=1024)
        forward = dict(flags, BIAS=centred, RESIDUAL=not centred, EARLY=not centred, WHOLE=weighted)
        backward = dict(flags, D_X=True, D_WEIGHT=weighted, D_BIAS=centred, EXTRA=not centred)
        tensors = lambda names, kind: dict.fromkeys(names.split(), "*" + kind)
        inputs = {**tensors("x residual weight bias out summed", element), **tensors("means rstds", "fp32"),
                  "x_stride": "i64", "residual_stride": "i64", "width": "i32", "eps": "fp32"}
        grads = {**tensors("grad extra x weight", element), **tensors("means rstds", "fp32"), "d_x": "*" + element,
                 **tensors("d_weights d_biases", "fp32"), "grad_stride": "i64", "extra_stride": "i64", "x_stride": "i64",
                 "rows": "i32", "width": "i32", "run": "i32"}
        for kernel, signature, constants in ((norm_rows._forward_kernel, inputs, forward),
                                             (norm_rows._backward_whole, grads, backward),
                                             (norm_rows._backward_split, grads, backward)):
            source = triton.compiler.ASTSource(fn=kernel, constexprs=constants,
                                               signature={**signature, **dict.fromkeys(constants, "constexpr")})
            assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
print("compiled")
"""


def test_the_triton_version_in_its_interpreter(seed, in_a_new_process):
    done = in_a_new_process(INTERPRETED, seed, Path(__file__).parent)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    assert int(done.stdout.split()[-1]) > 100  # it was the Triton version


def test_the_triton_version_compiles_for_a_gpu(tmp_path, in_a_new_process):
    done = in_a_new_process(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


def test_the_plain_operations_serve_without_triton():
    assert not norm_rows.use_triton(torch.zeros(2, 3))
