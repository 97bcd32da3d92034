"""A run laid out for the minutes that it may take (max_minutes).

Before step 0 some steps are timed, and undone, and a part of all that comes between steps;
max_steps is what then fits. So the whole schedule is known before the run begins, on all ranks
alike, and is in its checkpoints and config.yaml: an interruption has nothing else to keep, and one
before that has nothing to lose. What the first step does besides (compile, fill caches) counts as
time that is gone.

Should the machine slow down or speed up later, the steps stay, since the learning rate has to come
to its end and a resumed run to the same bits: the end comes later or sooner, as the log says.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from gpt2.config import TrainConfig
from gpt2.train import guard
from gpt2.train.metrics import duration

TIMED, MOST_TIMED_S = 0.02, 20.0  # steps are timed for this part of the minutes, at most so long
LEAST_STEPS = 20  # a schedule of fewer is none
EXAMPLES = 64  # of HellaSwag that are timed


def clock() -> float:
    """Seconds, by which max_minutes are counted."""
    return time.perf_counter()


def steps_within(seconds: float, step_s: float, others: list[tuple[int, float]]) -> int:
    """The most steps of step_s seconds that fit. others: what comes between them, and once more at
    the end, as (every so many steps, 0 for only at the end; seconds)."""
    at_end = sum(takes for _, takes in others)
    per_step = step_s + sum(takes / every for every, takes in others if every)
    return int((seconds - at_end) / per_step)


def most_steps(config: TrainConfig, step_s: float) -> int:
    """Steps of step_s seconds that fit max_minutes. Raises ValueError where these are too few."""
    return _check(config, steps_within(60 * config.max_minutes, step_s, []), step_s)


def lay_out(trainer) -> tuple[TrainConfig, str]:
    """The config of a trainer (gpt2.train.trainer) with the max_steps that fit its max_minutes, and
    why, in words; all ranks call it before step 0, and it leaves everything as it was.

    Raises ValueError where too few steps fit.
    """
    config, group, due = trainer.config, trainer.group, trainer.due
    seconds, model, optimizer = 60 * config.max_minutes, trainer.model, trainer.optimizer

    def timed(work: Callable[[], object]) -> float:
        started = clock()
        work()
        if group.device.type == "cuda":
            torch.cuda.synchronize(group.device)
        return clock() - started

    copies, times = guard.Snapshots(), []
    save_s = timed(lambda: copies.take(0, model, optimizer))
    timed(lambda: trainer.train_step(0))  # compiles, and finds memory and caches cold
    while group.broadcast(sum(times) < min(TIMED * seconds, MOST_TIMED_S)):
        times.append(timed(lambda: trainer.train_step(len(times))))
    copies.restore(model, optimizer)
    trainer.guard, trainer.sums = guard.Guard(group), {}

    between_steps = []  # (every so many steps, a part of it, how many such parts it is)
    if due.validation(config.max_steps):
        n_rows = trainer.val_rows()
        some = min(n_rows, 4 * config.micro_batch_size * group.world_size)
        between_steps.append((config.eval_every, lambda: trainer.mean_losses(some), n_rows / some))
    if config.hellaswag_every:
        every, asked = trainer.hellaswag, trainer.hellaswag[:EXAMPLES]
        part = len(every) / len(asked)
        between_steps.append((config.hellaswag_every, lambda: trainer.ask_hellaswag(asked), part))
    between_steps.append((config.sample_every, trainer.sample, 1))
    others = [(config.save_every, save_s)]
    for every, work, parts in between_steps:
        work()
        others.append((every, timed(work) * parts + save_s))

    step_s, gone = math.fsum(times) / len(times), clock() - trainer.started
    steps = group.broadcast(steps_within(seconds - gone, step_s, others))
    steps = _check(config, steps, step_s)
    line = f"{config.max_minutes:g}: {steps:,} steps of {step_s * 1e3:,.1f} ms, the mean of "
    line += f"{len(times)}, after {duration(gone)} for the start"
    return replace(config, max_steps=steps), line


def _check(config: TrainConfig, steps: int, step_s: float) -> int:
    if steps < LEAST_STEPS:
        raise ValueError(
            f"max_minutes {config.max_minutes:g} holds {max(steps, 0)} steps of {step_s:.2g} s and "
            f"what comes between, a schedule needs {LEAST_STEPS}: raise it, lower tokens_per_step "
            f"{config.tokens_per_step} or eval_steps, or take a smaller model"
        )
    return steps
