"""Uploads through huggingface_hub's own client to a Hub on loopback: rights, consent, interruptions, leftovers, what is there."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time

import pytest
import tiny_hub
import torch
from hub_server import Account, Hub, environment_of, running
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from safetensors.torch import save_file

from supertrainer.check import CheckFailed
from supertrainer.export import uploads
from supertrainer.export.hub import check_push, push_folder
from supertrainer.runtime import UserError, no_bars

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A folder as a model save leaves it: two weight files, settings, a card, something unfinished."""
    made = tmp_path / "model"
    made.mkdir()
    for i, name in enumerate((ONE, TWO)):
        save_file({f"w{i}": torch.full((40, 40), float(i + 1))}, made / name)
    (made / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    (made / "half.gguf.part").write_bytes(b"unfinished")
    (made / ".cache").mkdir()
    (made / ".cache" / "x").write_text("local")
    return made


@pytest.fixture
def waited(monkeypatch):
    """Pauses of the client and of ours, not waited for."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".part")


def object_id(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def committed(hub, repo_id="me/model"):
    return [message for _, message in hub.repos[repo_id].messages]


def python(code, *args, hub, cache, token="me-writes"):
    """A fresh process that talks to `hub`."""
    environment = {**os.environ, **environment_of(hub, cache, token), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], text=True, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


# --- what a push leaves


def test_a_push_makes_a_private_repository_with_exactly_the_folder(hub, folder, tmp_path):
    done = push_folder(folder, "me/model", commit_message="first", commit_description="of two")
    assert hub.repos["me/model"].private and sorted(done.files) == names(folder) and done.skipped == done.deleted == []
    there = hub.files("me/model")
    assert sorted(there) == sorted([".gitattributes", *names(folder)])
    assert all(there[name] == (folder / name).read_bytes() for name in names(folder))
    assert committed(hub) == ["initial commit", "first\n\nof two"]  # one commit
    assert len(done.checks) == 2 and all(check.passed for check in done.checks) and done.url.endswith("/me/model")
    assert done.uploaded_bytes == sum((folder / name).stat().st_size for name in names(folder))
    assert set(hub.received) == {object_id(folder / ONE), object_id(folder / TWO)}  # large files to the store, small ones in the commit
    path = hf_hub_download("me/model", ONE, cache_dir=tmp_path / "other")
    assert open(path, "rb").read() == (folder / ONE).read_bytes()


def test_pushing_again_sends_nothing_and_commits_nothing(hub, folder):
    first = push_folder(folder, "me/model")
    received = dict(hub.received)
    again = push_folder(folder, "me/model")
    assert again.commit == first.commit and sorted(again.skipped) == names(folder) and again.uploaded_bytes == 0
    assert hub.received == received and len(committed(hub)) == 2
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    third = push_folder(folder, "me/model")
    assert hub.received == received and third.commit != first.commit and "config.json" not in third.skipped
    assert hub.files("me/model")["config.json"] == b'{"model_type": "qwen3"}'


def test_content_that_another_branch_has_is_not_sent_again(hub, folder):
    push_folder(folder, "me/model")
    received = dict(hub.received)
    (folder / ONE).rename(folder / "renamed.safetensors")
    assert "renamed.safetensors" in push_folder(folder, "me/model", revision="v2").files
    assert hub.received == received


def test_large_objects_go_up_in_parts(hub, folder):
    hub.part = 3000
    push_folder(folder, "me/model")
    content = (folder / ONE).read_bytes()
    assert hub.files("me/model")[ONE] == content and hub.received[object_id(folder / ONE)] == len(content)
    assert {("PUT", f"/storage/{object_id(folder / ONE)}/{i}") for i in (1, 2, 3)} <= set(hub.requests)


def test_progress_is_shown_unless_it_is_not_wanted(hub, folder, capfd):
    enable_progress_bars()
    push_folder(folder, "me/model")
    assert ONE in capfd.readouterr().err
    with no_bars():
        push_folder(folder, "me/other")
    disable_progress_bars()
    assert "%" not in capfd.readouterr().err


# --- what an earlier model leaves


def test_a_smaller_model_leaves_no_shards_of_the_larger_one(hub, folder):
    push_folder(folder, "me/model")
    HfApi(endpoint=hub.url).upload_file(path_or_fileobj=b"kept", path_in_repo="notes.txt", repo_id="me/model")
    for path in [*folder.glob("model*"), folder / "README.md"]:
        path.unlink()
    save_file({"w": torch.zeros(50, 50)}, folder / "model.safetensors")
    assert push_folder(folder, "me/model", keep_others=True, revision="all").deleted == []
    done = push_folder(folder, "me/model")
    assert done.deleted == [ONE, TWO, "model.safetensors.index.json"]
    assert sorted(hub.files("me/model")) == [".gitattributes", "README.md", "config.json", "model.safetensors", "notes.txt"]
    assert len(committed(hub)) == 5  # the deletion was in the same commit as the upload


def test_a_merged_model_takes_the_place_of_an_adapter_and_not_the_other_way_round(hub, folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(3)}, adapter / "adapter_model.safetensors")
    push_folder(adapter, "me/model")
    assert push_folder(folder, "me/model").deleted == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(UserError, match="holds a whole model"):
        push_folder(adapter, "me/model")
    push_folder(adapter, "me/model", keep_others=True)
    assert {"adapter_config.json", ONE} <= set(hub.files("me/model"))


def test_gguf_files_alone_delete_no_weights_and_patterns_hide_nothing_from_the_comparison(hub, folder, tmp_path):
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    push_folder(folder, "me/model")
    only = tmp_path / "gguf"
    only.mkdir()
    (only / "model-Q8_0.gguf").write_bytes(b"GGUF" + bytes(5000))
    assert push_folder(only, "me/model").deleted == []
    assert push_folder(folder, "me/model", allow_patterns="*.json").deleted == []  # the template is in the folder, only not sent
    assert {ONE, "model-Q8_0.gguf", "chat_template.jinja"} <= set(hub.files("me/model"))
    (folder / "chat_template.jinja").unlink()
    assert push_folder(folder, "me/model").deleted == ["chat_template.jinja"]


# --- interruptions


def test_after_a_connection_is_lost_the_next_push_goes_on(hub, folder, waited):
    one, two = object_id(folder / ONE), object_id(folder / TWO)
    hub.fail("PUT", f"/storage/{two}", times=50, drop_after=100)
    with pytest.raises(UserError, match="goes on where it stopped"):
        push_folder(folder, "me/model")
    assert waited == [1, 2, 4, 8, 8]  # the client's five attempts, and none of ours on top
    assert list(hub.files("me/model")) == [".gitattributes"]  # nothing is half there
    assert hub.received == {one: (folder / ONE).stat().st_size, two: 600}
    hub.faults.clear()
    push_folder(folder, "me/model")
    assert hub.received == {one: (folder / ONE).stat().st_size, two: 600 + (folder / TWO).stat().st_size}


def test_a_push_that_was_killed_goes_on(hub, folder, tmp_path):
    one, two = object_id(folder / ONE), object_id(folder / TWO)
    reached, release = hub.hold("PUT", f"/storage/{two}", drop_after=1000)
    code = "import sys\nfrom supertrainer.export.hub import push_folder\npush_folder(sys.argv[1], 'me/model')"
    process = python(code, folder, hub=hub, cache=tmp_path / "cache")
    assert reached.wait(120) and hub.wait_for(one), process.poll() is not None and process.communicate()
    process.kill()
    process.communicate()
    release.set()
    assert process.returncode == -9 and list(hub.files("me/model")) == [".gitattributes"]
    assert hub.received == {one: (folder / ONE).stat().st_size, two: 1000}
    push_folder(folder, "me/model")
    assert hub.received == {one: (folder / ONE).stat().st_size, two: 1000 + (folder / TWO).stat().st_size}
    assert hub.files("me/model")[TWO] == (folder / TWO).read_bytes()


@pytest.mark.parametrize("after", [0, 1, 2], ids=["first_file", "second_file", "third_file"])
def test_however_many_files_arrived_they_are_not_sent_again(hub, folder, waited, after):
    for i in range(2):
        save_file({"x": torch.full((60, 60), float(i))}, folder / f"more-{i}.safetensors")
    hub.fail("PUT", "/storage/", times=100, status=500, after=after)
    with pytest.raises(UserError, match="goes on"):
        push_folder(folder, "me/model")
    stored = {oid: hub.received[oid] for oid in hub.objects}
    assert len(stored) == after
    hub.faults.clear()
    push_folder(folder, "me/model")
    large = [folder / name for name in names(folder) if name.endswith(".safetensors")]
    assert len(hub.objects) == 4 and hub.received == {object_id(path): path.stat().st_size for path in large}
    assert stored.items() <= hub.received.items()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_at_every_step(hub, folder, waited, status):
    steps = [("GET", "whoami"), ("GET", "/api/models/me/model$"), ("POST", "/repos/create"), ("GET", "/refs$"), ("GET", "/tree/"),
             ("POST", "/preupload/"), ("POST", "/objects/batch"), ("PUT", "/storage/"), ("POST", "/verify/"), ("POST", "/commit/"),
             ("POST", "/branch/")]
    for method, path in steps:
        hub.fail(method, path, status=status, retry_after=3)
    push_folder(folder, "me/model", revision="v2")
    assert len(waited) == len(steps) and set(waited) == {3, 4}  # the client adds a second
    assert all(fault.times == 0 for fault in hub.faults)
    assert sorted(hub.files("me/model", "v2")) == sorted([".gitattributes", *names(folder)]) and len(committed(hub)) == 2


def test_a_server_that_stays_busy_is_given_up_after_a_stated_number_of_tries(hub, folder, waited):
    hub.fail("POST", "/commit/", times=100, status=503)
    with pytest.raises(UserError, match="goes on where it stopped"):
        push_folder(folder, "me/model")
    assert waited == [1, 2, 4, 8] and sum("/commit/" in path for _, path in hub.requests) == uploads.TRIES
    hub.faults.clear()
    received = dict(hub.received)
    push_folder(folder, "me/model")
    assert hub.received == received  # only the commit was missing


def test_a_server_that_asks_for_an_hour_is_not_waited_for(hub, folder, waited):
    hub.fail("POST", "/commit/", times=100, status=429, retry_after=3600)
    with pytest.raises(UserError, match="asks to wait 1 h"):
        push_folder(folder, "me/model")
    assert waited == []


def test_a_slow_server_is_waited_for(hub, folder):
    hub.slow("PUT", "/storage/", 0.2, times=2)
    hub.slow("POST", "/commit/", 0.2)
    push_folder(folder, "me/model")
    assert sorted(hub.files("me/model")) == sorted([".gitattributes", *names(folder)])


def test_a_commit_whose_answer_is_lost_is_found_not_repeated(hub, folder, waited):
    push_folder(folder, "me/model")
    (folder / "config.json").write_text("{}")
    hub.fail("POST", "/commit/", lose_answer=True)
    done = push_folder(folder, "me/model")
    assert hub.files("me/model")["config.json"] == b"{}" and len(committed(hub)) == 3 and waited == []
    assert done.commit == hub.repos["me/model"].find("main")


def test_a_pull_request_whose_answer_is_lost_is_found_not_opened_twice(hub, folder, waited):
    push_folder(folder, "me/model")
    (folder / "config.json").write_text("{}")
    hub.fail("POST", "/commit/", lose_answer=True)
    done = push_folder(folder, "me/model", create_pr=True)
    assert done.revision == "refs/pr/1" and done.url.endswith("/me/model/discussions/1") and waited == []
    assert [ref for ref in hub.repos["me/model"].refs if "/pr/" in ref] == ["refs/pr/1"]


def test_a_commit_that_was_lost_before_it_was_made_is_made_again(hub, folder, waited):
    hub.fail("POST", "/commit/", drop_after=50)
    push_folder(folder, "me/model")
    assert waited == [1] and len(committed(hub)) == 2


@pytest.mark.parametrize("lost", [False, True], ids=["answered", "answer_lost"])
def test_a_commit_of_somebody_else_in_between_is_not_mixed_with_ours(hub, folder, waited, lost):
    push_folder(folder, "me/model")
    (folder / "config.json").write_text("{}")
    hub.fail("POST", "/commit/", before=lambda: hub.write("me/model", {"theirs.txt": b"x"}), lose_answer=lost)
    with pytest.raises(UserError, match="somebody committed"):
        push_folder(folder, "me/model")
    assert hub.files("me/model")["config.json"] != b"{}"
    push_folder(folder, "me/model")
    assert hub.files("me/model")["config.json"] == b"{}" and hub.files("me/model")["theirs.txt"] == b"x"


# --- where it goes


def test_branch_and_pull_request(hub, folder):
    push_folder(folder, "me/model")
    (folder / "config.json").write_text('{"branch": 1}')
    assert push_folder(folder, "me/model", revision="v2/next").revision == "v2/next"
    assert hub.files("me/model", "v2/next")["config.json"] == b'{"branch": 1}' != hub.files("me/model")["config.json"]
    (folder / "config.json").write_text('{"pull": 1}')
    done = push_folder(folder, "me/model", create_pr=True, commit_message="please", commit_description="why")
    assert done.url.endswith("/discussions/1") and hub.files("me/model", "refs/pr/1")["config.json"] == b'{"pull": 1}'
    assert hub.files("me/model")["config.json"] != b'{"pull": 1}' and committed(hub)[-1] == "please\n\nwhy"
    (folder / "config.json").write_text('{"pull": 2}')
    assert push_folder(folder, "me/model", revision="refs/pr/1").url.endswith("/discussions/1")
    assert hub.files("me/model", "refs/pr/1")["config.json"] == b'{"pull": 2}'
    assert [ref.name for ref in HfApi(endpoint=hub.url).list_repo_refs("me/model").branches] == ["main", "v2/next"]


def test_somebody_else_s_repository_takes_a_proposal(hub, folder, monkeypatch):
    hub.make("you/theirs", {"config.json": b"{}"}, private=False)
    with pytest.raises(UserError, match="belongs to you.*create_pr=True"):
        push_folder(folder, "you/theirs", private=False, public_ok=True)
    done = push_folder(folder, "you/theirs", private=False, public_ok=True, create_pr=True)
    assert done.revision == "refs/pr/1" and hub.files("you/theirs")["config.json"] == b"{}"
    (folder / "config.json").write_text('{"second": 2}')
    again = push_folder(folder, "you/theirs", private=False, public_ok=True, revision="refs/pr/1")  # one's own goes on
    assert again.revision == "refs/pr/1" and hub.files("you/theirs", "refs/pr/1")["config.json"] == b'{"second": 2}'
    monkeypatch.setenv("HF_TOKEN", "me-reads")
    with pytest.raises(UserError, match="may only read"):
        check_push("you/theirs", private=False, public_ok=True, create_pr=True)


@pytest.mark.parametrize(("arguments", "said"), [
    ({"create_pr": True, "revision": "v2"}, "create_pr=True proposes a change of main"), ({"revision": "a b"}, "no name for a branch"),
    ({"revision": "0" * 40}, "is a commit"), ({"revision": "v1"}, "is a tag"), ({"revision": "refs/pr/9"}, "has no pull request"),
    ({"repo_type": "dataset"}, "repo_type='dataset'"), ({"commit_message": " "}, "commit_message is empty"),
], ids=["pr_and_branch", "bad_branch", "commit", "tag", "no_pr", "repo_type", "message"])
def test_what_cannot_be_honoured_is_refused_before_anything_is_sent(hub, folder, arguments, said):
    repo = hub.make("me/model")
    HfApi(endpoint=hub.url).create_tag("me/model", tag="v1")
    with pytest.raises(UserError, match=said):
        push_folder(folder, "me/model", **arguments)
    assert committed(hub) == ["initial commit"] and not hub.received and list(repo.refs) == ["refs/heads/main", "refs/tags/v1"]


def test_a_pull_request_needs_a_repository(hub, folder):
    for arguments in ({"create_pr": True}, {"revision": "refs/pr/1"}):
        with pytest.raises(UserError, match="is not"):
            push_folder(folder, "me/none", **arguments)
    assert not hub.repos


def test_two_hubs_in_one_process(hub, folder, monkeypatch):
    with running() as other:
        monkeypatch.setenv("HF_ENDPOINT", other.url + "/")  # after the import of huggingface_hub, which read the first
        done = push_folder(folder, "me/model")
        assert done.url == f"{other.url}/me/model" and "me/model" in other.repos and not hub.repos


# --- who may, and who sees it


@pytest.mark.parametrize(("token", "repo_id", "said"), [
    ("me-reads", "me/model", "may only read"), ("you-writes", "me/model", "belongs to me"), ("nobody", "me/model", "does not accept"),
    ("me-writes", "me/mo del", "no name for a repository"), ("me-writes", "a/b/c", "no name for a repository"),
    ("me-writes", "me/-x", "no name for a repository"), ("org-reads", "org/model", "may only read in org"),
    ("hf_fine", "me/other", "does not have repo.write"),
], ids=["read_only", "not_mine", "unknown_token", "space", "three_parts", "dash", "org_reader", "fine_grained"])
def test_what_would_be_refused_is_said_before_anything_is_sent(hub, folder, monkeypatch, token, repo_id, said, caplog):
    hub.users["org-reads"] = Account("me", "write", {"org": "read"})
    hub.users["hf_fine"] = Account("me", "fineGrained", scopes={"me/model": ["repo.write"], "me": ["repo.content.read"]})
    monkeypatch.setenv("HF_TOKEN", token)
    for ask in (lambda: check_push(repo_id), lambda: push_folder(folder, repo_id), lambda: push_folder(folder, repo_id, token=token)):
        with pytest.raises(UserError, match=said) as caught:
            ask()
        assert token not in str(caught.value) + caplog.text
    assert not hub.repos and not hub.received


def test_organisations_and_fine_grained_tokens_that_may(hub, folder, monkeypatch):
    hub.users["org-writes"] = Account("me", "write", {"org": "write"})
    hub.users["hf_fine"] = Account("me", "fineGrained", scopes={"me": ["repo.write"]})
    monkeypatch.setenv("HF_TOKEN", "org-writes")
    assert push_folder(folder, "org/model").repo_id == "org/model"
    monkeypatch.setenv("HF_TOKEN", "hf_fine")
    assert push_folder(folder, "model").repo_id == "me/model" and hub.repos["org/model"].private


def test_a_check_asks_little_and_changes_nothing(hub):
    hub.make("me/model")
    target = check_push("me/model")
    assert (target.exists, target.private, target.head) == (True, True, hub.repos["me/model"].find("main"))
    assert len(hub.requests) == 3 and all(method == "GET" for method, _ in hub.requests)
    assert check_push("me/new") == type(target)("me/new", False, True, None) and list(hub.repos) == ["me/model"]


def test_no_token_no_network_no_server(hub, monkeypatch, folder, waited):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN.*hf auth login"):
        check_push("me/model")
    monkeypatch.setenv("HF_TOKEN", "me-writes")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        check_push("me/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        push_folder(folder, "me/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        check_push("me/model")
    assert not hub.requests


def test_public_is_only_by_consent_and_never_changed(hub, folder):
    with pytest.raises(UserError, match="public_ok=True"):
        push_folder(folder, "me/open", private=False)
    assert not hub.repos
    push_folder(folder, "me/open", private=False, public_ok=True)
    assert not hub.repos["me/open"].private
    (folder / "config.json").write_text('{"new": 1}')
    for how, said in (({}, "public"), ({"public_ok": True}, "a push does not change who may see it"), ({"private": False}, "public_ok=True")):
        with pytest.raises(UserError, match=said):
            push_folder(folder, "me/open", **how)
    assert len(committed(hub, "me/open")) == 2
    push_folder(folder, "me/open", private=False, public_ok=True)
    push_folder(folder, "me/closed")
    with pytest.raises(UserError, match="there and private"):
        push_folder(folder, "me/closed", private=False, public_ok=True)
    assert hub.repos["me/closed"].private and not hub.repos["me/open"].private


def test_a_repository_that_became_public_in_between_gets_nothing(hub, folder):
    hub.fail("POST", "/repos/create", before=lambda: hub.make("me/model", private=False))
    with pytest.raises(UserError, match="made it public. Nothing was uploaded"):
        push_folder(folder, "me/model")
    assert not hub.received and committed(hub) == ["initial commit"]


def test_a_full_account_says_so_before_the_first_byte(hub, folder):
    hub.quota = 7000  # one file would fit
    with pytest.raises(UserError, match="no room"):
        push_folder(folder, "me/model")
    assert sum(hub.received.values()) == 0


@pytest.mark.parametrize("token", ["you-writes", None], ids=["stranger", "nobody"])
def test_private_and_gated_repositories_answer_as_the_client_expects(hub, folder, token, tmp_path):
    push_folder(folder, "me/model")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=token or False).model_info("me/model")
    HfApi(endpoint=hub.url).update_repo_settings("me/model", private=False, gated="manual")
    with pytest.raises(GatedRepoError):
        hf_hub_download("me/model", ONE, token=token or False, cache_dir=tmp_path / "other")
    HfApi(endpoint=hub.url).delete_repo("me/model")
    assert not hub.repos


# --- what is compared


def test_what_arrived_wrong_is_noticed(hub, folder):
    def damage():
        commit = hub.repos["me/model"].commits[hub.repos["me/model"].find("main")]
        commit["config.json"] = hub.keep(b"other")
        del commit[TWO]

    hub.fail("GET", "/tree/", after=1, before=damage)  # the first listing is before the upload
    with pytest.raises(CheckFailed, match=f"{TWO} not there.*config.json differ"):
        push_folder(folder, "me/model")


def test_a_gitignore_in_the_repository_loses_no_file_silently(hub, folder):
    hub.make("me/model", {".gitignore": b"config.json\n"})
    with pytest.raises(CheckFailed, match="config.json not there.*gitignore"):
        push_folder(folder, "me/model")


def test_a_file_that_changes_under_the_upload_is_noticed(hub, folder):
    hub.fail("POST", "/commit/", before=lambda: (folder / ONE).write_bytes(b"new"))
    with pytest.raises(CheckFailed, match=f"no file changed.*{ONE}"):
        push_folder(folder, "me/model")


def test_a_mistake_of_ours_is_not_called_a_stopped_upload(hub, folder, monkeypatch):
    def broken(*arguments):
        raise ValueError("zip() argument 2 is shorter")

    monkeypatch.setattr("supertrainer.export.hub.compare", broken)
    with pytest.raises(ValueError, match="zip"):
        push_folder(folder, "me/model")


@pytest.mark.parametrize("asked", ["1.5", "soon"])
def test_a_wait_that_cannot_be_read_is_chosen_by_us(hub, folder, waited, asked):
    hub.fail("GET", "/api/whoami-v2", status=503, headers={"Retry-After": asked})
    assert push_folder(folder, "me/model").commit


def test_a_card_the_hub_would_not_take_is_said_before_the_upload(hub, folder):
    (folder / "README.md").write_text("---\n{broken\n---\n# mine\n")
    with pytest.raises(UserError, match=r"header of README.md is not accepted.*not valid YAML"):
        push_folder(folder, "me/model")
    assert not hub.received


def test_patterns_choose_files_and_an_empty_choice_is_an_error(hub, folder):
    done = push_folder(folder, "me/model", allow_patterns="*.json", ignore_patterns="*index*")
    assert done.files == ["config.json"]
    with pytest.raises(UserError, match="no file"):
        push_folder(folder, "me/model", allow_patterns="*.bin")
    with pytest.raises(UserError, match="not a folder"):
        push_folder(folder / "none", "me/model")


def test_files_no_hub_takes_are_named_all_at_once(hub, folder, monkeypatch):
    monkeypatch.setattr(uploads, "LARGEST_FILE", 6000)
    (folder / "two\nlines.txt").write_text("x")
    with pytest.raises(UserError) as caught:
        push_folder(folder, "me/model")
    said = str(caught.value)
    assert "lines.txt" in said and ONE in said and TWO in said and "max_shard_size" in said and not hub.repos


def test_the_token_is_in_no_message_and_no_log(hub, folder, waited, caplog, capfd):
    logging.getLogger("supertrainer").propagate = True
    try:
        hub.users["hf_secret"] = Account("me")
        hub.fail("POST", "/commit/", status=403)
        hub.fail("PUT", "/storage/", times=2, status=500)
        with caplog.at_level(logging.DEBUG), pytest.raises(UserError, match="refused the upload") as caught:
            push_folder(folder, "me/model", token="hf_secret")
    finally:
        logging.getLogger("supertrainer").propagate = False
    assert "hf_secret" not in caplog.text + str(caught.value) + repr(caught.value.__cause__) + "".join(capfd.readouterr())
    assert "asking again" not in caplog.text and "hf_secret" not in json.dumps([str(path) for path in folder.rglob("*")])


def test_the_server_s_own_mistakes_are_not_swallowed(tmp_path):
    made = Hub(tmp_path)
    made.errors.append(KeyError("bug"))
    with pytest.raises(KeyError):
        made.close()


# --- for whoever loads it


def test_a_pushed_model_is_downloaded_by_transformers_and_generates(hub, tmp_path, seed):
    model, tokenizer = tiny_hub.llama(tmp_path / "model", seed, max_shard_size="60KB")
    done = push_folder(tmp_path / "model", "me/model")
    assert len([name for name in done.files if name.endswith(".safetensors")]) > 1
    prompt = tokenizer("the cat", return_tensors="pt").input_ids
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    code = ("import json, sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "model, tokenizer = (kind.from_pretrained('me/model') for kind in (AutoModelForCausalLM, AutoTokenizer))\n"
            "prompt = tokenizer('the cat', return_tensors='pt').input_ids\n"
            "print(json.dumps(model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist()))")
    said, errors = (process := python(code, hub=hub, cache=tmp_path / "cache")).communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(said.splitlines()[-1]) == expected, f"seed {seed}"
