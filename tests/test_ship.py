"""From a model in memory, a run folder or the command line to a repository that a fresh process loads and runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import environment_of
from huggingface_hub import HfApi

from supertrainer.cli import main
from supertrainer.config import compose
from supertrainer.export import ship
from supertrainer.export.adapters import pull_adapter
from supertrainer.models.base import FastModel, info
from supertrainer.models.llm import FastLLM
from supertrainer.run import export
from supertrainer.runtime import UserError

TEXTS = ["What does `textwrap.dedent` do?", "Remove any common leading whitespace from every line in text.",
         "Which digit is this?", "0 1 2 3 4 5 6 7 8 9"] * 4
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


def trained(name="tiny_llama", seed=0, **lora):
    """A tiny chat model with an adapter whose weights have moved, and its tokenizer."""
    model, tokenizer = FastLLM.from_pretrained(name, texts=TEXTS, config=SMALL if name == "tiny_llama" else None, dtype="float32")
    model = FastLLM.get_peft_model(model, r=4, target_modules="all-linear", **lora)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 20)
    return model, tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model in a folder, so that an adapter on it can be found again."""
    model, tokenizer = FastLLM.from_pretrained("tiny_llama", texts=TEXTS, config=SMALL)
    folder = tmp_path_factory.mktemp("base") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def elsewhere(code, hub, cache, *args):
    """Run code in a process of its own that knows the Hub and nothing of ours."""
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300, cwd=cache.parent,
                          env={**os.environ, **environment_of(hub, cache), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


GENERATE = """
import json, sys, torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
ids = tokenizer.apply_chat_template([{"role": "user", "content": "Which digit is this?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    logits = model(**ids).logits[0, -1].float()
print(json.dumps({"answer": model.generate(**ids, max_new_tokens=5)[0].tolist(), "logits": logits.tolist(),
                  "side": tokenizer.padding_side, "cache": model.config.use_cache, "quant": hasattr(model.config, "quantization_config")}))
"""


def test_a_model_in_memory_becomes_a_private_repository_that_runs(hub, base, tmp_path):
    model, tokenizer = trained(base)
    done = model.save_to_hub("me/first", license="mit", tags=["mine"], gguf=["q8_0"])
    there = hub.files("me/first")
    assert hub.repos["me/first"].private and len(hub.repos["me/first"].messages) == 2  # made, and one commit
    assert {"model.safetensors", "tokenizer.json", "config.json", "generation_config.json", "README.md", "first-Q8_0.gguf",
            "Modelfile"} <= set(there)
    assert all(check.passed for check in done.checks) and len(done.checks) > 10
    card = there["README.md"].decode()
    assert "license: mit" in card and "first-Q8_0.gguf" in card and "mine" in card and str(Path.home()) not in card
    seen = elsewhere(GENERATE, hub, tmp_path / "fresh", "me/first")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Which digit is this?"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    with torch.no_grad():
        wanted = model.eval()(**ids).logits[0, -1].float()
    assert (torch.tensor(seen["logits"]) - wanted).abs().max() < 1e-3
    assert seen["side"] == "left" and seen["cache"] and not seen["quant"]


def test_what_would_stop_it_is_said_before_anything_is_merged(hub, base, monkeypatch):
    model, _ = trained(base)
    monkeypatch.setattr("supertrainer.export.methods.save_model", lambda *args, **kwargs: pytest.fail("merged in vain"))
    with pytest.raises(UserError, match="Did you mean"):
        model.save_to_hub("me/x", gguf=["q8_1"])
    monkeypatch.setenv("HF_TOKEN", "me-reads")
    with pytest.raises(UserError, match="may only read"):
        model.save_to_hub("me/x")
    assert not hub.repos


def test_an_unknown_licence_is_asked_for_and_nothing_is_uploaded(hub, base):
    model, _ = trained(base)
    with pytest.raises(UserError, match="license='apache-2.0'"):
        model.save_to_hub("me/x")
    assert not hub.repos and not hub.received


def test_a_secret_stops_a_push(hub, base, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(base, folder)
    (folder / "notes.txt").write_text("token = " + "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH")
    with pytest.raises(UserError, match="notes.txt"):
        ship.push(folder, "me/x", license="mit")
    assert not hub.received


def test_an_address_that_is_meant_to_be_public_can_be_allowed(hub, base, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(base, folder)
    (folder / "CONTACT.txt").write_text("erika" + "@acme.com")
    with pytest.raises(UserError, match="allow=") as refused:
        ship.push(folder, "me/x", license="mit")
    name = str(refused.value).split("allow=['")[1].split("'")[0]
    cfg = compose("export", f"model.path={folder}", "push.repo_id=me/x", "push.license=mit", f"push.allow=['{name}']")
    assert export(cfg).pushed.commit and "CONTACT.txt" in hub.files("me/x")


def test_words_on_the_card_of_the_repository_are_kept(hub, base, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    model, _ = trained(base)
    model.save_to_hub("me/x", license="mit")
    hub.fail("HEAD", "README.md", times=99, status=503)
    with pytest.raises(UserError, match="did not say whether"):
        model.save_to_hub("me/x", license="mit")
    hub.faults.clear()
    text = hub.files("me/x")["README.md"] + b"\nA line by hand.\n"
    HfApi(endpoint=hub.url).upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id="me/x")
    model.save_to_hub("me/x", license="mit")
    assert b"A line by hand." in hub.files("me/x")["README.md"]


def test_unsloths_names_do_the_same(hub, base, tmp_path, in_tmp):
    model, tokenizer = trained(base)
    model.push_to_hub_merged("me/merged", tokenizer, save_method="merged_16bit", token="me-writes", license="mit")
    assert "model.safetensors" in hub.files("me/merged") and hub.repos["me/merged"].private
    model.push_to_hub_gguf("me/files", tokenizer, quantization_method=["q8_0", "f16"], license="mit")
    there = set(hub.files("me/files"))
    assert {"files-Q8_0.gguf", "files-F16.gguf"} <= there and "model.safetensors" not in there
    files = model.save_pretrained_gguf("out", tokenizer, quantization_method="not_quantized")
    assert [path.read_bytes()[:4] for path in files] == [b"GGUF"] and files[0].parent.name == "out"
    assert model.save_gguf("one.gguf", "q4_0") == [Path("one.gguf")]
    assert sorted(path.name for path in Path().iterdir() if path.is_file()) == ["one.Modelfile", "one.gguf"]
    for call, said in ((lambda: model.push_to_hub_merged("me/x", save_method="gguf"), "merged_16bit"),
                       (lambda: model.push_to_hub_gguf("me/x", tokenizr=1), "tokenizr"),
                       (lambda: model.save_pretrained_gguf("x", safe_serialization=False), "safe_serialization"),
                       (lambda: model.save_gguf("x.gguf", ["q8_0", "f16"]), "Give a folder"),
                       (lambda: model.save_gguf("x", merge_bse="original"), "Did you mean 'merge_base'"),
                       (lambda: model.save_to_hub("me/x", licence="mit"), "Did you mean 'license'"),
                       (lambda: model.push_adapter("me/x", base_modl="me/base"), "Did you mean 'base_model'"),
                       (lambda: model.push_to_hub_merged("me/x", maximum_memory_usage=7), "maximum_memory_usage=7"),
                       (lambda: model.push_to_hub_merged("me/x", save_method="merged_4bit", gguf=["q8_0"]), "16-bit weights")):
        with pytest.raises(UserError, match=said):
            call()
    with pytest.raises(UserError, match="token=") as refused:
        model.save_pretrained_gguf("x", token="hf_secret")
    assert "hf_secret" not in str(refused.value)


def test_a_name_without_an_owner_is_the_accounts_own(hub, base):
    """The README that people wrote is looked for where the push goes, not at a repository of the bare name."""
    model, _ = trained(base)
    model.save_to_hub("bare", license="mit")
    text = hub.files("me/bare")["README.md"] + b"\nA line by hand.\n"
    HfApi(endpoint=hub.url).upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id="me/bare")
    ship.push(base, "bare", license="mit")
    card = hub.files("me/bare")["README.md"].decode()
    assert "A line by hand." in card and 'from_pretrained("me/bare")' in card and 'from_pretrained("bare")' not in card
    model.push_adapter("alone", license="mit", base_model="me/base")
    assert '"me/alone"' in hub.files("me/alone")["README.md"].decode()


def test_importance_is_gathered_from_words(base, in_tmp):
    model, tokenizer = trained(base)
    plain, = model.save_gguf("plain.gguf", "q2_k", prove=False)
    weighted, = model.save_gguf("weighted.gguf", "q2_k", prove=False, importance=[TEXTS[0], [{"role": "user", "content": TEXTS[1]}]])
    assert plain.stat().st_size == weighted.stat().st_size and plain.read_bytes() != weighted.read_bytes()


def test_an_adapter_alone_knows_its_base(hub, base, tmp_path):
    model, _ = trained(base)
    with pytest.raises(UserError, match="base_model="):
        model.push_adapter("me/adapter", license="mit")
    model.push_adapter("me/adapter", license="mit", base_model="me/base")
    there = hub.files("me/adapter")
    assert "adapter_model.safetensors" in there and "model.safetensors" not in there
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    right, _ = FastModel.from_pretrained(base, dtype="float32")
    adapted, _ = pull_adapter("me/adapter", right)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert (adapted.eval()(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max() < 1e-4
    torch.manual_seed(7)
    wrong, _ = FastLLM.from_pretrained("tiny_llama", texts=TEXTS, config=SMALL, seed=7)
    with pytest.raises(UserError, match="was trained on me/base"):
        pull_adapter("me/adapter", wrong)


def test_a_run_is_exported_from_the_command_line_and_runs_elsewhere(hub, tmp_path, in_tmp, capsys):
    words = ["train", "+experiment=train_llm", "model=tiny_llama", "mode=toy", "run.dir=run"]
    assert main(words) == 0
    assert main(["export", "model.path=run", "--gguf", "q8_0", "--push", "me/demo", "push.license=mit"]) == 0
    said = capsys.readouterr().out
    assert "demo-Q8_0.gguf" in said and "/me/demo" in said
    there = hub.files("me/demo")
    assert {"demo-Q8_0.gguf", "training_config.yaml", "README.md"} <= set(there) and Path("run/demo-Q8_0.gguf").is_file()
    assert b"held" in there["README.md"]
    assert elsewhere(GENERATE, hub, tmp_path / "fresh", "me/demo")["answer"]


def test_a_push_that_cannot_be_is_said_before_training(hub, in_tmp, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "me-reads")
    words = ["train", "+experiment=train_llm", "model=tiny_llama", "mode=toy", "run.dir=run"]
    assert main([*words, "export.push.repo_id=me/x"]) == 2 and "may only read" in capsys.readouterr().err
    assert main([*words, "export.gguf=[q8_2]"]) == 2 and "q8_2" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "me-writes")
    assert main([*words, "export.push.repo_id=me/x"]) == 2 and "license" in capsys.readouterr().err  # nobody's base
    assert not Path("run").exists() and not hub.repos


def test_training_ends_on_the_hub_when_that_is_asked(hub, in_tmp):
    from supertrainer.run import train

    run = train(compose("train_llm", "model=tiny_llama", "mode=toy", "run.dir=run", "export.gguf=[q8_0]",
                        "export.push.repo_id=me/trained", "export.push.license=mit"))
    assert {"model.safetensors", "trained-Q8_0.gguf"} <= set(hub.files("me/trained"))
    assert run.results["pushed"]["url"].endswith("me/trained") and info(run.model).run == run.dir
    assert any("repository" in check.name for check in run.checks)


def test_an_export_of_nothing_says_what_could_be(in_tmp):
    with pytest.raises(UserError, match="Nothing to export"):
        export(compose("export", "model.path=tiny_llama"))
