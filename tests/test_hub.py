"""Uploads through huggingface_hub's own client to a Hub on loopback: rights, consent, interruptions, orphans, what is there."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from hub_server import environment_of
from huggingface_hub import HfApi, hf_hub_download
from safetensors.torch import save_file

from supertrainer.check import CheckFailed
from supertrainer.export import hub as hub_module
from supertrainer.export.hub import check_push, push_folder
from supertrainer.runtime import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder as a model save leaves it: two weight files, settings, a card, something unfinished."""
    made = tmp_path / "model"
    made.mkdir()
    for i in (1, 2):
        save_file({f"w{i}": torch.full((40, 40), float(i))}, made / f"model-0000{i}-of-00002.safetensors")
    (made / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    (made / "half.gguf.part").write_bytes(b"unfinished")
    (made / ".cache").mkdir()
    (made / ".cache" / "x").write_text("local")
    return made


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".part")


def test_a_push_makes_a_private_repository_with_exactly_the_folder(hub, folder, tmp_path):
    done = push_folder(folder, "me/model", commit_message="first")
    assert hub.repos["me/model"].private and sorted(done.files) == names(folder)
    there = hub.files("me/model")
    assert sorted(there) == sorted([".gitattributes", *names(folder)])
    assert all(there[name] == (folder / name).read_bytes() for name in names(folder))
    assert [message for _, message in hub.repos["me/model"].messages] == ["initial commit", "first"]  # one commit
    assert all(check.passed for check in done.checks) and done.url.endswith("/me/model")
    path = hf_hub_download("me/model", "model-00001-of-00002.safetensors", cache_dir=tmp_path / "other")
    assert open(path, "rb").read() == (folder / "model-00001-of-00002.safetensors").read_bytes()


def test_pushing_again_sends_nothing_and_commits_nothing(hub, folder):
    first = push_folder(folder, "me/model")
    received = dict(hub.received)
    again = push_folder(folder, "me/model")
    assert again.commit == first.commit and sorted(again.skipped) == names(folder) and again.uploaded_bytes == 0
    assert hub.received == received and len(hub.repos["me/model"].messages) == 2
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    third = push_folder(folder, "me/model")
    assert hub.received == received and third.commit != first.commit and "config.json" not in third.skipped
    assert hub.files("me/model")["config.json"] == b'{"model_type": "qwen3"}'


def test_a_smaller_model_leaves_no_shards_of_the_larger_one(hub, folder):
    push_folder(folder, "me/model")
    api = HfApi(endpoint=hub.url)
    api.upload_file(path_or_fileobj=b"kept", path_in_repo="notes.txt", repo_id="me/model")
    for path in [*folder.glob("model*"), folder / "README.md"]:
        path.unlink()
    save_file({"w": torch.zeros(50, 50)}, folder / "model.safetensors")
    done = push_folder(folder, "me/model")
    assert done.deleted == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert sorted(hub.files("me/model")) == [".gitattributes", "README.md", "config.json", "model.safetensors", "notes.txt"]


def test_gguf_files_alone_delete_no_weights(hub, folder, tmp_path):
    push_folder(folder, "me/model")
    only = tmp_path / "gguf"
    only.mkdir()
    (only / "model-Q8_0.gguf").write_bytes(b"GGUF" + bytes(5000))
    assert push_folder(only, "me/model").deleted == []
    assert {"model-00001-of-00002.safetensors", "model-Q8_0.gguf"} <= set(hub.files("me/model"))


def test_large_objects_go_up_in_parts(hub, folder):
    hub.part = 3000
    push_folder(folder, "me/model")
    content = (folder / "model-00001-of-00002.safetensors").read_bytes()
    assert hub.files("me/model")["model-00001-of-00002.safetensors"] == content
    assert ("POST", f"/complete/{hashlib.sha256(content).hexdigest()}") in hub.requests


def object_id(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_after_a_connection_is_lost_the_next_push_goes_on(hub, folder, monkeypatch):
    one, two = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    hub.fail("PUT", f"/storage/{object_id(two)}", times=50, drop_after=100)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="goes on where it stopped"):
        push_folder(folder, "me/model")
    assert list(hub.files("me/model")) == [".gitattributes"]  # nothing is half there
    assert hub.received[object_id(one)] == one.stat().st_size
    hub.faults.clear()
    before = hub.received[object_id(two)]
    push_folder(folder, "me/model")
    assert hub.received[object_id(one)] == one.stat().st_size  # not sent again
    assert hub.received[object_id(two)] == before + two.stat().st_size


def test_a_killed_push_goes_on(hub, folder, tmp_path):
    one, two = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    code = ("import os, signal, sys\nfrom supertrainer.export import hub\nfrom huggingface_hub import lfs\n"
            "real = lfs._upload_single_part\n"
            "def once(operation, upload_url):\n    real(operation, upload_url)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
            "lfs._upload_single_part = once\nhub.push_folder(sys.argv[1], 'me/model')\n")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment_of(hub, tmp_path / "cache")})
    assert done.returncode == -9, done.stderr
    stored = [path for path in (one, two) if object_id(path) in hub.objects]
    assert stored and list(hub.files("me/model")) == [".gitattributes"]
    before = {path: hub.received[object_id(path)] for path in stored}
    push_folder(folder, "me/model")
    assert {path: hub.received[object_id(path)] for path in stored} == before
    assert hub.files("me/model")[two.name] == two.read_bytes()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(hub, folder, monkeypatch, status):
    waited = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    hub.fail("POST", "/preupload/", times=2, status=status)
    hub.fail("PUT", "/storage/", times=1, status=status)
    push_folder(folder, "me/model")
    assert len(waited) == 3 and sorted(hub.files("me/model")) == sorted([".gitattributes", *names(folder)])


def test_a_commit_whose_answer_is_lost_is_found_not_repeated(hub, folder, monkeypatch):
    push_folder(folder, "me/model")
    (folder / "config.json").write_text("{}")
    real = HfApi.create_commit

    def lost(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise hub_module.httpx2.ReadError("connection reset")

    monkeypatch.setattr(HfApi, "create_commit", lost)
    done = push_folder(folder, "me/model")
    assert hub.files("me/model")["config.json"] == b"{}" and len(hub.repos["me/model"].messages) == 3
    assert done.commit == hub.repos["me/model"].find("main")


def test_a_commit_of_somebody_else_in_between_is_not_mixed_with_ours(hub, folder, monkeypatch):
    push_folder(folder, "me/model")
    (folder / "config.json").write_text("{}")
    real = HfApi.create_commit

    def late(self, repo_id, operations, **kwargs):
        repo = hub.repos[repo_id]
        repo.add("refs/heads/main", {**repo.commits[repo.find("main")], "theirs.txt": (b"x", False)}, "theirs")
        return real(self, repo_id, operations, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(UserError, match="somebody committed"):
        push_folder(folder, "me/model")
    monkeypatch.undo()


def test_branch_and_pull_request(hub, folder):
    push_folder(folder, "me/model")
    (folder / "config.json").write_text('{"branch": 1}')
    assert push_folder(folder, "me/model", revision="v2").revision == "v2"
    assert hub.files("me/model", "v2")["config.json"] == b'{"branch": 1}' != hub.files("me/model")["config.json"]
    (folder / "config.json").write_text('{"pull": 1}')
    done = push_folder(folder, "me/model", create_pr=True)
    assert "/discussions/1" in done.url and hub.files("me/model", "refs/pr/1")["config.json"] == b'{"pull": 1}'
    assert hub.files("me/model")["config.json"] != b'{"pull": 1}'


@pytest.mark.parametrize(("token", "repo_id", "said"), [
    ("me-reads", "me/model", "may only read"), ("you-writes", "me/model", "belongs to me"), ("nobody", "me/model", "does not accept"),
    ("me-writes", "me/mo del", "no name for a repository"), ("me-writes", "a/b/c", "no name for a repository"),
])
def test_what_would_be_refused_is_said_before_anything_is_sent(hub, folder, monkeypatch, token, repo_id, said):
    monkeypatch.setenv("HF_TOKEN", token)
    for ask in (lambda: check_push(repo_id), lambda: push_folder(folder, repo_id)):
        with pytest.raises(UserError, match=said) as caught:
            ask()
        assert token not in str(caught.value)
    assert not hub.repos and not hub.received


def test_no_token_no_network_no_server(hub, monkeypatch, folder):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN"):
        check_push("me/model")
    monkeypatch.setenv("HF_TOKEN", "me-writes")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        check_push("me/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        check_push("me/model")


def test_public_is_only_by_consent(hub, folder):
    with pytest.raises(UserError, match="public_ok=True"):
        push_folder(folder, "me/open", private=False)
    assert not hub.repos
    push_folder(folder, "me/open", private=False, public_ok=True)
    assert not hub.repos["me/open"].private
    for how, said in (({}, "public"), ({"public_ok": True}, "a push does not change who may see it"), ({"private": False}, "public_ok=True")):
        with pytest.raises(UserError, match=said):
            push_folder(folder, "me/open", **how)
    push_folder(folder, "me/open", private=False, public_ok=True)
    push_folder(folder, "me/closed")
    assert check_push("me/closed").private and not check_push("model").exists and check_push("model").repo_id == "me/model"


def test_a_full_account_says_so(hub, folder):
    hub.quota = 1000
    with pytest.raises(UserError, match="no room"):
        push_folder(folder, "me/model")


def test_what_arrived_wrong_is_noticed(hub, folder, monkeypatch):
    real = HfApi.create_commit

    def damaged(self, repo_id, operations, **kwargs):
        done = real(self, repo_id, operations, **kwargs)
        repo = hub.repos[repo_id]
        repo.commits[done.oid]["config.json"] = (b"other", False)
        return done

    monkeypatch.setattr(HfApi, "create_commit", damaged)
    with pytest.raises(CheckFailed, match="config.json"):
        push_folder(folder, "me/model")


def test_patterns_choose_files_and_an_empty_choice_is_an_error(hub, folder):
    done = push_folder(folder, "me/model", allow_patterns="*.json", ignore_patterns="*index*")
    assert done.files == ["config.json"]
    with pytest.raises(UserError, match="no file"):
        push_folder(folder, "me/model", allow_patterns="*.bin")
