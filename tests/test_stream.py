"""Rows that are streamed: the same rows as read whole, held out, shuffled, resumed, counted, and never all in memory."""

import io
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import pandas
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from supertrainer.data import stream as stream_module
from supertrainer.data.base import load_splits, training_texts
from supertrainer.runtime import UserError


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def talk(n):
    return {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": f"Answer {n}."}]}


def write(name, rows):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def stream(path, family="llm", seed=0, **options):
    return load_splits(family, {"path": path, "streaming": True, "eval_fraction": 0.15, **options}, seed)


def asked(rows):
    return [row["messages"][0]["content"] for row in rows]


def test_a_stream_has_all_rows_but_those_held_out_in_another_order_by_seed_and_epoch():
    write("t.jsonl", map(talk, range(3000)))
    splits = stream("t.jsonl", stream_eval_rows=200)
    assert isinstance(splits.train, datasets.IterableDataset) and asked(splits.eval) == [f"Question {n}?" for n in range(200)]
    first = asked(splits.train)
    assert sorted(first) == sorted(f"Question {n}?" for n in range(200, 3000)) and first != sorted(first)
    assert asked(splits.train) == first == asked(stream("t.jsonl", stream_eval_rows=200).train)
    assert asked(stream("t.jsonl", seed=1).train) != first
    splits.train.set_epoch(1)
    assert asked(splits.train) != first and sorted(asked(splits.train)) == sorted(first)
    assert max(first.index(f"Question {n}?") - (n - 200) for n in range(200, 3000)) > stream_module.SHUFFLE_BUFFER / 2


def test_facts_of_a_stream():
    splits = stream(write("t.jsonl", map(talk, range(500))), test_path=write("e.jsonl", map(talk, range(9000, 9010))))
    facts = splits.facts
    assert facts["streaming"] is True and facts["rows"] == {"train": None, "eval": 200, "test": 10}
    assert facts["fingerprint"]["train"] is None and facts["fingerprint"]["eval"] and facts["kind"] == "chat" == splits.kind
    assert facts["sources"][0]["path"] == "t.jsonl" and facts["sources"][0]["bytes"] == Path("t.jsonl").stat().st_size
    assert splits.columns == {"messages": "messages"} and len(splits.test) == 10 and facts["format"] == "messages"
    json.dumps(facts)
    assert facts == stream("t.jsonl", test_path="e.jsonl").facts


def test_nothing_of_the_training_part_is_held_whole(monkeypatch):
    monkeypatch.setattr(stream_module, "SHUFFLE_BUFFER", 50), monkeypatch.setattr(stream_module, "CHUNK", 50)
    write("t.jsonl", ({"text": f"{n} " + "long " * 2000} for n in range(1000)))
    size = Path("t.jsonl").stat().st_size
    splits = stream("t.jsonl", stream_eval_rows=10, format="text")
    iter(splits.train).__next__()  # what is imported on first use is not the stream's
    tracemalloc.start()
    assert sum(1 for _ in splits.train) == 990
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 9e6 and peak < 0.5 * size, "the buffer and a piece, in several forms, are a tenth of it each"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "txt", "hub", "iterable", "list", "saved", "shards"])
def test_all_sources_can_be_streamed(kind):
    rows = [{"text": f"text number {n}"} for n in range(300)]
    frame, options = pandas.DataFrame(rows), {}
    if kind == "jsonl":
        path = write("t.jsonl", rows)
    elif kind in ("csv", "tsv"):
        frame.to_csv(path := f"t.{kind}", index=False, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        frame.to_parquet(path := "t.parquet")
    elif kind == "txt":
        path = write("t.txt", [row["text"] + "\n\n" for row in rows])
    elif kind == "hub":  # `datasets` takes a local folder of that name for the Hub's
        write("some/texts/train.jsonl", rows)
        path, options = None, {"name": "some/texts"}
    elif kind == "shards":
        write("set/train-0.jsonl", rows[:100]), write("set/train-1.jsonl", rows[100:]), write("set/test.jsonl", [{"text": "no"}])
        path = "set"
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path := "saved")
    else:
        path = datasets.Dataset.from_list(rows).to_iterable_dataset() if kind == "iterable" else rows
    splits = stream(path, stream_eval_rows=120, **options)
    assert len(splits.eval) == 120 and splits.kind == "text"
    assert sorted([*splits.eval["text"], *(row["text"] for row in splits.train)]) == sorted(row["text"] for row in rows)


def test_shards_are_shared_by_the_workers_of_a_loader():
    for shard in range(4):
        write(f"set/{shard}.jsonl", map(talk, range(shard * 100, shard * 100 + 100)))
    splits = stream("set", stream_eval_rows=150)
    loader = DataLoader(splits.train, batch_size=10, num_workers=2, collate_fn=list)
    assert sorted(asked(row for batch in loader for row in batch)) == sorted(f"Question {n}?" for n in range(150, 400))


def test_workers_may_be_other_processes():
    write("set/a.csv", ["text\n", *(f"line {n}\n" for n in range(300))]), write("set/b.csv", ["text\n", *(f"row {n}\n" for n in range(300))])
    train = stream("set", stream_eval_rows=100).train
    loader = DataLoader(train, batch_size=10, num_workers=1, collate_fn=list, multiprocessing_context="spawn")
    assert sorted(row["text"] for batch in loader for row in batch) == sorted(row["text"] for row in train)


def test_a_stream_goes_on_where_it_stopped():
    write("t.jsonl", map(talk, range(700)))
    train = stream("t.jsonl", stream_eval_rows=100).train
    assert asked(train.skip(250)) == asked(train)[250:]


def test_a_stream_gives_the_rows_that_reading_whole_gives():
    rows = [{"conversations": [{"from": "human", "value": f"Hi {n}"}, {"from": "gpt", "value": f"Yo {n}"}]} for n in range(40)]
    whole = load_splits("llm", {"path": write("t.jsonl", rows), "eval_fraction": 0.2, "system": "Be brief."}, 0)
    splits = stream("t.jsonl", stream_eval_rows=8, system="Be brief.")
    def texts(splits):
        return sorted(json.dumps(row["messages"], sort_keys=True) for part in (splits.train, splits.eval) for row in part)
    assert texts(splits) == texts(whole) and splits.facts["format"] == whole.facts["format"] == "sharegpt"


def test_tools_that_come_late_are_kept():
    tool = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}}
    splits = stream(write("t.jsonl", [*map(talk, range(30)), {**talk(30), "tools": [tool]}]), stream_eval_rows=5)
    found = [row["tools"] for row in splits.train if row["tools"]]
    assert len(found) == 1 and found[0][0]["function"]["name"] == "weather"


def test_images_are_streamed():
    def png(shade):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}
    rows = [{"image": png(n), "question": f"Number {n}?", "answer": str(n)} for n in range(30)]
    datasets.Dataset.from_list(rows).to_parquet("t.parquet")
    splits = stream("t.parquet", "mllm", stream_eval_rows=10)
    shades = sorted(row[splits.columns["image"]][0].getpixel((0, 0))[0] for row in splits.train)
    assert shades == list(range(10, 30)) and splits.eval[0]["images"][0].size == (8, 8)


def test_a_row_that_lacks_a_column_is_that_rows_problem_even_alone():
    write("t.jsonl", [*({"text": f"t{n}", "label": n % 2} for n in range(1020)), {"text": "last"}])
    for count in (1000, 20):  # the row stands alone in its piece, or not
        splits = stream("t.jsonl", "bert", stream_eval_rows=count, labels=["0", "1"])
        with pytest.raises(UserError, match="t.jsonl, line 1021, column 'label': the label is missing"):
            list(splits.train)


# ---------------------------------------------------------------- copies, groups, limits, classes

def test_copies_and_groups_of_held_out_rows_do_not_train():
    rows = [{**talk(n), "doc": n // 10} for n in range(100)]
    splits = stream(write("t.jsonl", [*rows, *rows[:3]]), stream_eval_rows=15, group_by="doc")
    assert sorted(asked(splits.train)) == sorted(f"Question {n}?" for n in range(20, 100))
    apart = stream("t.jsonl", eval_path=write("e.jsonl", rows[50:52]))
    assert len(apart.eval) == 2 and len(list(apart.train)) == 101 and not {"Question 50?", "Question 51?"} & set(asked(apart.train))
    tested = stream("t.jsonl", stream_eval_rows=10, test_path="e.jsonl")
    assert len(tested.eval) == 10 and len(list(tested.train)) == 100 - 10 - 2


def test_limits():
    splits = stream(write("t.jsonl", map(talk, range(500))), limit={"train": 50, "eval": 20})
    assert len(list(splits.train)) == 50 and len(splits.eval) == 20 and len(set(asked(splits.train))) == 50


def test_classes_of_a_stream_must_be_known():
    rows = [{"text": f"text {n}", "label": "odd" if n % 2 else "even"} for n in range(300)]
    write("t.jsonl", rows), write("e.jsonl", [{"text": "x", "label": "odd"}, {"text": "y", "label": "even"}])
    with pytest.raises(UserError, match="the classes of a stream are not known before it ends. Set dataset.eval_path"):
        stream("t.jsonl", "bert")
    assert stream("t.jsonl", "bert", eval_path="e.jsonl").labels == ("even", "odd")
    splits = stream("t.jsonl", "bert", labels=["odd", "even"], stream_eval_rows=100)
    assert splits.labels == ("odd", "even") and Counter(row["label"] for row in splits.train) == {0: 100, 1: 100}
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.Dataset.from_list([{"text": f"t{n}", "label": n % 2} for n in range(300)], features=features).to_parquet("t.parquet")
    assert stream("t.parquet", "bert").labels == ("neg", "pos")
    write("bad.jsonl", [*rows, {"text": "z", "label": "evn"}])
    with pytest.raises(UserError, match=r"bad.jsonl, line 301, column 'label': label 'evn' is unknown.*Did you mean 'even'"):
        list(stream("bad.jsonl", "bert", labels=["odd", "even"]).train)


# ---------------------------------------------------------------- what is wrong

def test_the_budget_is_kept_as_the_stream_goes_and_once_for_all_epochs():
    rows = [*map(talk, range(2500))]
    for place in (100, 700, 2400):
        rows[place] = talk(place) if place == 100 else {"messages": []}
    rows[1500] = '{"broken\n'
    write("t.jsonl", rows)
    splits = stream("t.jsonl", max_rejects=3)
    for _ in range(2):
        assert sum(1 for _ in splits.train) == 2300 - 3
    assert sorted(problem.where for problem in splits.rejected) == ["t.jsonl, line 1501", "t.jsonl, line 2401", "t.jsonl, line 701"]
    assert sum(1 for _ in stream("t.jsonl", max_rejects=0.002).train) == 2297
    with pytest.raises(UserError) as error:
        list(stream("t.jsonl", max_rejects=2).train)
    assert error.value.problems[-1] == "3 rows cannot be used, and dataset.max_rejects=2 allows 2."
    assert any(problem.startswith("t.jsonl, line 701, column 'messages': ") for problem in error.value.problems)
    with pytest.raises(UserError, match="t.jsonl, line 701"):
        list(stream("t.jsonl").train)


def test_broken_rows_at_the_beginning_stop_before_anything_trains():
    write("t.jsonl", ['{"broken\n', *map(talk, range(300))])
    with pytest.raises(UserError, match="t.jsonl, line 1: not valid JSON"):
        stream("t.jsonl")
    assert len(stream("t.jsonl", max_rejects=1, stream_eval_rows=50).eval) == 50


def test_a_file_that_breaks_late_stops_with_its_name():
    write("t.csv", ["text\n", *(f"line {n}\n" for n in range(1500)), '"open\n'])
    with pytest.raises(UserError, match="t.csv, line .*: not valid CSV"):
        list(stream("t.csv", max_rejects=100).train)


@pytest.mark.parametrize(("options", "message"), [
    ({"path": "t.json"}, "t.json: a JSON list can only be read whole. Write it as JSON lines"),
    ({"path": "none.jsonl"}, "dataset.path: none.jsonl does not exist"),
    ({"path": "few.jsonl"}, "its 20 rows are all held out (dataset.stream_eval_rows=200). Lower that, set dataset.eval_path"),
    ({"path": "empty.jsonl"}, "empty.jsonl: there are no rows"),
    ({"path": "few.jsonl", "test_fraction": 0.1}, "dataset.test_fraction: a stream is not split by shares"),
    ({"path": "few.jsonl", "stream_eval_rows": 0}, "dataset.stream_eval_rows=0"),
    ({"path": "few.jsonl", "eval_path": "texts.jsonl"}, "Rows of different kinds cannot be one data set"),
])
def test_wrong_settings(options, message):
    write("few.jsonl", map(talk, range(20))), write("t.json", ["[]"]), write("empty.jsonl", [])
    write("texts.jsonl", [{"text": "running text"}] * 3)
    with pytest.raises(UserError) as error:
        load_splits("llm", {"streaming": True, "eval_fraction": 0.2, **options}, 0)
    assert message in str(error.value), error.value


def test_mixtures_of_streams():
    write("a.jsonl", map(talk, range(1000))), write("b.jsonl", ({"prompt": f"P {n}", "completion": "C"} for n in range(1000)))
    def shares(**weights):
        mix = [{"path": name + ".jsonl", **({"weight": weights[name]} if weights else {})} for name in "ab"]
        splits = load_splits("llm", {"mix": mix, "streaming": True, "stream_eval_rows": 100}, 0)
        assert Counter(text[0] for text in asked(splits.eval)) == {"Q": 50, "P": 50}
        rows = asked(splits.train)
        assert len(set(rows)) == len(rows) and not set(rows) & set(asked(splits.eval))
        return Counter(text[0] for text in rows)
    assert shares() == {"Q": 950, "P": 950}
    found = shares(a=0.8, b=0.2)
    assert found["Q"] > 900 and 3.3 < found["Q"] / found["P"] < 5


def test_texts_for_a_tokenizer_are_the_first_rows():
    splits = stream(write("t.jsonl", map(talk, range(3000))))
    texts = training_texts(splits, 100)
    assert len(texts) == 200 and not set(texts) & {turn["content"] for row in splits.eval["messages"] for turn in row}
    assert len(training_texts(splits)) == 4000
