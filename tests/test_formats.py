"""Formats and turns: every documented example, every way to write a turn, and every bad turn with its place and fix."""

import json
import os
import time

import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from supertrainer.data import bert, llm, mllm
from supertrainer.data.calls import check_calls
from supertrainer.data.formats import FORMATS, Format, add_format, column_roles, describe_formats, detect, spoken
from supertrainer.data.rows import Problems, Rows, rows_of
from supertrainer.data.standardize import standardize_data_formats, standardize_sharegpt
from supertrainer.data.turns import check_turns
from supertrainer.runtime import UserError


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []


def turns(*texts, first="user"):
    speakers = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": speakers[index % 2], "content": text} for index, text in enumerate(texts)]


def normalise(*records, **options):
    """Return what the rows become, and the problems."""
    problems = Problems()
    return llm.normalise(rows_of("d", records), options, problems), problems


def one(record, **options):
    """Return the only row's columns and the format, or fail with what was wrong."""
    made, problems = normalise(record, **options)
    assert not problems.found, problems.found
    return {key: value for key, value in made.rows[0].items() if key[0] != "_" and key != "name"}, made.format


def refused(record, family="llm", **options):
    """Return the messages about one row of `d.jsonl`, line 3; every one of them keeps the row."""
    rows, problems = Rows("d.jsonl", [record], ["d.jsonl, line 3"]), Problems()
    assert llm.normalise(rows, options, problems).rows == [None]
    assert all(problem.record is record for problem in problems.found if problem.of_row)
    with pytest.raises(UserError) as error:
        problems.settle()
    return error.value.problems


# ---------------------------------------------------------------- the examples in the table

EXAMPLES = {
    "preference": {"prompt": turns("Name a colour."), "chosen": turns("Red.", first="assistant"),
                   "rejected": turns("Seven.", first="assistant")},
    "unpaired_preference": {"prompt": turns("Name a colour."), "completion": turns("Seven.", first="assistant"), "label": False},
    "messages": {"messages": turns("Name a colour.", "Red.")},
    "sharegpt": {"messages": turns("Name a colour.", "Red.")},
    "instruction": {"messages": turns("Translate to French.\n\nred", "rouge")},
    "prompt_completion": {"messages": turns("Name a colour.", "Red.")},
    "question_answer": {"messages": turns("What is 3 + 4?", "7")},
    "text": {"text": "Red is a colour."},
}
COLOUR = [{"role": "user", "content": [{"type": "text", "text": "Name a colour."}]},
          {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]
WITH_IMAGES = {
    "image_question_answer": ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which animal is this?"}]},
                               {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}], ["photos/cat.jpg"]),
    "messages": (COLOUR, []), "sharegpt": (COLOUR, []), "prompt_completion": (COLOUR, []),
}


def with_images(record, **options):
    """Return the messages and the images, not yet opened, of a row for a vision-language model, and its format."""
    problems = Problems()
    form, columns = detect(rows_of("d", [record]), options, "mllm", problems)
    row = mllm.image_row(form.convert(record, columns, options), "d, row 1", problems, record, options, form, "images")
    assert not problems.found and not problems.warnings
    return row["messages"], row["images"], form.name


def of_family(family):
    return [name for name, form in FORMATS.items() if family in form.families]


@pytest.mark.parametrize("name", of_family("llm"))
def test_the_example_of_each_format_is_found_and_becomes_what_it_says(name):
    row, found = one(FORMATS[name].example)
    assert found == name and row == EXAMPLES[name]
    assert one(FORMATS[name].example, format=name) == (row, name)


@pytest.mark.parametrize("name", of_family("mllm"))
def test_the_example_of_each_format_for_images(name):
    assert with_images(FORMATS[name].example) == (*WITH_IMAGES[name], name)


@pytest.mark.parametrize("name", of_family("bert"))
def test_the_example_of_each_format_with_labels(name):
    problems = Problems()
    form, columns = detect(rows_of("d", [FORMATS[name].example]), {}, "bert", problems)
    assert form.name == name and not problems.found and set(form.needs) <= set(columns)
    made = bert.normalise(rows_of("d", [FORMATS[name].example]), {}, problems, ("O", "B-PER", "B-LOC", "sport", "news", "entailment"))
    assert made.format == name and made.kind == form.kind and not problems.found


def test_no_format_is_left_without_a_test_and_the_table_prints_itself():
    assert set(of_family("llm")) == set(EXAMPLES) and set(of_family("mllm")) == set(WITH_IMAGES)
    assert set(of_family("bert")) == set(bert.FORMATS)
    assert all(json.dumps(form.example) in describe_formats() for form in FORMATS.values())
    assert set(FORMATS["sharegpt"].roles) <= set(column_roles("llm")) and llm.COLUMN_ROLES == column_roles("llm")


# ---------------------------------------------------------------- detection

@pytest.mark.parametrize(("record", "options", "name", "row"), [
    ({"instruction": "Add.", "output": "3"}, {}, "instruction", {"messages": turns("Add.", "3")}),
    ({"instruction": "And 4?", "input": "", "output": "7", "history": [["Add 3.", "3"]]}, {}, "instruction",
     {"messages": turns("Add 3.", "3", "And 4?", "7")}),
    ({"instruction": "Add.", "output": "3", "history": []}, {}, "instruction", {"messages": turns("Add.", "3")}),
    ({"instruction": "Add.", "input": " ", "response": "3"}, {}, "instruction", {"messages": turns("Add.", "3")}),
    ({"instruction": "Add.", "input": float("nan"), "output": "3"}, {}, "instruction", {"messages": turns("Add.", "3")}),
    ({"instruction": "Why?", "context": "Because.", "response": "So."}, {}, "instruction", {"messages": turns("Why?\n\nBecause.", "So.")}),
    ({"prompt": "Hi", "response": "Yo"}, {}, "prompt_completion", {"messages": turns("Hi", "Yo")}),
    ({"q": "Hi", "a": "Yo"}, {"columns": {"prompt": "q", "completion": "a"}}, "prompt_completion", {"messages": turns("Hi", "Yo")}),
    ({"prompt": turns("Hi"), "completion": turns("Yo", first="assistant")}, {}, "prompt_completion", {"messages": turns("Hi", "Yo")}),
    ({"prompt": json.dumps(turns("Hi")), "completion": "Yo"}, {}, "prompt_completion", {"messages": turns("Hi", "Yo")}),
    ({"prompt": "[1, 2] is what?", "completion": "[{"}, {}, "prompt_completion", {"messages": turns("[1, 2] is what?", "[{")}),
    ({"query": "7 - 3?", "response": 4}, {}, "question_answer", {"messages": turns("7 - 3?", "4")}),
    ({"question": "Why?", "context": "C", "answer": "So."}, {}, "question_answer", {"messages": turns("Why?\n\nC", "So.")}),
    ({"messages": json.dumps(turns("Hi", "Yo"))}, {}, "messages", {"messages": turns("Hi", "Yo")}),
    ({"conversations": turns("Hi", "Yo")}, {}, "sharegpt", {"messages": turns("Hi", "Yo")}),
    ({"dialog": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, {"columns": {"messages": "dialog"}}, "messages",
     {"messages": turns("Hi", "Yo")}),
    ({"body": "Once."}, {"columns": {"text": "body"}}, "text", {"text": "Once."}),
    ({"text": "<|im_start|>user\nHi<|im_end|>"}, {}, "text", {"text": "<|im_start|>user\nHi<|im_end|>"}),
    ({"prompt": "Hi", "completion": "Yo", "label": "1"}, {}, "unpaired_preference",
     {"prompt": turns("Hi"), "completion": turns("Yo", first="assistant"), "label": True}),
])
def test_columns_tell_the_format(record, options, name, row):
    assert one(record, **options) == (row, name)


@pytest.mark.parametrize(("record", "name", "others"), [
    ({"messages": turns("Hi", "Yo"), "text": "T"}, "messages", ["text"]),
    ({"instruction": "Hi", "output": "Yo", "text": "T"}, "instruction", ["text"]),
    ({"prompt": "Hi", "chosen": "Yo", "rejected": "No", "messages": turns("Hi", "Yo")}, "preference", ["messages"]),
    ({"prompt": "P", "question": "Hi", "response": "Yo"}, "prompt_completion", ["question_answer"]),
    ({"messages": turns("Hi", "Yo"), "conversations": turns("A", "B")}, "messages", ["sharegpt"]),
])
def test_a_choice_among_formats_is_said_with_the_way_to_the_others(record, name, others):
    made, problems = normalise(record)
    assert made.format == name and made.rows[0] and not problems.found
    assert problems.warnings[0].startswith(f"d: the columns fit the formats {', '.join([name, *others])}; read as {name}, from ")
    assert f"dataset.format={others[0]}" in problems.warnings[0] and len(problems.warnings) == 1
    other, problems = normalise(record, format=others[0])
    assert other.format == others[0] and other.rows[0] and not problems.warnings


def test_labels_that_are_no_booleans_make_no_preference_and_that_is_said():
    record = {"prompt": "Hi", "completion": "Yo", "label": "greeting"}
    made, problems = normalise(record)
    assert made.format == "prompt_completion" and "dataset.format=unpaired_preference" in problems.warnings[0]
    assert refused(record, format="unpaired_preference") == (
        "d.jsonl, line 3, column 'label': the label is 'greeting', neither true nor false. Write true for a good answer and "
        "false for a bad one.",)


def test_one_bad_label_does_not_change_how_a_file_is_read():
    good = {"prompt": "Hi", "completion": "Yo", "label": True}
    made, problems = normalise(good, {**good, "label": "maybe"}, {**good, "label": 0})
    assert made.kind == "unpaired_preference" and [bool(row) for row in made.rows] == [True, False, True]
    assert [row["_stratum"] for row in made.rows if row] == [1, 0] and problems.found[0].where == "d, row 2"


@pytest.mark.parametrize(("record", "options", "message"), [
    ({"x": 1}, {}, "d.jsonl: no known format fits its columns: x. Expected (preference: chosen, rejected; unpaired_preference: "),
    ({"massages": []}, {}, "d.jsonl: there is no column 'messages'. Its columns: massages. Set dataset.columns.messages to the "
     "right one. Did you mean 'massages'? A row of the format messages: {\"messages\": [{\"role\": "),
    ({"prompt": "Hi", "completions": "Yo"}, {}, "d.jsonl: there is no column 'completion'. Its columns: prompt, completions. Set "
     "dataset.columns.completion to the right one. Did you mean 'completions'? A row of the format prompt_completion: "),
    ({"messages": []}, {"columns": {"messages": "dialog"}}, "d.jsonl: there is no column 'dialog'. Its columns: messages. Set "
     "dataset.columns.messages to the right one."),
    ({"messages": []}, {"format": "mesages"}, "dataset.format=mesages: there is no such format for llm. Allowed: preference, "),
    ({"messages": []}, {"format": "mesages"}, "Did you mean 'messages'?"),
    ({"text": "a", "label": "b"}, {"format": "text_label"}, "there is no such format for llm; it is for bert. Allowed: "),
    ({"messages": []}, {"format": "text"}, "d.jsonl: there is no column 'text'. Its columns: messages. Set dataset.columns.text to "
     "the right one. A row of the format text: {\"text\": \"Red is a colour.\"}."),
    ({"question": "Q", "choices": ["a"], "answer": 0}, {}, "d.jsonl: the columns are those of the format question_answer, but the "
     "values are not. Its columns: question, choices, answer. A row of the format question_answer: "),
    ({"text": "a"}, {"columns": {"text": "text", "input": "b"}}, "d.jsonl: no known format fits its columns: text. Expected "
     "(instruction: instruction, output). Name the columns with e.g. dataset.columns.instruction=NAME. A row of the format"),
    ({"instruction": "a", "output": "b"}, {"columns": {"input": "inptu"}}, "d.jsonl, dataset.columns.input=inptu: there is no column "
     "'inptu'. Its columns: instruction, output. Its roles: instruction, output, input"),
])
def test_columns_that_fit_nothing_show_the_nearest_format(record, options, message):
    problems = refused_set(record, options)
    assert any(message in problem for problem in problems), problems


def refused_set(record, options, family="llm"):
    problems = Problems()
    detect(rows_of("d.jsonl", [record]), options, family, problems)
    assert not any(problem.of_row for problem in problems.found)
    return [str(problem) for problem in problems.found]


def test_a_question_for_all_images_stands_in_for_its_column():
    record = {"image": ["a.png", "b.png"], "answer": 7}
    message = refused_set(record, {}, "mllm")[0]
    assert "no column 'question' and no dataset.question" in message and "dataset.question to the right one" in message
    messages, images, _ = with_images(record, question="Sum?")
    assert images == ["a.png", "b.png"] and messages[1]["content"] == [{"type": "text", "text": "7"}]
    assert messages[0]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Sum?"}]


def test_a_format_of_the_users_own_is_one_entry():
    add_format(Format("haiku", "a topic and a poem", "chat", ("llm",), ("topic", "poem"), {"topic": "Rain", "poem": "Drops."},
                      spoken(messages=[("topic", "user"), ("poem", "assistant")])))
    try:
        assert one({"topic": "Rain", "poem": "Drops."}) == ({"messages": turns("Rain", "Drops.")}, "haiku")
    finally:
        del FORMATS["haiku"]


# ---------------------------------------------------------------- turns, as they should be

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def test_tool_calls_of_every_form_become_one():
    sharegpt = [{"from": "human", "value": "Weather?"}, {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                {"from": "observation", "value": "Sun"}, {"from": "gpt", "value": "Sunny."}]
    openai = [{"role": "user", "content": "Weather?"},
              {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
              {"role": "tool", "content": "Sun"}, {"role": "assistant", "content": "Sunny."}]
    legacy = [openai[0], {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
              {"role": "function", "content": "Sun"}, openai[3]]
    wanted = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
              {"role": "tool", "content": "Sun"}, {"role": "assistant", "content": "Sunny."}]
    for messages in (sharegpt, openai, legacy, json.dumps(openai)):
        assert one({"messages": messages})[0] == {"messages": wanted}
    tool = {"type": "function", "function": {"name": "weather", "description": "W", "parameters": {"type": "object"}}}
    for tools in ([tool], json.dumps([tool]), json.dumps([tool["function"]]), tool["function"]):
        assert one({"conversations": sharegpt, "tools": tools})[0] == {"messages": wanted, "tools": [tool]}
    for tools in (None, "", [], float("nan")):
        assert one({"conversations": sharegpt, "tools": tools})[0] == {"messages": wanted}


def test_ids_names_thoughts_and_loss_keys_are_kept():
    messages = [{"role": "user", "content": "Weather?", "name": "Ann", "train": False},
                {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}], "weight": 0, "reasoning_content": "Look."},
                {"role": "tool", "content": "", "tool_call_id": "c1"}, {"role": "assistant", "content": "Sun.", "train": True, "weight": 2.5}]
    assert one({"messages": messages})[0]["messages"] == messages


def test_keys_without_a_value_are_no_keys():
    """Arrow gives every turn the keys of every other."""
    keys = dict.fromkeys(("role", "from", "value", "tool_calls", "weight", "train", "name", "mood"))
    rows = [{**keys, "from": "human", "value": "Hi", "content": None}, {**keys, "role": "assistant", "content": "Yo"}]
    made, problems = normalise({"messages": rows})
    assert made.rows[0]["messages"] == turns("Hi", "Yo") and not problems.warnings


def test_an_unknown_key_is_left_out_and_told_once():
    rows = [{"messages": [{**turn, "weigth": 0, "mood": "calm"} for turn in turns("Hi", "Yo")]} for _ in range(5)]
    made, problems = normalise(*rows)
    assert made.rows[4]["messages"] == turns("Hi", "Yo") and not problems.found and len(problems.warnings) == 2
    told = next(text for text in problems.warnings if "weigth" in text)
    assert told.startswith("d, row 1, column 'messages': the message key 'weigth' means nothing here and is left out")
    assert told.endswith("Did you mean 'weight'?")


@pytest.mark.parametrize("messages", [
    turns("Hi", "Yo", "And?"), turns("Welcome.", "Hi", "Yo", first="assistant"),
    [{"role": "system", "content": "S"}, *turns("Yo", first="assistant")], [{"role": "system", "content": ""}, *turns("Hi", "Yo")],
    [{"role": "developer", "content": "S"}, *turns("Hi", "Yo")], [*turns("Hi"), *turns("Hi"), *turns("Yo", "Yo", first="assistant")],
    [*turns("Hi"), {"role": "assistant", "content": "<tool_call>{}</tool_call>"}, {"role": "tool", "content": "1"}],
    turns("What is `<|im_end|>`, a </s> or <b>?", "The end [of] it | <|"),
])
def test_orders_and_texts_that_some_template_takes_are_let_through(messages):
    assert one({"messages": messages})[0]["messages"] == messages


def test_a_system_text_opens_only_conversations_without_one():
    empty = [{"role": "system", "content": ""}, *turns("Hi", "Yo")]
    own = [{"role": "developer", "content": "Mine."}, *turns("Hi", "Yo")]
    made, _ = normalise({"messages": turns("Hi", "Yo")}, {"messages": empty}, {"messages": own}, system="Be brief.")
    assert [row["messages"][0]["content"] for row in made.rows] == ["Be brief.", "", "Mine."]
    column = one({"messages": turns("Hi", "Yo"), "system": "Row's."}, system="Set's.")[0]["messages"]
    assert column == [{"role": "system", "content": "Row's."}, *turns("Hi", "Yo")]
    assert one({"instruction": "Hi", "output": "Yo", "system": ""}, system="Set's.")[0]["messages"][0]["content"] == "Set's."
    made, problems = normalise({"text": "T"}, system="S")
    assert made.rows[0]["text"] == "T" and "dataset.system is not used" in problems.warnings[0]


def test_train_on_users_needs_no_assistant():
    assert one({"messages": turns("Hi")}, train_on=["user"])[0]["messages"] == turns("Hi")
    assert "no turn is the assistant's" in refused({"messages": turns("Hi")}, train_on="last_assistant")[0]


def test_list_columns_of_a_data_frame():
    frame = pd.DataFrame({"messages": [turns("Hi", "Yo")], "system": [None]})
    frame["messages"] = frame["messages"].map(lambda turns: pd.Series(turns).to_numpy())
    assert one(frame.to_dict("records")[0])[0]["messages"] == turns("Hi", "Yo")


# ---------------------------------------------------------------- turns, as they should not be

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
BAD = [
    ([{"role": "usr", "content": "x"}], "turn 1 has the unknown role 'usr'. Allowed: system, developer, user, assistant, tool, and "
     "names such as human and gpt. Did you mean 'user'? Mend it or delete the row."),
    ([{"from": "humn", "value": "x"}], "turn 1 has the unknown role 'humn'. Allowed: system, developer, user, assistant, tool, and "
     "names such as human and gpt. Did you mean 'human'? Mend it or delete the row."),
    ([USER, {"speaker": "bot", "content": "x"}], "turn 2 has no role; its keys are speaker, content. Write turns as {\"role\": ..."),
    ([{"role": 3, "content": "x"}], "turn 1 has the unknown role 3. Allowed:"),
    ([USER, REPLY, {"role": "system", "content": "S"}], "turn 3 (system) is a system turn. Only the first turn may be one."),
    ([USER, {"role": "tool", "content": "1"}, REPLY], "turn 2 (tool) answers a call, but the turn before makes none. Put the "
     "assistant's call (tool_calls) before it."),
    ([USER, REPLY, {"role": "tool", "content": "1"}], "turn 3 (tool) answers a call, but the turn before makes none."),
    ([{"role": "tool", "content": "1"}, REPLY], "turn 1 (tool) answers a call, but the turn before makes none."),
    ([USER, {"role": "assistant", "tool_calls": [{"id": "a1", **CALL}]}, {"role": "tool", "content": "1", "tool_call_id": "b2"}],
     "turn 3 (tool) answers the call 'b2', which was not made. Calls made: a1."),
    ([USER], "no turn is the assistant's, so nothing could be learnt. Add one or delete the row."),
    ([REPLY], "every turn is the assistant's, so it answers nothing. Add the turn it answers, or train on plain texts with "
     "dataset.format=text."),
    ([{"role": "user", "content": ""}, REPLY], "turn 1 (user) is empty. Fill it in, or delete the turn or the row."),
    ([USER, {"role": "assistant", "content": " \n"}], "turn 2 (assistant) is empty. Fill it in, or delete the turn or the row."),
    ([{"role": "user", "content": None}, REPLY], "turn 1 (user) has the content None, not a string. Make it a text."),
    ([USER, {"role": "assistant"}], "turn 2 (assistant) has the content None, not a string."),
    ([USER, {"role": "assistant", "content": 7}], "turn 2 (assistant) has the content 7, not a string. Make it a text."),
    ([{"from": "human", "value": {"a": 1}}, REPLY], "turn 1 (user) has the content {'a': 1}, not a string."),
    ([{"role": "user", "content": []}, REPLY], "turn 1 (user) has the content [], not a string."),
    ([{"role": "user", "content": [{"type": "txt", "text": "x"}]}, REPLY], "turn 1 (user) has a content part 1 of the unknown type 'txt'. "
     "Allowed: text, image. Did you mean 'text'?"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}, REPLY], "turn 1 (user) has the content part 1 with the text 5"),
    ([{"role": "user", "content": ["x", 5]}, REPLY], "turn 1 (user) has the content part 2 5, which has no type. Write parts as"),
    ([{"role": "user", "content": [{"type": "image"}]}, REPLY], "turn 1 (user) holds an image, and this model reads text only. Use a "
     "vision-language model (the mllm family)."),
    ([USER, {**REPLY, "train": "yes"}], "turn 2 (assistant) has train='yes'. Write true or false."),
    ([USER, {**REPLY, "train": 1}], "turn 2 (assistant) has train=1. Write true or false."),
    ([USER, {**REPLY, "weight": -0.5}], "turn 2 (assistant) has weight=-0.5. Write a number of at least 0."),
    ([USER, {**REPLY, "weight": "2"}], "turn 2 (assistant) has weight='2'. Write a number of at least 0."),
    ([USER, {**REPLY, "weight": float("nan")}], "turn 2 (assistant) has weight=nan. Write a number of at least 0."),
    ([USER, {**REPLY, "name": 5}], "turn 2 (assistant) has name=5, not a string. Make it a text."),
    ([{**USER, "tool_calls": [CALL]}, REPLY], "turn 1 (user) calls a tool. Only the assistant can"),
    ([USER, {"role": "assistant", "tool_calls": "weather"}], "turn 2 (assistant) has the tool calls 'weather', which are not a list."),
    ([USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}], "turn 2 (assistant) has the call 1 {'arguments': {}}, which names "
     "no function. Write calls as {\"name\": ..., \"arguments\": {...}}."),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{bad"}]}], "turn 2 (assistant) calls 'f' with the arguments "
     "'{bad', which are not a JSON object. Write them as"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], "calls 'f' with the arguments [1], which are not"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"n": 2**64}}]}], "turn 2 (assistant) calls 'f' with arguments "
     "that hold the number 18446744073709551616, which has more than 64 bits. Write it as a text."),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"n": "\\udc00"}'}]}], "calls 'f' with arguments that hold "
     "a lone surrogate (U+DC00, at character 1). Take the character out or delete the row."),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"n": [float("nan")]}}]}], "hold nan, which JSON has no word"),
    ([{"from": "human", "value": "x"}, {"from": "function_call", "value": None}], "turn 2 (assistant) is a call without a text."),
    ([{"from": "human", "value": "x"}, {"from": "function_call", "value": "f(x)"}], "turn 2 (assistant) has the tool calls 'f(x)'"),
    (["Hi"], "turn 1 is 'Hi', not an object. Write turns as {\"role\": ..., \"content\": ...}."),
    ([], "the conversation is empty. Write it as [{\"role\": \"user\", \"content\": \"...\"}, ...]."),
    (None, "the conversation is empty."), ("Hi", "'Hi' is not a list of turns. Write it as"),
    ({"role": "user"}, "{'role': 'user'} is not a list of turns."), ("[{", "'[{' is not a list of turns."),
]


@pytest.mark.parametrize(("messages", "message"), BAD)
def test_a_bad_turn_is_told_with_file_row_column_turn_value_and_fix(messages, message):
    problems = refused({"messages": messages})
    assert problems[0].startswith("d.jsonl, line 3, column 'messages': " + message[:20]) or message in problems[0]
    assert message in problems[0] and len(problems) == 1, problems


RENDERED = ["<|im_start|>user\nHi<|im_end|>\n", "<s>[INST] Hi [/INST]", "<bos><start_of_turn>user\nHi<end_of_turn>\n",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>", "<|user|>\nHi</s>\n", "<|user|>\nHi<|end|>\n",
            "<｜User｜>Hi", "<|start|>user<|message|>Hi<|end|>", "<|turn>user\nHi<turn|>", "<|start_of_role|>user<|end_of_role|>Hi",
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi"]


@pytest.mark.parametrize("text", RENDERED)
def test_a_text_that_was_rendered_already_is_refused_in_turns_and_columns_and_taken_as_text(text):
    problem = refused({"messages": [{"role": "user", "content": text}, REPLY]})[0]
    assert problem.startswith("d.jsonl, line 3, column 'messages': turn 1 (user) holds ") and "rendered with a chat template" in problem
    assert problem.endswith("Give plain messages, or train on finished texts with dataset.format=text.")
    assert refused({"prompt": text, "completion": "Yo"})[0].startswith("d.jsonl, line 3, column 'prompt': the text holds ")
    assert one({"text": text})[0] == {"text": text}


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": "Hi", "completion": None}, "column 'completion': the text is missing. Give every row a text, or delete the row."),
    ({"prompt": "Hi", "completion": float("nan")}, "column 'completion': the text is missing."),
    ({"prompt": " ", "completion": "Yo"}, "column 'prompt': the text is empty. Fill it in"),
    ({"prompt": "Hi", "completion": 5}, "column 'completion': the text is 5, not a string."),
    ({"prompt": [USER, {"role": "usr", "content": "x"}], "completion": "Yo"}, "column 'prompt': turn 2 has the unknown role 'usr'."),
    ({"instruction": "Hi", "input": 5, "output": "Yo"}, "column 'input': the text is 5, not a string."),
    ({"instruction": "Hi", "input": "", "output": ""}, "column 'output': the text is empty."),
    ({"instruction": "Hi", "output": "Yo", "history": [["A"]]}, "column 'history': turn 1 is ['A'], not an object."),
    ({"instruction": "Hi", "output": "Yo", "history": "none"}, "column 'history': turn 1 is 'none', not an object."),
    ({"messages": [USER, REPLY], "images": ["a.png", "b.png"]}, "column 'images': the row has 2 image(s), and this model reads text "
     "only. Use a vision-language model (the mllm family), or take the column out."),
    ({"messages": '[{"role": "user", "content": "a\\ud83d"}, {"role": "assistant", "content": "b"}]'}, "column 'messages': [0].content "
     "holds a lone surrogate (U+D83D, at character 2). Take the character out"),
    ({"messages": [USER, REPLY], "system": 5}, "column 'system': the text is 5, not a string."),
    ({"messages": [{"role": "system", "content": "S"}, USER, REPLY], "system": "T"}, "column 'messages': turn 2 (system) is a system turn."),
    ({"messages": [USER, REPLY], "tools": "weather"}, "column 'tools': the tools 'weather' are not a list. Write them as [{"),
    ({"messages": [USER, REPLY], "tools": [{"title": "x"}]}, "column 'tools': the tool 1 is {'title': 'x'}, which has no name."),
    ({"text": 7}, "column 'text': the text is 7, not a string. Give every row a text, or delete the row."),
    ({"text": " \n"}, "column 'text': the text is empty."), ({"text": None}, "column 'text': the text is missing."),
    ({"prompt": "Hi", "completion": "Yo", "label": None}, "column 'label': the label is missing. Write true for a good answer"),
    ({"prompt": "", "completion": "Yo", "label": True}, "column 'prompt': the text is empty."),
])
def test_a_bad_cell_is_told_with_its_own_column(record, message):
    problems = refused(record)
    assert len(problems) == 1 and problems[0].startswith("d.jsonl, line 3, " + message), problems


def test_every_bad_turn_of_a_row_is_told_and_counts_as_one_row():
    problems = Problems()
    rows = Rows("d", [{"messages": [{"role": "usr"}, {"role": "user", "content": 5}]}, {"messages": turns("Hi", "Yo")}], ["d, row 1", "d, row 2"])
    made = llm.normalise(rows, {}, problems)
    assert len(problems.found) == 2 and len(problems.rejected) == 1 and made.rows[0] is None
    assert made.rows[1] == {"messages": turns("Hi", "Yo"), "name": "d, row 2", "_key": made.rows[1]["_key"], "_stratum": 0}
    problems.settle(budget=1, rows=2)


# ---------------------------------------------------------------- preferences

BETTER, WORSE = turns("Red.", first="assistant"), turns("Nine.", first="assistant")
PAIR = {"prompt": turns("Colour?"), "chosen": BETTER, "rejected": WORSE}


@pytest.mark.parametrize("record", [
    {"prompt": "Colour?", "chosen": "Red.", "rejected": "Nine."},
    {"prompt": turns("Colour?"), "chosen": BETTER, "rejected": WORSE},
    {"prompt": "Colour?", "chosen": turns("Colour?", "Red."), "rejected": turns("Colour?", "Nine.")},
    {"chosen": turns("Colour?", "Red."), "rejected": turns("Colour?", "Nine.")},
    {"chosen": json.dumps(turns("Colour?", "Red.")), "rejected": json.dumps(turns("Colour?", "Nine."))},
    {"chosen": "\n\nHuman: Colour?\n\nAssistant: Red.", "rejected": "\n\nHuman: Colour?\n\nAssistant: Nine."},
    {"chosen": "Colour? Red.", "rejected": "Colour? Nine."},
])
def test_preferences_of_every_form_become_one(record):
    assert one(record) == (PAIR, "preference")


def test_preferences_keep_system_turns_and_an_explicit_prompt():
    system = [{"role": "system", "content": "S"}]
    with_it = {**PAIR, "prompt": system + turns("Colour?")}
    assert one({"prompt": "Colour?", "chosen": "Red.", "rejected": "Nine."}, system="S")[0] == with_it
    assert one({"prompt": "Colour?", "system": "S", "chosen": "Red.", "rejected": "Nine."})[0] == with_it
    assert one({"system": "S", "chosen": turns("Colour?", "Red."), "rejected": turns("Colour?", "Nine.")})[0] == with_it
    assert one({"prompt": "Colour?", "chosen": system + turns("Colour?", "Red."), "rejected": system + turns("Colour?", "Nine.")})[0] == with_it
    long = {"prompt": "A?", "chosen": turns("A?", "B.", "C?", "Red."), "rejected": turns("A?", "B.", "C?", "Nine.")}
    assert one(long)[0] == {"prompt": turns("A?"), "chosen": turns("B.", "C?", "Red.", first="assistant"),
                            "rejected": turns("B.", "C?", "Nine.", first="assistant")}
    del long["prompt"]
    assert one(long)[0] == {"prompt": turns("A?", "B.", "C?"), "chosen": BETTER, "rejected": WORSE}


@pytest.mark.parametrize(("record", "message"), [
    ({"chosen": "Red.", "rejected": "Nine."}, "column 'chosen, rejected': the two texts have no beginning in common, so there is no "
     "prompt. Add a prompt column (dataset.columns.prompt), or write both as turns."),
    ({"prompt": "C?", "chosen": "Red.", "rejected": "Red."}, "column 'chosen, rejected': chosen and rejected are the same, so nothing"),
    ({"prompt": "C?", "chosen": "", "rejected": "Red."}, "column 'chosen': the text is empty."),
    ({"prompt": "C?", "chosen": "Red.", "rejected": None}, "column 'rejected': the text is missing."),
    ({"prompt": None, "chosen": "Red.", "rejected": "Nine."}, "column 'prompt': the text is missing."),
    ({"prompt": "C?", "chosen": turns("D?", "Red."), "rejected": turns("D?", "Nine.")}, "column 'chosen, rejected': after the prompt "
     "chosen begins with a turn of the user, not with the assistant's answer. Let both begin with the prompt's turns, word for word"),
    ({"chosen": turns("C?", "Red."), "rejected": turns("D?", "Nine.")}, "column 'chosen, rejected': chosen and rejected have no turn in "
     "common, so there is no prompt."),
    ({"chosen": turns("C?", "Red."), "rejected": turns("C?", "Red.", "Why?", "So.")}, "column 'chosen, rejected': after the prompt chosen "
     "holds nothing, not with"),
    ({"chosen": turns("C?", "Red.", "Why?"), "rejected": turns("C?", "Nine.")}, "column 'chosen': the answer ends with a turn of the user. "
     "End it with the assistant's."),
    ({"prompt": turns("C?", "Hm."), "chosen": "Red.", "rejected": "Nine."}, "column 'chosen, rejected': the prompt ends with an "
     "assistant's turn"),
    ({"chosen": "\n\nHuman: C?\n\nAssistant: Red.", "rejected": "\n\nHuman: C?\n\nAssistant:"}, "column 'rejected': turn 2 (assistant) is empty"),
])
def test_bad_preferences(record, message):
    problems = refused(record)
    assert any(problem.startswith("d.jsonl, line 3, " + message) for problem in problems), problems


def test_an_implicit_prompt_of_texts_is_said():
    _, problems = normalise({"chosen": "Colour? Red.", "rejected": "Colour? Nine."}, {"chosen": "A b", "rejected": "A c"})
    assert len(problems.warnings) == 1 and "have in common: 'Colour?'" in problems.warnings[0]


# ---------------------------------------------------------------- tables

def test_tables_give_back_every_kind_of_row():
    tool = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    chats = [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0.1}], "tools": tool},
             {"messages": [{**USER, "name": "Ännä 😀"}, {**REPLY, "train": False}]}]
    for records in (chats, [PAIR], [{"prompt": "Hi", "completion": "Yo", "label": 1}], [{"text": "Once."}], chats[1:]):
        made, problems = normalise(*records)
        table = llm.to_dataset(made.rows, made.kind)
        parts = list(made.columns)
        assert not problems.found and table.column_names == [*parts, *(["tools"] if records is chats else []), "name"]
        for row, final in zip(table, made.rows, strict=True):
            assert {part: row[part] for part in parts} == {part: final[part] for part in parts} and row["name"] == final["name"]
    assert llm.to_dataset(normalise(*chats)[0].rows)["tools"][:] == [tool, None]


def test_rows_that_say_the_same_have_the_same_key():
    made, _ = normalise({"messages": turns("Hi", "YO \n")}, {"messages": turns("hi", "Yo")}, {"messages": turns("hi", "No")},
                        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
                        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": check_calls([{"name": "weather"}])}]})
    keys = [row["_key"] for row in made.rows]
    assert keys[0] == keys[1] and len(set(keys)) == 4


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0<[｜"), min_size=1).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([("human", "user"), ("gpt", "assistant"), ("USER", "user"), ("chatgpt", "assistant")]), TEXTS),
                min_size=1, max_size=6))
def test_any_conversation_comes_through_as_it_was_written(said):
    conversation = [((("human", "user")), "Begin."), *said, (("gpt", "assistant"), "End.")]
    wanted = [{"role": role, "content": text} for (_, role), text in conversation]
    by_name = [{"from": name, "value": text} for (name, _), text in conversation]
    by_role = [{"role": name, "content": [{"type": "text", "text": text}]} for (name, _), text in conversation]
    problems = Problems()
    for written in (by_name, by_role, wanted, json.dumps(by_name)):
        assert check_turns(written, "", "", problems) == wanted and not problems.found and not problems.warnings
    made, _ = normalise({"messages": wanted})
    assert llm.to_dataset(made.rows)[0]["messages"] == wanted


def test_a_hundred_thousand_turns_are_checked_in_seconds():
    rows = rows_of("d", [{"messages": turns(f"Question {number} " + "word " * 50, "answer " * 60)} for number in range(20_000)])
    start = time.process_time()
    made = llm.normalise(rows, {}, Problems())
    assert len(made.rows) == 20_000 and time.process_time() - start < 5  # about 0.4 on the machine this was written on


# ---------------------------------------------------------------- standard turns for a data set at hand

@pytest.mark.parametrize("function", [standardize_sharegpt, standardize_data_formats])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_standard_turns(function, num_proc):
    rows = [{"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": f"Hi {number}"}, {"from": "gpt", "value": "Yo"}],
             "source": "x", "score": number / 2} for number in range(10)]
    made = function(Dataset.from_list(rows), num_proc=num_proc)
    assert made.column_names == ["conversations", "source", "score"] and made["score"][3] == 1.5
    assert made[9]["conversations"] == [{"role": "system", "content": ""}, *turns("Hi 9", "Yo")]
    assert function(made)[9] == made[9]  # standard turns stay as they are
    streamed = function(Dataset.from_list(rows).to_iterable_dataset())
    assert [row["conversations"] for row in streamed] == made["conversations"][:]


def test_standard_turns_tell_every_unknown_speaker():
    rows = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": name, "value": "Yo"}]} for name in ("gpt", "gtp", "narrator")]
    with pytest.raises(UserError) as error:
        standardize_sharegpt(Dataset.from_list(rows))
    assert [problem[:60] for problem in error.value.problems] == [
        "row 2, column 'conversations': turn 2 has the unknown role '", "row 3, column 'conversations': turn 2 has the unknown role '"]
    assert "Did you mean 'gpt'?" in error.value.problems[0]
    made = standardize_sharegpt(Dataset.from_list(rows[2:]), aliases_for_assistant=["Narrator"])
    assert made[0]["conversations"] == turns("Hi", "Yo")


def test_standard_turns_keep_calls_and_leave_other_sets_alone():
    rows = [{"conversations": [{"from": "human", "value": "W?"}, {"from": "function_call", "value": json.dumps(CALL["function"])},
                               {"from": "observation", "value": "Sun"}]}]
    assert standardize_sharegpt(Dataset.from_list(rows))[0]["conversations"] == [
        {"role": "user", "content": "W?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "Sun"}]
    alpaca = Dataset.from_list([{"instruction": "Add.", "output": "3"}])
    assert standardize_data_formats(alpaca) is alpaca
