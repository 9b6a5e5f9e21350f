"""The preview: marks exactly around what is trained, honest counts, safe with anybody's text, and no model loaded."""

import io
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import supertrainer
from supertrainer.check import Check
from supertrainer.cli import main
from supertrainer.config import compose
from supertrainer.report.preview import (
    Part,
    PreviewData,
    Rejection,
    ShownImage,
    ShownRow,
    ShownText,
    ShownTurn,
    Stretch,
    Token,
    length_bins,
    printable,
    token_places,
)
from supertrainer.report.preview_html import as_fragment, as_html, tokens_fragment
from supertrainer.report.preview_terminal import as_text, use_colour
from supertrainer.runtime import UserError

sys.path.insert(0, str(Path(__file__).parent))
import tiny_vision  # noqa: E402

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


def greeting(said="Hi", answer="Hello", **fields):
    """A row whose trained text is `answer` and the end of turn."""
    turns = (ShownTurn("user", (Stretch(USER, kind="template"), Stretch(said), Stretch(END + "\n", kind="template"))),
             ShownTurn("assistant", (Stretch(ASSISTANT, kind="template"), Stretch(answer, True),
                                     Stretch(END, True, kind="template"), Stretch("\n", kind="template"))))
    tokens = (Token(5, said), Token(7, answer, 7), Token(2, END, 2), Token(3, "\n"))
    return ShownRow(1, "train", "line 1", (ShownText(turns, tokens, prompt=USER + said + END + "\n" + ASSISTANT,
                                                     prompt_note="The training text begins with it."),), **fields)


def small(*rows, **fields):
    parts = [Part("train", 1200, 3, [10, 20, 600], truncated=1, lost_end=1, roles={"user": (400, 0), "assistant": (230, 228)})]
    return PreviewData("A set", "llm", "chat", [("model", "tiny")], list(rows), **{"parts": parts, "max_length": 512, **fields})


# ---- the data model ----------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 3000), min_size=1, max_size=200), st.one_of(st.none(), st.integers(2, 2000)))
def test_every_row_is_in_one_bar_and_max_length_is_an_edge(lengths, max_length):
    bins = length_bins(lengths, max_length)
    for one in bins:
        inside = [n for n in lengths if max(n, 1) >= one.low and (one.high is None or n <= one.high)]
        assert one.count == len(inside), one
    assert sum(one.count for one in bins) == len(lengths)
    assert len(bins) <= 40
    if max_length:
        assert sum(one.count for one in bins if one.over) == sum(n > max_length for n in lengths)


@given(st.lists(st.text("ab \n", min_size=0, max_size=4), max_size=12))
def test_tokens_cover_the_text_in_order(pieces):
    places = token_places("".join(pieces), pieces)
    assert ["".join(pieces)[start:end] for start, end in places] == pieces


def test_tokens_that_are_not_the_text_have_no_place():
    assert token_places("one two", ["one", " too"]) is None


def test_control_characters_are_written_out():
    assert printable("\x1b]0;owned\x07 \u202eabc \ud83d ok\n") == "\\x1b]0;owned\\x07 \\u202eabc \\ud83d ok\n"


# ---- in a terminal -----------------------------------------------------------------------------------------------------

def test_without_colour_marks_stand_exactly_around_trained_text():
    text = as_text(small(greeting()), colour=False, width=80)
    assert "⟦Hello<|im_end|>⟧↵" in text and "Hi<|im_end|>↵" in text
    rows = text[text.index("train row 1"): text.index("Lengths of")]
    assert re.findall("⟦(.*?)⟧", rows) == ["Hello<|im_end|>"]


def test_a_long_trained_text_keeps_one_pair_of_marks_and_every_character():
    answer = " ".join(f"word{number}" for number in range(200))
    text = as_text(small(greeting(answer=answer)), colour=False, width=60)
    rows = text[text.index("train row 1"): text.index("Lengths of")]
    lines = [line.split("│ ", 1)[-1] for line in rows.splitlines()]
    assert rows.count("⟦") == rows.count("⟧") == 1
    assert " ".join(lines).split("⟦")[1].split("⟧")[0].split() == [*answer.split()[:-1], f"word199{END}"]
    assert max(map(len, lines)) <= 60


def test_marks_cannot_be_forged_and_a_terminal_cannot_be_driven():
    text = as_text(small(greeting(said="⟦I am trained⟧ \x1b[2J\x1b]0;x\x07\u202e")), colour=False)
    assert "⟦I am trained" not in text and "\\u27e6I am trained\\u27e7" in text
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text


def test_with_colour_trained_text_is_underlined_too():
    text = as_text(small(greeting()), colour=True)
    code = next(code for code, words in re.findall("\x1b\\[([0-9;]*)m([^\x1b]*)", text) if words.startswith("Hello"))
    assert "4" in code.split(";") and "32" in code.split(";")
    assert "⟦" not in text


def test_colour_follows_the_stream_and_the_environment(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert use_colour(Terminal()) and not use_colour(io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert use_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_colour(Terminal())


def test_the_terminal_says_what_does_not_fit():
    rejected = [Rejection("a.jsonl, line 7", "turn 2 is empty", "Fill it in.", "messages")]
    text = as_text(small(greeting(), rejected=rejected, rejected_total=4, warnings=["3 duplicates"],
                         checks=[Check("masks", True, 0, 0), Check("ends", False, 2, 0)]), width=200)
    assert "1 of 3 train rows (a sample of 1,200) is longer than dataset.max_length=512 and is cut; 1 of them without the end of a trained turn." in text
    assert "4 rows are rejected; the first 1:" in text
    assert "a.jsonl, line 7, column 'messages': turn 2 is empty. Fill it in." in text
    assert text.index("✗ ends") < text.index("✓ masks")
    assert re.search(r"assistant +228 of +230", text) and re.search(r"all +228 of +630 +36 %", text)


def test_tokens_are_listed_on_demand_and_images_take_one_line():
    row = ShownRow(1, "train", "x", (ShownText((ShownTurn("user", (Stretch("image 1", kind="image", tokens=3),)),),
                                               (Token(9, "<image>", image=True),) * 3 + (Token(4, "yes", 4),)),),
                   (ShownImage(None, 20, 10, 3),))
    plain, listed = as_text(small(row)), as_text(small(row), tokens=True)
    assert "[image 1: 3 tokens]" in plain and "image 1: 20 × 10 pixels, 3 tokens" in plain and "place" not in plain
    assert re.search(r"0 +9 +· +<image>  × 3", listed) and re.search(r"3 +4 +4 +⟦yes⟧", listed)


# ---- as HTML -----------------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "rect", "path"}


class Page(HTMLParser):
    """Collects what a browser would see, and complains about tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.marked, self.pres, self.links, self.words, self.tags = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")], attrs
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "mark":
            self.marked.append("")
        if tag == "pre":
            self.pres.append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag, tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.words.append(data)
        for tag, found in (("mark", self.marked), ("pre", self.pres)):
            if tag in self.stack:
                found[-1] += data


def test_the_page_is_one_file_that_says_it_all():
    text = as_html(small(greeting(), rejected=[Rejection("a.jsonl, line 7", "turn 2 is empty", "Fill it in.", "messages")],
                         rejected_total=1, efficiency={"padded": 0.5, "packed": 0.98}, batching="packed"))
    page = Page(text)
    assert page.links == [] and "script" not in page.tags and "http" not in text and "url(" not in text and "@import" not in text
    words = " ".join(" ".join(page.words).split())
    for said in ("1,200", "228", "630", "98.0 %", "a.jsonl, line 7", "turn 2 is empty", "Fill it in.", "max_length 512"):
        assert said in words, said
    assert "Hello<|im_end|>" in page.marked and not [said for said in page.marked if "Hi" in said]
    training, prompt = page.pres[:2]
    plain = USER + "Hi" + END + "\n" + ASSISTANT
    assert training.replace("↵", "") == plain + "Hello" + END + "\n" and prompt.replace("↵", "") == plain
    assert 'lang="en"' in text and "prefers-color-scheme: dark" in text and "underline" in text


EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> {{ 7*7 }} \u202e"


def everywhere(text):
    """A preview in which every text is `text`."""
    row = ShownRow(1, text, text, (ShownText((ShownTurn(text, (Stretch(text), Stretch(text, True, 2.0, "template"), Stretch(
        text, kind="image", tokens=2)), text),), (Token(1, text, text), Token(2, text)), text, 2, True, text, text, False),),
        (ShownImage(None, 1, 1, 1, text),), {text: text}, text)
    part = Part(text, 3, 3, [1, 2, 9], 1, 1, 1, {text: (3, 1)}, (3, 1), {text: 3})
    return PreviewData(text, "llm", "chat", [(text, text)], [row], [part], 4, [Rejection(text, text, text, text)], 2, [text],
                       [Check(text, False, text, text, text)], {text: 0.5}, text, text)


@pytest.mark.parametrize("make", [as_html, as_fragment])
def test_no_text_of_a_row_becomes_markup(make):
    page = Page(make(everywhere(EVIL)))
    assert "script" not in page.tags and page.tags.count("img") == 0 and page.links == []
    assert "{{ 7*7 }}" in " ".join(page.words) and "\u202e" not in " ".join(page.words)


def test_no_text_of_a_row_becomes_markup_in_the_token_table():
    page = Page(tokens_fragment([Token(1, EVIL, 1), Token(2, EVIL)], EVIL))
    assert "script" not in page.tags and "img" not in page.tags and len(page.marked) == 1


def test_a_fragment_styles_nothing_but_itself():
    text = as_fragment(small(greeting()))
    assert "<html" not in text and "<body" not in text
    css, depth, outer = re.sub(r"/\*.*?\*/", "", re.search("<style>(.*?)</style>", text, re.S)[1]), 0, ""
    selectors = []
    for piece in re.findall(r"[^{}]+|[{}]", css):
        if piece == "{":
            media = outer.strip().startswith("@")
            selectors += [] if media or depth else [outer.strip()]
            depth += 0 if media else 1
        elif piece == "}":
            depth = max(0, depth - 1)
        outer = piece
    assert selectors and all(".st-preview" in one for group in selectors for one in group.split(","))


def test_images_are_in_the_page_itself():
    picture = ShownImage("data:image/png;base64,AAAA", 8, 8, 4)
    page = Page(as_html(small(greeting(images=(picture,)))))
    assert page.links == ["data:image/png;base64,AAAA"]


# ---- from a configuration ----------------------------------------------------------------------------------------------

CHATS = [{"messages": [{"role": "system", "content": f"Be brief, {number}."}, {"role": "user", "content": f"What is {number} + 1?"},
                       {"role": "assistant", "content": f"It is {number + 1}."}, {"role": "user", "content": "Sure?"},
                       {"role": "assistant", "content": "Yes & <b>no</b>."}]} for number in range(40)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def llm(path, *words):
    return ["+experiment=train_llm", "model=tiny_llama", "dataset=llm/files", f"dataset.path={path}", *words]


def seen(words, **how):
    from supertrainer.run import preview

    return preview(compose("train", *words), **how)


@pytest.fixture
def chats(in_tmp):
    return write(in_tmp / "chats.jsonl", CHATS)


def trained(text):
    return ["".join(piece.text for piece in turn.stretches if piece.trained) for turn in text.turns if turn.role == "assistant"]


def test_chats_are_marked_by_hand_written_expectations(chats):
    found = seen(llm(chats), rows=3)
    assert len(found.rows) == 3 and found.kind == "chat"
    text = found.rows[0].texts[0]
    number = int(re.search(r"Be brief, (\d+)", text.text)[1])
    assert text.text == (f"<|im_start|>system\nBe brief, {number}.<|im_end|>\n<|im_start|>user\nWhat is {number} + 1?<|im_end|>\n"
                         f"<|im_start|>assistant\nIt is {number + 1}.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
                         "<|im_start|>assistant\nYes & <b>no</b>.<|im_end|>\n")
    assert trained(text) == [f"It is {number + 1}.<|im_end|>", "Yes & <b>no</b>.<|im_end|>"]
    assert [turn.role for turn in text.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert text.prompt == text.text[: text.text.rindex("Yes")] and text.prompt_same
    assert "".join(token.text for token in text.tokens if token.trained) == "".join(trained(text))
    assert all(token.label in (None, token.id) for token in text.tokens)
    assert [check.passed for check in found.checks] == [True] * len(found.checks) and len(found.checks) == 5


def test_counts_are_over_all_rows(chats):
    found = seen(llm(chats, "dataset.eval_fraction=0.25"), rows=1)
    by_name = {part.name: part for part in found.parts}
    assert by_name["train"].rows + by_name["eval"].rows == 40 and len(by_name["train"].lengths) == by_name["train"].rows
    everything = seen(llm(chats, "dataset.eval_fraction=0.25"), rows=by_name["train"].rows)
    assert [len(row.texts[0].tokens) for row in everything.rows] == list(by_name["train"].lengths)
    assert sum(row.texts[0].trained for row in everything.rows) == by_name["train"].roles["assistant"][1]
    assert by_name["train"].roles["user"][1] == by_name["train"].roles["system"][1] == 0
    assert set(found.efficiency) >= {"padded", "packed"} and all(0 < share <= 1 for share in found.efficiency.values())


def test_what_is_cut_is_counted_and_not_marked(chats):
    whole = seen(llm(chats), row="3").rows[0].texts[0]
    limit = len(whole.tokens) - 3
    found = seen(llm(chats, f"dataset.max_length={limit}"), row=3)
    text = found.rows[0].texts[0]
    assert len(text.tokens) == limit and text.cut == 3 and text.lost_end and whole.text.startswith(text.text)
    assert trained(text)[-1] == trained(whole)[-1][: len(trained(text)[-1])] and END not in trained(text)[-1]
    part = found.parts[0]
    assert part.truncated == sum(length > limit for length in part.lengths) > 0 and part.lost_end == part.truncated
    assert max(part.lengths) >= len(whole.tokens), "lengths are from before the cut"


def test_a_turn_that_is_not_trained_is_not_marked(in_tmp):
    rows = [{"messages": [{**turn, "train": False} if turn["content"].startswith("It is") else turn for turn in row["messages"]]}
            for row in CHATS]
    text = seen(llm(write(in_tmp / "a.jsonl", rows)), rows=1).rows[0].texts[0]
    assert trained(text) == ["", "Yes & <b>no</b>.<|im_end|>"] and text.turns[2].note == "train: false"


def test_train_on_all_marks_every_turn_but_no_header(chats):
    text = seen(llm(chats, "dataset.train_on=all"), rows=1).rows[0].texts[0]
    marked = "".join(piece.text for turn in text.turns for piece in turn.stretches if piece.trained)
    assert "Sure?" in marked and "<|im_start|>" not in marked and "user\n" not in marked


def test_other_templates_are_shown_as_they_will_be_used(chats):
    text = seen(llm(chats, "dataset.template=zephyr"), rows=1).rows[0].texts[0]
    assert "<|im_start|>" not in text.text and "<|assistant|>" in text.text


def test_preferences_show_both_answers(in_tmp):
    rows = [{"prompt": [{"role": "user", "content": f"Is {number} even?"}], "chosen": [{"role": "assistant", "content": "Yes."}],
             "rejected": [{"role": "assistant", "content": "Perhaps."}]} for number in range(20)]
    row = seen(llm(write(in_tmp / "a.jsonl", rows)), rows=1).rows[0]
    assert [text.title for text in row.texts] == ["chosen", "rejected"]
    assert [trained(text) for text in row.texts] == [["Yes.<|im_end|>"], ["Perhaps.<|im_end|>"]]
    assert row.texts[0].prompt.endswith(ASSISTANT)


def test_plain_texts_are_trained_but_for_their_first_token(in_tmp):
    rows = [{"text": f"Story {number}: once upon a time there was a number."} for number in range(30)]
    text = seen(llm(write(in_tmp / "a.jsonl", rows)), rows=1).rows[0].texts[0]
    assert not text.tokens[0].trained and all(token.trained for token in text.tokens[1:]) and text.tokens[-1].text == END


def test_classes_are_named_and_counted(in_tmp):
    rows = [{"text": f"Text {number} about things.", "label": ("<i>odd</i>" if number % 2 else "even")} for number in range(60)]
    found = seen(["+experiment=train_bert", "dataset=bert/files", f"dataset.path={write(in_tmp / 'a.jsonl', rows)}"], rows=2)
    assert sum(sum(part.classes.values()) for part in found.parts) == 60 and set(found.parts[0].classes) == {"even", "<i>odd</i>"}
    for row in found.rows:
        number = int(re.search(r"Text (\d+)", row.texts[0].text)[1])
        assert row.facts["label"] == ("<i>odd</i>" if number % 2 else "even") and not row.texts[0].masked
    assert "<i>odd" not in found.html() and "Rows per class" in found.text()


def test_images_stand_as_one_mark_with_their_size(in_tmp):
    rows = []
    for number in range(20):
        Image.new("RGB", (40, 20), (number, 0, 0)).save(in_tmp / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": f"Which one is {number}?", "answer": f"It is {number}."})
    path = write(in_tmp / "rows.jsonl", rows)
    found = seen(["+experiment=train_mllm", "dataset=mllm/files", f"dataset.path={path}"], rows=2)
    row = found.rows[0]
    pieces = [piece for turn in row.texts[0].turns for piece in turn.stretches if piece.kind == "image"]
    assert len(pieces) == 1 and pieces[0].tokens == sum(token.image for token in row.texts[0].tokens) > 1
    assert (row.images[0].width, row.images[0].height, row.images[0].tokens) == (40, 20, pieces[0].tokens)
    assert not [token for token in row.texts[0].tokens if token.image and token.trained]
    number = int(re.search(r"Which one is (\d+)", row.texts[0].text)[1])
    assert trained(row.texts[0])[0].startswith(f"It is {number}.") and "data:image/png;base64," in found.html()
    part = found.parts[0]
    assert part.roles["image"][0] == pieces[0].tokens * part.rows and part.total == (sum(part.lengths), part.kept[1])


def test_tokens_of_a_row(chats):
    found = seen(llm(chats), rows=2)
    assert [token.label for token in found.tokens(1)] == [token.label for token in found.rows[1].texts[0].tokens]
    assert found.tokens(found.rows[0].name) == list(found.rows[0].texts[0].tokens) and "·" in str(found.tokens(0))
    with pytest.raises(UserError, match="0 to 1"):
        found.tokens(5)


def test_no_model_is_made_and_no_weights_are_read(chats, tmp_path, monkeypatch):
    import transformers

    from supertrainer.models.builtin import make_config, make_model, recipe, train_byte_bpe

    tokenizer = train_byte_bpe([turn["content"] for row in CHATS for turn in row["messages"]], 500)
    model = make_model("llm", make_config(recipe("tiny_llama", {}), tokenizer))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()

    def forbidden(*args, **kwargs):
        raise AssertionError("a model was made")

    monkeypatch.setattr(transformers.PreTrainedModel, "__init__", forbidden)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", forbidden)
    opened, watching = [], [True]
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if watching[0] and event == "open" else None)
    found = seen(["+experiment=train_llm", "model=llm/hub", f"model.name={folder}", "dataset=llm/files", f"dataset.path={chats}"])
    watching[0] = False
    assert found.rows[0].texts[0].trained and any(name.endswith("tokenizer.json") for name in opened)
    assert not [name for name in opened if name.endswith((".safetensors", ".bin", ".pt", ".gguf"))]


# ---- further rows ------------------------------------------------------------------------------------------------------

THINKING = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
            "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nThought:{% endif %}")


def test_a_prompt_that_training_does_not_begin_with_is_told(chats):
    Path("odd.jinja").write_text(THINKING)
    found = seen(llm(chats, "dataset.template=odd.jinja"), rows=1)
    text = found.rows[0].texts[0]
    assert not text.prompt_same and text.prompt.endswith("assistant\nThought:")
    at = len(text.prompt) - len("Thought:") + 1
    assert f"differs from the training text at character {at}" in text.prompt_note and "'Thought:'" in text.prompt_note
    assert text.prompt_note in " ".join(found.text(colour=False).split()) or f"character {at}" in found.html()


def test_a_stream_and_a_sample_say_what_they_are(chats, monkeypatch):
    from supertrainer.run import counting

    found = seen(llm(chats, "dataset.streaming=true", "dataset.batching=padded", "dataset.stream_eval_rows=5",
                     "trainer.training_kwargs.max_steps=5"), rows=2)
    assert len(found.rows) == 2 and trained(found.rows[0].texts[0])[0].startswith("It is")
    assert any("first 35" in warning for warning in found.warnings)
    monkeypatch.setattr(counting.sample_of, "__defaults__", (10,))
    found = seen(llm(chats), rows=2)
    assert found.parts[0].measured == len(found.parts[0].lengths) == 10 < found.parts[0].rows
    assert "a sample of 10 measured" in found.text() and "10 measured" in found.html()


def test_several_images_no_image_and_text_around_them(in_tmp):
    rows = []
    for number in range(12):
        for side in "ab":
            Image.new("RGB", (30, 30), (number * 9, 0, 0)).save(in_tmp / f"{number}{side}.png")
        images = [f"{number}{side}.png" for side in "ab"][: number % 3]
        rows.append({"messages": [{"role": "user", "content": "Look: " + " and ".join(["<image>"] * len(images)) + f" number {number}?"},
                                  {"role": "assistant", "content": f"{len(images)} images."}], "images": images})
    found = seen(["+experiment=train_mllm", "dataset=mllm/files", f"dataset.path={write(in_tmp / 'a.jsonl', rows)}",
                  "dataset.max_length=512"], rows=12)
    assert len(found.rows) >= 9 and {len(row.images) for row in found.rows} == {0, 1, 2}
    for row in found.rows:
        text = row.texts[0]
        pieces = [piece for turn in text.turns for piece in turn.stretches if piece.kind == "image"]
        assert [piece.text for piece in pieces] == [f"image {at + 1}" for at in range(len(row.images))] and not row.problem
        assert sum(piece.tokens for piece in pieces) == sum(token.image for token in text.tokens)
        assert trained(text) == [f"{len(row.images)} images.<|im_end|>"]
        asked = "".join(piece.text for piece in text.turns[0].stretches if piece.kind != "template")
        assert re.fullmatch(r"Look: (image 1)?( and image 2)? ?number \d+\?", asked), asked


FAMILIES = ["idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "llava_onevision", "gemma3", "paligemma",
            "florence2", "instructblip", "chameleon"]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_every_vision_family_are_shown(family):
    from supertrainer.data.vision_batch import VisionEncoder
    from supertrainer.run.preview import show_row

    processor = tiny_vision.processor_of(family)
    pictures = [Image.new("RGB", (24, 20), (90, 20, 200)), Image.new("RGB", (40, 20), (90, 220, 20))]
    if family in ("florence2", "instructblip"):
        pictures = pictures[:1]
    parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": "Which colour is it?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "red and blue"}]}],
           "images": pictures, "name": "one"}
    shown = show_row("train", 0, row, processor, "chat", {"max_length": 4000}, (), "images")
    (made,), _ = VisionEncoder(processor, "images").encode([row])
    assert not shown.problem and [(image.width, image.height) for image in shown.images] == [picture.size for picture in pictures]
    text = shown.texts[0]
    marked = "".join(piece.text for turn in text.turns for piece in turn.stretches if piece.trained)
    assert "".join(marked.split()).startswith("redandblue") and "colour" not in marked
    pieces = [piece for turn in text.turns for piece in turn.stretches if piece.kind == "image"]
    assert pieces and sum(piece.tokens for piece in pieces) > 0 and sum(token.image for token in text.tokens) >= made.image_tokens
    if family in ("idefics3", "qwen2_vl", "llava"):  # the mark stands where the images stand, in the user's turn
        assert [turn.role for turn in text.turns if any(piece.kind == "image" for piece in turn.stretches)] == ["user"]
        assert pieces[-1].text in ("image 2", "images 1–2")
    assert not [token for token in text.tokens if token.image and token.trained]
    assert text.trained == sum(made.loss_mask)
    page = Page(as_html(small(shown)))
    assert len(page.links) == len(pictures)
    assert "⟦" in as_text(small(shown))


def test_tokenizers_that_drop_spaces_are_marked_right_too():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from supertrainer.run.showing import shown_chat

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    control = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    words = ["Say hello to the whole world", "Hello whole world to you", "And good bye"]
    inner.train_from_iterator(words, trainers.BpeTrainer(vocab_size=200, special_tokens=control))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                        additional_special_tokens=control[3:])
    tokenizer.chat_template = ("{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} "
                               "[/INST]{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}")
    text = shown_chat(tokenizer, [{"role": "user", "content": "Say hello"}, {"role": "assistant", "content": "Hello whole world"},
                                  {"role": "user", "content": "And"}, {"role": "assistant", "content": "good bye"}])
    assert text.text == "<s>[INST] Say hello [/INST] Hello whole world</s>[INST] And [/INST] good bye</s>"
    assert [said.strip() for said in trained(text)] == ["Hello whole world</s>", "good bye</s>"]


def test_the_facade_and_a_notebook_show_it(chats):
    import supertrainer

    found = supertrainer.preview(compose("train", *llm(chats)), rows=1)
    assert found._repr_html_().count("<mark") >= 2 and "⟦" in repr(found)
    assert found.tokens(0)._repr_html_().startswith("<table>")
    with pytest.raises(UserError, match="takes a configuration"):
        supertrainer.preview("train_llm")


# ---- as a command ------------------------------------------------------------------------------------------------------

def test_the_command_prints_and_writes_nothing(chats, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    before = set(Path().iterdir())
    assert main(["preview", *llm(chats), "--rows", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("train row ") == 2 and "⟦Yes & <b>no</b>.<|im_end|>⟧↵" in said and "Checks" in said
    assert set(Path().iterdir()) == before


def test_the_page_is_written_where_it_is_asked_for(chats, capsys):
    before = set(Path().iterdir())
    assert main(["preview", *llm(chats), "--html", "page.html"]) == 0
    assert {path.name for path in set(Path().iterdir()) - before} == {"page.html"} and "page.html" in capsys.readouterr().out
    page = Page(Path("page.html").read_text("utf-8"))
    assert "Yes & <b>no</b>.<|im_end|>" in page.marked and "b" in page.tags and page.links == []


def test_rows_can_be_asked_for(chats, capsys):
    assert main(["preview", *llm(chats), "--row", "2", "--row", "eval:1", "--tokens"]) == 0
    said = capsys.readouterr().out
    assert "train row 2" in said and "eval row 1" in said and said.count("place ") == 2
    assert main(["preview", *llm(chats), "--row", "chats.jsonl, line 4"]) == 0 and "What is 3 + 1?" in capsys.readouterr().out
    assert main(["preview", *llm(chats), "--row", "chats.jsonl, lin 4"]) == 2
    assert "Did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [
    [*CHATS[:3], {"messages": [{"role": "usr", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}],
    [{"mesages": row["messages"]} for row in CHATS],
    [],
])
def test_bad_data_is_told_as_training_tells_it(in_tmp, capsys, rows):
    words = llm(write(in_tmp / "a.jsonl", rows), "run.dir=run")
    assert main(["train", *words]) == 2
    train = capsys.readouterr()
    assert main(["preview", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err == train.err != "" and shown.out == "" and os.listdir() == ["a.jsonl"]


def test_rows_within_the_budget_are_listed(in_tmp, capsys):
    bad = {"messages": [{"role": "usr", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    assert main(["preview", *llm(write(in_tmp / "a.jsonl", [*CHATS, bad]), "dataset.max_rejects=1")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 row is rejected" in said and "line 41" in said and "usr" in said and os.listdir() == ["a.jsonl"]


def test_a_wrong_option_is_told_before_rows_are_read(in_tmp, capsys):
    assert main(["preview", "+experiment=train_llm", "--html", "absent/page.html"]) == 2
    assert "no folder" in capsys.readouterr().err
    assert main(["preview", "+experiment=train_lm"]) == 2 and "train_llm" in capsys.readouterr().err


def test_in_a_notebook_the_text_is_returned_and_not_shown_line_by_line(monkeypatch):
    shown = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *args: shown.append(args))
    found = supertrainer.preview(supertrainer.compose("train_llm", "model=tiny_llama", "mode=sanity_check"), rows=1)
    assert "Checks" in found.text(colour=False) and "Checks" in str(found) and not shown


def test_rows_in_memory_are_called_rows_of_your_own():
    rows = [{"prompt": f"Number {n}?", "completion": f"{n}."} for n in range(8)]
    found = supertrainer.preview(supertrainer.compose("train_llm", "model=tiny_llama"), rows=1, data=rows)
    assert "rows of your own" in found.text(colour=False) and "data, row 1" in found.text(colour=False)


def test_rows_that_training_would_stop_at_are_said(tmp_path):
    rows = [{"prompt": f"Number {n}?", "completion": f"{n}."} for n in range(20)]
    rows[5]["prompt"] = "word " * 300
    told = "Rows that cannot be used: 1. Training stops at them"
    words = ["model=tiny_llama", "dataset.max_length=64"]
    assert told in supertrainer.preview(supertrainer.compose("train_llm", *words), data=rows).text(colour=False, width=200)
    allowed = supertrainer.preview(supertrainer.compose("train_llm", *words, "dataset.max_rejects=1"), data=rows)
    assert told not in allowed.text(colour=False, width=200) and allowed.rejected_total == 1
