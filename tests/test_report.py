"""Receipt, report and verify_run: of real runs, and of run folders that something happened to."""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from gpt2.config import TrainConfig
from gpt2.dist import Distributed
from gpt2.options import VerifyConfig
from gpt2.train import receipt as receipts
from gpt2.train.metrics import read_metrics
from gpt2.train.pretrain import pretrain
from gpt2.train.receipt import Receipt, git_state, read_receipt
from gpt2.train.report import FINEWEB, OPENWEBTEXT, comparable_losses, describe, write_report
from gpt2.train.verify import verify_run

from .conftest import interrupt

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(shakespeare, tmp_path_factory) -> Path:
    """A run of 24 steps with checkpoints at 6, 12, 18 and 24, logged every 4 steps."""
    out = tmp_path_factory.mktemp("runs")
    pretrain(TrainConfig(
        preset="char", n_layer=2, n_head=2, n_embd=32, block_size=32, data=str(shakespeare),
        tokens_per_step=256, micro_batch_size="auto", max_steps=24, warmup_steps=2, lr=1e-2,
        eval_every=12, eval_steps=2, save_every=6, sample_every=12, keep_last=0, log_every=4,
        run_name="run", out_dir=str(out), device="cpu", dropout=0.1,
    ))  # fmt: skip
    return out / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def test_receipt_says_what_ran(finished, shakespeare):
    receipt = read_receipt(finished)
    (launch,), (data,) = receipt["launches"], receipt["data"]
    assert (launch["first_step"], launch["last_step"], launch["end"]) == (0, 24, "finished")
    assert launch["start"] <= launch["stop"] and launch["seconds"] > 0
    assert launch["versions"]["torch"] == torch.__version__
    assert launch["versions"]["python"] == sys.version.split()[0]
    assert launch["hardware"]["threads"] == torch.get_num_threads()
    assert "pytest" in launch["command"] and launch["world_size"] == 1
    assert launch["predicted"]["step_ms"] > 0
    manifest = (shakespeare / "manifest.json").read_bytes()
    assert data["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert data["tokens"] == 1_003_854 and len(data["hash"]) == 32
    # micro_batch_size auto became a number: the 8 rows of a step.
    assert "micro_batch_size: 8\n" in (finished / "config.yaml").read_text()


def test_git_state_is_that_of_this_tree(tmp_path, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("the tests do not run in a git repository")
    assert git_state()["commit"] == head.stdout.strip()
    # A copy inside of somebody else's repository is not theirs.
    theirs = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*theirs, *words], check=True)
    monkeypatch.setattr(receipts, "__file__", str(tmp_path / "receipt.py"))
    assert git_state() == {"commit": None, "dirty": None}


def test_a_resumed_run_adds_a_launch(train_config, at_step):
    at_step(4, interrupt)
    run = train_config.folder
    with pytest.raises(KeyboardInterrupt):
        pretrain(train_config)
    assert "stopped at step 4 of 6: failed" in (run / "report.md").read_text()
    pretrain(replace(train_config, resume="auto"))
    first, second = read_receipt(run)["launches"]
    assert (first["end"], first["last_step"]) == ("failed", 4)
    assert (second["first_step"], second["last_step"], second["end"]) == (3, 6, "finished")
    assert "| state | finished |" in (run / "report.md").read_text()


class Page(HTMLParser):
    """What a page would fetch, its tags and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.fetched, self.tags, self.text = [], [], ""
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = [v for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        self.fetched += [v for v in found if not v.startswith("data:image/png;base64,")]

    def handle_data(self, data):
        self.text += data


def test_report_is_whole_and_fetches_nothing(finished):
    lines, page = read_metrics(finished / "metrics.jsonl"), Page(finished / "report.html")
    assert page.fetched == [] and page.tags.count("img") == 1
    markdown = (finished / "report.md").read_text()
    last = [line["val/loss"] for line in lines if "val/loss" in line][-1]
    sample = next(line["sample"] for line in lines if "sample" in line)
    for text in (page.text, markdown.replace("\\", "")):
        for words in (
            f"{last:.4f}", sample, "finished", "the tokenizer is char", torch.__version__,
            "not comparable here", "0, on a CPU", "times that",
        ):  # fmt: skip
            assert words in text
    assert "![loss curve](loss.png)" in markdown
    assert (finished / "loss.png").read_bytes()[:4] == b"\x89PNG"


HOSTILE = (
    "</pre><script>alert(1)</script><img src=x>\"'&amp; a_b_ $x\\x$ **b** [l](u) ```\n````\n"
    "# x|`y`\x1b"
)
SHOWN = HOSTILE.replace("\x1b", "\\x1b")


def soil(value):
    if isinstance(value, dict):
        return {key: soil(item) for key, item in value.items()}
    if isinstance(value, list):
        return [soil(item) for item in value]
    as_it_is = not isinstance(value, str) or value in ("cpu", "finished")
    return value if as_it_is else value + HOSTILE


def test_text_of_others_is_shown_as_it_is(run):
    yaml_of = json.dumps({"run_name": HOSTILE, "data": HOSTILE, "max_steps": 24})  # YAML, too
    (run / "config.yaml").write_text(yaml_of)
    (run / "receipt.json").write_text(json.dumps(soil(read_receipt(run))))
    with open(run / "metrics.jsonl", "a") as file:
        for values in ({"sample": HOSTILE}, {"guard/reason": HOSTILE, "guard/rows": [1]}):
            file.write(json.dumps({"step": 24, **values}) + "\n")
    write_report(run)
    page = Page(run / "report.html")
    assert page.fetched == [] and page.tags.count("img") == page.tags.count("h1") == 1
    assert not {"script", "em", "strong", "a"} & set(page.tags)
    assert SHOWN in page.text  # the sample, on its lines
    flat = page.text.replace("\n", " ")
    assert flat.count(SHOWN.replace("\n", " ")) > 15  # title, heading, cells, command and sample
    rows = [x for x in (run / "report.md").read_text().splitlines() if x.startswith("| data |")]
    assert len(rows) == 1 and re.sub(r"\\.", "", rows[0]).count("|") == 3


def test_events_launches_and_cost_are_told():
    launch = {
        "start": "2026-01-01T00:00:00+00:00", "stop": "2026-01-01T01:00:00+00:00",
        "seconds": 3600.0, "first_step": 0, "last_step": 10, "end": "running",
        "command": "python x", "world_size": 8, "device": "cuda", "predicted": {"step_ms": 50.0},
        "git": {"commit": "0123456789abcdef", "dirty": True}, "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "c", "gpu": "NVIDIA H100", "gpus": 8, "driver": None},
    }  # fmt: skip
    receipt = {"launches": [launch, launch | {"seconds": 1800.0, "end": "stopped by SIGTERM"}]}
    lines = [{"step": i, "train/loss": 4.0, "train/step_ms": 100.0} for i in range(1, 6)]
    lines += [{"step": 3, "guard/skipped": 1, "guard/reason": "loss is nan", "guard/at": 2}]
    lines += [{"step": 5, "eval/hellaswag": 0.2945}]
    text = describe(lines, receipt, {}, 2.5)
    for words in (
        "| GPU hours | 12.000 |", "30.00, at 2.5 a GPU hour", "NVIDIA H100", "| killed |",
        "1 steps were skipped in 1 events", "loss is nan", "| stopped by SIGTERM |",
        "it took 2.00 times that", "0123456789 with changes", "| this run | 29.45% |",
        "| 124M | 29.45% |",
    ):  # fmt: skip
        assert words in text


def fineweb(**config) -> tuple[dict, dict]:
    data = {"source": "HuggingFaceFW/fineweb", "tokenizer": "gpt2"}
    run = {"block_size": 1024, "eval_steps": 20, "tokens_per_step": 524288} | config
    return {"data": [data | run.pop("data", {})], "model": {"block_size": 1024}}, run


@pytest.mark.parametrize(
    "changes, anchors, why",
    [
        ({}, FINEWEB, ""),
        ({"data": {"source": "Skylion007/openwebtext"}}, OPENWEBTEXT, ""),
        ({"eval_steps": 10}, {}, "5,242,880 validation tokens are read"),
        ({"eval_steps": 0}, {}, "all validation tokens are read"),
        ({"block_size": 512}, {}, "the context is 512"),
        ({"doc_mask": True}, {}, "doc_mask"),
        ({"data": {"source": "HuggingFaceFW/fineweb-edu"}}, {}, "the text is another"),
        ({"data": {"tokenizer": "byte"}}, {}, "another unit"),
    ],
)
def test_losses_stand_beside_gpt2s_only_where_they_are_the_same_measure(changes, anchors, why):
    receipt, run = fineweb(**changes)
    found, note = comparable_losses(receipt, run)
    assert found == anchors and why in note and ("not comparable" in note) == (not anchors)
    assert comparable_losses({"data": receipt["data"] * 2}, run)[0] == {}  # a mixture


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("receipt.json", "", "receipt.json cannot be read"),
        ("receipt.json", "[]", "receipt.json cannot be read"),
        ("receipt.json", '{"launches": [', "receipt.json cannot be read"),
        ("receipt.json", '{"launches": [1]}', "receipt.json cannot be read"),
        ("receipt.json", '{"launches": [], "format": 9}', "this version reads up to 2"),
        ("receipt.json", '{"launches": [{"end": 1}]}', "not as expected"),
        ("receipt.json", None, "train loss"),
        ("config.yaml", "\xff", "config.yaml cannot be read"),
        ("config.yaml", "[", "config.yaml cannot be read"),
        ("config.yaml", "- 1", "config.yaml cannot be read"),
        ("config.yaml", "max_steps: many", "This cannot be told"),
        ("config.yaml", None, "train loss"),
        ("loss.png", None, "train loss"),
        ("metrics.jsonl", '{"step": 1, "a": NaN}\n{"step": 2, "cut', "1 of 2 lines are damaged"),
        ("metrics.jsonl", None, "No loss was logged"),
    ],
)
def test_a_report_of_what_is_left_of_a_run(run, name, content, words):
    """Whatever is missing or damaged, the rest is told."""
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content, encoding="latin-1")
    write_report(run)
    text = (run / "report.md").read_text().replace("\\", "")
    assert words in text
    assert "Command:" in text or name == "receipt.json"
    assert "train loss" in text or name == "metrics.jsonl" or content == "max_steps: many"


def test_a_report_without_matplotlib_or_markdown(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(run)
    assert "No curve: the loss curve needs matplotlib" in (run / "report.html").read_text()
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    (run / "report.md").unlink()
    with pytest.raises(ImportError, match="needs markdown-it-py: pip install"):
        write_report(run)
    assert (run / "report.md").exists()


@pytest.mark.parametrize("content", [b"{}", b"\xff", b"", b"[]", b'{"launches": "x"}', None])
def test_a_damaged_receipt_is_set_aside(tmp_path, content):
    path, said = tmp_path / "receipt.json", []
    path.write_bytes(content) if content is not None else path.mkdir()
    receipt = Receipt(tmp_path, facts={"run": "r"}, data=[], group=Distributed(), say=said.append)
    assert len(read_receipt(tmp_path)["launches"]) == 1
    assert "set aside as receipt.json.damaged" in said[0] and len(said) == 1
    assert (tmp_path / "receipt.json.damaged").is_dir() == (content is None)
    shutil.rmtree(tmp_path)
    receipt.update(3, "finished")  # is told, and never raises
    assert len(said) == 2 and "not up to date: No such file" in said[1]


def verified(capsys, run: Path, **options) -> tuple[bool, str]:
    return verify_run(VerifyConfig(str(run), **options)), capsys.readouterr().out


def scale_losses(run: Path, factor: float) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    for line in lines:
        if "train/loss" in line:
            line["train/loss"] *= factor
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_verify_repeats_a_run_bit_for_bit(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    same, out = verified(capsys, finished)
    # The last checkpoint but one is that of step 18; 17-20 was logged as one mean, so it is left.
    assert same and "steps 19 to 24" in out and "21-24" in out and "17-20" not in out
    assert "the same as in the receipt, by its hashes" in out
    assert "same bits" in out and "repeated: 1 of 1" in out
    same, out = verified(capsys, finished, checkpoint="start", steps=9)
    assert same and "steps 1 to 12" in out and out.count("same bits\n") == 4
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


HASH, BIT = r'"hash": "\w+"', math.nextafter(1.0, 2.0)
OLDER = f"0.0001 (torch 2.0.0, here {torch.__version__})"


@pytest.mark.parametrize(
    "factor, pattern, text, options, same, words",
    [
        (BIT, "", "", {}, False, "NOT repeated: 0 of 1"),
        (BIT, "", "", {"tolerance": 1e-9}, True, "(asked for)"),
        (1 + 5e-5, r'"torch": "[^"]*"', '"torch": "2.0.0"', {}, True, OLDER),
        (1.0, HASH, '"hash": "0"', {}, False, "not what was trained on: "),
        (1.0, HASH, '"older": "0"', {}, True, "not known to be the same"),
    ],
    ids=["another loss", "tolerance", "another version", "other data", "an older receipt"],
)
def test_verify_says_what_differs(run, capsys, factor, pattern, text, options, same, words):
    """Losses by a factor, and the receipt, in which a pattern becomes a text."""
    scale_losses(run, factor)
    if pattern:
        receipt, n = re.subn(pattern, text, (run / "receipt.json").read_text())
        assert n == 1 and (run / "receipt.json").write_text(receipt)
    found, out = verified(capsys, run, **options)
    assert found == same and words in out
    assert ("repeating" in out) == ("not what was" not in out)  # the data is compared first


def test_verify_says_what_it_cannot_do(run):
    with pytest.raises(ValueError, match="no loss was logged after step 24"):
        verify_run(VerifyConfig(str(run), checkpoint="step_00000024"))
    with pytest.raises(OSError, match="no checkpoint"):
        verify_run(VerifyConfig(str(run), checkpoint="step_00000099"))
    (run / "receipt.json").unlink()
    with pytest.raises(OSError, match="no receipt.json"):
        verify_run(VerifyConfig(str(run)))


@pytest.mark.slow
def test_the_scripts(run, tmp_path):
    def script(name, *words):
        command = [sys.executable, str(ROOT / "scripts" / name), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, out = script("verify_run.py", run)
    assert code == 0 and "verdict     repeated" in out
    scale_losses(run, 1.01)
    code, out = script("verify_run.py", run)
    assert code == 1 and "NOT repeated" in out
    (run / "report.md").unlink()
    code, out = script("report.py", run, "--gpu_hour_price", 3)
    assert code == 0 and (run / "report.md").exists()
    code, out = script("report.py", tmp_path)
    assert code == 1 and "no run here" in out
