"""Where rows come from: every reader, every kind of source, what is wrong with a file, rejected rows and their budget."""

import codecs
import json
from pathlib import Path

import datasets
import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supertrainer.data import files, sources
from supertrainer.data.base import load_splits, write_rejects
from supertrainer.data.rows import Problems
from supertrainer.data.sources import collect, open_sources, read_rows
from supertrainer.runtime import UserError

TALK = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A thing."}]
ROWS = [{"text": f"text number {n}, with \"quotes\" and\nlines", "label": "odd" if n % 2 else "even", "page": n // 4}
        for n in range(40)]


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
        path.write_bytes(content.encode())
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return name


def save_everywhere():
    """Write `ROWS` in every format with independent writers, and return what to read each by."""
    frame, table = pandas.DataFrame(ROWS), pyarrow.Table.from_pylist(ROWS)
    write("t.jsonl", ROWS), write("t.json", json.dumps(ROWS, indent=1)), write("lines.json", ROWS), write("t.ndjson", ROWS)
    frame.to_csv("t.csv", index=False), frame.to_csv("t.tsv", index=False, sep="\t"), frame.to_csv("excel.csv", index=False, sep=";")
    write("bom.csv", codecs.BOM_UTF8 + Path("t.csv").read_bytes())
    frame.to_csv("indexed.csv")
    pyarrow.parquet.write_table(table, "t.parquet"), frame.to_parquet("pandas.parquet")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk("saved"), datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk("dict")
    with pyarrow.OSFile("file.arrow", "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pyarrow.OSFile("stream.arrow", "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    write("shards/train-0.jsonl", ROWS[:15]), write("shards/train-1.jsonl", ROWS[15:]), write("shards/test.jsonl", ROWS[:1])
    pyarrow.parquet.write_table(table.slice(0, 30), write("nested/data/a.parquet", b""))
    pyarrow.parquet.write_table(table.slice(30), write("nested/data/b.parquet", b""))
    write("nested/README.md", "# about"), write("nested/.cache/x.jsonl", '{"not": "data"}\n')
    return {"dict/train": "dict/train", "parts": ["shards/train-0.jsonl", "shards/train-1.jsonl"], "list": ROWS, "frame": frame,
            "dataset": dataset, "shuffled back": dataset.select(range(39, -1, -1)).select(range(39, -1, -1)),
            "formatted": dataset.with_format("numpy"), "table": table, "iterable": dataset.to_iterable_dataset(),
            "splits": datasets.DatasetDict({"train": dataset}),
            **{name: name for name in ("t.jsonl", "t.json", "lines.json", "t.ndjson", "t.csv", "t.tsv", "excel.csv", "bom.csv",
                                       "indexed.csv", "t.parquet", "pandas.parquet", "saved", "dict", "file.arrow",
                                       "stream.arrow", "shards", "nested")}}


def test_every_source_gives_the_same_rows(capsys):
    made = save_everywhere()
    capsys.readouterr()
    for name, source in made.items():
        rows = read_rows(source)
        found = [{**record, "page": int(record["page"])} for record in rows.records]
        for record in found:
            record.pop("Unnamed: 0", None)
        assert found == ROWS, name
        assert len(set(rows.where)) == 40 and rows.sources and all("rows" in each for each in rows.sources), name
    assert capsys.readouterr().err == "", "no progress bars"


def test_every_source_gives_the_same_splits():
    made = save_everywhere()
    seen = {name: load_splits("bert", {"path": source, "eval_fraction": 0.2}, 0).facts["fingerprint"] for name, source in made.items()}
    assert len({json.dumps(each) for each in seen.values()}) == 1
    assert load_splits("bert", {"rows": made["frame"], "path": "ignored", "eval_fraction": 0.2}, 0).facts["fingerprint"] == seen["list"]


@given(st.lists(st.dictionaries(st.sampled_from(["text", "a b", "ключ"]), st.text(st.characters(
    exclude_categories=["Cs"], exclude_characters="\0")) | st.integers(-2**40, 2**40) | st.none() | st.lists(st.text("añ\n\"\\")),
    min_size=1), min_size=1))
def test_json_and_json_lines_round_trip(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("json")
    for name, text in (("t.json", json.dumps(rows, ensure_ascii=False)), ("t.jsonl", "".join(
            json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows))):
        (folder / name).write_bytes(text.encode())
        problems = Problems()
        assert [row for _, row in files.SCANNERS[Path(name).suffix](folder / name, problems)] == rows and not problems.found


def test_types_of_datasets_come_back():
    features = datasets.Features({
        "messages": datasets.Json(), "nested": datasets.List({"call": datasets.Json(), "n": datasets.Value("int32")}),
        "label": datasets.ClassLabel(names=["no", "yes"]), "image": datasets.Image()})
    image = {"bytes": b"\x89PNG not decoded", "path": None}
    row = {"messages": TALK, "nested": [{"call": {"a": [1, None]}, "n": 3}], "label": 1, "image": image}
    table = datasets.Dataset.from_list([row, {**row, "label": None, "messages": None}], features=features)
    table.to_parquet("t.parquet"), table.save_to_disk("saved")
    for source in ("t.parquet", "saved", table):
        rows = read_rows(source)
        assert rows.records[0] == row and rows.records[1]["messages"] is None and rows.labels == ("no", "yes"), source
    tags = datasets.Features({"tokens": datasets.List(datasets.Value("string")),
                              "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-LOC"]))})
    assert read_rows(datasets.Dataset.from_list([{"tokens": ["a"], "ner_tags": [1]}], features=tags)).labels == ("O", "B-LOC")


def test_missing_values_of_pandas_and_numbers_of_numpy_become_plain():
    frame = pandas.DataFrame({"text": ["a", None, "c"], "score": [1.5, numpy.nan, 2], "when": pandas.array([1, None, 3], "Int64"),
                              7: [numpy.array([1, 2]), [3], None]})
    assert read_rows(frame).records == [{"text": "a", "score": 1.5, "when": 1, "7": [1, 2]},
                                        {"text": None, "score": None, "when": None, "7": [3]},
                                        {"text": "c", "score": 2.0, "when": 3, "7": None}]
    rows = read_rows([{"label": numpy.int64(3), "picture": numpy.zeros((2, 2, 3), "uint8")}])
    assert type(rows.records[0]["label"]) is int and isinstance(rows.records[0]["picture"], numpy.ndarray)
    with pytest.raises(UserError, match="two columns of the DataFrame are called 'text'"):
        read_rows(pandas.DataFrame([["a", "b"]], columns=["text", "text"]))
    for wrong in ({"text": "a"}, 7, None):
        with pytest.raises(UserError, match="holds no rows"):
            read_rows(wrong)


# ---------------------------------------------------------------- folders

@pytest.mark.parametrize("split", [None, "train", "training"])
def test_shards_of_other_splits_are_not_read(split):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"):
        write(f"set/data/{name}.jsonl", [{"text": name}])
    assert [row["text"][:5] for row in read_rows("set", split=split).records] == ["train", "train"]
    assert [row["text"][:5] for row in read_rows("set", split="dev").records] == ["valid"]
    with pytest.raises(UserError, match="Its splits: test, train, validation"):
        read_rows("set", split="tests")


def test_a_folder_whose_names_only_look_like_splits_is_read_whole():
    for name in ("a", "latest", "contest-2", "retrained", "evaluations2"):
        write(f"set/{name}.jsonl", [{"text": name}])
    assert len(read_rows("set")) == 5
    write("one/test.jsonl", [{"text": "a"}]), write("two/test.jsonl", [{"text": "a"}]), write("two/rest.jsonl", [{"text": "b"}])
    assert len(read_rows("one")) == 1, "a folder of one split is that split"
    assert [row["text"] for row in read_rows("two").records] == ["b"], "what is beside a test file is not the test file"


def test_a_notice_beside_data_is_no_data():
    write("set/a.jsonl", [{"text": "a"}]), write("set/LICENSE.txt", "All rights."), write("set/dataset_info.json", "{}")
    assert len(read_rows("set")) == 1
    write("books/one.txt", "A line.\n\nAnother.\n"), write("books/two.txt", "More.")
    assert [row["text"] for row in read_rows("books").records] == ["A line.", "Another.", "More."]


def test_images_by_split_class_and_table():
    for name in ("train/cat/1.png", "train/dog/2.JPG", "test/cat/3.png"):
        write(f"pets/{name}", b"x")
    assert [row["answer"] for row in read_rows("pets").records] == ["cat", "dog"]
    assert read_rows("pets", split="test").folder == Path("pets/test")
    assert read_rows("pets/test", columns={"image": "photo", "answer": "kind"}).records == [{"photo": "cat/3.png", "kind": "cat"}]
    write("table/a.png", b"x"), write("table/metadata.csv", "file_name,question,answer\na.png,Who?,he\n")
    assert read_rows("table").records == [{"file_name": "a.png", "question": "Who?", "answer": "he", "image": "a.png"}]
    write("beside/data.jsonl", [{"image": "pictures/a.png"}]), write("beside/pictures/a.png", b"x")
    rows = read_rows("beside")
    assert rows.records == [{"image": "pictures/a.png"}] and rows.folder == Path("beside")


def test_files_of_several_folders_keep_their_folder():
    write("a/t.jsonl", ROWS[:2]), write("b/t.jsonl", ROWS[2:4]), write("b/u.jsonl", ROWS[4:5])
    found = collect(open_sources(["a/t.jsonl", "b/t.jsonl", "b/u.jsonl"], "dataset.path", {}, problems := Problems()), problems)
    assert [(str(rows.folder), len(rows)) for rows in found] == [("a", 2), ("b", 3)] and not problems.found
    assert [source["path"] for rows in found for source in rows.sources] == ["a/t.jsonl", "b/t.jsonl", "b/u.jsonl"]


def test_the_identity_of_a_source_changes_with_its_content():
    write("set/a.jsonl", ROWS)
    one, two = (sources.identify(sources.file_source(Path("set/a.jsonl"), {}), whole) for whole in (True, False))
    write("set/a.jsonl", [*ROWS[:-1], {**ROWS[-1], "page": 8}])
    assert one != sources.identify(sources.file_source(Path("set/a.jsonl"), {}))
    assert two != sources.identify(sources.file_source(Path("set/a.jsonl"), {}), whole=False)


# ---------------------------------------------------------------- bad files

GOOD = "".join(json.dumps(row) + "\n" for row in ROWS[:2])
BAD_FILES = {
    "empty": ("d.jsonl", "", "d.jsonl: the file holds no rows. Fill it, or name another."),
    "blank": ("d.json", " \n", "d.json: the file holds no rows"),
    "empty list": ("d.json", "[]", "d.json: the file holds no rows"),
    "only a header": ("d.csv", "text,label\n", "d.csv: the file holds no rows"),
    "UTF-16": ("d.csv", "text,label\nx,a\n".encode("utf-16"), "d.csv: not UTF-8: it is UTF-16 text. Save the file as UTF-8."),
    "UTF-16, no mark": ("d.jsonl", GOOD.encode("utf-16-be"), "d.jsonl: not UTF-8: it is UTF-16 text without a byte order mark"),
    "UTF-32": ("d.jsonl", GOOD.encode("utf-32"), "d.jsonl: not UTF-8: it is UTF-32 text"),
    "gzip": ("d.jsonl", b"\x1f\x8b\x08\0rest", "d.jsonl: not UTF-8: it is compressed with gzip. Unpack it"),
    "spreadsheet": ("d.csv", b"PK\x03\x04rest", "d.csv: not UTF-8: it is a zip archive or a spreadsheet"),
    "Parquet as JSON lines": ("d.jsonl", b"PAR1rest", "d.jsonl: not UTF-8: it is Parquet"),
    "Latin-1 line": ("d.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}\n',
                     "d.jsonl, line 3: not UTF-8 (byte 0xe9 at byte 14 of it). Save the file as UTF-8."),
    "Latin-1 CSV": ("d.csv", b"text,label\nx,a\ncaf\xe9,a\n", "d.csv, line 3: not UTF-8 (byte 0xe9). Save the file as UTF-8."),
    "Latin-1 JSON": ("d.json", b'[{"text":\n "caf\xe9"}]', "d.json, line 2: not UTF-8 (byte 0xe9). Save the file as UTF-8."),
    "Latin-1 text": ("d.txt", b"one\ncaf\xe9\n", "d.txt, line 2: not UTF-8 (byte 0xe9 at byte 4 of it). Save the file"),
    "broken line": ("d.jsonl", GOOD + '{"text": "x" "label": 1}\n',
                    "d.jsonl, line 3: not valid JSON (Expecting ',' delimiter at column 14). Fix the line or delete it."),
    "two objects in a line": ("d.jsonl", '{"text": "x"} {"text": "y"}\n', "d.jsonl, line 1: not valid JSON (Extra data at column 15)"),
    "cut line": ("d.jsonl", GOOD + '{"text": "x', "d.jsonl, line 3: not valid JSON (Unterminated string starting at at column 10)"),
    "raw NUL": ("d.jsonl", GOOD + '{"text": "x\0"}\n', "d.jsonl, line 3: not valid JSON (Invalid control character at at column 12, it "
                "holds a NUL character)"),
    "a list": ("d.jsonl", GOOD + "[1]\n", "d.jsonl, line 3: [1] is not a JSON object. Name the file .json if it is one list."),
    "a text": ("d.jsonl", GOOD + '"hello"\n', "d.jsonl, line 3: 'hello' is not a JSON object. Write one object for each row."),
    "doubled key": ("d.jsonl", GOOD + '{"text": "x", "text": "y"}\n', "d.jsonl, line 3, column 'text': the key 'text' stands twice in "
                    "one object, and only one value could be kept. Delete one of them."),
    "doubled inner key": ("d.jsonl", '{"messages": [{"role": "user", "role": "system"}]}\n', "d.jsonl, line 1: the key 'role' stands "
                          "twice in one object"),
    "a number too long": ("d.jsonl", GOOD + '{"n": ' + "9" * 5000 + "}\n", "d.jsonl, line 3: not valid JSON (Exceeds the limit"),
    "too deep": ("d.jsonl", GOOD + '{"n": ' + "[" * 100_000 + "\n", "d.jsonl, line 3: not valid JSON (nested too deeply"),
    "NUL": ("d.jsonl", '{"text": "a\\u0000b"}\n', "d.jsonl, line 1, column 'text': text holds a NUL character (U+0000, at character 2): "
            "'a\\x00b'. Take the character out or delete the row."),
    "inner NUL": ("d.jsonl", json.dumps({"messages": [*TALK[:1], {"role": "assistant", "content": "\0"}]}) + "\n",
                  "d.jsonl, line 1, column 'messages': messages[1].content holds a NUL character"),
    "surrogate": ("d.json", '[{"text": "a"}, {"text": "\\ud83d"}]', "d.json, row 2, column 'text': text holds a lone surrogate (U+D83D, "
                  "at character 1): '\\ud83d'. Take the character out or delete the row."),
    "NUL in CSV": ("d.csv", 'text,label\nx,a\n"y\0",b\n', "d.csv, row 2 (line 3), column 'text': text holds a NUL character"),
    "JSON: broken": ("d.json", '[{"text": "x"},\n {"text" "y"}]', "d.json, line 2: not valid JSON (Expecting ':' delimiter at column 10)"),
    "JSON: no comma": ("d.json", '[{"text": "x"}\n {"text": "y"}]', "d.json, line 2: not valid JSON (Expecting ',' delimiter at column 2)"),
    "JSON: cut": ("d.json", '[{"text": "x"},\n', "d.json, line 2: not valid JSON (Expecting value at column 1)"),
    "JSON: more": ("d.json", '[{"text": "x"}]\n[]', "d.json, line 2: not valid JSON (Extra data at column 1)"),
    "JSON: no list": ("d.json", '{"version": 1, "data": []}', "d.json: a list of objects was expected, this is a dict with the keys "
                      'version, data. Write [{"column": value, ...}, ...].'),
    "JSON: a number in it": ("d.json", '[{"text": "x"}, 7]', "d.json, row 2: 7 is not a JSON object"),
    "CSV: fields": ("d.csv", "text,label\nx,a,b\ny,b\n", "d.csv, row 1 (line 2): 3 fields, but the header names 2 columns. Put a text "
                    "with commas or line breaks in quotes."),
    "CSV: open quote": ("d.csv", 'text,label\nx,a\n"y,b\n', "d.csv, line 3: not valid CSV (unexpected end of data)"),
    "CSV: doubled column": ("d.csv", "text,text\nx,a\n", "d.csv, line 1: the header names 'text' twice. Give every column a name"),
    "CSV: no header": ("d.csv", "a fine film,1\na bad film,0\n", "d.csv, line 1: '1' stands where a column's name should be. The first "
                       "line must name the columns, e.g. text,label."),
    "CSV: no header, texts": ("d.csv", "a film " + "that is long " * 9 + ",good\nx,bad\n", "stands where a column's name should be"),
    "Parquet: cut": ("d.parquet", None, "d.parquet: not readable as Parquet ("),
    "Parquet: empty": ("d.parquet", b"", "d.parquet: not readable as Parquet ("),
    "Arrow: cut": ("d.arrow", b"ARROW1\0\0", "d.arrow: not readable as Arrow ("),
    "unknown kind": ("d.xlsx", b"PK\x03\x04", "dataset.path: d.xlsx is of an unknown kind (.xlsx). Allowed: .jsonl, .ndjson, .json"),
    "near kind": ("d.jsonl2", b"{}", "Did you mean '.jsonl'?"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_with_row_key_value_and_fix(name, content, message):
    if content is None:
        pandas.DataFrame(ROWS).to_parquet(name)
        content = Path(name).read_bytes()[:-100]
    write(name, content)
    before = {path: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(UserError) as error:
        load_splits("bert", {"path": name, "eval_fraction": 0.5}, 0)
    assert any(message in problem for problem in error.value.problems), error.value.problems
    assert all(problem.rstrip(")").endswith((".", "?", "more problems like these", "}", "]")) for problem in error.value.problems)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before, "a failed load must write nothing"


def test_a_break_inside_a_parquet_file_is_placed_after_the_last_good_row():
    table = pyarrow.table({"text": [f"{n:09}" * 50 for n in range(5000)]})
    pyarrow.parquet.write_table(table, "d.parquet", row_group_size=1000, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(Path("d.parquet").read_bytes())
    content[len(content) // 2: len(content) // 2 + 4000] = b"\xff" * 4000
    write("d.parquet", bytes(content))
    problems = Problems()
    list(files.scan_parquet(Path("d.parquet"), problems))
    assert len(problems.found) <= 1  # without checksums in the reader a flipped byte may be read as text, never as a crash


def test_missing_files_and_splits_name_what_is_there():
    write("train.jsonl", ROWS), write("set/train.jsonl", ROWS)
    for path, message in (("trian.jsonl", "Did you mean train.jsonl?"), ("nowhere/at/all.csv", "does not exist (looked in "),
                          (["train.jsonl", "eval.csv"], "eval.csv does not exist")):
        with pytest.raises(UserError) as error:
            load_splits("bert", {"path": path, "eval_fraction": 0.2}, 0)
        assert message in str(error.value) and str(error.value).startswith("dataset.path")
    with pytest.raises(UserError, match="dataset.eval_split: train.jsonl is one file, so it has no split 'test'. Set dataset.eval_split=null"):
        load_splits("bert", {"path": "train.jsonl", "eval_split": "test"}, 0)
    with pytest.raises(UserError, match="dataset.path: train.jsonl is one file, so it has no split 'train'. Set dataset.split=null"):
        load_splits("bert", {"path": "train.jsonl", "split": "train", "eval_fraction": 0.2}, 0)
    with pytest.raises(UserError, match="dataset.eval_split: set has no files of the split 'trial'. Its splits: train. Name one"):
        load_splits("bert", {"path": "set", "eval_split": "trial"}, 0)
    Path("empty").mkdir()
    with pytest.raises(UserError, match="empty: the folder holds no images and no data files. Fill it, or name another."):
        load_splits("bert", {"path": "empty", "eval_fraction": 0.2}, 0)
    Path("saved").mkdir(), write("saved/state.json", "{}")
    with pytest.raises(UserError, match="saved: not readable as a saved data set"):
        load_splits("bert", {"path": "saved", "eval_fraction": 0.2}, 0)


# ---------------------------------------------------------------- late types, rejects, budget

@pytest.mark.parametrize("late", [7, 7.5, True, None, ["a"], {"a": 1}])
@pytest.mark.parametrize("kind", ["jsonl", "json", "rows"])
def test_a_type_that_changes_late_is_a_problem_of_that_row(late, kind):
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(500)] + [{"text": late, "label": 1}]
    source = {"rows": rows} if kind == "rows" else {"path": write(f"t.{kind}", rows if kind == "jsonl" else json.dumps(rows))}
    with pytest.raises(UserError) as error:
        load_splits("bert", {**source, "eval_fraction": 0.2}, 0)
    where = {"jsonl": "t.jsonl, line 501", "json": "t.json, row 501", "rows": "data, row 501"}[kind]
    [problem] = error.value.problems
    assert problem.startswith(f"{where}, column 'text': the text is ") and ("missing" if late is None else repr(late)) in problem
    allowed = load_splits("bert", {**source, "eval_fraction": 0.2, "max_rejects": 1}, 0)
    assert allowed.facts["rejected"] == 1 and sum(allowed.facts["rows"].values()) == 500
    assert [found.where for found in allowed.rejected] == [where] and "cannot be used: 1 of 501;" in " ".join(allowed.warnings)


def test_the_budget_counts_rows_of_all_files_and_rejects_keep_the_row():
    lines = "".join(json.dumps(row) + "\n" for row in [*ROWS, {"text": " ", "label": None, "page": 0}])
    write("t.jsonl", lines + '{"text": "cut\n')
    write("e.jsonl", [{"text": "new", "label": "odd"}, {"text": "bad", "label": "sprot"}])
    options = {"path": "t.jsonl", "eval_path": "e.jsonl"}
    for budget in (2, 0.04):
        with pytest.raises(UserError) as error:
            load_splits("bert", {**options, "max_rejects": budget}, 0)
        allowed = 2 if budget == 2 else int(0.04 * 44)
        assert error.value.problems[-1] == f"3 rows cannot be used, and dataset.max_rejects={budget} allows {allowed}."
    for budget in (3, 0.07):
        splits = load_splits("bert", {**options, "max_rejects": budget}, 0)
        assert splits.facts["rejected"] == 3 and splits.facts["rows"] == {"train": 40, "eval": 1}
    assert write_rejects(splits.rejected, "rejects.jsonl") == 3
    kept = {row["where"]: row for row in map(json.loads, Path("rejects.jsonl").read_text("utf-8").splitlines())}
    assert set(kept) == {"t.jsonl, line 41", "t.jsonl, line 42", "e.jsonl, line 2"}
    assert kept["t.jsonl, line 41"]["record"] == {"text": " ", "label": None, "page": 0} and kept["t.jsonl, line 41"]["also"]
    assert kept["t.jsonl, line 42"]["record"] == '{"text": "cut' and kept["e.jsonl, line 2"]["column"] == "label"


def test_a_broken_file_is_never_within_the_budget():
    write("t.csv", "text,label\n" + "".join(f"text {n},{n % 2}\n" for n in range(9)) + '"open,1\n')
    with pytest.raises(UserError, match="not valid CSV"):
        load_splits("bert", {"path": "t.csv", "eval_fraction": 0.2, "max_rejects": 0.9}, 0)


def test_nothing_usable_is_an_error_whatever_the_budget():
    write("t.jsonl", [{"text": "", "label": "a"}] * 3)
    with pytest.raises(UserError):
        load_splits("bert", {"path": "t.jsonl", "eval_fraction": 0.2, "max_rejects": 3}, 0)
