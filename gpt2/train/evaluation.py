"""What a trainer measures between two steps: validation loss, HellaSwag, and a sample of text.

Each is called by all ranks, at a step whose checkpoint is written or being written, and gives up
where a rank has had a signal.
"""

import time
from functools import partial

import torch
from torch import Tensor

from gpt2.config import IGNORE_INDEX
from gpt2.dist import Distributed
from gpt2.evals.files import find_file
from gpt2.evals.hellaswag import Example, hellaswag_accuracy, read_hellaswag
from gpt2.generate import generate
from gpt2.tokenizer import Tokenizer

EVAL_DATA = "data/eval"  # the folder of HellaSwag's file
SHOWN = 2  # of an objective's metrics on the terminal; the others are only logged


@torch.no_grad()
def mean_losses(trainer) -> dict[str, float] | None:
    """Validation over eval_steps * tokens_per_step tokens, spread over all ranks, each once.

    Returns the mean loss as "loss", and the objective's metrics; None where a signal came.
    """
    config, group, objective = trainer.config, trainer.group, trainer.objective
    n_rows = trainer.val_data.n_windows
    if config.eval_steps:
        n_rows = min(n_rows, config.eval_steps * trainer.rows_per_step)
    rows = config.micro_batch_size * group.world_size
    sums: dict[str, Tensor] = {}
    objective.eval()
    try:
        for i in range(-(-n_rows // rows)):
            if trainer.is_stop_asked():
                return None
            parts = trainer.val_feed.batch(i, rows, group.rank, group.world_size)
            # The last batch is filled up with rows that do not count: all have one shape.
            first = i * rows + group.rank * config.micro_batch_size
            parts[trainer.names.index("targets")][max(n_rows - first, 0) :] = IGNORE_INDEX
            batch = trainer.name(parts)
            with trainer.execution.autocast():
                loss_sum, metrics = trainer.layout.eval_forward(batch)
            found = {"loss": loss_sum, **metrics, "units": objective.count(batch)}
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.double()
    finally:
        objective.train()
    *values, units = group.sum(torch.stack(list(sums.values()))).tolist()
    return {name: value / units for name, value in zip(sums, values, strict=False)}


def validate(trainer) -> bool:
    """Logs mean_losses; whether it came to its end."""
    started, step, metrics = time.perf_counter(), trainer.step, trainer.metrics
    found = mean_losses(trainer)
    if found is not None and metrics is not None and not metrics.logged(step, "val/loss"):
        metrics.log(step, {f"val/{name}": value for name, value in found.items()})
        shown = [name for name in found if name != "loss"][:SHOWN]
        text = "".join(f"  {name} {found[name]:.4f}" for name in shown)
        _say(trainer, f"val loss {found['loss']:.4f}{text}", started)
    return found is not None


def load_hellaswag(
    tokenizer: Tokenizer, block_size: int, group: Distributed
) -> list[Example]:
    """The examples that are to be asked, on all ranks; the first downloads them if need be.

    Raises OSError where they cannot be had, ValueError where the model cannot read them.
    """
    if group.is_main:
        find_file("hellaswag", EVAL_DATA)
    group.barrier()
    path = find_file("hellaswag", EVAL_DATA)
    return read_hellaswag(path, tokenizer, block_size)


def ask_hellaswag(trainer) -> bool:
    """Logs HellaSwag's acc_norm and acc (gpt2.evals.hellaswag); whether it came to its end."""
    started, step, metrics = time.perf_counter(), trainer.step, trainer.metrics
    found = trainer.layout.call_model(
        partial(
            hellaswag_accuracy,
            trainer.model,
            trainer.hellaswag,
            trainer.group,
            autocast=trainer.execution.autocast,
            poll=trainer.is_stop_asked,
        )
    )
    if found is not None and metrics is not None and not metrics.logged(step, "eval/hellaswag"):
        values = {"": found["acc_norm"], "_acc": found["acc"], "_examples": found["examples"]}
        metrics.log(step, {f"eval/hellaswag{name}": value for name, value in values.items()})
        text = f"HellaSwag {found['acc_norm']:.2%} acc_norm, {found['acc']:.2%} acc"
        _say(trainer, f"{text} of {found['examples']:,}", started)
    return found is not None


def sample(trainer) -> None:
    """Prints and logs how a text goes on from its start, at most 100 tokens."""
    tokenizer, model = trainer.tokenizer, trainer.model
    prompt = [tokenizer.eot or 0]  # characters have no end of text, nor all of them a newline
    room = model.config.block_size - len(prompt)
    tokens = trainer.layout.call_model(
        partial(
            generate, model, [prompt], max_new_tokens=min(room, 100), temperature=0.8, top_k=50,
            seed=0,
        )
    )  # fmt: skip
    if trainer.metrics is not None:
        text = tokenizer.decode(tokens[0])
        trainer.metrics.say(f"sample: {text!r}")
        if not trainer.metrics.logged(trainer.step, "sample"):
            trainer.metrics.log(trainer.step, {"sample": text})


def _say(trainer, text: str, started: float) -> None:
    seconds = time.perf_counter() - started
    place = f"step {trainer.step:>6}/{trainer.config.max_steps}"
    trainer.metrics.say(f"{place}  {text}  ({seconds:.1f} s)")
