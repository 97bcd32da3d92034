"""Each kernel against PyTorch: first that it is right, then how long it takes and how near the
hardware's limit that is; and other tiles than those that triton_kernels/launch.py ships.

    python benchmarks/kernels.py                     all operations and shapes
    python benchmarks/kernels.py --quick             one shape each, those of the targets
    python benchmarks/kernels.py --op layer_norm     one operation (repeat the option for more)
    python benchmarks/kernels.py --tune              other tiles, at GPT-2 124M's shapes
    python benchmarks/kernels.py --tune --op attention --heads 25    gpt2-xl's, 1600 wide

Runs from a checkout, without installing. On a CUDA GPU it prints a table and writes kernels.json,
kernels.md and kernels.png, or tune.json and tune.md, under --out. On a CPU it times nothing: it
runs the parity check at small shapes through Triton's interpreter and prints the static roofline.

Parity: tests/kernel_rule.py. Timing and ceilings: benchmarks/common.py. Floor: for each phase of an
operation the larger of its least bytes over the copy bandwidth and its FLOPs over the matmul rate,
summed over phases; "of floor" is that time over the median. Attention counts 4 B H T^2 D / 2 FLOPs
forward and 2.5 times that backward, the convention of its papers. SDPA and flex_attention get
separate q, k and v and return three gradients, so they pay for no packing, which a model with one
c_attn would; eager and torch.compile start from the packed tensor, as ours does. FA3, FA4 and
flex_attention's FLASH (the modules flash_attn_interface and flash_attn.cute) are timed where they
are installed; elsewhere their rows say what is missing.

--tune takes one kernel after the other: each candidate takes the table's place, must pass the
parity check, and is timed in the mode that the kernel decides (attention's dq and dk/dv in the
whole backward pass). Then the fastest stays in place while the next kernel is tried. A candidate
that does not compile, does not fit or is wrong says so instead of a time. Nothing is changed in
launch.py: the last lines printed are the entries that would make it faster.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton_kernels is imported

import triton_kernels  # noqa: E402
from benchmarks import common  # noqa: E402
from tests import kernel_rule  # noqa: E402
from triton_kernels import launch, reference  # noqa: E402
from triton_kernels.launch import AttentionTiles, CrossEntropyTile  # noqa: E402

V, PADDED_V = 50257, 50304
OURS = "gpt2-triton"
OPS = ("layer_norm", "cross_entropy", "linear_cross_entropy", "attention")
WORTH = 0.98  # of the shipped tile's time: below it, a candidate is said to be better
BF16 = torch.bfloat16
Phases = dict[str, list[tuple[int, int]]]  # mode -> (bytes, FLOPs) of each phase


@dataclass
class Problem:
    """One operation at one shape: what to call, on what, and the least work that it is."""

    op: str
    shape: str
    inputs: list[Tensor]  # all of them get a gradient
    providers: dict[str, Callable]  # each of inputs -> tuple of outputs; ours first
    check: Callable[[], None]  # raises AssertionError where ours are not right
    phases: Phases
    own_inputs: dict[str, list[Tensor]] = field(default_factory=dict)  # where one needs others


def _tensor(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype)  # on the default device, which main sets


def _providers(call: Callable, liger: Callable, eager: Callable | None = None) -> dict:
    """call(triton_kernels, ...), Liger's, and call(reference, ...) or eager, also compiled."""
    eager = eager or partial(call, reference)
    compiled = torch.compile(eager, dynamic=False)
    ours = {OURS: partial(call, triton_kernels)}
    return ours | {"eager": eager, "torch.compile": compiled, "Liger": liger}


def layer_norm_problem(M: int, C: int, dtype: torch.dtype = BF16) -> Problem:
    def call(module, x, residual, weight, bias) -> tuple:
        return module.layer_norm(x, weight, bias, residual=residual)

    def liger(x, residual, weight, bias) -> tuple:
        from liger_kernel.transformers.functional import liger_layer_norm

        summed = x + residual
        return liger_layer_norm(summed, weight, bias, 1e-5), summed

    x, residual, weight, bias = (_tensor(*s, dtype=dtype) for s in ((M, C), (M, C), (C,), (C,)))
    once = [(4 * M * C * dtype.itemsize, 0)]
    return Problem(
        "layer_norm", f"{M} x {C}", [x, residual, weight, bias], _providers(call, liger),
        partial(kernel_rule.check_layer_norm, x, weight, bias, residual),
        {"forward": once, "backward": once, "forward+backward": 2 * once},
    )  # fmt: skip


def cross_entropy_problem(N: int, classes: int, stride: int, dtype: torch.dtype = BF16) -> Problem:
    targets = torch.randint(classes, (N,))

    def call(module, logits, **options) -> tuple:
        return (module.cross_entropy(logits, targets, **options),)

    def liger(logits) -> tuple:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return (liger_cross_entropy(logits, targets),)

    def check() -> None:
        for in_place in (False, True):
            kernel_rule.check_cross_entropy(buffer, targets, classes, inplace_backward=in_place)

    buffer = _tensor(N, stride, scale=2.0, dtype=dtype)
    in_place = {f"{OURS} in place": partial(call, triton_kernels, inplace_backward=True)}
    size = N * classes * dtype.itemsize
    return Problem(
        "cross_entropy", f"{N} x {classes} in {stride}", [buffer[:, :classes]],
        in_place | _providers(call, liger), check,
        {"forward": [(size, 0)], "forward+backward": [(2 * size, 0)]},
    )  # fmt: skip


def linear_cross_entropy_problem(
    N: int, C: int, classes: int, rows: int, dtype: torch.dtype = BF16
) -> Problem:
    targets = torch.randint(classes, (N,))

    def call(module, x, weight) -> tuple:
        return (module.linear_cross_entropy(x, weight, targets, vocab_size=classes),)

    def torch_own(x, weight) -> tuple:
        return (F.linear_cross_entropy(x, weight[:classes], targets),)

    def liger(x, weight) -> tuple:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return (LigerFusedLinearCrossEntropyLoss()(weight[:classes], x, targets),)

    def all_rows(x, weight) -> tuple:  # over the padding too, which costs less than cutting it off
        return (F.cross_entropy(F.linear(x, weight).float(), targets),)

    providers = _providers(call, liger, all_rows)
    if hasattr(F, "linear_cross_entropy"):
        providers["F.linear_cross_entropy"] = torch_own
    x, weight = _tensor(N, C, dtype=dtype), _tensor(rows, C, scale=0.05, dtype=dtype)
    matmul, logits = 2 * N * C * classes, N * classes * dtype.itemsize
    both = [(0, 3 * matmul), (2 * logits, 0)]
    return Problem(
        "linear_cross_entropy", f"{N} x {C} x {classes} in {rows}", [x, weight], providers,
        partial(kernel_rule.check_linear_cross_entropy, x, weight, targets, vocab_size=classes),
        {"forward": [(0, matmul), (logits, 0)], "forward+backward": both},
    )  # fmt: skip


def attention_problem(B: int, T: int, H: int, D: int, dtype: torch.dtype = BF16) -> Problem:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(module, qkv) -> tuple:
        return (module.attention(qkv),)

    def sdpa(backend, implementation, *qkv) -> tuple:
        _use_flash(implementation)
        q, k, v = (t.transpose(1, 2) for t in qkv)  # (B, H, T, D)
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)

    providers = _providers(call, None)
    del providers["Liger"]
    own_inputs = {}
    if HAS_CUDA:
        apart = {
            "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION, None),
            "SDPA FA3": partial(sdpa, SDPBackend.FLASH_ATTENTION, "FA3"),
            "SDPA FA4": partial(sdpa, SDPBackend.FLASH_ATTENTION, "FA4"),
            "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION, None),
            "flex_attention": _flex_attention(T, "TRITON"),
            "flex_attention FLASH": _flex_attention(T, "FLASH"),
        }
        providers |= apart
        own_inputs = dict.fromkeys(apart, [_tensor(B, T, H, D, dtype=dtype) for _ in "qkv"])
    qkv = _tensor(B, T, 3, H, D, dtype=dtype)
    size, flops = B * T * H * D * dtype.itemsize, 2 * B * H * T * T * D
    forward, backward = (4 * size, flops), (8 * size, flops * 5 // 2)
    return Problem(
        "attention", f"B{B} T{T} H{H} D{D}", [qkv], providers,
        partial(kernel_rule.check_attention, qkv),
        {"forward": [forward], "backward": [backward], "forward+backward": [forward, backward]},
        own_inputs,
    )  # fmt: skip


def _use_flash(implementation: str | None) -> None:
    """Which kernels torch's FLASH_ATTENTION means from now on: "FA3" or "FA4", None: torch's own.

    Raises ImportError or RuntimeError where they are not installed.
    """
    from torch.nn import attention

    if attention.current_flash_attention_impl() != implementation:
        if implementation is None:
            attention.restore_flash_attention_impl()
        else:
            attention.activate_flash_attention_impl(implementation)


def _flex_attention(T: int, backend: str) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(*qkv: Tensor) -> tuple:
        q, k, v = (t.transpose(1, 2) for t in qkv)
        out = compiled(q, k, v, block_mask=mask, kernel_options={"BACKEND": backend})
        return (out.transpose(1, 2),)

    return call


def timed_problems(ops: list[str], quick: bool) -> Iterator[Callable[[], Problem]]:
    """Builders of the problems to time, the shapes of the targets first."""
    tokens = [32768] if quick else [32768, 8192, 65536]
    widths = [768] if quick else [768, 1024, 1280, 1600]
    sizes = [(32768, C) for C in widths] + [(N, 768) for N in tokens[1:]]
    if "layer_norm" in ops:
        yield from (partial(layer_norm_problem, M, C) for M, C in sizes)
    if "cross_entropy" in ops:
        yield from (partial(cross_entropy_problem, N, V, PADDED_V) for N in tokens)
    if "linear_cross_entropy" in ops:
        yield from (partial(linear_cross_entropy_problem, N, C, V, PADDED_V) for N, C in sizes)
    if "attention" in ops:
        yield from (partial(attention_problem, 32, 1024, C // 64, 64) for C in widths)
        lengths = [] if quick else [2048, 4096, 8192, 16384]
        yield from (partial(attention_problem, 32768 // T, T, 12, 64) for T in lengths)


def parity_problems(ops: list[str]) -> Iterator[Problem]:
    """Small problems of odd shape; bf16 on a GPU, fp32 and fp16 through the interpreter, whose bf16
    is not a GPU's.
    """
    for dtype in (BF16,) if HAS_CUDA else (torch.float32, torch.float16):
        if "layer_norm" in ops:
            yield from (layer_norm_problem(67, C, dtype) for C in (768, 1600))
        if "cross_entropy" in ops:
            yield cross_entropy_problem(5, V, PADDED_V, dtype)
        if "linear_cross_entropy" in ops:
            yield linear_cross_entropy_problem(7, 64, 5000, 5056, dtype)
        if "attention" in ops:
            yield attention_problem(1, 200, 2, 64, dtype)


def time_problem(problem: Problem, ceilings: dict[str, float]) -> list[dict]:
    """One record for each provider and mode; a provider that cannot run says why instead of a
    time.
    """
    records = []
    for provider, function in problem.providers.items():
        for mode, phases in problem.phases.items():
            record = {"op": problem.op, "shape": problem.shape, "mode": mode, "provider": provider}
            records.append(record)
            try:
                timing = _time(function, problem.own_inputs.get(provider, problem.inputs), mode)
            except (ImportError, RuntimeError) as error:  # not installed or supported, no memory
                record["error"] = _first_line(error)
                torch.cuda.empty_cache()
                continue
            floor = 1e3 * floor_seconds(phases, *ceilings.values())
            n_bytes, flops = (sum(amounts) for amounts in zip(*phases, strict=True))
            record |= {
                "timing_ms": timing, "gb_per_s": n_bytes / timing.median * 1e-6,
                "tflop_per_s": flops / timing.median * 1e-9, "floor_ms": floor,
                "of_floor": floor / timing.median,
            }  # fmt: skip
    return records


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _time(function: Callable, inputs: list[Tensor], mode: str) -> common.Timing:
    leaves = [t.detach().requires_grad_(mode != "forward") for t in inputs]
    if mode == "forward":
        return common.measure(lambda: function(*leaves))
    upstream = [torch.randn_like(o) if o.dim() else None for o in function(*leaves)]

    def backward(*outputs: Tensor) -> None:
        torch.autograd.grad(outputs, leaves, upstream)

    if mode == "backward":
        return common.measure(backward, prepare=lambda: function(*leaves))
    return common.measure(lambda: backward(*function(*leaves)))


def floor_seconds(phases: list[tuple[int, int]], bytes_per_s: float, flops_per_s: float) -> float:
    return sum(max(n_bytes / bytes_per_s, flops / flops_per_s) for n_bytes, flops in phases)


def table(records: list[dict]) -> str:
    header = "op shape mode provider median_us p20..p80 GB/s TFLOP/s of_floor peak_MB".split()
    rows = []
    for r in records:
        row = [r["op"], r["shape"], r["mode"], r["provider"]]
        if "error" in r:
            rows.append(row + [r["error"][:40], *[""] * 5])
            continue
        t, flops = r["timing_ms"], r["tflop_per_s"]
        row += [f"{1e3 * t.median:,.1f}", f"{1e3 * t.p20:,.1f}..{1e3 * t.p80:,.1f}"]
        row += [f"{r['gb_per_s']:,.0f}", f"{flops:,.0f}" if flops else "", f"{r['of_floor']:.0%}"]
        rows.append(row + [f"{t.peak_bytes / 1e6:,.0f}"])
    return common.markdown_table(header, rows)


def static_table(problems: list[Problem]) -> str:
    ceilings = common.H200_COPY_BYTES_PER_S, common.H200_BF16_FLOPS_PER_S
    rows = []
    for p in problems:
        for mode, phases in p.phases.items():
            n_bytes, flops = (sum(amounts) for amounts in zip(*phases, strict=True))
            floor = f"{1e6 * floor_seconds(phases, *ceilings):,.1f}"
            work = [f"{n_bytes / 1e6:,.0f}", f"{flops / 1e9:,.0f}", floor]
            rows.append([p.op, p.shape, mode, *work])
    return common.markdown_table("op shape mode least_MB GFLOP floor_us".split(), rows)


def panels(records: list[dict]) -> dict[str, dict[str, float]]:
    """Of each operation the first shape's forward+backward: milliseconds by provider, and floor."""
    found: dict[str, dict[str, float]] = {}
    shapes: dict[str, str] = {}
    for r in records:
        if r["mode"] != "forward+backward" or "error" in r:
            continue
        if shapes.setdefault(r["op"], r["shape"]) == r["shape"]:
            bars = found.setdefault(f"{r['op']}, {r['shape']}", {"floor": r["floor_ms"]})
            bars[r["provider"]] = r["timing_ms"].median
    return found


# --- other tiles ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A table entry that is tried. table[key] is the shipped one; mode: what is timed."""

    name: str
    table: dict
    key: object
    candidates: list
    mode: str
    problem: Callable[[], Problem]  # at full size
    small: Callable[[], Problem]  # for the parity check


def all_kernels(arch: str, heads: int, tokens: int) -> list[Kernel]:
    """The kernels with their candidates; widths are 64 x heads, rows of 1,024 tokens."""
    width = 64 * heads
    dtype = BF16 if arch != "interpret" else torch.float16
    attention = launch.for_architecture(launch.ATTENTION, arch)
    norm = launch.for_architecture(launch.LAYER_NORM, arch)
    losses, norm_key = launch.CROSS_ENTROPY, min(limit for limit in norm if limit >= width)
    loss_key = next(a for a in losses if losses[a] is launch.for_architecture(losses, arch))

    def tiles(kernel: str, *shapes: tuple[int, int, int, int]) -> Kernel:
        table = attention[kernel][min(limit for limit in attention[kernel] if limit >= 64)]
        return Kernel(
            f"attention {kernel}", table, max(table), [AttentionTiles(*s) for s in shapes],
            "forward" if kernel == "fwd" else "backward",
            partial(attention_problem, tokens // 1024, 1024, heads, 64),
            partial(attention_problem, 1, 200, 2, 64, dtype),
        )  # fmt: skip

    def norms(name: str, mode: str, **changes: tuple[int, ...]) -> Kernel:
        candidates = [replace(norm[norm_key], **{k: v}) for k, vs in changes.items() for v in vs]
        return Kernel(
            name, norm, norm_key, candidates, mode, partial(layer_norm_problem, tokens, width),
            partial(layer_norm_problem, 67, width, dtype),
        )  # fmt: skip

    loss_tiles = [
        (4096, 2048, 8), (2048, 1024, 8), (2048, 2048, 4), (8192, 2048, 16), (8192, 4096, 32),
        (4096, 1024, 32), (16384, 2048, 32),
    ]  # fmt: skip
    return [
        # Queries x keys, warps, stages. Each compiles for sm_90 without a spill, with and without
        # documents; dk/dv with 128 queries spills at any number of warps.
        tiles(
            "fwd", (128, 64, 4, 2), (128, 64, 4, 4), (64, 64, 4, 3), (64, 64, 4, 4),
            (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
        ),
        tiles(
            "dkv", (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 3), (32, 128, 8, 2),
            (64, 128, 8, 2), (64, 128, 8, 3),
        ),
        tiles(
            "dq", (64, 64, 4, 2), (64, 64, 4, 4), (128, 64, 8, 2), (128, 64, 8, 3),
            (128, 32, 4, 3), (64, 32, 4, 3),
        ),
        norms("layer_norm", "forward", fwd_rows=(1, 2, 8), fwd_warps=(2, 8)),
        norms(
            "layer_norm backward", "backward", bwd_stages=(1, 3), bwd_programs=(2, 3, 5, 8),
            bwd_rows=(1, 4), bwd_warps=(8,), dw_parts=(64, 256), dw_cols=(32,),
        ),
        Kernel(
            "cross_entropy", losses, loss_key, [CrossEntropyTile(*t) for t in loss_tiles],
            "forward+backward", partial(cross_entropy_problem, tokens, V, PADDED_V),
            partial(cross_entropy_problem, 5, V, PADDED_V, dtype),
        ),
    ]  # fmt: skip


@contextmanager
def in_place(kernel: Kernel, tile) -> Iterator[None]:
    """tile where the shipped one stands."""
    shipped = kernel.table[kernel.key]
    kernel.table[kernel.key] = tile
    try:
        yield
    finally:
        kernel.table[kernel.key] = shipped


def try_tile(kernel: Kernel, tile, device: torch.device, problem: Problem | None) -> dict:
    """A record of one candidate: its time, or why it has none. problem None: parity alone."""
    record = {"kernel": kernel.name, "tile": repr(tile)}
    with in_place(kernel, tile):
        try:
            with device:
                torch.manual_seed(0)
                kernel.small().check()
            if problem is None:
                return record
            timing = _time(next(iter(problem.providers.values())), problem.inputs, kernel.mode)
        except Exception as error:  # Triton has many, for tiles that a device cannot have
            return record | {"error": _first_line(error)}
    return record | {"us": 1e3 * timing.median, "p20": 1e3 * timing.p20, "p80": 1e3 * timing.p80}


def tune_kernel(kernel: Kernel, device: torch.device, timed: bool) -> list[dict]:
    """Records of the shipped tile and of every candidate; leaves the fastest in place."""
    problem = None
    if timed:
        with device:
            problem = kernel.problem()
    shipped = kernel.table[kernel.key]
    tiles = [shipped, *(t for t in kernel.candidates if t != shipped)]
    records = []
    for tile in tiles:
        records.append(try_tile(kernel, tile, device, problem))
        shown = records[-1].get("error") or f"{records[-1].get('us', 0):,.1f} us" * timed or "right"
        print(f"{kernel.name:<20} {tile}  {shown}", flush=True)
    times = {i: r["us"] for i, r in enumerate(records) if "us" in r}
    best = min(times, key=times.get, default=0)
    if 0 in times and times[best] < WORTH * times[0]:
        kernel.table[kernel.key] = tiles[best]
        records[best]["better"] = times[0] / times[best]
    return records


def tune(options: argparse.Namespace, device: torch.device) -> int:
    arch = launch.architecture(device)
    found = all_kernels(arch, options.heads, options.tokens)
    chosen = [k for k in found if k.name.split()[0] in (options.op or OPS)]
    records = [record for k in chosen for record in tune_kernel(k, device, HAS_CUDA)]
    wrong = [r for r in records if r.get("error", "").startswith("AssertionError")]
    if HAS_CUDA:
        about = {"architecture": arch, "heads": options.heads, "tokens": options.tokens}
        rows = [
            [r["kernel"], r["tile"], r.get("error") or f"{r['us']:,.1f}",
             f"{r['better']:.3f} x" if "better" in r else ""]
            for r in records
        ]  # fmt: skip
        header = ["kernel", "tile", "us", "faster than shipped by"]
        text = common.markdown_table(header, rows)
        common.write_results(options.out, "tune", text, about | {"records": records})
    for record in records:
        if "better" in record:
            print(f"better on {arch}: {record['kernel']} {record['tile']}")
    print(f"{len(records)} tiles of {len(chosen)} kernels, {len(wrong)} wrong")
    return 1 if wrong else 0


def compare(options: argparse.Namespace, device: torch.device) -> int:
    ops = options.op or OPS
    with device:
        checked = list(parity_problems(ops))
        for problem in checked:
            problem.check()
    print(f"parity: {len(checked)} problems are right")
    builders = timed_problems(ops, options.quick)
    if not HAS_CUDA:
        print("Floors of an H200, from bytes / 4.3 TB/s and FLOPs / 790 TFLOP/s: each is the least")
        print("that the operation can take, not a measurement.")
        with torch.device("meta"):
            print(static_table([build() for build in builders]))
        return 0
    ceilings = common.measure_ceilings()
    print({name: f"{value:.4g}" for name, value in ceilings.items()})
    records = []
    for build in builders:
        with device:
            problem = build()
        found = time_problem(problem, ceilings)
        print(table(found), flush=True)
        records += found
        del problem
        torch.cuda.empty_cache()
    found = {"ceilings": ceilings, "records": records}
    common.write_results(options.out, "kernels", table(records), found)
    ours = {r["provider"] for r in records if r["provider"].startswith(OURS)}
    common.draw_bars(options.out / "kernels.png", panels(records), "ms, forward + backward", ours)
    return 0


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="only this (or several)")
    parser.add_argument("--quick", action="store_true", help="one shape an operation")
    parser.add_argument("--tune", action="store_true", help="time other tiles")
    parser.add_argument("--heads", type=int, default=12, help="--tune: of 64; 12, 16, 20, 25")
    parser.add_argument("--tokens", type=int, default=32768, help="--tune: of a micro batch")
    options = parser.parse_args()
    if not HAS_CUDA:
        print("no CUDA device: nothing is timed; results are checked through the interpreter")
    torch.manual_seed(0)
    run = tune if options.tune else compare
    return run(options, torch.device("cuda" if HAS_CUDA else "cpu"))


if __name__ == "__main__":
    sys.exit(main())
