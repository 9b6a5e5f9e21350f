"""What two reviews found in shipping: each case here went wrong once."""

import json
import os
import shutil
import tempfile

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import TINY, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from supertrainer import FastLLM
from supertrainer.chat import CHATML_TEMPLATE
from supertrainer.check import CheckFailed
from supertrainer.export.contract import check_contract, make_inference_ready
from supertrainer.export.doctor import examine
from supertrainer.export.folder import appear_whole
from supertrainer.export.gguf.architectures import plan
from supertrainer.export.gguf.convert import convert, read_back
from supertrainer.export.gguf.importance import gather_importance, importance_of
from supertrainer.export.gguf.proof import prove_gguf
from supertrainer.export.merge import save_model
from supertrainer.export.ship import staged
from supertrainer.export.weights import ModelWeights
from supertrainer.models.builtin import train_byte_bpe, train_wordpiece
from supertrainer.models.gguf import read_gguf
from supertrainer.models.gguf_file import GgufFile
from supertrainer.models.gguf_tokenizers import read_tokenizer
from supertrainer.runtime import UserError


@pytest.fixture
def llm(tmp_path):
    torch.manual_seed(0)
    folder, model = tmp_path / "llm", LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.3}))
    model.save_pretrained(folder)
    make_inference_ready(model, make_tokenizer(), "llm").save(folder)
    return folder


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def wrong(folder, **options):
    return {finding.name for finding in examine(folder, **options).findings if not finding.passed and finding.level == "wrong"}


# ---- saving


@pytest.mark.parametrize("method", ["lora", "merged_16bit"])
def test_a_save_over_the_folder_of_its_own_base_is_refused(llm, method):
    before = {path.name: path.read_bytes() for path in llm.iterdir()}
    model, tokenizer = FastLLM.from_pretrained(str(llm), max_seq_length=64)
    model = FastLLM.get_peft_model(model, r=4, target_modules=["q_proj"])
    with pytest.raises(UserError, match="holds the base of this adapter"):
        model.save_pretrained_merged(str(llm), tokenizer, save_method=method)
    assert {path.name: path.read_bytes() for path in llm.iterdir()} == before


def test_people_s_files_stay_in_a_folder_that_is_saved_into(tmp_path):
    theirs = ("optimizer.pt", "trainer_state.json", "requirements.txt", "train.json", "results.json", "rng_state.pth", "notes.md")
    for name in ("config.json", "model.safetensors", "tokenizer.json", *theirs):
        (tmp_path / name).write_text(name)
    with appear_whole(tmp_path) as hidden:
        (hidden / "config.json").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", *theirs} and (tmp_path / "config.json").read_text() == "new"


@pytest.mark.parametrize("dtype", ["bf16", "load", torch.int8])
def test_a_type_that_is_none_to_save_in_is_refused(tmp_path, dtype):
    with pytest.raises(UserError, match="a model is saved in float32"):
        save_model(LlamaForCausalLM(LlamaConfig(**TINY)), make_tokenizer(), tmp_path / "x", family="llm", dtype=dtype)


def test_a_check_that_the_system_killed_says_what_that_means(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif any('reload.py' in word for word in sys.orig_argv): os.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(CheckFailed, match="killed by signal 9; 9 mostly means that the memory"):
        save_model(LlamaForCausalLM(LlamaConfig(**TINY)).eval(), make_tokenizer(), tmp_path / "x", family="llm")


# ---- the doctor


def test_old_buffers_make_no_model_quantised(tmp_path):
    """GPT-NeoX checkpoints of old hold masks; while they counted as quantised, a missing weight was not seen."""
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**TINY, eos_token_id=0, pad_token_id=3)).half()
    model.save_pretrained(tmp_path)
    make_inference_ready(model, make_tokenizer(), "llm").save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        tensors[f"gpt_neox.layers.{layer}.attention.bias"] = torch.tril(torch.ones(1, 1, 64, 64, dtype=torch.bool))
        tensors[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9).half()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert not wrong(tmp_path)
    del tensors["gpt_neox.layers.0.attention.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert wrong(tmp_path) == {"weights are complete for the architecture"}


def test_an_adapter_on_experts_is_in_order(tmp_path):
    base = MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", target_parameters=[
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path)
    assert not wrong(tmp_path)


def test_pickles_on_the_hub_are_seen_without_being_downloaded(hub, llm):
    hub.make("me/name", {**{path.name: path.read_bytes() for path in llm.iterdir()}, "pytorch_model.bin": b"x"})
    assert "no pickled files" in {finding.name for finding in examine("me/name").findings if not finding.passed}


def test_the_length_that_a_save_writes_is_the_one_the_model_serves(tmp_path):
    model = RobertaForSequenceClassification(RobertaConfig(**{**TINY, "max_position_embeddings": 66}, num_labels=2, pad_token_id=1, type_vocab_size=1))
    tokenizer = make_tokenizer(chat=False)
    ready = make_inference_ready(model, tokenizer, "bert", ["a", "b"])
    model.save_pretrained(tmp_path / "roberta")
    ready.save(tmp_path / "roberta")
    positions = 66 - ready.config.pad_token_id - 1  # RoBERTa counts from behind the pad token
    assert AutoTokenizer.from_pretrained(tmp_path / "roberta").model_max_length == positions
    assert all(check.passed for check in check_contract(tmp_path / "roberta", "bert")) and not wrong(tmp_path / "roberta")
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    model, tokenizer = Qwen2ForCausalLM(Qwen2Config(**TINY, num_key_value_heads=2, rope_parameters=rope)), make_tokenizer()
    tokenizer.model_max_length = 256
    assert make_inference_ready(model, tokenizer, "llm").tokenizer.model_max_length == 256


def test_no_copy_from_before_a_repair_goes_up(llm):
    for _ in range(2):
        edit(llm / "config.json", _name_or_path="/data/me/secret/run")
        examine(llm, fix=True)
    assert len(list(llm.glob("*before-doctor*"))) == 2
    with staged(llm) as desk:
        assert not list(desk.glob("*before-doctor*"))


def test_a_mend_that_stumbles_keeps_the_others(llm):
    (llm / "generation_config.json").write_text("{broken")
    edit(llm / "config.json", use_cache=False)
    edit(llm / "tokenizer_config.json", padding_side="right")
    seen = examine(llm, fix=True)
    assert {"no training settings left", "padding is on the side this model needs"} <= {f.name for f in seen.findings if f.repaired}
    assert "originals are kept" in seen.hint


def test_a_repair_reads_no_weight_twice(llm, monkeypatch):
    edit(llm / "config.json", use_cache=False)
    read, load = [], ModelWeights.load
    monkeypatch.setattr(ModelWeights, "load", lambda self, name: read.append(name) or load(self, name))
    examine(llm, fix=True)
    assert read and max(map(read.count, read)) <= 2


def test_of_several_paths_those_that_can_go_are_taken_out(llm):
    edit(llm / "config.json", _name_or_path="/data/me/x", data_dir="/data/secret")
    examine(llm, fix=True)
    assert "_name_or_path" not in json.loads((llm / "config.json").read_text())


@pytest.mark.parametrize("text", ["{}", "[", '{"weight_map": []}'])
def test_an_index_that_says_nothing_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="does not say which file holds which weight"):
        ModelWeights(tmp_path)


def test_a_damaged_header_is_named_and_no_tensor_is_no_model(llm):
    save_file({}, llm / "model.safetensors")
    assert "weight files are there and whole" in wrong(llm)
    (llm / "model.safetensors").write_bytes((10).to_bytes(8, "little") + b"\xff" * 10)
    with pytest.raises(UserError, match="damaged"):
        ModelWeights(llm)


# ---- GGUF


@pytest.fixture
def decoder(tmp_path):
    torch.manual_seed(0)
    tokenizer = train_byte_bpe(["the quick brown fox jumps over the lazy dog"] * 4, 300)
    tokenizer.chat_template = CHATML_TEMPLATE
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
                                 initializer_range=0.2, tie_word_embeddings=False)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def file(decoder, tmp_path):
    return convert(decoder, tmp_path / "x.gguf", "q8_0", progress=False)


def test_a_file_with_nan_fails_its_proof_and_crashes_nothing(decoder, file):
    reader = gguf.GGUFReader(file)
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
    raw = bytearray(file.read_bytes())
    raw[int(tensor.data_offset):int(tensor.data_offset) + 2] = np.float16("nan").tobytes()
    del reader, tensor
    file.write_bytes(raw)
    assert [check.passed for check in read_back(file, plan(decoder)) if check.name == "gguf values"] == [False]
    assert not all(check.passed for check in prove_gguf(file, decoder, "q8_0"))


def test_a_peaked_model_has_a_perplexity(decoder, tmp_path):
    pytest.importorskip("xllamacpp")
    model = AutoModelForCausalLM.from_pretrained(decoder)
    with torch.no_grad():
        model.lm_head.weight.mul_(400)
    model.save_pretrained(decoder)
    proof = prove_gguf(convert(decoder, tmp_path / "x.gguf", "f32", progress=False), decoder, "f32", perplexity_rows=[[5, 9, 13, 7, 30]])
    assert all(check.passed for check in proof), [str(check) for check in proof if not check.passed]


def test_a_proof_leaves_nothing_in_the_temporary_folder_however_long_its_name(decoder, file, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    long = tmp_path / ("t" * 90)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert all(check.passed for check in prove_gguf(file, decoder, "q8_0"))
    assert list(long.iterdir()) == []


def test_adapted_experts_have_their_importance(tmp_path):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4))
    model.save_pretrained(tmp_path)
    make_inference_ready(model, make_tokenizer(), "llm").save(tmp_path)
    made, rows = plan(tmp_path), [{"input_ids": torch.randint(0, 60, (1, 32))}]
    plain = gather_importance(model, rows)
    adapted = gather_importance(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=[
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"])), rows)
    experts = [part for part in made.tensors if "exps" in part.name]
    assert len(experts) == 6
    for part in experts:
        torch.testing.assert_close(importance_of(adapted, part.sources, part.shape), importance_of(plain, part.sources, part.shape))


@pytest.mark.parametrize("row", [{"input_ids": [1, 2], "text": "abc"}, ""])
def test_rows_of_an_importance_matrix_that_cannot_be_read(decoder, row):
    model = AutoModelForCausalLM.from_pretrained(decoder)
    with pytest.raises(UserError, match="importance matrix"):
        gather_importance(model, [row], AutoTokenizer.from_pretrained(decoder))


@pytest.mark.parametrize("options", [{"lowercase": True, "strip_accents": False}, {"lowercase": False}, {"lowercase": True}])
def test_a_word_piece_tokenizer_comes_back_with_its_normaliser(tmp_path, options):
    from tokenizers import normalizers

    tokenizer = train_wordpiece(["the quick brown fox, naive cafe"] * 4, 120)
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(**options)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                         pad_token_id=tokenizer.pad_token_id), add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    back = read_tokenizer(GgufFile(convert(tmp_path, tmp_path / "x.gguf", "f32", progress=False)))
    for text in ("naïve café", "The Fox", "THE CAFÉ"):
        assert back(text).input_ids == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids


@pytest.mark.parametrize("metadata", [{"general.x": -1}, {"general.x": 5_000_000_000}])
def test_metadata_that_cannot_be_written_is_named(decoder, tmp_path, metadata):
    with pytest.raises(UserError, match="general.x"):
        convert(decoder, tmp_path / "x.gguf", "f16", progress=False, metadata=metadata)


@pytest.mark.parametrize("metadata", [{"general.tags": ("a", "b")}, {"tokenizer.chat_template": "{{ messages[0].content }}!"}])
def test_metadata_of_ones_own_passes_the_proof(decoder, tmp_path, metadata):
    path = convert(decoder, tmp_path / "x.gguf", "f16", progress=False, metadata=metadata)
    proof = prove_gguf(path, decoder, "f16", metadata=metadata)
    assert all(check.passed for check in proof), [str(check) for check in proof if not check.passed]


@pytest.mark.parametrize("header", ["version: 1.0", "author: [a, b]", "license: 3", "base_model: /data/me/secret/model"])
def test_any_card_can_be_written_into_a_file(decoder, tmp_path, header):
    (decoder / "README.md").write_text(f"---\n{header}\n---\nhello\n")
    assert b"secret" not in convert(decoder, tmp_path / "x.gguf", "f16", progress=False).read_bytes()


def test_a_tokenizer_without_merges_is_refused_by_name(decoder, tmp_path):
    state = json.loads((decoder / "tokenizer.json").read_text())
    state["model"]["merges"] = []
    (decoder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="no merges"):
        convert(decoder, tmp_path / "x.gguf", "f16", progress=False)


def test_files_that_cannot_be_read_say_why(file, tmp_path):
    reader = gguf.GGUFReader(file)
    tensor = reader.tensors[5]
    name, count, raw = tensor.name.encode(), len(tensor.shape), bytearray(file.read_bytes())
    place = raw.find(name) + len(name) + 4 + 8 * count
    assert int.from_bytes(raw[place:place + 4], "little") == int(tensor.tensor_type)
    raw[place:place + 4] = (77).to_bytes(4, "little")
    (tmp_path / "kind.gguf").write_bytes(raw)
    with pytest.raises(UserError, match=r"a type \(77\) that the installed gguf package does not know"):
        GgufFile(tmp_path / "kind.gguf")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="one of 3 parts of a model"):
        read_gguf(tmp_path / "part.gguf")


def test_a_disk_that_fills_in_the_middle_is_told(decoder, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="could not be written: No space left"):
        convert(decoder, tmp_path / "x.gguf", "f16", progress=False)
    assert not list(tmp_path.glob("x.gguf*")) and shutil.disk_usage(tmp_path).free
