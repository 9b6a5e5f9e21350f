"""The house's loss in TRL's trainer: step for step TRL's own, proven first, and TRL's own where something else is asked for."""

import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForSeq2Seq

from supertrainer.patching import GRADIENT_CHECK, KERNEL, LOSS_CHECK, patches
from supertrainer.unsloth import FastLanguageModel, SFTConfig, SFTTrainer, train_on_responses_only
from supertrainer.unsloth import loss as chapter

sys.path.insert(0, str(Path(__file__).parent))
import tiny_unsloth  # noqa: E402
from tiny_unsloth import WORDS  # noqa: E402

PARTS = ("<|im_start|>user\n", "<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_unsloth.llama(tmp_path_factory.mktemp("llama"))


def texts(rows=12):
    return Dataset.from_dict({"text": [" ".join(WORDS[number % 5:number % 5 + 1 + number % 3]) for number in range(rows)]})


def chats(tokenizer, rows=12):
    turns = [[{"role": "user", "content": WORDS[number % 4]}, {"role": "assistant", "content": " ".join(WORDS[:1 + number % 3])}]
             for number in range(rows)]
    return Dataset.from_dict({"text": [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]})


def completions(rows=12):
    return Dataset.from_list([{"prompt": WORDS[number % 4], "completion": " " + WORDS[number % 3]} for number in range(rows)])


def history(llama, kind, ours, in_tmp, lora=False, **options):
    """The logged losses and gradient norms of five steps, and the trainer."""
    model, tokenizer = FastLanguageModel.from_pretrained(llama, dtype="float32", max_seq_length=128)
    if lora:
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=lora == "checkpointed")
    rows = {"chat": lambda: chats(tokenizer), "completion": completions}.get(kind, texts)()
    collator = DataCollatorForSeq2Seq(tokenizer) if kind == "seq2seq collator" else None
    values = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 5, "learning_rate": 5e-3,
              "logging_steps": 1, "save_strategy": "no", "warmup_steps": 0, "max_length": 128, "per_device_eval_batch_size": 3}
    run = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows.select(range(5)),
                     data_collator=collator, args=SFTConfig("out", **{**values, **options}))
    if kind == "chat":
        run = train_on_responses_only(run, *PARTS)
    run.prove = ours
    run.train()
    run.logged = [(entry["loss"], entry["grad_norm"], entry.get("num_tokens")) for entry in run.state.log_history if "loss" in entry]
    return run


CASES = {
    "text": ("text", {}), "accumulated": ("text", {"gradient_accumulation_steps": 3}),
    "responses": ("chat", {}), "responses, accumulated": ("chat", {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}),
    "lora": ("chat", {"lora": True, "gradient_accumulation_steps": 2}), "checkpointed": ("chat", {"lora": "checkpointed"}),
    "completion": ("completion", {"gradient_accumulation_steps": 2}), "completion, all tokens": ("completion", {"completion_only_loss": False}),
    "padding-free": ("text", {"padding_free": True, "max_length": None, "gradient_accumulation_steps": 2}),
    "packed": ("text", {"packing": True, "max_length": 48, "gradient_accumulation_steps": 2}),
    "packed, wrapped": ("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 32}),
    "seq2seq collator": ("seq2seq collator", {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_step_for_step_as_trl(llama, in_tmp, case):
    kind, options = CASES[case]
    ours, trls = (history(llama, kind, which, in_tmp, **options) for which in (True, False))
    assert ours.loss_reason is None and trls.loss_reason == "not proven yet"
    assert len(ours.logged) == 5 and all(check.passed for check in ours.checks)
    proven = {LOSS_CHECK, GRADIENT_CHECK}
    assert proven <= {check.name for check in ours.checks} and not proven & {check.name for check in trls.checks}
    for (loss, norm, tokens), (other, other_norm, other_tokens) in zip(ours.logged, trls.logged, strict=True):
        assert loss == pytest.approx(other, rel=2e-4) and norm == pytest.approx(other_norm, rel=2e-3) and tokens == other_tokens
    before = ours.model.state_dict() if not hasattr(ours.model, "get_base_model") else None
    assert ours.evaluate()["eval_loss"] == pytest.approx(trls.evaluate()["eval_loss"], rel=1e-3)
    assert before is None or all(torch.equal(before[name], value) for name, value in ours.model.state_dict().items())
    plain = ours.model.get_base_model() if hasattr(ours.model, "get_base_model") else ours.model
    assert "forward" not in plain.__dict__ and "forward" not in trls.model.__dict__
    assert patches(plain).find(KERNEL).kept


def test_masks_of_conversations_are_trls_own(llama, in_tmp):
    """`assistant_only_loss` with a template that marks the assistant's tokens: the labels come from TRL's masks."""
    losses = []
    for prove in (True, False):
        model, tokenizer = FastLanguageModel.from_pretrained(llama, dtype="float32", max_seq_length=128)
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
            "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}")
        rows = Dataset.from_list([{"messages": [{"role": "user", "content": WORDS[number % 4]},
                                                {"role": "assistant", "content": WORDS[number % 3]}]} for number in range(8)])
        run = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=SFTConfig(
            "out", max_steps=3, assistant_only_loss=True, logging_steps=1, save_strategy="no", per_device_train_batch_size=2))
        labels = run.train_dataset[0]["labels"]
        assert -100 in labels and any(label != -100 for label in labels)
        run.prove = prove
        run.train()
        assert (run.loss_reason is None) == prove
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


def zero_loss(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().square().mean()


@pytest.mark.parametrize(("options", "reason"), [
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is set"), ({"loss_type": "dft"}, "loss_type=dft"),
    ({"compute_loss_func": zero_loss}, "compute_loss_func= was passed")])
@pytest.mark.filterwarnings("ignore")
def test_other_losses_are_trls_own(llama, in_tmp, options, reason):
    """What TRL's own trainer computes without us, it computes here."""
    options = dict(options)
    function = options.pop("compute_loss_func", None)
    values = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 2, "max_length": 64}
    losses = []
    for kind, config in ((SFTTrainer, SFTConfig), (trl.SFTTrainer, trl.SFTConfig)):
        model, tokenizer = FastLanguageModel.from_pretrained(llama, dtype="float32", max_seq_length=64)
        extra = {"bf16": False, "use_cpu": not torch.cuda.is_available(), "report_to": "none", "gradient_checkpointing": False}
        run = kind(model=model, processing_class=tokenizer, train_dataset=texts(), compute_loss_func=function,
                   args=config("out", **values, **options, **(extra if config is trl.SFTConfig else {})))
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        if kind is SFTTrainer:
            assert run.loss_reason == reason and all(check.passed for check in run.checks) and "forward" not in model.__dict__
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


def test_a_router_and_a_failed_proof_are_trls_own(llama, in_tmp, monkeypatch, caplog):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, dtype="float32", max_seq_length=64)
    run = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=texts(), args=SFTConfig(
        "out", max_steps=1, save_strategy="no", logging_steps=1))
    run.aux_loss_enabled = True
    assert chapter.why_trl(run) == "a mixture of experts adds its router's loss"
    run.aux_loss_enabled = False

    from supertrainer.patching import loss_proof

    true = loss_proof.masked_loss
    monkeypatch.setattr(loss_proof, "masked_loss", lambda *args, **kwargs: 1.01 * true(*args, **kwargs))
    run.train()
    assert "failed" in run.loss_reason and not all(check.passed for check in run.checks)
    assert "taken back (see model.patches)" in caplog.text and "forward" not in model.__dict__
    monkeypatch.undo()
    run.train()  # a later proof decides afresh, and its checks replace the failed ones
    assert run.loss_reason is None and len(run.checks) == 2 and all(check.passed for check in run.checks)


def test_metrics_that_need_logits(llama, in_tmp):
    seen = []

    def compute_metrics(pair):
        seen.append(pair.predictions.shape)
        return {"rows": len(pair.predictions)}

    model, tokenizer = FastLanguageModel.from_pretrained(llama, dtype="float32", max_seq_length=64)
    run = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=texts(), eval_dataset=texts(4), compute_metrics=compute_metrics,
                     args=SFTConfig("out", max_steps=1, save_strategy="no", per_device_eval_batch_size=2))
    run.train()
    assert run.loss_reason is None
    metrics = run.evaluate()
    assert metrics["eval_rows"] == 4 and seen[0][-1] == model.config.vocab_size
    batch = run.data_collator([run.eval_dataset[0]])
    loss, outputs = run.compute_loss(model, batch, return_outputs=True)
    expected = torch.nn.functional.cross_entropy(outputs.logits[0, :-1].float(), batch["labels"][0, 1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_streams_and_rows_without_labels(llama, in_tmp):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, dtype="float32", max_seq_length=64)
    stream = IterableDataset.from_generator(lambda: iter(texts().to_list()))
    run = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=stream, args=SFTConfig("out", max_steps=2, save_strategy="no"))
    run.train()
    assert run.loss_reason is None and len(run.checks) == 2


def test_no_memory_for_the_proof(llama, in_tmp, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(chapter, "prove_masked_loss", full)
    model, tokenizer = FastLanguageModel.from_pretrained(llama, dtype="float32", max_seq_length=64)
    run = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=texts(), args=SFTConfig("out", max_steps=1, save_strategy="no"))
    assert run.train().global_step == 1 and run.loss_reason == "not proven yet" and "no memory to prove" in caplog.text
    assert not any("forward" in module.__dict__ for module in model.modules())
