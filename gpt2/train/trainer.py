"""The training loop: the only one, for pretraining and everything after it.

It trains an objective on a source of batches. A source has batch(step, global_batch_size, rank,
world_size) -> idx, targets and, if attention is to stay inside documents, doc_start, or what its
attribute `names` says: a pure function, as TokenLoader has; so the only thing to remember about
data is the step.

The loss that is differentiated is the sum over all units (targets) of a step, divided by their
number over all micro steps and ranks. So how a step is cut into micro batches and ranks changes
nothing but the order of additions, and with exact_reduction not even that.

Between two steps, in this order: what the guard found, a checkpoint if one is due, then validation
and samples, so that running out of memory in those costs nothing.
"""

import dataclasses
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2 import checkpoint
from gpt2.cli import write_yaml
from gpt2.config import TrainConfig
from gpt2.data.feed import Feed
from gpt2.device import execution
from gpt2.dist import Distributed, Heartbeat
from gpt2.evals.hellaswag import Example
from gpt2.lora import lora_config
from gpt2.tokenizer import Tokenizer
from gpt2.train import blame, evaluation
from gpt2.train.describe import derived, show_result
from gpt2.train.guard import Guard, Verdict
from gpt2.train.metrics import Metrics
from gpt2.train.objectives import Batch
from gpt2.train.parallel import make_layout
from gpt2.train.preflight import Preflight, preflight
from gpt2.train.receipt import Receipt
from gpt2.train.report import write_report
from gpt2.train.rollback import Snapshots
from gpt2.train.saver import Saver
from gpt2.train.schedule import learning_rate
from gpt2.train.signals import Interrupted, StopSignals

NAMES = ("idx", "targets", "doc_start")
REPORT_EVERY_S = 30.0  # at checkpoints, so that it costs nothing where they come often


class Trainer:
    """Trains objective.model as config says; call run().

    objective: see gpt2.train.objectives; its model lies on group.device.
    train_data, val_data: sources of rows of block_size tokens; val_data None: no validation.
    Attribute step: optimizer steps done.
    Raises ValueError where config does not fit the data or the number of ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: torch.nn.Module,
        train_data,
        val_data,
        tokenizer: Tokenizer,
        group: Distributed,
    ):
        self.config, self.group, self.tokenizer = config, group, tokenizer
        self.objective, self.model = objective, objective.model
        self.train_data, self.val_data = train_data, val_data
        self.train_feed = Feed(train_data, group.device)
        self.val_feed = Feed(val_data, group.device) if val_data is not None else None
        self.names = getattr(train_data, "names", NAMES)
        self.folder = Path(config.out_dir) / config.run_name
        self.rows_per_step = config.tokens_per_step // train_data.block_size
        self.execution = execution(group.device, config.dtype, config.compile)
        self.model.activation_checkpointing = config.activation_checkpointing
        self.layout = make_layout(config, objective, group, self.execution.compiled)
        self.optimizer, self.params = self.layout.optimizer, self.layout.params
        adapters = lora_config(self.model)
        self.has_dropout = bool(self.model.config.dropout or adapters and adapters.dropout)
        self.first_step = self.step = 0
        self.data_offset = 0  # the batch of a step is that of step + data_offset; see _roll_back
        self.guard = Guard(group)
        self.snapshots = Snapshots()
        self.saved_step, self.reported = -1, -math.inf
        self.signals = StopSignals()
        self.hellaswag: list[Example] = []
        if config.hellaswag_every:
            self.hellaswag = evaluation.load_hellaswag(
                tokenizer, self.model.config.block_size, group
            )
        self.resumed: checkpoint.Checkpoint | None = None
        self.preflight: Preflight | None = None
        if config.micro_batch_size != "auto":  # else when it is known, in run()
            self._divide_step()
        if group.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where float32 matmuls are left

    def resume(self, from_checkpoint: checkpoint.Checkpoint) -> None:
        """Continues from a checkpoint's step with its weights, moments and guard."""
        self.resumed = from_checkpoint
        checkpoint.load_training_state(from_checkpoint, self.model, self.optimizer)
        self.first_step = self.step = self.saved_step = from_checkpoint.step
        self.data_offset = from_checkpoint.state.get("data_offset", 0)
        self.guard.load_state_dict(from_checkpoint.state.get("guard", {}))

    def run(self, signals: StopSignals | None = None) -> None:
        """Trains to max_steps; everything it writes lies in the run folder.

        signals: what asks for an early stop, if the caller has installed it already.
        Raises Interrupted (a SystemExit with status 75) after a signal, once everything is saved.
        """
        if signals is None:
            with StopSignals() as signals:
                return self.run(signals)
        self.config, self.preflight = preflight(
            self.config, self.model, self.optimizer, self.group,
            block_size=self.train_data.block_size, bfloat16=self.execution.dtype == torch.bfloat16,
            compiled=self.execution.compiled, doc_mask="doc_start" in self.names,
            reference=_n_numbers(self.objective) - _n_numbers(self.model),
            full_rows=not getattr(self.train_data, "trim", False), resumed=self.resumed,
        )  # fmt: skip
        self._divide_step()
        config, group, end = self.config, self.group, "failed"
        self.signals, self.metrics, self.saver = signals, None, None
        self.heartbeat = Heartbeat(group)
        if group.is_main:
            self._open_run_folder()
        try:
            self._loop()
            end = "finished"
        except Interrupted as interrupted:
            end = f"stopped by {interrupted.signal_name}"
            raise
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory on {group.device}: lower micro_batch_size "
                f"{config.micro_batch_size} (the result stays the same); checkpoints so far lie in "
                f"{self.folder}"
            ) from error
        except RuntimeError as error:
            if not _lost_connection(error):
                raise
            first = str(error).split(". ")[0]
            raise ConnectionError(
                f"step {self.step}: {self.heartbeat.diagnose()}; the run goes on from its last "
                f"checkpoint with --resume auto ({first})"
            ) from error
        finally:
            self.heartbeat.close()
            self.train_feed.close()
            if self.val_feed is not None:
                self.val_feed.close()
            if self.metrics is not None:
                try:
                    self.saver.close()
                finally:
                    self._report(end)
                    self.metrics.close()
        if group.is_main:
            show_result(self)

    def _divide_step(self) -> None:
        """Into micro steps; micro_batch_size is a number by now."""
        self.grad_accum_steps = self.config.grad_accum_steps(
            self.train_data.block_size, self.group.world_size
        )
        self.layout.divide_step(self.grad_accum_steps)

    def _open_run_folder(self) -> None:
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in checkpoint.set_aside(self.folder, self.first_step):
            print(f"not part of what goes on from step {self.first_step}, kept as {path}")
        write_yaml(config, self.folder / "config.yaml")
        for name, value in derived(self):
            print(f"{name:<22}{value}")
        self.metrics = Metrics(self.folder, config, dataclasses.asdict(config), self.first_step)
        self.receipt = Receipt(
            self.folder, config, self.model, self.group, unit=self.objective.unit,
            first_step=self.first_step, predicted=self.preflight.predicted(),
        )  # fmt: skip
        self.saver = Saver(
            self.folder,
            keep_last=config.keep_last,
            keep_going=config.on_save_error == "continue",
            on_saved=self._on_saved,
            on_failed=self._on_save_failed,
        )

    def _loop(self) -> None:
        config, group = self.config, self.group
        self.losses: list[float] = []  # of the steps applied since the last log line
        self.sums: dict[str, Tensor] = {}  # of the objective's metrics since then
        stop_asked = group.vote(self._signalled)
        busy_s, steps = 0.0, 0
        while True:
            step, last = self.step, self.step == config.max_steps
            if stop_asked() and not last:
                if self._settle(all_steps=True):
                    continue
                self._save()
                self._leave()
            if self._save_is_due(step) and step > self.first_step:
                self._save()
            # Weights that were trained before are validated as they come, too.
            is_start = step == 0 and config.eval_every and config.init_from
            if (self._is_due(config.eval_every) or is_start) and self.val_data is not None:
                if not evaluation.validate(self):
                    self._leave()
            if self._is_due(config.hellaswag_every):
                if not evaluation.ask_hellaswag(self):
                    self._leave()
            if _due(step, config.sample_every):
                evaluation.sample(self)
            if last:
                break
            if config.guard == "rollback" and step % config.snapshot_every == 0:
                self.snapshots.take(step, self.model, self.optimizer)
            # A vote begins with a step and is read after it, so that no one waits for it.
            stop_asked = group.vote(self._signalled)
            started = time.perf_counter()
            self.train_step(step, self.params)
            self.step = self.heartbeat.step = step + 1
            log_is_due = self.step % config.log_every == 0 or self.step in (1, config.max_steps)
            # Reading a step's numbers waits for the device, so it happens only where they are used.
            if self._settle(all_steps=log_is_due or self._save_is_due(self.step)):
                busy_s, steps = 0.0, 0
                continue
            busy_s, steps = busy_s + time.perf_counter() - started, steps + 1
            if log_is_due:
                self._log(busy_s / steps, steps)
                busy_s, steps = 0.0, 0
            if self.saver is not None:
                self.saver.poll()

    def train_step(self, step: int, params: list[Tensor]) -> None:
        """One optimizer step, which the guard may keep from being applied."""
        config, group = self.config, self.group
        data_step = step + self.data_offset
        batch = self.name(
            self.train_feed.batch(data_step, self.rows_per_step, group.rank, group.world_size)
        )
        n_units = group.sum(self.objective.count(batch))
        total = torch.zeros((), device=group.device)
        first_row = group.rank * self.rows_per_step // group.world_size
        for micro_step in range(self.grad_accum_steps):
            start = micro_step * config.micro_batch_size
            micro_batch = {k: v[start : start + config.micro_batch_size] for k, v in batch.items()}
            if self.has_dropout:
                # A function of (seed, step, row), so no random state needs saving.
                key = (config.seed, data_step, first_row + start)
                torch.manual_seed(hash(key) & (1 << 62) - 1)
            self.layout.begin(micro_step)
            with self.execution.autocast():
                loss_sum, metrics = self.layout.train_forward(micro_batch)
                loss = loss_sum / n_units
            self.layout.backward(loss)
            total += loss.detach()
            for name, value in metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + value.detach() / n_units
        total = self.layout.finish(total)
        grad_norm = self.layout.clip(config.grad_clip or math.inf)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = learning_rate(step, config)
        self.optimizer.found_inf = self.guard.judge(step, data_step, total, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def name(self, parts: tuple[Tensor, ...]) -> Batch:
        """The parts of a batch by their names."""
        return dict(zip(self.names, parts, strict=False))

    def is_stop_asked(self) -> bool:
        """Whether a signal came to any rank; a collective."""
        return self.group.any(self._signalled())

    def _signalled(self) -> bool:
        return self.signals.received is not None

    def _is_due(self, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens now."""
        return _due(self.step, every) or self.step == self.config.max_steps and every > 0

    def _save_is_due(self, step: int) -> bool:
        c = self.config
        eval_every = c.eval_every if self.val_data is not None else 0
        every = (c.save_every, eval_every, c.hellaswag_every, c.sample_every)
        return step == c.max_steps or any(_due(step, n) for n in every)

    def _settle(self, *, all_steps: bool) -> bool:
        """Acts on what the guard found; whether that led back to an earlier step."""
        for verdict in self.guard.verdicts(all_steps=all_steps):
            if not verdict.reason:
                self.losses.append(verdict.loss)
                self.grad_norm = verdict.grad_norm
                continue
            blame.tell_of_skipped(self, verdict)
            if self.config.guard == "rollback":
                self._roll_back(verdict)
                return True
            if self.config.guard == "stop":
                self.guard.verdicts(all_steps=True)
                self._save()
                raise ValueError(
                    f"step {verdict.step} was skipped as {verdict.reason}, and guard is stop; the "
                    "run is saved, and goes on behind that step with --resume auto"
                )
        return False

    def _roll_back(self, verdict: Verdict) -> None:
        """Goes back to the older snapshot, and behind the data of the step that was skipped."""
        step = self.step = self.snapshots.restore(self.model, self.optimizer)
        self.guard.forget(step)
        self.saved_step = -1  # what is saved of later steps is of what was left
        self.data_offset = verdict.data_step + 1 - step
        self.losses, self.sums = [], {}
        if self.metrics is not None:
            self.metrics.say(f"rolled back to step {step}, to go on behind that batch")
            self.metrics.log(step, {"guard/rolled_back_from": verdict.step})

    def _save(self) -> None:
        """Starts writing a checkpoint of this step, unless there is one."""
        if self.step == self.saved_step or self.step == 0:
            return
        self.saved_step = self.step
        if self.saver is not None:
            state = {"data_offset": self.data_offset, "guard": self.guard.state_dict()}
            meta = checkpoint.describe(
                self.model, tokenizer=self.tokenizer.to_dict(),
                train=dataclasses.asdict(self.config), state=state,
                chat_template=getattr(self.train_data, "chat_template", None),
            )  # fmt: skip
            self.saver.save(self.step, self.model, self.optimizer, meta)
        elif self.layout.sharded:
            checkpoint.snapshot(self.model, self.optimizer, keep=False)

    def _leave(self) -> None:
        """Ends the run after a signal; what is to be saved has been handed to the saver."""
        if self.saver is not None:
            self.saver.wait()
            found = checkpoint.list_checkpoints(self.folder)
            where = f"everything is in {found[-1]}" if found else "no step was finished"
            self.metrics.say(f"stopped at step {self.step}; {where}; go on with --resume auto")
        raise Interrupted(self.signals.received or "a signal to another rank")

    def _report(self, end: str) -> None:
        """Brings receipt and report up to date; end: how the launch ended, or "running"."""
        running, now = end == "running", time.monotonic()
        try:
            self.receipt.update(self.step, end)
            if running and now - self.reported < REPORT_EVERY_S:
                return
            self.reported = now
            write_report(self.folder, png=not running)
        except (OSError, ImportError) as error:
            self.metrics.say(f"no report: {error}")

    def _on_saved(self, step: int, path: Path, times: dict) -> None:
        self.metrics.log(step, times)
        self._report("running")
        self.metrics.say(
            f"step {step:>6}/{self.config.max_steps}  saved {path}  (held training "
            f"{times['checkpoint/held_ms']:.0f} ms, took {times['checkpoint/write_ms']:.0f} ms)"
        )

    def _on_save_failed(self, step: int, error: OSError) -> None:
        if step == self.config.max_steps or self.signals.received:
            raise error  # there is no later one
        self.metrics.say(
            f"step {step:>6}/{self.config.max_steps}  NOT saved: {error.strerror or error}; "
            "training goes on (on_save_error)"
        )

    def _log(self, seconds: float, steps: int) -> None:
        sums, self.sums = self.sums, {}
        if sums:
            values = self.group.sum(torch.stack(list(sums.values()))).tolist()
            sums = {f"train/{k}": v / steps for k, v in zip(sums, values, strict=True)}
        data_ms, self.train_feed.waited_s = self.train_feed.waited_s / steps * 1e3, 0.0
        losses, self.losses = self.losses, []
        if self.metrics is None or not losses:
            return
        step, tokens_per_s = self.step, self.config.tokens_per_step / seconds
        values = {
            "train/loss": math.fsum(losses) / len(losses),
            "train/lr": learning_rate(step - 1, self.config), "train/grad_norm": self.grad_norm,
            "train/tokens_per_s": tokens_per_s, "train/step_ms": seconds * 1e3,
            "train/data_ms": data_ms, **sums,
        }  # fmt: skip
        if peak := self.execution.peak_flops:
            flops = tokens_per_s * self.model.flops_per_token()
            values["train/mfu"] = flops / (peak * self.group.world_size)
        self.metrics.log(step, values)
        eta_s = (self.config.max_steps - step) * seconds
        predicted = self.preflight.predicted()["step_ms"]
        self.metrics.show_step(step, values, eta_s, predicted, tuple(sums)[: evaluation.SHOWN])


def _n_numbers(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed, and not what it was called with. Gloo has no error class."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
