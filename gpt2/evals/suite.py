"""`gpt2-triton evaluate` without its command line: tasks on a model, a table, a JSON file."""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from gpt2 import checkpoint
from gpt2.config import data_sources
from gpt2.data.mixture import find_tokenizer, open_split
from gpt2.device import device_name
from gpt2.dist import Distributed
from gpt2.evals.files import find_file, read_text
from gpt2.evals.hellaswag import MEASURES, N_ENDINGS, hellaswag_accuracy, read_hellaswag
from gpt2.evals.lambada import lambada, read_lambada
from gpt2.evals.perplexity import detokenize, perplexity, validation_loss
from gpt2.evals.table import table
from gpt2.model import GPT
from gpt2.options import EvaluateConfig
from gpt2.storage import check_writable, write_whole
from gpt2.tokenizer import Tokenizer

# What the numbers of an example are called in a line of --samples.
SAMPLES = {
    "hellaswag": (*MEASURES, *(f"loss_{i}" for i in range(N_ENDINGS))), "lambada": ("acc", "loss"),
}  # fmt: skip


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
    path = Path(config.out) if config.out else path

    def check() -> None:
        find()  # downloads once; the others find what is there
        for name in filter(None, (path, config.samples)):
            check_writable(Path(name))

    def find() -> dict[str, Path]:
        names = [task for task in config.tasks if task != "val"]
        return {name: find_file(name, config.data_dir, tokenizer) for name in names}

    group.on_main(check)
    paths = find()
    model = checkpoint.load_model(config.model, group.device, config.kernels)
    model.eval().requires_grad_(False)
    if group.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{config.model} has a vocabulary of {model.config.vocab_size}, its {tokenizer.name} "
            f"tokenizer one of {tokenizer.vocab_size}"
        )
    results, samples = {}, {task: {} for task in ("hellaswag", "lambada") if config.samples}
    for task in config.tasks:
        started = time.perf_counter()
        same = [t for t in results if t.startswith("wikitext") and paths[t] == paths.get(task)]
        result = dict(results[same[0]]) if same else _run(
            task, paths.get(task), model, tokenizer, group, config, recorded, samples.get(task)
        )  # fmt: skip
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
    write_whole(path, json.dumps(content, indent=1) + "\n")
    print(f"results: {path}")
    if config.samples:
        lines = [
            json.dumps(dict(zip(SAMPLES[task], values, strict=True), task=task, number=n)) + "\n"
            for task, found in samples.items() for n, values in sorted(found.items())
        ]  # fmt: skip
        write_whole(Path(config.samples), "".join(lines))
        print(f"samples: {config.samples}, {len(lines):,} examples")


def _run(
    task: str, path: Path | None, model: GPT, tokenizer: Tokenizer, group: Distributed,
    config: EvaluateConfig, recorded: dict, samples: dict[int, list[float]] | None,
) -> dict:  # fmt: skip
    """One task. recorded: the options of the model's training, empty where not known. samples: gets
    what each example scored."""
    block_size, bf16 = model.config.block_size, config.dtype == "bfloat16"
    autocast = partial(torch.autocast, group.device.type, torch.bfloat16) if bf16 else nullcontext
    common = {"autocast": autocast, "tokens_per_batch": config.tokens_per_batch}
    if task == "hellaswag":
        examples = read_hellaswag(path, tokenizer, block_size, config.limit)
        return hellaswag_accuracy(model, examples, group, samples=samples, **common)
    if task == "lambada":
        passages = read_lambada(path, tokenizer, block_size, config.limit)
        return lambada(model, passages, group, samples=samples, **common)
    if task == "val":  # the run's val/loss: on its data, or others, in the way it was trained
        data = config.data or str(recorded.get("data", ""))
        if not data:
            raise ValueError(f"task val: name a folder of val shards with --data ({config.model})")
        if files := [s.path for s in data_sources(data) if Path(s.path).is_file()]:
            raise ValueError(f"task val: {files[0]} is a file: --data takes a folder of shards")
        doc_mask = bool(recorded.get("doc_mask"))
        size = recorded.get("block_size") or block_size
        loader, theirs = open_split(data, "val", size, doc_mask=doc_mask), find_tokenizer(data)
        if theirs.to_dict() != tokenizer.to_dict():
            raise ValueError(
                f"{data} was made with the {theirs.name} tokenizer (GPT-2's is assumed without a "
                f"manifest.json), the model has another, a {tokenizer.name} tokenizer of "
                f"{tokenizer.vocab_size}: prepare the data with the model's"
            )
        result = validation_loss(model, loader, group, limit=config.limit, **common)
        return result | {"data": data, "doc_mask": doc_mask}
    text = "".join(read_text(path).splitlines(keepends=True)[: config.limit])
    result = perplexity(
        model, tokenizer, text, group, stride=config.stride,
        detokenized=detokenize(text) if config.detokenize else None, **common,
    )  # fmt: skip
    return result | {"detokenized": config.detokenize}
