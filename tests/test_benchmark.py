"""Quality and speed on real tiny models and on stand-ins with known answers."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from supertrainer.benchmark import quality, speed
from supertrainer.benchmark.table import display_width, format_table, write_json
from supertrainer.runtime import UserError

TINY = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)


class Answers:
    """An engine that gives prepared answers in order and remembers what it was asked."""

    def __init__(self, texts=(), labels=()):
        self.texts, self.labels, self.asked = list(texts), list(labels), []

    def generate(self, conversations, sampling=None, images=None, progress=False):
        self.asked += [(conversation, image) for conversation, image in zip(conversations, images or [None] * 99, strict=False)]
        return [SimpleNamespace(text=self.texts.pop(0), tokens=2, finish_reason="stop", seconds=0.0) for _ in conversations]

    def classify(self, texts, progress=False):
        named = [self.labels.pop(0) for _ in texts]
        return [SimpleNamespace(label=label, probabilities={"x": 0.7, "y": 0.3} if label == "x" else {"x": 0.1, "y": 0.9}, seconds=0)
                for label in named]  # fmt: skip


def chat_rows(n=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        ids = torch.randint(1, 40, (4 + 3 * i,), generator=generator).tolist()
        masked = 1 + i % 4
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:], "length": len(ids)})
    return rows


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_held_out_loss_weighs_tokens_not_batches(batch_size):
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).double().train()
    rows = chat_rows()
    total, tokens, means = 0.0, 0, []
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            losses = F.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none")
            kept = [i for i, label in enumerate(row["labels"][1:]) if label != -100]
            total, tokens = total + losses[kept].sum().item(), tokens + len(kept)
            means.append(losses[kept].mean().item())
    found = quality.evaluate_chat_loss(model, rows, pad_token_id=0, batch_size=batch_size)
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-6) and found["tokens"] == tokens
    assert abs(found["loss"] - sum(means) / len(means)) > 1e-4, "the mean of row means is another number"
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"])) and model.training


def test_classifier_on_known_answers():
    engine = Answers(labels=["x", "y", "y", "x"])
    found = quality.evaluate_classifier(engine, list("abcd"), [0, 1, 0, 0], ["x", "y"], [0, 0, 1], samples=2)
    assert found["metric"] == {"name": "accuracy", "value": 0.75, "baseline": 0.75, "baseline_name": "always 'x'"}
    assert found["warnings"], "not above the majority baseline"
    wrong, right = found["samples"]
    assert (wrong["input"], wrong["expected"], wrong["after"], wrong["correct"]) == ("c", "x", "y", False) and right["correct"]


def test_before_and_after_stay_together():
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(3)]
    before = quality.answer_samples(Answers(["?"] * 3), rows, None, when="before", split="train")
    engine = Answers(["a0", "a1 ", "no"])
    after = quality.answer_samples(engine, rows, None, split="train")
    assert [conversation for conversation, _ in engine.asked] == [row["messages"][:1] for row in rows], "no answer is shown to the model"
    paired = quality.pair_samples(before, after)
    assert paired[1] == {"input": "q1", "expected": "a1", "before": "?", "after": "a1", "split": "train"}
    with pytest.raises(UserError, match="same questions"):
        quality.pair_samples(before[::-1], after)
    assert quality.answer_samples(Answers(), [], None) == []
    with pytest.raises(UserError, match="without an assistant"):
        quality.answer_samples(Answers(), [{"messages": rows[0]["messages"][:1]}], None)


def test_vision_pairs_images_with_questions(tmp_path):
    images = [Image.new("RGB", (4, 4), (i, i, i)) for i in range(4)]
    truth = ["0", "1", "1", "0"]
    rows = [{"picture": image, "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]}]} for image, answer in zip(images, truth, strict=True)]  # fmt: skip
    engine = Answers(["0", "1", "nine", "1"])
    found = quality.evaluate_vision(engine, rows, "picture", None, train_answers=["0"], samples=3, image_dir=tmp_path / "images")
    assert [image for _, image in engine.asked] == images
    assert found["metric"]["value"] == 0.5 and found["metric"]["baseline"] == 0.5
    assert found["confusion"] == {"labels": ["0", "1", "(other)"], "matrix": [[1, 1, 0], [0, 1, 1], [0, 0, 0]]}
    assert [sample["correct"] for sample in found["samples"]] == [False, False, True]
    assert Image.open(tmp_path / found["samples"][0]["image"]).getpixel((0, 0)) == (2, 2, 2)


def test_speed_counts_what_was_done():
    found = speed.measure(Answers(["x"] * 99), [[{"role": "user", "content": "q"}]] * 5, batch_sizes=(2, 4, 9), single=2, warmup=0)
    assert [batch.batch_size for batch in found.batches] == [2, 4, 5] and found.requests == 5
    last = found.batches[-1]
    assert last.rows_per_s == pytest.approx(5 / last.seconds) and last.tokens_per_s == pytest.approx(10 / last.seconds)
    assert found.latency_ms_p50 <= found.latency_ms_p95 and found.to_dict()["tokens_per_s"] == found.tokens_per_s
    with pytest.raises(UserError, match="at least 1"):
        speed.measure(Answers(), ["q"], batch_sizes=(0,))


def test_table_lines_up_whatever_is_in_it(tmp_path):
    rows = [{"name": "short", "value": 1}, {"name": "数字识别 é", "value": 12345.678, "note": "a\nb"}, {"value": None, "note": "x" * 200}]
    lines = format_table(rows).splitlines()
    rule = lines[1]
    assert len(lines) == 5 and all(display_width(line) <= len(rule) for line in lines)
    ends = len(rule.split("  ")[0]) + 2 + len(rule.split("  ")[1])
    assert lines[3][: ends - (display_width("数字识别") - 4)].endswith("12,346") and "a b" in lines[3]
    write_json(tmp_path / "r.json", {"x": [float("nan"), torch.tensor(2)]})
    assert (tmp_path / "r.json").read_text().split() == ["{", '"x":', "[", "null,", "2", "]", "}"]
