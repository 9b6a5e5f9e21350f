"""Batch files against a server on loopback: nothing is submitted twice, nothing is lost, whatever breaks in between."""

import json
import os

import pytest
from openai_server import FakeServer

from supertrainer.inference import batches, clients
from supertrainer.inference.base import ModelSpec, Sampling
from supertrainer.inference.batch_folder import STATE, load
from supertrainer.inference.engines.openai import OpenAIEngine
from supertrainer.runtime import UserError

PACKAGES = ("openai", "anthropic")
ROWS = [[{"role": "user", "content": f"row {i} é"}] for i in range(7)]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    for package in PACKAGES:
        monkeypatch.setattr(f"{package}._base_client.INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setattr(clients, "BACK_OFF", 0.0)


@pytest.fixture
def server():
    with FakeServer() as running:
        yield running


@pytest.fixture(params=PACKAGES)
def api(request):
    return request.param


def open_at(server, api, **options):
    return OpenAIEngine.open(ModelSpec(options.pop("model", "m")), url=server.url, api=api, timeout=20,
                             **{"retries": 2, **options})


@pytest.fixture
def engine(server, api):
    with open_at(server, api) as opened:
        yield opened


def test_submit_status_download(server, engine, tmp_path):
    batch = batches.submit(tmp_path, engine, ROWS, Sampling(max_new_tokens=30))
    assert batch.ids == load(tmp_path).ids == list(server.batches) and not batch.ended
    server.work(3)
    assert batches.status(tmp_path, engine).parts[0].done == 3
    with pytest.raises(UserError, match="not finished yet"):
        batches.download(tmp_path, engine)
    server.work()
    found = batches.download(tmp_path, engine)
    assert {row: one.text for row, one in found.completions.items()} == {i: f"echo: row {i} é" for i in range(7)}
    assert not found.errors and not found.missing and load(tmp_path).ended
    assert engine.usage.output_tokens == 7 * 4
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [(line["row"], line["text"]) for line in lines] == [(i, f"echo: row {i} é") for i in range(7)]


def test_the_bodies_are_those_of_the_engine(server, engine, tmp_path):
    batches.submit(tmp_path, engine, ROWS, {"max_new_tokens": 5, "stop": ["\n"]})
    rows = [json.loads(line) for line in (tmp_path / "requests-001.jsonl").read_text("utf-8").splitlines()]
    key = "body" if engine.server.api == "openai" else "params"
    assert [row[key] for row in rows] == [engine.body(turns, {"max_new_tokens": 5, "stop": ["\n"]}) for turns in ROWS]


def test_submitting_again_sends_nothing_and_other_requests_are_refused(server, engine, tmp_path):
    first = batches.submit(tmp_path, engine, ROWS)
    again = batches.submit(tmp_path, engine, ROWS)
    assert again == first and len(server.batches) == 1 and len(server.files) <= 1
    for rows, sampling in ((ROWS[:-1], None), (ROWS, {"max_new_tokens": 3}), (ROWS[::-1], None)):
        with pytest.raises(UserError, match="holds a batch of other requests"):
            batches.submit(tmp_path, engine, rows, sampling)
    with open_at(server, engine.server.api, model="other") as other, pytest.raises(UserError, match="other requests"):
        batches.submit(tmp_path, other, ROWS)
    assert len(server.batches) == 1


class Killed(BaseException):
    """Stands for a program that dies: nothing of ours catches it."""


def test_killed_at_every_step_submits_once(server, api, tmp_path, monkeypatch):
    """The program dies before each write of the state in turn, and is started again: there is one batch, and its name is known."""
    writes = 0
    real = batches.save
    for fatal in range(6):
        folder, calls, rows = tmp_path / str(fatal), 0, ROWS[: fatal + 1]

        def dying(place, batch, at=fatal):
            nonlocal calls, writes
            calls, writes = calls + 1, writes + 1
            if calls == at + 1:
                raise Killed
            real(place, batch)

        before = len(server.batches)
        monkeypatch.setattr(batches, "save", dying)
        with open_at(server, api) as engine:
            try:
                batches.submit(folder, engine, rows)
                survived = True
            except Killed:
                survived = False
        monkeypatch.setattr(batches, "save", real)
        with open_at(server, api) as engine:
            batch = batches.submit(folder, engine, rows)
        assert len(server.batches) == before + 1, f"killed before write {fatal + 1}"
        assert batch.ids == [list(server.batches)[-1]] == load(folder).ids
        if survived:
            break
    assert survived and fatal >= 2


@pytest.mark.parametrize("status", [500, 599])
def test_an_unknown_outcome_is_looked_up(server, engine, tmp_path, status):
    """500: it failed before it created the batch. 599: it created the batch, and the answer was lost."""
    server.fail(status)
    batch = batches.submit(tmp_path, engine, ROWS)
    assert len(server.batches) == 1 and batch.ids == list(server.batches)


def test_a_server_that_stays_broken(server, engine, tmp_path):
    server.fail(500, times=9)
    with pytest.raises(UserError, match="said 500"):
        batches.submit(tmp_path, engine, ROWS)
    assert load(tmp_path).ids == [] and not server.batches
    with pytest.raises(UserError, match="was not sent yet: submit again"):
        batches.download(tmp_path, engine)
    server.faults.clear()
    assert batches.submit(tmp_path, engine, ROWS).ids == list(server.batches)


@pytest.mark.parametrize("status,words", [(400, "does not take this request"), (429, "account's limits"), (401, "key")])
def test_refusals(server, engine, tmp_path, status, words):
    server.fail(status)
    with pytest.raises(UserError, match=words):
        batches.submit(tmp_path, engine, ROWS)
    assert not server.batches
    batches.submit(tmp_path, engine, ROWS)
    assert len(server.batches) == 1


def test_parts_rows_that_fail_and_sending_them_again(server, engine, tmp_path):
    batch = batches.submit(tmp_path, engine, ROWS, limits=(3, 10**6))
    assert [part.total for part in batch.parts] == [3, 3, 1] and len(server.batches) == 3
    server.work(broken=["row 2 é", "row 6 é"])
    found = batches.download(tmp_path, engine)
    assert found.errors == {2: "bad row", 6: "bad row"} and set(found.completions) == {0, 1, 3, 4, 5} and found.missing == ()
    batches.retry(tmp_path, engine)
    with pytest.raises(UserError, match="not finished yet"):
        batches.download(tmp_path, engine)
    server.work()
    found = batches.download(tmp_path, engine)
    assert len(server.batches) == 4 and not found.errors
    assert {row: one.text for row, one in found.completions.items()} == {i: f"echo: row {i} é" for i in range(7)}
    with pytest.raises(UserError, match="nothing to send again"):
        batches.retry(tmp_path, engine)


def test_cancel_keeps_what_was_answered(server, engine, tmp_path):
    batches.submit(tmp_path, engine, ROWS)
    server.work(4)
    batch = batches.cancel(tmp_path, engine)
    assert batch.ended
    found = batches.download(tmp_path, engine)
    assert set(found.completions) == {0, 1, 2, 3} and {*found.errors, *found.missing} == {4, 5, 6}
    batches.retry(tmp_path, engine)
    server.work()
    assert set(batches.download(tmp_path, engine).completions) == set(range(7))


def test_an_expired_batch(server, engine, tmp_path):
    batches.submit(tmp_path, engine, ROWS)
    server.work(2, end="expired")
    found = batches.download(tmp_path, engine)
    assert set(found.completions) == {0, 1} and {*found.errors, *found.missing} == set(range(2, 7))


def test_answers_of_another_batch_are_refused(server, engine, tmp_path):
    batches.submit(tmp_path / "a", engine, ROWS)
    batches.submit(tmp_path / "b", engine, ROWS[:3])
    server.work()
    mine, other = load(tmp_path / "a"), load(tmp_path / "b")
    (tmp_path / "a" / STATE).write_text((tmp_path / "a" / STATE).read_text().replace(mine.ids[0], other.ids[0]))
    with pytest.raises(UserError, match="not of this batch"):
        batches.download(tmp_path / "a", engine)


def test_two_candidates_are_a_question_and_not_a_second_bill(server, tmp_path):
    """Anthropic's batches carry no name of ours."""
    with open_at(server, "anthropic") as engine:
        batches.submit(tmp_path / "a", engine, ROWS)
        batches.submit(tmp_path / "b", engine, ROWS)
        server.fail(599)
        with pytest.raises(UserError, match="It is not known which of"):
            batches.submit(tmp_path / "c", engine, ROWS)
    assert len(server.batches) == 3


def test_no_key_is_written(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sesame-1234")
    with open_at(server, "openai", key_variable="MY_KEY") as engine:
        batches.submit(tmp_path, engine, ROWS)
        server.work()
        batches.download(tmp_path, engine)
    assert {"Bearer sesame-1234"} >= {headers.get("authorization") for headers in server.headers}
    for name in os.listdir(tmp_path):
        assert "sesame" not in (tmp_path / name).read_text("utf-8")


def test_structure_and_truncation(server, engine, tmp_path):
    batches.submit(tmp_path, engine, ROWS[:2], {"choices": ["yes", "no"]})
    server.work()
    assert [one.text for one in batches.download(tmp_path, engine).completions.values()] == ["yes", "yes"]


def test_a_folder_without_a_batch_and_a_broken_one(server, engine, tmp_path):
    with pytest.raises(UserError, match="Submit one first"):
        batches.status(tmp_path, engine)
    with pytest.raises(UserError, match="nothing to submit"):
        batches.submit(tmp_path, engine, [])
    (tmp_path / STATE).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        batches.status(tmp_path, engine)


def test_another_server_is_refused(server, engine, tmp_path):
    batches.submit(tmp_path, engine, ROWS)
    with FakeServer() as second, open_at(second, engine.server.api) as other:
        for verb in (batches.status, batches.download, batches.cancel):
            with pytest.raises(UserError, match="holds a batch of http"):
                verb(tmp_path, other)
