"""From a GGUF file back to a model that can be trained: every architecture, every kind of tokenizer, and files that lie."""

import json

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from supertrainer import FastLLM
from supertrainer.export.gguf.architectures import plan
from supertrainer.export.gguf.convert import convert
from supertrainer.export.gguf.pre_tokenizers import PROBE, SPLITTINGS
from supertrainer.models.builtin import train_byte_bpe, train_wordpiece
from supertrainer.models.gguf import read_gguf, read_head
from supertrainer.models.gguf_config import find_llama3, read_config
from supertrainer.models.gguf_file import GgufFile
from supertrainer.models.gguf_tokenizers import CUTS, pre_tokenizer_of, read_tokenizer
from supertrainer.models.processor import load_processor, model_facts
from supertrainer.runtime import UserError, no_bars, quiet

TEXTS = [f"The {colour} fox number {n} jumps over {n * 7} lazy dogs; don't it sleep, café and all!\n\n  then\tthis"
         for n, colour in enumerate(["red", "brown", "quick", "pale", "snowy"] * 8)]
SAMPLES = [*TEXTS[:3], "", " ", "  two  spaces ", "\n\n\n", "\t tab", "12345 6.7", "don't I'LL we'Ve", "naïve café e\u0301",
           "日本語 テキスト", "Привет, мир", "😀👍🏽 family", "a\u00a0b", "x" * 40, "user\nCamelCaseWORDS and_snake", "<s>[INST]"]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 100, "rope_theta": 500000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + n / 50 for n in range(8)],
        "long_factor": [1.5 + n / 5 for n in range(8)], "original_max_position_embeddings": 64}
LOCAL = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
         "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
FAMILIES = {
    "llama": ("llama", {}), "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 64}), "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-attention": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.5, "beta_fast": 16.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "mistral": ("mistral", {"sliding_window": None}), "smollm3": ("smollm3", {}), "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7,
                               "rope_parameters": LOCAL, "layer_types": None}),
    "phi3": ("phi3", {}), "phi3-longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "phi4-partial": ("phi3", {"head_dim": 16, "partial_rotary_factor": 0.5,
                              "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
}
COMPARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window",
            "layer_types", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "bos_token_id",
            "eos_token_id", "pad_token_id", "no_rope_layers", "hidden_act", "hidden_activation")


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(TEXTS, 360, extra_tokens=["<|endoftext|>"])  # Qwen 2's own class would add it


def lively(model):
    """Random weights large enough for attention to choose, so that positions, windows and caps matter."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + noise * 0.2 if weight.dim() == 1 and "norm" in name.lower() and "gemma" not in model.config.model_type
                         else noise * (0.2 if weight.dim() == 1 else 0.12))
    return model.eval()


def saved(folder, kind, values, tokenizer):
    named = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SIZES | values, **named)
    model = lively(AutoModelForCausalLM.from_config(config))
    with quiet(), no_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def ids_of(model, length=96):
    return torch.randint(3, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(5))


def rendered(tokenizer):
    """A conversation by the tokenizer's template, whose text in a file is without what only transformers understands."""
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "No."}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def plain(rope):
    """Rotary settings without what only says again what a default says."""
    if all(isinstance(value, dict) for value in rope.values()):
        return {kind: plain(value) for kind, value in rope.items()}
    return {key: value for key, value in rope.items() if (key, value) != ("partial_rotary_factor", 1.0) and key != "factor"
            or rope["rope_type"] != "longrope" and key == "factor"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_float_file_gives_the_same_model_back(name, tokenizer, tmp_path):
    kind, values = FAMILIES[name]
    original = saved(tmp_path / "model", kind, values, tokenizer)
    path = convert(tmp_path / "model", tmp_path / "model.gguf", "f32", progress=False)
    model, read = read_gguf(path)
    ids = ids_of(original)
    assert (logits(model, ids) - logits(original, ids)).abs().max() <= 1e-5 * logits(original, ids).abs().max()
    for key in COMPARED:
        if hasattr(original.config, key) and hasattr(model.config, key):
            assert getattr(model.config, key) == getattr(original.config, key), key
    found, wanted = plain(model.config.rope_parameters), plain(original.config.rope_parameters)
    assert json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 5)) == json.loads(
        json.dumps(wanted), parse_float=lambda text: round(float(text), 5)) or found["rope_type"] == "longrope"
    assert model.config.model_type == {"mistral": "llama"}.get(kind, kind)
    with quiet(), no_bars():
        wanted = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert rendered(read) == rendered(wanted) and len(read) == len(wanted)
    with quiet(), no_bars():
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids), logits(model, ids)) and not hasattr(again.config, "quantization_config")


def test_a_bert_encoder_comes_back(tmp_path):
    tokenizer = train_wordpiece(TEXTS, 200)
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                                  num_attention_heads=4, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id)
    original = lively(AutoModel.from_config(config, add_pooling_layer=False))
    with quiet(), no_bars():
        original.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    path = convert(tmp_path / "model", tmp_path / "model.gguf", "f32", progress=False)
    model, read = read_gguf(path)
    batch = tokenizer(SAMPLES[:3], return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted, found = original(**batch).last_hidden_state, model(**read(SAMPLES[:3], return_tensors="pt", padding=True)).last_hidden_state
    assert (found - wanted).abs().max() < 1e-5 and model.config.layer_norm_eps == config.layer_norm_eps
    assert [read(text).input_ids for text in SAMPLES] == [tokenizer(text).input_ids for text in SAMPLES]
    assert read.special_tokens_map == tokenizer.special_tokens_map
    with pytest.raises(UserError, match="a text encoder"):
        FastLLM.from_pretrained(str(path))


@pytest.mark.parametrize("method, limit", [("bf16", 4e-3), ("f16", 1e-3), ("q8_0", 0.013), ("q4_k_m", 0.18)])
def test_a_smaller_type_costs_what_it_costs_and_no_more(method, limit, tokenizer, tmp_path):
    original = saved(tmp_path / "model", "llama", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}, tokenizer)
    path = convert(tmp_path / "model", tmp_path / "model.gguf", method, progress=False)
    model, read = FastLLM.from_pretrained(str(path), dtype="float32")
    held, ids = dict(model.named_parameters()), ids_of(original)
    for name, weight in original.named_parameters():
        error = (held[name] - weight).square().mean().sqrt() / weight.square().mean().sqrt()
        assert error <= limit, name
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert torch.equal(held["model.layers.1.mlp.up_proj.weight"], torch.from_numpy(gguf.dequantize(
        reader["blk.1.ffn_up.weight"].data, reader["blk.1.ffn_up.weight"].tensor_type)).float())
    with quiet(), no_bars():
        model.save_pretrained(tmp_path / "again")
        read.save_pretrained(tmp_path / "again")
        again, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "again"), AutoTokenizer.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert [tokens(text).input_ids for text in SAMPLES] == [tokenizer(text).input_ids for text in SAMPLES]


def byte_level(rule):
    """A byte-level tokenizer that cuts text by one of llama.cpp's rules."""
    cut = CUTS[rule]
    core = Tokenizer(models.BPE(ignore_merges=cut.whole_words))
    core.normalizer = normalizers.NFC() if cut.compose else None
    core.pre_tokenizer, core.decoder = pre_tokenizer_of(cut), decoders.ByteLevel()
    from tokenizers.pre_tokenizers import ByteLevel
    core.train_from_iterator(TEXTS + SAMPLES, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False, initial_alphabet=sorted(ByteLevel.alphabet())))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["\n\n", "CamelCase"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def test_both_ways_know_the_same_rules():
    for name, splitting in SPLITTINGS.items():
        assert pre_tokenizer_of(CUTS[name]).pre_tokenize_str(PROBE) == splitting.pre_tokenizer.pre_tokenize_str(PROBE), name
        assert CUTS[name].whole_words == splitting.whole_words, name


def sentencepiece(prefix):
    """A byte-fallback BPE tokenizer in the way of Llama 2 (`prefix`) or Gemma."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, show_progress=False))
    state = json.loads(core.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    pieces = {piece: number for piece, number in core.get_vocab().items() if number >= len(special)}
    merges = generate_merges(pieces, {piece: -float(number) for piece, number in pieces.items()})
    state["model"]["merges"] = [list(merge) for merge in merges]  # complete, as those made from a SentencePiece file are
    core = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


TOKENIZERS = {"gpt-2": lambda: byte_level("gpt-2"), "smollm": lambda: byte_level("smollm"), "qwen2": lambda: byte_level("qwen2"),
              "llama-bpe": lambda: byte_level("llama-bpe"), "sentencepiece": lambda: sentencepiece(True),
              "sentencepiece-gemma": lambda: sentencepiece(False)}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_comes_back(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]()
    saved(tmp_path / "model", "llama", {"num_hidden_layers": 1}, tokenizer)
    path = convert(tmp_path / "model", tmp_path / "model.gguf", "f16", progress=False)
    with quiet():
        wanted = AutoTokenizer.from_pretrained(tmp_path / "model")
    read = read_tokenizer(GgufFile(path))
    for text in SAMPLES:
        assert read(text).input_ids == wanted(text).input_ids, text
        assert read.decode(read(text).input_ids) == wanted.decode(wanted(text).input_ids), text
    assert len(read) == len(wanted) and rendered(read) == rendered(wanted)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(read, name) == getattr(wanted, name) or getattr(wanted, name) is None


def test_rows_without_a_token_stay_rows(tokenizer, tmp_path):
    model = saved(tmp_path / "model", "llama", {}, tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 24, mean_resizing=False)
    with quiet(), no_bars():
        model.save_pretrained(tmp_path / "model")
    path = convert(tmp_path / "model", tmp_path / "model.gguf", "f32", progress=False)
    again, read = read_gguf(path)
    assert again.config.vocab_size == len(tokenizer) + 24 and len(read) == len(tokenizer)
    assert load_processor(str(path))(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids
    facts = model_facts(str(path), read)
    assert facts.embedding_rows == len(tokenizer) + 24 and facts.stop_ids == (tokenizer.eos_token_id,) and facts.positions == 128


@pytest.fixture(scope="module")
def file(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("file")
    saved(folder / "model", "llama", {"num_hidden_layers": 1}, tokenizer)
    return convert(folder / "model", folder / "model.gguf", "f32", progress=False)


def rewritten(file, path, *, drop=(), rename=(), **entries):
    """The same file with entries changed (`None` removes one) and tensors left out or renamed."""
    reader = gguf.GGUFReader(file)
    values = {key.replace("__", "."): value for key, value in entries.items()}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in values:
            continue
        writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1] if len(entry.types) > 1 else None)
    for name, value in values.items():
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(dict(rename).get(tensor.name, tensor.name), tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("said, change", [
    ("missing, too many", {"drop": ["blk.0.ffn_up.weight"]}),
    ("blk.0.attn_sinks.weight, which a llama model", {"rename": [("blk.0.ffn_up.weight", "blk.0.attn_sinks.weight")]}),
    ("another shape than its settings promise", {"llama__feed_forward_length": 32}),
    ("has no llama.block_count", {"llama__block_count": None}),
    ("no language model", {"general__architecture": "clip"}),
    ("cannot be read as a language model", {"general__architecture": "nosuch"}),
    ("holds no vocabulary", {"tokenizer__ggml__tokens": None}),
    ("a vocabulary of the kind 'rwkv'", {"tokenizer__ggml__model": "rwkv"}),
])
def test_a_file_that_lies_is_refused(said, change, file, tmp_path):
    with pytest.raises(UserError, match=said.replace("(", "\\(")):
        read_gguf(rewritten(file, tmp_path / "other.gguf", **change))


def test_a_rule_that_is_not_known_is_left_to_transformers_and_said(file, tmp_path, caplog):
    path = rewritten(file, tmp_path / "other.gguf", tokenizer__ggml__pre="no-such-rule")
    with pytest.raises(UserError, match="'no-such-rule'"):
        read_tokenizer(GgufFile(path))
    import logging
    logging.getLogger("supertrainer").propagate = True
    try:
        config, tokenizer = read_head(path)
    finally:
        logging.getLogger("supertrainer").propagate = False
    assert "no-such-rule" in caplog.text and "transformers" in caplog.text and len(tokenizer) >= config.vocab_size


def test_a_cut_file_is_refused(file, tmp_path):
    whole = file.read_bytes()
    for left, said in ((len(whole) // 2, "is cut short"), (200, "in the middle of its head"), (6, "is not a GGUF file")):
        (tmp_path / "cut.gguf").write_bytes(whole[:left])
        with pytest.raises(UserError, match=said):
            read_gguf(tmp_path / "cut.gguf")


def test_turns_end_where_the_file_says(file, tmp_path):
    path = rewritten(file, tmp_path / "other.gguf", tokenizer__ggml__eot_token_id=5)
    model, tokenizer = read_gguf(path)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 5]


def test_factors_that_are_no_llama_3_are_kept(file, tmp_path):
    factors = torch.tensor([1.0, 1.7, 1.2, 3.0, 1.1, 2.0, 1.0, 5.0])
    assert find_llama3(factors, 10000.0) is None
    reader = gguf.GGUFReader(rewritten(file, tmp_path / "other.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "factors.gguf", "llama")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1] if len(entry.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, _ = read_gguf(tmp_path / "factors.gguf")
    plain_model, _ = read_gguf(file)
    turned = model.model.rotary_emb.inv_freq * factors
    assert torch.allclose(turned, plain_model.model.rotary_emb.inv_freq, rtol=1e-6)


def test_what_is_read_can_be_planned_again(file, tmp_path):
    """The way there and back closes: a file, the model, its folder, and the same file's settings and tensors."""
    model, tokenizer = read_gguf(file)
    with quiet(), no_bars():
        model.save_pretrained(tmp_path / "again")
        tokenizer.save_pretrained(tmp_path / "again")
    made, held = plan(tmp_path / "again"), GgufFile(file)
    assert {planned.name: planned.shape for planned in made.tensors} == {name: place.shape for name, place in held.tensors.items()}
    assert all(torch.equal(planned.load(), held.load(planned.name)) for planned in made.tensors)
    kept, found = read_config(held).to_dict(), model.config.to_dict()
    assert {key: found[key] for key in kept if key not in ("dtype", "architectures")} == {
        key: kept[key] for key in kept if key not in ("dtype", "architectures")}
