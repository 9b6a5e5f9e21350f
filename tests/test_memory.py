"""What training takes: counted on shapes alone, against what PyTorch keeps and what a process takes."""

import subprocess
import sys

import peft
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from supertrainer.models.base import FastModel
from supertrainer.models.info import ModelInfo, attach
from supertrainer.models.memory import estimate_training, kept_bytes

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400}
TEXTS = ["What does `textwrap.dedent` do?", "Remove any common leading whitespace."]


def build(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SHAPE))
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager" if kind == "eager" else "sdpa"))
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")) if kind == "lora" else model


def really_kept(model, rows, length):
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.train()(input_ids=torch.zeros(rows, length, dtype=torch.long), **({} if "Bert" in str(type(model)) else {"use_cache": False}))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", ["full", "lora", "bert", "eager"])
def test_what_is_counted_is_what_is_kept(kind):
    model = build(kind)
    counted = kept_bytes(model, 2, 24)
    assert counted == pytest.approx(really_kept(model, 2, 24), rel=0.03)


@pytest.mark.parametrize("quantization", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_asking_changes_nothing_in_the_model(quantization):
    model, tokenizer = FastModel.from_pretrained("tiny_llama", texts=TEXTS, quantization=quantization)
    adapted = FastModel.get_peft_model(model, r=2, use_gradient_checkpointing="offload")
    batch = tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        wanted = adapted.eval()(**batch).logits
    slots = {name: id(value) for name, value in [*adapted.named_parameters(), *adapted.named_buffers()]}
    inside = [(id(module), {name: id(value) for name, value in vars(module).items()}) for module in adapted.modules()]
    found = estimate_training(adapted, 2, 32)
    assert found.activations > 0 and found.gradients == sum(p.numel() * 4 for p in adapted.parameters() if p.requires_grad) / 1e6
    assert slots == {name: id(value) for name, value in [*adapted.named_parameters(), *adapted.named_buffers()]}
    assert inside == [(id(module), {name: id(value) for name, value in vars(module).items()}) for module in adapted.modules()]
    with torch.no_grad():
        assert torch.equal(adapted(**batch).logits, wanted)


def test_a_model_that_cannot_be_asked_says_so():
    class Peeking(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            return super().forward(input_ids, **kwargs) if int(input_ids.sum()) >= 0 else None

    model = attach(Peeking(LlamaConfig(**SHAPE)), ModelInfo("llm", "toy", "built-in", max_seq_length=64))
    found = estimate_training(model)
    assert found.activations is None and "not known" in found.note and found.total > 0
    assert "not known" in model.report(show=False) and "not known" in model.report(show=False)._repr_html_()


def test_the_report_follows_what_is_decided():
    model, _ = FastModel.from_pretrained("tiny_llama", texts=TEXTS)
    lines = dict((row[0], row[1:]) for row in model.report(show=False).rows)
    assert lines["trainable"][1] == "100.00 % of all" and lines["memory to train"][0].startswith("about")
    longer = model.report(show=False, rows=4, length=512)
    assert "4 x 512 tokens" in longer and "all activations are kept" in longer
    adapted = FastModel.get_peft_model(model, r=2, use_gradient_checkpointing=True)
    small = estimate_training(adapted, 4, 512)
    assert small.total < estimate_training(adapted, 4, 512, checkpointing=False).total
    assert "gradient checkpointing in" in adapted.report(show=False)
    fused, whole = (estimate_training(adapted, 64, 2048, fused_loss=on).loss for on in (True, False))
    assert fused < whole


STEP = """
import gc, sys, torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from supertrainer.models.info import ModelInfo, attach
from supertrainer.models.memory import estimate_training
from supertrainer.models.offload import switch_checkpointing
from supertrainer.runtime import MemoryMeter
torch.set_num_threads(1)

def step(model, optimizer, rows, length):
    ids = torch.randint(0, 50, (rows, length))
    labels = ids if "Llama" in type(model).__name__ else torch.zeros(rows, dtype=torch.long)
    model(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()

kinds = {"llama": (LlamaForCausalLM, LlamaConfig), "bert": (BertForSequenceClassification, BertConfig)}
model_class, config_class = kinds[sys.argv[1]]
warm = model_class(config_class(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50))
step(warm, torch.optim.AdamW(warm.parameters()), 1, 200)
del warm
model = model_class(config_class(hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=3, vocab_size=6000))
attach(model, ModelInfo("llm", "x", "built-in", max_seq_length=512)).train()
model.config.use_cache = False
switch_checkpointing(model, sys.argv[2] == "True")
found = estimate_training(model, 4, 400, fused_loss=False)
gc.collect()
with MemoryMeter(interval=0.001) as meter:
    step(model, torch.optim.AdamW(model.parameters()), 4, 400)
print(meter.peak_mb, found.total - found.weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(("kind", "checkpointing"), [("llama", False), ("llama", True), ("bert", False)])
def test_a_real_step_takes_what_was_estimated_within_a_factor_of_two(kind, checkpointing):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", STEP, kind, str(checkpointing)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, estimated = map(float, done.stdout.split()[-2:])
    assert estimated / 2 < measured < estimated * 2, (measured, estimated)
