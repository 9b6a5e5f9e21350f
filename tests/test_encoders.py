"""Encoders end to end: formats and bad rows, tokens and labels, three heads trained, saved, loaded and asked again."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, List, Value
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import BCEWithLogitsLoss
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import TokenClassifierOutput

from supertrainer.benchmark import quality
from supertrainer.data import bert
from supertrainer.data.base import load_splits, training_texts
from supertrainer.data.rows import Problems, rows_of
from supertrainer.data.texts import encode_tags
from supertrainer.export.merge import save_model
from supertrainer.inference.base import Classification
from supertrainer.inference.encoders import classify
from supertrainer.inference.engines.hf import HFEngine
from supertrainer.inference.requests import result_rows, results_table
from supertrainer.metrics.multi_label import multi_label_report
from supertrainer.metrics.tags import entities, tag_report
from supertrainer.models.base import load_finished
from supertrainer.models.bert import FastBERT
from supertrainer.models.builtin import train_byte_bpe, train_wordpiece
from supertrainer.models.info import info, task_of
from supertrainer.models.llm import FastLLM
from supertrainer.models.padding import space_before_words
from supertrainer.runtime import UserError
from supertrainer.trainers.base import build_trainer
from supertrainer.trainers.bert import class_weights_for

pytestmark = pytest.mark.filterwarnings("ignore")


# Which columns are what

PAIR = {"text": "x", "text_pair": "y"}


@pytest.mark.parametrize("record,options,form,columns", [
    ({"text": "x", "label": "a"}, {}, "text_label", {"text": "text", "label": "label"}),
    ({"sentence": "x", "label": 1, "idx": 3}, {}, "text_label", {"text": "sentence", "label": "label"}),
    ({"text": "x", "labels": "a"}, {}, "text_label", {"text": "text", "label": "labels"}),
    ({"body": "x", "stars": 3}, {"columns": {"text": "body", "label": "stars"}}, "text_label", {"text": "body", "label": "stars"}),
    ({**PAIR, "label": 0}, {}, "text_pair_label", {**{k: k for k in PAIR}, "label": "label"}),
    ({"premise": "x", "hypothesis": "y", "label": 0}, {}, "text_pair_label",
     {"text": "premise", "text_pair": "hypothesis", "label": "label"}),
    ({"sentence1": "x", "sentence2": "y", "label": 0}, {}, "text_pair_label",
     {"text": "sentence1", "text_pair": "sentence2", "label": "label"}),
    ({"question": "x", "sentence": "y", "label": 0}, {}, "text_pair_label",
     {"text": "question", "text_pair": "sentence", "label": "label"}),
    ({"premise": "x", "hypothesis": "y", "label": 0}, {"format": "text_label", "columns": {"text": "premise"}}, "text_label",
     {"text": "premise", "label": "label"}),
    ({"text": "x", "labels": ["a"]}, {}, "multi_label", {"text": "text", "labels": "labels"}),
    ({"text": "x", "label": ["a"]}, {}, "multi_label", {"text": "text", "labels": "label"}),
    ({"text": "x", "labels": []}, {}, "multi_label", {"text": "text", "labels": "labels"}),
    ({"text": "x", "labels": '["a", "b"]'}, {}, "multi_label", {"text": "text", "labels": "labels"}),
    ({**PAIR, "labels": ["a"]}, {}, "multi_label", {**{k: k for k in PAIR}, "labels": "labels"}),
    ({"text": "x", "labels": "a"}, {"format": "multi_label"}, "multi_label", {"text": "text", "labels": "labels"}),
    ({"tokens": ["x"], "ner_tags": [0], "id": "1"}, {}, "token_tags", {"tokens": "tokens", "tags": "ner_tags"}),
    ({"words": ["x"], "labels": ["O"]}, {}, "token_tags", {"tokens": "words", "tags": "labels"}),
    ({"tokens": '["x"]', "tags": '["O"]'}, {}, "token_tags", {"tokens": "tokens", "tags": "tags"}),
    ({"tokens": ["x"], "pos_tags": [0], "ner_tags": [1]}, {"columns": {"tags": "pos_tags"}}, "token_tags",
     {"tokens": "tokens", "tags": "pos_tags"}),
])
def test_the_format_is_read_from_the_columns_and_can_be_set(record, options, form, columns):
    found = bert.detect(rows_of("set", [record]), options, Problems())
    assert (found.format, dict(found.columns)) == (form, columns)


def test_every_documented_example_is_its_own_format():
    for name, form in bert.FORMATS.items():
        problems = Problems()
        found = bert.normalise(rows_of("set", [form.example]), {}, problems)
        assert (found.format, found.kind, problems.found) == (name, form.kind, []), name


# Bad rows: each names its place, its column, what is wrong and what to do, and leaves a hole in its place

GOOD = [{"text": "one", "label": "odd"}, {"text": "two", "label": "even"}]
SETS = [{"text": "one", "labels": ["odd", "small"]}, {"text": "two", "labels": []}]
TAGS = [{"tokens": ["In", "Rome"], "tags": ["O", "B-LOC"]}, {"tokens": ["No"], "tags": ["O"]}]


@pytest.mark.parametrize("good,bad,column,reason,fix", [
    (GOOD, {"text": None, "label": "odd"}, "text", "the text is missing", "Give every row a text"),
    (GOOD, {"label": "odd"}, "text", "the text is missing", "delete the row"),
    (GOOD, {"text": " \n", "label": "odd"}, "text", "the text is empty", "Fill it in"),
    (GOOD, {"text": 7, "label": "odd"}, "text", "the text is 7, not a string", "Give every row a text"),
    (GOOD, {"text": "a\0", "label": "odd"}, "text", "NUL character (position 2)", "Take it out"),
    (GOOD, {"text": "a\ud83d", "label": "odd"}, "text", "half of a character, U+D83D (position 2)", "UTF-8"),
    (GOOD, {"text": "x"}, "label", "the label is missing", "Give every row a word or a whole number"),
    (GOOD, {"text": "x", "label": float("nan")}, "label", "the label is missing", "delete the row"),
    (GOOD, {"text": "x", "label": ""}, "label", "the label is missing", "delete the row"),
    (GOOD, {"text": "x", "label": 0.5}, "label", "0.5 is not a label", "a word or a whole number"),
    (GOOD, {"text": "x", "label": 1}, "label", "label 1 is a number, and the classes are words", "Allowed: even, odd."),
    ([{"text": "x", "label": 0}, {"text": "y", "label": 1}], {"text": "z", "label": "one"}, "label",
     "label 'one' is a word, and the classes are numbers", "Allowed: 0, 1."),
    ([{"text": "x", "label": 0}, {"text": "y", "label": 1}], {"text": "z", "label": -1}, "label",
     "label -1 is out of range (public sets mark unlabelled rows with -1)", "Allowed: 0, 1."),
    ([{**PAIR, "label": "a"}, {**PAIR, "label": "b"}], {"text": "x", "text_pair": None, "label": "a"}, "text_pair",
     "the text is missing", "Give every row a text"),
    (SETS, {"text": "x"}, "labels", "the labels are missing", '[] means: no class'),
    (SETS, {"text": "x", "labels": "odd, small"}, "labels", "the labels are 'odd, small', not a list", 'e.g. ["red", "round"]'),
    (SETS, {"text": "x", "labels": ["odd", None]}, "labels", "label 2 of 2: the label is missing", "a word or a whole number"),
    (SETS, {"text": "x", "labels": ["odd", 3]}, "labels", "label 2 of 2: label 3 is out of range", "Allowed: odd, small."),
    (TAGS, {"tokens": ["In"], "tags": ["O", "O"]}, "tags", "1 tokens and 2 tags", "Give every token one tag"),
    (TAGS, {"tokens": ["In", 7], "tags": ["O", "O"]}, "tokens", "token 2 is 7, not a string", "Give every row a text"),
    (TAGS, {"tokens": ["In", ""], "tags": ["O", "O"]}, "tokens", "token 2 is empty", "Fill it in"),
    (TAGS, {"tokens": ["In", "Rome"], "tags": ["O", None]}, "tags", "tag 2: the label is missing", "a word or a whole number"),
    (TAGS, {"tokens": ["In"], "tags": [-100]}, "tags", "tag 1: label -100 is out of range", "Allowed: O, B-LOC."),
    (TAGS, {"tokens": [], "tags": []}, "tokens", "the list of tokens is empty", "Fill it in"),
    (TAGS, {"tokens": "In Rome", "tags": ["O", "O"]}, "tokens", "the tokens are 'In Rome', not a list", 'e.g. ["In", "Paris"]'),
    (TAGS, {"tokens": ["In"]}, "tags", "the tags are missing", '["O", "B-LOC"]'),
])
def test_bad_rows(good, bad, column, reason, fix):
    rows, problems = rows_of("d.jsonl", [*good, bad, *good]), Problems()
    names = bert.check_classes(rows, {}, problems)
    assert not problems.found, "the other rows are sound"
    found = bert.normalise(rows, {}, problems, names)
    (problem,) = problems.found
    assert (problem.where, problem.column, problem.of_row) == ("d.jsonl, row 3", column, True)
    assert reason in problem.reason and fix in problem.fix and problem.record == bad
    assert [row is None for row in found.rows] == [False, False, True, False, False]
    assert str(problem).startswith(f"d.jsonl, row 3, column {column!r}: ")


@pytest.mark.parametrize("label,reason,fix", [
    ("od", "label 'od' is unknown: no training row has it", "Allowed: even, odd. Did you mean 'odd'?"),
    (9, "label 9 is out of range", "Allowed: even, odd."),
    (-1, "label -1 is out of range", "Allowed: even, odd."),
    (0, "label 0 is a number, and the classes are words", "Allowed: even, odd."),
])
def test_labels_of_held_out_rows(label, reason, fix):
    problems = Problems()
    bert.normalise(rows_of("e.jsonl", [{"text": "x", "label": label}]), {}, problems, ["even", "odd"])
    assert reason in problems.found[0].reason and fix in problems.found[0].fix


@pytest.mark.parametrize("records,reason", [
    ([{"text": "x", "label": "a"}] * 3, "all rows have the same label (a)"),
    ([{"text": "x", "label": None}] * 3, "all rows have the same label (none)"),
    ([{"tokens": ["x"], "tags": ["O"]}] * 3, "all words have the same tag (O)"),
    ([{"text": "x", "labels": []}] * 3, "no row has a label"),
    ([{"text": "x", "label": 0.5}, {"text": "x", "label": 2.25}, {"text": "x", "label": 3.0}],
     "the labels are decimal numbers, e.g. 0.5"),
    ([{"text": "x", "labels": [0, 1, 0]}, {"text": "x", "labels": [0, 0, 0]}], "the labels look like one 0 or 1 for each class"),
    ([{"text": "x", "labels": [0.0, 1.0, 0.0]}, {"text": "x", "labels": [1.0, 0.0, 0.0]}], "one 0 or 1 for each class"),
])
def test_sets_without_classes(records, reason):
    problems = Problems()
    bert.check_classes(rows_of("d.jsonl", records), {}, problems)
    (problem,) = problems.found
    assert reason in problem.reason and not problem.of_row and problem.column in ("label", "labels", "tags")
    if "decimal" in reason:
        assert "regression, which is not offered" in problem.fix


def test_lists_of_two_numbers_are_classes():
    rows = rows_of("d", [{"text": "x", "labels": [0, 1]}, {"text": "y", "labels": [0, 1]}])
    problems = Problems()
    assert bert.check_classes(rows, {}, problems) == ("0", "1") and not problems.found


@pytest.mark.parametrize("options,where,fix", [
    ({"format": "multilabel"}, "multilabel", "multi_label"),
    ({"format": "sharegpt"}, "sharegpt", "text_label"),
    ({"columns": {"text": "txet"}}, "d.jsonl", "Did you mean 'text'?"),
    ({"format": "text_pair_label"}, "d.jsonl", "dataset.columns.text_pair"),
])
def test_wrong_settings_are_told_once(options, where, fix):
    problems = Problems()
    rows = rows_of("d.jsonl", GOOD)
    names = bert.check_classes(rows, options, problems)
    found = bert.normalise(rows, options, problems, names)
    assert found.rows == [None, None] and len(problems.found) == 1
    assert where in problems.found[0].where and fix in problems.found[0].fix


def test_names_of_a_source_are_kept_and_parts_with_another_order_agree():
    rows = rows_of("train", [{"text": "x", "label": 1}, {"text": "y", "label": 0}], labels=("neg", "pos"))
    names = bert.check_classes(rows, {}, Problems())
    assert names == ("neg", "pos")
    assert [row["label"] for row in bert.normalise(rows, {}, Problems(), names).rows] == [1, 0]
    other = rows_of("test", [{"text": "x", "label": 1}, {"text": "y", "label": "pos"}], labels=("pos", "neg"))
    assert [row["label"] for row in bert.normalise(other, {}, Problems(), names).rows] == [0, 1]
    counted = rows_of("stars", [{"text": "x", "label": 0}, {"text": "y", "label": 4}], labels=("1", "2", "3", "4", "5"))
    assert [row["label"] for row in bert.normalise(counted, {}, Problems()).rows] == [0, 4], "a place, not the name '4'"
    tags = rows_of("ner", [{"tokens": ["Rome"], "ner_tags": [1]}], labels=("O", "B-LOC"))
    assert bert.normalise(tags, {}, Problems()).rows[0]["tags"] == [1]
    sets = rows_of("emotions", [{"text": "x", "labels": [2, 0]}], labels=("joy", "fear", "rage"))
    assert bert.normalise(sets, {}, Problems()).rows[0]["labels"] == [0, 2]


def test_names_given_in_the_settings_are_those_that_numbers_stand_for():
    options = {"labels": ["neg", "pos"]}
    found = bert.normalise(rows_of("d", [{"text": "x", "label": 1}, {"text": "y", "label": "neg"}]), options, Problems(),
                           options["labels"])
    assert [row["label"] for row in found.rows] == [1, 0]


def test_rows_that_may_be_left_out(tmp_path):
    """Through the whole reading of a file: the budget, the sentence, and what is left."""
    file = tmp_path / "d.jsonl"
    rows = [{"tokens": ["In", f"Rome{n}"], "tags": ["O", "B-LOC"]} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"tokens": ["In"], "tags": ["O", "O"]}]))
    with pytest.raises(UserError) as error:
        load_splits("bert", {"path": str(file), "eval_fraction": 0.2}, seed=0)
    assert error.value.problems[0] == (f"{file}, line 10, column 'tags': 1 tokens and 2 tags. Give every token one tag, or "
                                       "delete the row.")
    splits = load_splits("bert", {"path": str(file), "eval_fraction": 0.2, "max_rejects": 1}, seed=0)
    assert len(splits.train) + len(splits.eval) == 9 and splits.labels == ("O", "B-LOC")
    assert [problem.where for problem in splits.rejected] == [f"{file}, line 10"]


def test_final_rows_by_hand():
    pair = bert.normalise(rows_of("d", [{"premise": "A  Dog", "hypothesis": "An\nanimal", "label": "yes", "name": "n1"},
                                        {"premise": "x", "hypothesis": "y", "label": "no"}]), {}, Problems())
    assert pair.rows[0] == {"text": "A  Dog", "text_pair": "An\nanimal", "label": 1, "name": "n1", "_stratum": 1,
                            "_key": "a dog\nan animal"}
    assert pair.columns == {"text": "text", "text_pair": "text_pair", "label": "label"}
    table = bert.to_dataset(pair.rows, pair.kind, ["no", "yes"])
    assert table.column_names == ["text", "text_pair", "label", "name"]
    assert table.features["label"] == ClassLabel(names=["no", "yes"])
    tags = bert.normalise(rows_of("d", TAGS), {}, Problems())
    assert tags.rows[0] == {"tokens": ["In", "Rome"], "tags": [0, 1], "name": "d, row 1", "_key": "in rome", "_stratum": 0}
    table = bert.to_dataset(tags.rows, tags.kind, ["O", "B-LOC"])
    assert table.features["tokens"] == List(Value("string")) and table[1] == {"tokens": ["No"], "tags": [0], "name": "d, row 2"}
    sets = bert.normalise(rows_of("d", SETS), {}, Problems())
    assert [row["labels"] for row in sets.rows] == [[0, 1], []]
    assert bert.to_dataset(sets.rows, sets.kind, ["odd", "small"])[0]["labels"] == [0, 1]


def test_classes_that_only_one_side_of_the_split_has():
    def table(*labels):
        return bert.to_dataset([{"text": "x", "labels": list(row), "name": ""} for row in labels], "multi_label", ["a", "b"])

    assert bert.check_training_classes(table([0], []), ["a", "b"]) == ([], ["1 of 2 classes have no training row: b"])
    assert bert.check_training_classes(table([0, 1]), ["a", "b"]) == ([], [])
    assert bert.class_counts(table([0], [0, 1], []), ["a", "b"]) == [2, 1]
    one = bert.to_dataset([{"text": "x", "label": 0, "name": ""}], "classification", ["a", "b"])
    (check,), warnings = bert.check_training_classes(one, ["a", "b"])
    assert not check.passed and check.detail == "b" and warnings == []


# Tokens


def pieces_tokenizer(pieces="a goal ##keeper song Paris in ,", sides=True, **more):
    """A tokenizer whose every token number can be written down by hand."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces.split()]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = ["input_ids", *(["token_type_ids"] if sides else []), "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", model_input_names=names, **more)


def dataset_of(records, names=None):
    rows = rows_of("d", records)
    found = bert.normalise(rows, {}, problems := Problems(), names or ())
    assert not problems.found, problems.found
    return bert.to_dataset(found.rows, found.kind, names or bert.check_classes(rows, {}, Problems()))


def test_pairs_by_hand_and_as_transformers_cuts_them():
    records = [{"text": "a goal a goal a", "text_pair": "song", "label": 0}, {"text": "a", "text_pair": "goal song", "label": 1}]
    encoded = bert.encode_rows(dataset_of(records), pieces_tokenizer(), 7)
    assert encoded.dataset[0] == {"input_ids": [2, 4, 5, 4, 3, 7, 3], "token_type_ids": [0, 0, 0, 0, 0, 1, 1],
                                  "attention_mask": [1] * 7, "labels": 0}
    assert encoded.dataset[1]["input_ids"] == [2, 4, 3, 5, 7, 3] and (encoded.truncated, encoded.lost_tags) == (1, 0)
    assert "token_type_ids" not in bert.encode_texts(dataset_of(records), pieces_tokenizer(sides=False), 7).column_names
    batch = bert.collator(pieces_tokenizer())([encoded.dataset[0], encoded.dataset[1]])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 0]]
    for row, length in zip(encoded.dataset, (7, 6), strict=True):
        assert len(row["input_ids"]) == length
    with pytest.raises(UserError, match="max_length=4 is too short: a row needs at least 5 tokens"):
        bert.encode_texts(dataset_of(records), pieces_tokenizer(), 4)


def test_a_row_that_just_fits_is_not_counted_as_cut():
    texts = [{"text": "a goal", "label": 0}, {"text": "a goal song", "label": 1}, {"text": "a", "label": 1}]
    assert [bert.encode_rows(dataset_of(texts), pieces_tokenizer(), limit).truncated for limit in (3, 4, 5)] == [2, 1, 0]


def test_label_sets_become_zeros_and_ones():
    encoded = bert.encode_rows(dataset_of([{"text": "a", "labels": [2, 0]}, {"text": "a goal", "labels": []},
                                           {"text": "a", "labels": [1]}]), pieces_tokenizer(), 8)
    assert encoded.dataset["labels"][:] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    batch = bert.collator(pieces_tokenizer(), "multi_label")(list(encoded.dataset))
    assert batch["labels"].dtype == torch.float32 and batch["labels"].shape == (3, 3) and batch["input_ids"].shape == (3, 4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_tags_by_hand(side):
    tokenizer = pieces_tokenizer(padding_side=side)
    records = [{"tokens": ["goalkeeper", "in", "Paris", ","], "tags": ["B-PER", "O", "B-LOC", "O"]},
               {"tokens": ["Paris", "goalkeeper"], "tags": ["B-LOC", "B-PER"]}]
    encoded = bert.encode_rows(dataset_of(records), tokenizer, 20)  # O is 0, B-LOC 1, B-PER 2
    assert encoded.dataset["input_ids"][:] == [[2, 5, 6, 9, 8, 10, 3], [2, 8, 5, 6, 3]]
    assert encoded.dataset["labels"][:] == [[-100, 2, -100, 0, 1, 0, -100], [-100, 1, 2, -100, -100]]
    batch = bert.collator(tokenizer, "token_tags")(list(encoded.dataset))
    short = [-100, 1, 2, -100, -100]
    assert batch["labels"].tolist()[1] == ([*short, -100, -100] if side == "right" else [-100, -100, *short])
    assert ((batch["labels"] != -100).sum(1) == torch.tensor([4, 2])).all()
    cut = bert.encode_rows(dataset_of(records), tokenizer, 4)
    assert cut.dataset["labels"][:] == [[-100, 2, -100, -100], [-100, 1, 2, -100]] and (cut.truncated, cut.lost_tags) == (2, 1)


WORD = st.sampled_from(["a", "goal", "goalkeeper", "song", "Paris", ",", "in", "keeper", "unknown", "songs"])


@given(st.lists(WORD, min_size=1, max_size=12), st.integers(3, 16))
def test_every_word_within_the_limit_has_its_tag_once(words, limit):
    """Against a count that asks the tokenizer about one word at a time."""
    tokenizer = pieces_tokenizer()
    tags = [position % 3 for position in range(len(words))]
    found = encode_tags({"tokens": [words], "tags": [tags]}, tokenizer, limit)
    expected = [-100]
    for word, tag in zip(words, tags, strict=True):
        expected += [tag] + [-100] * (len(tokenizer(word, add_special_tokens=False)["input_ids"]) - 1)
    full = len(expected) + 1
    expected = [*expected[: limit - 1], -100]
    assert found["labels"] == [expected] and found["cut"] == [full > limit]
    assert found["lost"] == [sum(label != -100 for label in expected) < len(words)]


LABELLED = {"text_label": GOOD * 6, "multi_label": SETS * 6, "token_tags": TAGS * 6}


@pytest.mark.parametrize("form", list(LABELLED))
def test_streamed_rows_are_those_of_a_table(form, tmp_path):
    """Tokens and labels are the same; the trainer takes them, but not weights, for which rows must be counted."""
    names = {"text_label": ["even", "odd"], "multi_label": ["odd", "small"], "token_tags": ["O", "B-LOC"]}[form]
    file, held_out = tmp_path / "d.jsonl", tmp_path / "e.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in LABELLED[form]))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in LABELLED[form][:2]).replace("one", "three").replace("No", "Yes"))
    options = {"path": str(file), "eval_path": str(held_out), "labels": names, "streaming": True}
    streamed = load_splits("bert", options, seed=0)
    tokenizer = pieces_tokenizer()
    encoded = bert.encode_rows(streamed.train, tokenizer, 8)
    table = bert.encode_rows(dataset_of(LABELLED[form], names), tokenizer, 8)
    rows = sorted(map(str, table.dataset))
    assert encoded.truncated is None and set(map(str, encoded.dataset)) <= set(rows) and len(list(encoded.dataset)) > 2
    kind = streamed.kind
    model = tiny(BertForTokenClassification if kind == "token_tags" else BertForSequenceClassification, 2,
                 **({"problem_type": "multi_label_classification"} if kind == "multi_label" else {}))
    options = {"model": model, "processing_class": tokenizer, "train_dataset": encoded.dataset,
               "data_collator": bert.collator(tokenizer, kind), "output_dir": str(tmp_path),
               "training_kwargs": {"max_steps": 2, "disable_tqdm": True, "per_device_train_batch_size": 2}}
    build_trainer("bert", **options).train()
    with pytest.raises(UserError, match="dataset.streaming=false"):
        build_trainer("bert", **options, class_weights=[1.0, 2.0])


def test_a_slow_tokenizer_cannot_tag():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="Slow cannot say which word"):
        encode_tags({"tokens": [["a"]], "tags": [[0]]}, Slow(), 8)


# Losses, against plain transformers


def tiny(kind, labels, **more):
    torch.manual_seed(0)
    return kind(BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                           max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                           num_labels=labels, **more))


def trainer_for(model, data, kind, tokenizer, folder, **more):
    options = {"disable_tqdm": True, "learning_rate": 1e-2, "report_to": "none", **more.pop("training_kwargs", {})}
    return build_trainer("bert", model=model, processing_class=tokenizer, train_dataset=data, eval_dataset=data,
                         data_collator=bert.collator(tokenizer, kind), output_dir=str(folder), training_kwargs=options, **more)


def tag_rows():
    return bert.encode_texts(dataset_of([
        {"tokens": ["goalkeeper", "in", "Paris"], "tags": ["B-PER", "O", "B-LOC"]}, {"tokens": ["Paris"], "tags": ["B-LOC"]},
        {"tokens": ["a", "song", "in", "a", "song", ","], "tags": ["O"] * 6}, {"tokens": ["in", "a"], "tags": ["O", "O"]},
    ]), pieces_tokenizer(), 16)


def test_tag_loss_is_that_of_transformers(tmp_path):
    tokenizer, data = pieces_tokenizer(), tag_rows()
    model = tiny(BertForTokenClassification, 3)
    trainer = trainer_for(model, data, "token_tags", tokenizer, tmp_path)
    batch = bert.collator(tokenizer, "token_tags")(list(data))
    model.eval()
    assert trainer.task == "token_tags" and trainer.compute_loss(model, dict(batch)).item() == pytest.approx(
        model(**batch).loss.item(), abs=1e-6)


def test_multi_label_loss_is_that_of_transformers_and_weights_are_those_of_a_yes(tmp_path):
    tokenizer = pieces_tokenizer()
    data = bert.encode_texts(dataset_of([{"text": "a goal", "labels": [0, 2]}, {"text": "song", "labels": []},
                                         {"text": "in Paris", "labels": [1]}]), tokenizer, 8)
    model = tiny(BertForSequenceClassification, 3, problem_type="multi_label_classification").eval()
    batch = bert.collator(tokenizer, "multi_label")(list(data))
    plain = trainer_for(model, data, "multi_label", tokenizer, tmp_path)
    assert plain.compute_loss(model, dict(batch)).item() == pytest.approx(model(**batch).loss.item(), abs=1e-6)
    weighted = trainer_for(model, data, "multi_label", tokenizer, tmp_path, class_weights=[1.0, 2.0, 5.0])
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    expected = BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 5.0]))(logits, batch["labels"])
    assert weighted.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), abs=1e-6)
    with pytest.raises(UserError, match="label_smoothing_factor"):
        trainer_for(model, data, "multi_label", tokenizer, tmp_path, training_kwargs={"label_smoothing_factor": 0.1})


def test_a_word_counts_the_same_however_rows_are_batched(tmp_path):
    """Four rows of 3, 1, 6 and 2 words: one batch of four, or four accumulated batches of one."""
    states = []
    for size, steps in ((4, 1), (1, 4)):
        model = tiny(BertForTokenClassification, 3)
        trainer = trainer_for(model, tag_rows(), "token_tags", pieces_tokenizer(), tmp_path, training_kwargs={
            "per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1, "optim": "sgd",
            "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0})
        trainer.train()
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    before = torch.cat([p.detach().flatten() for p in tiny(BertForTokenClassification, 3).parameters()])
    assert (states[0] - before).abs().max() > 1e-3
    assert torch.allclose(states[0], states[1], atol=2e-6)


def test_tag_weights_by_hand(tmp_path):
    data = tag_rows()
    weights = class_weights_for("balanced", ["O", "B-LOC", "B-PER"], data["labels"][:], "token_tags")
    assert weights == pytest.approx([12 / (3 * 9), 12 / (3 * 2), 12 / (3 * 1)])
    tokenizer, model = pieces_tokenizer(), tiny(BertForTokenClassification, 3).eval()
    trainer = trainer_for(model, data, "token_tags", tokenizer, tmp_path, class_weights=weights)
    batch = bert.collator(tokenizer, "token_tags")(list(data))
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.log_softmax(-1)
    total = sum(-weights[label] * logits[row, place, label].item() for row, line in enumerate(batch["labels"].tolist())
                for place, label in enumerate(line) if label != -100)
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(total / 12, rel=1e-5)  # their mean weight is 1
    assert class_weights_for("balanced", ["a", "b"], [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]], "multi_label") == [3, 3]


@pytest.mark.parametrize("kind,options,labels,message", [
    (BertForSequenceClassification, {}, [0.0, 1.0], "rows are for multi_label, and the model's head is for classification"),
    (BertForSequenceClassification, {}, [-100, 1, -100], "rows are for token_tags"),
    (BertForTokenClassification, {}, 1, "rows are for classification, and the model's head is for token_tags"),
    (BertForSequenceClassification, {"problem_type": "multi_label_classification"}, [0.0, 1.0, 0.0], "rows have 3 labels"),
])
def test_rows_for_another_head_are_refused(tmp_path, kind, options, labels, message):
    rows = Dataset.from_list([{"input_ids": [2, 4, 3], "attention_mask": [1, 1, 1], "labels": labels}] * 2)
    with pytest.raises(UserError, match=re.escape(message)):
        trainer_for(tiny(kind, 2, **options), rows, "classification", pieces_tokenizer(), tmp_path)


def test_a_metric_that_is_not_measured_is_told_before_training(tmp_path):
    with pytest.raises(UserError, match="metric_for_best_model=accuracy is not measured for token_tags; allowed: loss, entity_f1"):
        trainer_for(tiny(BertForTokenClassification, 2, id2label={0: "O", 1: "B-A"}, label2id={"O": 0, "B-A": 1}), tag_rows(),
                    "token_tags", pieces_tokenizer(), tmp_path, training_kwargs={"metric_for_best_model": "accuracy"})


# Metrics, against scikit-learn and seqeval

ENTITY_CASES = [  # tags of two rows each, what was said, and seqeval 1.2.2's precision, recall and F1
    (["B-PER I-PER O B-LOC", "O O B-LOC"], ["B-PER O O B-LOC", "O B-PER B-LOC"], (0.5, 2 / 3, 4 / 7)),
    (["B-A I-A I-A", "O I-A B-A"], ["B-A I-A O", "O I-A I-A"], (0.0, 0.0, 0.0)),
    (["S-A O B-B E-B", "B-A I-A E-A"], ["S-A O B-B E-B", "B-A E-A S-A"], (0.5, 2 / 3, 4 / 7)),
]


@pytest.mark.parametrize("truth,said,expected", ENTITY_CASES)
def test_entity_scores_by_hand(truth, said, expected):
    truth, said = [row.split() for row in truth], [row.split() for row in said]
    report = tag_report(truth, said, sorted({tag for row in truth + said for tag in row}))
    assert (report.precision, report.recall, report.entity_f1) == pytest.approx(expected)


def test_entity_scores_equal_seqeval():
    """seqeval is no requirement (its last release is of 2020): `pip install seqeval` to run this."""
    reference = pytest.importorskip("seqeval.metrics")
    from seqeval.metrics.sequence_labeling import get_entities

    rng = random.Random(0)
    for scheme in ("O B-A I-A B-B I-B", "O B-A I-A E-A S-A B-B I-B E-B S-B"):
        tags = scheme.split()
        for _ in range(200):
            truth = [[rng.choice(tags) for _ in range(rng.randint(1, 9))] for _ in range(3)]
            said = [[rng.choice(tags) for _ in row] for row in truth]
            assert all([(kind, a, b - 1) for kind, a, b in entities(row)] == get_entities(row) for row in truth)
            report = tag_report(truth, said, tags)
            assert report.entity_f1 == pytest.approx(reference.f1_score(truth, said, zero_division=0))
            assert report.precision == pytest.approx(reference.precision_score(truth, said, zero_division=0))
            assert report.token_accuracy == pytest.approx(reference.accuracy_score(truth, said))


@given(st.lists(st.tuples(st.sampled_from("NVA"), st.sampled_from("NVA")), min_size=1, max_size=20))
def test_scores_of_tags_without_entities_are_scikit_learns(words):
    truth, said = zip(*words, strict=True)
    report = tag_report([truth], [said], list("NVA"))
    assert report.entity_f1 is None and report.token_accuracy == pytest.approx(accuracy_score(truth, said))
    assert report.macro_f1 == pytest.approx(f1_score(truth, said, average="macro", zero_division=0))
    assert {score.label: score.support for score in report.per_class} == {
        tag: truth.count(tag) for tag in {*truth, *said}}


@given(st.lists(st.tuples(st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3))), min_size=1, max_size=8))
def test_label_set_scores_by_counting(rows):
    truth, said = [sorted(a) for a, _ in rows], [sorted(b) for _, b in rows]
    report = multi_label_report(truth, said, list("abcd"), train_sets=truth)
    both = sum(len(a & b) for a, b in rows)
    every = sum(len(a) + len(b) for a, b in rows)
    assert report.micro_f1 == pytest.approx(2 * both / every if both else 0.0)
    assert report.subset_accuracy == pytest.approx(sum(a == b for a, b in rows) / len(rows))
    per = [(sum(n in a and n in b for a, b in rows), sum((n in a) + (n in b) for a, b in rows)) for n in range(4)]
    assert report.macro_f1 == pytest.approx(np.mean([2 * good / total if good else 0.0 for good, total in per]))
    usual = max(truth.count(row) for row in truth) / len(truth)
    assert report.baseline.subset_accuracy == pytest.approx(usual)


# From a file to answers, with each kind of rows

ANIMALS, THINGS = "cat dog horse owl".split(), "stone lamp brick spoon".split()
NUMBERS = "two three four five".split()
COLOURS = "red blue green grey black white brown pink".split()


def pair_rows(rng):
    """A thing and a claim about it: is the claim true? Neither text tells it alone."""
    for number in range(240):
        living, claimed = number % 2, number // 2 % 2
        yield {"sentence1": f"the {rng.choice(COLOURS)} {rng.choice(ANIMALS if living else THINGS)} is {rng.choice(COLOURS)}",
               "sentence2": f"it {'lives' if claimed else 'rests'}", "label": "true" if living == claimed else "false"}


def set_rows(rng):
    """Any of two labels: an animal is named, a number is named."""
    for number in range(160):
        living, counted = number % 2, number // 2 % 2
        words = [rng.choice(ANIMALS if living else THINGS), rng.choice(NUMBERS if counted else COLOURS), rng.choice(COLOURS)]
        rng.shuffle(words)
        yield {"text": f"we saw {' '.join(words)} there",
               "labels": ["animal"] * living + ["number"] * counted}


def sentence_rows(rng):
    """Animals are entities, also those of two words."""
    for number in range(160):
        animal, thing, one, two = rng.choice(ANIMALS), rng.choice(THINGS), rng.choice(COLOURS), rng.choice(COLOURS)
        if number % 3:
            yield {"tokens": [one, animal, "saw", two, thing, "."], "tags": ["O", "B-ANIMAL", "O", "O", "O", "O"]}
        else:
            yield {"tokens": [one, thing, "and", two, "sea", animal], "tags": ["O", "O", "O", "O", "B-ANIMAL", "I-ANIMAL"]}


KINDS = {"text_pair_label": ("classification", pair_rows, "accuracy"), "multi_label": ("multi_label", set_rows, "micro_f1"),
         "token_tags": ("token_tags", sentence_rows, "entity_f1")}


@pytest.fixture(scope="module", params=list(KINDS))
def finished(request, tmp_path_factory):
    """A tiny BERT trained on a small file of each format, saved with its proof."""
    kind, make, metric = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make(random.Random(0))))
    splits = load_splits("bert", {"path": str(file), "eval_fraction": 0.2}, seed=0)
    assert (splits.facts["format"], splits.kind) == (request.param, kind)
    assert len(splits.eval) >= 32 and len(splits.train) > 100 and splits.rejected == []
    train, held_out, names = splits.train, splits.eval, splits.labels
    model, tokenizer = FastBERT.from_pretrained("tiny_bert", texts=training_texts(splits), labels=names, task=kind, config={
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    encoded = [bert.encode_texts(part, tokenizer, 32, kind=kind) for part in (train, held_out)]
    trainer = build_trainer("bert", model=model, processing_class=tokenizer, train_dataset=encoded[0], eval_dataset=encoded[1],
                            data_collator=bert.collator(tokenizer, kind), output_dir=str(folder / "checkpoints"),
                            training_kwargs={"learning_rate": 2e-3, "num_train_epochs": 12, "disable_tqdm": True, "seed": 1,
                                             "per_device_train_batch_size": 16, "lr_scheduler_type": "constant"})
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    checks = save_model(model, tokenizer, folder / "model", family="bert", labels=list(names), rows=[
        {k: v for k, v in bert.collator(tokenizer, kind)([encoded[1][i]]).items() if k != "labels"} for i in range(2)])
    return {"kind": kind, "metric": metric, "before": before, "after": after, "train": train, "held_out": held_out,
            "names": names, "model": model, "tokenizer": tokenizer, "folder": folder / "model", "checks": checks}


def test_it_learns(finished):
    after, metric = finished["after"], f"eval_{finished['metric']}"
    assert after["eval_loss"] < finished["before"]["eval_loss"] / 2
    assert after[metric] > 0.9 and after[metric] > finished["before"][metric]
    assert task_of(finished["model"]) == info(finished["model"]).task == finished["kind"]


def test_what_is_saved_says_what_it_is(finished):
    assert all(check.passed for check in finished["checks"]), [check for check in finished["checks"] if not check.passed]
    config = json.loads((finished["folder"] / "config.json").read_text())
    architecture = "BertForTokenClassification" if finished["kind"] == "token_tags" else "BertForSequenceClassification"
    problem = {"classification": "single_label_classification", "multi_label": "multi_label_classification"}
    assert config["architectures"] == [architecture] and config.get("problem_type") == problem.get(finished["kind"])
    assert config["id2label"] == {str(i): name for i, name in enumerate(finished["names"])}


def asked(part, kind):
    if kind == "token_tags":
        return [list(words) for words in part["tokens"]]
    return list(zip(part["text"], part["text_pair"], strict=True)) if kind == "classification" else list(part["text"])


def test_it_comes_back_and_answers_as_plain_transformers_does(finished):
    family, model, tokenizer = load_finished(finished["folder"])
    kind, part = finished["kind"], finished["held_out"]
    engine = HFEngine(model, tokenizer, family, batch_size=5)
    assert (family, engine.task, info(model).task) == ("bert", kind, kind)
    answers = engine.classify(asked(part, kind))
    auto = AutoModelForTokenClassification if kind == "token_tags" else AutoModelForSequenceClassification
    plain, reader = auto.from_pretrained(finished["folder"]).eval(), AutoTokenizer.from_pretrained(finished["folder"])
    for row, answer in zip(part, answers, strict=True):
        if kind == "token_tags":
            inputs = reader(row["tokens"], is_split_into_words=True, return_tensors="pt")
            scores = plain(**inputs).logits[0].softmax(-1)
            first = [inputs.word_ids().index(word) for word in range(len(row["tokens"]))]
            assert answer.words == tuple(row["tokens"]) and answer.labels is None and answer.probabilities == {}
            assert answer.tags == tuple(plain.config.id2label[int(scores[place].argmax())] for place in first)
            assert answer.scores == pytest.approx([float(scores[place].max()) for place in first], abs=1e-5)
            assert answer.label == " ".join(answer.tags)
        elif kind == "multi_label":
            scores = plain(**reader(row["text"], return_tensors="pt")).logits[0].sigmoid().tolist()
            assert list(answer.probabilities.values()) == pytest.approx(scores, abs=1e-5)
            assert answer.labels == tuple(plain.config.id2label[i] for i, score in enumerate(scores) if score > 0.5)
        else:
            scores = plain(**reader(row["text"], row["text_pair"], return_tensors="pt")).logits[0].softmax(-1).tolist()
            assert list(answer.probabilities.values()) == pytest.approx(scores, abs=1e-5)
            assert answer.label == max(answer.probabilities, key=answer.probabilities.get) and answer.labels is None


def test_it_is_measured_beside_a_lazy_guess(finished):
    kind, part, names = finished["kind"], finished["held_out"], list(finished["names"])
    engine = HFEngine(finished["model"], finished["tokenizer"], "bert", batch_size=8)
    measure, column = {"classification": (quality.evaluate_classifier, "label"),
                       "multi_label": (quality.evaluate_label_sets, "labels"),
                       "token_tags": (quality.evaluate_tags, "tags")}[kind]
    result = measure(engine, asked(part, kind), part[column][:], names, finished["train"][column][:], samples=6)
    metric, scores = result["metric"], result["scores"]
    assert metric["name"] == finished["metric"] and metric["value"] == pytest.approx(finished["after"][f"eval_{metric['name']}"])
    assert metric["value"] > metric["baseline"] and not result["warnings"] and len(result["samples"]) == 6
    if kind == "token_tags":
        words = [tag for row in part["tags"] for tag in row]
        assert metric["baseline_name"] == "always 'O'" and metric["baseline"] == 0.0
        assert scores["token_accuracy_baseline"] == pytest.approx(words.count(0) / len(words))
        assert scores["token_accuracy"] > scores["token_accuracy_baseline"] and scores["macro_f1"] > 0.9
    elif kind == "multi_label":
        table = np.array([[float(n in row) for n in range(2)] for row in part["labels"]])
        said = np.array([[float(name in answer.labels) for name in names] for answer in engine.classify(part["text"][:])])
        assert scores["micro_f1"] == pytest.approx(f1_score(table, said, average="micro"))


# Heads


def test_one_checkpoint_takes_each_head(tmp_path):
    words = train_wordpiece(["in Paris on Monday"] * 4, 60)
    base = tiny(BertForSequenceClassification, 2, pad_token_id=0)
    base.resize_token_embeddings(len(words))
    base.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    for task, kind, problem in (("classification", "BertForSequenceClassification", "single_label_classification"),
                                ("multi_label", "BertForSequenceClassification", "multi_label_classification"),
                                ("token_tags", "BertForTokenClassification", None)):
        model, _ = FastBERT.from_pretrained(tmp_path, labels=["a", "b", "c"], task=task)
        assert (type(model).__name__, model.config.problem_type, model.config.num_labels) == (kind, problem, 3)
        assert info(model).task == task and "3 labels, new" in info(model).head
        assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    with pytest.raises(UserError, match="task='tags' means nothing for FastBERT; allowed: classification, multi_label"):
        FastBERT.from_pretrained(tmp_path, task="tags")
    with pytest.raises(UserError, match="task='token_tags' means nothing for FastLLM"):
        FastLLM.from_pretrained("tiny_llama", texts=["a b"], task="token_tags")


def test_an_adapter_on_a_tagger_learns_and_is_known(tmp_path):
    tokenizer, data = pieces_tokenizer(), tag_rows()
    model, _ = FastBERT.from_pretrained("tiny_bert", texts=["goalkeeper in Paris"], labels=["O", "B-LOC", "B-PER"],
                                        task="token_tags", config={"hidden_size": 32, "num_hidden_layers": 1})
    model = FastBERT.get_peft_model(model, r=4)
    assert model.active_peft_config.task_type == "TOKEN_CLS" and task_of(model) == "token_tags"
    assert any("modules_to_save" in name and p.requires_grad for name, p in model.named_parameters())
    model.get_base_model().resize_token_embeddings(len(tokenizer))
    trainer = trainer_for(model, data, "token_tags", tokenizer, tmp_path, training_kwargs={"max_steps": 30})
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2


def test_a_byte_level_tokenizer_reads_words_as_in_a_sentence_and_stays_so(tmp_path):
    tokenizer = train_byte_bpe(["in Paris in Paris"] * 3, 300)
    inside = tokenizer.convert_ids_to_tokens(tokenizer("in Paris").input_ids)[-1]
    assert inside == "ĠParis" and space_before_words(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for reader in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert reader.convert_ids_to_tokens(reader(["Paris"], is_split_into_words=True).input_ids) == ["ĠParis"]
    assert not space_before_words(pieces_tokenizer())


# Answers


def test_long_rows_of_words_are_read_in_pieces():
    """A model without attention says the same of a word wherever it stands, so pieces must change nothing."""

    class WordwiseForTokenClassification(BertForTokenClassification):
        """Scores each token by its embedding alone."""

        def forward(self, input_ids, attention_mask=None, token_type_ids=None):
            return TokenClassifierOutput(logits=self.classifier(self.bert.embeddings.word_embeddings(input_ids)))

    tokenizer, plain = pieces_tokenizer(), tiny(WordwiseForTokenClassification, 4).eval()
    rng = random.Random(0)
    rows = [[rng.choice(["a", "goalkeeper", "song", "Paris", "keeper"]) for _ in range(n)] for n in (1, 7, 25, 60)]
    whole = classify(plain, tokenizer, rows, None, 2, False)
    for limit in (4, 5, 9, 32):
        pieces = classify(plain, tokenizer, rows, limit, 3, False)
        assert [answer.tags for answer in pieces] == [answer.tags for answer in whole]
        assert all(a.scores == pytest.approx(b.scores) for a, b in zip(pieces, whole, strict=True))
    assert len(set(whole[-1].tags)) > 1


def test_words_that_have_no_token_get_a_tag_all_the_same():
    words = train_wordpiece(["in Paris"], 40)
    model = tiny(BertForTokenClassification, 2, id2label={0: "B-LOC", 1: "O"}, label2id={"B-LOC": 0, "O": 1})
    model.resize_token_embeddings(len(words))
    for limit in (None, 4):
        (answer,) = classify(model, words, [["in", "\u200d\x07", "Paris", "\x07"]], limit, 1, False)
        assert len(answer.tags) == 4 and answer.tags[1] == answer.tags[3] == "O" and answer.scores[1] == 0.0
    assert classify(model, words, [[]], 8, 1, False)[0].tags == ()


def test_pairs_and_single_texts_do_not_mix():
    model = tiny(BertForSequenceClassification, 2)
    with pytest.raises(UserError, match="Some of the texts are pairs"):
        classify(model, pieces_tokenizer(), [("a", "goal"), "a"], 16, 2, False)
    with pytest.raises(UserError, match="a list of words is for a model that tags words"):
        classify(model, pieces_tokenizer(), [["a", "goal"]], 16, 2, False)


def test_answers_as_rows_and_as_a_table():
    answers = [Classification("a", {"a": 0.75, "b": 0.25}, 0.5), Classification("a", {"a": 0.4, "b": 0.1}, 0.5, ()),
               Classification("O B-LOC", {}, 0.5, None, ("In", "Rome"), ("O", "B-LOC"), (0.9, 0.8))]
    rows = result_rows([{"text": "x"}, {"text": "y"}, {"tokens": ["In", "Rome"]}], answers)
    assert rows[0] == {"text": "x", "label": "a", "probabilities": {"a": 0.75, "b": 0.25}, "seconds": 0.5}
    assert rows[1]["labels"] == () and rows[2]["tags"] == ("O", "B-LOC")
    table = results_table(rows)
    assert "75%" in table and "no label" in table and "Rome/B-LOC" in table and "In Rome" in table
    json.dumps(rows)


def test_a_run_folder_is_not_needed(finished, tmp_path):
    """The folder alone, moved elsewhere, answers."""
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in Path(finished["folder"]).iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    _, model, tokenizer = load_finished(moved)
    part, kind = finished["held_out"].select(range(2)), finished["kind"]
    assert HFEngine(model, tokenizer, "bert").classify(asked(part, kind))[0].label == HFEngine(
        finished["model"], finished["tokenizer"], "bert").classify(asked(part, kind))[0].label
