"""Kernels against float64 references: every gradient, odd shapes, strides and types, and what must never be created."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from supertrainer.kernels import cross_entropy, linear_cross_entropy
from supertrainer.kernels.cross_entropy import RowLoss, row_losses, row_losses_reference, row_step
from supertrainer.kernels.linear_cross_entropy import chunks, linear_cross_entropy_reference, selected_log_probabilities

fused = linear_cross_entropy.linear_cross_entropy
VARIANTS = [{}, {"softcap": 3.0}, {"scale": 0.25}, {"label_smoothing": 0.2}, {"z_loss": 1e-2},
            {"softcap": 5.0, "scale": 1.5, "label_smoothing": 0.1, "z_loss": 1e-3}]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ELEMENTS", 700)


def explicit(logits, targets, ignore_index=-100, softcap=None, scale=1.0, label_smoothing=0.0, z_loss=0.0):
    """The formula, word by word, from float64 logits: [rows] losses."""
    losses = []
    for row, target in zip(logits, targets.tolist(), strict=True):
        if target == ignore_index:
            losses.append(torch.zeros((), dtype=torch.float64))
            continue
        z = row * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        log_p = z - torch.log(torch.exp(z - z.max()).sum()) - z.max()
        normalizer = (z - log_p)[0]
        losses.append(-(1 - label_smoothing) * log_p[target] - label_smoothing * log_p.mean() + z_loss * normalizer**2)
    return torch.stack(losses) if losses else logits.sum(-1)


def near(got, wanted, dtype, seed, what=""):
    """Close relative to the largest value: a rounding error is as big as what was rounded."""
    tolerance = TOLERANCE[dtype]
    bound = tolerance * max(wanted.abs().max().item() if wanted.numel() else 0, 0.1)
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=bound,
                               msg=lambda text: f"{what}, seed {seed}: {text}")


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows,vocabulary", [(1, 1), (7, 31), (64, 257), (0, 5)])
def test_row_losses_and_slopes_against_the_formula(small_pieces, seed, options, dtype, rows, vocabulary):
    logits = (torch.randn(rows, vocabulary, dtype=torch.float64) * 6).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    targets[1::3] = -100
    weights = torch.rand(rows, dtype=torch.float64)
    wide = logits.detach().double().requires_grad_()
    expected = explicit(wide, targets, **options)
    (expected * weights).sum().backward()
    losses = row_losses(logits, targets, **options)
    (losses * weights.to(losses.dtype)).sum().backward()
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near(losses, expected, torch.float64 if dtype == torch.float64 else torch.float32, seed, "losses")
    near(logits.grad, wide.grad, dtype, seed, "slopes")
    near(row_losses_reference(wide, targets, RowLoss(**options)), expected, torch.float64, seed, "reference")


def test_label_smoothing_is_pytorchs(seed):
    logits, targets = torch.randn(9, 13, dtype=torch.float64), torch.randint(0, 13, (9,))
    targets[4] = 7  # an ignored index that is a word
    for smoothing in (0.0, 0.3, 1.0):
        wanted = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing, ignore_index=7)
        near(row_losses(logits, targets, label_smoothing=smoothing, ignore_index=7), wanted, torch.float64, seed)


def test_logits_of_minus_infinity_and_masked_rows_that_are_not_finite():
    logits = torch.randn(4, 9)
    logits[0, :5], logits[1], logits[2, 3] = float("-inf"), float("nan"), float("-inf")
    targets = torch.tensor([7, -100, 4, 0])
    logits.requires_grad_()
    wide = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none", ignore_index=-100)
    expected[[0, 2, 3]].sum().backward()
    losses = row_losses(logits, targets)
    losses.sum().backward()
    torch.testing.assert_close(losses[[0, 2, 3]].double(), expected[[0, 2, 3]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad[[0, 2, 3]].double(), wide.grad[[0, 2, 3]], rtol=1e-6, atol=1e-6)
    assert losses[1] == 0 and not logits.grad[1].any()


def test_strided_logits_are_read_in_place_and_never_written(seed):
    store = torch.randn(33, 24).requires_grad_()
    before, targets = store.detach().clone(), torch.randint(0, 33, (12,))
    logits = store.t()[::2]
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    near(row_losses(logits, targets), expected, torch.float32, seed)
    wanted, = torch.autograd.grad(expected.sum(), store)
    got, = torch.autograd.grad(row_losses(logits, targets).sum(), store)
    near(got, wanted, torch.float32, seed)
    assert torch.equal(store, before)


def test_blocks_do_not_change_a_bit(monkeypatch):
    logits, targets = torch.randn(50, 91), torch.randint(0, 91, (50,))
    whole = row_losses(logits, targets)
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 91 * 7)
    assert torch.equal(row_losses(logits, targets), whole)


def test_slopes_over_the_logits_themselves(small_pieces, seed):
    logits, targets, grads = torch.randn(11, 40), torch.randint(0, 40, (11,)), torch.rand(11)
    apart = torch.empty_like(logits)
    row_step(logits, targets, RowLoss(softcap=2.0), row_grads=grads, slopes=apart)
    row_step(logits, targets, RowLoss(softcap=2.0), row_grads=grads, slopes=logits)
    assert torch.equal(logits, apart), f"seed {seed}"


# --- linear layer and cross-entropy in one


def make(rows, vocabulary, features, dtype=torch.float64, bias=True, weights=True, masked=3):
    """Inputs of the fused loss, as leaves, with every `masked`-th row ignored."""
    targets = torch.randint(0, vocabulary, (rows,))
    if masked:
        targets[::masked] = -100
    hidden = torch.randn(rows, features, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, features, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    weights = torch.rand(rows, dtype=torch.float64).to(dtype).requires_grad_() if weights else None
    return hidden, weight, targets, bias, weights


def widened(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def assert_step(seed, hidden, weight, targets, bias, weights, dtype, **options):
    """Value and all gradients against the explicit formula in float64; for `"none"`, under random incoming gradients."""
    h, w, b, r = widened(hidden, weight, bias, weights)
    losses = explicit(F.linear(h, w, b), targets, **{k: v for k, v in options.items()
                                                     if k not in ("reduction", "num_items", "chunk_rows")})
    losses = losses if r is None else losses * r
    reduction = options.get("reduction", "sum")
    count = options.get("num_items") or max(1, int((targets != -100).sum()))
    expected = losses if reduction == "none" else losses.sum() / (count if reduction == "mean" else 1)
    loss = fused(hidden, weight, targets, bias, weights=weights, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide and loss.shape == expected.shape
    near(loss.detach(), expected.detach(), dtype, seed, "loss")
    arriving = torch.rand(expected.shape, dtype=torch.float64) + 0.5
    leaves = [(t, d) for t, d in zip((hidden, weight, bias, weights), (h, w, b, r), strict=True) if t is not None]
    wanted = torch.autograd.grad(expected, [d for _, d in leaves], arriving)
    got = torch.autograd.grad(loss, [t for t, _ in leaves], arriving.to(wide))
    for (leaf, _), value, want in zip(leaves, got, wanted, strict=True):
        assert value.dtype == leaf.dtype and value.shape == leaf.shape
        near(value, want, dtype, seed, f"gradient {list(leaf.shape)}")
    assert not got[0][targets == -100].any(), "a masked row's gradient is an exact zero"


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fused_loss_and_every_gradient_against_the_formula(small_pieces, seed, options, reduction, dtype):
    assert_step(seed, *make(41, 67, 13, dtype), dtype, reduction=reduction, **options)


def make_pairs(rows, vocabulary, ranks, dtype):
    return [tuple(torch.randn(size, rank, dtype=torch.float64).to(dtype).requires_grad_() for size in (rows, vocabulary))
            for rank in ranks]


@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[-1]], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_pairs_add_their_product_and_get_their_gradients(seed, options, reduction, dtype, chunk_rows):
    hidden, weight, targets, bias, weights = make(41, 67, 13, dtype)
    pairs = make_pairs(41, 67, (3, 1), dtype)
    leaves = [hidden, weight, bias, weights, *(side for pair in pairs for side in pair)]
    h, w, b, r, *flat = wide = widened(*leaves)
    logits = F.linear(h, w, b) + flat[0] @ flat[1].T + flat[2] @ flat[3].T
    losses = explicit(logits, targets, **options) * r
    expected = losses if reduction == "none" else losses.sum() / (1 if reduction == "sum" else (targets != -100).sum())
    got = fused(hidden, weight, targets, bias, pairs=pairs, weights=weights, reduction=reduction, chunk_rows=chunk_rows,
                **options)
    # logits of all products are rounded once for each product
    loose = {torch.bfloat16: torch.float16, torch.float16: torch.float16}.get(dtype, dtype)
    TOLERANCE_HERE = {torch.bfloat16: 8e-2, torch.float16: 1e-2}.get(dtype, TOLERANCE[loose])
    arriving = torch.rand(expected.shape, dtype=torch.float64) + 0.5
    wanted = torch.autograd.grad(expected, wide, arriving)
    found = torch.autograd.grad(got, leaves, arriving.to(got.dtype))
    for leaf, one, two in zip(leaves, found, wanted, strict=True):
        assert one.dtype == leaf.dtype and one.shape == leaf.shape
        bound = TOLERANCE_HERE * max(two.abs().max().item(), 0.1)
        torch.testing.assert_close(one.double(), two, rtol=TOLERANCE_HERE, atol=bound, msg=lambda text: f"seed {seed}: {text}")
    bound = TOLERANCE_HERE * max(expected.abs().max().item(), 0.1)
    torch.testing.assert_close(got.detach().double(), expected.detach(), rtol=TOLERANCE_HERE, atol=bound)


def test_pairs_under_gradcheck_and_in_the_reference(seed):
    hidden, weight, targets, bias, _ = make(7, 5, 3)
    (left, right), = make_pairs(7, 5, (2,), torch.float64)
    for reduction in ("sum", "none"):
        function = lambda h, w, b, one, two: fused(h, w, targets, b, pairs=[(one, two)], reduction=reduction,  # noqa: E731, B023
                                                   softcap=4.0, chunk_rows=2)
        assert torch.autograd.gradcheck(function, (hidden, weight, bias, left, right))
        near(fused(hidden, weight, targets, bias, pairs=[(left, right)], reduction=reduction).detach(),
             linear_cross_entropy_reference(hidden, weight, targets, bias, pairs=[(left, right)], reduction=reduction).detach(),
             torch.float64, seed)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_weight_given_by_a_function_is_asked_for_and_not_kept(seed, reduction):
    hidden, weight, targets, bias, _ = make(23, 37, 8, weights=False)
    (left, right), = make_pairs(23, 37, (2,), torch.float64)
    calls = []

    def dense():
        calls.append(1)
        return weight.detach().float().double()

    leaves = (hidden, bias, left, right)
    wanted = fused(hidden, weight.detach().float().double(), targets, bias, pairs=[(left, right)], reduction=reduction)
    got = fused(hidden, dense, targets, bias, pairs=[(left, right)], reduction=reduction)
    assert torch.equal(got, wanted) and len(calls) == 1
    for one, two in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True):
        assert torch.equal(one, two)
    assert len(calls) == (1 if reduction == "sum" else 2)
    with pytest.raises(IndexError, match="0 to 36"):
        fused(hidden, dense, targets.clamp(min=0) + 37, bias)
    near(selected_log_probabilities(hidden, dense, targets).detach(),
         -linear_cross_entropy_reference(hidden, dense, targets, reduction="none").detach(), torch.float64, seed)


def test_what_does_not_fit_a_pair_is_said():
    hidden, weight, targets, _, _ = make(6, 5, 4, torch.float32)
    for pair in ((torch.zeros(6, 2), torch.zeros(5, 3)), (torch.zeros(6), torch.zeros(5))):
        with pytest.raises(ValueError, match="each pair"):
            fused(hidden, weight, targets, pairs=[pair])
    for pair in ((torch.zeros(5, 2), torch.zeros(5, 2)), (torch.zeros(6, 2), torch.zeros(4, 2))):
        with pytest.raises(ValueError, match="6 positions and 5 words"):
            fused(hidden, weight, targets, pairs=[pair])


@pytest.mark.parametrize("rows", [9, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trained_16_bit_weight_takes_all_rows_at_once_or_adds_up_in_float32(small_pieces, seed, rows, dtype):
    hidden, weight, targets, _, _ = make(rows, 300, 8, dtype, masked=0)
    with Created() as created:
        fused(hidden, weight, targets).backward()
    tall = [shapes[0] for shapes in created.matmuls if shapes[0][0] == 300]
    assert tall[0][1] <= 2 * 8 and len(tall) == -(-rows // 16)
    h, w = widened(hidden, weight)
    linear_cross_entropy_reference(h, w, targets).backward()
    near(weight.grad, w.grad, dtype, seed)
    near(hidden.grad, h.grad, dtype, seed)


def test_nothing_of_float32_is_as_large_as_a_trained_bfloat16_weight_in_one_chunk():
    hidden, weight, targets, _, _ = make(9, 400, 8, torch.bfloat16, masked=0)
    large = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.shape == weight.shape:
                    large.append(func)
            return result

    with Watched():
        fused(hidden, weight, targets).backward()
    assert not large
    with Watched():
        fused(hidden, weight, targets, chunk_rows=4).backward()
    assert large  # the measure measures


@pytest.mark.parametrize("rows,vocabulary,features,chunk_rows", [(1, 1, 1, None), (1, 9, 3, 1), (5, 3, 17, 2),
                                                                 (30, 7, 1, 29), (17, 257, 33, 1000)])
@pytest.mark.parametrize("bias,weights", [(True, False), (False, True), (False, False)])
def test_odd_shapes(seed, rows, vocabulary, features, chunk_rows, bias, weights):
    masked = 2 if rows > 1 else 0
    for reduction in ("sum", "none"):
        assert_step(seed, *make(rows, vocabulary, features, torch.float32, bias, weights, masked), torch.float32,
                    reduction=reduction, chunk_rows=chunk_rows)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_gradcheck(reduction):
    torch.manual_seed(0)
    hidden, weight, targets, bias, weights = make(7, 5, 3)
    function = lambda h, w, b, r: fused(h, w, targets, b, weights=r, reduction=reduction, softcap=4.0, scale=1.2,  # noqa: E731
                                        label_smoothing=0.1, z_loss=1e-2, chunk_rows=2)
    assert torch.autograd.gradcheck(function, (hidden, weight, bias, weights))


def test_num_items_as_number_and_tensor():
    hidden, weight, targets, _, _ = make(9, 11, 4)
    total = fused(hidden, weight, targets)
    for items in (37, 37.0, torch.tensor(37)):
        torch.testing.assert_close(fused(hidden, weight, targets, reduction="mean", num_items=items), total / 37)


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_nothing_to_learn_is_a_zero_with_gradients_of_exact_zeros(rows, reduction):
    hidden, weight, _, bias, weights = make(rows, 11, 4, torch.float32)
    with torch.no_grad():
        hidden.fill_(float("nan"))  # never multiplied
    loss = fused(hidden, weight, torch.full((rows,), -100), bias, weights=weights, reduction=reduction)
    assert loss.shape == ((rows,) if reduction == "none" else ()) and not loss.any()
    for leaf, grad in zip((hidden, weight, bias, weights),
                          torch.autograd.grad(loss.sum(), (hidden, weight, bias, weights)), strict=True):
        assert grad.shape == leaf.shape and torch.equal(grad, torch.zeros_like(grad))


def test_strides(seed):
    targets = torch.randint(0, 21, (10,))
    wide = torch.randn(8, 20).t()[::2].requires_grad_()
    weight = torch.randn(8, 21).t().requires_grad_()
    for masked in (0, 3):
        if masked:
            targets[::masked] = -100
        for reduction in ("sum", "none"):
            assert_step(seed, wide, weight, targets, None, None, torch.float32, reduction=reduction, chunk_rows=3)
    one = torch.randn(1, 8).requires_grad_()  # ten rows that share one row's memory
    wanted, = torch.autograd.grad(linear_cross_entropy_reference(one.expand(10, 8), weight, targets), one)
    got, = torch.autograd.grad(fused(one.expand(10, 8), weight, targets, chunk_rows=3), one)
    near(got, wanted, torch.float32, seed)


def test_a_vocabulary_of_200_thousand(seed):
    hidden, weight, targets, _, _ = make(6, 200_000, 4, torch.float32)
    targets[1] = 199_999
    wanted = linear_cross_entropy_reference(*widened(hidden, weight), targets)
    loss = fused(hidden, weight, targets)
    near(loss.detach(), wanted.detach(), torch.float32, seed)
    loss.backward()
    h, w = widened(hidden, weight)
    linear_cross_entropy_reference(h, w, targets).backward()
    near(hidden.grad, h.grad, torch.float32, seed)
    near(weight.grad, w.grad, torch.float32, seed)


class Created(TorchDispatchMode):
    """Records the operations and the biggest tensor that any of them returned."""

    def __init__(self):
        super().__init__()
        self.biggest, self.matmuls = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and not func.is_view:
                self.biggest = max(self.biggest, value.numel())
        if "mm" in func._overloadpacket.__name__:
            shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor) and a.ndim == 2]
            self.matmuls.append(shapes[-2:])
        return result


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_rows_times_vocabulary_is_ever_created(reduction, dtype):
    hidden, weight, targets, bias, weights = make(64, 2000, 8, dtype)
    with Created() as plain:
        linear_cross_entropy_reference(hidden, weight, targets, bias).backward()
    assert plain.biggest == 64 * 2000  # the measure measures
    with Created() as created:
        fused(hidden, weight, targets, bias, weights=weights, reduction=reduction, chunk_rows=4).sum().backward()
    assert created.biggest <= 2000 * 8, "nothing is bigger than the weight's own gradient"
    assert sum(a[0] for a, b in created.matmuls if b == (8, 2000)) == int((targets != -100).sum()) * (
        1 if reduction == "sum" else 2), "each row with loss is multiplied once (twice where backward must), others never"


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_what_is_frozen_costs_nothing(reduction):
    for frozen in ("weight", "hidden"):
        hidden, weight, targets, _, _ = make(12, 50, 4, torch.float32)
        (weight if frozen == "weight" else hidden).requires_grad_(False)
        with Created() as created:
            fused(hidden, weight, targets, reduction=reduction).sum().backward()
        back = [shapes for shapes in created.matmuls if shapes[1] != (4, 50)]
        assert len(back) == 1 and (50 in back[0][0]) and (back[0][0][0] == 50) == (frozen == "hidden")
        assert (weight.grad is None) == (frozen == "weight") and (hidden.grad is None) == (frozen == "hidden")


def test_without_gradients_only_the_logits_are_multiplied():
    hidden, weight, targets, _, _ = make(12, 50, 4, torch.float32)
    with torch.no_grad(), Created() as created:
        loss = fused(hidden, weight, targets)
    assert len(created.matmuls) == 1 and not loss.requires_grad
    assert not fused(hidden.detach(), weight.detach(), targets).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_is_the_linear_layers(seed, dtype, reduction):
    hidden, weight, targets, bias, _ = make(40, 67, 16, torch.float32, weights=False)
    with torch.autocast("cpu", dtype), Created() as created:
        loss = fused(hidden, weight, targets, bias, reduction=reduction, chunk_rows=9)
        plain = linear_cross_entropy_reference(hidden, weight, targets, bias, reduction=reduction)
    assert created.matmuls
    leaves = (hidden, weight, bias)
    near(loss.detach(), plain.detach(), dtype, seed)
    wanted = torch.autograd.grad(plain.sum(), leaves)
    for got, want, leaf in zip(torch.autograd.grad(loss.sum(), leaves), wanted, leaves, strict=True):
        assert got.dtype == leaf.dtype
        near(got, want, dtype, seed)
    low = hidden.detach().to(dtype).requires_grad_()  # a body in 16 bits under a float32 head, as autocast makes them
    with torch.autocast("cpu", dtype):
        near(fused(low, weight, targets, bias).detach(), plain.sum().detach(), dtype, seed)
    with torch.autocast("cpu", dtype):  # float64 is left alone, as autocast leaves it
        assert fused(hidden.double(), weight.double(), targets).dtype == torch.float64


def test_the_weights_gradient_adds_up_in_float32():
    """4,096 chunks of one equal row each: summed in bfloat16 the total would stall at a few hundred."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    fused(hidden, weight, torch.zeros(4096, dtype=torch.long), chunk_rows=1).backward()
    assert weight.grad.flatten().tolist() == [-2048.0, 2048.0]


def test_a_small_mean_does_not_vanish_in_float16():
    hidden, weight, targets, _, _ = make(8, 13, 4, torch.float16, masked=0)
    h, w = widened(hidden, weight)
    linear_cross_entropy_reference(h, w, targets).backward()
    loss = fused(hidden, weight, targets, reduction="mean", num_items=2**20) * 2.0**20  # a loss scaler's part
    loss.backward()
    near(weight.grad, w.grad, torch.float16, 0)
    near(hidden.grad, h.grad, torch.float16, 0)


def test_a_second_backward_recomputes_and_a_second_derivative_is_refused():
    hidden, weight, targets, bias, weights = make(9, 11, 4)
    leaves = (hidden, weight, bias, weights)
    for reduction in ("sum", "none"):
        loss = fused(hidden, weight, targets, bias, weights=weights, reduction=reduction).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        for one, two in zip(first, torch.autograd.grad(loss * 3, leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(one * 3, two)
        slope, = torch.autograd.grad(loss, hidden, create_graph=True)
        torch.testing.assert_close(slope.detach(), first[0])
        with pytest.raises(RuntimeError, match="differentiated once only"):
            (slope.square().sum() + hidden.sum()).backward()


def test_gradient_checkpointing_around_it():
    hidden, weight, targets, _, _ = make(9, 11, 4)
    wanted = torch.autograd.grad(fused(hidden * 2, weight, targets), (hidden, weight))
    for reentrant in (True, False):
        loss = torch.utils.checkpoint.checkpoint(lambda h: fused(h * 2, weight, targets), hidden, use_reentrant=reentrant)
        loss.backward()
        torch.testing.assert_close((hidden.grad, weight.grad), wanted)
        hidden.grad = weight.grad = None


def test_the_same_batch_gives_the_same_bits_and_chunks_follow_from_shapes():
    hidden, weight, targets, _, _ = make(40, 67, 16, torch.float32)
    results = [torch.autograd.grad(fused(hidden, weight, targets, chunk_rows=7), (hidden, weight)) for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert [(s.start, s.stop) for s in chunks(10, 5, 4)] == [(0, 4), (4, 8), (8, 10)]
    assert [(s.start, s.stop) for s in chunks(9, 5, 8)] == [(0, 5), (5, 9)] and not list(chunks(0, 5))
    for rows, vocabulary in ((1, 10**9), (307, 131072), (10, 3)):
        covered = [row for s in chunks(rows, vocabulary) for row in range(s.start, s.stop)]
        assert covered == list(range(rows))


def test_errors_say_what_to_do():
    hidden, weight, targets, bias, _ = make(6, 5, 4, torch.float32)
    with pytest.raises(ValueError, match="rows, features"):
        fused(hidden[None], weight, targets)
    with pytest.raises(ValueError, match=r"one value per row, \[6\]"):
        fused(hidden, weight, targets[:5])
    with pytest.raises(ValueError, match="one value per word"):
        fused(hidden, weight, targets, bias[:4])
    with pytest.raises(ValueError, match="'sum', 'mean' or 'none'"):
        fused(hidden, weight, targets, reduction="average")
    with pytest.raises(ValueError, match="reduction='mean'"):
        fused(hidden, weight, targets, num_items=3)
    with pytest.raises(ValueError, match="softcap"):
        fused(hidden, weight, targets, softcap=0.0)
    with pytest.raises(ValueError, match="label_smoothing"):
        fused(hidden, weight, targets, label_smoothing=1.5)
    with pytest.raises(TypeError, match="autocast"):
        fused(hidden.bfloat16(), weight, targets)
    with pytest.raises(IndexError, match="0 to 4"):
        fused(hidden, weight, targets.clamp(min=0) + 5)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.7}], ids=str)
def test_selected_log_probabilities(seed, options):
    hidden, weight, targets, bias, _ = make(23, 37, 8, weights=False)
    z = F.linear(hidden, weight, bias) * options.get("scale", 1.0)
    z = 3.0 * torch.tanh(z / 3.0) if options else z
    kept = targets != -100
    wanted = torch.log_softmax(z, -1).gather(1, targets.clamp(min=0)[:, None])[:, 0] * kept
    got = selected_log_probabilities(hidden, weight, targets, bias, chunk_rows=5, **options)
    near(got.detach(), wanted.detach(), torch.float64, seed)
    arriving = torch.randn(23, dtype=torch.float64)
    for one, two in zip(torch.autograd.grad(got, (hidden, weight, bias), arriving),
                        torch.autograd.grad(wanted, (hidden, weight, bias), arriving), strict=True):
        near(one, two, torch.float64, seed)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_through_torch_compile(seed, reduction):
    hidden, weight, targets, bias, _ = make(23, 37, 8, torch.float32, weights=False)
    (left, right), = make_pairs(23, 37, (2,), torch.float32)
    leaves = (hidden, weight, bias, left, right)

    def step(h, w, b, one, two):
        return fused(h * 2, w, targets, b, pairs=[(one, two)], reduction=reduction, softcap=9.0).sum() * 3

    wanted = step(*leaves)
    got = torch.compile(step, backend="aot_eager")(*leaves)
    near(got.detach(), wanted.detach(), torch.float32, seed)
    for one, two in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        near(one, two, torch.float32, seed)


# --- the Triton version, in its interpreter; the environment must know before triton is imported

INTERPRETED = r"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = sys.argv[2:]
import torch
import test_kernels as t
from supertrainer.kernels import cross_entropy
launches = []
launch = cross_entropy._launch
cross_entropy._use_triton = lambda logits: True
cross_entropy._launch = lambda *args: (launches.append(1), launch(*args))
assert type(cross_entropy._rows_kernel).__name__ == "InterpretedFunction"
seed = int(sys.argv[1])
torch.manual_seed(seed)
raw = t.test_row_losses_and_slopes_against_the_formula
for options in t.VARIANTS:
    for dtype in t.TOLERANCE:
        for rows, vocabulary in ((1, 1), (7, 31), (0, 5)):
            raw(None, seed, options, dtype, rows, vocabulary)
raw(None, seed, t.VARIANTS[-1], torch.float32, 3, 20001)  # three blocks of the vocabulary
t.test_label_smoothing_is_pytorchs(seed)
t.test_logits_of_minus_infinity_and_masked_rows_that_are_not_finite()
t.test_strided_logits_are_read_in_place_and_never_written(seed)
t.test_slopes_over_the_logits_themselves(None, seed)
for reduction in ("sum", "none"):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = t.make(11, 67, 13, dtype)
        t.assert_step(seed, *inputs, dtype, reduction=reduction, chunk_rows=4, **t.VARIANTS[-1])
first = torch.full((2, 9000), float("-inf")); first[:, -2:] = torch.tensor([1.0, 2.0])  # whole blocks of -inf come first
losses = t.row_losses(first, torch.tensor([8999, 8998]))
torch.testing.assert_close(losses, torch.tensor([0.3132617, 1.3132617]))
# the third row lies beyond what 32 bits can count, though the stride fits; untouched pages of the store cost nothing
gap = 2**31 - 64
try:
    store = torch.empty(2 * gap + 8, dtype=torch.bfloat16)
except RuntimeError:
    store = None
if store is not None:
    far, near = store.as_strided((3, 8), (gap, 1)), torch.randn(3, 8).bfloat16()
    far.copy_(near)
    settings, targets, grads = t.RowLoss(softcap=3.0), torch.tensor([1, 7, 0]), torch.rand(3)
    wanted, slopes = torch.empty_like(near), far
    losses, _ = t.row_step(near, targets, settings, row_grads=grads, slopes=wanted)
    got, _ = t.row_step(far, targets, settings, row_grads=grads, slopes=slopes)
    assert torch.equal(got, losses) and torch.equal(far, wanted)
    wide = store.as_strided((1, 3), (1, gap))  # and columns likewise
    wide.copy_(near[:1, :3])
    assert torch.equal(t.row_step(wide, targets[2:], settings)[0], t.row_step(near[:1, :3], targets[2:], settings)[0])
    print("far apart")
print("launches", len(launches))
"""

COMPILED = r"""
import triton
from triton.backends.compiler import GPUTarget
from supertrainer.kernels import cross_entropy
for logits, wide in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
    for cap, smoothing in ((None, 0.0), (30.0, 0.1)):
        constants = dict(IGNORE=-100, SCALE=1.0, SOFTCAP=cap, SMOOTHING=smoothing, SHARE=smoothing / 30000, Z_LOSS=0.0,
                         FORWARD=True, BACKWARD=True, BLOCK=1024)
        signature = dict(logits="*" + logits, targets="*i64", losses="*" + wide, normalizers="*" + wide,
                         row_grads="*" + wide, slopes="*" + logits, row_stride="i64", column_stride="i64",
                         slope_stride="i64", vocabulary="i32", **dict.fromkeys(constants, "constexpr"))
        source = triton.compiler.ASTSource(fn=cross_entropy._rows_kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
print("compiled")
"""


def test_the_triton_version_in_its_interpreter(seed, in_a_new_process):
    done = in_a_new_process(INTERPRETED, seed, Path(__file__).parent)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    assert int(done.stdout.split()[-1]) > 50  # it was the Triton version
    assert "far apart" in done.stdout or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 16 * 2**30


def test_the_triton_version_compiles_for_a_gpu(tmp_path, in_a_new_process):
    done = in_a_new_process(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


# --- the benchmark of the loss


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_the_benchmark_measures_the_same_loss_three_ways(tmp_path, head):
    script = Path(__file__).parent.parent / "benchmarks/linear_cross_entropy.py"
    table = tmp_path / "table.md"
    done = subprocess.run([sys.executable, script, "--only", f"tiny-{head}-fp32", "--rounds", "1", "--repeats", "1", "--output",
                           table], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|") for line in table.read_text().splitlines() if f"| {head} |" in line]
    assert [row[4].strip() for row in rows] == ["torch", "masked rows", "fused"]
    assert len({row[-2] for row in rows}) == 1 and float(rows[0][-2]) > 1
