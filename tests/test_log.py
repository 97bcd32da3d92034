"""What a run writes about itself never ends it: metrics.jsonl, the terminal, W&B, the curve."""

import io
import json
import math
import os
import pty
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt2.cli import SafeOutput, printable
from gpt2.config import TrainConfig
from gpt2.model import GPT
from gpt2.storage import check_writable, to_json, write_whole
from gpt2.tokenizer import CharTokenizer
from gpt2.train import metrics as module
from gpt2.train.between import sample_text
from gpt2.train.metrics import Metrics, draw_curve, duration, points, read_metrics

NAN = float("nan")
STEP = {
    "train/loss": 3.0, "train/lr": 1e-3, "train/grad_norm": 1.0, "train/step_ms": 5.0,
    "train/tokens_per_s": 9.0,
}  # fmt: skip


@pytest.fixture
def log(tmp_path):
    """Opens the log of a run in tmp_path, and closes it."""
    opened = []

    def open_log(first_step: int = 0, description: dict | None = None, **options) -> Metrics:
        config = TrainConfig(max_steps=9, warmup_steps=0, **options)
        opened.append(Metrics(tmp_path, config, description or {}, first_step))
        return opened[-1]

    yield open_log
    for metrics in opened:
        metrics.close()


def steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_numbers_that_json_lacks(log, tmp_path):
    values = {"a": NAN, "b": [math.inf, {"c": -math.inf}], "d": Path("x")}
    log().log(1, values)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1, "a": None, "b": [None, {"c": None}], "d": "x"
    }  # fmt: skip
    (tmp_path / "old.jsonl").write_text('{"step": 1, "a": NaN, "b": 1e999, "c": 2}\n')
    assert read_metrics(tmp_path / "old.jsonl") == [{"step": 1, "a": None, "b": None, "c": 2}]
    lines = [{"step": 1, "x": value} for value in (NAN, None, "1", 10**400, 2)] + [{"step": 2}]
    assert points(lines, "x") == [(1, 2)] and to_json(NAN) == "null"


GOOD = b'{"step": 1, "x": 1}\n{"step": 2, "x": 2}\n'


@pytest.mark.parametrize(
    "content, left",
    [
        (b"", []),
        (GOOD + b'{"step": 3, "tra', [1, 2]),
        (GOOD[:20] + b"\xff\xfe\n" + GOOD[20:], [1, 2]),
        (GOOD + b"\0" * 99, [1, 2]),
        (b"1\n[]\n{}\n" + b"[" * 100_000 + b'\n{"step": "3"}\n' + GOOD, [1, 2]),
        (None, []),
    ],
)
def test_a_damaged_log_is_set_aside(log, tmp_path, capsys, content, left):
    path, aside = (tmp_path / f"metrics.jsonl{end}" for end in ("", ".damaged.1"))
    (tmp_path / "metrics.jsonl.damaged").write_text("of another time")
    path.write_bytes(content) if content is not None else path.mkdir()
    assert [line["step"] for line in read_metrics(path)] == left
    log(first_step=2).log(3, {"x": 3})
    assert "set aside as metrics.jsonl.damaged.1" in capsys.readouterr().out
    assert aside.is_dir() if content is None else aside.read_bytes() == content
    assert steps(tmp_path) == [*left, 3]


def test_a_pipe_in_place_of_the_log_is_set_aside_unread(log, tmp_path, capsys):
    os.mkfifo(tmp_path / "metrics.jsonl")
    log(first_step=0).log(1, {"x": 3})
    assert "not a file; set aside as metrics.jsonl.damaged" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl.damaged").is_fifo() and steps(tmp_path) == [1]


def test_no_line_no_log(log, tmp_path):
    """A folder counts as a run by its log."""
    (tmp_path / "metrics.jsonl").write_bytes(GOOD)
    log(first_step=0)
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_is_kept(log, tmp_path, capsys, monkeypatch):
    metrics, path = log(), tmp_path / "metrics.jsonl"
    metrics.log(1, {})

    def full(path, mode):
        with open(path, mode) as file:
            file.write(b'{"st')  # what fits
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "open", full, raising=False)
        metrics.log(2, {})
        metrics.log(3, {})
    metrics.log(4, {})
    assert steps(tmp_path) == [1, 2, 3, 4]
    out = capsys.readouterr().out
    assert out.count("No space left on device") == 1 and "whole again, after 2 failed" in out
    # Gone, cut, or with its folder gone and back: whole again with the next line.
    path.unlink()
    metrics.log(5, {})
    path.write_bytes(b"{")
    metrics.log(6, {})
    shutil.rmtree(tmp_path)
    metrics.log(7, {})
    assert "No such file" in capsys.readouterr().out
    tmp_path.mkdir()
    metrics.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_a_rollback_drops_what_was_left(log, tmp_path):
    metrics = log()
    for step in range(1, 7):
        metrics.log(step, {"val/loss": 1.0})
    metrics.log(6, {"guard/reason": "spike"})
    metrics.rewind(4)
    assert not metrics.logged(6, "val/loss") and metrics.logged(4, "val/loss")
    metrics.log(5, {"val/loss": 2.0})
    metrics.rewind(2)
    metrics.log(3, {})
    assert read_metrics(tmp_path / "metrics.jsonl")[2:] == [
        {"step": 2, "guard/step": 6, "guard/reason": "spike"}, {"step": 3}
    ]  # fmt: skip


def test_output_that_nobody_reads_is_dropped(log, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        metrics = log()
        for _ in range(3):
            metrics.say("x" * 100_000)
            metrics.show_step(1, STEP, 0.0)
        print("also from elsewhere", flush=True)
    metrics.say("to a closed stream")
    monkeypatch.setattr(sys, "stdout", None)
    metrics.say("to none")


def test_text_that_the_terminal_lacks_or_obeys_is_spelled_out():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    print("\u00fc \x1b[2J\r \ud800 a\tb", file=SafeOutput(stream), flush=True)
    assert stream.buffer.getvalue() == b"\\xfc \\x1b[2J\\r \\ud800 a\tb\n"
    assert printable("\u00fc\u4e2d\n") == "\u00fc\u4e2d\n"


@pytest.mark.parametrize("has_rich", [True, False])
def test_in_a_terminal(log, monkeypatch, has_rich):
    """A live bar with rich; plain lines without it; nothing raised when the terminal closes."""
    if not has_rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    ours, theirs = pty.openpty()
    with open(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        metrics = log()
        metrics.show_step(2, STEP, 0.0)
        metrics.say("a \x1b[2J name [bold]")
        text = b""
        while b"a \\x1b[2J name [bold]" not in text:
            text += os.read(ours, 100_000)
        assert (b"step      2/9" in text) == (not has_rich)
        os.close(ours)
        metrics.say("more")
        metrics.close()


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)


def test_wandb_hears_of_every_step_until_it_fails(log, offline, monkeypatch, capsys):
    run_id = "0123456789abcdef" * 2
    metrics = log(wandb_project="p", run_name="lr=3:1e-4", description={"run_id": run_id})
    run, heard = metrics.trackers["wandb"].run, []
    assert run.id == run_id and run.name == "lr=3:1e-4"
    real = run.log
    monkeypatch.setattr(run, "log", lambda values: heard.append(values["step"]) or real(values))
    for step in (5, 6, 3):  # after a rollback W&B's own step may not go back
        metrics.log(step, {"train/loss": 2.0})
    assert heard == [5, 6, 3]
    monkeypatch.setattr(run, "log", lambda values: 1 / 0)
    metrics.log(4, {"train/loss": 2.0})
    assert metrics.trackers == {} and len(metrics.lines) == 4
    assert "wandb fails and gets nothing more: division by zero" in capsys.readouterr().out
    run.finish()


def read_tensorboard(folder: Path) -> dict[str, list]:
    """What a reader of tensorboard's makes of a run's event files: (step, value) of each tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = found.Tags()
    lines = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["tensors"]:
        texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors(tag)]
        lines[tag.removesuffix("/text_summary")] = texts
    return lines


def test_tensorboard_has_what_the_log_has_after_rollbacks_and_a_resume(log, tmp_path):
    pytest.importorskip("tensorboard")
    metrics = log(tracker=("tensorboard",), description={"lr": 1e-3, "run_name": "a|b"})
    for step in range(1, 7):
        metrics.log(step, {"train/loss": 7.0 - step, "sample": f"* {step}\n"})
    metrics.log(6, {"guard/reason": "spike", "guard/skipped": 1})
    metrics.rewind(4)
    metrics.log(5, {"train/loss": 2.5, "train/grad_norm": NAN})
    guard = {"guard/skipped": [(4, 1.0)], "guard/step": [(4, 6.0)]}
    config = {"config": [(0, "    lr: 0.001\n    run_name: a|b\n")]}
    losses = [(1, 6.0), (2, 5.0), (3, 4.0), (4, 3.0), (5, 2.5)]
    found = read_tensorboard(tmp_path)  # while the run goes on
    assert found.pop("sample")[:4] == [(step, f"* {step}\n") for step in (1, 2, 3, 4)]
    assert found.pop("guard/reason")[-1] == (4, "spike")  # of texts this reader drops none
    assert math.isnan(found.pop("train/grad_norm")[0][1])
    assert found == {"train/loss": losses, **guard, **config}
    # Killed while it wrote, after a checkpoint of step 3.
    path = metrics.trackers["tensorboard"].path
    path.write_bytes(path.read_bytes()[:-3])
    os.rename(path, path.with_name("events.out.tfevents.0000000001.host.1"))
    metrics = log(first_step=3, tracker=("tensorboard",))
    metrics.log(4, {"train/loss": 1.5})
    metrics.close()
    found = read_tensorboard(tmp_path)
    assert found["train/loss"] == [*losses[:3], (4, 1.5)] and not found.get("guard/skipped")
    assert found["config"] == [*config["config"], (3, "")]


def test_one_tracker_that_fails_leaves_the_other_and_the_log(log, offline, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    metrics = log(tracker=("tensorboard", "wandb"))
    assert [*metrics.trackers] == ["wandb", "tensorboard"]
    metrics.trackers["tensorboard"].path = Path("/dev/full")
    metrics.log(1, {"train/loss": 2.0})
    metrics.log(2, {"train/loss": 2.0})
    said = capsys.readouterr().out
    assert said.count("tensorboard fails and gets nothing more: [Errno 28] No space left") == 1
    assert [*metrics.trackers] == ["wandb"] and steps(tmp_path) == [1, 2]


def test_trackers_that_cannot_start_leave_no_run(log, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**options):
        raise wandb.errors.UsageError("no API key\nat length")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"W&B cannot start \(no API key\): run `wandb login`"):
        log(tracker=("wandb",))
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
        words = rf"the tracker {name} needs {name}: pip install -e '.\[train\]'"
        with pytest.raises(ImportError, match=words):
            log(tracker=(name,))
    assert list(tmp_path.iterdir()) == []


def test_the_curve_of_whatever_was_logged(tmp_path):
    path, huge = tmp_path / "loss.png", {"step": 10**400, "val/loss": 1.0}
    lines = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": None}, {"step": 3}]
    lines += [{"step": 4, "train/loss": NAN, "val/loss": math.inf}, {"step": 10**400, "x": 1}]
    for title in ("a$\\x$", "\x1b\n\u4e2d", "a" * 300):
        draw_curve(lines, path, title, "nats $ token")
        assert path.read_bytes()[:4] == b"\x89PNG"
        path.unlink()
    with pytest.raises(ValueError, match="the loss curve cannot be drawn"):
        draw_curve([huge], path, "title", "nats")
    with pytest.raises(OSError):
        draw_curve(lines, tmp_path / "nowhere" / "loss.png", "title", "nats")


def test_samples_where_the_alphabet_has_no_newline(tiny):
    layout = SimpleNamespace(call_model=lambda call: call())
    text = sample_text(layout, GPT(replace(tiny, vocab_size=3), "torch"), CharTokenizer("abc"))
    assert len(text) == 31 and set(text) <= set("abc")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(IsADirectoryError) as error:
        write_whole(tmp_path, "text")
    assert error.value.filename == str(tmp_path)
    assert [*tmp_path.parent.glob(f".{tmp_path.name}*")] == []


def test_a_file_that_is_to_be_written_is_tried_first(tmp_path):
    (tmp_path / "file").touch()
    for path, named in ((tmp_path, tmp_path), (tmp_path / "file" / "x", tmp_path / "file"),
                        (Path("/proc/x"), "/proc/x")):  # fmt: skip
        with pytest.raises(OSError) as error:
            check_writable(path)
        assert error.value.filename == str(named)
    check_writable(tmp_path / "new" / "x")
    assert [*(tmp_path / "new").iterdir()] == []


def test_a_duration_has_no_end():
    assert duration(90061) == "1 day, 1:01:01"
    assert duration(float("inf")).endswith("17:46:40")
