"""Attention over packed samples against a formula written out token by token, on every way the kernel can take."""


import pytest
import torch

from supertrainer.kernels import attention
from supertrainer.kernels.attention import block_mask, packed_attention, packed_attention_reference

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SIGHTS = [{}, {"causal": False}, {"window": 3}, {"causal": False, "window": 2}, {"window": 1}, {"scale": 0.7}]
LENGTHS = [[7], [1, 5, 3], [4, 0, 9, 1], [6, 6], []]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(attention, "MIN_PIECE", 2)
    monkeypatch.setattr(attention, "CAP_BLOCK", 3)


@pytest.fixture
def batched(monkeypatch):
    """Samples of all types and any number are batched, those of very different lengths too."""
    monkeypatch.setattr(attention, "BATCHED_BYTES", 8)
    monkeypatch.setattr(attention, "FEWEST", 1)
    monkeypatch.setattr(attention, "ALIKE", 3.0)


def make(lengths, dtype=torch.float64, heads=4, key_heads=2, dim=8, value_dim=None, transposed=True):
    def one(n, width):
        x = torch.randn(1, sum(lengths), n, width) if transposed else torch.randn(1, n, sum(lengths), width)
        return (x.transpose(1, 2) if transposed else x).to(dtype)

    return one(heads, dim), one(key_heads, dim), one(key_heads, value_dim or dim)


def by_hand(q, k, v, lengths, scale=None, causal=True, window=None, softcap=None):
    """Token by token: which keys it sees, their weights, the sum."""
    scale, group, out, begin = q.shape[-1] ** -0.5 if scale is None else scale, q.shape[1] // k.shape[1], [], 0
    for length in lengths:
        for token in range(length):
            seen = [other for other in range(length) if not (causal and other > token)
                    and (window is None or (token - other < window if causal else abs(token - other) <= window))]
            for head in range(q.shape[1]):
                scores = torch.stack([q[0, head, begin + token] @ k[0, head // group, begin + other] for other in seen])
                scores = scores * scale
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                out.append(sum(weight * v[0, head // group, begin + other]
                               for weight, other in zip(torch.softmax(scores, 0), seen, strict=True)))
        begin += length
    return torch.stack(out).view(1, begin, q.shape[1], v.shape[-1]).transpose(1, 2) if out else q[..., :v.shape[-1]] * 1


def check(seed, lengths, dtype, sizes=None, **options):
    tensors = [x.requires_grad_() for x in make(lengths, dtype, **(sizes or {}))]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    found, expected = packed_attention(*tensors, lengths, **options), by_hand(*wide, lengths, **options)
    assert found.dtype == dtype and found.shape == expected.shape
    slope = torch.randn_like(found)
    grads = torch.autograd.grad(found, tensors, slope)
    wanted = torch.autograd.grad(expected, wide, slope.double(), allow_unused=True)
    tolerance = TOLERANCE[dtype]
    for got, true in zip([found, *grads], [expected, *wanted], strict=True):
        true = torch.zeros_like(got, dtype=torch.float64) if true is None else true
        bound = tolerance * max(1.0, true.abs().max().item() if true.numel() else 0)
        torch.testing.assert_close(got.double(), true, rtol=tolerance, atol=bound, msg=lambda m: f"{seed} {lengths}: {m}")


@pytest.mark.parametrize("options", SIGHTS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(small_pieces, seed, dtype, lengths, options):
    check(seed, lengths, dtype, **options)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 4}, {"scale": 0.7}], ids=str)
@pytest.mark.parametrize("lengths", [*LENGTHS, [3, 7, 3, 20, 5, 1, 9]], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients_of_batches(small_pieces, batched, seed, dtype, lengths, options, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", 10)  # one sample of the last row stays alone
    check(seed, lengths, dtype, **options)
    check(seed, lengths, dtype, {"heads": 3, "key_heads": 1, "transposed": False}, **options)
    monkeypatch.setattr(attention, "BATCH_SCORES", 4 * 25)
    check(seed, lengths, dtype, {"key_heads": 4}, **options)


@pytest.mark.parametrize("causal", [True, False])
def test_batches_under_autocast_and_as_compiled(batched, seed, causal):
    """Products stay as wide as their operands where backward runs within autocast."""
    tensors = [x.requires_grad_() for x in make([4, 5, 3], torch.float32)]
    run = torch.compile(lambda *tensors: packed_attention(*tensors, [4, 5, 3], causal=causal), backend="aot_eager")
    expected = packed_attention_reference(*tensors, [4, 5, 3], causal=causal)
    slope = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, tensors, slope)
    torch.testing.assert_close(torch.autograd.grad(run(*tensors), tensors, slope), wanted)
    found = packed_attention(*tensors, [4, 5, 3], causal=causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(found, tensors, slope), wanted)


def test_many_short_samples_take_few_calls(seed, monkeypatch):
    calls, alone = [], attention._flash_backward
    monkeypatch.setattr(attention, "_flash_backward", lambda *rest, **named: calls.append(1) or alone(*rest, **named))
    lengths = [20, 30, 25, 28, 140]
    tensors = [x.requires_grad_() for x in make(lengths, torch.bfloat16)]
    torch.autograd.grad(packed_attention(*tensors, lengths).sum(), tensors)
    assert len(calls) == 1  # the long one
    assert [len(batch) for batch in attention._batches(attention._parts(lengths, True, None), 4)] == [3, 1]


@pytest.mark.parametrize("options", SIGHTS, ids=str)
def test_every_way_gives_the_same(small_pieces, seed, options, monkeypatch):
    check(seed, [3, 8, 1], torch.float64, softcap=2.0, **options)
    check(seed, [3, 8, 1], torch.float64, {"value_dim": 6}, **options)  # PyTorch's plain function
    check(seed, [3, 8, 1], torch.float64, {"key_heads": 4, "transposed": False}, **options)
    check(seed, [3, 8, 1], torch.float64, {"heads": 3, "key_heads": 1}, **options)
    monkeypatch.setattr(attention, "_flash_backward", None)
    check(seed, [3, 8, 1], torch.float64, **options)


@pytest.mark.parametrize("options", SIGHTS, ids=str)
def test_the_reference_is_the_formula(seed, options):
    q, k, v = make([5, 2, 6])
    torch.testing.assert_close(packed_attention_reference(q, k, v, [5, 2, 6], softcap=3.0, **options),
                               by_hand(q, k, v, [5, 2, 6], softcap=3.0, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths,options", [([300, 20, 513], {}), ([700], {"window": 100}), ([40, 400], {"window": 150}),
                                             ([300, 500], {"causal": False, "window": 64})], ids=str)
def test_long_samples(seed, dtype, lengths, options):
    """Beyond one tile of the kernel, one piece of a window, and the length from which gradients stay in bfloat16."""
    tensors = [x.requires_grad_() for x in make(lengths, dtype)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    found, expected = packed_attention(*tensors, lengths, **options), packed_attention_reference(*wide, lengths, **options)
    slope = torch.randn_like(found)
    for got, wanted in zip([found, *torch.autograd.grad(found, tensors, slope)],
                           [expected, *torch.autograd.grad(expected, wide, slope.double())], strict=True):
        error = float((got.double() - wanted).detach().norm() / wanted.detach().norm())
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"seed {seed}: {error}"


@pytest.mark.parametrize("lengths", [[60, 31], [60, 31, 44, 52]], ids=["alone", "batched"])
def test_short_16_bit_gradients_are_better_than_pytorchs(seed, lengths, monkeypatch):
    tensors = [x.requires_grad_() for x in make(lengths, torch.bfloat16)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    slope = torch.randn_like(tensors[0])
    wanted = torch.autograd.grad(packed_attention_reference(*wide, lengths), wide, slope.double())

    def errors():
        grads = torch.autograd.grad(packed_attention(*tensors, lengths), tensors, slope)
        return [float((got.double() - true).norm() / true.norm()) for got, true in zip(grads, wanted, strict=True)]

    ours = errors()
    monkeypatch.setattr(attention, "WIDEN_BELOW", 0)
    monkeypatch.setattr(attention, "SHORT", 0)
    assert all(mine <= theirs for mine, theirs in zip(ours, errors(), strict=True)), seed


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 4}, {"softcap": 5.0}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("together", [False, True])
def test_samples_never_touch(seed, options, together, request):
    """Not even not-a-number passes from one sample to another, in either direction."""
    if together:
        request.getfixturevalue("batched")
    lengths = [6, 9, 3]
    q, k, v = make(lengths, torch.float32)
    for x in (q, k, v):
        x[:, :, 6:15] = float("nan")
        x.requires_grad_()
    out = packed_attention(q, k, v, lengths, **options)
    clean = torch.cat([out[:, :, :6], out[:, :, 15:]], 2)
    assert torch.isfinite(clean).all() and torch.isnan(out[:, :, 6:15]).any()
    clean.sum().backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad[:, :, :6]).all() and torch.isfinite(x.grad[:, :, 15:]).all(), seed


def test_dropout_drops_as_pytorch_does(seed):
    q, k, v = make([40] * 10, torch.float64)
    ones = torch.ones_like(v)
    out = packed_attention(q, k, ones, [40] * 10, dropout=0.25, causal=False)
    assert out.std() > 0.01 and abs(out.mean() - 1) < 0.05  # weights are dropped, and the rest made up for
    torch.manual_seed(seed)
    alone = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.25, is_causal=True, enable_gqa=True)
    torch.manual_seed(seed)
    torch.testing.assert_close(packed_attention(q, k, v, [400], dropout=0.25), alone)


def test_one_row_is_written_once_in_the_strides_of_the_projection(seed):
    q, k, v = (x.requires_grad_() for x in make([4, 6], torch.float32))
    out = packed_attention(q, k, v, [4, 6])
    assert out.transpose(1, 2).is_contiguous()
    saved = [tensor.data_ptr() for tensor in out.grad_fn.saved_tensors[:4]]
    assert saved == [q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()]  # nothing is kept twice


def test_work_grows_with_the_window_not_with_the_square(seed):
    calls = []
    flash = attention._flash
    attention._flash = lambda q, k, *rest, **named: (calls.append(q.shape[2] * k.shape[2]), flash(q, k, *rest, **named))[1]
    try:
        packed_attention(*make([4096], torch.float32, heads=1, key_heads=1), [4096], window=128)
    finally:
        attention._flash = flash
    assert sum(calls) < 4096 * 128 * 2.1


def test_autocast_as_pytorchs_function(seed):
    q, k, v = make([4, 5], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed_attention(q, k, v, [4, 5]).dtype == torch.bfloat16
        assert packed_attention(q.double(), k.double(), v.double(), [4, 5]).dtype == torch.float64


def test_columns_that_are_not_neighbours(seed):
    q, k, v = (x.repeat_interleave(2, -1)[..., ::2] for x in make([4, 5], torch.float32))
    torch.testing.assert_close(packed_attention(q, k, v, [4, 5]), packed_attention_reference(q, k, v, [4, 5]))


def test_what_does_not_fit_is_refused(seed):
    q, k, v = make([4, 5])
    for arguments in [(q, k, v, [4, 4]), (q, k, v, [10, -1]), (q, k, v[:, :, :5], [9]), (q[:, :3], k, v, [9]),
                      (q[0], k, v, [9]), (q.expand(2, -1, -1, -1), k, v, [9]), (q, k[:, :, :4], v[:, :, :4], [9])]:
        with pytest.raises(ValueError):
            packed_attention(*arguments)
    with pytest.raises(ValueError, match="window"):
        packed_attention(q, k, v, [4, 5], window=0)


def test_a_second_derivative_is_an_error(seed):
    q, k, v = (x.requires_grad_() for x in make([4, 5]))
    grad, = torch.autograd.grad(packed_attention(q, k, v, [4, 5]).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        grad.sum().backward()


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 4.0}], ids=str)
def test_compiled(seed, options):
    q, k, v = (x.requires_grad_() for x in make([4, 5], torch.float32))
    compiled = torch.compile(lambda q, k, v: packed_attention(q, k, v, [4, 5], **options), backend="aot_eager")
    found, expected = compiled(q, k, v), packed_attention(q, k, v, [4, 5], **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), [q, k, v]),
                               torch.autograd.grad(expected.square().sum(), [q, k, v]))


def test_variable_length_flash_gets_what_it_needs(seed, monkeypatch):
    """Its arguments, checked with a stand-in on the CPU that reads offsets and windows as PyTorch documents them."""
    def stand_in(q, k, v, ends, key_ends, longest, longest_key, *, scale, window_size, enable_gqa):
        assert ends.dtype == torch.int32 and torch.equal(ends, key_ends) and q.dim() == 3
        lengths = ends.diff().tolist()
        assert longest == longest_key == max(lengths) and enable_gqa == (q.shape[1] != k.shape[1])
        left, right = window_size
        causal = right == 0
        window = None if left < 0 else left + 1 if causal else left
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return packed_attention_reference(*rows, lengths, scale=scale, causal=causal, window=window)[0].transpose(0, 1)

    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "_for_varlen", lambda q, v: True)
    for options in SIGHTS:
        check(seed, [4, 2, 6], torch.float64, **options)


def test_the_block_mask(seed):
    assert block_mask([2, 1], True).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert block_mask([3], False, 1).tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    assert block_mask([3], True, 2).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
