"""Fine-tuning: what SFT and DPO put together for the trainer. All else is pretraining's.

SFT trains on conversations, of which only the assistant's tokens count; DPO on pairs of a chosen
and a rejected answer, against the model that it starts from.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from gpt2 import checkpoint
from gpt2.config import DPOConfig, FineTuneConfig, SFTConfig
from gpt2.data.preferences import PairLoader, load_pairs
from gpt2.data.rows import RowLoader
from gpt2.data.sft import ConversationLoader, load_conversations
from gpt2.device import execution
from gpt2.dist import Distributed
from gpt2.tokenizer import Tokenizer
from gpt2.train.objectives import DPO, LanguageModeling
from gpt2.train.pretrain import Parts, launch, make_model

DEFAULT_TEMPLATE = "user_assistant"
Rows = tuple[RowLoader, RowLoader | None, list[str]]


def sft(config: SFTConfig) -> None:
    """Fine-tunes config.init_from on conversations, or goes on from a checkpoint of the run.

    Raises ValueError and OSError for what cannot be trained, before anything is written.
    """
    launch(config, conversations)


def dpo(config: DPOConfig) -> None:
    """Trains config.init_from on preference pairs, or goes on from a checkpoint of the run.

    Raises ValueError and OSError for what cannot be trained, before anything is written.
    """
    launch(config, pairs)


def conversations(config: SFTConfig, group: Distributed) -> Parts:
    """What sft() trains."""
    tokenizer = checkpoint.load_tokenizer(config.init_from)
    model, block_size = make_model(config, tokenizer, group.device)
    train_data, val_data, lines = open_conversations(config, tokenizer, block_size)
    config = with_steps(config, train_data)
    return Parts(config, LanguageModeling(model), train_data, val_data, tokenizer, lines)


def pairs(config: DPOConfig, group: Distributed) -> Parts:
    """What dpo() trains."""
    tokenizer = checkpoint.load_tokenizer(config.init_from)
    config = with_template(config)
    model, length = make_model(config, tokenizer, group.device)
    model.set_dropout(0.0)  # see DPOConfig
    # Where each shape is compiled for itself, or equal sums need equal shapes, none is trimmed.
    compiled = execution(group.device, config.dtype, config.compile).compiled
    trim = not (compiled or config.exact_reduction)
    train_data, val_data, lines = open_pairs(config, tokenizer, length, trim=trim)
    # From here the model is the reference: a resumed run loads its weights only later.
    reference = None if config.lora else copy.deepcopy(model)
    objective = DPO(model, reference, beta=config.beta, loss_type=config.loss_type)
    config = with_steps(config, train_data)
    return Parts(config, objective, train_data, val_data, tokenizer, lines)


def with_template(config: DPOConfig) -> DPOConfig:
    """config with the template that is meant: its own, else that of init_from."""
    saved = checkpoint.load_chat_template(config.init_from)
    return replace(config, template=config.template or saved or DEFAULT_TEMPLATE)


def with_steps(config: FineTuneConfig, data: RowLoader) -> FineTuneConfig:
    """config with as many steps as see every row `epochs` times, unless it names them; the last
    step goes on into the next epoch."""
    rows_per_step = max(config.tokens_per_step // data.block_size, 1)
    steps = math.ceil(config.epochs * data.n_windows / rows_per_step)
    return config if config.max_steps else replace(config, max_steps=steps)


def open_conversations(config: SFTConfig, tokenizer: Tokenizer, block_size: int) -> Rows:
    """The rows for training and, unless eval_every is 0, for validation; and lines for the log."""
    load = partial(load_conversations, limit=config.max_conversations)
    return _open_rows(config, tokenizer, block_size, load, ConversationLoader)


def open_pairs(config: DPOConfig, tokenizer: Tokenizer, length: int, *, trim: bool = True) -> Rows:
    """As open_conversations, of pairs. length: positions of a half; trim: see PairLoader."""
    load = partial(load_pairs, limit=config.max_pairs)
    return _open_rows(config, tokenizer, length, load, partial(PairLoader, trim=trim))


def _open_rows(
    config: FineTuneConfig, tokenizer: Tokenizer, length: int, load: Callable, make: Callable
) -> Rows:
    """Rows of config.data and val_data; the lines say how many of the data's rows were left out or
    cut, and why. Raises ValueError and OSError as load does, and for validation without rows."""
    load = partial(
        load, tokenizer=tokenizer, block_size=length, template=config.template,
        overlong=config.overlong, bad_rows=config.bad_rows,
    )  # fmt: skip
    make = partial(make, seed=config.seed, pad=tokenizer.eot, chat_template=config.template)
    split = bool(config.eval_every) and not config.val_data
    if split and not config.val_fraction:
        raise ValueError(
            f"val_fraction 0 leaves none of {config.data} for validation: raise it, name a file as "
            "val_data, or switch validation off with eval_every 0"
        )
    train, val = load(config.data, val_fraction=config.val_fraction if split else 0.0)
    lines = [f"{config.data}: {line}" for line in train.counts.lines()]
    saved = checkpoint.load_chat_template(config.init_from)
    if saved != config.template:
        lines.append(f"template {config.template}; {config.init_from} was trained with {saved}")
    if config.val_data:
        val, _ = load(config.val_data)
        lines += [f"{config.val_data}: {line}" for line in val.counts.lines()]
    train_rows = make(train, length)
    lines.append(f"train: {train_rows.describe()}")
    if not config.eval_every:
        return train_rows, None, lines
    val_rows = make(val, length, shuffle=False)
    return train_rows, val_rows, [*lines, f"val: {val_rows.describe()}"]
