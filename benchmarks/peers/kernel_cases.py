"""Kernel by kernel: inputs of real models' sizes, our function, what PyTorch's operations do without it, and Liger's.

`eager` is written as transformers and PEFT compute it (PEFT keeps adapters in float32 and casts on the way; packed rows
attend under a block mask; the loss takes all logits at once, in float32).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RANK = 16


@dataclass(frozen=True)
class Size:
    """The dimensions of a model, and the tokens of a step."""

    name: str
    tokens: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    samples: int = 16
    masked: float = 0.6


SIZES = {size.name: size for size in [
    Size("smollm2", 960, 576, 1536, 9, 3, 64, 49_152),
    Size("minilm", 1024, 384, 1536, 12, 12, 32, 30_522),
    Size("llama-3.2-1b", 1024, 2048, 8192, 32, 8, 64, 128_256, samples=4),
    Size("llama-3.2-1b-gpu", 16_384, 2048, 8192, 32, 8, 64, 128_256),
    Size("llama-3.1-8b-gpu", 16_384, 4096, 14_336, 32, 8, 128, 128_256),
    Size("qwen3-4b-gpu", 16_384, 2560, 9728, 32, 8, 128, 151_936),
    Size("tiny", 48, 32, 64, 4, 2, 8, 300, samples=3),
]}


@dataclass
class Case:
    """A kernel on one size.

    Args:
        ways: name -> function of `inputs`; every function returns the same, up to rounding.
        inputs: what the functions take; those with `requires_grad` get gradients.
        moved: bytes that the forward pass, and both passes together, read and write at least; for kernels that compute
            little.
        flops: the same in FLOPs, for kernels of matrix products.
    """

    ways: dict[str, Callable]
    inputs: tuple[Any, ...]
    moved: tuple[int, int] | None = None
    flops: tuple[float, float] | None = None
    also: tuple[Tensor, ...] = field(default=())  # further tensors that get gradients


def _draw(*shape: int, dtype: torch.dtype, device: str, grad: bool = True, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_(grad)


def _liger() -> Any:
    """Return Liger's functions, or `None`."""
    try:
        from liger_kernel.transformers import functional

        return functional if torch.cuda.is_available() else None
    except ImportError:
        return None


def rms_norm(size: Size, dtype: torch.dtype, device: str) -> Case:
    from supertrainer.kernels.norms import rms_norm as ours

    x = _draw(1, size.tokens, size.hidden, dtype=dtype, device=device)
    weight = torch.ones(size.hidden, dtype=dtype, device=device)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * wide.to(x.dtype)

    ways = {"eager": eager, "ours": ours}
    if liger := _liger():
        ways["liger"] = lambda x, weight: liger.liger_rms_norm(x, weight, 1e-6, in_place=False)
    bytes_ = x.numel() * x.element_size()
    return Case(ways, (x, weight), moved=(2 * bytes_, 5 * bytes_))


def layer_norm(size: Size, dtype: torch.dtype, device: str) -> Case:
    from supertrainer.kernels.norms import layer_norm as ours

    x = _draw(1, size.tokens, size.hidden, dtype=dtype, device=device)
    weight, bias = (_draw(size.hidden, dtype=dtype, device=device) for _ in range(2))
    ways = {"eager": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-5),
            "ours": lambda x, weight, bias: ours(x, weight, bias, 1e-5)}
    if liger := _liger():
        ways["liger"] = lambda x, weight, bias: liger.liger_layer_norm(x, weight, bias, 1e-5)
    bytes_ = x.numel() * x.element_size()
    return Case(ways, (x, weight, bias), moved=(2 * bytes_, 5 * bytes_))


def rope(size: Size, dtype: torch.dtype, device: str) -> Case:
    from supertrainer.kernels.rope import rotate

    q = _draw(1, size.heads, size.tokens, size.head_dim, dtype=dtype, device=device)
    k = _draw(1, size.kv_heads, size.tokens, size.head_dim, dtype=dtype, device=device)
    angles = torch.arange(size.tokens, device=device)[:, None] / 10_000 ** (
        torch.arange(0, size.head_dim, 2, device=device) / size.head_dim)
    table = torch.cat((angles, angles), -1)[None]
    cos, sin = table.cos().to(dtype), table.sin().to(dtype)

    def half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    ways = {"eager": eager, "ours": rotate}
    if liger := _liger():
        ways["liger"] = lambda q, k, cos, sin: liger.liger_rope(q.clone(), k.clone(), cos, sin)  # it writes over its input
    bytes_ = (q.numel() + k.numel()) * q.element_size()
    return Case(ways, (q, k, cos, sin), moved=(2 * bytes_, 4 * bytes_))


def glu(size: Size, dtype: torch.dtype, device: str) -> Case:
    from supertrainer.kernels.activations import glu as ours

    gate, up = (_draw(1, size.tokens, size.inner, dtype=dtype, device=device) for _ in range(2))
    ways = {"eager": lambda gate, up: F.silu(gate) * up, "ours": lambda gate, up: ours(gate, up, "silu")}
    if liger := _liger():
        ways["liger"] = lambda gate, up: liger.liger_swiglu(gate.clone(), up.clone())  # it writes over its input
    bytes_ = gate.numel() * gate.element_size()
    return Case(ways, (gate, up), moved=(3 * bytes_, 8 * bytes_))


def gelu(size: Size, dtype: torch.dtype, device: str) -> Case:
    from supertrainer.kernels.activations import activate

    x = _draw(1, size.tokens, size.inner, dtype=dtype, device=device)
    bytes_ = x.numel() * x.element_size()
    return Case({"eager": F.gelu, "ours": lambda x: activate(x, "gelu")}, (x,), moved=(2 * bytes_, 5 * bytes_))


def _adapted(inputs: int, outputs: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return a frozen weight and an adapter in float32, as PEFT keeps it."""
    weight = _draw(outputs, inputs, dtype=dtype, device=device, grad=False, scale=inputs**-0.5)
    return weight, _draw(RANK, inputs, dtype=torch.float32, device=device, scale=inputs**-0.5), _draw(
        outputs, RANK, dtype=torch.float32, device=device, scale=0.1)


def _peft(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute an adapted layer in PEFT's order and types."""
    return (F.linear(x, weight) + F.linear(F.linear(x.to(a.dtype), a), b) * 1.0).to(x.dtype)


def _part(weight: Tensor, a: Tensor, b: Tensor) -> Any:
    from supertrainer.kernels.lora import LinearPart, LoRAPart

    return LinearPart(weight, None, (LoRAPart(a, b, 1.0),))


def _lora_flops(size: Size, shapes: list[tuple[int, int]]) -> tuple[float, float]:
    base = sum(inputs * outputs for inputs, outputs in shapes)
    thin = sum(RANK * (inputs + outputs) for inputs, outputs in shapes)
    return 2.0 * size.tokens * (base + thin), 2.0 * size.tokens * (2 * base + 3 * thin)


def lora_linears(size: Size, dtype: torch.dtype, device: str) -> Case:
    from supertrainer.kernels.lora import lora_linears as ours

    shapes = [(size.hidden, size.heads * size.head_dim)] + [(size.hidden, size.kv_heads * size.head_dim)] * 2
    layers = [_adapted(*shape, dtype, device) for shape in shapes]
    x = _draw(1, size.tokens, size.hidden, dtype=dtype, device=device)
    ways = {"eager": lambda x: tuple(_peft(x, *layer) for layer in layers),
            "ours": lambda x: tuple(ours(x, [_part(*layer) for layer in layers]))}
    return Case(ways, (x,), flops=_lora_flops(size, shapes), also=tuple(t for layer in layers for t in layer[1:]))


def lora_mlp(size: Size, dtype: torch.dtype, device: str) -> Case:
    from supertrainer.kernels.lora_mlp import lora_gated_mlp

    shapes = [(size.hidden, size.inner), (size.hidden, size.inner), (size.inner, size.hidden)]
    gate, up, down = (_adapted(*shape, dtype, device) for shape in shapes)
    x = _draw(1, size.tokens, size.hidden, dtype=dtype, device=device)
    ways = {"eager": lambda x: _peft(F.silu(_peft(x, *gate)) * _peft(x, *up), *down),
            "ours": lambda x: lora_gated_mlp(x, _part(*gate), _part(*up), _part(*down), "silu")}
    return Case(ways, (x,), flops=_lora_flops(size, shapes), also=tuple(t for layer in (gate, up, down) for t in layer[1:]))


def attention(size: Size, dtype: torch.dtype, device: str) -> Case:
    from supertrainer.kernels.attention import packed_attention

    cuts = torch.randperm(size.tokens - 1, generator=torch.Generator().manual_seed(0))[: size.samples - 1].sort().values + 1
    edges = [0, *cuts.tolist(), size.tokens]
    lengths = [end - start for start, end in zip(edges, edges[1:], strict=False)]
    q = _draw(1, size.heads, size.tokens, size.head_dim, dtype=dtype, device=device)
    k, v = (_draw(1, size.kv_heads, size.tokens, size.head_dim, dtype=dtype, device=device) for _ in range(2))
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
    mask = (sample[:, None] == sample[None, :]).tril()[None, None]
    ways = {"eager": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
            "ours": lambda q, k, v: packed_attention(q, k, v, lengths)}
    work = size.heads * size.head_dim * sum(length * length for length in lengths) / 2
    return Case(ways, (q, k, v), flops=(4.0 * work, 12.0 * work))


def linear_cross_entropy(size: Size, dtype: torch.dtype, device: str) -> Case:
    from supertrainer.kernels.linear_cross_entropy import linear_cross_entropy as ours

    hidden = _draw(size.tokens, size.hidden, dtype=dtype, device=device)
    weight = _draw(size.vocabulary, size.hidden, dtype=dtype, device=device, grad=False, scale=0.05)
    targets = torch.randint(0, size.vocabulary, (size.tokens,), device=device)
    targets[torch.rand(size.tokens, device=device) < size.masked] = -100
    ways = {"eager": lambda hidden, weight, targets: F.cross_entropy(F.linear(hidden, weight).float(), targets),
            "ours": lambda hidden, weight, targets: ours(hidden, weight, targets, reduction="mean")}
    if liger := _liger():
        ways["liger"] = lambda hidden, weight, targets: liger.liger_fused_linear_cross_entropy(hidden, weight, targets)
    work = 2.0 * int((targets != -100).sum()) * weight.numel()
    return Case(ways, (hidden, weight, targets), flops=(work, 2 * work))


CASES: dict[str, Callable[[Size, torch.dtype, str], Case]] = {
    function.__name__: function for function in
    (rms_norm, layer_norm, rope, glu, gelu, lora_linears, lora_mlp, attention, linear_cross_entropy)}
ENCODER = ("layer_norm", "gelu")  # only these are measured on an encoder's size, and only there on a CPU
