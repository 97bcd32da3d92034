"""Writes a model as a Hugging Face folder, for transformers, vLLM, MLX, lm-eval and the like, or as
GGUF, for llama.cpp, Ollama and LM Studio. docs/export.md has what to do with it.

    python scripts/export.py runs/gpt2 --out exported/gpt2 --verify
    python scripts/export.py runs/sft --out sft.gguf --format gguf --dtype q8_0
"""

import signal
import sys

from gpt2.cli import parse, run_script, starting
from gpt2.options import ExportConfig


def main() -> None:
    with starting():
        config = parse(ExportConfig, __doc__)
        from gpt2.export import export
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: nothing half-written stays
    export(config)


if __name__ == "__main__":
    run_script(main)
