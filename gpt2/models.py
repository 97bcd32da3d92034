"""Which model a path or a name means: a folder of one of three kinds, or one of the hub.

ours        a checkpoint (checkpoint.json), or a run with a folder checkpoints
hf          a Hugging Face GPT-2 (config.json)
adapters    LoRA adapters as peft writes them (adapter_config.json)
"""

import errno
import re
from pathlib import Path

from gpt2 import hf, lora

META = "checkpoint.json"


def is_ours(path: Path) -> bool:
    return (path / META).exists() or (path / "checkpoints").is_dir()


def is_hf(path: Path) -> bool:
    return (path / hf.CONFIG).exists() and not (path / META).exists()


def is_model(path: Path) -> bool:
    return is_ours(path) or is_hf(path) or (path / lora.CONFIG).exists()


def find(path_or_name: str | Path) -> Path:
    """The local folder of a model, which is downloaded if it is on the hub. Raises OSError."""
    path = Path(path_or_name)
    if is_model(path):
        return path
    if _may_be_hub_name(path_or_name):
        return hf.download(str(path_or_name))
    if path.is_dir():
        words = f"no checkpoint, run or Hugging Face folder: it has no {META} and no {hf.CONFIG}"
    elif path.exists():
        words = f"a file ({path.suffix}); a model is a folder, a checkpoint or Hugging Face's"
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            words += "; pickles of PyTorch, such as nanoGPT's, are not read since they may run code"
    else:
        names = ", ".join(hf.HUB_NAMES)
        words = f"no such folder: no checkpoint, run or name of the hub ({names}, or owner/name)"
    raise OSError(errno.ENOENT, words, str(path_or_name))


def find_base(name: str, adapters: Path) -> str | Path:
    """A base model by its name in adapters: a path from here, or from a folder above them, as when
    a folder with runs has moved; else a name of the hub. Raises OSError."""
    for folder in (Path(), *adapters.resolve().parents):
        if is_ours(folder / name) or is_hf(folder / name):
            return folder / name
    if _may_be_hub_name(name):
        return name
    raise OSError(
        errno.ENOENT,
        f"holds adapters for {name}, which is neither here nor in a folder above them: put the "
        "base model back there",
        str(adapters),
    )


def _may_be_hub_name(name: str | Path) -> bool:
    """gpt2, gpt2-medium ..., or owner/name, unless that would be a path from here."""
    if str(name) in hf.HUB_NAMES:
        return True
    here = Path(name).exists() or Path(name).parent.exists()
    return not here and bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name)))
