"""From a config to a run: what pretraining and everything after it have in common."""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

from gpt2 import checkpoint, dist
from gpt2.config import TrainConfig, data_sources
from gpt2.dist import Distributed
from gpt2.train.metrics import SafeOutput
from gpt2.train.signals import Interrupted, StopSignals
from gpt2.train.trainer import Trainer


def launch(config: TrainConfig, make_trainer: Callable[[Distributed], Trainer]) -> None:
    """Runs the trainer that make_trainer(group) returns, on from a checkpoint if config says so.

    Raises ValueError and OSError for what cannot be trained, before anything is written, and
    Interrupted (a SystemExit with status 75) after a signal.
    """
    with StopSignals() as signals, redirect_stdout(SafeOutput.of(sys.stdout)):
        group = dist.start(config.device, config.timeout_s)
        resumed = find_checkpoint(config, group)
        trainer = make_trainer(group)
        if resumed is not None:
            trainer.resume(resumed)
            if group.is_main:
                _show_changes(trainer.config, resumed)
        try:
            trainer.run(signals)
        except Interrupted:
            dist.stop(group)
            raise
    # Not where a rank failed: it must end at once, without waiting for the others.
    dist.stop(group)


def find_checkpoint(config: TrainConfig, group: Distributed) -> checkpoint.Checkpoint | None:
    """What config.resume names. Refuses to write over a run that is not to be continued."""
    run = Path(config.out_dir) / config.run_name
    if config.resume == "never":
        if (run / "metrics.jsonl").exists():
            raise ValueError(
                f"{run} holds a run already: continue it with --resume auto, or choose another "
                "run_name"
            )
        return None
    if config.resume != "auto":
        return checkpoint.read_checkpoint(config.resume)
    # One process decides, so that all go on from the same one.
    path = None
    if group.is_main:
        found = checkpoint.newest_good(run)
        path = found.path if found else None
    path = group.broadcast(path)
    return checkpoint.read_checkpoint(path) if path else None


def _show_changes(config: TrainConfig, resumed: checkpoint.Checkpoint) -> None:
    """Says which options are not those of the run that is continued."""
    now = json.loads(json.dumps(asdict(config)))  # with lists for tuples, as the checkpoint has
    for key, value in resumed.train.items():
        if key not in ("resume", "out_dir", "run_name") and now.get(key) != value:
            print(f"changed since the checkpoint: {key} was {value}, is {now.get(key)}")
    before, after = (
        [s for s in data_sources(data) if s.from_step < resumed.step]
        for data in (resumed.train.get("data", config.data), config.data)
    )
    if before != after:
        print(
            "the data of the steps before is another, too: what was seen is counted as if this had "
            f"held from step 0 on; weights for the steps from here on are written @{resumed.step}"
        )
