"""Fine-tuning runs: it learns to answer and to stop, resumes, and is the same on two ranks."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gpt2.checkpoint import load_chat_template, load_model, read_checkpoint, save_checkpoint
from gpt2.cli import parse
from gpt2.config import GPTConfig, SFTConfig, TrainConfig
from gpt2.data.chat import encode_prompt
from gpt2.generate import generate
from gpt2.model import GPT
from gpt2.tokenizer import ByteTokenizer
from gpt2.train.finetune import finetune

from .conftest import command_line, losses, write_rows
from .test_trainer import interrupted_at

ROOT = Path(__file__).parent.parent
ANSWERS = {"Hi": "Hello!", "Who?": "A model.", "2 + 2?": "It is 4.", "Bye": "See you\nsoon."}


def save_base(folder: Path, tokenizer=None, template=None, seed=0, **shape) -> str:
    """A model that knows nothing, as a checkpoint of step 0."""
    tokenizer = tokenizer or ByteTokenizer()
    shape = dict(n_layer=2, n_head=2, n_embd=32, block_size=96) | shape
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**shape, vocab_size=tokenizer.vocab_size), "torch")
    options = dict(tokenizer=tokenizer.to_dict(), train=asdict(TrainConfig()))
    save_checkpoint(folder, 0, model, chat_template=template, **options)
    return str(folder)


@pytest.fixture
def config(tmp_path) -> SFTConfig:
    """A run of a second: 40 conversations in 20 rows, 2 rows a step."""
    rows = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}."} for i in range(40)]
    return SFTConfig(
        init_from=save_base(tmp_path / "base"), data=write_rows(tmp_path / "qa.jsonl", rows),
        val_fraction=0.2, tokens_per_step=192, micro_batch_size=1, max_steps=6, lr=1e-3,
        eval_every=3, save_every=3, log_every=1, run_name="run", out_dir=str(tmp_path / "runs"),
        device="cpu",
    )  # fmt: skip


def run_of(config) -> Path:
    return Path(config.out_dir) / config.run_name


def test_learns_its_answers_and_where_they_end(config, tmp_path):
    rows = [{"prompt": q, "completion": a} for q, a in ANSWERS.items()]
    config = replace(
        config, init_from=save_base(tmp_path / "wide", n_embd=64), max_steps=120, lr=1e-2,
        data=write_rows(tmp_path / "four.jsonl", rows), eval_every=0, save_every=0,
        tokens_per_step=192, micro_batch_size=2,
    )  # fmt: skip
    finetune(config)
    assert losses(run_of(config))[-1] < 0.05
    model, tokenizer = load_model(run_of(config), kernels="torch"), ByteTokenizer()
    template = load_chat_template(run_of(config))
    assert template == "user_assistant"
    prompts = [
        encode_prompt([{"role": "user", "content": question}], tokenizer, template)
        for question in ANSWERS
    ]
    found = generate(model, prompts, max_new_tokens=40, temperature=0, stop_tokens=[tokenizer.eot])
    assert [tokenizer.decode(row) for row in found] == list(ANSWERS.values())
    # They end by their own end of text, not by the room that was left.
    assert max(map(len, found)) < 40


def test_steps_are_as_many_as_epochs_need(config, capsys):
    config = replace(config, max_steps=0, epochs=2.0, warmup_steps=1)
    finetune(config)
    out = capsys.readouterr().out
    train = next(line for line in out.splitlines() if line.startswith("train: "))
    n_rows = int(train.split(" conversations in ")[1].split()[0])
    assert "packed rows of 96" in train and "filled" in train
    assert f"{n_rows:,} steps, {n_rows * 192:,} tokens, 2.00 epochs" in out
    saved = parse(SFTConfig, "", [str(run_of(config) / "config.yaml")])
    assert saved.max_steps == n_rows == read_checkpoint(run_of(config)).step
    assert len(losses(run_of(config), "val/loss")) == 2 + (n_rows - 1) // 3  # before step 0, too
    finetune(replace(config, resume="auto"))
    out = capsys.readouterr().out
    assert f"resumed               from step {n_rows}" in out and "changed since" not in out


def test_the_template_is_saved_and_val_data_is_its_own(config, tmp_path, capsys):
    start, before = save_base(tmp_path / "long", block_size=256), None
    assert load_chat_template(start) is None and load_chat_template("gpt2") is None
    val = write_rows(tmp_path / "val.jsonl", [{"question": "5 + 5?", "answer": "It is 10."}])
    config = replace(config, tokens_per_step=512, max_steps=1, val_data=val)
    for template in ("user_assistant", "alpaca"):
        run = replace(config, template=template, init_from=start, run_name=template)
        finetune(run)
        start = str(run_of(run))
        assert len(losses(run_of(run), "val/loss")) == 2  # before and after the step
        assert load_chat_template(start) == read_checkpoint(start).chat_template == template
        out = capsys.readouterr().out
        assert "train: 40 conversations" in out and "val: 1 conversations in 1 packed rows" in out
        assert f"was trained with {before}" in out
        before = template


def test_all_of_the_data_may_be_for_training(config, capsys):
    finetune(replace(config, val_fraction=0.0))
    out = capsys.readouterr().out
    assert "val_fraction 0 leaves none of" in out and "so nothing is validated" in out
    assert "train: 40 conversations" in out and losses(run_of(config), "val/loss") == []


def same_as_whole(config, file="model.safetensors") -> Path:
    """Interrupted in its fifth step and resumed, a run gives the bits of one that was not."""
    whole, cut = (replace(config, run_name=name) for name in ("whole", "cut"))
    finetune(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2.train.trainer.Trainer.train_step", interrupted_at(4))
        with pytest.raises(KeyboardInterrupt):
            finetune(cut)
    finetune(replace(cut, resume="auto"))
    ends = [run_of(c) / "checkpoints" / "step_00000006" / file for c in (whole, cut)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    for key in ("train/loss", "val/loss"):
        assert losses(run_of(whole), key) == losses(run_of(cut), key)
    return run_of(whole)


def same_on_two_ranks(script, config, port, keys, rel) -> str:
    finetune(replace(config, run_name="one"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-port", str(port), str(ROOT / "scripts" / script),
        *command_line(replace(config, run_name="two")),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (Path(config.out_dir) / name for name in ("one", "two"))
    for key in keys:
        assert losses(two, key) == pytest.approx(losses(one, key), rel=rel, abs=1e-6), key
    return done.stdout


def test_resume_continues_bit_for_bit(config):
    same_as_whole(replace(config, dropout=0.2))


@pytest.mark.ddp
def test_two_ranks_give_the_losses_of_one(config, free_port):
    """Rows with different numbers of targets on each rank: the mean is over all of them."""
    keys = ("train/loss", "val/loss")
    printed = same_on_two_ranks("sft.py", config, free_port, keys, rel=1e-5)
    assert "2 ranks x 1 micro steps x 1 rows x 96" in printed
    assert printed.count("train: ") == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(init_from=""), "fine-tuning starts from a model"),
        (dict(init_from="nowhere/at/all"), "no such folder"),
        (dict(data="nowhere.jsonl"), "known data set"),
        (dict(val_data="nowhere.jsonl"), "known data set"),
        (dict(block_size=97), "longer than the context"),
        (dict(val_fraction=1.0), r"val_fraction must lie in \[0, 1\)"),
        (dict(epochs=0.0), "epochs must be above 0"),
        (dict(val_data="x.jsonl", eval_every=0), "is for validation, but eval_every is 0"),
        (dict(max_conversations=0), "max_conversations must be at least 1"),
        (dict(max_steps=0, epochs=0.1, warmup_steps=9), "warmup_steps 9 must not be above max_st"),
        (dict(preset="char"), "the shape comes from init_from"),
        (dict(doc_mask=True), "never see each other"),
    ],
)
def test_bad_input_ends_before_anything_is_written(config, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        finetune(replace(config, **changes))
    assert not Path(config.out_dir).exists()
