"""Trains a model on preferences: pairs of a chosen and a rejected answer.

    gpt2-triton dpo configs/dpo_hh.yaml
    gpt2-triton dpo --init_from runs/mine_chat --data pairs.jsonl --run_name mine_dpo
    gpt2-triton dpo --init_from runs/mine_chat --data pairs.jsonl --lora_rank 8 --lr 5e-5
    torchrun --nproc-per-node 8 -m gpt2 dpo configs/dpo_hh.yaml
    gpt2-triton dpo configs/dpo_hh.yaml --resume auto                # goes on with a run

A row of the data is {"prompt": ..., "chosen": ..., "rejected": ...}, each text or a list of
messages; or has chosen and rejected as hh-rlhf writes them; or instruction and input beside them.
The model that it starts from, best a fine-tuned one, is the reference too; with lora_rank it is the
model with its adapters off. The first loss is ln 2 = 0.6931. reward_margin is how much more the
chosen answer has gained than the rejected one, reward_accuracy for how many pairs it has.
"""

from gpt2.cli import parse, starting
from gpt2.config import DPOConfig


def main() -> None:
    with starting():
        config = parse(DPOConfig, __doc__)
        from gpt2.train.finetune import finetune
    finetune(config)
