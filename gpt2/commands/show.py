"""Shows what the model saw in a step of a run, and where each document came from.

    gpt2-triton show runs/shakespeare_char --step 1200
    gpt2-triton show --run configs/gpt2_124m.yaml --step 7 --rank 3 --world_size 8
    gpt2-triton show runs/sft_alpaca               # conversations of a fine-tuning run
    gpt2-triton show runs/dpo_hh                   # pairs: chosen, then rejected

The options of the run come from its YAML file, and what a rollback skipped from its checkpoints, so
the batch is the one that training read; `row` is the row of the global batch, and a document is
counted from the start of its shard. Of a conversation, what is learnt stands in [[ ]]; of a pair,
what is compared. Characters that a terminal would obey are written as escapes.
"""

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from torch import Tensor

from gpt2.checkpoint import list_checkpoints, load_model, load_tokenizer, read_checkpoint
from gpt2.cli import parse, printable, read_config
from gpt2.config import DPOConfig, FineTuneConfig, SFTConfig, TrainConfig
from gpt2.data.loader import BatchSource, rank_rows
from gpt2.options import ShowBatchConfig
from gpt2.tokenizer import Tokenizer
from gpt2.train.finetune import open_rows, with_template
from gpt2.train.pretrain import find_tokenizer, open_data


def main() -> None:
    show = parse(ShowBatchConfig, __doc__)
    run = Path(show.run)
    path = run / "config.yaml" if run.is_dir() else run
    data, tokenizer, step_rows = _open(
        read_config(path, TrainConfig, SFTConfig, DPOConfig), show.world_size
    )
    offset = _offset(run, show.step)
    first, rows = rank_rows(show.step, step_rows, show.rank, show.world_size, offset)
    idx, *_ = data.batch(show.step, step_rows, show.rank, show.world_size, offset=offset)
    for r in range(rows)[: show.rows]:
        row = first + r - show.step * step_rows - offset
        for start, end, text in _texts(data, tokenizer, first + r, idx[r]):
            place = data.provenance(show.step, row, step_rows, start, offset=offset)
            header = (
                f"== step {show.step} row {row} tokens {start}-{end - 1}: {place.shard}, token "
                f"{place.offset}, document {place.document}"
            )
            print(printable(f"{header}\n{text}"))
    if rows > show.rows:
        print(f"== {rows - show.rows} more rows of rank {show.rank}: --rows {rows}")


def _open(config: TrainConfig, world_size: int) -> tuple[BatchSource, Tokenizer, int]:
    """The data that a run trains on, its tokenizer, and the rows of a step."""
    shape = load_model(config.init_from).config if config.init_from else config.model_config()
    block_size = config.block_size or shape.block_size
    if isinstance(config, FineTuneConfig):
        tokenizer = load_tokenizer(config.init_from)
        data = open_rows(with_template(config), tokenizer, block_size)[0]
    else:
        data, tokenizer = open_data(config, "train", block_size), find_tokenizer(config.data)
    config = config.sized(shape, data.block_size, world_size)
    return data, tokenizer, config.tokens_per_step // data.block_size


def _offset(run: Path, step: int) -> int:
    """How many samples after its own a step's data lie, by the run's checkpoints; says so.

    What training left at a checkpoint has held since the last change before it.
    """
    saved = [read_checkpoint(path) for path in list_checkpoints(run)]
    known = [(0, 0), *((c.step, c.state.get("offset", 0)) for c in saved)]
    before = [at for at in known if at[0] <= step][-1]
    after = next((at for at in known if at[0] > step), before)
    if before[1] or after[1]:
        places = ", ".join(f"{n} at step {at}" for at, n in dict.fromkeys((before, after)))
        print(f"== data offset {after[1]} samples (by the checkpoints {places})")
    return after[1]


def _texts(
    data: BatchSource, tokenizer: Tokenizer, sample: int, idx: Tensor
) -> Iterator[tuple[int, int, str]]:
    """(first token, token after the last, text) of what stands in a row."""
    if data.chat_template is None:
        tokens = idx.tolist()
        starts = sorted({0, *(t for t, token in enumerate(tokens) if token == tokenizer.eot)})
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            yield start, end, tokenizer.decode(tokens[start:end])
        return
    for start, end, i in data.spans(data.index(sample)):
        tokens, learnt = (part[i].tolist() for part in (data.data.tokens, data.data.learnt))
        if not learnt[-1]:  # the last token is only a target
            tokens, learnt = tokens[:-1], learnt[:-1]
        text = ""
        for is_learnt, group in groupby(zip(learnt, tokens, strict=True), key=itemgetter(0)):
            part = tokenizer.decode([token for _, token in group])
            text += f"[[{part}]]" if is_learnt else part
        yield start, end, text
