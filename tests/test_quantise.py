"""GGUF quantisers, the choice of types and the importance matrix, held against llama.cpp's own answers (kept as data)."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quantise import (  # noqa: E402
    ERRORS,
    K_KINDS,
    MIXES,
    SHAPES,
    error,
    importance_for,
    made_tensors,
    real_tensors,
    summary,
)
from supertrainer.export.gguf import blocks  # noqa: E402
from supertrainer.export.gguf.blocks import KINDS, bytes_per_row, quantise, supports  # noqa: E402
from supertrainer.export.gguf.importance import gather_importance, importance_of, watched  # noqa: E402
from supertrainer.export.gguf.mixes import ALIASES, METHODS, choose_types, resolve_method  # noqa: E402
from supertrainer.runtime import UserError  # noqa: E402

KEPT, MADE = json.loads(ERRORS.read_text()), made_tensors()
PACKED = [kind for kind in KINDS if kind not in (Kind.F32, Kind.F16, Kind.BF16)]
LIMIT = 1.02  # times llama.cpp's root-mean-square error
BITS = {kind: int(kind.name[1]) for kind in PACKED}
# what the least float16 as a scale makes of the largest number: finer than that no type can be
QUANTUM = {kind: 2**-24 * {Kind.Q2_K: 3 * 15, Kind.Q3_K: 4 * 32, Kind.Q4_K: 15 * 63, Kind.Q5_K: 31 * 63, Kind.Q6_K: 32 * 128}.get(
    kind, 2 ** BITS[kind]) for kind in PACKED}


def back(packed, kind):
    return torch.from_numpy(gguf.quants.dequantize(packed, kind))


# ------------------------------------------------------------------------------------------------ beside llama.cpp

@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", [kind for kind in PACKED], ids=lambda kind: kind.name.lower())
def test_error_is_at_most_that_of_llama_cpp(kind, weighted):
    """On tensors made from a seed and, where the packages are installed, on those of SmolLM2 and MiniLM."""
    compared = 0
    for name, x in (MADE | real_tensors()).items():
        if kind.name not in KEPT["errors"][name]:
            assert not supports(kind, x.shape[1])
            continue
        importance = importance_for(x) if weighted else None
        packed = quantise(torch.from_numpy(x), kind, None if importance is None else torch.from_numpy(importance))
        theirs = KEPT["errors"][name][kind.name][weighted]
        # a tensor that came out of a 4-bit file can fit a type exactly but for float32's dust in the last place
        dust = 5e-5 * float(np.sqrt((x.astype(np.float64) ** 2).mean()))
        assert error(packed, kind, x, importance) <= LIMIT * theirs + (0 if theirs > dust else dust), (name, theirs)
        compared += 1
    assert compared >= len(MADE) == 8


@pytest.mark.parametrize("kind", K_KINDS, ids=lambda kind: kind.name.lower())
def test_importance_is_worth_having(kind):
    """The error that counts is lower with importance than without, on every tensor."""
    for name, x in MADE.items():
        importance = importance_for(x)
        without, with_it = (error(quantise(torch.from_numpy(x), kind, weight), kind, x, importance)
                            for weight in (None, torch.from_numpy(importance)))
        assert with_it < without, name


@pytest.mark.parametrize("shape", SHAPES)
def test_types_are_those_of_llama_cpp(shape):
    """Every tensor of every method: no exceptions."""
    model, kept = SHAPES[shape], json.loads(MIXES.read_text())["mixes"][shape]
    tensors = model.tensors()
    assert kept.keys() == METHODS.keys()
    for method, theirs in kept.items():
        types = choose_types(tensors, method, architecture=model.architecture, layers=model.layers, heads=model.heads,
                             kv_heads=model.kv_heads, experts=model.experts, importance=model.importance)
        assert summary(types) == theirs, method
        assert all(supports(kind, tensors[name][-1]) for name, kind in types.items())


# ------------------------------------------------------------------------------------------------ plain types

@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1],
                         ids=lambda kind: kind.name.lower())
def test_plain_types_are_those_of_gguf_to_the_byte(kind, seed):
    x = torch.randn(37, 416)
    x[0], x[1], x[2] = 0, x[1].bfloat16().float(), torch.randint(-8, 9, (416,)).float()  # zeros, ties, halves
    x[3], x[4] = x[3] * 1e-6, x[4].abs() + 3
    np.testing.assert_array_equal(quantise(x, kind), gguf.quants.quantize(x.numpy(), kind), err_msg=f"seed {seed}")


# ------------------------------------------------------------------------------------------------ edges

def edge(name):
    """Return 4 rows of 512 that are hard to scale."""
    x = torch.zeros(4, 512)
    if name == "one outlier":
        x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)) * 1e-3
        x[:, 100] = 50.0
    elif name == "constant":
        x += torch.tensor([[0.5], [-0.5], [3e-4], [-7.0]])
    elif name == "one value":
        x[:, 300] = -2.0
    elif name == "large":
        x = torch.randn(4, 512, generator=torch.Generator().manual_seed(1)) * 5e3
    elif name == "denormal":
        x += 1e-41
    elif name == "steps of 1":
        x = torch.arange(512).float().expand(4, -1) % 8 - 4
    return x


@pytest.mark.parametrize("name", ["zeros", "constant", "one value", "one outlier", "large", "denormal", "steps of 1"])
@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_edges_stay_within_a_step(kind, name, weighted):
    """Nothing becomes NaN, zeros stay zeros, and no weight is further off than a coarse step of its super-block."""
    x = edge(name)
    found = back(quantise(x, kind, torch.linspace(0, 2, 512) if weighted else None), kind)
    assert found.isfinite().all()
    if name in ("zeros", "denormal"):
        assert not found.any()
        return
    spread = x.abs().view(4, -1, 256).amax(-1, keepdim=True).expand(-1, -1, 256).reshape(4, 512)
    assert ((found - x).abs() <= spread * 2.2 / 2 ** BITS[kind] + QUANTUM[kind]).all()
    if name == "constant" and kind != Kind.Q2_K:
        assert ((found - x).abs() <= 0.02 * x.abs() + QUANTUM[kind]).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != Kind.F32], ids=lambda kind: kind.name.lower())
def test_what_cannot_be_stored_is_refused_by_name(kind):
    for value, says in ((float("nan"), "NaN or infinite"), (float("-inf"), "NaN or infinite"), (3.4e38, "stores up to")):
        x = torch.zeros(4, 512)
        x[3, 511] = value
        with pytest.raises(UserError, match=f"blk.3.ffn_up.weight holds .*{says}"):
            quantise(x, kind, name="blk.3.ffn_up.weight")


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name.lower())
def test_the_largest_weight_that_is_let_through_is_stored(kind):
    """The limit is one at which no scale leaves float16, whatever the search prefers."""
    for sign in (1, -1):
        x = torch.rand(64, 512, generator=torch.Generator().manual_seed(5))
        x[:, ::5] = sign
        x = x * sign * 0.999 * blocks.LARGEST[kind]
        for importance in (None, torch.rand(512, generator=torch.Generator().manual_seed(6)) ** 4):
            found = back(quantise(x, kind, importance), kind)
            assert found.isfinite().all() and (found - x).abs().max() < blocks.LARGEST[kind]


def test_wrong_requests_are_refused():
    for tensor, kind, importance, says in (
            (torch.ones(2, 576), Kind.Q4_K, None, "rows of 576"), (torch.ones(2, 40), Kind.Q8_0, None, "rows of 40"),
            (torch.ones(2, 256, dtype=torch.int32), Kind.Q8_0, None, "no floating"), (torch.ones(()), Kind.F32, None, "no floating"),
            (torch.ones(2, 256), Kind.IQ4_NL, None, "IQ4_NL. Possible: F32"), (torch.ones(0, 256), Kind.Q8_0, None, "shape"),
            (torch.ones(2, 256), Kind.Q4_K, torch.ones(2), "one number per column"),
            (torch.ones(2, 256), Kind.Q4_K, torch.ones(2, 256)[:, :255], "one number per column"),
            (torch.ones(4, 2, 256), Kind.Q4_K, torch.ones(3, 256), "one number per column"),
            (torch.ones(2, 256), Kind.Q4_K, -torch.ones(256), "negative"),
            (torch.ones(2, 256), Kind.Q4_K, torch.full((256,), float("nan")), "NaN")):
        with pytest.raises(UserError, match=says):
            quantise(tensor, kind, importance)
    with pytest.raises(UserError, match="576"):
        bytes_per_row(Kind.Q6_K, 576)


# ------------------------------------------------------------------------------------------------ shapes and types

@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.lower())
def test_shapes_layouts_and_dtypes(kind, seed):
    x = torch.randn(3, 6, 512, dtype=torch.float64)
    whole = quantise(x.float(), kind)
    np.testing.assert_array_equal(quantise(x, kind), whole)
    assert whole.shape[:-1] == (3, 6) and whole.nbytes == 18 * bytes_per_row(kind, 512)
    np.testing.assert_array_equal(quantise(x[1, 2].float(), kind), whole[1, 2])
    turned = x.float().transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    np.testing.assert_array_equal(quantise(turned, kind), whole)
    np.testing.assert_array_equal(quantise(torch.randn(512, 6).t().requires_grad_(), kind).shape, whole[0].shape)
    for dtype in (torch.bfloat16, torch.float16):
        np.testing.assert_array_equal(quantise(x.to(dtype), kind), quantise(x.to(dtype).float(), kind), err_msg=f"seed {seed}")


@pytest.mark.parametrize("kind", [*K_KINDS, Kind.Q5_0], ids=lambda kind: kind.name.lower())
def test_each_expert_has_its_importance(kind, seed):
    x, importance = torch.randn(3, 16, 512), torch.rand(3, 512) ** 6
    importance[1] = 0  # saw no token
    whole = quantise(x, kind, importance)
    for expert in (0, 2):
        np.testing.assert_array_equal(whole[expert], quantise(x[expert], kind, importance[expert]))
    np.testing.assert_array_equal(whole[1], quantise(x[1], kind, torch.ones(512)), err_msg=f"seed {seed}")
    np.testing.assert_array_equal(quantise(x, kind, importance[0] * 1024), quantise(x, kind, importance[0]))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name.lower())
def test_chunks_and_threads_change_nothing(kind, weighted, seed, monkeypatch):
    x, importance = torch.randn(77, 768), torch.rand(768) if weighted else None
    whole = quantise(x, kind, importance)
    for size in (1, 5000, 2**14):
        monkeypatch.setattr(blocks, "CHUNK", size)
        np.testing.assert_array_equal(quantise(x, kind, importance), whole, err_msg=f"seed {seed}, chunk {size}")
    monkeypatch.undo()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(blocks, "CHUNK", 5000)
        np.testing.assert_array_equal(quantise(x, kind, importance), whole, err_msg=f"seed {seed}")
        with pytest.raises(UserError, match="NaN"):
            quantise(torch.full((64, 768), float("nan")), kind, importance)
        assert torch.get_num_threads() == 2, "the number of threads is the caller's again"
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ methods

def test_names_of_methods():
    for name in (*METHODS, *ALIASES, "Q4_K_M", " q5-k-m ", METHODS["q6_k"]):
        assert resolve_method(name).name in METHODS
    for name in ("iq4_nl", "IQ2_XXS", "tq1_0", "q2_k_s", "iq3_m"):
        with pytest.raises(UserError, match="llama-cpp-python"):
            resolve_method(name)
    with pytest.raises(UserError, match="Did you mean 'q4_k_m'"):
        resolve_method("q4_km")


# ------------------------------------------------------------------------------------------------ importance

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def token_rows(count=4, length=12):
    return [{"input_ids": torch.randint(96, (1, length))} for _ in range(count)]


def by_hand(model, name, rows):
    """Return the mean square of the input of a layer, from a hook of this test's own."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    with torch.no_grad():
        for row in rows:
            model(**row)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).square().mean(0)


def test_importance_with_adapters_has_the_names_of_the_saved_model(seed):
    from peft import LoraConfig, get_peft_model

    base, rows = LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), token_rows()
    plain = gather_importance(base, rows)
    assert set(plain) == set(watched(base)) and len(plain) == 2 * 7 + 1 and "lm_head.weight" in plain
    torch.testing.assert_close(plain["model.layers.1.mlp.down_proj.weight"], by_hand(base, "model.layers.1.mlp.down_proj", rows))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"]))
    found = gather_importance(adapted.train(), rows)
    assert adapted.training and found.keys() == plain.keys(), seed
    for name in plain:
        torch.testing.assert_close(found[name], plain[name])  # a fresh adapter changes nothing


def test_importance_in_four_bits(seed):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, rows = LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), token_rows()
    plain = gather_importance(model, rows)
    for layer in model.model.layers:
        old = layer.mlp.up_proj
        new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32)
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        layer.mlp.up_proj = new.to("cpu")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(gather_importance(model, rows)[name], plain[name], msg=f"seed {seed}")


def test_importance_of_patched_gpt2_and_encoder_models(seed):
    from supertrainer.patching import patch_model

    rows = token_rows()
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    plain = gather_importance(model, rows)
    patch_model(model)
    for name, mean in gather_importance(model, rows).items():
        torch.testing.assert_close(mean, plain[name], rtol=1e-3, atol=1e-5)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2)).eval()
    found = gather_importance(gpt, rows)
    assert found["transformer.h.0.mlp.c_proj.weight"].shape == (128,) and "lm_head.weight" not in found
    bert = BertForSequenceClassification(BertConfig(**{key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size")},
                                                    num_hidden_layers=1, num_attention_heads=2)).eval()
    found = gather_importance(bert, [dict(row, labels=torch.tensor([1])) for row in rows])
    torch.testing.assert_close(found["bert.encoder.layer.0.output.dense.weight"],
                               by_hand(bert, "bert.encoder.layer.0.output.dense", rows), msg=f"seed {seed}")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_counted_one_by_one(family, seed):
    """What each expert saw, against a walk through the router by hand; an expert without tokens has no entry."""
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2)).eval()
        where, names = "model.layers.0.block_sparse_moe.experts.{}.{}.weight", ("w1", "w3", "w2")
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=16, num_experts=6,
                                                   num_experts_per_tok=2)).eval()
        where, names = "model.layers.0.mlp.experts.{}.{}.weight", ("gate_proj", "up_proj", "down_proj")
    implementation = model.config._experts_implementation
    rows = token_rows(2, 3)
    seen = []
    experts = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp.experts"))
    handle = experts.register_forward_hook(lambda module, args, out: seen.append([x.detach() for x in args[:2]]))
    found = gather_importance(model, rows)
    handle.remove()
    assert model.config._experts_implementation == implementation
    tokens, chosen = (torch.cat(part) for part in zip(*seen, strict=True))
    empty = 0
    for expert in range(6):
        mine = tokens[(chosen == expert).any(-1)]
        gate, up, down = (where.format(expert, name) for name in names)
        if not len(mine):
            assert gate not in found and down not in found
            empty += 1
            continue
        torch.testing.assert_close(found[gate], mine.square().mean(0), msg=f"seed {seed}")
        torch.testing.assert_close(found[up], found[gate])
        weight = experts.gate_up_proj[expert].detach()
        first, second = (mine @ weight.t()).chunk(2, -1)
        torch.testing.assert_close(found[down], (nn.functional.silu(first) * second).square().mean(0), msg=f"seed {seed}")
    sources = [where.format(expert, names[2]) for expert in range(6)]
    stacked = importance_of(found, sources, (6, 64, experts.down_proj.shape[-1]))
    assert stacked.shape == (6, experts.down_proj.shape[-1]) and stacked.isfinite().all() and empty <= 4


def test_texts_conversations_and_wrong_rows(seed):
    class Tokenizer:
        def __call__(self, text, return_tensors):
            return {"input_ids": torch.tensor([[len(word) for word in text.split()]])}

        def apply_chat_template(self, messages, return_tensors, return_dict):
            return self(" ".join(message["content"] for message in messages), return_tensors)

    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    turns = [{"role": "user", "content": "a bb ccc"}]
    same = [gather_importance(model, [row], Tokenizer()) for row in ("a bb ccc", turns, {"messages": turns}, {"input_ids": [1, 2, 3]})]
    for other in same[1:]:
        assert all(torch.equal(other[name], mean) for name, mean in same[0].items()), seed
    cut = gather_importance(model, [{"input_ids": [1, 2, 3, 4, 5], "attention_mask": [1] * 5}], max_length=3)
    assert all(torch.equal(cut[name], mean) for name, mean in same[0].items()), seed
    for rows, says in (([], "at least one row"), (["text"], "give a tokenizer"), ([{"text": "x"}], "give a tokenizer")):
        with pytest.raises(UserError, match=says):
            gather_importance(model, rows)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="NaN or infinite"):
        gather_importance(model, token_rows())
