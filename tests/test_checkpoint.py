import errno
import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gpt2 import checkpoint
from gpt2.checkpoint import list_checkpoints, load_model, read_checkpoint, save_checkpoint
from gpt2.config import TrainConfig
from gpt2.model import GPT
from gpt2.train.objectives import LanguageModeling
from gpt2.train.optim import make_optimizer

KEEP = dict(tokenizer={"name": "byte"}, train={})


def trained(config):
    model = GPT(config, "torch")
    optimizer = make_optimizer(model, TrainConfig())
    idx = torch.randint(0, 65, (2, 33))
    for _ in range(2):
        loss, _ = LanguageModeling(model)({"idx": idx[:, :-1], "targets": idx[:, 1:].contiguous()})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_round_trip_is_exact(tiny, tmp_path):
    model, optimizer = trained(tiny)
    path = save_checkpoint(tmp_path, 7, model, optimizer, **KEEP)
    assert path.name == "step_00000007"
    other, other_optimizer = GPT(tiny, "torch"), None
    other_optimizer = make_optimizer(other, TrainConfig())
    saved = read_checkpoint(path)
    assert (saved.step, saved.model, saved.tokenizer) == (7, tiny, {"name": "byte"})
    checkpoint.load_training_state(saved, other, other_optimizer)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other_optimizer.state[q][key]), (name, key)
    idx = torch.randint(0, 65, (1, 9))
    assert torch.equal(load_model(tmp_path, kernels="torch")(idx), model(idx))


def test_no_padding_and_no_wrapper_names_in_the_file(tiny, tmp_path):
    model, optimizer = trained(tiny)
    path = save_checkpoint(tmp_path, 1, model, optimizer, **KEEP)
    weights = load_file(path / "model.safetensors")
    assert weights["transformer.wte.weight"].shape == (65, 32)
    assert set(weights) == set(dict(model.named_parameters()))
    moments = load_file(path / "optimizer.safetensors")
    assert moments["transformer.wte.weight/exp_avg"].shape == (65, 32)


def test_keeps_the_newest(tiny, tmp_path):
    model = GPT(tiny, "torch")
    for step in (1, 2, 30, 100):
        save_checkpoint(tmp_path, step, model, keep_last=2, **KEEP)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000030", "step_00000100"]
    assert read_checkpoint(tmp_path).step == 100
    save_checkpoint(tmp_path, 100, model, keep_last=2, **KEEP)  # the same step again
    assert len(list_checkpoints(tmp_path)) == 2


def test_half_written_folders_do_not_count_and_go(tiny, tmp_path):
    model = GPT(tiny, "torch")
    path = save_checkpoint(tmp_path, 1, model, **KEEP)
    torn = path.with_name(".step_00000002.tmp")
    shutil.copytree(path, torn)
    (path.with_name("step_00000003")).mkdir()
    assert read_checkpoint(tmp_path).step == 1
    save_checkpoint(tmp_path, 4, model, **KEEP)
    assert not torn.exists()


def test_every_flipped_bit_is_noticed(tiny, tmp_path):
    model, optimizer = trained(tiny)
    path = save_checkpoint(tmp_path, 1, model, optimizer, **KEEP)
    for name in ("model.safetensors", "optimizer.safetensors"):
        good = (path / name).read_bytes()
        for position in torch.randint(0, 8 * len(good), (25,)).tolist():
            bad = bytearray(good)
            bad[position // 8] ^= 1 << position % 8
            (path / name).write_bytes(bad)
            with pytest.raises(ValueError, match=f"{name}: its content changed"):
                checkpoint.load_training_state(read_checkpoint(path), model, optimizer)
        (path / name).write_bytes(good)
    checkpoint.load_training_state(read_checkpoint(path), model, optimizer)


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_damaged_and_newer_checkpoints(tiny, tmp_path):
    path = save_checkpoint(tmp_path, 1, GPT(tiny, "torch"), **KEEP)
    meta = json.loads((path / "checkpoint.json").read_text())

    def rewrite(change):
        changed = {k: v for k, v in (meta | change).items() if k != "xxh3_128"}
        (path / "checkpoint.json").write_text(checkpoint._sign(changed))

    rewrite({"format": 99})
    with pytest.raises(ValueError, match="format 99, this version reads up to 1: update"):
        read_checkpoint(path)
    rewrite({"model": meta["model"] | {"n_experts": 4}})
    with pytest.raises(ValueError, match="unknown key 'n_experts'"):
        read_checkpoint(path)
    rewrite({"model": {}})
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(path)
    (path / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(path)
    rewrite({})
    (path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="has 1 bytes, should have"):
        read_checkpoint(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_checkpoint(path)
    with pytest.raises(OSError, match="no checkpoint"):
        read_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(OSError, match="no checkpoint, run"):
        load_model(tmp_path / "nowhere" / "at" / "all")


def test_another_model_size(tiny, tmp_path):
    from dataclasses import replace

    path = save_checkpoint(tmp_path, 1, GPT(tiny, "torch"), **KEEP)
    other = GPT(replace(tiny, n_layer=3, dropout=0.1), "torch")
    with pytest.raises(ValueError, match=r"another model: n_layer 2 \(here 3\)"):
        checkpoint.load_training_state(read_checkpoint(path), other)
    checkpoint.load_training_state(read_checkpoint(path), GPT(replace(tiny, dropout=0.1), "torch"))


def test_no_optimizer_state(tiny, tmp_path):
    model, optimizer = trained(tiny)
    path = save_checkpoint(tmp_path, 1, model, **KEEP)
    with pytest.raises(ValueError, match="no optimizer state"):
        checkpoint.load_training_state(read_checkpoint(path), model, optimizer)


def test_no_room_is_said_before_writing(tiny, tmp_path, monkeypatch):
    model = GPT(tiny, "torch")
    save_checkpoint(tmp_path, 1, model, **KEEP)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="does not fit") as error:
        save_checkpoint(tmp_path, 2, model, **KEEP)
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_writing_that_fails_half_way_leaves_nothing(tmp_path):
    """A file size limit fails like a full disk, and needs no root."""
    code = f"""
import resource, signal
from gpt2.checkpoint import save_checkpoint, list_checkpoints, load_model
from gpt2.config import GPTConfig
from gpt2.model import GPT
model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=65), "torch")
keep = dict(tokenizer={{"name": "byte"}}, train={{}})
save_checkpoint({str(tmp_path)!r}, 1, model, **keep)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))
try:
    save_checkpoint({str(tmp_path)!r}, 2, model, **keep)
except OSError as e:
    print("error:", e.filename)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "error:" in out.stdout and "model.safetensors" in out.stdout
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert read_checkpoint(tmp_path).step == 1
