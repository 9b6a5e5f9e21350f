"""Saved models against the trained ones: every kind of adapter, every family, damage, interruptions, the 4-bit trap."""

import copy
import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from supertrainer.check import CheckFailed, CheckLog
from supertrainer.export import contract, folder, merge, verify
from supertrainer.export.bases import MemoryBase, base_tensors
from supertrainer.export.deltas import Merged, layer_checks
from supertrainer.export.reload import logits_of
from supertrainer.export.rounding import Compared, RoundedBase
from supertrainer.runtime import UserError

TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
            max_position_embeddings=64, initializer_range=0.1)  # fmt: skip
CHATML = ("{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}")  # fmt: skip


def make_tokenizer(chat=True):
    names = ["<unk>", "<|im_end|>", "<|im_start|>", "<|pad|>", "user", "assistant"]
    vocab = {word: i for i, word in enumerate([*names, *"What does textwrap.dedent do? the lazy dog a b c d e f g".split()])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|pad|>"]})
    tokenizer.chat_template = CHATML if chat else None
    return tokenizer


def llama(seed=0, **config):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **config})).eval()


def shaken(model, std=0.3, seed=1):
    """As after training: every adapter weight has moved, and so has what is trained in full."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                scale = std if "lora_" in name or "magnitude" not in name else 0.1
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * scale)
    return model


def adapted(base, **options):
    torch.manual_seed(2)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return shaken(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)))


ROWS = [{"input_ids": [2, 4, 7, 9, 30], "labels": [-100] * 5}, {"input_ids": [5, 63, 1]}]


def logits(model, rows=ROWS):
    with torch.no_grad():
        return logits_of(model, verify.as_rows(model, rows))


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def gap(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def merged_model(model, base, kind=LlamaForCausalLM):
    """A plain model with the merged weights, and the checks made while merging."""
    compared = Compared(MemoryBase(base_tensors(base)), model)
    merged = Merged(model, compared, {model.active_adapters[0]: 1.0})
    plain = kind(merged.shell.config)
    state = {name: merged.load(name) for name in merged.names}
    plain.load_state_dict(state | {name: state[twin] for name, twin in merged.tied.items()})
    return plain.float().eval(), layer_checks(merged.layers) + compared.checks()


# ---- merging ---------------------------------------------------------------------------------------------------

KINDS = {
    "lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "bias": {"bias": "lora_only"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "head in full": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "embedding in full": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_base_and_adapter(kind):
    base = llama()
    model = adapted(base, **KINDS[kind])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = logits(model)
    merged, checks = merged_model(model, base)
    assert all(check.passed for check in checks), checks
    assert gap(logits(merged), trained) <= 1e-4 < 0.1 < gap(logits(base), trained)
    assert type(merged) is LlamaForCausalLM and not any("lora" in name for name, _ in merged.named_parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "the trained model is untouched"


def test_a_second_adapter_is_not_mixed_in():
    base = llama()
    model = adapted(base)
    model.add_adapter("german", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("german")
    shaken(model)
    merged, checks = merged_model(model, base)
    assert all(check.passed for check in checks) and gap(logits(merged), logits(model)) <= 1e-4
    model.set_adapter("default")
    assert gap(logits(merged), logits(model)) > 0.1


def test_wrong_base_is_noticed(tmp_path):
    model = adapted(llama())
    with pytest.raises(CheckFailed, match="base read again"):
        merge.save_model(model, None, tmp_path / "m", family="llm", rows=ROWS, base=llama(seed=9), checks_path=tmp_path / "checks.jsonl")
    assert os.listdir(tmp_path) == ["checks.jsonl"]
    assert [check.passed for check in CheckLog.load(tmp_path / "checks.jsonl")] == [True, False]


def four_bit(tmp_path):
    llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)


def test_four_bit_trap(tmp_path):
    """After a no-grad forward on a CPU, merging into the 4-bit base itself is silently wrong; the safe order is not."""
    quantised = four_bit(tmp_path)
    torch.manual_seed(0)
    model = peft.get_peft_model(quantised, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    shaken(model, std=0.1).eval()
    assert merge.is_quantised(model)
    rows = verify.as_rows(model, ROWS)
    trained = merge.trained_logits(model, rows)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    rounded = copy.deepcopy(fresh)
    source = RoundedBase(MemoryBase(base_tensors(fresh)), model)
    rounded.load_state_dict({name: source.load(name) for name in fresh.state_dict()})
    merged, checks = merged_model(model, fresh)
    assert all(check.passed for check in checks), checks
    assert checks[1].detail.startswith(f"weights that differ, of {len(fresh.state_dict())}"), "packed weights are compared"
    assert gap(logits(merged_model(model, rounded)[0]), trained) <= 1e-3, "what 4 bits left of it is what was trained on"
    assert gap(merge.trained_logits(model, rows), trained) == 0, "the model in training still answers as before"
    if not has_avx512bf16():
        return  # this processor never repacks, so there is no trap to show
    with torch.no_grad():
        model(**rows[0])  # what any evaluation during training does: from here on the weights are repacked
    again, checks = merged_model(model, fresh)
    assert all(check.passed for check in checks) and gap(logits(again), logits(merged)) == 0, checks
    naive = verify.compare_logits(logits(merged), logits(model.merge_and_unload()))
    honest = verify.compare_logits(logits(merged), trained)  # what quantisation alone costs
    assert naive.kl > 5 * honest.kl, "no longer so: bitsandbytes has mended it"


def test_four_bit_weights_are_no_base_and_no_model(tmp_path):
    with pytest.raises(UserError, match="itself quantised"):
        merge.save_model(adapted(llama()), None, tmp_path / "m", family="llm", rows=ROWS, base=four_bit(tmp_path))
    with pytest.raises(UserError, match="has no adapter"):
        merge.save_model(four_bit(tmp_path), None, tmp_path / "m", family="llm", rows=ROWS)
    assert os.listdir(tmp_path) == ["base"]


# ---- saving, reloaded in a fresh process -----------------------------------------------------------------------


def test_llama_lora_saved_twice_is_saved_once(tmp_path):
    base, tokenizer = llama(use_cache=False), make_tokenizer()
    model, target = adapted(base, use_dora=True).train(), tmp_path / "out" / "model"
    loads = []
    for _ in range(2):
        checks = merge.save_model(model, tokenizer, target, family="llm", rows=ROWS,
                                  base=lambda: loads.append(1) or copy.deepcopy(base))  # fmt: skip
        assert len(checks) > 8 and all(check.passed for check in checks), checks
        if len(loads) == 1:
            first = tree(target)
    assert tree(target) == first and os.listdir(target.parent) == ["model"] and model.training
    assert (target.stat().st_mode & 0o777) == (tmp_path / "out").stat().st_mode & 0o777
    loaded, reader = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    model.eval()
    assert gap(logits(loaded), logits(model)) <= 1e-4
    assert (reader.padding_side, reader.pad_token, reader.chat_template) == ("left", "<|pad|>", CHATML)
    assert loaded.generation_config.eos_token_id == reader.convert_tokens_to_ids("<|im_end|>") and loaded.config.use_cache
    assert tokenizer.padding_side == "right" and model.config.use_cache is False, "training settings stay"
    assert not {"adapter_config.json", "README.md"} & set(first)


def test_sixteen_bits_are_rounded_once(tmp_path):
    base = llama().to(torch.bfloat16)
    model = adapted(base)
    checks = merge.save_model(model, None, tmp_path / "m", family="llm", rows=ROWS, base=copy.deepcopy(base))
    exact = merged_model(model, base)[0].state_dict()
    saved = load_file(tmp_path / "m" / "model.safetensors")
    assert saved and all(torch.equal(value, exact[name].to(torch.bfloat16)) for name, value in saved.items())
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {"saved weights are the trained ones bit for bit", "base read again is the one that was trained on",
            "each merged layer answers as base and adapter do (float32)"} <= {c.name for c in checks}
    assert verify.kept_checks(tmp_path / "m") == checks


def test_full_llama_in_another_type(tmp_path):
    model = shaken(llama(tie_word_embeddings=True), std=0.05)
    merge.save_model(model, make_tokenizer(), tmp_path / "m", family="llm", dtype="float16")  # rows of our own
    assert {value.dtype for value in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.float16}
    assert model.dtype == torch.float32 and model.config.dtype != "float16"


def test_bert_with_a_trained_head(tmp_path):
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**TINY, num_labels=3)).eval()
    model = adapted(base, task_type="SEQ_CLS", target_modules=["query", "value"])
    trained = logits(model)
    checks = merge.save_model(model, make_tokenizer(chat=False), tmp_path / "m", family="bert", rows=ROWS,
                              labels=["json", "os", "re"], base=copy.deepcopy(base))  # fmt: skip
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert gap(logits(loaded), trained) <= 1e-4 and gap(logits(base), trained) > 0.1
    assert loaded.config.id2label == {0: "json", 1: "os", 2: "re"} and loaded.config.label2id["re"] == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "m").padding_side == "right"
    assert {check.name for check in checks} >= {"labels have names", "padding side by role"}


def test_idefics3_in_full(tmp_path):
    from supertrainer.models.mllm import FastMLLM

    model, processor = FastMLLM.from_pretrained("tiny_idefics3", texts=["Which digit is this? 7", "0 1 2 3 4 5 6 8 9"])
    shaken(model, std=0.02)
    checks = merge.save_model(model, processor, tmp_path / "m", family="mllm")
    names = {check.name for check in checks}
    assert {"image settings saved", "saved image settings are as before", "saved chat template writes prompts as before"} <= names
    assert processor.tokenizer.padding_side == "right" or model.training, "the training processor is as it was"
    with pytest.raises(UserError, match="needs its processor"):
        merge.save_model(model, processor.tokenizer, tmp_path / "n", family="mllm",
                         rows=[{"input_ids": [1, 2, 3]}])  # fmt: skip
    assert os.listdir(tmp_path) == ["m"]


def test_unsloths_name_on_a_loaded_model(tmp_path):
    from supertrainer.models.llm import FastLLM

    model, tokenizer = FastLLM.from_pretrained("tiny_llama", texts=["What does it do? It does this."] * 3)
    model = shaken(FastLLM.get_peft_model(model, r=4), std=0.05)
    checks = merge.save_pretrained_merged(model, tmp_path / "merged", tokenizer)
    assert all(check.passed for check in checks)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    lora = merge.save_pretrained_merged(model, tmp_path / "lora", tokenizer, save_method="lora")
    assert all(check.passed for check in lora) and (tmp_path / "lora" / "adapter_model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "lora").padding_side == "left"
    with pytest.raises(UserError, match="merged_8bit.*not supported"):
        merge.save_pretrained_merged(model, tmp_path / "x", tokenizer, "merged_8bit")
    with pytest.raises(UserError, match="cannot honour push_to_hub"):
        merge.save_pretrained_merged(model, tmp_path / "x", tokenizer, push_to_hub=True)


# ---- damage ----------------------------------------------------------------------------------------------------


def one_weight(path):
    file = path / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.5
    save_file(weights, file, metadata={"format": "pt"})


def other_template(path):
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def cut_file(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage, words", [
    (one_weight, "bit for bit"), (other_template, "template writes prompts"), (cut_file, "cannot load and run"),
], ids=["weight", "template", "file"])  # fmt: skip
def test_damage_between_writing_and_reading_is_caught(tmp_path, monkeypatch, damage, words):
    write = merge.write_folder

    def damaged(merged, ready, directory, *rest):
        found = write(merged, ready, directory, *rest)
        damage(directory)
        return found

    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("the save before")
    monkeypatch.setattr(merge, "write_folder", damaged)
    with pytest.raises(CheckFailed, match=words):
        merge.save_model(llama(), make_tokenizer(), target, family="llm", rows=ROWS)
    assert os.listdir(tmp_path) == ["model"] and tree(target) == {"config.json": b"the save before"}


# ---- the folder ------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from supertrainer.export import folder
where = sys.argv[2]
if where == "between":
    real = folder.shutil.rmtree
    def replace(self, target, real=folder.Path.replace):
        if ".saving-" in self.name: os.kill(os.getpid(), signal.SIGKILL)
        return real(self, target)
    folder.Path.replace = replace
with folder.appear_whole(sys.argv[1]) as hidden:
    (hidden / "config.json").write_text("new")
    if where == "inside": os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("where", ["inside", "between"])
def test_a_killed_save_loses_nothing(tmp_path, where):
    target = tmp_path / "model"
    with folder.appear_whole(target) as hidden:
        (hidden / "config.json").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), where])
    assert done.returncode == -9
    visible = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert visible == ([target] if where == "inside" else [])
    with pytest.raises(KeyboardInterrupt), folder.appear_whole(target):
        assert (target / "config.json").read_text() == "old", "found again by the next save"
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["model"] and (target / "config.json").read_text() == "old"


def test_a_save_that_runs_elsewhere_is_left_alone(tmp_path):
    host = folder.socket.gethostname()
    busy = tmp_path / f".model.saving-{host}-{os.getpid()}-abcd"
    far = tmp_path / ".model.saving-otherhost-1-abcd"
    busy.mkdir(), far.mkdir()
    with folder.appear_whole(tmp_path / "model") as hidden:
        (hidden / "config.json").write_text("{}")
    assert busy.exists() and far.exists()


def test_what_people_added_stays_and_old_weights_go(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "README.md", "model.gguf", "vocab.txt"):
        (target / name).write_text(name)
    (target / "plots").mkdir()
    (target / "plots" / "loss.png").write_text("png")
    with folder.appear_whole(target) as hidden:
        (hidden / "config.json").write_text("new")
    assert set(tree(target)) == {"config.json", "README.md", "model.gguf", "plots/loss.png"}


def test_refusals_come_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    for name, words in (("file", "is a file"), ("thesis", "holds no model")):
        with pytest.raises(UserError, match=words):
            merge.save_model(llama(), None, tmp_path / name, family="llm", rows=ROWS)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="Make room"):
        merge.save_model(llama(), None, tmp_path / "new", family="llm", rows=ROWS)
    assert sorted(os.listdir(tmp_path)) == ["file", "thesis"]


# ---- the contract ----------------------------------------------------------------------------------------------


def edit(path, **values):
    settings = json.loads(path.read_text())
    settings.update(values)
    path.write_text(json.dumps(settings))


DAMAGES = {
    "padding side by role": lambda p: edit(p / "tokenizer_config.json", padding_side="right"),
    "pad token does not end a turn": lambda p: edit(p / "tokenizer_config.json", pad_token="<|im_end|>"),
    "generation stops at the end of a turn": lambda p: edit(p / "generation_config.json", eos_token_id=7),
    "longest input fits the model": lambda p: edit(p / "tokenizer_config.json", model_max_length=10**30),
    "number type recorded": lambda p: edit(p / "config.json", dtype=None),
}


@pytest.fixture
def good_folder(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    contract.make_inference_ready(model, make_tokenizer(), "llm").save(tmp_path)
    assert all(check.passed for check in contract.check_contract(tmp_path, "llm"))
    return tmp_path


@pytest.mark.parametrize("name", DAMAGES)
def test_contract_finds_what_is_wrong(good_folder, name):
    DAMAGES[name](good_folder)
    assert [check.name for check in contract.check_contract(good_folder, "llm") if not check.passed] == [name]


@pytest.mark.parametrize("file, values", [
    ("config.json", {"use_cache": False}), ("config.json", {"_name_or_path": "/home/me/run"}),
    ("config.json", {"quantization_config": {"load_in_4bit": True}}),
    ("tokenizer.json", {"truncation": {"max_length": 9}}), ("tokenizer_config.json", {"name_or_path": "~/model"}),
], ids=str)  # fmt: skip
def test_contract_finds_training_leftovers(good_folder, file, values):
    settings = json.loads((good_folder / file).read_text())
    (good_folder / file).write_text(json.dumps({**settings, **values}))
    assert contract._leftovers(good_folder), "the file keeps the setting"


def test_llama3_like_terminators():
    """Documents and turns end in different tokens; both must stop generation."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|pad|>"})
    ready = contract.make_inference_ready(llama(), tokenizer, "llm")
    assert ready.generation.eos_token_id == [3, 1] or set(ready.generation.eos_token_id) >= {1, 3}
    assert ready.tokenizer.pad_token_id != 1


# ---- the comparison --------------------------------------------------------------------------------------------


def test_difference_against_float64():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, 9, generator=generator).double() * 3
    b = a + torch.randn(30, 9, generator=generator).double()
    found = verify.compare_logits([a[:10], a[10:]], [b[:10], b[10:]], sure=0.5)
    p, q = torch.softmax(a, -1), torch.softmax(b, -1)
    kl = [sum(p[i, v].item() * (p[i, v] / q[i, v]).log().item() for v in range(9)) for i in range(30)]
    top = a.sort(-1, descending=True).values
    flips = [i for i in range(30) if a[i].argmax() != b[i].argmax()]
    assert found.kl == pytest.approx(sum(kl) / 30) and found.kl_max == pytest.approx(max(kl))
    assert found.max_abs == pytest.approx((a - b).abs().max().item()) and found.flips == len(flips)
    assert found.sure_flips == sum(top[i, 0] - top[i, 1] > 0.5 for i in flips)


def test_sixteen_bit_limits_catch_a_lost_adapter():
    """The limits for 16 bits let rounding pass, and not an adapter that was forgotten, doubled or halved."""
    base = llama(initializer_range=0.3)
    model = adapted(base, r=2)
    limits = verify.limits_for(torch.bfloat16)
    rows = [{"input_ids": torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(i))} for i in range(2)]
    trained = logits(model, rows)
    merged = merged_model(model, base)[0]
    rounded = copy.deepcopy(merged)
    for weight in rounded.parameters():
        weight.data = weight.data.bfloat16().float()
    passes = lambda other: all(c.passed for c in verify.difference_checks("x", trained, logits(other, rows), limits))  # noqa: E731
    assert passes(merged) and passes(rounded) and not passes(base)
    for share in (0.5, 2.0):
        wrong = copy.deepcopy(base)
        for (_, right), weight in zip(merged.named_parameters(), wrong.parameters(), strict=True):
            weight.data += share * (right.data - weight.data)
        assert not passes(wrong), share
