"""The command line as people type it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from supertrainer.cli import configuration, main, overview, to_yaml
from supertrainer.runtime import UserError

ROOT = Path(__file__).resolve().parent.parent


def run(*words, cwd=ROOT, **kwargs):
    return subprocess.run([Path(sys.executable).parent / "supertrainer", *words], cwd=cwd, capture_output=True, text=True, **kwargs)


def test_help_names_commands_experiments_and_examples(capsys):
    assert main([]) == 0 and main(["--help"]) == 0
    said = capsys.readouterr().out
    for word in ("train", "infer", "benchmark", "train_bert", "train_llm", "train_mllm", "--multirun"):
        assert word in said
    assert said == f"{overview()}\n{overview()}\n"


def test_version_is_the_one_of_settings(capsys):
    main(["--version"])
    said = capsys.readouterr().out.strip()
    assert f"version = {said}" in (ROOT / "settings.ini").read_text()


@pytest.mark.parametrize("words", [
    "train +experiment=train_mllm trainer.training_kwargs.num_train_epochs=10 --cfg job",
    "train --cfg job +experiment=train_llm trainer/common/model_kwargs@trainer.model_kwargs=sdpa",
    "train experiment=train_bert mode=sanity_check --cfg job",
    "infer model.path=some/folder --cfg job",
    "benchmark model.path=some/folder dataset=mllm/digits --cfg job",
])
def test_cfg_prints_yaml_that_composes(words, tmp_path):
    done = run(*words.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert isinstance(yaml.safe_load(done.stdout), dict) and not list(tmp_path.iterdir())


def test_errors_go_to_standard_error_with_code_2_and_no_traceback(tmp_path):
    done = run("train", "+experiment=train_brt", "mode=toyy", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2 and not list(tmp_path.iterdir())


def test_an_unknown_command_or_option_names_the_nearest(capsys):
    assert main(["trian"]) == 2 and "Did you mean 'train'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["train", "--multi"])
    assert caught.value.code == 2


def test_from_run_takes_values_but_no_groups(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(configuration("train", ["experiment=train_bert", "mode=toy"], None, None)))
    again = configuration("train", ["trainer.training_kwargs.max_steps=3"], None, str(tmp_path))
    assert again.trainer.training_kwargs.max_steps == 3 and again.mode == "toy"
    for words, said in ((["model=minilm"], "chooses a group"), (["trainer.lerning=1"], "no such key"),
                        (["seed=x"], "must be a whole number")):
        with pytest.raises(UserError, match=said):
            configuration("train", words, None, str(tmp_path))
    with pytest.raises(UserError, match="no config.yaml"):
        configuration("train", [], None, str(tmp_path / "absent"))


def test_a_reader_that_leaves_early_is_no_error():
    done = subprocess.run(f"'{Path(sys.executable).parent}/supertrainer' train --help | head -1", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "usage" in done.stdout


def test_a_run_from_before_a_key_existed_repeats_with_its_default_and_is_not_pushed_again(tmp_path):
    cfg = configuration("train", ["experiment=train_bert", "mode=toy", "export.push.repo_id=me/x"], None, None).to_dict()
    del cfg["export"]["gguf"], cfg["model"]["freeze_layers"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    again = configuration("train", [], None, str(tmp_path)).to_dict()
    assert again["export"]["gguf"] == [] and again["model"]["freeze_layers"] is None
    assert again["export"]["push"]["repo_id"] is None
    wished = configuration("train", ["export.push.repo_id=me/y"], None, str(tmp_path))
    assert wished.export.push.repo_id == "me/y"
    assert {**again, "export": cfg["export"], "model": cfg["model"]} == cfg  # nothing else has changed


def test_short_options_of_export_are_overrides(capsys):
    assert main(["export", "model.path=x", "--gguf", "q8_0,q4_k_m", "--gguf", "f16", "--push", "me/x", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["gguf"] == ["q8_0", "q4_k_m", "f16"] and shown["push"]["repo_id"] == "me/x" and shown["push"]["private"]
    assert main(["export", "model.path=x", "--public", "--cfg", "job"]) == 0
    push = yaml.safe_load(capsys.readouterr().out)["push"]
    assert push["public_ok"] and not push["private"]
