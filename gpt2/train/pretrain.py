"""Pretraining: puts data, model and objective together and hands them to the trainer."""

from functools import partial

import torch

from gpt2 import checkpoint, tokenizer
from gpt2.config import TrainConfig
from gpt2.data import Mixture, TokenLoader
from gpt2.data.split import find_tokenizer, open_split
from gpt2.dist import Distributed
from gpt2.lora import add_lora
from gpt2.model import GPT
from gpt2.train.launch import launch
from gpt2.train.objectives import LanguageModeling
from gpt2.train.trainer import Trainer


def pretrain(config: TrainConfig) -> None:
    """Trains a model from config, from scratch, from other weights, or on from a checkpoint.

    Raises ValueError and OSError for what cannot be trained, before anything is written.
    """
    launch(config, partial(make_trainer, config))


def make_trainer(config: TrainConfig, group: Distributed) -> Trainer:
    data_tokenizer = find_tokenizer(config.data)
    model, block_size = make_model(config, data_tokenizer, group.device)
    share = (group.rank, group.world_size)
    val_data = open_data(config, "val", block_size, share) if config.eval_every else None
    train_data = open_data(config, "train", block_size, share)
    objective = LanguageModeling(model)
    return Trainer(config, objective, train_data, val_data, data_tokenizer, group)


def open_data(
    config: TrainConfig, split: str, block_size: int, share: tuple[int, int] = (0, 1)
) -> TokenLoader | Mixture:
    """The run's loader of a split; see gpt2.data.split.open_split."""
    return open_split(
        config.data, split, block_size, seed=config.seed, doc_mask=config.doc_mask, share=share
    )


def make_model(config: TrainConfig, data_tokenizer: tokenizer.Tokenizer, device) -> tuple[GPT, int]:
    """The model that training starts from, with adapters if config has some; the length of rows.

    Raises ValueError for options that do not go with init_from, a vocabulary that is not the
    tokenizer's, and a block_size beyond the model's context.
    """
    torch.manual_seed(config.seed)
    if config.init_from:
        model = _load_initial(config, data_tokenizer, device)
    else:
        model = GPT(config.model_config(data_tokenizer.vocab_size), config.kernels, device)
    block_size = config.block_size or model.config.block_size
    if block_size > model.config.block_size:
        raise ValueError(
            f"block_size {block_size} is longer than the context of {config.init_from}, "
            f"{model.config.block_size}"
        )
    adapters = getattr(config, "lora", None)
    if adapters is not None:
        add_lora(model, adapters, checkpoint.describe_base(config.init_from, model))
    return model, block_size


def _load_initial(config: TrainConfig, data_tokenizer: tokenizer.Tokenizer, device) -> GPT:
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", "bias"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} comes from init_from {config.init_from!r}: leave it out")
    model = checkpoint.load_model(config.init_from, device, config.kernels)
    if model.config.vocab_size != data_tokenizer.vocab_size:
        raise ValueError(
            f"{config.init_from} has a vocabulary of {model.config.vocab_size}, the tokenizer of "
            f"{config.data} one of {data_tokenizer.vocab_size}: prepare the data with the model's"
        )
    if config.dropout is not None:
        model.set_dropout(config.dropout)
    return model
