"""The benchmark scripts run, on tiny models, and what they count is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.peers import rates, workloads  # noqa: E402
from benchmarks.peers.variants import VARIANTS, pad  # noqa: E402


def run(script, *words, timeout=600):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *map(str, words)], capture_output=True, text=True,
                          timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_variants_take_turns_on_the_same_rows(tmp_path):
    """Two libraries that share nothing but the rows give the same loss; what is not there is left out with a reason."""
    text = run("train_step.py", "random", "--tiny", "--rounds", 2, "--alone", 2, "--only", "transformers-fp32", "unsloth", "ours",
               "--unsloth-python", sys.executable, "--json", tmp_path / "found.json", "--folder", tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())["results"][0]
    theirs, ours = (found["variants"][name] for name in ("transformers-fp32", "ours"))
    for mine, other in zip(ours["alone"], theirs["alone"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.03) and mine["tokens"] == other["tokens"] == 96
    assert ours["alone"][0]["loss"] != ours["alone"][1]["loss"], "each step has rows of its own"
    assert len(ours["rounds"]) == len(theirs["rounds"]) == len(found["meter"]) == 2
    assert found["rates"]["bfloat16 FLOP/s"] > 1e9 and 0 < ours["of_matmul_rate"] < 1
    assert "unsloth is not installed" in found["missing"]["unsloth"] and "| unsloth | left out" in text


def test_a_gpu_plan_is_made_without_a_gpu():
    text = run("train_step.py", "gpu", "--dry-run")
    for shape in ("llama-3.2-1b", "qwen3-4b", "llama-3.1-8b"):
        for way in ("lora", "qlora"):
            assert all(f"{shape}-{way}-{length}: " in text for length in (2048, 8192))
    assert "7.50 G weights" in text  # 8.03 B of Llama-3.1-8B without the input embedding


def test_kernels_are_timed_and_compared():
    lines = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in run(
        "kernels.py", "--sizes", "tiny", "--rounds", 1, "--no-compile", "--only", "rms_norm", "linear_cross_entropy").splitlines()
        if line.startswith("|")][2:]
    assert [line[:3] for line in lines] == [[name, "tiny", way] for name in ("rms_norm", "linear_cross_entropy")
                                            for way in ("eager", "ours")]
    assert all(float(line[3]) > 0 and float(line[8]) < 0.02 for line in lines)


@pytest.mark.parametrize("rows,length", [(1, 24), (3, 10)])
def test_step_flops_are_those_that_pytorch_counts(rows, length):
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 96, (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    expected = rates.step_flops(rates.model_facts(config), [length] * rows, rows * length, lora=False, causal=False)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)  # the turning angles are a product too


def test_step_flops_count_what_a_row_sees_and_what_is_trained():
    facts = {"linear": 1000, "adapter": 10, "head": 100, "attention": 6}
    assert rates.step_flops(facts, [4], 2, lora=True, causal=True) == 4 * 1000 * 4 + 6 * 10 * 4 + 4 * 100 * 2 + 6 * 6 * 16
    split, joined = (rates.step_flops(facts, lengths, 2, lora=True, causal=True) for lengths in ([2, 2], [4]))
    assert joined - split == 6 * 6 * (16 - 8)


def test_made_rows_are_the_same_each_time_and_masked_as_asked():
    work = workloads.tiny(workloads.WORKLOADS["llama-3.2-1b-lora-chat"])
    rows = workloads.made_rows(work, 20)
    assert rows == workloads.made_rows(work, 20) and rows != workloads.made_rows(work, 20, seed=1)
    lengths = [len(row["input_ids"]) for row in rows]
    assert max(lengths) <= work.sequence and len(set(lengths)) > 5
    kept = sum(label != -100 for row in rows for label in row["labels"]) / sum(lengths)
    assert kept == pytest.approx(1 - work.masked, abs=0.05)
    batch = pad(rows[:3])
    assert int(batch["attention_mask"].sum()) == sum(lengths[:3])
    assert all(row["input_ids"] == batch["input_ids"][number, : len(row["input_ids"])].tolist()
               and (batch["labels"][number, len(row["input_ids"]):] == -100).all() for number, row in enumerate(rows[:3]))


def test_every_workload_names_variants_that_exist():
    for work in workloads.WORKLOADS.values():
        assert set(work.variants) <= set(VARIANTS) and work.reference in work.variants
