"""benchmarks/kernels.py --tune without a GPU: candidates are right, take the table's place, and
leave it.
"""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks import common, kernels
from triton_kernels import launch

CPU = torch.device("cpu")
# From torch's own compiler, which the baselines of a problem are given to.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def found():
    tables = (launch.ATTENTION, launch.LAYER_NORM, launch.CROSS_ENTROPY)
    before = copy.deepcopy(tables)
    yield {kernel.name: kernel for kernel in kernels.all_kernels("interpret", 12, 1024)}
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.mark.parametrize("name, n", [("attention fwd", 2), ("layer_norm backward", 1)])
def test_candidates_are_right_and_the_table_is_left_alone(found, name, n):
    kernel = found[name]
    before = kernel.table[kernel.key]
    for tile in kernel.candidates[:n]:
        record = kernels.try_tile(kernel, tile, CPU, None)
        assert "error" not in record and record["tile"] == repr(tile)
    assert kernel.table[kernel.key] == before


def test_every_kernel_of_the_library_finds_its_entry():
    for arch in ("sm_80", "sm_90", "sm_100"):
        for heads in (12, 25):
            for kernel in kernels.all_kernels(arch, heads, 32768):
                assert kernel.table[kernel.key] is not None and kernel.candidates


def test_a_wrong_or_impossible_tile_is_said_and_the_fastest_stays(found, monkeypatch):
    kernel = found["attention fwd"]
    shipped = kernel.table[kernel.key]
    bad, slow, fast = kernel.candidates[:3]
    kernel.candidates[:] = [bad, slow, fast]
    now = lambda: kernel.table[kernel.key]  # noqa: E731 - the tile in place

    def check():
        if now() == bad:
            raise RuntimeError("out of resource: shared memory")

    problem = kernel.small()
    problem.check = check
    times = {shipped: 2.0, slow: 1.99, fast: 1.0}
    monkeypatch.setattr(
        kernels, "_time", lambda *args: common.Timing(times[now()], 1.0, 2.0, 10, 0)
    )
    kernel = replace(kernel, problem=lambda: problem, small=lambda: problem)
    records = kernels.tune_kernel(kernel, CPU, timed=True)
    assert records[1]["error"] == "RuntimeError: out of resource: shared memory"
    assert [r["tile"] for r in records if "better" in r] == [repr(fast)]
    assert records[3]["better"] == 2.0 and now() == fast


def test_wrong_results_are_said(found, monkeypatch):
    kernel = found["layer_norm"]
    norm = kernels.triton_kernels.layer_norm

    def wrong(x, *rest, **options):
        y, summed = norm(x, *rest, **options)
        return y + 1e-2, summed

    monkeypatch.setattr(kernels.triton_kernels, "layer_norm", wrong)
    record = kernels.try_tile(kernel, kernel.candidates[0], CPU, None)
    assert record["error"].startswith("AssertionError: y: an error is")
