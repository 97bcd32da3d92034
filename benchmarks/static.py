"""What every shipped kernel compiles to, for architectures that need not be at hand.

    python benchmarks/static.py                                  all kernels for sm_90
    python benchmarks/static.py --arch sm_100 --op attention --out results

No GPU is used and nothing is timed: Triton's own compiler and the cuobjdump in its wheel give
registers, spills, shared memory and instructions. This rules out bad configurations; it does not
rank good ones (latency, L2 and bank conflicts are not in it).

Columns. tiles: the kernel's BLOCK_ values in its order (attention: D, then M queries, N keys). reg:
registers a thread. spill: bytes of stack a thread. smem: bytes a program. occ: programs and warps a
multiprocessor. load, store: widest global access in bytes. mma: tensor-core instruction. MB, GFLOP:
least traffic and matrix work of the operation at that shape. floor: the larger of the two on an
H200, in microseconds, which no kernel can beat.
"""

import argparse
import importlib
import importlib.util
import json
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("attention", "layer_norm", "cross_entropy", "linear_cross_entropy")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# H200, measured: device-to-device copy and the best large bf16 matrix product.
COPY_BYTES_PER_S = 4.3e12
MATRIX_FLOP_PER_S = 790e12
FP32_FLOP_PER_S = 67e12  # without tensor cores; NVIDIA's H200 data sheet
# Per multiprocessor: registers, shared memory in bytes, warps (CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability"); gfx942: AMD CDNA3 ISA, per compute unit.
REGISTERS = 65536
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100, "gfx942": 64}
WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48, "gfx942": 32}


@dataclass(frozen=True)
class Row:
    op: str
    shape: str
    tiles: str
    warps: int
    stages: int
    registers: int
    spill: int
    shared: int
    programs: int  # resident a multiprocessor
    load: int
    store: int
    mma: str
    bytes: int
    flops: int
    floor_us: float


@cache
def shipped(arch: str) -> tuple:
    """All StaticConfigs of all kernel modules."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    configs = []
    for name in MODULES:
        if importlib.util.find_spec(f"triton_kernels.{name}") is None:
            continue
        module = importlib.import_module(f"triton_kernels.{name}")
        configs += getattr(module, "static_configs", lambda arch: [])(arch)
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
        signature={name: config.signature[name] for name in names},
        constexprs=config.constexprs,
        attrs={(names.index(name),): divisible for name in config.divisible_by_16},
    )
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, **config.options)
    return triton.compile(source, target=target, options=options)


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


def report(arch: str, index: int) -> Row | str:
    """One row, or the line that says why it does not compile."""
    config = shipped(arch)[index]
    try:
        compiled = compile_config(config, arch)
    except Exception as error:  # whatever the compiler raises is the finding
        return f"{config.op}, {config.shape}: {type(error).__name__}: {str(error)[:300]}"
    registers, spill = resources(compiled, arch)
    mma = tensor_core(compiled)
    peak = FP32_FLOP_PER_S if mma == "-" else MATRIX_FLOP_PER_S
    blocks = [value for name, value in config.constexprs.items() if name.startswith("BLOCK")]
    return Row(
        op=config.op,
        shape=config.shape,
        tiles="x".join(map(str, blocks)),
        warps=config.num_warps,
        stages=config.num_stages,
        registers=registers,
        spill=spill,
        shared=compiled.metadata.shared,
        programs=resident_programs(arch, registers, compiled.metadata.shared, config.num_warps),
        load=widest_access(compiled, arch, "load"),
        store=widest_access(compiled, arch, "store"),
        mma=mma,
        bytes=config.bytes,
        flops=config.flops,
        floor_us=1e6 * max(config.bytes / COPY_BYTES_PER_S, config.flops / peak),
    )


HEADER = "op shape tiles warps stages reg spill smem occ load store mma MB GFLOP floor".split()


def cells(row: Row) -> list[str]:
    return [
        row.op, row.shape, row.tiles, str(row.warps), str(row.stages), str(row.registers),
        str(row.spill), str(row.shared), f"{row.programs} ({row.programs * row.warps}w)",
        str(row.load), str(row.store), row.mma, f"{row.bytes / 1e6:.0f}",
        f"{row.flops / 1e9:.1f}", f"{row.floor_us:.0f}",
    ]  # fmt: skip


def table(rows: list[Row], *, markdown: bool) -> str:
    lines = [HEADER] + [cells(row) for row in rows]
    if markdown:
        lines.insert(1, ["---"] * len(HEADER))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_90", choices=[*ARCHITECTURES, "all"])
    parser.add_argument("--op", default="", help="only operations whose name contains this")
    parser.add_argument("--shape", default="", help="only shapes whose text contains this")
    parser.add_argument("--out", type=Path, help="folder for static_<arch>.json and .md")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    args = parser.parse_args()

    import triton

    failed = False
    pool = ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn"))
    for arch in ARCHITECTURES if args.arch == "all" else [args.arch]:
        configs = shipped(arch)
        if any(not isinstance(config.kernel, triton.JITFunction) for config in configs):
            parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
        wanted = [i for i, c in enumerate(configs) if args.op in c.op and args.shape in c.shape]
        found = list(pool.map(report, [arch] * len(wanted), wanted))
        rows = [row for row in found if isinstance(row, Row)]
        errors = [row for row in found if isinstance(row, str)]
        failed |= bool(errors) or not wanted
        print(f"{arch}, Triton {triton.__version__}, ahead of time: nothing here was timed")
        print(table(rows, markdown=False))
        print("\n".join(errors) if wanted else "no such operation")
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            about = dict(arch=arch, triton=triton.__version__, command=" ".join(sys.argv))
            content = dict(about, rows=[asdict(row) for row in rows], errors=errors)
            (args.out / f"static_{arch}.json").write_text(json.dumps(content, indent=1) + "\n")
            title = f"{arch}, Triton {triton.__version__}, compiled ahead of time\n\n"
            (args.out / f"static_{arch}.md").write_text(title + table(rows, markdown=True) + "\n")
    pool.shutdown()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
