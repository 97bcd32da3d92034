"""What a run shows and keeps: progress in the terminal, metrics.jsonl, trackers, the loss curve.

Logged keys: train/loss train/lr train/grad_norm train/tokens_per_s train/mfu train/step_ms
train/data_ms (what a step waited for its batch) val/loss; train/ and val/ with the name of each of
the objective's metrics; eval/hellaswag (acc_norm) with _acc and _examples; checkpoint/held_ms and
checkpoint/write_ms; guard/... of a skipped step; sample (text). A line's `step` is the number of
optimizer steps done. A number that is not finite is kept as null.

Nothing here ends training: what cannot be written is told once and written when it can be, and
output that nobody reads is dropped, and so is a tracker that fails. Only one that cannot start is
an error, before any step.
"""

import io
import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path

from gpt2.cli import SafeOutput, printable, say
from gpt2.config import TrainConfig
from gpt2.storage import finite, set_aside, to_json, write_whole
from gpt2.train.trackers import first_line, start_trackers


class Metrics:
    """Writes to the run folder and the terminal; only the main process has one.

    first_step: the step a resumed run starts from; lines of later steps, from before the
    interruption, are dropped. known: lines of which the log may have lost some. Attribute lines:
    what was logged.
    Raises as start_trackers does.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, description: dict, first_step: int,
        known: list[dict] = (),
    ):  # fmt: skip
        self.path, self.max_steps = folder / "metrics.jsonl", config.max_steps
        self.n_failed, self.bar = 0, None  # writes since the last one that worked
        # First, so that a start that one of them refuses leaves no log, which is what makes a run.
        self.trackers = start_trackers(folder, config, description, first_step)
        self.bar = _start_bar(config.max_steps, first_step)
        lines, damage = read_log(self.path)
        if damage:
            self.say(set_aside(self.path, damage))
        self.lines = [line for line in lines if line["step"] <= first_step]
        self.lines += [line for line in known if not self.logged(line["step"], "val/loss")]
        self.lines.sort(key=lambda line: line["step"])
        self._rewrite()

    def log(self, step: int, values: dict) -> None:
        """Keeps values under their keys at a step."""
        self.lines.append(finite({"step": step, **values}))
        self._write(f"{to_json(self.lines[-1])}\n".encode())
        self._tell("log", step, values)

    def logged(self, step: int, key: str) -> bool:
        """Whether a key was already logged at a step."""
        return any(line["step"] == step and key in line for line in self.lines)

    def rewind(self, step: int) -> None:
        """Drops what later steps logged, after a rollback to `step`.

        What the guard found in them happened, and does not come again: it stays, as of `step`, with
        the step that it was logged at under guard/step.
        """
        kept = [
            {"guard/step": line["step"], **line, "step": step}
            for line in self.lines
            if line["step"] > step and any(key.startswith("guard/") for key in line)
        ]
        self.lines = [line for line in self.lines if line["step"] <= step] + kept
        self._rewrite()
        self._tell("rewind", step, kept)

    def show_step(
        self, step: int, values: dict[str, float], eta_s: float,
        predicted_ms: float | None = None, also: tuple[str, ...] = (), late_s: float = 0.0,
    ) -> None:  # fmt: skip
        """One line of training progress, or the live display's new state.

        predicted_ms: the pre-flight's least time of a step; also: more keys of values to show;
        late_s: how long after max_minutes the end comes.
        """
        ms = values["train/step_ms"]
        text = (
            f"loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}  "
            f"norm {values['train/grad_norm']:.2f}  {ms:.1f} ms"
            + (f" ({ms / predicted_ms:.1f}x predicted)" if predicted_ms else "")
            + f"  {values['train/tokens_per_s']:,.0f} tok/s"
            + "".join(f"  {key.removeprefix('train/')} {values[key]:.3f}" for key in also)
            + (f"  MFU {values['train/mfu']:.1%}" if "train/mfu" in values else "")
        )
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, description=text)
        else:
            late = f", {duration(late_s)} after max_minutes" if late_s >= 1 else ""
            self.say(f"step {step:>6}/{self.max_steps}  {text}  ETA {duration(eta_s)}{late}")

    def say(self, text: str) -> None:
        """A line that stays on the terminal; what is not printable in it is spelled out."""
        if self.bar is not None:
            self.bar.console.print(printable(text), markup=False, highlight=False)
        else:
            say(text)

    def close(self) -> None:
        if self.n_failed:
            self._rewrite()
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self._tell("close")
        self.trackers = {}

    def _rewrite(self) -> None:
        self.size = -1  # of no file
        self._write(b"")

    def _write(self, new: bytes) -> None:
        """Appends to the log; one that is not as it was left is written anew from memory."""
        try:
            with open(self.path, "ab") as file:
                if is_ours := file.tell() == self.size:
                    file.write(new)
            if not is_ours:
                new = "".join(f"{to_json(line)}\n" for line in self.lines).encode()
                write_whole(self.path, new) if new else self.path.unlink()
                self.size = 0
            self.size += len(new)
        except OSError as error:
            self.size, self.n_failed = -1, self.n_failed + 1
            if self.n_failed == 1:
                self.say(f"{self.path}: {error.strerror}; its lines are kept until it is writable")
        else:
            if self.n_failed:
                self.say(f"{self.path} is whole again, after {self.n_failed} failed writes")
            self.n_failed = 0

    def _tell(self, method: str, *args) -> None:
        """Calls every tracker; one that fails, in whatever way, is left out from then on."""
        for name, tracker in list(self.trackers.items()):
            try:
                getattr(tracker, method)(*args)
            except Exception as error:
                del self.trackers[name]
                self.say(f"{name} fails and gets nothing more: {first_line(error)}")


def _start_bar(max_steps: int, first_step: int):
    """A live bar, where standard output is a terminal and rich is installed; else None."""
    output = SafeOutput(sys.stdout, escape=False)
    if not output.isatty():
        return None
    try:
        from rich import console, progress
    except ImportError:
        return None
    bar = progress.Progress(
        "step {task.completed}/{task.total}", progress.BarColumn(bar_width=20),
        "{task.description}", "ETA", progress.TimeRemainingColumn(),
        console=console.Console(file=output), redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
    bar.add_task("", total=max_steps, completed=first_step)
    bar.start()
    return bar


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl that can be read, whatever else it holds; none without one."""
    return read_log(path)[0]


def read_log(path: str | Path) -> tuple[list[dict], str]:
    """The lines of a metrics.jsonl that can be read, and what is wrong with it, "" for nothing."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            return [], f"{path}: not a file"  # reading from a pipe may never end
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"{path}: {error.strerror}"
    lines, bad, texts = [], [], content.splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = finite(json.loads(text.decode()))
            if type(line["step"]) is not int:
                raise TypeError("step")
            lines.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            bad.append(number)
    if bad:
        return lines, f"{path}: {len(bad)} of {len(texts)} lines are damaged, first line {bad[0]}"
    return lines, "" if content else f"{path}: empty"


def points(lines: list[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have a number under key."""
    found = ((line["step"], line.get(key)) for line in lines)
    return [(s, v) for s, v in found if isinstance(v, int | float) and abs(v) < 1e300]


def draw_curve(lines: list[dict], path: str | Path, title: str, unit: str) -> None:
    """Training and validation loss over steps, as a PNG; unit: of the loss.

    Raises ImportError without matplotlib, ValueError for what it cannot draw, OSError.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the loss curve needs matplotlib: pip install -e '.[train]'") from error
    png = io.BytesIO()
    try:
        axes = Figure(figsize=(8, 4.5), dpi=120, layout="constrained").add_subplot()
        for key, label, style in (
            ("train/loss", "train", dict(color="#9ab", linewidth=1)),
            ("val/loss", "val", dict(color="#c33", linewidth=2, marker="o", markersize=4)),
        ):
            if found := points(lines, key):
                label = f"{label}, last {found[-1][1]:.4f}"
                axes.plot(*zip(*found, strict=True), label=label, **style)
                axes.legend()
        # A name may hold $ and letters that the font lacks.
        axes.set_title(printable(title.replace("\n", " "))[:80], parse_math=False)
        axes.set_ylabel(printable(f"loss ({unit})")[:60], parse_math=False)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            axes.figure.savefig(png)
    except Exception as error:
        raise ValueError(f"the loss curve cannot be drawn: {first_line(error)}") from error
    write_whole(Path(path), png.getvalue())


def duration(seconds: float) -> str:
    """h:mm:ss"""
    return str(timedelta(seconds=round(min(seconds, 1e13))))  # timedelta ends at 8.6e13
