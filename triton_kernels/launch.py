"""How kernels are launched: as operators of PyTorch, with tiles, warps and stages from tables per
(architecture, shape).

Nothing is tuned at run time, so ranks cannot disagree and the first step is as fast as the last. A
table's comment says how its figures were found: "ahead of time" (registers, spills, shared memory)
or "measured" (where and when).
"""

import contextlib
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
from torch import Tensor

Entry = TypeVar("Entry")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton decides when it decorates: kernels are compiled, or interpreted under TRITON_INTERPRET=1.
INTERPRETED: bool = triton.knobs.runtime.interpret

_LIBRARY = torch.library.Library("gpt2_triton", "FRAGMENT")
OPERATORS: dict[str, Callable] = {}  # as they were written: benchmarks/static.py records launches


def operator(function: Callable) -> Callable:
    """The operator gpt2_triton::<its name> of a generator that yields its new outputs and then
    launches the kernels that fill them.

    Operators are opaque to torch.compile, which then neither copies around the kernels nor needs a
    GPU to trace: for it the part before the yield says which shapes and dtypes come out. Arguments
    are not modified and not returned. Autograd stays outside, the cheapest arrangement per call.
    """
    name, signature = function.__name__, inspect.signature(function)
    (outputs,) = typing.get_args(signature.return_annotation)  # of Iterator[outputs]

    def run(*args):
        steps = function(*args)
        with on_device(next(t for t in args if isinstance(t, Tensor))):
            made = next(steps)
            next(steps, None)
        return made

    run.__signature__ = signature.replace(return_annotation=outputs)
    OPERATORS[name] = function
    _LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()))
    for device_type in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device_type)
    torch.library.register_fake(
        f"gpt2_triton::{name}", lambda *args: next(function(*args)), lib=_LIBRARY
    )
    return getattr(torch.ops.gpt2_triton, name).default


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Where kernels must be launched that work on tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_tensor(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless kernels can work on a tensor of this dtype and on this device."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} is {tensor.dtype}; cast it to float32, float16 or bfloat16")
    if tensor.device.type not in ("cpu", "cuda") or (tensor.is_cpu and not INTERPRETED):
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, the kernels need a CUDA or ROCm device; use"
            f" triton_kernels.reference.{op}, or, to test them on a CPU, set TRITON_INTERPRET=1"
            " before triton is imported"
        )


def check_same_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError where two tensors are apart."""
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device} and {other_name} on {other.device};"
            " move them to one device"
        )


def architecture(device: torch.device) -> str:
    """The tables' key for a device: "interpret" for the CPU, "sm_90" for CUDA, "gfx942" for HIP."""
    if device.type == "cpu":
        return "interpret"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def multiprocessors(device: torch.device) -> int:
    """How many programs it takes to give each of the device's processors one."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def for_architecture(table: dict[str, Entry], arch: str) -> Entry:
    """The table's entry for arch, or for the nearest lower known one (sm_86 takes sm_80's)."""
    if arch in table:
        return table[arch]
    if arch.startswith("gfx"):
        return table["gfx942"]
    known = sorted(int(key[3:]) for key in table if key.startswith("sm_"))
    lower = [number for number in known if number <= int(arch[3:])]
    return table[f"sm_{(lower or known)[-1 if lower else 0]}"]


# --- attention ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionTiles:
    """A tile of scores, and the warps and pipeline stages of the program that walks over them."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


# architecture -> kernel -> head dimension up to -> length up to -> tiles, for fp16 and bf16.
# All of it chosen ahead of time, none measured: compiled by benchmarks/static.py with Triton 3.7.1
# (sm_90 with 3.6.0 too), with and without documents, D = 32 to 128. The rules, in this order:
# 1. no spills; 2. two programs a multiprocessor or more where registers and shared memory allow it,
# since a program waits for its own matrix products before each exponential, and only another
# program's products can fill that time; 3. the largest tile left. sm_80's fit in 99 KB of shared
# memory, because sm_86 and sm_89 use them. Where 1 rules out 2 the line says so.
_ANY, _t = 1 << 62, AttentionTiles
ATTENTION: dict[str, dict[str, dict[int, dict[int, AttentionTiles]]]] = {
    "interpret": {  # small, so that short tests meet full, diagonal and ragged tiles
        "fwd": {128: {_ANY: _t(64, 32, 4, 1)}},
        "dq": {128: {_ANY: _t(64, 32, 4, 1)}},
        "dkv": {128: {_ANY: _t(32, 64, 4, 1)}},
    },
    "sm_80": {  # 128x64 in 4 warps spills with documents; dk/dv 64x64 spills
        "fwd": {64: {_ANY: _t(64, 64, 4, 3)}, 128: {_ANY: _t(128, 32, 8, 2)}},
        "dq": {64: {_ANY: _t(64, 64, 4, 3)}, 128: {_ANY: _t(64, 32, 4, 2)}},
        "dkv": {64: {_ANY: _t(32, 64, 4, 2)}, 128: {_ANY: _t(32, 64, 8, 2)}},
    },
    "sm_90": {
        # Up to 256 tokens a 64-row tile wastes less of its work above the diagonal.
        # D = 128 forward: one program of 8 warps; 128x128 spills, 64x64 loads twice as much.
        "fwd": {
            64: {256: _t(64, 64, 4, 3), _ANY: _t(128, 64, 4, 3)},
            128: {_ANY: _t(128, 64, 8, 3)},
        },
        "dq": {64: {_ANY: _t(64, 64, 4, 3)}, 128: {_ANY: _t(64, 64, 4, 2)}},
        # D = 128: 64x64 and 64x128 spill at any number of warps.
        "dkv": {64: {_ANY: _t(64, 64, 4, 2)}, 128: {_ANY: _t(32, 128, 8, 2)}},
    },
    "sm_100": {  # accumulators live in tensor memory, and 128 rows fill a tcgen05 instruction
        "fwd": {128: {_ANY: _t(128, 64, 8, 3)}},
        # D = 32: 8 warps spill with documents.
        "dq": {32: {_ANY: _t(128, 64, 4, 2)}, 128: {_ANY: _t(128, 64, 8, 2)}},
        "dkv": {128: {_ANY: _t(64, 128, 8, 2)}},
    },
    "sm_120": {  # 99 KB of shared memory, mma.sync
        "fwd": {64: {_ANY: _t(64, 64, 4, 3)}, 128: {_ANY: _t(64, 32, 4, 2)}},
        "dq": {64: {_ANY: _t(64, 64, 4, 3)}, 128: {_ANY: _t(64, 32, 4, 2)}},
        "dkv": {64: {_ANY: _t(32, 64, 4, 2)}, 128: {_ANY: _t(32, 64, 8, 2)}},
    },
    "gfx942": {  # 64 KB of shared memory
        "fwd": {128: {_ANY: _t(128, 32, 4, 1)}},
        "dq": {128: {_ANY: _t(64, 32, 4, 1)}},
        "dkv": {128: {_ANY: _t(32, 64, 4, 1)}},
    },
}

# fp32 products are exact (IEEE), so not on tensor cores: small tiles, for checking, not for speed.
ATTENTION_FP32: dict[str, dict[int, dict[int, AttentionTiles]]] = {
    "fwd": {128: {_ANY: _t(32, 16, 4, 2)}},
    "dq": {128: {_ANY: _t(32, 16, 4, 2)}},
    "dkv": {128: {_ANY: _t(16, 16, 4, 1)}},
}


def attention_tiles(
    kernel: str, arch: str, itemsize: int, head_dim: int, length: int
) -> AttentionTiles:
    """Tiles of kernel "fwd", "dq" or "dkv" for inputs of itemsize bytes an element."""
    small = itemsize == 4 and arch != "interpret"
    table = ATTENTION_FP32 if small else for_architecture(ATTENTION, arch)
    lengths = table[kernel][min(limit for limit in table[kernel] if head_dim <= limit)]
    return lengths[min(limit for limit in lengths if length <= limit)]


# --- layer norm and cross entropy ----------------------------------------------------------------


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
    "sm_80": _NORM,  # and above
    "gfx942": _NORM,
}

# Ahead of time (sm_90, bf16): 38 registers with 16 warps, so that three rows are at home on a
# multiprocessor, and all 396 of an H200, 40 MB, in its L2 for the second reading. Blocks of 4096
# need 28 and as many instructions, but four rows each are 53 MB; blocks of 16384 spill on sm_100.
CROSS_ENTROPY = {
    "interpret": CrossEntropyTile(block=4096, tail=1024, warps=1),
    "sm_80": CrossEntropyTile(block=8192, tail=2048, warps=16),  # and above
    "gfx942": CrossEntropyTile(block=4096, tail=2048, warps=8),
}


def layer_norm_tile(arch: str, width: int) -> LayerNormTile:
    table = for_architecture(LAYER_NORM, arch)
    return table[min(limit for limit in table if limit >= width)]
