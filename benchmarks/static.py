"""What every shipped kernel compiles to, for architectures that need not be at hand.

    python benchmarks/static.py                                  all kernels for sm_90
    python benchmarks/static.py --arch sm_100 --op attention --out results

No GPU is used and nothing is timed: Triton's own compiler and the cuobjdump in its wheel give
registers, spills, shared memory and instructions. The second table is a model made of them: what
each instruction keeps of a multiprocessor's units, times how often it is executed at that shape. It
ranks designs by what must be done; latency, L2 and bank conflicts are not in it.

What is compiled is what is launched: each operator runs on tensors without data, and its launches
are recorded instead of made, then specialised as Triton does at run time.

Columns. tiles: the kernel's BLOCK_ values in its order (attention: D, then M queries, N keys). reg:
registers a thread. spill: bytes of stack a thread. smem: bytes a program. occ: programs and warps a
multiprocessor. load, store: widest global access in bytes. mma: tensor-core instruction. MB, GFLOP:
least traffic and matrix work of the operation at that shape. floor: the larger of the two on an
H200, in microseconds, which no kernel can beat.

Columns of the model, in microseconds of 132 multiprocessors at 1.755 GHz. tensor, shared, mufu,
fp32, int: the unit's time for all that is executed (shared: shared memory, with what wgmma reads
there and shuffles; fp32: also integer multiplication; int: also minimum, select, comparison and
conversion). issue: of all instructions, one a scheduler and clock. memory: MB at 4.3 TB/s. bound:
the longest of them, then the second. sum: of all but issue, as if no two units ever worked at once.
loops: the bound without what a program executes once. Documents: as if every tile were masked.
"""

import argparse
import json
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# Not this folder: transformers, which Liger imports, would take kernels.py for the package kernels.
sys.path[:] = [str(ROOT), *(p for p in sys.path if p != str(ROOT / "benchmarks"))]

from benchmarks import common  # noqa: E402

MODULES = ("attention", "layer_norm", "cross_entropy", "linear_cross_entropy")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
FP32_FLOP_PER_S = 67e12  # without tensor cores; NVIDIA's H200 data sheet
# Per multiprocessor: registers, shared memory in bytes, warps (CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability"); gfx942: AMD CDNA3 ISA, per compute unit.
REGISTERS = 65536
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100, "gfx942": 64}
WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48, "gfx942": 32}
MULTIPROCESSORS, CLOCK_HZ = 132, 1.755e9  # an H200's; NVIDIA names 1.98e9 as the highest
# A multiprocessor's fp32 lanes, lanes of the other arithmetic, and bf16 FMA a clock with fp32 sums.
# sm_100's matrix instructions do not say how large they are: not counted. Programming Guide, table
# "Throughput of Native Arithmetic Instructions"; tensor cores by the data sheets' peaks.
LANES = {"sm_80": (64, 64), "sm_90": (128, 64), "sm_100": (128, 64), "sm_120": (128, 64)}
TENSOR_FMA = {"sm_80": 1024, "sm_90": 2048, "sm_120": 512}
FP32_PIPE = re.compile(r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|IMAD")
INT_PIPE = re.compile(
    "FMNMX|FSEL|FSET|F2F|I2F|SEL|ISETP|IADD|VIADD|LEA|LOP|PLOP|SHF|PRMT|SGXT|VIMNMX|IMNMX|P2R|R2P"
)
UNITS = ("tensor", "shared", "mufu", "fp32", "int", "issue")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True)
class Config:
    """One launch, as Triton's compiler takes it."""

    op: str  # "attention fwd", "layer_norm bwd", ...
    shape: str  # the GPT-2 shape that the figures below are for, as text
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32", "constexpr"
    constexprs: dict[str, Any]
    divisible_by_16: tuple[str, ...]  # arguments known to be so, in value or address
    options: dict[str, int]  # num_warps, num_stages
    programs: int  # of the launch
    bytes: int  # least memory traffic of the operation at that shape
    flops: int  # tensor-core work at that shape


class Recorder:
    """Stands where a kernel stood, and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple) -> Callable:
        programs = math.prod(grid)
        return lambda *args, **kwargs: self.launches.append((self.kernel, programs, args, kwargs))


def specialised(kernel: Any, programs: int, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The fields of Config that a launch decides: None and 1 become constants, multiples of 16 are
    known as such, as at run time.
    """
    options = {key: kwargs.pop(key, 3) for key in ("num_warps", "num_stages")}
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constexprs, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        number = value if type(value) is int and not parameter.do_not_specialize else 0
        if parameter.is_constexpr or value is None or number == 1:
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            divisible.append(name)
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if type(value) is int and value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(name)
    return dict(kernel=kernel, signature=signature, constexprs=constexprs, options=options,
                programs=programs, divisible_by_16=tuple(divisible))  # fmt: skip


def attention_launches(meta):
    """With and without documents; the first shapes are GPT-2 124M's."""
    shapes = [(BF16, 32, 1024, 12, 64), (BF16, 128, 256, 12, 64), (FP16, 32, 1024, 12, 64)]
    shapes += [(BF16, 32, 1024, 24, 32), (BF16, 32, 1024, 10, 80), (BF16, 32, 1024, 6, 128)]
    shapes += [(FP32, 32, 1024, 12, 64), (FP32, 32, 1024, 6, 128)]
    for dtype, B, T, H, D in shapes:
        qkv, lse = meta(B, T, 3, H, D, dtype=dtype), meta(B, H, T)
        out = meta(B, T, H, D, dtype=dtype)
        head, products = B * T * H * D * dtype.itemsize, B * H * T * T * D  # causal: half of 2 ...
        for doc in (None, meta(B, T, dtype=torch.int32)):
            text = f"B{B} H{H} T{T} D{D} {TYPES[dtype]}" + ("" if doc is None else " docs")
            rest = B * H * T * 4 + (0 if doc is None else B * T * 4)
            yield "attention_fwd", (qkv, doc), [
                ("attention fwd", text, 4 * head + rest, 2 * products),
            ]  # fmt: skip
            more = 6 * head + rest + B * H * T * 4
            yield "attention_bwd", (out, qkv, out, lse, doc), [
                ("attention dq", text, more, 3 * products),
                ("attention dkv", text, more, 4 * products),
            ]  # fmt: skip


def layer_norm_launches(meta):
    """bf16 branches, an fp32 weight, a bf16 or fp32 stream, at GPT-2's widths."""
    M = 32768
    for C in (768, 1024, 1280, 1600):
        x, w = meta(M, C, dtype=BF16), meta(C)
        for dtype in (BF16, FP32):
            s, text, size = meta(M, C, dtype=dtype), f"{M} x {C}, {TYPES[dtype]} stream", M * C
            yield "layer_norm_fwd", (x, w, w, s, 1e-5, BF16), [
                ("layer_norm fwd", text, size * (4 + 2 * dtype.itemsize), 0),
            ]  # fmt: skip
            dx = 0 if dtype == BF16 else 2
            yield "layer_norm_bwd", (x, s, s, w, meta(M), meta(M), BF16, True, FP32), [
                ("layer_norm bwd", text, size * (2 + 3 * dtype.itemsize + dx), 0),
                ("layer_norm dw", f"partial rows x {C}", 0, 0),
            ]  # fmt: skip


def every_launch(meta):
    """(operator, its arguments, then of each launch: name, shape, bytes, FLOPs). Losses: of GPT-2's
    vocabulary, in bf16.
    """
    yield from attention_launches(meta)
    yield from layer_norm_launches(meta)
    N, V, width = 32768, 50257, 50304
    text, size = f"{N} x {V} in rows of {width}", N * V * 2
    logits, rows = meta(N, width, dtype=BF16)[:, :V], meta(N)
    targets = meta(N, dtype=torch.int64)
    yield "cross_entropy_fwd", (logits, targets, -100), [("cross_entropy fwd", text, size, 0)]
    for dloss in (meta(), rows):
        yield "cross_entropy_bwd", (dloss, logits, targets, rows, -100), [
            (f"cross_entropy bwd of {'a sum' if dloss.dim() == 0 else 'rows'}", text, 2 * size, 0)
        ]  # fmt: skip
    x, weight = meta(N, 768, dtype=BF16), meta(width, 768, dtype=BF16)
    yield "linear_cross_entropy_fwd", (x, weight, targets, -100, V, BF16, True, True), [
        ("cross_entropy fwd+bwd in place", text, 2 * size, 0)
    ]  # fmt: skip
    for name, n, given, made in (
        ("dx", N, BF16, BF16), ("dw", width, FP32, FP32), ("dw", width, FP32, BF16)
    ):  # fmt: skip
        text = f"{n} x 768, {TYPES[given]} to {TYPES[made]}"
        traffic = n * 768 * (given.itemsize + made.itemsize)
        yield "scaled", (meta(n, 768, dtype=given), meta(), made), [
            (f"linear_cross_entropy scale {name}", text, traffic, 0)
        ]  # fmt: skip


@cache
def shipped(arch: str) -> tuple[Config, ...]:
    """Every launch of every operator at GPT-2's sizes. For this process, kernels are recorders."""
    from triton_kernels import launch

    launches: list = []
    for module in (import_module(f"triton_kernels.{name}") for name in MODULES):
        for name, value in vars(module).items():
            if name.endswith("_kernel"):
                kernel = value.kernel if isinstance(value, Recorder) else value
                setattr(module, name, Recorder(kernel, launches))
        module.architecture = lambda device: arch
        module.multiprocessors = lambda device: MULTIPROCESSORS

    def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    configs: dict[tuple[str, str], Config] = {}
    for operator, args, expected in every_launch(meta):
        launches.clear()
        list(launch.OPERATORS[operator](*args))
        for given, (op, shape, n_bytes, flops) in zip(launches, expected, strict=True):
            fields = specialised(*given)
            n_bytes = n_bytes or sum(t.nbytes for t in given[2] if isinstance(t, torch.Tensor))
            # layer norm's second stage comes once with each stream, and is the same
            configs[op, shape] = Config(op, shape, bytes=n_bytes, flops=flops, **fields)
    return tuple(configs.values())


@cache
def peers() -> tuple[Config, ...]:
    """Liger's layer norm and in-place cross entropy, as its own functions launch them for 4 rows;
    counted for 32,768. None where it is not installed.
    """
    try:
        norm, loss = (import_module(f"liger_kernel.ops.{n}") for n in MODULES[1:3])
    except ImportError:
        return ()
    launches: list = []
    for module in (norm, loss):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Recorder(getattr(module, name), launches))
    x, w = torch.empty(4, 768, dtype=BF16), torch.empty(768)
    norm.layer_norm_forward(x, w, w, 1e-5)
    norm.layer_norm_backward(x, x, w, w, torch.empty(4), torch.empty(4))
    logits = torch.empty(4, 50304, dtype=BF16)[:, :50257].requires_grad_()
    ce = (None, -100, 0.0, 0.0, "sum", None, False, False, False)
    loss.cross_entropy_forward(logits, torch.zeros(4, dtype=torch.int64), *ce)
    M, V, shape = 32768, 50257, "32768 x 768"
    of = [("layer_norm fwd", shape, M * 768 * 4), ("layer_norm bwd", shape, M * 768 * 6)]
    of += [("cross_entropy fwd+bwd in place", f"{M} x {V}", M * V * 4)]
    configs = []
    for (kernel, _, args, kwargs), (op, text, n_bytes) in zip(launches, of, strict=True):
        fields = specialised(kernel, MULTIPROCESSORS if "bwd" in op.split() else M, args, kwargs)
        configs.append(Config(f"Liger {op}", text, bytes=n_bytes, flops=0, **fields))
    return tuple(configs)


def compile_config(config, arch: str):
    """The compiled kernel: .asm and .metadata."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    hip = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch[3:]), 32)
    names = config.kernel.arg_names
    divisible = [["tt.divisibility", 16]]
    source = ASTSource(
        config.kernel,
        signature=config.signature,
        constexprs=config.constexprs,
        attrs={(names.index(name),): divisible for name in config.divisible_by_16},
    )
    return triton.compile(source, target=target, options=config.options)


def resources(compiled, arch: str) -> tuple[int, int]:
    """Registers and bytes of stack a thread."""
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        count = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in (
            "vgpr_count", "vgpr_spill_count")}  # fmt: skip
        return count["vgpr_count"], 4 * count["vgpr_spill_count"]
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return int(found[1]), int(found[2]) + int(found[3])


def instructions(compiled) -> list[tuple[int, str, str]]:
    """Address, name and operands of each instruction that a warp may execute."""
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);"
    found = re.findall(line, text, re.MULTILINE)
    return [(int(at, 16), name, rest) for at, never, name, rest in found if never != "@!PT"]


def work_loops(code: list[tuple[int, str, str]]) -> list[range]:
    """Addresses of the innermost loops, in order: of those with exponentials where there are any,
    else of those with products of matrices or sums.
    """
    branches = ((at, re.findall(r"0x([0-9a-f]+)\s*$", rest)) for at, name, rest in code
                if name.startswith("BRA"))  # fmt: skip
    loops = {range(int(to[0], 16), at + 1) for at, to in branches if to and int(to[0], 16) < at}
    inner = [a for a in loops if not any(b != a and b[0] in a and b[-1] in a for b in loops)]
    for kinds in ("MUFU.EX2", ("FADD", "FFMA")):
        held = {a for a in inner if any(at in a and name.startswith(kinds) for at, name, _ in code)}
        if held:
            break
    return sorted(held, key=lambda a: a.start)


def cycles(name: str, rest: str, arch: str) -> dict[str, float]:
    """What one instruction of one warp keeps of each unit of a multiprocessor, in clocks."""
    fp32_lanes, lanes = LANES[arch]
    clocks = {"issue": 1 / 4}  # four schedulers
    if match := re.match(r"[HQ]GMMA\.64x(\d+)x16", name):  # of four warps together
        columns, left = int(match[1]), rest.split(",")[1].strip()
        clocks["tensor"] = 64 * columns * 16 / TENSOR_FMA[arch] / 4
        rows = columns + (64 if left.startswith("gdesc") else 0)  # operands in shared memory
        clocks["shared"] = rows * 16 * 2 / 128 / 4
    elif match := re.match(r"HMMA\.168(\d+)", name):
        clocks["tensor"] = 16 * 8 * int(match[1]) / TENSOR_FMA.get(arch, math.inf)
    elif name.startswith(("LDS", "STS", "LDGSTS")):  # also LDSM, STSM: matrices of 128 bytes
        wide = re.search(r"\.(128|64)\b|\.M\w*\.([24])\b", name)
        clocks["shared"] = {"128": 4, "64": 2, "4": 4, "2": 2}[wide[1] or wide[2]] if wide else 1
    elif name.startswith("SHFL"):
        clocks["shared"] = 1
    elif name.startswith("MUFU"):
        clocks["mufu"] = 32 / 16
    elif FP32_PIPE.match(name):
        half = name.startswith(("IMAD", "FFMA2", "FADD2", "FMUL2"))
        clocks["fp32"] = 32 / (64 if half else fp32_lanes)
    elif INT_PIPE.match(name):
        clocks["int"] = 32 / lanes
    return clocks


def trips(config: Config) -> list[tuple[float, bool]]:
    """Of each loop in the order of the source: iterations of all programs together, and whether it
    may be no loop because one iteration is known to be all.
    """
    c, kind = config.constexprs, config.op.split()
    if kind[0] == "attention":
        B, H, T = map(int, re.match(r"B(\d+) H(\d+) T(\d+)", config.shape).groups())
        BH, M, N = B * H, c["BLOCK_M"], c["BLOCK_N"]
        own, other = (N, M) if kind[1] == "dkv" else (M, N)
        cut = max(own, other) // other  # tiles on the diagonal
        diagonal = BH * (T // own) * cut
        plain = BH * sum(own * (i + 1) // other for i in range(T // own)) - diagonal
        if kind[1] == "dkv":
            rest = [(0, False), (plain, False)] if c["HAS_DOC"] else [(plain, False), (0, False)]
            return [(diagonal, False), *rest]
        first = [(plain, False), (0, False)] if c["HAS_DOC"] else [(plain, False)]
        return [*first, (diagonal, cut == 1)]
    if kind[0] == "cross_entropy":
        V, width = 50257, 50304
        whole = V // c["BLOCK"]
        tails = [math.ceil((n - whole * c["BLOCK"]) / c["TAIL"]) for n in (V, width)]
        forward, backward = ([(n * config.programs, False) for n in (whole, tail)]
                             for tail in tails)  # fmt: skip
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[kind[1]]
    rows = re.match(r"(\d+) x", config.shape)
    if kind[:2] == ["Liger", "cross_entropy"]:
        return [(config.programs * math.ceil(50257 / c["BLOCK_SIZE"]), False)] * 2
    if kind[:3] == ["Liger", "layer_norm", "bwd"]:
        return [(int(rows[1]), False)]
    if kind[:2] == ["layer_norm", "bwd"]:
        return [(math.ceil(int(rows[1]) / c["BLOCK_M"]), False)]
    return []


def model(config: Config, compiled, arch: str) -> dict[str, float]:
    """Microseconds of each unit, and the instructions of each loop. Empty where it does not apply:
    on AMD's GPUs, and for products in fp32, which are for checking.
    """
    if arch not in LANES or "fp32" in config.shape and config.op.startswith("attention"):
        return {}
    code, expected = instructions(compiled), trips(config)
    loops = work_loops(code) if expected else []
    if len(loops) != len(expected):
        expected = [(n, once) for n, once in expected if not once]
    if len(loops) != len(expected):
        raise ValueError(f"{len(loops)} loops in the code where the model expects {len(expected)}")
    warps, per_us = config.options["num_warps"], MULTIPROCESSORS * CLOCK_HZ / 1e6
    total, looped = (dict.fromkeys(UNITS, 0.0) for _ in range(2))
    counts = [0] * len(loops)
    for at, name, rest in code:
        where = next((i for i, loop in enumerate(loops) if at in loop), None)
        times = config.programs if where is None else expected[where][0]
        for unit, clocks in cycles(name, rest, arch).items():
            total[unit] += times * warps * clocks / per_us
            looped[unit] += 0 if where is None else times * warps * clocks / per_us
        if where is not None:
            counts[where] += 1
    total["memory"] = 1e6 * config.bytes / common.H200_COPY_BYTES_PER_S
    order = sorted(total, key=total.get, reverse=True)
    return total | {
        "bound": total[order[0]], "by": order[0], "second": total[order[1]], "then": order[1],
        "sum": sum(total.values()) - total["issue"], "loops": max(looped.values()),
        "counts": counts,
    }  # fmt: skip


def widest_access(compiled, arch: str, kind: str) -> int:
    """Bytes of the widest global "load" or "store"."""
    if arch.startswith("gfx"):
        widths = re.findall(rf"(?:global|buffer)_{kind}_(dwordx?\d?|u?short|[us]?byte)",
                            compiled.asm["amdgcn"])  # fmt: skip
        size = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
        return max((size.get(width, 2) for width in widths), default=0)
    ptx = compiled.asm["ptx"]
    instruction = {"load": "ld", "store": "st"}[kind]
    plain = re.findall(rf"\b{instruction}\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)", ptx)
    widths = [int(vector or 1) * int(bits) // 8 for vector, bits in plain]
    if kind == "load":
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x\w+|\d+)", ptx)
        widths += [int(width, 0) for width in copies]
    return max(widths, default=0)


def tensor_core(compiled) -> str:
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    names = (("tcgen05.mma", "tcgen05"), ("wgmma.mma_async", "wgmma"), ("mma.sync", "mma"))
    return next((name for token, name in (*names, ("v_mfma", "mfma")) if token in text), "-")


def resident_programs(arch: str, registers: int, shared: int, warps: int) -> int:
    """Programs that fit on a multiprocessor by registers, shared memory and warps."""
    if arch.startswith("gfx"):  # 512 registers a lane and 4 SIMDs of at most 8 waves
        by_registers = min(512 // max(8 * math.ceil(registers / 8), 1), 8) * 4 // warps
        return min(by_registers, SHARED[arch] * 1024 // max(shared, 1))
    a_warp = 32 * 8 * math.ceil(registers / 8)  # allocated in units of 8 a thread
    by_shared = SHARED[arch] * 1024 // (shared + 1024)  # 1 KB a program is the system's
    return min(REGISTERS // (a_warp * warps), by_shared, WARPS[arch] // warps, 32)


def report(arch: str, index: int) -> dict | str:
    """One row, or the line that says why it does not compile; after our kernels come the peers'."""
    config = (*shipped(arch), *peers())[index]
    try:
        compiled = compile_config(config, arch)
        modelled = model(config, compiled, arch)
    except Exception as error:  # whatever the compiler raises is the finding
        return f"{config.op}, {config.shape}: {type(error).__name__}: {str(error)[:300]}"
    registers, spill = resources(compiled, arch)
    shared, warps = compiled.metadata.shared, config.options["num_warps"]
    mma = tensor_core(compiled)
    peak = FP32_FLOP_PER_S if mma == "-" else common.H200_BF16_FLOPS_PER_S
    blocks = [value for name, value in config.constexprs.items() if name.startswith("BLOCK")]
    return {
        "op": config.op, "shape": config.shape, "tiles": "x".join(map(str, blocks)),
        "warps": warps, "stages": config.options["num_stages"], "registers": registers,
        "spill": spill, "shared": shared,
        "programs": resident_programs(arch, registers, shared, warps),
        "load": widest_access(compiled, arch, "load"),
        "store": widest_access(compiled, arch, "store"), "mma": mma, "bytes": config.bytes,
        "flops": config.flops,
        "floor_us": 1e6 * max(config.bytes / common.H200_COPY_BYTES_PER_S, config.flops / peak),
        "model": modelled,
    }  # fmt: skip


HEADER = "op shape tiles warps stages reg spill smem occ load store mma MB GFLOP floor".split()


def table(rows: list[dict]) -> str:
    cells = []
    for r in rows:
        shown = r | {
            "programs": f"{r['programs']} ({r['programs'] * r['warps']}w)",
            "bytes": f"{r['bytes'] / 1e6:.0f}", "flops": f"{r['flops'] / 1e9:.1f}",
            "floor_us": f"{r['floor_us']:.0f}",
        }  # fmt: skip
        cells.append([str(value) for key, value in shown.items() if key != "model"])
    return common.markdown_table(HEADER, cells)


MODEL_HEADER = [*"op shape".split(), *UNITS, *"memory bound second sum loops instructions".split()]


def model_table(rows: list[dict]) -> str:
    cells = []
    for r in rows:
        if m := r["model"]:
            us = [f"{m[unit]:.0f}" for unit in (*UNITS, "memory")]
            longest = [f"{m['by']} {m['bound']:.0f}", f"{m['then']} {m['second']:.0f}"]
            rest = [f"{m['sum']:.0f}", f"{m['loops']:.0f}", " ".join(map(str, m["counts"]))]
            cells.append([r["op"], r["shape"], *us, *longest, *rest])
    return common.markdown_table(MODEL_HEADER, cells)


def record(out: Path, arch: str, version: str, rows: list[dict]) -> None:
    """Adds this Triton's figures to out/static.json, and writes all versions' as a table."""
    path = out / "static.json"
    found = json.loads(path.read_text())["kernels"] if path.exists() else {}
    for r in rows:
        us = [round(r["model"].get(key, 0), 1) for key in ("bound", "issue")]
        kernels = found.setdefault(arch, {}).setdefault(f"{r['op']}, {r['shape']}", {})
        kernels[version] = [r["registers"], r["spill"], *us]
    text = [
        f"Commit {common.git_state()['commit']}. Of each Triton: registers, bytes spilled, bound"
        " and issue by the model in us. Compiled ahead of time; nothing was timed."
    ]
    for name, kernels in found.items():
        tritons = sorted({version for of in kernels.values() for version in of})
        cells = [[key, *(" ".join(f"{n:g}" for n in of.get(v, ())) for v in tritons)]
                 for key, of in kernels.items()]  # fmt: skip
        text += [name, common.markdown_table(["kernel", *tritons], cells)]
    common.write_results(out, "static", "\n\n".join(text), {"kernels": found})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_90", choices=[*ARCHITECTURES, "all"])
    parser.add_argument("--op", default="", help="only operations whose name contains this")
    parser.add_argument("--shape", default="", help="only shapes whose text contains this")
    parser.add_argument(
        "--out", type=Path, help="folder for of static and static_<arch>, .json and .md"
    )
    parser.add_argument("--peers", action="store_true", help="also Liger's, where installed")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    args = parser.parse_args()

    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    failed = False
    pool = ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn"))
    for arch in ARCHITECTURES if args.arch == "all" else [args.arch]:
        configs = (*shipped(arch), *(peers() if args.peers else ()))
        wanted = [i for i, c in enumerate(configs) if args.op in c.op and args.shape in c.shape]
        found = list(pool.map(report, [arch] * len(wanted), wanted))
        rows = [row for row in found if isinstance(row, dict)]
        errors = [row for row in found if isinstance(row, str)]
        failed |= bool(errors) or not wanted
        print(f"{arch}, Triton {triton.__version__}, ahead of time: nothing here was timed")
        tables = f"{table(rows)}\n\n{model_table(rows)}"
        print(tables)
        print("\n".join(errors) if wanted else "no such operation")
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            about = dict(arch=arch, triton=triton.__version__, command=" ".join(sys.argv))
            content = dict(about, rows=rows, errors=errors)
            (args.out / f"static_{arch}.json").write_text(json.dumps(content, indent=1) + "\n")
            title = f"{arch}, Triton {triton.__version__}, compiled ahead of time\n\n"
            (args.out / f"static_{arch}.md").write_text(title + tables + "\n")
            record(args.out, arch, triton.__version__, rows)
    pool.shutdown()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
