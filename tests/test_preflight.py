"""The pre-flight: its formulas against what a CPU really saves and allocates, and its refusals."""

import errno
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gpt2 import model as gpt2_model
from gpt2.cli import coerce, parse
from gpt2.config import PRESETS, GPTConfig, TrainConfig
from gpt2.dist import Distributed
from gpt2.model import GPT
from gpt2.train import preflight as module
from gpt2.train.memory import Ceilings, Setting, largest_fit, memory, saved_bytes, step_parts
from gpt2.train.objectives import LanguageModeling
from gpt2.train.optim import make_optimizer
from gpt2.train.preflight import available_host_bytes, preflight, size

CHAR = GPTConfig(4, 4, 128, 64, 65)
SMALL = GPTConfig(2, 2, 64, 64, 50257)
CPU = Distributed(0, 1, torch.device("cpu"))


def setting(shape, rows, kernels="torch", **changes) -> Setting:
    with torch.device("meta"):  # allocates nothing
        n = sum(p.numel() for p in GPT(shape, "torch", "meta").parameters())
    s = Setting(shape, rows, shape.block_size, 2, False, False, kernels, n, n)
    return replace(s, **changes)


def make(s: Setting):
    torch.manual_seed(0)
    objective = LanguageModeling(GPT(s.shape, s.kernels))
    tokens = torch.randint(s.shape.vocab_size, (2, s.rows, s.block_size))
    batch = dict(idx=tokens[0], targets=tokens[1])
    if s.doc_mask:
        batch["doc_start"] = torch.zeros(s.rows, s.block_size, dtype=torch.int32)
    return objective, batch


def forward(objective, batch, s: Setting):
    with torch.autocast("cpu", torch.bfloat16, enabled=s.bfloat16):
        return objective(batch)[0] / 1000


def really_saved(s: Setting) -> int:
    """Bytes of the storages that autograd keeps, parameters and tokens left out."""
    objective, batch = make(s)
    known = [*objective.parameters(), *batch.values()]
    known = {t.untyped_storage().data_ptr() for t in known}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # alive, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward(objective, batch, s)
    assert loss.isfinite()
    return sum(storage.nbytes() for storage in kept.values())


def really_allocated(s: Setting) -> int:
    """The most that a step allocates beside parameters, moments and batches."""
    objective, batch = make(s)
    optimizer = make_optimizer(objective.model, TrainConfig())

    def step():
        for _ in range(s.micro_steps):
            forward(objective, batch, s).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the moments
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


CASES = {
    "float32": setting(CHAR, 12),
    "bfloat16": setting(CHAR, 4, bfloat16=True),
    "no biases, one row": setting(replace(CHAR, bias=False), 1),
    "dropout": setting(replace(CHAR, dropout=0.1), 6),
    "dropout bfloat16": setting(replace(CHAR, dropout=0.1), 2, bfloat16=True),
    "documents": setting(CHAR, 6, doc_mask=True),
    "documents bfloat16": setting(CHAR, 2, doc_mask=True, bfloat16=True),
    "logits in chunks": setting(SMALL, 8),
    "all logits": setting(SMALL, 4),
    "wide": setting(GPTConfig(1, 4, 256, 128, 300), 8),
}


@pytest.mark.parametrize("name", CASES)
def test_saved_bytes_are_what_autograd_saves(name):
    s = CASES[name]
    assert saved_bytes(s) == pytest.approx(really_saved(s), rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"bfloat16": True}, {"doc_mask": True}], ids=str)
def test_saved_bytes_with_the_triton_kernels(changes):
    s = setting(GPTConfig(1, 2, 32, 16, 65), 1, "triton", **changes)
    assert saved_bytes(s) == pytest.approx(really_saved(s), rel=0.02)


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "logits in chunks", "all logits", "wide"])
def test_the_peak_is_what_a_step_allocates(name, micro_steps):
    s = replace(CASES[name], micro_steps=micro_steps)
    parts = memory(s)
    ours = parts.peak - parts.parameters - parts.optimizer - parts.batches
    assert ours == pytest.approx(really_allocated(s), rel=0.03)


def test_activation_checkpointing_keeps_the_inputs_of_blocks(monkeypatch):
    s = setting(GPTConfig(6, 4, 256, 64, 65), 8, micro_steps=1)
    again = replace(s, activation_checkpointing=True)
    real = gpt2_model.Block.forward
    monkeypatch.setattr(
        gpt2_model.Block,
        "forward",
        lambda self, *args: checkpoint(real, self, *args, use_reentrant=False),
    )
    parts = memory(again)
    ours = parts.peak - parts.parameters - parts.optimizer - parts.batches
    assert ours == pytest.approx(really_allocated(again), rel=0.05)
    assert memory(again).activations < 0.2 * memory(s).activations
    assert memory(again).peak < memory(s).peak


def test_layouts_divide_what_they_should():
    ddp = setting(PRESETS["gpt2"], 8, cuda=True, kernels="triton", bfloat16=True, world_size=8)
    zero1, fsdp = (replace(ddp, sharding=name) for name in ("optimizer", "full"))
    a, b, c = memory(ddp), memory(zero1), memory(fsdp)
    assert a.parameters == 124_475_904 * 4 and a.optimizer == 2 * a.parameters
    assert b.optimizer == a.optimizer // 8 and a.peak - b.peak == a.optimizer - b.optimizer
    assert c.parameters == a.parameters // 8 and c.gradients == a.gradients // 8
    assert c.peak < b.peak
    assert a.activations == 8 * 1024 * (12 * (36 * 768 + 48 + 16) + 4 * 768 + 8)


def test_largest_fit_is_the_largest():
    s = setting(CHAR, 12, micro_steps=4)  # 48 rows: 48, 24, 16, 12, 8, 6, ...
    for rows, above in ((24, 48), (16, 24), (1, 2)):
        budget = memory(replace(s, rows=rows, micro_steps=48 // rows)).peak
        assert largest_fit(s, budget) == rows
        assert memory(replace(s, rows=above, micro_steps=48 // above)).peak > budget
    assert largest_fit(s, 1000) == 0


def test_step_parts_count_the_work():
    s = setting(PRESETS["gpt2"], 8, micro_steps=64)
    parts = step_parts(s, Ceilings(flops=1.0, bandwidth=1.0))
    tokens = 8 * 1024 * 64
    # 6 N, N without position embeddings, biases and layer norms but with the padded vocabulary.
    N = 12 * 12 * 768**2 + 50304 * 768
    assert parts["matmuls"] + parts["head"] == 6 * N * tokens
    assert parts["attention"] == 7 * 12 * 768 * 1024 * tokens
    twice = step_parts(s, Ceilings(flops=2.0, bandwidth=4.0))
    assert twice["matmuls"] == parts["matmuls"] / 2 and twice["loss"] == parts["loss"] / 4
    again = step_parts(replace(s, activation_checkpointing=True), Ceilings(1.0, 1.0))
    assert again["matmuls"] == parts["matmuls"] * 4 / 3


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(
        preset="char", tokens_per_step=64 * 48, micro_batch_size=12, max_steps=100,
        warmup_steps=0, save_every=10, eval_every=0, out_dir=str(tmp_path / "runs"), device="cpu",
    )  # fmt: skip


def fly(config, monkeypatch=None, available=None, group=CPU, resumed=None):
    if available is not None:
        monkeypatch.setattr(module, "available_bytes", lambda device, held=0: available)
    model = GPT(config.model_config(65), "torch")
    kwargs = dict(block_size=64, bfloat16=False, compiled=False, resumed=resumed)
    return preflight(config, model, make_optimizer(model, config), group, **kwargs)


def needed(rows: int) -> int:
    s = setting(PRESETS["char"], rows, micro_steps=48 // rows, host_copies=1)
    return memory(s).peak


def test_rows_say_what_is_needed(config):
    resolved, found = fly(config)
    assert resolved == config and found.largest == 48
    said = dict(found.rows())
    assert said["memory"].startswith(size(needed(12)))
    assert f"parameters {size(4 * found.setting.n_params)}" in said["  of which"]
    for word in ("gradients", "AdamW's moments", "activations", "logits"):
        assert word in said["  of which"]
    assert "100 steps" in said["time"] and "FLOP/s" in said["  ceilings"]
    assert 0 < found.step_seconds < 60
    # 10 saves, 2 stay, one is being written.
    assert said["disk"].startswith(f"3 checkpoints of {size(found.checkpoint_bytes)}")


def test_what_cannot_fit_is_refused_with_what_does(config, monkeypatch):
    with pytest.raises(ValueError, match="--micro_batch_size 8, the largest that fits"):
        fly(config, monkeypatch, needed(8))
    fly(replace(config, micro_batch_size=8), monkeypatch, needed(8))
    with pytest.raises(ValueError, match="even micro_batch_size 1 needs"):
        fly(config, monkeypatch, needed(1) - 1)
    with pytest.raises(ValueError, match="even micro_batch_size 1 needs"):
        fly(replace(config, micro_batch_size="auto"), monkeypatch, needed(1) - 1)


def test_auto_takes_the_largest_or_the_checkpoints(config, monkeypatch):
    auto = replace(config, micro_batch_size="auto")
    assert fly(auto)[0].micro_batch_size == 48
    assert fly(auto, monkeypatch, needed(16))[0] == replace(config, micro_batch_size=16)
    for before, expected in ((6, 6), (24, 16), (5, 16), (None, 16)):
        resumed = SimpleNamespace(step=40, train={"micro_batch_size": before})
        resolved, found = fly(auto, monkeypatch, needed(16), resumed=resumed)
        assert resolved.micro_batch_size == expected and found.steps == 60
    with pytest.raises(ValueError, match="the nearest are 64 and 128"):
        fly(replace(auto, tokens_per_step=100))


def test_ranks_decide_by_the_least(config, monkeypatch):
    """Rank 0 of 2 has room for 24 rows, the other one for 4 only and is slow."""

    def least(rows):
        s = setting(PRESETS["char"], rows, micro_steps=24 // rows, host_copies=1, world_size=2)
        return memory(s).peak

    class Group(Distributed):
        def gather(self, value):
            theirs = {int: least(4), tuple: (1e6, 1e9), bool: False}
            return [value, theirs[type(value)]]

        def broadcast(self, value):
            return value

    group = Group(0, 2, torch.device("cpu"))
    auto = replace(config, micro_batch_size="auto")
    resolved, found = fly(auto, monkeypatch, least(24), group)
    assert resolved.micro_batch_size == 4 and found.available == least(4)
    assert found.ceilings.flops == 1e6


def test_a_full_disk_is_said_before_the_first_step(config, monkeypatch):
    one = fly(config)[1].checkpoint_bytes
    usage = SimpleNamespace(free=3 * one - 1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"3 checkpoints of .* \(keep_last 2\)") as error:
        fly(config)
    assert error.value.errno == errno.ENOSPC
    fly(replace(config, keep_last=1))
    fly(replace(config, save_every=0))
    with pytest.raises(OSError, match="10 checkpoints"):
        fly(replace(config, keep_last=0))
    with pytest.raises(OSError, match="5 checkpoints"):
        fly(replace(config, keep_every=50))
    usage.free = 3 * one
    assert fly(config)[1].n_checkpoints == 3


def test_memory_limits_of_control_groups_count(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 32000 kB\nMemAvailable:   16000 kB\n")
    assert available_host_bytes(proc, groups) == 16000 * 1024
    inner = groups / "job/task"
    inner.mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/job/task\n")
    assert available_host_bytes(proc, groups) == 16000 * 1024
    (inner / "memory.max").write_text("max\n")
    (groups / "job/memory.max").write_text("9000000\n")
    (groups / "job/memory.current").write_text("5000000\n")
    (groups / "job/memory.stat").write_text("anon 4000000\ninactive_file 1000000\n")
    assert available_host_bytes(proc, groups) == 5_000_000
    (proc / "self/cgroup").write_text("7:cpu,memory:/slurm\n1:name=systemd:/\n")
    folder = groups / "memory/slurm"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("7000000")
    (folder / "memory.usage_in_bytes").write_text("6000000")
    (folder / "memory.stat").write_text("total_inactive_file 0\n")
    assert available_host_bytes(proc, groups) == 1_000_000


def test_auto_is_an_option_like_any(tmp_path):
    assert parse(TrainConfig, "", ["--micro_batch_size", "auto"]).micro_batch_size == "auto"
    assert parse(TrainConfig, "", ["--micro_batch_size", "8"]).micro_batch_size == 8
    path = tmp_path / "run.yaml"
    path.write_text("micro_batch_size: auto\n")
    assert parse(TrainConfig, "", [str(path)]).micro_batch_size == "auto"
    with pytest.raises(ValueError, match="must be auto or int, got 'most'"):
        coerce(TrainConfig, {"micro_batch_size": "most"}, "run.yaml")
    with pytest.raises(ValueError, match="must be above 0"):
        TrainConfig(micro_batch_size=0)
