"""What a run says of itself before its first step."""

import math

from gpt2.config import TrainConfig
from gpt2.data import Mixture
from gpt2.data.loader import BatchSource
from gpt2.device import Execution
from gpt2.lora import lora_config
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from gpt2.train.layouts import Layout
from gpt2.train.preflight import Preflight


def derived(
    c: TrainConfig, m: GPT, data: BatchSource, tokenizer: Tokenizer, execution: Execution,
    layout: Layout, plan: Preflight, *, grad_accum_steps: int, first_step: int,
) -> list[tuple[str, str]]:  # fmt: skip
    """Everything that follows from the options, as rows of a table."""
    group = layout.group
    tokens, flops = c.max_steps * c.tokens_per_step, m.flops_per_token()
    peak = execution.peak_flops
    adapters = lora_config(m)
    formula = ("6 N" if adapters is None else "4 N + 2 n") + " + 12 L C T"
    sharing = f"sharding {c.sharding}"
    if c.sharding != "none" and group.world_size == 1:
        sharing += " (one process: nothing to share out)"
    sharing += ", activation checkpointing" * c.activation_checkpointing
    rows = [
        ("model", f"{m.n_params():,} parameters: {shape_of(m.config)}"),
        (
            "data",
            f"{c.data}: {data.n_tokens:,} train tokens, {tokenizer.name} tokenizer, "
            f"{data.backend} loader",
        ),
        (
            "step",
            f"{c.tokens_per_step:,} tokens = {group.world_size} ranks x "
            f"{grad_accum_steps} micro steps x {c.micro_batch_size} rows x "
            f"{data.block_size}",
        ),
        (
            "run",
            f"{c.max_steps:,} steps, {tokens:,} tokens, {tokens / data.n_tokens:.2f} epochs, "
            f"{tokens * flops:.2e} FLOPs",
        ),
        ("device", execution.describe()),
        ("layout", sharing),
        ("kernels", f"{m.ops.name} ({m.ops.reason})"),
        (
            "MFU",
            f"{flops:,} FLOPs a token ({formula}) x tokens/s / peak; peak "
            + (f"{peak / 1e12:.1f} TFLOP/s a device" if peak else "not known"),
        ),
        ("run folder", str(c.folder)),
    ]
    if isinstance(data, Mixture):
        for path, epochs in data.epochs(c.max_steps, c.tokens_per_step // data.block_size).items():
            rows.append(("  of which", f"{path}: {epochs:.2f} epochs"))
    if adapters is not None:
        n = sum(p.numel() for p in layout.params)
        where = f"in {', '.join(adapters.layers)} of every block; base {m.lora_base['path']}"
        rows.insert(1, (
            "adapters",
            f"{n:,} parameters are trained: rank {adapters.rank}, scale {adapters.scale:g}, "
            + where,
        ))  # fmt: skip
    rows += plan.rows()
    if first_step:
        rows.append(("resumed", f"from step {first_step}"))
    elif not c.init_from:
        rows.append(("first loss", f"about ln(vocabulary) = {math.log(m.config.vocab_size):.2f}"))
    return rows


def shape_of(c) -> str:
    return (
        f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.block_size}, "
        f"vocabulary {c.vocab_size}"
    )
