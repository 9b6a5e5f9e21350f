"""`supertrainer benchmark compare`: names from the runs' own files, paired tests against hand counts, CSV, LaTeX, one page."""

import csv
import json
import re

import pytest
import yaml

from supertrainer.benchmark import rows as kept
from supertrainer.benchmark.comparison import Entry, name_entries, table_rows
from supertrainer.cli import main
from supertrainer.run.comparing import compare
from supertrainer.runtime import UserError


def write_run(folder, model="tiny_a", correct=(1, 0, 1, 1), seed=1, engines=None, questions=None, **results):
    folder.mkdir(parents=True)
    config = {"model": {"name": model}, "experiment": "demo", "seed": seed, "dataset": {"name": "made"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    content = {"scores": {"accuracy": sum(correct) / len(correct), "text": "no number"}, "mode": "toy", **results}
    if engines:
        content["engines"] = engines
    (folder / "results.json").write_text(json.dumps(content))
    asked = questions or [f"q{i}" for i in range(len(correct))]
    n = len(correct)
    kept.write_rows(folder / kept.FILE, kept.make_rows(asked, asked, ["a"] * n, ["a"] * n, list(map(bool, correct)), [None] * n, None))
    return folder


def test_rows_are_named_by_what_the_files_say_not_by_the_folder(tmp_path):
    first = write_run(tmp_path / "best_model_final", "tiny_a")
    second = write_run(tmp_path / "tiny_a", "tiny_b")
    names = [row["run"] for row in compare([first, second]).rows]
    assert names == ["tiny_a", "tiny_b"]
    first.rename(tmp_path / "renamed")
    assert [row["run"] for row in compare([tmp_path / "renamed", second]).rows] == names


def test_runs_alike_are_told_apart_by_their_settings_or_a_number(tmp_path):
    runs = [write_run(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2), ("c", 2))]
    assert [row["run"] for row in compare(runs[:2]).rows] == ["tiny_a (seed=1)", "tiny_a (seed=2)"]
    names = [row["run"] for row in compare(runs).rows]
    assert len(set(names)) == 3 and names[1].startswith("tiny_a (seed=2)")


def test_paired_test_is_mcnemars_by_hand(tmp_path):
    a = write_run(tmp_path / "a", "tiny_a", [1] * 10 + [1] + [0] * 5)
    b = write_run(tmp_path / "b", "tiny_b", [1] * 10 + [0] + [1] * 5)
    test, = compare([a, b]).tests
    assert (test["first"], test["second"], test["rows"]) == ("tiny_a", "tiny_b", 16)
    assert test["p_value"] == pytest.approx(2 * (1 + 6) / 2**6) and test["difference"] == pytest.approx(4 / 16)
    assert (test["first_mean"], test["second_mean"]) == pytest.approx((11 / 16, 15 / 16))


def test_runs_on_other_data_get_a_note_and_no_figure(tmp_path):
    a = write_run(tmp_path / "a", "tiny_a", [1, 0])
    b = write_run(tmp_path / "b", "tiny_b", [1, 0], questions=["x", "y"])
    test, = compare([a, b]).tests
    assert "no row in common" in test["note"] and "p_value" not in test


def level(tokens):
    return {"concurrency": 1, "tokens_per_s": tokens, "rows_per_s": 1.0, "latency_ms": {"p95": 5.0}, "first_token_ms": None}


def test_each_engine_of_a_benchmark_is_a_row(tmp_path):
    records = [{"label": label, "reference": label == "hf", "load_seconds": 1.5, "peak_memory_mb": {"host": 300.0}, "folder": label,
                "quality": {"metric": {"name": "exact_match", "value": 0.5}, "scores": {"exact_match": 0.5}},
                "speed": {"warmup": 1, "repeats": 2, "levels": [level(tokens)]}} for label, tokens in (("hf", 10.0), ("onnx", 20.0))]
    found = compare([write_run(tmp_path / "a", engines=records), write_run(tmp_path / "b", "tiny_b")])
    assert len(found.rows) == 3 and [row.get("tokens/s @1") for row in found.rows] == [10.0, 20.0, None]
    assert {"hf", "onnx"} <= {part for row in found.rows for part in re.split(", ", row["run"])}


def test_files_hold_every_digit_escape_what_they_must_and_load_nothing(tmp_path):
    a = write_run(tmp_path / "a", "tiny_<a>&100%", [1, 0, 1])
    b = write_run(tmp_path / "b", "tiny_b", [1, 1, 1])
    found = compare([a, b], tmp_path / "out")
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["accuracy"]) == 2 / 3 and rows[0]["run"] == "tiny_<a>&100%"
    tex, page = (tmp_path / "out" / "table.tex").read_text(), (tmp_path / "out" / "comparison.html").read_text()
    assert r"tiny\_<a>\&100\%" in tex and r"\bottomrule" in tex
    assert "tiny_&lt;a&gt;&amp;100%" in page and "<a>" not in page
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["entries"][0]["scores"]["accuracy"] == 2 / 3
    assert len(found.files) == 4 and not list((tmp_path / "out").glob("*.part"))


def test_all_wrong_folders_are_named_at_once(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        compare([tmp_path / "nowhere", tmp_path / "empty"])
    assert len(error.value.problems) == 2
    assert main(["benchmark", "compare", str(tmp_path / "nowhere")]) == 2
    assert "No run folder" in capsys.readouterr().err


def test_command_line(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", "tiny_a"), write_run(tmp_path / "b", "tiny_b", [0, 0, 0, 1])
    assert main(["benchmark", "compare", str(a), str(b), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "tiny_a" in out and "McNemar" in out and "comparison.html" in out


def test_columns_all_have_come_first():
    entries = [Entry({"model": "a"}, {}, {"rare": 1.0, "shared": 2.0}), Entry({"model": "b"}, {}, {"shared": 3.0})]
    name_entries(entries)
    assert [list(row) for row in table_rows(entries)][0] == ["run", "shared", "rare"]


def test_a_measured_run_is_named_by_the_run_that_made_its_model(tmp_path):
    folders = []
    for layers in (1, 2):
        made = write_run(tmp_path / f"folder{layers}", "tiny_bert")
        config = yaml.safe_load((made / "config.yaml").read_text()) | {"family": "bert"}
        config["model"]["config"] = {"layers": layers}
        (made / "config.yaml").write_text(yaml.safe_dump(config))
        (made / "environment.json").write_text("{}")
        measured = write_run(tmp_path / f"measured{layers}")
        (measured / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(made)}, "engine": {"name": "hf"}}))
        folders.append(measured)
    assert [row["run"] for row in compare(folders).rows] == ["tiny_bert (layers=1)", "tiny_bert (layers=2)"]
