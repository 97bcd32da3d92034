"""The model that preset auto takes, for the minutes, the machine and the text.

A model of n parameters costs F = 6 n + 12 L C T FLOPs a token. In the minutes this machine does

    tokens = EFFICIENCY x FLOP/s of a matmul of the model's width, timed here, x seconds / F

but what is read more than EPOCHS times teaches little. auto takes the largest of SIZES that still
gets TOKENS tokens for each of its parameters, the smallest where none does. Its lr falls with the
root of the width, from what is best for Muon at 128; its step grows with the tokens. docs/LOG.md
(2026-11-26) has the runs that the constants are from: up to 0.8M parameters for characters, 7M for
GPT-2's tokens. Beyond, they are an extrapolation.
"""

import math
from dataclasses import replace

from gpt2.config import CHOSEN, GPTConfig, TrainConfig
from gpt2.data.mixture import find_tokenizer, open_split
from gpt2.device import execution
from gpt2.dist import Distributed
from gpt2.train.preflight import measure_rates, size

# (n_layer, n_head, n_embd, block_size), with 32 or 64 numbers in a head; from 768 on GPT-2's own.
SIZES = (
    (2, 2, 64, 64), (3, 3, 96, 64), (4, 4, 128, 64), (5, 3, 192, 128), (6, 4, 256, 256),
    (6, 6, 384, 256), (8, 8, 512, 512), (10, 10, 640, 1024), (12, 12, 768, 1024),
    (24, 16, 1024, 1024), (36, 20, 1280, 1024), (48, 25, 1600, 1024),
)  # fmt: skip
TOKENS = 10  # for each parameter
EPOCHS = 16  # what is read more often counts as this
EFFICIENCY = 0.4  # of the rate of a matmul, in a whole step with Muon
LR, LR_WIDTH = 6e-3, 128
# As the recipes for 1M characters and 10B tokens have it: 768 and 524,288 tokens.
STEP, STEP_AT, STEP_POWER = 768, 1e6, 0.7


def choose_size(config: TrainConfig, group: Distributed) -> tuple[TrainConfig, list[str]]:
    """config with all that preset auto decides and that is not given, and why, as a line for the
    log; by this process's device, which all others are taken to be like.

    Raises what opening the data does.
    """
    if all(getattr(config, name) is not None for name in CHOSEN):
        return config, []
    n_tokens = open_split(config.data, "train", 1).n_tokens
    vocab_size = find_tokenizer(config.data).vocab_size
    how, chosen, sizes = execution(group.device, config.dtype, config.compile), None, SIZES
    if config.n_embd is not None:
        sizes = ((config.n_layer, config.n_head, config.n_embd, GPTConfig.block_size),)
    for n_layer, n_head, width, length in sizes:
        length = config.block_size or length
        n = 12 * n_layer * width**2 + vocab_size * width
        rate = EFFICIENCY * measure_rates(width, 1 << 14, how)[0] * group.world_size
        tokens = 60 * config.max_minutes * rate / (6 * n + 12 * n_layer * width * length)
        if chosen and min(tokens, EPOCHS * n_tokens) < TOKENS * n:
            break
        chosen = n_layer, n_head, width, length, n, rate, tokens
    n_layer, n_head, width, length, n, rate, tokens = chosen
    rows = STEP * (tokens / STEP_AT) ** STEP_POWER / length / group.world_size
    rows = 2 ** max(round(math.log2(rows)), 0) * group.world_size
    found = {
        "n_layer": n_layer, "n_head": n_head, "n_embd": width, "block_size": length,
        "tokens_per_step": rows * length, "optimizer": "muon", "lr": LR * (LR_WIDTH / width) ** 0.5,
    }  # fmt: skip
    found = {name: value for name, value in found.items() if getattr(config, name) is None}
    line = (
        f"auto: {n_layer} layers, {width} wide, {n:,} parameters: about {size(rate, 'FLOP')}/s for "
        f"{config.max_minutes:g} minutes make {tokens:,.0f} tokens, {tokens / n:.1f} for each "
        f"parameter (the largest size with {TOKENS}) and {tokens / n_tokens:.1f} epochs"
    )
    if tokens > EPOCHS * n_tokens:
        line += f"; more than {EPOCHS} teach little: fewer minutes, or more text"
    return replace(config, **found), [line]
