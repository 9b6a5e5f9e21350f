"""Engines side by side: agreement with hand-made engines, each in a process of its own, failures, levels, the report."""

import json
import os

import numpy as np
import pytest

from supertrainer import compose, register
from supertrainer.benchmark.agreement import Said, agree, listen, margins, partings
from supertrainer.benchmark.concurrency import measure_levels
from supertrainer.inference.base import Classification, Completion, Engine
from supertrainer.run import Run, benchmark
from supertrainer.run.side_by_side import engines_of
from supertrainer.runtime import UserError


@register("engine", "toy_words", replace=True)
class ToyWords(Engine):
    """Answers 5 or 6, which are nearly equally likely, then ends; `shift` is its error on 6."""

    name, honours, family, families = "toy_words", ("max_new_tokens", "log_probabilities"), "llm", ("llm",)
    log_probability_limit = 0.05

    def __init__(self, shift=0.0, bos=False, dies=False, hides=False):
        self.logs, self.bos, self.dies, self.hides = {5: -0.70, 6: -0.72 + shift}, bos, dies, hides

    @classmethod
    def open(cls, model, shift=0.0, bos=False, dies=False, hides=False):
        if dies == "politely":
            raise UserError("toy_words: no room for it.")
        return cls(shift, bos, dies, hides)

    def prompt_ids(self, conversation, tools=None):
        if self.hides:
            raise self._cannot("tell the tokens of a prompt")
        return [*([1] if self.bos else []), *(ord(letter) for letter in conversation[-1]["content"])]

    def score(self, prompts, answers):
        if self.hides:
            raise self._cannot("score a given answer")
        return [np.array([self.logs.get(token, -0.1) for token in answer]) for answer in answers]

    def generate(self, conversations, sampling=None, images=None, progress=False, tools=None, adapter=None):
        if self.dies:
            os._exit(7)
        first = max(self.logs, key=self.logs.get)
        told = {} if self.hides else {"token_ids": (first, 2), "log_probabilities": (self.logs[first], -0.1)}
        return [Completion(str(first), 2, "stop", 0.01, 0.005, **told) for _ in conversations]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "5" if i % 3 else "6"}]}
            for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(tmp_path, chats, engines, *more):
    return compose("benchmark", "model.path=toy", "dataset=llm/files", f"dataset.path={chats}", f"engines={engines}",
                   "benchmark=quick", f"output.path={tmp_path / 'out'}", *more)


ASK = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "bc"}]]


def compared(engine, reference=None):
    reference = reference or ToyWords()
    base = listen(reference, ASK)
    said = listen(engine, ASK, reference=base)
    parted = partings(base.answers, said.answers) if said.answers else []
    return agree(base, said, parted, margins(reference, base, parted), engine.log_probability_limit)


def test_a_near_tie_is_no_disagreement_and_a_far_one_is():
    tie, far = compared(ToyWords(0.04)), compared(ToyWords(0.5))
    assert (tie.near_ties, tie.disagreements, tie.answers_equal) == (2, 0, 0) and tie.largest_margin == pytest.approx(0.02)
    assert tie.token_agreement == 0.0 and tie.log_probability_error == 0.0, "the reference's tokens are scored alike"
    torn = ToyWords()
    torn.logs = {5: -0.2, 6: -1.7}
    real = compared(ToyWords(0.5), torn)
    assert (real.near_ties, real.disagreements) == (0, 2) and real.largest_margin == pytest.approx(1.5)
    assert real.log_probability_error == pytest.approx(0.5)
    assert far.disagreements == 0, "the reference itself was torn, however sure the other is"


def test_what_an_engine_hides_is_not_called_equal():
    found = compared(ToyWords(hides=True))
    assert found.prompts_equal is None and found.answers_equal is None and found.log_probability_error is None
    assert found.texts_equal == 2


def test_infinite_log_probabilities_survive_json_as_an_infinite_error():
    base = Said(["a"], [[1]], [[2]], [[-0.1]], [[-0.1]])
    assert agree(base, Said(["a"], [[1]], [[2]], None, [[None]]), [], [], 1e-3).log_probability_error == float("inf")


def test_levels_run_in_turns_and_count_tokens():
    class Slow(ToyWords):
        sizes = []

        def generate(self, conversations, *args, **kwargs):
            self.sizes.append(len(conversations))
            return super().generate(conversations)

    levels = measure_levels(Slow(), ASK, levels=(1, 3), repeats=2, warmup=1)
    assert Slow.sizes == [1, 3] * 3 and [level.calls for level in levels] == [2, 2]
    assert levels[1].first_token_ms["p50"] == 5.0 and levels[1].latency_ms["p99"] == 10.0
    assert levels[0].tokens_per_s == pytest.approx(2 * levels[0].rows_per_s)
    with pytest.raises(UserError, match="at least 1"):
        measure_levels(Slow(), ASK, levels=(0,))


def test_every_engine_that_cannot_run_is_named_before_anything_runs(tmp_path, chats):
    @register("engine", "toy_lacks", replace=True)
    class Lacks(ToyWords):
        @classmethod
        def missing(cls):
            return "toy_lacks needs a package. pip install it"

    cfg = configured(tmp_path, chats, "[toy_words,toy_lacks,toy_wordz,toy_words]")
    with pytest.raises(UserError) as error:
        engines_of(cfg)
    text = str(error.value)
    assert "pip install it" in text and "Did you mean 'toy_words'" in text and "twice" in text
    assert not (tmp_path / "out").exists()


def test_engines_run_apart_and_one_that_dies_leaves_the_others(tmp_path, chats):
    engines = ("[toy_words,{name: toy_words, label: torn, shift: 0.04},{name: toy_words, label: bos, bos: true},"
               "{name: toy_words, label: dead, dies: true}]")
    run = benchmark(configured(tmp_path, chats, engines))
    records = {record["label"]: record for record in run.results["engines"]}
    assert records["toy_words"]["reference"] and "agreement" not in records["toy_words"]
    torn = records["torn"]["agreement"]
    assert torn["near_ties"] == torn["rows"] == 4 and torn["disagreements"] == 0 and torn["largest_margin"] == pytest.approx(0.02)
    assert records["bos"]["agreement"]["prompts_equal"] == 0 and "token 1" in records["bos"]["agreement"]["template_difference"]
    assert "exit code 7" in records["dead"]["problems"][0]
    assert any("dead" in warning for warning in run.results["warnings"])
    assert [check.name for check in run.checks.failed] == ["bos: same prompt tokens"]
    speed = records["torn"]["speed"]
    assert [level["concurrency"] for level in speed["levels"]] == [1, 4] and (speed["repeats"], speed["warmup"]) == (2, 1)
    assert records["torn"]["peak_memory_mb"]["host"] > 50 and records["torn"]["load_seconds"] >= 0
    page = (run.dir / "report.html").read_text()
    assert "Engines side by side" in page and "exit code 7" in page and "Time to the first token" in page
    text = Run.load(run.dir).summary()
    assert "tokens/s @4" in text and "toy_words (reference)" in text
    rows = [json.loads(line) for line in (run.dir / "per_row.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (run.dir / "engines" / "torn" / "per_row.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [row["id"] for row in others] and {row["answer"] for row in rows} == {"5"}
    assert not list(run.dir.rglob("*.job")), "job files are gone"


def test_a_reference_that_cannot_run_is_an_error(tmp_path, chats):
    with pytest.raises(UserError, match="reference engine toy_words cannot run it.*no room"):
        benchmark(configured(tmp_path, chats, "[{name: toy_words, dies: politely}]"))


def test_classes_agree_up_to_their_arithmetic():
    from supertrainer.benchmark.agreement import agree_on_classes, class_checks

    def row(a):
        return vars(Classification("x" if a > 0.5 else "y", {"x": a, "y": 1 - a}, 0.0))

    good = agree_on_classes([row(0.7), row(0.500001)], [row(0.70001), row(0.499999)])
    assert (good.labels_equal, good.near_ties, good.disagreements) == (1, 1, 0) and all(c.passed for c in class_checks("x", good))
    bad = agree_on_classes([row(0.7)], [row(0.4)])
    assert bad.disagreements == 1 and bad.probability_error == pytest.approx(0.3)


def test_tasks_of_lm_eval_and_engines_side_by_side_are_refused_together():
    with pytest.raises(UserError, match="one engine at a time"):
        benchmark(compose("benchmark", "model.path=x", "engines=[hf]", "benchmark.tasks=[a]"))
