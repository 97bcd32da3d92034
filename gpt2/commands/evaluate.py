"""Evaluates a model: HellaSwag, WikiText perplexity, LAMBADA, validation loss.

    gpt2-triton evaluate gpt2 --tasks hellaswag lambada           # a name of the hub
    gpt2-triton evaluate runs/mine --tasks val                    # on the data it was trained on
    torchrun --nproc-per-node 8 -m gpt2 evaluate runs/gpt2_124m   # work shared by 8 GPUs

Prints a table beside GPT-2's and GPT-3's figures and writes the results as JSON. Data sets are
looked for in --data_dir and downloaded there if need be.
"""

from gpt2.cli import parse, starting
from gpt2.options import EvaluateConfig


def main() -> None:
    with starting():
        config = parse(EvaluateConfig, __doc__)
        from gpt2 import dist
        from gpt2.evals.suite import evaluate
    group = dist.start(config.device)
    evaluate(config, group)
    dist.stop(group)
