"""Fine-tunes a model on conversations, so that it answers.

    gpt2-triton sft configs/sft_alpaca.yaml                          # gpt2 on Alpaca
    gpt2-triton sft runs/mine --data chats.jsonl --run_name mine_chat
    torchrun --nproc-per-node 8 -m gpt2 sft configs/sft_alpaca.yaml --micro_batch_size 2
    gpt2-triton sft configs/sft_alpaca.yaml --resume auto            # goes on with a run

A row of your own data is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...
}]}, or has instruction, input and output; or prompt and response; or question and answer. Only the
assistant's tokens count for the loss. Rows that cannot be used end the run, or with --bad_rows skip
are left out and counted.
"""

from gpt2.cli import parse, starting
from gpt2.config import SFTConfig


def main() -> None:
    with starting():
        from gpt2.data.conversations import listing

        config = parse(SFTConfig, f"{__doc__}\nData sets:\n{listing()}")
        from gpt2.train.finetune import finetune
    finetune(config)
