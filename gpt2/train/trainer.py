"""The training loop: the only one, for pretraining and everything after it.

It trains an objective on a source of batches. A source has batch(step, global_batch_size, rank,
world_size) -> idx, targets and, if attention is to stay inside documents, doc_start: a pure
function, as TokenLoader has; so the only thing to remember about data is the step.

The loss that is differentiated is the sum over all counted targets of a step, divided by their
number over all micro steps and ranks. So how a step is cut into micro batches and ranks changes
nothing but the order of additions.
"""

import dataclasses
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gpt2 import checkpoint
from gpt2.cli import write_yaml
from gpt2.config import TrainConfig
from gpt2.data import Mixture, TokenLoader
from gpt2.data.feed import Feed
from gpt2.generate import generate
from gpt2.tokenizer import Tokenizer
from gpt2.train.distributed import Distributed, peak_flops
from gpt2.train.metrics import Metrics, draw_curve
from gpt2.train.objectives import IGNORE_INDEX, Batch
from gpt2.train.optim import learning_rate, make_optimizer


class Trainer:
    """Trains objective.model as config says; call run().

    objective: see gpt2.train.objectives; its model lies on group.device.
    train_data, val_data: sources of rows of block_size tokens; val_data None: no validation.
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
        self.folder = Path(config.out_dir) / config.run_name
        block_size = train_data.block_size
        self.grad_accum_steps = config.grad_accum_steps(block_size, group.world_size)
        self.rows_per_step = config.tokens_per_step // block_size
        self.dtype = _select_dtype(config.dtype, group.device)
        self.peak_flops = peak_flops(group.device, self.dtype)
        self.optimizer = make_optimizer(self.model, config)
        self.first_step = 0
        self.ddp = None
        forward = objective
        if group.world_size > 1:
            forward = self.ddp = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        compiled = (
            config.compile == "on" or config.compile == "auto" and group.device.type == "cuda"
        )
        self.compiled = compiled
        self.train_forward = torch.compile(forward) if compiled else forward
        self.eval_forward = torch.compile(objective) if compiled else objective
        if group.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where float32 matmuls are left

    def resume(self, from_checkpoint: checkpoint.Checkpoint) -> None:
        """Continues from a checkpoint's step with its weights and moments."""
        checkpoint.load_training_state(from_checkpoint, self.model, self.optimizer)
        self.first_step = from_checkpoint.step

    def run(self) -> None:
        """Trains to max_steps; everything it writes lies in the run folder."""
        config, group = self.config, self.group
        self.metrics = None
        if group.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            description = dataclasses.asdict(config)
            write_yaml(config, self.folder / "config.yaml")
            for name, value in self.derived():
                print(f"{name:<22}{value}")
            self.metrics = Metrics(self.folder, config, description, self.first_step)
        try:
            self._loop()
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory on {group.device}: lower micro_batch_size "
                f"{config.micro_batch_size} (the result stays the same); checkpoints so far lie in "
                f"{self.folder}"
            ) from error
        finally:
            self.train_feed.close()
            if self.val_feed is not None:
                self.val_feed.close()
            if self.metrics is not None:
                self.metrics.close()
        if group.is_main:
            self._report()

    def _loop(self) -> None:
        config = self.config
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        loss_sum, since, started = torch.zeros((), device=self.group.device), self.first_step, None
        for step in range(self.first_step, config.max_steps + 1):
            last, paused = step == config.max_steps, time.perf_counter()
            # A resumed run starts from the checkpoint of its first step.
            if _due(step, config.save_every, last) and step > self.first_step:
                self._save(step)
            if _due(step, config.eval_every, last) and self.val_data is not None:
                self._validate(step)
            if _due(step, config.sample_every, False) and self.group.is_main:
                self._sample()
            if last:
                break
            # The clock of steps stands still during the above.
            now = time.perf_counter()
            started = now if started is None else started + now - paused

            loss, grad_norm = self.train_step(step, params)
            loss_sum += loss
            done = step + 1
            if done % config.log_every == 0 or done in (1, config.max_steps):
                # Reading the loss waits for the device, so it happens only here.
                mean_loss = self.group.sum(loss_sum).item() / (done - since)
                seconds = (time.perf_counter() - started) / (done - since)
                data_ms = self.train_feed.waited_s / (done - since) * 1e3
                self.train_feed.waited_s = 0.0
                self._log(
                    done, mean_loss, learning_rate(step, config), grad_norm.item(), seconds, data_ms
                )
                loss_sum, since, started = torch.zeros_like(loss_sum), done, time.perf_counter()

    def train_step(self, step: int, params: list[Tensor]) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns this rank's share of the mean loss and the gradient norm."""
        config, group = self.config, self.group
        if self.model.config.dropout:
            # A function of (seed, step, rank), so no random state needs saving.
            torch.manual_seed(hash((config.seed, step, group.rank)) & (1 << 62) - 1)
        data = self.train_feed.batch(step, self.rows_per_step, group.rank, group.world_size)
        n_targets = group.sum((data[1] != IGNORE_INDEX).sum())
        total = torch.zeros((), device=group.device)
        micro_batches = zip(*(part.split(config.micro_batch_size) for part in data), strict=True)
        for micro_step, micro_batch in enumerate(micro_batches):
            batch = _name(micro_batch)
            if self.ddp is not None:
                # Gradients are exchanged once, in the backward pass of the last micro step.
                self.ddp.require_backward_grad_sync = micro_step == self.grad_accum_steps - 1
            with self._autocast():
                loss_sum, _ = self.train_forward(batch)
                loss = loss_sum / n_targets
            # DDP averages over ranks, but this is a sum already divided by the count of all ranks.
            (loss * group.world_size).backward()
            total += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip or math.inf)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = learning_rate(step, config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, grad_norm

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean validation loss over eval_steps * tokens_per_step tokens, spread over all ranks."""
        config, group, data = self.config, self.group, self.val_data
        n_rows = data.n_windows
        if config.eval_steps:
            n_rows = min(n_rows, config.eval_steps * self.rows_per_step)
        rows = config.micro_batch_size * group.world_size
        totals = torch.zeros(2, dtype=torch.float64, device=group.device)  # loss, targets
        self.objective.eval()
        for i in range(-(-n_rows // rows)):
            parts = self.val_feed.batch(i, rows, group.rank, group.world_size)
            # The last batch is filled up with rows that do not count, so that all have one shape.
            first = i * rows + group.rank * config.micro_batch_size
            parts[1][max(n_rows - first, 0) :] = IGNORE_INDEX
            with self._autocast():
                loss_sum, _ = self.eval_forward(_name(parts))
            totals += torch.stack([loss_sum.double(), (parts[1] != IGNORE_INDEX).sum()])
        self.objective.train()
        loss, count = group.sum(totals).tolist()
        return loss / count

    def derived(self) -> list[tuple[str, str]]:
        """Everything that follows from the config, as rows of a table."""
        c, m, group, data = self.config, self.model, self.group, self.train_data
        tokens = c.max_steps * c.tokens_per_step
        flops = m.flops_per_token()
        peak = f"{self.peak_flops / 1e12:.1f} TFLOP/s a device" if self.peak_flops else "not known"
        shape = m.config
        dtype = str(self.dtype).removeprefix("torch.")
        rows = [
            (
                "model",
                f"{m.n_params():,} parameters: {shape.n_layer} layers, {shape.n_head} heads, "
                f"{shape.n_embd} wide, context {shape.block_size}, vocabulary {shape.vocab_size}",
            ),
            (
                "data",
                f"{c.data}: {data.n_tokens:,} train tokens, {self.tokenizer.name} tokenizer, "
                f"{data.backend} loader",
            ),
            (
                "step",
                f"{c.tokens_per_step:,} tokens = {group.world_size} ranks x "
                f"{self.grad_accum_steps} "
                f"micro steps x {c.micro_batch_size} rows x {data.block_size}",
            ),
            (
                "run",
                f"{c.max_steps:,} steps, {tokens:,} tokens, {tokens / data.n_tokens:.2f} epochs, "
                f"{tokens * flops:.2e} FLOPs",
            ),
            (
                "device",
                f"{_device_name(group.device)}, {dtype} matmuls, "
                f"compile {'on' if self.compiled else 'off'}",
            ),
            ("kernels", f"{m.ops.name} ({m.ops.reason})"),
            ("MFU", f"{flops:,} FLOPs a token (6 N + 12 L C T) x tokens/s / peak; peak {peak}"),
            ("run folder", str(self.folder)),
        ]
        if isinstance(data, TokenLoader | Mixture) and c.verify != "off":
            known, n = (sum(getattr(v, k) for v in data.verifiers) for k in ("n_known", "n_shards"))
            rows.append(("verify", f"{c.verify}, hashes are known of {known} of {n} shards"))
        if isinstance(data, Mixture):
            for path, epochs in data.epochs(c.max_steps, self.rows_per_step).items():
                rows.append(("  of which", f"{path}: {epochs:.2f} epochs"))
        if self.first_step:
            rows.append(("resumed", f"from step {self.first_step}"))
        elif not c.init_from:
            rows.append(("first loss", f"about ln(vocabulary) = {math.log(shape.vocab_size):.2f}"))
        return rows

    def _autocast(self):
        enabled = self.dtype != torch.float32
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=enabled)

    def _log(
        self, step: int, loss: float, lr: float, grad_norm: float, seconds: float, data_ms: float
    ) -> None:
        if self.metrics is None:
            return
        tokens_per_s = self.config.tokens_per_step / seconds
        values = {
            "train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm,
            "train/tokens_per_s": tokens_per_s, "train/step_ms": seconds * 1e3,
            "train/data_ms": data_ms,
        }  # fmt: skip
        if self.peak_flops:
            flops = tokens_per_s * self.model.flops_per_token()
            values["train/mfu"] = flops / (self.peak_flops * self.group.world_size)
        self.metrics.log(step, values)
        self.metrics.show_step(step, values, (self.config.max_steps - step) * seconds)

    def _validate(self, step: int) -> None:
        started = time.perf_counter()
        loss = self.evaluate()
        if self.metrics is not None and not self.metrics.logged(step, "val/loss"):
            self.metrics.log(step, {"val/loss": loss})
            seconds = time.perf_counter() - started
            self.metrics.say(
                f"step {step:>6}/{self.config.max_steps}  val loss {loss:.4f}  ({seconds:.1f} s)"
            )

    def _sample(self) -> None:
        start = "\n" if self.tokenizer.eot is None else None
        prompt = self.tokenizer.encode(start) if start else [self.tokenizer.eot]
        room = self.model.config.block_size - len(prompt)
        tokens = generate(
            self.model, [prompt], max_new_tokens=min(room, 100), temperature=0.8, top_k=50, seed=0
        )
        self.metrics.say(f"sample: {self.tokenizer.decode(tokens[0])!r}")

    def _save(self, step: int) -> None:
        if self.group.is_main:
            path = checkpoint.save_checkpoint(
                self.folder, step, self.model, self.optimizer,
                tokenizer=self.tokenizer.to_dict(), train=dataclasses.asdict(self.config),
                chat_template=getattr(self.train_data, "chat_template", None),
                keep_last=self.config.keep_last,
            )  # fmt: skip
            self.metrics.say(f"step {step:>6}/{self.config.max_steps}  saved {path}")
        self.group.barrier()

    def _report(self) -> None:
        lines, folder = self.metrics.lines, self.folder
        seconds = [line["train/step_ms"] for line in lines if "train/step_ms" in line]
        val = [line["val/loss"] for line in lines if "val/loss" in line]
        draw_curve(
            lines,
            folder / "loss.png",
            f"{self.config.run_name}: {self.model.n_params():,} parameters",
        )
        print(f"done: {self.config.max_steps:,} steps", end="")
        print(
            f", {sorted(seconds)[len(seconds) // 2]:.1f} ms a step (median)" if seconds else "",
            end="",
        )
        print(f", val loss {val[-1]:.4f}" if val else "")
        print(f"loss curve: {folder / 'loss.png'}")
        print(f"checkpoint: {checkpoint.list_checkpoints(folder)[-1]}")


def _name(parts: tuple[Tensor, ...]) -> Batch:
    return dict(zip(("idx", "targets", "doc_start"), parts, strict=False))


def _due(step: int, every: int, last: bool) -> bool:
    """Whether what happens every so many steps, and at the end, happens before this one."""
    return last or bool(every) and step > 0 and step % every == 0


def _select_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        dtype = (
            "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        )
    return getattr(torch, dtype)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
