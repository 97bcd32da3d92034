"""Writes a model as a Hugging Face folder, for transformers, vLLM, lm-eval and the like.

    python scripts/export.py runs/gpt2 --out exported/gpt2
"""

from gpt2.cli import parse, run_script, starting
from gpt2.options import ExportConfig


def main() -> None:
    with starting():
        config = parse(ExportConfig, __doc__)
        from gpt2.checkpoint import load_model, load_tokenizer
        from gpt2.hf import export_hf
    tokenizer = load_tokenizer(config.model)
    export_hf(load_model(config.model, kernels="torch"), config.out, tokenizer)
    print(
        f"{config.out}: load it with transformers.GPT2LMHeadModel.from_pretrained({config.out!r})"
    )
    if tokenizer.name != "gpt2":
        print(f"its {tokenizer.name} tokenizer has no Hugging Face form and was left out")


if __name__ == "__main__":
    run_script(main)
