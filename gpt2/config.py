"""Options of training runs and the shape of a model: frozen dataclasses, checked when made.

gpt2.cli makes command lines and YAML files of them; `gpt2-triton train --help` shows the same
words.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, Literal

Schedule = Literal["cosine", "linear", "constant", "wsd"]
Switch = Literal["auto", "on", "off"]
Precision = Literal["auto", "fast", "float32", "bfloat16"]
Kernels = Literal["auto", "triton", "cpp", "torch"]
IGNORE_INDEX = -100  # the target of a position that does not count
WARMUP_SHARE, MOST_WARMUP = 0.04, 700  # of max_steps, and steps


OTHER_NAMES = {
    "gpt2": "124m 117m small gpt2_small gpt2_124m d12",
    "gpt2-medium": "350m 345m 355m medium d24",
    "gpt2-large": "774m large d36",
    "gpt2-xl": "1558m 1.5b xl d48",
    "tinytiny": "62m",
    "tinystories-1m": "1m",
    "tinystories-8m": "8m",
    "tinystories-28m": "28m 33m",
    "char": "shakespeare_char baby",
    "model": "checkpoint ckpt model_path model_name_or_path",
    "init_from": "model_name_or_path base_model pretrained",
    "preset": "model model_name model_type",
    "data": "input_bin train_file",
    "val_data": "input_val_bin validation_file",
    "block_size": "sequence_length seq_len max_seq_len max_seq_length max_length context_length",
    "tokens_per_step": "total_batch_size global_batch_size train_batch_size",
    "tokens_per_step (micro steps follow from it)": "gradient_accumulation_steps grad_accum_steps",
    "micro_batch_size": "batch_size device_batch_size per_device_train_batch_size",
    "epochs": "num_train_epochs num_epochs n_epochs",
    "max_steps": "max_iters num_iterations num_train_steps train_steps n_steps steps iters",
    "max_steps (of tokens_per_step tokens)": "epochs num_train_epochs num_epochs n_epochs",
    "lr": "learning_rate max_lr peak_lr",
    "lr_range_test": "lr_find auto_lr_find",
    "min_lr": "final_lr learning_rate_decay_frac",
    "schedule": "lr_scheduler_type lr_scheduler lr_schedule decay_lr",
    "grad_clip": "max_grad_norm gradient_clip_val max_norm",
    "eval_every": "eval_interval val_loss_every eval_freq",
    "eval_steps": "eval_iters val_max_steps",
    "patience": "early_stopping early_stopping_patience",
    "save_every": "save_steps save_interval checkpoint_every",
    "keep_last": "save_total_limit",
    "log_every": "logging_steps log_interval",
    "sharding": "fsdp zero_stage deepspeed",
    "activation_checkpointing": "gradient_checkpointing recompute",
    "dtype": "bf16 fp16 mixed_precision precision",
    "out_dir": "output_dir save_dir",
    "resume": "resume_from_checkpoint resume_from",
    "wandb_project": "wandb_log report_to",
    "max_new_tokens": "max_tokens max_length n_predict",
    "num_samples": "num_return_sequences",
}
"""What nanoGPT, llm.c and Hugging Face call presets and options, where ours is not close to it."""


def suggest(word: str, known) -> str:
    """What to write for an unknown word: ours for a name of another program, 'did you mean X?' if a
    known word is close, else the list of known words. Those of options may begin with --."""
    word = word.lower()
    dashes, name = "--" * word.startswith("--"), word.removeprefix("--").replace("-", "_")
    for ours, names in OTHER_NAMES.items():
        if name in names.split() and f"{dashes}{ours.split()[0]}" in known:
            return f"here it is {dashes}{ours}"
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "known are " + ", ".join(sorted(known))


def nearest_multiples(value: int, of: int) -> str:
    """The multiples around value, as text for an error message."""
    below = value // of * of
    return f"{below} and {below + of}" if below else str(of)


def check_numbers(config, *, above_0="", at_least_0="", at_least_1="", below_1="") -> None:
    """Raises ValueError for a field that is NaN, infinite or beyond 64 bits, and for those named
    (with spaces between) that are out of range; None and words are left alone. below_1: in [0, 1).
    """
    every = " ".join(field.name for field in dataclasses.fields(config))
    rules = (
        (every, "must be a finite number", math.isfinite),
        (every, "must be below 2**63", lambda x: isinstance(x, float) or abs(x) < 2**63),
        (above_0, "must be above 0", lambda x: x > 0),
        (at_least_0, "must not be negative", lambda x: x >= 0),
        (at_least_1, "must be at least 1", lambda x: x >= 1),
        (below_1, "must lie in [0, 1)", lambda x: 0 <= x < 1),
    )
    for names, words, holds in rules:
        for name in names.split():
            value = getattr(config, name)
            if isinstance(value, int | float) and not holds(value):
                raise ValueError(f"{name} {words}, got {value}")


@dataclass(frozen=True)
class Sampling:
    """Options of gpt2.generate, applied in the order in which they stand, as transformers does;
    temperature 0 needs none after it.
    """

    repetition_penalty: float = 1.0  # above 1: tokens that have occurred become less likely
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token always
    top_k: int | None = None  # keep only this many of the most likely tokens, and their equals
    top_p: float | None = None  # keep the most likely tokens that together reach this probability
    min_p: float | None = None  # keep tokens at least so many times as likely as the likeliest

    def __post_init__(self):
        # Logits times or divided by these stay far inside float32.
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            raise ValueError(
                f"repetition_penalty must lie in [0.001, 1000], got {self.repetition_penalty}"
            )
        check_numbers(self, at_least_0="temperature", at_least_1="top_k")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {value}")

    @property
    def greedy(self) -> bool:
        """Below 1e-5, as in vLLM, a temperature counts as its limit: the rest would overflow."""
        return self.temperature < 1e-5


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; saved with it."""

    n_layer: int
    n_head: int
    n_embd: int  # channels; a multiple of n_head
    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50257
    dropout: float = 0.0  # on the embeddings and on what each sublayer adds; 0 for pretraining
    bias: bool = True  # biases in linear layers and layer norms, as GPT-2 has them
    exact_gelu: bool = False  # as nanoGPT's models have it; GPT-2's is approximated by tanh

    def __post_init__(self):
        sizes = "n_layer n_head n_embd block_size vocab_size"
        check_numbers(self, at_least_1=sizes, below_1="dropout")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}; the nearest are "
                f"{nearest_multiples(self.n_embd, self.n_head)}"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: whole tensor-core tiles and 16-byte rows of logits.

        50257 becomes 50304. The padding is zero, stays zero, and is never seen outside the model.
        """
        multiple = 128 if self.vocab_size > 1024 else 8
        return -(-self.vocab_size // multiple) * multiple


PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    # The depths and widths of Eldan and Li, TinyStories (2023); their names do not count
    # embeddings.
    "tinystories-1m": GPTConfig(n_layer=8, n_head=4, n_embd=64, block_size=512),
    "tinystories-8m": GPTConfig(n_layer=8, n_head=8, n_embd=256, block_size=512),
    "tinystories-28m": GPTConfig(n_layer=8, n_head=8, n_embd=512, block_size=512),
    "tinytiny": GPTConfig(n_layer=6, n_head=10, n_embd=640),  # 62M, half of gpt2
    # nanoGPT's CPU recipe for characters; vocab_size is that of tiny Shakespeare.
    "char": GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, bias=False),
}


# What preset auto decides where it is not given, and what is meant without it. Of the shape all.
SHAPE = ("n_layer", "n_head", "n_embd")
DEFAULTS = {"optimizer": "adamw", "lr": 6e-4}
CHOSEN = (*SHAPE, "block_size", "tokens_per_step", *DEFAULTS)


# The linear layers of a block, and the names by which one or two of them are meant. A name means
# the layers that end with it, as in peft: c_proj is both projections.
LORA_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LORA_TARGETS = ("c_attn", "c_proj", "c_fc", *LORA_LAYERS)


@dataclass(frozen=True)
class LoRAConfig:
    """The adapters of a model: y = W x + b + (alpha / rank) B A dropout(x) in each target."""

    rank: int = 8  # inner dimension of the update, A (rank, in) and B (out, rank)
    alpha: float = 16.0  # scale of the update, times 1 / rank
    dropout: float = 0.0  # on what A sees, in training
    targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")  # the layers that get adapters

    def __post_init__(self):
        check_numbers(self, at_least_1="rank", above_0="alpha", below_1="dropout")
        if not self.targets:
            raise ValueError(f"lora targets are empty: use some of {', '.join(LORA_TARGETS)}")
        for target in self.targets:
            if target not in LORA_TARGETS:
                raise ValueError(f"unknown lora target {target!r}: {suggest(target, LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def layers(self) -> tuple[str, ...]:
        """The linear layers of a block that are meant, in the block's order."""
        return tuple(
            layer for layer in LORA_LAYERS if any(layer.endswith(target) for target in self.targets)
        )


@dataclass(frozen=True)
class DataSource:
    """One folder of a mixture. See gpt2.data.mixture."""

    path: str
    weight: Fraction = Fraction(1)  # its part of the samples, against the other weights
    from_step: int = 0  # the weights of a step are those with the largest from_step up to it


_WEIGHT = r"\d+(?:/\d+|(?:\.\d+)?(?:[eE][-+]?\d+)?)"
_SOURCE = re.compile(
    rf'\s*(?:"(?P<quoted>[^"]+)"|(?P<plain>[^,"]+?))'
    rf"(?::(?P<weight>{_WEIGHT})(?:@(?P<from_step>\d+))?)?\s*(?:,|$)"
)


def data_sources(data: str) -> tuple[DataSource, ...]:
    """What TrainConfig.data names: one folder, or a mixture in the order written.

    A folder of a mixture whose name holds a comma or a quotable colon stands in double quotes.
    Raises ValueError for a mixture that says too little or too much.
    """
    found, at = [], 0
    while at < len(data) and (match := _SOURCE.match(data, at)):
        found.append(match)
        at = match.end()
    if at < len(data) or len(found) < 2 or not any(m["weight"] for m in found):
        return (DataSource(data),)
    sources = []
    for match in found:
        path = match["quoted"] or match["plain"]
        if not match["weight"]:
            raise ValueError(f"data: {path!r} in {data!r} needs a weight, as in {path}:0.5")
        try:
            weight = Fraction(match["weight"])
        except ZeroDivisionError:
            weight = Fraction(0)
        if weight <= 0:
            raise ValueError(f"data: the weight of {path!r} must be above 0: leave it out")
        sources.append(DataSource(path, weight, int(match["from_step"] or 0)))
    if len({(s.path, s.from_step) for s in sources}) < len(sources):
        raise ValueError(f"data: a folder stands twice at the same step in {data!r}")
    if min(s.from_step for s in sources) > 0:
        raise ValueError(f"data: {data!r} has no weights for step 0")
    return tuple(sources)


def spell_sources(entries: list, source: str) -> str:
    """A YAML list of {path, weight, from_step} as one line for TrainConfig.data."""
    known, words = ("path", "weight", "from_step"), []
    for entry in entries:
        if not isinstance(entry, dict) or not {"path", "weight"} <= entry.keys():
            raise ValueError(f"{source}: needs a list of {{path, weight}}, got {entry!r}")
        for key in entry.keys() - {*known}:
            raise ValueError(f"{source}: unknown key {key!r}: {suggest(str(key), known)}")
        path, weight, step = entry["path"], entry["weight"], entry.get("from_step", 0)
        word = f'"{path}":{weight}' + (f"@{step}" if step else "")
        match = _SOURCE.fullmatch(word)
        if not match or not match["weight"] or isinstance(weight, bool):
            raise ValueError(
                f"{source}: {entry!r}: path must be a folder without double quotes, weight a "
                "number such as 0.25, 3 or 1/3, from_step a whole number"
            )
        words.append(word if set(str(path)) & set(',:" @') else word.replace('"', ""))
    if not words:
        raise ValueError(f"{source}: the list of folders is empty")
    return ",".join(words)


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. The defaults are the 124M recipe on 10B tokens of FineWeb."""

    # Model shape: gpt2[-medium|-large|-xl], tinystories-*, tinytiny, char; auto: by max_minutes,
    # the machine and the amount of text, see gpt2.train.size.
    preset: str = "gpt2"
    init_from: str = ""  # start from these weights: a checkpoint, a Hugging Face folder or name
    # Folder with train and val shards, or several as folder:weight,folder:weight; a weight may hold
    # from a step on, folder:weight@step. In YAML also a list of {path, weight, from_step}.
    data: str = "data/fineweb10B"
    doc_mask: bool = False  # attention sees only the document that a token is in

    n_layer: int | None = None  # default: the preset's
    n_head: int | None = None  # default: the preset's
    n_embd: int | None = None  # default: the preset's
    block_size: int | None = None  # tokens in a training row; default: the preset's
    dropout: float | None = None  # default: the preset's, 0
    bias: bool | None = None  # default: the preset's

    # Over all ranks and micro steps. Default: 524,288 for gpt2 and above; below, in proportion to
    # the parameters of the blocks, a power of two, at least 16 rows; in whole micro steps.
    tokens_per_step: int | None = None
    # Rows of block_size tokens in one forward pass on one device; auto: the most that fit.
    micro_batch_size: int | Literal["auto"] = "auto"
    max_steps: int = 19073  # optimizer steps; with max_minutes those that fit, whatever is given
    # Wall time of the run on the machine that it begins on, in minutes, with all that it does;
    # before step 0 steps are timed, and max_steps becomes what fits. 0: max_steps is as given.
    max_minutes: float = 0.0
    # Steps in which lr rises linearly to its peak; default: 4% of max_steps, at most 700.
    warmup_steps: int | None = None
    # muon: Muon for the matrices of the blocks, AdamW for embeddings and vectors, all at one lr.
    # Default: adamw, with preset auto muon.
    optimizer: Literal["adamw", "muon"] | None = None
    lr: float | None = None  # peak learning rate; default: 6e-4, or what preset auto chooses
    min_lr: float = 0.0  # learning rate at max_steps
    # Instead of the run, up to 100 of its steps with lr rising from 1e-6 to 1, which suggest an lr
    # and leave a picture, OUT_DIR/RUN_NAME.lr.png.
    lr_range_test: bool = False
    # How lr falls after the warmup; wsd: not before the last fifth of max_steps.
    schedule: Schedule = "cosine"
    weight_decay: float = 0.1  # of matrices and embeddings, decoupled
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.95  # AdamW's
    grad_clip: float = 1.0  # largest global gradient norm; 0 switches clipping off

    eval_every: int = 250  # steps between validations; 0 switches them off
    eval_steps: int = 20  # validation tokens in units of tokens_per_step; 0 takes the whole split
    # Validations in a row without a lower loss than before, after which the run ends; 0: never.
    patience: int = 0
    # Steps between HellaSwag evaluations (its file lies in data/eval, or is downloaded there); 0
    # switches them off.
    hellaswag_every: int = 0
    sample_every: int = 0  # steps between samples of text, besides the one at the end; 0: only that
    save_every: int = 1000  # steps between checkpoints, besides the one at the end; 0: only that
    keep_last: int = 2  # checkpoints that stay, besides the best by validation loss; 0 keeps all
    on_save_error: Literal["continue", "stop"] = "continue"  # where a checkpoint cannot be written
    log_every: int = 10  # steps between log lines

    # A step whose loss or gradient is not finite, or spikes: skip it; or go back to the weights in
    # memory of some steps before and skip the data since; or save and stop.
    guard: Literal["skip", "rollback", "stop"] = "skip"
    snapshot_every: int = 50  # steps between the copies in memory that rollback goes back to
    # The same bits for 1, 2, 4 ... ranks, at the same micro_batch_size; see gpt2.train.layouts.
    exact_reduction: bool = False

    # What several ranks share out, instead of each having all of it: nothing (DDP); optimizer: its
    # moments and work (ZeRO-1); full: weights and gradients too (FSDP2). See gpt2.train.layouts.
    sharding: Literal["none", "optimizer", "full"] = "none"
    # Keep only the inputs of each block, and compute the rest again in the backward pass: less
    # memory, about a third more arithmetic.
    activation_checkpointing: bool = False

    seed: int = 1337  # of weights, data order and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    # Of matmuls; weights stay float32. fast: bfloat16 where the device has it in hardware, else
    # float32; auto: that on a GPU, float32 on a CPU.
    dtype: Precision = "auto"
    # Of the residual stream in training; bfloat16 moves fewer bytes and needs dtype bfloat16.
    stream: Literal["float32", "bfloat16"] = "float32"
    compile: Switch = "auto"  # torch.compile; auto: on for CUDA
    kernels: Kernels = "auto"  # triton, cpp, torch; auto: the fastest that runs here
    timeout_s: float = 600.0  # how long ranks wait for one that does not answer, seconds

    run_name: str = "gpt2"  # everything of the run lies in out_dir/run_name
    out_dir: str = "runs"  # folder of all runs
    resume: str = "never"  # never, auto (newest checkpoint of this run, if any), or a checkpoint
    tracker: tuple[Literal["wandb", "tensorboard"], ...] = ()  # log to W&B, TensorBoard or both too
    wandb_project: str = ""  # log to W&B too, under this project

    KIND: ClassVar[str] = "pretrain"  # what `kind` in a YAML file says
    STEP_TOKENS: ClassVar[int | None] = None  # what tokens_per_step is near by default
    lora: ClassVar[LoRAConfig | None] = None  # adapters are an option of fine-tuning

    def __post_init__(self):
        data_sources(self.data)
        if self.preset == "auto":
            self._check_auto()
        elif self.preset not in PRESETS:
            known = [*PRESETS, "auto"]
            raise ValueError(f"unknown preset {self.preset!r}: {suggest(self.preset, known)}")
        else:
            for name, value in DEFAULTS.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        check_numbers(
            self, above_0="tokens_per_step micro_batch_size max_steps log_every lr snapshot_every "
            "timeout_s", below_1="beta1 beta2", at_least_0="warmup_steps min_lr weight_decay seed "
            "grad_clip eval_every eval_steps hellaswag_every sample_every save_every keep_last "
            "patience max_minutes",
        )  # fmt: skip
        if self.lr is not None and self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} must not be above lr {self.lr}")
        if self.warmup > self.max_steps:
            raise ValueError(
                f"warmup_steps {self.warmup} must not be above max_steps {self.max_steps}: lower "
                "it, or leave it out"
            )
        if self.lr_range_test and (self.max_minutes or self.resume not in ("never", "auto")):
            raise ValueError(
                "lr_range_test has a length and a start of its own: leave max_minutes out, and "
                f"give a checkpoint as init_from, not as resume ({self.resume!r})"
            )
        if self.exact_reduction and self.sharding != "none":
            raise ValueError(
                f"exact_reduction adds up whole gradients itself, so it needs sharding none, not "
                f"{self.sharding}"
            )
        if self.exact_reduction and self.micro_batch_size == "auto":
            raise ValueError("exact_reduction is of one micro_batch_size: give it as a number")
        if self.run_name in ("", "..") or Path(self.run_name).name != self.run_name:
            raise ValueError(f"run_name must be a plain folder name, got {self.run_name!r}")

    def _check_auto(self) -> None:
        if self.init_from:
            raise ValueError(f"preset auto: init_from {self.init_from!r} has a size: leave one out")
        shape = [name for name in SHAPE if getattr(self, name) is not None]
        if not self.max_minutes:
            raise ValueError("preset auto chooses a size for the minutes: give max_minutes")
        if shape and len(shape) < len(SHAPE):
            raise ValueError(
                f"preset auto chooses {', '.join(SHAPE)}: give all of them or none, not only "
                f"{', '.join(shape)}"
            )

    @property
    def folder(self) -> Path:
        """Where everything of the run lies."""
        return Path(self.out_dir) / self.run_name

    @property
    def warmup(self) -> int:
        """warmup_steps, or their default: what the recipes for 124M and 1558M have."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(round(WARMUP_SHARE * self.max_steps), MOST_WARMUP)

    def model_config(self, vocab_size: int | None = None) -> GPTConfig:
        """The preset's shape with this run's departures; vocab_size: the data's tokenizer's."""
        preset = PRESETS[self.preset if self.preset != "auto" else "gpt2"]
        if self.preset == "auto" and self.n_embd is None:
            raise ValueError(
                "preset auto has no shape before its run begins: name the run's folder"
            )
        names = ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if vocab_size is not None:
            changes["vocab_size"] = vocab_size
        return dataclasses.replace(preset, **changes)

    def sized(self, shape: GPTConfig, block_size: int, world_size: int) -> "TrainConfig":
        """self with tokens_per_step as a number; shape: of the model; block_size: of a row."""
        if self.tokens_per_step is not None:
            return self
        # 124M's 85M parameters make a little more than 2 ** 19.
        tokens = 1 << (12 * shape.n_layer * shape.n_embd**2 // 160).bit_length() >> 1
        tokens = self.STEP_TOKENS or min(max(tokens, 16 * block_size), 1 << 19)
        rows = 1 if self.micro_batch_size == "auto" else self.micro_batch_size
        unit = rows * block_size * world_size
        return dataclasses.replace(self, tokens_per_step=max(round(tokens / unit), 1) * unit)

    def grad_accum_steps(self, block_size: int, world_size: int) -> int:
        """Micro steps that make up one step, once micro_batch_size is a number.

        Raises ValueError with the nearest valid numbers.
        """
        per_micro_step = self.micro_batch_size * block_size * world_size
        if self.tokens_per_step % per_micro_step:
            below = self.tokens_per_step // per_micro_step * per_micro_step
            fits = not self.tokens_per_step % (block_size * world_size)
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} does not divide into micro steps of "
                f"{per_micro_step} tokens (micro_batch_size {self.micro_batch_size} x block_size "
                f"{block_size} x {world_size} ranks): use --tokens_per_step "
                + (f"{below} or " if below else "")
                + f"{below + per_micro_step}"
                + ", or --micro_batch_size auto" * fits
            )
        return self.tokens_per_step // per_micro_step


@dataclass(frozen=True)
class FineTuneConfig(TrainConfig):
    """What SFT and DPO have in common. The model's shape comes from init_from."""

    POSITIONAL: ClassVar[str] = "init_from"  # what a first word on the command line is

    init_from: str = "gpt2"  # the start: a run, a checkpoint, a Hugging Face folder or name
    val_data: str = ""  # as data, for validation; default: see val_fraction
    # Part of data that becomes val, by a hash of the first question; without validation all of data
    # is train.
    val_fraction: float = 0.02
    # A row without answer, with a template's marker in its text and the like ends the run, or is
    # left out. What is left out is counted in the log.
    bad_rows: Literal["error", "skip"] = "error"

    lora_rank: int = 0  # rank of the adapters; 0: none, all weights are trained
    lora_alpha: float = 16.0  # the adapters' update is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # on what the adapters see, in training
    # The layers that get adapters: some of c_attn, c_proj (both), c_fc, attn.c_proj, mlp.c_proj.
    lora_targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")

    # muon is for weights that it has pretrained: those that AdamW has, such as GPT-2's, fine-tune
    # worse with it than with AdamW (arXiv 2605.10468), with adapters less so.
    optimizer: Literal["adamw", "muon"] = "adamw"
    epochs: float = 3.0  # how often each row is seen, where max_steps is 0
    max_steps: int = 0  # optimizer steps; 0: as many as epochs need
    warmup_steps: int = 0  # steps in which lr rises linearly to its peak
    schedule: Schedule = "linear"  # how lr falls after the warmup
    weight_decay: float = 0.0  # of matrices and embeddings, decoupled
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
        check_numbers(self, above_0="epochs", below_1="val_fraction", at_least_0="lora_rank")
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
        if self.val_data and not self.eval_every:
            raise ValueError(f"val_data {self.val_data!r} is for validation, but eval_every is 0")
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if not self.lora_rank and getattr(self, name) != getattr(FineTuneConfig, name):
                raise ValueError(f"{name} goes with adapters: set lora_rank, for instance to 8")
        _ = self.lora  # has checks of its own

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapters that are asked for."""
        if self.lora_rank == 0:
            return None
        return LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)


@dataclass(frozen=True)
class SFTConfig(FineTuneConfig):
    """Options of `gpt2-triton sft`."""

    KIND: ClassVar[str] = "sft"
    STEP_TOKENS: ClassVar[int] = 16384

    # A known data set (alpaca, dolly, tulu2, lima, oasst1, gsm8k), a file or folder of .jsonl,
    # .json or .parquet, compressed or not; or several with commas between.
    data: str = "alpaca"
    # Saved with the checkpoint. alpaca: as runs before alpaca_2 had it, tokenised in pieces.
    template: Literal["user_assistant", "alpaca_2", "alpaca"] = "user_assistant"
    # A conversation longer than a row is left out, or cut at its end; both are counted.
    overlong: Literal["drop", "cut"] = "drop"
    max_conversations: int | None = None  # read only so many

    # Rows x block_size over all ranks and micro steps, with filling; default: about 16,384.
    tokens_per_step: int | None = None
    lr: float = 2e-5  # peak learning rate; with adapters 1e-4 to 5e-4 is usual
    run_name: str = "sft"  # everything of the run lies in out_dir/run_name

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, at_least_1="max_conversations")


@dataclass(frozen=True)
class DPOConfig(FineTuneConfig):
    """Options of `gpt2-triton dpo`. init_from is also the reference, which stays as it is."""

    KIND: ClassVar[str] = "dpo"
    STEP_TOKENS: ClassVar[int] = 65536

    # A file or folder of .jsonl, .json or .parquet, compressed or not, or several with commas
    # between; rows hold prompt, chosen, rejected, or what else gpt2.data.preferences knows.
    data: str = "preferences.jsonl"
    # How questions and answers are written; default: as saved with init_from, else user_assistant.
    template: Literal["", "user_assistant", "alpaca_2", "alpaca"] = ""
    # A pair with a half longer than block_size is left out, or loses the start of its prompt; both
    # are counted.
    overlong: Literal["drop", "cut"] = "drop"
    max_pairs: int | None = None  # read only so many

    beta: float = 0.1  # how strongly the model is held to the reference; higher: closer to it
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO's own, or the squared one of IPO

    epochs: float = 1.0  # how often each pair is seen, where max_steps is 0
    # Pairs x 2 x block_size over all ranks and micro steps; default: about 65,536.
    tokens_per_step: int | None = None
    # Pairs in one forward pass on one device; auto: the most that fit.
    micro_batch_size: int | Literal["auto"] = "auto"
    lr: float = 1e-6  # peak learning rate; with adapters 1e-5 to 1e-4 is usual
    run_name: str = "dpo"  # everything of the run lies in out_dir/run_name

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, above_0="beta", at_least_1="max_pairs")
        if self.dropout:
            raise ValueError(
                f"dropout {self.dropout}: DPO compares log probabilities of two models, which "
                "dropout would blur: leave it out (lora_dropout may be used)"
            )


REMOVED_OPTIONS = {
    "vocab_size": "it is that of the data's tokenizer",
    "loader": "the C++ loader is used where it was built",
    "gpu_hour_price": "it is an option of gpt2-triton report",
    "verify": "shards are always checked in the background; prepare --verify checks all",
    "decay_fraction": "wsd decays in the last fifth of max_steps",
    "spike_z": "a spike is 8 standard deviations above the mean",
    "hellaswag_examples": "all of them are asked; gpt2-triton evaluate has --limit",
    "eval_data": "HellaSwag's file lies in data/eval",
    "keep_every": "keep_last 0 keeps all checkpoints",
    "packing": "conversations are always packed",
    "label_smoothing": "DPO has none",
    "length_normalised": "loss_type ipo divides by the length",
    "precompute_reference": "each step computes it; with lora_rank that needs no second model",
}
"""Options of earlier versions, and why a run does without; gpt2.cli tells those who use them."""
