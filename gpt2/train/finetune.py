"""Fine-tuning: what SFT and DPO put together for the trainer. All else is pretraining's.

SFT trains on conversations, of which only the assistant's tokens count; DPO on pairs of a chosen
and a rejected answer, against the model that it starts from.
"""

import copy
import math
from dataclasses import replace
from functools import partial

from gpt2 import checkpoint
from gpt2.config import DPOConfig, FineTuneConfig
from gpt2.data.preferences import PairLoader, load_pairs
from gpt2.data.sft import ConversationLoader, load_conversations
from gpt2.device import execution
from gpt2.dist import Distributed
from gpt2.tokenizer import Tokenizer
from gpt2.train.objectives import DPO, LanguageModeling
from gpt2.train.pretrain import Parts, launch, make_model

DEFAULT_TEMPLATE = "user_assistant"


def finetune(config: FineTuneConfig) -> None:
    """Trains config.init_from on conversations or pairs, or goes on from a checkpoint of the run.

    Raises ValueError and OSError for what cannot be trained, before anything is written.
    """
    launch(config, finetuning)


def finetuning(config: FineTuneConfig, group: Distributed) -> Parts:
    """What finetune() trains."""
    tokenizer = checkpoint.load_tokenizer(config.init_from)
    config = with_template(config)
    model, length = make_model(config, tokenizer, group.device)
    objective = LanguageModeling(model)
    if isinstance(config, DPOConfig):
        model.set_dropout(0.0)  # see DPOConfig
        # From here the model is the reference: a resumed run loads its weights only later.
        reference = None if config.lora else copy.deepcopy(model)
        objective = DPO(model, reference, beta=config.beta, loss_type=config.loss_type)
    # Where each shape is compiled for itself, or equal sums need equal shapes, none is trimmed.
    compiled = execution(group.device, config.dtype, config.compile).compiled
    trim = not (compiled or config.exact_reduction)
    train_data, val_data, lines = open_rows(config, tokenizer, length, trim=trim)
    config = config.sized(model.config, train_data.block_size, group.world_size)
    if not config.max_steps:  # as many as see every row `epochs` times, the last one perhaps more
        rows_per_step = max(config.tokens_per_step // train_data.block_size, 1)
        steps = math.ceil(config.epochs * train_data.n_windows / rows_per_step)
        config = replace(config, max_steps=steps)
    return Parts(config, objective, train_data, val_data, tokenizer, lines)


def with_template(config: FineTuneConfig) -> FineTuneConfig:
    """config with the template that is meant: its own, else that of init_from."""
    saved = checkpoint.load_chat_template(config.init_from)
    return replace(config, template=config.template or saved or DEFAULT_TEMPLATE)


def open_rows(
    config: FineTuneConfig, tokenizer: Tokenizer, length: int, *, trim: bool = True
) -> tuple[ConversationLoader, ConversationLoader | None, list[str]]:
    """The rows for training and, unless eval_every is 0, for validation; and lines for the log.

    length: positions of a row, of a pair's half; trim: see PairLoader. The lines say how many of
    the data's rows were left out or cut, and why. Raises ValueError and OSError as
    load_conversations does.
    """
    if isinstance(config, DPOConfig):
        load, limit, make = load_pairs, config.max_pairs, partial(PairLoader, trim=trim)
    else:
        load, limit, make = load_conversations, config.max_conversations, ConversationLoader
    load = partial(
        load, tokenizer=tokenizer, block_size=length, template=config.template, limit=limit,
        overlong=config.overlong, bad_rows=config.bad_rows,
    )  # fmt: skip
    make = partial(make, seed=config.seed, pad=tokenizer.eot, chat_template=config.template)
    split = bool(config.eval_every) and not config.val_data
    train, val = load(config.data, val_fraction=config.val_fraction if split else 0.0)
    lines = train.log()
    saved = checkpoint.load_chat_template(config.init_from)
    if saved != config.template:
        lines.append(f"template {config.template}; {config.init_from} was trained with {saved}")
    if config.val_data:
        val, _ = load(config.val_data)
        lines += val.log()
    train_rows = make(train, length)
    lines.append(f"train: {train_rows.describe()}")
    if split and not config.val_fraction:
        lines.append(f"val_fraction 0 leaves none of {config.data}, so nothing is validated")
    if not config.eval_every or not len(val):
        return train_rows, None, lines
    val_rows = make(val, length, shuffle=False)
    return train_rows, val_rows, [*lines, f"val: {val_rows.describe()}"]
