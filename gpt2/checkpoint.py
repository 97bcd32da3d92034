"""Checkpoints: one format, one way out (save_checkpoint), one way in (load_model).

RUN/checkpoints/step_00001000/
    checkpoint.json         format, step, model shape, tokenizer, chat template of a fine-tuned
                            model, training options, and the size and xxh3-128 hash of each file
    model.safetensors       float32 weights under Hugging Face's names, without padding
    optimizer.safetensors   AdamW's moments and step, as <parameter>/<state>

A folder is written beside its final name, synced, then renamed: one that exists is complete. It
holds no random state and no data position, because both are functions of (seed, step); so `step` is
all that a resumed run needs. Nothing is pickled.
"""

import dataclasses
import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt2 import hf, tokenizer
from gpt2.cli import coerce
from gpt2.config import GPTConfig
from gpt2.model import GPT

FORMAT = 1
META, MODEL, OPTIMIZER = "checkpoint.json", "model.safetensors", "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What checkpoint.json says; the tensors stay on disk until they are asked for."""

    path: Path
    step: int
    model: GPTConfig
    tokenizer: dict
    train: dict  # the TrainConfig of the run, as plain values
    chat_template: str | None = None  # of gpt2.data.chat; None: not trained on conversations


def save_checkpoint(
    run: str | Path,
    step: int,
    model: GPT,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    tokenizer: dict,
    train: dict,
    chat_template: str | None = None,
    keep_last: int = 0,
) -> Path:
    """Writes RUN/checkpoints/step_<step>, deletes all but the newest keep_last, returns its path.

    Raises OSError where there is no room or it cannot be written; what was there before stays.
    """
    folder = Path(run) / "checkpoints" / f"step_{step:08d}"
    tensors = {MODEL: dict(_model_tensors(model))}
    if optimizer is not None:
        tensors[OPTIMIZER] = dict(_optimizer_tensors(model, optimizer))
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".*.tmp"):
        shutil.rmtree(leftover)
    needed = sum(t.nbytes for group in tensors.values() for t in group.values()) + (1 << 20)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint of {needed / 1e6:.0f} MB does not fit the {free / 1e6:.0f} MB that are "
            "free; earlier checkpoints are untouched. Free room and use --resume auto",
            str(folder.parent),
        )
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        temporary.mkdir()
        files = {name: _write_tensors(temporary / name, group) for name, group in tensors.items()}
        meta = {
            "format": FORMAT, "step": step, "model": dataclasses.asdict(model.config),
            "tokenizer": tokenizer, "train": train, "files": files,
        }  # fmt: skip
        if chat_template is not None:
            meta["chat_template"] = chat_template
        with open(temporary / META, "w") as file:
            json.dump(meta, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep_last:
        for old in list_checkpoints(run)[:-keep_last]:
            shutil.rmtree(old)
    return folder


def list_checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    return sorted(p.parent for p in Path(run).glob(f"checkpoints/step_*/{META}"))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads checkpoint.json of a checkpoint folder, or of the newest one in a run folder.

    Raises OSError where there is none, ValueError where it is damaged or of a newer format.
    """
    path = Path(path)
    if not (path / META).exists():
        found = list_checkpoints(path)
        if not found:
            raise OSError(errno.ENOENT, "no checkpoint and no run with checkpoints here", str(path))
        path = found[-1]
    try:
        meta = json.loads((path / META).read_text())
        number = meta["format"]
        if number > FORMAT:
            raise ValueError(
                f"{path}: checkpoint format {number}, this version reads up to {FORMAT}: "
                "update gpt2-triton"
            )
        model = GPTConfig(**coerce(GPTConfig, meta["model"], f"{path / META}: model"))
        for name, file in meta["files"].items():
            size = (path / name).stat().st_size if (path / name).exists() else -1
            if size != file["bytes"]:
                found = "is missing" if size < 0 else f"has {size} bytes"
                raise ValueError(
                    f"{path / name}: {found}, should have {file['bytes']}: damaged; use another "
                    "checkpoint"
                )
        return Checkpoint(
            path, meta["step"], model, meta["tokenizer"], meta["train"], meta.get("chat_template")
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / META}: damaged ({error!r}); use another checkpoint") from error


def load_model(path_or_name: str | Path, device="cpu", kernels="auto") -> GPT:
    """A model from a checkpoint or run folder of ours, a Hugging Face folder, or its name there.

    Raises OSError (nothing there), ValueError (damaged, or not a GPT-2), ImportError (a name
    without huggingface_hub).
    """
    path = Path(path_or_name)
    if _is_hf_folder(path):
        return hf.load_hf(path, device, kernels)
    if _is_ours(path):
        checkpoint = read_checkpoint(path)
        model = GPT(checkpoint.model, kernels, device)
        load_training_state(checkpoint, model)
        return model
    if str(path_or_name) in hf.HUB_NAMES or not path.exists() and _may_be_hub_name(path_or_name):
        return hf.load_hf(hf.download(str(path_or_name)), device, kernels)
    raise OSError(
        errno.ENOENT,
        "no checkpoint, run or Hugging Face folder, and no name of the hub "
        f"({', '.join(hf.HUB_NAMES)}, or owner/name)",
        str(path_or_name),
    )


def load_tokenizer(path_or_name: str | Path) -> tokenizer.Tokenizer:
    """The tokenizer that a model was trained with; of Hugging Face models, GPT-2's."""
    path = Path(path_or_name)
    if _is_ours(path):
        return tokenizer.from_dict(read_checkpoint(path).tokenizer)
    return tokenizer.GPT2Tokenizer()


def load_chat_template(path_or_name: str | Path) -> str | None:
    """The template of gpt2.data.chat that a model was fine-tuned with; None where it was not."""
    path = Path(path_or_name)
    return read_checkpoint(path).chat_template if _is_ours(path) else None


@torch.no_grad()
def load_training_state(
    checkpoint: Checkpoint, model: GPT, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Copies a checkpoint's weights into model and, where given, its moments into optimizer.

    Raises ValueError for a model of another shape, damaged files, or a checkpoint without optimizer
    state.
    """
    if checkpoint.model != model.config:
        ours, theirs = dataclasses.asdict(model.config), dataclasses.asdict(checkpoint.model)
        differ = [f"{k} {theirs[k]} (here {ours[k]})" for k in ours if ours[k] != theirs[k]]
        # Dropout changes no tensor: a run may go on, or be fine-tuned, with another.
        if [d for d in differ if not d.startswith("dropout")]:
            raise ValueError(f"{checkpoint.path}: holds another model: {', '.join(differ)}")
    stored = _read_tensors(checkpoint.path, MODEL)
    for name, parameter in model.named_parameters():
        value = stored[name]
        parameter[: len(value)] = value.to(parameter.device)
        parameter[len(value) :] = 0.0
    if optimizer is None:
        return
    if not (checkpoint.path / OPTIMIZER).exists():
        raise ValueError(f"{checkpoint.path}: holds no optimizer state, so it cannot be resumed")
    stored = _read_tensors(checkpoint.path, OPTIMIZER)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for key in ("exp_avg", "exp_avg_sq"):
            value = stored[f"{name}/{key}"].to(parameter.device)
            state[key] = torch.zeros_like(parameter)
            state[key][: len(value)] = value
        # Fused AdamW wants its step where the parameter is.
        state["step"] = stored[f"{name}/step"].to(parameter.device)


def _model_tensors(model: GPT):
    for name, parameter in model.named_parameters():
        yield name, _without_padding(name, parameter.detach(), model.config)


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer):
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            yield f"{name}/{key}", _without_padding(name, value, model.config)


def _without_padding(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    if name == "transformer.wte.weight" and tensor.dim() == 2:
        tensor = tensor[: config.vocab_size]
    return tensor.cpu().contiguous()


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        full = "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": _hash(path)}


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = folder / name
    expected = json.loads((folder / META).read_text())["files"][name]["xxh3_128"]
    if _hash(path) != expected:
        raise ValueError(
            f"{path}: its content changed since it was written; use another checkpoint"
        )
    return load_file(path)


def _hash(path: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_hf_folder(path: Path) -> bool:
    return (path / "config.json").exists() and not (path / META).exists()


def _is_ours(path: Path) -> bool:
    return (path / META).exists() or (path / "checkpoints").is_dir()


def _may_be_hub_name(name: str | Path) -> bool:
    owner_and_name = str(name).split("/")
    return len(owner_and_name) == 2 and all(owner_and_name)
