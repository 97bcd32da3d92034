"""What torchrun starts for tests/test_layouts.py: several runs, one after the other.

Its argument is a JSON file: a list of options of TrainConfig, each perhaps with "poisoned": rows
(lists of tokens) that make the loss NaN, and "eval_data": the folder of HellaSwag's questions. One
start of the processes serves all runs.
"""

import json
import sys

import torch

from gpt2 import dist
from gpt2.config import TrainConfig
from gpt2.train import pretrain
from gpt2.train.objectives import LanguageModeling
from gpt2.train.trainer import Trainer


class Poisoned(LanguageModeling):
    rows: list[torch.Tensor] = []

    def forward(self, batch):
        loss_sum, metrics = super().forward(batch)
        for row in self.rows:
            if (batch["idx"] == row).all(1).any():
                loss_sum = loss_sum * float("nan")
        return loss_sum, metrics


def tell_what_is_held(real):
    def run(self, *args):
        real(self, *args)
        state = [t for s in self.optimizer.state.values() for k, t in s.items() if k != "step"]
        weights, moments = (
            sum((t.to_local() if hasattr(t, "to_local") else t).numel() for t in tensors)
            for tensors in (self.model.parameters(), state)
        )
        name, rank = self.config.run_name, self.group.rank
        print(f"{name}: rank {rank} holds {weights} weights, {moments} moments", flush=True)

    return run


def main() -> None:
    group = dist.start("cpu")
    start, stop = dist.start, dist.stop
    dist.start, dist.stop = lambda *_: group, lambda _: group.barrier()
    pretrain.LanguageModeling = Poisoned
    Trainer.run = tell_what_is_held(Trainer.run)
    with open(sys.argv[1]) as file:
        runs = json.load(file)
    for options in runs:
        Poisoned.rows = [torch.tensor(row) for row in options.pop("poisoned", [])]
        pretrain.EVAL_DATA = options.pop("eval_data", pretrain.EVAL_DATA)
        pretrain.pretrain(TrainConfig(**options))
    dist.start, dist.stop = start, stop
    dist.stop(group)


if __name__ == "__main__":
    main()
