"""How each kernel is launched: tiles, warps and stages per (architecture, shape), by table.

Nothing is tuned at run time, so ranks cannot disagree and the first step is as fast as the last. A
table's comment says how its figures were found: "ahead of time" (registers, spills, shared memory)
or "measured" (where and when).
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import triton

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class StaticConfig:
    """One shipped configuration, described so that it compiles without a GPU (see static.py)."""

    op: str  # "attention fwd", "layer_norm bwd", ...
    shape: str  # the GPT-2 shape that the figures below are for, as text
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32", "constexpr"
    constexprs: dict[str, Any]
    divisible_by_16: tuple[str, ...]  # arguments whose value or address divides by 16
    num_warps: int
    num_stages: int
    bytes: int = 0  # least memory traffic of the operation at that shape
    flops: int = 0  # tensor-core work at that shape
    options: dict[str, Any] = field(default_factory=dict)  # further compile options


def architecture(device: torch.device) -> str:
    """The tables' key for a device: "interpret" for the CPU, "sm_90" for CUDA, "gfx942" for HIP."""
    if device.type == "cpu":
        return "interpret"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# --- layer norm and cross entropy
# -------------------------------------------------------------------------------------


def for_architecture(table: dict[str, Entry], arch: str) -> Entry:
    """The table's entry for arch, or for the nearest lower known one of its family (sm_86 takes
    sm_80's).
    """
    if arch in table:
        return table[arch]
    if arch.startswith("gfx"):
        return table["gfx942"]
    known = sorted(int(key[3:]) for key in table if key.startswith("sm_"))
    lower = [number for number in known if number <= int(arch[3:])]
    return table[f"sm_{(lower or known)[-1 if lower else 0]}"]


def device_guard(kernel: Any, name: str, tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """The context to launch kernel on tensor's device in; ValueError where it cannot run there."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "cpu" and not isinstance(kernel, triton.JITFunction):
        return contextlib.nullcontext()  # decorated under TRITON_INTERPRET=1
    raise ValueError(
        f"{name} is on {tensor.device}, where Triton kernels do not run: move it to a CUDA device, "
        f"call "
        "triton_kernels.reference instead, or set TRITON_INTERPRET=1 before the first import (CPU, "
        "for tests)"
    )


@dataclass(frozen=True)
class LayerNormTile:
    """Tiles of one row width, rounded up to a power of two."""

    fwd_rows: int  # rows that a forward program normalises
    fwd_warps: int
    bwd_rows: int  # rows that a backward program holds at a time
    bwd_warps: int
    bwd_programs: int  # backward programs per multiprocessor; each leaves a partial dw and db
    bwd_stages: int = 1  # more than 1: the next rows are fetched through shared memory meanwhile
    dw_parts: int = 128  # partial rows and columns that a second-stage program adds at a time;
    dw_cols: int = 16  # 16 columns give 96 programs at width 768


@dataclass(frozen=True)
class CrossEntropyTile:
    """A row of logits is read in whole tiles and then, masked, in tail tiles."""

    block: int
    tail: int
    warps: int


# Ahead of time (sm_90, bf16 rows, fp32 weight): registers a thread, none spills, rows move 16 bytes
# at a time. Width 768: forward 72, backward 96 and 12 KiB of shared memory; width 1600: forward 80,
# backward 99 and 24 KiB. Four backward rows a program instead of two need 159 registers; one row
# halves the bytes in flight. The other architectures differ by a few registers and do not spill.
_NORM = {
    256: LayerNormTile(8, 4, 8, 4, 4),
    1024: LayerNormTile(4, 4, 2, 4, 4, bwd_stages=2),
    2048: LayerNormTile(2, 4, 2, 8, 2, bwd_stages=2),
    4096: LayerNormTile(1, 8, 1, 8, 2),
    16384: LayerNormTile(1, 16, 1, 16, 1),
}
LAYER_NORM = {  # architecture -> width up to -> tile
    "interpret": {
        1024: LayerNormTile(8, 1, 4, 1, 3, dw_parts=2, dw_cols=512),
        16384: LayerNormTile(2, 1, 2, 1, 3, dw_parts=2, dw_cols=512),
    },
    "sm_80": _NORM,
    "sm_90": _NORM,
    "sm_100": _NORM,
    "sm_120": _NORM,
    "gfx942": _NORM,
}

# Ahead of time (sm_90, bf16): 49 registers with 16 warps, so that two rows are at home on a
# multiprocessor. Their 2 x 100 kB fit in its L1, and all rows at home in half of the L2, for the
# second reading. Blocks of 8192 with 16 warps need 72 registers, and with 32 warps leave room for
# one row only, whose reductions nothing would hide.
CROSS_ENTROPY = {
    "interpret": CrossEntropyTile(block=4096, tail=1024, warps=1),
    "sm_80": CrossEntropyTile(block=4096, tail=2048, warps=16),
    "sm_90": CrossEntropyTile(block=4096, tail=2048, warps=16),
    "sm_100": CrossEntropyTile(block=4096, tail=2048, warps=16),
    "sm_120": CrossEntropyTile(block=4096, tail=2048, warps=16),
    "gfx942": CrossEntropyTile(block=4096, tail=2048, warps=8),
}


def layer_norm_tile(arch: str, width: int) -> LayerNormTile:
    table = for_architecture(LAYER_NORM, arch)
    return table[min(limit for limit in table if limit >= width)]
