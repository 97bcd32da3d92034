"""Each kernel against PyTorch: first that it is right, then how long it takes and how near the
hardware's limit that is.

    python benchmarks/kernels.py                     all operations and shapes
    python benchmarks/kernels.py --quick             one shape each, those of the targets
    python benchmarks/kernels.py --op layer_norm     one operation (repeat the option for more)

Runs from a checkout, without installing. On a CUDA GPU it prints a table and writes kernels.json,
kernels.md and kernels.png under --out. On a CPU it times nothing: it runs the parity check at small
shapes through Triton's interpreter and prints the static roofline.

Timing and ceilings: benchmarks/common.py. Floor: for each phase of an operation the larger of its
least bytes over the copy bandwidth and its FLOPs over the matmul rate, summed over phases; "of
floor" is that time over the median. Attention counts 4 B H T^2 D / 2 FLOPs forward and 2.5 times
that backward, the convention of its papers. SDPA and flex_attention get separate q, k and v and
return three gradients, so they pay for no packing, which a model with one c_attn would; eager and
torch.compile start from the packed tensor, as ours does.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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

from benchmarks import common  # noqa: E402
from triton_kernels import reference  # noqa: E402
from triton_kernels.cross_entropy import cross_entropy  # noqa: E402
from triton_kernels.layer_norm import layer_norm  # noqa: E402
from triton_kernels.linear_cross_entropy import linear_cross_entropy  # noqa: E402

V, PADDED_V = 50257, 50304
OURS = "gpt2-triton"
Phases = dict[str, list[tuple[int, int]]]  # mode -> (bytes, FLOPs) of each phase


@dataclass
class Problem:
    """One operation at one shape: what to call, on what, and the least work that it is."""

    op: str
    shape: str
    inputs: list[Tensor]  # all of them get a gradient
    ours: dict[str, Callable]
    baselines: dict[str, Callable]  # each of inputs -> tuple of outputs
    plain: Callable  # the reference, the oracle of the parity check
    phases: Phases
    own_inputs: dict[str, list[Tensor]] = field(
        default_factory=dict
    )  # where a baseline needs others


def _tensor(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype)  # on the default device, which main sets


def _targets(n: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (n,))


def layer_norm_problem(M: int, C: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    def call(
        function: Callable, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple:
        return function(x, weight, bias, residual=residual)

    def liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple:
        from liger_kernel.transformers.functional import liger_layer_norm

        summed = x + residual
        return liger_layer_norm(summed, weight, bias, 1e-5), summed

    once = [(4 * M * C * dtype.itemsize, 0)]
    plain = partial(call, reference.layer_norm)
    return Problem(
        "layer_norm",
        f"{M} x {C}",
        [
            _tensor(M, C, dtype=dtype),
            _tensor(M, C, dtype=dtype),
            *(_tensor(C, dtype=dtype) for _ in "wb"),
        ],
        {OURS: partial(call, layer_norm)},
        {"eager": plain, "torch.compile": _compiled(plain), "Liger": liger},
        plain,
        {"forward": once, "backward": once, "forward+backward": 2 * once},
    )


def cross_entropy_problem(
    N: int, vocabulary: int, stride: int, dtype: torch.dtype = torch.bfloat16
) -> Problem:
    targets = _targets(N, vocabulary)

    def call(function: Callable, logits: Tensor, **options: bool) -> tuple:
        return (function(logits, targets, **options),)

    def liger(logits: Tensor) -> tuple:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return (liger_cross_entropy(logits, targets),)

    logits = _tensor(N, stride, scale=2.0, dtype=dtype)[:, :vocabulary]
    size = N * vocabulary * dtype.itemsize
    plain = partial(call, reference.cross_entropy)
    return Problem(
        "cross_entropy",
        f"{N} x {vocabulary} in {stride}",
        [logits],
        {
            f"{OURS} in place": partial(call, cross_entropy, inplace_backward=True),
            OURS: partial(call, cross_entropy),
        },
        {"eager": plain, "torch.compile": _compiled(plain), "Liger": liger},
        plain,
        {"forward": [(size, 0)], "forward+backward": [(2 * size, 0)]},
    )


def linear_cross_entropy_problem(
    N: int, C: int, vocabulary: int, rows: int, chunk_rows: int, dtype: torch.dtype = torch.bfloat16
) -> Problem:
    targets = _targets(N, vocabulary)

    def call(function: Callable, x: Tensor, weight: Tensor, **options: int) -> tuple:
        return (function(x, weight, targets, vocab_size=vocabulary, **options),)

    def torch_own(x: Tensor, weight: Tensor) -> tuple:
        return (F.linear_cross_entropy(x, weight[:vocabulary], targets),)

    def liger(x: Tensor, weight: Tensor) -> tuple:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return (LigerFusedLinearCrossEntropyLoss()(weight[:vocabulary], x, targets),)

    def all_rows(
        x: Tensor, weight: Tensor
    ) -> tuple:  # over the padding too, which costs less than cutting it off
        return (F.cross_entropy(F.linear(x, weight).float(), targets),)

    matmul, logits = 2 * N * C * vocabulary, N * vocabulary * dtype.itemsize
    baselines = {"eager": all_rows, "torch.compile": _compiled(all_rows), "Liger": liger}
    if hasattr(F, "linear_cross_entropy"):
        baselines["F.linear_cross_entropy"] = torch_own
    return Problem(
        "linear_cross_entropy",
        f"{N} x {C} x {vocabulary} in {rows}",
        [_tensor(N, C, dtype=dtype), _tensor(rows, C, scale=0.05, dtype=dtype)],
        {
            OURS: partial(call, linear_cross_entropy),
            f"{OURS} chunks of {chunk_rows}": partial(
                call, linear_cross_entropy, chunk_rows=chunk_rows
            ),
        },
        baselines,
        partial(call, reference.linear_cross_entropy),
        {
            "forward": [(0, matmul), (logits, 0)],
            "forward+backward": [(0, 3 * matmul), (2 * logits, 0)],
        },
    )


def attention_problem(
    B: int, T: int, H: int, D: int, dtype: torch.dtype = torch.bfloat16
) -> Problem:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from triton_kernels.attention import attention

    def call(function: Callable, qkv: Tensor) -> tuple:
        return (function(qkv),)

    def sdpa(backend: SDPBackend, *qkv: Tensor) -> tuple:
        q, k, v = (t.transpose(1, 2) for t in qkv)  # (B, H, T, D)
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)

    plain = partial(call, reference.attention)
    baselines = {"eager": plain, "torch.compile": _compiled(plain)}
    own_inputs = {}
    if HAS_CUDA:
        apart = {
            "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
            "flex_attention": _flex_attention(T),
        }
        baselines |= apart
        own_inputs = dict.fromkeys(apart, [_tensor(B, T, H, D, dtype=dtype) for _ in "qkv"])
    size, flops = B * T * H * D * dtype.itemsize, 2 * B * H * T * T * D
    forward, backward = (4 * size, flops), (8 * size, flops * 5 // 2)
    return Problem(
        "attention",
        f"B{B} T{T} H{H} D{D}",
        [_tensor(B, T, 3, H, D, dtype=dtype)],
        {OURS: partial(call, attention)},
        baselines,
        plain,
        {"forward": [forward], "backward": [backward], "forward+backward": [forward, backward]},
        own_inputs,
    )


def _flex_attention(T: int) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(*qkv: Tensor) -> tuple:
        q, k, v = (t.transpose(1, 2) for t in qkv)
        return (compiled(q, k, v, block_mask=mask).transpose(1, 2),)

    return call


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def timed_problems(ops: list[str], quick: bool) -> Iterator[Callable[[], Problem]]:
    """Builders of the problems to time, the shapes of the targets first."""
    tokens = [32768] if quick else [32768, 8192, 65536]
    widths = [768] if quick else [768, 1024, 1280, 1600]
    heads = [12] if quick else [12, 16, 20, 25]
    if "layer_norm" in ops:
        yield from (partial(layer_norm_problem, 32768, C) for C in widths)
        yield from (partial(layer_norm_problem, M, 768) for M in tokens[1:])
    if "cross_entropy" in ops:
        yield from (partial(cross_entropy_problem, N, V, PADDED_V) for N in tokens)
    if "linear_cross_entropy" in ops:
        sizes = [(32768, C) for C in widths] + [(N, 768) for N in tokens[1:]]
        yield from (
            partial(linear_cross_entropy_problem, N, C, V, PADDED_V, 8192) for N, C in sizes
        )
    if "attention" in ops:
        yield from (partial(attention_problem, 32, 1024, H, 64) for H in heads)
        lengths = [] if quick else [2048, 4096, 8192, 16384]
        yield from (partial(attention_problem, 32768 // T, T, 12, 64) for T in lengths)


def parity_problems(ops: list[str]) -> Iterator[Problem]:
    """Small problems of odd shape; bf16 on a GPU, fp32 and fp16 through the interpreter, whose bf16
    is not a GPU's.
    """
    for dtype in (torch.bfloat16,) if HAS_CUDA else (torch.float32, torch.float16):
        if "layer_norm" in ops:
            yield from (layer_norm_problem(67, C, dtype) for C in (768, 1600))
        if "cross_entropy" in ops:
            yield cross_entropy_problem(5, V, PADDED_V, dtype)
        if "linear_cross_entropy" in ops:
            yield linear_cross_entropy_problem(7, 64, 5000, 5056, 4, dtype)
        if "attention" in ops:
            yield attention_problem(1, 200, 2, 64, dtype)


def check_parity(problem: Problem) -> list[str]:
    """Each of ours' outputs and gradients by the rule: error <= 2 x torch's own at this dtype + 4
    ulps. Failures as text.

    The oracle is the reference on fp64 inputs; cross entropy computes in fp32 there.
    """

    def run(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [_same_layout(t, dtype).requires_grad_() for t in problem.inputs]
        outputs = function(*leaves)
        upstream = [
            torch.linspace(-1, 2, max(o.numel(), 2))[: o.numel()].view(o.shape).to(o.dtype)
            for o in outputs
        ]
        outputs_now = [o.detach().clone() for o in outputs]
        return [*outputs_now, *torch.autograd.grad(outputs, leaves, upstream)]

    dtype = problem.inputs[0].dtype
    exact, theirs = run(problem.plain, torch.float64), run(problem.plain, dtype)
    failures = []
    for name, function in problem.ours.items():
        for i, (a, b, c) in enumerate(zip(run(function, dtype), theirs, exact, strict=True)):
            c = c.double()
            error, allowed = (
                (a.double() - c).abs().max().item(),
                2 * (b.double() - c).abs().max().item(),
            )
            allowed += 4 * torch.finfo(a.dtype).eps * c.abs().max().item()
            if not error <= allowed:
                failures.append(
                    f"{problem.op} {problem.shape} {name} result {i}: error {error:.3g} > "
                    f"{allowed:.3g}"
                )
    return failures


def _same_layout(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with t's strides, so that padded rows stay padded."""
    buffer = torch.zeros(
        t.shape[:-1] + (max(t.stride(-2), t.shape[-1]),) if t.dim() == 2 else t.shape
    )
    return buffer.to(dtype)[..., : t.shape[-1]].copy_(t)


def time_problem(problem: Problem, ceilings: dict[str, float]) -> list[dict]:
    """One record for each provider and mode; a provider that cannot run says why instead of a
    time.
    """
    records = []
    for provider, function in {**problem.ours, **problem.baselines}.items():
        for mode, phases in problem.phases.items():
            record = {"op": problem.op, "shape": problem.shape, "mode": mode, "provider": provider}
            try:
                timing = _time(function, problem.own_inputs.get(provider, problem.inputs), mode)
            except (
                ImportError,
                RuntimeError,
            ) as error:  # not installed, not supported, out of memory
                reason = str(error).strip().splitlines()
                records.append(
                    record | {"error": f"{type(error).__name__}: {reason[0] if reason else ''}"}
                )
                torch.cuda.empty_cache()
                continue
            floor_ms = 1e3 * floor_seconds(
                phases, ceilings["copy_bytes_per_s"], ceilings["bf16_flops_per_s"]
            )
            n_bytes, flops = (sum(phase[i] for phase in phases) for i in (0, 1))
            records.append(
                record
                | {
                    "timing_ms": timing,
                    "gb_per_s": n_bytes / timing.median * 1e-6,
                    "tflop_per_s": flops / timing.median * 1e-9,
                    "floor_ms": floor_ms,
                    "of_floor": floor_ms / timing.median,
                }
            )
    return records


def _time(function: Callable, inputs: list[Tensor], mode: str) -> common.Timing:
    if mode == "forward":
        leaves = [t.detach() for t in inputs]
        return common.measure(lambda: function(*leaves))
    leaves = [t.detach().requires_grad_() for t in inputs]
    upstream = [torch.randn_like(o) if o.dim() else None for o in function(*leaves)]

    def backward(*outputs: Tensor) -> None:
        torch.autograd.grad(outputs, leaves, upstream)

    if mode == "backward":
        return common.measure(backward, prepare=lambda: function(*leaves))
    return common.measure(lambda: backward(*function(*leaves)))


def floor_seconds(phases: list[tuple[int, int]], bytes_per_s: float, flops_per_s: float) -> float:
    return sum(max(n_bytes / bytes_per_s, flops / flops_per_s) for n_bytes, flops in phases)


def table(records: list[dict]) -> str:
    header = [
        "op",
        "shape",
        "mode",
        "provider",
        "median us",
        "p20..p80",
        "GB/s",
        "TFLOP/s",
        "of floor",
        "peak MB",
    ]
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
    header = ["op", "shape", "mode", "least MB", "GFLOP", "floor us"]
    rows = []
    for p in problems:
        for mode, phases in p.phases.items():
            n_bytes, flops = (sum(phase[i] for phase in phases) for i in (0, 1))
            floor = floor_seconds(
                phases, common.H200_COPY_BYTES_PER_S, common.H200_BF16_FLOPS_PER_S
            )
            rows.append(
                [
                    p.op,
                    p.shape,
                    mode,
                    f"{n_bytes / 1e6:,.0f}",
                    f"{flops / 1e9:,.0f}",
                    f"{1e6 * floor:,.1f}",
                ]
            )
    return common.markdown_table(header, rows)


def plot(records: list[dict], path: Path, title: str) -> None:
    """One panel an operation: the first shape's forward+backward, a bar a provider."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name} not drawn: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in records if r["mode"] == "forward+backward" and "error" not in r]
    ops = list(dict.fromkeys(r["op"] for r in timed))
    figure, axes = plt.subplots(len(ops), 1, figsize=(8, 1.2 + 2.2 * len(ops)), squeeze=False)
    for op, axis in zip(ops, axes[:, 0], strict=True):
        shape = next(r["shape"] for r in timed if r["op"] == op)
        bars = [r for r in timed if (r["op"], r["shape"]) == (op, shape)][::-1]
        colors = ["tab:orange" if r["provider"].startswith(OURS) else "tab:gray" for r in bars]
        axis.barh(
            [r["provider"] for r in bars], [r["timing_ms"].median for r in bars], color=colors
        )
        axis.axvline(bars[0]["floor_ms"], color="black", linestyle=":")
        axis.set_title(f"{op}, {shape}, forward+backward (dotted: floor)", fontsize=9)
        axis.set_xlabel("ms")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    ops = ["layer_norm", "cross_entropy", "linear_cross_entropy", "attention"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--op", action="append", choices=ops, help="only this operation (may be repeated)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one shape an operation, those of the targets"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results"
    )
    arguments = parser.parse_args()
    ops = arguments.op or ops
    if "attention" in ops and importlib.util.find_spec("triton_kernels.attention") is None:
        print("attention: skipped, triton_kernels has no attention module here")
        ops.remove("attention")

    device = torch.device("cuda" if HAS_CUDA else "cpu")
    torch.manual_seed(0)
    failures, n_checked = [], 0
    with device:
        for problem in parity_problems(ops):
            failures += check_parity(problem)
            n_checked += len(problem.ours)
    print(f"parity: {n_checked} checks, {len(failures)} failed")
    if failures:
        print("\n".join(failures))
        return 1

    builders = timed_problems(ops, arguments.quick)
    if not HAS_CUDA:
        print(
            "no CUDA device: nothing is timed here. Floors of an H200 from bytes / 4.3 TB/s and "
            "FLOPs / 790 TFLOP/s:"
        )
        print("each is the least that the operation can take, not a measurement.")
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
    provenance = common.provenance()
    common.write_json(
        arguments.out / "kernels.json", provenance | {"ceilings": ceilings, "records": records}
    )
    (arguments.out / "kernels.md").write_text(table(records) + "\n")
    plot(
        records,
        arguments.out / "kernels.png",
        f"{provenance['hardware']}, torch {provenance['torch']}",
    )
    print(f"written: {arguments.out / 'kernels.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
