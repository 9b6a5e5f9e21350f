"""Images, conversations about them, and one collator for eight families of vision-language models, on tiny models."""

import base64
import http.server
import io
import json
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ProcessorMixin

from supertrainer.chat import render
from supertrainer.data import mllm, vision
from supertrainer.data.images import ImageError, ImageRules, check_image, check_images, open_image, rules_for, to_rgb
from supertrainer.data.packing import pack
from supertrainer.data.rows import Problems, Rows, rows_of
from supertrainer.data.vision_batch import VisionCollator, encoded_lengths, inspect_rows
from supertrainer.data.vision_proof import check_labels
from supertrainer.runtime import UserError

sys.path.insert(0, str(Path(__file__).parent))
import tiny_vision  # noqa: E402

CHAT = ["idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "llava_onevision", "gemma3"]
ONE_IMAGE = ["florence2", "instructblip", "instructblip_t5"]
ALL = [*CHAT, "chameleon", "paligemma", *ONE_IMAGE]
JOINED = ["idefics3", "llava", "llava_next", "llava_onevision", "chameleon"]


def picture(number=0):
    return Image.new("RGB", (16 + 8 * number, 20), (50 * number, 20, 200))


def parts(*values):
    return [{"type": "image"} if value is None else {"type": "text", "text": value} for value in values]


def row_of(name, *turns, images=None, **more):
    """A row of `(role, part, part ...)` turns, `None` for an image; its images are as many as its places."""
    messages = [{"role": role, "content": parts(*said)} for role, *said in turns]
    count = sum(part["type"] == "image" for message in messages for part in message["content"])
    return {"messages": messages, "images": [picture(n) for n in range(count)] if images is None else images, "name": name, **more}


def rows_for(family):
    """Rows in every number of images that the family takes: one, two, none."""
    rows = [row_of("one", ("user", None, "Which colour is it?"), ("assistant", "red and blue"))]
    if family in ONE_IMAGE:
        return [*rows, row_of("other", ("user", None, "What?"), ("assistant", "a"))]
    rows.append(row_of("two", ("user", None, None, "What?"), ("assistant", "a")))
    return rows if family == "paligemma" else [*rows, row_of("none", ("user", "No picture"), ("assistant", "so"))]


def collator(family, **options):
    return VisionCollator(tiny_vision.processor_of(family), seq2seq=vision.is_seq2seq(tiny_vision.model_of(family).config), **options)


def said(processor, batch, row, key="labels"):
    kept = batch[key][row] != -100 if key == "labels" else batch["attention_mask"][row].bool()
    return processor.tokenizer.decode(batch[key][row][kept])


# ---------------------------------------------------------------- the eight families: tokens, labels, one step

FAKE = "<fake_token_around_image><global-img><image><fake_token_around_image>"
SOFT = "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"
PAD4, PAD6 = "<|image_pad|>" * 4, "<|image_pad|>" * 6
SYSTEM = "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n"
BOI = "<boi>" + "<image>" * 4 + "<eoi>"
EXPECTED = {
    "idefics3": [f"<|im_start|>User:{FAKE}Which colour is it?<end_of_utterance>\nAssistant:| red and blue<end_of_utterance>|\n",
                 f"<|im_start|>User:{FAKE}{FAKE}What?<end_of_utterance>\nAssistant:| a<end_of_utterance>|\n",
                 "<|im_start|>User: No picture<end_of_utterance>\nAssistant:| so<end_of_utterance>|\n"],
    "qwen2_5_vl": [f"{SYSTEM}<|vision_start|>{PAD4}<|vision_end|>Which colour is it?<|im_end|>\n<|im_start|>assistant\n"
                   "|red and blue<|im_end|>|\n",
                   f"{SYSTEM}<|vision_start|>{PAD4}<|vision_end|><|vision_start|>{PAD6}<|vision_end|>What?<|im_end|>\n"
                   "<|im_start|>assistant\n|a<|im_end|>|\n",
                   f"{SYSTEM}No picture<|im_end|>\n<|im_start|>assistant\n|so<|im_end|>|\n"],
    "llava": [f"<s>USER: {'<image>' * 4}\nWhich colour is it? ASSISTANT: |red and blue</s>|",
              f"<s>USER: {'<image>' * 4}\n{'<image>' * 4}\nWhat? ASSISTANT: |a</s>|", "<s>USER: No picture ASSISTANT: |so</s>|"],
    "llava_next": [f"<s>USER: {'<image>' * 10}\nWhich colour is it? ASSISTANT: |red and blue</s>|",
                   f"<s>USER: {'<image>' * 10}\n{'<image>' * 10}\nWhat? ASSISTANT: |a</s>|",
                   "<s>USER: No picture ASSISTANT: |so</s>|"],
    "llava_onevision": [f"<s>USER: {'<image>' * 10}\nWhich colour is it? ASSISTANT: |red and blue</s>|",
                        f"<s>USER: {'<image>' * 5}\n{'<image>' * 5}\nWhat? ASSISTANT: |a</s>|",
                        "<s>USER: No picture ASSISTANT: |so</s>|"],
    "gemma3": [f"<bos><start_of_turn>user\n{SOFT}Which colour is it?<end_of_turn>\n<start_of_turn>model\n|red and blue<end_of_turn>|\n",
               f"<bos><start_of_turn>user\n{SOFT}{SOFT}What?<end_of_turn>\n<start_of_turn>model\n|a<end_of_turn>|\n",
               "<bos><start_of_turn>user\nNo picture<end_of_turn>\n<start_of_turn>model\n|so<end_of_turn>|\n"],
    "chameleon": [f"<s>{BOI}Which colour is it?<sep>|red and blue</s>|", f"<s>{BOI}{BOI}What?<sep>|a</s>|",
                  "<s>No picture<sep>|so</s>|"],
    "paligemma": [f"{'<image>' * 4}<bos>Which colour is it?\n|red and blue<eos>|", f"{'<image>' * 8}<bos>What?\n|a<eos>|"],
    "instructblip": [f"{'<image>' * 3}<s>Which colour is it?|red and blue</s>|", f"{'<image>' * 3}<s>What?|a</s>|"],
}
EXPECTED["qwen2_vl"] = EXPECTED["qwen3_vl"] = EXPECTED["qwen2_5_vl"]


@pytest.mark.parametrize("family", EXPECTED)
def test_tokens_and_labels_are_those_written_by_hand(family):
    processor, rows = tiny_vision.processor_of(family), rows_for(family)
    batch = collator(family)(rows)
    for number, expected in enumerate(EXPECTED[family]):
        before, trained, after = expected.split("|") if "<|" not in expected else _parted(expected)
        assert said(processor, batch, number, "input_ids") == before + trained + after
        assert said(processor, batch, number) == trained
        assert batch["labels"][number].tolist().index(batch["labels"][number][batch["labels"][number] != -100][0]) == len(
            processor.tokenizer(before, add_special_tokens=False)["input_ids"])


def _parted(text):
    """Split at the bars that are not part of a token such as <|im_end|>."""
    marked = text.replace("<|", "\1").replace("|>", "\2")
    return [piece.replace("\1", "<|").replace("\2", "|>") for piece in marked.split("|")]


@pytest.mark.parametrize("family", ["florence2", "instructblip_t5"])
def test_decoders_get_the_answer_as_labels(family):
    processor = tiny_vision.processor_of(family)
    batch = collator(family)(rows_for(family))
    assert [said(processor, batch, number) for number in (0, 1)] == ["red and blue</s>", "a</s>"]
    begin = "<image>" * 2 + "<s>" if family == "florence2" else "<image>" * 3
    assert said(processor, batch, 0, "input_ids") == f"{begin}Which colour is it?</s>"
    assert batch["labels"].shape[1] < batch["input_ids"].shape[1] and batch["labels"][1, -1] == -100
    if family == "florence2":  # generation starts with </s> and forces <s>: neither is an answer's
        decode = processor.tokenizer.decode
        assert decode(batch["decoder_input_ids"][0]) == "</s><s>red and blue" and batch["labels"][0, 0] == -100
        assert decode(batch["decoder_input_ids"][1]) == "</s><s>a</s><pad>"
    else:  # what the model itself would make of the labels
        theirs = tiny_vision.model_of(family).language_model._shift_right(batch["labels"])
        assert torch.equal(batch["decoder_input_ids"], theirs)


@pytest.mark.parametrize("family", ALL)
def test_one_step_of_every_family(family):
    batch, model = collator(family)(rows_for(family)), tiny_vision.model_of(family)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert torch.isfinite(loss) and gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    sees = any(word in name for name in learns for word in ("vision", "visual", "qformer"))
    assert sees or family == "chameleon"  # whose image tokens come from a frozen code book


@pytest.mark.parametrize("family", ALL)
def test_neither_images_nor_padding_carry_loss(family):
    processor, batch = tiny_vision.processor_of(family), collator(family)(rows_for(family))
    image_ids = torch.tensor(sorted(vision.image_token_ids(processor)))
    tokens = batch["labels"][batch["labels"] != -100]
    assert not torch.isin(tokens, image_ids).any() and not (tokens == processor.tokenizer.pad_token_id).any()
    assert torch.isin(batch["input_ids"], image_ids).any()
    if batch["labels"].shape == batch["input_ids"].shape:
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
        kept = batch["labels"] != -100
        assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])


@pytest.mark.parametrize("family", CHAT)
def test_the_prompt_part_is_the_inference_prompt(family):
    processor, row = tiny_vision.processor_of(family), rows_for(family)[1]
    batch = collator(family)([row])
    text = render(processor, row["messages"][:1], add_generation_prompt=True)
    prompt = processor(text=[text], images=[row["images"]], add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    start = int((batch["labels"][0] != -100).nonzero()[0])
    begun = processor.tokenizer.decode(batch["input_ids"][0][:start])
    assert begun == processor.tokenizer.decode(prompt)
    if not family.startswith("llava"):  # "ASSISTANT: " + "a": the space is a token of its own only in training
        assert torch.equal(batch["input_ids"][0][:start], prompt)


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl", "gemma3"])
def test_tokens_are_those_of_the_processors_own_chat_template(family):
    processor, row = tiny_vision.processor_of(family), rows_for(family)[1]
    pictures = iter(row["images"])
    messages = [{**turn, "content": [{**part, "image": next(pictures)} if part["type"] == "image" else part
                                     for part in turn["content"]]} for turn in row["messages"]]
    theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    ours = collator(family)([row])
    for name, values in theirs.items():
        assert torch.equal(torch.as_tensor(values), ours[name]), name


def test_paligemma_rows_are_those_of_its_own_suffix():
    processor, rows = tiny_vision.processor_of("paligemma"), rows_for("paligemma")
    ours = collator("paligemma")(rows)
    theirs = processor(text=["<image>Which colour is it?", "<image><image>What?"], images=[row["images"] for row in rows],
                       suffix=["red and blue", "a"], return_tensors="pt", padding=True, padding_side="right")
    for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values"):
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(ours["labels"], theirs["labels"].masked_fill(theirs["attention_mask"] == 0, -100))


@pytest.mark.parametrize("family", ["instructblip", "instructblip_t5"])
def test_the_q_former_reads_the_question_and_never_the_answer(family):
    rows, other = rows_for(family), rows_for(family)
    other[0]["messages"][1]["content"] = parts("blue, blue, blue")
    one, two = collator(family)(rows), collator(family)(other)
    assert torch.equal(one["qformer_input_ids"], two["qformer_input_ids"]) and not torch.equal(one["labels"], two["labels"])
    asker = tiny_vision.processor_of(family).qformer_tokenizer
    assert asker.decode(one["qformer_input_ids"][0]) == "[CLS] which colour is it [UNK] [SEP]"


def test_a_text_token_that_the_image_makes_is_no_error():
    """Gemma's "\\n" before an image and the "\\n\\n" of the image are one token, which the template alone never writes."""
    processor, row = tiny_vision.processor_of("gemma3"), rows_for("gemma3")[0]
    merged = processor.tokenizer.convert_tokens_to_ids("ĊĊĊ")
    batch = collator("gemma3")([row])
    assert merged != processor.tokenizer.unk_token_id and merged is not None and (batch["input_ids"] == merged).sum() == 1
    assert said(processor, batch, 0) == "red and blue<end_of_turn>"


def test_token_types_follow_when_a_token_is_split():
    processor = tiny_vision.FAMILIES["gemma3"]()[2]
    processor.chat_template = tiny_vision.GEMMA.replace("<start_of_turn>{{ role }}\n", "<start_of_turn>{{ role }}: ").replace(
        "<start_of_turn>model\n{% endif %}", "<start_of_turn>model: {% endif %}")
    batch = VisionCollator(processor)([row_of("one", ("user", None, "Which?"), ("assistant", "blue"))])
    assert said(processor, batch, 0) == "blue<end_of_turn>"
    plain = processor.tokenizer(said(processor, batch, 0, "input_ids"), add_special_tokens=False)["input_ids"]
    assert plain != batch["input_ids"][0].tolist()  # " blue" would be one token
    assert torch.equal(batch["token_type_ids"] == 1, batch["input_ids"] == processor.tokenizer.image_token_id)


@pytest.mark.parametrize("family", ALL)
def test_the_proof_holds_for_every_family(family):
    checks = check_labels(collator(family), rows_for(family))
    assert all(check.passed for check in checks), checks
    longer = row_of("long", ("user", None, "What?"), ("assistant", "a square, the answer; " * 6))
    limit = encoded_lengths(rows_for(family)[:1], tiny_vision.processor_of(family))[0] + 4
    assert all(check.passed for check in check_labels(collator(family, max_length=limit), [longer]))  # cut, and known to be
    wrong = check_labels(collator(family), [{**longer, "images": []}])
    assert [check.passed for check in wrong] == [False, True, True] and "0 images, but 1 places" in wrong[0].detail


# ---------------------------------------------------------------- what carries loss

TALK = [("system", "Be brief."), ("user", None, "A?"), ("assistant", "one"), ("user", "B", None, "?"), ("assistant", "two")]


@pytest.mark.parametrize("train_on, expected", [
    ("assistant", "one<|im_end|>two<|im_end|>"), ("last_assistant", "two<|im_end|>"),
    (["user"], "A?<|im_end|>B?<|im_end|>"), ("all", "Be brief.<|im_end|>A?<|im_end|>one<|im_end|>B?<|im_end|>two<|im_end|>")])
def test_train_on_chooses_turns_and_never_images(train_on, expected):
    processor, row = tiny_vision.processor_of("qwen2_5_vl"), row_of("talk", *TALK)
    batch = collator("qwen2_5_vl", train_on=train_on)([row])
    assert said(processor, batch, 0) == expected


def test_weights_of_turns_become_weights_of_tokens():
    row = row_of("talk", *TALK)
    row["messages"][2]["weight"], row["messages"][4]["weight"] = 0.5, 2
    batch = collator("qwen2_5_vl")([row, rows_for("qwen2_5_vl")[2]])
    processor = tiny_vision.processor_of("qwen2_5_vl")
    ids, weights = batch["input_ids"][0], batch["loss_weights"][0]
    assert processor.tokenizer.decode(ids[weights == 0.5]) == "one<|im_end|>" and processor.tokenizer.decode(ids[weights == 2]) == "two<|im_end|>"
    assert torch.equal(batch["loss_weights"] > 0, batch["labels"] != -100) and set(batch["loss_weights"][1].tolist()) == {0.0, 1.0}
    row["messages"][4]["train"] = False
    assert said(processor, collator("qwen2_5_vl")([row]), 0) == "one<|im_end|>"
    asked = rows_for("florence2")[0]
    asked["messages"][1]["weight"] = 0.25
    assert collator("florence2")([asked])["loss_weights"][0].tolist() == [0.0, *[0.25] * 4]


WORDS = st.text(st.sampled_from("ab cd\n\u00e9\u6c49.?"), min_size=1, max_size=12).map(str.strip).filter(bool)
ASKED_PARTS = st.lists(st.one_of(st.none(), WORDS), min_size=1, max_size=4)
TALKS = st.lists(st.tuples(ASKED_PARTS, WORDS), min_size=1, max_size=3)


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl", "llava", "gemma3"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(talks=st.lists(TALKS, min_size=1, max_size=3))
def test_random_conversations_train_the_answers_and_their_ends(family, talks):
    """Any number of images at any place, in any turn, in rows of any length, next to each other in one batch."""
    processor = tiny_vision.processor_of(family)
    end = {"idefics3": "<end_of_utterance>", "qwen2_5_vl": "<|im_end|>", "llava": "</s>", "gemma3": "<end_of_turn>"}[family]
    rows = [row_of(f"row {number}", *(turn for asked, answer in talk for turn in (("user", *asked), ("assistant", answer))))
            for number, talk in enumerate(talks)]
    batch = collator(family)(rows)
    for number, talk in enumerate(talks):
        pieces = said(processor, batch, number).split(end)
        assert [piece.strip() for piece in pieces] == [*(answer for _, answer in talk), ""]
        count = (batch["input_ids"][number] == processor.image_token_ids[0]).sum()
        assert (count > 0) == any(part is None for asked, _ in talk for part in asked)
        assert (batch["labels"][number][batch["input_ids"][number] == processor.image_token_ids[0]] == -100).all()


@given(pieces=st.lists(st.tuples(st.text("xyz ", max_size=4), st.booleans(), st.integers(0, 5)), max_size=8), data=st.data())
def test_spans_move_with_the_text_and_never_hold_images(pieces, data):
    text, swaps, whole = "", [], ""
    for words, image, size in pieces:
        text, whole = text + words, whole + words
        if image:
            swaps.append({"span": (len(text), len(text) + 3), "replacement": "#" * size})
            text, whole = text + "<i>", whole + "#" * size
    edges = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    edges = [edge for edge in edges if not any(swap["span"][0] < edge < swap["span"][1] for swap in swaps)]
    spans = [(start, end, 1.0) for start, end in zip(edges[::2], edges[1::2], strict=False) if start < end]
    found, moved = vision.expand(text, spans, swaps)
    assert found == whole
    assert "".join(whole[start:end] for start, end, _ in moved) == "".join(text[start:end].replace("<i>", "") for start, end, _ in spans)


def test_an_image_in_the_assistants_turn_carries_no_loss():
    processor = tiny_vision.processor_of("idefics3")
    row = row_of("drawn", ("user", "Draw."), ("assistant", "Here: ", None, "done"))
    assert said(processor, collator("idefics3")([row]), 0) == " Here: done<end_of_utterance>"


def test_tiles_of_a_split_image_carry_no_loss():
    processor = tiny_vision.idefics3(do_image_splitting=True, size={"longest_edge": 32}, max_image_size={"longest_edge": 16})[2]
    row = row_of("tiles", ("user", None, "A?"), ("assistant", "1"), images=[Image.new("RGB", (32, 32))])
    batch = VisionCollator(processor)([row])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 5 and said(processor, batch, 0) == " 1<end_of_utterance>"


# ---------------------------------------------------------------- lengths

@pytest.mark.parametrize("family", ALL)
def test_a_cut_spares_images_and_is_counted(family):
    processor, row = tiny_vision.processor_of(family), rows_for(family)[0]
    options = {"seq2seq": family == "instructblip_t5" or None}
    whole = inspect_rows([row], processor, **options)[0]
    batch = collator(family)([row])
    trained = (batch["labels"][0] != -100).nonzero().flatten()
    decoder = batch["labels"].shape != batch["input_ids"].shape
    assert (whole.tokens, whole.trained_tokens, whole.images) == (batch["attention_mask"].sum(), len(trained), 1)
    assert whole.problem is None and whole.image_tokens > 0
    limit = batch["input_ids"].shape[1] if decoder else int(trained[-1])  # one token less than the answer needs
    if decoder:
        row = row_of("long", ("user", None, "What?"), ("assistant", "a square, the answer; " * 4))
    cut = inspect_rows([row], processor, max_length=limit, **options)[0]
    assert cut.problem is None and cut.cut > 0 and cut.lost_end
    assert collator(family, max_length=limit)([row])["labels"].shape[1] <= limit
    for limit in range(1, int(trained[0]) + 1 if not decoder else 4):
        report = inspect_rows([row], processor, max_length=limit, **options)[0]
        assert report.problem and f"more than dataset.max_length={limit}. An image is never cut" in report.problem.reason
        assert report.problem.where == row["name"] and "Raise dataset.max_length" in report.problem.fix
        with pytest.raises(UserError, match=f"{row['name']}: .*An image is never cut"):
            collator(family, max_length=limit)([row])


def test_rows_are_inspected_one_by_one():
    processor = tiny_vision.processor_of("llava")
    good = rows_for("llava")
    rows = [good[0], {**good[0], "images": []}, {**good[1], "name": "none left", "images": None},
            row_of("silent", ("user", None, "A?")), good[2]]
    reports = inspect_rows(rows, processor)
    assert [bool(report.problem) for report in reports] == [False, True, True, True, False]
    assert reports[1].problem.reason == "0 images, but 1 places for an image in its messages"
    assert reports[2].problem.where == "none left" and "2 places" in reports[2].problem.reason
    assert "no token carries loss" in reports[3].problem.reason and reports[3].problem.of_row
    lengths = encoded_lengths(good, processor)
    assert lengths == collator("llava")(good)["attention_mask"].sum(1).tolist()


# ---------------------------------------------------------------- rows in one sequence

@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", JOINED)
def test_rows_in_one_sequence_give_the_logits_of_rows_apart(family, attention):
    rows, model = rows_for(family), tiny_vision.model_of(family, attention)
    padded, joined = collator(family)(rows), collator(family, batching="padding_free")(rows)
    assert joined["input_ids"].shape[0] == 1 and "attention_mask" not in joined
    assert torch.equal(joined["input_ids"][0], padded["input_ids"][padded["attention_mask"].bool()])
    assert torch.equal(joined["labels"][0], padded["labels"][padded["attention_mask"].bool()])
    with torch.no_grad():
        together = model(**{key: value for key, value in joined.items() if key != "labels"}, use_cache=False).logits[0]
        apart = model(**{key: value for key, value in padded.items() if key != "labels"}, use_cache=False).logits
    assert torch.allclose(together, apart[padded["attention_mask"].bool()], atol=1e-5)
    losses = [model(**batch, use_cache=False).loss.item() for batch in (padded, joined)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_packed_bins_are_lists_of_rows():
    rows = rows_for("llava") * 2
    lengths = encoded_lengths(rows, tiny_vision.processor_of("llava"))
    bins = pack(lengths, 60)
    batch = collator("llava", batching="packed")([[rows[number] for number in chosen] for chosen in bins])
    assert batch["input_ids"].shape == (1, sum(lengths)) and batch["position_ids"][0].eq(0).sum() == len(rows)
    assert batch["pixel_values"].shape[0] == sum(len(row["images"]) for row in rows)


@pytest.mark.parametrize("family, why", [
    ("qwen2_5_vl", "positions have three axes"), ("qwen3_vl", "positions have three axes"), ("gemma3", "both directions"), ("paligemma", "both directions"),
    ("florence2", "encoder and a decoder"), ("instructblip", "Q-Former"), ("instructblip_t5", "encoder and a decoder")])
def test_families_that_cannot_share_a_sequence_say_why(family, why):
    with pytest.raises(UserError, match=f"dataset.batching=packed is not possible with .*{why}.*=padded or length_grouped"):
        collator(family, batching="packed")


# ---------------------------------------------------------------- rows and processors that do not fit

def test_rows_that_a_family_cannot_take_say_so():
    two, none = rows_for("llava")[1:]
    with pytest.raises(UserError, match="two: 2 images, and this model .Florence2Processor. needs exactly 1"):
        collator("florence2")([two])
    with pytest.raises(UserError, match="none: 0 images, and this model .PaliGemmaProcessor. needs at least 1"):
        collator("paligemma")([none])
    with pytest.raises(UserError, match="talk: a Chameleon model takes one question and one answer, .*system, user, assistant, user"):
        collator("chameleon")([row_of("talk", *TALK)])
    with pytest.raises(UserError, match="one: train_on asks for loss on the question"):
        collator("instructblip", train_on="all")(rows_for("instructblip"))
    task = row_of("task", ("user", None, "<OCR> now"), ("assistant", "text"))
    with pytest.raises(UserError, match="task: the processor refuses it .*<OCR> should be the only content"):
        collator("florence2")([rows_for("florence2")[0], task])
    system = row_of("told", ("system", "Be brief."), ("user", None, "What?"), ("assistant", "a"))
    processor = tiny_vision.processor_of("paligemma")
    assert said(processor, collator("paligemma")([system]), 0, "input_ids") == "<image>" * 4 + "<bos>Be brief.\nWhat?\na<eos>"


def test_a_literal_image_token_in_the_text_is_no_place():
    row = row_of("odd", ("user", None, "What is <image> for?"), ("assistant", "a"))
    with pytest.raises(UserError, match="odd: 1 images, but the chat template writes 2 places for an image"):
        collator("llava")([row])


def test_no_pad_token_is_said_at_once():
    processor = tiny_vision.FAMILIES["llava"]()[2]
    processor.tokenizer.pad_token = None
    with pytest.raises(UserError, match="no pad token.* eos_token"):
        VisionCollator(processor)
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    batch = VisionCollator(processor)(rows_for("llava"))
    assert [said(processor, batch, number) for number in range(3)] == ["red and blue</s>", "a</s>", "so</s>"]


class HomemadeProcessor(ProcessorMixin):
    """A processor of no known family, which does not say where it put images."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return self.image_token * 3

    def __call__(self, images=None, text=None, **kwargs):
        output = super().__call__(images=images, text=text, **kwargs)
        output.pop("text_replacement_offsets", None)
        return output


@pytest.mark.parametrize("chat_template", [tiny_vision.LLAVA, None])
def test_an_unknown_processor_is_asked(chat_template):
    known = tiny_vision.processor_of("llava")
    processor = HomemadeProcessor(known.image_processor, known.tokenizer, chat_template=chat_template)
    batch = VisionCollator(processor)(rows_for("llava"))
    assert [said(processor, batch, number) for number in range(3)] == ["red and blue</s>", "a</s>", "so</s>"]
    begin = f"<s>USER: {'<image>' * 3}\nWhich colour is it? ASSISTANT: " if chat_template else f"{'<image>' * 3}Which colour is it?"
    assert said(processor, batch, 0, "input_ids") == begin + "red and blue</s>"
    with pytest.raises(UserError, match="nothing is known about how it keeps rows apart"):
        VisionCollator(processor, batching="padding_free")


def test_chameleon_with_a_template_uses_it():
    template = ("{{ bos_token }}{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
                "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<sep>{% endfor %}")
    processor = tiny_vision.chameleon(add_bos=False)[2]
    processor.chat_template = template
    batch = VisionCollator(processor)([row_of("talk", ("user", None, "A?"), ("assistant", "one"), ("user", "B?"), ("assistant", "two"))])
    assert said(processor, batch, 0, "input_ids") == f"<s>{BOI}A?<sep>one<sep>B?<sep>two<sep>"
    assert said(processor, batch, 0) == "one<sep>two<sep>"


# ---------------------------------------------------------------- pictures

def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        found = np.asarray(open_image({"bytes": saved(Image.fromarray(values), kind), "path": None}))
        assert found[0, :, 0].tolist() == [round(value / 257) for value in values[0].tolist()] and (found[..., 0] == found[..., 2]).all()
    big_endian = Image.frombytes("I;16B", (2, 1), b"\x00\x00\xff\xff")
    assert np.asarray(to_rgb(big_endian))[0, :, 1].tolist() == [0, 255]


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (2, (3, 0)), (3, (3, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 3)), (8, (0, 3))])
def test_every_exif_orientation_is_undone(orientation, corner):
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = orientation
    found = open_image({"bytes": saved(image, "PNG", exif=exif), "path": None})
    assert found.size == ((4, 2) if orientation < 5 else (2, 4)) and found.getpixel(corner) == (255, 0, 0)


def test_palettes_transparency_cmyk_and_small_depths():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 128))
    half = open_image({"bytes": saved(clear), "path": None})
    assert half.getpixel((0, 0)) == (255, 255, 255) and half.getpixel((1, 0)) == (255, 127, 127)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    found = open_image({"bytes": saved(palette, "PNG", transparency=0), "path": None})
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]
    assert open_image({"bytes": saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), "path": None}).getpixel((4, 4))[0] > 200
    assert open_image({"bytes": saved(Image.new("1", (1, 1), 1)), "path": None}).getpixel((0, 0)) == (255, 255, 255)
    assert open_image({"bytes": saved(Image.new("LA", (1, 1), (0, 0))), "path": None}).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.fromarray(np.array([[7, 65535]], np.uint16))
    grey.info["transparency"] = 7
    assert to_rgb(grey).getpixel((0, 0)) == (255, 255, 255)


def test_pictures_in_memory_of_every_mode_can_be_kept():
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"):
        assert check_image(Image.new(mode, (3, 2)), ImageRules()).size == (3, 2), mode
    assert check_image(np.zeros((2, 3, 3), np.uint8), ImageRules()).size == (3, 2)
    with pytest.raises(ImageError, match=r"an array of float64 \[2, 3, 3\] is not an image"):
        check_image(np.zeros((2, 3, 3)), ImageRules())


def test_the_size_is_read_before_anything_is_decoded(monkeypatch):
    content = saved(Image.new("RGB", (300, 200)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="the image has 300 x 200 pixels, more than 59,999"):
        check_image(content, ImageRules(max_pixels=59_999))
    bomb = bytearray(content)
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2  # the header claims ten thousand million pixels
    import zlib
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with pytest.raises(ImageError, match="has 10,000,000,000 pixels, more than 50,000,000"):
        check_image(bytes(bomb), ImageRules())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_files_of_every_kind_are_row_problems_and_not_tracebacks():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    contents = [saved(noise, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]
    rng = np.random.default_rng(1)
    outcomes = []
    for content in contents:
        for length in (0, 1, 8, 30, len(content) // 2, len(content) - 200):
            outcomes += list(check_images([content[:length]], ImageRules(), 1))
        for _ in range(20):
            broken = bytearray(content)
            for place in rng.integers(0, len(broken), 8):
                broken[place] = rng.integers(0, 256)
            outcomes += list(check_images([bytes(broken)], ImageRules(), 1))  # any other exception fails here
    assert all(isinstance(one, ImageError) for one in list(check_images([content[: len(content) // 2] for content in contents[:2]], ImageRules())))
    assert sum(isinstance(one, ImageError) for one in outcomes) > 30


# ---------------------------------------------------------------- where images may come from

def test_paths_stay_under_the_roots(tmp_path):
    root, outside = tmp_path / "data", tmp_path / "secret"
    (root / "pictures").mkdir(parents=True)
    outside.mkdir()
    for folder in (root / "pictures", outside):
        (folder / "a.png").write_bytes(saved(picture()))
    (root / "link.png").symlink_to(outside / "a.png")
    rules = ImageRules((root.resolve(),))
    for path in ("pictures/a.png", str(root / "pictures" / "a.png"), "pictures/../pictures/a.png", root / "pictures" / "a.png"):
        assert check_image(path, rules).stored == {"bytes": None, "path": str((root / "pictures" / "a.png").resolve())}
    for path in ("../secret/a.png", str(outside / "a.png"), "../../../../../../etc/passwd", "/etc/passwd", "link.png",
                 "pictures/../../secret/a.png"):
        with pytest.raises(ImageError, match="lies outside the folders that images may come from") as error:
            check_image(path, rules)
        assert "dataset.image_roots=[" in error.value.fix
    for path, reason in (("pictures", "is a folder"), ("gone.png", "does not exist"), ("a" * 5000, "is no path|lies outside"), ("a\0b", "is no path")):
        with pytest.raises(ImageError, match=reason):
            check_image(path, rules)
    assert check_image("a.png", ImageRules((root.resolve(), outside.resolve()))).size == (16, 20)


def test_the_roots_are_the_files_folder_and_the_working_directory_unless_named(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rows = Rows("x", [], [], sources=[{"path": str(tmp_path / "set" / "train.jsonl")}])
    assert rules_for(rows, {}).roots == ((tmp_path / "set").resolve(), (tmp_path / "here").resolve())
    assert rules_for(rows, {"image_roots": [str(tmp_path / "far")], "max_image_pixels": 10, "remote_images": True}) == ImageRules(
        ((tmp_path / "far").resolve(),), 10, True)


def test_data_uris():
    good = "data:image/png;base64," + base64.b64encode(saved(picture())).decode()
    assert check_image(good, ImageRules()).size == (16, 20) and check_image({"url": good}, ImageRules()).size == (16, 20)
    for bad, reason in (("data:image/png;base64,@@@@", "is broken"), ("data:image/png,rawtext", "is not the data URI of an image"),
                        ("data:text/html;base64,aGk=", "is not the data URI of an image"), ("data:image/png;base64,", "is empty"),
                        ("data:image/png;base64,aGVsbG8=", "is not an image that Pillow knows")):
        with pytest.raises(ImageError, match=reason):
            check_image(bad, ImageRules())


@pytest.fixture
def server():
    """A loopback server: /a.png, a redirect to it and to a file, a large answer, a slow one; 404 for the rest."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = {"/a.png": saved(picture()), "/large.png": b"x" * 200_000, "/page.png": b"<html>"}.get(self.path)
            if self.path == "/slow.png":
                self.send_response(200)
                self.end_headers()
                for _ in range(20):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
                return
            target = {"/there": "/a.png", "/file": "file:///etc/passwd"}.get(self.path)
            self.send_response(200 if content else 302 if target else 404)
            if target:
                self.send_header("Location", target)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

        def handle(self):
            try:
                super().handle()
            except ConnectionError:
                pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join()


def test_addresses_are_refused_unless_switched_on(server):
    with pytest.raises(ImageError, match="is a remote address, and nothing is downloaded") as error:
        check_image(f"{server}/a.png", ImageRules())
    assert "dataset.remote_images=true" in error.value.fix
    rules = ImageRules(remote=True, timeout=0.6, max_bytes=100_000)
    assert check_image(f"{server}/a.png", rules).stored == {"bytes": saved(picture()), "path": None}
    assert check_image(f"{server}/there", rules).size == (16, 20)
    for path, reason in (("gone.png", "404"), ("file", "could not be downloaded"), ("large.png", "larger than 100,000 bytes"),
                         ("slow.png", "took longer than 0.6 s|could not be downloaded"), ("page.png", "not an image that Pillow knows")):
        with pytest.raises(ImageError, match=reason):
            check_image(f"{server}/{path}", rules)
    for other in ("ftp://127.0.0.1/a.png", "file:///etc/passwd", "s3://bucket/a.png"):
        with pytest.raises(ImageError, match="only http.s. addresses"):
            check_image(other, rules)
    with pytest.raises(ImageError, match="could not be downloaded"):
        check_image("http://127.0.0.1:9/a.png", rules)


# ---------------------------------------------------------------- rows of a file

def lines(path, records):
    """Rows as a reader returns them for a JSONL file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return Rows(str(path), [dict(record) for record in records], [f"{path}, line {n}" for n in range(1, len(records) + 1)],
                sources=[{"path": str(path)}])


def normal(rows, **options):
    problems = Problems()
    return mllm.normalise(rows, options, problems), problems


ASKED = {"question": "What?", "answer": "This."}


def test_every_image_problem_names_file_row_key_and_fix_and_writes_nothing(tmp_path):
    (tmp_path / "ok.png").write_bytes(saved(picture()))
    (tmp_path / "cut.png").write_bytes(saved(Image.effect_noise((32, 32), 50))[:500])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "large.png").write_bytes(saved(Image.new("L", (100, 100))))
    cases = [("ok.png", None, None), ("gone.png", "does not exist", "Mend the image or its path"), ("cut.png", "cannot be read", "Mend"),
             ("text.png", "is not an image that Pillow knows", "Mend"), ("zero.png", r"is empty \(0 bytes\)", "Mend"),
             ("large.png", "100 x 100 pixels, more than 5,000", "dataset.max_image_pixels"), ("../../etc/passwd", "outside the folders", "dataset.image_roots"),
             ("https://example.org/a.png", "nothing is downloaded", "dataset.remote_images=true"), (None, "the image is missing", "Give the row an image"), (7, "7 is not an image", "Mend")]
    path = tmp_path / "train.jsonl"
    rows = lines(path, [{"photo": name, **ASKED} for name, _, _ in cases])
    before = sorted(tmp_path.iterdir())
    made, problems = normal(rows, columns={"image": "photo"}, max_image_pixels=5_000)
    assert [row is not None for row in made.rows] == [True] + [False] * 9 and sorted(tmp_path.iterdir()) == before
    for number, (_, reason, fix) in list(enumerate(cases, 1))[1:]:
        found, = problems.rejected[f"{path}, line {number}"]
        assert re.search(reason, found.reason) and fix in found.fix and found.column == "photo" and found.record == rows.records[number - 1]
    with pytest.raises(UserError) as error:
        problems.settle(0)
    assert len(error.value.args) == 9 and all(f"{path}, line " in text and "'photo'" in text for text in error.value.args)


def test_numbers_of_images_and_places_are_compared_in_every_row(tmp_path):
    png = saved(picture())
    def talk(text, images):
        return {"images": images, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]}

    records = [talk("<image> and <image>", [png, png]), talk("<image>", [png, png]), talk("<image> <image>", [png]), talk("<image>", []),
               talk("none", []), talk("before", [png]), talk([{"type": "image"}, {"type": "text", "text": "x"}], []),
               talk([{"type": "text", "text": "<image>x<image>"}], [png, png])]
    made, problems = normal(rows_of("set", records))
    assert [number for number, row in enumerate(made.rows, 1) if row is None] == [2, 3, 4, 7]
    assert [len(row["images"]) for row in made.rows if row] == [2, 0, 1, 2]
    assert [str(problem) for problem in problems.found] == [
        f"set, row {number}, column 'images': {images} images, but {places} places for an image in its messages. "
        "Write <image> or an image part once for each image." for number, images, places in ((2, 2, 1), (3, 1, 2), (4, 0, 1), (7, 0, 1))]
    assert made.rows[5]["messages"][0]["content"] == parts(None, "before")
    assert made.rows[7]["messages"][0]["content"] == parts(None, "x", None)


def test_sharegpt_with_relative_paths_tools_system_and_names(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.png").write_bytes(saved(picture()))
    rows = lines(tmp_path / "llava.jsonl", [{"id": 1, "image": "pics/a.png", "name": "first", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A square."},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]}])
    made, problems = normal(rows, system="Be brief.")
    problems.raise_if_any()
    row = made.rows[0]
    assert made.format == "sharegpt" and made.columns == {"messages": "messages", "image": "images"} and row["name"] == "first"
    assert [(turn["role"], turn["content"]) for turn in row["messages"]] == [
        ("system", parts("Be brief.")), ("user", parts(None, "What is this?")), ("assistant", parts("A square.")),
        ("user", parts("Sure?")), ("assistant", parts("Yes."))]
    assert row["images"] == [{"bytes": None, "path": str((tmp_path / "pics" / "a.png").resolve())}] and row["_stratum"] == 0
    dataset = mllm.to_dataset([row])
    assert dataset[0]["images"][0].size == (16, 20) and dataset[0]["messages"][1]["content"] == parts(None, "What is this?")


def test_animated_images_give_their_first_frame_and_are_said_once(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    moving = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    made, problems = normal(rows_of("set", [{"image": moving, **ASKED}, {"image": moving, **ASKED, "question": "More?"}]))
    problems.raise_if_any()
    assert problems.warnings == ["set, row 1, column 'image': the image has 3 frames, and only the first is used, as of every animated image."]
    dataset = mllm.to_dataset(made.rows)
    assert open_image(dataset[1]["images"][0]).getpixel((0, 0)) == (255, 0, 0)


def test_keys_are_of_images_and_questions():
    one, two = saved(picture(0)), saved(picture(1))
    records = [{"image": one, "question": "What?", "answer": "a"}, {"image": one, "question": " what? ", "answer": "b"},
               {"image": two, "question": "What?", "answer": "a"}, {"image": one, "question": "Why?", "answer": "a"}]
    made, problems = normal(rows_of("set", records))
    problems.raise_if_any()
    keys = [row["_key"] for row in made.rows]
    assert keys[0] == keys[1] and len(set(keys)) == 3 and [row["_stratum"] for row in made.rows] == ["a", "b", "a", "a"]


@pytest.mark.parametrize("family", ["idefics3", "paligemma"])
def test_from_rows_to_a_batch(family, tmp_path):
    records = [{"image": saved(picture(1)), "question": "Which colour is it?", "answer": "red"}, {"image": saved(Image.new("I;16", (20, 20), 40000)), "question": "What?", "answer": 7}]
    made, problems = normal(rows_of("set", records))
    problems.raise_if_any()
    dataset = mllm.to_dataset(made.rows)
    batch = collator(family, image_column="images", max_length=64)([dataset[0], dataset[1]])
    processor = tiny_vision.processor_of(family)
    end = processor.tokenizer.eos_token
    assert [said(processor, batch, number).strip() for number in (0, 1)] == [f"red{end}", f"7{end}"]
    assert torch.isfinite(tiny_vision.model_of(family)(**batch).loss)
