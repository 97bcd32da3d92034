"""How fast prepare_data tokenizes, beside bare tiktoken processes, and how much memory it takes.

python benchmarks/prepare.py TEXT.jsonl [--repeats 5] [--workers 2] [--megabytes 50 1000]

Text: the `text` field of the file's rows (JSON lines, compressed or not), over again up to a size.
Bare: the documents are in each process already, an equal share each; the time is from the moment
when all are ready to the last one's end, and the tokens are thrown away. By encode_ordinary_batch,
as people do it, and by encode_to_numpy, which is faster and what is used here.
prepare: scripts/prepare_data.py's function on the same documents in a file of JSON lines: reading,
parsing, splitting by hash, feeding the threads, writing, syncing and hashing the shards are all in
its time. Its tokens are compared with tiktoken's first.
Memory: the largest resident set of scripts/prepare_data.py.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import arguments, markdown_table, write_results  # noqa: E402
from gpt2.data import find_shards, open_shards  # noqa: E402
from gpt2.data.encode import default_workers  # noqa: E402
from gpt2.data.prepare import prepare  # noqa: E402
from gpt2.data.readers import JsonRows  # noqa: E402
from gpt2.options import PrepareConfig  # noqa: E402
from gpt2.tokenizer import from_dict  # noqa: E402

SPEED_MB = 80  # of text, for the comparison of speeds
BATCH = 256  # documents in one call of encode_ordinary_batch


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--megabytes", type=int, nargs="*", default=[50, 1000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        where = options.text, Path(name), options.workers
        speeds = compare_speeds(*where, options.repeats)
        memory = [measure_memory(*where, size, form)
                  for form in ("jsonl", "text") for size in options.megabytes]  # fmt: skip
    base = speeds[0]["median"]
    of_speeds = [[f"{s['name']}: {s['median'] / 1e6:.2f} M", f"{min(s['all']) / 1e6:.2f} M",
                  f"{max(s['all']) / 1e6:.2f} M", f"{s['median'] / base:.0%}"]
                 for s in speeds]  # fmt: skip
    of_memory = [[f"{m['megabytes']} MB, {m['form']}", f"{m['peak_mb']:.0f} MB",
                  f"{m['seconds']:.1f}", f"{m['tokens'] / m['seconds'] / 1e6:.2f} M"]
                 for m in memory]  # fmt: skip
    text = "\n\n".join([
        f"{options.workers} processes or threads",
        markdown_table(["tokens/s, median of repeats", "lowest", "highest", "of bare"], of_speeds),
        markdown_table(["text", "peak memory", "seconds", "tokens/s"], of_memory),
    ])  # fmt: skip
    print(text)
    about = {"workers": options.workers, "text": options.text.name}
    write_results(options.out, "prepare", text, about | {"speeds": speeds, "memory": memory})


def compare_speeds(text: Path, folder: Path, workers: int, repeats: int) -> list[dict]:
    """The three ways on the same documents, taking turns."""
    documents = list(_documents(text, SPEED_MB * 1_000_000))
    path = _write(folder / "speed.jsonl", documents)
    n_tokens = sum(map(len, from_dict({"name": "gpt2"}).encoding.encode_ordinary_batch(documents)))
    found: dict[str, list[float]] = {}
    for repeat in range(repeats):
        for method in ("encode_ordinary_batch", "encode_to_numpy"):
            seconds = _bare(documents, workers, method)
            found.setdefault(f"bare, {method}", []).append(n_tokens / seconds)
        start, out = time.perf_counter(), folder / f"out{repeat}"
        prepare(PrepareConfig(jsonl=str(path), out=str(out), workers=workers))
        found.setdefault("prepare", []).append(n_tokens / (time.perf_counter() - start))
        separators = sum(int(np.count_nonzero(s.tokens() == 50256)) for s in _shards(out))
        if (_n_tokens(out) - separators, separators) != (n_tokens, len(documents)):
            raise RuntimeError(f"{_n_tokens(out)} tokens, {separators} separators: not tiktoken's")
    return [{"name": name, "median": statistics.median(all_), "all": all_, "tokens": n_tokens}
            for name, all_ in found.items()]  # fmt: skip


def measure_memory(text: Path, folder: Path, workers: int, megabytes: int, form: str) -> dict:
    """Peak memory of scripts/prepare_data.py on so much text."""
    path, out = folder / f"memory.{form}", folder / f"memory_{form}_{megabytes}"
    _write(path, _documents(text, megabytes * 1_000_000))
    command = [sys.executable, ROOT / "scripts/prepare_data.py", f"--{form}", path, "--out", out,
               "--workers", str(workers)]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ,
                               "PYTHONPATH": str(ROOT)})  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"prepare_data failed on {path}")
    path.unlink()
    return {"form": form, "megabytes": megabytes, "peak_mb": usage.ru_maxrss / 1000,
            "seconds": seconds, "tokens": _n_tokens(out)}  # fmt: skip


def _shards(folder: Path) -> list:
    return [s for split in ("train", "val") for s in open_shards(find_shards(folder, split))]


def _n_tokens(folder: Path) -> int:
    return sum(s.n_tokens for s in _shards(folder))


def _documents(path: Path, characters: int):
    """About so many characters of the file's documents, which come again and again."""
    for document in cycle([row.text for row in JsonRows([path]).items() if row.text]):
        if characters <= 0:
            return
        yield document
        characters -= len(document)


def _write(path: Path, documents) -> Path:
    with open(path, "w") as file:
        for d in documents:
            file.write(f"{d}\n\n" if path.suffix == ".text" else json.dumps({"text": d}) + "\n")
    return path


def _bare(documents: list[str], n: int, method: str) -> float:
    """Seconds in which n processes tokenize an equal share of documents each."""
    context = multiprocessing.get_context("fork")  # so that the documents are there already
    barrier, ends = context.Barrier(n + 1), context.SimpleQueue()
    encoding = from_dict({"name": "gpt2"}).encoding

    def work(share: list[str]) -> None:
        barrier.wait()
        if method == "encode_to_numpy":
            for document in share:
                encoding.encode_to_numpy(document, disallowed_special=())
        else:
            for i in range(0, len(share), BATCH):
                encoding.encode_ordinary_batch(share[i : i + BATCH], num_threads=1)
        ends.put(time.perf_counter())

    processes = [context.Process(target=work, args=(documents[i::n],)) for i in range(n)]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    last = max(ends.get() for _ in processes)
    for process in processes:
        process.join()
    return last - start


if __name__ == "__main__":
    main()
