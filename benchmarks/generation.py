"""Tokens a second of generation: this project, transformers and nanoGPT, side by side in one run.

    python benchmarks/generation.py --nanogpt PATH        # on this CPU: benchmarks/results/generation.*
    python benchmarks/generation.py --new 64 --rounds 2 --batches 1 --out /tmp
    python benchmarks/generation.py --device cuda         # a GPU: tokens/s, share of its bandwidth

GPT-2 124M's shape with random weights, block_size 1024, greedy, a prompt of 32 random tokens a row.

On a CPU: float32, the same weights and threads in all three. They take turns in rounds; in each,
this project and transformers (generate with its default KV cache, under inference_mode) make --new
tokens, and nanoGPT (generate without a cache, as it is, with top_k 1) makes its --new tokens in as
many parts as there are rounds, each going on where the last one ended, which for it is the same
work. Its batches above 1 are left out: they take hours. PATH is a checkout of
https://github.com/karpathy/nanoGPT; without it nanoGPT is left out.
Before any timing the logits of all are compared on the same tokens. nanoGPT has the exact GELU
where GPT-2 has its approximation by tanh, so its logits may differ by a little more.

On a GPU: this project in bfloat16, with the captured graph and without. Bytes that a step has to
read (weights once, keys and values of all rows at full capacity) over its time, against the
bandwidth of a large copy in the same run.
"""

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import markdown_table, measure_ceilings, provenance, write_json  # noqa: E402
from gpt2 import GPT, PRESETS, generate  # noqa: E402
from gpt2.hf import is_transposed  # noqa: E402

PROMPT = 32
OURS, HF, NANO = "gpt2-triton", "transformers", "nanoGPT"
TOLERANCE = {HF: 1e-4, NANO: 1e-2}  # of logits with a spread of about 1


def as_transformers(model: GPT):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config()).eval()
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            value = ours[name].T if is_transposed(name) else ours[name]
            parameter.copy_(value[: len(parameter)])
    return theirs


def as_nanogpt(model: GPT, folder: Path):
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    shape = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.0, bias=True)
    theirs = module.GPT(module.GPTConfig(vocab_size=model.config.padded_vocab_size, **shape)).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def check(model: GPT, others: dict) -> dict[str, float]:
    """The largest difference of each one's logits from ours at the end of 64 tokens."""
    idx = torch.randint(0, model.config.vocab_size, (2, 64))
    found = {}
    with torch.inference_mode():
        ours = model(idx)[:, -1]
        for name, other in others.items():
            logits = other(idx)[0] if name == NANO else other(idx).logits
            logits = logits[:, -1, : model.config.vocab_size]
            found[name] = (logits - ours).abs().max().item()
            if found[name] > TOLERANCE[name]:
                raise SystemExit(f"{name}: logits differ by {found[name]:.2g}: nothing was timed")
    return found


def cpu_round(
    model: GPT, others: dict, prompt: torch.Tensor, new: int, nano: list, part: int
) -> tuple[dict[str, float], bool]:
    """Seconds of each for its tokens, and whether transformers' tokens are ours."""
    seconds = {}
    start = time.perf_counter()
    ours = generate(model, prompt.tolist(), max_new_tokens=new, temperature=0)
    seconds[OURS] = time.perf_counter() - start
    start = time.perf_counter()
    with torch.inference_mode():
        theirs = others[HF].generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new,
            min_new_tokens=new, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    seconds[HF] = time.perf_counter() - start
    if NANO in others and nano:
        start = time.perf_counter()
        nano[0] = others[NANO].generate(nano[0], part, top_k=1)
        seconds[NANO] = time.perf_counter() - start
    return seconds, theirs[:, PROMPT:].tolist() == ours


def on_cpu(options: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(options.threads)
    model = GPT(PRESETS["gpt2"], "torch").eval()
    others = {HF: as_transformers(model)}
    if options.nanogpt:
        others[NANO] = as_nanogpt(model, options.nanogpt)
    differences, results = check(model, others), []
    for batch in options.batches:
        prompt = torch.randint(0, model.config.vocab_size, (batch, PROMPT))
        generate(model, prompt.tolist(), max_new_tokens=4, temperature=0)  # touches all weights
        nano, times, equal = [prompt] if batch == 1 else [], {}, True
        for _ in range(options.rounds):
            seconds, same = cpu_round(
                model, others, prompt, options.new, nano, options.new // options.rounds
            )
            equal = equal and same
            for name, value in seconds.items():
                times.setdefault(name, []).append(value)
            print(batch, {name: f"{value:.1f} s" for name, value in seconds.items()}, flush=True)
        for name, values in times.items():
            # nanoGPT's rounds are parts of one generation, the others' each a whole one.
            whole = sum(values) if name == NANO else statistics.median(values)
            results.append(
                {
                    "generator": name, "batch": batch, "new_tokens": options.new,
                    "seconds": whole, "tokens_per_s": batch * options.new / whole,
                    "over": whole / statistics.median(times[OURS]), "rounds": values,
                    "tokens_equal_ours": equal if name == HF else None,
                }
            )  # fmt: skip
    return {
        "threads": options.threads, "dtype": "float32", "cpu": cpu_name(),
        "load_average": os.getloadavg(), "logits_differ_by": differences, "results": results,
    }  # fmt: skip


def on_gpu(options: argparse.Namespace) -> dict[str, object]:
    module = importlib.import_module("gpt2.generate")  # gpt2.generate is the function
    ceiling = measure_ceilings()["copy_bytes_per_s"]
    model = GPT(PRESETS["gpt2"], "auto", "cuda").eval()
    c, results = model.config, []
    weights = 2 * (model.n_params() - model.transformer.wpe.weight.numel())
    for batch in options.batches:
        prompts = torch.randint(0, c.vocab_size, (batch, PROMPT)).tolist()
        cache = 2 * 2 * c.n_layer * c.n_embd * (PROMPT + options.new) * batch
        for name, graph in (("one graph a step", True), ("eager", False)):
            module.captures = lambda device, graph=graph: graph
            seconds = []
            for n_round in range(options.rounds + 1):
                torch.cuda.synchronize()
                start = time.perf_counter()
                generate(model, prompts, max_new_tokens=options.new, temperature=0)
                torch.cuda.synchronize()
                if n_round:  # the first one loads kernels
                    seconds.append(time.perf_counter() - start)
            step = statistics.median(seconds) / options.new
            results.append(
                {
                    "generator": name, "batch": batch, "new_tokens": options.new,
                    "seconds": step * options.new, "tokens_per_s": batch / step,
                    "share_of_bandwidth": (weights + cache) / step / ceiling, "rounds": seconds,
                }
            )  # fmt: skip
    return {"dtype": "bfloat16", "copy_bytes_per_s": ceiling, "results": results}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores"


def draw(results: list[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = sorted({r["batch"] for r in results})
    figure = Figure(figsize=(8, 1 + 1.5 * len(batches)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, batch in zip(figure.subplots(len(batches), 1, squeeze=False).flat, batches,
                           strict=True):  # fmt: skip
        at = [r for r in results if r["batch"] == batch][::-1]
        colors = ["#c33" if r["generator"] in (OURS, "one graph a step") else "#9ab" for r in at]
        shown = axes.barh([r["generator"] for r in at], [r["tokens_per_s"] for r in at], color=colors)
        axes.bar_label(shown, [f"{r['tokens_per_s']:,.4g}" for r in at], padding=2, fontsize=8)
        title = f"GPT-2 124M, batch {batch}, {at[0]['new_tokens']} new tokens"
        axes.set(title=title, xlabel="tokens a second")
        axes.margins(x=0.12)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 8, on a GPU 1 64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.batches = options.batches or ([1, 8] if options.device == "cpu" else [1, 64])
    if not 0 < options.rounds <= options.new <= 1024 - PROMPT:
        parser.error(f"--new must lie in [--rounds, {1024 - PROMPT}], and --rounds be above 0")
    torch.manual_seed(0)
    measured = on_cpu(options) if options.device == "cpu" else on_gpu(options)
    keys = ["generator", "batch", "new_tokens", "seconds", "tokens_per_s"]
    keys.append("over" if options.device == "cpu" else "share_of_bandwidth")
    rows = [[f"{r[k]:.4g}" if type(r[k]) is float else str(r[k]) for k in keys]
            for r in measured["results"]]  # fmt: skip
    header = ["time over ours" if key == "over" else key for key in keys]
    table = markdown_table(header, rows)
    print(table)
    name = "generation" if options.device == "cpu" else "generation_gpu"
    write_json(options.out / f"{name}.json", {**provenance(), **measured})
    (options.out / f"{name}.md").write_text(f"{table}\n")
    draw(measured["results"], options.out / f"{name}.png")
    print(f"written: {options.out / name}.json, .md and .png")


if __name__ == "__main__":
    main()
