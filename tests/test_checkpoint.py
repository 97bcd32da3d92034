import errno
import json
import os
import resource
import shutil
import stat
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import checkpoint
from gpt2.checkpoint import load_model, load_training_state, newest_good, read_checkpoint
from gpt2.config import LoRAConfig, TrainConfig
from gpt2.lora import add_lora
from gpt2.model import GPT
from gpt2.train.optim import make_optimizer

listed = checkpoint.list_checkpoints
FC = "transformer.h.0.mlp.c_fc.weight"


def save(run, step, model, optimizer=None, **options):
    options = {"tokenizer": {"name": "byte"}, "train": {}} | options
    return checkpoint.save_checkpoint(run, step, model, optimizer, **options)


def trained(config, optimizer="adamw"):
    model = GPT(config, "torch")
    optimizer = make_optimizer(model, TrainConfig(optimizer=optimizer))
    for _ in range(2):
        model(torch.randint(0, 65, (2, 32))).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def read(path):
    return json.loads((path / "checkpoint.json").read_text())


def rewrite(path, meta):
    """With the right hash of its own."""
    (path / "checkpoint.json").write_text(checkpoint._sign(meta))


def rewrite_tensors(path, file, change):
    """The same for the tensors of a file, with the right hashes."""
    save_file(change(load_file(path / file)), path / file)
    new = {"bytes": (path / file).stat().st_size, "xxh3_128": checkpoint._hash(path / file)}
    meta = read(path)
    rewrite(path, meta | {"files": meta["files"] | {file: new}})


@pytest.mark.parametrize("number, kind", [(1, "adamw"), (2, "adamw"), (2, "muon")])
def test_round_trip_is_exact(tiny, tmp_path, number, kind):
    model, optimizer = trained(tiny, kind)
    identity = {"data": [{"path": "x", "hash": "y"}]}
    path = save(tmp_path, 7, model, optimizer, run_id="a", identity=identity)
    if number == 1:  # as earlier versions wrote it
        new = ("run_id", "identity")
        rewrite(path, {k: v for k, v in read(path).items() if k not in new} | {"format": 1})
    saved = read_checkpoint(path)
    assert (saved.step, saved.model, saved.tokenizer) == (7, tiny, {"name": "byte"})
    assert (saved.run_id, saved.identity) == (("a", identity) if number == 2 else (None, None))
    other = GPT(tiny, "torch")
    other_optimizer = make_optimizer(other, TrainConfig(optimizer=kind))
    load_training_state(saved, other, other_optimizer)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert optimizer.state[p].keys() == other_optimizer.state[q].keys(), name
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other_optimizer.state[q][key]), (name, key)
    idx = torch.randint(0, 65, (1, 9))
    assert torch.equal(load_model(tmp_path, kernels="torch")(idx), model(idx))
    # Neither padding nor the names of wrappers are in the files.
    weights, moments = (load_file(path / f) for f in (checkpoint.MODEL, checkpoint.OPTIMIZER))
    assert set(weights) == set(dict(model.named_parameters()))
    assert weights["transformer.wte.weight"].shape == (65, 32)
    assert moments["transformer.wte.weight/exp_avg"].shape == (65, 32)
    assert (
        (f"{FC}/momentum_buffer" in moments) == (f"{FC}/exp_avg" not in moments) == (kind == "muon")
    )


def test_keeps_the_newest_and_touches_nothing_else(tiny, tmp_path):
    model = GPT(tiny, "torch")
    folder = save(tmp_path, 10, model).parent
    others = {
        "step_00000010 (copy)", "step_00000010.bak", "aside_step_00000009", "best", ".mine.tmp",
        ".step_x.tmp", ".step_00000010.old.bak", "step_",
    }  # fmt: skip
    for name in others:
        shutil.copytree(folder / "step_00000010", folder / name)
    (folder / "step_9").symlink_to("best")  # before 10, though not as text
    assert [p.name for p in listed(tmp_path)] == ["step_9", "step_00000010"]
    for step in (30, 123456789, 99999999):
        save(tmp_path, step, model, keep_last=2)
    assert [p.name for p in listed(tmp_path)] == ["step_99999999", "step_123456789"]
    assert read_checkpoint(tmp_path).step == 123456789
    save(tmp_path, 5, model, keep_last=1)  # what was just written stays
    assert set(names(tmp_path)) == others | {"latest", "step_00000005", "step_123456789"}
    assert (folder / "latest").resolve().name == "step_00000005"


def test_what_was_left_is_set_aside(tiny, tmp_path):
    """As after a rollback, also of a step that had been left before, or was being replaced."""
    for _ in range(2):
        for step in (1, 2, 3):
            path = save(tmp_path, step, GPT(tiny, "torch"))
        path.rename(path.with_name(f".{path.name}.old"))
        assert len(checkpoint.set_aside(tmp_path, 1)) == 2
        assert newest_good(tmp_path).step == read_checkpoint(tmp_path).step == 1
        assert (tmp_path / "checkpoints/latest").resolve().name == "step_00000001"
    aside = ["aside_step_0000000" + end for end in ("2", "2.again", "3", "3.again")]
    assert names(tmp_path) == [*aside, "latest", "step_00000001"]
    assert checkpoint.set_aside(tmp_path, 1) == []


@pytest.mark.parametrize("moment", ["writing", "old aside", "new in place", "deleting"])
def test_a_crash_leaves_a_good_checkpoint(tiny, tmp_path, moment):
    """The states of the folder while step 2 is replaced, or deleted."""
    model = GPT(tiny, "torch")
    save(tmp_path, 1, model)
    path = save(tmp_path, 2, model)
    temporary, old = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old"))
    if moment == "deleting":
        path.rename(temporary)
    else:
        shutil.copytree(path, old if moment == "new in place" else temporary)
    if moment == "old aside":
        path.rename(old)
    steps = [1] if moment == "deleting" else [1, 2]
    assert newest_good(tmp_path).step == read_checkpoint(tmp_path).step == steps[-1]
    save(tmp_path, 3, model)
    assert names(tmp_path) == ["latest", *(f"step_{step:08d}" for step in [*steps, 3])]


@contextmanager
def broken(how, number=errno.EIO):
    """Writing fails as on a full disk (a limit of the size of files), or as said."""
    real, limit = os.fsync, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, "broken")
        real(fd)

    with pytest.MonkeyPatch.context() as patch:
        if how == "no room":
            usage = shutil.disk_usage("/")._replace(free=1000)
            patch.setattr(shutil, "disk_usage", lambda _: usage)
        elif how == "fsync":
            patch.setattr(os, how, fsync)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("how", ["small files", "no room", "fsync"])
def test_writing_that_fails_leaves_what_was_there(tiny, tmp_path, how):
    path = save(tmp_path, 1, GPT(tiny, "torch"))
    before = read(path)
    for step in (1, 2):
        with broken(how), pytest.raises(OSError) as error:
            save(tmp_path, step, GPT(tiny, "torch"))
        assert error.value.errno == (errno.ENOSPC if how == "no room" else errno.EIO)
        assert names(tmp_path) == ["latest", "step_00000001"] and read(path) == before
    assert newest_good(tmp_path).step == 1


def test_a_file_system_without_syncing_of_folders(tiny, tmp_path):
    with broken("fsync", errno.EINVAL):
        save(tmp_path, 1, GPT(tiny, "torch"))
    assert newest_good(tmp_path).step == 1


def test_every_flipped_bit_is_noticed(tiny, tmp_path):
    model, optimizer = trained(tiny)
    path = save(tmp_path, 1, model, optimizer)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for position in torch.randint(0, 8 * len(good), (25,)).tolist():
            bad = bytearray(good)
            bad[position // 8] ^= 1 << position % 8
            file.write_bytes(bad)
            with pytest.raises(ValueError, match=file.name):
                load_training_state(read_checkpoint(path), model, optimizer)
        file.write_bytes(good)
    load_training_state(read_checkpoint(path), model, optimizer)


def test_damaged_ones_and_those_of_another_run_are_passed_over(tiny, tmp_path):
    model, said = GPT(tiny, "torch"), []
    for step, run_id in ((1, None), (2, "a"), (3, "a"), (4, "b")):
        save(tmp_path, step, model, run_id=run_id)
    assert newest_good(tmp_path).step == 4
    (tmp_path / "checkpoints/step_00000003/model.safetensors").write_bytes(b"x")
    assert newest_good(tmp_path, said.append, run_id="a").step == 2
    assert "step_00000004 is of another run, b" in said[0]
    assert "damaged" in said[1] and "step_00000003/model.safetensors: has 1 bytes" in said[1]
    assert newest_good(tmp_path, said.append, run_id="c").step == 1  # which names no run
    shutil.rmtree(tmp_path / "checkpoints/step_00000001")
    with pytest.raises(ValueError, match="all 3 checkpoints are damaged or of another run"):
        newest_good(tmp_path, said.append, run_id="c")
    assert newest_good(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"format": 99}, "step_00000001.*format 99: update .* reads up to 2"),
        ({"step": "7"}, "step must be int, is '7'"), ({"step": -5}, "step -5"),
        ({"tokenizer": 5}, "tokenizer must be dict"),
        ({"tokenizer": {"name": "x"}}, "unknown tokenizer"),
        ({"identity": []}, "identity must be dict"), ({"model": {}}, "model: .*missing"),
        ({"model": {"n_layer": 2, "n_experts": 4}}, "step_00000001.*model: n_experts"),
        ({"model": {"vocab_size": 10**12}}, "model: vocab_size cannot be .* number from 1 to"),
        ({"model": {"n_layer": True}}, "model: n_layer cannot be True"),
        ({"model": {"dropout": float("nan")}}, "model: dropout cannot be nan"),
        ({"lora": {"targets": ["c_atn"]}}, "lora: unknown lora target 'c_atn'"),
        ({"lora": {"rank": 2}}, "base must name"), ({"files": None}, "files must be dict, is None"),
        ({"files": {}}, r"files \[\]"),
        ({"files": {"model.safetensors": 3}}, "model.safetensors: has"),
        ({"files": {"model.safetensors": {}, "../x": {}}}, "files .*'../x'"),
        ("", "checkpoint.json"), ("[]", "checkpoint.json"), ("[" * 100_000, "checkpoint.json"),
        ('{"a":' * 900 + "1" + "}" * 900, "checkpoint.json"), ("\xff", "checkpoint.json"),
        ('{"step": ' + "9" * 5000 + "}", "checkpoint.json"),
    ],
)  # fmt: skip
def test_descriptions_that_are_wrong(tiny, tmp_path, changes, words):
    path = save(tmp_path, 1, GPT(tiny, "torch"))
    if isinstance(changes, dict):
        rewrite(path, read(path) | changes)
    else:
        (path / "checkpoint.json").write_bytes(changes.encode("latin1"))
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path)


@pytest.mark.parametrize("file", [checkpoint.MODEL, checkpoint.OPTIMIZER])
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x[:, :1].contiguous(), " has shape .128, 1.* must have .128, 32."),
        (lambda x: torch.zeros(()), " has shape .., dtype F32, must have"),
        (lambda x: x.half(), " has shape .* dtype F16, must have .* F32"),
        (lambda x: x.long(), " has shape .* dtype I64"),
        (lambda x: x * float("nan"), " holds values that are not finite"), (None, "'., unknown"),
    ],
)  # fmt: skip
def test_tensors_that_are_wrong(tiny, tmp_path, file, change, words):
    model, optimizer = trained(tiny)
    path = save(tmp_path, 1, model, optimizer)
    name = FC if file == checkpoint.MODEL else f"{FC}/exp_avg"

    def spoil(tensors):
        value = tensors.pop(name)
        return tensors | ({"x": value} if change is None else {name: change(value)})

    rewrite_tensors(path, file, spoil)
    with pytest.raises(ValueError, match=f"{file}: .*{name}{words}"):
        load_training_state(read_checkpoint(path), model, optimizer)
    if file == checkpoint.MODEL:
        with pytest.raises(ValueError, match=f"{file}: .*{name}{words}"):
            load_model(tmp_path)


def test_what_is_not_finite_is_not_written(tiny, tmp_path):
    model, optimizer = trained(tiny)
    save(tmp_path, 1, model, optimizer)
    model.transformer.h[0].mlp.c_fc.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=f"step 2 is not saved: {FC} holds .* not finite"):
        save(tmp_path, 2, model, optimizer)
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_a_checkpoint_that_does_not_fit(tiny, tmp_path):
    model, optimizer = trained(tiny)
    path = save(tmp_path, 1, model)
    with pytest.raises(ValueError, match="no optimizer state"):
        load_training_state(read_checkpoint(path), model, optimizer)
    with pytest.raises(ValueError, match=r"another model: n_layer 2 \(here 3\)"):
        load_training_state(read_checkpoint(path), GPT(replace(tiny, n_layer=3), "torch"))
    load_training_state(read_checkpoint(path), GPT(replace(tiny, dropout=0.1), "torch"))


def test_a_reader_goes_on_to_the_newer_one(tiny, tmp_path, monkeypatch):
    """Where a run deletes the checkpoint that is being read."""
    model, other, real = GPT(tiny, "torch"), GPT(tiny, "torch"), checkpoint.verify
    save(tmp_path, 1, model)

    def verify(*args):
        if not (tmp_path / "checkpoints/step_00000002").exists():
            save(tmp_path, 2, other, keep_last=1)
        real(*args)

    monkeypatch.setattr(checkpoint, "verify", verify)
    idx = torch.randint(0, 65, (1, 9))
    assert torch.equal(load_model(tmp_path, kernels="torch")(idx), other(idx))


def test_what_is_no_model(tmp_path, monkeypatch):
    """Is named, and never looked for on the hub where it can only be a path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    (tmp_path / "runs").mkdir()
    words = {"runs": "not a model: .*checkpoint.json"}
    for name in ("runs/gpt", "./x", "/x/y/z", tmp_path / "x", "runs"):
        for load in (load_model, checkpoint.load_tokenizer, checkpoint.load_chat_template):
            with pytest.raises(OSError, match=words.get(name, "no such folder")):
                load(name)


def test_adapters_that_are_their_own_base(tiny, tmp_path):
    save(tmp_path, 1, GPT(tiny, "torch"))
    base = {"path": str(tmp_path), "xxh3_128": "x"}
    save(tmp_path, 2, add_lora(GPT(tiny, "torch"), LoRAConfig(2), base))
    with pytest.raises(ValueError, match="name themselves as their base"):
        load_model(tmp_path)
