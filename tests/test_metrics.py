"""Scores against plain recomputation that shares no code with the package."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supertrainer.metrics import classification as c
from supertrainer.metrics import generation as g
from supertrainer.runtime import UserError

LABELS = ["a", "b", "c", "d"]
labelled = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
words = st.lists(st.sampled_from("red green blue fish".split()), max_size=7)


def f1_by_hand(pairs, label):
    hits = sum(t == p == label for t, p in pairs)
    predicted, actual = sum(p == label for _, p in pairs), sum(t == label for t, _ in pairs)
    return 2 * hits / (predicted + actual) if predicted + actual else None


@given(labelled, st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_classification_report_is_the_textbook(pairs, train):
    truth, predicted = zip(*pairs, strict=True)
    report = c.classification_report(truth, predicted, LABELS, train_labels=train)
    assert report.accuracy == pytest.approx(sum(t == p for t, p in pairs) / len(pairs))
    by_hand = [f1_by_hand(pairs, label) for label in range(4)]
    occurring = [f1 for f1 in by_hand if f1 is not None]
    assert report.macro_f1 == pytest.approx(sum(occurring) / len(occurring))
    assert [score.f1 for score in report.per_class] == pytest.approx([f1 or 0.0 for f1 in by_hand])
    assert [score.support for score in report.per_class] == [truth.count(label) for label in range(4)]
    assert report.confusion == tuple(tuple(pairs.count((t, p)) for p in range(4)) for t in range(4))
    top = max(range(4), key=lambda label: (train.count(label), -label))
    assert report.majority.label == LABELS[top]
    assert report.majority_baseline == pytest.approx(truth.count(top) / len(truth))


def test_log_loss_in_float64():
    rng = np.random.default_rng(0)
    p = rng.random((50, 4)) + 0.01
    p /= p.sum(1, keepdims=True)
    truth = rng.integers(0, 4, 50)
    by_hand = -sum(math.log(row[t]) for row, t in zip(p, truth, strict=True)) / 50
    assert c.log_loss(truth, p) == pytest.approx(by_hand, rel=1e-12)
    assert c.log_loss(truth, p.astype(np.float32)) == pytest.approx(by_hand, rel=1e-6)
    with pytest.raises(UserError, match="expected \\[rows, labels\\]"):
        c.log_loss(truth[:3], p)


def test_results_have_the_reports_form():
    found = c.classification_report([0, 1, 1], [0, 1, 0], ["x", "y"], [1], [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    plain = found.to_dict()
    assert set(plain) == {"scores", "averages", "per_class", "confusion"}
    assert set(plain["scores"]) == {"accuracy", "macro_f1", "weighted_f1", "log_loss", "accuracy_baseline", "macro_f1_baseline"}
    assert set(plain["per_class"][0]) == {"label", "precision", "recall", "f1", "support"}
    assert plain["confusion"] == {"labels": ["x", "y"], "matrix": [[1, 0], [1, 1]]}


@pytest.mark.parametrize("truth, predicted, words", [
    ([], [], "at least one"), ([0, 1], [0], "as many"), ([0, 5], [0, 0], "row 2 has label 5"),
    ([0, -1], [0, 0], "row 2 has label -1"), ([0.5], [0], "must be integers"), ([[0]], [0], "flat list"),
])  # fmt: skip
def test_impossible_labels_are_refused(truth, predicted, words):
    with pytest.raises(UserError, match=words):
        c.classification_report(truth, predicted, LABELS)


@given(words, words)
def test_longest_common_subsequence_by_trying_all(a, b):
    subsequences = {s for n in range(len(a) + 1) for s in itertools.combinations(a, n)}
    best = max(len(s) for s in subsequences if s in set(itertools.combinations(b, len(s))))
    assert g.longest_common_subsequence(a, b) == best
    assert g.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(2 * best / (len(a) + len(b)) if a or b else 1.0)


@given(words, words)
def test_token_f1_by_counting(a, b):
    left = list(b)
    shared = sum(1 for word in a if word in left and (left.remove(word) or True))
    expected = 2 * shared / (len(a) + len(b)) if a and b else float(a == b)
    assert g.token_f1(" ".join(a), " ".join(b)) == pytest.approx(expected)


@pytest.mark.parametrize("prediction, reference, expected", [
    ("Paris", "paris.", 1), ("The capital is Paris", "Paris", 0), ("", "", 1), ("", "x", 0), ("a-b", "ab", 1),
    ("the", "a", 0), ("3.14", "314", 1), ("two  words", "two words", 1),
])  # fmt: skip
def test_exact_match(prediction, reference, expected):
    assert g.exact_match(prediction, reference) == expected


@given(st.lists(st.integers(0, 8), max_size=30), st.lists(st.integers(0, 8), min_size=1, max_size=30))
def test_unigram_loss_by_counting(train, held_out):
    counts = Counter(train)
    by_hand = -sum(math.log((counts[token] + 1) / (len(train) + 9)) for token in held_out) / len(held_out)
    assert g.unigram_loss(train, held_out, 9) == pytest.approx(by_hand, rel=1e-12)


def test_loss_tokens_are_those_a_causal_model_is_judged_by():
    import torch
    import torch.nn.functional as F

    labels = torch.tensor([[4, -100, 2, 3], [-100, 1, -100, -100]])
    logits = torch.zeros(2, 4, 5)  # uniform: the loss of each judged token is log 5
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, 5), labels[:, 1:].reshape(-1), reduction="sum")
    tokens = g.loss_tokens(labels.tolist())
    assert tokens.tolist() == [2, 3, 1] and len(tokens) * math.log(5) == pytest.approx(loss.item(), rel=1e-6)
    with pytest.raises(UserError, match="No held-out token"):
        g.unigram_loss([1], [], 5)


def test_generation_report():
    found = g.generation_report(["1", "2", "x"], ["1", "1", "3"], ["1", "3", "3"])
    assert (found.exact_match, found.exact_match_baseline, found.majority_answer) == (1 / 3, 1 / 3, "3")
    with pytest.raises(UserError, match="as many"):
        g.generation_report(["1"], [])
