"""Runs of DPO and of adapters: they learn, resume, are the same on two ranks, and load anywhere."""

import math
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from gpt2.checkpoint import load_chat_template, load_model, read_checkpoint, save_checkpoint
from gpt2.config import DPOConfig, LoRAConfig
from gpt2.hf import export_hf
from gpt2.lora import TENSORS, add_lora, save_adapters, weights_hash
from gpt2.options import VerifyConfig
from gpt2.train.finetune import finetune
from gpt2.train.verify import verify_run

from .conftest import losses, write_rows
from .test_sft import ROOT, run_of, same_as_whole, same_on_two_ranks, save_base

LORA = dict(lora_rank=4, lora_alpha=8.0, lora_dropout=0.1)
MUON = dict(optimizer="muon")


def save_start(run: Path, template="user_assistant", **shape) -> str:
    return save_base(run, template=template, **dict(block_size=64) | shape)


@pytest.fixture
def config(tmp_path) -> DPOConfig:
    """A run of a second: the answer that repeats the question is preferred to its reverse."""
    words = [f"{i:03}" for i in range(60)]
    rows = [{"prompt": w, "chosen": f"yes {w}", "rejected": f"no {w[::-1]}"} for w in words]
    return DPOConfig(
        init_from=save_start(tmp_path / "runs" / "base"), val_fraction=0.2,
        data=write_rows(tmp_path / "pairs.jsonl", rows),
        tokens_per_step=1024, micro_batch_size=2, max_steps=6, lr=3e-3, eval_every=3, save_every=3,
        log_every=1, run_name="run", out_dir=str(tmp_path / "runs"), device="cpu",
    )  # fmt: skip


def weights(run: Path, step: int, file=TENSORS) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / file)


@pytest.mark.parametrize("options", [{}, LORA, {"loss_type": "ipo"}], ids=["full", "lora", "ipo"])
def test_starts_where_it_must_and_the_margin_grows(config, options, capsys):
    config = replace(config, max_steps=16, eval_every=8, save_every=0, **options)
    finetune(config)
    run = run_of(config)
    first = 25.0 if options.get("loss_type") == "ipo" else math.log(2)  # (0 - 1 / (2 beta))^2
    assert losses(run)[0] == pytest.approx(first, abs=1e-4)
    margins = losses(run, "train/reward_margin")
    assert abs(margins[0]) < 1e-4 and margins[-1] > margins[4] > 0.01
    for split in ("train", "val"):
        gap, chosen, rejected = (
            losses(run, f"{split}/reward_{name}") for name in ("margin", "chosen", "rejected")
        )
        assert gap == pytest.approx(
            [c - r for c, r in zip(chosen, rejected, strict=True)], abs=1e-5
        )
    assert losses(run, "val/reward_accuracy")[-1] > 0.9
    assert losses(run, "val/loss")[-1] < 0.9 * first
    assert load_chat_template(run) == "user_assistant"
    printed = capsys.readouterr().out
    assert "reward_margin" in printed and "pairs in rows of 2 x 64" in printed
    assert ("parameters are trained: rank 4, scale 2" in printed) == (options is LORA)


@pytest.mark.parametrize("options", [LORA, {}, LORA | MUON], ids=["lora", "full", "lora muon"])
def test_resume_continues_bit_for_bit(config, options):
    """With the reference of the start, not of the checkpoint, and with the adapters' dropout."""
    file = TENSORS if options else "model.safetensors"
    whole = same_as_whole(replace(config, **options), file)
    assert verify_run(VerifyConfig(str(whole)))


@pytest.mark.ddp
@pytest.mark.parametrize(
    "options",
    [
        LORA | {"lora_dropout": 0.0},
        pytest.param(LORA | {"lora_dropout": 0.0, "sharding": "full"}, marks=pytest.mark.slow),
        pytest.param(LORA | {"lora_dropout": 0.0, "sharding": "optimizer"}, marks=pytest.mark.slow),
        LORA | MUON | {"lora_dropout": 0.0, "sharding": "full"},
        pytest.param({"sharding": "full"}, marks=pytest.mark.slow),
    ],
    ids=["lora", "lora full", "lora optimizer", "lora muon full", "full"],
)
def test_two_ranks_give_the_losses_of_one(config, free_port, options):
    """Adapters, their switch and a batch trimmed differently on each rank."""
    keys = ("train/loss", "train/reward_margin", "val/loss", "val/reward_accuracy")
    config = replace(config, **options)
    printed = same_on_two_ranks("dpo.py", config, free_port, keys, rel=1e-4)
    assert "2 ranks x 2 micro steps x 2 rows x 128" in printed


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(config, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend="aot_eager"))
    config = replace(config, max_steps=3, save_every=0, **LORA | {"lora_dropout": 0.0})
    finetune(replace(config, run_name="eager"))
    finetune(replace(config, run_name="compiled", compile="on"))
    eager, compiled = (losses(Path(config.out_dir) / name) for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's use
def test_a_checkpoint_of_adapters(config, tmp_path):
    """Holds only them; load_model merges them in, and peft loads the folder as it is."""
    finetune(replace(config, **LORA))
    run, base = run_of(config), load_model(config.init_from, kernels="torch")
    folder = run / "checkpoints" / "step_00000006"
    names = {"adapter_config.json", TENSORS, "optimizer.safetensors"}
    assert {path.name for path in folder.iterdir()} == names | {"checkpoint.json"}
    assert read_checkpoint(run).files.keys() == names
    assert read_checkpoint(run).base["xxh3_128"] == weights_hash(base)
    moments = weights(run, 6, "optimizer.safetensors")
    assert len(moments) == 3 * len(weights(run, 6)) == 3 * 2 * 4 * 2
    assert all(".lora_" in name for name in moments)
    merged = load_model(run, kernels="torch")
    assert all(p.requires_grad for p in merged.parameters())

    export_hf(base, tmp_path / "base_hf")
    theirs = peft.PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(tmp_path / "base_hf"), folder
    )
    idx = torch.randint(0, 257, (2, 30))
    expected = theirs(idx).logits
    assert_close(merged(idx), expected, rtol=1e-4, atol=1e-5)
    assert (base(idx) - expected).abs().max() > 1e-3

    # Adapters go onto what was itself made with adapters; a new run starts from the sum.
    second = replace(config, init_from=str(run), run_name="second", **LORA)
    finetune(second)
    assert losses(run_of(second))[0] == pytest.approx(math.log(2), abs=1e-6)
    before = load_model(run_of(second), kernels="torch")(idx)
    # The runs may lie elsewhere, if they lie there together.
    shutil.move(config.out_dir, tmp_path / "moved")
    base_path = read_checkpoint(tmp_path / "moved" / "second").base["path"]
    assert base_path.endswith("runs/run/checkpoints/step_00000006")
    with pytest.raises(OSError, match="neither here nor in a folder above"):
        load_model(tmp_path / "moved" / "second")
    (tmp_path / "moved").rename(config.out_dir)
    assert torch.equal(load_model(run_of(second), kernels="torch")(idx), before)


def test_adapters_for_another_model(config, tmp_path):
    finetune(replace(config, **LORA))
    shutil.rmtree(config.init_from)
    save_start(Path(config.init_from), seed=1)
    with pytest.raises(ValueError, match="adapters for another model.*runs/base.*hash.*has"):
        load_model(run_of(config))
    shutil.rmtree(config.init_from)
    with pytest.raises(OSError, match="runs/base.*neither here nor"):
        load_model(run_of(config))


def test_other_adapters_on_resume(config):
    finetune(replace(config, **LORA))
    resumed = replace(config, resume="auto", max_steps=8)
    with pytest.raises(ValueError, match="holds another model: lora_rank 4 .here None."):
        finetune(resumed)
    with pytest.raises(ValueError, match="holds another model: lora_rank 4 .here 2."):
        finetune(replace(resumed, lora_rank=2))


def test_a_folder_of_peft_loads_as_a_model(config, tmp_path):
    model = add_lora(load_model(config.init_from, kernels="torch"), LoRAConfig(2))
    torch.nn.init.normal_(model.transformer.h[0].attn.c_attn.lora_B.weight)
    save_adapters(model, tmp_path / "adapters", config.init_from)
    idx = torch.randint(0, 257, (1, 20))
    loaded = load_model(tmp_path / "adapters", kernels="torch")
    assert_close(loaded(idx), model(idx), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"dropout": 0.1}, "dropout 0.1: DPO compares"),
        ({"lora_rank": -1}, "lora_rank must not be negative"),
        ({"lora_dropout": 0.1}, "lora_dropout goes with adapters"),
        ({"tokens_per_step": 1000}, "use --tokens_per_step 768 or 1024"),
        ({"data": "alpaca"}, "no such file or folder: 'alpaca'"),
    ],
)
def test_bad_input_ends_before_anything_is_written(config, changes, words):
    with pytest.raises((ValueError, OSError), match=words):
        finetune(replace(config, **changes))
    assert not run_of(config).exists()


def test_the_template_of_the_start_is_used_unless_told_otherwise(config, tmp_path, capsys):
    alpaca = save_start(tmp_path / "alpaca", template="alpaca", block_size=256)
    config = replace(config, init_from=alpaca, tokens_per_step=2048, max_steps=1)
    finetune(config)
    assert read_checkpoint(run_of(config)).chat_template == "alpaca"
    assert "was trained with" not in capsys.readouterr().out
    told = replace(config, run_name="told", template="user_assistant")
    finetune(told)
    assert "template user_assistant; " in (out := capsys.readouterr().out)
    assert "was trained with alpaca" in out
    assert load_chat_template(run_of(told)) == "user_assistant"


def test_show_batch_shows_pairs_and_what_a_rollback_skipped(config, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"{i}\x1b[2J", "chosen": f"yes {i}", "rejected": f"no {i}"}
            for i in range(40)]  # fmt: skip
    config = replace(config, data=write_rows(tmp_path / "40.jsonl", rows), max_steps=1)
    finetune(config)
    run = run_of(config)

    def show(step: int) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["show_batch", str(run), "--step", str(step), "--rows=1"])
        runpy.run_path(str(ROOT / "scripts" / "show_batch.py"), run_name="__main__")
        return capsys.readouterr().out

    shown = show(0)
    number = shown.split("<|user|>\n")[1].split("\\x1b")[0]
    assert "\x1b" not in shown and "7 more rows" in shown
    for half, word in (("chosen", "yes"), ("rejected", "no")):
        text = f"<|user|>\n{number}\\x1b[2J\n<|assistant|>\n[[{word} {number}<|endoftext|>]]"
        assert f"line {int(number) + 1} {half}, token 0, document " in shown and text in shown
    later = show(4).replace("step 4", "step 3")
    model, tokenizer = load_model(run, kernels="torch"), read_checkpoint(run).tokenizer
    save_checkpoint(run, 3, model, tokenizer=tokenizer, train={}, state={"offset": 8})
    assert show(3) == f"== data offset 8 samples (by the checkpoints 8 at step 3)\n{later}"
    assert "offset 8 samples (by the checkpoints 0 at step 1, 8 at step 3)" in show(2)
    assert show(0) == shown
