"""What the machine can do, and what a step asks of it: matmul and copy rates, model FLOPs of a training step."""

import time
from collections.abc import Callable, Sequence
from typing import Any


def _seconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Return the shortest of `repeats` timings of `function`, after one that is not counted."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    function()
    wait()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        wait()
        best = min(best, time.perf_counter() - started)
    return best


def matmul_rate(dtype: str, device: str = "cpu", size: int | None = None, repeats: int = 4) -> float:
    """Return FLOP/s of a square matrix product; by default 2,048 a side on a CPU, 8,192 on a GPU.

    Args:
        dtype: `float32` or `bfloat16`.
    """
    import torch

    size = size or (8192 if device == "cuda" else 2048)
    left = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    right = torch.ones_like(left)
    out = torch.empty_like(left)
    return 2 * size**3 / _seconds(lambda: torch.mm(left, right, out=out), device, repeats)


def copy_rate(device: str = "cpu", megabytes: int = 256, repeats: int = 4) -> float:
    """Return bytes read and written per second by a copy."""
    import torch

    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device, repeats)


def model_facts(config: Any, rank: int = 16) -> dict[str, int]:
    """Return what `step_flops` needs of a transformers configuration, read off the model built without memory.

    Returns:
        `linear`: weights of the linear layers under the head; `adapter`: weights of LoRA matrices of `rank` on all of them;
        `head`: weights of the output embedding; `attention`: layers x heads x width of a head.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    causal = type(config) in AutoModelForCausalLM._model_mapping
    with torch.device("meta"):
        model = (AutoModelForCausalLM if causal else AutoModelForSequenceClassification).from_config(config)
    head = model.get_output_embeddings() if causal else None
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"linear": sum(layer.weight.numel() for layer in layers),
            "adapter": sum(rank * sum(layer.weight.shape) for layer in layers),
            "head": head.weight.numel() if head is not None else 0,
            "attention": config.num_hidden_layers * config.num_attention_heads * width}


def step_flops(facts: dict[str, int], lengths: Sequence[int], trained: int, *, lora: bool, causal: bool) -> float:
    """Return the FLOPs that one forward and backward pass over real tokens needs; nothing is computed twice in it.

    Two for each weight and token in the forward pass, two for the gradient of a layer's input, two more for that of a
    weight which is trained. The head counts for rows with loss only, and is frozen with LoRA. Attention: `Q K^T` and `P V`
    forward, four products of that size backward, half of each where a token looks back only.

    Args:
        facts: from `model_facts`.
        lengths: tokens of each row; a row attends to itself.
        trained: positions with loss.
        lora: the linear layers and the head are frozen and an adapter is trained.
    """
    tokens = sum(lengths)
    weights = (4 if lora else 6) * facts["linear"] * tokens + (6 * facts["adapter"] * tokens if lora else 0)
    head = (4 if lora else 6) * facts["head"] * trained
    attention = 12 * facts["attention"] * sum(length * length for length in lengths) / (2 if causal else 1)
    return float(weights + head + attention)
