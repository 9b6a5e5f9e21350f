"""Attention layers found by structure: packed rows equal samples alone, padded and plain batches equal the class's own."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from supertrainer.data.collate import collator_for
from supertrainer.kernels.attention import block_mask
from supertrainer.patching import attention as module_under_test
from supertrainer.patching import masks
from supertrainer.patching.attention import find_attention
from supertrainer.patching.masks import packed_samples
from supertrainer.patching.proof import prove, record_calls
from supertrainer.patching.record import patches, plain_model

SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = {**SIZES, "num_key_value_heads": 2}
CAUSAL = {
    "llama": ("Llama", GROUPED),
    "llama, one key head": ("Llama", {**GROUPED, "num_key_value_heads": 1, "head_dim": 16}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 16}),
    "gemma3": ("Gemma3", {**GROUPED, "head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention",
                                                                                        "full_attention"]}),
    "mistral with a window": ("Mistral", {**GROUPED, "sliding_window": 4}),
    "phi3": ("Phi3", GROUPED),
    "glm": ("Glm", {**GROUPED, "head_dim": 8}),
    "cohere": ("Cohere", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "smollm3, a layer without positions": ("SmolLM3", {**GROUPED, "no_rope_layers": [1, 0]}),
    "gpt2": ("GPT2", dict(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "gpt_neox": ("GPTNeoX", SIZES),
    "starcoder2": ("Starcoder2", {**GROUPED, "residual_dropout": 0.1}),
    "qwen3_next, gates beside the queries": ("Qwen3Next", {
        **GROUPED, "head_dim": 16, "layer_types": ["full_attention"] * 2, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    "gemma2, eager with a cap": ("Gemma2", {**GROUPED, "head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 1.0}),
}
ENCODERS = {"bert": ("BertForMaskedLM", SIZES), "roberta": ("RobertaForMaskedLM", {**SIZES, "max_position_embeddings": 64}),
            "electra": ("ElectraForMaskedLM", {**SIZES, "embedding_size": 32}),
            "modernbert": ("ModernBertForMaskedLM", {**SIZES, "local_attention": 6, "global_attn_every_n_layers": 2}),
            "distilbert": ("DistilBertForMaskedLM", dict(vocab_size=60, dim=32, hidden_dim=48, n_layers=2, n_heads=4))}


def build(name, table=CAUSAL, **more):
    family, options = table[name]
    options = {**options, **more}
    if table is not ENCODERS:
        kind = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
        family = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    else:
        kind = family.replace("ForMaskedLM", "Config")
    model = getattr(transformers, family)(getattr(transformers, kind)(**options)).eval()
    with torch.no_grad():  # norms that are not all ones, weights whose scores are not all alike
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def patch(model, batches=None):
    """Swap each layer's first proven candidate in; return the names of the patched layers and what they run."""
    candidates = list(find_attention(model))
    ids = torch.randint(3, 60, (2, 11))
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, 8:] = 0
    cacheless = {} if plain_model(model).config.model_type in ENCODERS else {"use_cache": False}
    batches = batches or [dict(input_ids=ids, attention_mask=mask, **cacheless), dict(input_ids=ids, **cacheless)]
    calls, kept = record_calls(model, {one.module for one in candidates}, batches), {}
    for one in candidates:
        if one.name not in kept and prove(one, calls[one.module]).kept:
            kept[one.name] = one
            patches(model).swap(one.module, one.function)
    return kept


def samples(*lengths):
    return [torch.randint(3, 60, (length,)).tolist() for length in lengths]


def packed_batch(model, chats, batching="padding_free"):
    batch = collator_for(batching, model, 0)([{"input_ids": ids, "labels": ids} for ids in chats])
    if isinstance(batch.get("attention_mask"), dict):
        return {key: value for key, value in batch.items() if key != "labels"}
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.fixture
def counted(monkeypatch):
    """Lengths of every call of the packed kernel."""
    calls = []
    kernel = module_under_test.packed_attention
    monkeypatch.setattr(module_under_test, "packed_attention",
                        lambda q, k, v, lengths, **options: (calls.append((lengths, options)), kernel(q, k, v, lengths,
                                                                                                  **options))[1])
    return calls


def run(model, batch):
    """Logits, and the gradient of a fixed function of them by every parameter."""
    model.zero_grad()
    logits = model(**batch, **({} if model.config.model_type in ENCODERS else {"use_cache": False})).logits
    (logits * torch.arange(logits.shape[1]).cos()[None, :, None]).sum().backward()
    return logits.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def run_alone(model, chats, start=0):
    """The same from each sample on its own, with the factors its tokens have in the packed row."""
    model.zero_grad()
    logits, begin = [], 0
    for ids in chats:
        out = model(input_ids=torch.tensor([ids])).logits
        (out * torch.arange(begin, begin + len(ids)).cos()[None, :, None]).sum().backward()
        logits.append(out.detach())
        begin += len(ids)
    return torch.cat(logits, 1), {name: weight.grad.clone() for name, weight in model.named_parameters()
                                  if weight.grad is not None}


def assert_same(found, wanted, seed, skip=()):
    def close(got, true, name):
        bound = 1e-5 * max(1.0, float(true.abs().max()))
        torch.testing.assert_close(got, true, rtol=1e-5, atol=bound, msg=lambda m: f"{seed}, {name}: {m}")

    close(found[0], wanted[0], "logits")
    assert found[1].keys() == wanted[1].keys()
    for name in found[1].keys() - set(skip):
        close(found[1][name], wanted[1][name], name)


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_is_each_sample_alone(seed, name, counted):
    model, chats = build(name), samples(7, 1, 12, 4)
    wanted = run_alone(copy.deepcopy(model), chats)
    if model.config._attn_implementation == "eager":  # the weights it no longer gives are an output for the proof
        kept = {one.name: one for one in find_attention(model) if not one.function.args[0].weights
                and one.function.args[0].rope == "half"}
        for one in kept.values():
            patches(model).swap(one.module, one.function)
    else:
        kept = patch(model)
    assert len(kept) == 2, seed
    before = len(counted)
    found = run(model, packed_batch(model, chats))
    assert len(counted) == before + 2 and counted[-1][0] == (7, 1, 12, 4), "both layers attend by samples"
    assert_same(found, wanted, seed)


@pytest.mark.parametrize("name", [name for name in CAUSAL if "eager" not in name])
def test_padded_and_plain_batches_are_as_the_class_computes_them(seed, name):
    plain = build(name)
    model = copy.deepcopy(plain)
    assert len(patch(model)) == 2
    ids, mask = torch.randint(3, 60, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    assert_same(run(model, dict(input_ids=ids)), run(plain, dict(input_ids=ids)), seed)
    for row, side in ((1, slice(6, 9)), (2, slice(0, 4))):  # right and left
        mask[row, side] = 0
    batch = dict(input_ids=ids, attention_mask=mask)
    assert_same(run(model, batch), run(plain, batch), seed)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_packed_and_padded(seed, name, counted):
    plain, chats = build(name, ENCODERS), samples(7, 2, 13, 5)
    model = copy.deepcopy(plain)
    assert len(patch(model)) == 2
    wanted, before = run_alone(plain, chats), len(counted)
    found = run(model, packed_batch(model, chats))
    assert len(counted) == before + 2 and not counted[-1][1]["causal"]
    assert_same(found, wanted, seed)
    ids, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    batch = dict(input_ids=ids, attention_mask=mask)
    assert_same(run(model, batch), run(plain, batch), seed)


def test_a_gate_of_its_own(seed):
    plain = build("hrm", {"hrm": ("HrmText", SIZES)})
    model = copy.deepcopy(plain)
    assert all("gate" in one.kernel for one in patch(model).values()) and len(patches(model).swapped) == 4
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_several_rows_of_samples(seed, counted):
    model, chats = build("llama"), samples(5, 3, 8)
    wanted = run_alone(copy.deepcopy(model), chats)
    patch(model)
    ids = torch.tensor([chats[0] + chats[1], chats[2]])
    positions = torch.tensor([[*range(5), *range(3)], [*range(8)]])
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert counted[-1][0] == (5, 3, 8)
    torch.testing.assert_close(logits.flatten(0, 1)[None], wanted[0], rtol=1e-5, atol=1e-4)


def test_a_window_over_one_long_row_is_computed_in_pieces(seed, counted):
    plain = build("mistral with a window")
    model = copy.deepcopy(plain)
    patch(model)
    batch = dict(input_ids=torch.randint(3, 60, (2, 20)))
    before = len(counted)
    assert_same(run(model, batch), run(plain, batch), seed)
    assert len(counted) == before + 2 and counted[-1][0] == (20, 20) and counted[-1][1]["window"] == 4


def test_the_layers_of_a_forward_pass_read_a_mask_once(seed, monkeypatch):
    reads = []
    read = masks._read
    monkeypatch.setattr(masks, "_read", lambda mask: (reads.append(1), read(mask))[1])
    model = build("llama", num_hidden_layers=6)
    patch(model)
    model.gradient_checkpointing_enable()
    model.train()
    batch, before = packed_batch(model, samples(4, 6)), len(reads)
    run(model, batch)
    assert len(reads) == before + 1
    run(model, batch)  # another forward pass, another mask
    assert len(reads) == before + 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_samples_read_from_masks(seed, dtype):
    def typed(seen):
        seen = seen[None, None]
        return seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill_(
            ~seen, torch.finfo(dtype).min)

    for lengths in ([4], [1, 1, 1], [3, 5, 1], [6, 2, 6]):
        for causal in (True, False):
            for window in (None, 1, 2, 4):
                mask = block_mask(lengths, causal, window)
                found = packed_samples(typed(mask))
                if found is None:  # with a window of one token there is nothing to tell samples by
                    assert window == 1 and causal
                    continue
                again = block_mask(found.lengths, found.causal, found.window)
                assert torch.equal(again, mask), (seed, lengths, causal, window)
                for _ in range(5):  # one entry more or less, and it says something else
                    wrong = mask.clone()
                    row, column = torch.randint(len(mask), (2,)).tolist()
                    wrong[row, column] ^= True
                    other = packed_samples(typed(wrong))
                    assert other is None or torch.equal(block_mask(other.lengths, other.causal, other.window), wrong)
    if dtype != torch.bool:
        biased = typed(block_mask([3, 3], True))
        biased[0, 0, 4, 0] = -1.0  # a bias, not a wall
        assert packed_samples(biased) is None


def test_a_mask_that_was_changed_is_read_again(seed):
    mask = block_mask([3, 3], True)[None, None]
    assert packed_samples(mask).lengths == (3, 3)
    mask[0, 0, 3:, :3] = True
    assert packed_samples(mask).lengths == (6,)


def test_position_ids_that_restart_under_a_mask_that_does_not(seed, counted):
    """With a mask of ones transformers lets the samples see each other; then so do we."""
    plain = build("llama")
    model = copy.deepcopy(plain)
    patch(model)
    batch = dict(input_ids=torch.randint(3, 60, (1, 9)), position_ids=torch.tensor([[*range(4), *range(5)]]),
                 attention_mask=torch.ones(1, 9, dtype=torch.int64))
    before = len(counted)
    assert_same(run(model, batch), run(plain, batch), seed)
    assert len(counted) == before


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_generation_with_a_cache(seed, name):
    plain = build(name)
    model = copy.deepcopy(plain)
    patch(model)
    ids = torch.randint(3, 60, (2, 7))
    options = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options)), seed


def test_attention_weights_when_asked_for(seed):
    plain = build("llama", attn_implementation="eager")
    model = copy.deepcopy(plain)
    assert len(patch(model)) == 2
    ids = torch.randint(3, 60, (1, 6))
    found, wanted = model(ids, output_attentions=True), plain(ids, output_attentions=True)
    torch.testing.assert_close(found.attentions, wanted.attentions)
    chats = packed_batch(model, samples(4, 5))
    found, wanted = model(**chats, output_attentions=True), plain(**chats, output_attentions=True)
    assert all(weights is not None for weights in found.attentions)
    torch.testing.assert_close(found.attentions, wanted.attentions)


def test_dropout_is_the_classes_own(seed):
    """The same random numbers are drawn in the same order: equal to the last bit."""
    for name, table, options in [("bert", ENCODERS, {}), ("gpt2", CAUSAL, {}), ("llama", CAUSAL, {"attention_dropout": 0.3})]:
        plain = build(name, table, **options).train()
        model = copy.deepcopy(plain)
        assert len(patch(model.eval())) == 2
        model.train()
        ids = torch.randint(3, 60, (2, 9))
        torch.manual_seed(1)
        wanted = run(plain, dict(input_ids=ids))
        torch.manual_seed(1)
        assert_same(run(model, dict(input_ids=ids)), wanted, seed)
        torch.manual_seed(2)
        assert not torch.allclose(run(model, dict(input_ids=ids))[0], wanted[0])


def test_adapters(seed):
    from peft import LoraConfig, get_peft_model

    plain = get_peft_model(build("qwen3"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model = copy.deepcopy(plain)
    kept = patch(model)
    assert len(kept) == 2 and all("base_model" in name for name in kept)
    ids = torch.randint(3, 60, (2, 9))
    assert_same(run(model, dict(input_ids=ids)), run(plain, dict(input_ids=ids)), seed)
    chats = samples(5, 8)
    assert_same(run(model, packed_batch(model, chats)), run_alone(plain, chats), seed)
    with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_hooks_and_swapped_children_still_run(seed):
    model = build("qwen3")
    patch(model)
    seen = []
    model.model.layers[0].self_attn.q_norm.register_forward_hook(lambda *_: seen.append("norm"))
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: seen.append("output"))
    ids = torch.randint(3, 60, (1, 5))
    with torch.no_grad():
        before = model(ids).logits
        assert seen == ["norm", "output"]
        model.model.layers[0].self_attn.q_proj = nn.Linear(32, 64, bias=False)
        assert not torch.allclose(model(ids).logits, before)


def test_what_is_left_alone(seed):
    model = build("llama")
    assert list(find_attention(nn.Linear(3, 3))) == []
    layer = model.model.layers[0].self_attn
    handle = layer.register_forward_hook(lambda *_: None)
    assert {one.name for one in find_attention(model)} == {"model.layers.1.self_attn"}
    handle.remove()
    layer.register_parameter("sinks", nn.Parameter(torch.zeros(4)))
    model.model.layers[1].self_attn.further = nn.Linear(32, 32)
    assert list(find_attention(model)) == []


def test_arguments_by_place_and_arguments_it_does_not_know(seed):
    plain = build("llama")
    layer = plain.model.layers[0].self_attn
    one = next(find_attention(plain))
    hidden, tables = torch.randn(1, 6, 32), plain.model.rotary_emb(torch.randn(1, 6, 32), torch.arange(6)[None])
    for args, kwargs in [((hidden, tables), {}), ((hidden, tables, None), {}), ((), dict(hidden_states=hidden,
                                                                                        position_embeddings=tables))]:
        torch.testing.assert_close(one.function(layer, *args, **kwargs), layer(*args, **kwargs))
    bias = torch.randn(1, 4, 6, 6)
    mask = block_mask([2, 4], True)[None, None]
    found = one.function(layer, hidden, tables, mask, position_bias=bias)
    torch.testing.assert_close(found, layer(hidden, tables, mask, position_bias=bias))


def test_pickle_and_deepcopy(seed):
    model = build("gemma3")
    patch(model)
    ids = torch.randint(3, 60, (1, 6))
    with torch.no_grad():
        wanted = model(ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids).logits, wanted)
            assert other.model.layers[0].self_attn.forward.module is other.model.layers[0].self_attn


def test_layers_of_one_kind_share_a_key(seed):
    keys = [one.key for one in find_attention(build("llama"))]
    assert len(set(keys)) == 1
    assert len({one.key for one in find_attention(build("gemma3"))}) == 2  # with a window and without


def test_bfloat16_and_autocast(seed):
    for name in ("llama", "qwen3"):
        plain = build(name)
        model = copy.deepcopy(plain)
        assert len(patch(model)) == 2
        chats = samples(9, 6)
        wanted = torch.cat([plain(torch.tensor([ids])).logits for ids in chats], 1)
        scale = wanted.abs().max()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(**packed_batch(model, chats), use_cache=False).logits
        assert (found - wanted).abs().max() < 0.1 * scale, seed
        found = model.bfloat16()(**packed_batch(model, chats), use_cache=False).logits
        assert (found - wanted).abs().max() < 0.1 * scale, seed
