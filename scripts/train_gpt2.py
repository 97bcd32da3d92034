"""Trains a GPT-2 on a folder of token shards.

python scripts/train_gpt2.py configs/shakespeare_char.yaml                # a CPU or one GPU
torchrun --nproc-per-node 8 scripts/train_gpt2.py configs/gpt2_124m.yaml  # 8 GPUs
python scripts/train_gpt2.py configs/gpt2_124m.yaml --lr 3e-4             # overrides the file
python scripts/train_gpt2.py configs/gpt2_124m.yaml --resume auto         # goes on with a run
"""

from gpt2.cli import parse, run_script, starting
from gpt2.config import TrainConfig


def main() -> None:
    with starting():
        config = parse(TrainConfig, __doc__)
        from gpt2.train.pretrain import pretrain
    pretrain(config)


if __name__ == "__main__":
    run_script(main)
