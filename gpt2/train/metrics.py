"""What a run shows and keeps: progress in the terminal, metrics.jsonl, W&B, the loss curve.

Logged keys: train/loss train/lr train/grad_norm train/tokens_per_s train/mfu train/step_ms
train/data_ms (what a step waited for its batch) val/loss; train/ and val/ with the name of each of
the objective's metrics; eval/hellaswag (acc_norm) with _acc and _examples; checkpoint/held_ms and
checkpoint/write_ms; guard/... of a skipped step; sample (text). A line's `step` is the number of
optimizer steps done.
"""

import json
import os
import sys
import time
from pathlib import Path

from gpt2.config import TrainConfig


class Metrics:
    """Writes to the run folder and the terminal; only the main process has one.

    first_step: the step a resumed run starts from; lines of later steps, from before the
    interruption, are dropped. Raises ValueError where W&B was asked for and cannot start.
    """

    def __init__(self, folder: Path, config: TrainConfig, description: dict, first_step: int):
        self.path = folder / "metrics.jsonl"
        self.max_steps = config.max_steps
        self.lines = [line for line in read_metrics(self.path) if line["step"] <= first_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(temporary, self.path)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - closed by close()
        self.wandb = _start_wandb(folder, config, description) if config.wandb_project else None
        self.progress = _Progress(config.max_steps, first_step) if sys.stdout.isatty() else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Keeps values under their keys at a step."""
        line = {"step": step, **values}
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def logged(self, step: int, key: str) -> bool:
        """Whether a key was already logged at a step."""
        return any(line["step"] == step and key in line for line in self.lines)

    def show_step(
        self,
        step: int,
        values: dict[str, float],
        eta_s: float,
        predicted_ms: float | None = None,
        also: tuple[str, ...] = (),
    ) -> None:
        """One line of training progress, or the live display's new state.

        predicted_ms: the pre-flight's least time of a step; also: more keys of values to show.
        """
        step_ms = values["train/step_ms"]
        of_predicted = f" ({step_ms / predicted_ms:.1f}x predicted)" if predicted_ms else ""
        text = (
            f"loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}  "
            f"norm {values['train/grad_norm']:.2f}  {step_ms:.1f} ms{of_predicted}  "
            f"{values['train/tokens_per_s']:,.0f} tok/s"
        )
        text += "".join(f"  {key.removeprefix('train/')} {values[key]:.3f}" for key in also)
        if "train/mfu" in values:
            text += f"  MFU {values['train/mfu']:.1%}"
        if self.progress is not None:
            self.progress.update(step, text)
        else:
            self.say(f"step {step:>6}/{self.max_steps}  {text}  ETA {duration(eta_s)}")

    def say(self, text: str) -> None:
        """A line that stays on the terminal."""
        if self.progress is not None:
            self.progress.say(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


class _Progress:
    """A live bar in a terminal."""

    def __init__(self, max_steps: int, first_step: int):
        from rich import progress

        self.bar = progress.Progress(
            progress.TextColumn("step"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=20),
            progress.TextColumn("{task.description}"),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(),
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task = self.bar.add_task("", total=max_steps, completed=first_step)
        self.bar.start()

    def update(self, step: int, text: str) -> None:
        self.bar.update(self.task, completed=step, description=text)

    def say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.bar.stop()


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that was cut short by a crash is left out."""
    lines = []
    if Path(path).exists():
        for text in Path(path).read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def draw_curve(
    lines: list[dict], path: str | Path, title: str, unit: str = "nats per token"
) -> None:
    """Training and validation loss over steps, as a PNG. Raises ImportError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing the loss curve needs matplotlib: pip install -e '.[train]'"
        ) from error
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (
        ("train/loss", "train", dict(color="#9ab", linewidth=1)),
        ("val/loss", "val", dict(color="#c33", linewidth=2, marker="o", markersize=4)),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=f"{label}, last {points[-1][1]:.4f}", **style
            )
            axes.legend()
    axes.set(title=title, xlabel="step", ylabel=f"loss ({unit})")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def duration(seconds: float) -> str:
    """h:mm:ss"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _start_wandb(folder: Path, config: TrainConfig, description: dict):
    try:
        import wandb
    except ImportError as error:
        raise ImportError("wandb_project needs wandb: pip install -e '.[train]'") from error
    id_path = folder / "wandb_id"
    run_id = id_path.read_text() if id_path.exists() else f"{config.run_name}-{time.time_ns():x}"
    try:
        run = wandb.init(
            project=config.wandb_project, name=config.run_name, id=run_id, resume="allow",
            dir=folder, config=description,
        )  # fmt: skip
    except wandb.errors.Error as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"W&B cannot start ({reason}): run `wandb login`, set WANDB_MODE=offline, or leave out "
            "wandb_project"
        ) from error
    id_path.write_text(run_id)
    return run
