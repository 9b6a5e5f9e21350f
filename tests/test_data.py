"""Reading, checking, splitting and collating rows; every kind of bad input with its file, row and fix."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image

from supertrainer.chat import CHATML_TEMPLATE, check_masks, render
from supertrainer.data import bert, llm, mllm
from supertrainer.data.base import load_splits, training_texts
from supertrainer.data.rows import same_text
from supertrainer.registry import names, register
from supertrainer.runtime import UserError

CONFIGS = Path(__file__).parents[1] / "supertrainer" / "configs"
TEXTS = [{"text": f"text number {n}", "label": "even" if n % 2 == 0 else "odd", "doc": n // 4} for n in range(40)]
CHATS = [{"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": f"Answer {n}."}]}
         for n in range(10)]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return name


def load(family, path=None, seed=0, **options):
    return load_splits(family, {"path": path, "eval_fraction": 0.2, **options}, seed)


def fails(family, path, **options):
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError) as error:
        load(family, path, **options)
    assert sorted(Path().rglob("*")) == before, "a failed load must write nothing"
    return error.value.problems


# ---------------------------------------------------------------- built-in sets

def test_modules_set_is_split_by_object_without_duplicates_or_labels_in_the_text():
    splits = load("bert", name="python_stdlib_modules", max_classes=12, seed=42)
    assert len(splits.labels) == 12 and splits.facts["rows"]["train"] > 1000 and splits.facts["rows"]["eval"] > 150
    owner = [{tuple(name.split(".")[:2]) for name in part["name"]} for part in (splits.train, splits.eval)]
    assert not owner[0] & owner[1]
    texts = [{same_text(text) for text in part["text"]} for part in (splits.train, splits.eval)]
    assert not texts[0] & texts[1]
    for text in [*splits.train["text"], *splits.eval["text"]]:
        assert not set(re.findall(r"[a-z0-9]+", text.lower())) & set(splits.labels), text
    assert set(splits.train["label"]) == set(splits.eval["label"]) == set(range(12))
    assert splits.facts["sources"][0]["version"].startswith("3.") and "missing_modules" in splits.facts["sources"][0]


def test_chat_set_has_unique_questions_and_no_answer_on_both_sides():
    splits = load("llm", name="python_stdlib_chat", seed=42)
    pairs = {part: [[turn["content"] for turn in row] for row in getattr(splits, part)["messages"]] for part in ("train", "eval")}
    questions = [question for part in pairs.values() for question, _ in part]
    assert len(set(questions)) == len(questions) > 3000 and "What does `textwrap.dedent` do?" in questions
    assert not {same_text(a) for _, a in pairs["train"]} & {same_text(a) for _, a in pairs["eval"]}
    answers = [answer for part in pairs.values() for _, answer in part]
    assert all(15 <= len(answer) <= 300 and "\n" not in answer for answer in answers)
    assert not [answer for answer in answers if re.match(r"[\w.]+\(", answer) or " -> " in answer]


def test_digits_are_stratified_and_at_least_300_are_held_out():
    splits = load("mllm", name="digits", question="Which?", image_size=16)
    assert splits.facts["rows"] == {"train": 1437, "eval": 360}
    assert max(splits.facts["labels"]["eval"].values()) - min(splits.facts["labels"]["eval"].values()) <= 2
    row = splits.eval[0]
    assert row["image"].size == (16, 16) and row["image"].mode == "RGB"
    assert mllm.prompts(row)[0][0]["content"] == [{"type": "image"}, {"type": "text", "text": "Which?"}]
    assert mllm.prompts(row)[1] in "0123456789"


@pytest.mark.parametrize(("family", "name"), [("bert", "python_stdlib_modules"), ("llm", "python_stdlib_chat")])
def test_built_in_rows_are_the_same_in_another_process_and_differ_by_seed(family, name):
    code = (f"from supertrainer.data.base import load_splits\n"
            f"print(load_splits({family!r}, {{'name': {name!r}, 'eval_fraction': 0.2}}, 7).facts['fingerprint'])")
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    here = load(family, name=name, seed=7).facts["fingerprint"]
    assert child.stdout.strip() == str(here) != str(load(family, name=name, seed=8).facts["fingerprint"])


def test_walking_the_library_leaves_nothing_behind():
    code = ("import sys; from supertrainer.data.builtin import documented_objects; before = set(sys.modules)\n"
            "objects, missing = documented_objects(); print(len(objects)); assert set(sys.modules) == before, set(sys.modules) - before")
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    assert child.stdout.strip().isdigit() and child.stderr == ""


def test_a_set_of_the_users_own_is_one_function():
    register("dataset", "my_test_set")(lambda options, seed: [dict(row) for row in TEXTS])
    assert load("bert", name="my_test_set").labels == ("even", "odd")


# ---------------------------------------------------------------- formats

@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.parquet"])
def test_text_formats_give_the_same_rows(name):
    splits = load("bert", write(name, TEXTS))
    assert splits.labels == ("even", "odd") and splits.facts["rows"] == {"train": 32, "eval": 8}
    assert splits.facts["labels"]["eval"] == {"even": 4, "odd": 4}
    everything = [*splits.train["text"], *splits.eval["text"]]
    assert sorted(everything) == sorted(row["text"] for row in TEXTS)
    assert splits.facts["sources"][0]["path"] == name and len(splits.facts["sources"][0]["sha256"]) == 64


def test_csv_with_a_byte_order_mark_quotes_and_numeric_labels():
    lines = ["text,stars"] + [f'"good, or\nnot {n}",{n % 3 + 3}' for n in range(30)]
    splits = load("bert", write("t.csv", ("\ufeff" + "\n".join(lines)).encode()), columns={"label": "stars"})
    assert splits.labels == ("3", "4", "5") and set(splits.train["label"]) == {0, 1, 2}


@pytest.mark.parametrize(("record", "columns", "turns"), [
    ({"prompt": "Hi {n}", "completion": "Yo"}, {}, [("user", "Hi {n}"), ("assistant", "Yo")]),
    ({"q": "Hi {n}", "a": "Yo"}, {"prompt": "q", "completion": "a"}, [("user", "Hi {n}"), ("assistant", "Yo")]),
    ({"instruction": "Add {n}", "input": "1", "output": "2"}, {}, [("user", "Add {n}\n\n1"), ("assistant", "2")]),
    ({"instruction": "Add {n}", "input": "", "output": "2"}, {}, [("user", "Add {n}"), ("assistant", "2")]),
    ({"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U {n}"}],
      "completion": [{"role": "assistant", "content": "A"}]}, {}, [("system", "S"), ("user", "U {n}"), ("assistant", "A")]),
])
def test_chat_shapes_become_messages(record, columns, turns):
    rows = [json.loads(json.dumps(record).replace("{n}", str(n))) for n in range(10)]
    splits = load("llm", write("c.jsonl", rows), columns=columns)
    found = sorted(json.dumps([(turn["role"], turn["content"]) for turn in row]) for row in
                   [*splits.train["messages"], *splits.eval["messages"]])
    assert found == sorted(json.dumps([(role, text.replace("{n}", str(n))) for role, text in turns]) for n in range(10))


def test_a_system_text_of_the_configuration_opens_conversations_that_have_none():
    own = {"messages": [{"role": "system", "content": "Mine."}, *CHATS[0]["messages"]]}
    splits = load("llm", write("c.jsonl", [own, *CHATS]), system="Be brief.")
    opening = Counter(row[0]["content"] for row in [*splits.train["messages"], *splits.eval["messages"]])
    assert opening == {"Be brief.": 10, "Mine.": 1}


def images(folder, names):
    for number, name in enumerate(names):
        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(Path(folder) / name)
    return folder


def test_image_folder_with_a_class_per_subfolder():
    folder = images("pets", [f"{kind}/{n}.png" for kind in ("cat", "dog") for n in range(5)])
    splits = load("mllm", folder, question="Which animal?", columns={"image": "photo"})
    assert splits.columns == {"image": "photo", "messages": "messages"}
    assert splits.facts["labels"]["eval"] == {"cat": 1, "dog": 1} and len(splits.facts["sources"][0]["sha256"]) == 64
    assert splits.train[0]["photo"].size == (8, 8) and mllm.prompts(splits.train[0])[1] == "cat"


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_image_folder_with_a_table(table):
    folder = images("pets", [f"{n}.png" for n in range(5)])
    rows = [{"file_name": f"{n}.png", "question": f"Number {n}?", "answer": n} for n in range(5)]
    content = "file_name,question,answer\n" + "".join(f"{n}.png,Number {n}?,{n}\n" for n in range(5))
    write(f"pets/{table}", rows if table.endswith("jsonl") else content)
    splits = load("mllm", folder)
    asked = {mllm.prompts(row)[0][0]["content"][1]["text"]: mllm.prompts(row)[1] for row in [*splits.train, *splits.eval]}
    assert asked == {f"Number {n}?": str(n) for n in range(5)}


def test_images_by_relative_path_and_inside_parquet():
    images("data/pics", [f"{n}.png" for n in range(5)])
    write("data/t.jsonl", [{"image": f"pics/{n}.png", "question": "Q?", "answer": "A"} for n in range(5)])
    assert load("mllm", "data/t.jsonl").facts["rows"] == {"train": 4, "eval": 1}
    write("data/t.parquet", [{"image": {"bytes": Path(f"data/pics/{n}.png").read_bytes(), "path": None}, "question": "Q?",
                              "answer": "A"} for n in range(5)])
    inside = load("mllm", "data/t.parquet")
    assert inside.train[0]["image"].getpixel((0, 0))[1:] == (0, 0) and inside.facts["rows"]["eval"] == 1


def test_hub_id_with_class_names_and_a_held_out_split():
    # `datasets` takes a local folder of that name for the Hub's, so nothing reaches a network here
    write("somebody/reviews/train.jsonl", [{"text": f"t{n}", "label": n % 2} for n in range(10)])
    write("somebody/reviews/test.jsonl", [{"text": f"e{n}", "label": n % 2} for n in range(4)])
    splits = load("bert", name="somebody/reviews", eval_split="test")
    assert splits.facts["rows"] == {"train": 10, "eval": 4} and splits.labels == ("0", "1")
    assert [source["split"] for source in splits.facts["sources"]] == ["train", "test"]
    with pytest.raises(UserError, match=r"somebody/reviews \(split 'dev'\) could not be loaded"):
        load("bert", name="somebody/reviews", eval_split="dev")


def test_class_names_of_a_hub_set_are_kept(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    made = datasets.Dataset.from_list([{"text": f"t{n}", "label": n % 2} for n in range(10)], features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: made)
    assert load("bert", name="somebody/reviews").labels == ("neg", "pos")
    unlabelled = datasets.Dataset.from_list([{"text": "t", "label": -1}] * 3, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: unlabelled)
    with pytest.raises(UserError, match=r"row 1, column 'label': label -1 is out of range \(public sets mark"):
        load("bert", name="somebody/reviews")


# ---------------------------------------------------------------- splits

def test_group_by_keeps_a_document_on_one_side():
    splits = load("bert", write("t.jsonl", TEXTS), group_by="doc")
    docs = [{int(text.split()[-1]) // 4 for text in part["text"]} for part in (splits.train, splits.eval)]
    assert not docs[0] & docs[1] and 4 <= len(splits.eval) <= 8
    assert "no such column" in fails("bert", "t.jsonl", group_by="dcc")[0]


def test_rows_that_also_stand_in_the_held_out_file_leave_training():
    write("train.jsonl", TEXTS)
    write("eval.jsonl", [{"text": "Text  NUMBER 3\n", "label": "odd"}, {"text": "new", "label": "even"}])
    splits = load("bert", "train.jsonl", eval_path="eval.jsonl")
    assert splits.facts["duplicates_removed"] == 1 and splits.facts["rows"] == {"train": 39, "eval": 2}
    assert "text number 3" not in splits.train["text"]
    assert [source["path"] for source in splits.facts["sources"]] == ["train.jsonl", "eval.jsonl"]
    assert "every training row also stands" in fails("bert", "train.jsonl", eval_path="train.jsonl")[0]


def test_copies_within_one_file_do_not_cross_the_split():
    splits = load("llm", write("c.jsonl", CHATS * 3), eval_fraction=0.3)
    keys = [{json.dumps(row) for row in part["messages"]} for part in (splits.train, splits.eval)]
    assert not keys[0] & keys[1] and splits.facts["duplicates_removed"] > 0


def test_limit_is_seeded_and_keeps_classes():
    write("t.jsonl", TEXTS)
    small = load("bert", "t.jsonl", limit={"train": 10, "eval": 4})
    assert Counter(small.train["label"]) == {0: 5, 1: 5} and Counter(small.eval["label"]) == {0: 2, 1: 2}
    again, other = (load("bert", "t.jsonl", limit={"train": 10, "eval": 4}, seed=seed) for seed in (0, 1))
    assert again.facts == small.facts and other.facts["fingerprint"] != small.facts["fingerprint"]
    assert load("bert", "t.jsonl", limit={"train": 10_000, "eval": None}).facts["rows"]["train"] == 32


def test_training_texts_hold_no_held_out_text():
    splits = load("llm", write("c.jsonl", CHATS))
    assert len(training_texts(splits)) == 16
    assert not {turn["content"] for row in splits.eval["messages"] for turn in row} & set(training_texts(splits))


# ---------------------------------------------------------------- bad input

GOOD = '{"text": "fine", "label": "a"}\n{"text": "good", "label": "b"}\n'
BAD_FILES = [
    ("bert", "d.jsonl", GOOD + '{"text": "x" "label": "a"}\n',
     "d.jsonl, line 3: not valid JSON (Expecting ',' delimiter at column 14). Fix the line or delete it."),
    ("bert", "d.jsonl", GOOD + '["x"]\n', "d.jsonl, line 3: ['x'] is not a JSON object"),
    ("bert", "d.jsonl", "", "d.jsonl: the file holds no rows. Fill it"),
    ("bert", "d.jsonl", GOOD.encode() + b'{"text": "caf\xe9", "label": "a"}\n',
     "d.jsonl, line 3: not UTF-8 (byte 0xe9 at byte 14 of it). Save the file as UTF-8."),
    ("bert", "d.jsonl", GOOD + '{"text": " ", "label": "a"}\n', "d.jsonl, line 3, column 'text': the text is empty. Fill it in"),
    ("bert", "d.jsonl", GOOD + '{"label": "a"}\n', "d.jsonl, line 3, column 'text': the text is missing"),
    ("bert", "d.jsonl", GOOD + '{"text": 7, "label": "a"}\n', "d.jsonl, line 3, column 'text': the text is 7, not a string"),
    ("bert", "d.jsonl", GOOD + '{"text": "x", "label": NaN}\n', "d.jsonl, line 3, column 'label': the label is missing"),
    ("bert", "d.jsonl", GOOD + '{"text": "x"}\n', "d.jsonl, line 3, column 'label': the label is missing"),
    ("bert", "d.jsonl", GOOD + '{"text": "x", "label": 0.5}\n', "d.jsonl, line 3, column 'label': 0.5 is not a label"),
    ("bert", "d.jsonl", '{"text": "x", "label": -1}\n{"text": "y", "label": 0}\n{"text": "z", "label": 1}\n',
     "d.jsonl, line 1, column 'label': label -1 is out of range (public sets mark unlabelled rows with -1). Allowed:"),
    ("bert", "d.jsonl", '{"text": "x", "label": "a"}\n{"text": "y", "label": "a"}\n',
     "d.jsonl, column 'label': all rows have the same label (a). A classifier needs at least two classes."),
    ("bert", "d.jsonl", '{"txt": "x", "label": "a"}\n', "d.jsonl: there is no column 'text'. Its columns: txt, label. "
     "Set dataset.columns.text to the right one. Did you mean 'txt'?"),
    ("bert", "d.json", '[{"text": "x"},\n {"text" "y"}]', "d.json, line 2: not valid JSON (Expecting ':' delimiter at column 10)"),
    ("bert", "d.json", GOOD, "d.json, line 2: not valid JSON (Extra data at column 1). Name the file .jsonl"),
    ("bert", "d.json", '{"data": []}', "d.json: a list of objects was expected, this is a dict with the keys data"),
    ("bert", "d.csv", "text,label\nx,a,b\ny,b\n", "d.csv, row 1 (line 2): 3 fields, but the header names 2 columns"),
    ("bert", "d.csv", 'text,label\nx,a\n"y,b\n', "d.csv, line 3: not valid CSV (unexpected end of data)"),
    ("bert", "d.csv", b"text,label\ncaf\xe9,a\n", "d.csv, line 2: not UTF-8 (byte 0xe9). Save the file as UTF-8."),
    ("bert", "d.csv", "text,label\nx,\ny,b\nz,c\n", "d.csv, row 1 (line 2), column 'label': the label is missing"),
    ("bert", "d.parquet", b"PAR1", "d.parquet: not readable as Parquet"),
    ("bert", "d.txt", "x", "dataset.path: d.txt is of an unknown kind (.txt). Allowed: .jsonl"),
    ("llm", "d.jsonl", '{"messages": [{"role": "usr", "content": "x"}]}', "d.jsonl, line 1, column 'messages': turn 1 has the "
     "unknown role 'usr'. Allowed: system, user, assistant. Did you mean 'user'?"),
    ("llm", "d.jsonl", '{"messages": [{"role": "user", "content": "x"}]}',
     "d.jsonl, line 1, column 'messages': no turn is the assistant's, so nothing could be learnt"),
    ("llm", "d.jsonl", '{"messages": [{"role": "user", "content": 5}]}', "turn 1 (user) has the content 5, not a string"),
    ("llm", "d.jsonl", '{"messages": [{"role": "user", "content": null}]}', "turn 1 (user) has the content None, not a string"),
    ("llm", "d.jsonl", '{"messages": [{"role": "assistant", "content": "\\n"}]}', "turn 1 (assistant) is empty"),
    ("llm", "d.jsonl", '{"messages": []}', "d.jsonl, line 1, column 'messages': the conversation is empty"),
    ("llm", "d.jsonl", '{"messages": "Hi"}', "d.jsonl, line 1, column 'messages': 'Hi' is not a list of turns"),
    ("llm", "d.jsonl", '{"messages": ["Hi"]}', "turn 1 is 'Hi', not an object"),
    ("llm", "d.jsonl", '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}',
     "turn 2 is a system turn. Only the first turn may be one."),
    ("llm", "d.jsonl", '{"prompt": "Hi", "completion": null}',
     "d.jsonl, line 1, column 'prompt, completion': turn 2 (assistant) has the content None"),
    ("llm", "d.jsonl", '{"prompt": "Hi", "completions": "Yo"}', "d.jsonl: there is no column 'completion'. Its columns: prompt, "
     "completions. Set dataset.columns.completion to the right one. Did you mean 'completions'?"),
    ("llm", "d.jsonl", '{"massages": []}', "d.jsonl: no column holds a conversation. Its columns: massages. Expected messages,"),
    ("mllm", "d.jsonl", '{"image": "no.png", "question": "Q", "answer": "A"}', "no.png does not exist. Mend the image or its path"),
    ("mllm", "d.jsonl", '{"image": "d.jsonl", "question": "Q", "answer": "A"}', "d.jsonl is not an image that Pillow knows"),
    ("mllm", "d.jsonl", '{"image": "https://x.org/a.png", "question": "Q", "answer": "A"}', "is a remote address, and nothing is "),
    ("mllm", "d.jsonl", '{"image": null, "question": "Q", "answer": "A"}', "d.jsonl, line 1, column 'image': the image is missing"),
    ("mllm", "d.jsonl", '{"image": "a.png", "question": "Q", "answer": " "}', "d.jsonl, line 1, column 'answer': the answer is ' '"),
    ("mllm", "d.jsonl", '{"image": "a.png", "question": null, "answer": "A"}', "column 'question': the question is missing"),
    ("mllm", "d.jsonl", '{"image": "a.png", "answer": "A"}', "d.jsonl: there is no column 'question' and no dataset.question"),
    ("mllm", "d.jsonl", '{"picture": "a.png", "question": "Q", "answer": "A"}', "d.jsonl: there is no column 'image'"),
]


@pytest.mark.parametrize(("family", "name", "content", "message"), BAD_FILES)
def test_bad_input_names_file_row_column_and_fix(family, name, content, message):
    problems = fails(family, write(name, content))
    assert any(message in problem for problem in problems), problems


def test_truncated_image_and_stray_image_and_empty_folder():
    images("pets", ["cat/a.png", "cat/b.png", "stray.png"])
    content = Path("pets/cat/b.png").read_bytes()
    Path("pets/cat/b.png").write_bytes(content[:-25])
    problems = fails("mllm", "pets", question="Q?")
    assert any("stray.png: the image lies in no sub-folder" in problem for problem in problems)
    assert any(re.search(r"pets/cat/b.png, column 'image': .*b.png cannot be read", problem) for problem in problems)
    Path("empty").mkdir()
    assert fails("mllm", "empty", question="Q?") == ("empty: the folder holds no images. Fill it, or name another.",)


def test_all_problems_are_told_at_once_and_counted():
    lines = ["{", *['{"text": "", "label": "a"}'] * 30]
    write("e.jsonl", '{"text": "x", "label": "sprot"}\n')
    problems = fails("bert", write("d.jsonl", "\n".join([*lines, '{"text": "x", "label": "sport"}'])), eval_path="e.jsonl")
    assert len(problems) == 21 and problems[0].startswith("d.jsonl, line 1: not valid JSON")
    assert problems[-1] == "... and 12 more problems like these."


def test_unknown_label_in_the_held_out_file():
    write("d.jsonl", GOOD)
    problems = fails("bert", "d.jsonl", eval_path=write("e.jsonl", '{"text": "x", "label": "bb"}\n{"text": "", "label": "b"}\n'))
    assert problems == ("e.jsonl, line 1, column 'label': label 'bb' is unknown: no training row has it. Allowed: a, b. "
                        "Did you mean 'b'? Mend the label or delete the row.",
                        "e.jsonl, line 2, column 'text': the text is empty. Fill it in or delete the row.")


@pytest.mark.parametrize(("options", "message"), [
    ({}, "Set exactly one of dataset.name (a built-in set or a Hub id) and dataset.path (a file): neither is set."),
    ({"path": "trian.jsonl"}, "Did you mean train.jsonl?"),
    ({"name": "python_stdlib_module"}, "Did you mean 'python_stdlib_modules'?"),
    ({"name": "digits"}, "dataset.name=digits: this set is made for the family mllm, not for bert."),
    ({"path": "train.jsonl", "eval_fraction": 0}, "dataset.eval_fraction=0: a share between 0 and 1"),
    ({"path": "train.jsonl", "limit": {"train": -1}}, "dataset.limit.train=-1"),
    ({"path": "train.jsonl", "columns": {"txt": "text"}}, "dataset.columns.txt means nothing for bert. Allowed: text, label, name. "
                                                          "Did you mean 'text'?"),
    ({"name": "python_stdlib_modules", "max_classes": 1}, "dataset.max_classes=1: a classifier needs at least 2"),
    ({"path": "train.jsonl", "eval_path": "none.csv"}, "dataset.eval_path: none.csv does not exist"),
])
def test_wrong_settings_name_the_key(options, message):
    write("train.jsonl", GOOD)
    options = {"path": None, **options}
    assert any(message in problem for problem in fails("bert", **options))


def test_a_file_beside_a_named_set_says_how_to_read_it():
    write("train.jsonl", GOOD)
    assert "both are set. Add dataset.name=null to read the file." in fails("bert", "train.jsonl", name="digits")[0]


def test_too_few_rows_to_hold_one_out():
    assert "1 rows are too few to hold out" in fails("llm", write("c.jsonl", CHATS[:1]))[0]


# ---------------------------------------------------------------- tensors

def chat_tokenizer(splits, eos="<|im_end|>"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(training_texts(splits), trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos, chat_template=CHATML_TEMPLATE)


def test_chat_batch_trains_the_end_of_turn_and_not_the_padding():
    rows = [{"prompt": "Hi?", "completion": "Yes."}, {"prompt": "Hi there?", "completion": "Yes, I am here."}] * 3
    splits = load("llm", write("c.jsonl", [{**row, "prompt": f"{n} {row['prompt']}"} for n, row in enumerate(rows)]))
    tokenizer = chat_tokenizer(splits)
    split = llm.encode_chats(splits.train, tokenizer, 64)
    batch = llm.ChatCollator(tokenizer.pad_token_id)(list(split.dataset))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        answer = tokenizer.decode(labels[labels != -100])
        assert answer in ("Yes.<|im_end|>", "Yes, I am here.<|im_end|>")
        assert (labels[mask == 0] == -100).all() and (ids[mask == 0] == tokenizer.pad_token_id).all()
        assert (labels[labels != -100] == ids[labels != -100]).all()
    assert split.tokens == int(batch["attention_mask"].sum()) and split.trained_tokens == int((batch["labels"] != -100).sum())
    assert all(check.passed for check in check_masks(tokenizer, splits.train["messages"]))


def test_rows_without_room_for_an_answer_are_listed_and_cut_ones_counted():
    long = {"prompt": "word " * 50, "completion": "Yes.", "name": "the long one"}
    cut = {"prompt": "Hi?", "completion": "word " * 50}
    short = [{"prompt": f"Hi {n}?", "completion": "Yes."} for n in range(8)]
    splits = load("llm", write("c.jsonl", [long, cut, *short]), eval_path=write("e.jsonl", short[:1]))
    split = llm.encode_chats(splits.train, chat_tokenizer(splits), 40)
    assert split.rejected == ["the long one"] and split.truncated == 2 and len(split.dataset) == 8
    assert max(split.dataset["length"]) == 40


def test_texts_reach_an_encoder_with_their_labels():
    splits = load("bert", write("t.jsonl", TEXTS))
    tokenizer = chat_tokenizer(splits)
    encoded = bert.encode_texts(splits.train, tokenizer, 3)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    assert list(encoded["labels"]) == list(splits.train["label"])
    batch = bert.collator(tokenizer)(list(encoded))
    assert batch["input_ids"].shape == (32, 3) and batch["labels"].dtype == torch.int64


@pytest.fixture(scope="module")
def processor():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    backend.train_from_iterator(["Which digit is this?", "User: Assistant:"], trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    template = ("<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
                "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %}"
                "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False)
    return Idefics3Processor(pictures, PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>"), image_seq_len=4,
                             chat_template=template)


def vision_row(*turns, count=1):
    messages = [{"role": role, "content": [{"type": "image", "text": None} if part is None else {"type": "text", "text": part}
                                           for part in parts]} for role, parts in turns]
    return {"image": [Image.new("RGB", (16, 16), (60 * n, 0, 0)) for n in range(count)], "messages": messages, "name": "row"}


def test_vision_batch_matches_a_hand_written_expectation(processor):
    row = vision_row(("user", [None, "Is it 7?"]), ("assistant", ["7"]))
    batch = mllm.VisionCollator(processor)([row])
    assert processor.decode(batch["input_ids"][0]) == (
        "<|im_start|>User:<fake_token_around_image><global-img><image><image><image><image><fake_token_around_image>Is it 7?"
        "<end_of_utterance>\nAssistant: 7<end_of_utterance>\n")
    trained = batch["labels"][0] != -100
    assert processor.decode(batch["input_ids"][0][trained]) == " 7<end_of_utterance>"
    prompt = processor(text=render(processor, mllm.prompts(row)[0], add_generation_prompt=True), images=row["image"],
                       add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    start = int(trained.nonzero()[0])
    assert torch.equal(batch["input_ids"][0][:start], prompt)  # the untrained part is the inference prompt


def test_several_images_no_image_and_several_turns_in_one_batch(processor):
    rows = [vision_row(("user", [None, "A?"]), ("assistant", ["1"]), ("user", [None, "B?", None]), ("assistant", ["2 and 3"]), count=3),
            vision_row(("user", ["No picture?"]), ("assistant", ["none"]), count=0)]
    batch = mllm.VisionCollator(processor)(rows)
    found = [processor.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert found == [" 1<end_of_utterance> 2 and 3<end_of_utterance>", " none<end_of_utterance>"]
    image_tokens = batch["input_ids"] == processor.image_token_id
    assert image_tokens.sum(1).tolist() == [12, 0] and (batch["labels"][image_tokens] == -100).all()
    padding = batch["attention_mask"] == 0
    assert padding[1, -1] and not padding[:, 0].any() and (batch["labels"][padding] == -100).all()


def test_split_images_are_masked_too(processor):
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True)
    tiled = Idefics3Processor(pictures, processor.tokenizer, image_seq_len=4, chat_template=processor.chat_template)
    row = vision_row(("user", [None, "A?"]), ("assistant", ["1"]), ("user", [None, "B?"]), ("assistant", ["2"]), count=2)
    batch = mllm.VisionCollator(tiled)([row])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 2 * 5 * 4  # four tiles and the whole, four tokens each
    assert tiled.decode(batch["labels"][0][batch["labels"][0] != -100]) == " 1<end_of_utterance> 2<end_of_utterance>"


def test_vision_rows_that_cannot_be_right_are_errors_that_name_them(processor):
    row = vision_row(("user", [None, "A?"]), ("assistant", ["1"]))
    with pytest.raises(UserError, match="row: 2 images, but 1 places for an image"):
        mllm.VisionCollator(processor)([{**row, "image": row["image"] * 2}])
    with pytest.raises(UserError, match="row: 0 images, but 1 places"):
        mllm.VisionCollator(processor)([{**row, "image": None}])
    with pytest.raises(UserError, match="row: .* tokens with its image, more than dataset.max_length=12. An image is never cut"):
        mllm.VisionCollator(processor, max_length=12)([row])
    with pytest.raises(UserError, match="row: no token carries loss"):
        mllm.VisionCollator(processor)([vision_row(("user", [None, "A?"]))])


def test_a_tiny_model_learns_from_the_vision_batch(processor):
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    torch.manual_seed(0)
    config = Idefics3Config(
        image_token_id=processor.image_token_id, scale_factor=2, pad_token_id=0, tie_word_embeddings=False,
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                       "image_size": 16, "patch_size": 4},
        text_config={"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": len(processor.tokenizer),
                     "max_position_embeddings": 128, "pad_token_id": 0})
    model = Idefics3ForConditionalGeneration(config)
    splits = load("mllm", name="digits", image_size=16, limit={"train": 4, "eval": 2})
    batch = mllm.VisionCollator(processor, splits.columns["image"], 64)([splits.train[n] for n in range(4)])
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------- configurations

@pytest.mark.parametrize("path", sorted(CONFIGS.glob("dataset/*llm/*.yaml")) + sorted(CONFIGS.glob("dataset/bert/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_dataset_files_name_registered_sets_and_known_keys(path):
    text = path.read_text("utf-8")
    assert text.startswith("# "), "a comment says what the file is for"
    options, known = yaml.safe_load(text), yaml.safe_load((CONFIGS / "dataset/common/keys.yaml").read_text("utf-8"))
    assert set(options) <= set(known)
    assert ("name" in options) != ("path" in options)
    if "name" in options:
        assert options["name"] in names("dataset")
