"""Tokens a second of generation: this project, transformers and nanoGPT, side by side in one run.

    python benchmarks/generation.py --nanogpt PATH        # on a GPU if there is one, else this CPU
    python benchmarks/generation.py --device cpu --new 64 --rounds 2 --batches 1 --out /tmp

GPT-2 124M's shape with random weights, block_size 1024, greedy, a prompt of 32 random tokens a row.

On a CPU: float32, the same weights and threads in all three. They take turns, a whole generation
each in every round, and ratios are of the same round. transformers: generate with its default KV
cache, under inference_mode. nanoGPT: generate without a cache, as it is, with top_k 1; only in the
first round, and only for batch 1: larger ones take hours. PATH is a checkout of
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
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import markdown_table, measure_ceilings, provenance, write_json  # noqa: E402
from gpt2 import GPT, PRESETS, generate  # noqa: E402
from gpt2.hf import export_hf  # noqa: E402

PROMPT = 32
OURS, HF, NANO = "gpt2-triton", "transformers", "nanoGPT"
TOLERANCE = {HF: 1e-4, NANO: 1e-2}  # of logits with a spread of about 1


def as_transformers(model: GPT):
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        export_hf(model, Path(folder) / "hf", None)
        return GPT2LMHeadModel.from_pretrained(Path(folder) / "hf").eval()


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


def seconds(job) -> tuple[float, object]:
    """Of one call, and what it returned."""
    start = time.perf_counter()
    found = job()
    return time.perf_counter() - start, found


def on_cpu(options: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(options.threads)
    model = GPT(PRESETS["gpt2"], "torch").eval()
    others = {HF: as_transformers(model)}
    if options.nanogpt:
        others[NANO] = as_nanogpt(model, options.nanogpt)
    differences, results, new = check(model, others), [], options.new
    for batch in options.batches:
        prompt = torch.randint(0, model.config.vocab_size, (batch, PROMPT))

        def ours(new=new, prompt=prompt) -> list[list[int]]:
            return generate(model, prompt.tolist(), max_new_tokens=new, temperature=0)

        @torch.inference_mode()
        def transformers(new=new, prompt=prompt) -> list[list[int]]:
            idx = others[HF].generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new,
                min_new_tokens=new, do_sample=False, pad_token_id=0,
            )  # fmt: skip
            return idx[:, PROMPT:].tolist()

        def nanogpt(new=new, prompt=prompt) -> None:
            others[NANO].generate(prompt, new, top_k=1)

        ours(4)  # touches all weights
        times, equal = {}, True
        for n_round in range(options.rounds):
            jobs = {OURS: ours, HF: transformers}
            if NANO in others and batch == 1 and n_round == 0:
                jobs[NANO] = nanogpt
            found = {name: seconds(job) for name, job in jobs.items()}
            equal = equal and found[OURS][1] == found[HF][1]
            for name, (value, _) in found.items():
                times.setdefault(name, []).append(value)
            print(batch, {name: f"{value:.1f} s" for name, (value, _) in found.items()}, flush=True)
        for name, values in times.items():
            over = [v / o for v, o in zip(values, times[OURS], strict=False)]
            results.append(
                row(name, batch, new, values)
                | {"over": statistics.median(over), "tokens_equal_ours": equal or name != HF}
            )
    return {
        "threads": options.threads, "dtype": "float32", "load_average": os.getloadavg(),
        "logits_differ_by": differences, "results": results,
    }  # fmt: skip


def row(name: str, batch: int, new: int, values: list[float]) -> dict[str, object]:
    whole = statistics.median(values)
    return {
        "generator": name, "batch": batch, "new_tokens": new, "seconds": whole,
        "tokens_per_s": batch * new / whole, "rounds": values,
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

        def ours(prompts=prompts) -> None:
            generate(model, prompts, max_new_tokens=options.new, temperature=0)
            torch.cuda.synchronize()

        for name, graph in (("one graph a step", True), ("eager", False)):
            pace = module.Pace(fixed=True, captured=graph, poll=module.POLL)
            module.pace = lambda device, pace=pace: pace
            values = [seconds(ours)[0] for _ in range(options.rounds + 1)][1:]  # the first compiles
            found = row(name, batch, options.new, values)
            step = found["seconds"] / options.new
            results.append(found | {"share_of_bandwidth": (weights + cache) / step / ceiling})
    return {"dtype": "bfloat16", "copy_bytes_per_s": ceiling, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 8, on a GPU 1 64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.batches = options.batches or ([1, 8] if options.device == "cpu" else [1, 64])
    if not (0 < options.rounds and 0 < options.new <= 1024 - PROMPT):
        parser.error(f"--new must lie in [1, {1024 - PROMPT}], and --rounds be above 0")
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
    print(f"written: {options.out / name}.json and .md")


if __name__ == "__main__":
    main()
