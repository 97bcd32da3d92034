"""Turns text into token shards.

    python scripts/prepare_data.py shakespeare_char             # a registered data set
    python scripts/prepare_data.py --text my_book.txt           # your own text, GPT-2 tokens
    python scripts/prepare_data.py --text notes/ --tokenizer char --out data/notes
    python scripts/prepare_data.py --jsonl wiki/ --field text --val wiki/val.jsonl.xz
    python scripts/prepare_data.py --hf roneneldan/TinyStories --split train --val validation
    python scripts/prepare_data.py --megatron my-gpt2_text_document
    python scripts/prepare_data.py --verify data/notes          # checks every byte of its shards

The same command again goes on where an interrupted one stopped, and does nothing when it is done.
"""

from gpt2.cli import parse, run_script, starting
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


if __name__ == "__main__":
    run_script(main)
