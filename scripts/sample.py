"""Continues prompts with a trained model, all of them as one batch.

    python scripts/sample.py runs/shakespeare_char --prompt "ROMEO:" "First Citizen:"
    python scripts/sample.py gpt2-medium --prompt "Once upon a time" --top_p 0.9

A name such as gpt2-medium is downloaded from Hugging Face. The first prompt is written to the
terminal as it grows, the others when they are done. Text longer than the model's context goes on
from the later half of the context, again and again.
"""

import codecs
import sys

from gpt2.checkpoint import load_model, load_tokenizer
from gpt2.cli import parse, run_script
from gpt2.config import SampleConfig
from gpt2.generate import generate
from gpt2.train.distributed import select_device


def main() -> None:
    config = parse(SampleConfig, __doc__)
    device = select_device(config.device)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, device, config.kernels)
    prompts = [tokenizer.encode(p, allow_special=True) for p in config.prompt]
    # A token may be part of a character only; the decoder waits for the rest.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(row: int, token: int) -> None:
        if row == 0:
            sys.stdout.write(decoder.decode(tokenizer.decode_bytes([token])))
            sys.stdout.flush()

    print(config.prompt[0], end="", flush=True)
    rows = generate(
        model,
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_tokens=() if tokenizer.eot is None else (tokenizer.eot,),
        window=True,
        seed=config.seed,
        stream=show,
    )
    print()
    for prompt, row in zip(config.prompt[1:], rows[1:], strict=True):
        print(f"{'-' * 40}\n{prompt}{tokenizer.decode(row)}")


if __name__ == "__main__":
    run_script(main)
