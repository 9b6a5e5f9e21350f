"""From a configuration to the rows of a run: built-in sets, checking, splitting, copies, mixing, limits, and what is wrong."""

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
import yaml
from PIL import Image

from supertrainer.data import mllm
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


def fails(family, path=None, **options):
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
    assert splits.columns["image"] == "images" and [image.size for image in row["images"]] == [(16, 16)]
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
    splits = load("mllm", folder, question="Which animal?")
    assert splits.facts["labels"]["eval"] == {"cat": 1, "dog": 1} and len(splits.facts["sources"][0]["sha256"]) == 64
    assert splits.train[0][splits.columns["image"]][0].size == (8, 8) and mllm.prompts(splits.train[0])[1] == "cat"


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
    write("data/t.jsonl", [{"image": f"pics/{n}.png", "question": f"Q {n}?", "answer": "A"} for n in range(5)])
    assert load("mllm", "data/t.jsonl").facts["rows"] == {"train": 4, "eval": 1}
    write("data/t.parquet", [{"image": {"bytes": Path(f"data/pics/{n}.png").read_bytes(), "path": None}, "question": "Q?",
                              "answer": "A"} for n in range(5)])
    inside = load("mllm", "data/t.parquet")
    assert inside.train[0]["images"][0].getpixel((0, 0))[1:] == (0, 0) and inside.facts["rows"]["eval"] == 1


def test_relative_images_of_files_in_several_folders_are_looked_up_beside_each():
    for number, folder in enumerate(("a", "b")):
        images(f"{folder}/pics", ["1.png"] if folder == "a" else ["0.png", "1.png"])
        write(f"{folder}/t.jsonl", [{"image": "pics/1.png", "question": f"{folder} {n}?", "answer": str(number)} for n in range(5)])
    splits = load("mllm", ["a/t.jsonl", "b/t.jsonl"])
    shades = {(mllm.prompts(row)[1], row["images"][0].getpixel((0, 0))[0]) for row in [*splits.train, *splits.eval]}
    assert shades == {("0", 0), ("1", 1)}


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
    assert "no such column" in fails("bert", "t.jsonl", group_by="dcc")[0] and "'doc'" in fails("bert", "t.jsonl", group_by="dcc")[0]


def test_rows_that_also_stand_in_the_held_out_file_leave_training():
    write("train.jsonl", TEXTS)
    write("eval.jsonl", [{"text": "Text  NUMBER 3\n", "label": "odd"}, {"text": "new", "label": "even"}])
    splits = load("bert", "train.jsonl", eval_path="eval.jsonl")
    assert splits.facts["duplicates_removed"] == 1 and splits.facts["rows"] == {"train": 39, "eval": 2}
    assert "text number 3" not in splits.train["text"]
    assert [source["path"] for source in splits.facts["sources"]] == ["train.jsonl", "eval.jsonl"]
    assert "every training row, or its group, also stands in the held-out or test part" in fails("bert", "train.jsonl", eval_path="train.jsonl")[0]


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


# ---------------------------------------------------------------- three parts, and no leak between them

def part_texts(splits):
    parts = {"train": splits.train, "eval": splits.eval, **({"test": splits.test} if splits.test is not None else {})}
    return {name: [same_text(text) for text in part["text"]] for name, part in parts.items()}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("group", [None, "doc"])
@pytest.mark.parametrize("ways", ["fractions", "eval apart", "test apart", "both apart"])
def test_no_text_and_no_group_is_in_two_parts(seed, group, ways):
    rows = [{"text": f"text {n % 70}" + " " * (n // 70), "label": "even" if n % 2 else "odd", "doc": (n % 70) // 5} for n in range(100)]
    extra = [{"text": f"text {n}", "label": "odd", "doc": n // 5} for n in (3, 60, 200, 205)]
    options = {"eval_fraction": 0.2, "test_fraction": 0.1, "group_by": group}
    if ways in ("eval apart", "both apart"):
        options |= {"eval_path": write("e.jsonl", extra[:3])}
    if ways in ("test apart", "both apart"):
        options |= {"test_fraction": 0, "test_path": write("s.jsonl", extra[1:])}
    splits = load("bert", write("t.jsonl", rows), seed=seed, **options)
    parts = part_texts(splits)
    assert set(parts) == {"train", "eval", "test"} and all(parts.values())
    assert not set(parts["train"]) & set(parts["eval"]) | set(parts["train"]) & set(parts["test"]) | set(parts["eval"]) & set(parts["test"])
    if group:
        owner = {same_text(row["text"]): row["doc"] for row in [*rows, *extra]}
        docs = [{owner[text] for text in part} for part in parts.values()]
        assert not docs[0] & docs[1] | docs[0] & docs[2] | docs[1] & docs[2]
    whole = 100 + 3 * ("eval_path" in options) + 3 * ("test_path" in options)
    lost = sum(splits.facts[key] for key in ("duplicates_removed", "duplicates_removed_from_eval", "groups_removed"))
    assert sum(splits.facts["rows"].values()) + lost == whole, "every row is in one part or counted"
    if ways == "both apart":
        assert parts["test"] == ["text 60", "text 200", "text 205"] and parts["eval"] == ["text 3"]


def test_a_test_part_does_not_change_which_rows_are_asked_for_without_it():
    write("t.jsonl", TEXTS)
    assert load("bert", "t.jsonl").test is None and "test" not in load("bert", "t.jsonl").facts["rows"]
    three = load("bert", "t.jsonl", test_fraction=0.1)
    assert three.facts["rows"] == {"train": 28, "eval": 8, "test": 4} and Counter(three.test["label"]) == {0: 2, 1: 2}
    assert set(three.facts["fingerprint"]) == {"train", "eval", "test"}
    assert load("bert", "t.jsonl", test_fraction=0.1, limit={"test": 2}).facts["rows"]["test"] == 2


def test_copies_are_counted_and_said():
    write("t.jsonl", [*TEXTS, *TEXTS[:5]])
    splits = load("bert", "t.jsonl", eval_path=write("e.jsonl", TEXTS[:3]), test_path=write("s.jsonl", TEXTS[2:4]))
    facts = splits.facts
    assert facts["duplicates_removed"] == 8 and facts["duplicates_removed_from_eval"] == 1 and facts["duplicates_in_train"] == 1
    assert facts["rows"] == {"train": 37, "eval": 2, "test": 2}
    said = " ".join(splits.warnings)
    assert "also stand in the held-out or the test part: 8." in said and "also stand in the test part: 1." in said
    assert "copies of other training rows, and so weigh more: 1." in said
    assert load("bert", write("u.jsonl", TEXTS)).warnings == []


def test_splits_of_a_hub_id_and_of_a_folder():
    for name, start in (("train", 0), ("validation", 100), ("test", 200)):
        write(f"somebody/three/{name}.jsonl", [{**row, "text": f"{start} {row['text']}"} for row in TEXTS])
    for source in ({"name": "somebody/three"}, {"path": "somebody/three"}, {"rows": datasets.DatasetDict({
            name: datasets.Dataset.from_json(f"somebody/three/{name}.jsonl") for name in ("train", "validation", "test")})}):
        splits = load("bert", **source, eval_split="validation", test_split="test")
        assert {name: {text.split()[0] for text in part} for name, part in part_texts(splits).items()} == {
            "train": {"0"}, "eval": {"100"}, "test": {"200"}}
        assert len(splits.facts["sources"]) == 3


def test_rows_without_a_group_are_alone():
    rows = [{"text": f"text {n}", "label": n % 2, "doc": None if n < 30 else "d"} for n in range(40)]
    splits = load("bert", write("t.jsonl", rows), group_by="doc", eval_fraction=0.25)
    assert 8 <= len(splits.eval) <= 20, "thirty rows of no document are not one document"


def test_rare_classes_are_said():
    rows = [{"text": f"text {n}", "label": "common" if n % 2 else "usual"} for n in range(20)] + [{"text": "once", "label": "rare"}]
    assert "rare" in load("bert", write("t.jsonl", rows)).facts["labels"]["train"], "a class of one row trains"
    held = write("e.jsonl", [{"text": "new", "label": "rare"}, {"text": "once", "label": "rare"}])
    splits = load("bert", "t.jsonl", eval_path=held)
    assert splits.warnings[1:] == ["All 2 held-out rows have the label rare, so a score says little.",
                                   "No training row has the label of some held-out rows: rare."]
    problems = fails("bert", write("u.jsonl", [*rows[:1], rows[-1]]), eval_path=write("f.jsonl", rows[-1:]))
    assert "All 1 training rows that are left have the label usual" in problems[0]


# ---------------------------------------------------------------- mixtures

def test_a_mixture_reads_each_set_with_its_own_settings():
    write("chats.jsonl", CHATS), write("faq.csv", "frage,antwort\n" + "".join(f"Q{n}?,A{n}\n" for n in range(20)))
    mix = [{"path": "chats.jsonl", "system": "Be kind."}, {"path": "faq.csv", "columns": {"prompt": "frage", "completion": "antwort"}}]
    splits = load("llm", mix=mix, system="Be brief.", eval_fraction=0.1)
    opening = Counter(row[0]["content"] for row in [*splits.train["messages"], *splits.eval["messages"]])
    assert opening == {"Be kind.": 10, "Be brief.": 20}
    assert splits.facts["rows"] == {"train": 27, "eval": 3} and splits.facts["format"] == "messages, prompt_completion"
    assert [(each["source"], each["rows"], each["used"]) for each in splits.facts["mix"]] == [("chats.jsonl", 9, 9), ("faq.csv", 18, 18)]
    assert Counter(row[1]["content"][0] for row in splits.eval["messages"]) == {"Q": 3}


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), (3, 1)])
def test_a_weighted_mixture_draws_in_proportion_and_no_row_twice(weights):
    for name in "ab":
        write(f"{name}.jsonl", [{"text": f"{name} {n}", "label": n % 2} for n in range(1000)])
    mix = [{"path": f"{name}.jsonl", "weight": weight} for name, weight in zip("ab", weights, strict=True)]
    splits = load("bert", mix=mix, eval_fraction=0.1)
    drawn = Counter(text[0] for text in splits.train["text"])
    assert len(set(splits.train["text"])) == len(splits.train) and max(drawn.values()) == 900, "until the first has no more"
    assert abs(drawn["a"] / len(splits.train) - weights[0] / sum(weights)) < 0.03
    assert Counter(text[0] for text in splits.eval["text"]) == {"a": 100, "b": 100}, "each holds out its own share"
    assert [each["used"] for each in splits.facts["mix"]] == [drawn["a"], drawn["b"]]
    again = load("bert", mix=mix, eval_fraction=0.1)
    assert again.facts == splits.facts and load("bert", mix=mix, eval_fraction=0.1, seed=1).facts["fingerprint"] != splits.facts["fingerprint"]
    firsts = [int(text.split()[1]) for text in splits.train["text"][:100]]
    assert max(firsts) > 500, "the rows of a set are shuffled before a part of them is taken"


def test_a_mixture_has_the_classes_of_all_its_sets():
    for name in ("music", "sport"):  # a file for each class
        write(f"{name}.jsonl", [{"text": f"{name} {n}", "label": name} for n in range(20)])
    write("tags.jsonl", [{"body": f"art {n}", "topic": "art"} for n in range(20)])
    mix = [{"path": "music.jsonl"}, {"path": "sport.jsonl"}, {"path": "tags.jsonl", "columns": {"text": "body", "label": "topic"}}]
    splits = load("bert", mix=mix)
    assert splits.labels == ("art", "music", "sport") and Counter(splits.eval["label"]) == {0: 4, 1: 4, 2: 4}
    named = {splits.labels[label] for label, text in zip(splits.train["label"], splits.train["text"], strict=True) if text.startswith("art")}
    assert named == {"art"}
    assert "have the same label (music)" in fails("bert", mix=[mix[0], mix[0]])[0]


def test_kinds_that_cannot_be_mixed_are_named():
    write("chats.jsonl", CHATS), write("book.txt", "One line.\nAnother line.\n" * 5)
    problems = fails("llm", mix=[{"path": "chats.jsonl"}, {"path": "book.txt"}])
    assert problems == ("book.txt: its rows are of the kind text (format text), those of chats.jsonl of the kind chat. Rows of "
                        "different kinds cannot be one data set; set the format, or leave one out.",)
    assert "of the kind text" in fails("llm", "chats.jsonl", eval_path="book.txt")[0]


def test_copies_between_the_sets_of_a_mixture_do_not_cross_the_split():
    write("a.jsonl", TEXTS), write("b.jsonl", TEXTS[::-1])
    splits = load("bert", mix=[{"path": "a.jsonl"}, {"path": "b.jsonl"}])
    parts = part_texts(splits)
    assert not set(parts["train"]) & set(parts["eval"]) and splits.facts["duplicates_removed"] > 0


# ---------------------------------------------------------------- rows in memory

def test_rows_in_memory_go_before_the_settings():
    splits = load("llm", name="python_stdlib_chat", rows=CHATS, eval_rows=[{"prompt": "Hi?", "completion": "Yo."}])
    assert splits.facts["rows"] == {"train": 10, "eval": 1} and [each["name"] for each in splits.facts["sources"]] == ["data", "eval_data"]
    assert "data, row 2, column 'messages'" in fails("llm", None, rows=[CHATS[0], {"messages": []}])[0]
    assert load("llm", CHATS).facts["rows"] == {"train": 8, "eval": 2}, "dataset.path may hold rows, too"
    assert load("bert", name=TEXTS).labels == ("even", "odd")


def test_texts_of_every_kind_reach_a_tokenizer():
    def of(family, rows):
        return training_texts(load(family, rows, eval_fraction=0.4))

    assert set(of("llm", [{"text": "plain a"}, {"text": "plain b"}, {"text": "plain c"}])) <= {"plain a", "plain b", "plain c"}
    pair = [{"prompt": f"P{n}", "chosen": f"C{n}", "rejected": f"R{n}"} for n in range(4)]
    texts = of("llm", pair)
    assert {text[0] for text in texts} == {"P", "C", "R"} and all(isinstance(text, str) for text in texts)
    premises = [{"premise": f"a {n}", "hypothesis": f"b {n}", "label": n % 2} for n in range(6)]
    assert {text[0] for text in of("bert", premises)} == {"a", "b"}
    words = [{"tokens": ["In", f"Paris{n}"], "tags": ["O", "B"]} for n in range(6)]
    assert "In" in of("bert", words)


# ---------------------------------------------------------------- bad input

GOOD = '{"text": "fine", "label": "a"}\n{"text": "good", "label": "b"}\n'
BAD_ROWS = [
    ("bert", '{"text": " ", "label": "a"}', "d.jsonl, line 3, column 'text': the text is empty. Fill it in"),
    ("bert", '{"label": "a"}', "d.jsonl, line 3, column 'text': the text is missing"),
    ("bert", '{"text": 7, "label": "a"}', "d.jsonl, line 3, column 'text': the text is 7, not a string"),
    ("bert", '{"text": "x", "label": NaN}', "d.jsonl, line 3, column 'label': the label is missing"),
    ("bert", '{"text": "x", "label": 0.5}', "d.jsonl, line 3, column 'label': 0.5 is not a label"),
    ("bert", '{"text": "x", "label": -1}', "d.jsonl, line 3, column 'label': "),
    ("llm", '{"messages": [{"role": "usr", "content": "x"}]}', "d.jsonl, line 3, column 'messages': turn 1 has the unknown role 'usr'."),
    ("llm", '{"messages": [{"role": "user", "content": "x"}]}', "d.jsonl, line 3, column 'messages': "),
    ("llm", '{"messages": []}', "d.jsonl, line 3, column 'messages': "),
    ("llm", '{"messages": "Hi"}', "d.jsonl, line 3, column 'messages': "),
    ("llm", '{"messages": 7}', "d.jsonl, line 3, column 'messages': "),
    ("mllm", '{"image": "no.png", "question": "Q", "answer": "A"}', "d.jsonl, line 3, column 'image': "),
    ("mllm", '{"image": "a.png", "question": "Q", "answer": " "}', "d.jsonl, line 3, column 'answer': "),
]


@pytest.mark.parametrize(("family", "line", "message"), BAD_ROWS)
def test_a_bad_row_names_file_row_column_and_fix(family, line, message):
    images(".", ["a.png"])
    good = {"bert": GOOD, "llm": "".join(json.dumps(row) + "\n" for row in CHATS[:2]), "mllm": "".join(
        json.dumps({"image": "a.png", "question": f"Q{n}?", "answer": "A"}) + "\n" for n in range(2))}[family]
    problems = fails(family, write("d.jsonl", good + line))
    assert len(problems) == 1 and problems[0].startswith(message) and problems[0].rstrip().endswith((".", "?")), problems


@pytest.mark.parametrize(("family", "content", "message"), [
    ("bert", '{"text": "x", "label": "a"}\n{"text": "y", "label": "a"}\n',
     "d.jsonl, column 'label': all rows have the same label (a). A classifier needs at least two classes."),
    ("bert", '{"txt": "x", "label": "a"}\n', "d.jsonl: there is no column 'text'. Its columns: txt, label. "
     "Set dataset.columns.text to the right one. Did you mean 'txt'?"),
    ("llm", '{"massages": []}', "Did you mean 'massages'?"),
    ("llm", '{"prompt": "Hi", "completions": "Yo"}', "d.jsonl: there is no column 'completion'. Its columns: prompt, completions. "
     "Set dataset.columns.completion to the right one. Did you mean 'completions'?"),
    ("mllm", '{"picture": "a.png", "question": "Q", "answer": "A"}', "d.jsonl: there is no column "),
])
def test_a_wrong_column_names_the_nearest_and_the_setting(family, content, message):
    problems = fails(family, write("d.jsonl", content))
    assert any(message in problem for problem in problems), problems


def test_truncated_image_and_stray_image():
    images("pets", ["cat/a.png", "cat/b.png", "stray.png"])
    content = Path("pets/cat/b.png").read_bytes()
    Path("pets/cat/b.png").write_bytes(content[:-25])
    problems = fails("mllm", "pets", question="Q?")
    assert any("stray.png, column 'image': the image lies in no sub-folder" in problem for problem in problems)
    assert any(problem.startswith("pets/cat/b.png, column 'image': ") for problem in problems), problems


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
    ({}, "Set exactly one of dataset.name (a built-in set or a Hub id), dataset.path (files) and dataset.mix (several sources): none is set."),
    ({"path": "trian.jsonl"}, "Did you mean train.jsonl?"),
    ({"name": "python_stdlib_module"}, "Did you mean 'python_stdlib_modules'?"),
    ({"name": "digits"}, "dataset.name=digits: this set is made for the family mllm, not for bert."),
    ({"path": "train.jsonl", "eval_fraction": 0}, "dataset.eval_fraction=0: a share between 0 and 1"),
    ({"path": "train.jsonl", "limit": {"train": -1}}, "dataset.limit.train=-1"),
    ({"path": "train.jsonl", "columns": {"txt": "text"}}, "dataset.columns.txt means nothing for bert. Allowed: "),
    ({"name": "python_stdlib_modules", "max_classes": 1}, "dataset.max_classes=1: a classifier needs at least 2"),
    ({"path": "train.jsonl", "eval_path": "none.csv"}, "dataset.eval_path: none.csv does not exist"),
    ({"path": "train.jsonl", "eval_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
    ({"path": "train.jsonl", "test_fraction": 1}, "dataset.test_fraction=1: a share between 0 and 1"),
    ({"path": "train.jsonl", "test_fraction": 0.1, "test_path": "train.jsonl"}, "dataset.test_fraction is set beside a test part"),
    ({"path": "train.jsonl", "eval_path": "train.jsonl", "eval_split": "x"}, "dataset.eval_split and dataset.eval_path are both set"),
    ({"name": "somebody/reviews", "eval_split": "train"}, "dataset.eval_split=train is the training split"),
    ({"name": "somebody/reviews", "eval_split": "dev", "test_split": "dev"}, "dataset.eval_split and dataset.test_split are both dev"),
    ({"name": "python_stdlib_modules", "eval_split": "test"}, "the built-in set python_stdlib_modules has no splits"),
    ({"path": "train.jsonl", "max_rejects": -1}, "dataset.max_rejects=-1"),
    ({"path": "train.jsonl", "max_rejects": True}, "dataset.max_rejects=True"),
    ({"mix": [{"path": "train.jsonl", "name": "digits"}]}, "dataset.mix.0: give exactly one of name and path."),
    ({"mix": [{"path": "train.jsonl", "weight": 1}, {"path": "train.jsonl"}]}, "some sources have a weight and some have none"),
    ({"mix": [{"path": "train.jsonl", "wieght": 1}]}, "dataset.mix.0.wieght: no such key. Did you mean 'weight'?"),
    ({"mix": [{"path": "train.jsonl", "weight": 0}]}, "dataset.mix.0.weight=0: a number above 0"),
    ({"mix": [{"path": "train.jsonl", "columns": {"txt": "a"}}]}, "dataset.mix.0.columns.txt means nothing for bert"),
    ({"mix": [{"path": "nowhere.jsonl"}]}, "dataset.mix.0.path: nowhere.jsonl does not exist"),
    ({"mix": ["train.jsonl"]}, "dataset.mix must be a list of sources"),
    ({"mix": [{"path": "train.jsonl"}], "eval_split": "x"}, "dataset.eval_split: a mixture has no splits of its own"),
    ({"path": "train.jsonl", "group_by": "lable"}, "train.jsonl has no such column. Its columns: text, label. Name one of them, or "
                                                   "null. Did you mean 'label'?"),
])
def test_wrong_settings_name_the_key(options, message):
    write("train.jsonl", GOOD)
    options = {"path": None, **options}
    assert any(message in problem for problem in fails("bert", **options))


def test_a_file_beside_a_named_set_says_how_to_read_it():
    write("train.jsonl", GOOD)
    assert "name and path are both set. Add dataset.name=null to read the file." in fails("bert", "train.jsonl", name="digits")[0]


def test_too_few_rows_to_hold_one_out():
    assert "1 rows are too few to hold out" in fails("llm", write("c.jsonl", CHATS[:1]))[0]


# ---------------------------------------------------------------- configurations

@pytest.mark.parametrize("path", sorted(CONFIGS.glob("dataset/*llm/*.yaml")) + sorted(CONFIGS.glob("dataset/bert/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_dataset_files_name_registered_sets_and_known_keys(path):
    text = path.read_text("utf-8")
    assert text.startswith("# "), "a comment says what the file is for"
    options, known = yaml.safe_load(text), yaml.safe_load((CONFIGS / "dataset/common/keys.yaml").read_text("utf-8"))
    assert set(options) <= set(known)
    assert sum(key in options for key in ("name", "path", "mix")) == 1
    if "name" in options:
        assert options["name"] in names("dataset")
