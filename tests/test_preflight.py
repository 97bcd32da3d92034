"""The pre-flight: its memory against what a run really allocates, its choices, its refusals."""

import errno
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

from gpt2.cli import coerce, parse
from gpt2.config import GPTConfig, LoRAConfig, TrainConfig
from gpt2.device import Execution
from gpt2.dist import Distributed
from gpt2.lora import add_lora
from gpt2.model import GPT
from gpt2.train import preflight as module
from gpt2.train.objectives import DPO, LanguageModeling
from gpt2.train.optim import make_optimizer
from gpt2.train.preflight import available_host_bytes, preflight, size

CPU = torch.device("cpu")
ALONE, ON_CPU = Distributed(), Execution(CPU)
CHAR = GPTConfig(4, 4, 128, 64, 65, bias=False)
N = sum(p.numel() for p in GPT(CHAR, "torch").parameters())


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(
        preset="char", tokens_per_step=64 * 48, micro_batch_size=12, max_steps=100,
        warmup_steps=0, save_every=10, eval_every=0, out_dir=str(tmp_path / "runs"), device="cpu",
    )  # fmt: skip


def fly(config, objective=None, *, run=ON_CPU, group=ALONE, full_rows=True, trial=None, **more):
    """The pre-flight of a run, by default on a CPU: config, the rows of its table, predictions."""
    objective = objective or LanguageModeling(GPT(CHAR, "torch"))
    source = SimpleNamespace(block_size=objective.model.config.block_size, full_rows=full_rows)
    optimizer = make_optimizer(objective.model, config)
    found = preflight(config, objective, optimizer, source, run, group, trial=trial, **more)
    return found[0], dict(found[1]), found[2]


def needed(config, rows: int, objective=None, **options) -> int:
    """The bytes that a micro batch of so many rows is said to need."""
    return fly(replace(config, micro_batch_size=rows), objective, **options)[2]["peak_bytes"]


@pytest.fixture
def free(monkeypatch):
    """Call it to say how many bytes are usable, weights included."""
    return lambda n: monkeypatch.setattr(module, "available_bytes", lambda device: n - 4 * N)


def allocated(config, objective: LanguageModeling, run: Execution) -> tuple[int, int]:
    """The most that a step on a CPU really holds; of which weights and moments."""
    shape, model = objective.model.config, objective.model
    model.activation_checkpointing = config.activation_checkpointing
    optimizer = make_optimizer(model, config)
    tokens = torch.randint(shape.vocab_size, (2, config.micro_batch_size, shape.block_size))

    def step():
        for _ in range(config.grad_accum_steps(shape.block_size, 1)):
            with run.autocast():
                loss = objective(dict(idx=tokens[0], targets=tokens[1]))[0]
            (loss / 1000).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the moments
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    sums = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    moments = [t for state in optimizer.state.values() for t in state.values()]
    kept = sum(t.nbytes for t in (*model.parameters(), *moments))
    return max(sums) + kept, kept


@pytest.mark.parametrize(
    "shape, rows, dtype, changes",
    [
        (CHAR, 12, "float32", {}),
        (CHAR, 48, "bfloat16", {}),
        (CHAR, 12, "float32", {"optimizer": "muon"}),
        (replace(CHAR, dropout=0.1), 16, "float32", {}),
        (GPTConfig(6, 4, 256, 64, 65), 8, "float32", {"activation_checkpointing": True}),
        (GPTConfig(2, 2, 64, 64, 50257), 8, "float32", {}),  # logits in chunks
        (GPTConfig(1, 4, 256, 128, 300), 8, "bfloat16", {}),
    ],
)
def test_the_estimate_is_near_what_a_step_allocates(config, shape, rows, dtype, changes):
    """Within a third, and not far above: what fits must not be refused."""
    tokens = 48 * shape.block_size
    config = replace(config, tokens_per_step=tokens, micro_batch_size=rows, **changes)
    objective, run = LanguageModeling(GPT(shape, "torch")), Execution(CPU, getattr(torch, dtype))
    estimate = needed(config, rows, objective, run=run)
    peak, kept = allocated(config, objective, run)
    assert 2 / 3 < (estimate - kept) / peak < 4 / 3  # without a copy for checkpoints


def test_rows_say_what_is_needed(config):
    resolved, said, predicted = fly(config)
    assert resolved == config and said["  largest fit"] == "micro_batch_size 48"
    assert said["memory"].startswith(f"{size(predicted['peak_bytes'])} at the peak of a step (est")
    for part in (f"weights {size(4 * N)}", f"gradients {size(4 * N)}", "activations", "logits"):
        assert part in said["  of which"]
    assert "a step at best" in said["time"] and "for 100 steps" in said["time"]
    assert predicted["step_ms"] > 0
    _, said, predicted = fly(config, full_rows=False)
    assert "time" not in said and predicted["step_ms"] is None


def test_what_is_there_several_times_is_counted_so(config):
    """A reference, the copies to roll back to, the partial sums of exact_reduction."""
    one, policy = needed(config, 12), GPT(CHAR, "torch")
    assert needed(config, 12, DPO(policy, GPT(CHAR, "torch"))) == one + 4 * N
    assert needed(replace(config, guard="rollback"), 12) == one + 2 * 12 * N
    assert needed(replace(config, exact_reduction=True), 12) == one + 2 * 4 * N  # 4 micro steps


def test_muon_has_one_moment_of_a_matrix(config):
    both = [fly(replace(config, optimizer=name)) for name in ("adamw", "muon")]
    less = 4 * 4 * 12 * 128**2  # of 4 blocks
    peaks = [predicted["peak_bytes"] for *_, predicted in both]
    assert peaks[0] - peaks[1] == 2 * less  # and of the copy for checkpoints
    said = both[1][1]
    assert f"moments {size(8 * N - less)}" in said["  of which"]
    assert said["disk"].startswith(f"3 checkpoints of {size(12 * N - less)} at a time")


def test_adapters_are_saved_alone(config):
    model = GPT(CHAR, "torch")
    add_lora(model, LoRAConfig())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    said = fly(config, LanguageModeling(model))[1]
    assert said["disk"].startswith(f"3 checkpoints of {size(12 * trained)} at a time")
    assert f"weights {size(4 * (N + trained))}, gradients {size(4 * trained)}" in said["  of which"]


def test_what_cannot_fit_is_refused_with_what_does(config, free):
    for_8, for_1 = needed(config, 8), needed(config, 1)
    free(for_8)
    with pytest.raises(ValueError, match="--micro_batch_size 8, the largest that fits") as error:
        fly(config)
    assert f"{size(for_8)} are usable" in str(error.value) and "\n" not in str(error.value)
    fly(replace(config, micro_batch_size=8))
    free(for_1 - 1)
    for rows in (12, "auto"):
        with pytest.raises(ValueError, match="even micro_batch_size 1 does not fit: use activ"):
            fly(replace(config, micro_batch_size=rows))
    with pytest.raises(ValueError, match="use --tokens_per_step 64 or 128"):
        fly(replace(config, tokens_per_step=100, micro_batch_size="auto"))


def test_auto_takes_the_largest_or_the_checkpoints(config, free):
    auto = replace(config, micro_batch_size="auto")
    assert fly(auto)[0].micro_batch_size == 48
    wide = replace(auto, tokens_per_step=64 * 1024)  # all fit, but 256 rows are 16384 tokens
    assert fly(wide)[0].micro_batch_size == 256
    for_1 = needed(config, 1)
    free(2 * needed(config, 16))
    assert fly(auto)[0] == replace(config, micro_batch_size=16)
    for before, expected in ((6, 6), (24, 24), (5, 16), (None, 16)):
        resumed = SimpleNamespace(step=40, train={"micro_batch_size": before})
        resolved, said, _ = fly(auto, resumed=resumed)
        assert resolved.micro_batch_size == expected and "for 60 steps" in said["time"]
    free(for_1)
    assert fly(auto)[0].micro_batch_size == 1


def test_ranks_decide_by_the_least(config, free):
    """Rank 0 of 2 has room for 24 rows, the other one for 4 only, and is slow."""
    theirs = []

    class Group(Distributed):
        def gather(self, value):
            return [value, theirs.pop(0)]

        def broadcast(self, value):
            return value

    group, auto = Group(0, 2, CPU), replace(config, micro_batch_size="auto")
    free(1 << 40)
    theirs[:] = [8, 4, ({"activations": 900}, 1000), (1.0, 1e9)]
    resolved, _, predicted = fly(auto, group=group)
    assert resolved.micro_batch_size == 4 and predicted["peak_bytes"] == 900
    assert predicted["step_ms"] > 1e9  # at one operation a second
    theirs[:] = [4, ({"activations": 5000}, 1000)]
    with pytest.raises(ValueError, match="needs 5 kB on the CPU's memory of the rank .* 1 kB are"):
        fly(config, group=group)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 1 GB, 0.1 GB of it taken; a row of a pass takes `row` bytes."""
    self = SimpleNamespace(row=0, asked=[], objective=LanguageModeling(GPT(CHAR, "torch")))

    def trial(rows):
        self.asked.append(rows)
        gradients = sum(p.grad.nbytes for p in self.objective.parameters())  # all there already
        self.peak = 10**8 + gradients + rows * self.row
        assert not torch.compile(torch.compiler.is_compiling, backend="eager")()
        if self.peak > 10**9:
            raise torch.OutOfMemoryError

    for name, value in dict(
        mem_get_info=(9 * 10**8, 10**9), memory_reserved=10**8, synchronize=None,
        reset_peak_memory_stats=None, empty_cache=None,
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
    monkeypatch.setattr(module, "measure_rates", lambda *args: (1e12, 1e12))
    run = Execution(torch.device("cuda"), torch.bfloat16)
    options = dict(run=run, group=Distributed(device=run.device))
    self.fly = lambda c: fly(c, self.objective, trial=trial, **options)
    return self


def test_a_gpus_memory_is_measured_and_extended(config, gpu):
    gpu.row, auto = 10**7, replace(config, micro_batch_size="auto")
    _, said, predicted = gpu.fly(config)
    assert predicted["peak_bytes"] == 10**8 + 4 * N + 12 * 10**7 + 8 * N  # with moments
    assert gpu.asked == [1, 1, 2] and "(measured), 900 MB usable on the GPU" in said["memory"]
    gpu.row = 3 * 10**7  # 26 rows fit
    assert gpu.fly(auto)[0].micro_batch_size == 24
    with pytest.raises(ValueError, match="use --micro_batch_size 24, the largest that fits"):
        gpu.fly(replace(config, micro_batch_size=48))
    gpu.row = 5 * 10**8  # two rows run out of memory
    assert gpu.fly(auto)[0].micro_batch_size == 1


def test_what_a_gpu_or_its_host_has_no_room_for(config, gpu, monkeypatch):
    gpu.row = 10**9
    with pytest.raises(ValueError, match="even micro_batch_size 1 does not fit"):
        gpu.fly(config)
    assert all(p.grad is None for p in gpu.objective.parameters())
    monkeypatch.setattr(module, "available_host_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="of host memory for each rank, 1 kB are usable"):
        gpu.fly(config)


@pytest.mark.parametrize(
    "changes, has_val, n",
    [
        ({}, True, 3), ({"keep_last": 1}, True, 2), ({"save_every": 0}, True, 1),
        ({"eval_every": 50}, True, 4), ({"eval_every": 50}, False, 3),  # the best stays, too
        ({"keep_last": 0}, True, 10),
        ({"keep_last": 0, "save_every": 0, "hellaswag_every": 5}, True, 20),
        ({"keep_last": 0, "save_every": 0, "eval_every": 25}, True, 4),
        ({"keep_last": 0, "save_every": 0, "eval_every": 25}, False, 1),
    ],
)  # fmt: skip
def test_a_full_disk_is_said_before_the_first_step(config, monkeypatch, changes, has_val, n):
    config, usage = replace(config, **changes), SimpleNamespace(free=n * 12 * N - 1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=rf"{n} checkpoints of .* \(keep_last ") as error:
        fly(config, has_val=has_val)
    assert error.value.errno == errno.ENOSPC
    kept = config.folder / "checkpoints/step_000010"
    kept.mkdir(parents=True)
    (kept / "checkpoint.json").write_bytes(b" ")
    if not config.keep_last:
        usage.free += 1
    said = fly(config, has_val=has_val)[1]["disk"]  # what lies there will make room
    assert said.startswith(f"{n} checkpoints of {size(12 * N)} at a time")


def test_memory_limits_of_control_groups_count(tmp_path):
    def left(files: dict[str, str]) -> int:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return available_host_bytes(tmp_path / "proc", tmp_path / "cgroup")

    group, job = "proc/self/cgroup", "cgroup/job/memory"
    assert left({"proc/meminfo": "MemTotal: 32000 kB\nMemAvailable:   16000 kB\n"}) == 16_384_000
    assert left({group: "0::/job/task\n", "cgroup/job/task/memory.max": "max\n"}) == 16_384_000
    assert 5_000_000 == left({
        f"{job}.max": "9000000\n", f"{job}.current": "5000000\n",
        f"{job}.stat": "anon 4\ninactive_file 1000000\n",
    })  # fmt: skip
    v1 = "cgroup/memory/slurm/memory"
    assert 1_000_000 == left({
        group: "7:cpu,memory:/slurm\n1:name=systemd:/\n", f"{v1}.limit_in_bytes": "7000000",
        f"{v1}.usage_in_bytes": "6000000", f"{v1}.stat": "",
    })  # fmt: skip


def test_auto_is_an_option_like_any(tmp_path):
    assert parse(TrainConfig, "", ["--micro_batch_size", "auto"]).micro_batch_size == "auto"
    path = tmp_path / "run.yaml"
    path.write_text("micro_batch_size: auto\n")
    assert parse(TrainConfig, "", [str(path)]).micro_batch_size == "auto"
    with pytest.raises(ValueError, match="must be auto or a whole number, got 'most'"):
        coerce(TrainConfig, {"micro_batch_size": "most"}, "run.yaml")
    with pytest.raises(ValueError, match="must be above 0"):
        TrainConfig(micro_batch_size=0)
