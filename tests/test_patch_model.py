"""`patch_model` on whole models: what it swaps is proven, leaves everything else as it was, and can be taken back."""

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from supertrainer.patching import masked_loss, patch_model, patches, plain, plain_model, prove, record_calls
from supertrainer.patching import model as patching_model
from supertrainer.patching.proof import Candidate
from supertrainer.runtime import UserError


def llama(seed: int = 0, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, **kwargs}
    return LlamaForCausalLM(LlamaConfig(**settings))


def lora(model: nn.Module, **kwargs) -> peft.PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
                "init_lora_weights": False, **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**settings))


def batch(rows: int = 3, length: int = 14, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, -4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: nn.Module, rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the model's own loss and its gradients, by name."""
    model.zero_grad()
    loss = model(**rows, use_cache=False).loss
    loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


def assert_same_step(model: nn.Module, rows: dict[str, torch.Tensor], limit: float = 1e-5) -> None:
    loss, grads = step(model, rows)
    with plain(model):
        own_loss, own_grads = step(model, rows)
    torch.testing.assert_close(loss, own_loss, rtol=limit, atol=limit)
    assert grads.keys() == own_grads.keys() and grads
    for name, grad in grads.items():
        assert (grad - own_grads[name]).norm() <= 10 * limit * own_grads[name].norm() + 1e-7, name


def kept(model: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for patch in patches(model):
        if patch.kept:
            counts[patch.kernel] = counts.get(patch.kernel, 0) + 1
    return counts


def test_every_part_of_a_llama_is_swapped_and_the_step_is_the_same():
    model = llama()
    patch_model(model, batch())
    counts = kept(model)
    assert sum(count for kernel, count in counts.items() if "norm" in kernel.lower()) == 5
    assert sum(count for kernel, count in counts.items() if "mlp" in kernel.lower()) == 2
    assert sum(count for kernel, count in counts.items() if "attention" in kernel.lower()) == 2
    assert_same_step(model, batch(seed=2))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.0, "bias": "lora_only"},
                                      {"target_modules": ["q_proj", "down_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_lora_steps_are_the_same_whatever_the_adapter(settings):
    model = lora(llama(), **settings)
    patch_model(model, batch())
    assert len(kept(model)) >= 3, model.patches
    assert_same_step(model, batch(seed=2))


def test_what_peft_switches_is_honoured_by_the_patched_model():
    model = lora(llama())
    rows = {key: value for key, value in batch().items() if key != "labels"}
    patch_model(model, rows)
    model.eval()
    adapted = model(**rows).logits
    with model.disable_adapter():
        disabled = model(**rows).logits
        with plain(model):
            torch.testing.assert_close(disabled, model(**rows).logits, rtol=1e-4, atol=1e-5)
    assert (adapted - disabled).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(model(**rows).logits, adapted, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("second")
    second = model(**rows).logits
    with plain(model):
        torch.testing.assert_close(second, model(**rows).logits, rtol=1e-4, atol=1e-5)
    assert (adapted - second).abs().max() > 1e-2


def test_restore_gives_the_same_bits_back():
    model, rows = lora(llama()), batch()
    rows.pop("labels")
    model.eval()
    before = model(**rows).logits
    patch_model(model, rows)
    with plain(model):
        assert torch.equal(model(**rows).logits, before)
    assert not patches(model).suspended
    model.patches.restore()
    assert torch.equal(model(**rows).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(patch.kept for patch in model.patches)


def test_another_model_of_the_same_class_is_not_touched():
    one, other = llama(), llama()
    forwards = {module: type(module).forward for module in other.modules()}
    patch_model(one, batch())
    assert kept(one) and not patches(other)
    assert all("forward" not in vars(module) and type(module).forward is forwards[module] for module in other.modules())
    assert [type(a) for a in one.modules()] == [type(b) for b in other.modules()]


def test_state_dict_saving_copies_and_pickles_are_unaffected(tmp_path):
    model, rows = llama(), batch()
    names = list(model.state_dict())
    patch_model(model, rows)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
    for other in (twin, pickled):
        assert kept(other) == kept(model)
        assert_same_step(other, rows)
        other.patches.restore()
        torch.testing.assert_close(other(**rows).loss, loaded(**rows).loss, rtol=0, atol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, rows = lora(llama()), batch()
    patch_model(model, rows)
    loss, grads = step(model.train(), rows)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    again, others = step(model, rows)
    torch.testing.assert_close(again, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-6)


def test_weights_that_are_trained_later_get_their_gradients():
    model, rows = llama(), batch()
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    patch_model(model, rows)
    model.requires_grad_(True)
    assert_same_step(model, rows)


def test_torch_compile_runs_through_a_patched_model():
    model, rows = llama(), batch()
    patch_model(model, rows)
    expected, grads = step(model, rows)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(**rows, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, grads[name], rtol=1e-3, atol=1e-5)


def test_generation_with_a_cache_gives_the_same_tokens():
    model, rows = llama(), batch(rows=1)
    prompt = rows["input_ids"]
    patch_model(model, rows)
    model.eval()
    found = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    with plain(model):
        assert torch.equal(found, model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0))


def test_an_encoder_is_patched_too():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    rows = {**batch(), "labels": torch.tensor([0, 2, 1])}
    patch_model(model, rows)
    model.zero_grad()
    loss = model(**rows).loss
    loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    with plain(model):
        own = model(**rows).loss
        own.backward()
    torch.testing.assert_close(loss, own)
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(grads[name], weight.grad, rtol=1e-3, atol=1e-6)


def test_a_wrong_rule_changes_nothing(monkeypatch):
    def times_two(module, *args, **kwargs):
        return type(module).forward(module, *args, **kwargs) * 2

    def find(model, backend="own"):
        for name, module in model.named_modules():
            if "layernorm" in name:
                yield Candidate(name, module, "wrong norm", times_two, key=type(module))

    monkeypatch.setattr(patching_model, "find_norms", find)
    model, rows = llama(), batch()
    before = model(**rows).loss
    record = patch_model(model, rows)
    refused = [patch for patch in record if patch.kernel == "wrong norm"]
    assert len(refused) == 4 and not any(patch.kept for patch in refused) and "error" in refused[0].reason
    torch.testing.assert_close(model(**rows).loss, before)


def test_modules_that_another_library_works_on_are_left_alone():
    model, rows = llama(), batch()
    seen = []
    norm, mlp = model.model.layers[0].input_layernorm, model.model.layers[1].mlp
    handle = norm.register_forward_hook(lambda module, args, output: seen.append("norm"))
    watched = mlp.gate_proj.register_forward_hook(lambda module, args, output: seen.append("gate"))
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * 1.0
    wrapped = mlp.forward
    patch_model(model, rows)
    seen.clear()
    model(**rows)
    assert sorted(seen) == ["gate", "norm"] and mlp.forward is wrapped
    handle.remove()
    watched.remove()


def test_hooks_put_on_after_patching_still_run():
    model, rows = lora(llama()), batch()
    patch_model(model, rows)
    seen = []
    layer = plain_model(model).model.layers[0]
    for module in (layer.self_attn.q_proj, layer.mlp.down_proj, layer.input_layernorm, layer.mlp):
        module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    model(**rows)
    assert len(seen) == 4


def test_a_second_call_judges_anew_and_off_takes_all_away():
    model, rows = llama(), batch()
    patch_model(model, rows)
    first = len(model.patches)
    patch_model(model, rows)
    assert len(model.patches) == first and kept(model)
    patch_model(model, rows, kernels="off")
    assert not kept(model) and not any("forward" in vars(module) for module in model.modules())


def test_kernels_that_are_unknown_are_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="Did you mean 'liger'"):
        patch_model(llama(), kernels="ligerr")


def test_patching_leaves_modes_gradients_and_random_numbers_alone():
    model, rows = llama(), batch()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    patch_model(model, rows)
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())


def test_the_fused_loss_and_the_patches_go_together():
    model, rows = lora(llama()), batch()
    patch_model(model, rows)
    loss = masked_loss(model, rows)
    loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    with plain(model):
        own = model(**rows, use_cache=False).loss
        own.backward()
    torch.testing.assert_close(loss, own)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, dict(model.named_parameters())[name].grad, rtol=1e-3, atol=1e-6)


def test_a_call_is_recorded_once_for_each_batch_and_the_pass_ends_early():
    model = llama()
    first = model.model.layers[0].input_layernorm
    later = []
    model.model.layers[1].register_forward_hook(lambda *args: later.append(1))
    rows = {"input_ids": batch()["input_ids"]}
    calls = record_calls(model, [first], [rows, rows])
    assert [call.args[0].shape for call in calls[first]] == [(3, 14, 32)] * 2 and not later
    assert not first._forward_pre_hooks


def test_bfloat16_is_judged_against_float64_and_not_against_itself():
    norm = nn.LayerNorm(64).bfloat16()

    def exact(module, x):
        return nn.functional.layer_norm(x.double(), (64,), module.weight.double(), module.bias.double(), module.eps).bfloat16()

    call = record_calls(nn.Sequential(norm), [norm], [{"input": torch.randn(8, 64).bfloat16()}])[norm]
    good = prove(Candidate("norm", norm, "exact", exact, key=0), call)
    assert good.kept and good.error <= good.own * 1.01
    off = prove(Candidate("norm", norm, "off", lambda module, x: exact(module, x) * 1.02, key=0), call)
    assert not off.kept and off.error > 0.015


DISTRIBUTED = """
import os, sys, tempfile
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, {tests!r})
from test_patch_model import assert_same_step, batch, kept, llama, lora, step
from supertrainer.patching import patch_model, plain

dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
for make in (llama, lambda: lora(llama())):
    model, rows = make(), batch()
    patch_model(model, rows)
    assert len(kept(model)) >= 3
    with plain(model):
        expected, grads = step(model, rows)
    wrapped = DistributedDataParallel(model)
    loss = wrapped(**rows, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    for name, weight in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(weight.grad, grads[name], rtol=1e-3, atol=1e-5)
    model.zero_grad()
    mesh = init_device_mesh("cpu", (1,))
    for module in list(model.modules()):
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(**rows, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    for name, weight in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(weight.grad.full_tensor(), grads[name], rtol=1e-3, atol=1e-5)
dist.destroy_process_group()
print("both wrappers agree")
"""


def test_ddp_and_fsdp2_train_a_patched_model_alike():
    code = DISTRIBUTED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "both wrappers agree" in done.stdout, done.stderr[-3000:]


def test_a_gradient_that_is_zero_but_for_rounding_does_not_spoil_the_figure():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.softmax(x + self.bias, -1)

    def same(module, x):
        return torch.softmax(x + module.bias, -1)

    torch.manual_seed(0)
    module = Shifted()
    calls = record_calls(nn.Sequential(module), [module], [{"input": torch.randn(5, 7)}])[module]
    proof = prove(Candidate("shifted", module, "same", same, key=0), calls)
    assert proof.kept and proof.error < 1e-5
