"""The installed command: what lists and finds its commands, and a wheel without a checkout."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from gpt2.commands import COMMANDS

from .conftest import write_rows
from .test_scripts import SCRIPTS

ROOT = SCRIPTS.parent
RENAMED = {"prepare_data": "prepare", "train_gpt2": "train", "verify_run": "verify",
           "show_batch": "show"}  # fmt: skip


def run(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, **options)


def command(*words, **options) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "gpt2", *words, **options)


def test_alone_it_lists_every_command_on_a_line():
    done = command()
    assert done.returncode == 0 and done.stderr == ""
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:2] == "  "]
    assert [name for name, _ in lines] == [*COMMANDS]
    assert all(text.endswith(".") for _, text in lines)
    assert max(map(len, done.stdout.splitlines())) <= 100
    modules = {path.stem for path in (ROOT / "gpt2" / "commands").glob("*.py")} - {"__init__"}
    assert modules == {*COMMANDS}


def test_an_unknown_command_is_answered_with_the_nearest():
    done = command("trian")
    assert done.returncode == 1
    assert done.stderr == "error: unknown command 'trian': did you mean 'train'?\n"


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_each_script_is_the_function_of_its_command(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    name = RENAMED.get(path.stem, path.stem)
    assert name in COMMANDS
    assert script.main is importlib.import_module(f"gpt2.commands.{name}").main


def test_help_is_the_same_at_both_doors():
    ours, script = command("train", "--help"), run(sys.executable, SCRIPTS / "train_gpt2.py", "-h")
    usage, _, rest = ours.stdout.partition("\n")
    assert usage.startswith("usage: gpt2-triton train ")
    assert rest == script.stdout.partition("\n")[2] and "--micro-batch-size" in rest


def test_a_recipe_of_the_package_is_found_anywhere_and_waiting_threads_sleep(tmp_path):
    """GOMP_SPINCOUNT counts only where it is set before torch loads OpenMP."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    environment |= {"OMP_DISPLAY_ENV": "verbose"}
    for recipe in ("configs/shakespeare_char.yaml", "shakespeare_char.yaml"):
        done = command("train", recipe, cwd=tmp_path, env=environment)
        assert done.returncode == 1 and "data/shakespeare_char: no such data folder" in done.stderr
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "shakespeare_char.yaml").write_text("data: nowhere")
    done = command("train", "configs/shakespeare_char.yaml", cwd=tmp_path)
    assert "error: nowhere: no such data folder" in done.stderr
    done = command("train", "mine/shakespeare_char.yaml", cwd=tmp_path)
    assert done.stderr == "error: mine/shakespeare_char.yaml: No such file or directory\n"


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(3600)
def test_a_wheel_works_without_a_checkout(tmp_path, free_port):
    """From preparing to exporting, with the dependencies of this environment and not its gpt2."""
    source = tmp_path / "source"
    leave = shutil.ignore_patterns(".git", ".venv", "runs", "data", "build", "*.egg-info", "*.so")
    shutil.copytree(ROOT, source, symlinks=True, ignore=leave)
    shutil.copytree(ROOT / "gpt2" / "data", source / "gpt2" / "data")  # of the same name as ours
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    build = (*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path)
    done = run(*build, source)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run(sys.executable, "-m", "venv", tmp_path / "venv", check=True)
    binaries = tmp_path / "venv" / "bin"
    [site] = (tmp_path / "venv" / "lib").glob("*/site-packages")
    [wheel] = tmp_path.glob("*.whl")
    done = run(binaries / "pip", "install", "-q", "--no-deps", "--no-index", wheel, env=environment)
    assert done.returncode == 0, done.stderr
    # A path from such a file is searched last, and its own such files (an editable gpt2) are not
    # read at all.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    work = tmp_path / "work"
    work.mkdir()
    talk = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}."} for i in range(40)]
    pairs = [{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "Hardly."} for i in range(40)]
    write_rows(work / "talk.jsonl", talk)
    write_rows(work / "pairs.jsonl", pairs)
    (work / "prompts.txt").write_text("Who?\n")
    (work / "notes.txt").write_text("It was the best of times. " * 400)
    torchrun = f"torchrun --master-port {free_port} --nproc-per-node 2"
    steps = "--max_steps 2 --warmup_steps 0 --micro_batch_size 1 --eval_every 0 --device cpu"
    for line in (
        "gpt2-triton prepare shakespeare_char",
        "gpt2-triton train configs/shakespeare_char.yaml --max_steps 12 --save_every 4 "
        "--log_every 1 --warmup_steps 0 --eval_every 0 --device cpu",
        "gpt2-triton sample runs/shakespeare_char --max_new_tokens 4",
        "gpt2-triton evaluate runs/shakespeare_char --tasks val --limit 2",
        "gpt2-triton show runs/shakespeare_char --step 1",
        "gpt2-triton verify runs/shakespeare_char --steps 1",
        "gpt2-triton report runs/shakespeare_char",
        "gpt2-triton export runs/shakespeare_char --out exported --verify",
        "gpt2-triton prepare --text notes.txt --tokenizer byte --out data/notes",
        f"{torchrun} -m gpt2 train char --data data/notes --block_size 64 --run_name notes "
        f"--tokens_per_step 128 {steps}",
        f"{torchrun} --no-python gpt2-triton evaluate runs/notes --tasks val --limit 2",
        f"gpt2-triton sft runs/notes --data talk.jsonl --tokens_per_step 128 {steps}",
        f"gpt2-triton dpo runs/sft --data pairs.jsonl --tokens_per_step 256 {steps}",
        "gpt2-triton chat runs/dpo --max_new_tokens 4",
        "gpt2-triton compare --models runs/sft runs/dpo --prompts prompts.txt --max_new_tokens 4",
    ):
        print(line, flush=True)
        program, *words = line.split()
        # torchrun's first line names the environment that it was installed in, not this one.
        start = [binaries / "python", "-m", "torch.distributed.run"] if program == "torchrun" else [
            binaries / program
        ]  # fmt: skip
        words = [binaries / word if word == "gpt2-triton" else word for word in words]
        done = run(*start, *words, cwd=work, env=environment, input="Who?\n")
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    receipt = json.loads((work / "runs" / "notes" / "receipt.json").read_text())
    assert receipt["launches"][0]["world_size"] == 2
    assert Path(work / "exported" / "config.json").exists()
