"""Every kind of bad row, as a user meets it: `supertrainer train` ends with exit code 2, names file, row, key, value and
fix, writes nothing and loads no model."""

import base64
import io
import json

import pytest
from PIL import Image

from supertrainer import cli
from supertrainer.run import training

SMALL_LLM = ["experiment=train_llm", "model=tiny_llama", "model.config={hidden_size: 32, num_hidden_layers: 1}"]
SMALL_BERT = ["experiment=train_bert", "model=tiny_bert", "model.config={hidden_size: 32, num_hidden_layers: 1}"]
SMALL_MLLM = ["experiment=train_mllm", "model=tiny_idefics3"]


def talk(question="What is it?", answer="A thing."):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(*broken, count=12):
    """Good chat rows with `broken` at row (line) 3 and after."""
    rows = [talk(f"What is number {n}?", f"It is {n}.") for n in range(count)]
    return [*rows[:2], *broken, *rows[2:]]


def texts(*broken, count=12):
    rows = [{"text": f"a text about {n}", "label": "odd" if n % 2 else "even"} for n in range(count)]
    return [*rows[:2], *broken, *rows[2:]]


def lines(rows):
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def png(size=(8, 8), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def attempt(tmp_path, monkeypatch, capsys):
    """Run `supertrainer train` in an empty folder and return what it said, having checked that it left no trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))

    def run(files, *words, base=SMALL_LLM):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        before = snapshot(tmp_path)
        code = cli.main(["train", *base, *words])
        said = capsys.readouterr().err
        assert code == 2, said
        assert snapshot(tmp_path) == before, "something was written"
        return said

    return run


def says(said, *parts):
    for part in parts:
        assert part in said, f"{part!r} is not in:\n{said}"


FILES = {
    "missing": ({}, ["data.jsonl", "does not exist"]),
    "empty": ({"data.jsonl": ""}, ["data.jsonl", "the file holds no rows", "Fill it"]),
    "not UTF-8": ({"data.jsonl": lines(chats()).encode() + b'{"messages": "caf\xe9"}\n'},
                  ["data.jsonl, line 13", "not UTF-8", "0xe9", "Save the file as UTF-8"]),
    "broken JSON line": ({"data.jsonl": lines(chats('{"messages": [}\n'))},
                         ["data.jsonl, line 3", "not valid JSON", "Fix the line or delete it"]),
    "no object": ({"data.jsonl": lines(chats('["user", "hello"]\n'))}, ["data.jsonl, line 3", "not a JSON object"]),
    "wrong column": ({"data.jsonl": lines([{"mesages": row["messages"]} for row in chats()])},
                     ["data.jsonl", "mesages", "Did you mean"]),
}


@pytest.mark.parametrize("files,parts", FILES.values(), ids=FILES)
def test_files(attempt, files, parts):
    says(attempt(files, "dataset.path=data.jsonl"), *parts)


TURNS = {
    "late-changing type": ([{"messages": 7}], ["messages", "7"]),
    "NUL": ([talk("a\x00b")], ["messages", "NUL"]),
    "lone surrogate": (['{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}\n'],
                       ["messages", "surrogate"]),
    "empty content": ([talk("   ")], ["messages", "turn 1", "empty"]),
    "null content": ([talk(None)], ["messages", "turn 1"]),
    "content that is no text": ([talk(7)], ["messages", "turn 1", "7"]),
    "unknown role": ([{"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}],
                     ["messages", "turn 1", "'usr'", "Did you mean 'user'?"]),
    "bad role order": ([{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"},
                                      {"role": "assistant", "content": "c"}]}], ["messages", "turn 2", "system"]),
    "no assistant": ([{"messages": [{"role": "user", "content": "a"}]}], ["messages", "assistant"]),
    "rendered already": ([talk("<|im_start|>user\nhello<|im_end|>")], ["messages", "turn 1", "<|im_start|>"]),
}


@pytest.mark.parametrize("broken,parts", TURNS.values(), ids=TURNS)
def test_turns(attempt, broken, parts):
    said = attempt({"data.jsonl": lines(chats(*broken))}, "dataset.path=data.jsonl")
    says(said, "data.jsonl, line 3", *parts)
    assert said.strip().endswith((".", "?")), "the last sentence is the fix"


def test_the_budget_lets_some_rows_go_and_no_more(attempt):
    broken = [talk(""), talk(7)]
    said = attempt({"data.jsonl": lines(chats(*broken))}, "dataset.path=data.jsonl", "dataset.max_rejects=1")
    says(said, "data.jsonl, line 3", "data.jsonl, line 4", "dataset.max_rejects=1")


def test_a_prompt_longer_than_the_limit(attempt):
    said = attempt({"data.jsonl": lines(chats(talk("word " * 300)))}, "dataset.path=data.jsonl", "dataset.max_length=64",
                   "dataset.eval_fraction=0.1", "seed=1")
    says(said, "data.jsonl, line 3", "64", "dataset.max_length")


LABELS = {
    "empty text": ({"text": " ", "label": "odd"}, ["text", "empty"]),
    "null text": ({"text": None, "label": "odd"}, ["text", "missing"]),
    "text that is no text": ({"text": 5, "label": "odd"}, ["text", "5"]),
    "no label": ({"text": "a", "label": None}, ["label", "missing"]),
}


@pytest.mark.parametrize("row,parts", LABELS.values(), ids=LABELS)
def test_labels(attempt, row, parts):
    said = attempt({"data.jsonl": lines(texts(row))}, "dataset.path=data.jsonl", base=SMALL_BERT)
    says(said, "data.jsonl, line 3", *parts)


@pytest.mark.parametrize("label,parts", [(9, ["9", "out of range"]), (-1, ["-1", "out of range"]),
                                         (float("nan"), ["missing"]), ("oddd", ["'oddd'", "unknown", "odd"])])
def test_a_label_that_the_training_rows_do_not_have(attempt, label, parts):
    held_out = [{"text": "one", "label": "odd"}, {"text": "two", "label": label}]
    said = attempt({"data.jsonl": lines(texts()), "held.jsonl": lines(held_out)}, "dataset.path=data.jsonl",
                   "dataset.eval_path=held.jsonl", base=SMALL_BERT)
    says(said, "held.jsonl, line 2", "label", *parts)
    if "missing" not in parts:
        says(said, "even, odd")


def test_one_class_only(attempt):
    rows = [{"text": f"text {n}", "label": "same"} for n in range(10)]
    says(attempt({"data.jsonl": lines(rows)}, "dataset.path=data.jsonl", base=SMALL_BERT), "data.jsonl", "same",
         "at least two classes")


GOOD_IMAGE = {"image": "good.png", "question": "What?", "answer": "this"}
IMAGES = {
    "missing": ({**GOOD_IMAGE, "image": "none.png"}, {}, ["none.png", "does not exist"]),
    "no image": ({**GOOD_IMAGE, "image": "text.png"}, {"text.png": b"hello"}, ["text.png", "not an image"]),
    "truncated": ({**GOOD_IMAGE, "image": "cut.png"}, {"cut.png": png((64, 64))[:-30]}, ["cut.png"]),
    "empty": ({**GOOD_IMAGE, "image": "empty.png"}, {"empty.png": b""}, ["empty.png"]),
    "too large": ({**GOOD_IMAGE, "image": "large.png"}, {"large.png": png((300, 300))}, ["300", "max_image_pixels"]),
    "outside the roots": ({**GOOD_IMAGE, "image": "/etc/hostname"}, {}, ["/etc/hostname", "image_roots"]),
    "remote": ({**GOOD_IMAGE, "image": "http://localhost:1/a.png"}, {}, ["remote_images"]),
    "no answer": ({**GOOD_IMAGE, "answer": ""}, {}, ["answer", "empty"]),
}


@pytest.mark.parametrize("row,files,parts", IMAGES.values(), ids=IMAGES)
def test_images(attempt, row, files, parts):
    rows = [{**GOOD_IMAGE, "question": f"What is {n}?"} for n in range(10)]
    said = attempt({"data.jsonl": lines([*rows[:2], row, *rows[2:]]), "good.png": png(), **files},
                   "dataset=mllm/files", "dataset.path=data.jsonl", "dataset.max_image_pixels=40000", base=SMALL_MLLM)
    says(said, "data.jsonl, line 3", *parts)


@pytest.mark.parametrize("content,images", [("<image><image> two?", 1), ("<image> one?", 2)])
def test_images_and_places_differ(attempt, content, images):
    picture = "data:image/png;base64," + base64.b64encode(png()).decode()
    rows = [{"messages": talk(f"<image> what is {n}?")["messages"], "images": [picture]} for n in range(8)]
    broken = {"messages": talk(content)["messages"], "images": [picture] * images}
    said = attempt({"data.jsonl": lines([*rows[:2], broken, *rows[2:]])}, "dataset=mllm/files", "dataset.path=data.jsonl",
                   base=SMALL_MLLM)
    says(said, "data.jsonl, line 3", "1", "image")


# What rows need of a model: its template, its vocabulary, its padding.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny chat model and its tokenizer, saved as anyone would save them."""
    from supertrainer.models.base import FastModel

    words = [f"What is number {n}? It is {n}." for n in range(12)]
    model, tokenizer = FastModel.from_pretrained("tiny_llama", texts=words, config={"hidden_size": 32, "num_hidden_layers": 1})
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed(saved, folder, template=True, **values):
    """Copy the model with other values in its tokenizer's or its own configuration."""
    import shutil

    shutil.copytree(saved, folder)
    if not template:
        (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer_config.json", "config.json"):
        content = json.loads((folder / name).read_text())
        content.update({key: value for key, value in values.items() if key in content})
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return folder


FROM_FOLDER = ["experiment=train_llm", "model.lora=null"]


def test_a_model_without_a_template_is_told_a_likely_one(attempt, saved, tmp_path_factory):
    folder = changed(saved, tmp_path_factory.mktemp("x") / "plain", template=False)
    says(attempt({"data.jsonl": lines(chats())}, "dataset.path=data.jsonl", f"model.name={folder}", base=FROM_FOLDER),
         "no chat template", "dataset.template=chatml")


def test_a_vocabulary_larger_than_the_embedding(attempt, saved, tmp_path_factory):
    folder = changed(saved, tmp_path_factory.mktemp("x") / "small", vocab_size=100)
    says(attempt({"data.jsonl": lines(chats())}, "dataset.path=data.jsonl", f"model.name={folder}", base=FROM_FOLDER),
         "every token has a row in the embedding", "100", "resize_token_embeddings")


def test_no_token_of_the_whole_set_can_be_trained(attempt):
    rows = [{"messages": [{"role": "user", "content": f"Number {n}?"}, {"role": "assistant", "content": f"{n}", "train": False}]}
            for n in range(10)]
    says(attempt({"data.jsonl": lines(rows)}, "dataset.path=data.jsonl"), "None of the", "data.jsonl, line", "none of its")


def test_a_template_that_never_ends_a_turn(attempt):
    template = ("{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    says(attempt({"data.jsonl": lines(chats()), "endless.jinja": template}, "dataset.path=data.jsonl",
                 "dataset.template=endless.jinja"), "stop")


@pytest.mark.parametrize("pad", ["<|im_end|>", ...], ids=["pad is eos", "no pad"])
def test_padding_that_would_hide_the_end_of_a_turn_is_replaced_and_the_end_trained(saved, tmp_path, pad):
    from supertrainer import compose, train

    folder = changed(saved, tmp_path / "model", pad_token=pad)
    (tmp_path / "data.jsonl").write_text(lines(chats()))
    run = train(compose("train_llm", f"model.name={folder}", "model.lora=null", f"dataset.path={tmp_path / 'data.jsonl'}",
                        "mode=sanity_check", f"run.root={tmp_path / 'runs'}"))
    assert run.tokenizer.pad_token_id != run.tokenizer.convert_tokens_to_ids("<|im_end|>") and not run.checks.failed
    trained = [token["text"] for token in run.results["loss_tokens"][0] if token["trained"]]
    assert trained[-1] == "<|im_end|>"
