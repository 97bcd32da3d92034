"""What a run says of itself before its first step and after its last."""

import math
from statistics import median_high

from gpt2 import checkpoint
from gpt2.data import Mixture, TokenLoader
from gpt2.lora import lora_config
from gpt2.train.metrics import points


def derived(trainer) -> list[tuple[str, str]]:
    """Everything that follows from the config, as rows of a table."""
    c, m, group, data = trainer.config, trainer.model, trainer.group, trainer.train_data
    tokens = c.max_steps * c.tokens_per_step
    flops = m.flops_per_token()
    known = trainer.execution.peak_flops
    peak = f"{known / 1e12:.1f} TFLOP/s a device" if known else "not known"
    shape = m.config
    adapters = lora_config(m)
    formula = ("6 N" if adapters is None else "4 N + 2 n") + " + 12 L C T"
    rows = [
        (
            "model",
            f"{m.n_params():,} parameters: {shape.n_layer} layers, {shape.n_head} heads, "
            f"{shape.n_embd} wide, context {shape.block_size}, vocabulary {shape.vocab_size}",
        ),
        (
            "data",
            f"{c.data}: {data.n_tokens:,} train tokens, {trainer.tokenizer.name} tokenizer, "
            f"{data.backend} loader",
        ),
        (
            "step",
            f"{c.tokens_per_step:,} tokens = {group.world_size} ranks x "
            f"{trainer.grad_accum_steps} "
            f"micro steps x {c.micro_batch_size} rows x {data.block_size}",
        ),
        (
            "run",
            f"{c.max_steps:,} steps, {tokens:,} tokens, {tokens / data.n_tokens:.2f} epochs, "
            f"{tokens * flops:.2e} FLOPs",
        ),
        (
            "device",
            trainer.execution.describe(),
        ),
        ("layout", _layout(c, group.world_size)),
        ("kernels", f"{m.ops.name} ({m.ops.reason})"),
        ("MFU", f"{flops:,} FLOPs a token ({formula}) x tokens/s / peak; peak {peak}"),
        ("run folder", str(trainer.folder)),
    ]
    if isinstance(data, TokenLoader | Mixture):
        known, n = (sum(getattr(v, k) for v in data.verifiers) for k in ("n_known", "n_shards"))
        rows.append(("verify", f"in the background, hashes are known of {known} of {n} shards"))
    if isinstance(data, Mixture):
        for path, epochs in data.epochs(c.max_steps, trainer.rows_per_step).items():
            rows.append(("  of which", f"{path}: {epochs:.2f} epochs"))
    if adapters is not None:
        n = sum(p.numel() for p in trainer.params)
        rows.insert(
            1,
            (
                "adapters",
                f"{n:,} parameters are trained: rank {adapters.rank}, scale {adapters.scale:g}, in "
                f"{', '.join(adapters.layers)} of every block; base {m.lora_base['path']}",
            ),
        )
    rows += trainer.preflight.rows()
    if trainer.first_step:
        rows.append(("resumed", f"from step {trainer.first_step}"))
    elif not c.init_from:
        rows.append(("first loss", f"about ln(vocabulary) = {math.log(shape.vocab_size):.2f}"))
    return rows


def _layout(config, world_size: int) -> str:
    words = f"sharding {config.sharding}"
    if config.sharding != "none" and world_size == 1:
        words += " (one process: nothing to share out)"
    return words + (", activation checkpointing" if config.activation_checkpointing else "")


def show_result(trainer) -> None:
    """Prints what came out."""
    lines, folder = trainer.metrics.lines, trainer.folder
    times, val = points(lines, "train/step_ms"), points(lines, "val/loss")
    done = f"done: {trainer.config.max_steps:,} steps"
    if times:
        done += f", {median_high(ms for _, ms in times):.1f} ms a step (median)"
    print(done + (f", val loss {val[-1][1]:.4f}" if val else ""))
    print(f"loss curve: {folder / 'loss.png'}, report: {folder / 'report.html'}")
    print(f"checkpoint: {checkpoint.list_checkpoints(folder)[-1]}")
