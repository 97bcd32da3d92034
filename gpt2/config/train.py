"""Options of a training run."""

import dataclasses
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from gpt2.config.model import PRESETS, GPTConfig
from gpt2.config.words import Kernels, Schedule, Switch, nearest_multiples, suggest


@dataclass(frozen=True)
class DataSource:
    """One folder of a mixture. See gpt2.data.mixture."""

    path: str
    weight: Fraction = Fraction(1)  # its part of the samples, against the other weights
    from_step: int = 0  # the weights of a step are those with the largest from_step up to it


_SOURCE = re.compile(r"(?P<path>[^,]+?):(?P<weight>\d+(\.\d+|/\d+)?)(@(?P<from_step>\d+))?")


def data_sources(data: str) -> tuple[DataSource, ...]:
    """What TrainConfig.data names: one folder, or a mixture in the order written.

    Raises ValueError for a mixture that says too little or too much.
    """
    parts = [part.strip() for part in data.split(",")]
    found = [_SOURCE.fullmatch(part) for part in parts]
    if not any(found):
        return (DataSource(data),)
    sources = []
    for part, match in zip(parts, found, strict=True):
        if not match:
            raise ValueError(f"data: {part!r} in {data!r} needs a weight, as in {part}:0.5")
        try:
            weight = Fraction(match["weight"])
        except ZeroDivisionError:
            weight = Fraction(0)
        if weight <= 0:
            raise ValueError(f"data: the weight of {match['path']!r} must be above 0: leave it out")
        sources.append(DataSource(match["path"], weight, int(match["from_step"] or 0)))
    if len({(s.path, s.from_step) for s in sources}) < len(sources):
        raise ValueError(f"data: a folder stands twice at the same step in {data!r}")
    if min(s.from_step for s in sources) > 0:
        raise ValueError(f"data: {data!r} has no weights for step 0")
    return tuple(sources)


def spell_sources(entries: list, source: str) -> str:
    """A YAML list of {path, weight, from_step} as one line for TrainConfig.data."""
    words = []
    for entry in entries:
        if not isinstance(entry, dict) or not {"path", "weight"} <= entry.keys():
            raise ValueError(f"{source}: needs a list of {{path, weight}}, got {entry!r}")
        for key in entry.keys() - {"path", "weight", "from_step"}:
            known = ["path", "weight", "from_step"]
            raise ValueError(f"{source}: unknown key {key!r}: {suggest(str(key), known)}")
        path, weight, step = entry["path"], entry["weight"], entry.get("from_step", 0)
        word = f"{path}:{weight}" + (f"@{step}" if step else "")
        match = _SOURCE.fullmatch(word)
        if not match or match["path"] != path or isinstance(weight, bool):
            raise ValueError(
                f"{source}: {entry!r}: path must be a folder without comma, weight a number such "
                "as 0.25, 3 or 1/3, from_step a whole number"
            )
        words.append(word)
    if not words:
        raise ValueError(f"{source}: the list of folders is empty")
    return ",".join(words)


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. The defaults are the 124M recipe on 10B tokens of FineWeb."""

    preset: str = "gpt2"  # model shape: gpt2[-medium|-large|-xl], tinystories-*, tinytiny, char
    init_from: str = ""  # start from these weights: a checkpoint, a Hugging Face folder or name
    # Folder with train and val shards, or several as folder:weight,folder:weight; a weight may hold
    # from a step on, folder:weight@step. In YAML also a list of {path, weight, from_step}.
    data: str = "data/fineweb10B"
    doc_mask: bool = False  # attention sees only the document that a token is in

    n_layer: int | None = None  # default: the preset's
    n_head: int | None = None  # default: the preset's
    n_embd: int | None = None  # default: the preset's
    block_size: int | None = None  # tokens in a training row; default: the preset's
    vocab_size: int | None = None  # default: that of the data's tokenizer
    dropout: float | None = None  # default: the preset's, 0
    bias: bool | None = None  # default: the preset's

    tokens_per_step: int = 524288  # over all ranks and micro steps
    # Rows of block_size tokens in one forward pass on one device; auto: the most that fit.
    micro_batch_size: int | Literal["auto"] = 32
    max_steps: int = 19073  # optimizer steps
    warmup_steps: int = 700  # steps in which lr rises linearly to its peak
    lr: float = 6e-4  # peak learning rate
    min_lr: float = 0.0  # learning rate at max_steps
    schedule: Schedule = "cosine"  # how lr falls after the warmup
    decay_fraction: float = 0.2  # wsd only: the part of max_steps in which lr falls
    weight_decay: float = 0.1  # AdamW's, on matrices and embeddings
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.95  # AdamW's
    grad_clip: float = 1.0  # largest global gradient norm; 0 switches clipping off

    eval_every: int = 250  # steps between validations; 0 switches them off
    eval_steps: int = 20  # validation tokens in units of tokens_per_step; 0 takes the whole split
    # Steps between HellaSwag evaluations; 0 switches them off. examples: ask only so many, evenly
    # spaced (0: all 10,042). Its file lies in eval_data, or is downloaded there.
    hellaswag_every: int = 0
    hellaswag_examples: int = 0
    eval_data: str = "data/eval"
    sample_every: int = 0  # steps between samples of text; 0 switches them off
    save_every: int = 1000  # steps between checkpoints, besides the one at the end; 0: only that
    keep_last: int = 2  # checkpoints that stay; 0 keeps all
    keep_every: int = 0  # steps; checkpoints at multiples of it stay as well; 0: none
    on_save_error: Literal["continue", "stop"] = "continue"  # where a checkpoint cannot be written
    log_every: int = 10  # steps between log lines

    # A step whose loss or gradient is not finite, or spikes: skip it; or go back to the weights in
    # memory of some steps before and skip the data since; or save and stop.
    guard: Literal["skip", "rollback", "stop"] = "skip"
    spike_z: float = 8.0  # standard deviations above the last 128 steps' mean; 0: no spikes
    snapshot_every: int = 50  # steps between the copies in memory that rollback goes back to
    # The same bits for 1, 2, 4 ... ranks, at the same micro_batch_size; see gpt2.train.exact.
    exact_reduction: bool = False

    # What several ranks share out, instead of each having all of it: nothing (DDP); optimizer:
    # AdamW's moments (ZeRO-1); full: weights and gradients too (FSDP2). See gpt2.train.parallel.
    sharding: Literal["none", "optimizer", "full"] = "none"
    # Keep only the inputs of each block, and compute the rest again in the backward pass: less
    # memory, about a third more arithmetic.
    activation_checkpointing: bool = False

    seed: int = 1337  # of weights, data order and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls; weights stay float32
    compile: Switch = "auto"  # torch.compile; auto: on for CUDA
    kernels: Kernels = "auto"  # triton, torch; auto: triton where it runs
    timeout_s: float = 600.0  # how long ranks wait for one that does not answer, seconds
    # Shards' content against their manifest's hashes: open, all before step 0; background, in a
    # thread while training goes on.
    verify: Literal["off", "background", "open"] = "background"
    loader: Literal["auto", "cpp", "numpy"] = "auto"  # token loader; auto: cpp where it was built

    run_name: str = "gpt2"  # everything of the run lies in out_dir/run_name
    out_dir: str = "runs"  # folder of all runs
    resume: str = "never"  # never, auto (newest checkpoint of this run, if any), or a checkpoint
    wandb_project: str = ""  # log to Weights & Biases too, under this project
    gpu_hour_price: float = 0.0  # what an hour of one GPU costs, for the report; 0: not known

    def __post_init__(self):
        data_sources(self.data)
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}: {suggest(self.preset, PRESETS)}")
        positive = (
            "tokens_per_step", "micro_batch_size", "max_steps", "log_every", "lr",
            "snapshot_every", "timeout_s",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value != "auto" and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        not_negative = (
            "warmup_steps", "min_lr", "weight_decay", "grad_clip", "eval_every", "eval_steps",
            "hellaswag_every", "hellaswag_examples", "sample_every", "save_every", "keep_last",
            "keep_every", "seed", "spike_z", "gpu_hour_price",
        )  # fmt: skip
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} must not be above lr {self.lr}")
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must not be above max_steps {self.max_steps}"
            )
        if not 0.0 < self.decay_fraction <= 1.0:
            raise ValueError(f"decay_fraction must lie in (0, 1], got {self.decay_fraction}")
        if self.exact_reduction and self.sharding != "none":
            raise ValueError(
                f"exact_reduction adds up whole gradients itself, so it needs sharding none, not "
                f"{self.sharding}"
            )
        if not self.run_name or Path(self.run_name).name != self.run_name:
            raise ValueError(f"run_name must be a plain folder name, got {self.run_name!r}")

    def model_config(self, vocab_size: int | None = None) -> GPTConfig:
        """The preset's shape with this run's departures; vocab_size: the data's tokenizer's."""
        preset = PRESETS[self.preset]
        changes = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(GPTConfig)
            if getattr(self, field.name) is not None
        }
        if vocab_size is not None:
            if changes.setdefault("vocab_size", vocab_size) < vocab_size:
                raise ValueError(
                    f"vocab_size {self.vocab_size} is smaller than the {vocab_size} entries of the "
                    "data's tokenizer: leave it out"
                )
        return dataclasses.replace(preset, **changes)

    def grad_accum_steps(self, block_size: int, world_size: int) -> int:
        """Micro steps that make up one step, once micro_batch_size is a number.

        Raises ValueError with the nearest valid numbers.
        """
        per_micro_step = self.micro_batch_size * block_size * world_size
        if self.tokens_per_step % per_micro_step:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} does not divide into micro steps of "
                f"{per_micro_step} tokens (micro_batch_size {self.micro_batch_size} x block_size "
                f"{block_size} x {world_size} ranks); the nearest valid tokens_per_step are "
                f"{nearest_multiples(self.tokens_per_step, per_micro_step)}"
            )
        return self.tokens_per_step // per_micro_step
