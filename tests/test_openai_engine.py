"""The openai engine against a server on loopback: both protocols, and every fault a server can have."""

import weakref
from itertools import count

import pytest
from openai_server import FakeServer, image_in
from PIL import Image

from supertrainer.inference import clients
from supertrainer.inference.base import ModelSpec, Sampling
from supertrainer.inference.clients import Unanswered
from supertrainer.inference.engines.openai import OpenAIEngine
from supertrainer.runtime import UserError

PACKAGES = ("openai", "anthropic")


@pytest.fixture
def server():
    with FakeServer() as running:
        yield running


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Both clients pause half a second before the first retry; a `Retry-After` header still counts in full."""
    for package in PACKAGES:
        monkeypatch.setattr(f"{package}._base_client.INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setattr(clients, "BACK_OFF", 0.0)


def engine_at(server, **options):
    api = options.get("api", "openai")
    return OpenAIEngine.open(ModelSpec("m", adapters=options.pop("adapters", {})),
                             **{"url": server.url, "retries": 2, "timeout": 20, "api": api, **options})


def ask(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


@pytest.mark.parametrize("api", PACKAGES)
def test_answers_come_in_order_with_usage_and_cost(server, api):
    with engine_at(server, api=api, concurrency=3, prices={"input": 1.0, "output": 10.0}) as engine:
        texts = [f"text number {i}" for i in range(20)]
        found = engine.generate(ask(*texts), Sampling(max_new_tokens=30))
        assert [one.text for one in found] == [f"echo: {text}" for text in texts]
        assert all((one.tokens, one.finish_reason) == (4, "stop") and one.seconds > 0 for one in found)
        assert engine.usage.to_dict() == {"requests": 20, "input_tokens": 60, "output_tokens": 80, "cached_input_tokens": 0,
                                          "cost": pytest.approx((60 + 800) / 1e6)}
        assert 1 <= server.most_running <= 3
        (short,) = engine.generate(ask("a b c d"), Sampling(max_new_tokens=2))
        assert (short.text, short.finish_reason, short.tokens) == ("echo: a", "length", 2)


@pytest.mark.parametrize("api", PACKAGES)
def test_streams_join_to_the_answer(server, api):
    with engine_at(server, api=api) as engine:
        pieces = list(engine.stream(ask("one two three")[0]))
        assert len(pieces) == 4 and "".join(pieces) == "echo: one two three"
        assert engine.usage.output_tokens == 4 and engine.usage.input_tokens == 3
    with engine_at(server, api=api, first_token=True) as engine:
        (one,) = engine.generate(ask("one two three"))
        assert one.text == "echo: one two three" and 0 < one.first_token_seconds <= one.seconds
        assert engine.usage.requests == 1


def test_sampling_is_written_out(server):
    with engine_at(server) as engine:
        engine.generate(ask("x"), Sampling(do_sample=True, temperature=0.7, top_p=0.9, seed=3, stop=("a", "b"), max_new_tokens=9))
        engine.generate(ask("x"))
    first, second = server.bodies
    assert {key: first[key] for key in ("temperature", "top_p", "seed", "stop", "max_tokens")} == {
        "temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["a", "b"], "max_tokens": 9}
    assert second["temperature"] == 0.0 and "top_p" not in second and server.headers[0]["authorization"] == "Bearer none"


def test_each_dialect_gets_its_own_keys(server):
    with engine_at(server, dialect="vllm") as engine:
        engine.generate(ask("x"), Sampling(regex="a+"))
        engine.generate(ask("x"), Sampling(choices=("yes", "no"), repetition_penalty=1.2))
    with engine_at(server, dialect="llama_cpp") as engine:
        engine.generate(ask("x"), Sampling(choices=("yes", "no"), repetition_penalty=1.2))
    assert server.bodies[0]["structured_outputs"] == {"regex": "a+"} and server.bodies[0]["top_p"] == 1.0
    assert server.bodies[1]["structured_outputs"] == {"choice": ["yes", "no"]} and server.bodies[1]["repetition_penalty"] == 1.2
    assert server.bodies[2]["grammar"] == 'root ::= "yes" | "no"' and server.bodies[2]["repeat_penalty"] == 1.2
    with pytest.raises(UserError, match="does not go with engine.api=anthropic"):
        engine_at(server, api="anthropic", dialect="vllm")


@pytest.mark.parametrize("api", PACKAGES)
def test_structure(server, api):
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    with engine_at(server, api=api) as engine:
        assert engine.generate(ask("x"), Sampling(choices=("yes", "no")))[0].text == "yes"
        assert list(engine.stream(ask("x")[0], Sampling(choices=("no", "yes")))) == ["no"]
        assert engine.generate(ask("x"), Sampling(json_schema=schema))[0].text == '{"colour": "red"}'
        with pytest.raises(UserError, match="cannot honour sampling.grammar"):
            engine.generate(ask("x"), Sampling(grammar="start: \"a\""))


def test_log_probabilities(server):
    with engine_at(server) as engine:
        assert engine.generate(ask("a b"), Sampling(log_probabilities=True))[0].log_probabilities == (-0.5,) * 3
        assert engine.generate(ask("a b"))[0].log_probabilities is None
        server.fail(200, body={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
        with pytest.raises(UserError, match="does not tell log-probabilities"):
            engine.generate(ask("a b"), Sampling(log_probabilities=True))
    with engine_at(server, api="anthropic") as engine, pytest.raises(UserError, match="cannot honour sampling.log_probabilities"):
        engine.generate(ask("a"), Sampling(log_probabilities=True))


def test_images_tools_and_adapters(server):
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    with engine_at(server, adapters={"mine": "m-lora"}) as engine:
        engine.generate([turns], images=[Image.new("RGB", (3, 2), "red")], tools=[[tool]], adapter="mine")
        body = server.bodies[-1]
        assert image_in(body).size == (3, 2) and image_in(body).getpixel((0, 0)) == (255, 0, 0)
        assert body["tools"] == [tool] and body["model"] == "m-lora"
        with pytest.raises(UserError, match="1 places for an image and 0 images"):
            engine.generate([turns])
        with pytest.raises(UserError, match="Did you mean 'mine'"):
            engine.generate(ask("x"), adapter="mien")
        server.fail(200, body={"choices": [{"finish_reason": "tool_calls", "message": {"content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{\"at\": 1}"}}]}}]})
        assert engine.generate(ask("x"))[0].text == '{"name": "look", "arguments": {"at": 1}}'


# -- faults

@pytest.mark.parametrize("api", PACKAGES)
@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"status": 429}, {"status": 529}, {"drop": True},
                                   {"body": "<html>a proxy</html>"}, {"body": '{"choices": []'}, {"body": "{}"}],
                         ids=lambda fault: "-".join(map(str, fault.values()))[:12])
def test_faults_that_pass_are_tried_again(server, api, fault):
    server.fail(**fault, times=2)
    with engine_at(server, api=api, concurrency=1) as engine:
        assert [one.text for one in engine.generate(ask("a", "b"))] == ["echo: a", "echo: b"]
        assert engine.usage.requests == 2  # answers are counted, not tries
    assert server.answered == 2 and len(server.times) == 4


@pytest.mark.parametrize("api", PACKAGES)
@pytest.mark.parametrize("fault,words", [
    ({"status": 500}, "said 500: planned 500 \\(tried 3 times\\)"), ({"status": 429}, "Lower engine.concurrency"),
    ({"drop": True}, "cannot be reached, or broke off"), ({"body": "<html>a proxy</html>"}, "cannot be read .*a proxy"),
    ({"status": 400}, "planned 400. The server does not take"), ({"status": 404}, "Check model.path"),
    ({"status": 413}, "too large")], ids=str)
def test_faults_that_stay_are_sentences_and_lose_nothing(server, api, fault, words):
    with engine_at(server, api=api, concurrency=1) as engine:
        server.reply = lambda text: (server.fail(**fault, times=9), f"echo: {text}")[1] if text == "2" else f"echo: {text}"
        with pytest.raises(Unanswered, match=words) as error:
            engine.generate(ask(*map(str, range(8))))
        answered = error.value.answered
        assert {number: one.text for number, one in answered.items()} == {n: f"echo: {n}" for n in range(3)}
        assert "Request 4: " in str(error.value) and "3 of 8 requests were answered" in str(error.value)


def test_retry_after_is_waited_for(server):
    server.fail(429, headers={"Retry-After": "0.4"})
    with engine_at(server) as engine:
        engine.generate(ask("a"))
    assert server.times[1] - server.times[0] >= 0.4


def test_a_slow_server_is_a_time_out(server):
    server.silent()
    with engine_at(server, timeout=0.2, retries=1) as engine:
        with pytest.raises(UserError, match=r"no answer within 0.2 seconds \(tried 2 times\). Raise engine.timeout"):
            engine.generate(ask("a"))
    assert len(server.times) == 2


def test_nobody_listens():
    with FakeServer() as gone:
        pass
    with engine_at(gone, retries=1) as engine:
        with pytest.raises(UserError, match="Start the server, or mend engine.url"):
            engine.generate(ask("a", "b"))
        with pytest.raises(UserError, match="Start the server, or mend engine.url"):
            list(engine.stream(ask("a")[0]))


def test_killed_in_the_middle_and_started_again():
    with FakeServer() as server:
        server.die_after = 25  # from then on connections are reset
        with engine_at(server, concurrency=4, retries=0) as engine:
            with pytest.raises(Unanswered) as error:
                engine.generate(ask(*map(str, range(60))))
        answered = {number: one.text for number, one in error.value.answered.items()}
        assert len(answered) == server.answered == 25, "what the server answered is kept, and nothing else"
        server.die_after = None
        left = [number for number in range(60) if number not in answered]
        with engine_at(server, concurrency=4) as engine:
            again = engine.generate(ask(*map(str, left)))
    answered |= {number: one.text for number, one in zip(left, again, strict=True)}
    assert answered == {number: f"echo: {number}" for number in range(60)}
    assert server.answered == 60, "nothing was asked twice"


@pytest.mark.parametrize("api", PACKAGES)
def test_a_stream_that_breaks_off(server, api):
    server.cut_stream = True
    with engine_at(server, api=api) as engine:
        pieces = []
        with pytest.raises(UserError, match="broke off|cannot be read"):
            for piece in engine.stream(ask("one two")[0]):
                pieces.append(piece)
        assert "".join(pieces) == "echo: one two"


class Turns(list):
    """A conversation that can be counted while it lives."""

    __hash__ = object.__hash__


def test_ten_thousand_requests_in_bounded_memory():
    alive, most, made = weakref.WeakSet(), 0, count()

    def conversations():
        nonlocal most
        for _ in range(10_000):
            turns = Turns([{"role": "user", "content": f"{next(made)} {'x' * 10_000}"}])
            alive.add(turns)
            most = max(most, len(alive))
            yield turns

    with FakeServer(keep=False) as server:
        server.reply = lambda text: text.split()[0]
        with engine_at(server, concurrency=8) as engine:
            seen = set()
            for number, one in engine.answers(conversations()):
                assert one.text == str(number)
                seen.add(number)
            assert engine.usage.requests == 10_000
    assert seen == set(range(10_000)) and most <= 2 * 8 + 2, most


# -- keys

def test_keys_come_from_the_environment_and_go_nowhere_else(monkeypatch):
    with FakeServer(key="sesame-1234") as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sesame-1234")
        with engine_at(server, retries=0) as engine, pytest.raises(UserError, match="said 401") as error:
            engine.generate(ask("a"))  # a key for openai.com is not sent to another address unasked
        assert "sesame" not in str(error.value) and "OPENAI_API_KEY" in str(error.value)
        monkeypatch.setenv("MY_KEY", "sesame-1234")
        for api in PACKAGES:
            with engine_at(server, key_variable="MY_KEY", api=api) as engine:
                assert engine.generate(ask("a"))[0].text == "echo: a"
                kept = {key: value for key, value in vars(engine).items() if key != "client"}
                assert "sesame" not in repr(kept) and "sesame" not in repr(engine.server)
        monkeypatch.delenv("MY_KEY")
        with pytest.raises(UserError, match="environment variable MY_KEY is not set"):
            engine_at(server, key_variable="MY_KEY")
    with pytest.raises(UserError, match="environment variable ANTHROPIC_API_KEY is not set"):
        monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
        OpenAIEngine.open(ModelSpec("m"), api="anthropic")


def test_what_belongs_to_the_server_is_refused(server):
    for spec, words in ((ModelSpec("m", dtype="float32"), "dtype=float32 is the server's matter"),
                        (ModelSpec("m", load="merged"), "model.load=merged is the server's matter")):
        with pytest.raises(UserError, match=words):
            OpenAIEngine.open(spec, url=server.url)
    with pytest.raises(UserError, match="takes input, output, cached_input"):
        engine_at(server, prices={"in": 1})
    with engine_at(server) as engine:
        with pytest.raises(UserError, match="cannot tell the tokens of a prompt"):
            engine.prompt_ids(ask("a")[0])
    with pytest.raises(UserError, match="closed"):
        engine.generate(ask("a"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    assert OpenAIEngine.missing() == "openai is not installed. It comes with: pip install 'supertrainer[api]'"
