"""`supertrainer export` as somebody types it who has not read the code: each mistake, each kind of model, each line of the card."""

import json
import os
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from test_ship import SMALL, TEXTS
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from supertrainer.cli import main
from supertrainer.export import ship
from supertrainer.export.gguf.modelfile import for_ollama, modelfile
from supertrainer.models.llm import FastLLM
from supertrainer.runtime import UserError, human_mb


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A tiny float32 model whose weights bfloat16 cannot hold."""
    model, tokenizer = FastLLM.from_pretrained("tiny_llama", texts=TEXTS, config=SMALL)
    folder = tmp_path_factory.mktemp("exact") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "topics"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(
        vocab_size=25, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
        id2label={0: "warm", 1: "cold", 2: "dry"}, label2id={"warm": 0, "cold": 1, "dry": 2})).save_pretrained(folder)
    return folder


def says(capsys, *words):
    """Return what a refused command says."""
    capsys.readouterr()
    assert main(list(words)) == 2
    return capsys.readouterr().err


def weights(folder):
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def on_hub(hub, folder, repo_id, readme=""):
    client = HfApi(endpoint=hub.url)
    client.create_repo(repo_id, private=True)
    if readme:
        client.upload_file(path_or_fileobj=readme.encode(), path_in_repo="README.md", repo_id=repo_id)
    client.upload_folder(folder_path=folder, repo_id=repo_id)


def test_a_float32_model_of_the_hub_keeps_its_digits(hub, exact, in_tmp):
    on_hub(hub, exact, "me/exact")
    assert main(["export", "model.path=me/exact", "folder=back", "--gguf", "f32", "prove=false"]) == 0
    before, after = weights(exact), weights("back")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert main(["export", "model.path=back/exact-F32.gguf", "folder=again"]) == 0
    assert all(torch.equal(tensor, weights("again")[name]) for name, tensor in before.items() if "q_proj" not in name and "k_proj" not in name)
    assert main(["export", "model.path=me/exact", "folder=half", "dtype=float16"]) == 0
    assert all(torch.equal(tensor.half(), weights("half")[name]) for name, tensor in before.items())


def test_an_adapter_is_merged_in_the_number_type_of_its_base(exact, in_tmp):
    model, tokenizer = FastLLM.from_pretrained(str(exact))
    model = FastLLM.get_peft_model(model, r=2, target_modules="all-linear")
    model.save_pretrained_merged("adapter", tokenizer, save_method="lora")
    assert main(["export", "model.path=adapter", "folder=merged"]) == 0
    assert json.loads(Path("merged/config.json").read_text())["dtype"] == "float32"
    assert all(torch.equal(tensor, weights("merged")[name]) for name, tensor in weights(exact).items())


def test_an_adapter_of_the_hub_is_merged_under_its_name(hub, exact, in_tmp):
    on_hub(hub, exact, "me/base")
    model, _ = FastLLM.from_pretrained("me/base", dtype="float32")
    FastLLM.get_peft_model(model, r=2, target_modules="all-linear").push_adapter("me/adapter", license="mit")
    assert main(["export", "model.path=me/adapter", "folder=merged"]) == 0
    assert all(torch.equal(tensor, weights("merged")[name]) for name, tensor in weights(exact).items())


def test_licence_and_base_come_from_where_the_model_was_loaded(hub, exact, in_tmp, monkeypatch):
    on_hub(hub, exact, "me/base", "---\nlicense: cc-by-4.0\n---\n# base\n")
    model, tokenizer = FastLLM.from_pretrained("me/base", dtype="float32")
    model = FastLLM.get_peft_model(model, r=2, target_modules="all-linear")
    done = model.save_to_hub("me/tuned")
    card = hub.files("me/tuned")["README.md"].decode()
    assert "license: cc-by-4.0" in card and "base_model: me/base" in card.replace("base_model:\n- ", "base_model: ")
    assert len(repr(done)) < 300 and "me/tuned" in repr(done)
    model.save_pretrained_merged("adapter", tokenizer, save_method="lora")
    assert main(["export", "model.path=adapter", "--push", "me/merged"]) == 0
    card = hub.files("me/merged")["README.md"].decode()
    assert "license: cc-by-4.0" in card and "me/base" in card
    assert main(["export", "model.path=me/base", "--push", "me/copy"]) == 0
    assert b"license: cc-by-4.0" in hub.files("me/copy")["README.md"]


def test_a_missing_licence_is_asked_for_before_anything_is_made(hub, exact, in_tmp, monkeypatch, capsys):
    monkeypatch.setattr("supertrainer.run.exporting.save_model", lambda *args, **kwargs: pytest.fail("saved in vain"))
    monkeypatch.setattr("supertrainer.export.methods.save_model", lambda *args, **kwargs: pytest.fail("merged in vain"))
    monkeypatch.setattr("supertrainer.export.ship.convert", lambda *args, **kwargs: pytest.fail("converted in vain"))
    said = says(capsys, "export", f"model.path={exact}", "--gguf", "q8_0", "--push", "me/x")
    assert "push.license='apache-2.0'" in said and "True" not in said
    assert "Did you mean 'mit'" in says(capsys, "export", f"model.path={exact}", "--gguf", "q8_0", "--push", "me/x", "push.license=mitt")
    model, _ = FastLLM.from_pretrained(str(exact))
    with pytest.raises(UserError, match="license='apache-2.0'"):
        model.save_to_hub("me/x")
    assert not hub.repos


def test_messages_name_keys_of_the_command_line(hub, exact, in_tmp, capsys):
    words = ["export", f"model.path={exact}", "push.license=mit"]
    assert main([*words, "--push", "me/open", "--public"]) == 0
    said = says(capsys, *words, "--push", "me/open")
    assert "push.public_ok=true and push.private=false" in said
    assert "push.create_pr=true" in says(capsys, *words, "--push", "you/x")
    assert "model.path='./nowhere'" in says(capsys, "export", "model.path=./nowhere", "--gguf", "q8_0")
    assert "set HF_TOKEN" in says(capsys, "export", "model.path=me/nothing", "--gguf", "q8_0")


@pytest.mark.parametrize("words, said", [
    (["--gguf", "q4_k_m", "q8_0"], "--gguf q4_k_m,q8_0"),
    (["MODEL", "--gguf", "q8_0"], "write model.path=MODEL"),
    (["model.path=tiny_llama", "--gguf", "q8_0"], "random weights"),
    (["model.path=MODEL", "--gguf", "q2_k", "importance.path=nowhere.txt"], "nowhere.txt is no file"),
    (["model.path=PARENT", "--gguf", "q8_0"], "Models in it: "),
    (["model.path=MODEL", "--gguf", ","], "Nothing to export"),
    (["model.path=MODEL", "folder=notes"], "holds no model"),
    (["model.path=MODEL", "folder=notes/a.txt"], "is a file"),
    (["model.path=MODEL", "folder=notes/a.txt/model"], "is a file, so there can be no folder"),
    (["model.path=MODEL", "folder=locked/model"], "no right to"),
    (["model.path=LOCKED", "--gguf", "q8_0"], "no right to"),
])  # fmt: skip
def test_mistakes_are_said_before_a_model_is_loaded(exact, in_tmp, capsys, monkeypatch, words, said):
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("mine")
    Path("locked").mkdir()
    shutil.copytree(exact, "full")
    can = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name not in ("locked", "full") and can(path, mode))  # root may anything
    for name in ("run.exporting.load_finished", "run.exporting.save_model", "export.ship.convert"):
        monkeypatch.setattr(f"supertrainer.{name}", lambda *args, **kwargs: pytest.fail("loaded in vain"))
    places = {"MODEL": str(exact), "PARENT": str(exact.parent), "LOCKED": "full"}

    def put(text):
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    assert put(said) in says(capsys, "export", *map(put, words))
    assert {path.name for path in Path().iterdir()} == {"notes", "locked", "full"}


def test_types_may_be_given_in_any_way_they_are_written(exact, in_tmp):
    assert main(["export", f"model.path={exact}", "folder=with space/my model", "--gguf", "q8_0, f16,", "--gguf", "q8_0", "prove=false"]) == 0
    made = {path.name for path in Path("with space/my model").glob("*.gguf")}
    assert made == {"tiny-Q8_0.gguf", "tiny-F16.gguf"}


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    said = capsys.readouterr().out
    for word in ("push.license=null", "importance.path=null", "dtype=auto", "folder=null", "prove=true", "model.path=runs/my-run --gguf"):
        assert word in said, word


def test_a_classifier_is_not_sent_to_ollama(hub, classifier, in_tmp):
    assert main(["export", f"model.path={classifier}", "folder=out", "--gguf", "q8_0", "--push", "me/topics", "push.license=mit"]) == 0
    there = hub.files("me/topics")
    card = there["README.md"].decode()
    assert "topics-Q8_0.gguf" in there and "Modelfile" not in there and not Path("out/Modelfile").exists()
    assert "ollama" not in card.lower() and "llama-server" not in card
    assert 'llama-embedding -hf me/topics:Q8_0 --embd-normalize -1 -p "The meeting is on Monday."' in card
    held = gguf.GGUFReader("out/topics-Q8_0.gguf").fields
    assert held["bert.classifier.output_labels"].contents() == ["warm", "cold", "dry"] and not for_ollama(classifier)


def test_an_encoder_gives_vectors_in_ollama(classifier, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(classifier, folder)
    BertForSequenceClassification.from_pretrained(folder).bert.save_pretrained(folder)
    text = modelfile("x.gguf", folder)
    assert for_ollama(folder) and "vectors" in text and "TEMPLATE" not in text and "stop" not in text


@pytest.mark.parametrize("words", [["--gguf", "q8_0,q4_k_m"]])
def test_a_vision_model_has_its_projector_everywhere(hub, in_tmp, words):
    run = ["train", "+experiment=train_mllm", "mode=sanity_check", "run.dir=run"]
    assert main(run) == 0
    assert main(["export", "model.path=run", *words, "--push", "me/eyes", "push.license=mit"]) == 0
    there = hub.files("me/eyes")
    assert {"mmproj-eyes-F16.gguf", "eyes-Q8_0.gguf", "eyes-Q4_K_M.gguf", "Modelfile"} <= set(there)
    for text in (there["Modelfile"].decode(), Path("run/Modelfile").read_text()):
        assert [line for line in text.splitlines() if line.startswith("FROM")] == ["FROM ./eyes-Q8_0.gguf", "FROM ./mmproj-eyes-F16.gguf"]
    limits = there["README.md"].decode().partition("## Limits")[2]
    assert "llama.cpp shows an image of this family twice" in limits


def test_what_is_left_is_said_shortly():
    assert repr(ship.Shipped(Path("a"))) == "checks   0 passed\nfolder   a"
    assert [human_mb(size) for size in (0, 0.0004, 0.178, 1.51, 9.96, 64, 1500)] == ["0 MB", "0 kB", "178 kB", "1.5 MB", "10 MB", "64 MB", "1.5 GB"]
