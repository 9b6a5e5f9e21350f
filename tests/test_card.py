"""Model cards: every line of code on them runs, a hand-written card keeps its words, a licence is never invented."""

import json
import re
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file

from supertrainer.check import Check
from supertrainer.config import compose
from supertrainer.export import card, usage
from supertrainer.export.card_facts import Base, CardFacts, base_of, facts_of_folder, facts_of_run
from supertrainer.export.card_sections import escaped, limits, wilson
from supertrainer.export.licences import Licence, given_licence, inherited_licence
from supertrainer.export.secrets import scan
from supertrainer.models.builtin import make_config, make_model, make_processor, recipe, train_byte_bpe, train_wordpiece
from supertrainer.runtime import UserError

TEXTS = ["The meeting is on Monday.", "What is the capital of France?", "It rains. The street is wet."] * 4
LABELS = {"id2label": {0: "calm", 1: "glad", 2: "sad"}, "label2id": {"calm": 0, "glad": 1, "sad": 2}}
PROBLEMS = {"classification": "single_label_classification", "multi_label": "multi_label_classification",
            "regression": "regression"}


def encoder(what, folder):
    tokenizer = train_wordpiece(TEXTS, 200)
    values = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                  max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id)
    if what in (*PROBLEMS, "token_tags"):
        values |= LABELS if what != "regression" else {"num_labels": 1}
        values |= {"problem_type": PROBLEMS[what]} if what in PROBLEMS else {}
    auto = getattr(transformers, usage.AUTO_CLASSES[what])
    model = auto.from_config(transformers.BertConfig(**values))
    model.save_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def decoder(what, folder):
    tokenizer = train_byte_bpe(TEXTS, 300)
    if what == "text":
        tokenizer.chat_template = None
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def vision(folder):
    values = recipe("tiny_idefics3")
    processor = make_processor(values, TEXTS)
    make_model("mllm", make_config(values, processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)


def make(what, folder):
    torch.manual_seed(0)
    if what == "vision":
        return vision(folder)
    return decoder(what, folder) if what in ("chat", "text") else encoder(what, folder)


def adapted(what, folder):
    """An adapter's folder; its base lies beside it."""
    base = folder.with_name(f"{folder.name}-base")
    model, tokenizer = make(what, base)
    model.name_or_path = model.config._name_or_path = str(base)
    options = {"chat": {"task_type": "CAUSAL_LM"}, "classification": {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}}
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear" if what == "chat" else ["query", "value"],
                                             **options[what]))
    tuned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


RUNNER = """
import runpy, sys, traceback
failed = []
for file in sys.argv[1:]:
    print("==", file)
    try:
        runpy.run_path(file)
    except Exception:
        failed.append(file); traceback.print_exc()
sys.exit(f"failed: {failed}" if failed else 0)
"""


def run_snippets(folders, tmp_path):
    """Write a card into each folder, take its Python code out, and run all of it in one fresh process."""
    Image.new("RGB", (32, 32), "white").save(tmp_path / "photo.png")
    files = []
    for folder in folders:
        facts = facts_of_folder(folder)
        text = card.write_card(folder, facts, repo_id="me/model", license="mit").read_text()
        codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(codes) == (2 if facts.adapter else 3), text
        for number, code in enumerate(codes):
            file = tmp_path / f"{folder.name}_{number}.py"
            file.write_text(code.replace("me/model", str(folder)))
            files.append(str(file))
    done = subprocess.run([sys.executable, "-c", RUNNER, *files], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return dict(part.split("\n", 1) for part in done.stdout.split("== ")[1:])


def printed(outputs, name):
    return [text for file, text in sorted(outputs.items()) if f"/{name}_" in file]


def test_code_for_encoders_runs(tmp_path):
    kinds = ["classification", "multi_label", "regression", "token_tags", "masked_lm", "embeddings"]
    for what in kinds:
        make(what, tmp_path / what)
        assert facts_of_folder(tmp_path / what).what == what
    outputs = run_snippets([tmp_path / what for what in kinds], tmp_path)
    assert len(outputs) == 18
    short, full, ours = printed(outputs, "classification")
    assert re.search(r"'label': '(calm|glad|sad)'", short) and re.search(r"'(calm|glad|sad)'", ours)
    assert sum(float(line.split()[1]) for line in full.strip().splitlines()) == pytest.approx(1, abs=0.01)
    assert "[1, 32]" in printed(outputs, "embeddings")[1]


def test_code_for_generators_and_adapters_runs(tmp_path):
    for what in ("chat", "text", "vision"):
        make(what, tmp_path / what)
        assert facts_of_folder(tmp_path / what).what == what
    adapted("chat", tmp_path / "chat_adapter")
    adapted("classification", tmp_path / "label_adapter")
    assert facts_of_folder(tmp_path / "label_adapter").labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    outputs = run_snippets([tmp_path / name for name in ("chat", "text", "vision", "chat_adapter", "label_adapter")], tmp_path)
    assert len(outputs) == 13
    short, full, _ = printed(outputs, "text")
    assert short.startswith("The meeting is on") and short == full


def test_conversation_of_the_card_has_the_system_prompt_of_training():
    facts = CardFacts(what="chat", system='Say "yes".')
    for code in (usage.pipeline_code(facts, "me/m"), usage.transformers_code(facts, "me/m")):
        assert json.dumps(usage.chat_messages(facts)) in code
    assert usage.chat_messages(facts)[0] == {"role": "system", "content": 'Say "yes".'}
    compile(usage.supertrainer_code(facts, "me/m"), "card", "exec")


@pytest.mark.parametrize(("files", "repo", "modelfile", "server", "ollama"), [
    (["m-Q4_K_M.gguf"], "me/M", False, "llama-server -hf me/M:Q4_K_M", "ollama run hf.co/me/M:Q4_K_M"),
    (["odd.gguf"], "me/M", False, "llama-server --hf-repo me/M --hf-file odd.gguf", ""),
    (["mmproj-f16.gguf", "m.q8_0.gguf"], None, True, "llama-server -m m.q8_0.gguf --mmproj mmproj-f16.gguf",
     "ollama create m.q8_0 -f Modelfile && ollama run m.q8_0"),
])
def test_lines_for_llama_cpp(files, repo, modelfile, server, ollama):
    assert usage.llama_cpp_code(files, repo, modelfile) == (server, ollama)


# ---- licence


def base_folder(tmp_path, front):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    return base_of(str(tmp_path / "base"))


def test_licence_is_inherited_with_name_and_link(tmp_path):
    base = base_folder(tmp_path, "license: other\nlicense_name: lab\nlicense_link: https://lab.test/l")
    facts = CardFacts(what="chat", base=base)
    (tmp_path / "out").mkdir()
    data = ModelCard.load(card.write_card(tmp_path / "out", facts)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "lab", "https://lab.test/l")
    assert "base_model" not in data.to_dict()  # a folder of one's own is no page on the Hub


def test_relative_licence_link_leads_to_the_base(tmp_path):
    base = base_folder(tmp_path, "license: other\nlicense_name: lab\nlicense_link: LICENSE")
    found = inherited_licence(Base("org/base", "hub", "org/base", path=base.path))
    assert found.link == "https://huggingface.co/org/base/blob/main/LICENSE"


@pytest.mark.parametrize("base", [None, Base("tiny_bert", "built-in"), Base("org/never-fetched", "hub", "org/never-fetched"),
                                  Base("gone", "folder")], ids=["none", "built-in", "hub", "folder"])
def test_unknown_licence_is_asked_for_and_nothing_is_written(tmp_path, base):
    with pytest.raises(UserError, match="license="):
        card.write_card(tmp_path, CardFacts(what="chat", base=base, log=[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]))
    assert not list(tmp_path.iterdir())


def test_hub_base_is_asked_only_when_the_network_is_allowed(tmp_path, monkeypatch):
    (tmp_path / "card.md").write_text("---\nlicense: gemma\n---\n")
    calls = []

    def download(repo_id, name, *, revision, local_files_only, endpoint):
        calls.append((repo_id, name, revision, local_files_only))
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return str(tmp_path / "card.md")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("supertrainer.export.licences.constants.HF_HUB_OFFLINE", False)
    base = Base("org/base", "hub", "org/base", "v1")
    assert inherited_licence(base) is None
    assert inherited_licence(base, network=True).identifier == "gemma"
    assert calls == [("org/base", "README.md", "v1", True), ("org/base", "README.md", "v1", False)]


@pytest.mark.parametrize("value", ["apache2", "unknown", "other", {"license": "mit", "name": "x"}, ""])
def test_a_licence_the_hub_refuses_is_refused_before(value):
    with pytest.raises(UserError):
        given_licence(value)


def test_a_given_licence_wins_over_the_file(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: old\n---\n# Mine\n")
    data = ModelCard.load(card.write_card(tmp_path, CardFacts(what="chat"), license="mit")).data.to_dict()
    assert data["license"] == "mit" and "license_name" not in data


# ---- a card that somebody wrote


FACTS = CardFacts(what="chat", family="llm", base=Base("org/base", "hub", "org/base"), training={"steps": 3},
                  metric={"name": "exact_match", "value": 0.5, "baseline": 0.1}, measured_rows=40,
                  sources=[{"name": "org/data", "hub_id": "org/data"}],
                  checks=[Check("a <|im_end|> | b", True, 0.001, 0.01, "KL mean 2e-9")])
HAND = "---\ntitle: Mine\nlicense: cc-by-4.0\nlanguage: de\ntags: [own]\nbase_model: [org/base, org/other]\n---\n\n# My model\n\nIt is *mine*.\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_hand_written_card_keeps_every_word(tmp_path, end):
    (tmp_path / "README.md").write_bytes(HAND.replace("\n", end).encode())
    path = card.write_card(tmp_path, FACTS, repo_id="me/model", tags=["more"])
    text = path.read_bytes().decode()
    assert f"{end}# My model{end}{end}It is *mine*.{end}{end}{card.BEGIN}{end}" in text
    assert text.count("\n") == text.count(end)
    data = ModelCard.load(path).data.to_dict()
    assert data["license"] == "cc-by-4.0" and data["language"] == "de" and data["title"] == "Mine"
    assert data["tags"] == ["own", "supertrainer", "more"] and data["datasets"] == ["org/data"]
    assert data["base_model"] == ["org/base", "org/other"] and data["base_model_relation"] == "finetune"
    for _ in range(2):
        assert card.write_card(tmp_path, FACTS, repo_id="me/model", tags=["more"]).read_bytes().decode() == text


def test_only_the_marked_section_is_replaced(tmp_path):
    path = card.write_card(tmp_path, FACTS, repo_id="me/model", license="mit")
    path.write_text(path.read_text().replace("# model", "# Another title").replace(card.END, f"{card.END}\n\n## Thanks\n\nTo all."))
    newer = CardFacts(**{**vars(FACTS), "metric": {"name": "exact_match", "value": 0.75}})
    text = card.write_card(tmp_path, newer, repo_id="me/model").read_text()
    assert "# Another title" in text and text.endswith("## Thanks\n\nTo all.\n") and "| exact match | 0.75 |" in text
    assert "0.5 |" not in text and text.count(card.BEGIN) == 1
    [result] = ModelCard.load(path).data.eval_results
    assert result.metric_value == 0.75 and result.metric_type == "exact_match" and result.dataset_type == "org/data"


@pytest.mark.parametrize("body", [f"# A\n{card.BEGIN}\n", f"{card.END}\n{card.BEGIN}", f"{card.BEGIN}{card.END}" * 2])
def test_broken_marks_are_an_error_and_nothing_changes(tmp_path, body):
    (tmp_path / "README.md").write_text(body)
    with pytest.raises(UserError, match="marks"):
        card.write_card(tmp_path, FACTS, license="mit")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"] and (tmp_path / "README.md").read_text() == body


def test_broken_front_matter_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n# A\n")
    with pytest.raises(UserError, match="YAML"):
        card.write_card(tmp_path, FACTS, license="mit")


def test_form_left_by_peft_is_not_taken_for_somebodys_words(tmp_path):
    adapted("chat", tmp_path / "adapter")
    assert str(tmp_path) in (tmp_path / "adapter" / "README.md").read_text()  # the base, by its path
    text = card.write_card(tmp_path / "adapter", facts_of_folder(tmp_path / "adapter"), license="mit").read_text()
    assert "More Information Needed" not in text and str(tmp_path) not in text
    assert "library_name: peft" in text and "adapter" in text


def test_a_form_that_somebody_began_to_fill_in_is_theirs(tmp_path):
    ModelCard.from_template(huggingface_hub.ModelCardData(), model_description="I wrote this by hand.", developers="Erika").save(
        tmp_path / "README.md")
    text = card.write_card(tmp_path, FACTS, license="mit").read_text()
    assert "I wrote this by hand." in text and "Erika" in text


def test_what_an_earlier_call_wrote_is_not_the_authors_word(tmp_path):
    """An adapter's card becomes that of a merged model on another base: nothing of the first base stays, what people wrote does."""
    first = CardFacts(what="chat", family="llm", adapter=True, base=Base("org/base", "hub", "org/base"), lora={"rank": 4},
                      sources=[{"name": "org/old", "hub_id": "org/old"}])
    (tmp_path / "README.md").write_text("---\ntags: [own]\ntitle: Mine\n---\n# A\n")
    card.write_card(tmp_path, first, license="apache-2.0")
    card.write_card(tmp_path, FACTS, repo_id="me/model", license="mit")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["library_name"] == "transformers" and data["datasets"] == ["org/data"] and data["title"] == "Mine"
    assert "own" in data["tags"] and "lora" not in data["tags"] and data["license"] == "mit"


@pytest.mark.parametrize("system", ["You are terse.\nAnswer.", 'say "hi" \\ there', "Cost in ${currency}", "It's [1, 2]: {x}"])
def test_the_system_prompt_of_the_cards_code_arrives_as_it_was(system):
    code = usage.supertrainer_code(CardFacts(what="chat", family="llm", system=system), "me/model")
    line = next(line for line in code.splitlines() if line.startswith("cfg = "))
    scope = {"compose": compose}
    exec(line, scope)
    assert scope["cfg"].system == system


@pytest.mark.parametrize("status", [401, 503])
def test_a_licence_that_could_not_be_asked_for_is_not_called_missing(hub, monkeypatch, status):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.make("me/base", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    hub.fail("HEAD", "README.md", times=99, status=status)
    with pytest.raises(UserError, match="could not be read"):
        inherited_licence(Base("me/base", "hub", "me/base"), network=True)
    hub.faults.clear()
    assert inherited_licence(Base("me/base", "hub", "me/base"), network=True).identifier == "apache-2.0"


def test_weights_in_four_bits_count_as_weights(tmp_path):
    packed = {"a.weight": torch.zeros(2048, 1, dtype=torch.uint8), "a.weight.absmax": torch.zeros(64),
              "a.weight.quant_map": torch.zeros(16), "b.weight": torch.zeros(640, dtype=torch.bfloat16)}
    save_file(packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    assert facts_of_folder(tmp_path).parameters == 4096 + 640


def test_new_results_stand_beside_those_of_other_models(tmp_path):
    other = {"name": "other", "results": [{"task": {"type": "text-generation"}, "dataset": {"type": "d", "name": "d"},
                                           "metrics": [{"type": "f1", "value": 1}]}]}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'license': 'mit', 'model-index': [other]})}---\n# A\n")
    card.write_card(tmp_path, FACTS, repo_id="me/model")
    index = card.front_matter(tmp_path / "README.md")["model-index"]
    assert [entry["name"] for entry in index] == ["other", "model"] and index[0] == other


# ---- facts


def write_run(folder, **changes):
    """A run folder as `train` leaves it, with a home path wherever one could be."""
    home = "/home/" + "erika"
    config = {"family": "llm", "experiment": "demo", "mode": "full", "seed": 1, "run": {"root": f"{home}/runs"},
              "model": {"name": f"{home}/models/base", "lora": {"r": 8, "lora_alpha": 16}},
              "dataset": {"path": f"{home}/data/mine.jsonl", "system": None, "max_length": 64},
              "trainer": {"training_kwargs": {"learning_rate": 1e-4, "per_device_train_batch_size": 2,
                                              "gradient_accumulation_steps": 4, "hub_token": "hf_" + "a1B2c3D4" * 5}},
              "benchmark": {"rows": 20}}
    results = {"metric": {"name": "exact_match", "value": 0.25, "baseline": 0.5, "baseline_name": "always 'x'"},
               "facts": {"steps": 7}, "warnings": [f"rows of {home}/data/mine.jsonl were cut"],
               "seconds": {"training": 12.0}, "training_memory_mb": 100.0, **changes}
    environment = {"cpu": "a processor", "cores": 2, "python": "3.11", "gpus": [], "packages": {"torch": "2.13"},
                   "data": {"sources": [{"path": f"{home}/data/mine.jsonl", "sha256": "ab" * 32}], "rows": {"train": 90, "eval": 30}},
                   "model": {"name": f"{home}/models/base", "source": "folder"}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "epoch": i / 5, "loss": 2 / i}) + "\n" for i in (1, 2, 3)) + '{"st')
    (folder / "checks.jsonl").write_text(json.dumps({"name": "merged as trained", "passed": True, "measured": 1e-9, "limit": 1e-3,
                                                     "detail": "KL mean 1.7e-11"}) + "\n")
    make("chat", folder / "model")


def test_a_run_becomes_a_card_without_its_owner(tmp_path):
    write_run(tmp_path / "run")
    facts = facts_of_run(tmp_path / "run")
    assert facts.base.name == "base" and facts.rows == {"train": 90, "eval": 30} and facts.measured_rows == 20
    assert facts.training["rows per step"] == "8 (2 × 4)" and facts.training["epochs"] == 0.6 and facts.lora["rank"] == 8
    folder = tmp_path / "run" / "model"
    text = card.write_card(folder, facts, repo_id="me/demo", license="mit").read_text()
    for shown in ("mine.jsonl", "KL mean 1.7e-11", "always 'x'", "no better than the baseline", "training_loss.png", "12 s",
                  "merged into its weights", "a processor"):
        assert shown in text, shown
    assert Image.open(folder / "training_loss.png").size[0] > 300
    kept = yaml.safe_load((folder / "training_config.yaml").read_text())
    assert kept["run"]["root"] == "~/runs" and kept["trainer"]["training_kwargs"]["hub_token"] is None
    assert kept["dataset"]["path"] == "~/data/mine.jsonl"
    assert "erika" not in text and not scan(folder), scan(folder)


def test_saved_checks_of_a_folder_are_on_its_card(tmp_path):
    make("chat", tmp_path / "m")
    (tmp_path / "m" / "supertrainer_checks.json").write_text(json.dumps([
        {"name": "file agrees", "passed": True, "measured": 0.0123, "limit": 0.05, "detail": "KL"}]))
    assert "| passed | file agrees | 0.0123 | 0.05 | KL |" in card.write_card(
        tmp_path / "m", facts_of_folder(tmp_path / "m"), license="mit").read_text()


def test_tied_weights_count_once(tmp_path):
    model, _ = make("chat", tmp_path / "m")
    assert facts_of_folder(tmp_path / "m").parameters == model.num_parameters()


def test_a_folder_of_gguf_files_alone_is_a_quantised_base(tmp_path):
    (tmp_path / "m-Q8_0.gguf").write_bytes(b"GGUF")
    facts = CardFacts(what="chat", base=Base("org/base", "hub", "org/base"))
    path = card.write_card(tmp_path, facts, repo_id="me/m", license="mit")
    assert ModelCard.load(path).data.base_model_relation == "quantized"
    assert "```python" not in path.read_text() and "llama-server -hf me/m:Q8_0" in path.read_text()


def test_broken_json_is_named(tmp_path):
    make("chat", tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        facts_of_folder(tmp_path / "m")


def test_limits_come_from_the_figures():
    confusion = {"labels": ["a", "b", "c"], "matrix": [[4, 1, 0], [2, 3, 0], [1, 0, 0]]}
    said = limits(CardFacts(confusion=confusion, metric={"name": "held_out_loss", "value": 3.0, "baseline": 2.0}))
    assert "Never answered on the held-out rows: c." in said and "no better" in said
    better = limits(CardFacts(metric={"name": "held_out_loss", "value": 1.0, "baseline": 2.0}, training={"steps": 1}))
    assert better is None


def test_wilson_against_scipy(seed):
    from scipy.stats import binomtest

    for rows in (1, 7, 60, 1000):
        hits = int(torch.randint(0, rows + 1, ()).item())
        theirs = binomtest(hits, rows).proportion_ci(0.95, "wilson")
        assert wilson(hits / rows, rows) == pytest.approx((theirs.low, theirs.high), abs=1e-4), f"seed {seed}"


def test_text_in_tables_renders_as_itself():
    from markdown_it import MarkdownIt

    nasty = ["<|im_end|>", "a|b", "`x`", "*y*_z_", "[l](u)", "&amp;", "\\", "~~s~~", "$a$ $b$", "line\nbreak"]
    md = MarkdownIt("gfm-like", {"linkify": False})
    for text in nasty:
        html = md.render(f"| a |\n| --- |\n| {escaped(text)} |\n")
        cell = re.search(r"<td>(.*?)</td>", html, re.DOTALL)[1]
        import html as entities

        shown = entities.unescape(re.sub(r"\\(\$)", r"\1", cell))
        assert shown == " ".join(text.split()), (text, html)


def test_matplotlib_is_left_as_it_was(tmp_path):
    import matplotlib

    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    log = [{"step": i, "loss": 1 / (i + 1), "eval_loss": float("nan") if i % 2 else 1.0} for i in range(20)]
    assert card.draw_loss(log, tmp_path / "a.png") and card.draw_loss(log, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert dict(matplotlib.rcParams) == before and matplotlib.get_backend() == backend


def test_hub_cache_path_gives_the_hub_id():
    assert base_of("/x/hub/models--org--a.b-c/snapshots/" + "f" * 40).hub_id == "org/a.b-c"
    assert Licence("mit").source == "given"
