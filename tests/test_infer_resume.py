"""`infer` into a file: killed at every point it goes on where it stopped; runs that do not belong together are refused."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from openai_server import FakeServer
from PIL import Image
from test_serve import byte_tokenizer, llama

from supertrainer import compose, infer, register
from supertrainer.cli import main
from supertrainer.inference import clients
from supertrainer.inference.base import Classification, Completion, Engine, Sampling
from supertrainer.run import batching, talking
from supertrainer.run.engines import engines_here
from supertrainer.run.resuming import AnswersFile
from supertrainer.runtime import UserError

TEXTS = [f"question {number}" + "?" * (number % 7) for number in range(21)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    llama(tokenizer).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def configured(folder, out, *words):
    return compose("infer", f"model.path={folder}", f"output.path={out}", "model_kwargs.dtype=float32", "engine.batch_size=2",
                   "sampling.max_new_tokens=5", *words)


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answers_of(path):
    return [(line["text"], line["answer"], line["tokens"], line["finish_reason"]) for line in lines_of(path)]


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


# ---------------------------------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize("words", [(), ("sampling.do_sample=true", "sampling.temperature=1.5"), ("sampling.do_sample=true", "sampling.seed=7")])
def test_a_run_killed_at_any_answer_ends_like_an_unbroken_one(folder, tmp_path, monkeypatch, words):
    whole = infer(configured(folder, tmp_path / "whole.jsonl", *words), TEXTS)
    assert [row["text"] for row in whole] == TEXTS and lines_of(tmp_path / "whole.jsonl") == whole
    plain = AnswersFile.append
    for stop in (0, 1, 9, 17):
        out = tmp_path / f"killed-{stop}.jsonl"

        def append(self, answers, stop=stop):
            plain(self, answers[: max(stop - self.done, 0)])  # a kill in the middle of a write
            if self.done >= stop:
                with self.path.open("a") as file:
                    file.write('{"text": "half a li')
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(AnswersFile, "append", append)
            with pytest.raises(Killed):
                infer(configured(folder, out, *words), TEXTS)
        assert out.read_text().count("\n") == stop
        infer(configured(folder, out, *words), TEXTS)
        assert answers_of(out) == answers_of(tmp_path / "whole.jsonl")


def test_what_is_answered_is_not_asked_again(tmp_path, monkeypatch, asking):
    asking.stop_before = "question 9??"
    with pytest.raises(UserError, match=r"no more today(.|\n)*8 of 21 answers are in .*goes on from there"):
        infer(asked_of(tmp_path / "a.jsonl"), TEXTS)
    assert asking.asked[:8] == TEXTS[:8] and len(lines_of(tmp_path / "a.jsonl")) == 8
    asking.stop_before, before = None, len(asking.asked)
    found = infer(asked_of(tmp_path / "a.jsonl"), TEXTS)
    assert asking.asked[before:] == TEXTS[8:] and [row["answer"] for row in found] == [text.upper() for text in TEXTS]
    opened = asking.opened
    assert infer(asked_of(tmp_path / "a.jsonl"), TEXTS) == found and asking.opened == opened  # no model for nothing


class Asking(Engine):
    """Answers in capitals; keeps what it was asked."""

    name, family, honours, batch_size = "asking", "llm", ("max_new_tokens",), 2
    asked, opened, stop_before = [], 0, None

    @classmethod
    def open(cls, model, **options):
        cls.opened += 1
        return cls()

    def generate(self, conversations, sampling=None, images=None, progress=False, tools=None, adapter=None):
        texts = [turns[-1]["content"] for turns in conversations]
        type(self).asked += texts
        if self.stop_before in texts:
            raise UserError("The server answers no more today.")
        return [Completion(text.upper(), 1, "stop", 0.0) for text in texts]


@pytest.fixture
def asking():
    register("engine", "asking", replace=True)(Asking)
    Asking.asked, Asking.opened, Asking.stop_before = [], 0, None
    return Asking


def asked_of(out, *words):
    return compose("infer", "model.path=somewhere", f"output.path={out}", "engine.name=asking", "engine.batch_size=2", *words)


def test_a_real_kill_loses_nothing(folder, tmp_path):
    """The process kills itself (SIGKILL) when it has written 5 answers of 21, and is started again."""
    code = (
        "import os, signal, sys\n"
        "from supertrainer.cli import main\n"
        "from supertrainer.run.resuming import AnswersFile\n"
        "plain = AnswersFile.append\n"
        "def append(self, answers):\n"
        "    plain(self, answers)\n"
        "    if self.done >= int(os.environ['KILL_AT']): os.kill(os.getpid(), signal.SIGKILL)\n"
        "AnswersFile.append = append\n"
        "sys.exit(main(sys.argv[1:]))\n")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)))
    words = ["infer", f"model.path={folder}", f"input.path={tmp_path / 'in.jsonl'}", f"output.path={tmp_path / 'out.jsonl'}",
             "sampling.max_new_tokens=4", "engine.batch_size=2"]
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *words], env={**os.environ, "KILL_AT": "5"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert 5 <= len(lines_of(tmp_path / "out.jsonl")) < 21
    assert main(words) == 0
    assert [line["id"] for line in lines_of(tmp_path / "out.jsonl")] == list(range(21))


def test_the_command_says_that_it_goes_on(tmp_path, asking, capsys, caplog):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    words = ["infer", "model.path=m", f"input.path={tmp_path / 'in.txt'}", f"output.path={tmp_path / 'out.jsonl'}", "engine.name=asking"]
    asking.stop_before = TEXTS[-1]
    assert main([*words, "engine.batch_size=2"]) == 2 and "16 of 21 answers are in" in capsys.readouterr().err
    asking.stop_before = None
    assert main([*words, "engine.batch_size=4"]) == 0  # another pace is the same run
    assert "21 answers in" in capsys.readouterr().out and len(lines_of(tmp_path / "out.jsonl")) == 21


# ---------------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("words,rows,named", [
    (["sampling.max_new_tokens=9"], TEXTS, "sampling.max_new_tokens was 64 and is 9"), (["system=Be brief"], TEXTS, "system was null"),
    (["seed=1"], TEXTS, "seed was 42 and is 1"), (["model.path=other"], TEXTS, "model.path"), ([], TEXTS[:-1], "rows.count was 21 and is 20"),
    ([], [*TEXTS[:-1], "another"], "rows.sha256"), (["engine.temper=3"], TEXTS, "engine.temper")])
def test_answers_of_different_runs_are_kept_apart(tmp_path, asking, words, rows, named):
    infer(asked_of(tmp_path / "a.jsonl"), TEXTS)
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        infer(asked_of(tmp_path / "a.jsonl", *words), rows)
    assert (tmp_path / "a.jsonl").read_bytes() == before
    infer(asked_of(tmp_path / "a.jsonl", *words, "output.overwrite=true"), rows)
    assert len(lines_of(tmp_path / "a.jsonl")) == len(rows)


def test_a_model_that_was_trained_further_is_another(folder, tmp_path):
    tokenizer = byte_tokenizer()
    model = llama(tokenizer)
    place = tmp_path / "model"
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    out = tmp_path / "a.jsonl"
    infer(configured(place, out), TEXTS[:2])
    with torch.no_grad():
        model.lm_head.weight[5] += 0.5
    model.save_pretrained(place)
    with pytest.raises(UserError, match="model.sha256"):
        infer(configured(place, out), TEXTS[:2])


def test_files_that_are_not_ours_or_were_changed_are_left_alone(tmp_path, asking):
    out = tmp_path / "a.jsonl"
    out.write_text("somebody's notes\n")
    with pytest.raises(UserError, match=r"a.jsonl.run.json(.|\n)*overwrite"):
        infer(asked_of(out), TEXTS)
    assert out.read_text() == "somebody's notes\n"
    infer(asked_of(out, "output.overwrite=true"), TEXTS)
    lines = out.read_text().splitlines(keepends=True)
    for changed, number in ((lines[:3] + lines[4:], 4), (lines + lines[-1:], 22), ([*lines[:5], "no json\n", *lines[6:]], 6), (lines[1:2] + lines, 1)):
        out.write_text("".join(changed))
        with pytest.raises(UserError, match=f"line {number} is not the answer to row {number}"):
            infer(asked_of(out), TEXTS)
        assert out.read_text() == "".join(changed)


def test_two_at_a_time_are_refused(tmp_path, asking):
    with AnswersFile(tmp_path / "a.jsonl", [{"text": "x"}], {}), pytest.raises(UserError, match="another process"):
        infer(asked_of(tmp_path / "a.jsonl"), TEXTS)


def test_images_count_by_what_they_show(tmp_path):
    Image.new("L", (3, 3), 7).save(tmp_path / "a.png")
    rows = [{"image": str(tmp_path / "a.png"), "question": "Which?"}]
    with AnswersFile(tmp_path / "out.jsonl", rows, {}) as file:
        file.append([{**rows[0], "answer": "7"}])
    Image.new("L", (3, 3), 9).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="rows.sha256"), AnswersFile(tmp_path / "out.jsonl", rows, {}):
        pass


# ------------------------------------------------------------------------------------------------------- servers, batches

@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setattr(clients, "BACK_OFF", 0.0)


def test_a_server_that_breaks_down_half_way(tmp_path, no_pauses):
    rows = [f"row {number}" for number in range(60)]
    out = tmp_path / "a.jsonl"
    with FakeServer() as server:
        cfg = compose("infer", "engine=openai", f"engine.url={server.url}", "engine.concurrency=4", "engine.retries=0", "model.path=m",
                      f"output.path={out}")
        server.fail(500, times=1)
        with pytest.raises(UserError):
            infer(cfg, rows)
        infer(cfg, rows[:60])
    assert [line["answer"] for line in lines_of(out)] == [f"echo: row {number}" for number in range(60)]


class OutOfOrder(Asking):
    """A server whose answers come in any order; counts how many rows were taken before the first was written."""

    name = "out_of_order"

    def answers(self, conversations, sampling=None, images=None, tools=None, adapter=None):
        window = []
        for number, turns in enumerate(conversations):
            window.append((number, Completion(turns[-1]["content"].upper(), 1, "stop", 0.0)))
            if len(window) == 8:
                yield from reversed(window)
                window = []
        yield from reversed(window)


def test_ten_thousand_rows_in_order_whatever_order_they_come_in(tmp_path, monkeypatch):
    register("engine", "out_of_order", replace=True)(OutOfOrder)
    monkeypatch.setattr(os, "fsync", lambda number: None)
    rows = [{"text": f"t{number}", "id": number} for number in range(10_000)]
    infer(compose("infer", "model.path=m", f"output.path={tmp_path / 'a.jsonl'}", "engine.name=out_of_order", "~engine.batch_size"), rows)
    assert all(line["id"] == number and line["answer"] == f"T{number}" for number, line in enumerate(lines_of(tmp_path / "a.jsonl")))


def test_batch_verbs(tmp_path, capsys, no_pauses, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k3y")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"row {n}", "id": n}) + "\n" for n in range(5)))
    folder = str(tmp_path / "batch")
    with FakeServer(key="k3y") as server:
        words = ["submit", "engine=openai", f"engine.url={server.url}", "engine.retries=1", "engine.key_variable=OPENAI_API_KEY", "model.path=m", f"input.path={tmp_path / 'in.jsonl'}",
                 f"output.path={folder}"]
        assert main(["infer", *words]) == 0 and "supertrainer infer status" in capsys.readouterr().out
        assert main(["infer", *words]) == 0 and len(server.batches) == 1  # a second time sends nothing
        assert "k3y" not in "".join(file.read_text() for file in (tmp_path / "batch").iterdir())
        assert main(["infer", "download", folder]) == 2
        server.work(broken=["row 3"])
        capsys.readouterr()
        assert main(["infer", "status", folder]) == 0 and "4 answered, 1 failed" in capsys.readouterr().out
        assert main(["infer", "download", folder]) == 0 and "4 of 5 rows have an answer" in capsys.readouterr().out
        lines = lines_of(tmp_path / "batch" / "results.jsonl")
        assert [line["id"] for line in lines] == list(range(5)) and lines[4]["answer"] == "echo: row 4" and "error" in lines[3]
        assert main(["infer", "retry", folder]) == 0
        server.work()
        assert main(["infer", "download", folder]) == 0
        assert lines_of(tmp_path / "batch" / "results.jsonl")[3]["answer"] == "echo: row 3"
        assert main(["infer", "cancel", folder]) == 0
    capsys.readouterr()
    assert main(["infer", "status", str(tmp_path)]) == 2 and "Submit one first" in capsys.readouterr().err
    assert main(["infer", "submit", "model.path=m", "input.text=x", f"output.path={tmp_path / 'no'}"]) == 2
    assert "engine=openai" in capsys.readouterr().err and main(["infer", "cancel"]) == 2
    with pytest.raises(UserError, match="no verb"):
        batching.follow("delete", folder)


# ------------------------------------------------------------------------------------------------- options, talks, engines

def test_schemas_and_grammars_from_files(tmp_path):
    (tmp_path / "s.json").write_text('{"type": "object"}')
    (tmp_path / "g.lark").write_text('start: "a"')
    cfg = compose("infer", "model.path=m", f"sampling.json_schema={tmp_path / 's.json'}")
    from supertrainer.run.answering import sampling_of

    assert json.loads(sampling_of(cfg).json_schema) == {"type": "object"}
    assert json.loads(sampling_of(compose("infer", "model.path=m", "sampling.json_schema={type: object}")).json_schema) == {"type": "object"}
    assert sampling_of(compose("infer", "model.path=m", f"sampling.grammar={tmp_path / 'g.lark'}")).grammar == 'start: "a"'
    with pytest.raises(UserError, match="is no file"):
        sampling_of(compose("infer", "model.path=m", "sampling.json_schema=none.json"))
    with pytest.raises(UserError, match="model.load"):
        compose("infer", "model.path=m", "model.load=bas")


class Seeing(Asking):
    """Sees images; streams; has labels if it is asked to be an encoder."""

    name, family, honours = "seeing", "mllm", tuple(Sampling.__dataclass_fields__)
    seen = []

    def stream(self, conversation, sampling=None, images=None):
        type(self).seen.append((conversation, [picture.size for picture in images or []]))
        if conversation[-1]["content"][-1]["text"] == "fail":
            raise UserError("That cannot be answered.")
        yield from ("I see ", str(len(images or [])))

    def generate(self, conversations, sampling=None, images=None, progress=False, tools=None, adapter=None):
        return [Completion("yes", 1, "stop", 0.0, probabilities={"no": 0.25, "yes": 0.75}) for _ in conversations]

    def classify(self, texts, progress=False):
        return [Classification("os", {"os": 0.9, "re": 0.1}, 0.0) for _ in texts]


def talk_of(monkeypatch, capsys, lines, *words, family="mllm"):
    register("engine", "seeing", replace=True)(Seeing)
    Seeing.seen, Seeing.family = [], family
    said = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    talking.infer_command(compose("infer", "model.path=m", "engine.name=seeing", "~engine.batch_size", *words), terminal)
    return capsys.readouterr().out


def test_a_conversation_with_images(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (4, 2)).save(tmp_path / "a b.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    out = talk_of(monkeypatch, capsys, [f"/image '{tmp_path / 'a b.png'}'", "What is it?", f"/image {tmp_path / 'bad.png'}", "/image none.png",
                                        "fail", "And now?", "/new", "Hello", "/hepl", "/quit"], "system=Look.")
    turns, images = Seeing.seen[0]
    assert [turn["role"] for turn in turns] == ["system", "user"] and images == [(4, 2)]
    assert turns[1]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    turns, images = Seeing.seen[2]  # the failed question is not part of it, the image of the first still is
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"] and images == [(4, 2)]
    assert Seeing.seen[3][1] == [] and len(Seeing.seen[3][0]) == 2  # a new conversation
    assert "I see 1" in out and "That cannot be answered." in out and "bad.png" in out and "none.png" in out and "/image PATH" in out


def test_a_conversation_with_choices_a_text_model_and_an_encoder(monkeypatch, capsys):
    out = talk_of(monkeypatch, capsys, ["Is it?", ""], "sampling.choices=[yes,no]")
    assert "yes   (yes 75.0%, no 25.0%)" in out
    assert "needs a vision-language model" in talk_of(monkeypatch, capsys, ["/image a.png", ""], family="llm")
    assert "os 90%  re 10%" in talk_of(monkeypatch, capsys, ["walk", ""], family="bert")
    with pytest.raises(UserError, match="model.adapter=x is none of model.adapters"):
        talk_of(monkeypatch, capsys, [""], "model.adapter=x")


def test_doctor_lists_every_engine_and_what_it_lacks(capsys, monkeypatch):
    class Absent(Engine):
        """An engine of nowhere."""

        families = ("llm",)

        @classmethod
        def missing(cls):
            return "It needs the package nowhere: pip install nowhere"

    register("engine", "absent", replace=True)(Absent)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "absent" in said and "pip install nowhere" in said and "hf" in said
    found = {engine.name: engine for engine in engines_here()}
    assert {"hf", "onnx", "openvino", "tensorrt", "llama_cpp", "openai", "vllm", "unsloth"} <= set(found) and not found["hf"].missing
    with pytest.raises(UserError, match="pip install nowhere"):
        infer(compose("infer", "model.path=m", "engine.name=absent"), ["x"])
    assert main(["doctor", "--fix"]) == 2
