"""The doctor: folders damaged as real ones are, each fault found and nothing else; repairs after which the model answers as before."""

import json

import peft
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from test_export import TINY, make_tokenizer, tree
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from supertrainer import cli
from supertrainer.export.contract import make_inference_ready
from supertrainer.export.doctor import examine
from supertrainer.runtime import UserError


def edit(name, **values):
    """Damage: values written into a JSON file; None takes a key out."""
    def damage(folder):
        path = folder / name
        now = json.loads(path.read_text("utf-8")) | values
        path.write_text(json.dumps({key: value for key, value in now.items() if value is not None}))
    return damage


def several(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def weights(change):
    def damage(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return damage


def a_token_without_a_row(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"added{number}" for number in range(64 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    edit("tokenizer_config.json", padding_side="left")(folder)
    for name in ("config.json", "generation_config.json"):
        edit(name, pad_token_id=64)(folder)


def sharded_with_one_lost(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pad_with(token, number):
    return several(edit("tokenizer_config.json", pad_token=token), edit("config.json", pad_token_id=number),
                   edit("generation_config.json", pad_token_id=number))


# damage, the one finding, whether --fix mends it
LLM = {
    "padding on the right": (edit("tokenizer_config.json", padding_side="right"), "padding is on the side this model needs", True),
    "pad ends a turn": (pad_with("<|im_end|>", 1), "the pad token ends no turn", True),
    "pad is a word": (pad_with("user", 4), "the pad token is no ordinary word", True),
    "pad beyond the embedding": (a_token_without_a_row, "every token has a row in the embedding", True),
    "config pads with a word": (edit("config.json", pad_token_id=9), "config and tokenizer pad with the same token", True),
    "terminator lost": (edit("generation_config.json", eos_token_id=2), "generation stops at the end of a turn", True),
    "stops at a word": (edit("generation_config.json", eos_token_id=[1, 9]), "generation stops at the end of a turn", True),
    "cache off": (edit("config.json", use_cache=False, gradient_checkpointing=True), "no training settings left", True),
    "merged, still noted as 4-bit": (edit("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
                                     "quantisation is noted as it is", True),
    "another number type": (edit("config.json", dtype="bfloat16"), "number type is recorded as stored", True),
    "number type not recorded": (edit("config.json", dtype=None), "number type is recorded as stored", True),
    "path of the trainer's machine": (edit("config.json", _name_or_path="/home/me/runs/checkpoint-7"), "no paths of another machine", True),
    "attention prescribed": (edit("config.json", _attn_implementation="flash_attention_2"), "no attention implementation prescribed", True),
    "remote code for a known model": (edit("config.json", auto_map={"AutoModel": "modeling.Mine"}), "no code has to be trusted", True),
    "truncation left": (edit("tokenizer.json", truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}),
                        "the tokenizer cuts and pads only when asked", True),
    "longest input beyond the model": (edit("tokenizer_config.json", model_max_length=4096), "the longest input fits the model", True),
    "temperature without sampling": (edit("generation_config.json", temperature=0.3, do_sample=False), "generation settings are valid", True),
    "answers cut": (edit("generation_config.json", max_length=20), "answers are not cut short", True),
    "template broken": (lambda folder: (folder / "chat_template.jinja").write_text("{% for m in messages %}"), "the chat template can be rendered", False),
    "template lost": (lambda folder: (folder / "chat_template.jinja").unlink(), "the chat template is there", False),
    "NaN": (weights(lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))), "no NaN or infinity in the weights", False),
    "infinity": (weights(lambda tensors: tensors["lm_head.weight"][3, 3].fill_(float("-inf"))), "no NaN or infinity in the weights", False),
    "a weight missing": (weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")), "weights are complete for the architecture", False),
    "an adapter left beside": (weights(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 32)})),
                               "weights are complete for the architecture", False),
    "another layer count": (edit("config.json", num_hidden_layers=3), "weights are complete for the architecture", False),
    "a shard lost": (sharded_with_one_lost, "weight files are there and whole", False),
    "weights cut short": (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-999]),
                          "weight files are there and whole", False),
    "pickled weights": (pickled, "no pickled files", False),
    "training arguments left": (lambda folder: (folder / "training_args.bin").write_bytes(b"x"), "no pickled files", False),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("*token*")], "the tokenizer is there", False),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{'model_type': 'llama'}"), "settings files can be read", False),
    "unknown architecture": (edit("config.json", model_type="llama9"), "transformers understands the configuration", False),
}
BERT = {
    "a class name lost": (edit("config.json", id2label={"0": "json", "1": "os"}), "class names fit the head", True),
    "class names swapped": (edit("config.json", label2id={"json": 1, "os": 0, "re": 2}), "class names fit the head", True),
    "classes without names": (edit("config.json", id2label=None, label2id=None, num_labels=3), "classes have names", False),
    "padding on the left": (edit("tokenizer_config.json", padding_side="left"), "padding is on the side this model needs", True),
    "longer than its positions": (edit("tokenizer_config.json", model_max_length=512), "the longest input fits the model", True),
}


@pytest.fixture
def llm(tmp_path):
    """A folder of ours, of a tiny Llama with a chat template."""
    torch.manual_seed(0)
    folder = tmp_path / "llm"
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    model.save_pretrained(folder)
    make_inference_ready(model, make_tokenizer(), "llm").save(folder)
    return folder


@pytest.fixture
def bert(tmp_path):
    """A folder of ours, of a tiny classifier."""
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=3)).eval()
    model.save_pretrained(folder)
    make_inference_ready(model, make_tokenizer(chat=False), "bert", ["json", "os", "re"]).save(folder)
    return folder


def failed(folder, **options):
    return [finding for finding in examine(folder, **options).findings if not finding.passed]


def answers(folder):
    """What plain transformers makes of a batch of prompts of different length: new token ids, or class names and logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["the lazy dog", "What does the lazy user do?"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    if "ForCausalLM" in (folder / "config.json").read_text():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        made = model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1]:]
        return [str(model.dtype), model.config.use_cache, made.tolist()]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**batch).logits
    return [[model.config.id2label[int(row.argmax())] for row in logits], logits.tolist()]


@pytest.mark.parametrize("damage", LLM)
def test_a_language_models_fault_is_found_and_nothing_else(llm, damage):
    _judge(llm, *LLM[damage])


@pytest.mark.parametrize("damage", BERT)
def test_a_classifiers_fault_is_found_and_nothing_else(bert, damage):
    _judge(bert, *BERT[damage])


def _judge(folder, damage, name, mends):
    assert failed(folder) == []
    good = answers(folder)
    damage(folder)
    before = tree(folder)
    found = failed(folder)
    assert [finding.name for finding in found] == [name], found
    assert found[0].explanation and found[0].repair and name in examine(folder).text()
    assert tree(folder) == before, "looking changes nothing"
    fixed = examine(folder, fix=True)
    if not mends:
        assert tree(folder) == before and [finding.name for finding in fixed.findings if not finding.passed] == [name]
        assert "--fix" not in found[0].repair and fixed.changed == []
        return
    assert [finding for finding in fixed.findings if not finding.passed] == [], fixed.text()
    assert [finding.name for finding in fixed.findings if finding.repaired] == [name] and fixed.passed
    assert answers(folder) == good
    after = tree(folder)
    for path in fixed.changed:
        assert after[f"{path.name}.before-doctor"] == before[path.name] != after[path.name]
    unchanged = before.keys() - {path.name for path in fixed.changed}
    assert all(after[path] == before[path] for path in unchanged) and "model.safetensors" in unchanged
    assert examine(folder, fix=True).changed == [], "a second time there is nothing to do"


# ---- healthy folders -------------------------------------------------------------------------------------------


def plain_tokenizer(**options):
    """A tokenizer with its settings right, as an author would publish it."""
    options = {"eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<|pad|>", "model_max_length": 64, **options}
    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(chat=False).backend_tokenizer, **options)


NAMED = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}
HEALTHY = {
    "bert classifier": lambda: (BertForSequenceClassification(BertConfig(**TINY, **NAMED, pad_token_id=3)), plain_tokenizer()),
    "llama without a template": lambda: (LlamaForCausalLM(LlamaConfig(**TINY, eos_token_id=0, pad_token_id=3)),
                                         plain_tokenizer(eos_token="<unk>", padding_side="left")),
    "tied llama": lambda: (LlamaForCausalLM(LlamaConfig(**TINY, eos_token_id=0, pad_token_id=3, tie_word_embeddings=True)),
                           plain_tokenizer(eos_token="<unk>", padding_side="left")),
    "mixture of experts": lambda: (MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=2, eos_token_id=0,
                                                                    pad_token_id=3)), plain_tokenizer(eos_token="<unk>", padding_side="left")),
    "half precision": lambda: (LlamaForCausalLM(LlamaConfig(**TINY, eos_token_id=0, pad_token_id=3)).half(),
                               plain_tokenizer(eos_token="<unk>", padding_side="left")),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_what_transformers_saves_is_left_in_peace(tmp_path, kind):
    model, tokenizer = HEALTHY[kind]()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    seen = examine(tmp_path)
    assert [(finding.level, finding.name) for finding in seen.findings if not finding.passed and finding.level != "note"] == [], seen.text()


def test_gpt2_pads_with_nothing_and_that_is_a_note(tmp_path):
    tokenizer = make_tokenizer(chat=False)
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<unk>", bos_token="<unk>", unk_token="<unk>")
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, eos_token_id=0, bos_token_id=0)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    seen = examine(tmp_path)
    assert seen.passed and {finding.level for finding in seen.findings if not finding.passed and "pad token" in finding.name} <= {"note", "risk"}


def test_a_vision_language_model(tmp_path):
    import tiny_vision

    model, processor = tiny_vision.model_of("idefics3"), tiny_vision.processor_of("idefics3")
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    plain = failed(tmp_path / "plain")
    assert {(finding.level, finding.name) for finding in plain if finding.level != "note"} <= {("risk", "padding is on the side this model needs")}
    make_inference_ready(model, processor, "mllm").save(tmp_path / "plain")
    seen = examine(tmp_path / "plain")
    assert seen.family == "mllm" and [finding for finding in seen.findings if not finding.passed] == []
    (tmp_path / "plain" / "processor_config.json").unlink()
    assert [finding.name for finding in failed(tmp_path / "plain")] == ["image settings are there"]


# ---- other things that are called a model ----------------------------------------------------------------------


def test_an_adapter_names_its_base(tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**TINY)), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "me/base"
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert [(finding.level, finding.name) for finding in failed(tmp_path)] == [("risk", "the adapter changes the base")]
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: torch.ones_like(tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    seen = examine(tmp_path)
    assert seen.what == "adapter" and seen.family == "llm" and all(finding.passed for finding in seen.findings)
    edit("adapter_config.json", base_model_name_or_path="/home/me/base")(tmp_path)
    assert [finding.name for finding in examine(tmp_path).wrong] == ["the adapter names its base"]
    file.unlink()
    assert "the adapter's weights are there and whole" in {finding.name for finding in examine(tmp_path).wrong}


def test_a_run_folder_stands_for_its_model(llm, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 1\n")
    seen = examine(run)
    assert not seen.passed and "run folder without a saved model" in seen.wrong[0].found
    llm.rename(run / "model")
    assert examine(run).passed and examine(run).what == "model folder, language model"


def test_a_gguf_file(tmp_path):
    from supertrainer.export.gguf.convert import convert
    from supertrainer.models.llm import FastLLM

    model, tokenizer = FastLLM.from_pretrained("tiny_llama", texts=["What does it do? It does this."] * 3)
    model.save_pretrained(tmp_path / "m")
    make_inference_ready(model, tokenizer, "llm").save(tmp_path / "m")
    assert failed(tmp_path / "m") == []
    path = convert(tmp_path / "m", tmp_path / "m.gguf", "q8_0", progress=False)
    seen = examine(path)
    assert seen.passed and seen.what == "GGUF file" and all(finding.passed for finding in seen.findings), seen.text()
    path.write_bytes(path.read_bytes()[:-500])
    said, mended = (" ".join(examine(path, fix=fix).text().split()) for fix in (False, True))  # lines break where paths are long
    assert "cut short" in said and "is not repaired" in mended


def test_a_hub_model_is_examined_and_never_repaired(hub, llm):
    edit("tokenizer_config.json", padding_side="right")(llm)
    api = HfApi()
    api.create_repo("me/name", private=True)
    api.upload_folder(repo_id="me/name", folder_path=llm)
    seen = examine("me/name", fix=True)
    assert [finding.name for finding in seen.wrong] == ["padding is on the side this model needs"]
    assert seen.changed == [] and "hf download me/name --local-dir" in seen.text()
    with pytest.raises(UserError, match="me/absent"):
        examine("me/absent")


# ---- anything at all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors",
                                  "chat_template.jinja"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff\xfe\x00", b'{"architectures": 3, "id2label": [1], "eos_token_id": "x"}'],
                         ids=["empty", "nothing", "list", "no text", "nonsense"])
def test_a_broken_file_gives_findings_and_no_traceback(llm, name, content):
    (llm / name).write_bytes(content)
    seen = examine(llm)
    assert seen.text() and isinstance(seen.passed, bool) and len(seen.checks) == len(seen.findings)
    if name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert not seen.passed
    examine(llm, fix=True)


def test_a_folder_that_holds_nothing(tmp_path):
    assert [finding.name for finding in examine(tmp_path).wrong] == ["there is a model"]


def test_the_values_need_not_be_read(llm):
    LLM["NaN"][0](llm)
    assert not examine(llm).passed and examine(llm, values=False).passed


def test_the_command_line(llm, capsys):
    assert cli.main(["doctor", str(llm)]) == 0
    for name in ("padding on the right", "cache off", "another number type"):
        LLM[name][0](llm)
    assert cli.main(["doctor", str(llm)]) == 2
    out = capsys.readouterr().out
    assert "3 wrong" in out and out.index("WRONG") < out.rindex("ok ") and "goes on from" in out
    assert max(map(len, out.splitlines()[2:])) <= 100
    assert cli.main(["doctor", str(llm), "--fix", "--family", "llm"]) == 0
    assert "repaired" in capsys.readouterr().out
    assert cli.main(["doctor", str(llm / "nowhere")]) == 2
    assert GenerationConfig.from_pretrained(llm).eos_token_id == 1


def test_a_processor_is_found_again_for_a_bare_tokenizer(tmp_path):
    """Unsloth's users pass the tokenizer; the image settings go into the folder all the same."""
    import tiny_vision
    from transformers import AutoProcessor

    from supertrainer.models.mllm import FastMLLM

    model, processor = tiny_vision.model_of("idefics3"), tiny_vision.processor_of("idefics3")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    loaded, reader = FastMLLM.from_pretrained(str(tmp_path / "base"))
    loaded.save_pretrained(tmp_path / "m")
    make_inference_ready(loaded, reader.tokenizer, "mllm").save(tmp_path / "m")
    assert [finding for finding in examine(tmp_path / "m").findings if not finding.passed] == []
    again = AutoProcessor.from_pretrained(tmp_path / "m")
    assert again.image_processor.size == reader.image_processor.size and again.chat_template == reader.chat_template
    with pytest.raises(UserError, match="needs its processor"):
        make_inference_ready(model, processor.tokenizer, "mllm")


# ---- what repairs must not do, and what loads without a word ---------------------------------------------------


def test_no_stop_token_is_made_up_from_an_empty_tokenizer(llm):
    """transformers makes a tokenizer without words where tokenizer.json is missing, and says nothing."""
    (llm / "tokenizer.json").unlink()
    edit("tokenizer_config.json", tokenizer_class="LlamaTokenizer")(llm)
    assert len(AutoTokenizer.from_pretrained(llm)) < 10, "transformers still makes one of nothing"
    before = tree(llm)
    seen = examine(llm, fix=True)
    assert [finding.name for finding in seen.wrong] == ["the tokenizer can be loaded"] and "no vocabulary" in seen.wrong[0].found
    assert tree(llm) == before


def test_an_adapter_beside_merged_weights_is_found(llm):
    model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**TINY)), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(llm, save_embedding_layers=False)
    assert "no adapter beside the weights" in {finding.name for finding in examine(llm).wrong}


def test_a_generation_config_without_an_end_counts_alone(llm):
    """generate() does not fall back to config.json where generation_config.json is there."""
    good = answers(llm)
    edit("generation_config.json", eos_token_id=None)(llm)
    edit("config.json", eos_token_id=1)(llm)
    assert [finding.name for finding in examine(llm).wrong] == ["generation stops at the end of a turn"]
    assert examine(llm, fix=True).passed and answers(llm) == good


def test_a_snapshot_in_the_cache_is_not_repaired_by_its_path(llm, tmp_path):
    edit("tokenizer_config.json", padding_side="right")(llm)
    snapshot = tmp_path / "models--me--name" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    llm.rename(snapshot)
    before = tree(snapshot)
    seen = examine(snapshot, fix=True)
    assert not seen.passed and tree(snapshot) == before and "hf download me/name" in seen.text()


def test_no_name_is_no_folder(in_tmp):
    with pytest.raises(UserError):
        examine("")
