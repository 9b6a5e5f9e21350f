"""Whole runs on data in every form: formats, mixtures, streams, masks, batching, splits, through `train` itself."""

import json
import math

import pandas as pd
import pytest

from supertrainer import compose, train
from supertrainer.runtime import UserError

TINY = ["model=tiny_llama", "model.config={hidden_size: 32, num_hidden_layers: 1}", "export.save=false",
        "trainer.training_kwargs.max_steps=3", "trainer.training_kwargs.per_device_train_batch_size=4",
        "benchmark.samples=2", "benchmark.rows=2", "benchmark.speed_rows=0", "benchmark.max_new_tokens=4"]


def talk(number, **extra):
    return {"messages": [{"role": "user", "content": f"What is number {number}?"},
                         {"role": "assistant", "content": f"It is {number}. " * (1 + number % 4), **extra}]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path):
    def start(*words, experiment="train_llm", **data):
        tiny = TINY if experiment == "train_llm" else [f"model={experiment.replace('train', 'tiny')}", *TINY[1:]]
        return train(compose(experiment, *tiny, f"run.root={tmp_path / 'runs'}", *words), **data)

    return start


FORMS = {
    "sharegpt": lambda n: {"conversations": [{"from": "human", "value": f"Number {n}?"}, {"from": "gpt", "value": f"{n}."}]},
    "instruction": lambda n: {"instruction": "Say the number.", "input": str(n), "output": f"{n}."},
    "prompt_completion": lambda n: {"prompt": f"Number {n}?", "completion": f"{n}."},
    "question_answer": lambda n: {"question": f"Number {n}?", "answer": f"{n}."},
    "text": lambda n: {"text": f"This text is about the number {n}, and it goes on for a while."},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_format_trains(run, tmp_path, form):
    finished = run(f"dataset.path={write(tmp_path / 'rows.jsonl', [FORMS[form](n) for n in range(24)])}")
    assert finished.results["facts"]["format"] == form and not finished.checks.failed
    assert math.isfinite(finished.metrics["held_out_loss"]["value"])


@pytest.mark.parametrize("batching", ["padded", "length_grouped", "padding_free", "packed"])
def test_every_way_of_batching_gives_the_same_held_out_loss_before_training(run, tmp_path, batching):
    path = write(tmp_path / "rows.jsonl", [talk(n) for n in range(40)])
    finished = run(f"dataset.path={path}", f"dataset.batching={batching}", "dataset.max_length=128")
    assert not finished.checks.failed and finished.results["facts"]["batching"]["way"] == batching
    names = [check.name for check in finished.checks]
    assert any("packed rows" in name for name in names) == (batching in ("padding_free", "packed"))
    assert finished.metrics["held_out_loss"]["before"] == pytest.approx(math.log(len(finished.tokenizer)), rel=0.05)


def test_rows_in_memory_a_test_part_and_the_groups_that_stay_together(run):
    frame = pd.DataFrame({"prompt": [f"Number {n}?" for n in range(60)], "completion": [f"{n}." for n in range(60)],
                          "book": [f"book {n // 3}" for n in range(60)]})
    finished = run("dataset.test_fraction=0.2", "dataset.group_by=book", data=frame)
    rows = finished.results["facts"]["rows"]
    assert rows["train"] + rows["eval"] + rows["test"] == 60 and all(count % 3 == 0 for count in rows.values())
    assert finished.cfg.dataset.name is None and not finished.checks.failed


def test_a_mixture_says_how_many_rows_of_each_came_in(run, tmp_path):
    first = write(tmp_path / "a.jsonl", [talk(n) for n in range(60)])
    second = write(tmp_path / "b.jsonl", [FORMS["instruction"](n) for n in range(60)])
    finished = run("dataset.name=null", f"dataset.mix=[{{path: '{first}', weight: 0.75}}, {{path: '{second}', weight: 0.25}}]")
    used = {entry["source"]: entry["used"] for entry in finished.results["facts"]["mix"]}
    counts = list(used.values())
    assert len(counts) == 2 and 2 < counts[0] / counts[1] < 4.5


def test_a_stream_trains_and_keeps_its_rejects(run, tmp_path):
    rows = [talk(n) for n in range(60)]
    rows[20] = {"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}
    finished = run(f"dataset.path={write(tmp_path / 'rows.jsonl', rows)}", "dataset.streaming=true", "dataset.max_rejects=1",
                   "dataset.stream_eval_rows=8", "dataset.batching=padded", "trainer.training_kwargs.max_steps=20")
    assert finished.results["facts"]["streaming"] and finished.results["facts"]["rows"]["train"] is None
    rejects = [json.loads(line) for line in (finished.dir / "rejects.jsonl").read_text().splitlines()]
    assert [reject["where"].rpartition("/")[2] for reject in rejects] == ["rows.jsonl, line 21"]
    assert not finished.checks.failed


def test_rejected_rows_are_kept_with_place_reason_and_fix(run, tmp_path):
    rows = [talk(n) for n in range(30)]
    rows[2] = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}
    rows[4] = {"name": "the long one", "messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "b"}]}
    finished = run(f"dataset.path={write(tmp_path / 'rows.jsonl', rows)}", "dataset.max_rejects=0.1", "dataset.max_length=64")
    rejects = {reject["where"].rpartition("/")[2].rstrip(")"): reject for reject in
               map(json.loads, (finished.dir / "rejects.jsonl").read_text().splitlines())}
    assert set(rejects) == {"rows.jsonl, line 3", "rows.jsonl, line 5"}
    assert rejects["rows.jsonl, line 5"]["where"].startswith("the long one (")
    assert "dataset.max_length" in rejects["rows.jsonl, line 5"]["fix"] and rejects["rows.jsonl, line 3"]["record"] == rows[2]
    assert any("1 " in text and "left out" in text for text in finished.results["warnings"])


def decoded(finished):
    """Return what the report says was trained in its first row."""
    return "".join(token["text"] for token in finished.results["loss_tokens"][0] if token["trained"])


@pytest.mark.parametrize("train_on,trained", [
    ("assistant", "First.<|im_end|>Second.<|im_end|>"), ("last_assistant", "Second.<|im_end|>"),
    ("[user]", "One?<|im_end|>Two?<|im_end|>")])
def test_which_turns_are_trained(run, tmp_path, train_on, trained):
    rows = [{"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "First."},
                          {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Second."}], "tag": n}
            for n in range(8)]
    other = write(tmp_path / "other.jsonl", [talk(n) for n in range(4)])
    finished = run(f"dataset.path={write(tmp_path / 'rows.jsonl', rows[:1])}", f"dataset.eval_path={other}",
                   f"dataset.train_on={train_on}")
    assert decoded(finished) == trained and not finished.checks.failed


def test_a_turn_left_out_and_a_turn_of_half_weight(run, tmp_path):
    half, whole = ([talk(n, **({"weight": weight} if weight != 1 else {})) for n in range(16)] for weight in (0.5, 1))
    other = write(tmp_path / "other.jsonl", [talk(n) for n in range(20, 24)])
    words = [f"dataset.eval_path={other}", "trainer.training_kwargs.max_steps=1", "trainer.training_kwargs.logging_steps=1",
             "trainer.training_kwargs.per_device_train_batch_size=16"]
    losses = []
    for rows in (half, whole):
        finished = run(f"dataset.path={write(tmp_path / 'rows.jsonl', rows)}", *words)
        logged = [json.loads(line) for line in (finished.dir / "metrics.jsonl").read_text().splitlines()]
        losses.append(next(line["loss"] for line in logged if "loss" in line))
        assert not finished.checks.failed
    assert losses[0] == pytest.approx(losses[1] / 2, rel=1e-3)


@pytest.mark.parametrize("template", ["zephyr", "chatml", "alpaca"])
def test_another_template_is_learnt_and_stopped_on(run, tmp_path, template):
    path = write(tmp_path / "rows.jsonl", [talk(n) for n in range(12)])
    finished = run(f"dataset.path={path}", f"dataset.template={template}")
    assert not finished.checks.failed
    stops = [check for check in finished.checks if check.name.startswith("generation stops where")]
    assert len(stops) == 1


def test_preferences_are_read_and_refused_with_the_way_out(run, tmp_path):
    rows = [{"prompt": f"Number {n}?", "chosen": f"{n}.", "rejected": "No."} for n in range(12)]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="dataset.columns.completion=chosen"):
        run(f"dataset.path={path}")
    finished = run(f"dataset.path={path}", "dataset.format=prompt_completion", "dataset.columns={completion: chosen}")
    assert "No." not in decoded(finished) and not finished.checks.failed


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {
    "type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}}}]


def test_tool_calls_are_rendered_and_trained(run, tmp_path):
    rows = [{"tools": TOOLS, "messages": [
        {"role": "user", "content": f"What is {n} and 1?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": n, "b": 1}}}]},
        {"role": "tool", "name": "add", "content": str(n + 1)}, {"role": "assistant", "content": f"It is {n + 1}."}]}
        for n in range(16)]
    finished = run(f"dataset.path={write(tmp_path / 'rows.jsonl', rows)}", "dataset.template=qwen-2.5", "dataset.max_length=1024",
                   "model.config.max_position_embeddings=1024")
    assert not finished.checks.failed
    assert "<tool_call>" in decoded(finished) and "It is" in decoded(finished) and "What is" not in decoded(finished)


LABELLED = {
    "text_pair_label": lambda n: {"sentence1": f"number {n}", "sentence2": f"number {n + n % 2}", "label": ["same", "other"][n % 2]},
    "multi_label": lambda n: {"text": f"number {n} is {'even' if n % 2 == 0 else 'odd'}", "labels": ["even"] if n % 2 == 0 else ["odd", "rare"]},
    "token_tags": lambda n: {"tokens": ["number", str(n), "here"], "tags": ["O", "B-NUM", "O"]},
}


@pytest.mark.parametrize("form", LABELLED)
def test_every_kind_of_label_trains_and_is_measured(run, tmp_path, form):
    path = write(tmp_path / "rows.jsonl", [LABELLED[form](n) for n in range(40)])
    finished = run(f"dataset.path={path}", "dataset=bert/files", "export.save=true", "trainer.training_kwargs.eval_strategy=no",
                   "trainer.training_kwargs.save_strategy=no", "trainer.training_kwargs.load_best_model_at_end=false",
                   experiment="train_bert")
    assert finished.results["facts"]["format"] == form and not finished.checks.failed
    assert finished.results["metric"]["baseline"] is not None


def test_rows_longer_than_the_model_has_positions_for_are_refused_before_it_loads(run, tmp_path):
    rows = [talk(n) for n in range(20)] + [{"messages": [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(UserError, match="positions for 64 tokens.*Set dataset.max_length=64"):
        run(f"dataset.path={write(tmp_path / 'rows.jsonl', rows)}", "model.config.max_position_embeddings=64", "seed=3")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("batching", ["padded", "padding_free"])
def test_images_train_in_both_ways_of_batching(tmp_path, batching):
    finished = train(compose("train_mllm", "mode=sanity_check", f"dataset.batching={batching}", f"run.root={tmp_path}"))
    assert not finished.checks.failed and finished.results["facts"]["batching"]["way"] == batching


def test_chats_about_several_images_train(tmp_path):
    import base64
    import io

    from PIL import Image

    def picture(shade):
        buffer = io.BytesIO()
        Image.new("L", (16, 16), shade).save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    rows = [{"messages": [{"role": "user", "content": "<image><image> Same?" if n % 3 else "Are you there?"},
                          {"role": "assistant", "content": "yes" if n % 2 else "no"}],
             "images": [picture(n), picture(0)] if n % 3 else []} for n in range(24)]
    finished = train(compose("train_mllm", "mode=sanity_check", f"run.root={tmp_path}",
                             f"dataset.path={write(tmp_path / 'rows.jsonl', rows)}"))
    assert finished.results["facts"]["format"] == "messages" and not finished.checks.failed


def test_the_end_of_a_turn_is_checked_whatever_else_is_known_and_only_where_there_is_a_template():
    from types import SimpleNamespace

    from supertrainer.models.base import FastModel
    from supertrainer.models.processor import ModelFacts
    from supertrainer.run.recipes import check_embedding, check_stops

    model, tokenizer = FastModel.from_pretrained("tiny_llama", texts=["some text"], config={"hidden_size": 32, "num_hidden_layers": 1})
    assert check_embedding(tokenizer, ModelFacts("llama", None, (), None)) == []
    assert [check.passed for check in check_stops(tokenizer, model, "chat")] == [True]
    model.generation_config.eos_token_id = None
    assert [check.passed for check in check_stops(tokenizer, model, "chat")] == [False]
    assert check_stops(tokenizer, model, "text") == [] == check_stops(SimpleNamespace(chat_template=None), model, "chat")
