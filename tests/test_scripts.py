"""The command lines, run as a user runs them (in this process, to save the imports)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.cli import run_script
from gpt2.data import find_shards, open_shards, write_shard
from gpt2.data.prepare import prepare
from gpt2.options import PrepareConfig
from gpt2.tokenizer import ByteTokenizer
from gpt2.train.pretrain import pretrain

from .test_sft import save_base

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def script(capfd, monkeypatch):
    """Runs a script by name; returns its exit status, stdout and stderr."""

    def run(name: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        status = 0
        try:
            run_script(module.main)
        except SystemExit as error:
            status = error.code or 0
        return status, *capfd.readouterr()

    return run


def one_line_error(result) -> str:
    status, _, err = result
    assert status == 1, result
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


TRAIN = (
    "--warmup_steps", 0, "--tokens_per_step", 128, "--micro_batch_size", 2, "--eval_every", 0,
    "--device", "cpu",
)  # fmt: skip


def test_memory_that_is_not_there_is_one_line_and_a_fault_of_ours_is_not(capsys):
    with pytest.raises(SystemExit):
        run_script(lambda: torch.empty(1 << 60))
    found = capsys.readouterr().err
    assert found.startswith("error: out of memory (") and found.count("\n") == 1
    with pytest.raises(RuntimeError, match="shapes"):
        run_script(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


def test_own_text_in_three_lines(script, tmp_path):
    """The README's way from a text file to a sample, for each tokenizer, and to an export."""
    text = (SCRIPTS.parent / "LICENSE").read_text() * 5
    (tmp_path / "mine.txt").write_text(text)
    for kind in ("byte", "char", "gpt2"):
        data, run = tmp_path / kind, tmp_path / "runs" / kind
        prepare = "--text", tmp_path / "mine.txt", "--tokenizer", kind, "--out", data
        status, out, _ = script("prepare_data", *prepare)
        assert status == 0 and f"{kind} tokenizer" in out
        assert script("prepare_data", *prepare)[0] == 0  # again: there is nothing to do
        status, out, err = script(
            "train_gpt2", "char", "--data", data, "--run_name", kind, "--out_dir", run.parent,
            "--max_steps", 3, *TRAIN,
        )  # fmt: skip
        assert status == 0, err
        assert "done: 3 steps" in out
        sample = "--prompt", "MIT", "a", "--max_new_tokens", 8, "--device", "cpu"
        status, out, err = script("sample", run, *sample)
        assert status == 0, err
        assert "\nMIT" in f"\n{out}" and "-----\na" in out
    status, _, err = script("export", run, "--out", tmp_path / "hf")
    assert status == 0 and (tmp_path / "hf" / "merges.txt").exists(), err
    status, out, _ = script("sample", tmp_path / "hf", *sample)
    assert status == 0 and out.startswith("MIT")
    assert "exists" in one_line_error(script("export", run, "--out", tmp_path / "hf"))


def test_shakespeare_is_nanogpts_split(shakespeare, tmp_path):
    bpe = prepare(PrepareConfig(name="shakespeare", out=str(tmp_path / "bpe")))
    counts = [open_shards(find_shards(folder, split))[0].n_tokens
              for folder in (shakespeare, bpe) for split in ("train", "val")]  # fmt: skip
    assert counts == [1_003_854, 111_540, 301_966, 36_059]


def test_folder_of_texts_is_separated_by_end_of_text(script, tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("aaaaaaaaaa")
    (tmp_path / "texts" / "deep" / "b.txt").write_text("bbbbbbbbbb")
    options = ("--tokenizer", "byte", "--shard_tokens", 8, "--out", tmp_path / "out")
    status, _, err = script("prepare_data", "--text", tmp_path / "texts", *options)
    assert status == 0, err
    train = [s.tokens().tolist() for s in open_shards(find_shards(tmp_path / "out", "train"))]
    assert sum(train, []) == [256] + [97] * 9 + [256] + [98] * 9
    assert [len(t) for t in train] == [8, 8, 4]


def test_prepare_data_errors(script, tmp_path):
    assert "did you mean 'shakespeare'" in one_line_error(script("prepare_data", "shakespear"))
    assert "give either the NAME" in one_line_error(script("prepare_data"))
    missing = script("prepare_data", "--text", tmp_path / "no.txt")
    assert "no.txt: no such text file" in one_line_error(missing)


def test_sample_errors(script, tmp_path, train_config):
    pretrain(train_config)
    run = Path(train_config.out_dir) / "run"
    long = script("sample", run, "--prompt", "a" * 40)
    assert "prompt of 40 tokens leaves no room" in one_line_error(long)
    unknown = script("sample", run, "--prompt", "\N{SNOWMAN}")
    assert "does not occur in the text" in one_line_error(unknown)
    assert "at least one token" in one_line_error(script("sample", run, "--prompt", ""))
    assert "no such folder" in one_line_error(script("sample", tmp_path / "nowhere"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("triton_kernels.attention"), "INTERPRETED", False)
        triton = script("sample", run, "--kernels", "triton", "--device", "cpu")
    assert "'triton' cannot run: the Triton kernels need a CUDA GPU" in one_line_error(triton)


def test_show_batch_prints_what_a_rank_saw(script, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    texts = [f"document {i:02} says hello.".encode() for i in range(30)]
    tokens = [token for text in texts for token in [ByteTokenizer.eot, *text]]
    write_shard(data / "train_000000.bin", np.array(tokens))
    (data / "manifest.json").write_text(json.dumps({"tokenizer": {"name": "byte"}}))
    (tmp_path / "config.yaml").write_text(
        f"preset: char\ndata: {data}\nblock_size: 64\ntokens_per_step: 256\n"
    )
    status, out, err = script(
        "show_batch", tmp_path, "--step", "2", "--rank", "1", "--world_size", "2", "--rows", "1"
    )
    assert status == 0, err
    assert "step 2 row 2 tokens 0-" in out and "1 more rows of rank 1: --rows 2" in out
    # Every document that begins in the row bears the number that its text says.
    shown = [part.split("\n", 1) for part in out.split("== ")[1:-1]]
    whole = [
        (header, text) for header, text in shown if len(text) > 25 and "tokens 0-" not in header
    ]
    assert whole
    for header, text in whole:
        number = int(header.rsplit(" ", 1)[1])
        assert text.startswith(f"<|endoftext|>document {number - 1:02}") and str(data) in header
    missing = one_line_error(script("show_batch", tmp_path / "nowhere"))
    assert "nowhere: No such file" in missing


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_without_login_and_offline(tmp_path, shakespeare, mode):
    """In a process of its own: wandb remembers its first settings."""
    words = (
        SCRIPTS / "train_gpt2.py", "char", "--data", shakespeare, "--out_dir", tmp_path / "runs",
        "--max_steps", 2, "--wandb_project", "test", *TRAIN,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True,
        env={"PATH": "", "HOME": str(tmp_path), "WANDB_MODE": mode}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if mode == "offline":
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / "runs" / "gpt2" / "wandb").glob("offline-run-*/*.wandb"))
    else:
        assert done.returncode == 1
        assert "error: W&B cannot start" in done.stderr and "wandb login" in done.stderr


@pytest.mark.parametrize(
    "name",
    ["chat", "compare", "dpo", "evaluate", "export", "report", "sample", "sft", "train_gpt2"],
)
def test_help_comes_without_torch(name):
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules));"
        f"sys.argv[1:] = ['--help']; runpy.run_path('{SCRIPTS / name}.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
    assert "--gpu-hour-price" in done.stdout or name != "report"


def test_fine_tuning_and_a_look_at_its_rows(script, tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}."} for i in range(9)]
    rows[4] = {"question": "say <|user|>", "answer": "no"}
    data = tmp_path / "qa.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (
        save_base(tmp_path / "base"), "--data", data, "--out_dir", tmp_path / "runs", "--max_steps",
        2, *TRAIN, "--tokens_per_step", 192,
    )  # fmt: skip
    error = one_line_error(script("sft", *options))
    assert "line 5: message 1 (user) holds the template's marker '<|user|>'" in error
    assert not (tmp_path / "runs").exists()
    status, out, err = script("sft", *options, "--bad_rows", "skip")
    assert status == 0, err
    assert f"{data}: left out 1: template marker in text, first {data}: line 5: message" in out
    assert "done: 2 steps" in out
    status, out, err = script("show_batch", tmp_path / "runs" / "sft", "--step", 1)
    assert status == 0, err
    assert (
        f"{data}: line 3, token 0, document 3\n<|user|>\n2 + 1?\n<|assistant|>\n[[It is 3." in out
    )
    assert out.count("<|endoftext|>]]\n") == out.count("<|user|>") >= 2
