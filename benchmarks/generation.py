"""Tokens a second of generation: this project, transformers and nanoGPT, side by side in one run.

    python benchmarks/generation.py --nanogpt PATH        # on a GPU if there is one, else this CPU
    python benchmarks/generation.py --device cpu --new 64 --rounds 2 --batches 1 --out /tmp

GPT-2 124M's shape with random weights, block_size 1024, greedy, a prompt of 32 random tokens a row.

On a CPU: weights in --dtype, the same weights and threads in all. They take turns, a whole
generation each in every round, and ratios are of the same round. transformers: generate with its
default KV cache, under inference_mode. llama.cpp, where llama_cpp is installed: batch 1, weights in
f32, beside bfloat16 in f16. nanoGPT, beside float32: generate without a cache, as it is, with top_k
1; only in the first round, and only for batch 1: larger ones take hours. PATH is a checkout of
https://github.com/karpathy/nanoGPT; without it nanoGPT is left out. Before any timing the logits of
all are compared on the same tokens, in float32. nanoGPT has the exact GELU where GPT-2 has its
approximation by tanh, so its logits may differ by a little more.

On a GPU: this project in bfloat16, with the captured graph and without. Bytes that a step has to
read (weights once, keys and values of all rows at full capacity) over its time, against the
bandwidth of a large copy in the same run.
"""

import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import baseline  # noqa: E402
from benchmarks.common import arguments, markdown_table, measure_ceilings, write_results  # noqa: E402
from gpt2 import GPT, PRESETS, generate  # noqa: E402
from gpt2.export import write_gguf  # noqa: E402
from gpt2.generate import POLL, Pace  # noqa: E402
from gpt2.hf import export_hf  # noqa: E402
from gpt2.tokenizer import GPT2Tokenizer  # noqa: E402

PROMPT = 32
OURS, HF, NANO, LLAMA = "gpt2-triton", "transformers", "nanoGPT", "llama.cpp"
TOLERANCE = {HF: 1e-4, NANO: 1e-2, LLAMA: 1e-2}  # of logits with a spread of about 1


def llama_cpp(model: GPT, folder: Path, dtype: str) -> dict:
    """llama.cpp's model, by its name; nothing where llama_cpp is not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return {}
    kind = "f32" if dtype == "float32" else "f16"
    write_gguf(model, folder / "model.gguf", GPT2Tokenizer(), None, kind)
    threads = torch.get_num_threads()
    return {LLAMA: Llama(str(folder / "model.gguf"), n_ctx=model.config.block_size, verbose=False,
                         n_threads=threads, n_threads_batch=threads, logits_all=True)}  # fmt: skip


def make_others(model: GPT, nanogpt: Path | None, dtype: str) -> tuple[dict, dict[str, float]]:
    """The others with the model's weights, and by how much their logits after 64 tokens differ."""
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        export_hf(model, Path(folder) / "hf", None)
        others = {HF: GPT2LMHeadModel.from_pretrained(Path(folder) / "hf").eval()}
        others |= llama_cpp(model, Path(folder), dtype)
    if nanogpt and dtype == "float32":
        others[NANO] = baseline.nanogpt(nanogpt, model.config).eval()
        others[NANO].load_state_dict(model.state_dict())
    idx, found = torch.randint(0, model.config.vocab_size, (1, 64)), {}
    with torch.inference_mode():
        for name, other in others.items():
            if name == LLAMA:
                other.eval(idx[0].tolist())
                logits = torch.from_numpy(other.scores[None, : idx.numel()])
            else:
                logits = other(idx)[0] if name == NANO else other(idx).logits
            difference = logits[:, -1, : model.config.vocab_size] - model(idx)[:, -1]
            found[name] = difference.abs().max().item()
            if found[name] > TOLERANCE[name] and not (name == LLAMA and dtype == "bfloat16"):
                raise SystemExit(f"{name}: logits differ by {found[name]:.2g}: nothing was timed")
    others[HF].to(getattr(torch, dtype))
    return others, found


def make_jobs(options, model: GPT, others: dict, prompt: torch.Tensor) -> dict[str, Callable]:
    """What takes turns, by name: functions of the number of new tokens; the first is ours."""

    def ours(new: int, pace=None) -> list[list[int]]:
        module = importlib.import_module("gpt2.generate")  # gpt2.generate is the function
        module.pace = (lambda device: pace) if pace else module.pace
        return generate(
            model, prompt.tolist(), max_new_tokens=new, temperature=0, dtype=options.dtype
        )

    @torch.inference_mode()
    def transformers(new: int) -> list[list[int]]:
        return others[HF].generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new,
            min_new_tokens=new, do_sample=False, pad_token_id=0,
        )[:, PROMPT:].tolist()  # fmt: skip

    def llama(new: int) -> list[list[int]]:
        others[LLAMA].reset()
        return [list(islice(others[LLAMA].generate(prompt[0].tolist(), temp=0), new))]

    if options.device == "cuda":
        return {"one graph a step": partial(ours, pace=Pace(True, True, POLL)),
                "eager": partial(ours, pace=Pace(True, False, POLL))}  # fmt: skip
    jobs = {OURS: ours, HF: transformers}
    if LLAMA in others and len(prompt) == 1:
        jobs[LLAMA] = llama
    if NANO in others and len(prompt) == 1:
        jobs[NANO] = lambda new: others[NANO].generate(prompt, new, top_k=1)
    return jobs


def measure(options, model: GPT, others: dict, batch: int, bytes_per_s: float | None) -> list[dict]:
    """One result for each job."""
    c, new = model.config, options.new
    jobs = make_jobs(options, model, others, torch.randint(0, c.vocab_size, (batch, PROMPT)))
    for name in jobs.keys() - {NANO}:
        jobs[name](new if options.device == "cuda" else 4)  # compiles, touches all weights
    times, tokens = {}, {}
    for _ in range(options.rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            tokens[name] = job(new)  # on the host, so the device has finished
            times.setdefault(name, []).append(time.perf_counter() - start)
        print(batch, {name: f"{values[-1]:.1f} s" for name, values in times.items()}, flush=True)
        jobs.pop(NANO, None)  # only in the first round
    first, *_ = times
    weights = 2 * (model.n_params() - model.transformer.wpe.weight.numel())
    cache = 2 * 2 * c.n_layer * c.n_embd * (PROMPT + new) * batch
    results = []
    for name, rounds in times.items():
        whole = statistics.median(rounds)
        over = statistics.median([a / b for a, b in zip(rounds, times[first], strict=False)])
        results.append({
            "generator": name, "batch": batch, "new_tokens": new, "seconds": whole,
            "tokens_per_s": batch * new / whole, "rounds": rounds, "over": over,
            "tokens_equal_ours": name == NANO or tokens[name] == tokens[first],
            "share_of_bandwidth": bytes_per_s and (weights + cache) * new / whole / bytes_per_s,
        })  # fmt: skip
    return results


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 8, on a GPU 1 64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="CPU default: float32")
    options = parser.parse_args()
    if not (0 < options.rounds and 0 < options.new <= 1024 - PROMPT):
        parser.error(f"--new must lie in [1, {1024 - PROMPT}], and --rounds be above 0")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    ceiling = measure_ceilings()["copy_bytes_per_s"] if on_gpu else None
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    model = GPT(PRESETS["gpt2"], "auto", options.device).eval()
    others, differences = {}, {}
    if not on_gpu:
        others, differences = make_others(model, options.nanogpt, options.dtype)
    results = []
    for batch in options.batches or ([1, 64] if on_gpu else [1, 8]):
        results += measure(options, model, others, batch, ceiling)
    keys = ["generator", "batch", "new_tokens", "seconds", "tokens_per_s"]
    keys += ["share_of_bandwidth" if on_gpu else "over"]
    table = markdown_table(
        [*keys[:-1], keys[-1].replace("over", "time over ours")],
        [[f"{r[k]:.4g}" if type(r[k]) is float else str(r[k]) for k in keys] for r in results],
    )
    print(table)
    name = "generation_gpu" if on_gpu else f"generation_{options.dtype}"
    write_results(options.out, name, table, {
        "dtype": options.dtype, "threads": options.threads,
        "copy_bytes_per_s": ceiling, "logits_differ_by": differences, "results": results,
    })  # fmt: skip


if __name__ == "__main__":
    main()
