"""The hf engine against plain `generate` and plain forward passes, and requests read from files."""

import io
import json
import threading

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3 import Idefics3Config, Idefics3ForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from supertrainer.inference.base import Completion, Sampling, require_honoured
from supertrainer.inference.engines.hf import HFEngine, most_tokens, stop_token_ids
from supertrainer.inference.requests import read_requests, result_rows, results_table, to_conversation, write_results
from supertrainer.registry import lookup
from supertrainer.runtime import UserError

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def byte_tokenizer(*extra):
    """Every byte a token, so that no training is needed; the template ends turns with a token that is not eos."""
    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", *extra]
    vocab = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def llama(tokenizer, **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
             "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


TEXTS = ("Hi", "What does dedent do to a text?", "Why?", "Name the days of the week, please.", "", "12")


@pytest.fixture(scope="module")
def chat():
    tokenizer = byte_tokenizer()
    return llama(tokenizer), tokenizer


def one_by_one(model, tokenizer, conversation, new, **options):
    """Plain transformers: no padding, no batch."""
    text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    out = model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=stops,
                         pad_token_id=tokenizer.pad_token_id, **options)
    return out[0, inputs["input_ids"].shape[1]:].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_equal_plain_generate_one_by_one(chat, batch_size, side):
    model, tokenizer = chat
    tokenizer.padding_side = side
    answers = HFEngine(model, tokenizer, "llm", batch_size=batch_size).generate(ask(*TEXTS), {"max_new_tokens": 12})
    assert tokenizer.padding_side == side
    for conversation, answer in zip(ask(*TEXTS), answers, strict=True):
        plain = one_by_one(model, tokenizer, conversation, 12)
        assert answer.text == tokenizer.decode(plain, skip_special_tokens=True) and answer.tokens == len(plain)
        ended = plain[-1] in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>"))
        assert answer.finish_reason == ("stop" if ended else "length") and answer.seconds > 0


def always(model, token_id):
    """Make the model say one token for ever."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[token_id] = model.model.norm(torch.ones(1, 1, 48))[0, 0] * 0
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with torch.no_grad():
        model.lm_head.bias[token_id] = 9.0
    return model


def test_stops_at_the_templates_end_of_turn_which_is_not_eos(chat):
    tokenizer = chat[1]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    model = always(llama(tokenizer), end)
    assert stop_token_ids(model, tokenizer) == sorted([tokenizer.eos_token_id, end])
    answers = HFEngine(model, tokenizer, "llm").generate(ask("a", "bcd"), {"max_new_tokens": 9})
    assert [(a.text, a.tokens, a.finish_reason) for a in answers] == [("", 1, "stop")] * 2
    endless = HFEngine(always(llama(tokenizer), tokenizer.convert_tokens_to_ids("x")), tokenizer, "llm")
    answer, = endless.generate(ask("a"), {"max_new_tokens": 9})
    assert (answer.text, answer.tokens, answer.finish_reason) == ("x" * 9, 9, "length")
    stopped, = endless.generate(ask("a"), {"max_new_tokens": 9, "stop": ["xxx"]})
    assert (stopped.text, stopped.finish_reason) == ("", "stop") and stopped.tokens == 3


def test_a_models_own_generation_config_does_not_come_through(chat):
    tokenizer = chat[1]
    model = llama(tokenizer)
    plain = HFEngine(model, tokenizer, "llm").generate(ask(*TEXTS), {"max_new_tokens": 8})
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0)
    again = HFEngine(model, tokenizer, "llm").generate(ask(*TEXTS), {"max_new_tokens": 8})
    assert [a.text for a in plain] == [a.text for a in again]


def test_sampling_follows_its_seed_and_leaves_the_random_state(chat):
    engine = HFEngine(*chat, "llm")
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "seed": 3}
    state = torch.get_rng_state()
    first, second = engine.generate(ask("Hi"), options), engine.generate(ask("Hi"), options)
    assert torch.equal(torch.get_rng_state(), state) and first[0].text == second[0].text
    assert {engine.generate(ask("Hi"), {**options, "seed": seed})[0].text for seed in range(5)} != {first[0].text}
    greedy = engine.generate(ask("Hi"), {"max_new_tokens": 12})[0].text
    assert engine.generate(ask("Hi"), {**options, "top_k": 1})[0].text == greedy
    assert engine.generate(ask("Hi"), {**options, "top_p": 1e-6})[0].text == greedy
    assert engine.generate(ask("Hi"), {**options, "temperature": 1e-4})[0].text == greedy


def test_streaming_gives_the_same_text_in_pieces_and_passes_errors_on(chat):
    model, tokenizer = chat
    engine = HFEngine(model, tokenizer, "llm")
    for conversation in ask(*TEXTS[:3]):
        pieces = list(engine.stream(conversation, {"max_new_tokens": 20}))
        assert "".join(pieces) == engine.generate([conversation], {"max_new_tokens": 20})[0].text
    model.train()
    broken = HFEngine(llama(tokenizer, vocab_size=8), tokenizer, "llm")
    with pytest.raises(IndexError):
        list(broken.stream(ask("hello")[0]))
    with pytest.raises(UserError, match="log_probabilities while streaming"):
        engine.stream(ask("hello")[0], {"log_probabilities": True})
    model.eval()


def test_leaving_a_stream_early_ends_its_thread(chat):
    tokenizer = chat[1]
    space = tokenizer.convert_tokens_to_ids("Ġ")  # words are handed over at their end
    engine = HFEngine(always(llama(tokenizer, max_position_embeddings=100000), space), tokenizer, "llm")
    before = threading.active_count()
    stream = engine.stream(ask("hello")[0], {"max_new_tokens": 20000})
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_training_mode_and_gradients_are_left_alone(chat):
    model, tokenizer = chat
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    HFEngine(model, tokenizer, "llm").generate(ask("Hi"), {"max_new_tokens": 2})
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    with pytest.raises(UserError):
        HFEngine(model, tokenizer, "llm").generate(ask("word " * 200), {"max_new_tokens": 2})
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_what_cannot_be_honoured_is_an_error(chat):
    engine = HFEngine(*chat, "llm")
    with pytest.raises(UserError, match="Did you mean 'temperature'"):
        engine.generate(ask("Hi"), {"temprature": 0.5})
    with pytest.raises(UserError, match="temperature=0.5 has no effect without sampling.do_sample=true"):
        engine.generate(ask("Hi"), {"temperature": 0.5})
    with pytest.raises(UserError, match="exceed the 128 tokens of this model"):
        engine.generate(ask("Hi"), {"max_new_tokens": 126})
    with pytest.raises(UserError, match="1 images? for 2|1 images for 2 conversations"):
        engine.generate(ask("a", "b"), images=[None])
    with pytest.raises(UserError, match="0 places for an image and 1 images"):
        engine.generate(ask("a"), images=[Image.new("RGB", (2, 2))])
    with pytest.raises(UserError, match="use generate"):
        engine.classify(["a"])
    with pytest.raises(UserError, match="cannot honour sampling.top_k"):
        require_honoured(Sampling(do_sample=True, top_k=2), ["max_new_tokens", "do_sample"], "other")
    assert engine.generate([]) == []
    engine.close()
    with pytest.raises(UserError, match="closed"):
        engine.generate(ask("a"))
    assert lookup("engine", "hf") is HFEngine


# ---------------------------------------------------------------------------------------------------------------- images

@pytest.fixture(scope="module")
def vision():
    tokenizer = byte_tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 16},
                                         do_image_splitting=False)
    processor = Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 16, "patch_size": 4, "initializer_range": 0.3}, scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=0, tie_word_embeddings=False,
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 64,
                     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
                     "max_position_embeddings": 256, "initializer_range": 0.3})
    return Idefics3ForConditionalGeneration(config).eval(), processor


def picture_question(text):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def test_images_in_batches_equal_one_by_one_and_are_seen(vision):
    model, processor = vision
    processor.tokenizer.padding_side = "right"
    rows = [(picture_question("What?"), 10), (picture_question("Which digit is this?"), 200), (ask("No image")[0], None),
            (picture_question("And?"), 120)]
    images = [None if shade is None else Image.new("L", (16, 16), shade) for _, shade in rows]
    engine = HFEngine(model, processor, "mllm", batch_size=3)
    answers = engine.generate([turns for turns, _ in rows], {"max_new_tokens": 8}, images=images)
    for (turns, _), image, answer in zip(rows, images, answers, strict=True):
        text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=None if image is None else [[image.convert("RGB")]],
                           add_special_tokens=False, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=engine.generator.stop_ids)
        assert answer.text == processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    assert processor.tokenizer.padding_side == "right"
    shades = [Image.new("RGB", (16, 16), (shade, 255 - shade, 0)) for shade in range(0, 256, 51)]
    same = engine.generate([picture_question("What?")] * 6, {"max_new_tokens": 8}, images=shades)
    assert len({answer.text for answer in same}) > 1  # the image matters
    assert "".join(engine.stream(rows[1][0], {"max_new_tokens": 8}, images=images[1])) == answers[1].text


def test_choices_after_an_image_have_the_probabilities_of_plain_forward_passes(vision):
    model, processor = vision
    choices, engine = ("three", "3", "no digit"), HFEngine(model, processor, "mllm", batch_size=3)
    rows = [(picture_question("What?"), Image.new("RGB", (16, 16), (200, 0, 9))), (ask("No image")[0], None)]
    answers = engine.generate([turns for turns, _ in rows], {"choices": choices, "log_probabilities": True}, images=[own for _, own in rows])
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    for (turns, image), answer in zip(rows, answers, strict=True):
        prompt, totals = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False), []
        for choice in choices:
            count = len(processor.tokenizer(choice, add_special_tokens=False)["input_ids"]) + 1
            inputs = processor(text=[prompt + choice + "<|end|>"], images=None if image is None else [[image]], add_special_tokens=False,
                               return_tensors="pt")
            with torch.no_grad():
                table = model(**inputs).logits[0].double().log_softmax(-1)
            ids = inputs["input_ids"][0]
            assert ids[-1] == end
            totals.append(sum(float(table[place - 1, ids[place]]) for place in range(len(ids) - count, len(ids))))
        shares = torch.tensor(totals).double().softmax(0).tolist()
        assert list(answer.probabilities.values()) == pytest.approx(shares, abs=1e-5)
        assert sum(answer.log_probabilities) == pytest.approx(max(totals), abs=1e-3) and answer.text == choices[totals.index(max(totals))]


# -------------------------------------------------------------------------------------------------------- classification

def encoder(tokenizer, **changes):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 24, "initializer_range": 0.5,
        "id2label": {0: "json", 1: "os", 2: "re"}, **changes}))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_classification_equals_one_by_one_and_long_texts_are_cut(batch_size):
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    model = encoder(tokenizer).train()
    texts = ["parse", "a much longer text than the model can read", "x", "walk a folder", "b" * 24]
    found = HFEngine(model, tokenizer, "bert", batch_size=batch_size).classify(texts)
    assert model.training and tokenizer.padding_side == "left" and most_tokens(model, tokenizer) == 24
    model.eval()
    for text, one in zip(texts, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(text)["input_ids"][:24]])).logits[0].double()
        assert list(one.probabilities) == ["json", "os", "re"]
        assert list(one.probabilities.values()) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        assert one.label == ["json", "os", "re"][int(logits.argmax())]
    with pytest.raises(UserError, match="writes no text"):
        HFEngine(model, tokenizer, "bert").generate(ask("a"))


# --------------------------------------------------------------------------------------------------- requests and results

def test_all_kinds_of_files(tmp_path):
    Image.new("L", (3, 3)).save(tmp_path / "seven.png")
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x", "id": 1}, {"messages": ask("y")[0]}]))
    (tmp_path / "b.csv").write_text('image,question\nseven.png,"Which digit,\nplease?"\n', "utf-8")
    (tmp_path / "c.txt").write_text("one\n\ntwo\n")
    assert read_requests(tmp_path / "a.json") == [{"text": "x", "id": 1}, {"messages": ask("y")[0]}]
    row, = read_requests(tmp_path / "b.csv")
    assert row["question"] == "Which digit,\nplease?" and row["image"] == str(tmp_path / "seven.png")
    turns, images = to_conversation(row, system="Answer with a digit.")
    assert [turn["role"] for turn in turns] == ["system", "user"] and images[0].size == (3, 3)
    assert [row["text"] for row in read_requests(tmp_path / "c.txt")] == ["one", "two"]
    assert read_requests("-", io.StringIO('plain\n{"prompt": "p"}\n')) == [{"text": "plain"}, {"prompt": "p"}]


@pytest.mark.parametrize("name,content,expected", [
    ("a.jsonl", '{"text": "x"}\n{"text": "x"}\n{"text": \n', [":3: not JSON"]),
    ("a.jsonl", '{"text": ""}\n[1]\n{"promt": "x"}\n', [":1: text is empty", ":2: not an object", ":3: no request"]),
    ("a.json", '[{"text": "x"},\n {"text" "y"}]', [":2: not JSON"]),
    ("a.csv", "text,label\nx,1\ny,2,3\n", [":3: 1 cells more"]),
    ("a.jsonl", '{"image": "no.png", "question": "?"}\n{"image": "bad.png", "question": "?"}\n{"image": "bad.png"}\n',
     [":1: image no.png cannot", ":2: image bad.png cannot", ":3: an image needs"]),
    ("a.jsonl", '{"messages": []}\n', [":1: messages must"]),
    ("a.txt", "\n", ["holds no request"]),
    ("a.docx", "x", ["allowed: .json"]),
])
def test_every_broken_row_is_named(tmp_path, name, content, expected):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_requests(tmp_path / name)
    assert len(error.value.problems) == len(expected)
    assert all(words in problem for words, problem in zip(expected, error.value.problems, strict=True))


def test_many_broken_rows_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" * 50)
    with pytest.raises(UserError) as error:
        read_requests(tmp_path / "a.jsonl")
    assert len(error.value.problems) == 21 and "30 more" in error.value.problems[-1]
    with pytest.raises(UserError, match="is no file"):
        read_requests(tmp_path / "none.jsonl")


def test_results_as_lines_and_as_a_table(tmp_path, capsys):
    requests = [{"messages": ask("What is\nthis?")[0], "id": 4}, {"image": Image.new("L", (1, 1)), "question": "digit?"}]
    rows = result_rows(requests, [Completion("a\n" * 80, 9, "length", 0.5), Completion("7", 2, "stop", 0.5)])
    write_results(rows, tmp_path / "new" / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert lines[0]["id"] == 4 and lines[1]["answer"] == "7" and lines[1]["finish_reason"] == "stop"
    write_results(rows)
    assert len(capsys.readouterr().out.splitlines()) == 2
    table = results_table(rows, 70).splitlines()
    assert len(table) == 4 and max(map(len, table)) <= 70 and "What is this?" in table[2] and "2 tokens" in table[3]
