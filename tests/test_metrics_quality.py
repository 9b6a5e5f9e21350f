"""Calibration, averages, overlap, regression, uncertainty and metrics by name, against other libraries and by brute force."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from supertrainer.benchmark import quality
from supertrainer.benchmark.rows import FILE, compare_rows, read_rows, write_rows
from supertrainer.config import StrictDict
from supertrainer.metrics import answers, calibration, generation, named, overlap, regression, uncertainty, vqa
from supertrainer.metrics import classification as c
from supertrainer.registry import register
from supertrainer.run.folder import Run, finish, write_config
from supertrainer.runtime import UserError

guesses = st.lists(st.tuples(st.integers(0, 3), st.none() | st.integers(0, 3)), min_size=1, max_size=30)


@given(guesses)
def test_averages_with_unknown_answers_are_scikit_learns(pairs):
    truth, said = zip(*pairs, strict=True)
    found = c.classification_report(truth, said, list("abcd"))
    plain = [-1 if one is None else one for one in said]
    occurring = sorted((set(truth) | set(plain)) - {-1})
    for how in ("micro", "macro", "weighted"):
        p, r, f, _ = sk.precision_recall_fscore_support(truth, plain, labels=occurring, average=how, zero_division=0)
        own = found.averages[how]
        assert (own.precision, own.recall, own.f1) == pytest.approx((p, r, f))
    assert found.accuracy == pytest.approx(sum(t == s for t, s in pairs) / len(pairs))
    assert (found.unknown_rate or 0) == pytest.approx(said.count(None) / len(said))
    assert sum(map(sum, found.confusion)) == len(pairs), "every row is in the table"


def test_calibration_is_torchmetrics_and_scikit_learns():
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("torchmetrics.functional.classification")
    rng = np.random.default_rng(0)
    for rows, labels in ((7, 2), (300, 4)):
        p = rng.dirichlet(np.ones(labels), rows)
        truth = rng.integers(0, labels, rows)
        found = calibration.calibration(truth, p)
        for norm, own in (("l1", found.ece), ("max", found.max_error)):
            other = functional.multiclass_calibration_error(torch.tensor(p), torch.tensor(truth), labels, n_bins=15, norm=norm)
            assert own == pytest.approx(float(other), abs=1e-6)
        assert sum(one.rows for one in found.bins) == rows
        if labels == 2:
            assert found.brier == pytest.approx(2 * sk.brier_score_loss(truth, p[:, 1]))


def test_mcnemar_by_counting_all_coins():
    rng = np.random.default_rng(1)
    for rows in (1, 5, 9):
        a, b = rng.integers(0, 2, (2, rows))
        only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
        n = only_a + only_b
        as_bad = [coins for coins in itertools.product((0, 1), repeat=n) if abs(sum(coins) - n / 2) >= abs(only_a - n / 2) - 1e-9]
        found = uncertainty.compare_correct(a, b)
        assert found.p_value == pytest.approx(len(as_bad) / 2**n) and (found.first_only, found.second_only) == (only_a, only_b)


def test_permutation_by_trying_all_swaps():
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 8))
    differences = b - a
    means = [abs(np.mean(differences * np.array(signs))) for signs in itertools.product((1, -1), repeat=8)]
    by_hand = np.mean([mean >= abs(differences.mean()) - 1e-12 for mean in means])
    found = uncertainty.compare_scores(a, b)
    assert found.p_value == pytest.approx(by_hand) and found.difference == pytest.approx(differences.mean())
    assert uncertainty.compare_scores(b, a).p_value == pytest.approx(found.p_value), "the order of the two does not matter"


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(100):
        found = uncertainty.mean_interval(rng.random(80) < 0.3, resamples=300, seed=seed)
        covered += found.low <= 0.3 <= found.high
    assert 85 <= covered <= 100


def test_many_rows_need_little_time_and_memory():
    rng = np.random.default_rng(4)
    a, b = rng.random((2, 20_000))
    found = uncertainty.compare_scores(a, b + 0.02)
    assert found.p_value < 1e-3 and found.low < 0.02 < found.high


@given(st.lists(st.sampled_from("red green blue fish".split()), min_size=1, max_size=7),
       st.lists(st.sampled_from("red green blue fish".split()), min_size=1, max_size=7))
@settings(max_examples=50)
def test_own_rouge_l_is_rouge_scores(a, b):
    pytest.importorskip("rouge_score")
    a, b = " ".join(a), " ".join(b)
    assert overlap.rouge([a], [[b]])["rougeL"][0] == pytest.approx(generation.rouge_l(a, b))


def test_bleu_and_chrf_are_corpus_figures():
    sacrebleu = pytest.importorskip("sacrebleu")
    said = ["the cat sat on the mat today", "a dog barks loudly at night"]
    true = ["the cat sat on the mat", "the dog barks loudly at night"]
    bleu, chrf = overlap.bleu(said, [[one] for one in true]), overlap.chrf(said, [[one] for one in true])
    assert bleu.corpus == pytest.approx(sacrebleu.corpus_bleu(said, [true]).score)
    assert chrf.corpus == pytest.approx(sacrebleu.corpus_chrf(said, [true]).score)
    assert bleu.corpus != pytest.approx(np.mean(bleu.sentences)) and "tok:13a" in bleu.signature
    ragged = overlap.bleu(said, [true[:1], [true[1], said[1]]])
    assert ragged.corpus > bleu.corpus, "a second right answer helps its own row"


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=3, max_size=20))
def test_regression_by_hand(pairs):
    truth, said = map(np.array, zip(*pairs, strict=True))
    found = regression.regression_report(truth, said, [1.0, 3.0])
    assert found.mae == pytest.approx(np.abs(truth - said).mean())
    assert found.rmse == pytest.approx(math.sqrt(((truth - said) ** 2).mean()))
    assert found.mae_baseline == pytest.approx(np.abs(truth - 2).mean())
    if found.pearson is not None and truth.std() > 1e-3 and said.std() > 1e-3:
        assert found.pearson == pytest.approx(np.corrcoef(truth, said)[0, 1], abs=1e-6)


def test_vqa_by_leaving_each_person_out():
    people = ["yes"] * 2 + ["no"] * 7 + ["maybe"]
    for said in ("yes", "no", "maybe", "other"):
        by_hand = np.mean([min(1, sum(one == said for j, one in enumerate(people) if j != i) / 3) for i in range(10)])
        assert vqa.vqa_accuracy(said.upper() + ".", people) == pytest.approx(by_hand)


@pytest.mark.parametrize("answer, expected", [
    ("positive", "positive"), ("Positive.", "positive"), ("**Positive**", "positive"), ("Label: positive", "positive"),
    ("The answer is positive", "positive"), ("I think it is negative because", "negative"), ("not positive", None),
    ("it isn't positive", None), ("positive or negative", None), ("very positive indeed", "very positive"),
    ("", None), ("positively", None), ("neutral", None),
])  # fmt: skip
def test_answers_are_read_with_care(answer, expected):
    assert answers.label_of(answer, ["positive", "negative", "very positive"]) == expected


def chats(pairs):
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]


def test_metrics_of_ones_own_on_any_run():
    @register("metric", "test_shouts", replace=True)
    def shouts(predictions, references):
        return {"shouts": [float(text.isupper()) for text in predictions], "longest": max(map(len, predictions))}

    rows = chats([("a?", "A"), ("b?", "b")])
    found = quality.evaluate_generation(["A", "bb"], rows, metrics=["test_shouts", "bleu", "vqa"])
    assert found["scores"]["shouts"] == 0.5 and found["scores"]["longest"] == 2 and found["scores"]["vqa_accuracy"] == 0.5
    assert found["per_row"][0]["metrics"]["shouts"] == 1.0 and "shouts" in found["intervals"]

    class Encoder:
        def classify(self, texts):
            return [SimpleNamespace(label="X", probabilities={"X": 0.6, "Y": 0.4}, seconds=0.0) for _ in texts]

    encoder = quality.evaluate_classifier(Encoder(), ["p", "q"], [0, 1], ["X", "Y"], metrics=["test_shouts"])
    assert encoder["scores"]["shouts"] == 1.0 and encoder["scores"]["accuracy"] == 0.5
    with pytest.raises(UserError, match="Did you mean 'test_shouts'"):
        named.check_names(["test_shout"])


def test_rows_of_two_runs_are_compared_by_content_not_by_place(tmp_path):
    pairs = [(f"q{i}", f"answer {i}") for i in range(12)]
    first = quality.evaluate_generation([a if i < 6 else "?" for i, (_, a) in enumerate(pairs)], chats(pairs))
    again = pairs[::-1][:-1] + [("new", "row")]
    second = quality.evaluate_generation([a for _, a in again], chats(again))
    for name, result in (("one", first), ("two", second)):
        config = StrictDict({"experiment": "demo", "mode": "benchmark", "seed": 1, "family": "llm"})
        write_config(tmp_path / name, config)
        run = finish(Run(tmp_path / name, config, {"experiment": "demo", "mode": "benchmark", **result}))
        assert "per_row" not in run.results and "per_row" not in json.loads((run.dir / "results.json").read_text())
    kept = read_rows(tmp_path / "one")
    assert len(kept) == 12 and set(kept[0]) >= {"id", "expected", "answer", "correct", "score", "score_name"}
    found = compare_rows(kept, read_rows(tmp_path / "two"))
    assert found["accuracy"].rows == 11 and found["accuracy"].second_only == 6 and found["accuracy"].first_only == 0
    assert found["accuracy"].p_value == pytest.approx(2 / 2**6) and found["token_f1"].rows == 11
    write_rows(tmp_path / "bad" / FILE, kept[:1])
    with (tmp_path / "bad" / FILE).open("a") as file:
        file.write("{oops\n")
    with pytest.raises(UserError, match="line 2: no JSON"):
        read_rows(tmp_path / "bad")


def test_loss_through_an_engine_is_the_loss_of_the_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from supertrainer.inference.scoring import score_rows

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                         vocab_size=40)).eval()  # fmt: skip
    ids = torch.randint(1, 40, (5, 9)).tolist()
    rows = [{"input_ids": row, "labels": [-100] * 2 + row[2:5] + [-100] * 2 + row[7:]} for row in ids]

    class Scorer:
        @torch.no_grad()
        def score(self, prompts, expected):
            return score_rows(model, prompts, expected, 0, 2)

    found, plain = quality.evaluate_score_loss(Scorer(), rows), quality.evaluate_chat_loss(model, rows, 0)
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5) and found["tokens"] == plain["tokens"] == 25
    each = sum(row["score"] * row["tokens"] for row in found["per_row"]) / 25
    assert each == pytest.approx(found["loss"]) and found["interval"]["low"] < found["loss"] < found["interval"]["high"]
