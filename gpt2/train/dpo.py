"""DPO: puts preference pairs, model, reference and objective together for the trainer."""

import copy
from dataclasses import replace
from functools import partial

import torch

from gpt2 import checkpoint
from gpt2.config import DPOConfig
from gpt2.data.preferences import PairLoader, load_pairs
from gpt2.data.sft import Conversations
from gpt2.dist import Distributed
from gpt2.tokenizer import Tokenizer
from gpt2.train.launch import launch
from gpt2.train.objectives import DPO
from gpt2.train.pretrain import make_model
from gpt2.train.sft import steps_of
from gpt2.train.trainer import Trainer


def dpo(config: DPOConfig) -> None:
    """Trains config.init_from on preference pairs, or goes on from a checkpoint of the run.

    Raises ValueError and OSError for what cannot be trained, before anything is written.
    """
    launch(config, partial(make_trainer, config))


def make_trainer(config: DPOConfig, group: Distributed) -> Trainer:
    tokenizer = checkpoint.load_tokenizer(config.init_from)
    saved, config = checkpoint.load_chat_template(config.init_from), with_template(config)
    model, length = make_model(config, tokenizer, group.device)
    model.set_dropout(0.0)  # see DPOConfig
    train_data, val_data, lines = open_pairs(config, tokenizer, length, trim=_may_trim(config))
    if saved is None:
        lines.insert(0, f"{config.init_from} has no chat template: {config.template} is used")
    elif saved != config.template:
        lines.insert(0, f"{config.init_from} was trained with {saved}, not {config.template}")
    if not config.max_steps:
        config = replace(config, max_steps=steps_of(config, train_data))
    # From here the model is the reference: a resumed run loads its weights only later.
    objective = DPO(
        model,
        None if config.lora else copy.deepcopy(model),
        beta=config.beta,
        loss_type=config.loss_type,
    )
    trainer = Trainer(config, objective, train_data, val_data, tokenizer, group)
    if group.is_main:
        print("\n".join(lines))
    return trainer


def with_template(config: DPOConfig) -> DPOConfig:
    """config with the template that is meant: its own, else that of init_from."""
    saved = checkpoint.load_chat_template(config.init_from)
    return replace(config, template=config.template or saved or "user_assistant")


def _may_trim(config: DPOConfig) -> bool:
    """Whether batches may differ in length: not where each shape is compiled for itself, nor where
    sums are to be equal to the bit."""
    compiled = config.compile == "on" or config.compile == "auto" and torch.cuda.is_available()
    return not (compiled or config.exact_reduction)


def open_pairs(
    config: DPOConfig, tokenizer: Tokenizer, length: int, *, trim: bool = True
) -> tuple[PairLoader, PairLoader | None, list[str]]:
    """The pairs for training and, unless eval_every is 0, for validation; and lines for the log.

    length: positions of a half. The lines say what became of the rows of the data.
    Raises ValueError and OSError as load_pairs does, and for a split without pairs.
    """
    options = dict(
        template=config.template, overlong=config.overlong, bad_rows=config.bad_rows,
        max_pairs=config.max_pairs,
    )  # fmt: skip
    with_val = bool(config.eval_every)
    fraction = config.val_fraction if with_val and not config.val_data else 0.0
    train, val = load_pairs(config.data, tokenizer, length, val_fraction=fraction, **options)
    lines = [f"{config.data}: {line}" for line in train.counts.lines("pairs")]
    if with_val and config.val_data:
        val, _ = load_pairs(config.val_data, tokenizer, length, **options)
        lines += [f"{config.val_data}: {line}" for line in val.counts.lines("pairs")]

    def loader(split: str, pairs: Conversations) -> PairLoader:
        if not len(pairs):
            raise ValueError(
                f"none of the {train.counts.used:,} pairs of {config.data} is {split} by "
                f"val_fraction {config.val_fraction}: change it, name a file as val_data, or "
                "switch validation off with eval_every 0"
            )
        rows = PairLoader(
            pairs, length, config.seed, split == "train", pad=tokenizer.eot, trim=trim,
            chat_template=config.template,
        )  # fmt: skip
        lines.append(f"{split}: {rows.describe()}")
        return rows

    train_rows = loader("train", train)
    return train_rows, loader("val", val) if with_val else None, lines
