"""Linear layers of a loaded model: whatever PEFT's own forward honours, ours honours, to the same numbers."""

import contextlib
import copy
import pickle
import random

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from supertrainer.kernels import lora as kernel
from supertrainer.patching.linears import (
    exact_forward,
    find_linears,
    gated,
    has_four_bit,
    linear_part,
    lora_linear,
    project,
)
from supertrainer.patching.proof import Call, prove
from supertrainer.patching.record import Patches

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
NAMES = ("q", "k", "v", "gate", "up")


@pytest.fixture(autouse=True)
def seed():
    number = random.SystemRandom().randrange(2**31)
    print(f"seed {number}")
    torch.manual_seed(number)
    return number


@pytest.fixture
def fused(monkeypatch):
    """Counts the layers that the kernels computed."""
    count = []
    step = kernel.lora_step

    def counted(plan, x, tensors):
        count.append(len(plan.layers))
        return step(plan, x, tensors)

    monkeypatch.setattr(kernel, "lora_step", counted)
    monkeypatch.setattr("supertrainer.kernels.lora_mlp.lora_step", counted)
    return count


class Block(nn.Module):
    def __init__(self, make=nn.Linear):
        super().__init__()
        self.q, self.k, self.v = make(16, 12), make(16, 8), make(16, 8)
        self.gate, self.up, self.down = make(16, 24), make(16, 24), make(24, 16)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x), self.down(F.silu(self.gate(x)) * self.up(x))


def adapted(make=nn.Linear, dtype=F32, names=(*NAMES, "down"), **config):
    block = Block(make)
    block = block.to(dtype) if make is not four_bit else block
    model = get_peft_model(block, LoraConfig(target_modules=list(names), **{"r": 4, "init_lora_weights": False, **config}))
    return model, model.base_model.model


def ours(block, x):
    return (*project([block.q, block.k, block.v], x), gated(x, block.gate, block.up, block.down, "silu"))


def distance(value, exact):
    return float((value.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm().clamp(min=1e-30))


def run(function, block, x, seed=0):
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    outputs = function(block, x)
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    weights = {name: p for name, p in block.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(outputs, [x, *weights.values()], slopes, allow_unused=True)
    return outputs, dict(zip(["x", *weights], grads, strict=True))


def same(block, x, limit=1e-5):
    """Ours against PEFT's own forward: outputs and every gradient, types included."""
    mine, my_grads = run(ours, block, x)
    theirs, their_grads = run(lambda b, v: Block.forward(b, v), block, x)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and distance(a, b) <= limit
    for name, grad in their_grads.items():
        if grad is None:
            assert my_grads[name] is None, name
        else:
            assert my_grads[name].dtype == grad.dtype and distance(my_grads[name], grad) <= limit, name
    with torch.no_grad():
        torch.manual_seed(0)
        quiet = ours(block, x)
        torch.manual_seed(0)
        assert all(distance(a, b) <= limit for a, b in zip(quiet, Block.forward(block, x), strict=True))
    return mine


# what PEFT's forward honours

@pytest.mark.parametrize("config", [
    {}, {"r": 1}, {"use_rslora": True, "lora_alpha": 5}, {"lora_dropout": 0.3}, {"bias": "lora_only"}, {"bias": "all"},
    {"modules_to_save": ["up"]}, {"rank_pattern": {"k": 2}, "alpha_pattern": {"q": 32}}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_configurations(config, training, fused):
    model, block = adapted(**config)
    same(block.train(training), torch.randn(2, 5, 16))
    assert fused and fused[0] == 3


@pytest.mark.parametrize("names", [("q",), ("q", "v"), ("k", "down"), ("gate",), ("up", "down")], ids=str)
def test_some_layers_have_adapters(names):
    model, block = adapted(names=names)
    same(block, torch.randn(2, 5, 16))


@pytest.mark.parametrize("names", [("q", "k", "v"), ("gate", "down")], ids=str)
def test_base_weights_trained_too(names, fused):
    model, block = adapted()
    for name in names:
        getattr(block, name).base_layer.requires_grad_(True)
    same(block, torch.randn(7, 16))
    assert fused


def test_disabled(fused):
    model, block = adapted()
    x = torch.randn(5, 16)
    with_adapter = same(block, x)
    with model.disable_adapter():
        without = ours(block, x)
        assert all(torch.equal(a, b) for a, b in zip(without[:3], block(x)[:3], strict=True))
        assert torch.allclose(without[3], block(x)[3], atol=1e-5)
        plain = F.linear(x, block.q.base_layer.weight, block.q.base_layer.bias)
        assert torch.allclose(without[0], plain) and not torch.allclose(without[0], with_adapter[0], atol=1e-3)
        assert torch.equal(lora_linear(block.q, x), block.q(x))
    assert all(torch.equal(a, b) for a, b in zip(ours(block, x), with_adapter, strict=True))


@pytest.mark.parametrize("which", [None, ["q", "gate"]])
def test_merged(which, fused):
    model, block = adapted()
    x = torch.randn(5, 16)
    before = ours(block, x)
    for name in which or (*NAMES, "down"):
        getattr(block, name).merge()
    for a, b in zip(same(block, x), before, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    with model.disable_adapter():  # PEFT takes the merge back at the first call
        unmerged = ours(block, x)
        assert not block.q.merged and not block.gate.merged
        assert torch.allclose(unmerged[0], F.linear(x, block.q.base_layer.weight, block.q.base_layer.bias), atol=1e-5)


def test_several_adapters_and_the_active_one(fused):
    model, block = adapted()
    model.add_adapter("second", LoraConfig(target_modules=["q", "k", "down"], r=3, lora_alpha=9, init_lora_weights=False))
    x, seen = torch.randn(5, 16), []
    for active in ("default", "second", ["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(active)
        seen.append(same(block, x))
    assert not torch.allclose(seen[0][0], seen[1][0], atol=1e-3) and torch.allclose(seen[2][0], seen[3][0], atol=1e-4)
    assert not torch.allclose(seen[2][0], seen[0][0], atol=1e-3)
    model.base_model.set_adapter("second")
    model.delete_adapter("second")
    same(block, x)


def test_own_dropouts_and_modes(fused):
    """Two adapters with a dropout each; one of the dropout modules put into evaluation on its own."""
    model, block = adapted(lora_dropout=0.4)
    model.add_adapter("second", LoraConfig(target_modules=["q", "k", "down"], r=3, lora_dropout=0.2,
                                           init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(6, 16)
    same(block.train(), x)
    block.q.lora_dropout["default"].eval()
    same(block, x)
    fused.clear()
    assert torch.equal(ours(block.eval(), x)[0], ours(block, x)[0]) and fused


def test_requires_grad_is_read_at_each_call():
    model, block = adapted()
    x = torch.randn(5, 16)
    same(block, x)
    block.q.lora_A["default"].requires_grad_(False)
    block.down.lora_B["default"].requires_grad_(False)
    same(block, x)
    block.requires_grad_(False)
    assert not any(y.requires_grad for y in ours(block, x))


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_are_called(config, fused):
    model, block = adapted(**config)
    same(block, torch.randn(5, 16))
    assert not fused


def test_one_variant_among_plain_ones(fused):
    model, block = adapted(names=("q", "k"))
    model.add_adapter("second", LoraConfig(target_modules=["v", "gate"], use_dora=True, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    same(block, torch.randn(5, 16))
    assert fused and set(fused) == {2}


def test_mixed_batches(fused):
    """adapter_names comes through hooks of PEFT's, and straight to a swapped layer."""
    model, block = adapted()
    model.add_adapter("second", LoraConfig(target_modules=["q"], r=3, init_lora_weights=False))
    x, names = torch.randn(3, 5, 16), ["default", "second", "__base__"]
    block.eval()
    with torch.no_grad():
        want = block.q(x, adapter_names=names)
        assert torch.equal(lora_linear(block.q, x, adapter_names=names), want)
        assert not torch.allclose(want[1], block.q(x)[1])

        handle = block.q.register_forward_pre_hook(lambda _, args, kwargs: (args, {"adapter_names": names}),
                                                   with_kwargs=True)
        assert torch.equal(project([block.q], x)[0], want)
        handle.remove()
        assert not fused
        assert torch.equal(lora_linear(block.q, x=x), block.q(x))


@pytest.mark.parametrize("place", [
    lambda layer: layer, lambda layer: layer.base_layer, lambda layer: layer.lora_A["default"],
    lambda layer: layer.lora_B["default"], lambda layer: layer.lora_dropout["default"]])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                                  "register_full_backward_pre_hook"])
def test_hooks_still_fire(place, kind, fused):
    model, block = adapted()
    fired, x = [], torch.randn(5, 16, requires_grad=True)
    for layer in (block.q, block.up):
        getattr(place(layer), kind)(lambda *_: fired.append(1))
    sum(y.sum() for y in ours(block, x)).backward()
    assert len(fired) == 2 and 3 not in fused


def test_a_global_hook_still_fires():
    model, block = adapted()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        ours(block, torch.randn(5, 16))
    finally:
        handle.remove()
    assert block.q.base_layer in seen and block.down.lora_B["default"] in seen


def test_replaced_pieces_are_called(fused):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(5, 16)
    for change in ("base", "A", "forward", "parametrized"):
        model, block = adapted()
        if change == "base":
            block.q.base_layer = Doubled(16, 12)
        elif change == "A":
            block.q.lora_A["default"] = Doubled(16, 4, bias=False)
        elif change == "forward":
            block.q.base_layer.forward = lambda x: x[..., :12]
        else:
            nn.utils.parametrizations.weight_norm(block.q.base_layer)
        assert linear_part(block.q, x, 16) is None
        same(block, x)


def test_other_input_goes_to_the_layer():
    model, block = adapted()
    with pytest.raises(RuntimeError, match="shapes"):
        project([block.q, block.k], torch.randn(5, 17))
    with pytest.raises(RuntimeError):
        project([block.q], torch.randn(5, 16, dtype=BF16))


# types

@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, F64])
@pytest.mark.parametrize("thin", [F32, BF16, F64])
def test_types_against_float64(dtype, thin, seed):
    """Each output and gradient at most twice as far from float64 as PEFT's own, or half an epsilon of the type."""
    model, block = adapted(dtype=dtype)
    for name, weight in block.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(thin)
    exact = copy.deepcopy(block).double()
    x = torch.randn(2, 33, 16).to(dtype)
    mine, my_grads = run(ours, block, x)
    theirs, their_grads = run(Block.forward, block, x)
    truth, true_grads = run(Block.forward, exact, x.double())
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(thin).eps)
    for a, b, c in zip([*mine, *my_grads.values()], [*theirs, *their_grads.values()], [*truth, *true_grads.values()],
                       strict=True):
        assert a.dtype == b.dtype and distance(a, c) <= max(2 * distance(b, c), epsilon)


@pytest.mark.parametrize("inputs", [F32, BF16])
@pytest.mark.parametrize("weights", [F32, BF16])
def test_autocast(inputs, weights, fused):
    model, block = adapted(dtype=weights)
    with torch.autocast("cpu", BF16):
        same(block, torch.randn(2, 9, 16).to(inputs), limit=2e-2)
    assert fused


def test_switched_off_cast_is_peft_s_business(fused):
    model, block = adapted(dtype=BF16)
    block.q.lora_A["default"].float(), block.q.lora_B["default"].float()
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        project([block.q], torch.randn(5, 16, dtype=BF16))
    assert not fused


def test_transposed_base(fused):
    model, block = adapted(lambda features, out: Conv1D(out, features), fan_in_fan_out=True)
    same(block, torch.randn(2, 5, 16))
    block.q.base_layer.requires_grad_(True)
    same(block, torch.randn(2, 5, 16))
    assert fused


# 4 and 8 bits

def four_bit(features, out, bias=False, **options):
    layer = Linear4bit(features, out, bias=bias, **{"compute_dtype": BF16, "quant_type": "nf4", **options})
    layer.weight.data = torch.randn(out, features).to(layer.compute_dtype or BF16) / features**0.5
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer


def four_bit_model(**options):
    block = Block(lambda features, out: four_bit(features, out, **options))
    block.is_loaded_in_4bit = True
    model = get_peft_model(block, LoraConfig(target_modules=[*NAMES, "down"], r=4, init_lora_weights=False))
    assert type(model.base_model.model.q).__name__ == "Linear4bit"
    return model, model.base_model.model


@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "compress_statistics": False}, {"compute_dtype": F32},
                                     {"bias": True}], ids=str)
def test_four_bit(options, fused):
    model, block = four_bit_model(**options)
    dtype = block.q.base_layer.compute_dtype
    before = block.q.base_layer.weight.data.clone()
    same(block.train(), torch.randn(2, 9, 16).to(dtype), limit=2e-2 if dtype == BF16 else 1e-5)
    assert fused[:2] == [3, 2] and torch.equal(before, block.q.base_layer.weight.data)
    with model.disable_adapter():
        x = torch.randn(2, 9, 16).to(dtype)
        assert torch.equal(ours(block, x)[0], block.q(x))


def test_four_bit_keeps_no_dense_weight():
    model, block = four_bit_model()
    kept, x = [], torch.randn(50, 16, dtype=BF16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        ours(block, x)
    assert not any(t.shape in {(12, 16), (24, 16), (16, 24), (8, 16)} for t in kept)


@pytest.mark.parametrize(("inputs", "options"), [(F32, {}), (BF16, {"compute_dtype": F32}), (BF16, {"compute_dtype": None})],
                         ids=str)
def test_four_bit_with_another_type_is_called(inputs, options, fused):
    model, block = four_bit_model(**options)
    same(block, torch.randn(2, 9, 16).to(inputs), limit=0 if options.get("compute_dtype", 1) else 2e-2)
    if options.get("compute_dtype", 1):
        assert not fused


@pytest.mark.parametrize("inputs", [F32, BF16])
def test_four_bit_under_autocast(inputs, fused):
    model, block = four_bit_model()
    with torch.autocast("cpu", BF16):
        same(block, torch.randn(2, 9, 16).to(inputs), limit=2e-2)
    assert fused


def test_four_bit_reordered_or_few_rows(fused):
    model, block = four_bit_model()
    with torch.no_grad():
        project([block.q], torch.randn(1, 1, 16, dtype=BF16))
    assert not fused
    block.q.base_layer.weight.quant_state.packing_format_for_cpu = True
    assert linear_part(block.q, torch.randn(20, 16, dtype=BF16), 16) is None
    with pytest.raises(ValueError, match="reordered"):
        exact_forward(block.q, torch.randn(20, 16, dtype=F64))


def test_four_bit_beside_a_plain_layer(fused):
    model, block = four_bit_model()
    block.k = nn.Linear(16, 8, dtype=BF16)
    same(block, torch.randn(2, 9, 16, dtype=BF16), limit=2e-2)
    assert fused[0] == 3


def test_exact_forward_of_four_bits():
    """Against the formula with dequantised weights; gradients reach the trained weights; the module stays as it is."""
    from bitsandbytes.functional import dequantize_4bit
    model, block = four_bit_model(bias=True)
    x = torch.randn(9, 16, dtype=F64, requires_grad=True)
    layer = block.q
    weight = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).double()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    want = x @ weight.T + layer.base_layer.bias.double() + layer.scaling["default"] * (x @ a.double().T) @ b.double().T
    found = exact_forward(layer, x)
    assert torch.allclose(found, want, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(found.sum(), [x, a, b]), torch.autograd.grad(want.sum(), [x, a, b]),
                            strict=True):
        assert torch.allclose(mine, theirs) and mine.dtype == theirs.dtype
    whole = exact_forward(block, x)
    assert torch.allclose(whole[0], want) and has_four_bit(block) and layer.base_layer.weight.dtype == torch.uint8


def test_eight_bit_is_called(fused):
    block = Block(lambda features, out: Linear8bitLt(features, out, bias=False, has_fp16_weights=False)).to("cpu")
    block.is_loaded_in_8bit = True
    x = torch.randn(2, 9, 16)
    assert linear_part(block.q, x, 16) is None and not list(find_linears(block))


# candidates

def candidates_of(block):
    return {c.name: c for c in find_linears(block)}


@pytest.mark.parametrize("make", ["plain", "four_bit"])
def test_candidates_are_proven(make):
    model, block = adapted(dtype=BF16) if make == "plain" else four_bit_model()
    found = candidates_of(block)
    assert set(found) == {*NAMES, "down"} and {c.kernel for c in found.values()} == {"LoRA linear"}
    assert found["k"].key == found["v"].key != found["q"].key and hash(found["q"].key) is not None
    for name in ("q", "down"):
        x = torch.randn(2, 40, 24 if name == "down" else 16, dtype=BF16)
        verdict = prove(found[name], [Call((x,), {})])
        assert verdict.kept, verdict
        wrong = copy.copy(found[name])
        object.__setattr__(wrong, "function", lambda module, x: module.base_layer(x))
        assert not prove(wrong, [Call((x,), {})]).kept
    assert not list(find_linears(block, backend="liger"))


def test_keys_differ_where_the_computation_does():
    model, block = adapted(names=("k", "v"), rank_pattern={"v": 2})
    assert len({c.key for c in find_linears(block)}) == 2
    model, block = adapted(names=("k", "v"))
    assert len({c.key for c in find_linears(block)}) == 1
    block.k.base_layer.requires_grad_(True)
    assert len({c.key for c in find_linears(block)}) == 2


def test_watched_layers_are_no_candidates():
    model, block = adapted()
    block.q.register_forward_hook(lambda *_: None)
    block.k.forward = lambda x: x
    assert set(candidates_of(block)) == {"v", "gate", "up", "down"}


def test_swapped_layers_through_deepcopy_pickle_and_project(fused):
    model, block = adapted()
    x = torch.randn(5, 16)
    want = Block.forward(block, x)
    record = Patches()
    for candidate in find_linears(block):
        record.swap(candidate.module, candidate.function)
    swapped = block(x)
    assert len(fused) == 6 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(swapped, want, strict=True))
    fused.clear()
    assert torch.allclose(project([block.q, block.k], x)[0], want[0], atol=1e-6) and fused == [2]
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        twin.q.lora_B["default"].weight.data.zero_()
        assert torch.allclose(twin(x)[0], F.linear(x, twin.q.base_layer.weight, twin.q.base_layer.bias), atol=1e-6)
        assert torch.allclose(block(x)[0], want[0], atol=1e-6)
    record.restore()
    assert all(torch.equal(a, b) for a, b in zip(block(x), want, strict=True))


# a whole model

def llama(**options):
    config = LlamaConfig(vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, **options)
    model = LlamaForCausalLM(config)
    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_model_trains_the_same(reentrant, fused):
    model = llama().train()
    ids = torch.randint(0, 67, (2, 11))
    if reentrant is not None:
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def step():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    loss, grads = step()
    record = Patches()
    for candidate in find_linears(model):
        record.swap(candidate.module, candidate.function)
    assert len(record.swapped) == 14 and not fused
    mine, my_grads = step()
    assert fused and torch.allclose(mine, loss, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(my_grads, grads, strict=True))
    with model.disable_adapter():
        bare = model(input_ids=ids, labels=ids).loss
    assert not torch.allclose(bare, mine, atol=1e-4)
    record.restore()
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids, labels=ids).loss, bare)


def test_saved_adapter_is_unaffected(tmp_path):
    model = llama()
    for candidate in find_linears(model):
        Patches().swap(candidate.module, candidate.function)
    names = set(model.state_dict())
    assert names == set(llama().state_dict())
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training, fused):
    model, block = adapted()
    x = torch.randn(2, 5, 16)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    with contextlib.nullcontext() if training else torch.no_grad():
        for _ in range(2):
            for a, b in zip(compiled(block, x), ours(block, x), strict=True):
                assert torch.allclose(a, b, atol=1e-5)
    if training:
        grads = [torch.autograd.grad(sum(y.sum() for y in f(block, x)), block.q.lora_A["default"].weight)[0]
                 for f in (compiled, ours)]
        assert torch.allclose(*grads, atol=1e-5)
    with model.disable_adapter():  # guards must notice
        assert torch.allclose(compiled(block, x)[0], ours(block, x)[0], atol=1e-5)


def test_exported_without_autograd():
    model, block = adapted()
    x = torch.randn(5, 16)

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return ours(self.block, x)

    with torch.no_grad():
        program = torch.export.export(Program().eval(), (x,))
        assert torch.allclose(program.module()(x)[3], ours(block, x)[3], atol=1e-5)
