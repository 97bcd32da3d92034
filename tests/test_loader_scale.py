"""The loader on 10 billion tokens: sparse files, so that the disk holds next to nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest

from gpt2.data.shards import HEADER_BYTES, MAGIC

SHARD_TOKENS = 100_000_000

# Runs in a process of its own, whose memory is that of the loader. Times are medians of batches
# whose pages are in the cache, as the computing is what could grow with the step.
MEASURE = """
import json, statistics, sys, time
from gpt2.data import TokenLoader, find_shards

def memory():
    status = open("/proc/self/status").read()
    return {k: int(status.split(k + ":")[1].split()[0]) * 1024 for k in ("VmRSS", "RssAnon")}

def batch_ms(data, first):
    times = []
    for step in 2 * list(range(first, first + 60)):
        start = time.perf_counter()
        data.batch(step, 16)
        times.append(time.perf_counter() - start)
    return statistics.median(times[60:]) * 1e3

folder, backend = sys.argv[1:]
before, start = memory(), time.perf_counter()
data = TokenLoader(find_shards(folder, "train"), 1024, backend=backend)
opened_s, opened = time.perf_counter() - start, memory()
near_ms, far_ms = batch_ms(data, 0), batch_ms(data, 10**9)
early = memory()
for step in range(500):
    data.batch(step * 7919, 16)
print(json.dumps(dict(
    n_tokens=data.n_tokens, opened_s=opened_s, opened_bytes=opened["VmRSS"] - before["VmRSS"],
    near_ms=near_ms, far_ms=far_ms, read_bytes=memory()["RssAnon"] - early["RssAnon"])))
"""


@pytest.fixture
def ten_billion(tmp_path):
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, 1, SHARD_TOKENS
    for i in range(100):
        with open(tmp_path / f"fineweb_train_{i:06}.bin", "wb") as file:
            file.write(header.tobytes())
            file.truncate(HEADER_BYTES + 2 * SHARD_TOKENS)
    return tmp_path


@pytest.mark.parametrize("backend", ["cpp", "numpy"])
def test_ten_billion_tokens_in_100_shards(ten_billion, backend):
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ten_billion), backend],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    measured = json.loads(out)
    assert measured["n_tokens"] == 10_000_000_000
    assert measured["opened_s"] < 1
    assert measured["opened_bytes"] < 200e6
    # Cycle walking may take a pass or two more; nothing grows with the step.
    assert measured["far_ms"] < 3 * measured["near_ms"] + 0.05
    assert measured["read_bytes"] < 4e6


def test_more_shards_than_files_may_be_open(tmp_path):
    for i in range(300):
        np.arange(100, dtype="<u2").tofile(tmp_path / f"train_{i}.bin")
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[2])))
from gpt2.data import TokenLoader, find_shards
try:
    print(TokenLoader(find_shards(sys.argv[1], "train"), 8).n_tokens)
except OSError as error:
    print(error)
"""

    def run(hard: int) -> str:
        command = [sys.executable, "-c", code, str(tmp_path), str(hard)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert run(1000) == "30000\n"
    refused = run(200)
    assert "Too many open files" in refused and "train_2" in refused
    assert "ulimit -n" in refused
