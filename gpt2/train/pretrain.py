"""From options to a run: pretraining, and what every kind of run has in common.

A kind of run is a function that puts its Parts together from options; launch() does the rest. Up to
the agreement of all ranks nothing is written and nothing is waited for, so a rank that cannot start
names its reason, and the others end with it.
"""

import errno
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch

from gpt2 import checkpoint, dist, tokenizer
from gpt2.cli import say
from gpt2.config import CHOSEN, TrainConfig, data_sources
from gpt2.data import Mixture, TokenLoader, find_shards, open_shards
from gpt2.data.loader import BatchSource
from gpt2.data.mixture import find_tokenizer, open_split
from gpt2.data.shards import list_shards
from gpt2.dist import Distributed
from gpt2.evals.files import find_file
from gpt2.evals.hellaswag import read_hellaswag
from gpt2.lora import add_lora
from gpt2.model import GPT
from gpt2.train.between import Interrupted, StopSignals
from gpt2.train.lr_range import range_config, range_test
from gpt2.train.objectives import LanguageModeling
from gpt2.train.run_folder import LOCATIONS, RunFolder, identity_of, without_paths
from gpt2.train.size import choose_size
from gpt2.train.trainer import Trainer

EVAL_DATA = "data/eval"  # the folder of HellaSwag's file


@dataclass(frozen=True)
class Parts:
    """What a trainer is made of. config: with what only the data could tell; lines: for the log."""

    config: TrainConfig
    objective: torch.nn.Module
    train_data: BatchSource
    val_data: BatchSource | None
    tokenizer: tokenizer.Tokenizer
    lines: list[str] = field(default_factory=list)


MakeParts = Callable[[TrainConfig, Distributed], Parts]


def pretrain(config: TrainConfig) -> None:
    """Trains a model from config, from scratch, from other weights, or on from a checkpoint.

    Raises ValueError and OSError for what cannot be trained, before anything is written.
    """
    launch(config, pretraining)


def pretraining(config: TrainConfig, group: Distributed) -> Parts:
    """What pretrain() trains."""
    data_tokenizer = find_tokenizer(config.data)
    model, block_size = make_model(config, data_tokenizer, group.device)
    config = config.sized(model.config, block_size, group.world_size)
    share = (group.rank, group.world_size)
    val_data, lines = open_val(config, block_size, share) if config.eval_every else (None, [])
    train_data = open_data(config, "train", block_size, share)
    return Parts(config, LanguageModeling(model), train_data, val_data, data_tokenizer, lines)


def launch(config: TrainConfig, make_parts: MakeParts) -> None:
    """Trains what make_parts(config, group) gives, on from a checkpoint if config says so.

    Raises ValueError and OSError for what cannot be trained, before anything is written, and
    Interrupted (a SystemExit with status 75) after a signal.
    """
    config = range_config(config) if config.lr_range_test else config
    with StopSignals() as signals, RunFolder(config.folder) as folder:
        group = dist.start(config.device, config.timeout_s)
        # One process decides, so that all go on from the same checkpoint.
        is_test = config.lr_range_test
        found = group.on_main(lambda: None if is_test else folder.find(config.resume))
        problem, chosen = None, []
        if config.preset == "auto" and found is None:
            config, chosen = group.on_main(lambda: choose_size(config, group))
        try:
            resumed = None if found is None else checkpoint.read_checkpoint(found.path)
            parts = make_parts(pin_start(config, resumed), group)
            asked = replace(parts.config, init_from=config.init_from)
            parts = replace(parts, config=asked)
            identity = identity_of(parts)
            check_resumed(parts.config, resumed)
            if config.patience and parts.val_data is None:
                raise ValueError(
                    f"patience {config.patience} counts validations, but there are none: see "
                    "eval_every, and whether the data has a val split"
                )
        except (ValueError, OSError, ImportError) as error:
            problem = error
        group.agree({} if problem else fingerprint(parts, identity, resumed), problem)
        trainer = Trainer(
            parts.config, parts.objective, parts.train_data, parts.val_data, parts.tokenizer, group,
            hellaswag=load_hellaswag(parts, group) if config.hellaswag_every else None,
        )  # fmt: skip
        if resumed is not None:
            trainer.resume(resumed)
        trainer.check_resources(resumed)
        if is_test:
            range_test(trainer, signals)
            return dist.stop(group)
        lines = group.on_main(lambda: folder.begin(trainer.config, identity, resumed))
        lines = [*chosen, *parts.lines, *lines]
        if group.is_main and lines:
            say("\n".join(lines))
        try:
            trainer.run(folder if group.is_main else None, signals)
        except Interrupted:
            dist.stop(group)
            raise
    # Not where a rank failed: it must end at once, without waiting for the others.
    dist.stop(group)


def pin_start(config: TrainConfig, resumed: checkpoint.Checkpoint | None) -> TrainConfig:
    """config with what was decided when the run began: the very weights that init_from meant (a
    run's folder means its newest checkpoint, and may have gone on since), the steps that fit
    max_minutes, and what is not given: the step's tokens, the warm-up, and preset auto's model.

    Raises ValueError where max_minutes is another, or the run began without.
    """
    if resumed is None:
        return config
    names = ["tokens_per_step", "warmup_steps", *(CHOSEN if config.preset == "auto" else ())]
    kept = {n: resumed.train.get(n) for n in names if getattr(config, n) is None}
    config = replace(config, **kept)
    if config.max_minutes:
        steps, minutes = resumed.train["max_steps"], resumed.train.get("max_minutes", 0.0)
        if minutes != config.max_minutes:
            raise ValueError(
                f"max_minutes {config.max_minutes:g}: the run began with {minutes:g} and the "
                f"max_steps {steps} that {resumed.path} has: to change its end, resume with "
                "--max_minutes 0 and other --max_steps"
            )
        config = replace(config, max_steps=steps)
    start = (resumed.identity or {}).get("init_from")
    if start and config.init_from == start["asked"] and Path(start["path"]).exists():
        return replace(config, init_from=start["path"])
    return config


def check_resumed(config: TrainConfig, resumed: checkpoint.Checkpoint | None) -> None:
    """Raises ValueError where a checkpoint is further than the run is to go, or its moments are
    another optimizer's."""
    if resumed is None:
        return
    if (before := resumed.train.get("optimizer", "adamw")) != config.optimizer:
        raise ValueError(
            f"{resumed.path} has the moments of optimizer {before}, not {config.optimizer}: resume "
            f"with --optimizer {before}, or start a new run from its weights with --init_from"
        )
    if resumed.step > config.max_steps:
        raise ValueError(
            f"{resumed.path} is of step {resumed.step}, after max_steps {config.max_steps}: raise "
            "max_steps (or epochs), or --resume an earlier checkpoint"
        )


def fingerprint(parts: Parts, identity: dict, resumed: checkpoint.Checkpoint | None) -> dict:
    """What all ranks must have alike."""
    options = {k: v for k, v in asdict(parts.config).items() if k not in LOCATIONS}
    facts = {k: v for k, v in identity.items() if k != "init_from"}
    facts |= {name: without_paths(identity[name]) for name in ("data", "val_data")}
    start = identity["init_from"] and identity["init_from"]["xxh3_128"]
    step = None if resumed is None else (resumed.run_id, resumed.step)
    versions = {name: version(name) for name in ("torch", "numpy")}
    return options | facts | versions | {"weights of init_from": start, "checkpoint": step}


def open_data(
    config: TrainConfig, split: str, block_size: int, share: tuple[int, int] = (0, 1)
) -> TokenLoader | Mixture:
    """The run's loader of a split; see gpt2.data.mixture.open_split."""
    return open_split(
        config.data, split, block_size, seed=config.seed, doc_mask=config.doc_mask, share=share
    )


def open_val(
    config: TrainConfig, block_size: int, share: tuple[int, int]
) -> tuple[TokenLoader | Mixture | None, list[str]]:
    """The loader for validation, in shorter rows where one of block_size would not be full; None
    where the data has no such split; and what is to be said of that."""
    folders = {Path(source.path) for source in data_sources(config.data)}
    without = [folder for folder in folders if not any(list_shards(folder, "val"))]
    if len(without) == len(folders):
        return None, [f"{config.data}: no val split, so nothing is validated"]
    if without:
        remedy = "prepare it with one, or validate nothing with --eval_every 0"
        raise OSError(errno.ENOENT, f"no val split, and others have one: {remedy}", str(without[0]))
    counts = (sum(s.n_tokens for s in open_shards(find_shards(f, "val"))) for f in folders)
    length, lines = max(min(block_size, min(counts) - 1), 1), []
    if length < block_size:
        lines = [f"{config.data}: few val tokens, so validation is in rows of {length}"]
    return open_data(config, "val", length, share), lines


def make_model(config: TrainConfig, data_tokenizer: tokenizer.Tokenizer, device) -> tuple[GPT, int]:
    """The model that training starts from, with adapters if config has some; the length of rows.

    Raises ValueError for options that do not go with init_from, a tokenizer that is not the
    model's, and a block_size beyond the model's context.
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
    if config.lora is not None:
        add_lora(model, config.lora, model.origin)
    return model, block_size


def _load_initial(config: TrainConfig, data_tokenizer: tokenizer.Tokenizer, device) -> GPT:
    for name in ("n_layer", "n_head", "n_embd", "bias"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} comes from init_from {config.init_from!r}: leave it out")
    own = checkpoint.load_tokenizer(config.init_from)
    if own.to_dict() != data_tokenizer.to_dict():
        raise ValueError(
            f"{config.init_from} has another tokenizer ({own.name}, {own.vocab_size} entries) than "
            f"{config.data} ({data_tokenizer.name}, {data_tokenizer.vocab_size}): prepare the data "
            "with the model's"
        )
    model = checkpoint.load_model(config.init_from, device, config.kernels)
    model.origin = checkpoint.describe_base(config.init_from, model)
    if config.dropout is not None:
        model.set_dropout(config.dropout)
    return model


def load_hellaswag(parts: Parts, group: Distributed):
    """HellaSwag's examples, on all ranks; the main process downloads them if need be."""
    group.on_main(lambda: find_file("hellaswag", EVAL_DATA, parts.tokenizer))
    path = find_file("hellaswag", EVAL_DATA)
    return read_hellaswag(path, parts.tokenizer, parts.objective.model.config.block_size)
