"""Trainers against plain Hugging Face loops, hand-computed losses, and the promises of the house."""

import json
import math
import tempfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from supertrainer.patching import next_labels
from supertrainer.registry import register
from supertrainer.runtime import UserError
from supertrainer.trainers.base import build_trainer, freeze_parameters, trainer_class, training_arguments
from supertrainer.trainers.bert import ClassificationTrainer, class_weights_for
from supertrainer.trainers.callbacks import LivePlot, MetricsLog, ProgressBar
from supertrainer.trainers.llm import ChatTrainer


def tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), pad_token="[PAD]",
                                   eos_token="[EOS]")


def llama(seed=1, **changes):
    torch.manual_seed(seed)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def chat_rows(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(3, 64, (int(torch.randint(6, 15, (1,), generator=generator)),), generator=generator).tolist()
        cut = len(ids) * 2 // 3
        rows.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:], "length": len(ids)})
    return Dataset.from_list(rows)


def collate(rows):
    def padded(values, filler):
        return pad_sequence([torch.tensor(value) for value in values], True, filler)

    return {"input_ids": padded([row["input_ids"] for row in rows], 0),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], -100)}


def bert(seed=1, labels=3, dropout=0.0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.2,
        id2label={index: f"class {index}" for index in range(labels)}))


def text_rows(count=24, labels=3):
    return Dataset.from_list([{"input_ids": [2, 3 + index % labels, 9 + index % 5], "attention_mask": [1, 1, 1],
                               "labels": index % labels} for index in range(count)])


def collate_text(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "attention_mask", "labels")}


def chat_trainer(model, rows=None, **options):
    values = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1,
              "disable_tqdm": True, **options.pop("training_kwargs", {})}
    return build_trainer("llm", **{
        "model": model, "processing_class": tokenizer(), "train_dataset": rows if rows is not None else chat_rows(),
        "data_collator": collate, "output_dir": tempfile.mkdtemp(), "training_kwargs": values, **options})


def text_trainer(model, rows=None, **options):
    values = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1,
              "disable_tqdm": True, **options.pop("training_kwargs", {})}
    return build_trainer("bert", **{
        "model": model, "processing_class": None, "train_dataset": rows if rows is not None else text_rows(),
        "data_collator": collate_text, "output_dir": tempfile.mkdtemp(), "training_kwargs": values, **options})


def logged(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


# ---------------------------------------------------------------------------------------------- same numbers as plain

@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("lora", [False, True])
def test_chat_losses_equal_plain_trainer_step_by_step(accumulate, lora):
    """Plain `Trainer` with the model's own loss, same seed and data: same losses, gradient norms and final weights."""
    def model():
        return get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)) \
            if lora else llama()

    torch.manual_seed(5)
    ours = model()
    torch.manual_seed(5)
    plain = model()
    shared = {"learning_rate": 1e-2, "max_steps": 5, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 7,
              "gradient_accumulation_steps": accumulate, "warmup_steps": 2, "lr_scheduler_type": "linear",
              "train_sampling_strategy": "random", "weight_decay": 0.1}
    trainer = chat_trainer(ours, training_kwargs=shared)
    trainer.train()
    reference = Trainer(plain, TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none", disable_tqdm=True,
                                                 remove_unused_columns=False, save_strategy="no", **shared),
                        data_collator=collate, train_dataset=chat_rows())
    reference.train()
    assert trainer.checks and all(check.passed for check in trainer.checks)
    assert logged(trainer) == pytest.approx(logged(reference), rel=1e-4)
    assert logged(trainer, "grad_norm") == pytest.approx(logged(reference, "grad_norm"), rel=1e-3)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.skipif(trl.__version__ < "1.16", reason="TRL 1.15's fused head needs a GPU driver for Triton, even on a CPU")
def test_chat_losses_equal_trls_own():
    """TRL's SFTTrainer with its fused head on the same prepared rows."""
    shared = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 3,
              "lr_scheduler_type": "linear", "train_sampling_strategy": "random", "gradient_checkpointing": False,
              "bf16": False}
    trainer = chat_trainer(llama(), training_kwargs={**shared, "warmup_steps": 0})
    trainer.train()
    reference = trl.SFTTrainer(llama(), trl.SFTConfig(
        tempfile.mkdtemp(), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_length=None,
        remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, **shared),
        data_collator=collate, train_dataset=chat_rows(), processing_class=tokenizer())
    reference.train()
    assert logged(trainer) == pytest.approx(logged(reference), rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_classifier_gradients_are_the_mean_over_all_accumulated_rows(accumulate):
    """transformers 5.23 alone multiplies BERT's gradients by the accumulation steps."""
    rows = text_rows(8)
    trainer = text_trainer(bert(), rows, training_kwargs={
        "max_steps": 1, "per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate,
        "max_grad_norm": 1e9})
    model = bert()
    F.cross_entropy(model(**{k: v for k, v in collate_text(rows).items() if k != "labels"}).logits,
                    collate_text(rows)["labels"]).backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    trainer.train()
    assert logged(trainer, "grad_norm")[0] == pytest.approx(expected.item(), rel=1e-4)


def test_class_weights_against_hand_computed_loss():
    weights, rows, model = [0.5, 2.0, 4.0], text_rows(7), bert()
    trainer = text_trainer(model, text_rows(9), class_weights=weights)  # trained on rows of mean weight 6.5 / 3
    batch = collate_text(rows)
    loss = trainer.compute_loss(model, batch).item()
    with torch.no_grad():
        probabilities = model(batch["input_ids"], batch["attention_mask"]).logits.double().softmax(-1).numpy()
    labels = batch["labels"].numpy()
    each = -np.log(probabilities[np.arange(7), labels]) * np.array(weights)[labels]
    assert loss == pytest.approx(each.mean() / (6.5 / 3), rel=1e-5)
    assert "labels" in batch  # the batch was not emptied


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 5 + [1] * 2 + [2] * 9
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights_for("balanced", ["a", "b", "c"], labels) == pytest.approx(expected)


def test_class_weights_change_what_is_learnt():
    """Two classes that look alike, one nine times as often: only the weighted model ever answers the rare one."""
    rows = Dataset.from_list([{"input_ids": [2, 5, 9], "attention_mask": [1, 1, 1], "labels": int(i % 10 == 0)}
                              for i in range(40)])
    found = []
    for weights in (None, class_weights_for({"class 1": 30.0}, ["class 0", "class 1"], rows["labels"])):
        model = bert(labels=2)
        text_trainer(model, rows, class_weights=weights, training_kwargs={
                "max_steps": 40, "learning_rate": 5e-3, "per_device_train_batch_size": 40}).train()
        found.append(int(model.eval()(torch.tensor([[2, 5, 9]])).logits.argmax()))
    assert found == [0, 1]


# ------------------------------------------------------------------------------------------------------------- learning

def test_chat_overfits_a_few_rows_and_generates_them():
    rows, model = chat_rows(3), llama()
    trainer = chat_trainer(model, rows, training_kwargs={"max_steps": 80, "per_device_train_batch_size": 3})
    trainer.train()
    assert logged(trainer)[-1] < 0.05 < 3 < logged(trainer)[0]
    for row in rows:
        cut = sum(label == -100 for label in row["labels"])
        out = model.eval().generate(torch.tensor([row["input_ids"][:cut]]), max_new_tokens=len(row["input_ids"]) - cut,
                                    do_sample=False, eos_token_id=None)
        assert out[0].tolist() == row["input_ids"]


def test_eval_loss_is_the_mean_over_tokens_whatever_the_batches():
    model, rows = llama(), chat_rows(10)
    losses = [chat_trainer(model, rows, eval_dataset=rows, training_kwargs={"per_device_eval_batch_size": size})
              .evaluate()["eval_loss"] for size in (1, 3, 10)]
    model.eval()
    total = count = 0.0
    for row in rows:
        batch = collate([row])
        targets = next_labels(batch["labels"]).flatten()
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits.double().flatten(0, 1)
        total += F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        count += int((targets != -100).sum())
    assert losses == pytest.approx([total / count] * 3, rel=1e-5)


def test_classifier_learns_and_reports_accuracy_and_macro_f1():
    trainer = text_trainer(bert(), eval_dataset=text_rows(), training_kwargs={
        "max_steps": 60, "per_device_train_batch_size": 24})
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_macro_f1"] == 1.0 and "eval_loss" in metrics


# ------------------------------------------------------------------------------------------------------- freeze, stop

def test_frozen_parameters_do_not_move_and_others_do():
    model = bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text_trainer(model, freeze=["bert.*"], unfreeze=["*pooler*"]).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


def test_freeze_names_work_through_peft_and_errors_name_the_nearest():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    freeze_parameters(model, [], ["model.norm.weight"])
    assert model.get_base_model().model.norm.weight.requires_grad
    with pytest.raises(UserError) as error:
        freeze_parameters(llama(), ["model.layer.*", "*"], ["lm_heat.*"])
    assert "model.layers" in error.value.problems[0] and "lm_head" in error.value.problems[1]
    with pytest.raises(UserError, match="No parameter is left"):
        freeze_parameters(llama(), ["*"])


def test_early_stopping_stops_and_the_best_model_comes_back():
    """The learning rate is so high that held-out loss soon rises."""
    model = llama()
    trainer = chat_trainer(model, eval_dataset=chat_rows(8, seed=9), early_stopping={"patience": 2, "threshold": 0.0},
                           training_kwargs={"max_steps": 60, "eval_strategy": "steps", "eval_steps": 3,
                                            "learning_rate": 5e-2, "load_best_model_at_end": True, "save_total_limit": 1})
    trainer.train()
    evals = logged(trainer, "eval_loss")
    assert trainer.state.global_step < 60
    assert evals[-1] > min(evals) and min(evals) == evals[-3]  # two evaluations without a better one
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evals), rel=1e-5)


def test_early_stopping_and_evaluation_need_rows_and_evaluations():
    with pytest.raises(UserError, match="early_stopping needs evaluations"):
        chat_trainer(llama(), early_stopping={"patience": 1})
    with pytest.raises(UserError, match="needs held-out rows"):
        chat_trainer(llama(), training_kwargs={"eval_strategy": "epoch"})
    with pytest.raises(UserError, match="no row to train on"):
        chat_trainer(llama(), chat_rows(1).select([]))


def test_two_steps_without_evaluation():
    """What the sanity check mode does."""
    trainer = chat_trainer(llama(), training_kwargs={"max_steps": 2, "eval_strategy": "no"})
    trainer.train()
    assert trainer.state.global_step == 2 and not logged(trainer, "eval_loss")


# --------------------------------------------------------------------------------------------------- promises of the house

class Spoil(TrainerCallback):
    """Makes the weights infinite before a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).fill_(float("inf"))


@pytest.mark.parametrize("family", ["llm", "bert"])
def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(family):
    make, model = (chat_trainer, llama()) if family == "llm" else (text_trainer, bert())
    trainer = make(model, callbacks=[Spoil(2)])
    with pytest.raises(UserError, match="stopped at step 3: loss is (nan|inf).*learning rate"):
        trainer.train()
    assert len(logged(trainer)) == 2 and all(math.isfinite(loss) for loss in logged(trainer))


def test_the_model_comes_back_clean(tmp_path):
    forward, hooks = vars(LlamaForCausalLM)["forward"], torch.nn.modules.module._global_forward_pre_hooks
    base = llama()
    base.config.use_cache = True
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = chat_trainer(model, training_kwargs={"gradient_checkpointing": True})
    trainer.train()
    assert "forward" not in vars(model) and "forward" not in vars(base)
    assert base.config.use_cache is True and not base.is_gradient_checkpointing
    assert not base.get_output_embeddings()._forward_pre_hooks and not hasattr(base, "_require_grads_hook")
    assert vars(LlamaForCausalLM)["forward"] is forward and not hooks
    base.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    model.save_pretrained(tmp_path)


def test_clean_also_after_an_error_and_with_autocast():
    model = llama()
    trainer = chat_trainer(model, callbacks=[Spoil(1)], training_kwargs={"bf16": True})
    with pytest.raises(UserError):
        trainer.train()
    assert "forward" not in vars(model) and "_original_forward" not in vars(model)


def test_gradient_checkpointing_changes_no_loss():
    losses = []
    for checkpointing in (False, True):
        trainer = chat_trainer(llama(), training_kwargs={"gradient_checkpointing": checkpointing})
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_nothing_is_sent_and_checkpoints_hold_no_pickled_arguments_and_no_card(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("something was sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", no_network)
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = chat_trainer(model, output_dir=tmp_path, training_kwargs={"save_strategy": "steps", "save_steps": 2,
                                                                        "save_total_limit": 1})
    trainer.train()
    folder, = tmp_path.glob("checkpoint-*")
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "trainer_state.json", "optimizer.pt"} <= names
    assert not names & {"training_args.bin", "README.md", "adapter_model.bin"}


def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = chat_trainer(llama(), training_kwargs=options)
    whole.train()
    chat_trainer(llama(), output_dir=tmp_path, training_kwargs=options, callbacks=[StopAt(4)]).train()
    resumed = chat_trainer(llama(seed=99), output_dir=tmp_path, training_kwargs=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(resumed)[-2:] == logged(whole)[-2:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_failed_proof_falls_back_and_is_kept_as_a_check():
    class Biased(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            outputs = super().forward(input_ids=input_ids, **kwargs)
            length, vocab = outputs.logits.shape[1:]
            outputs.logits = outputs.logits + torch.arange(length)[None, :, None] * torch.arange(vocab) / vocab
            if labels is not None:
                outputs.loss = self.loss_function(outputs.logits, labels, vocab)
            return outputs

    shared = {"train_sampling_strategy": "random", "seed": 7}
    ours, plain = Biased(llama().config), Biased(llama().config)
    plain.load_state_dict(ours.state_dict())
    trainer = chat_trainer(ours, training_kwargs=shared)
    trainer.train()
    assert not trainer.checks[0].passed and "own" in trainer.checks[0].detail
    reference = Trainer(plain, TrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False,
        save_strategy="no", learning_rate=1e-2, max_steps=4, per_device_train_batch_size=4, logging_steps=1,
        lr_scheduler_type="cosine", warmup_steps=0.05, **shared), data_collator=collate, train_dataset=chat_rows())
    reference.train()
    assert logged(trainer) == pytest.approx(logged(reference), rel=1e-4)


def test_classes_of_other_libraries_are_untouched():
    watched = [transformers.Trainer, trl.SFTTrainer, LlamaForCausalLM, BertForSequenceClassification,
               transformers.TrainingArguments, trl.SFTConfig]
    before = [dict(vars(kind)) for kind in watched]
    chat_trainer(llama()).train()
    text_trainer(bert()).train()
    assert [dict(vars(kind)) for kind in watched] == before


# ------------------------------------------------------------------------------------------------------------ arguments

def test_arguments_are_refused_all_at_once_with_reasons():
    with pytest.raises(UserError) as error:
        chat_trainer(llama(), training_kwargs={"lerning_rate": 1, "hub_token": "secret", "packing": True})
    problems = "\n".join(error.value.problems)
    assert len(error.value.problems) == 3 and "Did you mean 'learning_rate'?" in problems and "secret" not in problems
    with pytest.raises(UserError, match="training_kwargs: .*nonsense"):
        training_arguments(TrainingArguments, {"eval_strategy": "nonsense"}, output_dir=tempfile.mkdtemp())
    with pytest.raises(UserError, match="class_weights is for the family bert"):
        chat_trainer(llama(), class_weights=[1.0])
    with pytest.raises(UserError, match="2 weights, the model 3 classes"):
        text_trainer(bert(), class_weights=[1.0, 2.0])


def test_mixed_precision_needs_float32_weights():
    with pytest.raises(UserError, match="bfloat16. Drop bf16"):
        chat_trainer(llama().bfloat16(), training_kwargs={"bf16": True})
    assert not chat_trainer(llama().bfloat16()).args.bf16  # TRL would switch it on


def test_rows_of_like_length_share_a_batch_unless_the_user_says_otherwise():
    trainer = chat_trainer(llama(), chat_rows(64), training_kwargs={"per_device_train_batch_size": 8})
    waste = [float((batch["attention_mask"] == 0).float().mean()) for batch in trainer.get_train_dataloader()]
    drawn = chat_trainer(llama(), chat_rows(64), training_kwargs={"per_device_train_batch_size": 8,
                                                                  "train_sampling_strategy": "random"})
    loose = [float((batch["attention_mask"] == 0).float().mean()) for batch in drawn.get_train_dataloader()]
    assert np.mean(waste) < 0.75 * np.mean(loose)


def test_lookup_and_registration():
    assert trainer_class("llm") is ChatTrainer and trainer_class("bert", "classification") is ClassificationTrainer
    assert issubclass(trainer_class("mllm", "sft"), ChatTrainer)
    with pytest.raises(UserError, match="Did you mean 'llm'"):
        trainer_class("lllm")

    @register("trainer", "mine", replace=True)
    class Mine(ChatTrainer):
        pass

    assert type(chat_trainer(llama(), name="mine")) is Mine


# ------------------------------------------------------------------------------------------------------------ callbacks

def test_metrics_file_and_real_tokens_per_second(tmp_path):
    rows = chat_rows(16)
    trainer = chat_trainer(llama(), rows, eval_dataset=rows, callbacks=[MetricsLog(tmp_path / "metrics.jsonl"), LivePlot()],
                           training_kwargs={"num_train_epochs": 1, "max_steps": -1, "eval_strategy": "epoch",
                                            "logging_steps": 2})
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "loss" in line]
    assert [line["step"] for line in train] == [2, 4]
    assert {"epoch", "learning_rate", "grad_norm", "tokens_per_second", "seconds"} <= set(train[0])
    assert any("eval_loss" in line for line in lines)
    assert trainer.tokens_seen == sum(rows["length"])  # padding is not counted
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_one_progress_bar_of_ours_and_none_of_theirs():
    trainer = chat_trainer(llama(), training_kwargs={"disable_tqdm": False})
    kinds = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert kinds.count("ProgressBar") == 1
    assert not {"ProgressCallback", "PrinterCallback", "NotebookProgressCallback"} & set(kinds)
    quiet = chat_trainer(llama())
    assert not any(isinstance(callback, ProgressBar) for callback in quiet.callback_handler.callbacks)
