"""Layouts of several ranks (over gloo, started by torchrun) and activation checkpointing: the same
training."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._inductor.utils import run_and_get_code

from gpt2.checkpoint import list_checkpoints
from gpt2.config import TrainConfig
from gpt2.data import TokenLoader, write_shard
from gpt2.device import execution
from gpt2.dist import Distributed
from gpt2.model import GPT
from gpt2.train.layouts import ShardedMuonAdamW, make_layout
from gpt2.train.metrics import read_metrics
from gpt2.train.objectives import LanguageModeling
from gpt2.train.optim import make_optimizer
from gpt2.train.pretrain import open_data, pretrain

from .conftest import command_line, losses
from .test_evaluation import write_questions

ROOT = Path(__file__).parent.parent


def torchrun(n: int, port: int, *words: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n),
        "--master-port", str(port), *words,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=ROOT)


def start(n: int, port: int, runs: list[dict], folder: Path) -> subprocess.CompletedProcess:
    """Trains them on n ranks, one after the other."""
    (folder / "runs.json").write_text(json.dumps(runs))
    return torchrun(n, port, "-m", "tests.parallel_worker", str(folder / "runs.json"))


def row_of(config: TrainConfig, step: int, row: int) -> list[int]:
    data = open_data(config, "train", config.block_size)
    return data.batch(step, config.tokens_per_step // config.block_size)[0][row].tolist()


def files(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    path = run / "checkpoints" / f"step_{step:08d}"
    return {f"{f.name}/{k}": v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape
        and torch.allclose(a[name].float(), b[name].float(), rtol=1e-4, atol=2e-5)
        for name in a
    )


@pytest.mark.ddp
def test_two_ranks_give_the_losses_of_one(train_config, free_port, tmp_path):
    """Equal to the order of additions; with exact_reduction the same bits; also by the kernels."""
    plain = replace(train_config, micro_batch_size=2, schedule="constant")
    exact = replace(plain, exact_reduction=True, dropout=0.1, run_name="exact")
    triton = replace(plain, max_steps=2, eval_every=0, run_name="triton", kernels="triton")
    muon = replace(exact, optimizer="muon", run_name="muon")
    # One rank goes on where two stopped, too.
    runs = [replace(c, run_name=f"{c.run_name}2") for c in (plain, triton)]
    runs += [replace(c, run_name=f"{c.run_name}2", max_steps=4) for c in (exact, muon)]
    done = start(2, free_port, [asdict(run) for run in runs], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 ranks x 2 micro steps x 2 rows x 32" in done.stdout
    assert "kernels               triton (asked for)" in done.stdout
    for config in (plain, exact, muon, replace(triton, kernels="torch")):
        pretrain(config)
    for config in (exact, muon):
        pretrain(replace(config, run_name=f"{config.run_name}2", resume="auto"))
    for name, max_steps in (("run", 8), ("run2", 8)):
        pretrain(replace(plain, run_name=name, resume="auto", max_steps=max_steps))
    out = Path(train_config.out_dir)
    for key, tolerance in (("train/loss", 1e-5), ("val/loss", 1e-5), ("train/grad_norm", 1e-4)):
        assert losses(out / "run2", key) == pytest.approx(losses(out / "run", key), rel=tolerance)
        if key != "val/loss":  # it was interrupted at another step than those
            for name in ("exact", "muon"):
                assert losses(out / f"{name}2", key) == losses(out / name, key)
    assert losses(out / "triton2") == pytest.approx(losses(out / "triton"), rel=1e-4)
    for name in ("exact", "muon"):
        assert equal(files(out / f"{name}2", 6), files(out / name, 6)), name


@pytest.mark.ddp
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_layouts_train_alike(train_config, free_port, tmp_path, optimizer):
    """Losses, weights, moments and checkpoints; a step that is skipped; going on in another."""
    base = replace(
        train_config, optimizer=optimizer, micro_batch_size=2, schedule="constant",
        warmup_steps=0, save_every=1, keep_last=0, sample_every=3, eval_every=3, hellaswag_every=3,
    )  # fmt: skip
    write_questions(tmp_path / "eval")
    poisoned = [row_of(base, 3, 5)]
    pretrain(replace(base, run_name="mixed", max_steps=1, hellaswag_every=0))
    layouts = ("none", "optimizer", "full")
    more = {"poisoned": poisoned, "eval_data": str(tmp_path / "eval")}
    runs = [asdict(replace(base, run_name=s, sharding=s)) | more for s in layouts]
    again = replace(base, run_name="again", sharding="full", activation_checkpointing=True)
    runs.append(asdict(again) | more)
    for stop, sharding in ((2, "full"), (3, "optimizer"), (5, "full"), (6, "none")):
        mixed = replace(
            base, run_name="mixed", resume="auto", max_steps=stop, sharding=sharding,
            activation_checkpointing=stop > 3, eval_every=0,  # so that it samples before all else
        )  # fmt: skip
        runs.append(asdict(mixed) | more)
    for s in layouts:
        back = replace(base, run_name=f"back_{s}", sharding=s, guard="rollback", snapshot_every=2)
        runs.append(asdict(back) | more)
    done = start(2, free_port, runs, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert "sharding full, activation checkpointing" in done.stdout

    held = {
        (run, rank): (int(weights), int(moments))
        for run, rank, weights, moments in re.findall(
            r"(\w+): rank (\d) holds (\d+) weights, (\d+) moments", done.stdout
        )
    }
    n, _ = held["none", "0"]
    moments = 2 * n - (optimizer == "muon") * 2 * 12 * 32**2  # of the matrices of 2 blocks
    assert done.stdout.count("27,840 parameters: 2 layers") == len(runs)
    for rank in "01":
        assert held["none", rank] == (n, moments)
        assert held["optimizer", rank] == (n, pytest.approx(moments / 2, rel=0.15))
        assert held["full", rank] == (n // 2, moments // 2)
    assert sum(held["optimizer", rank][1] for rank in "01") == moments

    out = Path(base.out_dir)
    expected = losses(out / "none")
    assert len(expected) == 5  # one step was skipped
    for key in ("train/loss", "val/loss", "train/grad_norm"):
        wanted = losses(out / "none", key)
        assert losses(out / "optimizer", key) == wanted
        assert losses(out / "full", key) == pytest.approx(wanted, rel=1e-5), key
        if key != "val/loss":  # it has none
            tolerance = 1e-4 if key == "train/grad_norm" else 1e-5
            assert losses(out / "mixed", key) == pytest.approx(wanted, rel=tolerance), key
        assert losses(out / "again", key) == losses(out / "full", key)
    swag = losses(out / "none", "eval/hellaswag")
    assert len(swag) == 2
    assert all(losses(out / name, "eval/hellaswag") == swag for name in (*layouts, "again"))
    for name in layouts:
        run = out / name
        assert len(list_checkpoints(run)) == 6
        assert equal(files(run, 3), files(run, 4)), name  # weights, moments and their step
        assert not equal(files(run, 4), files(run, 5)), name
        (event,) = [line for line in read_metrics(run / "metrics.jsonl") if "guard/skipped" in line]
        ((rank, row),) = [(r["rank"], r["row"]) for r in event["guard/rows"]]
        assert (event["step"], rank, row) == (4, 1, 5)
    assert equal(files(out / "optimizer", 6), files(out / "none", 6))
    for name in ("full", "mixed"):
        assert close(files(out / name, 6), files(out / "none", 6)), name
    assert equal(files(out / "again", 6), files(out / "full", 6))
    # Two a run, at steps 3 and 6; a step that has its sample gets no other. Besides, mixed's two
    # ends at 2 and 5.
    assert done.stdout.count("sample: ") == 2 * 10 - 1 + 2
    # Back to step 2, on with the batches after the poisoned one: 6 steps that count.
    assert len(losses(out / "back_none")) > 5
    assert equal(files(out / "back_optimizer", 6), files(out / "back_none", 6))
    assert close(files(out / "back_full", 6), files(out / "back_none", 6))
    # One process goes on with either.
    ends = []
    for name in ("none", "full"):
        pretrain(replace(base, run_name=name, resume="auto", max_steps=8, micro_batch_size=8,
                         hellaswag_every=0))  # fmt: skip
        ends.append(losses(out / name)[-2:])
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)


def test_what_cannot_be_shared_out(tiny, train_config):
    with pytest.raises(ValueError, match="exact_reduction .* needs sharding none, not full"):
        replace(train_config, exact_reduction=True, sharding="full")
    with pytest.raises(ValueError, match="28 tensors of this model do not go round 29 ranks"):
        sharded_optimizer(GPT(tiny, "torch"), 0, 29)


def sharded_optimizer(model: GPT, rank: int, world_size: int) -> ShardedMuonAdamW:
    group = Distributed(rank, world_size, torch.device("cpu"))
    return make_optimizer(model, TrainConfig(), lambda *a, **k: ShardedMuonAdamW(group, *a, **k))


def test_moments_are_shared_out_equally(tiny):
    model = GPT(replace(tiny, n_layer=8), "torch")
    parts = [
        [p for g in sharded_optimizer(model, rank, 4).param_groups for p in g["params"]]
        for rank in range(4)
    ]
    assert sorted(id(p) for part in parts for p in part) == sorted(map(id, model.parameters()))
    sizes = [sum(p.numel() for p in part) for part in parts]
    assert max(sizes) < 1.02 * min(sizes)


def test_one_process_has_nothing_to_share_out(train_config, capsys):
    pretrain(replace(train_config, max_steps=2, warmup_steps=0, sharding="full"))
    assert "sharding full (one process: nothing to share out)" in capsys.readouterr().out


class Watched(torch.nn.Module):
    """An objective that notes whether torch is deterministic, and then may fail."""

    def __init__(self, model: GPT, fails: bool):
        super().__init__()
        self.model, self.fails, self.seen = model, fails, []

    def note(self, *_):
        self.seen.append(torch.are_deterministic_algorithms_enabled())

    def forward(self, batch):
        self.note()
        if self.fails:
            raise RuntimeError("in forward")
        loss = self.model(batch["idx"]).float().mean()
        loss.register_hook(self.note)
        return loss, {}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_passes_are_deterministic_where_exactness_is_asked_for(
    tiny, train_config, exact, before, fails
):
    config = replace(train_config, exact_reduction=exact)
    objective, group = Watched(GPT(tiny), fails), Distributed()
    layout = make_layout(config, objective, group, execution(group.device))
    layout.divide_step(1)
    batch = {"idx": torch.zeros(1, 4, dtype=torch.int64)}
    torch.use_deterministic_algorithms(before, warn_only=before)
    try:
        with pytest.raises(RuntimeError, match="in forward") if fails else nullcontext():
            layout.backward(layout.train_forward(batch)[0])
        fill = torch.utils.deterministic.fill_uninitialized_memory
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before and fill
        assert torch.are_deterministic_algorithms_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False)
    assert objective.seen == [exact or before] * (1 if fails else 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's own compiler
@pytest.mark.parametrize("exact", [False, True])
def test_a_compiled_embedding_adds_up_its_gradient_in_order(tiny, train_config, exact):
    """Where exactness is asked for: by torch's index_put, which sorts on a GPU, instead of
    inductor's own code, whose additions are atomic there.
    """
    model, group = GPT(replace(tiny, n_layer=1), "torch"), Distributed()
    config = replace(train_config, exact_reduction=exact)
    layout = make_layout(
        config, LanguageModeling(model), group, execution(group.device, "auto", "on")
    )
    layout.divide_step(1)
    idx = torch.randint(tiny.vocab_size, (2, 16))

    def passes():
        layout.backward(layout.train_forward({"idx": idx, "targets": idx})[0])

    torch._dynamo.reset()
    _, codes = run_and_get_code(passes)
    forward, backward = codes
    assert "embedding" in backward and ("aten.index_put_(" in backward) == exact


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_checkpointing_changes_no_bit(train_config, dtype):
    config = replace(train_config, dropout=0.2, dtype=dtype)
    pretrain(config)
    pretrain(replace(config, run_name="again", activation_checkpointing=True))
    runs = Path(config.out_dir)
    assert losses(runs / "again") == losses(runs / "run")
    assert equal(files(runs / "again", 6), files(runs / "run", 6))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's own compiler
def test_compiled_dropout_is_the_same_when_computed_again(train_config):
    config = replace(train_config, dropout=0.2, compile="on", max_steps=3, eval_every=0)
    pretrain(config)
    pretrain(replace(config, run_name="again", activation_checkpointing=True))
    runs = Path(config.out_dir)
    assert losses(runs / "again") == pytest.approx(losses(runs / "run"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.ddp
def test_layouts_compiled_and_with_the_kernels(train_config, free_port, tmp_path):
    base = replace(train_config, micro_batch_size=2, max_steps=3, sample_every=2, save_every=0)
    again = replace(base, activation_checkpointing=True)
    runs = [
        replace(base, run_name="plain"),
        replace(again, run_name="compiled_full", compile="on", sharding="full"),
        replace(again, run_name="compiled_optimizer", compile="on", sharding="optimizer"),
        replace(again, run_name="triton_full", kernels="triton", sharding="full"),
        replace(again, run_name="bfloat16", dtype="bfloat16"),
        replace(again, run_name="bfloat16_full", dtype="bfloat16", sharding="full"),
    ]
    done = start(2, free_port, [asdict(run) for run in runs], tmp_path)
    assert done.returncode == 0, done.stderr
    out = Path(base.out_dir)
    for key in ("train/loss", "val/loss"):
        for run in ("compiled_full", "compiled_optimizer", "triton_full"):
            wanted = pytest.approx(losses(out / "plain", key), rel=1e-4)
            assert losses(out / run, key) == wanted, (run, key)
        wanted = pytest.approx(losses(out / "bfloat16", key), rel=1e-3)
        assert losses(out / "bfloat16_full", key) == wanted, key


@pytest.mark.parametrize("ops", ["torch", "triton"])
def test_activation_checkpointing_keeps_less(tiny, ops):
    """The gradients are the same bits, and of a block only what enters it is kept."""
    objective = LanguageModeling(GPT(tiny, ops))
    batch = {k: torch.randint(65, (1, 16)) for k in ("idx", "targets")}
    kept, grads = [], []
    for again in (False, True):
        objective.model.activation_checkpointing = again
        memory: dict[int, int] = {}

        def note(tensor, memory=memory):
            storage = tensor.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss, _ = objective(batch)
        loss.backward()
        weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
        kept.append(sum(size for at, size in memory.items() if at not in weights))
        grads.append([p.grad.clone() for p in objective.parameters()])
        objective.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.ddp
def test_a_rank_that_fails_alone_ends_the_run(train_config, free_port, tmp_path):
    """Only rank 1 meets the bad token; rank 0 must not wait for it for ever."""
    data = tmp_path / "bad"
    data.mkdir()
    (data / "manifest.json").write_text('{"tokenizer": {"name": "byte"}}')
    tokens = np.arange(2000) % 250
    tokens[1000] = 300
    write_shard(data / "train_000000.bin", tokens)

    def first_to_meet_it(seed: int) -> int:
        loader = TokenLoader(data / "train_000000.bin", 32, seed)
        for step in range(100):
            ranks = [r for r in (0, 1) if (torch.stack(loader.batch(step, 8, r, 2)) == 300).any()]
            if ranks:
                return ranks[0] if len(ranks) == 1 else -1
        return -1

    seed = next(seed for seed in range(100) if first_to_meet_it(seed) == 1)
    config = replace(train_config, data=str(data), seed=seed, max_steps=99, eval_every=0)
    done = torchrun(2, free_port, "scripts/train_gpt2.py", *command_line(config))
    assert done.returncode != 0
    assert "error (rank 1): shard" in done.stderr and "token 1000 is 300" in done.stderr
