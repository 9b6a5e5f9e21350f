"""Classification, embeddings, reload-and-continue, tables and DPO as notebooks write them, on tiny local models."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer

from supertrainer.models.info import info
from supertrainer.runtime import UserError
from supertrainer.unsloth import (
    FastLanguageModel,
    FastModel,
    PatchDPOTrainer,
    SFTConfig,
    SFTTrainer,
    TrainingArguments,
    apply_chat_template,
    heads,
    is_bfloat16_supported,
    standardize_sharegpt,
    to_sharegpt,
    train_on_responses_only,
)

sys.path.insert(0, str(Path(__file__).parent))
import tiny_unsloth  # noqa: E402
from tiny_unsloth import change, snapshot  # noqa: E402


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_unsloth.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_unsloth.bert(tmp_path_factory.mktemp("bert"))


# --- notebook 4: a classification head, on an encoder and on a language model ---

LABELS = {0: "question", 1: "statement", 2: "request"}


def sorted_texts():
    texts = ["What is two and two?", "It is four.", "Name a colour, please."]
    return Dataset.from_list([{"text": f"{texts[label]} {number}", "labels": label} for number in range(10) for label in LABELS])


def compute_metrics(pair):
    logits, labels = pair
    return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_classification_head(bert, llama, in_tmp, kind, full):
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=bert if kind == "bert" else llama, load_in_4bit=False, max_seq_length=64, dtype=None,
        auto_model=AutoModelForSequenceClassification, num_labels=len(LABELS), full_finetuning=full, id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()})
    if not full:
        model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, lora_dropout=0, bias="none",
                                                 use_gradient_checkpointing="unsloth", random_state=3407, task_type="SEQ_CLS")
    dataset = sorted_texts().map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=64), batched=True)
    before = snapshot(model)
    run = Trainer(
        model=model, processing_class=tokenizer, train_dataset=dataset, eval_dataset=dataset,
        data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=compute_metrics,
        args=TrainingArguments(per_device_train_batch_size=10, num_train_epochs=8, learning_rate=5e-3, warmup_steps=2,
                               lr_scheduler_type="linear", fp16=not is_bfloat16_supported(), bf16=is_bfloat16_supported(),
                               optim="adamw_torch", seed=3407, output_dir="outputs", report_to="none", save_strategy="no",
                               logging_steps=10))
    run.train()
    changed = change(before, model)
    assert changed and (full or all("lora_" in name or "modules_to_save" in name for name in changed))
    assert any("classifier" in name or "score" in name for name in changed)
    assert run.evaluate()["eval_accuracy"] > 0.9

    FastLanguageModel.for_inference(model)
    inputs = tokenizer(["What is two and two? 3", "It is four."], return_tensors="pt", padding=True).to("cuda")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert [model.config.id2label[index] for index in logits.argmax(-1).tolist()] == ["question", "statement"]

    model.save_pretrained("sorter")
    tokenizer.save_pretrained("sorter")
    loaded, _ = (FastModel if full else FastLanguageModel).from_pretrained("sorter", max_seq_length=64)
    assert type(loaded.get_base_model() if not full else loaded).__name__.endswith("ForSequenceClassification")
    assert next(loaded.parameters()).dtype == next(model.parameters()).dtype
    with torch.no_grad():
        # transformers' own Trainer leaves its autocast on the model: compare values, not types
        torch.testing.assert_close(FastModel.for_inference(loaded)(**inputs).logits.float(), logits.float(), atol=2e-2, rtol=2e-2)


def test_a_decoder_that_classifies_has_the_machines_type(llama, monkeypatch):
    for rates, expected in ((400.0, "bfloat16"), (90.0, "float32")):
        monkeypatch.setattr("supertrainer.runtime._cpu_rates", {"float32": 100.0, "bfloat16": rates})
        if not torch.cuda.is_available():
            model, _ = FastLanguageModel.from_pretrained(llama, num_labels=3)
            assert info(model).decision("dtype").value == expected
    model, _ = FastLanguageModel.from_pretrained(llama, num_labels=3, full_finetuning=True)
    assert model.dtype == torch.float32
    model, _ = FastLanguageModel.from_pretrained(llama, num_labels=3, torch_dtype="float32")
    assert model.dtype == torch.float32


def test_heads_by_other_words(bert, llama):
    many, _ = FastModel.from_pretrained(bert, num_labels=4, problem_type="multi_label_classification")
    assert many.config.problem_type == "multi_label_classification" and many.config.num_labels == 4
    one, _ = FastModel.from_pretrained(bert, num_labels=1)
    assert one.config.problem_type == "regression" and one.config.num_labels == 1
    tags, _ = FastModel.from_pretrained(bert, auto_model="AutoModelForTokenClassification", num_labels=5)
    assert type(tags).__name__ == "BertForTokenClassification" and tags.config.num_labels == 5
    causal, _ = FastModel.from_pretrained(llama, auto_model=transformers.AutoModelForCausalLM)
    assert type(causal).__name__ == "LlamaForCausalLM"
    with pytest.raises(UserError, match="num_labels=3 does not fit the 2 names"):
        FastModel.from_pretrained(bert, num_labels=3, id2label={0: "a", 1: "b"})
    with pytest.raises(UserError, match="contradict each other"):
        FastModel.from_pretrained(bert, id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0})
    with pytest.raises(UserError, match="from 0 to 1; it has \\[0, 2\\]"):
        FastModel.from_pretrained(bert, label2id={"a": 0, "b": 2})
    with pytest.raises(UserError, match="auto_model=AutoModelForSeq2SeqLM cannot be honoured"):
        FastModel.from_pretrained(bert, auto_model=transformers.AutoModelForSeq2SeqLM)
    with pytest.raises(UserError, match="problem_type='ranking' is unknown"):
        heads.asked_head(bert, {"problem_type": "ranking"})


def test_answers_by_a_few_rows_of_the_head(llama, in_tmp):
    """The other way notebooks classify: the output layer is cut down to the tokens of the labels, a collator keeps the last."""
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=64, load_in_4bit=False, dtype="float32")
    numbers = [tokenizer(f" {digit}", add_special_tokens=False)["input_ids"][-1] for digit in range(5)]
    assert len(set(numbers)) == 5
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[numbers].detach().clone())
    model.lm_head.out_features = 5
    model.config.tie_word_embeddings, model.config.vocab_size = False, 5
    model = FastLanguageModel.get_peft_model(model, r=8, target_modules=["lm_head", "q_proj", "v_proj", "up_proj"])
    wanted = {number: index for index, number in enumerate(numbers)}

    class DataCollatorForLastTokenLM(DataCollatorForSeq2Seq):
        def __call__(self, features, return_tensors=None):
            rows = [{"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"])} for row in features]
            batch = self.tokenizer.pad(rows, return_tensors="pt")
            labels = torch.full_like(batch["input_ids"], -100)
            for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                last = int((batch["input_ids"][row, :length] == numbers_of(batch["input_ids"][row, :length])).nonzero()[-1])
                labels[row, last] = wanted[int(batch["input_ids"][row, last])]
            return {**batch, "labels": labels}

    def numbers_of(ids):
        return torch.where(torch.isin(ids, torch.tensor(numbers)), ids, -1)

    words = ["What is", "It is", "Name a", "Red is", "Be brief"]
    texts = [f"{words[number % 5]} {number % 5}" for number in range(30)]
    run = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict({"text": texts}), max_seq_length=64,
                     data_collator=DataCollatorForLastTokenLM(tokenizer),
                     args=SFTConfig("out", max_steps=30, per_device_train_batch_size=10, learning_rate=1e-2, logging_steps=1,
                                    warmup_steps=0, save_strategy="no"))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0] and run.loss_reason is None


# --- notebook 6: save, load, continue ---


def chat(tokenizer, rows=8):
    turns = [[{"from": "human", "value": f"What is two and two? {number}"}, {"from": "gpt", "value": "It is four."}]
             for number in range(rows)]
    data = standardize_sharegpt(Dataset.from_dict({"conversations": turns}))
    return data.map(lambda batch: {"text": [tokenizer.apply_chat_template(convo, tokenize=False)
                                            for convo in batch["conversations"]]}, batched=True)


def sft(model, tokenizer, dataset, **options):
    run = SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=dataset, dataset_text_field="text", max_seq_length=64,
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer), packing=False,
        args=SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2, warmup_steps=0, learning_rate=5e-3,
                       logging_steps=1, optim="adamw_8bit", seed=3407, output_dir="outputs", report_to="none", **options))
    return train_on_responses_only(run, "<|im_start|>user\n", "<|im_start|>assistant\n")


def test_reload_and_continue(llama, in_tmp):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=64, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    dataset = chat(tokenizer)
    whole = sft(model, tokenizer, dataset, max_steps=4, save_steps=2, save_strategy="steps")
    whole.train()
    final = snapshot(model)
    assert [check.passed for check in whole.checks] == [True] * len(whole.checks) and len(whole.checks) == 3
    model.save_pretrained("lora_model")
    tokenizer.save_pretrained("lora_model")

    # the same run, stopped after two steps and gone on with in a new process's objects
    again, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=64, load_in_4bit=False)
    again = FastLanguageModel.get_peft_model(again, r=8, lora_alpha=16)
    resumed = sft(again, tokenizer, dataset, max_steps=4, save_strategy="no")
    stats = resumed.train(resume_from_checkpoint="outputs/checkpoint-2")
    assert stats.global_step == 4 and not change(final, again)

    # a new process: the adapter from its folder answers as before, and learns on
    loaded, loaded_tokenizer = FastLanguageModel.from_pretrained("lora_model", max_seq_length=64, load_in_4bit=False)
    assert not change({name: value for name, value in final.items()}, loaded)
    FastLanguageModel.for_inference(loaded)
    FastLanguageModel.for_inference(model)
    inputs = loaded_tokenizer.apply_chat_template([{"role": "user", "content": "What is two and two? 3"}], tokenize=True,
                                                  add_generation_prompt=True, return_tensors="pt", return_dict=True).to("cuda")
    asked = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    assert torch.equal(loaded.generate(**inputs, **asked), model.generate(**inputs, **asked))
    FastLanguageModel.for_training(loaded)
    more = sft(loaded, loaded_tokenizer, chat(loaded_tokenizer, 4), max_steps=2, save_strategy="no")
    more.train()
    changed = change(final, loaded)
    assert changed and all("lora_" in name for name in changed)
    loaded.save_pretrained("lora_model")  # over the older one
    third, _ = FastLanguageModel.from_pretrained("lora_model")
    assert not change(snapshot(loaded), third)


def test_checkpointing_comes_back_after_inference(llama):
    from supertrainer.models.adapters import is_checkpointing

    model, _ = FastLanguageModel.from_pretrained(llama, use_gradient_checkpointing="unsloth")
    model = FastLanguageModel.get_peft_model(model, r=2)
    assert is_checkpointing(model)
    FastLanguageModel.for_inference(model)
    assert not is_checkpointing(model)
    FastLanguageModel.for_training(model)
    assert is_checkpointing(model)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    assert not is_checkpointing(model)


# --- a table becomes a chat ---


def test_a_table_as_conversations(llama, in_tmp):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=256, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    table = Dataset.from_dict({"colour": ["red", "blue", None, "green"], "number": [1, 2, 3, 4], "good": ["yes", "no", "no", "yes"]})
    dataset = to_sharegpt(table, merged_prompt="[[The colour is {colour}.\n]]The number is {number}.", conversation_extension=3,
                          output_column_name="good")
    first = dataset[2]["conversations"]
    assert first[0] == {"from": "human", "value": "The number is 3."} and len(first) == 6
    assert [row["conversations"][0]["value"] for row in dataset][0] == "The colour is red.\nThe number is 1."
    assert len({turn["value"] for row in dataset for turn in row["conversations"][2::2]}) > 1  # the further turns are drawn
    dataset = standardize_sharegpt(dataset)
    dataset = apply_chat_template(dataset, tokenizer=tokenizer, default_system_message="Be brief.", chat_template=(
        "{SYSTEM}\n\n### Question:\n{INPUT}\n\n### Answer:\n{OUTPUT}"))
    end = tokenizer.eos_token
    assert dataset[2]["text"].removeprefix(tokenizer.bos_token or "").startswith(
        f"Be brief.\n\n### Question:\nThe number is 3.\n\n### Answer:\nno{end}\n\n### Question:\n")
    assert dataset[2]["text"].count(end) == 3 + (tokenizer.bos_token == end)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("### Question:\nx\n\n### Answer:\n")
    run = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=dataset, dataset_text_field="text", max_seq_length=256,
                     args=SFTConfig("out", max_steps=1, save_strategy="no", per_device_train_batch_size=2))
    assert run.train().global_step == 1
    with pytest.raises(UserError, match="extra_eos_tokens"):
        apply_chat_template(dataset, tokenizer, extra_eos_tokens=["x"])


# --- preferences, with TRL's own trainer ---


def test_dpo_with_trls_own_trainer(llama, in_tmp):
    PatchDPOTrainer()
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=64, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4)
    rows = Dataset.from_dict({"prompt": ["What is two and two?"] * 4, "chosen": ["It is four."] * 4, "rejected": ["Red is one."] * 4})
    before = snapshot(model)
    trl.DPOTrainer(model=model, ref_model=None, processing_class=tokenizer, train_dataset=rows, args=trl.DPOConfig(
        "out", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", use_cpu=not torch.cuda.is_available(),
        bf16=False, gradient_checkpointing=False, save_strategy="no")).train()
    after = dict(model.named_parameters())  # TRL adds a copy of the adapter as its reference
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all("lora_" in name for name in changed)
