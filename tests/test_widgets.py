"""The config picker driven as by hand: what is shown, what `picker.cfg` is, and that the command line says the same."""

import asyncio
import shlex
import subprocess
import sys

import pytest

from supertrainer.cli import command_parser, configuration
from supertrainer.config import LockedConfig, compose, options
from supertrainer.config.selection import FIELDS, override
from supertrainer.runtime import UserError
from supertrainer.widgets import ConfigPicker

RATE = "trainer.training_kwargs.learning_rate"
STEPS = "trainer.training_kwargs.max_steps"


def typed(command: str):
    """Return the configuration that a terminal would compose from a command line."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("supertrainer", "train")
    arguments = command_parser("train").parse_intermixed_args(words)
    return configuration("train", arguments.overrides, arguments.config_dir, arguments.from_run)


def fill(picker: ConfigPicker, **fields: str) -> None:
    """Type into fields by the last part of their key."""
    for name, text in fields.items():
        (key,) = [item.key for item in FIELDS if item.key.endswith(f".{name}") or item.key == name]
        picker.controls.fields[key].value = text


def shown_html(picker: ConfigPicker) -> str:
    """Return everything the right half shows."""
    return "\n".join(part.value for part in picker.box.children[1].children if isinstance(part.value, str))


@pytest.mark.parametrize("experiment", options("experiment"))
def test_an_untouched_picker_is_the_experiment(experiment):
    picker = ConfigPicker(experiment)
    assert picker.cfg == compose(experiment) and picker.overrides == []
    assert picker.command == f"supertrainer train +experiment={experiment}"
    assert experiment in shown_html(picker)


def test_changes_reach_cfg_command_and_python():
    picker = ConfigPicker()
    picker.controls.groups["mode"].value = "toy"
    picker.controls.groups["model"].value = "bert/minilm"
    fill(picker, learning_rate="3e-5", seed="7", train="50", save="false", root="my runs; rm -rf '$HOME'")
    picker.controls.further.value = "\n# weights by frequency\ntrainer.class_weights=balanced\n"
    cfg = picker.cfg
    assert (cfg.mode, cfg.model.name, cfg.seed, cfg.export.save) == ("toy", "minilm", 7, False)
    assert cfg.trainer.training_kwargs.learning_rate == 3e-5 and cfg.dataset.limit.train == 50
    assert cfg.trainer.class_weights == "balanced" and cfg.run.root == "my runs; rm -rf '$HOME'"
    assert len(picker.overrides) == 8
    assert typed(picker.command) == cfg
    assert eval(picker.python, {"compose": compose}) == cfg
    assert "learning_rate: 3.0e-05" in shown_html(picker)
    with pytest.raises(LockedConfig):
        cfg.seed = 8


def test_what_equals_the_default_is_no_override():
    picker = ConfigPicker("train_bert", "mode=sanity_check")
    steps = picker.cfg.trainer.training_kwargs.max_steps
    fill(picker, seed="42", max_steps=str(steps))  # what the mode says already
    picker.controls.further.value = "trainer.freeze=[]"
    assert picker.overrides == ["mode=sanity_check"] and picker.problems == ()
    fill(picker, max_steps="-1")  # what the experiment says, but not the mode
    assert picker.overrides == ["mode=sanity_check", f"{STEPS}=-1"] and picker.cfg.trainer.training_kwargs.max_steps == -1


def test_a_default_that_hides_behind_another_override_stays():
    # model.name alone takes another option for the model, whose config has no hidden_size
    further = ["model.name=some/encoder", "model.config.hidden_size=128"]
    picker = ConfigPicker()
    picker.controls.further.value = "\n".join(further)
    assert picker.overrides == further
    assert picker.cfg == compose("train_bert", *further) and picker.cfg.model.config == {"hidden_size": 128}


@pytest.mark.parametrize(("name", "text", "sentence"), [
    ("learning_rate", "abc", f"{RATE}: must be a number, but is the text 'abc'."),
    ("learning_rate", "0,001", f"{RATE}: must be a number, but is the text '0,001'."),
    ("learning_rate", "-1", f"{RATE}: must be a number greater than 0, but is -1."),
    ("seed", "[1", "seed: must be a whole number, but is the text '[1'."),
    ("seed", "1.5", "seed: must be a whole number, but is 1.5."),
    ("train", "0", "dataset.limit.train: must be a number at least 1, but is 0."),
])
def test_a_wrong_value_is_a_sentence(name, text, sentence):
    picker = ConfigPicker()
    good = picker.cfg
    fill(picker, **{name: text})
    assert picker.problems == (sentence,)
    with pytest.raises(UserError) as caught:
        print(picker.cfg)
    assert caught.value.problems == (sentence,)
    page = shown_html(picker)
    assert "1 problem" in page and "opacity" in page and f"name: {good.model.name}" in page  # the last valid one, greyed
    key = sentence.split(":")[0]
    assert "1px solid" in str(picker.controls.fields[key].layout.border_top)
    fill(picker, **{name: ""})
    assert picker.cfg == good and "opacity" not in shown_html(picker)
    assert picker.controls.fields[key].layout.border_top is None


def test_all_problems_are_shown_at_once():
    picker = ConfigPicker()
    fill(picker, seed="x")
    picker.controls.further.value = "trainer.nmae=a\nseed=3\nmode=toy\nexport.verify_rows=0"
    problems = "\n".join(picker.problems)
    for part in ("trainer.nmae: no such key. Did you mean 'name'?", "seed: set twice", "mode=toy: choose the mode",
                 "export.verify_rows: must be a number at least 1"):
        assert part in problems
    picker.controls.further.value = "nonsense"
    assert picker.problems[0].startswith("nonsense: not an override")


def test_no_text_can_break_out_of_the_page():
    picker = ConfigPicker()
    fill(picker, root="<script>alert(1)</script>")
    assert picker.cfg.run.root.startswith("<script>") and "<script>" not in shown_html(picker)
    fill(picker, seed="<img src=x>")
    assert "&lt;img" in shown_html(picker) and "<img" not in shown_html(picker)


@pytest.mark.parametrize("text", ["plain", "with space", "it's", 'say "hi"', "both ' and \"", "back\\slash\\", "a,b", "[x",
                                  "{a: 1}", "7", "true", "null.txt", "a=b", "é—ü", "~/x", "100%", "#no"])
def test_any_text_survives_quoting(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(override("run.root", text, "text"))
    assert parsed.key_or_group == "run.root" and not parsed.is_sweep_override()
    assert getattr(parsed.value(), "text", parsed.value()) == text


def test_another_experiment_has_its_own_model_and_data():
    picker = ConfigPicker("train_bert", "mode=toy")
    picker.controls.groups["model"].value = "bert/minilm"
    fill(picker, seed="7")
    for experiment, family in (("train_llm", "llm"), ("train_mllm", "mllm"), ("train_bert", "bert")):
        picker.controls.groups["experiment"].value = experiment
        assert picker.cfg == compose(experiment, "mode=toy", "seed=7")
        for group in ("model", "dataset"):
            offered = [value for _, value in picker.controls.groups[group].options]
            assert offered == [option for option in options(group) if option.startswith(f"{family}/")]


def test_fields_show_only_where_they_mean_something():
    picker = ConfigPicker("train_llm")
    rank, name, path = (picker.controls.fields[key] for key in ("model.lora.r", "model.name", "dataset.path"))
    assert rank.layout.display is None and rank.placeholder == str(picker.cfg.model.lora.r)
    assert name.layout.display == path.layout.display == "none"
    rank.value = "4"
    assert picker.cfg.model.lora.r == 4
    picker.controls.groups["experiment"].value = "train_bert"  # has no adapter: the field says nothing there
    assert rank.layout.display == "none" and picker.cfg == compose("train_bert")
    picker.controls.groups["dataset"].value = "bert/files"
    assert path.layout.display is None and picker.problems[0].startswith("dataset: give exactly one of")
    path.value = "my rows.jsonl"
    assert picker.cfg.dataset.path == "my rows.jsonl" and typed(picker.command) == picker.cfg


def test_placeholders_follow_the_choices():
    picker = ConfigPicker("train_bert", "trainer.training_kwargs.weight_decay=0.5")
    assert picker.controls.fields[STEPS].placeholder == str(compose("train_bert").trainer.training_kwargs.max_steps)
    picker.controls.groups["mode"].value = "sanity_check"
    assert picker.controls.fields[STEPS].placeholder == "2"
    assert picker.controls.fields["export.save"].options[0] == ("true (default)", "")
    fill(picker, save="false")
    picker.controls.further.value = f"export.verify_rows=3\n{STEPS}=5"
    assert picker.controls.fields[STEPS].placeholder == "5" and picker.cfg.export.save is False


def test_starting_overrides_go_to_their_controls():
    words = ["mode=toy", "model=minilm", "seed=7", "run.root='my runs'", "export.save=false",
             "trainer.class_weights=balanced", "seed=[1,2]"]
    picker = ConfigPicker("train_bert", *words[:-1])
    assert picker.controls.groups["model"].value == "bert/minilm" and picker.controls.fields["seed"].value == "7"
    assert picker.controls.further.value == "trainer.class_weights=balanced"
    assert picker.cfg == compose("train_bert", *words[:-1])
    hub = ConfigPicker("train_bert", "model.name=some/encoder")
    assert hub.controls.groups["model"].value == "bert/hub" and hub.controls.fields["model.name"].value == "some/encoder"
    assert hub.cfg == compose("train_bert", "model.name=some/encoder")
    strange = ConfigPicker("train_bert", words[-1])  # not what a field can hold; wrong, and said so
    assert strange.controls.further.value == words[-1] and strange.problems[0].startswith("seed: must be a whole number")


@pytest.mark.parametrize(("words", "part"), [
    (["train_brt"], "Did you mean 'train_bert'?"),
    (["train_bert", "mode=toyy"], "Did you mean 'toy'?"),
    (["train_bert", "trainer.training_kwargs.lerning_rate=1"], "Did you mean 'learning_rate'?"),
])
def test_names_that_do_not_exist_are_said_at_once(words, part):
    with pytest.raises(UserError, match=part.replace("?", r"\?")):
        ConfigPicker(*words)


def test_a_users_own_tree(tmp_path):
    tree = tmp_path / "my tree"
    for group, name, text in (("experiment", "mine", "# @package _global_\n# My own <experiment>.\ndefaults:\n  - train_bert\n"
                                                     "  - override /model: bert/wide\n  - _self_\nfamily: bert\n"
                                                     "experiment: mine\nseed: 5\n"),
                              ("model/bert", "wide", "# A wider encoder.\nname: tiny_bert\nconfig: {hidden_size: 256}\n"),
                              ("dataset", "support", "# Tickets.\nname: null\npath: tickets.jsonl\n")):
        (tree / group).mkdir(parents=True, exist_ok=True)
        (tree / group / f"{name}.yaml").write_text(text)
    picker = ConfigPicker(config_dir=tree)
    assert "mine" in dict(picker.controls.groups["experiment"].options)
    picker.controls.groups["experiment"].value = "mine"
    assert picker.controls.groups["model"].value == "bert/wide" and picker.overrides == []
    assert "A wider encoder." in picker.controls.about["model"].value
    assert "&lt;experiment&gt;" in picker.controls.about["experiment"].value
    picker.controls.groups["dataset"].value = "support"
    assert (picker.cfg.seed, picker.cfg.model.config.hidden_size, picker.cfg.dataset.path) == (5, 256, "tickets.jsonl")
    assert typed(picker.command) == picker.cfg and eval(picker.python, {"compose": compose}) == picker.cfg
    (tree / "experiment" / "mine.yaml").write_text("defaults: [nowhere]\n")
    with pytest.raises(UserError):
        ConfigPicker("mine", config_dir=tree)
    other = ConfigPicker(config_dir=tree)
    other.controls.groups["experiment"].value = "mine"  # breaks while it is picked: said, and nothing old passes as valid
    assert "not valid" in shown_html(other)
    with pytest.raises(UserError):
        print(other.cfg)


def test_many_changes_compose_once_and_nothing_waits_for_cfg():
    async def hand() -> list[int]:
        picker, seen = ConfigPicker(), []
        wiring = picker._live.wiring
        compose_once = wiring.compose
        wiring.compose = lambda: (seen.append(1), compose_once())[1]
        for text in ("1", "1e", "1e-", "1e-3"):
            fill(picker, learning_rate=text)
        assert not seen and "composing" in shown_html(picker)
        assert picker.cfg.trainer.training_kwargs.learning_rate == 1e-3 and len(seen) == 1
        fill(picker, seed="9")
        for _ in range(100):
            await asyncio.sleep(0.05)
            if len(seen) > 1:
                break
        assert "seed: 9" in shown_html(picker)
        return seen

    assert len(asyncio.run(hand())) == 2


def test_an_unexpected_failure_is_shown_and_raised(monkeypatch):
    picker = ConfigPicker()

    def fails(*_, **__):
        raise OSError("disk on fire")

    monkeypatch.setattr("supertrainer.config.selection.compose", fails)
    fill(picker, seed="9")
    assert "OSError: disk on fire" in shown_html(picker) and "opacity" in shown_html(picker)
    with pytest.raises(OSError, match="disk on fire"):
        print(picker.cfg)
    monkeypatch.undo()
    assert picker.cfg.seed == 9


def test_only_what_differs():
    picker = ConfigPicker("train_bert", "seed=7")
    panel = picker._live.wiring.panel
    panel.brief.value = True
    assert "seed: 7" in panel.yaml.value and "learning_rate" not in panel.yaml.value


def test_a_saved_picker_reads_as_its_command():
    bundle = ConfigPicker("train_bert", "mode=toy")._repr_mimebundle_()
    bundle = bundle[0] if isinstance(bundle, tuple) else bundle
    assert bundle["text/plain"] == "ConfigPicker: supertrainer train +experiment=train_bert mode=toy"
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_importing_and_using_it_stays_light():
    code = ("import sys; from supertrainer import ConfigPicker; ConfigPicker('train_llm', 'mode=toy').cfg\n"
            "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
