"""The loader on 10 billion tokens: sparse files, so that the disk holds next to nothing."""

import subprocess
import sys

import numpy as np
import pytest

from gpt2.data.shards import HEADER_BYTES, shard_header

SHARD_TOKENS = 100_000_000


def run(code: str, *arguments) -> str:
    """What code prints in a process of its own, so that its memory and limits are the loader's."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("backend", ["cpp", "numpy"])
def test_ten_billion_tokens_in_100_shards_take_no_memory(tmp_path, backend):
    for i in range(100):
        with open(tmp_path / f"fineweb_train_{i:06}.bin", "wb") as file:
            file.write(shard_header(SHARD_TOKENS))
            file.truncate(HEADER_BYTES + 2 * SHARD_TOKENS)
    code = """
import sys
from gpt2.data import TokenLoader, find_shards

def memory(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024

before = memory("VmRSS")
data = TokenLoader(find_shards(sys.argv[1], "train"), 1024, backend=sys.argv[2])
opened = memory("VmRSS") - before
data.batch(10**9, 16)
before = memory("RssAnon")
for step in range(500):
    data.batch(step * 7919, 16)
print(data.n_tokens, opened, memory("RssAnon") - before)
"""
    n_tokens, opened, read = map(int, run(code, tmp_path, backend).split())
    assert n_tokens == 10_000_000_000 and opened < 200e6 and read < 4e6


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
    assert run(code, tmp_path, 1000) == "30000\n"
    refused = run(code, tmp_path, 200)
    assert all(text in refused for text in ("Too many open files", "train_2", "ulimit -n"))
