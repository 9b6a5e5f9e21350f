"""Encoding a split: against the tokenizer's own masks and TRL's own preparation, in one process and in several."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from supertrainer.chat import CHATML_TEMPLATE
from supertrainer.data.encode import SMALL_SET, encode_split, pieces_of
from supertrainer.data.packing import PackedDataset
from supertrainer.data.processes import each, processes
from supertrainer.runtime import UserError, no_bars

TEXTS = ["What does textwrap.dedent do?", "It removes common leading white space.\nFrom every line.", "Ünïcode, 日本語 🙂",
         "def f(x):\n    return x + 1", "Four.", "a" * 40]


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=320, special_tokens=["<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    inner = trained._tokenizer
    if bos:
        inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


TOKENIZER = make_tokenizer()
user, assistant = ({"role": role} for role in ("user", "assistant"))


def chat(*contents: str) -> list[dict]:
    return [{**(user, assistant)[number % 2], "content": content} for number, content in enumerate(contents)]


def chats(conversations: list, **columns) -> datasets.Dataset:
    features = {"messages": datasets.Json(), **{key: datasets.Value("string") for key in columns}}
    return datasets.Dataset.from_dict({"messages": conversations, **columns}, features=datasets.Features(features))


def own_masks(messages: list[dict]) -> tuple[list[int], list[int]]:
    """Return tokens and labels as transformers makes them from the template's `{% generation %}` markers."""
    found = TOKENIZER.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    labels = [token if loss else -100 for token, loss in zip(found["input_ids"], found["assistant_masks"], strict=True)]
    return found["input_ids"], labels


# ---------------------------------------------------------------------------------------------------------------------
# chat

contents = st.lists(st.sampled_from(TEXTS), min_size=2, max_size=6).map(lambda texts: texts[: len(texts) // 2 * 2])


@given(st.lists(contents, min_size=1, max_size=5), st.integers(4, 120))
def test_tokens_labels_and_counts_are_the_tokenizers_own(texts, limit):
    conversations = [chat(*row) for row in texts]
    own = [own_masks(messages) for messages in conversations]
    kept = [(ids[:limit], labels[:limit]) for ids, labels in own if any(label != -100 for label in labels[:limit])]
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    if not kept:
        with pytest.raises(UserError, match="prompt alone has"):
            encode_split(chats(conversations), TOKENIZER, max_length=limit)
        return
    split = encode_split(chats(conversations), TOKENIZER, max_length=limit)
    assert list(zip(split.dataset["input_ids"][:], split.dataset["labels"][:], strict=True)) == kept
    assert split.dataset["length"][:] == [len(ids) for ids, _ in kept]
    assert split.tokens == sum(len(ids) for ids, _ in kept)
    assert split.trained_tokens == sum(label != -100 for _, labels in kept for label in labels)
    used = [(ids, labels) for ids, labels in own if any(label != -100 for label in labels[:limit])]
    assert split.truncated == sum(len(ids) > limit for ids, _ in used)
    assert split.lost_end == sum(max(i for i, label in enumerate(labels) if label == end) >= limit for _, labels in used)
    assert len(split.rejected) == len(own) - len(kept) and split.counts.rows == len(own)
    assert split.roles["assistant"] == (sum(label != -100 for _, labels in own for label in labels),) * 2
    assert sum(tokens for tokens, _ in split.roles.values()) == sum(len(ids) for ids, _ in own)


def test_a_rejected_row_is_named_with_its_figures_and_kept_for_the_file():
    long = chat(TEXTS[1] * 5, "Four.")
    ids, labels = own_masks(long)
    first = next(index for index, label in enumerate(labels) if label != -100)
    rows = chats([chat("a", "Four."), long], name=["a.jsonl, line 1", "a.jsonl, line 7"])
    split = encode_split(rows, TOKENIZER, max_length=first)
    (problem,) = split.rejected
    assert problem.where == "a.jsonl, line 7" and problem.of_row and problem.column == "messages"
    assert f"prompt alone has {first} tokens and dataset.max_length is {first}" in problem.reason
    assert f"the whole row has {len(ids)} tokens" in problem.fix and "Raise dataset.max_length" in problem.fix
    assert json.loads(json.dumps(problem.record)) == {"messages": long}
    assert len(encode_split(rows, TOKENIZER, max_length=first + 1).rejected) == 0  # one token more is enough


def test_rows_that_choose_to_train_nothing_and_rows_rendered_before():
    quiet = [*chat("a"), {**assistant, "content": "Four.", "train": False}]
    rendered = chat("<|im_start|>user\na<|im_end|>\n", "Four.")
    split = encode_split(chats([quiet, chat("a", "b"), rendered]), TOKENIZER)
    silent, twice = split.rejected
    assert silent.where == "row 1" and "carries loss" in silent.reason and "train" in silent.fix
    assert twice.where == "row 3" and "<|im_start|>" in twice.reason and twice.fix.endswith(".")
    assert len(split.dataset) == 1


def test_weights_travel_only_when_a_row_has_some():
    plain, weighted = chat("a", "Four."), [*chat("a"), {**assistant, "content": "Four.", "weight": 0.5}]
    assert "loss_weights" not in encode_split(chats([plain]), TOKENIZER).dataset.column_names
    rows = encode_split(chats([plain, weighted]), TOKENIZER).dataset
    assert rows[0]["loss_weights"] is None and len(rows[1]["loss_weights"]) == rows[1]["length"]
    assert {weight for weight, label in zip(rows[1]["loss_weights"], rows[1]["labels"], strict=True) if label != -100} == {0.5}
    packed = PackedDataset(rows, 64)[0]
    assert sorted(packed["loss_weights"]) == sorted([1.0] * rows[0]["length"] + rows[1]["loss_weights"])


def test_train_on_reaches_the_masks():
    rows = chats([chat("a", "Four.", "b", "Four.")])
    counts = {choice: encode_split(rows, TOKENIZER, train_on=choice).trained_tokens
              for choice in ("last_assistant", "assistant", "all")}
    assert 0 < counts["last_assistant"] < counts["assistant"] < counts["all"]
    with pytest.raises(UserError, match="Did you mean 'assistant'"):
        encode_split(rows, TOKENIZER, train_on="asistant")


# ---------------------------------------------------------------------------------------------------------------------
# text


def test_a_text_begins_once_and_ends_trained():
    tokenizer = make_tokenizer(bos=True)
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    rows = encode_split(datasets.Dataset.from_dict({"text": ["Four.", "<s>Four.", "Four.<|im_end|>"]}), tokenizer, kind="text")
    body = TOKENIZER("Four.", add_special_tokens=False)["input_ids"]
    for row in rows.dataset:
        assert row["input_ids"] == [begin, *body, end] and row["labels"] == [-100, *body, end]
    assert rows.tokens == 3 * (len(body) + 2) and rows.trained_tokens == 3 * (len(body) + 1)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(2, 50))
def test_every_token_of_a_long_text_is_predicted_once(lengths, limit):
    texts = ["Four. " * length for length in lengths]
    split = encode_split(datasets.Dataset.from_dict({"text": texts}), TOKENIZER, kind="text", max_length=limit)
    whole = [[*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id] for text in texts]
    predicted = [label for row in split.dataset for label in row["labels"] if label != -100]
    assert predicted == [token for ids in whole for token in ids[1:]]
    assert max(split.dataset["length"][:]) <= limit and not split.truncated and not split.rejected
    assert split.counts.split_rows == sum(len(ids) > limit for ids in whole)
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in split.dataset)


def test_no_end_of_sequence_token_is_an_error():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="tokenizer.eos_token"):
        encode_split(datasets.Dataset.from_dict({"text": ["a"]}), tokenizer, kind="text")
    assert len(pieces_of(np.arange(2), 2)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# preferences, against TRL's own preparation

PAIRS = {"prompt": [chat("a"), chat("b", "Four.", TEXTS[2])], "chosen": [[{**assistant, "content": TEXTS[1]}]] * 2,
         "rejected": [[{**assistant, "content": "Four."}], [{**assistant, "content": TEXTS[3]}]]}
UNPAIRED = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False]}


def trained_by(trainer_class, config_class, rows: datasets.Dataset, folder) -> datasets.Dataset:
    model, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), hidden_size=8, intermediate_size=8,
                                                     num_hidden_layers=1, num_attention_heads=1)) for _ in range(2))
    args = config_class(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, max_length=512,
                        per_device_train_batch_size=2)
    with no_bars():
        return trainer_class(model=model, ref_model=reference, args=args, train_dataset=rows,
                             processing_class=make_tokenizer()).train_dataset


def as_json(columns: dict) -> datasets.Dataset:
    features = {key: datasets.Value("bool") if key == "label" else datasets.Json() for key in columns}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("kind, columns, trainer_class, config_class, answers", [
    ("preference", PAIRS, DPOTrainer, DPOConfig, ("chosen_ids", "rejected_ids")),
    ("unpaired_preference", UNPAIRED, KTOTrainer, KTOConfig, ("completion_ids",))])
def test_preferences_are_those_of_trl(kind, columns, trainer_class, config_class, answers, tmp_path):
    ours = encode_split(as_json(columns), TOKENIZER, kind=kind)
    theirs = trained_by(trainer_class, config_class, datasets.Dataset.from_dict(columns), tmp_path)
    after = TOKENIZER("\n", add_special_tokens=False)["input_ids"]  # TRL also trains what the template writes after the turn
    for one, other in zip(ours.dataset, theirs, strict=True):
        assert one["prompt_ids"] == other["prompt_ids"]
        for column in answers:
            assert one[column] + after == other[column] and one[column][-1] == TOKENIZER.eos_token_id
        assert one["length"] == len(one["prompt_ids"]) + max(len(one[column]) for column in answers)
    collate = DataCollatorForPreference(0) if kind == "preference" else DataCollatorForUnpairedPreference(0)
    assert collate(list(ours.dataset))["completion_mask"].sum() == ours.trained_tokens
    if kind == "unpaired_preference":
        assert ours.dataset["label"][:] == [True, False]
    assert encode_split(datasets.Dataset.from_dict(columns), TOKENIZER, kind=kind).counts == ours.counts


def test_preferences_that_do_not_fit():
    whole = encode_split(as_json(PAIRS), TOKENIZER, kind="preference").dataset[1]
    prompt = len(whole["prompt_ids"])
    cut = encode_split(as_json(PAIRS), TOKENIZER, kind="preference", max_length=prompt + 6)
    row = cut.dataset[1]
    assert row["chosen_ids"] == whole["chosen_ids"][:6] and row["rejected_ids"] == whole["rejected_ids"][:6]
    assert cut.truncated == cut.lost_end == 1  # the other row is short enough
    full = encode_split(as_json(PAIRS), TOKENIZER, kind="preference", max_length=prompt)
    assert len(full.dataset) == 1 and f"prompt alone has {prompt} tokens" in full.rejected[0].reason
    same = {**PAIRS, "chosen": [[{**assistant, "content": "Four. Five."}]] * 2, "rejected": [[{**assistant, "content": "Four. Six."}]] * 2}
    first = len(encode_split(as_json(same), TOKENIZER, kind="preference").dataset[0]["prompt_ids"])
    with pytest.raises(UserError, match="both answers are the same 2 tokens"):
        encode_split(as_json({key: value[:1] for key, value in same.items()}), TOKENIZER, kind="preference",
                     max_length=first + 2)


# ---------------------------------------------------------------------------------------------------------------------
# processes, streams, memory


def many(count: int) -> datasets.Dataset:
    rows = [chat(TEXTS[n % 6], TEXTS[n * 7 % 5] * (1 + n % 4)) for n in range(count)]
    return chats(rows, name=[f"row-{n}" for n in range(count)])


def test_several_processes_give_what_one_gives_in_the_same_order():
    rows = many(SMALL_SET + 300)
    before = dict(os.environ)
    with no_bars():
        one = encode_split(rows, TOKENIZER, max_length=45, num_proc=1)
        three = encode_split(rows, TOKENIZER, max_length=45, num_proc=3)
        few = encode_split(rows.select(range(300)), TOKENIZER, max_length=45, num_proc=2)
    assert dict(os.environ) == before
    assert one.counts == three.counts and one.truncated > 0 and one.rejected
    assert one.dataset.data.table.equals(three.dataset.data.table)
    assert three.dataset.cache_files and not few.dataset.cache_files  # many rows are in a mapped file
    assert few.dataset["input_ids"][:] == one.dataset.select(range(len(few.dataset)))["input_ids"][:]
    assert Path(three.dataset.cache_files[0]["filename"]).exists()


def test_a_stream_is_encoded_as_it_is_read():
    rows = many(400)
    whole = encode_split(rows, TOKENIZER, max_length=45)
    stream = encode_split(rows.to_iterable_dataset(), TOKENIZER, max_length=45)
    assert stream.tokens == 0
    first = next(iter(stream.dataset))
    assert first == whole.dataset[0] | {"loss_weights": None} and 0 < stream.counts.rows < 400
    again = encode_split(rows.to_iterable_dataset(), TOKENIZER, max_length=45)
    assert [row["labels"] for row in again.dataset] == whole.dataset["labels"][:]
    assert again.counts == whole.counts and again.rejected


def test_errors_of_a_worker_reach_the_parent():
    rows, broken = many(SMALL_SET + 10), make_tokenizer()
    broken.chat_template = None
    with no_bars(), pytest.raises(UserError, match="chat template"):
        encode_split(rows, broken, num_proc=2)

    def fails_late(start: int, stop: int) -> int:
        if start == 5:
            raise UserError("the sixth", "and why")
        return start

    found = []
    with pytest.raises(UserError) as error:
        found.extend(each(fails_late, [(n, n + 1) for n in range(9)], 2))
    assert error.value.problems == ("the sixth", "and why")
    with pytest.raises(UserError, match=r"Lower dataset.num_proc \(it was 2\)"):
        list(each(lambda start, stop: start and os._exit(1), [(0, 1), (1, 2), (2, 3)], 2))


def test_how_many_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert processes(100) == 8 and processes(100, few=True) == 1 and processes(100, 3) == 3 and processes(5) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes(100) == 2
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes(100) == 1


def test_wrong_calls():
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(UserError, match="there is no messages. The columns are: text"):
        encode_split(rows, TOKENIZER, kind="chat")
    with pytest.raises(UserError, match="max_length=1"):
        encode_split(rows, TOKENIZER, kind="text", max_length=1)


def test_the_benchmark_runs():
    script = Path(__file__).parent.parent / "benchmarks" / "data_preparation.py"
    done = subprocess.run([sys.executable, str(script), "--rows", "200", "--rounds", "1", "--tokenizer", "local"],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = ([cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()
                    if line.startswith(("| supertrainer", "| trl")))
    assert ours[5:7] == theirs[5:7], "the same rows must give the same tokens, and the same tokens with loss"
    assert int(ours[7].replace(",", "")) <= int(theirs[7].replace(",", ""))
