"""What is trained: model, rows, how many of them make a step, and which variants are measured on it.

`prepare` writes a workload once, as files that every library can read: `rows.json` (token ids and labels, the same for
all), `model/` (weights and tokenizer, where a variant reads them from a folder) and, for images, `images/`.
"""

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

IGNORE = -100
LLAMA = {"model_type": "llama", "rope_theta": 500_000.0, "max_position_embeddings": 131_072}
CPU_TEXT = ("transformers-fp32", "transformers-bf16", "trl", "trl-bf16", "trl-packed", "unsloth", "ours-off", "ours")
GPU_TEXT = ("transformers", "transformers-liger", "trl", "trl-bf16", "unsloth", "ours-off", "ours-liger", "ours")


@dataclass(frozen=True)
class Workload:
    """One line of the plan.

    Args:
        name: as it is asked for on the command line.
        title: as it is printed.
        shape: keys of the transformers configuration, for random weights; empty: `source` names a packaged model.
        source: a model that `supertrainer` loads by name.
        family: `llm`, `bert` or `mllm`.
        rows_per_step: rows of an optimizer step.
        sequence: longest row, in tokens.
        lengths: `full`: every row has `sequence` tokens; `chat`: drawn like chats (log-normal, median a fifth of
            `sequence`, cut there); `real`: as the rows are.
        masked: share of tokens without loss, at the beginning of each row; for rows that are made here.
        quantised: the frozen weights are in 4 bit (QLoRA).
        checkpointing: every variant computes activations again in the backward pass.
        device: `cpu` or `cuda`.
        variants: see `variants.VARIANTS`.
        reference: the variant whose loss curve the others are compared with.
    """

    name: str
    title: str
    shape: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    family: str = "llm"
    rows_per_step: int = 2
    sequence: int = 512
    lengths: str = "full"
    masked: float = 0.7
    quantised: bool = False
    checkpointing: bool = False
    learning_rate: float = 5e-4
    device: str = "cpu"
    variants: tuple[str, ...] = CPU_TEXT
    reference: str = "transformers-bf16"

    @property
    def lora(self) -> bool:
        """Whether an adapter is trained; otherwise all weights are."""
        return self.family == "llm"


GPU_SHAPES = {
    "llama-3.2-1b": LLAMA | {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                             "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
                             "tie_word_embeddings": True},
    "qwen3-4b": {"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728,
                 "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                 "max_position_embeddings": 40_960, "rope_theta": 1_000_000.0, "tie_word_embeddings": True},
    "llama-3.1-8b": LLAMA | {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
                             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                             "tie_word_embeddings": False},
}


def gpu_workloads() -> list[Workload]:
    """Return shape x (bf16 LoRA, QLoRA) x (2,048, 8,192 tokens), and chat-length rows for the smallest."""
    found = []
    for shape, values in GPU_SHAPES.items():
        for quantised in (False, True):
            for sequence in (2048, 8192):
                way = "QLoRA" if quantised else "bf16 LoRA"
                found.append(Workload(
                    f"{shape}-{'qlora' if quantised else 'lora'}-{sequence}", f"{shape}, {way} r=16, rows of {sequence:,} tokens",
                    shape=values, rows_per_step=16_384 // sequence, sequence=sequence, masked=0.5, quantised=quantised,
                    checkpointing=True, device="cuda", variants=GPU_TEXT, reference="transformers"))
    chats = replace(found[0], name="llama-3.2-1b-lora-chat", title="llama-3.2-1b, bf16 LoRA r=16, rows as long as chats, up "
                    "to 2,048 tokens", rows_per_step=32, lengths="chat")
    return [*found, chats]


WORKLOADS = {work.name: work for work in [
    Workload("random", "random weights, vocabulary 128k, hidden 512, 6 layers, 70 % masked, 2 x 512 tokens, LoRA r=16",
             shape=LLAMA | {"vocab_size": 128_000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6,
                            "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 2048,
                            "tie_word_embeddings": False}),
    Workload("smollm2", "SmolLM2-135M-Instruct on the standard-library chat, LoRA r=16 on all linear layers, 16 rows",
             source="smollm2", rows_per_step=16, sequence=256, lengths="real"),
    Workload("minilm", "all-MiniLM-L6-v2, full fine-tuning, standard-library texts in 12 classes, 16 rows", source="minilm",
             family="bert", rows_per_step=16, sequence=128, lengths="real", learning_rate=1e-4,
             variants=("transformers-fp32", "transformers-amp", "transformers-grouped", "ours-off", "ours", "ours-bf16",
                       "ours-grouped"), reference="transformers-fp32"),
    Workload("digits", "tiny Idefics3 on the handwritten digits, full fine-tuning, 32 rows", source="tiny_idefics3",
             family="mllm", rows_per_step=32, sequence=128, lengths="real", learning_rate=2e-3,
             variants=("trl", "trl-fp32", "trl-bf16", "ours-off", "ours", "ours-bf16"), reference="trl-fp32"),
    *gpu_workloads()]}
TINY = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}


def tiny(work: Workload) -> Workload:
    """Return a copy that runs in seconds on a CPU; for tests, and to try the code of a GPU workload."""
    return replace(work, shape={**work.shape, **TINY} if work.shape else {}, rows_per_step=2, sequence=48, device="cpu",
                   quantised=False)


def made_rows(work: Workload, steps: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Return rows of random tokens for `steps` steps; the first `masked` share of each carries no loss."""
    rng = random.Random(seed)
    rows = []
    for _ in range(steps * work.rows_per_step):
        length = work.sequence
        if work.lengths == "chat":
            length = max(8, min(work.sequence, round(work.sequence / 5 * rng.lognormvariate(0.0, 0.8))))
        ids = [rng.randrange(3, work.shape["vocab_size"]) for _ in range(length)]
        without = round(length * work.masked)
        rows.append({"input_ids": ids, "labels": [IGNORE] * without + ids[without:]})
    return rows


def plain_tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer of numbered words, for random weights: trainers ask for one, and for its padding token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, min(vocab_size, 1000))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>",
                                   bos_token="<s>", eos_token="</s>")


def random_model(work: Workload, device: str = "cpu") -> Any:
    """Return the model of `work.shape` in bfloat16, the same weights on every call (on one kind of device)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **work.shape}
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.bfloat16)


def prepare(work: Workload, folder: Path, steps: int, needs_weights: bool) -> None:
    """Write rows for `steps` steps, and the model's folder where that is needed, under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not work.source:
        rows = made_rows(work, steps)
        plain_tokenizer(work.shape["vocab_size"]).save_pretrained(folder / "model")
        if needs_weights:
            random_model(work, work.device).save_pretrained(folder / "model")
    else:
        rows = {"llm": _chats, "bert": _texts, "mllm": _images}[work.family](work, folder, steps)
    (folder / "rows.json").write_text(json.dumps(rows))


def _recipe(work: Workload, experiment: str, *overrides: str) -> tuple[Any, Any, Any, Any]:
    """Return (configuration, splits, processor, prepared rows) as `supertrainer` itself makes them."""
    from supertrainer.config import compose
    from supertrainer.run import recipes

    cfg = compose(experiment, f"dataset.max_length={work.sequence}", f"model.name={work.source}", *overrides)
    splits = recipes.read_splits(cfg)
    processor = recipes.load_tokenizer(cfg, splits)
    return cfg, splits, processor, recipes.prepare(cfg, splits, processor)


def _first(rows: Any, count: int, seed: int = 0) -> list[int]:
    """Return `count` row numbers, drawn once and again from the start where there are fewer rows."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [order[number % len(order)] for number in range(count)]


def _chats(work: Workload, folder: Path, steps: int) -> list[dict]:
    """Save the packaged chat model in bfloat16; return the chat rows as tokens, loss on the answers only."""
    from supertrainer.models.llm import FastLLM

    _, _, tokenizer, prepared = _recipe(work, "train_llm")
    model, _ = FastLLM.from_pretrained(work.source, dtype="bfloat16", device="cpu")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = prepared.rows
    order = _first(rows, steps * work.rows_per_step)
    # some step of every epoch holds the longest row, and decides what a padded batch needs at most: here it is the third
    order[min(2, steps - 1) * work.rows_per_step] = max(range(len(rows)), key=lambda number: rows[number]["length"])
    return [{key: list(rows[number][key]) for key in ("input_ids", "labels")} for number in order]


def _texts(work: Workload, folder: Path, steps: int) -> list[dict]:
    """Save the packaged encoder with a new head in float32; return its rows as tokens."""
    from supertrainer.models.bert import FastBERT

    _, splits, tokenizer, prepared = _recipe(work, "train_bert", "model=minilm" if work.source == "minilm" else "model=tiny_bert")
    from supertrainer.data.base import training_texts

    extra = {} if work.source == "minilm" else {"texts": training_texts(splits), "processor": tokenizer}
    model, _ = FastBERT.from_pretrained(work.source, labels=list(splits.labels), dtype="float32", device="cpu", **extra)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = prepared.train
    return [{"input_ids": list(rows[number]["input_ids"]), "labels": int(rows[number]["labels"])}
            for number in _first(rows, steps * work.rows_per_step)]


def _images(work: Workload, folder: Path, steps: int) -> list[dict]:
    """Save the built-in vision-language model, and images as PNG; return messages with the files' names."""
    from supertrainer.data.base import training_texts
    from supertrainer.models.mllm import FastMLLM

    _, splits, processor, _ = _recipe(work, "train_mllm")
    model, _ = FastMLLM.from_pretrained(work.source, texts=training_texts(splits), processor=processor, device="cpu")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for number in _first(splits.train, steps * work.rows_per_step):
        row = splits.train[number]
        picture, name = row[splits.columns["image"]], f"{number}.png"
        (picture[0] if isinstance(picture, list) else picture).save(folder / "images" / name)
        rows.append({"messages": row["messages"], "image": name})
    return rows
