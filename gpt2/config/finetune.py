"""Options of fine-tuning runs: those of a training run, with other defaults, and a few more."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from gpt2.config.lora import LoRAOptions
from gpt2.config.train import TrainConfig
from gpt2.config.words import Schedule


@dataclass(frozen=True)
class FineTuneConfig(LoRAOptions, TrainConfig):
    """What SFT and DPO have in common. The model's shape comes from init_from."""

    POSITIONAL = "init_from"  # what a first word on the command line is

    init_from: str = "gpt2"  # the start: a run, a checkpoint, a Hugging Face folder or name
    val_data: str = ""  # as data, for validation; default: see val_fraction
    # Part of data that becomes val, by a hash of the first question; without validation all of data
    # is train.
    val_fraction: float = 0.02
    # A row without answer, with a template's marker in its text and the like ends the run, or is
    # left out. What is left out is counted in the log.
    bad_rows: Literal["error", "skip"] = "error"

    epochs: float = 3.0  # how often each row is seen, where max_steps is 0
    max_steps: int = 0  # optimizer steps; 0: as many as epochs need
    warmup_steps: int = 0  # steps in which lr rises linearly to its peak
    schedule: Schedule = "linear"  # how lr falls after the warmup
    weight_decay: float = 0.0  # AdamW's, on matrices and embeddings
    beta2: float = 0.999  # AdamW's
    eval_every: int = 100  # steps between validations; 0 switches them off
    eval_steps: int = 0  # validation tokens in units of tokens_per_step; 0 takes the whole split
    save_every: int = 0  # steps between checkpoints, besides the one at the end; 0: only that

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
        self.check_lora()


@dataclass(frozen=True)
class SFTConfig(FineTuneConfig):
    """Options of scripts/sft.py."""

    # A known data set (alpaca, dolly, tulu2, lima, oasst1, gsm8k), a file or folder of .jsonl,
    # .json or .parquet, compressed or not; or several with commas between.
    data: str = "alpaca"
    template: Literal["user_assistant", "alpaca"] = "user_assistant"  # saved with the checkpoint
    packing: bool = True  # several conversations to a row, hidden from each other; else one
    # A conversation longer than a row is left out, cut at the end, or ends the run.
    overlong: Literal["drop", "cut", "error"] = "drop"
    max_conversations: int | None = None  # read only so many

    tokens_per_step: int = 16384  # rows x block_size over all ranks and micro steps, with filling
    micro_batch_size: int = 8  # rows of block_size tokens in one forward pass on one device
    lr: float = 2e-5  # peak learning rate; with adapters 1e-4 to 5e-4 is usual
    run_name: str = "sft"  # everything of the run lies in out_dir/run_name

    def __post_init__(self):
        super().__post_init__()
        if self.max_conversations is not None and self.max_conversations < 1:
            raise ValueError(f"max_conversations must be at least 1, got {self.max_conversations}")


@dataclass(frozen=True)
class DPOConfig(FineTuneConfig):
    """Options of scripts/dpo.py. init_from is also the reference, which stays as it is."""

    # A file or folder of .jsonl, .json or .parquet, compressed or not, or several with commas
    # between; rows hold prompt, chosen, rejected, or what else gpt2.data.preferences knows.
    data: str = "preferences.jsonl"
    # How questions and answers are written; default: as saved with init_from, else user_assistant.
    template: Literal["", "user_assistant", "alpaca"] = ""
    # A pair with a half longer than block_size is left out, loses the start of its prompt, or ends
    # the run.
    overlong: Literal["drop", "cut", "error"] = "drop"
    max_pairs: int | None = None  # read only so many

    beta: float = 0.1  # how strongly the model is held to the reference; higher: closer to it
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO's own, or the squared one of IPO
    label_smoothing: float = 0.0  # sigmoid only: the probability that a label is wrong, below 0.5
    length_normalised: bool = False  # log probabilities a token, not an answer; ipo: always
    # The reference's log probabilities of all pairs once, before step 0, and not in each step:
    # worth it above one epoch, and where no second model fits.
    precompute_reference: bool = False

    epochs: float = 1.0  # how often each pair is seen, where max_steps is 0
    tokens_per_step: int = 65536  # pairs x 2 x block_size over all ranks and micro steps
    micro_batch_size: int = 4  # pairs in one forward pass on one device
    lr: float = 1e-6  # peak learning rate; with adapters 1e-5 to 1e-4 is usual
    run_name: str = "dpo"  # everything of the run lies in out_dir/run_name

    def __post_init__(self):
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}: at 0.5 the "
                "labels say nothing"
            )
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing goes with loss_type sigmoid, not {self.loss_type}")
        if self.dropout:
            raise ValueError(
                f"dropout {self.dropout}: DPO compares log probabilities of two models, which "
                "dropout would blur: leave it out (lora_dropout may be used)"
            )
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ValueError(f"max_pairs must be at least 1, got {self.max_pairs}")
