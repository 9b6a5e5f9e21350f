"""A trainer for each library, on the same rows in the same order; built inside a measured process.

Each function takes (workload, folder, steps, loaded), calls `loaded(model)` when the model is there (memory counts from
then on) and returns (trainer, context to train in). Peers get what their documentation shows, or their best switches.
"""

import contextlib
import importlib
import inspect
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .workloads import IGNORE, Workload, random_model

LORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0}
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Loaded = Callable[[Any], None]
Built = tuple[Any, contextlib.AbstractContextManager]


class Missing(Exception):
    """Something that this variant needs is not on this machine."""


def need(*names: str) -> None:
    """Raise `Missing` for the first package of `names` that cannot be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise Missing(f"{name} is not installed here ({error})") from None


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "rows.json").read_text())


def dataset_of(rows: list[dict[str, Any]]) -> Any:
    need("datasets")
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(rows)


def arguments(work: Workload, steps: int, **more: Any) -> dict[str, Any]:
    """Return the training arguments that all variants share: rows in order, no warm-up; the optimizer is each library's own choice, AdamW."""
    return {"output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": work.rows_per_step, "max_steps": steps,
            "learning_rate": work.learning_rate, "lr_scheduler_type": "constant", "weight_decay": 0.01,
            "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 3407,
            "train_sampling_strategy": "sequential", **({"use_cpu": True} if work.device == "cpu" else {}), **more}


def pad(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lay rows one under the other, padded on the right; labels may be one number a row."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, filler: int) -> Any:
        return torch.tensor([[*row[name], *[filler] * (longest - len(row[name]))] for row in rows])

    masks = [{"mask": [1] * len(row["input_ids"])} for row in rows]
    attention = torch.tensor([[*row["mask"], *[0] * (longest - len(row["mask"]))] for row in masks])
    labels = filled("labels", IGNORE) if isinstance(rows[0]["labels"], list) else torch.tensor([row["labels"] for row in rows])
    return {"input_ids": filled("input_ids", 0), "attention_mask": attention, "labels": labels}


def load(work: Workload, folder: Path, dtype: str) -> Any:
    """Load the workload's model as transformers does; 4-bit where the workload asks for it."""
    import torch
    import transformers

    auto = {"llm": transformers.AutoModelForCausalLM, "bert": transformers.AutoModelForSequenceClassification,
            "mllm": transformers.AutoModelForImageTextToText}[work.family]
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    if work.quantised:
        need("bitsandbytes")
        options |= {"quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16)}
    if not (folder / "model" / "config.json").is_file():  # a GPU's models are drawn on the GPU, and never written
        return random_model(work, work.device).to(options["dtype"])
    return auto.from_pretrained(folder / "model", device_map={"": work.device}, **options)


def adapt(work: Workload, model: Any) -> Any:
    """Put LoRA on all linear layers, drawn from the seed that all variants use; or train all weights."""
    if not work.lora:
        return model.train()
    need("peft")
    import peft
    import torch

    if work.quantised:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=work.checkpointing)
    torch.manual_seed(3407)
    return peft.get_peft_model(model, peft.LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM"))


def checkpointing(work: Workload) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}
            } if work.checkpointing else {}


def transformers_trainer(work: Workload, folder: Path, steps: int, loaded: Loaded, *, dtype: str = "bfloat16",
                         liger: bool = False, **switches: Any) -> Built:
    """transformers' own `Trainer`, rows padded to the longest of the batch."""
    from transformers import Trainer, TrainingArguments

    if liger:
        need("liger_kernel")
        if work.device != "cuda":
            raise Missing("Liger's kernels need a CUDA GPU")
    model = adapt(work, load(work, folder, dtype))
    loaded(model)
    if work.lora and work.checkpointing:
        model.enable_input_require_grads()
    args = TrainingArguments(**arguments(work, steps, remove_unused_columns=False, use_liger_kernel=liger,
                                         **checkpointing(work), **switches))
    rows = rows_of(folder)
    if switches.get("train_sampling_strategy") == "group_by_length":
        rows = dataset_of([row | {"length": len(row["input_ids"])} for row in rows])
    return Trainer(model=model, args=args, train_dataset=rows, data_collator=pad), contextlib.nullcontext()


def trl_trainer(work: Workload, folder: Path, steps: int, loaded: Loaded, *, dtype: str = "float32", **switches: Any) -> Built:
    """TRL's `SFTTrainer`: a model by path is loaded in float32, and trained with bf16 autocast and checkpointing."""
    need("trl", "datasets", "peft")
    import peft
    from transformers import AutoProcessor, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = load(work, folder, dtype)
    loaded(model)
    if work.checkpointing:
        switches = {**switches, "gradient_checkpointing": True}
    shared = arguments(work, steps, shuffle_dataset=False, max_length=None, **switches)
    extra: dict[str, Any] = {}
    if work.family == "mllm":
        extra["processing_class"] = AutoProcessor.from_pretrained(folder / "model")
        dataset, shared["assistant_only_loss"] = with_images(rows_of(folder), folder), True
    else:
        extra["processing_class"] = AutoTokenizer.from_pretrained(folder / "model")
        dataset = dataset_of(rows_of(folder))
        extra["peft_config"] = peft.LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(model=model, args=SFTConfig(**shared), train_dataset=dataset, **extra), contextlib.nullcontext()


def with_images(rows: list[dict[str, Any]], folder: Path) -> Any:
    """Return rows of messages with their images, as `datasets` hands them out."""
    dataset = dataset_of([{"messages": row["messages"], "images": [str(folder / "images" / row["image"])]} for row in rows])
    import datasets

    return dataset.cast_column("images", datasets.Sequence(datasets.Image()))


def unsloth_trainer(work: Workload, folder: Path, steps: int, loaded: Loaded) -> Built:
    """Unsloth as its notebooks use it: its loader, its adapter with its own checkpointing, TRL's trainer as it patches it."""
    need("unsloth")
    import torch
    import unsloth
    from trl import SFTConfig, SFTTrainer

    if not (folder / "model" / "config.json").is_file():
        raise Missing("Unsloth loads from a folder, and this workload's weights were not written")
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        str(folder / "model"), max_seq_length=work.sequence, dtype=torch.bfloat16, load_in_4bit=work.quantised)
    model = unsloth.FastLanguageModel.get_peft_model(
        model, **LORA, target_modules=PARTS, bias="none", use_gradient_checkpointing="unsloth", random_state=3407)
    loaded(model)
    args = SFTConfig(**arguments(work, steps, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
                                 max_length=work.sequence))
    return SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset_of(rows_of(folder)), args=args,
                      data_collator=pad), contextlib.nullcontext()


def ours(work: Workload, folder: Path, steps: int, loaded: Loaded, *, kernels: str = "own", **switches: Any) -> Built:
    """`supertrainer` as it comes: its loader, its batching without padding, its trainer; `kernels="off"`: all plain."""
    need("peft")
    if kernels == "liger":
        need("liger_kernel")
    if not (folder / "model" / "config.json").is_file() or not _has("trl", "datasets"):
        return _ours_without_trl(work, folder, steps, loaded, kernels)
    from supertrainer.trainers.base import build_trainer

    model, processor, dataset, collate, extra = {"llm": _our_chats, "bert": _our_texts, "mllm": _our_images}[work.family](
        work, folder, loaded, kernels)
    kwargs = {key: value for key, value in arguments(work, steps, **checkpointing(work), **switches).items()
              if key not in ("output_dir", "use_cpu")}
    trainer = build_trainer(work.family, model=model, processing_class=processor, train_dataset=dataset, data_collator=collate,
                            output_dir=tempfile.mkdtemp(), training_kwargs=kwargs, **extra)
    return trainer, contextlib.nullcontext()


def _has(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def _our_chats(work: Workload, folder: Path, loaded: Loaded, kernels: str) -> tuple:
    from supertrainer.data.collate import collator_for
    from supertrainer.models.llm import FastLLM

    options = {"load_in_4bit": True} if work.quantised else {}
    model, tokenizer = FastLLM.from_pretrained(str(folder / "model"), device=work.device, kernels=kernels, **options)
    model = FastLLM.get_peft_model(model, **LORA, random_state=3407, use_gradient_checkpointing=work.checkpointing)
    loaded(model)
    rows = dataset_of([row | {"length": len(row["input_ids"])} for row in rows_of(folder)])
    return model, tokenizer, rows, collator_for("padding_free", model, tokenizer.pad_token_id), {}


def _our_texts(work: Workload, folder: Path, loaded: Loaded, kernels: str) -> tuple:
    from supertrainer.data import bert
    from supertrainer.models.bert import FastBERT

    model, tokenizer = FastBERT.from_pretrained(str(folder / "model"), full_finetuning=True, device=work.device, kernels=kernels)
    loaded(FastBERT.for_training(model))
    rows = dataset_of([row | {"length": len(row["input_ids"])} for row in rows_of(folder)])
    return model, tokenizer, rows, bert.collator(tokenizer, "classification"), {}


def _our_images(work: Workload, folder: Path, loaded: Loaded, kernels: str) -> tuple:
    from supertrainer.data.vision_batch import VisionCollator
    from supertrainer.models.mllm import FastMLLM

    model, processor = FastMLLM.from_pretrained(str(folder / "model"), full_finetuning=True, device=work.device, kernels=kernels)
    loaded(FastMLLM.for_training(model))
    rows = with_images(rows_of(folder), folder)
    collate = VisionCollator(processor, image_column="images", max_length=work.sequence, train_on="assistant")
    return model, processor, rows, collate, {"image_column": "images"}


def _ours_without_trl(work: Workload, folder: Path, steps: int, loaded: Loaded, kernels: str) -> Built:
    """The same kernels, loss and batches on transformers' own trainer, where TRL or datasets are not installed."""
    from transformers import Trainer, TrainingArguments

    from supertrainer.data.collate import collator_for
    from supertrainer.patching import masked_loss, patches
    from supertrainer.trainers.base import HouseRules

    class MaskedTrainer(HouseRules, Trainer):
        model_accepts_loss_kwargs = True

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
                         num_items_in_batch: Any = None) -> Any:
            return masked_loss(model, {**inputs, "use_cache": False}, num_items_in_batch)

    model = adapt(work, load(work, folder, "bfloat16"))
    loaded(model)
    if work.checkpointing:
        model.enable_input_require_grads()
    rows, collate = rows_of(folder), collator_for("padding_free", model, 0)
    patches(model).kernels = kernels
    args = TrainingArguments(**arguments(work, steps, remove_unused_columns=False, **checkpointing(work)))
    trainer = MaskedTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.model_accepts_loss_kwargs = True
    return trainer, contextlib.nullcontext()


GROUPED = {"train_sampling_strategy": "group_by_length"}
FAST = {"gradient_checkpointing": False, "bf16": False}
VARIANTS: dict[str, Callable[..., Built]] = {
    "transformers": transformers_trainer,
    "transformers-fp32": partial(transformers_trainer, dtype="float32"),
    "transformers-bf16": transformers_trainer,
    "transformers-amp": partial(transformers_trainer, dtype="float32", bf16=True),
    "transformers-grouped": partial(transformers_trainer, dtype="float32", bf16=True, **GROUPED),
    "transformers-liger": partial(transformers_trainer, liger=True),
    "trl": trl_trainer,
    "trl-fp32": partial(trl_trainer, **FAST),
    "trl-bf16": partial(trl_trainer, dtype="bfloat16", **FAST),
    "trl-packed": partial(trl_trainer, dtype="bfloat16", padding_free=True, **FAST),
    "unsloth": unsloth_trainer,
    "ours": ours,
    "ours-off": partial(ours, kernels="off"),
    "ours-liger": partial(ours, kernels="liger"),
    "ours-bf16": partial(ours, bf16=True),
    "ours-grouped": partial(ours, **GROUPED),
}


def described(variant: str) -> str:
    """Return what a variant is, in a line."""
    function = VARIANTS[variant]
    settings = function.keywords if isinstance(function, partial) else {}
    text = inspect.getdoc(getattr(function, "func", function)).splitlines()[0]
    return text + (f" [{', '.join(f'{key}={value}' for key, value in settings.items())}]" if settings else "")
