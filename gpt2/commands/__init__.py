"""The command `gpt2-triton`, in a module for each of its commands.

`python -m gpt2` is the same, and so `torchrun -m gpt2 train ...`; scripts/ has a file for each.
"""

import ast
import importlib
import sys
from pathlib import Path

from gpt2 import __version__
from gpt2.cli import run_script
from gpt2.config import suggest

COMMANDS = (
    "prepare", "train", "sft", "dpo", "sample", "chat", "evaluate", "compare", "export", "report",
    "verify", "show",
)  # fmt: skip


def main() -> None:
    """Runs the command that the first word of the command line names."""
    run_script(_dispatch)


def _dispatch() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(overview())
        return
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}: {suggest(name, COMMANDS)}")
    sys.argv[:2] = [f"gpt2-triton {name}"]
    importlib.import_module(f"gpt2.commands.{name}").main()


def overview() -> str:
    """Every command with the first line of its help, read without importing it."""
    lines = [f"gpt2-triton {__version__}: trains GPT-2-class models. Commands:", ""]
    for name in COMMANDS:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        lines.append(f"  {name:10}{ast.get_docstring(ast.parse(source)).splitlines()[0]}")
    return "\n".join([*lines, "", "`gpt2-triton COMMAND --help` shows its options."])
