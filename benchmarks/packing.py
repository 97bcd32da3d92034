"""What packing conversations saves, beside one conversation a row.

python benchmarks/packing.py alpaca_data.json.xz [--conversations 32] [--repeats 3]

The same conversations, forward and backward, by the same model with random weights: packed;
one to a row of block_size (the fixed shape that compiled training wants); one to a row that is cut
to the longest of its micro batch, in the order of the data. First the three losses are compared:
the same sum over the same tokens. Then each way is timed in turn, over and over, so that what else
the machine does hits all of them; a time is this process's CPU time, the ratio that of medians.
Rows of the whole file are counted besides.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import markdown_table, provenance, write_json  # noqa: E402
from gpt2.config import IGNORE_INDEX, PRESETS  # noqa: E402
from gpt2.data.sft import ConversationLoader, load_conversations  # noqa: E402
from gpt2.model import GPT  # noqa: E402
from gpt2.tokenizer import GPT2Tokenizer  # noqa: E402
from gpt2.train.objectives import LanguageModeling  # noqa: E402

MICRO_BATCH = 8  # rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--preset", default="tinystories-1m")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/packing.json")
    options = parser.parse_args()
    shape = PRESETS[options.preset]
    data, _ = load_conversations(
        options.data, GPT2Tokenizer(), shape.block_size, template="user_assistant", bad_rows="skip"
    )
    chosen = np.random.default_rng(0).choice(len(data), options.conversations, replace=False)
    few = data.select(np.sort(chosen))
    torch.manual_seed(0)
    objective = LanguageModeling(GPT(shape, "torch"))
    packed, padded = (
        ConversationLoader(few, shape.block_size, shuffle=False, packing=p) for p in (True, False)
    )
    ways = {
        "packed": batches(packed),
        "a row each": batches(padded),
        "a row each, cut to the longest": batches(padded, cut=True),
    }
    losses = {name: run(objective, rows) for name, rows in ways.items()}
    torch.testing.assert_close(list(losses.values()), [losses["packed"]] * 3, rtol=1e-5, atol=0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, rows in ways.items():
            start = time.process_time()
            run(objective, rows)
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    table = [
        [name, str(sum(len(idx) for idx, *_ in ways[name])),
         f"{sum(idx.numel() for idx, *_ in ways[name]):,}", f"{medians[name]:.2f}",
         f"{medians[name] / medians['packed']:.2f}"]
        for name in ways
    ]  # fmt: skip
    whole = ConversationLoader(data, shape.block_size)
    print(markdown_table(["way", "rows", "positions", "CPU seconds", "of packed"], table))
    print(f"whole file: {whole.describe()}; one to a row: {len(data):,} rows")
    write_json(options.out, {
        **provenance(), "threads": torch.get_num_threads(), "preset": options.preset,
        "block_size": shape.block_size, "conversations": len(few),
        "losses": {k: v.item() for k, v in losses.items()}, "cpu_seconds": seconds,
        "positions": {k: sum(idx.numel() for idx, *_ in rows) for k, rows in ways.items()},
        "whole_file": {"conversations": len(data), "packed_rows": whole.n_windows,
                       "filled": whole.n_filled / whole.n_tokens},
    })  # fmt: skip


def batches(loader: ConversationLoader, cut: bool = False) -> list[tuple[torch.Tensor, ...]]:
    """The rows of an epoch in micro batches; cut: without the filling that all rows end with."""
    parts = loader.batch(0, loader.n_windows)
    found = list(zip(*(part.split(MICRO_BATCH) for part in parts), strict=True))
    if not cut:
        return found
    longest = [int((t != IGNORE_INDEX).nonzero()[:, 1].max()) + 1 for _, t, _ in found]
    return [
        tuple(part[:, :end] for part in batch) for batch, end in zip(found, longest, strict=True)
    ]


def run(objective: LanguageModeling, rows: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """The summed loss of all rows, after its backward pass."""
    total = torch.zeros(())
    for parts in rows:
        names = ("idx", "targets", "doc_start")
        loss, _ = objective(dict(zip(names, parts, strict=True)))
        loss.backward()
        total += loss.detach()
    objective.zero_grad()
    return total


if __name__ == "__main__":
    main()
