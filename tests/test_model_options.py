"""What a configuration can ask of a model beyond its name, through whole runs: kernels, length, vocabulary, frozen parts, rates."""

import functools
import json

import pytest
import torch
from datasets import Dataset

from supertrainer import compose, train
from supertrainer.cli import main
from supertrainer.models.bert import FastBERT
from supertrainer.models.info import info
from supertrainer.models.lengths import position_limit
from supertrainer.models.llm import FastLLM
from supertrainer.models.offload import is_checkpointing, is_offloading, send_away, switch_checkpointing
from supertrainer.patching import patches
from supertrainer.run import preview
from supertrainer.runtime import UserError
from supertrainer.trainers.base import HouseRules, build_trainer

WORDS = ["red", "green", "blue", "round", "square", "heavy", "light", "old", "new", "warm", "cold", "wet"]
CHATS = [{"messages": [{"role": "user", "content": f"Say {first} and {second}."},
                       {"role": "assistant", "content": f"{first} <sep> {second}"}]} for first in WORDS for second in WORDS[:5]]
TEXTS = [{"text": f"{first} {second} thing", "label": WORDS.index(first) % 2} for first in WORDS for second in WORDS[1:5]]
LLAMA = ("train_llm", "mode=sanity_check", "model=tiny_llama", "model.config.hidden_size=32", "model.config.num_hidden_layers=2",
         "model.config.intermediate_size=64", "model.config.max_position_embeddings=64", "model.config.tokenizer.vocab_size=300",
         "dataset.max_length=64", "dataset.batching=padded", "export.save=false")
HUB = ("train_llm", "mode=sanity_check", "model.lora=null", "dataset.batching=padded", "export.save=false")
LORA = "model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"
BERT = ("train_bert", "mode=sanity_check", "model.config.hidden_size=32", "model.config.intermediate_size=64",
        "model.config.max_position_embeddings=32", "dataset.max_length=16", "export.save=false")


def run(folder, *words, base=LLAMA, data=CHATS):
    return train(compose(*base, f"run.dir={folder}", *words), data=data)


def losses(done):
    return [json.loads(line)["loss"] for line in (done.dir / "metrics.jsonl").read_text().splitlines() if "loss" in json.loads(line)]


def trained(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_kernels_as_the_configuration_says_and_as_the_report_shows(tmp_path):
    own = run(tmp_path / "own", LORA)
    kept = [line for line in json.loads((own.dir / "results.json").read_text())["patches"] if line["kept"]]
    page = (own.dir / "report.html").read_text()
    assert any(line["kernel"] == "RMSNorm" for line in kept) and 'id="kernels"' in page
    assert all(line["kernel"] in page for line in kept)
    off = run(tmp_path / "off", LORA, "trainer.model_kwargs.kernels=off")
    assert not json.loads((off.dir / "results.json").read_text())["patches"] and patches(off.model).kernels == "off"
    assert 'id="kernels"' not in (off.dir / "report.html").read_text()
    assert losses(own) == pytest.approx(losses(off), rel=1e-5) and len(losses(own)) == 2


# --- length -----------------------------------------------------------------------------------------------------------


def long_rows(words=150):
    return [{"messages": [{"role": "user", "content": " ".join(WORDS * (words // 12))},
                          {"role": "assistant", "content": word}]} for word in WORDS] * 2


def test_a_row_beyond_the_models_limit_names_the_key_that_stretches(tmp_path, monkeypatch):
    monkeypatch.setattr("supertrainer.run.training.load_model", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"has positions for 64 tokens, and the longest row has \d+\. Set dataset\.max_length=64"
                                        r", which cuts rows, or model\.max_seq_length=\d+, which stretches"):
        run(tmp_path / "run", "dataset.max_length=512", data=long_rows())
    with pytest.raises(UserError, match=r"model\.max_seq_length=70, and the longest row has \d+\. Set dataset\.max_length=70"):
        run(tmp_path / "run", "dataset.max_length=null", "model.max_seq_length=70", data=long_rows())
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small Llama (rotary positions, 64) and a small BERT (learnt ones, 32) with weights of their own, as folders."""
    found = {}
    for name, loader, texts, shape in (("llama", FastLLM, [f"{a} {b} Say and ." for a in WORDS for b in WORDS], {"max_position_embeddings": 64}),
                                       ("bert", FastBERT, [row["text"] for row in TEXTS], {"max_position_embeddings": 32})):
        model, tokenizer = loader.from_pretrained(f"tiny_{name}", texts=texts, config={
            "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4, **shape,
            **({"num_key_value_heads": 2} if name == "llama" else {})})
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.mark.parametrize(("words", "kind"), [
    (["model.max_seq_length=512"], "yarn"), (["model.rope_scaling={rope_type: linear, factor: 8.0}"], "linear"),
    (["model.max_seq_length=512", "model.rope_scaling={rope_type: dynamic}"], "dynamic")])
def test_a_longer_model_is_trained_on_longer_rows(tmp_path, folders, words, kind):
    done = run(tmp_path / "run", f"model.name={folders['llama']}", "dataset.max_length=512", *words, data=long_rows(), base=HUB)
    assert position_limit(done.model.config) == 512 and info(done.model).decision("positions")
    assert len(losses(done)) == 2 and done.model.config.rope_parameters["rope_type"] == kind
    assert "max_seq" not in words[0] or done.tokenizer.model_max_length == 512


def test_a_model_made_on_the_spot_is_made_longer(tmp_path):
    done = run(tmp_path / "run", "dataset.max_length=512", "model.max_seq_length=512", data=long_rows())
    assert position_limit(done.model.config) == 512 and done.model.config.rope_parameters["rope_type"] == "default"


def test_a_stretch_that_is_too_short_is_seen_before_anything_is_written(tmp_path, folders):
    with pytest.raises(UserError, match="has positions for 128 tokens"):
        run(tmp_path / "run", f"model.name={folders['llama']}", "dataset.max_length=512",
            "model.rope_scaling={rope_type: linear, factor: 2.0}", data=long_rows(), base=HUB)
    assert not (tmp_path / "run").exists()


def test_positions_that_cannot_be_stretched_are_refused(tmp_path, folders):
    with pytest.raises(UserError, match="max_seq_length=64 is more than .* can take: 32"):
        run(tmp_path / "run", f"model.name={folders['bert']}", "model.max_seq_length=64", "dataset.max_length=16", data=TEXTS,
            base=("train_bert", "mode=sanity_check", "export.save=false"))
    with pytest.raises(UserError, match="dataset.max_length=64 is more than model.max_seq_length=16.*model.max_seq_length=64"):
        compose(*LLAMA, "model.max_seq_length=16")


# --- vocabulary -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False])
def test_new_tokens_are_encoded_grown_trained_and_saved(tmp_path, lora):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "tools.yaml").write_text(
        "# @package _global_\ndefaults: [train_llm, _self_]\nfamily: llm\nmodel:\n  new_tokens: {<sep>: and then, <end>: stop}\n")
    cfg = compose("tools", *LLAMA[1:], f"run.dir={tmp_path / 'run'}", "model.pad_vocab_to_multiple_of=8", "export.save=true",
                  *([LORA] if lora else []), config_dir=tmp_path)
    done = train(cfg, data=CHATS)
    number = done.tokenizer.convert_tokens_to_ids("<sep>")
    assert done.tokenizer("red <sep> blue").input_ids.count(number) == 1
    assert any("<sep>" in token["text"] for row in done.results["loss_tokens"] for token in row)
    assert done.model.get_input_embeddings().weight.shape[0] % 8 == 0
    assert {"rows are encoded with the model's tokens"} <= {check.name for check in done.checks}
    assert all(check.passed for check in done.checks), str(done.checks)
    rows = info(done.model).reload["new_rows"]
    assert number in rows and ("new tokens" in info(done.model).decision("adapter").reason if lora else True)
    again, tokenizer = FastLLM.from_pretrained(done.dir / "model", dtype="float32")
    assert tokenizer.convert_tokens_to_ids("<sep>") == number
    assert again.get_input_embeddings().weight.shape[0] > number
    with torch.no_grad():
        ids = torch.tensor([tokenizer("red <sep> blue").input_ids])
        torch.testing.assert_close(again(ids).logits, done.model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_rows_of_the_embedding_as_asked(tmp_path):
    done = run(tmp_path / "run", "model.resize_model_vocab=333")
    assert done.model.get_input_embeddings().weight.shape[0] == 333
    with pytest.raises(UserError, match="resize_model_vocab=5 is less than"):
        run(tmp_path / "no", "model.resize_model_vocab=5")


def test_a_preview_shows_new_tokens_as_the_run_reads_them():
    seen = preview(compose(*LLAMA, 'model.new_tokens=["<sep>"]'), data=CHATS)
    assert all(check.passed for check in seen.checks), seen.checks
    assert "<sep>" in [piece for row in seen.rows for text in row.texts for piece in pieces(text)]


def pieces(text):
    return [token if isinstance(token, str) else getattr(token, "text", "") for token in getattr(text, "tokens", ())]


# --- what learns ------------------------------------------------------------------------------------------------------


def test_frozen_layers_with_and_without_an_adapter(tmp_path):
    full = run(tmp_path / "full", "model.freeze_layers=1")
    assert not any(".layers.0." in name or "embed" in name for name in trained(full.model))
    assert any(".layers.1." in name for name in trained(full.model)) and info(full.model).decision("frozen")
    adapter = run(tmp_path / "adapter", "model.freeze_layers=1", LORA)
    assert trained(adapter.model) and all(".layers.1." in name for name in trained(adapter.model))


def test_parts_of_a_model_get_an_adapter(tmp_path):
    done = run(tmp_path / "run", LORA, "model.lora.finetune_mlp_modules=false", "model.lora.layers_to_transform=[1]")
    assert trained(done.model) and all(".layers.1.self_attn." in name for name in trained(done.model))


@pytest.mark.parametrize(("words", "said"), [
    (["model.lora.use_gradient_checkpointing=true"], "set trainer.training_kwargs.gradient_checkpointing instead"),
    ([LORA, "model.lora.freeze_layers=1"], "set model.freeze_layers instead"),
    ([LORA, "model.freeze_layers=1", "model.lora.layers_to_transform=[0]"], "both say which layers learn"),
    (["trainer.training_kwargs.activation_offloading=true"], "gradient_checkpointing=offload instead"),
    (["trainer.training_kwargs.gradient_checkpointing=offlod"], "must be true or false or one of 'offload'"),
    (["trainer.training_kwargs.gradient_checkpointing=offload", "trainer.training_kwargs.activation_checkpointing=false"],
     "trainer.training_kwargs.activation_checkpointing: contradicts"),
    (["trainer.training_kwargs.gradient_checkpointing=offload",
      "trainer.training_kwargs.gradient_checkpointing_kwargs={use_reentrant: true}"], "remove one of the two"),
    (["trainer.training_kwargs.gradient_checkpointing=true", "trainer.training_kwargs.activation_checkpointing=false"],
     "its other name"),
    (['model.new_tokens=["<sep>"]', "model.freeze_layers=1"], "model.freeze_layers=1 freezes those: set model.lora"),
    (["trainer.model_kwargs.kernels=false"], 'YAML reads off as false: write "off", with the quotes.'),
    (["trainer.model_kwargs.kernels=lger"], "Did you mean 'liger'?"),
    (["trainer.embedding_learning_rate=0"], "trainer.embedding_learning_rate: must be a number greater than 0"),
    (["model.freeze_layers=-1"], "model.freeze_layers: must be a number at least 0"),
    (["model.new_tokens=word"], "model.new_tokens: must be"),
    (["model.new_token=[a]"], "Did you mean 'new_tokens'?"),
])
def test_what_is_wrong_is_said_with_the_fix(words, said):
    with pytest.raises(UserError) as caught:
        compose(*LLAMA, *words)
    assert said in str(caught.value)


def test_every_option_is_shown_and_repeated(tmp_path, capsys):
    assert main(["train", "+experiment=train_llm", "model.rope_scaling.rope_type=yarn", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    for key in ("kernels: own", "max_seq_length: null", "rope_type: yarn", "new_tokens: null", "resize_model_vocab: null",
                "pad_vocab_to_multiple_of: null", "freeze_layers: null", "embedding_learning_rate: null",
                "gradient_checkpointing: false"):
        assert key in shown, key


# --- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "data", "adapter"), [(LLAMA, CHATS, [LORA]), (LLAMA, CHATS, []), (BERT, TEXTS, [])])
def test_offloaded_checkpoints_train_the_same(tmp_path, monkeypatch, base, data, adapter):
    seen, away = [], []

    def note(trainer, *args, step=HouseRules.training_step, **kwargs):
        seen.append((is_offloading(trainer.model), is_checkpointing(trainer.model), trainer.args.gradient_checkpointing))
        return step(trainer, *args, **kwargs)

    def send(tensor, least, kinds):
        away.append(tensor.shape)
        return send_away(tensor, 0, ("cpu",))  # a GPU's path, with a copy where a GPU would send it to

    plain = run(tmp_path / "plain", *adapter, base=base, data=data)
    monkeypatch.setattr(HouseRules, "training_step", note)
    monkeypatch.setattr("supertrainer.models.offload.send_away", send)
    monkeypatch.setattr("supertrainer.trainers.checkpointing.switch_checkpointing",
                        functools.partial(switch_checkpointing, least=0, kinds=("cpu",)))
    done = run(tmp_path / "offload", "trainer.training_kwargs.gradient_checkpointing=offload", *adapter, base=base, data=data)
    assert seen == [(True, True, False)] * 2 and away and not is_checkpointing(done.model)
    assert losses(done) == pytest.approx(losses(plain), rel=1e-5)
    for one, other in zip(done.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    decision = info(done.model).decision("gradient checkpointing")
    assert decision.value == "offload" and decision.reason.split(": ")[1] in (done.dir / "report.html").read_text().replace("&#39;", "'")
    assert "gradient_checkpointing: offload" in (done.dir / "config.yaml").read_text()


def test_a_model_in_the_cpus_memory_has_nowhere_to_offload_to_and_says_so(tmp_path):
    done = run(tmp_path / "run", LORA, "trainer.training_kwargs.gradient_checkpointing=offload")
    decision = info(done.model).decision("gradient checkpointing")
    assert decision.value == "on" and "in the CPU's memory already" in decision.reason
    on = run(tmp_path / "on", LORA, "trainer.training_kwargs.gradient_checkpointing=true")
    assert info(on.model).decision("gradient checkpointing").value == "on" and losses(on) == pytest.approx(losses(done), rel=1e-6)


# --- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "data", "words", "part"), [
    (LLAMA, CHATS, [], "embed_tokens"), (BERT, TEXTS, [], "word_embeddings"),
    (LLAMA, CHATS, [LORA, "model.lora.modules_to_save=[embed_tokens]"], "modules_to_save"),
    (LLAMA, CHATS, [LORA, 'model.new_tokens=["<sep>"]'], "trainable_tokens_delta")])
def test_embeddings_have_their_own_rate(tmp_path, monkeypatch, base, data, words, part):
    kept = []
    real = build_trainer

    def note(*args, **kwargs):
        kept.append(real(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr("supertrainer.run.training.build_trainer", note)
    done = run(tmp_path / "run", "trainer.embedding_learning_rate=1e-7", "trainer.training_kwargs.lr_scheduler_type=constant",
               "trainer.training_kwargs.learning_rate=1e-2", "trainer.training_kwargs.warmup_steps=0", *words, base=base, data=data)
    names = {id(weight): name for name, weight in done.model.named_parameters()}
    rates = {names[id(weight)]: group["lr"] for group in kept[0].optimizer.param_groups for weight in group["params"]}
    assert set(rates) == trained(done.model)
    slow = {name for name, rate in rates.items() if rate == 1e-7}
    assert slow and all(part in name for name in slow) and {rate for name, rate in rates.items() if name not in slow} == {1e-2}
    decays = {names[id(weight)]: group["weight_decay"] for group in kept[0].optimizer.param_groups for weight in group["params"]}
    assert {decays[name] for name in slow} == {0.01}


def test_a_rate_without_an_embedding_that_learns_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no embedding is trained.*model\.lora\.modules_to_save=\[embed_tokens\]"):
        run(tmp_path / "lora", LORA, "trainer.embedding_learning_rate=1e-4")
    with pytest.raises(UserError, match="no embedding is trained"):
        run(tmp_path / "frozen", "model.freeze_layers=1", "trainer.embedding_learning_rate=1e-4")


# --- tasks of encoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "said"), [("regression", "teaches it numbers"), ("masked_lm", "DataCollatorForLanguageModeling"),
                                            ("embeddings", "FastSentenceTransformer")])
def test_an_encoder_for_what_no_run_trains_is_refused(tmp_path, task, said):
    model, tokenizer = FastBERT.from_pretrained("tiny_bert", texts=[row["text"] for row in TEXTS], task=task)
    with pytest.raises(UserError, match=f"loaded for {task}, which no run trains") as caught:
        build_trainer("bert", model=model, processing_class=tokenizer, output_dir=tmp_path, data_collator=lambda rows: rows,
                      train_dataset=Dataset.from_list([{"input_ids": [1, 2], "labels": 0}]))
    assert said in str(caught.value)
