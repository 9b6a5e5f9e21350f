"""The tables in the chapter `supertrainer.unsloth` are true: every line is tried."""

import functools
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from supertrainer import unsloth
from supertrainer.runtime import UserError
from supertrainer.unsloth import FastLanguageModel, FastVisionModel

sys.path.insert(0, str(Path(__file__).parent))
import tiny_unsloth  # noqa: E402

CHAPTER = Path(__file__).resolve().parent.parent / "nbs" / "63_unsloth.ipynb"
# what public notebooks import, by how many (FACTS)
IMPORTED = ("FastLanguageModel FastVisionModel train_on_responses_only FastModel get_chat_template UnslothVisionDataCollator "
            "standardize_data_formats is_bf16_supported standardize_sharegpt FastSentenceTransformer is_bfloat16_supported "
            "UnslothTrainer UnslothTrainingArguments PatchDPOTrainer to_sharegpt apply_chat_template").split()
CALLED = ("get_peft_model save_pretrained_merged push_to_hub_merged save_pretrained push_to_hub generate save_pretrained_gguf "
          "push_to_hub_gguf for_inference for_training save_lora load_lora fast_generate").split()
CLASSES = ("from_pretrained", "get_peft_model", "for_inference", "for_training")


@functools.cache
def table(title):
    """The lines of one table of the chapter: each name in its first column, and its state."""
    for cell in nbformat.read(CHAPTER, as_version=4).cells:
        lines = cell.source.splitlines()
        for start, line in enumerate(lines):
            if cell.cell_type == "markdown" and line.startswith(f"| {title} |"):
                rows = [[part.strip() for part in row.split("|")[1:-1]] for row in lines[start + 2:] if row.startswith("|")]
                found = {}
                for row in rows:
                    if row[0] in ("name", "method of a model") or row[0].startswith("argument of"):
                        break
                    found |= {name.strip().strip("`"): row[1] for name in row[0].split(",")}
                return found
    raise AssertionError(f"no table {title!r}")


def lines(title):
    return sorted(table(title).items())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_unsloth.llama(tmp_path_factory.mktemp("llama"))


def test_every_name_that_notebooks_use_has_a_line():
    assert set(IMPORTED) <= set(table("name")) and "refused" not in {table("name")[name] for name in IMPORTED}
    assert set(CALLED) - {"get_peft_model"} <= set(table("method of a model"))
    assert set(unsloth.__all__) <= {*table("name"), "SFTConfig", "SFTTrainer", "TextStreamer", "TrainingArguments", "SamplingParams",
                                    "LoRARequest"}


@pytest.mark.parametrize(("name", "state"), lines("name"))
def test_names(name, state):
    if state == "refused":
        with pytest.raises(ImportError, match=name):
            getattr(unsloth, name)
        return
    if name == "FastSentenceTransformer":
        pytest.importorskip("sentence_transformers")
    assert state == "honoured" and callable(getattr(unsloth, name)) and name in dir(unsloth)


@pytest.mark.parametrize(("name", "state"), lines("method of a model"))
def test_methods(llama, in_tmp, hub, name, state):
    model, tokenizer = FastLanguageModel.from_pretrained(llama)
    model = FastLanguageModel.get_peft_model(model, r=2)
    if state == "refused":
        with pytest.raises(UserError, match=f"model.{name} is not here yet"):
            getattr(model, name)("me/model", tokenizer)
    elif name == "push_to_hub":
        seen = []
        type(model).push_to_hub, before = (lambda self, repo, **options: seen.append((repo, options))), type(model).push_to_hub
        try:
            model.push_to_hub("me/model")
            model.push_to_hub("me/model", private=False)
        finally:
            type(model).push_to_hub = before
        assert seen == [("me/model", {"private": True}), ("me/model", {"private": False})]
    else:
        model.save_lora("lora")
        ids = torch.tensor([tokenizer("Be brief.")["input_ids"]])
        calls = {"generate": lambda: model.generate(ids, max_new_tokens=1), "for_inference": model.for_inference,
                 "for_training": model.for_training, "load_lora": lambda: model.load_lora("lora"),
                 "fast_generate": lambda: model.fast_generate("Be brief."), "save_lora": lambda: model.save_lora("other"),
                 "save_pretrained": lambda: model.save_pretrained("saved"),
                 "save_pretrained_merged": lambda: model.save_pretrained_merged("merged", tokenizer),
                 "save_pretrained_gguf": lambda: model.save_pretrained_gguf("gguf", tokenizer, quantization_method="q8_0"),
                 "push_to_hub_merged": lambda: model.push_to_hub_merged("me/model", tokenizer, license="mit"),
                 "push_to_hub_gguf": lambda: model.push_to_hub_gguf("me/files", tokenizer, license="mit")}
        assert state == "honoured"
        calls[name]()
        assert {"save_lora": "other", "save_pretrained": "saved", "save_pretrained_merged": "merged",
                "save_pretrained_gguf": "gguf"}.get(name, "lora") in {path.name for path in in_tmp.iterdir()}
        assert {"push_to_hub_merged": ["me/model"], "push_to_hub_gguf": ["me/files"]}.get(name, []) == list(hub.repos)


def decided(name, value):
    from supertrainer.models.info import info

    return lambda model: info(model).decision(name).value == value


# a value that says something, and what shows that it was heeded
LOADING = {
    "model_name": (None, lambda m: True), "max_seq_length": (77, lambda m: m.max_seq_length == 77),
    "dtype": (torch.bfloat16, lambda m: m.dtype == torch.bfloat16), "torch_dtype": ("bfloat16", lambda m: m.dtype == torch.bfloat16),
    "load_in_4bit": (True, lambda m: m.is_loaded_in_4bit), "load_in_16bit": (True, lambda m: not getattr(m, "is_quantized", False)),
    "full_finetuning": (True, lambda m: m.dtype == torch.float32),
    "attn_implementation": ("eager", lambda m: m.config._attn_implementation == "eager"),
    "use_gradient_checkpointing": ("unsloth", lambda m: decided("gradient checkpointing", "on")(FastLanguageModel.get_peft_model(m))),
    "random_state": (7, lambda m: __import__("supertrainer.models.info").models.info.info(m).reload["request"].seed == 7),
    "auto_model": (AutoModelForSequenceClassification, lambda m: hasattr(m, "score")), "num_labels": (5, lambda m: m.config.num_labels == 5),
    "id2label": ({0: "a", 1: "b", 2: "c"}, lambda m: m.config.id2label[2] == "c"),
    "label2id": ({"a": 0, "b": 1, "c": 2}, lambda m: m.config.id2label[2] == "c"),
    "problem_type": ("multi_label_classification", lambda m: m.config.problem_type == "multi_label_classification"),
    "fast_inference": (True, decided("fast_inference", "transformers")),
    "max_lora_rank": (4, lambda m: "max_lora_rank=4" in error(lambda: FastLanguageModel.get_peft_model(m, r=8))),
    "rope_scaling": ({"rope_type": "linear", "factor": 2.0}, lambda m: "linear" in str(m.config.to_dict())),
    "resize_model_vocab": (400, lambda m: len(m.get_input_embeddings().weight) >= 400),
    "gpu_memory_utilization": (0.6, None), "disable_log_stats": (False, None), "use_exact_model_name": (True, None),
    "return_logits": (True, None), "fullgraph": (True, None), "fix_tokenizer": (True, None), "device_map": ("auto", None),
    "token": ("hf_x", None), "revision": ("main", None),
    "trust_remote_code": (True, None), "float8_kv_cache": (True, None), "load_in_fp8": (True, None), "qat_scheme": ("int4", None),
    "offload_embedding": (True, None), "unsloth_tiled_mlp": (True, None), "unsloth_force_compile": (True, None),
    "whisper_language": ("English", None), "whisper_task": ("transcribe", None),
}


def error(call):
    try:
        call()
    except UserError as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize(("name", "state"), lines("argument of `from_pretrained`"))
def test_arguments_of_loading(llama, name, state):
    value, heeded = LOADING[name]
    options = {} if name == "model_name" else {name: value}
    if name in ("token", "revision"):  # a folder has neither, and says so; the Hub gets them
        with pytest.raises(UserError, match=f"{name} belong to a Hub model"):
            FastLanguageModel.from_pretrained(llama, **options)
        return
    if state == "refused":
        with pytest.raises(UserError, match=name):
            FastLanguageModel.from_pretrained(llama, **options)
        return
    model, _ = FastLanguageModel.from_pretrained(llama, **options)
    assert state == ("honoured" if heeded else "accepted") and (heeded is None or heeded(model))


def layers(model):
    return {name.split(".layers.")[1].split(".")[0] for name, value in model.named_parameters() if value.requires_grad}


def parts(model):
    return {part for name, value in model.named_parameters() if value.requires_grad
            for part in ("self_attn", "mlp", "vision_model", "text_model") if f".{part}." in name}


def config(model):
    return model.peft_config["default"]


ADAPTING = {
    "r": (3, lambda m: config(m).r == 3), "target_modules": (["q_proj"], lambda m: parts(m) == {"self_attn"}),
    "lora_alpha": (7, lambda m: config(m).lora_alpha == 7), "lora_dropout": (0.1, lambda m: config(m).lora_dropout == 0.1),
    "bias": ("lora_only", lambda m: config(m).bias == "lora_only"),
    "use_gradient_checkpointing": (True, lambda m: decided("gradient checkpointing", "on")(m)),
    "random_state": (1, lambda m: True), "use_rslora": (True, lambda m: config(m).use_rslora), "use_dora": (True, lambda m: config(m).use_dora),
    "modules_to_save": (["lm_head"], lambda m: any("modules_to_save" in name for name, _ in m.named_parameters())),
    "init_lora_weights": ("gaussian", lambda m: config(m).init_lora_weights == "gaussian"),
    "task_type": ("CAUSAL_LM", lambda m: config(m).task_type == "CAUSAL_LM"),
    "ensure_weight_tying": (True, lambda m: config(m).ensure_weight_tying),
    "layers_to_transform": ([1], lambda m: layers(m) == {"1"}), "layers_pattern": ("layers", lambda m: layers(m) == {"0", "1"}),
    "finetune_attention_modules": (False, lambda m: parts(m) == {"mlp"}), "finetune_mlp_modules": (False, lambda m: parts(m) == {"self_attn"}),
    "max_seq_length": (64, None), "temporary_location": ("_unsloth_temporary_saved_buffers", None),
    "loftq_config": ({"loftq_bits": 4}, None), "qat_scheme": ("int4", None),
}


@pytest.mark.parametrize(("name", "state"), lines("argument of `get_peft_model`"))
def test_arguments_of_adapting(llama, name, state):
    if name in ("finetune_vision_layers", "finetune_language_layers"):
        model, _ = FastVisionModel.from_pretrained("tiny_idefics3", texts=tiny_unsloth.WORDS)
        left = "text_model" if "vision" in name else "vision_model"
        assert state == "honoured" and left in parts(model := FastVisionModel.get_peft_model(model, r=2, **{name: False}))
        assert not parts(model) & ({"text_model", "vision_model"} - {left})
        return
    model, _ = FastLanguageModel.from_pretrained(llama, max_seq_length=64)
    value, heeded = ADAPTING[name]
    if state == "refused":
        with pytest.raises(UserError, match=name):
            FastLanguageModel.get_peft_model(model, **{name: value})
        return
    model = FastLanguageModel.get_peft_model(model, **{name: value})
    assert state == ("honoured" if heeded else "accepted") and (heeded is None or heeded(model))


def test_layers_hold_with_and_without_names(llama):
    for options in ({}, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"}):
        model, _ = FastLanguageModel.from_pretrained(llama)
        assert layers(FastLanguageModel.get_peft_model(model, r=2, layers_to_transform=1, **options)) == {"1"}
    model, _ = FastLanguageModel.from_pretrained(llama)
    with pytest.raises(UserError, match="layers_to_transform asks for"):
        FastLanguageModel.get_peft_model(model, r=2, layers_to_transform=[9])


def test_the_seed_of_an_adapter(llama):
    def first(seed):
        model, _ = FastLanguageModel.from_pretrained(llama)
        model = FastLanguageModel.get_peft_model(model, r=2, random_state=seed)
        return next(value for name, value in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("sentence_transformers") or name == "supertrainer.unsloth.embeddings"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install \"supertrainer\[embeddings\]\""):
        _ = unsloth.FastSentenceTransformer
