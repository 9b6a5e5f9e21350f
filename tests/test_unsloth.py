"""Notebooks in Unsloth's style, in our own words, on tiny local models: they run to the end, and learn what they should."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image, ImageDraw

from supertrainer import unsloth
from supertrainer.models import adapters
from supertrainer.models.base import FastModel as OurModel
from supertrainer.models.info import info
from supertrainer.models.parts import linear_parts
from supertrainer.patching import plain
from supertrainer.runtime import Decision, UserError
from supertrainer.unsloth import (
    FastLanguageModel,
    FastModel,
    FastVisionModel,
    SFTConfig,
    SFTTrainer,
    TextStreamer,
    UnslothTrainer,
    UnslothTrainingArguments,
    UnslothVisionDataCollator,
    arguments,
    get_chat_template,
    is_bf16_supported,
    is_bfloat16_supported,
    models,
    standardize_data_formats,
    standardize_sharegpt,
    train_on_responses_only,
    trainer,
    vision,
)

WORDS = ["What is two and two?", "It is four.", "Name a colour, please.", "Red is one.", "Be brief.", "Once upon a time"] * 8
sys.path.insert(0, str(Path(__file__).parent))
import tiny_vision  # noqa: E402

PARTS = ("<|im_start|>user\n", "<|im_start|>assistant\n")


def share(number, turns=2):
    """A conversation as ShareGPT exports it."""
    said = [{"from": "human" if turn % 2 == 0 else "gpt", "value": f"{WORDS[turn % 4]} {number}"} for turn in range(turns)]
    return [{"from": "system", "value": "Be brief."}, *said]


def change(before, model):
    """The names of the parameters that differ from `before`."""
    return {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def spoken(tokenizer, labels):
    """The text of each unbroken stretch of one row's labels."""
    runs, inside = [], False
    for label in labels.tolist():
        if label != -100:
            runs = [*runs, []] if not inside else runs
            runs[-1].append(label)
        inside = label != -100
    return [tokenizer.decode(run) for run in runs]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer, as a download would leave them."""
    folder = tmp_path_factory.mktemp("llama")
    model, tokenizer = OurModel.from_pretrained("tiny_llama", texts=WORDS, config={"hidden_size": 32, "num_hidden_layers": 2})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def idefics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idefics")
    model, processor = OurModel.from_pretrained("tiny_idefics3", texts=WORDS)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


# --- notebook 1: a chat model learns answers ---


@pytest.mark.parametrize("speed", [None, 90.0, 400.0], ids=["this machine", "bfloat16 slow", "bfloat16 fast"])
def test_chat_lora_on_responses_then_reload_and_continue(llama, in_tmp, capsys, monkeypatch, speed):
    if speed is not None and not torch.cuda.is_available():
        monkeypatch.setattr("supertrainer.runtime._cpu_rates", {"float32": 100.0, "bfloat16": speed})
    max_seq_length = 128
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=llama, max_seq_length=max_seq_length, dtype=None, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(
        model, r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth", random_state=3407,
        use_rslora=False, loftq_config=None)
    tokenizer = get_chat_template(tokenizer, chat_template="chatml")
    dataset = Dataset.from_dict({"conversations": [share(number, 2 + 2 * (number % 2)) for number in range(8)]})
    dataset = standardize_sharegpt(dataset)

    def formatting_prompts_func(examples):
        texts = [tokenizer.apply_chat_template(convo, tokenize=False, add_generation_prompt=False)
                 for convo in examples["conversations"]]
        return {"text": texts}

    dataset = dataset.map(formatting_prompts_func, batched=True)
    run = SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=dataset, dataset_text_field="text", max_seq_length=max_seq_length,
        dataset_num_proc=1, packing=False,
        args=SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2, warmup_steps=1, max_steps=2,
                       learning_rate=2e-3, fp16=not is_bf16_supported(), bf16=is_bf16_supported(), logging_steps=1,
                       optim="adamw_8bit", weight_decay=0.01, lr_scheduler_type="linear", seed=3407, output_dir="outputs",
                       report_to="none"))
    run = train_on_responses_only(run, instruction_part=PARTS[0], response_part=PARTS[1])
    for row, source in zip(run.train_dataset, dataset, strict=True):
        answers = [turn["content"] for turn in source["conversations"] if turn["role"] == "assistant"]
        assert spoken(tokenizer, torch.tensor(row["labels"])) == [f"{answer}<|im_end|>" for answer in answers]
    assert adapters.is_checkpointing(model)
    before = snapshot(model)
    assert {value.dtype for name, value in before.items() if "lora_" not in name} == {
        torch.bfloat16 if is_bf16_supported() else torch.float32 if not torch.cuda.is_available() else torch.float16}
    stats = run.train()
    assert stats.global_step == 2 and stats.training_loss > 0
    changed = change(before, model)
    assert changed and all("lora_" in name for name in changed)

    FastLanguageModel.for_inference(model)
    assert tokenizer.padding_side == "left" and not model.training
    messages = [{"role": "user", "content": "What is two and two?"}]
    inputs = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_tensors="pt").to("cuda")
    capsys.readouterr()
    tokens = model.generate(input_ids=inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=6,
                            use_cache=True, do_sample=False)
    streamed = capsys.readouterr().out.strip()
    prompt = inputs["input_ids"].shape[1]
    assert streamed == tokenizer.decode(tokens[0, prompt:]).strip()
    again = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, again)

    model.save_pretrained("lora_model")
    tokenizer.save_pretrained("lora_model")
    loaded, loaded_tokenizer = FastLanguageModel.from_pretrained("lora_model", max_seq_length=max_seq_length)
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    with torch.no_grad():
        ids = inputs["input_ids"]
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=2e-2, rtol=0)
    before = snapshot(loaded)
    more = SFTTrainer(model=loaded, tokenizer=loaded_tokenizer, train_dataset=dataset, dataset_text_field="text",
                      args=SFTConfig(output_dir="more", max_steps=1, learning_rate=1e-2, save_strategy="no", warmup_steps=0))
    assert more.train().global_step == 1 and change(before, loaded)


def test_merged_model_is_saved_as_notebooks_do(llama, in_tmp):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    model.save_pretrained_merged("merged", tokenizer, save_method="merged_16bit")
    merged, _ = FastLanguageModel.from_pretrained("merged", dtype="float32")
    ids = torch.arange(10)[None] + 5
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, atol=0.05, rtol=0.05)


# --- notebook 2: a vision model learns to read a formula, or here: a colour ---


def pictures():
    rows = []
    for number, colour in enumerate(("red", "green", "blue", "white")):
        picture = Image.new("RGB", (64, 64), "black")
        ImageDraw.Draw(picture).rectangle((8, 8, 40, 8 + 12 * number), fill=colour)
        rows.append({"image": picture, "text": f"It is {colour}."})
    return rows


def convert_to_conversation(sample):
    return {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Name a colour, please."}, {"type": "image", "image": sample["image"]}]},
        {"role": "assistant", "content": [{"type": "text", "text": sample["text"]}]}]}


def test_vision_lora(idefics, in_tmp):
    model, tokenizer = FastVisionModel.from_pretrained(idefics, load_in_4bit=False, use_gradient_checkpointing="unsloth")
    model = FastVisionModel.get_peft_model(
        model, finetune_vision_layers=True, finetune_language_layers=True, finetune_attention_modules=True,
        finetune_mlp_modules=True, r=8, lora_alpha=8, lora_dropout=0, bias="none", random_state=3407, use_rslora=False,
        loftq_config=None)
    converted = [convert_to_conversation(sample) for sample in pictures()]
    FastVisionModel.for_training(model)
    run = SFTTrainer(
        model=model, tokenizer=tokenizer, data_collator=UnslothVisionDataCollator(model, tokenizer), train_dataset=converted,
        eval_dataset=converted[:2], args=SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=1, warmup_steps=0, max_steps=2,
                       learning_rate=2e-3, logging_steps=1, optim="adamw_8bit", weight_decay=0.01, lr_scheduler_type="linear",
                       seed=3407, output_dir="outputs", report_to="none", remove_unused_columns=False, dataset_text_field="",
                       dataset_kwargs={"skip_prepare_dataset": True}, max_length=512))
    assert run.train_dataset is converted and adapters.is_checkpointing(model)
    before = snapshot(model)
    assert run.train().global_step == 2
    changed = change(before, model)
    assert any("vision_model" in name for name in changed) and any("text_model" in name for name in changed)
    assert all("lora_" in name for name in changed)
    assert run.evaluate()["eval_loss"] > 0 and "forward" not in model.get_base_model().__dict__
    assert run.train().global_step == 2  # a notebook's cell may be run again

    FastVisionModel.for_inference(model)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Name a colour, please."}]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    inputs = tokenizer(pictures()[0]["image"], text, add_special_tokens=False, return_tensors="pt").to("cuda")
    tokens = model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=4, use_cache=True)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]
    model.save_pretrained("lora_model")
    tokenizer.save_pretrained("lora_model")
    loaded, _ = FastVisionModel.from_pretrained("lora_model")
    with torch.no_grad(), plain(model), plain(loaded):  # kernels of the house round otherwise in bfloat16
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("switches", "towers", "kinds"), [
    ({"finetune_vision_layers": False}, {"text_model"}, {"self_attn", "mlp"}),
    ({"finetune_language_layers": False}, {"vision_model"}, {"self_attn", "mlp"}),
    ({"finetune_attention_modules": False}, {"text_model", "vision_model"}, {"mlp"}),
    ({"finetune_mlp_modules": False}, {"text_model", "vision_model"}, {"self_attn"}),
    ({"finetune_vision_layers": False, "finetune_mlp_modules": False, "target_modules": "all-linear"}, {"text_model"},
     {"self_attn"}),
    ({"finetune_vision_layers": False, "target_modules": ["q_proj", "fc1"]}, {"text_model"}, {"self_attn"}),
])
def test_only_the_chosen_parts_get_an_adapter(idefics, switches, towers, kinds):
    model, _ = FastVisionModel.from_pretrained(idefics)
    model = FastVisionModel.get_peft_model(model, r=2, **switches)
    trained = [name.split(".") for name, value in model.named_parameters() if value.requires_grad]
    assert {part for path in trained for part in ("text_model", "vision_model", "connector", "lm_head") if part in path} == towers
    assert {part for path in trained for part in ("self_attn", "mlp") if part in path} == kinds


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava", "gemma3", "paligemma"])
def test_towers_of_other_families(family):
    model = tiny_vision.model_of(family)
    parts = linear_parts(model)
    for path, (tower, _) in parts.items():
        assert (tower == "vision") == ("vision" in path or "visual" in path), path
    assert {tower for tower, _ in parts.values()} == {"vision", "language"}
    assert {kind for tower, kind in parts.values() if tower == "language"} == {"attention", "mlp"}
    assert not [path for path in parts if "projector" in path or path == "lm_head"]


# --- notebook 3: continued pretraining on raw text ---


def test_raw_text_with_a_rate_for_embeddings(llama, in_tmp):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=128, dtype="float32")
    model = FastLanguageModel.get_peft_model(
        model, r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                                    "embed_tokens", "lm_head"],
        lora_alpha=32, use_gradient_checkpointing=True, random_state=3407, use_rslora=True)
    end = tokenizer.eos_token
    dataset = Dataset.from_dict({"text": [f"Once upon a time, {number}." for number in range(8)]})
    dataset = dataset.map(lambda rows: {"text": [text + end for text in rows["text"]]}, batched=True)
    run = UnslothTrainer(
        model=model, tokenizer=tokenizer, train_dataset=dataset, dataset_text_field="text", max_seq_length=128,
        args=UnslothTrainingArguments(per_device_train_batch_size=2, max_steps=2, warmup_steps=0, learning_rate=5e-3,
                                      embedding_learning_rate=1e-3, lr_scheduler_type="constant", optim="adamw_torch",
                                      logging_steps=1, output_dir="outputs", report_to="none", save_strategy="no"))
    before = snapshot(model)
    run.train()
    rates = {id(weight): group["lr"] for group in run.optimizer.param_groups for weight in group["params"]}
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert set(rates) == {id(value) for value in trained.values()}  # every weight in one group, none twice
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(rates)
    for name, value in trained.items():
        assert rates[id(value)] == (1e-3 if "modules_to_save" in name else 5e-3), name
    changed = change(before, model)
    assert any("embed_tokens" in name for name in changed) and any("lm_head" in name for name in changed)
    # Adam's first steps are as long as the rate: the largest move of a weight says which rate moved it
    moved = {name: (value - before[name]).abs().max().item() for name, value in trained.items()}
    assert all(move <= 2.1e-3 for name, move in moved.items() if "modules_to_save" in name)
    assert max(move for name, move in moved.items() if "lora_B" in name) > 5e-3


def test_a_rate_for_embeddings_that_are_frozen_is_an_error(llama, in_tmp):
    model, tokenizer = FastLanguageModel.from_pretrained(llama)
    model = FastLanguageModel.get_peft_model(model, r=2)
    run = UnslothTrainer(model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict({"text": WORDS[:4]}),
                         args=UnslothTrainingArguments("out", max_steps=1, embedding_learning_rate=1e-5, save_strategy="no"))
    with pytest.raises(UserError, match="embedding_learning_rate=1e-05 has nothing to act on"):
        run.train()


# --- the collator's labels, by hand ---


def test_vision_labels_by_hand(idefics):
    model, processor = FastVisionModel.from_pretrained(idefics)
    rows = [convert_to_conversation(sample) for sample in pictures()[:2]]
    rows[1]["messages"] += [{"role": "user", "content": [{"type": "text", "text": "Be brief."}]},
                            {"role": "assistant", "content": [{"type": "text", "text": "Red is one."}]}]
    answers = [["It is red.<|im_end|>"], ["It is green.<|im_end|>", "Red is one.<|im_end|>"]]
    tokenizer = processor.tokenizer
    for options in ({}, {"instruction_part": PARTS[0], "response_part": PARTS[1]}):
        batch = UnslothVisionDataCollator(model, processor, train_on_responses_only=True, **options)(rows)
        assert [spoken(tokenizer, labels) for labels in batch["labels"]] == answers
        assert batch["pixel_values"].shape[0] == 2

    batch = UnslothVisionDataCollator(model, processor)(rows)
    picture = {tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<fake_token_around_image>", "<global-img>")}
    for ids, mask, labels in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist(),
                                 strict=True):
        assert labels == [-100 if not seen or token in picture else token for token, seen in zip(ids, mask, strict=True)]
    images = processor(images=[[row["messages"][0]["content"][1]["image"]] for row in rows],
                       text=["<image>", "<image>"], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], images)


def test_vision_rows_keep_the_order_of_their_images(idefics):
    first, second = (sample["image"] for sample in pictures()[:2])
    parts = [{"type": "image", "image": first}, {"type": "text", "text": "and"}, {"type": "image", "image": second, "text": None}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]}
    lifted = vision.lift_images(row)
    assert lifted["images"] == [first, second] and "images" not in row and parts[0]["image"] is first
    with pytest.raises(UserError, match="1 of 2 image parts"):
        vision.lift_images({"messages": [{"role": "user", "content": [{"type": "image"}, parts[0]]}]})
    with pytest.raises(UserError, match="resize='max'"):
        UnslothVisionDataCollator(*FastVisionModel.from_pretrained(idefics), resize="max")


def test_vision_trainer_learns_what_the_labels_say(idefics, in_tmp):
    """One step's loss is the mean cross-entropy over the labels computed by hand, before the step."""
    model, processor = FastVisionModel.from_pretrained(idefics, dtype="float32")
    rows = [convert_to_conversation(sample) for sample in pictures()[:2]]
    collator = UnslothVisionDataCollator(model, processor)
    run = SFTTrainer(model=model, tokenizer=processor, data_collator=collator, train_dataset=rows, args=SFTConfig(
        "out", per_device_train_batch_size=2, max_steps=1, learning_rate=1e-3, save_strategy="no", warmup_steps=0))
    run = train_on_responses_only(run, *PARTS)
    batch = collator(rows)
    with torch.no_grad():
        logits = model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert run.train().training_loss == pytest.approx(expected.item(), rel=1e-4)


# --- number types, devices, arguments ---


def test_flags_this_machine_cannot_honour(monkeypatch, in_tmp, caplog):
    monkeypatch.setattr(arguments, "choose_device", lambda wanted: Decision("device", "cpu", ""))
    monkeypatch.setattr(arguments, "is_bfloat16_supported", lambda: False)
    with pytest.raises(UserError, match="fp16=True needs a CUDA GPU"):
        SFTConfig("out", fp16=True)
    with pytest.raises(UserError, match="bf16=True cannot be honoured"):
        SFTConfig("out", bf16=True)
    args = SFTConfig("out", fp16=True, bf16=False)  # what `not is_bfloat16_supported()` gives
    assert not args.fp16 and not args.bf16 and args.use_cpu
    args = SFTConfig("out")
    assert not args.bf16 and args.use_cpu and args.report_to == [] and not args.gradient_checkpointing


def test_bfloat16_is_the_loaders_choice(monkeypatch):
    assert is_bf16_supported is is_bfloat16_supported
    for rate, expected in ((400.0, True), (90.0, False)):
        monkeypatch.setattr("supertrainer.runtime._cpu_rates", {"float32": 100.0, "bfloat16": rate})
        monkeypatch.setattr(models, "choose_device", lambda wanted: Decision("device", "cpu", ""))
        assert is_bfloat16_supported() is expected


@pytest.mark.parametrize("kind", [unsloth.TrainingArguments, transformers.TrainingArguments])
def test_arguments_of_transformers_are_taken(llama, in_tmp, kind):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=64)
    run = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict({"text": WORDS[:4]}),
                     args=kind("out", max_steps=3, learning_rate=1e-4, report_to="none"))
    assert (run.args.max_steps, run.args.learning_rate, run.args.max_length, run.args.report_to) == (3, 1e-4, 64, [])


def test_rows_are_as_long_as_the_model_was_loaded_for(llama, in_tmp):
    short, _ = FastLanguageModel.from_pretrained(llama, max_seq_length=64)
    whole, _ = FastLanguageModel.from_pretrained(llama)
    limit = whole.config.max_position_embeddings
    assert trainer.row_length(short, packing=True) == trainer.row_length(short, packing=False) == 64
    assert trainer.row_length(whole, packing=False) == limit and trainer.row_length(whole, packing=True) == min(limit, 2048)
    assert trainer.row_length(torch.nn.Linear(2, 2), packing=False) is None


def test_both_flags_in_arguments_of_transformers(in_tmp):
    bf16 = is_bf16_supported()
    args = unsloth.TrainingArguments("out", bf16=bf16, fp16=not bf16)
    assert args.bf16 == bf16 and args.use_cpu == (not torch.cuda.is_available())


def test_text_wins_over_turns_and_begins_once(llama, in_tmp):
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = FastLanguageModel.from_pretrained(llama)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "Be brief."}], "text": f"{bos}Once upon a time"}])
    for options in ({}, {"formatting_func": lambda row: row["text"]}):
        data = rows if not options else rows.remove_columns("messages")
        run = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=data, args=SFTConfig("out", max_steps=1), **options)
        assert tokenizer.decode(run.train_dataset[0]["input_ids"]) == f"{bos}Once upon a time{tokenizer.eos_token}"


@pytest.mark.parametrize(("call", "message"), [
    (lambda m, t: FastLanguageModel.get_peft_model(m, use_gradient_checkpointing="offlaod"), "use_gradient_checkpointing='offlaod'"),
    (lambda m, t: FastLanguageModel.get_peft_model(m, loftq_config={"bits": 4}), "loftq_config"),
    (lambda m, t: FastLanguageModel.get_peft_model(m, qat_scheme="int4"), "qat_scheme"),
    (lambda m, t: FastLanguageModel.get_peft_model(m, target_modules=["q_porj"]), "q_proj"),
    (lambda m, t: FastLanguageModel.get_peft_model(m, max_seq_length=77), "max_seq_length=77"),
    (lambda m, t: FastLanguageModel.from_pretrained("x", load_in_4bit=True, load_in_16bit=True), "load_in_16bit"),
    (lambda m, t: m.save_lora("x"), "no adapter to save"),
    (lambda m, t: m.save_pretrained_gguf("x", t, quantization_method="q4_k_n"), "q4_k_m"),
    (lambda m, t: m.push_to_hub_merged("x", t, save_method="merged_32bit"), "save_method='merged_32bit' is not supported"),
    (lambda m, t: SFTTrainer(model="llama", tokenizer=t), "no loaded model"),
    (lambda m, t: SFTTrainer(model=m, tokenizer=t, train_data=[]), "train_dataset"),
    (lambda m, t: SFTTrainer(model=m, tokenizer=t, processing_class=t), "two names of one thing"),
    (lambda m, t: SFTConfig("x", max_length=5, max_seq_length=6), "two names of one thing"),
])
def test_what_cannot_be_honoured_is_named(llama, in_tmp, call, message):
    with pytest.raises(UserError, match=message):
        call(*FastLanguageModel.from_pretrained(llama))


def test_four_bits_without_a_gpu(llama, in_tmp):
    model, tokenizer = FastLanguageModel.from_pretrained(llama, max_seq_length=128, load_in_4bit=True)
    assert model.is_loaded_in_4bit and info(model).decision("quantisation").value == "4 bit"
    model = FastLanguageModel.get_peft_model(model, r=4)
    before = snapshot(model)
    SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict({"text": WORDS[:8]}),
               args=SFTConfig("out", max_steps=1, learning_rate=1e-2, warmup_steps=0, save_strategy="no")).train()
    changed = change(before, model)
    assert changed and all("lora_" in name for name in changed)


# --- what is on the tokenizer and on the module ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the tokenizer is left alone")
def test_tokenizer_without_cuda_stays_itself(llama, in_tmp):
    _, tokenizer = FastLanguageModel.from_pretrained(llama)
    plain = type(tokenizer).__mro__[1]
    assert type(tokenizer).__name__ == plain.__name__ and isinstance(tokenizer, plain)
    for copied in (pickle.loads(pickle.dumps(tokenizer)),):
        assert copied("Be brief.")["input_ids"] == tokenizer("Be brief.")["input_ids"]
        assert copied("Be brief.", return_tensors="pt").to("cuda")["input_ids"].device.type == "cpu"
    tokenizer.save_pretrained("saved")
    assert type(OurModel.from_pretrained(llama)[1]) is plain  # the class itself was not touched
    with pytest.raises((RuntimeError, AssertionError)):
        OurModel.from_pretrained(llama)[1]("Be brief.", return_tensors="pt").to("cuda")
    meta = tokenizer("Be brief.", return_tensors="pt").to("meta")
    assert meta["input_ids"].device.type == "meta"


def test_import_is_light_and_names_are_there():
    code = ("import sys, supertrainer.unsloth as u; heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets'};"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(getattr(unsloth, name) is not None for name in unsloth.__all__)
    assert issubclass(FastModel, OurModel) and standardize_data_formats is standardize_sharegpt
    with pytest.raises(ImportError, match="PatchFastRL: reinforcement learning"):
        from supertrainer.unsloth import PatchFastRL  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'FastLangaugeModel'"):
        from supertrainer.unsloth import FastLangaugeModel  # noqa: F401
    from supertrainer.unsloth.chat_templates import train_on_responses_only as by_address

    assert by_address is train_on_responses_only
