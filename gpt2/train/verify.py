"""Whether a run can be repeated: some steps again from a checkpoint, against its metrics.jsonl.

The trainer is the one that trained, with the options of config.yaml, in a temporary folder, and is
stopped as a signal would stop it. It logs each step; the run logged means over several, which are
made again of the single losses in the same way (math.fsum), so that equal means equal bits.

A mean is compared where all its steps are repeated: it begins behind the logged step before, behind
the start of the launch that logged it, or where a rollback ended.
"""

import contextlib
import io
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from gpt2 import checkpoint, dist
from gpt2.cli import read_config
from gpt2.config import DPOConfig, SFTConfig, TrainConfig
from gpt2.dist import Distributed
from gpt2.options import VerifyConfig
from gpt2.train import dpo, pretrain, sft
from gpt2.train.metrics import read_metrics
from gpt2.train.receipt import git_state, hardware, manifest_facts, read_receipt, versions
from gpt2.train.signals import Interrupted
from gpt2.train.trainer import data_identity

LEAST_STEPS = 10
MAKERS = {  # the kinds of runs; pretraining's options are part of the others'
    TrainConfig: pretrain.make_trainer,
    SFTConfig: sft.make_trainer,
    DPOConfig: dpo.make_trainer,
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Relative differences of losses that another order of additions may make over a few steps."""


class StopAt:
    """Stands for gpt2.train.signals.StopSignals: asks for a stop at a step."""

    def __init__(self, trainer, step: int):
        self.trainer, self.step = trainer, step

    @property
    def received(self) -> str | None:
        return "verify_run" if self.trainer.step >= self.step else None


def verify_run(options: VerifyConfig) -> bool:
    """Prints a table of the comparison; whether everything agreed.

    Raises ValueError and OSError where nothing can be compared.
    """
    run = Path(options.run)
    config, lines, receipt = _read(run)
    from_checkpoint = _choose(run, options.checkpoint, lines, receipt)
    first = from_checkpoint.step if from_checkpoint is not None else 0
    wanted = _windows(lines, receipt, first, options.steps or LEAST_STEPS)
    now = [entry | manifest_facts(entry["path"]) for entry in data_identity(config.data)]
    changes = data_changes(receipt["data"], now)
    group = dist.start(options.device or config.device, config.timeout_s)
    say = print if group.is_main else _silent
    say(f"run         {run}: {config.data}")
    say(f"data        {'; '.join(changes) or 'the same as in the receipt, by ' + _how(receipt)}")
    if changes:
        return False
    launch = [x for x in receipt["launches"] if x["first_step"] <= first][-1]
    say(f"code        {_code(launch['git'], git_state())}")
    if group.device.type == "cpu" and launch["device"] == "cpu":
        torch.set_num_threads(launch["hardware"]["threads"])  # another number adds in another order
    say(f"repeating   steps {first + 1:,} to {wanted[-1][1]:,}, on {group.world_size} ranks")
    found = _repeat(config, options, from_checkpoint, first, wanted[-1][1], group)
    tolerance, why = _tolerance(options, launch, config, group)
    say(f"tolerance   {tolerance:g} ({why})")
    agreed = _compare(lines, found, wanted, tolerance, say)
    dist.stop(group)
    return agreed


def _silent(text: str) -> None:
    del text


def _read(run: Path) -> tuple[TrainConfig, list[dict], dict]:
    for name in ("config.yaml", "metrics.jsonl", "receipt.json"):
        if not (run / name).exists():
            raise OSError(f"{run}: no {name} here, so this is no run that can be verified")
    config = read_config(run / "config.yaml", *MAKERS)
    return config, read_metrics(run / "metrics.jsonl"), read_receipt(run)


def _choose(run: Path, name: str, lines: list[dict], receipt: dict):
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
    """(behind, to) of the logged means that lie behind step `first`, for at least `steps` steps."""
    logged = sorted({line["step"] for line in lines if "train/loss" in line})
    edges = {0, *logged, *(launch["first_step"] for launch in receipt["launches"])}
    edges |= {line["step"] for line in lines if "guard/rolled_back_from" in line}
    windows = []
    for to in logged:
        behind = max(edge for edge in edges if edge < to)
        if behind >= first:
            windows.append((behind, to))
            if to - first >= steps:
                break
    if not windows:
        raise ValueError(
            f"no loss was logged for steps behind {first} that begin there: choose an earlier "
            "--checkpoint"
        )
    return windows


def data_changes(before: list[dict], now: list[dict]) -> list[str]:
    """What is different between a receipt's data and what is there now, in words."""
    changes = []
    for old, new in zip(before, now, strict=False):
        if old.get("manifest_sha256") != new.get("manifest_sha256"):
            changes.append(f"{new['path']}/manifest.json is another one")
        for name in sorted(old["shards"].keys() | new["shards"].keys()):
            a, b = old["shards"].get(name), new["shards"].get(name)
            if a != b:
                verb = "is missing" if b is None else "is new" if a is None else "is another one"
                changes.append(f"{new['path']}/{name} {verb}")
    if len(before) != len(now):
        changes.append(f"{len(now)} folders instead of {len(before)}")
    return changes


def _how(receipt: dict) -> str:
    hashes = [h for entry in receipt["data"] for h in entry["shards"].values()]
    hashed = hashes and all("bytes" not in h for h in hashes)
    return "the hashes of manifest and shards" if hashed else "sizes; not all shards have hashes"


def _repeat(config, options, from_checkpoint, first: int, to: int, group: Distributed) -> dict:
    """Loss of each step behind `first` up to `to`, by step, as a run of its own logs it."""
    with tempfile.TemporaryDirectory(prefix="verify_run_") as folder:
        # Without validation fine-tuning would train on the data that it holds back for that.
        eval_every = config.eval_every and config.max_steps + 1
        config = replace(
            config, out_dir=folder, resume="never", log_every=1, save_every=0,
            eval_every=eval_every,
            hellaswag_every=0, sample_every=0, wandb_project="",
            device=options.device or config.device,
        )  # fmt: skip
        trainer = MAKERS[type(config)](config, group)
        if from_checkpoint is not None:
            trainer.resume(from_checkpoint)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Interrupted):
            trainer.run(StopAt(trainer, to))
        lines = read_metrics(Path(folder) / config.run_name / "metrics.jsonl")
        return {
            line["step"]: line["train/loss"]
            for line in group.broadcast(lines)
            if "train/loss" in line and line["step"] > first
        }


def _code(then: dict, now: dict) -> str:
    if then["commit"] is None or now["commit"] is None:
        return "commit not known"
    old, new = (s["commit"][:10] + " with changes" * bool(s["dirty"]) for s in (then, now))
    return f"the same commit, {new}" if old == new else f"trained by {old}, here {new}"


def _tolerance(options, launch: dict, config, group) -> tuple[float, str]:
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
    is_bfloat16 = config.dtype == "bfloat16" or config.dtype == "auto" and here["device"] == "cuda"
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    return TOLERANCE[dtype], "; ".join(differ) or "a GPU"


def _compare(lines: list[dict], found: dict, wanted: list, tolerance: float, say) -> bool:
    """Prints a line for each mean; whether all agree."""
    logged = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    say(f"{'steps':>17}  {'logged':>12}  {'repeated':>12}  difference")
    bad = 0
    for behind, to in wanted:
        losses = [found[step] for step in range(behind + 1, to + 1) if step in found]
        again = math.fsum(losses) / len(losses) if losses else math.nan
        apart = abs(again - logged[to]) / max(abs(logged[to]), 1e-12)
        is_equal = again == logged[to]
        ok = is_equal or apart <= tolerance
        bad += not ok
        what = "same bits" if is_equal else f"{apart:.1e}"
        steps = f"{behind + 1:,}-{to:,}"
        mark = "" if ok else "  DIFFERS"
        say(f"{steps:>17}  {logged[to]:>12.6f}  {again:>12.6f}  {what}{mark}")
    n = len(wanted)
    say(f"verdict     {'repeated' if not bad else 'NOT repeated'}: {n - bad} of {n} losses agree")
    return not bad
