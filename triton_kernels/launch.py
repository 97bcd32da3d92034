"""How each kernel is launched: tiles, warps and stages per (architecture, shape), from fixed tables.

Nothing is tuned at run time, so ranks cannot disagree and the first step is as fast as the last. A table's comment says
how its figures were found: "ahead of time" (registers, spills, shared memory) or "measured" (where and when).
"""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class StaticConfig:
    """One shipped kernel configuration, described so that it compiles without a GPU (benchmarks/static.py)."""

    op: str  # "attention fwd", "layer_norm bwd", ...
    shape: str  # the GPT-2 shape that the figures below are for, as text
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32", "constexpr"
    constexprs: dict[str, Any]
    divisible_by_16: tuple[str, ...]  # arguments whose value or address the launcher knows to divide by 16
    num_warps: int
    num_stages: int
    bytes: int = 0  # least memory traffic of the operation at that shape
    flops: int = 0  # tensor-core work at that shape
    options: dict[str, Any] = field(default_factory=dict)  # further compile options


def architecture(device: torch.device) -> str:
    """The name that the tables go by: "sm_90", "gfx942", or "interpret" on a CPU."""
    if device.type == "cpu":
        return "interpret"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@dataclass(frozen=True)
class AttentionTiles:
    block_m: int  # queries a tile
    block_n: int  # keys a tile
    num_warps: int
    num_stages: int


_T = AttentionTiles
_INTERPRET = {"fwd": _T(64, 32, 4, 1), "dq": _T(64, 32, 4, 1), "dkv": _T(32, 64, 4, 1)}


def attention_tiles(
    kernel: str, arch: str, itemsize: int, head_dim: int, length: int
) -> AttentionTiles:
    return _INTERPRET[kernel]
