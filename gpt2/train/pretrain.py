"""Pretraining: puts data, model and objective together and hands them to the trainer."""

from dataclasses import asdict
from pathlib import Path

import torch

from gpt2 import checkpoint, tokenizer
from gpt2.config import TrainConfig
from gpt2.data import TokenLoader, find_shards, read_manifest
from gpt2.model import GPT
from gpt2.train import distributed
from gpt2.train.objectives import LanguageModeling
from gpt2.train.trainer import Trainer


def pretrain(config: TrainConfig) -> None:
    """Trains a model from config, from scratch, from other weights, or on from a checkpoint.

    Raises ValueError and OSError for what cannot be trained, before anything is written.
    """
    group = distributed.start(config.device)
    resumed = _find_checkpoint(config)
    manifest = read_manifest(config.data)
    data_tokenizer = tokenizer.from_dict(manifest["tokenizer"] if manifest else {"name": "gpt2"})
    torch.manual_seed(config.seed)
    model = _make_model(config, data_tokenizer, group.device)
    block_size = config.block_size or model.config.block_size
    if block_size > model.config.block_size:
        raise ValueError(
            f"block_size {block_size} is longer than the context of {config.init_from}, "
            f"{model.config.block_size}"
        )

    def load(split: str) -> TokenLoader:
        return TokenLoader(
            find_shards(config.data, split), block_size, config.seed, split == "train",
            vocab_size=data_tokenizer.vocab_size, backend=config.loader,
        )  # fmt: skip

    val_data = load("val") if config.eval_every else None
    objective = LanguageModeling(model)
    trainer = Trainer(config, objective, load("train"), val_data, data_tokenizer, group)
    if resumed is not None:
        trainer.resume(resumed)
        if group.is_main:
            _show_changes(config, resumed)
    trainer.run()
    # Only here: a rank that failed must end at once, not wait for the others to end too.
    distributed.stop(group)


def _make_model(config: TrainConfig, data_tokenizer: tokenizer.Tokenizer, device) -> GPT:
    if not config.init_from:
        return GPT(config.model_config(data_tokenizer.vocab_size), config.kernels, device)
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


def _find_checkpoint(config: TrainConfig) -> checkpoint.Checkpoint | None:
    """What config.resume names. Refuses to write over a run that is not to be continued."""
    run = Path(config.out_dir) / config.run_name
    if config.resume == "never":
        if (run / "metrics.jsonl").exists():
            raise ValueError(
                f"{run} holds a run already: continue it with --resume auto, or choose another "
                "run_name"
            )
        return None
    if config.resume == "auto":
        found = checkpoint.list_checkpoints(run)
        return checkpoint.read_checkpoint(found[-1]) if found else None
    return checkpoint.read_checkpoint(config.resume)


def _show_changes(config: TrainConfig, resumed: checkpoint.Checkpoint) -> None:
    """Says which options are not those of the run that is continued."""
    now = asdict(config)
    for key, value in resumed.train.items():
        if key not in ("resume", "out_dir", "run_name") and now.get(key) != value:
            print(f"changed since the checkpoint: {key} was {value}, is {now.get(key)}")
