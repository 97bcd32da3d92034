"""Shows what the model saw in a step of a run: the text, and where each document of it came from.

    python scripts/show_batch.py runs/shakespeare_char --step 1200
    python scripts/show_batch.py --run configs/gpt2_124m.yaml --step 7 --rank 3 --world_size 8
    python scripts/show_batch.py runs/sft_alpaca               # conversations of a fine-tuning run
    python scripts/show_batch.py runs/dpo_hh                   # pairs: chosen, then rejected

The options of the run come from its YAML file, so the batch is the one that training read; `row` is
the row of the global batch, and a document is counted from the start of its shard. Of a
conversation, what is learnt stands in [[ ]]; of a pair, what is compared.
"""

from pathlib import Path

from gpt2.checkpoint import load_model, load_tokenizer
from gpt2.cli import parse, read_config, run_script
from gpt2.config import IGNORE_INDEX, DPOConfig, SFTConfig, TrainConfig
from gpt2.data.loader import rank_rows
from gpt2.options import ShowBatchConfig
from gpt2.train.dpo import open_pairs, with_template
from gpt2.train.pretrain import find_tokenizer, open_data
from gpt2.train.sft import open_conversations


def main() -> None:
    show = parse(ShowBatchConfig, __doc__)
    run = Path(show.run)
    path = run / "config.yaml" if run.is_dir() else run
    config = read_config(path, TrainConfig, SFTConfig, DPOConfig)
    block_size = config.block_size
    if block_size is None:
        shape = load_model(config.init_from).config if config.init_from else config.model_config()
        block_size = shape.block_size
    if isinstance(config, DPOConfig):
        _show_pairs(show, config, block_size)
        return
    global_rows = config.tokens_per_step // block_size
    first, rows = rank_rows(show.step, global_rows, show.rank, show.world_size)
    first -= show.step * global_rows
    if isinstance(config, SFTConfig):
        tokenizer = load_tokenizer(config.init_from)
        data, _, _ = open_conversations(config, tokenizer, block_size)
    else:
        tokenizer = find_tokenizer(config.data)
        data = open_data(config, "train", block_size)
    x, y, *_ = data.batch(show.step, global_rows, show.rank, show.world_size)
    for row in range(rows)[: show.rows]:
        tokens, at = x[row].tolist(), first + row
        if isinstance(config, SFTConfig):
            spans = [(s, e) for s, e, _ in data.spans(show.step * global_rows + at)]
        else:
            ends = [t + 1 for t, token in enumerate(tokens) if token == tokenizer.eot]
            starts = sorted({0, *ends} - {block_size})
            spans = zip(starts, [*starts[1:], block_size], strict=True)
        for start, end in spans:
            shard, offset, document = data.provenance(show.step, at, global_rows, start)
            print(
                f"== step {show.step} row {at} tokens {start}-{end - 1}: "
                f"{shard}, token {offset}, document {document}"
            )
            if isinstance(config, SFTConfig):
                print(_with_marks(tokenizer, tokens[start:end], y[row, start:end].tolist()))
            else:
                print(tokenizer.decode(tokens[start:end]))
    if rows > show.rows:
        print(f"== {rows - show.rows} more rows of rank {show.rank}: --rows {rows}")


def _show_pairs(show: ShowBatchConfig, config: DPOConfig, length: int) -> None:
    tokenizer = load_tokenizer(config.init_from)
    data, _, _ = open_pairs(with_template(config), tokenizer, length)
    global_rows = config.tokens_per_step // data.block_size
    first, rows = rank_rows(show.step, global_rows, show.rank, show.world_size)
    first -= show.step * global_rows
    idx, targets = data.batch(show.step, global_rows, show.rank, show.world_size)
    for row in range(rows)[: show.rows]:
        for half in (0, 1):
            at = data.provenance(show.step, first + row, global_rows, half * (length + 1))
            end = int((targets[row, half] != IGNORE_INDEX).nonzero().max()) + 1
            print(f"== step {show.step} row {first + row}: {at.shard}")
            halves = (part[row, half, :end].tolist() for part in (idx, targets))
            print(_with_marks(tokenizer, *halves))
    if rows > show.rows:
        print(f"== {rows - show.rows} more pairs of rank {show.rank}: --rows {rows}")


def _with_marks(tokenizer, tokens: list[int], targets: list[int]) -> str:
    """A conversation's text, what is learnt in [[ ]]."""
    text, part, learning = "", tokens[:1], False
    for target, following in zip(targets, [*tokens[1:], None], strict=True):
        learnt = target != IGNORE_INDEX
        if learnt != learning:
            text += tokenizer.decode(part) + ("[[" if learnt else "]]")
            part, learning = [], learnt
        if learnt or following is not None:
            part.append(target if learnt else following)
    return text + tokenizer.decode(part) + ("]]" if learning else "")


if __name__ == "__main__":
    run_script(main)
