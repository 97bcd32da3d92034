"""Checkpoints: one format, one way out (save_checkpoint), one way in (load_model).

RUN/checkpoints/step_00001000/
    checkpoint.json     format, what Checkpoint has, size and xxh3-128 of each file, its own hash
    *.safetensors       weights and moments, see gpt2.state. LoRA adapters lie in peft's layout,
                        with adapter_config.json; checkpoint.json names their base model
RUN/checkpoints/latest  a link to the newest one
RUN/checkpoints/best    a link to the one with the lowest validation loss, which keep_last spares

Folders named step_<digits> are checkpoints, in the order of the number; nothing else there is
touched. One is written as .step_<digits>.tmp, synced, then renamed: one that exists is complete.
The one it replaces is .step_<digits>.old for that moment, and counts if the new one never came.
There is no random state, because that is a function of (seed, step). Nothing is pickled. Any change
of any byte is noticed when it is read; newest_good then takes the checkpoint before.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import xxhash

from gpt2 import foreign, hf, lora, storage, tokenizer
from gpt2.config import GPTConfig, LoRAConfig
from gpt2.model import GPT, parameter_shapes
from gpt2.state import MODEL, OPTIMIZER, Optimizer, Tensors, restore, snapshot

META, FORMAT = "checkpoint.json", 2  # format 1 had no run_id and identity
FILES = (MODEL, OPTIMIZER, lora.TENSORS, lora.CONFIG)  # no other is read
DAMAGED = "damaged; use another checkpoint"
BEST = "best"
WHOLE, OLD, HALF = r"(step_([0-9]+))", r"\.(step_([0-9]+))\.old", r"\.(step_([0-9]+))\.tmp"


@dataclass(frozen=True)
class Checkpoint:
    """What checkpoint.json says; the tensors stay on disk until they are asked for."""

    path: Path
    step: int
    model: GPTConfig
    tokenizer: dict
    train: dict  # the TrainConfig of the run, as plain values
    state: dict  # what else the trainer needs to go on, as plain values
    files: dict  # name -> {"bytes", "xxh3_128"}
    chat_template: str | None = None  # of gpt2.data.chat; None: not trained on conversations
    lora: LoRAConfig | None = None  # the adapters it holds, instead of all weights
    base: dict | None = None  # what these are for: {"path", "xxh3_128"}
    run_id: str | None = None  # of the run that wrote it
    identity: dict | None = None  # of that run, and what its data is


def save_checkpoint(
    run: str | Path, step: int, model: GPT, optimizer: Optimizer | None = None, *,
    keep_last: int = 0, **description,
) -> Path:  # fmt: skip
    """write_checkpoint of a model and optimizer as they are; description: see describe."""
    meta = describe(model, **description)
    return write_checkpoint(run, step, snapshot(model, optimizer), meta, keep_last=keep_last)


def describe(model: GPT, *, tokenizer: dict, train: dict, **others) -> dict:
    """What write_checkpoint writes beside the tensors; others: further fields of Checkpoint."""
    meta = {"model": asdict(model.config), "tokenizer": tokenizer, "train": train, "state": {}}
    if lora.lora_config(model) is not None:
        meta |= {"lora": asdict(model.lora), "base": model.lora_base}
    return meta | others


def write_checkpoint(
    run: str | Path, step: int, tensors: Tensors, meta: dict, *, keep_last: int = 0,
    best: Path | None = None,
) -> Path:  # fmt: skip
    """Writes a snapshot as RUN/checkpoints/step_<step>, then deletes all but the newest keep_last
    (0 keeps all), the best, also where the link is to another, and this one; returns its path.

    Raises OSError where there is no room or it cannot be written, ValueError for weights or moments
    that are not finite; what was there before stays.
    """
    for group in tensors.values():
        storage.check_finite(group, f"step {step} is not saved")
    folder = Path(run) / "checkpoints" / f"step_{step:08d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    _tidy(folder.parent)
    needed = sum(t.nbytes for group in tensors.values() for t in group.values()) + (1 << 20)
    if needed > (free := shutil.disk_usage(folder.parent).free):
        words = f"a checkpoint of {needed / 1e6:.0f} MB does not fit the {free / 1e6:.0f} MB free"
        raise OSError(errno.ENOSPC, f"{words}: make room, or lower keep_last", str(folder.parent))
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir()
        for name, group in tensors.items():
            storage.write_tensors(temporary / name, group)
        if "lora" in meta:
            config = lora.adapter_config(LoRAConfig(**meta["lora"]), meta["base"]["path"])
            storage.write_text(temporary / lora.CONFIG, json.dumps(config, indent=2))
        paths = sorted(temporary.iterdir())
        files = {p.name: {"bytes": p.stat().st_size, "xxh3_128": _hash(p)} for p in paths}
        content = {"format": FORMAT, "step": step, **meta, "files": files}
        storage.write_text(temporary / META, _sign(content))
        storage.sync(temporary)
        if folder.exists():  # the same step again
            os.rename(folder, old)
        os.rename(temporary, folder)
        storage.sync(folder.parent)
        point_at(folder, "latest")
        kept = (folder, best, best_checkpoint(run))
        for path in list_checkpoints(run)[:-keep_last] if keep_last else []:
            if path not in kept:  # renamed, so that a half deleted one is never seen
                os.rename(path, path.with_name(f".{path.name}.tmp"))
    finally:
        _tidy(folder.parent)
    return folder


def set_aside(run: str | Path, after_step: int) -> list[Path]:
    """Renames a run's checkpoints of later steps, which are damaged or of a continuation that was
    left, so that none is resumed; returns their new paths. Whoever writes is to be waited for."""
    folder, moved = Path(run) / "checkpoints", []
    for step, name, path in _named(folder, OLD) + _named(folder, WHOLE):
        if step > after_step:
            target = folder / f"aside_{name}"
            while target.exists():
                target = target.with_name(f"{target.name}.again")
            moved.append(path.rename(target))
    if moved and (good := list_checkpoints(run)):
        point_at(good[-1], "latest")
    if (best := best_checkpoint(run)) and not best.exists():
        (folder / BEST).unlink()
    return moved


def best_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint that the link of a run's best names, if there is a link."""
    link = Path(run) / "checkpoints" / BEST
    return link.parent / os.readlink(link) if link.is_symlink() else None


def _named(folder: Path, pattern: str) -> list[tuple[int, str, Path]]:
    """(step, step_<digits>, path) of what has such a name in a folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(re.fullmatch(pattern, path.name), path) for path in paths]
    return [(int(match[2]), match[1], path) for match, path in found if match]


def _tidy(folder: Path) -> None:
    """Removes what a crash left of writing or deleting; the one that was being replaced returns."""
    for _, name, path in _named(folder, OLD) + _named(folder, HALF):
        if path.suffix == ".old" and not (folder / name).exists():
            os.rename(path, folder / name)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def point_at(folder: Path, name: str) -> None:
    """Makes a link beside a checkpoint point at it, at once: it never points at nothing."""
    temporary = folder.with_name(f".{name}.tmp")
    with suppress(OSError):  # a file system without links, or a copy where the link was
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name, target_is_directory=True)
        os.replace(temporary, folder.with_name(name))
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def _sign(meta: dict) -> str | None:
    """meta as JSON with its own hash, by which a change of any byte is noticed."""
    meta = {key: value for key, value in meta.items() if key != "xxh3_128"}
    with suppress(RecursionError):  # of what somebody else wrote
        digest = xxhash.xxh3_128_hexdigest(json.dumps(meta).encode())
        return json.dumps({**meta, "xxh3_128": digest}, indent=2)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def list_checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    folder = Path(run) / "checkpoints"
    # A crash while a step was replaced may have left only the one before.
    found = {found[:2]: found[2] for found in _named(folder, OLD) + _named(folder, WHOLE)}
    return [found[key] for key in sorted(found) if (found[key] / META).exists()]


def newest_good(
    run: str | Path, say: Callable[[str], None] = print, run_id: str | None = None
) -> Checkpoint | None:
    """The newest checkpoint of a run whose every byte is as it was written; None without any.

    Those that are damaged or, where run_id is given, of another run are passed over and told to
    say. Raises ValueError where there are only such.
    """
    found = list_checkpoints(run)
    for path in reversed(found):
        try:
            checkpoint = read_checkpoint(path)
            if run_id in (None, checkpoint.run_id) or checkpoint.run_id is None:
                verify(checkpoint)
                return checkpoint
            say(f"{path} is of another run, {checkpoint.run_id}: trying the one before it")
        except (ValueError, OSError) as error:
            say(f"a checkpoint is damaged, trying the one before it: {error}")
    if found:
        raise ValueError(f"{run}: all {len(found)} checkpoints are damaged or of another run")
    return None


def verify(checkpoint: Checkpoint, names: tuple[str, ...] = FILES) -> None:
    """Raises ValueError where a file's content is not what was written."""
    for name in checkpoint.files.keys() & set(names):
        path = checkpoint.path / name
        if _hash(path) != checkpoint.files[name].get("xxh3_128"):
            raise ValueError(f"{path}: its content changed since it was written: {DAMAGED}")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint, or the newest one of a run. Raises OSError where there is none, ValueError
    where it is damaged or of a newer format."""
    return _read_newest(Path(path), lambda checkpoint: checkpoint)


def _read_newest(path: Path, use: Callable):
    """use(checkpoint) for a checkpoint, or for the newest one of a run, which may go meanwhile."""
    while True:
        found = [path] if (path / META).exists() else list_checkpoints(path)
        found = found or list_checkpoints(path)  # keep_last may act while a folder is listed
        if not found:
            raise OSError(errno.ENOENT, "no checkpoint and no run with checkpoints here", str(path))
        try:
            return use(_read(found[-1]))
        except (OSError, ValueError):
            if (found[-1] / META).exists():
                raise  # else keep_last has just deleted it


def _read(folder: Path) -> Checkpoint:
    path = folder / META
    content = storage.read_json(path)
    if type(number := content.get("format")) is int and number > FORMAT:
        raise ValueError(f"{path}: format {number}: update gpt2-triton, which reads up to {FORMAT}")
    if _sign(content) != path.read_text(encoding="utf-8"):
        raise ValueError(f"{path}: its content changed since it was written: {DAMAGED}")
    meta = {field.name: content.get(field.name) for field in fields(Checkpoint)} | {"path": folder}
    meta["model"] = storage.make(GPTConfig, meta["model"], f"{path}: model")
    if meta["lora"] is not None:
        meta["lora"] = storage.make(LoRAConfig, meta["lora"], f"{path}: lora")
    for field in fields(Checkpoint):
        if not isinstance(value := meta[field.name], field.type):
            kind = getattr(field.type, "__name__", field.type)
            raise ValueError(f"{path}: {field.name} must be {kind}, is {value!r:.40}: {DAMAGED}")
    found, files, bases = Checkpoint(**meta), meta["files"], meta["base"] or {}
    if found.lora is not None and {type(bases.get(key)) for key in ("path", "xxh3_128")} != {str}:
        raise ValueError(f"{path}: base must name the model of the adapters: {DAMAGED}")
    weights = MODEL if found.lora is None else lora.TENSORS
    if found.step < 0 or weights not in files or not files.keys() <= set(FILES):
        raise ValueError(f"{path}: step {found.step}, files {list(files)[:5]}: {DAMAGED}")
    for name, file in files.items():
        size = (folder / name).stat().st_size
        if not isinstance(file, dict) or size != file.get("bytes"):
            raise ValueError(f"{folder / name}: has {size} bytes, {META} says other: {DAMAGED}")
    return found


def load_training_state(
    checkpoint: Checkpoint, model: GPT, optimizer: Optimizer | None = None
) -> None:
    """Copies a checkpoint's weights into model and, where given, its moments into optimizer; where
    ranks share these out each takes its part. Raises ValueError for another model, damaged files,
    or a checkpoint without optimizer state."""
    where, here = checkpoint.path, lora.lora_config(model)
    if optimizer is not None and OPTIMIZER not in checkpoint.files:
        raise ValueError(f"{where}: holds no optimizer state, so it cannot be resumed")
    ours, theirs = (
        asdict(config) | {f"lora_{k}": getattr(a, k, None) for k in ("rank", "alpha", "layers")}
        for config, a in ((model.config, here), (checkpoint.model, checkpoint.lora))
    )  # fmt: skip
    # Dropout changes no tensor: a run may go on, or be fine-tuned, with another.
    names = [k for k in ours if ours[k] != theirs[k] and k != "dropout"]
    differ = [f"{k} {theirs[k]} (here {ours[k]})" for k in names]
    if differ:
        raise ValueError(f"{where}: holds another model: {', '.join(differ)}")
    if checkpoint.lora is not None:
        base, ours = checkpoint.base, model.lora_base
        if base["xxh3_128"] != ours["xxh3_128"]:
            raise ValueError(
                f"{where}: adapters for another model: they were trained on {base['path']} with "
                f"weights of hash {base['xxh3_128']}, but {ours['path']} has {ours['xxh3_128']}"
            )
    verify(checkpoint)
    restore(where, model, optimizer)


def load_model(path_or_name: str | Path, device="cpu", kernels="auto") -> GPT:
    """A model from a checkpoint or run folder of ours, a Hugging Face folder, its name there, or a
    file of nanoGPT, build-nanogpt or llm.c.

    Adapters, ours or peft's, give their base model with them merged in. n_tokens are the ids of the
    tokenizer, where that has fewer than the vocabulary has rows. Raises OSError (nothing there),
    ValueError (damaged, no GPT-2, or adapters of another base), ImportError (no huggingface_hub).
    """
    return _load(_find(path_or_name), device, kernels, above=())


def _load(folder: Path, device, kernels, above: tuple[Path, ...]) -> GPT:
    """above: the adapters that this model is a base of."""
    if folder.resolve() in above:
        raise ValueError(f"{folder}: adapters that name themselves as their base model")
    above = (*above, folder.resolve())
    if _kind(folder) == "ours":
        return _read_newest(folder, lambda found: _load_ours(found, device, kernels, above))
    if _kind(folder) == "file":
        return foreign.load_file(folder, device, kernels)
    if _kind(folder) == "hf":
        return hf.load_hf(folder, device, kernels)
    base = _load(_find(lora.base_name(folder), folder), device, kernels, above)
    return lora.merge(lora.load_adapters(base, folder))


def _load_ours(checkpoint: Checkpoint, device, kernels, above: tuple[Path, ...]) -> GPT:
    where, n_tokens = checkpoint.path, tokenizer.from_dict(checkpoint.tokenizer).vocab_size
    if checkpoint.lora is None:
        verify(checkpoint, (MODEL,))
        path, wanted = where / MODEL, parameter_shapes(checkpoint.model)
        storage.check_shapes(storage.read_shapes(path), wanted, path)  # before memory is taken
        model = GPT(checkpoint.model, kernels, device)
        restore(where, model)
    else:
        base = _find(checkpoint.base["path"], where)
        model = _load(base, device, kernels, above)
        path, wanted = where / lora.TENSORS, lora.adapter_shapes(model, checkpoint.lora)
        storage.check_shapes(storage.read_shapes(path), wanted, path)
        lora.add_lora(model, checkpoint.lora, describe_base(base, model))
        load_training_state(checkpoint, model)
        lora.merge(model)
    model.n_tokens = min(n_tokens, model.config.vocab_size)
    return model


def load_tokenizer(path_or_name: str | Path) -> tokenizer.Tokenizer:
    """The tokenizer of a model. Raises as load_model, and ValueError for another of Hugging Face's
    than GPT-2's."""
    found = _describing(path_or_name)
    if isinstance(found, Checkpoint):
        return tokenizer.from_dict(found.tokenizer)
    if found is None:
        return tokenizer.GPT2Tokenizer()
    return (foreign.file_tokenizer if found.is_file() else hf.read_tokenizer)(found)


def load_chat_template(path_or_name: str | Path) -> str | None:
    """The template of gpt2.data.chat that a model was fine-tuned with; None where it was not.
    Raises as load_model, and ValueError for a Hugging Face folder with one of its own."""
    found = _describing(path_or_name)
    if isinstance(found, Checkpoint):
        return found.chat_template
    return None if found is None else hf.read_chat_template(found)


def describe_base(name: str | Path, model: GPT) -> dict:
    """What a checkpoint of adapters says of the model they are for: {"path", "xxh3_128"}.

    model: what load_model(name) gave, before it gets adapters. Where that came from adapters too,
    the hash is of hashes, since how the sums of merging are rounded differs between devices.
    """
    found = read_checkpoint(name) if _kind(Path(name)) == "ours" else None
    if found is not None and found.base is not None:
        parts = found.base["xxh3_128"] + found.files[lora.TENSORS]["xxh3_128"]
        return {"path": str(found.path), "xxh3_128": xxhash.xxh3_128_hexdigest(parts.encode())}
    return {"path": str(found.path if found else name), "xxh3_128": lora.weights_hash(model)}


def _kind(path: Path) -> str | None:
    """ours: a checkpoint or a run; hf: Hugging Face's GPT-2; adapters, as peft writes them; file:
    of whatever kind."""
    if path.is_file():
        return "file"
    if (path / META).exists() or (path / "checkpoints").is_dir():
        return "ours"
    kinds = {hf.CONFIG: "hf", lora.CONFIG: "adapters"}
    return next((kind for name, kind in kinds.items() if (path / name).exists()), None)


def _find(name: str | Path, adapters: Path | None = None) -> Path:
    """The folder of a model, downloaded if it is on the hub. adapters: those that name it; a path
    may then also be one from a folder above them, as when a folder with runs has moved."""
    for folder in (Path(), *(adapters.resolve().parents if adapters else ())):
        kind = _kind(folder / name)
        if kind and not (adapters and kind == "adapters"):
            return folder / name
    # owner/name, unless that would be a path from here
    exists, above = Path(name).exists(), Path(name).parent.exists()
    is_owners = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name)) and not (exists or above)
    if str(name) in hf.HUB_NAMES or is_owners:
        return hf.download(str(name))
    words = "not a model" if exists else "no such folder or file"
    words += f": a folder with {META}, checkpoints or {hf.CONFIG}, a file of nanoGPT, build-nanogpt"
    words += " or llm.c, or a name of the hub (gpt2, gpt2-medium ..., owner/name) is one"
    if files := [*Path(name).glob("*.pt")] if exists else []:
        words += f"; {files[-1].name} may be: name the file"
    if adapters:
        words = f"{name}, the base of these adapters, is neither here nor in a folder above"
    raise OSError(errno.ENOENT, words, str(adapters or name))


def _describing(name: str | Path, adapters: Path | None = None) -> Checkpoint | Path | None:
    """What says how text is written for a model: a checkpoint, or a folder of Hugging Face's; for
    peft's adapters that of the base. None: the hub's own GPT-2, known without a download."""
    if str(name) in hf.HUB_NAMES and _kind(Path(name)) is None:
        return None
    folder = _find(name, adapters)
    if _kind(folder) == "adapters":
        return _describing(lora.base_name(folder), folder)
    return read_checkpoint(folder) if _kind(folder) == "ours" else folder
