"""A run's folder: who may write to it, which run it holds, and every file in it.

RUN/lock            held (flock) for as long as a process writes here
RUN/run.json        the run's identity, written once: run id, kind, model, tokenizer, data, seed
RUN/config.yaml     the options of the last launch; scripts take it
RUN/metrics.jsonl   the log (gpt2.train.metrics)
RUN/receipt.json    the launches (gpt2.train.receipt)
RUN/report.md, report.html, loss.png    drawn from these (gpt2.train.report)
RUN/checkpoints/    gpt2.checkpoint; each carries the run id and the identity

Training stands still only while a checkpoint's tensors are copied to host memory; a thread writes
the one copy. A second checkpoint waits until the first is written.

Only checkpoints are needed to go on, so only a checkpoint that cannot be written may end training;
of everything else a failed write is told, and that is all. Files with other names are not ours.
"""

import fcntl
import json
import math
import os
import socket
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median_high

import torch

from gpt2 import checkpoint
from gpt2.cli import say, to_yaml
from gpt2.config import TrainConfig
from gpt2.dist import Distributed
from gpt2.model import GPT
from gpt2.storage import read_json, write_whole
from gpt2.train.metrics import Metrics, points, read_metrics
from gpt2.train.receipt import Receipt
from gpt2.train.report import write_report

REPORT_EVERY_S = 120.0  # drawing it takes some 0.2 s
LOCATIONS = ("data", "val_data", "init_from", "out_dir", "run_name", "resume", "device")
"""Options that say where something lies; what lies there is compared, not these words."""
DATA_OPTIONS = (
    "data", "val_data", "val_fraction", "template", "overlong", "bad_rows", "max_conversations",
    "max_pairs", "block_size",
)  # fmt: skip
"""Options by which somebody asks for other rows than before."""


class RunFolder:
    """The folder of one run, as a context that gives its lock back; for the main process."""

    def __init__(self, path: str | Path):
        self.path, self.run_id, self.identity = Path(path), "", {}
        self.val: list[tuple[int, float | None]] = []  # step, loss, as the checkpoint has them
        self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            self._lock.close()

    # -- who may write, and what is there ---------------------------------------------------------

    def lock(self) -> None:
        """Makes this process the only one that trains here; a folder that is not there yet is not
        made for that. The lock goes with the process, however it ends.

        Raises OSError where another process has it.
        """
        if self._lock is not None or not self.path.is_dir():
            return
        file = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise OSError(
                f"{self.path}: {owner} is training here: wait for it, or choose another run_name"
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._lock = file

    def find(self, resume: str) -> checkpoint.Checkpoint | None:
        """The checkpoint that `resume` means: never, auto, or the path of one.

        Raises ValueError where a run would be written over, or be continued with another's state.
        """
        self.lock()
        recorded = self._read_identity()
        self.run_id = recorded.get("run_id", "")
        if resume == "never":
            if checkpoint.list_checkpoints(self.path) or read_metrics(self.path / "metrics.jsonl"):
                raise ValueError(
                    f"{self.path} holds a run already: continue it with --resume auto, or choose "
                    "another run_name"
                )
            return None
        if resume == "auto":
            return checkpoint.newest_good(self.path, run_id=self.run_id or None)
        found = checkpoint.read_checkpoint(resume)
        if self.run_id and found.run_id and found.run_id != self.run_id:
            raise ValueError(
                f"{found.path} is a checkpoint of another run than {self.path} holds: choose "
                "another run_name to go on from it"
            )
        return found

    def begin(self, config: TrainConfig, identity: dict, resumed) -> list[str]:
        """Makes the folder this run's; returns what is to be said of a run that goes on.

        identity: what the run trains, see identity_of. Raises ValueError where it is not what the
        run was begun with and no option says why; nothing has been written then.
        """
        known = [] if self._lock is None else checkpoint.list_checkpoints(self.path)
        before = (resumed.identity if resumed is not None else None) or self._read_identity()
        lines = compare(config, resumed, before, identity) if resumed is not None else []
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)  # else no step is kept
        self.lock()
        if checkpoint.list_checkpoints(self.path) != known:
            raise OSError(f"{self.path}: another process has trained here meanwhile; start again")
        own = resumed is not None and resumed.path.parent.parent.resolve() == self.path.resolve()
        self.val = resumed.state.get("val", []) if own else []
        if not (own and self.run_id):
            self.run_id = (resumed.run_id if own else None) or uuid.uuid4().hex
        self.identity = identity
        content = {"format": 1, "run_id": self.run_id, "created": time.time(), **identity}
        if not own or not (self.path / "run.json").exists():
            write_whole(self.path / "run.json", json.dumps(content, indent=2) + "\n")
        step = 0 if resumed is None else resumed.step
        for path in checkpoint.set_aside(self.path, step):
            lines.append(f"not part of what goes on from step {step}, kept as {path}")
        return lines

    def _read_identity(self) -> dict:
        try:
            return read_json(self.path / "run.json")
        except (OSError, ValueError):
            return {}  # of an earlier version, or damaged: the checkpoints have it too

    # -- while the run writes ---------------------------------------------------------------------

    def open(
        self, config: TrainConfig, first_step: int, group: Distributed, facts: dict,
        predicted: dict,
    ) -> None:  # fmt: skip
        """Opens log and receipt. facts, predicted: see gpt2.train.receipt."""
        self.config, self.reported = config, time.monotonic()
        description = asdict(config) | {"run_id": self.run_id}
        known = [{"step": step, "val/loss": loss} for step, loss in self.val]
        self.metrics = Metrics(self.path, config, description, first_step, known)
        self.say, self.log = self.metrics.say, self.metrics.log
        try:
            write_whole(self.path / "config.yaml", to_yaml(config))
        except OSError as error:
            self.say(f"config.yaml is not written: {error}")
        self.receipt = Receipt(
            self.path, facts=facts | {"run": config.run_name, "run_id": self.run_id},
            data=self.identity["data"], group=group, first_step=first_step, predicted=predicted,
            say=self.say,
        )  # fmt: skip
        self._writer = ThreadPoolExecutor(1, "saver")
        self._copy: checkpoint.Tensors | None = None  # of what is written, 12 bytes a parameter
        self._pending: tuple[int, float, Future] | None = None  # step, held_ms, path and write_ms
        self.stopping = False  # whether the next checkpoint is the last one
        self._told = False  # that the link to the best one does not move
        self._point_at_best()

    def save(
        self, step: int, model: GPT, optimizer: torch.optim.Optimizer, *,
        tokenizer: dict, state: dict, chat_template: str | None,
    ) -> None:  # fmt: skip
        """Copies a checkpoint's tensors, starts writing it and returns. Raises what wait raises."""
        state = state | {"val": self._val()}  # a log may be lost, and says which is the best
        meta = checkpoint.describe(
            model, tokenizer=tokenizer, train=asdict(self.config), state=state,
            chat_template=chat_template, run_id=self.run_id, identity=self.identity,
        )  # fmt: skip
        started = time.perf_counter()
        self.wait()  # for the one before: its copy is written over
        self._copy = checkpoint.snapshot(model, optimizer, self._copy)
        held_ms = (time.perf_counter() - started) * 1e3
        self._pending = step, held_ms, self._writer.submit(self._write, step, meta, self._best())

    def _write(self, step: int, meta: dict, best: Path | None) -> tuple[Path, float]:
        started, keep_last = time.perf_counter(), self.config.keep_last
        path = checkpoint.write_checkpoint(
            self.path, step, self._copy, meta, keep_last=keep_last, best=best
        )
        return path, (time.perf_counter() - started) * 1e3

    def poll(self) -> None:
        """Tells of a checkpoint that has been written meanwhile; waits for nothing."""
        if self._pending is not None and self._pending[-1].done():
            self.wait()

    def wait(self) -> None:
        """Until what save started is written and told of. Raises ValueError where the state is not
        finite, OSError where it cannot be written and on_save_error is stop, or none comes later.
        """
        if self._pending is None:
            return
        (step, held_ms, future), self._pending = self._pending, None
        place = f"step {step:>6}/{self.config.max_steps}"
        try:
            path, write_ms = future.result()
        except OSError as error:
            is_last = self.stopping or step == self.config.max_steps
            if is_last or self.config.on_save_error == "stop":
                raise
            why = f"{error.strerror or error}; training goes on (on_save_error)"
            self.say(f"{place}  NOT saved: {why}")
            return
        self._point_at_best()
        self.log(step, {"checkpoint/held_ms": held_ms, "checkpoint/write_ms": write_ms})
        self.report(step)
        times = f"held training {held_ms:.0f} ms, took {write_ms:.0f} ms"
        self.say(f"{place}  saved {path}  ({times})")

    def go_back(self, step: int) -> None:
        """Sets aside what was saved and logged of later steps."""
        self.wait()
        checkpoint.set_aside(self.path, step)
        self.metrics.rewind(step)

    def validated(self, step: int) -> bool:
        """After a validation was logged: whether patience ends the run with it."""
        if self._pending is None:  # else when that checkpoint is written
            self._point_at_best()
        found = [math.inf if loss is None else loss for _, loss in self._val()]
        since, patience = len(found) - 1 - found.index(min(found)), self.config.patience
        self.stopping = 0 < patience <= since and step < self.config.max_steps
        if self.stopping:
            self.say(
                f"stopped early: no lower val loss than {min(found):.4f} in {since} validations "
                f"(patience {patience})"
            )
        return self.stopping

    def _val(self) -> list[tuple[int, float | None]]:
        """Step and loss of each validation; None: not finite."""
        return [(x["step"], x["val/loss"]) for x in self.metrics.lines if "val/loss" in x]

    def _best(self) -> Path | None:
        """The checkpoint with the lowest validation loss, of those that are there."""
        found = {f"step_{step:08d}": loss for step, loss in points(self.metrics.lines, "val/loss")}
        saved = [p for p in checkpoint.list_checkpoints(self.path) if p.name in found]
        return min(saved, key=lambda p: found[p.name], default=None)

    def _point_at_best(self) -> None:
        if (best := self._best()) is None:
            return
        checkpoint.point_at(best, checkpoint.BEST)
        if checkpoint.best_checkpoint(self.path) != best and not self._told:
            self._told, link = True, best.with_name(checkpoint.BEST)
            self.say(f"{link} cannot be made a link (is it a copy?); the best is {best.name}")

    def close(self, step: int, end: str) -> None:
        """Waits for the last checkpoint and draws the report; end: how the launch ended."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self.report(step, end)
            self.metrics.close()
        if end.startswith("finished"):
            self._show_result(step)

    def report(self, step: int, end: str = "running") -> None:
        """Brings receipt and, now and then, the report up to date."""
        self.receipt.update(step, end)
        now = time.monotonic()
        if end == "running" and now - self.reported < REPORT_EVERY_S:
            return
        self.reported = now
        try:
            write_report(self.path)
        except (OSError, ImportError, ValueError) as error:
            self.say(f"no report: {error}")

    def _show_result(self, step: int) -> None:
        times, val = (points(self.metrics.lines, key) for key in ("train/step_ms", "val/loss"))
        text = f"done: {step:,} steps"
        text += f", {median_high(ms for _, ms in times):.1f} ms a step (median)" if times else ""
        say(text + (f", val loss {val[-1][1]:.4f}" if val else ""))
        say(f"loss curve: {self.path / 'loss.png'}, report: {self.path / 'report.html'}")
        found = checkpoint.list_checkpoints(self.path)
        say(f"checkpoint: {found[-1] if found else 'none was needed'}")
        if (best := self._best()) and best != found[-1]:
            say(f"the best by val loss: {best.with_name(checkpoint.BEST)}, which is {best.name}")


def identity_of(parts) -> dict:
    """What a run trains, as plain values: what must be the same for it to go on as if it had never
    stopped. parts: see gpt2.train.pretrain.Parts.
    """
    config, model, val_data = parts.config, parts.objective.model, parts.val_data
    found = {
        "kind": config.KIND,
        "model": asdict(model.config),
        "tokenizer": parts.tokenizer.to_dict(),
        "data": parts.train_data.identity(),
        "val_data": None if val_data is None else val_data.identity(),
        "init_from": {"asked": config.init_from, **model.origin} if config.init_from else None,
    }
    return json.loads(json.dumps(found))  # as it comes back from a file


def without_paths(data: list[dict] | None) -> list[dict]:
    """Identities of data without where it lies."""
    return [{k: v for k, v in entry.items() if k != "path"} for entry in data or []]


def compare(config: TrainConfig, resumed, before: dict, now: dict) -> list[str]:
    """What differs from the run that goes on, in words.

    Raises ValueError for what would be trained on without anyone having asked for it: other
    content under the same name, another tokenizer, another reference.
    """
    lines, options = [], json.loads(json.dumps(asdict(config)))  # with lists for tuples
    for key, value in resumed.train.items():
        if key in options and key not in ("resume", "out_dir", "run_name"):
            if options[key] != value:
                lines.append(f"changed since the checkpoint: {key} was {value}, is {options[key]}")
    restore = "restore it, or start a new run with --init_from CHECKPOINT"
    if before.get("kind", now["kind"]) != now["kind"]:
        raise ValueError(f"{resumed.path} is of a run of kind {before['kind']}: choose its script")
    if resumed.tokenizer != now["tokenizer"]:
        raise ValueError(
            f"{config.data}: its tokenizer is another than the one of {resumed.path}: prepare the "
            f"data with the same, or {restore}"
        )
    for name in ("data", "val_data"):
        old, new = (without_paths(x.get(name)) for x in (before, now))
        if before and old and old != new:
            asked = any(resumed.train.get(o) != options.get(o) for o in DATA_OPTIONS)
            asked |= bool(resumed.train.get("eval_every")) != bool(options["eval_every"])
            text = f"{options.get(name) or options['data']}: other {name.replace('_', ' ')} than at"
            text += f" step {resumed.step} (prepared again, another folder, or other weights)"
            if not asked and name == "data":
                raise ValueError(f"{text}: {restore}, or name a folder of another name as data")
            lines.append(f"{text}; the steps so far have seen the other")
    old, new = before.get("init_from"), now["init_from"]
    if old and new and now["kind"] == "dpo" and old["xxh3_128"] != new["xxh3_128"]:
        raise ValueError(
            f"{new['path']}: the reference has other weights than when the run began "
            f"({old['path']}): {restore}"
        )
    return lines
