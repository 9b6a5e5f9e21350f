"""The proof of a GGUF file: it passes for what was written, and it finds what was changed afterwards."""

import importlib.util
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from supertrainer.chat import CHATML_TEMPLATE
from supertrainer.export.gguf.convert import convert
from supertrainer.export.gguf.limits import LIMITS, Limit, distance, distance_checks
from supertrainer.export.gguf.proof import places_of, prove_gguf
from supertrainer.inference.llama import Llama, load_failure
from supertrainer.models.builtin import train_byte_bpe, train_wordpiece
from supertrainer.runtime import UserError

needs_llama = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
TEXTS = ["hello  world", "the quick brown fox\n\n1234"]


@pytest.fixture
def decoder(tmp_path):
    """A tiny Llama and its tokenizer, in a folder; one whose next token is not a matter of chance."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    tokenizer = train_byte_bpe(["the quick brown fox jumps over the lazy dog"] * 4, 300)
    tokenizer.chat_template = CHATML_TEMPLATE
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "encoder"
    tokenizer = train_wordpiece(["the quick brown fox jumps over the lazy dog"] * 4, 100)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def failed(proof):
    return [check.name for check in proof if not check.passed]


@needs_llama
@pytest.mark.parametrize("method", ["f32", "f16", "bf16", "q8_0"])
def test_a_file_as_written_passes(decoder, method):
    path = convert(decoder, decoder.parent / "x.gguf", method, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    held_out = [tokenizer("the quick brown fox jumps over the lazy dog")["input_ids"] * 2]
    proof = prove_gguf(path, decoder, method, texts=TEXTS, perplexity_rows=[{"input_ids": torch.tensor(held_out)}])
    assert not failed(proof) and not proof.not_run, "\n".join(map(str, proof))
    assert any("perplexity" in check.name for check in proof) and sum("llama.cpp" in check.name for check in proof) == 8


@needs_llama
def test_a_weight_that_changed_is_found_in_the_answers(decoder):
    path = convert(decoder, decoder.parent / "x.gguf", "f16", progress=False)
    held = load_file(decoder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    held[name] = held[name].reshape(4, 2, 8, 64).transpose(1, 2).reshape(64, 64).contiguous()  # the rotary order of the other kind
    save_file(held, decoder / "model.safetensors", metadata={"format": "pt"})
    found = failed(prove_gguf(path, decoder, "f16", texts=TEXTS))
    assert "gguf values" in found and any("mean KL" in name for name in found), found


@needs_llama
def test_a_setting_that_changed_is_found_in_the_answers(decoder):
    path = convert(decoder, decoder.parent / "x.gguf", "f16", progress=False)
    config = json.loads((decoder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (decoder / "config.json").write_text(json.dumps(config))
    found = failed(prove_gguf(path, decoder, "f16", texts=TEXTS))
    assert "gguf metadata" in found and any("|dlogprob|" in name for name in found), found


@needs_llama
def test_another_chat_template_is_found(decoder):
    path = convert(decoder, decoder.parent / "x.gguf", "f16", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = CHATML_TEMPLATE.replace("<|im_start|>", "<|im_end|><|im_start|>")
    tokenizer.save_pretrained(decoder)
    found = failed(prove_gguf(path, decoder, "f16", texts=TEXTS))
    assert "gguf vocabulary" in found and any("writes prompts" in name for name in found), found


@needs_llama
def test_an_encoder_is_compared_by_its_vectors(encoder):
    path = convert(encoder, encoder.parent / "x.gguf", "f16", progress=False)
    proof = prove_gguf(path, encoder, "f16", texts=TEXTS)
    assert not failed(proof) and any("vectors" in check.name for check in proof), "\n".join(map(str, proof))
    held = load_file(encoder / "model.safetensors")
    name = next(name for name in held if name.endswith("layer.1.attention.self.value.weight"))
    held[name] = held[name].flip(0).contiguous()
    save_file(held, encoder / "model.safetensors", metadata={"format": "pt"})
    assert any("vectors" in name for name in failed(prove_gguf(path, encoder, "f16", texts=TEXTS)))


@needs_llama
def test_a_classifier_is_compared_by_its_scores(encoder):
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(encoder, num_labels=3)
    model.classifier.weight.data.normal_()
    model.save_pretrained(encoder)
    path = convert(encoder, encoder.parent / "x.gguf", "f16", progress=False)
    proof = prove_gguf(path, encoder, "f16", texts=TEXTS)
    assert not failed(proof) and any("texts, 1 - cosine" in check.name for check in proof), "\n".join(map(str, proof))
    held = load_file(encoder / "model.safetensors")
    save_file(held | {"classifier.weight": held["classifier.weight"].flip(0).contiguous()}, encoder / "model.safetensors",
              metadata={"format": "pt"})
    found = failed(prove_gguf(path, encoder, "f16", texts=TEXTS))
    assert any("texts, 1 - cosine" in name for name in found) and not any("tokens, 1 - cosine" in name for name in found), found


def test_what_was_not_run_is_not_a_check_that_passed(decoder, monkeypatch):
    path = convert(decoder, decoder.parent / "x.gguf", "f16", progress=False)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "xllamacpp" else found(name, *rest))
    proof = prove_gguf(path, decoder, "f16")
    assert len(proof) == 5 and not any("llama.cpp" in check.name for check in proof)
    assert "pip install 'supertrainer[gguf]'" in proof.not_run[0]


def test_a_torn_file_fails_at_once(decoder):
    path = convert(decoder, decoder.parent / "x.gguf", "f16", progress=False)
    path.write_bytes(path.read_bytes()[:-4000])
    assert failed(prove_gguf(path, decoder, "f16")) == ["gguf file is whole"]


@needs_llama
def test_llama_cpp_leaves_nothing_behind(decoder):
    path = convert(decoder, decoder.parent / "x.gguf", "q8_0", progress=False)

    def open_and_close():
        with Llama(path, context=64, threads=1) as llama:
            llama.log_probabilities([1, 2, 3])
            folder = llama._folder
        assert not folder.exists()
        with pytest.raises(UserError, match="closed"):
            llama.tokenize("a")
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    first = open_and_close()
    assert open_and_close() == first and open_and_close() == first


@needs_llama
def test_a_row_is_scored_as_its_prefixes_are(decoder, seed):
    path = convert(decoder, decoder.parent / "x.gguf", "f32", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    row = torch.randint(3, len(tokenizer), (24,)).tolist()
    row[10], row[12] = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("Ā")  # an end, a zero byte
    with Llama(path, context=64, threads=1) as llama:
        wanted = [llama.log_probabilities(row[:place])[row[place]] for place in range(1, len(row))]
        assert np.abs(llama.score(row) - wanted).max() < 1e-3, seed
        answer = llama.complete([{"role": "user", "content": "hi"}], max_tokens=3)
        assert len(answer.tokens) <= 3 and not answer.ended or answer.ended
        with pytest.raises(UserError, match="<image>"):
            llama.complete("a picture", images=[b"x"])
        with pytest.raises(UserError, match="images were given"):
            llama.complete([{"role": "user", "content": "hi"}], images=[b"x"])


@needs_llama
def test_a_file_that_llama_cpp_refuses_says_why(decoder):
    path = decoder.parent / "other.gguf"
    convert(decoder, path, "f16", progress=False, metadata={"tokenizer.ggml.pre": "no-such"})
    assert "no-such" in load_failure(path)
    with pytest.raises(UserError, match="load_failure"):
        Llama(path)


def test_first_choices_count_only_where_the_model_is_sure():
    near, sure = (np.log(np.array([0.4, 0.39, 0.21])), np.log(np.array([0.9, 0.06, 0.04])))
    limit = Limit(kl=10, error=0.5, perplexity=2, cosine=1)
    other = [values[[1, 0, 2]] for values in (near, sure)]
    for reference, found, passes in ((near, other[0], True), (sure, other[1], False)):
        assert distance_checks(distance([reference], [found]), limit)[2].passed is passes


def test_limits_grow_with_fewer_bits_and_places_end_at_the_end():
    order = ["f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"]
    figures = [LIMITS[name].kl for name in order]
    assert figures == sorted(figures)
    assert places_of([0] * 40) == [10, 20, 30, 40] and places_of([0, 0]) == [1, 2]
