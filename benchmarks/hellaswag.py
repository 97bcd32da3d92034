"""HellaSwag's time: the shared context run once, against 4 plain rows, against one example a call.

    python benchmarks/hellaswag.py --data ../shared/data/hellaswag/hellaswag_val.jsonl.xz
    python benchmarks/hellaswag.py --data hellaswag_val.jsonl --device cuda --examples 10042

All three give the losses of the same examples with the same weights (random, of a preset), in turns
in one process; the third is the usual script: one example a call, the head on every position. They
are compared first. The result is the median of the rounds.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import ROOT, markdown_table, provenance, write_json
from gpt2.config import PRESETS
from gpt2.evals.hellaswag import Example, hellaswag_accuracy, read_hellaswag
from gpt2.evals.scoring import Single
from gpt2.model import GPT
from gpt2.tokenizer import GPT2Tokenizer


def one_at_a_time(model: GPT, examples: list[Example]) -> dict[str, float]:
    """The usual script's way."""
    hits = 0
    device = model.lm_head.weight.device
    with torch.inference_mode():
        for e in examples:
            longest = max(map(len, e.endings))
            rows = [e.context + ending + [0] * (longest - len(ending)) for ending in e.endings]
            idx = torch.tensor(rows, device=device)
            losses = F.cross_entropy(
                model(idx)[:, :-1].flatten(0, 1).float(), idx[:, 1:].flatten(), reduction="none"
            ).view(4, -1)[:, len(e.context) - 1 :]
            lengths = torch.tensor([len(ending) for ending in e.endings], device=device)
            counted = torch.arange(longest, device=device) < lengths[:, None]
            hits += int(((losses * counted).sum(1) / lengths).argmin() == e.label)
    return {"acc_norm": hits / len(examples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="hellaswag_val.jsonl, or .xz")
    parser.add_argument("--preset", default="gpt2", choices=PRESETS)
    parser.add_argument("--examples", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/hellaswag.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = GPT(PRESETS[args.preset], "auto", args.device).eval()
    block_size = model.config.block_size
    examples = read_hellaswag(args.data, GPT2Tokenizer(), block_size, args.examples)
    group = Single(torch.device(args.device))
    ways = {
        "shared context": lambda: hellaswag_accuracy(model, examples, group),
        "4 plain rows": lambda: hellaswag_accuracy(model, examples, group, share_context=False),
        "one example a call": lambda: one_at_a_time(model, examples),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores = {name: way()["acc_norm"] for name, way in ways.items()}  # warm, and compared
    if len(set(scores.values())) > 1:
        raise SystemExit(f"error: the ways give different scores: {scores}")
    for _ in range(args.rounds):
        for name, way in ways.items():
            if group.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            way()  # reads its sums, so it waits for the device
            seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds["4 plain rows"])
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        rows.append(
            [name, f"{median:.3f}", f"{len(examples) / median:.2f}", f"{base / median:.2f}"]
        )
    print(f"{args.preset}, {len(examples)} examples, {torch.get_num_threads()} threads")
    print(markdown_table(["way", "seconds", "examples/s", "times 4 plain rows"], rows))
    content = {
        **provenance(), "threads": torch.get_num_threads(), "preset": args.preset,
        "examples": len(examples), "seconds": seconds, "acc_norm": scores,
    }  # fmt: skip
    write_json(Path(args.out), content)


if __name__ == "__main__":
    main()
