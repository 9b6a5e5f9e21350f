"""`train_on_responses_only` on TRL's own trainer, as Unsloth's notebooks use it."""

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from supertrainer.chat import render
from supertrainer.models.base import FastModel
from supertrainer.runtime import UserError
from supertrainer.trainers.responses import train_on_responses_only

PARTS = ("<|im_start|>user\n", "<|im_start|>assistant\n")


def talk(number, turns):
    roles = [("user", f"Question {number}.{turn}?") if turn % 2 == 0 else ("assistant", f"Answer {number}.{turn}!")
             for turn in range(turns)]
    return [{"role": "system", "content": "Be brief."}, *({"role": role, "content": text} for role, text in roles)]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    words = [message["content"] for number in range(4) for message in talk(number, 6)]
    return FastModel.from_pretrained("tiny_llama", texts=words, config={"hidden_size": 32, "num_hidden_layers": 1})


def sft_trainer(model, tokenizer, texts, folder, **options):
    args = SFTConfig(output_dir=str(folder), per_device_train_batch_size=4, max_steps=2, report_to="none", use_cpu=True,
                     bf16=False, dataset_text_field="text", save_strategy="no", **options)
    return SFTTrainer(model=model, args=args, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer)


def spoken(tokenizer, labels):
    """Return the texts of the unbroken stretches of one row's labels."""
    runs, inside = [], False
    for label in labels:
        if label != -100:
            if not inside:
                runs.append([])
            runs[-1].append(label)
        inside = label != -100
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("parts", [PARTS, (None, None)], ids=["parts given", "parts from the template"])
def test_trl_trainer_learns_the_responses_and_their_ends_only(model_and_tokenizer, tmp_path, parts):
    model, tokenizer = model_and_tokenizer
    talks = [talk(number, 2 + 2 * (number % 3)) for number in range(4)]
    trainer = sft_trainer(model, tokenizer, [render(tokenizer, turns) for turns in talks], tmp_path)
    assert train_on_responses_only(trainer, *parts) is trainer
    batch = next(iter(trainer.get_train_dataloader()))
    found = sorted(tuple(spoken(tokenizer, row)) for row in batch["labels"].tolist())
    expected = sorted(tuple(f"{turn['content']}<|im_end|>" for turn in turns if turn["role"] == "assistant")
                      for turns in talks)
    assert found == expected
    assert batch["labels"][batch["attention_mask"] == 0].eq(-100).all()
    before = [parameter.clone() for parameter in model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(check.passed for check in trainer.checks)


def test_rows_without_a_response_are_left_out_and_counted(model_and_tokenizer, tmp_path, caplog):
    model, tokenizer = model_and_tokenizer
    texts = [render(tokenizer, talk(0, 2)), render(tokenizer, talk(1, 1)), render(tokenizer, talk(2, 4))]
    trainer = sft_trainer(model, tokenizer, texts, tmp_path)
    train_on_responses_only(trainer, *PARTS)
    assert len(trainer.train_dataset) == 2


def test_parts_that_are_not_there(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    trainer = sft_trainer(model, tokenizer, [render(tokenizer, talk(0, 2))], tmp_path)
    with pytest.raises(UserError, match="No training row holds the response part '<start_of_turn>model"):
        train_on_responses_only(trainer, "<start_of_turn>user\n", "<start_of_turn>model\n")
    with pytest.raises(UserError, match="Pass both"):
        train_on_responses_only(trainer, PARTS[0])
