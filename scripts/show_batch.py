"""`gpt2-triton show`, for a checkout and for torchrun."""

from gpt2.cli import run_script
from gpt2.commands.show import main

if __name__ == "__main__":
    run_script(main)
