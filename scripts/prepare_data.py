"""Turns text into token shards.

python scripts/prepare_data.py shakespeare_char             # a registered data set
python scripts/prepare_data.py --text my_book.txt           # your own text, GPT-2 tokens
python scripts/prepare_data.py --text notes/ --tokenizer char --out data/notes
"""

from gpt2.config import PrepareConfig, parse, run_script
from gpt2.data.datasets import DATASETS, prepare


def main() -> None:
    listing = "\n".join(f"    {n:<20}{d.summary} ({d.licence})" for n, d in DATASETS.items())
    prepare(parse(PrepareConfig, f"{__doc__}\nData sets:\n{listing}"))


if __name__ == "__main__":
    run_script(main)
