"""Linear layers with low-rank adapters, and the gated MLP of them, against float64 maths written out by hand."""

import contextlib
import itertools
import random

import pytest
import torch

from supertrainer.kernels.activations import ACTIVATIONS
from supertrainer.kernels.lora import LinearPart, LoRAPart, lora_linears, lora_linears_reference
from supertrainer.kernels.lora_mlp import lora_gated_mlp, lora_gated_mlp_reference

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def seed():
    number = random.SystemRandom().randrange(2**31)
    print(f"seed {number}")
    torch.manual_seed(number)
    return number


def values(*shape, dtype=F64, grad=True):
    return (torch.randn(*shape, dtype=F64) / max(1, shape[-1]) ** 0.5).to(dtype).requires_grad_(grad)


def part(out, features, ranks=(3,), bias=True, dtype=F64, thin=None, weight_grad=True, scale=0.7, dropout=0.0):
    thin = dtype if thin is None else thin
    return LinearPart(values(out, features, dtype=dtype, grad=weight_grad),
                      values(out, dtype=dtype, grad=weight_grad) if bias else None,
                      tuple(LoRAPart(values(rank, features, dtype=thin), values(out, rank, dtype=thin),
                                     scale + index, dropout) for index, rank in enumerate(ranks)))


def tensors_of(*parts):
    found = []
    for one in parts:
        found += [one.weight, one.bias] + [tensor for lora in one.loras for tensor in (lora.A, lora.B)]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def exact_of(parts, x, slopes):
    """Outputs and gradients (x, then W, b, A, B, ... of each part) in float64, each written as its own matrix formula."""
    x = x.detach().double().reshape(-1, x.shape[-1])
    outputs, of_x, found = [], torch.zeros_like(x), []
    for one, slope in zip(parts, slopes, strict=True):
        weight = one.weight.detach().double()
        total = weight + sum(lora.scale * lora.B.detach().double() @ lora.A.detach().double() for lora in one.loras)
        slope = slope.detach().double().reshape(-1, len(weight))
        outputs.append(x @ total.T + (0 if one.bias is None else one.bias.detach().double()))
        of_x += slope @ total
        found += [slope.T @ x] + ([] if one.bias is None else [slope.sum(0)])
        for lora in one.loras:
            a, b = lora.A.detach().double(), lora.B.detach().double()
            found += [lora.scale * (slope @ b).T @ x, lora.scale * slope.T @ (x @ a.T)]
    return outputs, of_x, found


def distance(value, exact):
    exact = exact.detach().reshape(value.shape)
    return float((value.detach().double() - exact).norm() / exact.norm().clamp(min=1e-30))


def check(x, parts, limit):
    fused = lora_linears(x, parts)
    slopes = [torch.randn(y.shape, dtype=F64).to(y.dtype) for y in fused]
    outputs, of_x, of_tensors = exact_of(parts, x, slopes)
    for mine, exact in zip(fused, outputs, strict=True):
        assert distance(mine, exact) < limit
    leaves = [x, *tensors_of(*parts)]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(fused, asked, slopes)
    exact = [value for leaf, value in zip(leaves, [of_x, *of_tensors], strict=True) if leaf.requires_grad]
    for leaf, grad, value in zip(asked, grads, exact, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape and distance(grad, value) < limit
        assert grad.is_contiguous()
    return fused


@pytest.mark.parametrize(("dtype", "thin", "limit"), [
    (F64, F64, 1e-12), (F32, F32, 2e-5), (BF16, BF16, 2e-2), (BF16, F32, 2e-2), (F16, F32, 3e-3), (F32, BF16, 2e-2)], ids=str)
@pytest.mark.parametrize("shape", [(7,), (1, 1), (3, 5), (2, 3, 4), ()], ids=str)
def test_values_and_all_gradients(dtype, thin, limit, shape):
    x = values(*shape, 11, dtype=dtype)
    parts = [part(6, 11, dtype=dtype, thin=thin), part(5, 11, (2, 4), False, dtype, thin), part(1, 11, (), True, dtype)]
    for y, one in zip(check(x, parts, limit), parts, strict=True):
        assert y.shape == (*shape, one.weight.shape[0]) and y.dtype == dtype and not y._is_view()


@pytest.mark.parametrize("form", ["transposed", "strided", "expanded", "sliced"])
def test_strides(form):
    x = {"transposed": lambda: values(11, 9).t(), "strided": lambda: values(9, 22)[:, ::2],
         "expanded": lambda: values(1, 11).expand(9, 11), "sliced": lambda: values(4, 9, 15)[1:3, :, 2:13]}[form]()
    parts = [part(6, 11), part(4, 11)]
    leaf = x.detach().requires_grad_() if form != "expanded" else x
    check(leaf, parts, 1e-12)
    turned = LinearPart(values(11, 6).t(), None, (LoRAPart(values(11, 3).t(), values(3, 6).t(), 2.0),))
    check(values(9, 11), [turned], 1e-12)


def test_gradients_of_any_stride_reach_it():
    x, parts = values(2, 6, 11), [part(8, 11), part(4, 11)]
    y, z = lora_linears(x, parts)
    got = torch.autograd.grad(y.view(2, 6, 2, 4).transpose(1, 2).square().sum() + z.sum(), [x, *tensors_of(*parts)])
    y, z = lora_linears_reference(x, parts)
    want = torch.autograd.grad(y.view(2, 6, 2, 4).transpose(1, 2).square().sum() + z.sum(), [x, *tensors_of(*parts)])
    for mine, theirs in zip(got, want, strict=True):
        assert torch.allclose(mine, theirs)


@pytest.mark.parametrize("shape", [(0, 11), (2, 0, 11)], ids=str)
def test_no_tokens(shape):
    x, parts = values(*shape), [part(6, 11), part(4, 11, ())]
    outputs = lora_linears(x, parts)
    assert [y.shape for y in outputs] == [(*shape[:-1], 6), (*shape[:-1], 4)]
    for grad in torch.autograd.grad(sum(y.sum() for y in outputs), tensors_of(*parts)):
        assert not grad.any()


@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_what_is_asked_for(asked):
    """Every combination of gradients of x, W, A and B; the others are not computed, and nothing is kept for them."""
    of_x, of_weight, of_a, of_b = asked
    x = values(9, 11, grad=of_x)
    parts = [LinearPart(values(out, 11, grad=of_weight), None, (
        LoRAPart(values(3, 11, grad=of_a), values(out, 3, grad=of_b), 0.5),)) for out in (6, 4)]
    if not any(asked):
        assert not any(y.requires_grad for y in lora_linears(x, parts))
        return
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        check(x, parts, 1e-12)
    shapes = [tuple(t.shape) for t in kept]
    assert ((9, 11) in shapes) == (of_weight or of_a) and ((9, 6) in shapes) == of_b


def test_an_input_without_gradient_is_not_multiplied():
    """The first layer over frozen embeddings: one product with [tokens, in] as result less."""
    def products(grad):
        with torch.profiler.profile() as profile:
            y, = lora_linears(values(64, 11, grad=grad), [part(6, 11, weight_grad=False)])
            y.sum().backward()
        return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.events())

    assert products(False) == products(True) - 2


def test_unused_outputs_and_graph_kept():
    x, parts = values(9, 11), [part(6, 11), part(4, 11), part(5, 11)]
    fused, plain = lora_linears(x, parts), lora_linears_reference(x, parts)
    for chosen in ([1], [0, 2], [0, 1, 2]):
        leaves = [x, *tensors_of(*(parts[i] for i in chosen))]
        slopes = [torch.randn_like(plain[i]) for i in chosen]
        mine = torch.autograd.grad([fused[i] for i in chosen], leaves, slopes, retain_graph=True)
        theirs = torch.autograd.grad([plain[i] for i in chosen], leaves, slopes, retain_graph=True)
        assert all(torch.allclose(a, b) for a, b in zip(mine, theirs, strict=True))
    unused = torch.autograd.grad(fused[0], parts[1].loras[0].A, torch.ones_like(fused[0]), allow_unused=True)[0]
    assert unused is None


@pytest.mark.parametrize("ranks", [(3,), (2, 3)])
def test_gradcheck(ranks):
    x, parts = values(4, 5), [part(6, 5, ranks), part(3, 5, ranks, bias=False)]

    def run(*_):
        return tuple(lora_linears(x, parts))

    assert torch.autograd.gradcheck(run, (x, *tensors_of(*parts)))


def test_a_second_derivative_is_refused():
    x = values(4, 5)
    y, = lora_linears(x, [part(6, 5)])
    grad, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        grad.sum().backward()


def test_weights_unpacked_at_use():
    calls = []
    weight, x = values(6, 11, dtype=BF16, grad=False), values(9, 11, dtype=BF16)

    def unpack():
        calls.append(1)
        return weight.float()

    lora = (LoRAPart(values(3, 11, dtype=F32), values(6, 3, dtype=F32), 2.0),)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        packed, = lora_linears(x, [LinearPart(unpack, None, lora)])
    assert len(calls) == 1 and (6, 11) not in kept
    dense, = lora_linears(x, [LinearPart(weight, None, lora)])
    leaves = [x, lora[0].A, lora[0].B]
    mine = torch.autograd.grad(packed, leaves, torch.ones_like(packed))
    assert len(calls) == 2 and torch.equal(packed, dense)
    assert all(torch.equal(a, b) for a, b in zip(
        mine, torch.autograd.grad(dense, leaves, torch.ones_like(dense)), strict=True))


# dropout

@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_draws_as_torch_does(seed, p):
    """On the CPU the masks are the very ones of torch's dropout, adapter after adapter, so the results are equal."""
    x = values(7, 11)
    parts = [part(6, 11, (2, 3), dropout=p), part(4, 11), part(5, 11, dropout=p)]
    leaves = [x, *tensors_of(*parts)]
    torch.manual_seed(seed)
    fused = lora_linears(x, parts)
    torch.manual_seed(seed)
    plain = lora_linears_reference(x, parts)
    slopes = [torch.randn_like(y) for y in plain]
    for mine, theirs in zip(fused, plain, strict=True):
        assert torch.allclose(mine, theirs)
    for mine, theirs in zip(torch.autograd.grad(fused, leaves, slopes),
                            torch.autograd.grad(plain, leaves, slopes), strict=True):
        assert torch.allclose(mine, theirs)


def test_dropout_is_unbiased_and_independent():
    one = LinearPart(torch.zeros(1, 4096, dtype=F64), None, (
        LoRAPart(torch.ones(1, 4096, dtype=F64), torch.ones(1, 1, dtype=F64), 1.0, 0.25),))
    x = torch.ones(400, 4096, dtype=F64)
    first, second = (y.squeeze(1) for y in lora_linears(x, [one, one]))
    spread = (4096 * 0.25 / 0.75) ** 0.5
    assert abs(first.mean() - 4096) < 6 * spread / 20 and abs(first.std() / spread - 1) < 0.25
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.3


# types, autocast, refusal

@pytest.mark.parametrize("inputs", [F32, BF16])
@pytest.mark.parametrize("weights", [F32, BF16])
def test_autocast_as_linear(inputs, weights):
    x, one = values(9, 11, dtype=inputs), part(6, 11, dtype=weights, thin=F32)
    with torch.autocast("cpu", BF16):
        y, = lora_linears(x, [one])
        want = torch.nn.functional.linear(x, one.weight, one.bias)
        thin = torch.nn.functional.linear(torch.nn.functional.linear(x, one.loras[0].A), one.loras[0].B)
        out = lora_gated_mlp(x, one, one, part(4, 6, dtype=weights, thin=F32))
    assert y.dtype == want.dtype == out.dtype == BF16
    assert distance(y, want.double() + one.loras[0].scale * thin.double()) < 1e-2
    grads = torch.autograd.grad(y, [x, *tensors_of(one)], torch.ones_like(y))
    assert [g.dtype for g in grads] == [t.dtype for t in [x, *tensors_of(one)]]
    _, of_x, found = exact_of([one], x, [torch.ones_like(y)])
    assert all(distance(grad, exact) < 2e-2 for grad, exact in zip(grads, [of_x, *found], strict=True))


def test_float64_is_not_narrowed_by_autocast():
    x, one = values(9, 11), part(6, 11)
    with torch.autocast("cpu", BF16):
        check(x, [one], 1e-12)


def test_backward_under_autocast_is_the_same():
    x, one = values(9, 11, dtype=F32), part(6, 11, dtype=F32)
    y, = lora_linears(x, [one])
    plain = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0]
    with torch.autocast("cpu", BF16):
        assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], plain)


@pytest.mark.parametrize(("change", "error", "words"), [
    (lambda p: LinearPart(p.weight[:, :-1]), ValueError, "weight must be"),
    (lambda p: LinearPart(p.weight.float()), TypeError, "autocast"),
    (lambda p: LinearPart(p.weight, p.bias[:-1]), ValueError, "agree"),
    (lambda p: LinearPart(p.weight, None, (LoRAPart(p.loras[0].A[:-1], p.loras[0].B),)), ValueError, "A must be"),
    (lambda p: LinearPart(p.weight, None, (LoRAPart(p.loras[0].A, p.loras[0].B, 1.0, 1.5),)), ValueError, "probability"),
])
def test_what_does_not_fit_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        lora_linears(values(3, 11), [change(part(6, 11))])


def test_inputs_and_saved_tensors_stay_as_they_are():
    x, parts = values(9, 11), [part(6, 11), part(4, 11)]
    mlp = [part(7, 11), part(7, 11), part(5, 7)]
    given = [x, *tensors_of(*parts, *mlp)]
    before = [tensor.detach().clone() for tensor in given]
    total = sum(y.sum() for y in lora_linears(x, parts)) + lora_gated_mlp(x, *mlp).sum()
    first = torch.autograd.grad(total, given, retain_graph=True)
    second = torch.autograd.grad(total, given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, given, strict=True))


# the gated MLP

def exact_mlp(x, gate, up, down, activation):
    """The formula in float64, from merged weights."""
    x = x.double()

    def layer(one, value):
        total = one.weight.double() + sum(lora.scale * lora.B.double() @ lora.A.double() for lora in one.loras)
        return value @ total.T + (0 if one.bias is None else one.bias.double())

    z = layer(gate, x)
    act = {"silu": lambda v: v * torch.sigmoid(v), "gelu": lambda v: v * 0.5 * (1 + torch.erf(v / 2**0.5)),
           "gelu_tanh": lambda v: 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
           "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v), "relu": lambda v: v.clamp(min=0),
           "relu2": lambda v: v.clamp(min=0) ** 2, "sigmoid": torch.sigmoid}[activation]
    return layer(down, act(z) * layer(up, x))


@pytest.mark.parametrize(("dtype", "thin", "limit"), [(F64, F64, 1e-11), (F32, F32, 5e-5), (BF16, F32, 4e-2)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation, dtype, thin, limit):
    x = values(2, 9, 11, dtype=dtype)
    parts = [part(14, 11, dtype=dtype, thin=thin), part(14, 11, (2, 3), False, dtype, thin),
             part(5, 14, dtype=dtype, thin=thin)]
    mine, exact = lora_gated_mlp(x, *parts, activation), exact_mlp(x, *parts, activation)
    assert mine.dtype == dtype and not mine._is_view() and distance(mine, exact) < limit
    leaves, slope = [x, *tensors_of(*parts)], torch.randn(mine.shape).to(dtype)
    for grad, want in zip(torch.autograd.grad(mine, leaves, slope),
                          torch.autograd.grad(exact, leaves, slope.double()), strict=True):
        assert distance(grad, want.double()) < limit


@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=4)), ids=str)
def test_mlp_only_what_is_asked_for(asked):
    of_x, of_gate, of_up, of_down = asked
    x = values(9, 11, grad=of_x)
    parts = [part(out, width, weight_grad=False) for out, width in ((14, 11), (14, 11), (5, 14))]
    for one, grad in zip(parts, (of_gate, of_up, of_down), strict=True):
        for lora in one.loras:
            lora.A.requires_grad_(grad), lora.B.requires_grad_(grad)
    mine, plain = lora_gated_mlp(x, *parts), lora_gated_mlp_reference(x, *parts)
    assert torch.allclose(mine, plain) and mine.requires_grad == any(asked)
    leaves = [leaf for leaf in [x, *tensors_of(*parts)] if leaf.requires_grad]
    if leaves:
        for a, b in zip(torch.autograd.grad(mine.square().sum(), leaves),
                        torch.autograd.grad(plain.square().sum(), leaves), strict=True):
            assert torch.allclose(a, b)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_mlp_base_weights(which):
    """Full fine-tuning of one of the three, no adapter anywhere."""
    x = values(9, 11, grad=False)
    parts = [part(out, width, (), weight_grad=index == which) for index, (out, width) in
             enumerate(((14, 11), (14, 11), (5, 14)))]
    leaves = [parts[which].weight, parts[which].bias]
    mine, plain = lora_gated_mlp(x, *parts), lora_gated_mlp_reference(x, *parts)
    for a, b in zip(torch.autograd.grad(mine.square().sum(), leaves),
                    torch.autograd.grad(plain.square().sum(), leaves), strict=True):
        assert torch.allclose(a, b)


def test_mlp_gradcheck_dropout_and_empty(seed):
    x, parts = values(3, 5), [part(6, 5), part(6, 5, bias=False), part(4, 6)]
    assert torch.autograd.gradcheck(lambda *_: lora_gated_mlp(x, *parts), (x, *tensors_of(*parts)))
    dropped = [LinearPart(p.weight, p.bias, (LoRAPart(p.loras[0].A, p.loras[0].B, 1.5, 0.4),)) for p in parts]
    leaves, results = [x, *tensors_of(*dropped)], []
    for run in (lora_gated_mlp, lora_gated_mlp_reference):
        torch.manual_seed(seed)
        y = run(x, *dropped)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))
    nothing = lora_gated_mlp(x[:0], *parts)
    assert nothing.shape == (0, 4)
    assert not any(g.any() for g in torch.autograd.grad(nothing.sum(), tensors_of(*parts)))


def test_mlp_keeps_two_inner_tensors():
    x, parts = values(50, 11, dtype=BF16), [part(14, 11, dtype=BF16, thin=F32), part(14, 11, dtype=BF16, thin=F32),
                                            part(5, 14, dtype=BF16, thin=F32)]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        lora_gated_mlp(x, *parts)
    own = {t.data_ptr() for t in tensors_of(*parts)}
    assert sorted(tuple(t.shape) for p, t in kept.items() if p not in own) == [
        (50, 3), (50, 6), (50, 11), (50, 14), (50, 14)]


@pytest.mark.parametrize(("parts", "words"), [
    (lambda: [part(14, 11), part(13, 11), part(5, 14)], "same number"), (lambda: [part(14, 11), part(14, 11), part(5, 13)],
                                                                         "weight must be")])
def test_mlp_refuses(parts, words):
    with pytest.raises(ValueError, match=words):
        lora_gated_mlp(values(3, 11), *parts())
    with pytest.raises(ValueError, match="unknown activation"):
        lora_gated_mlp(values(3, 11), part(14, 11), part(14, 11), part(5, 14), "swish")


# torch.compile

@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
def test_compile(seed, dropout, autocast):
    x = values(9, 11, dtype=F32)
    parts = [part(6, 11, dtype=F32, dropout=dropout), part(6, 11, (2, 3), dtype=F32)]
    down = part(4, 6, dtype=F32)

    def run(x):
        y, z = lora_linears(x, parts)
        return lora_gated_mlp(x, *parts, down) + y.sum() + z.sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager")
    leaves = [x, *tensors_of(*parts, down)]
    results = []
    for form in (run, compiled):
        torch.manual_seed(seed)
        with torch.autocast("cpu", BF16) if autocast else contextlib.nullcontext():
            y = form(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    if not dropout:  # a compiled program draws in another order
        for a, b in zip(*results, strict=True):
            assert distance(a, b.double()) < (5e-2 if autocast else 1e-5)
    assert all(torch.isfinite(value).all() for value in results[1])


def test_compile_without_a_break():
    x, one = values(9, 11, dtype=F32), part(6, 11, dtype=F32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: lora_linears(x, [one])[0], backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), lora_linears(x, [one])[0], atol=1e-6)
    torch.autograd.grad(compiled(x).sum(), [x, *tensors_of(one)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint
    x, parts = values(9, 11), [part(14, 11, dropout=0.3), part(14, 11), part(5, 14)]
    leaves, results = [x, *tensors_of(*parts)], []
    for again in (False, True):
        torch.manual_seed(3)
        y = checkpoint(lora_gated_mlp, x, *parts, use_reentrant=reentrant) if again else lora_gated_mlp(x, *parts)
        for leaf in leaves:
            leaf.grad = None
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))
