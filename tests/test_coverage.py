"""The same step with patches as without, on a dozen unlike architectures, by the function that makes the coverage table."""

import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from supertrainer.patching import patches

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import coverage as table  # noqa: E402
from benchmarks import tiny_configs  # noqa: E402

SAMPLE = [("llama", "causal"), ("gemma2", "causal"), ("gemma3_text", "causal"), ("qwen3_moe", "causal"), ("gpt2", "causal"),
          ("phi3", "causal"), ("mamba", "causal"), ("granite", "causal"), ("cohere2", "causal"), ("bart", "causal"),
          ("idefics3", "vision"), ("qwen2_vl", "vision"), ("llava", "vision"), ("bert", "masked"), ("modernbert", "masked"),
          ("deberta-v2", "classifier"), ("t5", "classifier")]


def class_of(name: str, kind: str) -> str:
    return next(model for other, sort, model in table.architectures() if (other, sort) == (name, kind))


def examine(name: str, kind: str, **options) -> "table.Outcome":
    return table.examine(name, kind, class_of(name, kind), **options)


@pytest.mark.parametrize(("name", "kind"), SAMPLE, ids=lambda value: value)
def test_the_patched_step_equals_the_plain_one(name, kind):
    outcome = examine(name, kind)
    assert outcome.state == "equal", outcome
    assert outcome.restored is True
    assert outcome.loss_error <= table.LOSS_LIMIT and outcome.gradient_error <= table.GRADIENT_LIMIT, outcome
    if kind == "vision":
        assert outcome.batch == "text and pictures", outcome.blind


def double(module: nn.Module, *args, **kwargs):
    return type(module).forward(module, *args, **kwargs) * 1.001


class Shifted(torch.autograd.Function):
    """The identity, with one wrong gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def shift(module: nn.Module, *args, **kwargs):
    return Shifted.apply(type(module).forward(module, *args, **kwargs))


def swapping(function, forget: bool = False):
    """Return what patches a model's last norm with `function`, and keeps it to itself if it shall not be restored."""
    def patch(model, kind, batch):
        module = [part for part in model.modules() if "norm" in type(part).__name__.lower()][-1]
        patches(model).swap(module, function)
        if forget:
            patches(model).swapped.clear()
    return patch


def test_a_wrong_value_is_found():
    outcome = examine("llama", "causal", patch_with=swapping(double))
    assert outcome.state == "differs" and "loss" in outcome.note and outcome.restored is True


def test_a_wrong_gradient_under_the_right_loss_is_found():
    outcome = examine("bert", "classifier", patch_with=swapping(shift))
    assert outcome.state == "differs" and outcome.loss_error == 0.0
    assert outcome.gradient_error == pytest.approx(1e-3, rel=0.2)


def test_a_patch_that_cannot_be_taken_back_is_found():
    outcome = examine("llama", "causal", patch_with=swapping(double, forget=True))
    assert outcome.state == "differs" and outcome.restored is False and "restore()" in outcome.note


def test_a_patch_that_fails_is_said():
    def patch(model, kind, batch):
        raise RuntimeError("no kernel here")

    outcome = examine("llama", "causal", patch_with=patch)
    assert outcome.state == "patched step fails" and "no kernel here" in outcome.note


def test_a_model_above_the_limit_is_not_built(monkeypatch):
    monkeypatch.setitem(table.LIMITS, "parameters", 1000)
    outcome = examine("llama", "causal")
    assert outcome.state == "not built" and "M parameters" in outcome.note


def test_gradients_that_are_missing_or_not_numbers_are_errors():
    one = {"a": torch.ones(3)}
    assert table.gradient_errors(one, one) == {"a": 0.0}
    assert table.gradient_errors({}, one) == {"a": math.inf}
    errors = table.gradient_errors({"a": torch.full((3,), math.nan)}, one)
    assert not errors["a"] <= table.GRADIENT_LIMIT


def test_every_architecture_counts_once_and_shrinks_where_its_parts_are_installed():
    found = table.architectures()
    assert len(found) == len({(name, model) for name, _, model in found}) > 400
    config = tiny_configs.tiny_config("gemma3", transformers.Gemma3ForConditionalGeneration)
    text = config.text_config
    assert set(text.layer_types) == {"sliding_attention", "full_attention"} and text.num_hidden_layers == 2
    assert text.pad_token_id < text.vocab_size and config.image_token_id < text.vocab_size
    assert text.hidden_size == tiny_configs.HIDDEN and config.vision_config.patch_size == tiny_configs.PATCH


def test_a_worker_outlives_a_crash_and_the_report_says_so(monkeypatch):
    worker = table.Worker()
    try:
        monkeypatch.setitem(table.LIMITS, "wall seconds", 0.01)
        slow = worker.examine(("llama", "causal", "LlamaForCausalLM"))
        assert slow["state"] == "crashed" and "no answer" in slow["note"]
        monkeypatch.setitem(table.LIMITS, "wall seconds", 300.0)
        again = worker.examine(("llama", "causal", "LlamaForCausalLM"))
        assert again["state"] == "equal", again["note"]
    finally:
        worker.close()
    report = table.report([slow, {**again, "name": "other"}])
    assert "| causal language models | 2 | 1 | 1 | 1 | 100.0% | 0 |" in report
    assert "crashed" in report and "no answer" in report
