"""Merging, family by family and kind by kind: the files hold what PEFT's own merge of a fresh float32 base gives."""

import copy
import os
import signal
import subprocess
import sys
import weakref

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from supertrainer.check import CheckFailed
from supertrainer.export import merge, verify
from supertrainer.export.bases import FolderBase, make_shell, open_base
from supertrainer.export.deltas import Merged, layer_checks, mixed
from supertrainer.export.reload import logits_of
from supertrainer.export.rounding import Compared, RoundedBase
from supertrainer.export.trained import no_repacking
from supertrainer.export.weights import ModelWeights
from supertrainer.export.writing import write_weights
from supertrainer.runtime import UserError

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
             max_position_embeddings=64, initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2, num_key_value_heads=2)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
              projection_dim=32)  # fmt: skip


def llava_config():
    return LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**SMALL), image_token_id=63,
                       vision_feature_layer=-1)  # fmt: skip


FAMILIES = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**SMALL, head_dim=8, num_key_value_heads=2, tie_word_embeddings=False)),
    "gemma2": (Gemma2ForCausalLM, lambda: Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2)),
    "gemma3": (Gemma3ForCausalLM, lambda: Gemma3TextConfig(**SMALL, head_dim=8, num_key_value_heads=2)),
    "gpt2": (GPT2LMHeadModel, lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64,
                                                 initializer_range=0.1, bos_token_id=1, eos_token_id=2)),
    "bert": (BertForSequenceClassification, lambda: BertConfig(**SMALL, num_labels=3)),
    "modernbert": (ModernBertForSequenceClassification, lambda: ModernBertConfig(
        **SMALL, num_labels=3, cls_token_id=1, sep_token_id=2, attn_implementation="eager")),
    "llava": (LlavaForConditionalGeneration, llava_config),
    "mixtral": (MixtralForCausalLM, lambda: MixtralConfig(**SMALL, **EXPERTS, num_local_experts=4)),
    "qwen3_moe": (Qwen3MoeForCausalLM, lambda: Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16)),
}  # fmt: skip
ENCODERS = ("bert", "modernbert")
ATTENTION = {"gpt2": ["c_attn", "c_proj"], "bert": ["query", "value", "dense"], "modernbert": ["Wqkv", "Wo"]}
EMBEDDING = {"gpt2": "wte", "bert": "word_embeddings", "modernbert": "tok_embeddings"}
EXPERT_BLOCKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def build(family, seed=0, **config):
    torch.manual_seed(seed)
    kind, make = FAMILIES[family]
    values = make()
    for name, value in config.items():
        setattr(values, name, value)
    model = kind(values).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms that do something
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def targets(family):
    return ATTENTION.get(family, "all-linear")


KINDS = {
    "lora": lambda f: {}, "rslora": lambda f: {"use_rslora": True}, 
    "dora": lambda f: {"use_dora": True, "target_modules": targets(f) if "mixtral" not in f and "moe" not in f else lists(f)},
    "biases": lambda f: {"bias": "lora_only"},
    "embedding in full": lambda f: {"modules_to_save": [EMBEDDING.get(f, "embed_tokens")]},
    "embedding lora": lambda f: {"target_modules": [*lists(f), EMBEDDING.get(f, "embed_tokens")]},
    "embedding dora": lambda f: {"target_modules": [*lists(f), EMBEDDING.get(f, "embed_tokens")], "use_dora": True},
    "token rows": lambda f: {"trainable_token_indices": {EMBEDDING.get(f, "embed_tokens"): [3, 9]}},
    "head lora": lambda f: {"target_modules": [*lists(f), "lm_head"]},
    "head in full": lambda f: {"modules_to_save": ["lm_head"]},
    "lora bias": lambda f: {"lora_bias": True, "target_modules": ["c_attn"] if f == "gpt2" else ["query"]},
    "experts": lambda f: {"target_modules": ["q_proj"], "target_parameters": EXPERT_BLOCKS},
}  # fmt: skip


def lists(family):
    return targets(family) if isinstance(targets(family), list) else ["q_proj", "v_proj"]


CELLS = [(family, kind) for family in FAMILIES for kind in ("lora", "rslora", "dora")]
CELLS += [(family, kind) for family in ("llama", "qwen3", "gemma3", "gpt2", "llava") for kind in
          ("embedding in full", "embedding lora", "head lora", "head in full")]  # fmt: skip
CELLS += [("bert", kind) for kind in ("biases", "embedding in full", "embedding lora", "lora bias", "token rows")]
CELLS += [("llama", "embedding dora"), ("llama", "token rows"), ("qwen3", "token rows"), ("gemma2", "token rows"),
          ("gpt2", "biases"), ("gpt2", "lora bias"), ("mixtral", "experts"), ("qwen3_moe", "experts")]  # fmt: skip


def adapted(base, family, seed, **options):
    task = "SEQ_CLS" if family in ENCODERS else "CAUSAL_LM"
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets(family), "task_type": task, **options}
    torch.manual_seed(seed)
    return shake(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)))


def shake(model, std=0.2):
    """As after training: whatever is trained has moved, and no weight by the same amount."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape).to(weight) * std)
    return model.eval()


def rows_for(family):
    generator = torch.Generator().manual_seed(7)
    rows = [{"input_ids": torch.randint(3, 63, (2, 12), generator=generator)} for _ in range(2)]
    if family == "llava":
        for row in rows:
            row["input_ids"][:, 1:5] = 63  # four patches
            row["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    for row in rows:
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    return rows


def answers(model, family):
    with torch.no_grad():
        return logits_of(model, rows_for(family))


def gap(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def largest(a):
    return max(x.abs().max().item() for x in a)


def write(model, base_folder, target, adapters=None, quantised=False):
    """The merged weights as a save writes them, without the fresh process; and the checks made while merging."""
    shell = make_shell(model)
    source = FolderBase(base_folder, shell)
    compared = Compared(RoundedBase(source, model) if quantised else source, model)
    merged = Merged(model, compared, adapters or {model.active_adapters[0]: 1.0}, shell)
    target.mkdir(exist_ok=True)
    write_weights(merged, target, torch.float32)
    shell.config.save_pretrained(target)
    return merged, layer_checks(merged.layers) + compared.checks()


def cut_ties(model):
    """Give every place its own weight: PEFT merges what is tied twice into one, so its answer on tied weights is wrong."""
    seen = set()
    for module in model.modules():
        for leaf, weight in module._parameters.items():
            if weight is not None and id(weight) in seen:
                module._parameters[leaf] = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            seen.add(id(weight))
    return model


@pytest.mark.parametrize("family, kind", CELLS, ids=lambda value: value.replace(" ", "-"))
def test_merged_is_base_and_adapter(tmp_path, family, kind, seed):
    base = build(family, seed)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, family, seed, **KINDS[kind](family))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = answers(model, family)
    merged, checks = write(model, tmp_path / "base", tmp_path / "merged")
    assert checks and all(check.passed for check in checks), (seed, checks)
    loaded, report = type(base).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    peft_own = cut_ties(copy.deepcopy(model).float()).merge_and_unload()
    reached, limit = gap(answers(loaded, family), trained), 1e-4 * max(1.0, largest(trained))  # float32 rounds in proportion
    assert reached <= limit, (seed, reached, limit)
    assert gap(answers(loaded, family), answers(peft_own, family)) <= limit, seed
    assert gap(answers(base, family), trained) > 0.01, f"seed {seed}: the adapter does nothing, so this shows nothing"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "the trained model is untouched"
    if kind in ("lora", "rslora", "dora", "experts"):
        assert set(ModelWeights(tmp_path / "merged").names()) == set(ModelWeights(tmp_path / "base").names())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "modernbert"])
def test_trained_in_full(tmp_path, family, seed):
    model = shake(build(family, seed), std=0.05)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write_weights(Merged(model), tmp_path / "ours", torch.float32, max_shard_size="20KB")
    ours, theirs = ModelWeights(tmp_path / "ours"), ModelWeights(tmp_path / "theirs")
    assert len(os.listdir(tmp_path / "ours")) > 3, "several files and an index"
    assert ours.names() == theirs.names() and all(torch.equal(ours.load(n), theirs.load(n)) for n in ours.names()), seed


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert"])
def test_base_in_four_bits(tmp_path, family, seed):
    """Merged into what 4 bits left, the answers are the trained ones; merged into the original, near them."""
    wide = dict(n_embd=64) if family == "gpt2" else dict(hidden_size=64, intermediate_size=128)
    torch.manual_seed(seed)
    kind, make = FAMILIES[family]
    base = kind(type(make())(**{**make().to_dict(), **wide})).eval()
    base.save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["classifier", "lm_head"])  # fmt: skip
    quantised = kind.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    model = shake(peft.get_peft_model(quantised, peft.LoraConfig(r=4, target_modules=targets(family), task_type=task)), 0.1)
    with torch.no_grad(), no_repacking(model):
        trained = answers(model, family)
    for rounded in (True, False):
        _, checks = write(model, tmp_path / "base", tmp_path / "merged", quantised=rounded)
        assert all(check.passed for check in checks), (seed, checks)
        found = verify.compare_logits(trained, answers(kind.from_pretrained(tmp_path / "merged"), family))
        assert found.max_abs <= 1e-3 if rounded else 1e-3 < found.max_abs and found.kl < 0.5, (seed, rounded, found)


def test_several_adapters_add_up(tmp_path, seed):
    base = build("llama", seed)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, "llama", seed)
    model.add_adapter("other", peft.LoraConfig(r=2, use_rslora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    weights = {"default": 0.7, "other": -0.3}
    single = answers(model, "llama")
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    with mixed(model, weights):
        wanted = answers(model, "llama")
    _, checks = write(model, tmp_path / "base", tmp_path / "merged", weights)
    assert all(check.passed for check in checks), (seed, checks)
    assert gap(answers(LlamaForCausalLM.from_pretrained(tmp_path / "merged"), "llama"), wanted) <= 1e-4 < 0.01 < gap(single, wanted)
    assert gap(answers(model, "llama"), single) == 0 and model.active_adapters == ["default"]
    assert all(before[name][0] == p.requires_grad and torch.equal(before[name][1], p) for name, p in model.named_parameters())
    for bad, words in (({"nobody": 1.0}, "nobody"), ({}, "none"), ({"default": float("nan")}, "no number")):
        with pytest.raises(UserError, match=words):
            merge.save_model(model, None, tmp_path / "x", family="llm", base=tmp_path / "base", adapters=bad)
    # PEFT's own name for a mixture: one new adapter, which is then merged like any
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    write(model, tmp_path / "base", tmp_path / "both")
    assert gap(answers(LlamaForCausalLM.from_pretrained(tmp_path / "both"), "llama"), answers(model, "llama")) <= 1e-4, seed


def test_tied_embeddings_set_apart_are_two_weights(tmp_path, seed):
    base = build("llama", seed)
    base.save_pretrained(tmp_path / "base")
    for kind, tied in (("lora", True), ("head in full", False), ("embedding in full", False), ("token rows", True)):
        model = adapted(base, "llama", seed, **KINDS[kind]("llama"))
        target = tmp_path / kind
        merged, _ = write(model, tmp_path / "base", target)
        assert ("lm_head.weight" not in load_file(target / "model.safetensors")) is tied, kind
        assert LlamaConfig.from_pretrained(target).tie_word_embeddings is tied, kind


def test_a_wrong_layer_is_caught(tmp_path, monkeypatch, seed):
    """If PEFT's merge were wrong (here: twice the delta), the proof of the layer says so."""
    base = build("llama", seed)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, "llama", seed)
    real = peft.tuners.lora.layer.Linear.get_delta_weight
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "get_delta_weight", lambda self, name: 2 * real(self, name))
    with pytest.raises(CheckFailed, match="each merged layer"):
        merge.save_model(model, None, tmp_path / "m", family="llm", rows=rows_for("llama"), base=tmp_path / "base")
    assert os.listdir(tmp_path) == ["base"]


# ---- in a fresh process ----------------------------------------------------------------------------------------


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def four_bit(tmp_path, seed):
    torch.manual_seed(seed)
    values = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)
    options = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return shake(peft.get_peft_model(quantised, options), 0.05)


def test_three_saves_are_one(tmp_path, seed):
    base, target, trees = build("llama", seed), tmp_path / "model", []
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, "llama", seed)
    for _ in range(3):
        checks = merge.save_model(model, None, target, family="llm", rows=rows_for("llama"), base=tmp_path / "base")
        assert all(check.passed for check in checks), (seed, checks)
        trees.append(tree(target))
    assert trees[0] == trees[1] == trees[2] and sorted(os.listdir(tmp_path)) == ["base", "model"], seed
    assert verify.kept_checks(target) == checks and len(checks) >= 8


def test_both_bases_are_stated(tmp_path, seed):
    model = four_bit(tmp_path, seed)
    merge.save_model(model, None, tmp_path / "model", family="llm", rows=rows_for("llama"), base=tmp_path / "base")
    stated = {check.name: check for check in verify.kept_checks(tmp_path / "model")}
    chosen = stated["saved model answers as the trained one"]
    other = [check for name, check in stated.items() if name.startswith("merged into the base as quantisation left it instead")]
    assert chosen.measured > 0 and "KL" in chosen.detail and len(other) == 4 and other[0].measured < 1e-3, (seed, stated)
    assert sorted(os.listdir(tmp_path)) == ["base", "model"] and not (tmp_path / "model" / "other").exists()


def test_saved_in_four_bits(tmp_path, seed):
    model = four_bit(tmp_path, seed)
    checks = merge.save_model(model, None, tmp_path / "m", family="llm", rows=rows_for("llama"), base=tmp_path / "base",
                              four_bit=True, merge_base="dequantized")  # fmt: skip
    assert all(check.passed for check in checks), (seed, checks)
    assert any("merged into the original base instead" in check.name for check in checks)
    name = "saved model answers as the trained one, in 4 bits"
    assert [check.measured for check in checks if check.name == name][0] < 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.is_loaded_in_4bit and sorted(os.listdir(tmp_path)) == ["base", "m"]
    assert not (tmp_path / "m" / "merged").exists()


KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from transformers import LlamaForCausalLM
from supertrainer.export import merge, weights
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1)
real, count = weights.ShardWriter.write, 0
def write(self, name, tensor):
    global count
    real(self, name, tensor)
    count += 1
    if count == 5: os.kill(os.getpid(), signal.SIGKILL)
weights.ShardWriter.write = write
merge.save_model(model, None, sys.argv[2], family="llm", rows=[{"input_ids": [1, 2, 3]}])
"""


def test_killed_in_the_middle_of_writing(tmp_path, seed):
    base = build("llama", seed)
    merge.save_model(base, None, tmp_path / "model", family="llm", rows=rows_for("llama"))
    whole = tree(tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model"), str(tmp_path / "model")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    unfinished = [name for name in os.listdir(tmp_path) if name != "model"]
    assert len(unfinished) == 1 and unfinished[0].startswith(".model.saving-") and tree(tmp_path / "model") == whole, seed
    assert not (tmp_path / unfinished[0] / "config.json").exists(), "what is left does not look like a model"
    merge.save_model(base, None, tmp_path / "model", family="llm", rows=rows_for("llama"))
    assert os.listdir(tmp_path) == ["model"] and tree(tmp_path / "model") == whole


# ---- models loaded by name -------------------------------------------------------------------------------------

TEXTS = ["What does it do? It does this and that."] * 3


def test_a_model_without_a_name_can_save_itself(tmp_path):
    """Nothing holds the model that get_peft_model returns, and its method still knows it."""
    from supertrainer.models.llm import FastLLM

    model, tokenizer = FastLLM.from_pretrained("tiny_llama", texts=TEXTS)
    FastLLM.get_peft_model(model, r=4).save_pretrained_merged(tmp_path / "lora", tokenizer, save_method="lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    held = FastLLM.get_peft_model(FastLLM.from_pretrained("tiny_llama", texts=TEXTS)[0], r=4)
    gone = weakref.ref(held)
    del held
    assert gone() is None, "the parts a method holds must not keep the model itself alive"


def found_again(model, merge_base="original"):
    """The merged weights in a plain model, from the base as it is found without being told where; and the checks."""
    shell = make_shell(model)
    source = open_base(model, shell)
    compared = Compared(RoundedBase(source, model) if merge_base == "dequantized" else source, model)
    merged = Merged(model, compared, {"default": 1.0}, shell)
    plain = type(shell)(shell.config).float().eval()
    state = {name: merged.load(name).float() for name in merged.names}
    plain.load_state_dict(state | {name: state[twin] for name, twin in merged.tied.items()}, strict=False)
    return plain, layer_checks(merged.layers) + compared.checks(), source


def loaded_and_trained(where, seed, std=0.1, **options):
    from supertrainer.models.llm import FastLLM

    model, tokenizer = FastLLM.from_pretrained(str(where), **options)
    torch.manual_seed(seed)
    return shake(FastLLM.get_peft_model(model, r=4, kernels="off"), std), tokenizer


@pytest.fixture
def saved_llama(tmp_path):
    """A tiny Llama with its tokenizer in a folder, in float32."""
    from supertrainer.models.llm import FastLLM

    model, tokenizer = FastLLM.from_pretrained("tiny_llama", texts=TEXTS)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_base_is_found_in_its_folder(saved_llama, seed):
    """With tokens added and the vocabulary grown, trained in 16 bits while the folder has 32."""
    model, tokenizer = loaded_and_trained(saved_llama, seed, dtype="bfloat16", new_tokens=["<start_of_plan>", "zyx"],
                                          pad_vocab_to_multiple_of=64)  # fmt: skip
    assert merge.weight_dtype(model) == torch.bfloat16
    plain, checks, source = found_again(model)
    assert all(check.passed for check in checks), (seed, checks)
    original = ModelWeights(saved_llama)
    norm = plain.get_parameter("model.norm.weight")
    assert torch.equal(norm, original.load("model.norm.weight").float()), "not through 16 bits: the folder's own values"
    ids = tokenizer.convert_tokens_to_ids(["<start_of_plan>", "zyx"])
    rows = [{"input_ids": torch.tensor([ids + [5, 6, 7]])}]
    with torch.no_grad():
        found = verify.compare_logits(logits_of(model, rows), logits_of(plain, rows))
    assert found.kl < 0.05 and found.sure_flips == 0, (seed, found)


@pytest.mark.parametrize("packed_folder", [False, True], ids=["quantised-on-load", "quantised-folder"])
def test_base_in_four_bits_is_found(saved_llama, tmp_path, packed_folder, seed):
    """Also when the folder itself is in 4 bits: then what comes out of it is the original."""
    where = saved_llama
    if packed_folder:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        where = tmp_path / "packed"
        AutoModelForCausalLM.from_pretrained(saved_llama, quantization_config=config, dtype=torch.float32).save_pretrained(where)
        AutoTokenizer.from_pretrained(saved_llama).save_pretrained(where)
    model, _ = loaded_and_trained(where, seed, 0.05, dtype="float32", **({} if packed_folder else {"load_in_4bit": True}))
    assert merge.is_quantised(model)
    rows = [{"input_ids": torch.arange(3, 40)[None]}]
    trained = merge.trained_logits(model, rows)
    for merge_base in ("original", "dequantized"):
        plain, checks, source = found_again(model, merge_base)
        assert all(check.passed for check in checks) and source.quantised is packed_folder, (seed, checks)
        with torch.no_grad():
            found = verify.compare_logits(trained, logits_of(plain, rows))
        exact = packed_folder or merge_base == "dequantized"
        assert (found.max_abs < 2e-3 if exact else 2e-3 < found.max_abs) and found.kl < 0.5, (seed, merge_base, found)


def test_arguments_are_honoured_or_refused(saved_llama, tmp_path, seed):
    model, tokenizer = loaded_and_trained(saved_llama, seed)
    save = lambda **options: merge.save_pretrained_merged(model, tmp_path / "x", tokenizer, **options)  # noqa: E731
    for options, words in (
        ({"merge_base": "dequantized"}, "is not quantised"), ({"merge_base": "quantized"}, "Did you mean 'dequantized'"),
        ({"save_method": "lora", "merge_base": "dequantized"}, "merges nothing"), ({"max_shard_size": "5 gigs"}, "no size"),
        ({"save_method": "gguf"}, "not supported"), ({"max_shard_sise": "1GB"}, "max_shard_sise"), ({"adapters": {"x": 1}}, "'x'"),
        ({"token": "hf_secret"}, "cannot honour token"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as said:
            save(**options)
        assert "hf_secret" not in str(said.value), "tokens are written nowhere"
    assert sorted(os.listdir(tmp_path)) == ["base"]


MEASURED = """
import sys, threading, time
import peft, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from supertrainer.export.bases import FolderBase, make_shell, open_base
from supertrainer.export.deltas import Merged
from supertrainer.export.rounding import Compared
from supertrainer.export.writing import write_weights

torch.set_num_threads(1)
shape = dict(num_attention_heads=8, max_position_embeddings=64, tie_word_embeddings=True)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6


def save(home, **size):
    (home / "out").mkdir(parents=True)
    LlamaForCausalLM(LlamaConfig(**shape, **size)).save_pretrained(home)
    model = LlamaForCausalLM.from_pretrained(home)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    held, peak, done = sum(p.numel() for p in model.parameters()) * 4 / 1e6, [0.0], threading.Event()
    for parameter in model.parameters():
        parameter.sum()  # read the mapped file: what the trained model takes is not the save's
    idle = resident()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    shell = make_shell(model)
    write_weights(Merged(model, Compared(FolderBase(home, shell), model), {"default": 1.0}, shell), home / "out", torch.bfloat16)
    done.set()
    watcher.join()
    return held, peak[0] - idle


for number, size in enumerate([dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=99),
                               dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=24, vocab_size=16000)]):
    measured = save(Path(sys.argv[1], str(number)), **size)  # the small one first: what is loaded on first use is not the save's
print(*measured)
"""


def test_memory_is_a_few_tensors(tmp_path):
    """A model of 340 MB in float32, its largest weight 33 MB: the merge may take a few of those, and no second model."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    held, above = map(float, done.stdout.split())
    assert held > 300 and above < 130, (held, above)
