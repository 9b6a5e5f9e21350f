"""Loaders: longer rows, new tokens, heads of encoders, parts and frozen layers, attention, kernels, another engine."""

import copy
import sys
import types

import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from supertrainer import runtime
from supertrainer.models.base import FastModel, fresh_base, info
from supertrainer.models.bert import FastBERT
from supertrainer.models.info import task_of
from supertrainer.models.lengths import position_limit, stretch
from supertrainer.models.llm import FastLLM
from supertrainer.models.mllm import FastMLLM
from supertrainer.models.parts import linear_parts
from supertrainer.models.processor import load_processor, model_facts
from supertrainer.models.vocabulary import is_tied, vocabulary_tensors
from supertrainer.runtime import UserError

TEXTS = ["What does `textwrap.dedent` do?", "Remove any common leading whitespace from every line in text.",
         "Which digit is this?", "0 1 2 3 4 5 6 7 8 9"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BUILT_INS = {"bert": ("tiny_bert", FastBERT), "llm": ("tiny_llama", FastLLM), "mllm": ("tiny_idefics3", FastMLLM)}


def make(family, **options):
    name, loader = BUILT_INS[family]
    return loader.from_pretrained(name, texts=TEXTS, config=options.pop("config", {} if family == "mllm" else SMALL), **options)


def logits_of(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits.float()


def save(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def shaken(adapted):
    """Change everything that is trained, as training would."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return adapted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of 64 positions in a folder."""
    model, tokenizer = make("llm", config={**SMALL, "max_position_embeddings": 64})
    return save(tmp_path_factory.mktemp("llama") / "base", model, tokenizer)


def long_ids(length, seed=0):
    return torch.randint(5, 200, (1, length), generator=torch.Generator().manual_seed(seed))


# Lengths


@pytest.mark.parametrize("rule", [None, {"rope_type": "dynamic"}, {"rope_type": "linear", "factor": 4.0}, {"type": "yarn"}], ids=str)
def test_a_longer_row_is_served_said_saved_and_merged(folder, rule, tmp_path):
    plain, tokenizer = FastLLM.from_pretrained(folder, dtype="float32")
    model, longer = FastLLM.from_pretrained(folder, dtype="float32", max_seq_length=256, rope_scaling=rule)
    kind = (rule or {}).get("rope_type", "yarn")
    assert kind in info(model).decision("positions").value and info(model).decision("positions").reason
    assert longer.model_max_length == 256 == info(model).max_seq_length
    with torch.no_grad():
        assert model(long_ids(256)).logits.isfinite().all()
        short = (model(long_ids(40)).logits - plain(long_ids(40)).logits).abs().max()
        wanted = model(long_ids(200)).logits
    assert (short == 0) == (kind == "dynamic")
    again, _ = FastLLM.from_pretrained(save(tmp_path / "again", model, longer), dtype="float32")
    assert info(again).max_seq_length == 256 and position_limit(again.config) == 256
    with torch.no_grad():
        assert torch.equal(again(long_ids(200)).logits, wanted)
        assert torch.equal(fresh_base(FastLLM.get_peft_model(model, r=2))(long_ids(200)).logits, wanted)


def test_what_cannot_be_longer_says_its_limit(folder, tmp_path):
    model, tokenizer = make("bert", config={**SMALL, "max_position_embeddings": 64})
    learnt = save(tmp_path / "bert", model, tokenizer)
    with pytest.raises(UserError, match="64 tokens.*not rotary"):
        FastBERT.from_pretrained(learnt, max_seq_length=128)
    with pytest.raises(UserError, match="needs rotary positions"):
        FastBERT.from_pretrained(learnt, rope_scaling={"rope_type": "yarn", "factor": 2})
    for wrong, message in (({"rope_type": "yarm"}, "'yarn'"), ({"rope_type": "linear", "faktor": 2}, "'factor'"),
                           ({"rope_type": "linear", "factor": 0.5}, "at least 1"), ({"rope_type": "llama3"}, "not complete")):
        with pytest.raises(UserError, match=message):
            FastLLM.from_pretrained(folder, max_seq_length=128, rope_scaling=wrong)


def test_windows_are_left_alone_and_trained_rules_are_not_replaced():
    gemma = AutoConfig.for_model("gemma3_text", max_position_embeddings=128)
    stretch(gemma, 512)
    assert gemma.rope_parameters["full_attention"]["factor"] == 4.0
    assert gemma.rope_parameters["sliding_attention"]["rope_type"] == "default"
    llama = AutoConfig.for_model("llama", max_position_embeddings=128, rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0})
    with pytest.raises(UserError, match="llama3"):
        stretch(llama, 256)
    stretch(llama, 256, {"rope_type": "yarn"})
    assert llama.rope_parameters["factor"] == 4.0 and position_limit(llama) == 256
    assert stretch(BertConfig(), 10_000) is None


# Vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_near_their_meaning_and_learn_under_an_adapter(tied, tmp_path):
    made, tokenizer = make("llm", config={**SMALL, "tie_word_embeddings": tied})
    base = save(tmp_path / "base", made, tokenizer)
    model, longer = FastLLM.from_pretrained(base, dtype="float32", new_tokens=["textwrapper", "<|tool|>"], pad_vocab_to_multiple_of=8)
    ids = longer.convert_tokens_to_ids(["textwrapper", "<|tool|>"])
    assert model.config.vocab_size % 8 == 0 and is_tied(model) == tied and info(model).decision("new tokens").value == "2"
    pieces = tokenizer("textwrapper", add_special_tokens=False).input_ids
    for before, after in zip(vocabulary_tensors(made), vocabulary_tensors(model), strict=True):
        assert torch.equal(before, after[: len(before)])
        assert (after[ids[0]] - before[pieces].mean(dim=0)).abs().max() < 0.02 * before.std()
    adapted = FastLLM.get_peft_model(model, r=2)
    assert "2 rows of new tokens" in info(adapted).decision("adapter").reason
    row = torch.tensor([[*ids, 7]])
    adapted(input_ids=row, labels=row).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in adapted.named_parameters() if "trainable_tokens" in name)
    shaken(adapted)
    wanted = logits_of(adapted, {"input_ids": row})
    again, again_tokenizer = FastModel.from_pretrained(save(tmp_path / "adapter", adapted, longer), dtype="float32")
    assert again_tokenizer.convert_tokens_to_ids("textwrapper") == ids[0]
    width = len(longer)
    assert torch.allclose(logits_of(again, {"input_ids": row})[..., :width], wanted[..., :width], atol=1e-5)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert torch.allclose(logits_of(merged, {"input_ids": row}), wanted, atol=1e-4, rtol=1e-4)


def test_the_fresh_base_has_the_rows_of_new_tokens(folder):
    model, tokenizer = FastLLM.from_pretrained(folder, dtype="float32")
    FastLLM.add_new_tokens(model, tokenizer, {"<tool>": "Remove whitespace"}, special=True, seed=3)
    row = {"input_ids": tokenizer("<tool> text", return_tensors="pt").input_ids}
    assert tokenizer.convert_tokens_to_ids("<tool>") in row["input_ids"]
    wanted = logits_of(model, row)
    assert torch.equal(logits_of(fresh_base(FastLLM.get_peft_model(model, r=2)), row), wanted)


def test_a_vocabulary_that_cannot_be_changed_is_named(folder):
    model, tokenizer = FastLLM.from_pretrained(folder)
    rows = model.get_input_embeddings().weight.shape[0]
    assert FastLLM.from_pretrained(folder, resize_model_vocab=rows + 9)[0].config.vocab_size == rows + 9
    with pytest.raises(UserError, match="resize_model_vocab=10"):
        FastLLM.from_pretrained(folder, resize_model_vocab=10)
    adapted = FastLLM.get_peft_model(model, r=2)
    with pytest.raises(UserError, match="before get_peft_model"):
        FastLLM.add_new_tokens(adapted, tokenizer, ["new"])
    known = next(iter(tokenizer.get_vocab()))
    assert "1 were known" in FastLLM.add_new_tokens(FastLLM.from_pretrained(folder)[0], tokenizer, [known]).reason


# Heads of encoders


@pytest.mark.parametrize(("task", "options", "width"), [("regression", {}, 1), ("regression", {"num_labels": 3}, 3),
                                                        ("masked_lm", {}, None), ("embeddings", {}, None)])
def test_an_encoder_gets_the_head_of_its_task_and_keeps_it(task, options, width, tmp_path):
    made, tokenizer = make("bert", labels=["a", "b"])
    base = save(tmp_path / "base", made, tokenizer)
    model, _ = FastBERT.from_pretrained(base, task=task, **options)
    batch = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    out = model(**batch)
    assert task_of(model) == info(model).task == task
    if task == "regression":
        assert out.logits.shape == (2, width) and model.config.problem_type == "regression"
        assert model(**batch, labels=torch.zeros(2, width).squeeze(1)).loss.dim() == 0
        again, _ = FastBERT.from_pretrained(save(tmp_path / "again", model, tokenizer))
        assert info(again).task == "regression" and again.config.num_labels == width
    elif task == "masked_lm":
        assert out.logits.shape[-1] == model.config.vocab_size and "labels" not in info(model).head
    else:
        assert out.last_hidden_state.shape[-1] == model.config.hidden_size
    adapted = FastBERT.get_peft_model(model, r=2)
    assert any("modules_to_save" in name for name, _ in adapted.named_parameters()) == (task == "regression")
    if task != "regression":
        with pytest.raises(UserError, match=f"task={task} has none"):
            FastBERT.from_pretrained(base, task=task, num_labels=2)


def test_a_published_encoder_is_still_classified_by_default(tmp_path):
    made, tokenizer = make("bert", task="masked_lm")
    model, _ = FastBERT.from_pretrained(save(tmp_path / "mlm", made, tokenizer), labels=["a", "b"])
    assert info(model).task == "classification" and "new" in info(model).head


# Parts


def test_parts_and_layers_are_chosen_by_structure():
    vision, _ = make("mllm")
    parts = set(linear_parts(vision).values())
    assert {("vision", "mlp"), ("language", "attention")} <= parts
    adapted = FastMLLM.get_peft_model(vision, r=2, finetune_vision_layers=False, finetune_mlp_modules=False)
    names = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert names and all("vision" not in name and "attn" in name for name in names)
    upper = FastLLM.get_peft_model(make("llm")[0], r=2, freeze_layers=1)
    assert {name.split(".layers.")[1][0] for name, weight in upper.named_parameters() if weight.requires_grad} == {"1"}
    only = FastLLM.get_peft_model(make("llm")[0], r=2, layers_to_transform=[0], target_modules=["q_proj"])
    assert sum("lora_A" in name for name, _ in only.named_parameters()) == 1


def test_lower_layers_stay_frozen_in_full_training(folder):
    model, _ = FastLLM.from_pretrained(folder, full_finetuning=True, freeze_layers=1)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and not any("layers.0." in name or "embed" in name for name in trained)
    assert info(model).decision("frozen").value == "1 of 2 layers"
    for wrong in ({"freeze_layers": 2}, {"freeze_layers": -1}, {"freeze_layers": 1, "load_in_4bit": True}):
        with pytest.raises(UserError, match="freeze_layers"):
            FastLLM.from_pretrained(folder, **wrong)


@pytest.mark.parametrize(("arguments", "expected"), [
    ({"loftq_config": {"loftq_bits": 4}}, "LoftQ changes"), ({"init_lora_weights": "pissa"}, "pissa"),
    ({"kernels": "lieger"}, "'liger'"), ({"freeze_layers": 1, "layers_to_transform": [1]}, "pass one"),
    ({"finetune_mlp_modules": False, "target_modules": ".*q_proj"}, "regular expression"),
    ({"finetune_mlp_modules": False, "finetune_attention_modules": False}, "is left"),
    ({"use_gradient_checkpointing": "ofload"}, "'offload'"), ({"freeze_layers": 9}, "has 2 layers")], ids=str)
def test_what_an_adapter_cannot_honour_is_named(arguments, expected):
    with pytest.raises(UserError, match=expected):
        FastLLM.get_peft_model(make("llm")[0], **arguments)


def test_the_choice_of_kernels_is_kept(folder):
    model, _ = FastLLM.from_pretrained(folder, kernels="off")
    assert info(FastLLM.get_peft_model(model, r=2)).reload["kernels"] == "off"
    with pytest.raises(UserError, match="kernels='of'"):
        FastLLM.from_pretrained(folder, kernels="of")


# Attention and number type


def test_an_architecture_without_sdpa_loads_with_what_it_has(tmp_path):
    config = DebertaV2Config(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    _, tokenizer = make("bert")
    place = save(tmp_path / "deberta", DebertaV2ForSequenceClassification(config), tokenizer)
    model, _ = FastBERT.from_pretrained(place)
    assert info(model).decision("attention").value == "eager" == model.config._attn_implementation
    with pytest.raises(UserError):  # what was asked for is not replaced
        FastBERT.from_pretrained(place, attn_implementation="sdpa")


def test_a_mixture_of_experts_is_one_grouped_matmul_and_says_so(folder, tmp_path):
    torch.manual_seed(0)
    _, tokenizer = FastLLM.from_pretrained(folder)
    config = Qwen3MoeConfig(**SMALL, vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, moe_intermediate_size=16,
                            num_experts=4, num_experts_per_tok=2)
    place, ids = save(tmp_path / "moe", Qwen3MoeForCausalLM(config), tokenizer), long_ids(12)
    grouped, _ = FastLLM.from_pretrained(place, dtype="float32")
    assert "experts" in grouped.report(show=False) and "grouped_mm" in grouped.report(show=False)
    eager = Qwen3MoeForCausalLM.from_pretrained(place, experts_implementation="eager", dtype=torch.float32)
    assert (logits_of(grouped, {"input_ids": ids}) - logits_of(eager, {"input_ids": ids})).abs().max() < 1e-5
    assert "experts" not in FastLLM.from_pretrained(folder)[0].report(show=False)


def test_flash_attention_is_chosen_where_it_can_run(monkeypatch):
    there = {"flash_attn"}
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: object() if name in there else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert runtime.choose_attention(None, "cuda", "bfloat16").value == "flash_attention_2"
    assert "16 bit only" in runtime.choose_attention(None, "cuda", "float32").reason
    assert runtime.choose_attention(None, "cpu", "bfloat16").value == "sdpa"
    there.add("xformers")
    assert "xformers" in runtime.choose_attention(None, "cuda", "float32").reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert runtime.choose_attention(None, "cuda", "float16").value == "sdpa"
    for wrong, message in (("flash_attention_3", "not installed"), ("flash_attention_2", "8.0")):
        with pytest.raises(UserError, match=message):
            runtime.choose_attention(wrong, "cuda", "float16")
    assert runtime.choose_attention("flex_attention", "cpu").value == "flex_attention"


@pytest.mark.parametrize(("rate", "expected"), [(130.0, "bfloat16"), (129.0, "float32"), (40.0, "float32")])
def test_the_type_on_a_cpu_follows_the_measurement(monkeypatch, rate, expected):
    monkeypatch.setattr(runtime, "_cpu_rates", {})
    calls = []
    monkeypatch.setattr(runtime, "matmul_rate", lambda dtype, **_: calls.append(dtype) or {"float32": 100.0, "bfloat16": rate}[dtype])
    chosen = runtime.choose_dtype("auto", "cpu")
    assert chosen.value == expected and f"{rate:.0f} GFLOP/s" in chosen.reason
    count = len(calls)
    assert runtime.choose_dtype("auto", "cpu") == chosen and len(calls) == count  # once for a process
    assert calls[:4] == ["float32", "bfloat16"] * 2  # in turns


def test_facts_without_weights_know_a_stretched_model(folder, tmp_path):
    model, tokenizer = FastLLM.from_pretrained(folder, max_seq_length=256, rope_scaling={"rope_type": "dynamic"})
    place = save(tmp_path / "long", model, tokenizer)
    assert model_facts(place, load_processor(place)).positions == 256


# Another engine


@pytest.fixture
def fake_unsloth(monkeypatch, folder):
    """A module that loads as Unsloth does, and what it was asked for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = {}

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(model_name, **kwargs):
            asked.update(kwargs, model_name=model_name)
            if kwargs.get("load_in_4bit"):
                raise RuntimeError("no GPU\nat all")
            model = AutoModelForCausalLM.from_pretrained(model_name, dtype=kwargs["dtype"] or torch.float32)
            model.max_seq_length = kwargs.get("max_seq_length") or 64
            return model, AutoTokenizer.from_pretrained(model_name)

    module = types.ModuleType("unsloth")
    module.FastLanguageModel, module.__version__ = FastLanguageModel, "2026.10.9"
    module.__spec__ = types.SimpleNamespace(name="unsloth")
    monkeypatch.setitem(sys.modules, "unsloth", module)
    return asked


def test_unsloth_loads_and_the_rest_of_the_path_works(fake_unsloth, folder, tmp_path):
    model, tokenizer = FastLLM.from_pretrained(folder, engine="unsloth", max_seq_length=32, dtype="float32")
    assert fake_unsloth["max_seq_length"] == 32 and fake_unsloth["dtype"] is torch.float32
    assert "2026.10.9" in info(model).decision("engine").value and "whole process" in info(model).decision("engine").reason
    assert info(model).max_seq_length == 32 and tokenizer.padding_side == "right" and tokenizer.pad_token != tokenizer.eos_token
    assert "engine" in model.report(show=False)
    adapted = shaken(FastLLM.get_peft_model(model, r=2))
    batch = tokenizer(TEXTS[:1], return_tensors="pt")
    assert torch.equal(logits_of(fresh_base(adapted), batch), logits_of(FastLLM.from_pretrained(folder, dtype="float32")[0], batch))
    with pytest.raises(UserError, match="Unsloth could not load .*no GPU at all"):
        FastLLM.from_pretrained(folder, engine="unsloth", load_in_4bit=True)
    with pytest.raises(UserError, match="freeze_layers= cannot be honoured"):
        FastLLM.from_pretrained(folder, engine="unsloth", freeze_layers=1)
    with pytest.raises(UserError, match="built-in source"):
        FastLLM.from_pretrained("tiny_llama", engine="unsloth")


def test_without_unsloth_the_line_that_installs_it_is_said(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    with pytest.raises(UserError, match="pip install unsloth"):
        FastLLM.from_pretrained(folder, engine="unsloth")
    with pytest.raises(UserError, match="engine='onsloth'"):
        FastLLM.from_pretrained(folder, engine="onsloth")
