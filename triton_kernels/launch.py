"""How each kernel is launched: tiles, warps and stages per (architecture, shape), as tables.

Nothing is tuned at run time, so ranks cannot disagree and the first step is as fast as the last. A
table's comment says how its figures were found: "ahead of time" (registers, spills, shared memory)
or "measured" (where and when).
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StaticConfig:
    """One shipped kernel configuration, described so that it compiles without a GPU
    (benchmarks/static.py)."""

    op: str  # "attention fwd", "layer_norm bwd", ...
    shape: str  # the GPT-2 shape that the figures below are for, as text
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32", "constexpr"
    constexprs: dict[str, Any]
    divisible_by_16: tuple[
        str, ...
    ]  # arguments whose value or address the launcher knows to divide by 16
    num_warps: int
    num_stages: int
    bytes: int = 0  # least memory traffic of the operation at that shape
    flops: int = 0  # tensor-core work at that shape
    options: dict[str, Any] = field(default_factory=dict)  # further compile options
