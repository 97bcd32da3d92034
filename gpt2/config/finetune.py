"""Options of a fine-tuning run: those of a training run, with other defaults, and a few more."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from gpt2.config.train import TrainConfig
from gpt2.config.words import Schedule


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Options of scripts/sft.py. The model's shape comes from init_from."""

    POSITIONAL = "init_from"  # what a first word on the command line is

    init_from: str = "gpt2"  # the base model: a run, a checkpoint, a Hugging Face folder or name
    # A known data set (alpaca, dolly, tulu2, lima, oasst1, gsm8k), a file or folder of .jsonl,
    # .json or .parquet, compressed or not; or several with commas between.
    data: str = "alpaca"
    val_data: str = ""  # the same for validation; default: see val_fraction
    # Part of data that becomes val, by a hash of the first question; without validation all of data
    # is train.
    val_fraction: float = 0.02
    template: Literal["user_assistant", "alpaca"] = "user_assistant"  # saved with the checkpoint
    packing: bool = True  # several conversations to a row, hidden from each other; else one
    # A conversation longer than a row is left out, cut at the end, or ends the run.
    overlong: Literal["drop", "cut", "error"] = "drop"
    # A row without answer, with a template's marker in its text and the like ends the run, or is
    # left out. What is left out is counted in the log.
    bad_rows: Literal["error", "skip"] = "error"
    max_conversations: int | None = None  # read only so many

    epochs: float = 3.0  # how often each conversation is seen, where max_steps is 0
    max_steps: int = 0  # optimizer steps; 0: as many as epochs need
    tokens_per_step: int = 16384  # rows x block_size over all ranks and micro steps, with filling
    micro_batch_size: int = 8  # rows of block_size tokens in one forward pass on one device
    warmup_steps: int = 0  # steps in which lr rises linearly to its peak
    lr: float = 2e-5  # peak learning rate
    schedule: Schedule = "linear"  # how lr falls after the warmup
    weight_decay: float = 0.0  # AdamW's, on matrices and embeddings
    beta2: float = 0.999  # AdamW's
    eval_every: int = 100  # steps between validations; 0 switches them off
    eval_steps: int = 0  # validation tokens in units of tokens_per_step; 0 takes the whole split
    save_every: int = 0  # steps between checkpoints, besides the one at the end; 0: only that
    run_name: str = "sft"  # everything of the run lies in out_dir/run_name

    def __post_init__(self):
        if self.max_steps == 0:
            # Known when the rows are; then this config is made again with it, and checked whole.
            options = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)}
            TrainConfig(**options | {"max_steps": max(self.warmup_steps, 1)})
        else:
            super().__post_init__()
        if not self.init_from:
            raise ValueError(
                "fine-tuning starts from a model: name a run, a checkpoint, a Hugging Face folder "
                "or name as init_from"
            )
        if self.preset != TrainConfig.preset:
            raise ValueError(
                f"preset {self.preset!r}: the shape comes from init_from: leave it out"
            )
        if self.doc_mask:
            raise ValueError("doc_mask: conversations never see each other: leave it out")
        if self.epochs <= 0:
            raise ValueError(f"epochs must be above 0, got {self.epochs}")
        if not 0.0 <= self.val_fraction < 1.0:
            raise ValueError(f"val_fraction must lie in [0, 1), got {self.val_fraction}")
        if self.val_data and not self.eval_every:
            raise ValueError(f"val_data {self.val_data!r} is for validation, but eval_every is 0")
        if self.max_conversations is not None and self.max_conversations < 1:
            raise ValueError(f"max_conversations must be at least 1, got {self.max_conversations}")
