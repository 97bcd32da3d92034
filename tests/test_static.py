"""Shipped kernels compile ahead of time, without spills, for GPUs that are not here, and to no more
work than was recorded in benchmarks/results/static.json.

Compiled in a process of its own: this one has TRITON_INTERPRET=1, which turns the compiler off.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).resolve().parents[1]
TENSOR_CORES = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma"}
# Operations that store one number a row, or a few: nothing there is worth 16 bytes.
NARROW_STORES = ("layer_norm dw", "cross_entropy fwd")


def compile_report(tmp_path, arch, *options):
    command = [sys.executable, "benchmarks/static.py", "--arch", arch]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path), *options],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / f"static_{arch}.json").read_text())["rows"]
    assert rows and (tmp_path / f"static_{arch}.md").read_text().count("\n|") >= len(rows)
    return rows


def check_work(rows, arch):
    """Bound and issued instructions, in the model's us, are at most 5% above the recorded ones."""
    recorded = json.loads((ROOT / "benchmarks/results/static.json").read_text())["kernels"][arch]
    for row in (row for row in rows if row["model"]):
        name = f"{row['op']}, {row['shape']}"
        if known := recorded[name].get(triton.__version__):
            for key, us in zip(("bound", "issue"), known[2:], strict=True):
                now = row["model"][key]
                assert now <= 1.05 * us + 0.1, f"{name}: {key} {now:.1f} us, recorded {us}"


def check(rows, arch):
    check_work(rows, arch)
    for row in rows:
        name = f"{row['op']} {row['shape']}"
        assert row["spill"] == 0, f"{name} spills {row['spill']} bytes on {arch}"
        assert row["programs"] >= 1, f"{name} does not fit on {arch}"
        if arch not in TENSOR_CORES:
            continue
        if row["op"].startswith("attention") and "fp32" not in row["shape"]:
            assert row["mma"] == TENSOR_CORES[arch], name
        assert row["load"] == 16, f"{name} loads {row['load']} bytes at a time"
        narrow = row["op"] in NARROW_STORES
        assert row["store"] == 16 or narrow, f"{name} stores {row['store']} bytes at a time"


@pytest.mark.parametrize(
    "op, shape, n_rows",
    [
        ("attention", "T1024 D64 bf16", 6),
        ("layer_norm", " x 768", 5),
        ("cross_entropy", "32768 x", 5),
    ],
)
def test_gpt2_on_hopper(tmp_path, op, shape, n_rows):
    """The design points: T = 1024, D = 64, with and without documents; width 768."""
    rows = compile_report(tmp_path, "sm_90", "--op", op, "--shape", shape)
    assert len(rows) == n_rows
    check(rows, "sm_90")
    if op != "attention":
        return
    # Two programs a multiprocessor: one's matrix products run during the other's exponentials.
    assert all(row["programs"] >= 2 for row in rows)
    forward = next(row for row in rows if row["op"] == "attention fwd")
    assert forward["flops"] == 4 * 32 * 12 * 1024**2 * 64 // 2
    assert forward["bytes"] == 32 * 1024 * 12 * (4 * 64 * 2 + 4)
    assert 65 < forward["floor_us"] < 66  # 51.5 GFLOP at 790 TFLOP/s
    # 64-key tiles of 128 queries, of which 1/8 is beyond the diagonal, at 2048 FMA a clock
    assert forward["model"]["tensor"] == pytest.approx(
        32 * 12 * 72 * 128 * 64 * 64 * 2 / 2048 / (132 * 1755), rel=1e-6
    )
    by_name = {(row["op"], "docs" in row["shape"]): row["model"] for row in rows}
    for op in ("attention dq", "attention dkv"):  # where every tile is masked
        assert by_name[op, True]["bound"] <= 1.25 * by_name[op, False]["bound"]


def test_a_regression_is_found():
    row = {"op": "attention fwd", "shape": "B32 H12 T1024 D64 bf16"}
    recorded = json.loads((ROOT / "benchmarks/results/static.json").read_text())["kernels"]["sm_90"]
    _, _, bound, issue = recorded["attention fwd, B32 H12 T1024 D64 bf16"][triton.__version__]
    check_work([row | {"model": dict(bound=bound, issue=issue)}], "sm_90")
    with pytest.raises(AssertionError, match="issue"):
        check_work([row | {"model": dict(bound=bound, issue=1.06 * issue)}], "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_everything_shipped(tmp_path, arch):
    check(compile_report(tmp_path, arch), arch)


def test_report_refuses_the_interpreter(tmp_path):
    command = [sys.executable, "benchmarks/static.py", "--op", "attention"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr
