"""The report: structure, self-containment, escaping and honesty about what is missing, on run folders made here."""

import base64
import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from supertrainer.report import inline, write_report
from supertrainer.report.figures import heat_map, thin
from supertrainer.report.reading import read_run
from supertrainer.runtime import UserError

ENVIRONMENT = {
    "python": "3.11.2",
    "system": "Linux x86_64",
    "cpu": "Intel(R) Xeon(R) Processor @ 2.60GHz",
    "cores": 2,
    "memory_gb": 25.2,
    "threads": 2,
    "gpus": [],
    "seed": 42,
    "packages": {
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "trl": "1.16.0",
        "peft": "0.21.2",
        "accelerate": "1.15.0",
        "datasets": "5.2.0",
        "bitsandbytes": "0.50.2",
        "hydra-core": "1.3.8",
    },
    "data": {"train": "5f0c" * 16, "eval": "91ab" * 16},
}
DECISIONS = [
    {"name": "device", "value": "cpu", "reason": "no GPU was found"},
    {
        "name": "dtype",
        "value": "float32",
        "reason": "measured matrix products: 215 GFLOP/s in float32, 190 in bfloat16",
    },
    {"name": "attention", "value": "sdpa", "reason": "PyTorch's own attention, exact and without an extra package"},
]
CLASSES = [
    "argparse",
    "asyncio",
    "collections",
    "concurrent_futures",
    "email_message",
    "http_client",
    "importlib",
    "logging",
    "multiprocessing",
    "os",
    "unittest_mock",
    "xml_etree_elementtree",
]
MEMBERS = [60, 83, 41, 30, 44, 37, 58, 49, 66, 92, 71, 33]
CHAT = [
    ("textwrap.dedent", "Remove any common leading whitespace from every line in `text`."),
    ("os.path.commonpath", "Given a sequence of path names, returns the longest common sub-path."),
    ("itertools.pairwise", "Return an iterator of overlapping pairs taken from the input iterator."),
    ("shutil.which", "Given a command, mode, and a PATH string, return the path which conforms to the given mode."),
    ("bisect.insort", "Insert item x in list a, and keep it sorted assuming a is sorted."),
    ("math.isqrt", "Return the integer part of the square root of the input."),
]


def training_log(steps, start, end, rate, evaluations, noise=0.15, every=1):
    """Return log lines as the trainers write them: loss lines, evaluation lines and one summary."""
    rng = random.Random(7)
    rows = []
    for step in range(every, steps + 1, every):
        share = step / steps
        loss = end + (start - end) * math.exp(-4 * share) + rng.gauss(0, noise)
        rows.append(
            {
                "step": step,
                "epoch": round(share * 2, 3),
                "loss": loss,
                "grad_norm": abs(1.2 + rng.gauss(0, 0.4)),
                "learning_rate": rate * min(1.0, step / max(1, steps // 10)) * (1 - share),
            }
        )
        if evaluations and step % (steps // evaluations) < every:
            rows.append(
                {
                    "step": step,
                    "eval_loss": end + (start - end) * math.exp(-4 * share) + 0.2,
                    "eval_runtime": 3.1,
                    "eval_samples_per_second": 80.0,
                    "eval_accuracy": 0.85 * (1 - math.exp(-3 * share)),
                }
            )
    return [*rows, {"step": steps, "train_runtime": 75.0, "train_loss": (start + end) / 2}]


def write_run(folder, *, config, results=None, log=(), checks=(), environment=ENVIRONMENT, error=None):
    """Write a run folder's files; what is None or empty is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    for name, value in (("environment.json", environment), ("results.json", results)):
        if value:
            (folder / name).write_text(json.dumps(value), "utf-8")
    for name, rows in (("metrics.jsonl", log), ("checks.jsonl", checks)):
        if rows:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    if error is not None:
        (folder / "error.txt").write_text(error, "utf-8")
    return folder


def configuration(family, mode="full", **more):
    experiment = f"train_{family}"
    return {
        "family": family,
        "experiment": experiment,
        "mode": mode,
        "seed": 42,
        "run": {"root": "runs", "dir": None},
        "dataset": {"name": more.pop("data"), "eval_fraction": 0.15, "max_length": 256},
        "model": {"name": more.pop("model"), "lora": more.pop("lora", None)},
        "trainer": {"name": "sft", "training_kwargs": {"learning_rate": 5e-4, "num_train_epochs": 2}},
    }


def bert_run(folder):
    rng = random.Random(3)
    matrix = [[0] * len(CLASSES) for _ in CLASSES]
    for i, rows in enumerate(MEMBERS):
        for _ in range(rows):
            j = i if rng.random() < 0.86 - 0.03 * (i % 5) else rng.randrange(len(CLASSES))
            matrix[i][j] += 1
    per_class, right = [], sum(matrix[i][i] for i in range(len(CLASSES)))
    for i, label in enumerate(CLASSES):
        precision, recall = matrix[i][i] / sum(row[i] for row in matrix), matrix[i][i] / sum(matrix[i])
        per_class.append(
            {
                "label": label,
                "precision": precision,
                "recall": recall,
                "support": sum(matrix[i]),
                "f1": 2 * precision * recall / (precision + recall),
            }
        )
    total = sum(MEMBERS)
    samples = [
        {
            "input": "Return a list of the paths below a folder.\n\nThe order is arbitrary, and links to folders are not "
            "followed unless asked for. Errors are ignored by default; give onerror to see them. " * 2,
            "expected": "os",
            "before": None,
            "after": "os",
            "split": "held out",
            "image": None,
            "correct": True,
        },
        {
            "input": "<script>alert('x')</script> & \"quotes\"",
            "expected": "asyncio",
            "before": None,
            "after": "concurrent_futures",
            "split": "held out",
            "image": None,
            "correct": False,
        },
        {
            "input": "Log 'msg % args' with severity 'ERROR'.",
            "expected": "logging",
            "before": None,
            "after": "logging",
            "split": "train",
            "image": None,
            "correct": True,
        },
    ]
    results = {
        "family": "bert",
        "experiment": "train_bert",
        "mode": "full",
        "metric": {
            "name": "accuracy",
            "value": right / total,
            "baseline": max(MEMBERS) / total,
            "baseline_name": "majority",
        },
        "scores": {"macro_f1": sum(row["f1"] for row in per_class) / len(per_class), "balanced_accuracy": 0.79},
        "per_class": per_class,
        "confusion": {"labels": CLASSES, "matrix": matrix},
        "seconds": {"data": 4.2, "model": 1.1, "train": 131.0, "evaluate": 6.4, "save": 9.8, "total": 152.5},
        "peak_memory_mb": 1213.0,
        "parameters": {"trained": 3_412_236, "total": 3_412_236},
        "speed": {"latency_ms": {"p50": 6.2, "p95": 9.9}, "rows_per_s": 321.5, "peak_mb": 88.0},
        "samples": samples,
        "facts": {
            "rows": {"train": 3763, "eval": total},
            "duplicates_removed": 212,
            "labels": dict(zip(CLASSES, MEMBERS, strict=True)),
            "sources": [{"name": "python_stdlib_modules", "version": "Python 3.11.2"}],
        },
        "decisions": DECISIONS,
        "command": f"supertrainer train --from-run {folder}",
        "warnings": ["41 rows were longer than 256 tokens and were cut."],
    }
    checks = [
        {
            "name": "no text is in both splits",
            "passed": True,
            "measured": 0,
            "limit": 0,
            "detail": "3,763 and 664 rows",
        },
        {
            "name": "the saved model answers as the trained one",
            "passed": True,
            "measured": 2.4e-7,
            "limit": 1e-3,
            "detail": "max |dlogit| on 8 rows, reloaded in a fresh process with transformers alone",
        },
    ]
    return write_run(
        folder,
        config=configuration("bert", data="python_stdlib_modules", model="tiny_bert"),
        results=results,
        log=training_log(470, 2.5, 0.5, 5e-4, 6, every=5),
        checks=checks,
    )


def llm_run(folder):
    samples = [
        {
            "input": f"What does `{name}` do?",
            "expected": answer,
            "image": None,
            "correct": None,
            "before": f"`{name}` allows you to indent lines of text in a string. It is a function of the module that takes a "
            "string and returns it with every line moved to the right by the given number of spaces.",
            "after": answer if i % 3 else answer.split(",")[0].split(" from")[0] + ".",
            "split": "held out" if i % 2 == 0 else "train",
        }
        for i, (name, answer) in enumerate(CHAT)
    ]
    pieces = [
        ("<|im_start|>", 0),
        ("user", 0),
        ("\n", 0),
        ("What", 0),
        (" does", 0),
        (" `", 0),
        ("text", 0),
        ("wrap", 0),
        (".", 0),
        ("ded", 0),
        ("ent", 0),
        ("`", 0),
        (" do", 0),
        ("?", 0),
        ("<|im_end|>", 0),
        ("\n", 0),
        ("<|im_start|>", 0),
        ("assistant", 0),
        ("\n", 0),
        ("Remove", 1),
        (" any", 1),
        (" common", 1),
        (" leading", 1),
        (" whites", 1),
        ("pace", 1),
        (" from", 1),
        (" every", 1),
        (" line", 1),
        (" in", 1),
        (" `", 1),
        ("text", 1),
        ("`.", 1),
        ("<|im_end|>", 1),
        ("\n", 0),
    ]
    results = {
        "family": "llm",
        "experiment": "train_llm",
        "mode": "full",
        "metric": {
            "name": "held-out loss",
            "value": 2.447,
            "baseline": 6.82,
            "baseline_name": "unigram",
            "before": 3.98,
        },
        "scores": {"token_f1": 0.34, "token_f1_before": 0.19, "rouge_l": 0.31, "rouge_l_before": 0.17},
        "seconds": {
            "data": 6.0,
            "model": 8.5,
            "before": 19.0,
            "train": 231.0,
            "evaluate": 31.0,
            "save": 22.0,
            "total": 318.0,
        },
        "peak_memory_mb": 1880.0,
        "parameters": {"trained": 4_884_480, "total": 139_399_488},
        "speed": {
            "latency_ms": {"p50": 812.0, "p95": 1430.0},
            "tokens_per_s": 61.3,
            "rows_per_s": 2.4,
            "peak_mb": 402.0,
        },
        "samples": samples,
        "loss_tokens": [[{"text": text, "trained": bool(flag)} for text, flag in pieces]] * 2,
        "facts": {
            "rows": {"train": 3318, "eval": 585},
            "duplicates_removed": 31,
            "sources": [{"path": "SmolLM2-135M-Instruct.Q4_1.gguf", "sha256": "bcc81830" * 8}],
        },
        "decisions": DECISIONS,
        "command": f"supertrainer train --from-run {folder}",
        "warnings": [],
    }
    checks = [
        {
            "name": "trained tokens are the assistant's turns",
            "passed": True,
            "measured": "16 of 16 rows",
            "limit": None,
            "detail": "decoded and compared with the messages",
        },
        {"name": "masked loss equals the model's own", "passed": True, "measured": 3.1e-7, "limit": 1e-5, "detail": ""},
        {
            "name": "merged model answers as base + adapter",
            "passed": False,
            "measured": 18.04,
            "limit": 1e-3,
            "detail": "max |dlogit| on 8 rows; the adapter was kept instead",
        },
    ]
    return write_run(
        folder,
        results=results,
        checks=checks,
        log=training_log(150, 4.0, 2.2, 5e-4, 5),
        config=configuration("llm", data="python_stdlib_chat", model="smollm2", lora={"r": 16, "lora_alpha": 16}),
    )


def mllm_run(folder):
    from sklearn.datasets import load_digits

    digits = load_digits()
    (folder / "images").mkdir(parents=True)
    samples = []
    for i in range(14):
        name, answer = f"images/{i}.png", str(digits.target[i])
        Image.fromarray((255 - digits.images[i] * 15.9).astype("uint8")).save(folder / name)
        wrong = i in (5, 8)
        samples.append(
            {
                "input": "Which digit is this?",
                "expected": answer,
                "before": "",
                "after": "3" if wrong else answer,
                "split": "held out" if i < 10 else "train",
                "image": name,
                "correct": not wrong,
            }
        )
    labels = list("0123456789")
    matrix = [[33 if i == j else int((i * 7 + j * 3) % 11 == 0) for j in range(10)] for i in range(10)]
    results = {
        "family": "mllm",
        "experiment": "train_mllm",
        "mode": "full",
        "metric": {"name": "exact_match", "value": 0.944, "baseline": 0.106, "baseline_name": "majority"},
        "scores": {"held_out_loss": {"value": 0.19, "before": 5.2}},
        "confusion": {"labels": labels, "matrix": matrix},
        "per_class": [{"label": d, "precision": 0.95, "recall": 0.93, "f1": 0.94, "support": 36} for d in labels],
        "seconds": {"train": 88.0, "evaluate": 11.0},
        "peak_memory_mb": 640.0,
        "parameters": {"trained": 553_184, "total": 553_184},
        "speed": {"rows_per_s": 55.0, "latency_ms": {"p50": 41.0, "p95": 66.0}},
        "samples": samples,
        "facts": {"rows": {"train": 1437, "eval": 360}},
        "decisions": DECISIONS,
        "warnings": [],
        "loss_tokens": [
            [{"text": "<image>", "trained": False}] * 16
            + [{"text": "7", "trained": True}, {"text": "<end>", "trained": True}]
        ],
        "command": "supertrainer train +experiment=train_mllm",
    }
    return write_run(
        folder,
        results=results,
        log=training_log(315, 5.0, 0.05, 3e-3, 7),
        checks=[{"name": "image tokens carry no loss", "passed": True, "measured": 0, "limit": 0, "detail": ""}],
        config=configuration("mllm", data="digits", model="tiny_smolvlm"),
    )


def sanity_run(folder):
    results = {
        "family": "llm",
        "experiment": "train_llm",
        "mode": "sanity_check",
        "seconds": {"train": 1.9},
        "peak_memory_mb": 95.0,
        "facts": {"rows": {"train": 8, "eval": 4}},
        "decisions": DECISIONS,
        "command": "supertrainer train +experiment=train_llm mode=sanity_check",
        "warnings": [],
    }
    return write_run(
        folder,
        results=results,
        config=configuration("llm", "sanity_check", data="python_stdlib_chat", model="tiny_llama"),
        log=[
            {"step": 1, "loss": 6.93, "grad_norm": 2.1, "learning_rate": 5e-4},
            {"step": 2, "loss": 6.71, "grad_norm": 2.0, "learning_rate": 2.5e-4},
        ],
        checks=[
            {
                "name": "trained tokens are the assistant's turns",
                "passed": True,
                "measured": "8 of 8 rows",
                "limit": None,
                "detail": "",
            }
        ],
    )


def failed_run(folder):
    return write_run(
        folder,
        config=configuration("bert", data="rows.jsonl", model="tiny_bert"),
        log=[{"step": 10, "loss": 2.4}, {"step": 20, "loss": float("nan")}],
        error="FloatingPointError: the loss is not a number at step 20\nTraceback (most recent call last):\n  <module>",
    )


RUNS = {"bert": bert_run, "llm": llm_run, "mllm": mllm_run, "sanity": sanity_run, "failed": failed_run}
VOID = {"meta", "img", "br", "input", "link", "hr", "path", "rect"}


class Page(HTMLParser):
    """Collects what the tests ask about: tags with attributes, the text of each section, and unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sections, self.text, self.unbalanced = [], [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if self.open and self.open[-1][0] == tag:
            self.open.pop()
        elif tag not in VOID:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1][0] in ("style", "script"):
            return
        self.text.append(data)
        for tag, attrs in self.open:
            if tag == "section":
                self.sections[attrs["id"]] = self.sections.get(attrs["id"], "") + data

    def all(self, tag, **wanted):
        return [
            attrs
            for name, attrs in self.tags
            if name == tag and all(attrs.get(k.rstrip("_")) == v for k, v in wanted.items())
        ]


@pytest.fixture(scope="module", params=RUNS)
def made(request, tmp_path_factory):
    folder = RUNS[request.param](tmp_path_factory.mktemp("runs") / request.param)
    return request.param, folder, write_report(folder).read_text("utf-8")


def report_of(maker, folder):
    return Page(write_report(maker(folder)).read_text("utf-8"))


def test_structure_is_whole_and_every_link_leads_somewhere(made):
    kind, _, text = made
    page = Page(text)
    assert not page.unbalanced and not page.open
    assert len(page.all("h1")) == 1 and page.all("html", lang="en") and page.all("meta", name="viewport")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"] for attrs in page.all("a")}
    assert links <= {f"#{one}" for one in ids}
    always = {"scores", "curves", "samples", "checks", "cost", "decisions", "data", "environment", "repeat"}
    family = {
        "bert": {"classes"},
        "failed": {"classes"},
        "llm": {"tokens"},
        "sanity": {"tokens"},
        "mllm": {"classes", "tokens"},
    }
    assert set(page.sections) == always | family[kind]
    assert all(len(" ".join(words.split())) > len(one) + 10 for one, words in page.sections.items()), "no empty frame"


def test_nothing_is_loaded_from_outside(made):
    _, _, text = made
    for _, attrs in Page(text).tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert attrs.get(name, "#").startswith(("#", "data:image/")), (name, attrs[name])
    assert not re.search(r"@import|url\(|@font-face|fetch\(|XMLHttpRequest|import\(", text)


def test_texts_of_a_run_never_become_markup(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    folder = bert_run(tmp_path / "evil")
    results = json.loads((folder / "results.json").read_text("utf-8"))

    def poison(value):
        if isinstance(value, dict):
            return {f"{key}" if key in STRUCTURE else f"{key}{evil}": poison(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner) for inner in value]
        return value + evil if isinstance(value, str) and value not in ("bert", "held out", "train") else value

    STRUCTURE = {
        *results,
        *results["metric"],
        *results["per_class"][0],
        *results["confusion"],
        *results["samples"][0],
        *DECISIONS[0],
        "rows",
        "sources",
        "labels",
    }
    results["loss_tokens"] = [[{"text": evil, "trained": True}]]
    poisoned = {key: poison(value) for key, value in results.items()}
    poisoned["loss_tokens"] = [[{"text": evil, "trained": True}, {"text": "\n", "trained": False}]]
    (folder / "results.json").write_text(json.dumps(poisoned), "utf-8")
    (folder / "environment.json").write_text(json.dumps({evil: {evil: [evil]}}), "utf-8")
    (folder / "config.yaml").write_text(f"# {evil}\nexperiment: train_bert\nkey: |\n  {evil}\n", "utf-8")
    (folder / "checks.jsonl").write_text(
        json.dumps({"name": evil, "passed": False, "measured": evil, "limit": evil, "detail": evil})
    )
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, f"eval_{evil}": 0.5}) + "\n" for step in (1, 2))
    text = write_report(folder).read_text("utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert evil in "".join(page.text).replace("·", " "), "the reader still sees it as written"


def test_verdict_says_metric_baseline_and_by_how_much(tmp_path):
    text = " ".join("".join(report_of(mllm_run, tmp_path / "m").text).split())
    assert "0.944 exact match" in text and "Majority baseline 0.106, +0.838." in text
    text = " ".join("".join(report_of(llm_run, tmp_path / "l").text).split())
    assert (
        "2.45 held-out loss" in text
        and "Unigram baseline 6.82, −4.37; before training 3.98, −1.53. Lower is better." in text
    )


def test_confusion_matrix_shows_the_counts_it_was_given(tmp_path):
    folder = bert_run(tmp_path / "run")
    given = json.loads((folder / "results.json").read_text("utf-8"))["confusion"]["matrix"]
    text = write_report(folder).read_text("utf-8")
    drawn = re.search(r'<svg class="heat".*?</svg>', text, re.S)[0]
    counts = [int(n) for n in re.findall(r'<g class="cell.*?<text[^>]*>(\d+)</text></g>', drawn, re.S)]
    assert [counts[i : i + 12] for i in range(0, 144, 12)] == given
    names = re.findall(r'class="end"><title>(.*?)</title>', drawn)
    assert names == CLASSES
    worst = max((given[i][j], CLASSES[i], CLASSES[j]) for i in range(12) for j in range(12) if i != j)[0]
    assert f": {worst} of" in Page(text).sections["classes"]


def test_curves_hold_every_logged_point(tmp_path):
    folder = bert_run(tmp_path / "run")
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    page = Page(write_report(folder).read_text("utf-8"))
    drawn = {attrs["data-series"]: attrs for attrs in page.all("path") if "data-series" in attrs}
    for name, key in (
        ("training", "loss"),
        ("held out", "eval_loss"),
        ("gradient norm", "grad_norm"),
        ("learning rate", "learning_rate"),
        ("accuracy", "eval_accuracy"),
    ):
        wanted = sum(key in row for row in log)
        assert int(drawn[name]["data-points"]) == wanted
        assert len(re.findall("[ML]", drawn[name]["d"])) == wanted
    loss = json.loads(page.all("figure", class_="chart")[0]["data-chart"])["series"][0]["points"]
    assert loss == [[row["step"], row["loss"]] for row in log if "loss" in row]


def test_a_long_curve_is_thinned_but_keeps_its_spike():
    points = [(float(i), 50.0 if i == 61_803 else math.sin(i)) for i in range(100_000)]
    kept = thin(points)
    assert len(kept) <= 600 and (61_803.0, 50.0) in kept and kept == sorted(kept) and set(kept) <= set(points)


def test_pictures_are_embedded_whole_and_marked(tmp_path):
    folder = mllm_run(tmp_path / "run")
    page = Page(write_report(folder).read_text("utf-8"))
    pictures = page.all("img")
    assert len(pictures) == 14 and all(picture["alt"] for picture in pictures)
    inside = Image.open(io.BytesIO(base64.b64decode(pictures[0]["src"].split(",")[1])))
    assert list(inside.getdata()) == list(Image.open(folder / "images" / "0.png").getdata())
    marks = re.findall("[✓✗] (right|wrong)", page.sections["samples"])
    assert (marks.count("right"), marks.count("wrong")) == (12, 2)


@pytest.mark.parametrize("name", ["../secret.png", "gone.png", "text.png", "/etc/hostname"])
def test_pictures_outside_the_run_or_unreadable_are_named_not_shown(tmp_path, name):
    folder = mllm_run(tmp_path / "run")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (folder / "text.png").write_text("no picture", "utf-8")
    results = json.loads((folder / "results.json").read_text("utf-8"))
    results["samples"] = [results["samples"][0] | {"image": name}]
    (folder / "results.json").write_text(json.dumps(results), "utf-8")
    page = Page(write_report(folder).read_text("utf-8"))
    assert not page.all("img") and f"picture {name} is not" in page.sections["samples"]


def test_a_large_photo_is_made_smaller(tmp_path):
    folder = mllm_run(tmp_path / "run")
    Image.effect_noise((1800, 1200), 60).convert("CMYK").save(folder / "images" / "0.png", "JPEG")
    page = Page(write_report(folder).read_text("utf-8"))
    uri = page.all("img")[0]["src"]
    inside = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert uri.startswith("data:image/jpeg") and inside.size == (512, 341)


def test_trained_tokens_are_marked_without_colour_and_white_space_is_seen(tmp_path):
    folder = llm_run(tmp_path / "run")
    text = write_report(folder).read_text("utf-8")
    passage = re.search(r'<p class="tokens">(.*?)</p>', text, re.S)[1]
    (marked,) = re.findall(r"<mark>(.*?)</mark>", passage, re.S)
    shown = "".join(Page(marked).text)
    assert shown == "Remove·any·common·leading·whitespace·from·every·line·in·`text`.<|im_end|>"
    assert "14 of 34 tokens carry loss" in text and "↵" in passage and "text-decoration: underline" in text


def test_failed_checks_come_first_and_are_announced(tmp_path):
    page = report_of(llm_run, tmp_path / "run")
    order = re.findall("[✓✗] (passed|failed)", page.sections["checks"])
    assert order == ["failed", "passed", "passed"]
    assert "1 check did not hold" in "".join(page.text) and "18.0" in page.sections["checks"]


def test_a_sanity_check_says_that_nothing_was_evaluated(tmp_path):
    page = report_of(sanity_run, tmp_path / "run")
    assert "a sanity check trains for a few steps and evaluates nothing" in page.sections["scores"]
    assert "Sanity check" in "".join(page.text) and page.all("figure", class_="chart")


def test_a_failed_run_shows_what_stopped_it_and_what_there_is(tmp_path):
    page = report_of(failed_run, tmp_path / "run")
    text = " ".join("".join(page.text).split())
    assert "This run did not finish" in text and "the loss is not a number at step 20" in text and "<module>" in text
    assert "the run stopped before it got there" in page.sections["scores"]
    assert "1 logged value is not a number" in page.sections["curves"]
    assert "It stopped after step 20" in text


@pytest.mark.parametrize(
    "kept", ["config.yaml", "metrics.jsonl", "results.json", "checks.jsonl", "environment.json", "error.txt"]
)
@pytest.mark.parametrize("kind", ["bert", "failed"])
def test_any_single_file_is_enough_for_a_page(tmp_path, kind, kept):
    folder = RUNS[kind](tmp_path / "run")
    if not (folder / kept).exists():
        (folder / kept).write_text("{}\n" if kept != "error.txt" else "", "utf-8")
    for path in list(folder.iterdir()):
        if path.is_file() and path.name != kept:
            path.unlink()
    page = Page(write_report(folder).read_text("utf-8"))
    assert not page.unbalanced and all(page.sections.values())


@pytest.mark.parametrize(
    "field",
    [
        "metric",
        "scores",
        "per_class",
        "confusion",
        "seconds",
        "peak_memory_mb",
        "parameters",
        "speed",
        "samples",
        "facts",
        "decisions",
        "command",
        "warnings",
        "family",
        "mode",
    ],
)
@pytest.mark.parametrize("gone", ["absent", "null"])
def test_any_field_may_be_missing(tmp_path, field, gone):
    folder = bert_run(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text("utf-8"))
    results.pop(field)
    (folder / "results.json").write_text(json.dumps(results | ({} if gone == "absent" else {field: None})), "utf-8")
    page = Page(write_report(folder).read_text("utf-8"))
    assert not page.unbalanced and page.all("table")


def test_broken_files_become_sentences(tmp_path):
    folder = bert_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 475, "lo')
    (folder / "results.json").write_text('{"family": ', "utf-8")
    text = " ".join("".join(Page(write_report(folder).read_text("utf-8")).text).split())
    assert re.search(r"metrics\.jsonl, line \d+, is not valid JSON", text) and "results.json cannot be read" in text


def test_a_path_that_is_no_run_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="No run folder"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "report.html").exists()


def test_only_the_report_is_written_and_twice_gives_the_same(tmp_path):
    folder = llm_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    first = write_report(folder).read_bytes()
    assert write_report(str(folder)) == folder / "report.html" and (folder / "report.html").read_bytes() == first
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before | {folder / "report.html": first}


def test_inline_frames_the_page(tmp_path):
    path = write_report(sanity_run(tmp_path / "run"))
    (frame,) = Page(inline(path).data).all("iframe")
    assert frame["srcdoc"] == path.read_text("utf-8") and "allow-same-origin" not in frame["sandbox"]


def test_tables_have_headers_and_every_figure_a_description(made):
    _, _, text = made
    page = Page(text)
    tables = len(page.all("table"))
    assert len(page.all("caption")) == tables and len(page.all("th", scope="col")) >= 2 * tables
    described = page.all("div", class_="plot")
    assert all(re.search(r"at step|no finite", attrs["aria-label"]) for attrs in described)


def _luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_have_contrast_in_light_and_dark(scheme):
    """WCAG 2.2, success criterion 1.4.3: 4.5 to 1 for text; formula of its definition of relative luminance."""
    style = (Path(__file__).parent.parent / "supertrainer" / "report" / "template.html.j2").read_text("utf-8")
    block = re.findall(r":root \{(.*?)\n\s*\}", style, re.S)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    pairs = [
        ("ink", "paper"),
        ("ink", "card"),
        ("muted", "card"),
        ("muted", "paper"),
        ("muted", "faint"),
        ("accent", "card"),
        ("on-accent", "accent"),
        ("on-second", "second"),
        ("ink", "soft"),
        ("bad", "card"),
        ("bad", "bad-soft"),
        ("warn", "warn-soft"),
    ]
    for text, ground in pairs:
        light, dark = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize("colour", ["accent", "second"])
def test_counts_in_cells_have_contrast_at_every_strength(scheme, colour):
    style = (Path(__file__).parent.parent / "supertrainer" / "report" / "template.html.j2").read_text("utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\n\s*\}", style, re.S)[scheme]))
    for count in range(1, 101):
        drawn = heat_map(["a", "b"], [[count, 100 - count], [0, 1]])
        kind, opacity = re.search(r'<g class="cell right ?(\w*)">.*?fill-opacity="([\d.]+)"', drawn, re.S).groups()
        share = float(opacity)
        mixed = "#" + "".join(
            f"{round(share * int(colours[colour][i : i + 2], 16) + (1 - share) * int(colours['faint'][i : i + 2], 16)):02x}"
            for i in (1, 3, 5)
        )
        light, dark = sorted((_luminance(mixed), _luminance(colours[f"cell-{kind or 'low'}"])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.4, (count, kind)


def test_reading_keeps_the_order_of_the_steps(tmp_path):
    folder = write_run(
        tmp_path / "run", config={"mode": "toy"}, log=[{"step": 3, "loss": 1.0}, {"step": 1, "loss": 2.0}]
    )
    assert [row["step"] for row in read_run(folder).log] == [1, 3]
