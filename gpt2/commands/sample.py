r"""Continues prompts with a trained model, all of them as one batch.

    gpt2-triton sample runs/shakespeare_char --prompt "ROMEO:" "First Citizen:"
    gpt2-triton sample gpt2-medium --prompt "Once upon a time" --top_p 0.9 --num_samples 3
    gpt2-triton sample runs/mine --prompt_file prompts.txt --stop "\n\n" --temperature 0

A name such as gpt2-medium is downloaded from Hugging Face. The first row is written to the terminal
as it grows, the others when they are done. Text longer than the model's context goes on from the
later half of the context, again and again. A model that was fine-tuned on conversations gets each
prompt as a question in its template. In --stop, \n is a new line.
"""

import sys
import time

from gpt2.cli import parse, printable, starting
from gpt2.options import SampleConfig
from gpt2.text import RowTexts, read_prompts


def main() -> None:
    with starting():
        config = parse(SampleConfig, __doc__)
        from gpt2.assistant import load_assistant
    prompts = read_prompts(config.prompt_file) if config.prompt_file else list(config.prompt)
    assistant = load_assistant(
        config.model, device=config.device, kernels=config.kernels, dtype=config.dtype,
        template=config.template,
    )  # fmt: skip
    gap = "" if assistant.template is None else "\n"
    encoded = [assistant.encode(prompt) for prompt in prompts]
    _ = assistant.model  # loads it before anything is printed

    def show(row: int, text: str) -> None:
        if row == 0:
            print(printable(text), end="", flush=True)

    texts = RowTexts(assistant.tokenizer, [s.replace("\\n", "\n") for s in config.stop], show)
    print(printable(prompts[0]), end=gap, flush=True)
    start = time.perf_counter()
    rows = assistant.complete(
        encoded, max_new_tokens=config.max_new_tokens, sampling=config, seed=config.seed,
        num_samples=config.num_samples, stop=texts, window=True,
        log_probabilities=config.log_probabilities,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    texts.finish()
    print()
    for number, text in enumerate(texts.texts(len(rows))[1:], 1):
        prompt = prompts[number // config.num_samples]
        print(f"{'-' * 40}\n{printable(prompt)}{gap}{printable(text)}")
    for number, row in enumerate(rows if config.log_probabilities else ()):
        total, n = sum(row.log_probabilities), len(row.tokens)
        words = f"{n} tokens, log probability {total:.2f}, {total / max(n, 1):.3f} a token"
        print(f"row {number}: {words}", file=sys.stderr)
    made = sum(len(row.tokens) for row in rows)
    print(f"{made} tokens, {made / seconds:,.1f} tokens/s", file=sys.stderr)
