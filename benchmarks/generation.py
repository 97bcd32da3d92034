"""Tokens a second of generation: this project, transformers and nanoGPT, side by side in one run.

    python benchmarks/generation.py --nanogpt PATH        # on this CPU
    python benchmarks/generation.py --new 64 --rounds 2 --batches 1 --out /tmp
    python benchmarks/generation.py --device cuda         # a GPU: tokens/s, share of its bandwidth

GPT-2 124M's shape with random weights, block_size 1024, greedy, a prompt of 32 random tokens a row.

On a CPU: float32, the same weights and threads in all three. They generate at the same time but
work in turns of a few tokens, so that what else the machine does slows all alike; each one's time
is the sum of its turns, prompt included. transformers: generate with its default KV cache, under
inference_mode. nanoGPT: generate without a cache, as it is, with top_k 1; it is called anew for
each turn with all tokens so far, which for it is the same work; only in the first round, and only
for batch 1: larger ones take hours. PATH is a checkout of https://github.com/karpathy/nanoGPT;
without it nanoGPT is left out.
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
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import markdown_table, measure_ceilings, provenance, write_json  # noqa: E402
from gpt2 import GPT, PRESETS, generate  # noqa: E402
from gpt2.hf import is_transposed  # noqa: E402

PROMPT, TOKENS_A_TURN = 32, 8
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


class Turns:
    """Jobs that take turns: each runs in a thread of its own, one at a time."""

    def __init__(self, jobs: dict, tokens_a_turn: int):
        self.jobs, self.tokens_a_turn = jobs, tokens_a_turn
        self.seconds = dict.fromkeys(jobs, 0.0)
        self.results, self.waiting = {}, list(jobs)  # the first of those waiting works
        self.changed, self.n_threads = threading.Condition(), torch.get_num_threads()

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, args=job) for job in self.jobs.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, name: str, job) -> None:
        torch.set_num_threads(self.n_threads)  # OpenMP keeps it for each thread
        done = 0

        def tick() -> bool:
            """After every token."""
            nonlocal done
            done += 1
            if done % self.tokens_a_turn == 0:
                self._end_turn(name)
                self._await_turn(name)
            return False

        self._await_turn(name)
        self.results[name] = job(tick)
        self._end_turn(name, for_good=True)

    def _await_turn(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting[0] == name)
        self.began = time.perf_counter()

    def _end_turn(self, name: str, for_good: bool = False) -> None:
        self.seconds[name] += time.perf_counter() - self.began
        with self.changed:
            self.waiting.pop(0)
            if not for_good:
                self.waiting.append(name)
            self.changed.notify_all()


def cpu_round(
    model: GPT, others: dict, prompt: torch.Tensor, new: int, with_nanogpt: bool
) -> tuple[dict[str, float], bool]:
    """Seconds of each for its tokens, and whether transformers' tokens are ours."""
    rows = len(prompt)

    def ours(tick) -> list[list[int]]:
        stop = lambda row, tokens: row == rows - 1 and tick()  # noqa: E731
        return generate(model, prompt.tolist(), max_new_tokens=new, temperature=0, stop=stop)

    def transformers(tick) -> list[list[int]]:
        def after_token(idx, scores, **kwargs):
            tick()
            return torch.zeros(rows, dtype=torch.bool)

        with torch.inference_mode():
            idx = others[HF].generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new,
                min_new_tokens=new, do_sample=False, pad_token_id=0,
                stopping_criteria=[after_token],
            )  # fmt: skip
        return idx[:, PROMPT:].tolist()

    def nanogpt(tick) -> None:
        idx = prompt
        while idx.shape[1] < PROMPT + new:
            n = min(TOKENS_A_TURN, PROMPT + new - idx.shape[1])
            idx = others[NANO].generate(idx, n, top_k=1)
            for _ in range(n):
                tick()

    jobs = {OURS: ours, HF: transformers} | ({NANO: nanogpt} if with_nanogpt else {})
    turns = Turns(jobs, TOKENS_A_TURN)
    turns.run()
    return turns.seconds, turns.results[OURS] == turns.results[HF]


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
        times, equal = {}, True
        for n_round in range(options.rounds):
            with_nanogpt = NANO in others and batch == 1 and n_round == 0
            seconds, same = cpu_round(model, others, prompt, options.new, with_nanogpt)
            equal = equal and same
            for name, value in seconds.items():
                times.setdefault(name, []).append(value)
            print(batch, {name: f"{value:.1f} s" for name, value in seconds.items()}, flush=True)
        for name, values in times.items():
            whole = statistics.median(values)
            # Ratios are of the same round, in which all met the same machine.
            over = [v / o for v, o in zip(values, times[OURS], strict=False)]
            results.append(
                {
                    "generator": name, "batch": batch, "new_tokens": options.new,
                    "seconds": whole, "tokens_per_s": batch * options.new / whole,
                    "over": statistics.median(over), "rounds": values,
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
        names, rates = [r["generator"] for r in at], [r["tokens_per_s"] for r in at]
        shown = axes.barh(names, rates, color=colors)
        axes.bar_label(shown, [f"{rate:,.4g}" for rate in rates], padding=2, fontsize=8)
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
    parser.add_argument("--rounds", type=int, default=3)
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
