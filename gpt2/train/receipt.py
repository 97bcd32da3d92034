"""The receipt of a run: RUN/receipt.json says what ran, on what, with which data, and when.

    {"format": 1, "run": ..., "model": {...}, "data": [...], "launches": [{...}, ...]}

`data` holds for each folder the hash of its manifest and of every shard that the manifest knows.
Each start of the program adds a launch, since it may have another commit, machine or number of
ranks: command line, commit, versions, hardware, first and last step, start and stop, how it ended,
and what the pre-flight predicted. A launch is written when it starts and brought up to date at
every checkpoint, so one that was killed has a stop time as well: that of its last checkpoint.
scripts/verify_run.py compares the data with it, gpt2.train.report draws the report from it.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from gpt2.config import TrainConfig, data_sources
from gpt2.data.integrity import manifest_records
from gpt2.dist import Distributed
from gpt2.model import GPT

FORMAT = 1
NAME = "receipt.json"
PACKAGES = ("torch", "triton", "numpy", "gpt2-triton")


class Receipt:
    """This launch's part of a run's receipt; only the main process has one.

    unit: what its losses are measured in.  predicted: what the pre-flight said, {"step_ms": ...,
    "peak_bytes": ...}, or nothing.
    Raises ValueError for a receipt.json that is damaged.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        model: GPT,
        group: Distributed,
        *,
        unit: str = "nats per token",
        first_step: int = 0,
        predicted: dict[str, float] | None = None,
    ):
        self.path = folder / NAME
        self.content = read_receipt(folder) or {"format": FORMAT, "launches": []}
        shape = vars(model.config) | {"n_params": model.n_params(), "kernels": model.ops.name}
        data = describe_data(config.data)
        self.content |= {"run": config.run_name, "model": shape, "data": data, "unit": unit}
        self.launch = {
            "start": _now(), "stop": None, "seconds": 0.0, "first_step": first_step,
            "last_step": first_step, "end": "running", "command": shlex.join(sys.orig_argv),
            "world_size": group.world_size, "device": group.device.type, "git": git_state(),
            "versions": versions(), "hardware": hardware(group.device),
            "predicted": predicted or {},
        }  # fmt: skip
        self.started = time.monotonic()
        self.content["launches"].append(self.launch)
        self.update(first_step)

    def update(self, step: int, end: str = "running") -> None:
        """Writes that the launch has come to a step; end: "running", or how it ended."""
        seconds = round(time.monotonic() - self.started, 1)
        self.launch |= {"stop": _now(), "seconds": seconds, "last_step": step, "end": end}
        write_whole(self.path, json.dumps(self.content, indent=2) + "\n")


def read_receipt(folder: str | Path) -> dict | None:
    """A run folder's receipt, or None where there is none. Raises ValueError for a damaged one."""
    path = Path(folder) / NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content["launches"], list):
            raise TypeError("launches is not a list")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}): move it away to start a new one") from error
    if content.get("format", 0) > FORMAT:
        raise ValueError(f"{path}: format {content['format']}, this version reads up to {FORMAT}")
    return content


def describe_data(data: str) -> list[dict]:
    """What each folder of TrainConfig.data holds, by the hashes in its manifest.

    A folder without manifest has no hashes: then sizes of its files. What fine-tuning reads may be
    a file, by its own hash, or a name of the hub, of which nothing is known.
    """
    folders = []
    for path in dict.fromkeys(source.path for source in data_sources(data)):
        manifest, records = Path(path) / "manifest.json", manifest_records(path)
        entry = {"path": path, "manifest_sha256": None}
        if manifest.exists():
            content = json.loads(manifest.read_text())
            entry["manifest_sha256"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
            entry["source"] = content.get("source", content.get("made_from", {}).get("source"))
            entry["tokenizer"] = content["tokenizer"].get("name")
        if Path(path).is_file():
            with open(path, "rb") as f:
                entry["shards"] = {Path(path).name: hashlib.file_digest(f, "sha256").hexdigest()}
        else:
            files = sorted(p for p in Path(path).glob("*") if p.is_file() and p != manifest)
            if manifest.exists():
                files = [p for p in files if p.suffix in (".bin", ".npy")]
            entry["shards"] = {
                p.name: records[p.name]["sha256"]
                if p.name in records
                else f"{p.stat().st_size} bytes"
                for p in files
            }
        folders.append(entry)
    return folders


def git_state() -> dict:
    """Commit of the tree that this code lies in, and whether it was changed since; else None."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside of somebody else's repository.
    if not git("ls-files", Path(__file__).name):
        return {"commit": None, "dirty": None}
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str | None]:
    """Python's, and those of the packages that decide what comes out."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    return found


def hardware(device: torch.device) -> dict:
    """CPU and GPUs of this host."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "host": platform.node(), "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(), "cpus": len(os.sched_getaffinity(0)), "memory_bytes": memory,
        "threads": torch.get_num_threads(), "gpu": None,
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name, "gpus": torch.cuda.device_count(),
            "gpu_memory_bytes": properties.total_memory, "driver": _driver_version(),
        }  # fmt: skip
    return found


def write_whole(path: Path, text: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text.encode() if isinstance(text, str) else text)
    os.replace(temporary, path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver_version() -> str | None:
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in line.split() if word[0].isdigit() and "." in word), None)
