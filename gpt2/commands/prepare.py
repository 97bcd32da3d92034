"""Turns text into token shards.

    gpt2-triton prepare shakespeare_char             # a registered data set
    gpt2-triton prepare --text my_book.txt           # your own text, GPT-2 tokens
    gpt2-triton prepare --text notes/ --tokenizer char --out data/notes
    gpt2-triton prepare --jsonl wiki/ --field text --val wiki/val.jsonl.xz
    gpt2-triton prepare --hf roneneldan/TinyStories --split train --val validation
    gpt2-triton prepare --megatron my-gpt2_text_document
    gpt2-triton prepare --verify data/notes          # checks every byte of its shards

The same command again goes on where an interrupted one stopped, and does nothing when it is done.
"""

from gpt2.cli import parse, starting
from gpt2.options import PrepareConfig


def main() -> None:
    with starting():
        from gpt2.data.datasets import listing
        from gpt2.data.integrity import verify
        from gpt2.data.prepare import prepare

        config = parse(PrepareConfig, f"{__doc__}\nData sets:\n{listing()}")
    if not config.verify:
        prepare(config)
        return
    problems = verify(config.verify)
    print("\n".join(problems) or f"{config.verify}: every shard is as it was written")
    if problems:
        raise ValueError(f"{config.verify}: {len(problems)} problems, see above")
