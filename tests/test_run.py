"""Whole runs through every floor with models made on the spot: files left, repetition, failure, inference, benchmark."""

import json
import subprocess
import sys

import pytest
import yaml

from supertrainer import benchmark, compose, infer, train
from supertrainer.check import CheckLog
from supertrainer.cli import main
from supertrainer.run import Run
from supertrainer.runtime import UserError

SMALL = {
    "train_bert": ["model.config.hidden_size=32", "model.config.intermediate_size=64", "dataset.max_length=64",
                   "benchmark.speed_rows=2", "benchmark.samples=4"],
    "train_llm": ["model=tiny_llama", "model.config.hidden_size=32", "model.config.num_hidden_layers=2",
                  "model.config.intermediate_size=64", "benchmark.max_new_tokens=8", "benchmark.rows=8",
                  "benchmark.speed_rows=2", "benchmark.samples=4"],
    "train_mllm": ["benchmark.rows=24", "benchmark.speed_rows=2", "benchmark.samples=4", "benchmark.max_new_tokens=4"],
}


@pytest.fixture(scope="module", params=list(SMALL))
def toy_run(request, tmp_path_factory):
    """One short but complete run of a family: training, evaluation before and after, saving, report."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    cfg = compose(request.param, "mode=toy", f"run.dir={folder}", "trainer.training_kwargs.max_steps=6", "trainer.training_kwargs.logging_steps=2",
                  "dataset.limit={train: 300, eval: 48}", *SMALL[request.param])
    return train(cfg)


def test_a_run_leaves_everything_a_reader_needs(toy_run):
    names = {path.name for path in toy_run.dir.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checks.jsonl", "results.json", "report.html", "model"} <= names
    results = json.loads((toy_run.dir / "results.json").read_text())
    assert results["metric"]["value"] is not None and results["metric"]["baseline"] is not None
    assert results["samples"] and results["loss_tokens"] is not None and results["peak_memory_mb"] > 0
    logged = [json.loads(line) for line in (toy_run.dir / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in row for row in logged)
    environment = json.loads((toy_run.dir / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["data"]["fingerprint"]
    assert "supertrainer train --from-run" in (toy_run.dir / "report.html").read_text()
    assert str(toy_run.dir) in toy_run.summary()


def test_every_check_held_and_is_kept(toy_run):
    kept = CheckLog.load(toy_run.dir / "checks.jsonl")
    assert len(kept) == len(toy_run.checks) >= 3 and not kept.failed, str(kept)
    names = " ".join(check.name for check in kept)
    assert "saved model" in names
    if toy_run.cfg.family != "bert":
        assert "loss" in names


def test_the_saved_model_needs_only_transformers(toy_run):
    code = (
        "import sys\nfrom transformers import AutoConfig, AutoTokenizer, AutoModel\n"
        "import transformers\nfolder = sys.argv[1]\nconfig = AutoConfig.from_pretrained(folder)\n"
        "model = getattr(transformers, config.architectures[0]).from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "print(tokenizer.padding_side, sorted(config.id2label.values())[:1], 'supertrainer' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, toy_run.dir / "model"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    side, *_, ours = done.stdout.split()
    assert side == ("right" if toy_run.cfg.family == "bert" else "left") and ours == "False"


def test_a_run_loads_again(toy_run):
    again = Run.load(toy_run.dir)
    assert again.metrics == json.loads(json.dumps(toy_run.metrics)) and again.cfg.family == toy_run.cfg.family


def test_a_run_is_repeated_exactly(toy_run, tmp_path):
    code = main(["train", "--from-run", str(toy_run.dir), f"run.dir={tmp_path / 'again'}"])
    assert code == 0
    pick = ("step", "loss", "grad_norm", "eval_loss")
    first, second = ([{k: json.loads(line)[k] for k in pick if k in json.loads(line)}
                      for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (toy_run.dir, tmp_path / "again"))
    assert first == second and any("loss" in row for row in first)
    assert Run.load(tmp_path / "again").metrics == Run.load(toy_run.dir).metrics


def test_repeating_with_other_data_is_refused(toy_run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.yaml").write_text((toy_run.dir / "config.yaml").read_text())
    environment = json.loads((toy_run.dir / "environment.json").read_text())
    environment["data"]["fingerprint"] = {"train": "other", "eval": "other"}
    (copy / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(UserError, match="the data has changed"):
        train(toy_run.cfg | {"run": {"root": str(tmp_path), "dir": None}}, from_run=str(copy))


def test_infer_answers_from_a_run_folder(toy_run):
    family = toy_run.cfg.family
    rows = {"bert": [{"text": "Return the square root of x."}, {"text": "Close the socket."}],
            "llm": [{"prompt": "What does `math.sqrt` do?"}], "mllm": []}[family]
    if family == "mllm":
        from PIL import Image

        rows = [{"image": Image.new("RGB", (32, 32)), "question": "Which digit is this?"}]
    answers = infer(compose("infer", f"model.path={toy_run.dir}", "sampling.max_new_tokens=4"), rows)
    assert len(answers) == len(rows)
    if family == "bert":
        assert answers[0]["label"] in toy_run.results["confusion"]["labels"]
        assert sum(answers[0]["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    else:
        assert isinstance(answers[0]["answer"], str) and answers[0]["finish_reason"] in ("stop", "length")


def test_benchmark_measures_a_run_folder(toy_run, tmp_path):
    measured = benchmark(compose("benchmark", f"model.path={toy_run.dir}", f"output.path={tmp_path / 'b'}",
                                 "benchmark.rows=16", "benchmark.speed_rows=2", "benchmark.max_new_tokens=4"))
    kept = json.loads((tmp_path / "b" / "results.json").read_text())
    assert kept["metric"]["value"] is not None and kept["speed"] and (tmp_path / "b" / "report.html").exists()
    assert "baseline" in measured.summary()


@pytest.mark.parametrize("experiment", list(SMALL))
def test_sanity_check_is_two_steps_without_evaluation(experiment, tmp_path):
    run = train(compose(experiment, "mode=sanity_check", f"run.root={tmp_path}", *SMALL[experiment][:3]))
    assert "sanity_check" in run.dir.name and run.results["facts"]["steps"] == 2
    assert run.results.get("metric") is None and (run.dir / "report.html").exists() and not run.checks.failed
    assert not list((run.dir / "checkpoints").glob("checkpoint-*"))


def test_a_broken_line_stops_the_run_before_anything_is_written(in_tmp, capsys):
    (in_tmp / "rows.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n{"text": "c" "label": "x"}\n')
    code = main(["train", "+experiment=train_bert", "dataset.path=rows.jsonl"])
    said = capsys.readouterr().err
    assert code == 2 and "rows.jsonl, line 3" in said and "not valid JSON" in said
    assert [path.name for path in in_tmp.iterdir()] == ["rows.jsonl"]


def test_ones_own_files_train_a_classifier_that_learns(in_tmp):
    rows = [{"text": f"{word} number {i}", "label": label} for i in range(40)
            for word, label in (("good great", "positive"), ("bad awful", "negative"))]
    (in_tmp / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = train(compose("train_bert", "dataset.path=rows.jsonl", "run.dir=run", "trainer.training_kwargs.num_train_epochs=4",
                        "trainer.training_kwargs.learning_rate=5e-3", *SMALL["train_bert"]))
    assert run.metrics["accuracy"] > 0.9 > run.results["metric"]["baseline"]
    assert set(run.results["confusion"]["labels"]) == {"positive", "negative"}


def test_an_occupied_folder_is_refused(in_tmp):
    (in_tmp / "mine").mkdir()
    (in_tmp / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="not an empty folder"):
        train(compose("train_bert", "run.dir=mine"))
    assert [path.name for path in (in_tmp / "mine").iterdir()] == ["notes.txt"]


def test_a_failure_in_the_middle_is_noted(tmp_path, monkeypatch):
    from supertrainer.run import training

    def broken(*args, **kwargs):
        raise UserError("the loss is not a number at step 3")

    monkeypatch.setattr(training, "fit", broken)
    with pytest.raises(UserError):
        train(compose("train_bert", "mode=sanity_check", f"run.dir={tmp_path / 'run'}", *SMALL["train_bert"][:3]))
    assert "step 3" in (tmp_path / "run" / "error.txt").read_text()


def test_multirun_runs_every_combination(in_tmp, capsys):
    code = main(["train", "+experiment=train_bert", "mode=sanity_check", "--multirun", "seed=1,2", "run.root=sweeps",
                 *SMALL["train_bert"][:3]])
    assert code == 0, capsys.readouterr()
    configs = [yaml.safe_load(path.read_text()) for path in sorted(in_tmp.glob("sweeps/multirun-*/*/config.yaml"))]
    assert [config["seed"] for config in configs] == [1, 2]
    assert main(["train", "+experiment=train_bert", "--multirun", "seed=1,x"]) == 2


def test_as_a_module(in_tmp):
    done = subprocess.run([sys.executable, "-m", "supertrainer.train", "+experiment=train_bert", "mode=toyy"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Did you mean 'toy'?" in done.stderr
    for module in ("inference", "benchmark"):
        done = subprocess.run([sys.executable, "-m", f"supertrainer.{module}"], capture_output=True, text=True)
        assert done.returncode == 2 and "model.path: required" in done.stderr, done.stderr
