"""Trains a GPT-2 on a folder of token shards.

    gpt2-triton train configs/shakespeare_char.yaml                   # a CPU or one GPU
    torchrun --nproc-per-node 8 -m gpt2 train configs/gpt2_124m.yaml  # 8 GPUs
    gpt2-triton train configs/gpt2_124m.yaml --lr 3e-4                # overrides the file
    gpt2-triton train configs/gpt2_124m.yaml --resume auto            # goes on with a run

The shards come from `gpt2-triton prepare`; a recipe that is not here as a file is the package's.
"""

from gpt2.cli import parse, starting
from gpt2.config import TrainConfig


def main() -> None:
    with starting():
        config = parse(TrainConfig, __doc__)
        from gpt2.train.pretrain import pretrain
    pretrain(config)
