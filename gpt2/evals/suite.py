"""scripts/evaluate.py without its command line: tasks on a model, a table, a JSON file.

A task is a data file and a function of this package; TASKS names them.
"""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from gpt2 import checkpoint
from gpt2.config import data_sources
from gpt2.data.mixture import find_tokenizer, open_split
from gpt2.device import device_name
from gpt2.dist import Distributed
from gpt2.evals.files import find_file, read_text
from gpt2.evals.hellaswag import hellaswag_accuracy, read_hellaswag
from gpt2.evals.lambada import lambada, read_lambada
from gpt2.evals.perplexity import detokenize, perplexity, validation_loss
from gpt2.evals.table import table
from gpt2.model import GPT
from gpt2.options import EvaluateConfig
from gpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and how.

    paths: of the tasks' files.  recorded: the options of its training, empty where not known.
    """

    model: GPT
    tokenizer: Tokenizer
    group: Distributed
    config: EvaluateConfig
    paths: dict[str, Path]
    recorded: dict

    @property
    def block_size(self) -> int:
        return self.model.config.block_size

    @property
    def common(self) -> dict:
        kind = self.group.device.type
        bf16 = self.config.dtype == "bfloat16"
        autocast = partial(torch.autocast, kind, torch.bfloat16) if bf16 else nullcontext
        return {"autocast": autocast, "tokens_per_batch": self.config.tokens_per_batch}


def _hellaswag(s: Subject) -> dict:
    examples = read_hellaswag(s.paths["hellaswag"], s.tokenizer, s.block_size, s.config.limit)
    return hellaswag_accuracy(s.model, examples, s.group, **s.common)


def _lambada(s: Subject) -> dict:
    passages = read_lambada(s.paths["lambada"], s.tokenizer, s.block_size, s.config.limit)
    return lambada(s.model, passages, s.group, **s.common)


def _wikitext(s: Subject, task: str) -> dict:
    text = read_text(s.paths[task])
    if s.config.limit is not None:
        text = "".join(text.splitlines(keepends=True)[: s.config.limit])
    detokenized = detokenize(text) if s.config.detokenize else None
    return perplexity(
        s.model, s.tokenizer, text, s.group, stride=s.config.stride, detokenized=detokenized,
        **s.common,
    ) | {"detokenized": s.config.detokenize}  # fmt: skip


def _val(s: Subject) -> dict:
    """The run's val/loss: on its data, or on others', in the way in which it was trained."""
    data = s.config.data or str(s.recorded.get("data", ""))
    if not data:
        raise ValueError(f"task val: name a folder of val shards with --data for {s.config.model}")
    for source in data_sources(data):
        if Path(source.path).is_file():
            raise ValueError(f"task val: {source.path} is a file: --data takes a folder of shards")
    block_size = s.recorded.get("block_size") or s.block_size
    doc_mask = bool(s.recorded.get("doc_mask"))
    loader = open_split(data, "val", block_size, doc_mask=doc_mask)
    theirs = find_tokenizer(data)
    if theirs.to_dict() != s.tokenizer.to_dict():
        raise ValueError(
            f"{data} was made with {'another' if theirs.name == s.tokenizer.name else 'the'} "
            f"{theirs.name} tokenizer (GPT-2's is assumed without a manifest.json), the model has "
            f"a {s.tokenizer.name} tokenizer of {s.tokenizer.vocab_size}: prepare the data with "
            "the model's"
        )
    result = validation_loss(s.model, loader, s.group, limit=s.config.limit, **s.common)
    return result | {"data": data, "doc_mask": doc_mask}


TASKS: dict[str, Callable[[Subject], dict]] = {
    "hellaswag": _hellaswag,
    "wikitext2": partial(_wikitext, task="wikitext2"),
    "wikitext103": partial(_wikitext, task="wikitext103"),
    "lambada": _lambada,
    "val": _val,
}


def evaluate(config: EvaluateConfig, group: Distributed) -> None:
    """Runs the tasks on all ranks; the first prints the table and writes the JSON file.

    Raises ValueError and OSError, before the first task runs where a file is missing.
    """
    tokenizer = checkpoint.load_tokenizer(config.model)
    try:
        found = checkpoint.read_checkpoint(config.model)
        run = found.path.parent.parent if found.path.parent.name == "checkpoints" else found.path
        step, recorded, path = found.step, found.train, run / f"evaluation_{found.path.name}.json"
    except OSError:
        step, recorded, path = None, {}, Path(f"evaluation_{Path(config.model).name}.json")
    find = lambda: {  # noqa: E731
        task: find_file(task, config.data_dir, tokenizer) for task in config.tasks if task != "val"
    }
    if group.is_main:  # downloads once; the others find what is there
        find()
    group.barrier()
    paths = find()
    model = checkpoint.load_model(config.model, group.device, config.kernels)
    model.eval().requires_grad_(False)
    if group.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{config.model} has a vocabulary of {model.config.vocab_size}, its tokenizer "
            f"({tokenizer.name}) one of {tokenizer.vocab_size}"
        )
    subject = Subject(model, tokenizer, group, config, paths, recorded)
    results = {}
    for task in config.tasks:
        started = time.perf_counter()
        same = [t for t in results if t.startswith("wikitext") and paths[t] == paths.get(task)]
        result = dict(results[same[0]]) if same else TASKS[task](subject)
        if any(isinstance(value, float) and math.isnan(value) for value in result.values()):
            raise ValueError(
                f"{task}: the losses of {config.model} are not numbers (NaN): its weights are "
                "damaged, or its training has diverged"
            )
        results[task] = result | {"seconds": round(time.perf_counter() - started, 2)}
        if group.is_main:
            counts = [f"{k.replace('_', ' ')} {v:,}" for k, v in result.items() if type(v) is int]
            print(f"{task}: {', '.join(counts)} ({results[task]['seconds']:.1f} s)", flush=True)
    if not group.is_main:
        return
    print(f"\n{table(config.model, results)}")
    content = {
        "model": config.model, "step": step, "parameters": model.n_params(),
        "options": asdict(config), "ranks": group.world_size, "device": device_name(group.device),
        "torch": torch.__version__, "kernels": model.ops.name, "tokenizer": tokenizer.name,
        "results": results,
    }  # fmt: skip
    path = Path(config.out) if config.out else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"results: {path}")
