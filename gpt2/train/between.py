"""What the loop asks and does between two steps: the learning rate, what is due, what asks to stop.

learning_rate and Due follow from the number of a step alone. The validation loss and the sample are
called by all ranks.

Slurm and spot machines send SIGUSR1 or SIGTERM some time before they end a job; a user sends SIGINT
(Ctrl-C), a terminal that is closed SIGHUP. A handler may run in the middle of anything, a
collective or a write, so it only sets a flag; the loop polls it. A second SIGINT, a second or more
later, stops at once: torchrun passes on the one that its terminal has already sent to all.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gpt2.config import IGNORE_INDEX, TrainConfig
from gpt2.data.feed import Feed
from gpt2.device import Execution
from gpt2.dist import Distributed
from gpt2.generate import generate
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from gpt2.train.layouts import Layout

WSD_DECAY = 0.2  # the part of max_steps in which wsd decays
RANGE = (1e-6, 1.0)  # of lr, in a test
SAMPLE_TOKENS = 100
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: the run is saved, the same command line goes on with it


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Rises linearly to lr over config.warmup steps, then by schedule:
        cosine, linear   fall from lr to min_lr at max_steps
        constant         stays at lr
        wsd              stays at lr, then falls linearly over the last fifth of max_steps
    With lr_range_test it rises exponentially over RANGE.
    """
    if config.lr_range_test:
        return RANGE[0] * (RANGE[1] / RANGE[0]) ** (step / max(config.max_steps - 1, 1))
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    start = config.warmup
    if config.schedule == "wsd":
        start = max(start, round(config.max_steps * (1 - WSD_DECAY)))
    progress = min(max(step - start, 0) / max(config.max_steps - start, 1), 1.0)
    is_cosine = config.schedule == "cosine"
    share = 0.5 * (1 + math.cos(math.pi * progress)) if is_cosine else 1 - progress
    return config.min_lr + share * (config.lr - config.min_lr)


@dataclass(frozen=True)
class Due:
    """What is due once `step` optimizer steps are done; has_val: there is validation data."""

    config: TrainConfig
    has_val: bool

    def log(self, step: int) -> bool:
        return step in (1, self.config.max_steps) or step % self.config.log_every == 0

    def validation(self, step: int) -> bool:
        """Weights that were trained before are validated as they come, too."""
        if step == 0:
            return self.has_val and self.config.eval_every > 0 and bool(self.config.init_from)
        return self.has_val and self._every(step, self.config.eval_every, at_end=True)

    def hellaswag(self, step: int) -> bool:
        return self._every(step, self.config.hellaswag_every, at_end=True)

    def sample(self, step: int) -> bool:
        return self._every(step, self.config.sample_every)

    def save(self, step: int) -> bool:
        """Before everything else that is due, so that what fails there costs nothing."""
        evaluated = self.validation(step) or self.hellaswag(step) or self.sample(step)
        at_end = step == self.config.max_steps
        return step > 0 and (evaluated or at_end or self._every(step, self.config.save_every))

    def snapshot(self, step: int) -> bool:
        """For guard rollback; the first step of a launch takes one besides."""
        return step % self.config.snapshot_every == 0

    def _every(self, step: int, every: int, *, at_end: bool = False) -> bool:
        if every == 0 or step == 0:
            return False
        return step % every == 0 or at_end and step == self.config.max_steps


@torch.no_grad()
def mean_losses(
    layout: Layout, objective: nn.Module, feed: Feed, execution: Execution, group: Distributed, *,
    n_rows: int, micro_batch_size: int, stop_asked: Callable[[], bool],
) -> dict[str, float] | None:  # fmt: skip
    """The objective over the first n_rows rows of validation data, spread over all ranks.

    stop_asked: asked before each batch, of the same answer on all ranks.
    Returns the mean loss as "loss", and the objective's metrics; None where a stop was asked for.
    """
    rows = micro_batch_size * group.world_size
    sums: dict[str, Tensor] = {}
    objective.eval()
    try:
        for i in range(-(-n_rows // rows)):
            if stop_asked():
                return None
            parts = feed.batch(i, rows, group.rank, group.world_size)
            batch = dict(zip(feed.source.names, parts, strict=True))
            # The last batch is filled up with rows that do not count: all have one shape.
            first = i * rows + group.rank * micro_batch_size
            batch["targets"][max(n_rows - first, 0) :] = IGNORE_INDEX
            with execution.autocast():
                loss_sum, metrics = layout.eval_forward(batch)
            found = {"loss": loss_sum, **metrics, "units": objective.count(batch)}
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.double()
    finally:
        objective.train()
    *values, units = group.sum(torch.stack(list(sums.values()))).tolist()
    return {name: value / units for name, value in zip(sums, values, strict=False)}


def sample_text(layout: Layout, model: GPT, tokenizer: Tokenizer) -> str:
    """How a text goes on from its start; a character model starts from a newline, if it has one."""
    if tokenizer.eot is not None:
        start = [tokenizer.eot]
    else:
        start = tokenizer.encode("\n" if "\n" in tokenizer.chars else tokenizer.chars[0])
    room = model.config.block_size - len(start)
    tokens = layout.call_model(partial(
        generate, model, [start], max_new_tokens=min(room, SAMPLE_TOKENS), temperature=0.8,
        top_k=50, seed=0,
    ))  # fmt: skip
    return tokenizer.decode(tokens[0])


class StopSignals:
    """A context in which signals that ask a run to stop only set `.received`, to their names."""

    def __init__(self):
        self.received: str | None = None
        self._interrupted_at = math.inf
        self._before: dict = {}

    def __enter__(self) -> "StopSignals":
        # Only the main thread may set handlers; elsewhere whoever runs it has them.
        if threading.current_thread() is threading.main_thread():
            # What the process was started to ignore (nohup, a job in the background) stays so.
            wanted = [n for n in HANDLED if signal.getsignal(n) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted_at > 1.0:
                raise KeyboardInterrupt
            self._interrupted_at = min(self._interrupted_at, time.monotonic())
        if self.received is None:
            self.received = signal.Signals(number).name
            # write(2) and not print: the interrupted code may be inside print itself.
            again = " (Ctrl-C again: at once)" if number == signal.SIGINT else ""
            text = f"\n{self.received}: saving after this step, then stopping{again}\n"
            with contextlib.suppress(OSError):  # the terminal is gone
                os.write(2, text.encode())


class Interrupted(SystemExit):
    """Ends a process whose run was saved and is to be resumed; exit status 75."""

    def __init__(self, signal_name: str):
        super().__init__(RESUME_ME)
        self.signal_name = signal_name
