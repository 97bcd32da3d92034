"""The receipt of a run: RUN/receipt.json says what ran, on what, with which data, and when.

    {"format": 2, "run": ..., "model": {...}, "unit": ..., "data": [...], "launches": [{...}, ...]}

`data` is what the sources of batches say of themselves (their identity()), and of each folder with
a manifest its hash. Each start of the program adds a launch, since it may have another commit,
machine or number of ranks: command line, commit, versions, hardware, first and last step, start and
stop, how it ended, and what the pre-flight predicted. A launch is written when it starts and
brought up to date at every checkpoint, so one that was killed has a stop time as well: that of its
last checkpoint. scripts/verify_run.py compares the data with it, gpt2.train.report draws the report
from it.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from gpt2.device import cpu_name
from gpt2.dist import Distributed

FORMAT = 2
NAME = "receipt.json"
PACKAGES = ("torch", "triton", "numpy", "gpt2-triton")


class Receipt:
    """This launch's part of a run's receipt; only the main process has one. It never raises.

    facts: of the run, {"run": its name, "model": {...}, "unit": what its losses are measured in}
    and what else is to be known.  data: see gpt2.data's identity().  predicted: what the pre-flight
    said, {"step_ms": ..., "peak_bytes": ...}, or nothing.  say: is told what goes wrong.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        facts: dict,
        data: list[dict],
        group: Distributed,
        first_step: int = 0,
        predicted: dict[str, float] | None = None,
        say: Callable[[str], None] = print,
    ):
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
        data = [entry | manifest_facts(entry.get("path", "")) for entry in data]
        launches = [*launches, self.launch]
        self.content = {"format": FORMAT, **facts, "data": data, "launches": launches}
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
    try:
        content = json.loads(path.read_bytes().decode())
        lists = [content["launches"], content.get("data", [])]
        if not all(isinstance(x, list) and all(isinstance(y, dict) for y in x) for x in lists):
            raise TypeError("launches and data must be lists of objects")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error!r})") from error
    if content.get("format", 0) not in range(FORMAT + 1):
        raise ValueError(f"{path}: format {content['format']}, this version reads up to {FORMAT}")
    return content


def manifest_facts(path: str | Path) -> dict[str, str | None]:
    """The SHA-256 of a data folder's manifest, and its source and tokenizer; {} without one."""
    try:
        content = (Path(path) / "manifest.json").read_bytes()
    except (OSError, ValueError):
        return {}
    facts = {"manifest_sha256": hashlib.sha256(content).hexdigest()}
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        manifest = json.loads(content)
        facts["source"] = manifest.get("source", manifest.get("made_from", {}).get("source"))
        facts["tokenizer"] = manifest["tokenizer"].get("name")
    return facts


def git_state() -> dict:
    """Commit of the tree that this code lies in, and whether it was changed since; else None."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()  # fmt: skip

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # An installed copy may lie inside of somebody else's repository.
        if git("ls-files", Path(__file__).name):
            changes = git("status", "--porcelain", "--untracked-files=no")
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    return {"commit": None, "dirty": None}


def versions() -> dict[str, str | None]:
    """Python's, and those of the packages that decide what comes out; None: not installed."""
    found = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **found, "cuda": torch.version.cuda}


def hardware(device: torch.device) -> dict:
    """CPU and GPUs of this host."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "host": platform.node(), "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(), "cpus": len(os.sched_getaffinity(0)), "memory_bytes": memory,
        "threads": torch.get_num_threads(), "gpu": None,
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name, "gpus": torch.cuda.device_count(),
            "gpu_memory_bytes": properties.total_memory, "driver": _driver_version(),
        }  # fmt: skip
    return found


def finite(value):
    """A value of JSON with None for each number that is not finite, which strict JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value, indent: int | None = None) -> str:
    """Strict JSON; what JSON lacks as null or its text."""
    return json.dumps(finite(value), indent=indent, default=str, allow_nan=False)


def write_whole(path: Path, text: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(text.encode() if isinstance(text, str) else text)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # on a full disk what it holds is wanted back
            temporary.unlink()
        raise


def set_aside(path: Path, why: str) -> str:
    """Renames what cannot be used to NAME.damaged, or .damaged.1 and so on; says so."""
    target, n = path.with_name(f"{path.name}.damaged"), 0
    while target.exists():
        n += 1
        target = path.with_name(f"{path.name}.damaged.{n}")
    try:
        path.rename(target)
    except OSError as error:
        return f"{why}; it cannot be set aside either: {error.strerror}"
    return f"{why}; set aside as {target.name}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _driver_version() -> str | None:
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        return next(iter(re.findall(r"\b\d+\.[\d.]+", text)), None)
    return None
