"""Shows what the model saw in a step of a run: the text, and where each document of it came from.

    python scripts/show_batch.py runs/shakespeare_char --step 1200
    python scripts/show_batch.py --run configs/gpt2_124m.yaml --step 7 --rank 3 --world_size 8

The options of the run come from its YAML file, so the batch is the one that training read; `row` is
the row of the global batch, and a document is counted from the start of its shard.
"""

from pathlib import Path

from gpt2.checkpoint import load_model
from gpt2.cli import parse, read_yaml, run_script
from gpt2.config import ShowBatchConfig, TrainConfig
from gpt2.data.loader import rank_rows
from gpt2.train.pretrain import find_tokenizer, open_data


def main() -> None:
    show = parse(ShowBatchConfig, __doc__)
    run = Path(show.run)
    config = TrainConfig(**read_yaml(TrainConfig, run / "config.yaml" if run.is_dir() else run))
    block_size = config.block_size
    if block_size is None:
        shape = load_model(config.init_from).config if config.init_from else config.model_config()
        block_size = shape.block_size
    global_rows = config.tokens_per_step // block_size
    first, rows = rank_rows(show.step, global_rows, show.rank, show.world_size)
    first -= show.step * global_rows
    tokenizer = find_tokenizer(config.data)
    data = open_data(config, "train", block_size)
    x = data.batch(show.step, global_rows, show.rank, show.world_size)[0]
    for row in range(rows)[: show.rows]:
        tokens = x[row].tolist()
        ends = [t + 1 for t, token in enumerate(tokens) if token == tokenizer.eot]
        starts = sorted({0, *ends} - {block_size})
        for start, end in zip(starts, [*starts[1:], block_size], strict=True):
            shard, offset, document = data.provenance(show.step, first + row, global_rows, start)
            print(
                f"== step {show.step} row {first + row} tokens {start}-{end - 1}: "
                f"{shard}, token {offset}, document {document}"
            )
            print(tokenizer.decode(tokens[start:end]))
    if rows > show.rows:
        print(f"== {rows - show.rows} more rows of rank {show.rank}: --rows {rows}")


if __name__ == "__main__":
    run_script(main)
