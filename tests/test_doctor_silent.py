"""Faults that load without an error, folders full of nonsense, and places where the doctor must not write."""

import json
import os
import random
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import CHATML, TINY, make_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from supertrainer.export.contract import make_inference_ready
from supertrainer.export.doctor import examine
from supertrainer.runtime import UserError


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder of a tiny Llama with a chat template, as supertrainer writes it."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("sound"), LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.3}))
    model.save_pretrained(folder)
    make_inference_ready(model, make_tokenizer(), "llm").save(folder)
    return folder


@pytest.fixture
def llm(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


@pytest.fixture
def adapter(sound, tmp_path):
    """An adapter folder with weights that are not zero."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(sound), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_()
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def failed(folder, **options):
    return {finding.name: finding for finding in examine(folder, **options).findings if not finding.passed and finding.level != "note"}


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def answers(folder):
    """New tokens of two prompts in one batch, by plain transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
               for text in ("a", "the lazy dog do? a b c")]
    batch = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
    return model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1]:].tolist()


def test_a_sound_folder_has_no_finding(llm):
    assert not failed(llm)


# ---- faults that load without an error --------------------------------------------------------------------------


def test_a_lost_vocabulary_is_found_and_nothing_is_repaired_by_it(llm):
    """transformers makes a tokenizer of the special tokens alone, with other numbers; these must not get into the settings."""
    (llm / "tokenizer.json").unlink()
    before = tree(llm)
    assert set(failed(llm)) == {"the tokenizer can be loaded"}
    assert not examine(llm, fix=True).passed and tree(llm) == before


def test_an_adapter_beside_merged_weights(llm, adapter):
    """Plain transformers puts it on a second time."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, llm)
    assert any("lora" in name for name, _ in AutoModelForCausalLM.from_pretrained(llm).named_parameters()), "it is put on"
    assert set(failed(llm)) == {"no adapter beside the weights"}


def test_an_adapter_with_its_bases_config_is_an_adapter(llm, adapter):
    shutil.copy(llm / "config.json", adapter)
    seen = examine(adapter)
    assert seen.what == "adapter" and not seen.wrong


def test_generation_settings_without_a_stop(llm):
    """A generation_config.json without eos_token_id never stops, whatever config.json says."""
    wanted = answers(llm)
    values = json.loads((llm / "generation_config.json").read_text())
    values.pop("eos_token_id")
    (llm / "generation_config.json").write_text(json.dumps(values))
    edit(llm / "config.json", eos_token_id=1)
    assert AutoModelForCausalLM.from_pretrained(llm).generation_config.eos_token_id is None
    assert set(failed(llm)) == {"generation stops at the end of a turn"}
    assert not failed(llm, fix=True) and answers(llm) == wanted


@pytest.mark.parametrize("value", [[1, None], "1", 1.5, [], {"a": 1}], ids=str)
def test_stops_that_are_no_numbers(llm, value):
    edit(llm / "generation_config.json", eos_token_id=value)
    assert "generation settings hold token numbers" in failed(llm)
    assert not failed(llm, fix=True)
    assert AutoModelForCausalLM.from_pretrained(llm).generation_config.eos_token_id == 1


def test_prompts_that_end_in_a_stop_token(llm):
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 1)])
    tokenizer.backend_tokenizer.save(str(llm / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(llm)("a")["input_ids"][-1] == 1
    assert "prompts are left open" in {finding.name for finding in examine(llm).wrong}


def test_a_template_that_does_not_print_the_question(llm):
    (llm / "chat_template.jinja").write_text(CHATML.replace("m['content']", "m['role']"))
    assert "the chat template prints what the user says" in {finding.name for finding in examine(llm).wrong}


def test_a_layer_of_zeros(llm):
    weights(llm, lambda tensors: tensors["lm_head.weight"].zero_())
    assert set(failed(llm)) == {"no layer is all zeros"}


@pytest.mark.parametrize("named", [["LlamaModel"], ["PeftModelForCausalLM"], []], ids=str)
def test_the_class_that_the_weights_fit_is_written(llm, named):
    wanted = answers(llm)
    edit(llm / "config.json", architectures=named)
    assert failed(llm)
    assert not failed(llm, fix=True) and answers(llm) == wanted
    assert json.loads((llm / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_stop_beyond_the_embedding_is_rewritten(llm):
    edit(llm / "config.json", eos_token_id=32000)
    assert set(failed(llm)) == {"settings name tokens that exist"}
    assert not failed(llm, fix=True) and json.loads((llm / "config.json").read_text())["eos_token_id"] == 1


def test_a_gguf_file_in_the_folder(llm):
    (llm / "model-q8_0.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert set(failed(llm)) == {"GGUF files in the folder are whole"}


# ---- adapters ---------------------------------------------------------------------------------------------------

ADAPTERS = {
    "another rank": ({"r": 8}, "ranks are those of the weights"),
    "a layer that is not named": ({"target_modules": ["v_proj"]}, "every stored layer is named"),
    "an unknown kind": ({"peft_type": "NOPE"}, "PEFT understands the settings"),
    "a base beside it": ({"base_model_name_or_path": "outputs/checkpoint-5"}, "the adapter names its base"),
    "a base of this machine": ({"base_model_name_or_path": "/content/base"}, "the adapter names its base"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapters_fault(adapter, name):
    assert not failed(adapter)
    values, wanted = ADAPTERS[name]
    edit(adapter / "adapter_config.json", **values)
    assert set(failed(adapter)) == {wanted}


def test_ranks_by_pattern_are_no_fault(sound, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=r".*\.(q|v)_proj", rank_pattern={"v_proj": 4}, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(sound), config)
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path)
    assert not failed(tmp_path)


# ---- where the doctor must not write, and what must not stop it -------------------------------------------------


def test_a_snapshot_in_the_cache_is_never_changed(llm, tmp_path):
    """Also when it is named by its path: other programs share these files."""
    edit(llm / "config.json", use_cache=False)
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True), snapshot.mkdir(parents=True)
    for path in llm.iterdir():
        shutil.copy(path, repository / "blobs" / f"blob-{path.name}")
        os.symlink(f"../../blobs/blob-{path.name}", snapshot / path.name)
    before = tree(repository)
    seen = examine(snapshot, fix=True)
    assert tree(repository) == before and not seen.changed and not seen.passed
    assert "hf download org/name" in seen.hint


def test_no_name_is_no_folder():
    with pytest.raises(UserError, match="empty"):
        examine("")


VALUES = [None, True, -1, 0, 3, 10**30, 0.5, "", "x", "/home/me", [], {}, [1, None], ["a"], {"a": 1}, {"0": []}, [[]]]


def vary(values, draw):
    """Change or take out one value anywhere in nested JSON."""
    place = values
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], (dict, list)) and place[key]) or draw.random() < 0.3:
            break
        place = place[key]
    if draw.random() < 0.25:
        del place[key]
    else:
        place[key] = draw.choice(VALUES)


@pytest.mark.parametrize("key, value", [("num_hidden_layers", 10**30), ("num_hidden_layers", 5000), ("num_labels", 10**30)])
def test_counts_without_end_are_said_before_anything_is_built(llm, key, value):
    """Built, they fill the memory until the system kills the process, which took the whole suite's worker along once."""
    edit(llm / "config.json", **{key: value})
    found = failed(llm)["transformers understands the configuration"]
    assert key in str(found)
    assert not examine(llm, fix=True).passed


def test_any_nonsense_gives_findings(sound, tmp_path, seed):
    """Never a traceback, nothing changed without fix, and what fix returns is what a second look finds."""
    draw = random.Random(seed)
    for number in range(12):
        folder = shutil.copytree(sound, tmp_path / str(number))
        for _ in range(draw.choice([1, 1, 2, 4])):
            path = draw.choice(sorted(folder.glob("*.json")))
            values = json.loads(path.read_text())
            vary(values, draw)
            path.write_text(json.dumps(values))
        before = tree(folder)
        seen = examine(folder)
        assert tree(folder) == before, f"seed {seed}, folder {number}"
        assert max(map(len, seen.text(80).splitlines()[1:])) <= 80, f"seed {seed}, {number}"  # the first line is the path
        treated, again = examine(folder, fix=True), examine(folder)
        assert [(f.name, f.passed) for f in treated.findings] == [(f.name, f.passed) for f in again.findings], f"seed {seed}, {number}"
