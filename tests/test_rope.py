"""RoPE against its formula written out pair by pair, in every layout, and its Triton version in the interpreter."""

from pathlib import Path

import pytest
import torch

from supertrainer.kernels import rope
from supertrainer.kernels.rope import rotate, rotate_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYOUTS = [{}, {"interleaved": True}, {"unsqueeze_dim": 2}, {"interleaved": True, "unsqueeze_dim": 2}]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(rope, "BLOCK_ELEMENTS", 50)


def by_hand(x, cos, sin, interleaved, heads_dim, sections, positions):
    """Each pair turned on its own: float64, no broadcasting, no slices."""
    x = x if heads_dim == 1 else x.transpose(1, 2)
    width, out = cos.shape[-1], x.clone()
    planes = [0] * (width // 2) if sections is None else [p for p, size in enumerate(sections) for _ in range(size)]

    def angle(table, batch, token, plane, column):
        if positions is not None:
            return table[positions[(plane, batch, token) if sections else (batch, token)], column]
        table = table[plane] if sections else table
        return table[token, column] if table.dim() == 2 else table[batch if table.shape[0] > 1 else 0, token, column]

    for batch in range(x.shape[0]):
        for token in range(x.shape[2]):
            for pair, plane in enumerate(planes):
                a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
                one, two = x[batch, :, token, a], x[batch, :, token, b]
                out[batch, :, token, a] = (one * angle(cos, batch, token, plane, a)
                                           - two * angle(sin, batch, token, plane, a))
                out[batch, :, token, b] = (two * angle(cos, batch, token, plane, b)
                                           + one * angle(sin, batch, token, plane, b))
    return out if heads_dim == 1 else out.transpose(1, 2)


def make(dtype, dim=12, width=8, heads=3, key_heads=1, batch=2, length=5, heads_dim=1, sections=None, indexed=False,
         table_batch=None):
    shape = (lambda n: (batch, n, length, dim)) if heads_dim == 1 else (lambda n: (batch, length, n, dim))
    q, k = torch.randn(shape(heads)).to(dtype), torch.randn(shape(key_heads)).to(dtype)
    rows = ((3,) if sections else ()) + (table_batch or batch, length)
    tables = [torch.randn(*((9,) if indexed else rows), width).to(dtype) for _ in range(2)]
    positions = torch.randint(0, 9, ((3,) if sections else ()) + (batch, length)) if indexed else None
    return q, k, *tables, positions


def check(seed, dtype, interleaved=False, unsqueeze_dim=1, sections=None, **sizes):
    q, k, cos, sin, positions = make(dtype, heads_dim=unsqueeze_dim, sections=sections, **sizes)
    before = q.clone(), k.clone()
    q.requires_grad_(), k.requires_grad_()
    options = dict(interleaved=interleaved, unsqueeze_dim=unsqueeze_dim, positions=positions, sections=sections)
    found = rotate(q, k, cos, sin, **options)
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    tables = cos.double(), sin.double()
    expected = [by_hand(x, *tables, interleaved, unsqueeze_dim, sections, positions) for x in wide]
    reference = rotate_reference(*wide, *tables, **options)
    slopes = [torch.randn_like(x) for x in found]
    torch.autograd.backward(found, slopes)
    torch.autograd.backward(expected, [slope.double() for slope in slopes])
    tolerance = TOLERANCE[dtype]
    for got, wanted in zip([*found, q.grad, k.grad, *reference], [*expected, *(x.grad for x in wide), *expected],
                           strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=2 * tolerance, msg=lambda m: f"{seed}: {m}")
    assert found[0].dtype == dtype and q.grad.dtype == dtype
    assert torch.equal(q.detach(), before[0]) and torch.equal(k.detach(), before[1])


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(small_blocks, seed, dtype, options):
    check(seed, dtype, **options)
    check(seed, dtype, dim=8, width=8, **options)  # whole heads turn
    check(seed, dtype, indexed=True, **options)
    check(seed, dtype, sections=(2, 1, 1), **options)
    check(seed, dtype, sections=(1, 0, 3), indexed=True, **options)
    check(seed, dtype, table_batch=1, **options)


def test_as_transformers(seed):
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    angles = torch.randn(2, 7, 8)
    halves, pairs = angles.repeat(1, 1, 2), angles.repeat_interleave(2, -1)
    for theirs, ours, interleaved in ((llama, halves, False), (cohere, pairs, True)):
        for got, wanted in zip(rotate(q, k, ours.cos(), ours.sin(), interleaved=interleaved),
                               theirs(q, k, ours.cos(), ours.sin()), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, msg=lambda m: f"{seed}: {m}")
    half = angles[..., :4]
    wanted = glm(q, k, half.repeat(1, 1, 2).cos(), half.repeat(1, 1, 2).sin())
    found = rotate(q, k, half.repeat_interleave(2, -1).cos(), half.repeat_interleave(2, -1).sin(), interleaved=True)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)


def test_strides_stay_and_nothing_is_copied(seed):
    base = torch.randn(1, 6, 4 * 8 + 2 * 8)  # a fused projection
    q, k = (x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in base.split([32, 16], -1))
    cos, sin = torch.randn(6, 8), torch.randn(6, 8)
    found = rotate(q, k, cos, sin)
    assert found[0].transpose(1, 2).is_contiguous() and found[0].stride(1) == 8
    torch.testing.assert_close(found, rotate_reference(q, k, cos, sin))
    spread = q[:, :1].expand(1, 3, 6, 8)
    torch.testing.assert_close(rotate(spread, k, cos, sin)[0], rotate_reference(spread, k, cos, sin)[0])


def test_only_the_gradient_that_is_asked_for(seed, monkeypatch):
    turned = []
    native = rope._native
    monkeypatch.setattr(rope, "_native", lambda x, *rest: (turned.append(x.shape[1]), native(x, *rest))[1])
    q, k, cos, sin, _ = make(torch.float32)
    rotate(q, k.requires_grad_(), cos, sin)[1].sum().backward()
    assert turned == [3, 1, 1] and k.grad is not None


def test_an_empty_batch_and_a_result_nobody_used(seed):
    q, k, cos, sin, _ = make(torch.float32, batch=0)
    q.requires_grad_()
    rotate(q, k, cos, sin)[0].sum().backward()
    assert q.grad.shape == q.shape
    q, k, cos, sin, _ = make(torch.float32)
    q.requires_grad_(), k.requires_grad_()
    rotate(q, k, cos, sin)[0].sum().backward()
    assert not k.grad.any()


def test_what_does_not_fit_is_refused(seed):
    q, k, cos, sin, _ = make(torch.float32)
    for arguments, options in [((q, k[:1], cos, sin), {}), ((q, k, cos[:, :4], sin[:, :4]), {}),
                               ((q, k, cos[..., :7], sin[..., :7]), {}), ((q, k, cos, sin[..., :4]), {}),
                               ((q, k, cos, sin), {"sections": (2, 2)}), ((q, k, cos, sin), {"sections": (2, 1, 1)}),
                               ((q, k, cos, sin), {"unsqueeze_dim": 3}),
                               ((q, k, cos, sin), {"positions": torch.zeros(2, 5, dtype=torch.int64)}),
                               ((q, k, cos.clone().requires_grad_(), sin), {})]:
        with pytest.raises(ValueError):
            rotate(*arguments, **options)


def test_a_second_derivative_is_an_error(seed):
    q, k, cos, sin, _ = make(torch.float32)
    q.requires_grad_()
    grad, = torch.autograd.grad(rotate(q, k, cos, sin)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        grad.sum().backward()


@pytest.mark.parametrize("options", LAYOUTS[:2], ids=str)
def test_compiled(seed, options):
    q, k, cos, sin, _ = make(torch.float32)
    q.requires_grad_(), k.requires_grad_()
    expected = rotate(q, k, cos, sin, **options)
    wanted = torch.autograd.grad([x.square().sum() for x in expected], [q, k])
    compiled = torch.compile(lambda q, k: rotate(q, k, cos, sin, **options), backend="aot_eager", fullgraph=True)
    found = compiled(q, k)
    torch.testing.assert_close(found, expected, msg=lambda m: f"{seed}: {m}")
    torch.testing.assert_close(torch.autograd.grad([x.square().sum() for x in found], [q, k]), wanted)


# --- the Triton version, in its interpreter; the environment must know before triton is imported

INTERPRETED = r"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = sys.argv[2:]
import torch
import test_rope as t
from supertrainer.kernels import rope
launches = []
launch = rope._launch
rope._use_triton = lambda x: True
rope._launch = lambda *args: (launches.append(1), launch(*args))
assert type(rope._rotate_kernel).__name__ == "InterpretedFunction"
seed = int(sys.argv[1])
torch.manual_seed(seed)
for options in t.LAYOUTS:
    for dtype in t.TOLERANCE:
        t.check(seed, dtype, **options)
    t.check(seed, torch.float32, dim=8, width=8, heads=40, **options)  # two steps over the heads
    t.check(seed, torch.float32, dim=7 * 2, width=6, **options)
    t.check(seed, torch.float32, indexed=True, **options)
    t.check(seed, torch.float32, sections=(2, 1, 1), **options)
    t.check(seed, torch.float32, sections=(1, 0, 3), indexed=True, **options)
    t.check(seed, torch.float32, table_batch=1, **options)
    t.check(seed, torch.float32, table_batch=1, sections=(1, 1, 2), **options)
t.test_as_transformers(seed)
t.test_strides_stay_and_nothing_is_copied(seed)
t.test_an_empty_batch_and_a_result_nobody_used(seed)
q, k, cos, sin, _ = t.make(torch.float32)
before = len(launches)
rope.rotate(q, k.requires_grad_(), cos, sin)[1].sum().backward()
assert len(launches) == before + 2  # q and k in one
print("launches", len(launches))
"""

COMPILED = r"""
import triton
from triton.backends.compiler import GPUTarget
from supertrainer.kernels import rope
import inspect
names = list(inspect.signature(rope._rotate_kernel.fn).parameters)
for kind, wide in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
    for interleaved, back, first, indexed in ((False, False, None, False), (True, True, 16, True)):
        import triton.language as tl
        constants = dict(FIRST_SECTION=first, TWO_SECTIONS=None if first is None else 40, INDEXED=indexed,
                         INTERLEAVED=interleaved, BACK=back, DIM=128, WIDTH=96, PAIRS=64, REST=32, HEADS=32,
                         wide=tl.float64 if wide == "fp64" else tl.float32)
        signature = {name: "constexpr" if name in constants else "i32" for name in names}
        signature |= {name: "*" + kind for name in ("q", "k", "q_out", "k_out", "cos", "sin")} | {"positions": "*i64"}
        source = triton.compiler.ASTSource(fn=rope._rotate_kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
print("compiled")
"""


def test_the_triton_version_in_its_interpreter(seed, in_a_new_process):
    done = in_a_new_process(INTERPRETED, seed, Path(__file__).parent)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    assert int(done.stdout.split()[-1]) > 50  # it was the Triton version


def test_the_triton_version_compiles_for_a_gpu(tmp_path, in_a_new_process):
    done = in_a_new_process(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]
