"""The unmodified openai client against a served model; what it hears is held against plain transformers."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import openai
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from supertrainer import compose, serve
from supertrainer.inference.base import Completion, Engine, Sampling
from supertrainer.inference.engines.hf import HFEngine
from supertrainer.inference.serving import TOKEN, Served
from supertrainer.run.serving import Server, bind
from supertrainer.runtime import UserError

TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
            "{% if tools %}<|tools|>{{ tools[0]['function']['name'] }}<|end|>{% endif %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
SPECIAL = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|tools|>", "<|end|>"]
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def byte_tokenizer():
    vocab = {token: index for index, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def llama(tokenizer):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id)).eval()


def served_at(engine, **options):
    """A running server and an openai client of it."""
    server = Server(Served(engine, "tiny", **options), bind("127.0.0.1", 0)).start()
    return server, openai.OpenAI(base_url=server.url, api_key=options.get("token") or "none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def chat():
    tokenizer = byte_tokenizer()
    return llama(tokenizer), tokenizer


@pytest.fixture(scope="module")
def client(chat):
    server, client = served_at(HFEngine(*chat, "llm", batch_size=8), sampling=Sampling(max_new_tokens=12), gather_seconds=0.05)
    with server:
        yield client


def plain(chat, prompt, new=12):
    """Greedy tokens and their log-probabilities by plain transformers, one prompt at a time, without padding."""
    model, tokenizer = chat
    ids = torch.tensor([prompt if isinstance(prompt, list) else tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=stops, pad_token_id=0, output_logits=True,
                         return_dict_in_generate=True)
    tokens = out.sequences[0, ids.shape[1]:].tolist()
    told = [float(step[0].double().log_softmax(-1)[token]) for step, token in zip(out.logits, tokens, strict=True)]
    return tokenizer.decode(tokens, skip_special_tokens=True), tokens, told


def said(text, system=None):
    turns = [{"role": "user", "content": text}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def prompt_of(text):
    return f"<|user|>{text}<|end|><|assistant|>"


# ------------------------------------------------------------------------------------------------------------------ chats

def test_models_and_health(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/health"), timeout=10) as answer:
        assert json.load(answer) == {"status": "ok", "model": "tiny", "engine": "hf", "waiting": 0}


def test_a_chat_is_plain_greedy_generation(client, chat):
    answer = client.chat.completions.create(model="tiny", messages=said("Hi there"), max_tokens=9, logprobs=True)
    text, tokens, told = plain(chat, prompt_of("Hi there"), 9)
    choice = answer.choices[0]
    assert choice.message.content == text and choice.message.role == "assistant" and choice.message.tool_calls is None
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(told, abs=1e-4)
    assert [one.token for one in choice.logprobs.content] == [chat[1].decode([token]) for token in tokens]
    length = len(chat[1](prompt_of("Hi there"), add_special_tokens=False)["input_ids"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, len(tokens))
    assert choice.finish_reason == ("length" if len(tokens) == 9 else "stop") and answer.object == "chat.completion"


@pytest.mark.parametrize("options", [{}, {"stop": ["e", "zz"]}, {"max_tokens": 30}])
def test_the_pieces_of_a_stream_are_the_whole_answer(client, options):
    whole = client.chat.completions.create(model="tiny", messages=said("A stream"), **options)
    pieces = list(client.chat.completions.create(model="tiny", messages=said("A stream"), stream=True,
                                                 stream_options={"include_usage": True}, **options))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content and pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].usage == whole.usage and len({piece.id for piece in pieces}) == 1


def test_clients_at_the_same_time_get_their_own_answers(client, chat):
    texts = [f"Question number {number}" + "!" * number for number in range(12)]
    expected = [plain(chat, prompt_of(text))[0] for text in texts]
    found = [None] * len(texts)

    def ask(number):
        if number % 2:
            stream = client.chat.completions.create(model="tiny", messages=said(texts[number]), stream=True)
            found[number] = "".join(piece.choices[0].delta.content or "" for piece in stream)
        else:
            found[number] = client.chat.completions.create(model="tiny", messages=said(texts[number])).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(texts))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == expected


def test_a_temperature_draws_and_a_seed_repeats_it(client):
    def drawn(seed):
        return client.chat.completions.create(model="tiny", messages=said("Draw"), temperature=1.5, seed=seed).choices[0].message.content

    assert drawn(3) == drawn(3) and len({drawn(seed) for seed in range(4)}) > 1
    greedy = client.chat.completions.create(model="tiny", messages=said("Draw")).choices[0].message.content
    assert client.chat.completions.create(model="tiny", messages=said("Draw"), temperature=0, top_p=0.1).choices[0].message.content == greedy


def test_structure(client, chat):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"],
              "additionalProperties": False}
    answer = client.chat.completions.create(model="tiny", messages=said("A number"), max_tokens=40, response_format={
        "type": "json_schema", "json_schema": {"name": "number", "schema": schema}})
    assert 0 <= json.loads(answer.choices[0].message.content)["n"] <= 9
    answer = client.chat.completions.create(model="tiny", messages=said("Yes?"), extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    shares = answer.choices[0].probabilities
    assert answer.choices[0].message.content == max(shares, key=shares.get) and sum(shares.values()) == pytest.approx(1)
    digits = client.chat.completions.create(model="tiny", messages=said("Digits"), extra_body={"structured_outputs": {"regex": "[0-9]{4}"}})
    assert digits.choices[0].message.content.isdigit() and len(digits.choices[0].message.content) == 4


@pytest.mark.parametrize("change,words", [
    ({"model": "tinny"}, "Did you mean 'tiny'"), ({"n": 3}, "n=3"), ({"top_logprobs": 4, "logprobs": True}, "top_logprobs"),
    ({"frequency_penalty": 0.5}, "frequency_penalty=0.5"), ({"tool_choice": "required", "tools": WEATHER}, "tool_choice"),
    ({"temperature": "hot"}, "temperature must be a number"), ({"max_tokens": 0}, "max_new_tokens=0"), ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "needs content"), ({"messages": [{"role": "robot", "content": "x"}]}, "needs a role"),
    ({"extra_body": {"temprature": 1}}, "Did you mean 'temperature'"), ({"max_tokens": 500}, "exceed"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]}, "image"),
    ({"messages": [{"role": "user", "content": "x" * 200}]}, "context holds 128"),
    ({"response_format": {"type": "yaml"}}, "allowed: text"), ({"extra_body": {"structured_outputs": {"xml": 1}}}, "structured_outputs.xml"),
])
def test_what_cannot_be_honoured_is_an_error_that_names_it(client, change, words):
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(**{"model": "tiny", "messages": said("Hi"), "stream": stream, **change})
        assert error.value.status_code == (404 if "model" in change else 400) and words in error.value.body["message"]
    assert client.chat.completions.create(model="tiny", messages=said("Hi")).choices


def test_one_impossible_request_does_not_spoil_those_beside_it(client, chat):
    found = {}

    def ask(text, new):
        try:
            found[text] = client.chat.completions.create(model="tiny", messages=said(text), max_tokens=new).choices[0].message.content
        except openai.BadRequestError as error:
            found[text] = error

    long = "y" * 120
    threads = [threading.Thread(target=ask, args=(text, 12)) for text in ("ab", long, "cd")]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found["ab"] == plain(chat, prompt_of("ab"))[0] and found["cd"] == plain(chat, prompt_of("cd"))[0]
    assert isinstance(found[long], openai.BadRequestError)


def test_an_answer_without_a_length_gets_what_the_context_leaves(chat):
    server, client = served_at(HFEngine(*chat, "llm"))  # its default, 512, is more than the model's 128
    with server:
        text = "z" * 80
        answer = client.chat.completions.create(model="tiny", messages=said(text))
        assert answer.usage.total_tokens <= 128 and answer.choices[0].message.content == plain(chat, prompt_of(text), 128 - answer.usage.prompt_tokens)[0]


# ------------------------------------------------------------------------------------------------------------ completions

def test_raw_prompts_as_text_and_as_tokens(client, chat):
    ids = chat[1]("One two", add_special_tokens=False)["input_ids"]
    text, tokens, told = plain(chat, ids, 7)
    for prompt in ("One two", ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=7, logprobs=1, extra_body={"return_token_ids": True})
        assert answer.choices[0].text == text and answer.choices[0].token_ids == tokens
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(told, abs=1e-4)
    several = client.completions.create(model="tiny", prompt=["a", "bcd", "ef"], max_tokens=7, echo=True)
    assert [choice.text for choice in several.choices] == [before + plain(chat, before, 7)[0] for before in ("a", "bcd", "ef")]
    pieces = list(client.completions.create(model="tiny", prompt="One two", max_tokens=7, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == text
    for wrong, words in (([9999], "does not know"), ([], "prompt must"), ("q" * 130, "exceed")):
        with pytest.raises(openai.BadRequestError, match=words):
            client.completions.create(model="tiny", prompt=wrong, max_tokens=7)


# ------------------------------------------------------------------------------------------------- tools, images, encoders

class Scripted(Engine):
    """Says what it was given to say, and keeps what it was asked."""

    name, honours = "scripted", tuple(Sampling.__dataclass_fields__)

    def __init__(self, text, family="llm"):
        self.text, self.family, self.asked, self.closed = text, family, [], False

    def generate(self, conversations, sampling=None, images=None, progress=False, tools=None, adapter=None):
        self.asked.append((conversations, sampling, images, tools, adapter))
        return [Completion(self.text, 5, "stop", 0.0) for _ in conversations]

    def stream(self, conversation, sampling=None, images=None):
        self.asked.append(([conversation], sampling, images, None, None))
        yield from self.text

    def classify(self, texts, progress=False):
        raise RuntimeError("a secret of the server")

    def close(self):
        self.closed = True


CALL = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rom", "days": 2}}\n</tool_call>'


def test_tools_there_and_back():
    engine = Scripted(CALL)
    server, client = served_at(engine)
    with server:
        choice = client.chat.completions.create(model="tiny", messages=said("Rain?"), tools=WEATHER).choices[0]
        call = choice.message.tool_calls[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
        assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Rom", "days": 2}
        assert engine.asked[-1][3] == [WEATHER]
        pieces = list(client.chat.completions.create(model="tiny", messages=said("Rain?"), tools=WEATHER, stream=True))
        deltas = [piece.choices[0].delta for piece in pieces]
        streamed = next(delta.tool_calls[0] for delta in deltas if delta.tool_calls)
        assert streamed.index == 0 and json.loads(streamed.function.arguments)["city"] == "Rom"
        assert "tool_call>" not in "".join(delta.content or "" for delta in deltas) and pieces[-1].choices[0].finish_reason == "tool_calls"
        client.chat.completions.create(model="tiny", messages=[*said("Rain?"), choice.message, {
            "role": "tool", "tool_call_id": call.id, "content": "sunny"}], tools=WEATHER)
        turns = engine.asked[-1][0][0]
        assert [turn["role"] for turn in turns] == ["user", "assistant", "tool"] and turns[2]["tool_call_id"] == call.id
        assert client.chat.completions.create(model="tiny", messages=said("Rain?"), tools=WEATHER, tool_choice="none").choices[0].message.content == CALL
    assert engine.closed


def test_images_come_as_data_urls_and_nothing_is_fetched():
    engine = Scripted("A red square.", family="mllm")
    server, client = served_at(engine, system="Look.")
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (255, 0, 0)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    def look(address, **options):
        parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "What is it?"}]
        return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}], **options)

    with server:
        assert look(url).choices[0].message.content == "A red square."
        turns, images = engine.asked[-1][0][0], engine.asked[-1][2]
        assert turns[0] == {"role": "system", "content": [{"type": "text", "text": "Look."}]}
        assert turns[1]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        assert images[0][0].size == (3, 2) and images[0][0].getpixel((0, 0)) == (255, 0, 0)
        assert "".join(piece.choices[0].delta.content or "" for piece in look(url, stream=True)) == "A red square."
        for wrong in ("https://example.org/cat.png", "file:///etc/passwd", "data:image/png;base64,!!!", "data:image/png;base64,AAAA"):
            with pytest.raises(openai.BadRequestError, match="image"):
                look(wrong)


def post(server, path, body, token=None, data=None):
    request = urllib.request.Request(server.url.replace("/v1", path), data or json.dumps(body).encode(), {
        "Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_an_encoder_classifies():
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, initializer_range=0.5, id2label={0: "json", 1: "os", 2: "re"})).eval()
    server, client = served_at(HFEngine(model, tokenizer, "bert"))
    with server:
        status, found = post(server, "/classify", {"input": ["parse", "walk a folder"]})
        assert status == 200
        for text, one in zip(["parse", "walk a folder"], found["data"], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([tokenizer(text)["input_ids"][:24]])).logits[0].double()
            assert list(one["probabilities"].values()) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        assert post(server, "/classify", {"input": []})[0] == 400
        with pytest.raises(openai.BadRequestError, match="/classify"):
            client.chat.completions.create(model="tiny", messages=said("Hi"))


# ------------------------------------------------------------------------------------------------------ faults and access

def test_our_own_errors_are_500_without_their_inside_and_the_server_goes_on():
    server, client = served_at(Scripted("Hi", family="bert"))
    with server:
        for _ in range(2):
            status, body = post(server, "/classify", {"input": "x"})
            assert status == 500 and "secret" not in json.dumps(body) and body["error"]["type"] == "server_error"
        assert post(server, "/classify", None, data=b"{not json")[0] == 400
        assert post(server, "/v1/nothing", {})[0] == 404


class Gated(Scripted):
    """Waits at a gate before each answer; counts what it wrote of a stream."""

    def __init__(self):
        super().__init__("word " * 50)
        self.gate, self.begun, self.ended = threading.Event(), threading.Event(), threading.Event()

    def generate(self, *arguments, **options):
        self.begun.set()
        self.gate.wait(30)
        return super().generate(*arguments, **options)

    def stream(self, conversation, sampling=None, images=None):
        try:
            for number in range(10**9):
                self.gate.wait(0.002)
                yield f"{number} "
        finally:
            self.ended.set()


def test_a_full_queue_answers_429_and_closing_refuses_those_that_wait():
    engine = Gated()
    engine.batch_size = 1
    server, client = served_at(engine, max_waiting=1, gather_seconds=0)
    errors, answers = [], []

    def ask():
        try:
            answers.append(client.chat.completions.create(model="tiny", messages=said("Hi")))
        except openai.APIStatusError as error:
            errors.append(error)

    first = threading.Thread(target=ask)
    first.start()
    assert engine.begun.wait(30)
    waiting = threading.Thread(target=ask)
    waiting.start()
    while server.served.queue.waiting < 1:
        waiting.join(0.01)
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="tiny", messages=said("Hi"))
    server.served.queue._closed = True
    engine.gate.set()
    [thread.join() for thread in (first, waiting)]
    assert len(answers) == 1 and [error.status_code for error in errors] == [503]
    server.close()


def test_a_client_that_goes_ends_its_stream():
    engine = Gated()
    server, client = served_at(engine)
    with server:
        stream = client.chat.completions.create(model="tiny", messages=said("Hi"), stream=True)
        assert any(piece.choices[0].delta.content for piece in stream)
        stream.close()
        assert engine.ended.wait(30)


def test_a_client_that_goes_ends_its_row_and_not_its_neighbours(chat):
    """Rows of one batch: the one whose client has gone ends, the other gets its whole answer."""
    from supertrainer.inference.serving_requests import Asked
    from supertrainer.inference.serving_together import answer_together

    engine, gone, pieces = HFEngine(*chat, "llm"), [threading.Event(), threading.Event()], [[], []]

    def first(piece):
        pieces[0].append(piece)
        gone[0].set()

    asked = [Asked(Sampling(max_new_tokens=12), said(text)) for text in ("ab", "cdef")]
    found = answer_together(engine, asked, [first, pieces[1].append], gone)
    assert found[1].text == "".join(pieces[1]) == plain(chat, prompt_of("cdef"))[0]
    assert plain(chat, prompt_of("ab"))[0].startswith(found[0].text) and found[0].token_ids[-1] == chat[1].pad_token_id


def test_a_token_is_asked_for_where_one_is_set(chat):
    server, client = served_at(Scripted("Hi"), token="s3cret")
    with server:
        assert client.chat.completions.create(model="tiny", messages=said("Hi")).choices[0].message.content == "Hi"
        for token in (None, "", "wrong", "s3cret2"):
            assert post(server, "/v1/chat/completions", {"model": "tiny", "messages": said("Hi")}, token)[0] == 401
        with urllib.request.urlopen(server.url.replace("/v1", "/health"), timeout=10) as answer:
            assert answer.status == 200


def test_adapters_go_by_their_own_names():
    engine = Scripted("Hi")
    server, client = served_at(engine, adapters=("french", "german"))
    with server:
        assert [model.id for model in client.models.list()] == ["tiny", "french", "german"]
        for name, adapter in (("tiny", None), ("german", "german")):
            client.chat.completions.create(model=name, messages=said("Hi"))
            assert engine.asked[-1][4] == adapter


def test_an_engine_that_cannot_honour_the_defaults_is_refused():
    class Plain(Scripted):
        honours = ("max_new_tokens",)

    with pytest.raises(UserError, match="cannot honour sampling.stop"):
        Served(Plain("x"), "tiny", Sampling(stop=("a",)))
    server, client = served_at(Plain("x"))
    with server, pytest.raises(openai.BadRequestError, match="cannot honour"):
        client.chat.completions.create(model="tiny", messages=said("Hi"), stop="a")


# ------------------------------------------------------------------------------------------------------- the command line

@pytest.fixture(scope="module")
def saved(chat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "my-model"
    chat[0].save_pretrained(folder)
    chat[1].save_pretrained(folder)
    return folder


def test_serve_from_a_configuration(saved, chat):
    with serve(compose("serve", f"model.path={saved}", "server.port=0", "model_kwargs.dtype=float32", "sampling.max_new_tokens=8"), wait=False) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        answer = client.chat.completions.create(model="my-model", messages=said("Hello"))
        assert answer.choices[0].message.content == plain(chat, prompt_of("Hello"), 8)[0]
        server.close()
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_addresses_are_checked_before_anything_loads(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(UserError, match=TOKEN):
        serve(compose("serve", "model.path=nowhere", "server.host=0.0.0.0"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="Choose another port"):
        serve(compose("serve", "model.path=nowhere", f"server.port={taken.getsockname()[1]}"))
    with pytest.raises(UserError, match="sampling.temperature"):
        serve(compose("serve", "model.path=nowhere", "sampling.temperature=0.5"))


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_the_module_cleanly(saved):
    with subprocess.Popen([sys.executable, "-W", "ignore", "-m", "supertrainer.serve", f"model.path={saved}", "server.port=0"],
                          stderr=subprocess.PIPE, text=True, env={**os.environ, TOKEN: "t0ken"}) as process:
        line = ""
        for line in process.stderr:
            if "http://" in line:
                break
        url = next(word for word in line.split() if word.startswith("http://")).rstrip(",;.")
        assert "t0ken" not in line
        client = openai.OpenAI(base_url=url, api_key="t0ken", max_retries=20)
        assert client.chat.completions.create(model="my-model", messages=said("Hi"), max_tokens=3).choices
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 0 and "Traceback" not in rest
