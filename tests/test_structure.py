"""Structured answers: valid by a reader that is not ours, exact probabilities of choices, and the rest left as it was."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from supertrainer.inference.base import Sampling
from supertrainer.inference.engines.hf import HFEngine
from supertrainer.inference.structure import Rows, Structures, choose, grammar_of
from supertrainer.models.builtin import train_byte_bpe
from supertrainer.runtime import UserError

TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
QUESTIONS = ("Hi", "Which day follows Monday?", "A name and an age, please, and nothing else.", "12")


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def byte_tokenizer():
    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    vocab = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def llama(rows, tokenizer, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=rows, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id)).eval()


@pytest.fixture(scope="module", params=["bytes", "words"])
def engine(request):
    """A tokenizer of bytes, whose end of turn is not its eos; one of word pieces, with more logits than tokens."""
    texts = ["What is two plus two? Four.", '{"name": "Ada", "age": 36}', "yes, no, maybe"] * 5
    tokenizer = byte_tokenizer() if request.param == "bytes" else train_byte_bpe(texts, vocab_size=400)
    return HFEngine(llama(len(tokenizer) + (13 if request.param == "words" else 0), tokenizer), tokenizer, "llm", batch_size=3)


class Person(BaseModel, extra="forbid"):
    name: str
    age: int


SCHEMA = {"type": "object", "required": ["colour", "sizes"], "additionalProperties": False, "properties": {
    "colour": {"enum": ["red", "blue"]}, "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9},
                                                  "minItems": 1, "maxItems": 3}}}
SAMPLES = [{}, {"do_sample": True, "temperature": 2.0, "seed": 1}, {"do_sample": True, "top_k": 1},
           {"do_sample": True, "top_p": 0.05, "temperature": 0.5, "seed": 2}, {"repetition_penalty": 2.0}]


@pytest.mark.parametrize("options", SAMPLES, ids=str)
def test_a_schema_is_followed_in_batches_under_any_sampling(engine, options):
    answers = engine.generate(ask(*QUESTIONS), {"max_new_tokens": 160, "json_schema": SCHEMA, **options})
    finished = [answer for answer in answers if answer.finish_reason == "stop"]
    assert len(finished) == len(answers)
    for answer in finished:
        value = json.loads(answer.text)
        assert set(value) == {"colour", "sizes"} and value["colour"] in ("red", "blue") and 1 <= len(value["sizes"]) <= 3
        assert all(type(size) is int and 0 <= size <= 9 for size in value["sizes"])


def test_a_pydantic_class_its_schema_and_its_text_are_the_same(engine):
    schema = Person.model_json_schema()
    grammars = {grammar_of(Sampling(json_schema=form)) for form in (Person, schema, json.dumps(schema))}
    assert len(grammars) == 1
    turned = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}
    told, = engine.generate(ask("Hi"), {"max_new_tokens": 160, "json_schema": turned})
    assert list(json.loads(told.text)) == ["sizes", "colour"]  # the schema's order
    schema["properties"]["name"]["maxLength"] = 5
    schema["properties"]["age"] |= {"minimum": 0, "maximum": 150}
    answers = engine.generate(ask(*QUESTIONS), {"max_new_tokens": 120, "json_schema": schema, "do_sample": True, "seed": 0})
    assert all(Person.model_validate_json(answer.text) for answer in answers)


@pytest.mark.parametrize("regex", [r"[0-9]{2}/[a-f]{3}", r"(yes|no), (Ada|Grace)!", r"«[äöü]{2,4}»", r"[12][0-9]{3}-[01][0-9]"])
def test_a_regular_expression_matches_the_whole_answer(engine, regex):
    for options in ({}, {"do_sample": True, "temperature": 3.0, "seed": 4}):
        answers = engine.generate(ask(*QUESTIONS), {"max_new_tokens": 60, "regex": regex, **options})
        assert all(re.fullmatch(regex, answer.text) and answer.finish_reason == "stop" for answer in answers)
        assert all(answer.token_ids[-1] in engine.generator.stop_ids for answer in answers)


def test_a_grammar_with_recursion(engine):
    grammar = 'start: sum\nsum: term ("+" term)~1..3\nterm: /[0-9]/ | "(" /[0-9]/ "-" /[0-9]/ ")"'
    answers = engine.generate(ask(*QUESTIONS), {"max_new_tokens": 60, "grammar": grammar, "do_sample": True, "seed": 0})
    assert all(re.fullmatch(r"(\d|\(\d-\d\))(\+(\d|\(\d-\d\))){1,3}", answer.text) for answer in answers)


def test_rows_end_on_their_own_and_alone_equals_in_a_batch(engine):
    options = {"max_new_tokens": 40, "regex": "(a|b{20}|[cd]{3,9})", "log_probabilities": True}
    together = engine.generate(ask(*QUESTIONS), options)
    for conversation, answer in zip(ask(*QUESTIONS), together, strict=True):
        alone, = engine.generate([conversation], options)
        assert alone.text == answer.text and alone.token_ids == answer.token_ids
        assert np.allclose(alone.log_probabilities, answer.log_probabilities, atol=1e-4)
        assert "".join(engine.stream(conversation, {**options, "log_probabilities": False})) == answer.text


def test_an_answer_cut_short_says_so(engine):
    answer, = engine.generate(ask("Hi"), {"max_new_tokens": 4, "regex": "[xyz]{50}"})
    assert answer.finish_reason == "length" and answer.tokens == 4 and re.fullmatch("[xyz]+", answer.text)


def test_it_greedily_takes_the_likeliest_token_that_is_allowed(engine):
    """By hand: the best digit at each step, from plain forward passes."""
    tokenizer, conversation = engine.tokenizer, ask("Hi")[0]
    ids = engine.prompt_ids(conversation)
    digits = [token for token in range(len(tokenizer)) if re.fullmatch("[0-9]+", tokenizer.decode([token]))]
    digits = [token for token in digits if len(tokenizer.decode([token])) == 1]
    for _ in range(3):
        with torch.no_grad():
            logits = engine.model(torch.tensor([ids])).logits[0, -1]
        ids.append(max(digits, key=lambda token: float(logits[token])))
    answer, = engine.generate([conversation], {"max_new_tokens": 9, "regex": "[0-9]{3}"})
    assert answer.text == tokenizer.decode(ids[-3:])


def test_structure_is_refused_before_the_model_computes(engine, monkeypatch):
    monkeypatch.setattr(engine.model, "forward", lambda *_, **__: pytest.fail("computed"))
    for wrong, said in (({"regex": "(a"}, "regex"), ({"grammar": "start a"}, "grammar"),
                        ({"json_schema": {"type": "objct"}}, "objct"), ({"json_schema": {"if": {}, "type": "object"}}, "if")):
        with pytest.raises(UserError, match=said):
            engine.generate(ask("Hi"), wrong)
    with pytest.raises(UserError, match="both set"):
        engine.generate(ask("Hi"), {"regex": "a", "choices": ["a"]})
    with pytest.raises(UserError, match="is no JSON"):
        engine.generate(ask("Hi"), {"json_schema": "{"})


# -------------------------------------------------------------------------------------------------------------- choices

CHOICES = ("yes", "yes, but", "no", "maybe some day", '"quoted"\n', "ä")


def by_hand(model, tokenizer, conversation, choices, end):
    """Each choice's total, from a plain forward pass of its own, in float64."""
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    before, totals = tokenizer(prompt, add_special_tokens=False)["input_ids"], []
    for choice in choices:
        ids = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
        assert ids[: len(before)] == before
        ids = [*ids, end]
        with torch.no_grad():
            table = model(torch.tensor([ids])).logits[0].double().numpy()
        table = table - np.log(np.exp(table).sum(-1, keepdims=True))
        totals.append(sum(table[place - 1, ids[place]] for place in range(len(before), len(ids))))
    return np.array(totals)


@pytest.mark.parametrize("shared", [True, False])
def test_probabilities_of_choices_are_exact(engine, shared, monkeypatch):
    if not shared:
        monkeypatch.setattr("supertrainer.inference.generation.shared_past", lambda *_: None)
    tokenizer = engine.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|end|>" if "<|end|>" in tokenizer.get_vocab() else "<|im_end|>")
    answers = engine.generate(ask(*QUESTIONS), {"choices": CHOICES, "log_probabilities": True})
    for conversation, answer in zip(ask(*QUESTIONS), answers, strict=True):
        totals = by_hand(engine.model, tokenizer, conversation, CHOICES, end)
        shares = np.exp(totals - totals.max()) / np.exp(totals - totals.max()).sum()
        assert list(answer.probabilities) == list(CHOICES)
        assert np.allclose(list(answer.probabilities.values()), shares, atol=1e-5)
        best = CHOICES[int(totals.argmax())]
        assert answer.text == best and answer.finish_reason == "stop"
        assert abs(sum(answer.log_probabilities) - totals.max()) < 1e-3 and len(answer.token_ids) == answer.tokens
        assert "".join(engine.stream(conversation, {"choices": CHOICES})) == best


def test_choices_in_chunks_are_the_same(engine, monkeypatch):
    many = [f"number {number}" for number in range(30)]
    whole = engine.generate(ask(*QUESTIONS), {"choices": many})
    monkeypatch.setattr("supertrainer.inference.scoring.CHOICES_AT_ONCE", 7)
    pieces = engine.generate(ask(*QUESTIONS), {"choices": many})
    for one, other in zip(whole, pieces, strict=True):
        assert np.allclose(list(one.probabilities.values()), list(other.probabilities.values()), atol=1e-6)


def test_choices_are_drawn_by_their_probabilities(engine):
    drawn = {"choices": CHOICES, "do_sample": True, "temperature": 20.0}
    first = engine.generate(ask("Hi") * 40, {**drawn, "seed": 5})
    again = engine.generate(ask("Hi") * 40, {**drawn, "seed": 5})
    assert [a.text for a in first] == [a.text for a in again] and len({a.text for a in first}) > 1
    greedy, = engine.generate(ask("Hi"), {"choices": CHOICES})
    assert greedy.probabilities == pytest.approx(first[0].probabilities, abs=1e-6)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-3}):
        assert engine.generate(ask("Hi"), {**drawn, **narrow})[0].text == greedy.text


def test_drawing_choices_follows_their_shares():
    torch.manual_seed(0)
    sampling = Sampling(choices=("a", "b", "c"), do_sample=True, top_p=0.75)
    counts = np.bincount([choose(np.log([0.5, 0.3, 0.2]), sampling)[0] for _ in range(4000)], minlength=3) / 4000
    assert counts[2] == 0 and abs(counts[0] - 0.625) < 0.03


def test_what_choices_leave_no_room_for(engine):
    for options, said in (({"stop": ["x"]}, "stop has no effect"), ({"repetition_penalty": 1.5}, "repetition_penalty has no"),
                          ({"max_new_tokens": 2}, "more than sampling.max_new_tokens=2")):
        with pytest.raises(UserError, match=said):
            engine.generate(ask("Hi"), {"choices": CHOICES, **options})
    with pytest.raises(UserError, match="different texts"):
        engine.generate(ask("Hi"), {"choices": ["a", "a"]})


def test_choices_without_an_end_of_turn_in_one_token_use_eos():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", "#END#")
    engine = HFEngine(llama(len(tokenizer), tokenizer), tokenizer, "llm")
    answer, = engine.generate(ask("Hi"), {"choices": ["yes", "no"]})
    totals = by_hand(engine.model, tokenizer, ask("Hi")[0], ["yes", "no"], tokenizer.eos_token_id)
    assert answer.probabilities["yes"] == pytest.approx(1 / (1 + np.exp(totals[1] - totals[0])), abs=1e-5)


# --------------------------------------------------------------------------------------------------------- class tokens

def test_one_token_classes_are_a_softmax_over_their_logits(engine):
    classes = ["a", "b", "X"]
    found = HFEngine(engine.model, engine.tokenizer, "llm", batch_size=3, classes=classes).classify(list(QUESTIONS))
    for conversation, one in zip(ask(*QUESTIONS), found, strict=True):
        with torch.no_grad():
            logits = engine.model(torch.tensor([engine.prompt_ids(conversation)])).logits[0, -1].double().numpy()
        own = logits[engine.tokenizer.convert_tokens_to_ids(classes)]
        shares = np.exp(own - own.max()) / np.exp(own - own.max()).sum()
        assert np.allclose(list(one.probabilities.values()), shares, atol=1e-5) and one.label == classes[int(own.argmax())]


def test_classes_of_several_tokens_are_refused(engine):
    with pytest.raises(UserError, match="not one token each"):
        HFEngine(engine.model, engine.tokenizer, "llm", classes=["a", "xyzzy"]).classify(["Hi"])
    with pytest.raises(UserError, match="use generate"):
        engine.classify(["Hi"])


# ----------------------------------------------------------------------------------------------------------- the pieces

def test_rows_serve_a_loop_without_torch():
    tokenizer = byte_tokenizer()
    structures = Structures(tokenizer, [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")])
    rows = Rows(structures, Sampling(choices=("ab", "b")), 2)
    ids = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in "ab"}
    assert np.flatnonzero(rows.allowed(len(tokenizer))[0]).tolist() == sorted(ids.values())
    rows.take([ids["a"], ids["b"]])
    masks = rows.allowed(len(tokenizer))
    assert np.flatnonzero(masks[0]).tolist() == [ids["b"]] and set(np.flatnonzero(masks[1])) == set(structures.stop_ids)
    rows.take([ids["b"], structures.stop_ids[1]])
    assert rows.allowed(len(tokenizer))[1].all() and not rows.allowed(len(tokenizer) + 5)[0, len(tokenizer):].any()
    with pytest.raises(UserError, match="could not be followed"):
        rows.take([ids["a"], 0])


def test_the_cache_that_is_shared_is_not_changed(engine):
    """Two lists of choices in turn: the second must not see the first."""
    one = engine.generate(ask("Hi"), {"choices": ["yes", "no"]})
    engine.generate(ask("Hi"), {"choices": ["something quite else", "a"]})
    assert engine.generate(ask("Hi"), {"choices": ["yes", "no"]})[0].probabilities == pytest.approx(one[0].probabilities)
    with pytest.raises(UserError, match="0 places for an image"):
        engine.generate(ask("Hi"), {"choices": ["yes", "no"]}, images=[Image.new("RGB", (2, 2))])
