"""Programs that show a run while it goes on: W&B and TensorBoard.

A tracker has a constructor (folder, config, description, first_step), which raises where it cannot
start, and the methods of Tracker, which may raise whatever their library does: gpt2.train.metrics
leaves out one that fails. Both work offline: W&B with WANDB_MODE=offline, TensorBoard always.

Steps go back, after a rollback and where a run goes on from a checkpoint before its last line.
TensorBoard's files can say so, and its readers then drop the numbers that were left; W&B's history
only grows, so its charts are drawn over the key `step`.
"""

import importlib.util
import os
import socket
import time
from pathlib import Path

from gpt2.config import TrainConfig


class Tracker:
    def log(self, step: int, values: dict) -> None:
        """Shows values (numbers and texts) under their keys."""

    def rewind(self, step: int, kept: list[dict]) -> None:
        """Forgets what later steps logged, but not the lines that are kept, as of `step`."""

    def close(self) -> None:
        """Writes what is left."""


class WandB(Tracker):
    """Under the run's own id, so that a resumed run continues it."""

    def __init__(self, folder: Path, config: TrainConfig, description: dict, first_step: int):
        import wandb

        try:
            self.run = wandb.init(
                project=config.wandb_project or None, name=config.run_name[:128],
                id=description.get("run_id"), resume="allow", dir=folder, config=description,
            )  # fmt: skip
            self.run.define_metric("*", step_metric="step")  # W&B's own step may not go back
        except Exception as error:
            raise ValueError(
                f"W&B cannot start ({first_line(error)}): run `wandb login`, set "
                "WANDB_MODE=offline, or leave out wandb_project and wandb in tracker"
            ) from error

    def log(self, step: int, values: dict) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class TensorBoard(Tracker):
    """An event file for each launch, written as it is logged: torch's SummaryWriter has a thread
    for that, which prints a traceback where the disk is full."""

    def __init__(self, folder: Path, config: TrainConfig, description: dict, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self.Event, self.SessionLog = Event, SessionLog
        self.RecordWriter, self.summary = RecordWriter, summary
        folder = folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Files are read in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._write(file_version="brain.Event:2")
        text = "".join(f"    {key}: {value}\n" for key, value in description.items())
        self.rewind(first_step, [{"config": text}])  # Markdown's form of plain text

    def log(self, step: int, values: dict) -> None:
        found = self.summary.Summary()
        for key, value in values.items():
            is_number = isinstance(value, int | float)
            shown = self.summary.scalar if is_number else self.summary.text
            found.value.extend(shown(key, value if is_number else str(value)).value)
        self._write(step=step, summary=found)

    def rewind(self, step: int, kept: list[dict]) -> None:
        # A start at a step drops that step and later ones.
        start = self.SessionLog(status=self.SessionLog.START)
        self._write(step=step + 1, session_log=start)
        for values in kept:
            self.log(step, {key: value for key, value in values.items() if key != "step"})

    def _write(self, **fields) -> None:
        event = self.Event(wall_time=time.time(), **fields)
        with open(self.path, "ab") as file:
            self.RecordWriter(file).write(event.SerializeToString())


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandB, "tensorboard": TensorBoard}


def start_trackers(folder: Path, config: TrainConfig, *args) -> dict[str, Tracker]:
    """Those that config names, by name. Raises ImportError for a package that is missing, and
    ValueError and OSError for a tracker that cannot start."""
    names = [n for n in TRACKERS if n in config.tracker or n == "wandb" and config.wandb_project]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"the tracker {name} needs {name}: pip install -e '.[train]'")
    return {name: TRACKERS[name](folder, config, *args) for name in names}


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
