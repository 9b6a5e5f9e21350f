"""Packing: the bins against a slow reference, and packed rows against the same rows alone, on models of many kinds."""

import math
import pickle

import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from supertrainer.data.collate import ChatCollator, PackedCollator, check_packing, collator_for
from supertrainer.data.packing import BATCHINGS, PackedDataset, efficiency, fill, pack
from supertrainer.patching import masked_loss, own_loss, patches, prove_masked_loss
from supertrainer.runtime import UserError
from supertrainer.trainers.base import build_trainer

# ---------------------------------------------------------------------------------------------------------------------
# bins


def slow_best_fit(lengths: list[int], max_length: int) -> list[int]:
    """Return the contents of the bins of best fit decreasing, looking at every bin for every row."""
    used: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [number for number, content in enumerate(used) if content + length <= max_length]
        if fits:
            used[max(fits, key=lambda number: used[number])] += length
        else:
            used.append(length)
    return used


def fewest_bins(lengths: tuple[int, ...], max_length: int) -> int:
    """Return the optimum, by trying every way."""
    best = len(lengths)

    def place(index: int, used: list[int]) -> None:
        nonlocal best
        if len(used) >= best:
            return
        if index == len(lengths):
            best = len(used)
            return
        for number in range(len(used)):
            if used[number] + lengths[index] <= max_length:
                used[number] += lengths[index]
                place(index + 1, used)
                used[number] -= lengths[index]
        place(index + 1, [*used, lengths[index]])

    place(0, [])
    return best


sizes = st.integers(1, 60).flatmap(lambda limit: st.tuples(st.lists(st.integers(1, limit), max_size=120), st.just(limit)))


@given(sizes)
def test_every_row_is_in_one_bin_and_no_bin_is_too_full(drawn):
    lengths, limit = drawn
    bins = pack(lengths, limit)
    assert sorted(row for bin in bins for row in bin) == list(range(len(lengths)))
    assert all(bin and sum(lengths[row] for row in bin) <= limit for bin in bins)
    assert bins == pack(lengths, limit)


@given(sizes)
def test_bins_are_those_of_best_fit_decreasing(drawn):
    lengths, limit = drawn
    assert sorted(sum(lengths[row] for row in bin) for bin in pack(lengths, limit)) == sorted(slow_best_fit(lengths, limit))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_bins_are_within_the_bound_of_the_optimum(lengths):
    bins, optimum = len(pack(lengths, 20)), fewest_bins(tuple(sorted(lengths, reverse=True)), 20)
    assert optimum <= bins <= math.floor(11 / 9 * optimum + 6 / 9)


@given(sizes)
def test_no_more_bins_than_rows_in_the_order_they_come(drawn):
    lengths, limit = drawn
    next_fit = room = 0
    for length in lengths:
        if length > room:
            next_fit, room = next_fit + 1, limit
        room -= length
    # best fit decreasing may need a bin more than a lucky order, never more than its own bound on the optimum
    assert len(pack(lengths, limit)) <= max(next_fit, math.floor(11 / 9 * next_fit + 6 / 9))
    if lengths:
        assert fill(lengths, pack(lengths, limit), limit) > 0.5 or len(pack(lengths, limit)) == 1


def test_empty_and_wrong_lengths():
    assert pack([], 10) == []
    for lengths, row in (([3, 11], 2), ([0], 1), ([5, 5, -1], 3)):
        with pytest.raises(UserError, match=f"Row {row} has"):
            pack(lengths, 10)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_efficiency_is_what_the_batches_hold(batching):
    lengths = [int(torch.randint(1, 100, (), generator=torch.Generator().manual_seed(n))) for n in range(1200)]
    claimed = efficiency(lengths, batching, batch_size=8, max_length=256)
    rows = [{"input_ids": [1] * n, "labels": [1] * n, "length": n} for n in lengths]
    data = Dataset.from_list(rows)
    if batching == "packed":
        data, collate = PackedDataset(data, 256), PackedCollator(0, flatten=False)
    else:
        collate = PackedCollator(0) if batching == "padding_free" else ChatCollator(0)
    sampler = None
    if batching == "length_grouped":
        sampler = LengthGroupedSampler(8, lengths=lengths, generator=torch.Generator().manual_seed(3))
    batches = DataLoader(data, 8, shuffle=sampler is None, sampler=sampler, collate_fn=collate,
                         generator=torch.Generator().manual_seed(5))
    found = sum(lengths) / sum(batch["input_ids"].numel() for batch in batches)
    assert abs(found - claimed) < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# packed sets and collators


def encoded(lengths: list[int], vocabulary: int = 64, seed: int = 0) -> list[dict]:
    """Return random rows; the first third of each carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(5, vocabulary, (length,), generator=generator).tolist()
        first = max(1, length // 3)
        rows.append({"input_ids": ids, "labels": [-100] * first + ids[first:], "length": length})
    return rows


def test_a_packed_set_reads_rows_once_and_can_travel():
    rows = encoded([9, 4, 14, 3, 7, 10])
    packed = PackedDataset(Dataset.from_list(rows), 16)
    seen = []
    for item, length in zip(pickle.loads(pickle.dumps(packed)), packed.lengths, strict=True):
        assert len(item["input_ids"]) == len(item["labels"]) == item["length"] == sum(item["seq_lengths"]) == length <= 16
        start = 0
        for part in item["seq_lengths"]:
            seen.append((item["input_ids"][start: start + part], item["labels"][start: start + part]))
            start += part
    assert sorted(seen) == sorted((row["input_ids"], row["labels"]) for row in rows)
    assert sorted(item["length"] for item in packed.shuffle(seed=1)) == sorted(packed.lengths)


def test_weights_of_some_rows_become_weights_of_all():
    rows = [{**row, "loss_weights": weights} for row, weights in
            zip(encoded([3, 2, 4]), (None, [1.0, 0.25], None), strict=True)]
    packed = PackedDataset(Dataset.from_list(rows), bins=[[0, 1], [2]])
    assert packed[0]["loss_weights"] == [1, 1, 1, 1, 0.25]
    batch = PackedCollator(0, flatten=False)([packed[0], packed[1]])
    assert batch["loss_weights"].tolist() == [[1, 1, 1, 1, 0.25], [1] * 5]
    assert ChatCollator(0)(rows)["loss_weights"].tolist() == [[1, 1, 1, 1], [1, 0.25, 1, 1], [1, 1, 1, 1]]
    assert "loss_weights" not in PackedCollator(0)([{**row, "loss_weights": None} for row in rows])


def test_a_flattened_batch_is_that_of_trl():
    rows = encoded([9, 4, 1, 14])
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    ours = PackedCollator(0, boundaries=True)(rows)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(value)), key
        assert getattr(ours[key], "dtype", None) == getattr(value, "dtype", None), key


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4), st.sampled_from([None, 8]))
def test_boundaries_padding_and_labels_of_stacked_bins(parts, multiple):
    bins = [{"input_ids": list(range(1, sum(part) + 1)), "labels": list(range(1, sum(part) + 1)), "seq_lengths": part}
            for part in parts]
    batch = PackedCollator(0, flatten=False, pad_to_multiple_of=multiple)(bins)
    for row, part in enumerate(parts):
        place = 0
        for length in part:
            assert batch["position_ids"][row, place: place + length].tolist() == list(range(length))
            assert batch["labels"][row, place: place + length].tolist() == [-100, *range(place + 2, place + length + 1)]
            place += length
        assert (batch["labels"][row, place:] == -100).all() and (batch["input_ids"][row, place:] == 0).all()
        assert batch["position_ids"][row, place:].tolist() == list(range(batch["input_ids"].shape[1] - place))


# ---------------------------------------------------------------------------------------------------------------------
# packed = alone

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
LENGTHS = [11, 5, 1, 17, 8]
CAUSAL = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=8)),
    # windows of 4 tokens on two layers of three, so that rows are longer than a window
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=8)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=4)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
}
ENCODERS = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE)),
    "bert_tags": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**SHAPE, num_labels=5)),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SHAPE, pad_token_id=1)),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(
        **SHAPE, local_attention=4, layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)),
}


def build(name: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = (CAUSAL | ENCODERS)[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual start, so that a leak would be plain to see
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.set_attn_implementation(attention)
    return model.eval()


def alone(model: torch.nn.Module, rows: list[dict]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]


def packed_logits(model: torch.nn.Module, collate: PackedCollator, rows: list[dict]) -> list[torch.Tensor]:
    """Return the logits of each row out of one flattened batch, or out of two bins of unlike length."""
    extra = {} if collate.mask else {"use_cache": False}
    parts = [rows] if collate.flatten else [rows[:2], rows[2:]]
    items = [{key: [value for row in part for value in row[key]] for key in ("input_ids", "labels")}
             | {"seq_lengths": [row["length"] for row in part]} for part in parts]
    batch = {key: value for key, value in collate(items).items() if key != "labels"}
    logits = model(**batch, **extra).logits
    return [piece for row, part in zip(logits, parts, strict=True)
            for piece in row[: sum(r["length"] for r in part)].split([r["length"] for r in part])]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batching", ["padding_free", "packed"])
@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_packed_logits_and_gradients_are_those_of_the_rows_alone(name, batching, attention):
    model, rows = build(name, attention), encoded(LENGTHS)
    collate = collator_for(batching, model, 0)
    expected, found = alone(model, rows), packed_logits(model, collate, rows)
    assert max(float(logits.detach().abs().max()) for logits in expected) > 0.1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradients(logits: list[torch.Tensor]) -> list[torch.Tensor]:
        loss = sum(((number + 1) * row.float().log_softmax(-1)[:, 3]).sum() for number, row in enumerate(logits))
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [torch.zeros(()) if grad is None else grad for grad in found]

    one, other = gradients(packed_logits(model, collate, rows)), gradients(expected)
    for mine, theirs in zip(one, other, strict=True):
        assert float((mine - theirs).norm()) <= 2e-5 * max(1.0, float(theirs.norm()))
    assert check_packing(model, rows, collate).passed


def test_collators_follow_the_model():
    model = build("llama", "sdpa")
    assert collator_for("packed", model, 3) == PackedCollator(3, flatten=False)
    model.config._attn_implementation = "flash_attention_2"
    for batching in ("packed", "padding_free"):  # a varlen kernel reads one row a batch
        assert collator_for(batching, model, 3) == PackedCollator(3, flatten=True, boundaries=True)
    vision = transformers.Idefics3Config(text_config={**GROUPED, "model_type": "llama"}, vision_config={
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16,
        "patch_size": 8})
    assert collator_for("packed", transformers.Idefics3ForConditionalGeneration(vision), 0).mask is None


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_would_let_rows_see_each_other(name):
    model, rows = build(name, "sdpa"), encoded(LENGTHS)
    batch = PackedCollator(0)(rows)
    expected = alone(model, rows)[-1]
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    right = model(**inputs, use_cache=False).logits[0, -8:]
    torch.testing.assert_close(right, expected, rtol=1e-5, atol=1e-5)
    for wrong in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(batch["input_ids"])}):
        leaked = model(**inputs, **wrong).logits[0, -8:]
        assert float((leaked - expected).detach().abs().max()) > 1e-2, wrong


def test_the_check_finds_encoders_without_their_mask():
    for name in ENCODERS:
        model, rows = build(name, "sdpa"), encoded(LENGTHS)
        failed = check_packing(model, rows, PackedCollator(0, position_start=collator_for("packed", model, 0).position_start))
        assert not failed.passed and failed.measured > failed.limit and "dataset.batching=padded" in failed.detail


def test_the_check_finds_wrong_first_positions():
    model, rows = build("roberta", "sdpa"), encoded(LENGTHS)
    assert collator_for("packed", model, 1).position_start == 2
    assert not check_packing(model, rows, PackedCollator(1, mask="bidirectional")).passed


@pytest.mark.parametrize("make", [
    lambda: transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2,
                                                                   state_size=4)),
    lambda: transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)),
], ids=["mamba", "rwkv"])
def test_a_recurrent_model_is_sent_to_padding(make):
    torch.manual_seed(0)
    check = check_packing(make(), encoded(LENGTHS))
    assert not check.passed and "dataset.batching=padded" in check.detail


def test_the_check_leaves_everything_as_it_was():
    model, rows = build("llama", "sdpa").train(), encoded(LENGTHS)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert check_packing(model, rows).passed
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not check_packing(model, rows[:1]).passed  # one row proves nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_limit_follows_the_number_type(dtype):
    rows = encoded(LENGTHS)
    for name in ("llama", "bert"):
        model = build(name, "sdpa").to(dtype)
        assert check_packing(model, rows).passed
        model.set_attn_implementation("eager")
        assert check_packing(model, rows, collator_for("packed", model, 0)).passed
    assert not check_packing(build("bert", "sdpa").to(dtype), rows, PackedCollator(0)).passed


# ---------------------------------------------------------------------------------------------------------------------
# packed batches and the loss of the answer rows only


@pytest.mark.parametrize("batching", ["padding_free", "packed"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_masked_loss_of_a_packed_batch(name, batching, weighted):
    model, rows = build(name, "sdpa"), encoded(LENGTHS)
    if weighted:
        rows = [{**row, "loss_weights": None} for row in rows]
        rows[1]["loss_weights"] = [0.25] * rows[1]["length"]
        rows[3]["loss_weights"] = [2.0] * rows[3]["length"]
    total = sum(label != -100 for row in rows for label in row["labels"][1:])
    expected = sum(own_loss(model, {**ChatCollator(0)([row]), "use_cache": False}, total) for row in rows
                   if any(label != -100 for label in row["labels"][1:]))
    packed = PackedDataset(Dataset.from_list(rows), 20)
    items = [packed[index] for index in range(len(packed))] if batching == "packed" else rows
    batch = {**collator_for(batching, model, 0)(items), "use_cache": False}
    torch.testing.assert_close(masked_loss(model, batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_loss(model, batch), expected, rtol=1e-5, atol=1e-5)
    checks = prove_masked_loss(model, batch)
    assert len(checks) == 2 and all(check.passed for check in checks), checks
    assert patches(model)[-1].kept


@pytest.mark.parametrize("batching", ["padding_free", "packed"])
def test_a_training_step_is_the_same_padded_and_packed(batching, tmp_path):
    rows = Dataset.from_list(encoded(LENGTHS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a", pad_token="a")
    after = {}
    for way in ("padded", batching):
        model = build("llama", "sdpa").train()
        data = PackedDataset(rows, 20) if way == "packed" else rows
        trainer = build_trainer(
            "llm", model=model, processing_class=tokenizer, train_dataset=data, data_collator=collator_for(way, model, 0),
            output_dir=tmp_path, training_kwargs={
                "max_steps": 3, "per_device_train_batch_size": len(data), "learning_rate": 0.1, "optim": "sgd",
                "lr_scheduler_type": "constant", "warmup_steps": 0,
                "train_sampling_strategy": "random", "logging_steps": 1, "disable_tqdm": True})
        trainer.train()
        assert len(trainer.checks) == 2 and all(check.passed for check in trainer.checks)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        after[way] = (losses, [parameter.detach().clone() for parameter in model.parameters()])
    torch.testing.assert_close(after[batching], after["padded"], rtol=1e-4, atol=1e-5)
    assert after["padded"][0][1] != after["padded"][0][0]
