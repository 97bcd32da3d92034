"""The receipt of a run: RUN/receipt.json says what ran, on what, with which data, and when.

    {"format": 2, "run": ..., "model": {...}, "unit": ..., "data": [...], "launches": [{...}, ...]}

`data` is the identity() of the run's data, with the hash of each folder's manifest. Each start of
the program adds a launch: command line, commit, versions, hardware, first and last step, start and
stop, how it ended, and what the pre-flight predicted. It is written at the start and at every
checkpoint, so a launch that was killed has a stop time as well: that of its last checkpoint.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, SubprocessError, check_output

import torch

from gpt2.device import cpu_name
from gpt2.dist import Distributed
from gpt2.storage import read_json, set_aside, to_json, write_whole

FORMAT = 2
NAME = "receipt.json"


class Receipt:
    """This launch's part of a run's receipt; only the main process has one. It never raises.

    facts: {"run": its name, "model": {...}, "unit": of its losses, ...}.  data: its identity().
    predicted: {"step_ms": ..., "peak_bytes": ...} or nothing.  say: is told what goes wrong.
    """

    def __init__(
        self, folder: str | Path, *, facts: dict, data: list[dict], group: Distributed,
        first_step: int = 0, predicted: dict | None = None, say: Callable[[str], None] = print,
    ):  # fmt: skip
        self.path, self.say, launches = Path(folder) / NAME, say, []
        try:
            launches = (read_receipt(folder) or {"launches": []})["launches"]
        except (ValueError, OSError) as error:
            say(set_aside(self.path, str(error)))
        self.launch = {
            "start": _now(), "stop": None, "seconds": 0.0, "first_step": first_step,
            "last_step": first_step, "end": "running", "command": shlex.join(sys.orig_argv),
            "world_size": group.world_size, "device": group.device.type, "git": git_state(),
            "versions": versions(), "hardware": hardware(group.device),
            "predicted": predicted or {},
        }  # fmt: skip
        data = [entry | _manifest_facts(entry.get("path", "")) for entry in data]
        self.content = {"format": FORMAT, **facts, "data": data}
        self.content["launches"] = [*launches, self.launch]
        self.started = time.monotonic()
        self.update(first_step)

    def update(self, step: int, end: str = "running") -> None:
        """Writes that the launch has come to a step; end: "running", or how it ended."""
        seconds = round(time.monotonic() - self.started, 1)
        self.launch |= {"stop": _now(), "seconds": seconds, "last_step": step, "end": end}
        try:
            write_whole(self.path, to_json(self.content, indent=2) + "\n")
        except OSError as error:
            self.say(f"{self.path} is not up to date: {error.strerror}; training goes on")


def read_receipt(folder: str | Path) -> dict | None:
    """A run folder's receipt, or None where there is none.

    Raises ValueError for a damaged one, OSError where it cannot be read.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return None
    content = read_json(path)
    for entries in (content.get("launches"), content.get("data", [])):
        if not isinstance(entries, list) or not all(isinstance(x, dict) for x in entries):
            raise ValueError(f"{path}: damaged: launches and data must be lists of objects")
    if content.get("format", 0) not in range(FORMAT + 1):
        raise ValueError(f"{path}: format {content['format']}, this version reads up to {FORMAT}")
    return content


def _manifest_facts(path: str) -> dict[str, str | None]:
    """The SHA-256 of a data folder's manifest, and its source and tokenizer; {} without one."""
    facts = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = (Path(path) / "manifest.json").read_bytes()
        facts["manifest_sha256"] = hashlib.sha256(content).hexdigest()
        manifest = json.loads(content)
        facts["source"] = manifest.get("source", manifest.get("made_from", {}).get("source"))
        facts["tokenizer"] = manifest["tokenizer"].get("name")
    return facts


def git_state() -> dict:
    """Commit of the tree that this code lies in, and whether it was changed since; else None."""
    here = Path(__file__).resolve()
    git = partial(check_output, cwd=here.parent, stderr=DEVNULL, text=True, timeout=20)
    with contextlib.suppress(OSError, SubprocessError):
        # An installed copy may lie inside of somebody else's repository.
        if git(["git", "ls-files", here.name]):
            commit = git(["git", "rev-parse", "HEAD"]).strip()
            return {"commit": commit, "dirty": bool(git(["git", "status", "--porcelain", "-uno"]))}
    return {"commit": None, "dirty": None}


def commit_of(git: dict) -> str:
    """A git_state in words."""
    return (git["commit"] or "not known")[:10] + (" with changes" if git["dirty"] else "")


def versions() -> dict[str, str | None]:
    """Of what decides what comes out; None: not installed."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}  # and its build
    for name in ("triton", "numpy", "gpt2-triton"):
        found[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "cuda": torch.version.cuda}


def hardware(device: torch.device) -> dict:
    """CPU and GPUs of this host; memory in bytes."""
    found = {
        "host": platform.node(), "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(), "cpus": len(os.sched_getaffinity(0)), "gpu": None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    if device.type == "cuda":
        gpu, driver = torch.cuda.get_device_properties(device), None
        with contextlib.suppress(OSError):
            driver = re.search(r"\d+\.[\d.]+", Path("/proc/driver/nvidia/version").read_text())
        found |= {
            "gpu": gpu.name, "gpus": torch.cuda.device_count(),
            "gpu_memory_bytes": gpu.total_memory, "driver": driver and driver[0],
        }  # fmt: skip
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
