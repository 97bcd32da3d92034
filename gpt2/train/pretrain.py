"""Pretraining: puts data, model and objective together and hands them to the trainer."""

from functools import partial
from pathlib import Path

import torch

from gpt2 import checkpoint, tokenizer
from gpt2.config import TrainConfig, data_sources
from gpt2.data import Mixture, TokenLoader, find_shards, read_manifest
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


def find_tokenizer(data: str) -> tokenizer.Tokenizer:
    """The tokenizer of the data that a config names; GPT-2's where no manifest says.

    Raises ValueError where the folders of a mixture differ in it, and for a damaged manifest.
    """
    found = {}
    for source in data_sources(data):
        manifest = read_manifest(source.path)
        found[source.path] = manifest["tokenizer"] if manifest else {"name": "gpt2"}
    first, description = next(iter(found.items()))
    for path, other in found.items():
        if other != description:
            names = [d.get("name") if isinstance(d, dict) else d for d in (description, other)]
            which = " and ".join(names) if names[0] != names[1] else f"{names[0]}, but another one"
            raise ValueError(
                f"{first} and {path} were made with different tokenizers ({which}): the folders of "
                "a mixture need the same; prepare one of them again"
            )
    try:
        return tokenizer.from_dict(description)
    except ValueError as error:
        raise ValueError(f"{Path(first) / 'manifest.json'}: {error}") from error


def open_data(
    config: TrainConfig, split: str, block_size: int, share: tuple[int, int] = (0, 1)
) -> TokenLoader | Mixture:
    """The loader of a split ("train" or "val"): shuffled for training, in order for validation.

    Validation keeps the first weights of a mixture, so that its losses can be compared.
    share: (rank, world size), by which the checking of hashes is divided.
    Raises as TokenLoader does.
    """
    sources = data_sources(config.data)
    if split == "val":
        sources = tuple(s for s in sources if s.from_step == 0)
    data_tokenizer = find_tokenizer(config.data)
    loaders = {
        path: TokenLoader(
            find_shards(path, split), block_size, config.seed, split == "train",
            vocab_size=data_tokenizer.vocab_size, eot=data_tokenizer.eot,
            doc_mask=config.doc_mask, verify="background", verify_share=share,
        )
        for path in dict.fromkeys(s.path for s in sources)
    }  # fmt: skip
    return Mixture(sources, loaders) if len(sources) > 1 else next(iter(loaders.values()))


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
    if model.n_tokens != data_tokenizer.vocab_size:
        raise ValueError(
            f"{config.init_from} has a vocabulary of {model.n_tokens}, the tokenizer of "
            f"{config.data} one of {data_tokenizer.vocab_size}: prepare the data with the model's"
        )
    if config.dropout is not None:
        model.set_dropout(config.dropout)
    return model
