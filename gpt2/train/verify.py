"""Whether a run can be repeated: some steps again from a checkpoint, against its metrics.jsonl.

The trainer is the one that trained, with the options of config.yaml; it writes nothing. The run
logged means over several steps, which are made again of the single losses in the same way
(math.fsum), so that equal means equal bits.

A mean is compared where all its steps are repeated: it begins after the logged step before, after
the start of the launch that logged it, or where a rollback ended.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch

from gpt2 import checkpoint, dist
from gpt2.cli import read_config
from gpt2.config import DPOConfig, SFTConfig, TrainConfig
from gpt2.device import Execution
from gpt2.dist import Distributed
from gpt2.options import VerifyConfig
from gpt2.train.finetune import finetuning
from gpt2.train.metrics import read_metrics
from gpt2.train.pretrain import Parts, pin_start, pretraining
from gpt2.train.receipt import commit_of, git_state, hardware, read_receipt, versions
from gpt2.train.trainer import Trainer

LEAST_STEPS = 10
KINDS = {TrainConfig: pretraining, SFTConfig: finetuning, DPOConfig: finetuning}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Relative differences of losses that another order of additions may make over a few steps."""


def verify_run(options: VerifyConfig) -> bool:
    """Prints a table of the comparison; whether everything agreed.

    Raises ValueError and OSError where nothing can be compared.
    """
    run = Path(options.run)
    for name in ("config.yaml", "metrics.jsonl", "receipt.json"):
        if not (run / name).exists():
            raise OSError(f"{run}: no {name} here, so this is no run that can be verified")
    config = read_config(run / "config.yaml", *KINDS)
    lines, receipt = read_metrics(run / "metrics.jsonl"), read_receipt(run)
    start = _choose(run, options.checkpoint, lines)
    first = 0 if start is None else start.step
    wanted = _windows(lines, receipt, first, options.steps or LEAST_STEPS)
    launch = [x for x in receipt["launches"] if x["first_step"] <= first][-1]
    group = dist.start(options.device or config.device, config.timeout_s)
    say = print if group.is_main else lambda text: None
    if group.device.type == "cpu" and launch["device"] == "cpu":
        torch.set_num_threads(launch["hardware"]["threads"])  # another number adds in another order
    config = pin_start(replace(config, device=options.device or config.device), start)
    parts = KINDS[type(config)](config, group)
    say(f"run         {run}: {config.data}")
    same, how = _compare_data(receipt["data"], parts)
    say(f"data        {how}")
    if same:
        say(f"code        commit {commit_of(launch['git'])}, here {commit_of(git_state())}")
        say(f"repeating   steps {first + 1:,} to {wanted[-1][1]:,}, on {group.world_size} ranks")
        data = (parts.train_data, None, parts.tokenizer)
        trainer = Trainer(parts.config, parts.objective, *data, group)
        trainer.take_products(receipt.get("products") or {})
        if start is not None:
            trainer.resume(start)
        tolerance, why = _tolerance(options, launch, trainer.execution, group)
        say(f"tolerance   {tolerance:g} ({why})")
        same = _compare_losses(lines, trainer.repeat(wanted[-1][1]), wanted, tolerance, say)
    dist.stop(group)
    return same


def _choose(run: Path, name: str, lines: list[dict]) -> checkpoint.Checkpoint | None:
    """The checkpoint to start from; None: step 0."""
    if name == "start":
        return None
    if name:
        path = Path(name) if (Path(name) / checkpoint.META).exists() else run / "checkpoints" / name
        return checkpoint.read_checkpoint(path)
    found = [checkpoint.read_checkpoint(path) for path in checkpoint.list_checkpoints(run)[:-1]]
    last = max((line["step"] for line in lines if "train/loss" in line), default=0)
    return next((c for c in reversed(found) if c.step < last), None)


def _windows(lines: list[dict], receipt: dict, first: int, steps: int) -> list[tuple[int, int]]:
    """(after, to) of the logged means that lie after step `first`, for at least `steps` steps, and
    before the run went back to an earlier step."""
    back = [line["step"] for line in lines if "guard/rolled_back_from" in line]
    end = min((step for step in back if step > first), default=math.inf)
    logged = sorted({line["step"] for line in lines if "train/loss" in line})
    edges = {0, *logged, *back, *(launch["first_step"] for launch in receipt["launches"])}
    windows = [(max(edge for edge in edges if edge < to), to) for to in logged if to <= end]
    windows = [(after, to) for after, to in windows if after >= first]
    if not windows:
        raise ValueError(f"no loss was logged after step {first}: choose an earlier --checkpoint")
    enough = next((i for i, (_, to) in enumerate(windows) if to - first >= steps), len(windows))
    return windows[: enough + 1]


def _compare_data(before: list[dict], parts: Parts) -> tuple[bool, str]:
    """Whether the data is what the receipt says, and how that is known, in words."""
    now = parts.train_data.identity()
    if not before or any("hash" not in entry for entry in before):
        return True, "the receipt holds no hashes of it, so it is not known to be the same"
    if len(before) != len(now):
        return False, f"{len(now)} folders or files instead of {len(before)}"
    known = zip(before, now, strict=True)
    other = [new["path"] for old, new in known if old["hash"] != new["hash"]]
    if other:
        return False, f"not what was trained on: {', '.join(other)}"
    return True, "the same as in the receipt, by its hashes"


def _tolerance(
    options: VerifyConfig, launch: dict, execution: Execution, group: Distributed
) -> tuple[float, str]:
    """The relative difference that is allowed, and why."""
    if options.tolerance is not None:
        return options.tolerance, "asked for"
    here, there = (
        {"device": device, "ranks": ranks, "CPU": h["cpu"], "threads": h["threads"], **v}
        for device, ranks, h, v in (
            (group.device.type, group.world_size, hardware(group.device), versions()),
            (launch["device"], launch["world_size"], launch["hardware"], launch["versions"]),
        )
    )
    differ = [f"{k} {there.get(k)}, here {here[k]}" for k in here if here[k] != there.get(k)]
    if not differ and group.device.type == "cpu":
        return 0.0, "the same CPU, versions, ranks and threads: the same bits"
    return TOLERANCE[execution.dtype], "; ".join(differ) or "a GPU"


def _compare_losses(lines: list[dict], found: dict, wanted: list, tolerance: float, say) -> bool:
    """Prints a line for each mean; whether all agree."""
    logged = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    say(f"{'steps':>17}  {'logged':>12}  {'repeated':>12}  difference")
    n_good = 0
    for after, to in wanted:
        losses = [found[step] for step in range(after + 1, to + 1) if step in found]
        before, again = logged[to], math.fsum(losses) / len(losses) if losses else math.nan
        apart = abs(again - before) / max(abs(before), 1e-12)
        what = "same bits" if again == before else f"{apart:.1e}"
        what += "" if (is_good := again == before or apart <= tolerance) else "  DIFFERS"
        n_good += is_good
        say(f"{f'{after + 1:,}-{to:,}':>17}  {before:>12.6f}  {again:>12.6f}  {what}")
    verdict = "repeated" if n_good == len(wanted) else "NOT repeated"
    say(f"verdict     {verdict}: {n_good} of {len(wanted)} losses agree")
    return n_good == len(wanted)
