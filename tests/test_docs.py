"""Every command in README.md and docs/ is run as it stands there, on tiny data.

The pages' sh and python blocks run in order, each page in a folder of its own that holds the
library's files and, of its runs, what NEEDS says; the options of TINY make a command small. A block
under `<!-- not run: reason -->` is only parsed: by the command's own parser, by torchrun's, or
against the Makefile and setup.py.
"""

import importlib
import io
import itertools
import json
import lzma
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

import gpt2.commands
from gpt2.config import DPOConfig, SFTConfig, TrainConfig
from gpt2.options import ExportConfig, PrepareConfig

ROOT = Path(__file__).parent.parent
STEPS = "--max_steps 2 --warmup_steps 0 --micro_batch_size 2 --device cpu"
# Put behind a command's own words; the last of two equal options counts.
TINY = {
    "train": f"--n_layer 1 --n_head 2 --n_embd 32 --block_size 64 --tokens_per_step 128 {STEPS}",
    "train auto": "--max_minutes 0.02",
    "train configs/shakespeare_char.yaml": "--max_steps 12 --save_every 4 --log_every 1",
    "sft": f"--tokens_per_step 256 {STEPS}",
    "dpo": f"--tokens_per_step 512 --eval_every 0 {STEPS}",
    "sample": "--max_new_tokens 4 --device cpu",
    "chat": "--max_new_tokens 4 --device cpu",
    "compare": "--max_new_tokens 4 --device cpu",
    "evaluate": "--limit 2 --device cpu",
    "verify": "--steps 1",
}
# Words that stand for what would be fetched, or for a step that a tiny run does not reach.
WORDS = {"alpaca": "conversations.jsonl", "1200": "1"}
MODELS = ("gpt2", "gpt2-xl")  # names of the hub, here folders
# Runs that a page names and does not make.
NEEDS = {
    "evaluate.md": ["mine"], "export.md": ["mine"], "finetune.md": ["mine"],
    "generate.md": ["mine", "sft"],
}  # fmt: skip
OTHERS = {"lm_eval", "llama-server", "llama-cli", "echo"}  # of other programs


class Block(NamedTuple):
    reason: str | None  # why it is not run
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    block = r"(?:<!-- not run: (.+?) -->\n)?^```(sh|python)\n(.*?)^```$"
    return [Block(*m.groups()) for m in re.finditer(block, page.read_text(), re.M | re.S)]


PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks(p)]


class Parsed(Exception):
    """Ends a command where its work would begin."""


def run_command(words: list[str]) -> None:
    """gpt2-triton WORDS, in this process. Raises SystemExit where it fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpt2-triton", *words])
        patch.setattr(sys, "stdin", io.StringIO("Who goes there?\n"))  # of a chat
        # Of max_minutes: each look takes 10 ms.
        patch.setattr("gpt2.train.minutes.clock", partial(next, itertools.count(0, 0.01)))
        gpt2.commands.main()


def run_tiny(words: list[str]) -> None:
    words = [WORDS.get(word, word) for word in words]
    run_command(words + f"{TINY.get(words[0], '')} {TINY.get(' '.join(words[:2]), '')}".split()
                if words else words)  # fmt: skip


def check_parsed(words: list[str]) -> None:
    """A command that cannot run here, against the parsers that would read it."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words[1:])
        script, rest = options.training_script, options.training_script_args
        if options.module or options.no_python:
            assert script == ("gpt2" if options.module else "gpt2-triton")
        else:
            command = re.search(r"from gpt2\.commands\.(\w+) import", (ROOT / script).read_text())
            rest = [command[1], *rest]
        words = ["gpt2-triton", *rest]
    if words[0] != "gpt2-triton":
        check_other(words)
        return
    module = importlib.import_module(f"gpt2.commands.{words[1]}")

    def parse(*arguments, real=module.parse):
        real(*arguments)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(module, "parse", parse)
        run_command(words[1:])


def check_other(words: list[str]) -> None:
    """What a command that is not ours names of the project is there."""
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), words
        case ["pip" | ".venv/bin/pip", "install", *rest]:
            for extra in re.findall(r"^\.\[(\w+)\]$", "\n".join(rest), re.M):
                assert f'"{extra}": ' in (ROOT / "setup.py").read_text(), words
        case ["python", script, *rest]:
            source = (ROOT / script).read_text()
            assert all(f'"{word}"' in source for word in rest if word.startswith("--")), words
        case ["source", ".venv/bin/activate"] | ["python3", "-m", "venv", ".venv"]:
            pass
        case _:
            assert words[0] in OTHERS, f"neither ours nor marked as not run: {shlex.join(words)}"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Small files under the names that the pages use, and the runs and models that they name."""
    folder = tmp_path_factory.mktemp("library")
    text = (ROOT / "gpt2" / "assets" / "tiny_shakespeare.txt").read_text()[:20_000]
    documents = [{"text": part} for part in text.split("\n\n")]
    talk = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}."} for i in range(60)]
    pairs = [{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "Hardly."} for i in range(60)]
    rows = {
        "wiki_train.jsonl.xz": documents, "wiki_val.jsonl.xz": documents[:9],
        "books_train.jsonl.xz": documents, "books_val.jsonl.xz": documents[:9],
        "alpaca_data.json.xz": talk, "conversations.jsonl": talk, "preferences.jsonl": pairs,
        "alpacafarm_gpt4_prefs.jsonl.xz": pairs,
        "data/eval/hellaswag_val.jsonl": [{"ctx": "He", "endings": [*"abcd"], "label": 1}] * 4,
        "data/eval/lambada/lambada_openai.jsonl": [{"context": "It is a", "continuation": "word"}],
    }  # fmt: skip
    files = {name: "".join(f"{json.dumps(row)}\n" for row in rows[name]) for name in rows} | {
        "my_notes.txt": text, "prompts.txt": "Who goes there?\nWhat is this?\n",
        "data/eval/wikitext2/wiki.test.raw": " = A = \n It is .\n" * 40,
    }  # fmt: skip
    for name, content in files.items():
        path, data = folder / name, content.encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(data) if name.endswith("xz") else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            "prepare --text my_notes.txt --out data/mine",
            "prepare --text my_notes.txt --out data/wikitext103",
            "prepare shakespeare_char",
            "train --data data/mine --run_name mine",
            "sft runs/mine --data conversations.jsonl",
            *(f"export runs/mine --out {name}" for name in MODELS),
        ):
            run_tiny(command.split())
    return folder


@pytest.fixture
def place(library, tmp_path, monkeypatch):
    """place(page) enters the folder of a page, without what its commands make."""

    def enter(page: Path) -> None:
        made = re.findall(r"--out (\S+)", page.read_text())
        shutil.copytree(library, tmp_path, dirs_exist_ok=True, ignore=lambda at, names: [
            name for name in names if name == "runs" or f"{Path(at).name}/{name}" in made
        ])  # fmt: skip
        for run in NEEDS.get(page.name, ()):
            shutil.copytree(library / "runs" / run, tmp_path / "runs" / run)
        monkeypatch.chdir(tmp_path)

    return enter


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_page_runs(page, place, monkeypatch):
    place(page)
    monkeypatch.setenv("PYTHON", sys.executable)  # of the shell scripts
    for block in blocks(page):
        if block.language == "python":
            code = compile(block.text, str(page), "exec")
            if not block.reason:
                exec(code, {})
            continue
        for words in block.commands():
            if block.reason:
                check_parsed(words)
            elif words[0] == "gpt2-triton":
                run_tiny(words[1:])
            elif words[0].startswith("scripts/"):
                subprocess.run([ROOT / words[0], *words[1:]], check=True)
            else:
                check_other(words)


def test_what_a_block_that_is_not_run_says_is_parsed():
    for line, problem in (
        ("gpt2-triton train --no_such_option 1", SystemExit),
        ("torchrun --nproc-per-node 2 -m gpt2 train no.yaml", SystemExit),
        ("torchrun --no-such-option 2 -m gpt2 train", SystemExit),
        ("make nothing", AssertionError),
        ("python benchmarks/static.py --nothing", AssertionError),
        ("nothing", AssertionError),
    ):
        with pytest.raises(problem):
            check_parsed(line.split())


def test_the_site_builds_without_a_warning_and_its_options_are_the_codes(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    words = ["-q", "-W", "-E", "-d", tmp_path / "trees", ROOT / "docs", tmp_path / "site"]
    done = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference.html").read_text()
    for config in (TrainConfig, SFTConfig, DPOConfig, PrepareConfig, ExportConfig):
        for field in fields(config):
            assert f'<span class="pre">--{field.name}</span>' in page
    assert "Over all ranks and micro steps" in page and "19073" in page
