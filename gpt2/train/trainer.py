"""The training loop: the only one, for pretraining and everything after it.

It trains an objective on a source of batches (gpt2.data.loader.BatchSource), whose batch is a pure
function of the step; so all that has to be remembered about data is the step, and an offset in
samples where a run skipped some or changed the size of its steps.

The loss that is differentiated is the sum over all units (targets) of a step, divided by their
number over all micro steps and ranks. So how a step is cut into micro batches and ranks changes
nothing but the order of additions, and with exact_reduction not even that.

Between two steps, in this order: what the guard found, a checkpoint if one is due, then validation
and samples, so that running out of memory in those costs nothing.
"""

import math
import time
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gpt2 import checkpoint
from gpt2.cli import say
from gpt2.config import TrainConfig
from gpt2.cpu import choose, keep_memory
from gpt2.data import Mixture
from gpt2.data.feed import Feed
from gpt2.data.loader import BatchSource
from gpt2.device import execution
from gpt2.dist import Distributed, Heartbeat
from gpt2.evals.hellaswag import Example, hellaswag_accuracy
from gpt2.lora import lora_config
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from gpt2.train import between, guard, minutes
from gpt2.train.between import Due, Interrupted, StopSignals, learning_rate
from gpt2.train.layouts import make_layout
from gpt2.train.metrics import duration
from gpt2.train.objectives import Batch
from gpt2.train.preflight import describe, preflight
from gpt2.train.run_folder import RunFolder

SHOWN = 2  # of an objective's metrics on the terminal; the others are only logged


class Trainer:
    """Trains objective.model as config says; call run().

    objective: see gpt2.train.objectives; its model lies on group.device.
    val_data: None: no validation.  hellaswag: the examples that are asked, if config says so.
    Attributes: step, optimizer steps done; offset, in samples: the batch of a step begins with
    sample step * rows_per_step + offset of the data.
    Raises ValueError where config does not fit the data or the number of ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: torch.nn.Module,
        train_data: BatchSource,
        val_data: BatchSource | None,
        tokenizer: Tokenizer,
        group: Distributed,
        hellaswag: list[Example] | None = None,
    ):
        self.config, self.group, self.tokenizer = config, group, tokenizer
        self.objective, self.model, self.hellaswag = objective, objective.model, hellaswag
        self.train_data, self.val_data = train_data, val_data
        self.train_feed = Feed(train_data, group.device)
        self.val_feed = Feed(val_data, group.device) if val_data is not None else None
        self.rows_per_step = config.tokens_per_step // train_data.block_size
        self.execution = execution(group.device, config.dtype, config.compile)
        self.model.activation_checkpointing = config.activation_checkpointing
        self._set_stream()
        self.signals = StopSignals()  # those of run(), once it has begun
        self.started, self.spent_s = minutes.clock(), 0.0  # spent_s: by the launches before
        self.choice = None  # what a run of float32 on a CPU computes its matrix products with
        if self.execution.dtype == torch.float32 and not self.execution.compiled:
            self.choice = self.model.ops.choice
        self.layout = make_layout(config, objective, group, self.execution)
        self.optimizer = self.layout.optimizer
        adapters = lora_config(self.model)
        self.has_dropout = bool(self.model.config.dropout or adapters and adapters.dropout)
        self.due = Due(config, has_val=val_data is not None)
        self.guard, self.snapshots = guard.Guard(group), guard.Snapshots()
        self.first_step = self.step = self.offset = 0
        self.saved_step = -1
        self.folder: RunFolder | None = None
        self.losses: list[float] = []  # of the steps applied since the last log line
        self.sums: dict[str, Tensor] = {}  # of the objective's metrics over the same steps
        if config.micro_batch_size != "auto":  # else when it is known, in run()
            self._divide_step()
        if group.device.type == "cpu":
            keep_memory()
        else:
            torch.set_float32_matmul_precision("high")  # TF32 where float32 matmuls are left

    def _set_stream(self) -> None:
        """Of the model, and of one that it is compared with."""
        if self.config.stream == "bfloat16" and self.execution.dtype != torch.bfloat16:
            raise ValueError(
                "stream bfloat16 needs matmuls in bfloat16, and they are in float32 here: use "
                "--dtype bfloat16 or --stream float32"
            )
        for model in self.objective.modules():
            if isinstance(model, GPT):
                model.stream = getattr(torch, self.config.stream)

    def resume(self, resumed: checkpoint.Checkpoint) -> None:
        """Continues from a checkpoint's step with its weights, moments and guard.

        With the sample after the last one that it has seen, also where the size of a step or of a
        row is another now. Raises ValueError where the data cannot be continued so.
        """
        checkpoint.load_training_state(resumed, self.model, self.optimizer)
        self.first_step = self.step = self.saved_step = resumed.step
        self.guard.load_state_dict(resumed.state.get("guard", {}))
        self.take_products(resumed.state.get("products") or {})
        self.offset = resumed.state.get("offset", 0)
        self.spent_s = resumed.state.get("spent_s", 0.0)
        tokens, block_size = self.config.tokens_per_step, self.train_data.block_size
        before = resumed.train.get("tokens_per_step", tokens)
        rows = before // (resumed.state.get("block_size") or block_size)
        self.offset += self.step * (rows - self.rows_per_step)
        self.offset += resumed.state.get("data_offset", 0) * rows  # format 1, in steps
        phases = self.train_data.phases if isinstance(self.train_data, Mixture) else 1
        if rows != self.rows_per_step and phases > 1:
            raise ValueError(
                f"tokens_per_step was {before} and is {tokens}, but a mixture whose weights change "
                "at a step counts in steps of one size: keep it, or write weights without @step"
            )

    def choose_products(self) -> None:
        """Times the matrix products of a CPU (gpt2.cpu), unless a checkpoint has named them."""
        if self.choice is not None and not self.choice.products:
            rows = self.config.tokens_per_step // self.group.world_size
            self.take_products(self.group.on_main(lambda: choose(self.model, rows)))

    def take_products(self, products: dict[str, str]) -> None:
        """Computes with those that were chosen when the run began: others would round otherwise."""
        if self.choice is not None:
            self.choice.products = products

    def check_resources(self, resumed: checkpoint.Checkpoint | None) -> None:
        """The pre-flight (gpt2.train.preflight): raises where the run cannot fit; decides the micro
        batch where that is auto, and max_steps where max_minutes are given."""
        self.choose_products()
        self.config, self.resources, self.predicted = preflight(
            self.config, self.objective, self.optimizer, self.train_data, self.execution,
            self.group, trial=self._trial, resumed=resumed, has_val=self.val_data is not None,
        )  # fmt: skip
        self.due = Due(self.config, self.due.has_val)
        self._divide_step()
        if self.config.max_minutes and resumed is None:
            self.config, line = minutes.lay_out(self)
            self.due = Due(self.config, self.due.has_val)
            self.resources.append(("minutes", line))

    def run(self, folder: RunFolder | None, signals: StopSignals) -> None:
        """Trains to max_steps, after check_resources, or until patience ends; everything it writes
        lies in the folder.

        folder: begun; None on all processes but the main one. signals: what asks for an early stop.
        Raises Interrupted (a SystemExit with status 75) after a signal, once everything is saved.
        """
        group, self.signals, self.folder, end = self.group, signals, folder, "failed"
        if folder is not None:
            self._open(folder)
        self.heartbeat = Heartbeat(group)
        try:
            self._loop()
            self.train_data.finish()  # what a check in the background finds at last
            is_early = self.step < self.config.max_steps
            end = f"finished early (patience {self.config.patience})" if is_early else "finished"
        except Interrupted as interrupted:
            end = f"stopped by {interrupted.signal_name}"
            raise
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory on {group.device}: lower micro_batch_size "
                f"{self.config.micro_batch_size} (the result stays the same); checkpoints so far "
                f"lie in {self.config.folder}"
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
            if folder is not None:
                folder.close(self.step, end)
        if folder is not None and self.config.max_minutes:
            say(f"took {duration(self.wall_s())} of max_minutes {self.config.max_minutes:g}")

    def wall_s(self) -> float:
        """Seconds that the run has taken, in all launches up to their checkpoints, and in this."""
        return self.spent_s + minutes.clock() - self.started

    def repeat(self, to: int) -> dict[int, float]:
        """Trains to step `to` and writes nothing; the loss of each step (1, 2 ...) not skipped."""
        if self.config.micro_batch_size == "auto":
            raise ValueError("micro_batch_size auto: name the number that the run had")
        found = {}
        while self.step < to:
            self.train_step(self.step)
            self.step += 1
            for verdict in self.guard.verdicts(all_steps=True):
                if not verdict.reason:
                    found[verdict.step + 1] = verdict.loss
        return found

    # -- the loop ---------------------------------------------------------------------------------

    def _loop(self) -> None:
        config, group, due = self.config, self.group, self.due
        stop_asked = group.vote(self._signalled)
        busy_s, steps = 0.0, 0
        while True:
            step, last = self.step, self.step >= config.max_steps
            if stop_asked() and not last:
                if self._settle(all_steps=True):
                    continue
                self._save()
                self._leave()
            if due.save(step) and step > self.first_step:
                self._save()
            if due.validation(step):
                if not self._validate():
                    self._leave()
                last |= group.on_main(partial(self._is_over, step))
            if due.hellaswag(step) and not self._log_hellaswag():
                self._leave()
            if due.sample(step) or last:
                self._log_sample()
            if last:
                return
            if config.guard == "rollback" and (due.snapshot(step) or step == self.first_step):
                self.snapshots.take(step, self.model, self.optimizer)
            # A vote begins with a step and is read after it, so that no one waits for it.
            stop_asked = group.vote(self._signalled)
            started = time.perf_counter()
            self.train_step(step)
            self.step = self.heartbeat.step = step + 1
            log_is_due = due.log(self.step)
            # Reading a step's numbers waits for the device, so it happens only where they are used.
            if self._settle(all_steps=log_is_due or due.save(self.step)):
                busy_s, steps = 0.0, 0
                continue
            busy_s, steps = busy_s + time.perf_counter() - started, steps + 1
            if log_is_due:
                self._log(busy_s / steps, steps)
                busy_s, steps = 0.0, 0
            if self.folder is not None:
                self.folder.poll()

    def train_step(self, step: int) -> None:
        """One optimizer step, which the guard may keep from being applied."""
        config, group = self.config, self.group
        batch = self._batch(self.train_feed, step)
        n_units = group.sum(self.objective.count(batch))
        total = torch.zeros((), device=group.device)
        sums: dict[str, Tensor] = {}
        for micro_step in range(self.grad_accum_steps):
            start = micro_step * config.micro_batch_size
            micro_batch = {k: v[start : start + config.micro_batch_size] for k, v in batch.items()}
            if self.has_dropout:
                torch.manual_seed(self._dropout_seed(step, start))
            self.layout.begin(micro_step)
            with self.execution.autocast():
                loss_sum, metrics = self.layout.train_forward(micro_batch)
                loss = loss_sum / n_units
            self.layout.backward(loss)
            total += loss.detach()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / n_units
        total = self.layout.finish(total)
        grad_norm = self.layout.clip(config.grad_clip or math.inf)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = learning_rate(step, config)
        skip = self.optimizer.found_inf = self.guard.judge(step, total, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.where(skip == 0, 0.0)

    def _batch(self, feed: Feed, step: int) -> Batch:
        group = self.group
        parts = feed.batch(
            step, self.rows_per_step, group.rank, group.world_size, offset=self.offset
        )
        return dict(zip(self.train_data.names, parts, strict=True))

    def _dropout_seed(self, step: int, row: int) -> int:
        """A function of (seed, sample), so that no random state needs saving."""
        first = self.group.rank * self.rows_per_step // self.group.world_size
        sample = step * self.rows_per_step + self.offset + first + row
        return int(np.random.SeedSequence([self.config.seed, sample]).generate_state(1)[0])

    def _trial(self, rows: int) -> None:
        """The forward and backward pass of full rows, for the memory that they take."""
        group, data = self.group, self.train_data
        parts = data.batch(0, rows * group.world_size, group.rank, group.world_size)
        # A batch may be shorter than the longest one.
        length = data.block_size // math.prod(parts[0].shape[1:-1])
        parts = [F.pad(part, (0, length - part.shape[-1])).to(group.device) for part in parts]
        with self.execution.autocast():
            loss_sum, _ = self.layout.train_forward(dict(zip(data.names, parts, strict=True)))
        loss_sum.backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _divide_step(self) -> None:
        """Into micro steps; micro_batch_size is a number by now."""
        self.grad_accum_steps = self.config.grad_accum_steps(
            self.train_data.block_size, self.group.world_size
        )
        self.layout.divide_step(self.grad_accum_steps)

    # -- what the guard found, and what a signal asks for -----------------------------------------

    def is_stop_asked(self) -> bool:
        """Whether a signal came to any rank; a collective."""
        return self.group.any(self._signalled())

    def _signalled(self) -> bool:
        return self.signals.received is not None

    def _settle(self, *, all_steps: bool) -> bool:
        """Acts on what the guard found; whether that led back to an earlier step."""
        try:
            for verdict in self.guard.verdicts(all_steps=all_steps):
                if not verdict.reason:
                    self.losses.append(verdict.loss)
                    self.grad_norm = verdict.grad_norm
                    continue
                self._tell_of_skipped(verdict)
                if self.config.guard == "rollback":
                    self._roll_back(verdict)
                    return True
                if self.config.guard == "stop":
                    raise guard.GaveUp(
                        f"step {verdict.step} was skipped as {verdict.reason}, and guard is stop"
                    )
        except guard.GaveUp as error:
            self.guard.verdicts(all_steps=True)
            self._save()  # the weights are clean: bad steps are not applied
            raise ValueError(
                f"{error}; the run is saved at step {self.step} and goes on with --resume auto"
            ) from error
        return False

    def _tell_of_skipped(self, verdict: guard.Verdict) -> None:
        """Logs a skipped step, and the rows and documents of its batch; a collective."""
        batch = self._batch(self.train_feed, verdict.step)
        losses = guard.row_losses(self.objective, batch, self.execution.autocast)
        every = self.group.gather(losses)
        if self.folder is None:
            return
        what, rows = guard.suspects(
            every, self.train_data, verdict.step, self.rows_per_step, self.offset
        )
        text = [f"step {verdict.step:>6}  skipped: {verdict.reason}", f"  {what}:"]
        self.folder.say("\n".join(text + [f"  {guard.spell(row)}" for row in rows]))
        event = {"reason": verdict.reason, "offset": self.offset, "rows": rows, "skipped": 1}
        self.folder.log(verdict.step + 1, {f"guard/{k}": v for k, v in event.items()})

    def _roll_back(self, verdict: guard.Verdict) -> None:
        """Goes back to the older snapshot, and past the data of the step that was skipped."""
        step = self.snapshots.restore(self.model, self.optimizer)
        self.guard.forget(step)
        self.offset += (verdict.step + 1 - step) * self.rows_per_step
        self.step, self.saved_step = step, -1  # what is saved of later steps is of what was left
        self.losses, self.sums = [], {}
        if self.folder is not None:
            self.folder.go_back(step)
            self.folder.say(f"rolled back to step {step}, to go on after that batch")
            self.folder.log(step, {"guard/rolled_back_from": verdict.step})

    def _save(self) -> None:
        """Starts writing a checkpoint of this step, unless there is one."""
        if self.step in (self.saved_step, 0):
            return
        self.saved_step = self.step
        if self.folder is not None:
            state = {
                "offset": self.offset, "block_size": self.train_data.block_size,
                "guard": self.guard.state_dict(), "products": self.choice and self.choice.products,
                "spent_s": self.wall_s(),
            }  # fmt: skip
            self.folder.save(
                self.step, self.model, self.optimizer, tokenizer=self.tokenizer.to_dict(),
                state=state, chat_template=self.train_data.chat_template,
            )  # fmt: skip
        elif self.layout.sharded:
            checkpoint.snapshot(self.model, self.optimizer, keep=False)

    def _leave(self) -> None:
        """Ends the run after a signal; what is to be saved is being written."""
        if self.folder is not None:
            self.folder.stopping = True
            self.folder.wait()
            found = checkpoint.list_checkpoints(self.folder.path)
            where = f"everything is in {found[-1]}" if found else "no step was finished"
            self.folder.say(f"stopped at step {self.step}; {where}; go on with --resume auto")
        raise Interrupted(self.signals.received or "a signal to another rank")

    # -- what is measured and said between two steps ----------------------------------------------

    def val_rows(self) -> int:
        """Of a validation."""
        n_rows, steps = self.val_data.n_windows, self.config.eval_steps
        return min(n_rows, steps * self.rows_per_step) if steps else n_rows

    def mean_losses(self, n_rows: int | None = None) -> dict[str, float] | None:
        """Validation over n_rows, by default val_rows(); None where a signal came."""
        return between.mean_losses(
            self.layout, self.objective, self.val_feed, self.execution, self.group,
            n_rows=self.val_rows() if n_rows is None else n_rows,
            micro_batch_size=self.config.micro_batch_size, stop_asked=self.is_stop_asked,
        )  # fmt: skip

    def _validate(self) -> bool:
        """Logs mean_losses; whether it came to its end."""
        started, found = time.perf_counter(), self.mean_losses()
        if found is not None:
            shown = [name for name in found if name != "loss"][:SHOWN]
            text = "".join(f"  {name} {found[name]:.4f}" for name in shown)
            values = {f"val/{name}": value for name, value in found.items()}
            self._tell(values, f"val loss {found['loss']:.4f}{text}", started)
        return found is not None

    def _is_over(self, step: int) -> bool:
        """Whether patience ends the run; for the main process."""
        return self.folder is not None and self.folder.validated(step)

    def ask_hellaswag(self, examples: list[Example]) -> dict[str, float] | None:
        """See gpt2.evals.hellaswag; None where a signal came."""
        return self.layout.call_model(partial(
            hellaswag_accuracy, self.model, examples, self.group,
            autocast=self.execution.autocast, poll=self.is_stop_asked,
        ))  # fmt: skip

    def _log_hellaswag(self) -> bool:
        """Logs HellaSwag's acc_norm and acc; whether it came to its end."""
        started, found = time.perf_counter(), self.ask_hellaswag(self.hellaswag)
        if found is not None:
            values = {"": found["acc_norm"], "_acc": found["acc"], "_examples": found["examples"]}
            text = f"HellaSwag {found['acc_norm']:.2%} acc_norm, {found['acc']:.2%} acc"
            values = {f"eval/hellaswag{name}": value for name, value in values.items()}
            self._tell(values, f"{text} of {found['examples']:,}", started)
        return found is not None

    def sample(self) -> str:
        return between.sample_text(self.layout, self.model, self.tokenizer)

    def _log_sample(self) -> None:
        started = time.perf_counter()
        try:
            text = self.sample()
        except ValueError as error:  # of logits that are not finite, on all ranks alike
            text = f"(none: {error})"
        self._tell({"sample": text}, f"sample: {text!r}", started)

    def _tell(self, values: dict, text: str, started: float) -> None:
        """Logs what was measured at this step, once, and says it."""
        if self.folder is None or self.folder.metrics.logged(self.step, next(iter(values))):
            return
        self.folder.log(self.step, values)
        place = f"step {self.step:>6}/{self.config.max_steps}"
        self.folder.say(f"{place}  {text}  ({time.perf_counter() - started:.1f} s)")

    def _log(self, seconds: float, steps: int) -> None:
        """A line on the steps since the last one; seconds: of each."""
        losses, self.losses = self.losses, []
        sums, self.sums = self.sums, {}
        if sums:
            values = self.group.sum(torch.stack(list(sums.values()))).tolist()
            sums = {
                f"train/{name}": value / max(len(losses), 1)
                for name, value in zip(sums, values, strict=True)
            }
        data_ms, self.train_feed.waited_s = self.train_feed.waited_s / steps * 1e3, 0.0
        if self.folder is None or not losses:
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
        self.folder.log(step, values)
        eta_s, predicted = (self.config.max_steps - step) * seconds, self.predicted["step_ms"]
        limit_s = 60 * self.config.max_minutes or math.inf
        self.folder.metrics.show_step(
            step, values, eta_s, predicted, tuple(sums)[:SHOWN],
            late_s=self.wall_s() + eta_s - limit_s,
        )  # fmt: skip

    def _open(self, folder: RunFolder) -> None:
        """Says what the run is, and opens what it writes."""
        group, model = self.group, self.model
        table = describe(
            self.config, model, self.train_data, self.tokenizer, self.execution, self.layout,
            self.resources, grad_accum_steps=self.grad_accum_steps, first_step=self.first_step,
        )  # fmt: skip
        say("\n".join(f"{name:<22}{value}" for name, value in table))
        shape = vars(model.config) | {"n_params": model.n_params(), "kernels": model.ops.name}
        facts = {"model": shape, "unit": self.objective.unit}
        facts["products"] = self.choice and self.choice.products
        folder.open(self.config, self.first_step, group, facts, self.predicted)


def _lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed, and not what it was called with. Gloo has no error class."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
