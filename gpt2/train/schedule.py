"""What follows from the number of a step alone: the learning rate, and what is due.

The loop, the pre-flight and verify_run all ask here, so they cannot disagree.
"""

import math
from dataclasses import dataclass

from gpt2.config import TrainConfig

WSD_DECAY = 0.2  # the part of max_steps in which wsd decays


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Rises linearly to lr over warmup_steps, then by schedule:
        cosine, linear   fall from lr to min_lr at max_steps
        constant         stays at lr
        wsd              stays at lr, then falls linearly over the last fifth of max_steps
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, round(config.max_steps * (1 - WSD_DECAY)))
    progress = min(max(step - start, 0) / max(config.max_steps - start, 1), 1.0)
    share = (
        0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    )
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

    def n_saves(self, first_step: int) -> int:
        """How many checkpoints a run writes that starts from first_step."""
        return sum(self.save(step) for step in range(first_step + 1, self.config.max_steps + 1))

    def snapshot(self, step: int) -> bool:
        """For guard rollback; the first step of a launch takes one besides."""
        return step % self.config.snapshot_every == 0

    def _every(self, step: int, every: int, *, at_end: bool = False) -> bool:
        if every == 0 or step == 0:
            return False
        return step % every == 0 or at_end and step == self.config.max_steps
