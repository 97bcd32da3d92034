"""Supervised fine-tuning on conversations: puts data, model and objective together for the trainer.

The loss counts the assistant's tokens only; everything else, from the loop to the checkpoint, is
pretraining's.
"""

import math
from dataclasses import replace
from functools import partial

from gpt2 import checkpoint
from gpt2.config import FineTuneConfig, SFTConfig
from gpt2.data.sft import ConversationLoader, Conversations, load_conversations
from gpt2.dist import Distributed
from gpt2.tokenizer import Tokenizer
from gpt2.train.launch import launch
from gpt2.train.objectives import LanguageModeling
from gpt2.train.pretrain import make_model
from gpt2.train.trainer import Trainer


def sft(config: SFTConfig) -> None:
    """Fine-tunes config.init_from, or goes on from a checkpoint of the run.

    Raises ValueError and OSError for what cannot be trained, before anything is written.
    """
    launch(config, partial(make_trainer, config))


def make_trainer(config: SFTConfig, group: Distributed) -> Trainer:
    tokenizer = checkpoint.load_tokenizer(config.init_from)
    model, block_size = make_model(config, tokenizer, group.device)
    train_data, val_data, lines = open_conversations(config, tokenizer, block_size)
    if not config.max_steps:
        config = replace(config, max_steps=steps_of(config, train_data))
    trainer = Trainer(config, LanguageModeling(model), train_data, val_data, tokenizer, group)
    if group.is_main:
        print("\n".join(lines))
    return trainer


def open_conversations(
    config: SFTConfig, tokenizer: Tokenizer, block_size: int
) -> tuple[ConversationLoader, ConversationLoader | None, list[str]]:
    """The rows for training and, unless eval_every is 0, for validation; and lines for the log.

    The lines say what the rows hold and how many rows of the data were left out or cut, and why.
    Raises ValueError and OSError as load_conversations does, and for a split without conversations.
    """
    options = dict(
        template=config.template, overlong=config.overlong, bad_rows=config.bad_rows,
        max_conversations=config.max_conversations,
    )  # fmt: skip
    with_val = bool(config.eval_every)
    fraction = config.val_fraction if with_val and not config.val_data else 0.0
    train, val = load_conversations(
        config.data, tokenizer, block_size, val_fraction=fraction, **options
    )
    before = checkpoint.load_chat_template(config.init_from)
    lines = [f"{config.data}: {line}" for line in train.counts.lines()]
    if before not in (None, config.template):
        lines.append(f"template: {config.init_from} knows {before}, this run has {config.template}")
    if with_val and config.val_data:
        val, _ = load_conversations(config.val_data, tokenizer, block_size, **options)
        lines += [f"{config.val_data}: {line}" for line in val.counts.lines()]

    def loader(split: str, conversations: Conversations) -> ConversationLoader:
        if not len(conversations):
            raise ValueError(
                f"none of the {train.counts.used:,} conversations of {config.data} is {split} by "
                f"val_fraction {config.val_fraction}: change it, name a file as val_data, or "
                "switch validation off with eval_every 0"
            )
        rows = ConversationLoader(
            conversations, block_size, config.seed, split == "train", pad=tokenizer.eot,
            chat_template=config.template,
        )  # fmt: skip
        lines.append(f"{split}: {rows.describe()}")
        return rows

    train_rows = loader("train", train)
    return train_rows, loader("val", val) if with_val else None, lines


def steps_of(config: FineTuneConfig, data) -> int:
    """Steps in which every row comes config.epochs times; the last goes on into the next epoch."""
    rows_per_step = max(config.tokens_per_step // data.block_size, 1)
    return math.ceil(config.epochs * data.n_windows / rows_per_step)
