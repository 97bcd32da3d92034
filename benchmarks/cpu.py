"""Training steps on a CPU: this project's trainer beside nanoGPT and llm.c.

    python benchmarks/cpu.py --nanogpt ../nanoGPT --llmc ../llm.c
    python benchmarks/cpu.py --size "char 12 64" --rounds 1

Each measurement is a process of its own (benchmarks/train_step.py), one of each contestant in turn,
for some rounds, on the same threads. A round's ratio is a contestant's median step over ours in
float32 in the same round, so that the machine's moods cancel out; the table has their median and
range. A size is PRESET ROWS LENGTH. llm.c's program has one size, 4 rows of 64 tokens, of gpt2's
shape. Beside it stands the least time that the matrix products of a step can take here: their
FLOPs at the highest rate that was measured in this run, of any product of any implementation.

Writes cpu.json, cpu.md and cpu.png under --out.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from benchmarks.baseline import Setup, write_data  # noqa: E402
from benchmarks.train_step import in_own_process  # noqa: E402
from gpt2 import cpu  # noqa: E402
from gpt2.model import GPT, parameter_shapes  # noqa: E402

SIZES = ["char 12 64", "tinystories-8m 8 256", "gpt2 4 64", "gpt2 1 1024"]
OURS = "gpt2-triton float32"
CONTESTANTS = {  # name: whose, dtype, compiled
    OURS: ("trainer", "float32", False),
    "gpt2-triton bfloat16": ("trainer", "bfloat16", False),
    "nanoGPT float32": ("nanogpt", "float32", False),
    "nanoGPT bfloat16": ("nanogpt", "bfloat16", False),
    "nanoGPT float32, compiled": ("nanogpt", "float32", True),
    "nanoGPT bfloat16, compiled": ("nanogpt", "bfloat16", True),
}


def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some large products of all implementations that there are."""
    found = 0.0
    for n, n_in, n_out in ((1024, 768, 3072), (2048, 768, 768), (512, 3072, 768)):
        x, weight = torch.randn(n, n_in, dtype=dtype), torch.randn(n_out, n_in, dtype=dtype)
        for product in cpu.PRODUCTS["forward"].values():
            product(x, weight)
            times = []
            for _ in range(7):
                started = time.perf_counter()
                product(x, weight)
                times.append(time.perf_counter() - started)
            found = max(found, 2 * n * n_in * n_out / min(times))
    return found


def llmc_step_ms(checkout: Path, folder: Path, setup: Setup) -> float:
    """The median step of llm.c's train_gpt2, built anew, on random weights and tokens."""
    built = subprocess.run(["make", "train_gpt2"], cwd=checkout, capture_output=True, text=True)
    if built.returncode:
        raise ValueError(f"llm.c: {built.stderr.strip().splitlines()[-1]}")
    data = folder / "dev/data/tinyshakespeare"
    if not data.exists():
        data.mkdir(parents=True)
        c, random = setup.shape, np.random.default_rng(0)
        header = np.zeros(256, np.int32)
        header[:8] = [20240326, 3, c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd,
                      c.padded_vocab_size]  # fmt: skip
        with open(folder / "gpt2_124M.bin", "wb") as file:
            file.write(header.tobytes())
            padding = (c.padded_vocab_size - c.vocab_size) * c.n_embd
            for n in (*(np.prod(shape) for shape in parameter_shapes(c).values()), padding):
                file.write((0.02 * random.standard_normal(n, np.float32)).tobytes())
        header[:3] = 20240520, 1, 100_000
        tokens = random.integers(0, c.vocab_size, 100_000).astype(np.uint16)
        for split in ("train", "val"):
            (data / f"tiny_shakespeare_{split}.bin").write_bytes(
                header.tobytes() + tokens.tobytes()
            )
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    program = subprocess.Popen(
        [checkout.resolve() / "train_gpt2"], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    times = []
    for line in program.stdout:
        if found := re.match(r"step \d+: train loss \S+ \(took ([\d.]+) ms\)", line):
            times.append(float(found[1]))
        if len(times) == 6:
            break
    program.kill()
    if not times:
        raise ValueError("llm.c printed no step")
    return statistics.median(times[1:])


def measure_size(size: str, args, folder: Path) -> dict:
    """The rounds of all contestants at one size: {name: {"ms": [...], "peak_bytes": ...}}."""
    preset, rows, length = size.split()
    base = Setup(
        preset=preset, rows=int(rows), accum=1, device="cpu", dtype="float32", compile=False,
        kernels="auto", data=str(folder / preset), nanogpt=args.nanogpt, length=int(length),
    )  # fmt: skip
    if not Path(base.data).exists():
        write_data(Path(base.data), base.shape.vocab_size, 2_000_000)
    found: dict[str, dict] = {}
    for turn in range(args.rounds):
        for name, (whose, dtype, compiled) in CONTESTANTS.items():
            if whose == "nanogpt" and not args.nanogpt or compiled and not args.compiled:
                continue
            setup = replace(base, dtype=dtype, compile=compiled)
            steps = args.steps or (30 if preset == "char" else 4)
            record = in_own_process(name=whose, setup=setup, steps=steps,
                                    caches=folder / whose, profile=False)  # fmt: skip
            mine = found.setdefault(name, {"ms": [], "peak_bytes": 0})
            mine["ms"].append(statistics.median(record["step_ms"]))
            mine["peak_bytes"] = max(mine["peak_bytes"], record["peak_bytes"])
            mine["kernels"] = record.get("kernels")
            print(f"{size}, round {turn + 1}: {name} {mine['ms'][-1]:,.1f} ms", flush=True)
        if args.llmc and size == "gpt2 4 64":
            mine = found.setdefault("llm.c float32", {"ms": []})
            mine["ms"].append(llmc_step_ms(Path(args.llmc), folder / "llmc", base))
            print(f"{size}, round {turn + 1}: llm.c {mine['ms'][-1]:,.1f} ms", flush=True)
    with torch.device("meta"):
        model = GPT(base.shape, "torch", "meta")
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return {"setup": asdict(base), "product_flops": 6 * base.tokens * matrices, "found": found}


def table(results: dict[str, dict], peaks: dict[str, float]) -> str:
    rows = []
    for size, result in results.items():
        ours = result["found"][OURS]["ms"]
        for name, record in result["found"].items():
            ratios = [ms / our for ms, our in zip(record["ms"], ours, strict=True)]
            floor = result["product_flops"] / peaks["bfloat16" if "bf" in name else "float32"]
            rows.append([
                size, name, f"{statistics.median(record['ms']):,.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{record['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in record else "n/a",
                f"{floor * 1e3:,.1f}",
            ])  # fmt: skip
    header = ["size", "contestant", "ms a step", "times ours in float32", "peak MB",
              "products at peak, ms"]  # fmt: skip
    lines = [f"- {kind}: {flops / 1e9:,.0f} GFLOP/s at best" for kind, flops in peaks.items()]
    for size, result in results.items():
        lines.append(f"- {size}: {result['found'][OURS]['kernels']}")
    return common.markdown_table(header, rows) + "\n\n" + "\n".join(lines)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--size", nargs="+", default=SIZES, help="PRESET ROWS LENGTH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="timed, in each process; default: by preset")
    parser.add_argument("--nanogpt", default="", help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--llmc", default="", help="a checkout of karpathy/llm.c")
    parser.add_argument("--compiled", action="store_true", help="nanoGPT compiled as well")
    args = parser.parse_args()
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    peaks = {kind: peak_flops(dtype) for kind, dtype in kinds.items()}
    with tempfile.TemporaryDirectory() as folder:
        results = {size: measure_size(size, args, Path(folder)) for size in args.size}
    text = table(results, peaks)
    print(f"\n{text}")
    content = {"peaks": peaks, "threads": torch.get_num_threads(), "results": results}
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    content["flags"] = flags[1].split() if flags else []
    common.write_results(args.out, "cpu", text, content)
    panels = {
        size: {name: statistics.median(r["ms"]) for name, r in result["found"].items()}
        for size, result in results.items()
    }
    ours = [name for name in CONTESTANTS if name.startswith("gpt2-triton")]
    common.draw_bars(args.out / "cpu.png", panels, "ms a step", ours=ours)


if __name__ == "__main__":
    main()
