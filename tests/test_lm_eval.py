"""lm-eval's tasks through our engine, against lm-eval's own transformers class on the same tiny model."""

import json
import math

import pytest
import torch
import yaml

from supertrainer.inference.engines.hf import HFEngine
from supertrainer.models.llm import FastLLM
from supertrainer.runtime import UserError

pytest.importorskip("lm_eval")
TEXTS = ["The capital of France is Paris.", "The capital of Italy is Rome.", "two and two is four", "red green blue"] * 4


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return FastLLM.from_pretrained("tiny_llama", texts=TEXTS)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Task files for the four kinds of request."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"q": "The capital of France is", "options": ["Paris", "Rome", "red"], "gold": 0},
            {"q": "The capital of Italy is", "options": ["Paris", "Rome", "green"], "gold": 1},
            {"q": "two and two is", "options": ["four", "Rome", "blue"], "gold": 0}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
              "test_split": "test", "doc_to_text": "{{q}}"}
    kinds = {
        "choose": {"output_type": "multiple_choice", "doc_to_choice": "options", "doc_to_target": "gold",
                   "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        "continue": {"output_type": "loglikelihood", "doc_to_target": " {{options[gold]}}",
                     "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
        "whole": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}",
                  "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}]},
        "write": {"output_type": "generate_until", "doc_to_target": "{{options[gold]}}",
                  "generation_kwargs": {"until": ["."], "max_gen_toks": 6}, "metric_list": [{"metric": "exact_match"}]},
    }  # fmt: skip
    for name, task in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"tiny_{name}", **shared, **task}))
    return folder


def test_figures_equal_lm_evals_own(tiny, tasks):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from supertrainer.benchmark.lm_eval import evaluate_tasks

    model, tokenizer = tiny
    files = [str(tasks / f"{name}.yaml") for name in ("choose", "continue", "whole", "write")]
    found = evaluate_tasks(HFEngine(model, tokenizer, "llm"), files)
    own = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=256), tasks=files,
                                  task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)
    plain = {f"{task}/{key.split(',')[0]}": value for task, figures in own["results"].items() for key, value in figures.items()
             if "," in key and "stderr" not in key}  # fmt: skip
    assert set(found["scores"]) == set(plain) and len(plain) >= 6
    for name, value in plain.items():
        assert found["scores"][name] == pytest.approx(value, rel=1e-4), name
    ours = {row["id"]: row["answer"] for row in found["per_row"] if row["task"] == "tiny_write"}
    theirs = [sample["filtered_resps"][0] for sample in own["samples"]["tiny_write"]]
    assert sorted(ours.values()) == sorted(theirs), "the same texts, letter for letter"
    assert len(found["per_row"]) == 12 and found["lm_eval"]["rows"]["tiny_choose"] == 3
    assert all(row["correct"] in (True, False) for row in found["per_row"] if row["task"] == "tiny_choose")


def test_is_greedy_is_what_the_model_would_write(tiny):
    from supertrainer.benchmark.lm_eval_model import greedy_of

    model, tokenizer = tiny
    engine = HFEngine(model, tokenizer, "llm")
    prompt = tokenizer.encode("The capital of")
    with torch.no_grad():
        ids = list(prompt)
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    likeliest = ids[len(prompt):]
    other = [*likeliest[:2], (likeliest[2] + 1) % len(tokenizer)]
    scores = engine.score([prompt] * 2, [likeliest, other])
    assert all((row < math.log(0.5)).any() for row in scores), "an untrained model is sure of nothing, so logits decide"
    assert greedy_of(engine, [prompt] * 2, [likeliest, other], scores, [True, True]) == [True, False]


def test_chat_template_asks_the_engine_with_conversations(tiny, tasks):
    from supertrainer.benchmark.lm_eval import evaluate_tasks

    asked = []

    class Listening(HFEngine):
        def generate(self, conversations, *args, **more):
            asked.extend(conversations)
            return super().generate(conversations, *args, **more)

    evaluate_tasks(Listening(*tiny, "llm"), [str(tasks / "write.yaml")], chat_template=True, rows=2)
    assert [talk[-1] for talk in asked] == [{"role": "user", "content": "The capital of France is"},
                                            {"role": "user", "content": "The capital of Italy is"}]  # fmt: skip


def test_long_contexts_are_cut_from_the_left(tiny):
    from lm_eval.api.instance import Instance

    from supertrainer.benchmark.lm_eval_model import EngineLM

    engine = HFEngine(*tiny, "llm", max_length=16)
    lm = EngineLM(engine)
    long = "red green blue " * 30
    request = Instance("loglikelihood", {}, (long, " red"), 0, ("t", 0, 1))
    ((value, _),) = lm.loglikelihood([request])
    ids, answer = lm._encode_pair(long, " red")
    kept = ids[-(16 - len(answer)):]
    assert value == pytest.approx(float(engine.score([kept], [answer])[0].sum()), rel=1e-6)
    (rolled,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (long,), 0, ("t", 0, 1))])
    assert rolled < 0 and len(lm.generate_until([Instance("generate_until", {}, (long, {"until": [], "max_gen_toks": 4}), 0, ("t", 0, 1))])) == 1


def test_what_cannot_be_done_is_said(tiny, tasks):
    from supertrainer.benchmark.lm_eval import evaluate_tasks
    from supertrainer.inference.base import Engine

    class Deaf(Engine):
        name = "deaf"

    with pytest.raises(UserError, match="tells no tokens"):
        evaluate_tasks(Deaf(), [str(tasks / "choose.yaml")])
    with pytest.raises(UserError, match="neither a file nor a task"):
        evaluate_tasks(HFEngine(*tiny, "llm"), ["tiny_chose"], task_path=tasks)
    with pytest.raises(UserError, match="no such folder"):
        evaluate_tasks(HFEngine(*tiny, "llm"), ["x"], task_path=tasks / "nowhere")
    found = evaluate_tasks(HFEngine(*tiny, "llm"), ["tiny_choose"], task_path=tasks, rows=2)
    assert found["lm_eval"]["rows"] == {"tiny_choose": 2} and found["metric"]["name"] == "tiny_choose/acc"
