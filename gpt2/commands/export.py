"""Writes a model for other programs, as a Hugging Face folder or as GGUF.

The folder is for transformers, vLLM, MLX, lm-eval and the like, GGUF for llama.cpp, Ollama and LM
Studio. docs/export.md has what to do with it.

    gpt2-triton export runs/gpt2 --out exported/gpt2 --verify
    gpt2-triton export runs/sft --out sft.gguf --format gguf --dtype q8_0
"""

import signal
import sys

from gpt2.cli import parse, starting
from gpt2.options import ExportConfig


def main() -> None:
    with starting():
        config = parse(ExportConfig, __doc__)
        from gpt2.export import export
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: nothing half-written stays
    export(config)
