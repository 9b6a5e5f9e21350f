"""Gradient checkpointing with activations in the CPU's memory: equal gradients, dropout, adapters, switches."""

import copy
import pickle

import pytest
import torch

from supertrainer.models import offload
from supertrainer.models.base import FastModel, info
from supertrainer.models.offload import is_checkpointing, is_offloading, offloaded_checkpoint, switch_checkpointing
from supertrainer.runtime import UserError

TEXTS = ["What does `textwrap.dedent` do?", "Remove any common leading whitespace from every line in text."]
HERE = {"least": 0, "kinds": ("cpu",)}


def gradients(model, ids, labels):
    torch.manual_seed(5)
    model.train().zero_grad()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert", "tiny_idefics3"])
def test_gradients_are_equal_with_dropout(name, adapter, monkeypatch):
    model, processor = FastModel.from_pretrained(name, texts=TEXTS)
    ids = torch.randint(5, 40, (2, 12))
    labels = torch.tensor([0, 1]) if name == "tiny_bert" else ids
    if adapter:
        model = FastModel.get_peft_model(model, r=2, lora_dropout=0.2)
        with torch.no_grad():
            for part, weight in model.named_parameters():
                if "lora_B" in part:
                    weight.normal_()
    switch_checkpointing(model, False)
    wanted = gradients(model, ids, labels)
    moved = []
    send = offload.send_away
    monkeypatch.setattr(offload, "send_away", lambda tensor, **options: moved.append(send(tensor, **options)) or moved[-1])
    decision = switch_checkpointing(model, "offload", **HERE)
    found = gradients(model, ids, labels)
    assert decision.value == "offload" and is_offloading(model) and is_checkpointing(model)
    assert sum(isinstance(kept, offload._Away) for kept in moved) >= 2  # at least a layer's input each
    assert len(wanted) == len(found) and all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    switch_checkpointing(model, False)
    assert not is_checkpointing(model)


def test_what_is_kept_is_a_copy_elsewhere():
    layer = torch.nn.Linear(4, 4)
    start = torch.randn(3, 4, requires_grad=True)
    out = offloaded_checkpoint(lambda x: layer(x).tanh(), start * 1.0, **HERE)
    out.sum().backward()
    wanted = torch.autograd.grad(layer(start).tanh().sum(), start)[0]
    assert torch.equal(start.grad, wanted)


def test_copies_offload_too():
    model, _ = FastModel.from_pretrained("tiny_llama", texts=TEXTS)
    switch_checkpointing(model, "unsloth", **HERE)
    ids = torch.randint(5, 150, (1, 9))
    wanted = gradients(model, ids, ids)
    twin = copy.deepcopy(model)
    assert is_offloading(twin)
    assert all(torch.equal(a, b) for a, b in zip(wanted, gradients(twin, ids, ids), strict=True))
    kept = pickle.dumps(model.model.layers[0]._gradient_checkpointing_func)
    assert pickle.loads(kept).func is offloaded_checkpoint


@pytest.mark.parametrize("name", ["offload", "unsloth"])
def test_on_a_cpu_it_is_plain_checkpointing_and_says_so(name):
    model, tokenizer = FastModel.from_pretrained("tiny_llama", texts=TEXTS)
    adapted = FastModel.get_peft_model(model, r=2, use_gradient_checkpointing=name)
    assert is_checkpointing(adapted) and not is_offloading(adapted)
    said = info(adapted).decision("gradient checkpointing")
    assert said.value == "on" and "already" in said.reason and name in said.reason
    FastModel.for_inference(adapted, tokenizer)
    assert not is_checkpointing(adapted)
    FastModel.for_training(adapted, tokenizer, use_gradient_checkpointing=name)
    assert is_checkpointing(adapted)
    with pytest.raises(UserError, match="'unsloth'"):
        FastModel.for_training(adapted, use_gradient_checkpointing="unslot")
