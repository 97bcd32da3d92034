"""scripts/evaluate.py without its command line: tasks on a model, a table, a JSON file.

A task is a data file and a function of this package; TASKS names them.
"""

import json
import os
import textwrap
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from gpt2 import checkpoint
from gpt2.evals.files import find_file, read_text
from gpt2.evals.hellaswag import hellaswag_accuracy, read_hellaswag
from gpt2.evals.lambada import lambada, read_lambada
from gpt2.evals.loss import open_val, validation_loss
from gpt2.evals.perplexity import detokenize, perplexity
from gpt2.evals.published import GPT2_SIZES, GPT3_SIZES, PUBLISHED
from gpt2.evals.scoring import Group
from gpt2.model import GPT
from gpt2.options import EvaluateConfig
from gpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and how."""

    model: GPT
    tokenizer: Tokenizer
    group: Group
    config: EvaluateConfig
    val_data: str  # a folder with val shards; empty: none is known
    path: Callable[[str], Path]  # of a task's file

    @property
    def common(self) -> dict:
        kind = self.group.device.type
        bf16 = self.config.dtype == "bfloat16"
        autocast = partial(torch.autocast, kind, torch.bfloat16) if bf16 else nullcontext
        return {"autocast": autocast, "tokens_per_batch": self.config.tokens_per_batch}


def _hellaswag(s: Subject) -> dict:
    block_size = s.model.config.block_size
    examples = read_hellaswag(s.path("hellaswag"), s.tokenizer, block_size, s.config.limit)
    return hellaswag_accuracy(s.model, examples, s.group, **s.common)


def _lambada(s: Subject) -> dict:
    block_size = s.model.config.block_size
    passages = read_lambada(s.path("lambada"), s.tokenizer, block_size, s.config.limit)
    return lambada(s.model, passages, s.group, **s.common)


def _wikitext(s: Subject, task: str) -> dict:
    text = read_text(s.path(task))
    if s.config.limit is not None:
        text = "".join(text.splitlines(keepends=True)[: s.config.limit])
    detokenized = detokenize(text) if s.config.detokenize else None
    return perplexity(
        s.model, s.tokenizer, text, s.group, stride=s.config.stride, detokenized=detokenized,
        **s.common,
    ) | {"detokenized": s.config.detokenize}  # fmt: skip


def _val(s: Subject) -> dict:
    if not s.val_data:
        raise ValueError(f"task val: name a folder of val shards with --data for {s.config.model}")
    data = open_val(s.val_data, s.tokenizer, s.model.config.block_size)
    result = validation_loss(s.model, data, s.group, limit=s.config.limit, **s.common)
    return result | {"data": s.val_data}


TASKS: dict[str, Callable[[Subject], dict]] = {
    "hellaswag": _hellaswag,
    "wikitext2": partial(_wikitext, task="wikitext2"),
    "wikitext103": partial(_wikitext, task="wikitext103"),
    "lambada": _lambada,
    "val": _val,
}
# What the table shows of each task, and how: a percentage or a number.
SHOWN = {
    ("hellaswag", "acc_norm"): "%", ("hellaswag", "acc"): "%",
    ("wikitext2", "word_perplexity"): "", ("wikitext2", "token_perplexity"): "",
    ("wikitext2", "bits_per_byte"): "",
    ("wikitext103", "word_perplexity"): "", ("wikitext103", "token_perplexity"): "",
    ("wikitext103", "bits_per_byte"): "",
    ("lambada", "acc"): "%", ("lambada", "perplexity"): "",
    ("val", "loss"): "", ("val", "perplexity"): "",
}  # fmt: skip


def evaluate(config: EvaluateConfig, group: Group, wait: Callable[[], None]) -> None:
    """Runs the tasks on all ranks; the first prints the table and writes the JSON file.

    wait: returns when all ranks have come to it.  Raises ValueError and OSError, before the first
    task runs where a file is missing.
    """
    main = group.rank == 0
    tokenizer = checkpoint.load_tokenizer(config.model)
    known = _known(config)
    paths = {}
    if main:  # downloads once; the others find what is there
        paths = {t: find_file(t, config.data_dir) for t in config.tasks if t != "val"}
    wait()
    paths = paths or {t: find_file(t, config.data_dir) for t in config.tasks if t != "val"}
    model = checkpoint.load_model(config.model, group.device, config.kernels)
    model.eval().requires_grad_(False)
    if group.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{config.model} has a vocabulary of {model.config.vocab_size}, its tokenizer "
            f"({tokenizer.name}) one of {tokenizer.vocab_size}"
        )
    val_data = config.data or known.get("data", "")
    subject = Subject(model, tokenizer, group, config, val_data, paths.__getitem__)
    results = {}
    for task in config.tasks:
        started = time.perf_counter()
        same = [t for t in results if t.startswith("wikitext") and paths[t] == paths.get(task)]
        results[task] = dict(results[same[0]]) if same else TASKS[task](subject)
        results[task]["seconds"] = round(time.perf_counter() - started, 2)
        if main:
            print(_line(task, results[task]), flush=True)
    if not main:
        return
    print(f"\n{table(config.model, results)}")
    path = Path(config.out) if config.out else known["out"]
    content = {
        "model": config.model, "step": known.get("step"), "parameters": model.n_params(),
        "options": asdict(config), "ranks": group.world_size, "device": _device(group.device),
        "torch": torch.__version__, "kernels": model.ops.name, "tokenizer": tokenizer.name,
        "results": results,
    }  # fmt: skip
    _write(path, content)
    print(f"results: {path}")


def table(name: str, results: dict[str, dict]) -> str:
    """The results beside GPT-2's and GPT-3's, with the sources below."""
    rows, sources = [], []
    for (task, key), unit in SHOWN.items():
        if task not in results:
            continue
        label = " ".join([task, *key.split("_"), *unit])
        row = [label, _number(results[task][key] * (100 if unit else 1), unit)]
        known = PUBLISHED.get((task, key))
        if known is not None:
            row += [_number(v, unit) for v in (*known.gpt2, *known.gpt3)]
            sources.append(f"{label}: {known.source}.")
        rows.append(row + ["-"] * (2 + len(GPT2_SIZES + GPT3_SIZES) - len(row)))
    header = ["", "this model", *GPT2_SIZES, *GPT3_SIZES]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in [header, *rows]
    ]
    before = sum(widths[:2]) + 4
    gpt2_width = sum(widths[2 : 2 + len(GPT2_SIZES)]) + 2 * len(GPT2_SIZES)
    above = f"{name:<{before}}{'GPT-2, published':<{gpt2_width}}GPT-3, published"
    wrap = textwrap.TextWrapper(
        len(lines[0]), subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
    notes = [wrap.fill(source) for source in sources]
    return "\n".join([above, *lines, *notes])


def _known(config: EvaluateConfig) -> dict:
    """Of a checkpoint of ours: its step, its training data, and where the results go."""
    path = Path(config.model)
    try:
        found = checkpoint.read_checkpoint(path)
    except OSError:
        return {"out": Path(f"evaluation_{path.name}.json")}
    run = found.path.parent.parent if found.path.parent.name == "checkpoints" else found.path.parent
    data = str(found.train.get("data", ""))
    return {
        "step": found.step, "data": data if ":" not in data else "",
        "out": run / f"evaluation_{found.path.name}.json",
    }  # fmt: skip


def _line(task: str, result: dict) -> str:
    parts = [
        f"{key.replace('_', ' ')} {value:,}"
        for key, value in result.items()
        if type(value) is int  # the counts; the scores stand in the table
    ]
    return f"{task}: {', '.join(parts)} ({result['seconds']:.1f} s)"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit:
        return f"{value:.2f}"
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
