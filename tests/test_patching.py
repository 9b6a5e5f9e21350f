"""The masked loss against the model's own loss and against cross-entropy in float64, in every setting it claims."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.idefics3 import Idefics3Config, Idefics3ForConditionalGeneration

from supertrainer import patching
from supertrainer.kernels import cross_entropy
from supertrainer.kernels.cross_entropy import row_losses
from supertrainer.patching import (
    masked_loss,
    own_loss,
    patches,
    plain_model,
    project_loss_rows,
    prove_masked_loss,
)
from supertrainer.patching.head import LogitChange, find_change

SHAPE = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
IMAGE = 66


def llama(**changes):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


def batch_of(vocab=60, rows=3, length=14, share=0.4, seed=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    labels = torch.where(torch.rand(ids.shape, generator=generator) < share, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.where(mask.bool(), torch.tensor(-100))}


def reference(model, batch):
    """Next-token cross-entropy from the model's full logits, in float64: sum and number of rows."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits[:, :-1].double().flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"), int((targets != -100).sum())


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_step(model, batch, num_items=None, rtol=1e-4):
    """Loss and every gradient of `masked_loss` against the float64 reference."""
    total, count = reference(model, batch)
    expected = total / (num_items or count)
    wanted = gradients(model, expected)
    loss = masked_loss(model, batch, num_items)
    got = gradients(model, loss)
    assert loss.item() == pytest.approx(expected.item(), rel=rtol)
    assert wanted.keys() == got.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=rtol, atol=rtol * grad.abs().max().item() + 1e-9, msg=name)


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=5.0, attn_logit_softcapping=20.0,
                                          sliding_window=8))


def granite():
    return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0, embedding_multiplier=2.0))


@pytest.mark.parametrize("make", [llama, gemma2, granite, lambda: llama(tie_word_embeddings=True)],
                         ids=["llama", "gemma2 (soft cap)", "granite (scaled logits)", "tied"])
def test_loss_and_all_gradients_equal_float64_reference(make):
    torch.manual_seed(3)
    model = make()
    assert_same_step(model, batch_of())
    assert not patches(model)  # nothing fell back


def test_num_items_in_batch_divides_the_sum():
    model, batch = llama(), batch_of()
    assert_same_step(model, batch, num_items=37)
    as_tensor = masked_loss(model, batch, torch.tensor(37))
    assert as_tensor.item() == pytest.approx(model(**batch, num_items_in_batch=37).loss.item(), rel=1e-5)


def test_shifted_labels_are_not_shifted_again():
    model, batch = llama(), batch_of()
    shifted = {**batch, "shift_labels": patching.next_labels(batch["labels"])}
    shifted["labels"] = torch.zeros_like(batch["labels"])
    torch.testing.assert_close(masked_loss(model, shifted), masked_loss(model, batch))


@pytest.mark.parametrize("num_items", [None, 37])
def test_loss_weights_multiply_each_token(num_items):
    model, batch = llama(), batch_of()
    weights = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(3)) * 2
    copy = llama().double()
    logits = copy(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    targets = batch["labels"][:, 1:]
    terms = [weights[i, j + 1].double() * -torch.log_softmax(logits[i, j], -1)[targets[i, j]]
             for i in range(targets.shape[0]) for j in range(targets.shape[1]) if targets[i, j] != -100]
    wanted = torch.stack(terms).sum() / (num_items or len(terms))
    weighted = {**batch, "loss_weights": weights}
    for loss_of in (masked_loss, own_loss):
        torch.testing.assert_close(loss_of(model, weighted, num_items).double(), wanted, rtol=1e-5, atol=1e-6)
    assert all(check.passed for check in prove_masked_loss(model, weighted))
    halved = {**batch, "loss_weights": torch.full(batch["labels"].shape, 0.5)}
    torch.testing.assert_close(masked_loss(model, halved), masked_loss(model, batch) / 2)


def test_an_encoder_decoders_labels_are_not_shifted():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                   decoder_start_token_id=0, pad_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100]])
    batch = {"input_ids": torch.tensor([[3, 4, 1], [9, 1, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
             "labels": labels}
    plain = model(**batch).loss
    torch.testing.assert_close(masked_loss(model, batch), plain)
    torch.testing.assert_close(masked_loss(model, batch, 12), plain * 6 / 12)  # six labels, the first ones included


def test_mixture_of_experts_adds_its_balance_loss():
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2,
                                             output_router_logits=True, router_aux_loss_coef=0.5))
    batch = batch_of()
    own = model(**batch)
    assert masked_loss(model, batch).item() == pytest.approx(own.loss.item(), rel=1e-5)
    assert own.aux_loss > 0.1 and not patches(model)


def test_vision_language_model():
    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 16, "patch_size": 4}, scale_factor=2, image_token_id=IMAGE,
        text_config={"model_type": "llama", **SHAPE}, pad_token_id=0)
    model = Idefics3ForConditionalGeneration(config)
    batch = batch_of()
    batch["attention_mask"][:] = 1
    batch["input_ids"][:, 1:5] = IMAGE  # (16 / 4 / 2) ** 2 image tokens
    batch["labels"][:, :6] = -100
    batch["pixel_values"] = torch.randn(3, 1, 3, 16, 16)
    assert_same_step(model, batch)
    assert all(check.passed for check in prove_masked_loss(model, batch))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_lora_with_and_without_gradient_checkpointing(train, checkpointing):
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train(train)
    assert_same_step(model, batch_of())
    with_adapter = masked_loss(model, batch_of()).item()
    with model.disable_adapter():
        without = masked_loss(model, batch_of()).item()
        total, count = reference(model, batch_of())
    assert without == pytest.approx(total.item() / count, rel=1e-5) and abs(without - with_adapter) > 1e-3
    assert not patches(model)


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head", "q_proj"]},
                                     {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_output_embedding_itself(options):
    model = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False, **options))
    assert_same_step(model, batch_of())
    assert all(check.passed for check in prove_masked_loss(model, batch_of())) and patches(model)[-1].kept


@pytest.mark.parametrize("dtype,rel", [(torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float32, 1e-5)])
def test_weight_types(dtype, rel):
    model, batch = llama().to(dtype), batch_of()
    loss = masked_loss(model, batch)
    total, count = reference(model, batch)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(total.item() / count, rel=rel)
    checks = prove_masked_loss(model, batch)
    assert all(check.passed for check in checks), [str(check) for check in checks]


def test_autocast_from_float32_weights():
    model, batch = llama(), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        loss, own = masked_loss(model, batch), model(**batch).loss
    assert loss.item() == pytest.approx(own.item(), rel=2e-3)
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_no_loss_row_is_a_finite_zero_with_gradient():
    model, batch = llama(), batch_of()
    batch["labels"][:] = -100
    for items in (None, 12):
        grads = gradients(model, masked_loss(model, batch, items))
        assert len(grads) == len(list(model.parameters())) and all(not grad.any() for grad in grads.values())
    batch["labels"][:, 0] = 5  # a label that nothing predicts
    assert masked_loss(model, batch).item() == 0.0


def test_the_hook_is_gone_after_every_exit():
    model, batch = llama(), batch_of()
    head = model.get_output_embeddings()
    with pytest.raises(KeyError), project_loss_rows(model, batch["labels"]):
        assert len(head._forward_pre_hooks) == 1
        raise KeyError
    broken = {**batch, "input_ids": batch["input_ids"] + 1000}
    with pytest.raises(IndexError):
        masked_loss(model, broken)
    assert not head._forward_pre_hooks and not patches(model)  # the user's error, not a reason to give up
    masked_loss(model, batch)
    assert not head._forward_pre_hooks


def test_only_the_loss_rows_reach_the_output_embedding():
    model, batch = llama(), batch_of()
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    masked_loss(model, batch)
    handle.remove()
    assert seen == [(1, int((batch["labels"][:, 1:] != -100).sum()), 67)]


@pytest.fixture
def fused(monkeypatch):
    """The rows of each call of the fused loss."""
    calls = []
    plain = patching.loss.linear_cross_entropy
    monkeypatch.setattr(patching.loss, "linear_cross_entropy",
                        lambda hidden, *args, **kwargs: calls.append(len(hidden)) or plain(hidden, *args, **kwargs))
    return calls


def watch(model):
    """What the masked loss knows of the model's logits."""
    return patching.loss._WATCHES[plain_model(model)]


def head_rows(model, batch):
    """How many rows the model's own head multiplies in one step; looked at from inside, where no hook is."""
    head, seen = model.get_output_embeddings(), []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.linear and args[1] is head.weight:
                seen.append(args[0].shape[:-1].numel())
            return func(*args, **(kwargs or {}))

    with Watched():
        loss = masked_loss(model, batch)
    return seen, loss


def test_a_plain_head_is_fused_and_multiplies_one_row_itself(fused):
    model, batch = llama(), batch_of()
    rows = int((batch["labels"][:, 1:] != -100).sum())
    first, loss = head_rows(model, batch)
    second, again = head_rows(model, batch)
    assert first == [rows] and second == [1] and fused == [rows, rows]
    assert torch.equal(loss, again)  # the look at all rows changes nothing
    for _ in range(2):
        assert_same_step(model, batch, num_items=19)
    weighted = {**batch, "loss_weights": torch.rand(batch["labels"].shape)}
    torch.testing.assert_close(masked_loss(model, weighted), own_loss(model, weighted))


def cohere():
    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.0625))


def with_large_logits(make, dtype=torch.float32):
    """A model whose cap is felt: the logits of a fresh one are so small that no cap bends them."""
    torch.manual_seed(3)
    model = make()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return model.to(dtype)


@pytest.mark.parametrize("make,wanted", [(gemma2, LogitChange(softcap=5.0)), (granite, LogitChange(1 / 3)),
                                         (cohere, LogitChange(0.0625)), (llama, LogitChange())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_model_does_to_its_logits_is_found_and_fused(make, wanted, dtype, fused):
    model, batch = with_large_logits(make, dtype), batch_of()
    rows = int((batch["labels"][:, 1:] != -100).sum())
    seen = [head_rows(model, batch)[0] for _ in range(3)]
    assert seen == [[rows], [1], [1]] and len(fused) == 3 and not patches(model)
    assert watch(model).change == wanted
    if dtype == torch.float32:
        assert_same_step(model, batch, num_items=23)
        weighted = {**batch, "loss_weights": torch.rand(batch["labels"].shape)}
        torch.testing.assert_close(masked_loss(model, weighted), own_loss(model, weighted))
    assert all(check.passed for check in prove_masked_loss(model, batch))


def test_a_cap_that_is_felt_later_is_found_then():
    model, batch = gemma2().bfloat16(), batch_of()  # 8 bits do not show the cap of 5 on logits of 0.3
    masked_loss(model, batch)
    assert watch(model).change == LogitChange()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30.0)
    for _ in range(2):
        assert masked_loss(model, batch).item() == pytest.approx(own_loss(model, batch).item(), rel=4e-3)
        assert watch(model).change == LogitChange(softcap=5.0)
    assert not watch(model).given_up


def test_a_model_that_keeps_changing_its_mind_is_left_alone(fused):
    torch.manual_seed(0)
    model, batch = Changes(LlamaConfig(**SHAPE)), batch_of()
    model.how = "times"
    for step in range(8):
        model.factor = 1.5 + step
        assert masked_loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert watch(model).given_up and not patches(model)
    tried = len(fused)
    masked_loss(model, batch)
    assert len(fused) == tried


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_changes_are_found_from_logits_alone(dtype):
    seed = torch.seed() % 2**31
    generator = torch.Generator().manual_seed(seed)
    raw = (torch.randn(20, 700, generator=generator, dtype=torch.float64) * 9).to(dtype)
    for change in (LogitChange(), LogitChange(0.3), LogitChange(1 / 7), LogitChange(softcap=30.0), LogitChange(0.25, 50.0)):
        for logits in (change(raw), change(raw).float()):
            found = find_change(raw, logits)
            assert found.softcap == change.softcap, f"seed {seed}"
            assert found.scale == pytest.approx(change.scale, rel=torch.finfo(dtype).eps / 8), f"seed {seed}"
    others = {"a bias": raw + 0.5, "squares": raw.square(), "a banned word": raw.index_fill(1, torch.tensor([3]), -1e4),
              "minus infinity": raw.index_fill(1, torch.tensor([3]), float("-inf")), "another sign": -raw,
              "another row": raw.roll(1, 0), "clamped": raw.clamp(-6, 6), "one row": raw * torch.linspace(1, 1.2, 20)[:, None],
              "nothing": raw * 0}
    for name, logits in others.items():
        assert find_change(raw, logits.to(dtype)) is None, f"{name}, seed {seed}"


def test_dropout_draws_the_same_numbers_where_fusing_was_tried_in_vain():
    torch.manual_seed(0)
    model = gemma2()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert all(check.passed for check in prove_masked_loss(model, batch_of()))


class Changes(LlamaForCausalLM):
    """Does something to its logits, in a way that can be switched."""

    how = "nothing"

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if self.how == "in place":
            outputs.logits.mul_(2.0)
        elif self.how == "times":
            outputs.logits = outputs.logits * self.factor
        elif self.how == "one word":
            outputs.logits[..., 3] = -1e4
        elif self.how == "a copy in float32":
            outputs.logits = outputs.logits.to(torch.float32, copy=True)
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, self.config.vocab_size)
        return outputs


@pytest.mark.parametrize("how,dtype,trusted", [("nothing", torch.float32, True), ("in place", torch.float32, True),
                                               ("one word", torch.float32, False), ("in place", torch.bfloat16, True),
                                               ("a copy in float32", torch.bfloat16, True)])
def test_what_counts_as_a_change(how, dtype, trusted, fused):
    torch.manual_seed(0)
    model, batch = Changes(LlamaConfig(**SHAPE)).to(dtype), batch_of()
    model.lm_head.weight.requires_grad_(False)
    model.how = how
    own = model(**batch).loss.item()
    for _ in range(2):
        assert masked_loss(model, batch).item() == pytest.approx(own, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert len(fused) == (2 if trusted else 1) and not patches(model)
    assert watch(model).change == (None if not trusted else LogitChange(2.0) if how == "in place" else LogitChange())


@pytest.mark.parametrize("dtype,trained,wanted", [(torch.bfloat16, True, 1), (torch.float16, True, 0),
                                                  (torch.float16, False, 1), (torch.float32, True, 1)])
def test_a_trained_float16_head_is_not_fused(dtype, trained, wanted, fused):
    model = llama().to(dtype)
    model.lm_head.weight.requires_grad_(trained)
    masked_loss(model, batch_of()).backward()
    assert len(fused) == wanted


def test_a_model_that_begins_to_change_its_logits_later(fused):
    torch.manual_seed(0)
    model, batch = Changes(LlamaConfig(**SHAPE)), batch_of()
    for _ in range(2):
        assert_same_step(model, batch)
    model.how = "in place"
    for _ in range(2):
        assert masked_loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert len(fused) == 5 and not patches(model)  # one row did not fit, all rows were looked at, and then one again
    assert watch(model).change == LogitChange(2.0)


ADAPTERS = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "with a bias": {"lora_bias": True},
            "dropout": {"lora_dropout": 0.4}, "a saved copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}


def adapted(model=None, **options):
    torch.manual_seed(5)
    return get_peft_model(model or llama(), LoraConfig(**{"r": 4, "init_lora_weights": False,
                                                          "target_modules": ["lm_head", "q_proj"], **options}))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_the_head_is_fused(name, fused):
    model, batch = adapted(**ADAPTERS[name]).eval(), batch_of()
    for step in range(2):
        assert_same_step(model, batch)
        assert len(fused) == step + 1
    model.train()
    assert all(check.passed for check in prove_masked_loss(model, batch)) and patches(model)[-1].kept
    with model.disable_adapter():
        total, count = reference(model, batch)
        assert masked_loss(model, batch).item() == pytest.approx(total.item() / count, rel=1e-5)


def test_adapters_on_the_head_are_switched_added_and_merged_between_steps(fused):
    model, batch = adapted().eval(), batch_of()
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, target_modules=["lm_head"], lora_alpha=32))
    losses = []
    for names in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(names)
        assert_same_step(model, batch)
        losses.append(masked_loss(model, batch).item())
    assert len({round(loss, 4) for loss in losses}) == 3
    model.merge_adapter()
    assert masked_loss(model, batch).item() == pytest.approx(losses[-1], rel=1e-5)
    tried = len(fused)
    with model.disable_adapter():  # PEFT unmerges when it is called, so only PEFT can do it
        total, count = reference(model, batch)
        assert masked_loss(model, batch).item() == pytest.approx(total.item() / count, rel=1e-5)
    assert tried == 7 and not patches(model)


def test_a_saved_copy_follows_the_active_adapter(fused):
    model, batch = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]), batch_of()
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("third", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["second"].weight.mul_(1.5)
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        assert_same_step(model, batch)
    assert len(fused) == 3 and not patches(model)


def test_what_an_adapter_cannot_be_read_from_is_left_to_peft(fused):
    batch = batch_of()
    assert_same_step(adapted(use_dora=True), batch)
    for inside in ("base_layer", "lora_B.default"):
        model = adapted()
        model.get_output_embeddings().get_submodule(inside).register_forward_hook(lambda *args: None)
        assert_same_step(model, batch)
    assert not fused


def test_an_adapter_under_autocast_and_in_16_bits(fused):
    batch = batch_of()
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(llama().to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss, own = masked_loss(model, batch), own_loss(model, batch)
        wanted = gradients(model, own)
        for name, grad in gradients(model, loss).items():
            assert grad.dtype == torch.float32
            torch.testing.assert_close(grad, wanted[name], rtol=0.05, atol=0.03 * wanted[name].abs().max().item())
        assert loss.item() == pytest.approx(own.item(), rel=4e-3)
    assert len(fused) == 2


def test_a_4_bit_head(fused):
    bnb = pytest.importorskip("bitsandbytes")
    model = llama()
    layer = bnb.nn.Linear4bit(32, 67, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(model.lm_head.weight.data.clone(), requires_grad=False, quant_type="nf4")
    model.lm_head = layer.to("cpu")
    batch = batch_of()
    for _ in range(2):
        assert_same_step(model, batch, rtol=1e-3)
    assert len(fused) == 2
    assert_same_step(adapted(model), batch, rtol=1e-3)
    assert len(fused) == 3 and not patches(model)
    layer.weight.quant_state.packing_format_for_cpu = True  # as after a pass without gradients on some CPUs
    assert patching.head.read_head(layer) is None


def test_a_head_that_others_hold_is_left_to_the_model(fused):
    batch = batch_of()
    for register in ("register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"):
        model = llama()
        getattr(model.get_output_embeddings(), register)(lambda *args: None)
        assert_same_step(model, batch)
    model = llama()
    head = model.get_output_embeddings()
    head.forward = lambda hidden: F.linear(hidden, head.weight) * 1.0  # as accelerate's offloading does
    assert_same_step(model, batch)
    model = llama()
    torch.nn.utils.parametrizations.weight_norm(model.get_output_embeddings())
    assert_same_step(model, batch)
    with torch.inference_mode():
        masked_loss(llama(), batch)
    assert not fused


def test_autocast_inside_the_models_own_forward(fused):
    """As accelerate does it: outside of the forward there is no autocast to be found."""
    model, batch = llama(), batch_of()
    plain = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(plain)
    for _ in range(2):
        loss = masked_loss(model, batch)
        assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=2e-3)
    loss.backward()
    assert fused and all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows,vocab", [(1, 1), (7, 31), (64, 257), (0, 5)])
def test_row_losses_against_float64(monkeypatch, dtype, rows, vocab):
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 300)  # several pieces
    seed = torch.seed() % 2**31
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 8).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[1::3] = -100
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    wide = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none") if rows else wide.sum(-1)
    (expected * weights).sum().backward()
    losses = row_losses(logits, targets)
    (losses * weights.to(losses.dtype)).sum().backward()
    epsilon = torch.finfo(dtype).eps
    # logsumexp(x) - x[target] loses up to an epsilon of the computing type times the largest logit, and exp() passes that on
    computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    lost = 3 * computed * max(1.0, float(logits.detach().abs().max()) if logits.numel() else 1.0)
    torch.testing.assert_close(losses.double(), expected, rtol=4 * computed, atol=lost, msg=f"seed {seed}")
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=max(2 * epsilon, 1e-5 * (epsilon > 1e-10)),
                               atol=max(epsilon / 4, lost), msg=f"seed {seed}")


def test_pieces_do_not_change_a_bit(monkeypatch):
    logits, targets = torch.randn(50, 91), torch.randint(0, 91, (50,))
    whole = row_losses(logits, targets)
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 91 * 7)
    assert torch.equal(row_losses(logits, targets), whole)


def test_a_masked_row_stays_out_even_if_it_is_not_finite():
    logits = torch.randn(3, 5)
    logits[1] = float("nan")
    logits.requires_grad_()
    row_losses(logits, torch.tensor([1, -100, 2])).sum().backward()
    assert torch.isfinite(logits.grad).all() and not logits.grad[1].any()


def test_what_cannot_be_masked_uses_the_models_own_loss_and_says_why():
    torch.manual_seed(0)
    batch = batch_of()
    seq2seq = T5ForConditionalGeneration(T5Config(vocab_size=67, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                                  decoder_start_token_id=0, dropout_rate=0.0))
    torch.testing.assert_close(masked_loss(seq2seq, batch), seq2seq(**batch).loss)
    assert "encoder-decoder" in prove_masked_loss(seq2seq, batch)[0].detail
    own = llama()
    own.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().square().mean()
    torch.testing.assert_close(masked_loss(own, batch), own(**batch).loss)


def masked_words(name):
    torch.manual_seed(0)
    tiny = {"vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "pad_token_id": 0}
    if name == "DistilBert":
        tiny = {"vocab_size": 67, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "dropout": 0.0,
                "attention_dropout": 0.0}
    elif name == "ModernBert":
        tiny |= {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    else:
        tiny |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return getattr(transformers, name + "ForMaskedLM")(getattr(transformers, name + "Config")(**tiny))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Bert", "Roberta", "ModernBert", "DistilBert", "Electra"])
def test_masked_words_are_judged_by_their_own_label_and_the_others_not_projected(name, dtype, fused):
    model, batch = masked_words(name).to(dtype), batch_of(share=0.15)
    rows = int((batch["labels"] != -100).sum())
    own = model(**batch).loss
    wanted = gradients(model, own)
    assert head_rows(model, batch)[0] == [rows] and head_rows(model, batch)[0] == [1] and fused == [rows, rows]
    loss = masked_loss(model, batch)
    rtol = 1e-4 if dtype == torch.float32 else 0.05
    assert loss.item() == pytest.approx(own.item(), rel=rtol) and not patches(model)
    got = gradients(model, loss)
    assert got.keys() == wanted.keys()
    for key, grad in wanted.items():
        torch.testing.assert_close(got[key], grad, rtol=rtol, atol=rtol * grad.abs().max().item() + 1e-7, msg=key)
    torch.testing.assert_close(masked_loss(model, batch, 50), loss * (rows / 50))
    weighted = {**batch, "loss_weights": torch.rand(batch["labels"].shape)}
    torch.testing.assert_close(masked_loss(model, weighted), own_loss(model, weighted), rtol=rtol, atol=rtol)
    checks = prove_masked_loss(model, batch)
    assert len(checks) == 2 and all(check.passed for check in checks) and patches(model)[-1].kept, list(map(str, checks))


@pytest.mark.parametrize("make", [llama, gemma2, lambda: masked_words("Bert")], ids=["llama", "gemma2", "bert"])
def test_label_smoothing_and_z_loss(make):
    model, batch = make(), batch_of()
    targets = batch["labels"] if not patching.loss.shifts_labels(model) else patching.next_labels(batch["labels"])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().flatten(0, 1)
    wanted = F.cross_entropy(logits, targets.flatten(), label_smoothing=0.2)
    wanted = wanted + 0.01 * torch.logsumexp(logits, -1).square()[targets.flatten() != -100].mean()
    for loss_of in (own_loss, masked_loss, masked_loss):
        assert loss_of(model, batch, label_smoothing=0.2, z_loss=0.01).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_label_smoothing_of_an_encoder_decoder():
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=67, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                                decoder_start_token_id=0, dropout_rate=0.0))
    batch = batch_of()
    wanted = F.cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(masked_loss(model, batch, label_smoothing=0.2), wanted)


def test_soft_prompts_fall_back():
    model = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    batch = batch_of()
    torch.testing.assert_close(masked_loss(model, batch), model(**batch).loss)
    assert not patches(model)[-1].kept and "hidden states" in patches(model)[-1].reason
    torch.testing.assert_close(masked_loss(model, batch), model(**batch).loss)
    assert len(patches(model)) == 1  # known from the first time on


class Reshapes(LlamaForCausalLM):
    """Uses its logits as [batch, length, vocabulary]."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        outputs.logits = outputs.logits.view(*input_ids.shape, -1)
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, self.config.vocab_size)
        return outputs


class Biased(LlamaForCausalLM):
    """Adds something to its logits that depends on the position: masking rows changes the answer without an error."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        length, vocab = outputs.logits.shape[1:]
        outputs.logits = outputs.logits + torch.arange(length)[None, :, None] * torch.arange(vocab) / vocab
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, vocab)
        return outputs


@pytest.mark.parametrize("kind,passes", [(Reshapes, True), (Biased, False)])
def test_models_that_need_all_positions(kind, passes):
    torch.manual_seed(0)
    model, batch = kind(LlamaConfig(**SHAPE)), batch_of()
    checks = prove_masked_loss(model, batch)
    assert all(check.passed for check in checks) == passes and not patches(model)[-1].kept
    torch.testing.assert_close(masked_loss(model, batch), model(**batch).loss)
    torch.testing.assert_close(masked_loss(model, batch, 50),
                               model(**batch).loss * ((batch["labels"][:, 1:] != -100).sum() / 50))
    batch["labels"][:] = -100
    assert masked_loss(model, batch).item() == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_the_proof_leaves_no_trace(training):
    model = get_peft_model(llama(attention_dropout=0.3), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3))
    model.train(training)
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 2.0)
    state, batch = torch.get_rng_state(), batch_of()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        checks = prove_masked_loss(model, batch)
    assert len(checks) == 2 and all(check.passed for check in checks)
    assert torch.equal(torch.get_rng_state(), state) and modes == [module.training for module in model.modules()]
    assert all((p.grad == 2.0).all() for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_dropout_draws_the_same_numbers_both_ways():
    model = llama(attention_dropout=0.5)
    assert all(check.passed for check in prove_masked_loss(model, batch_of()))


def test_restore_goes_back_to_the_models_own_loss_and_a_proof_brings_it_back():
    model, batch = llama(), batch_of()
    prove_masked_loss(model, batch)
    assert model.patches[-1].kept and "lm_head" in str(model.patches)
    model.patches.restore()
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    masked_loss(model, batch)
    assert seen == [(3, 14, 67)]
    prove_masked_loss(model, batch)
    seen.clear()
    masked_loss(model, batch)
    handle.remove()
    assert seen[0][0] == 1 and model.patches[-1].kept


def test_copies_files_and_classes_are_unaffected(tmp_path):
    methods = dict(vars(LlamaForCausalLM))
    model, batch = llama(), batch_of()
    keys = list(model.state_dict())
    prove_masked_loss(model, batch)
    assert list(model.state_dict()) == keys and dict(vars(LlamaForCausalLM)) == methods
    assert "forward" not in vars(model)
    copied = copy.deepcopy(model)
    assert copied.patches == model.patches and copied.patches is not model.patches
    pickle.load(io.BytesIO(pickle.dumps(model)))
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss)
    assert transformers.LlamaForCausalLM.forward is LlamaForCausalLM.forward


def test_plain_model_looks_through_wrappers():
    model = llama()
    wrapped = torch.nn.Module()
    wrapped.module = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert plain_model(wrapped) is model


# --- the proof on the whole model, with swapped modules


def doubled(module, *args):
    return 2 * type(module).forward(module, *args)


def same(module, *args):
    return type(module).forward(module, *args)


def swap(model, name, kernel, function):
    patches(model).swap(plain_model(model).get_submodule(name), function)
    patches(model).append(patching.Patch(name, kernel, 0.0, True, "proven"))


def verdicts(model):
    return {patch.kernel: patch.kept for patch in patches(model)}


def test_a_kernel_that_is_wrong_is_taken_back_and_the_others_stay():
    model, batch = llama(), batch_of()
    swap(model, "model.layers.0.mlp", "good", same)
    swap(model, "model.layers.0.input_layernorm", "wrong", doubled)
    swap(model, "model.layers.1.input_layernorm", "wrong", doubled)
    checks = prove_masked_loss(model, batch)
    assert [check.passed for check in checks[2:]] == [True, True] and not all(check.passed for check in checks[:2])
    assert len({check.name for check in checks}) == 4 and "without wrong" in checks[2].name
    assert verdicts(model) == {"good": True, "wrong": False, patching.KERNEL: True}
    assert "failed" in patches(model)[1].reason
    assert "forward" not in vars(model.model.layers[0].input_layernorm) and "forward" in vars(model.model.layers[0].mlp)
    torch.testing.assert_close(masked_loss(model, batch), llama()(**batch).loss)


def test_two_wrong_kernels_are_both_taken_back():
    model, batch = llama(), batch_of()
    swap(model, "model.layers.0.mlp", "wrong", doubled)
    swap(model, "model.norm", "also wrong", doubled)
    checks = prove_masked_loss(model, batch)
    assert checks[-1].passed and verdicts(model) == {"wrong": False, "also wrong": False, patching.KERNEL: True}
    assert not patches(model).swapped


def test_where_the_loss_is_wrong_the_swapped_modules_stay():
    torch.manual_seed(0)
    model, batch = Biased(LlamaConfig(**SHAPE)), batch_of()
    swap(model, "model.layers.0.mlp", "good", same)
    checks = prove_masked_loss(model, batch)
    assert verdicts(model) == {"good": True, patching.KERNEL: False} and checks[-1].passed
    torch.testing.assert_close(masked_loss(model, batch), model(**batch).loss)


def test_both_wrong():
    torch.manual_seed(0)
    model, batch = Biased(LlamaConfig(**SHAPE)), batch_of()
    swap(model, "model.layers.0.mlp", "good", same)
    swap(model, "model.norm", "wrong", doubled)
    checks = prove_masked_loss(model, batch)
    assert verdicts(model) == {"good": True, "wrong": False, patching.KERNEL: False}
    assert [check.passed for check in checks[2:]] == [True, True]


def test_swapped_modules_are_proven_where_the_loss_is_the_models_own():
    model, batch = llama(), batch_of()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().square().mean()
    swap(model, "model.norm", "wrong", doubled)
    checks = prove_masked_loss(model, batch)
    assert not checks[0].passed and checks[-1].passed and verdicts(model) == {"wrong": False}


def drops_more(module, x):
    return F.dropout(F.dropout(type(module).forward(module, x), 0.3, module.training), 0.3, module.training)


def test_a_swapped_module_that_draws_other_random_numbers_is_compared_without_them():
    model, batch = llama(), batch_of()
    model.model.layers[0].mlp.dropout = torch.nn.Dropout(0.3)  # what the kernel reads its probability from
    swap(model, "model.layers.0.mlp", "drops", drops_more)
    assert all(check.passed for check in prove_masked_loss(model, batch)) and model.model.layers[0].mlp.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_patched_is_within_the_limits(dtype):
    model, batch = adapted(llama().to(dtype), target_modules="all-linear"), batch_of()
    patching.patch_model(model, batch)
    checks = prove_masked_loss(model, batch)
    assert len(checks) == 2 and all(check.passed for check in checks), list(map(str, checks))
    assert len(patches(model).swapped) > 4


class Codebooks(LlamaForCausalLM):
    """A model with labels of three dimensions, as music models have."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        return super().forward(input_ids=input_ids, labels=None if labels is None else labels[..., 0], **kwargs)


def test_labels_of_three_dimensions_are_the_models_own_affair():
    torch.manual_seed(0)
    model = Codebooks(LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=2))
    ids = torch.randint(0, 61, (2, 7))
    batch = {"input_ids": ids, "labels": ids[..., None]}
    expected = model(**batch).loss
    assert expected > 1
    torch.testing.assert_close(masked_loss(model, batch), expected)
    torch.testing.assert_close(own_loss(model, batch), expected)
    assert "not one for each token" in model.patches[-1].reason
