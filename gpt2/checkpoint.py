"""Checkpoints: one format, one way out (save_checkpoint), one way in (load_model).

RUN/checkpoints/step_00001000/
    checkpoint.json         format, step, model shape, tokenizer, chat template of a fine-tuned
                            model, training options, the trainer's state, which run and what data it
                            is of, the size and xxh3-128 hash of each file, and its own hash
    *.safetensors           weights and moments, see gpt2.state. LoRA adapters lie in peft's layout,
                            with adapter_config.json; checkpoint.json names their base model
RUN/checkpoints/latest      a link to the newest one

Folders named step_<digits> are checkpoints, in the order of the number; nothing else there is
touched. One is written as .step_<digits>.tmp, synced, then renamed: one that exists is complete.
The one it replaces is .step_<digits>.old for that moment, and counts if the new one never came.
There is no random state, because that is a function of (seed, step). Nothing is pickled. Any change
of any byte is noticed when it is read; newest_good then takes the checkpoint before.
"""

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2 import hf, lora, tokenizer
from gpt2.config import GPTConfig, LoRAConfig
from gpt2.model import GPT, parameter_shapes
from gpt2.models import META, find, find_base, is_hf, is_model, is_ours
from gpt2.state import MODEL, OPTIMIZER, Tensors, restore, snapshot
from gpt2.storage import (
    check_finite,
    check_shapes,
    make,
    read_json,
    read_shapes,
    sync_folder,
    write_tensors,
    write_text,
)

FORMAT = 2  # 1 had no run_id and identity
FILES = (MODEL, OPTIMIZER, lora.TENSORS, lora.CONFIG)  # no other is read
DAMAGED = "damaged; use another checkpoint"


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
    run: str | Path,
    step: int,
    model: GPT,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    keep_last: int = 0,
    **description,
) -> Path:
    """Writes RUN/checkpoints/step_<step> and returns its path; see write_checkpoint.

    description: what describe takes.
    """
    meta = describe(model, **description)
    return write_checkpoint(run, step, snapshot(model, optimizer), meta, keep_last=keep_last)


def describe(
    model: GPT,
    *,
    tokenizer: dict,
    train: dict,
    state: dict | None = None,
    chat_template: str | None = None,
    run_id: str | None = None,
    identity: dict | None = None,
) -> dict:
    """What write_checkpoint writes beside the tensors, as plain values; see Checkpoint."""
    meta = {
        "model": dataclasses.asdict(model.config), "tokenizer": tokenizer, "train": train,
        "state": state or {}, "chat_template": chat_template, "run_id": run_id,
        "identity": identity,
    }  # fmt: skip
    if lora.lora_config(model) is not None:
        if model.lora_base is None:
            raise ValueError("a checkpoint of adapters names their base: give it to add_lora")
        meta |= {"lora": dataclasses.asdict(model.lora), "base": model.lora_base}
    return meta


def write_checkpoint(
    run: str | Path, step: int, tensors: Tensors, meta: dict, *, keep_last: int = 0
) -> Path:
    """Writes a snapshot as RUN/checkpoints/step_<step>; returns its path.

    Then deletes all but the newest keep_last (0 keeps all) and this one.
    Raises OSError where there is no room or it cannot be written, ValueError for weights or moments
    that are not finite; what was there before stays.
    """
    for group in tensors.values():
        check_finite(group, f"step {step} is not saved")
    folder = Path(run) / "checkpoints" / f"step_{step:08d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    _tidy(folder.parent)
    needed = sum(t.nbytes for group in tensors.values() for t in group.values()) + (1 << 20)
    if needed > (free := shutil.disk_usage(folder.parent).free):
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint of {needed / 1e6:.0f} MB does not fit the {free / 1e6:.0f} MB that are "
            "free; earlier checkpoints are untouched. Free room, or lower keep_last",
            str(folder.parent),
        )
    temporary = _hidden(folder, "tmp")
    try:
        temporary.mkdir()
        for name, group in tensors.items():
            write_tensors(temporary / name, group)
        if "lora" in meta:
            config = lora.adapter_config(LoRAConfig(**meta["lora"]), meta["base"]["path"])
            write_text(temporary / lora.CONFIG, json.dumps(config, indent=2))
        files = {path.name: _describe_file(path) for path in sorted(temporary.iterdir())}
        content = {"format": FORMAT, "step": step, **meta, "files": files}
        write_text(temporary / META, _sign(content))
        sync_folder(temporary)
        if folder.exists():  # the same step again
            os.rename(folder, _hidden(folder, "old"))
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        _tidy(folder.parent)
    _point_latest_at(folder)
    for path in list_checkpoints(run)[:-keep_last] if keep_last else []:
        if path != folder:
            os.rename(path, _hidden(path, "tmp"))  # so that a half deleted one is never seen
    _tidy(folder.parent)
    return folder


def list_checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    folder = Path(run) / "checkpoints"
    # A crash while a step was replaced may have left only the one before.
    found = _named(folder, r"\.(step_([0-9]+))\.old") | _named(folder, r"(step_([0-9]+))")
    return [found[key] for key in sorted(found) if (found[key] / META).exists()]


def newest_good(
    run: str | Path, say: Callable[[str], None] = print, run_id: str | None = None
) -> Checkpoint | None:
    """The newest checkpoint of a run whose every byte is as it was written; None without any.

    say is told of each one passed over: damaged, or, where run_id is given, of another run. Raises
    ValueError where there are only such.
    """
    found = list_checkpoints(run)
    for path in reversed(found):
        try:
            checkpoint = read_checkpoint(path)
            if run_id is None or checkpoint.run_id in (None, run_id):
                verify(checkpoint)
                return checkpoint
            say(f"{path} is of another run, {checkpoint.run_id}: trying the one before it")
        except (ValueError, OSError) as error:
            say(f"a checkpoint is damaged, trying the one before it: {error}")
    if found:
        other = "" if run_id is None else " or of another run"
        raise ValueError(f"{run}: all {len(found)} checkpoints are damaged{other}")
    return None


def verify(checkpoint: Checkpoint, names: tuple[str, ...] = FILES) -> None:
    """Raises ValueError where a file's content is not what was written, OSError if unreadable."""
    for name in checkpoint.files.keys() & set(names):
        if _hash(checkpoint.path / name) != checkpoint.files[name].get("xxh3_128"):
            raise ValueError(
                f"{checkpoint.path / name}: its content changed since it was written; use another "
                "checkpoint"
            )


def set_aside(run: str | Path, after_step: int) -> list[Path]:
    """Renames a run's checkpoints of later steps, which a run that goes on from there would meet.

    They are damaged, or belong to a continuation that was left. Returns their new paths.
    """
    folder, moved = Path(run) / "checkpoints", []
    _tidy(folder)
    for (step, name), path in _named(folder, r"(step_([0-9]+))").items():
        if step > after_step:
            target, n = folder / f"aside_{name}", 1
            while target.exists():
                target, n = folder / f"aside_{name}.{n}", n + 1
            moved.append(path.rename(target))
    good = list_checkpoints(run)
    if moved and good:
        _point_latest_at(good[-1])
    return moved


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads checkpoint.json of a checkpoint folder, or of the newest one in a run folder.

    Raises OSError where there is none, ValueError where it is damaged or of a newer format.
    """
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
    meta = read_json(path)
    number = meta.get("format")
    if type(number) is int and number > FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {number}, this version reads up to {FORMAT}: update "
            "gpt2-triton"
        )
    try:
        unchanged = _sign(meta) == path.read_text(encoding="utf-8")
    except RecursionError:
        unchanged = False
    if not unchanged:
        raise ValueError(f"{path}: its content changed since it was written: {DAMAGED}")
    needed = {"step": int, "tokenizer": dict, "train": dict, "state": dict, "files": dict}
    optional = {"chat_template": str, "run_id": str, "identity": dict, "lora": dict, "base": dict}
    for key, kind in (needed | optional).items():
        value = meta.get(key)
        if type(value) is not kind and (value is not None or key in needed):
            raise ValueError(f"{path}: {key} must be {kind.__name__}, is {value!r:.40}: {DAMAGED}")
    model = make(GPTConfig, meta.get("model"), f"{path}: model")
    adapters, base = meta.get("lora"), meta.get("base")
    if adapters is not None:
        adapters = make(LoRAConfig, adapters, f"{path}: lora")
        if not base or not all(type(base.get(key)) is str for key in ("path", "xxh3_128")):
            raise ValueError(f"{path}: base must name the model of the adapters: {DAMAGED}")
    files, weights = meta["files"], MODEL if adapters is None else lora.TENSORS
    if meta["step"] < 0 or weights not in files or not files.keys() <= set(FILES):
        raise ValueError(f"{path}: step {meta['step']}, files {list(files)[:5]}: {DAMAGED}")
    for name, file in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if not isinstance(file, dict) or found is None or found != file.get("bytes"):
            words = "is missing" if found is None else f"has {found} bytes, checkpoint.json differs"
            raise ValueError(f"{folder / name}: {words}: {DAMAGED}")
    return Checkpoint(
        folder, meta["step"], model, meta["tokenizer"], meta["train"], meta["state"], files,
        meta.get("chat_template"), adapters, base, meta.get("run_id"), meta.get("identity"),
    )  # fmt: skip


def load_model(path_or_name: str | Path, device="cpu", kernels="auto") -> GPT:
    """A model from a checkpoint or run folder of ours, a Hugging Face folder, or its name there.

    A checkpoint or a folder of peft that holds adapters gives its base model with them merged in.
    Its n_tokens are the ids of the tokenizer, where that has fewer than the vocabulary has rows.
    Raises OSError (nothing there), ValueError (damaged, not a GPT-2, or adapters whose base has
    other weights), ImportError (a name without huggingface_hub).
    """
    return _load(path_or_name, device, kernels, above=())


def _load(path_or_name: str | Path, device, kernels, above: tuple[Path, ...]) -> GPT:
    """above: the adapters that this model is a base of."""
    folder = find(path_or_name)
    if folder.resolve() in above:
        raise ValueError(f"{folder}: adapters that name themselves as their base model")
    above = (*above, folder.resolve())
    if is_ours(folder):
        return _read_newest(folder, lambda found: _load_ours(found, device, kernels, above))
    if is_hf(folder):
        return hf.load_hf(folder, device, kernels)
    base = find_base(lora.base_name(folder), folder)
    return lora.merge(lora.load_adapters(_load(base, device, kernels, above), folder))


def _load_ours(checkpoint: Checkpoint, device, kernels, above: tuple[Path, ...]) -> GPT:
    where, n_tokens = checkpoint.path, _make_tokenizer(checkpoint).vocab_size
    if checkpoint.lora is None:
        verify(checkpoint, (MODEL,))
        wanted = parameter_shapes(checkpoint.model)
        check_shapes(read_shapes(where / MODEL), wanted, where / MODEL)
        model = GPT(checkpoint.model, kernels, device)
        restore(where, model)
    else:
        base = find_base(checkpoint.base["path"], where)
        model = _load(base, device, kernels, above)
        _check_same_model(checkpoint, model)
        wanted = lora.adapter_shapes(model, checkpoint.lora)
        check_shapes(read_shapes(where / lora.TENSORS), wanted, where / lora.TENSORS)
        lora.add_lora(model, checkpoint.lora, describe_base(base, model))
        load_training_state(checkpoint, model)
        lora.merge(model)
    model.n_tokens = min(n_tokens, model.config.vocab_size)
    return model


def load_tokenizer(path_or_name: str | Path) -> tokenizer.Tokenizer:
    """The tokenizer that a model was trained with.

    Raises OSError as load_model, ValueError for a Hugging Face folder with another than GPT-2's.
    """
    folder = _find_described(path_or_name)
    if folder is None:
        return tokenizer.GPT2Tokenizer()
    if is_hf(folder):
        return hf.read_tokenizer(folder)
    return _make_tokenizer(read_checkpoint(folder))


def load_chat_template(path_or_name: str | Path) -> str | None:
    """The template of gpt2.data.chat that a model was fine-tuned with; None where it was not.

    Raises OSError as load_model, and ValueError for a Hugging Face folder with one of its own.
    """
    folder = _find_described(path_or_name)
    if folder is None:
        return None
    if is_hf(folder):
        return hf.check_chat_template(folder)
    return read_checkpoint(folder).chat_template


def _find_described(name: str | Path) -> Path | None:
    """The folder that says how text is written for a model: for adapters of peft that of the base.
    None for the hub's own GPT-2, of which it is known without a download."""
    if str(name) in hf.HUB_NAMES and not is_model(Path(name)):
        return None
    folder = find(name)
    if is_ours(folder) or is_hf(folder):
        return folder
    return _find_described(find_base(lora.base_name(folder), folder))


def describe_base(name: str | Path, model: GPT) -> dict:
    """What a checkpoint of adapters says of the model they are for: {"path", "xxh3_128"}.

    model: what load_model(name) gave, before it gets adapters. Where that came from adapters too,
    the hash is of hashes, since how the sums of merging are rounded differs between devices.
    """
    found = read_checkpoint(name) if is_ours(Path(name)) else None
    if found is None or found.base is None:
        path = name if found is None else found.path
        return {"path": str(path), "xxh3_128": lora.weights_hash(model)}
    import xxhash

    parts = found.base["xxh3_128"] + found.files[lora.TENSORS]["xxh3_128"]
    return {"path": str(found.path), "xxh3_128": xxhash.xxh3_128_hexdigest(parts.encode())}


def load_training_state(
    checkpoint: Checkpoint, model: GPT, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Copies a checkpoint's weights into model and, where given, its moments into optimizer.

    Where ranks share these out each takes its part.
    Raises ValueError for a model of another shape, damaged files, or a checkpoint without optimizer
    state.
    """
    _check_same_model(checkpoint, model)
    if optimizer is not None and OPTIMIZER not in checkpoint.files:
        raise ValueError(f"{checkpoint.path}: holds no optimizer state, so it cannot be resumed")
    _check_adapters(checkpoint, model)
    verify(checkpoint)
    restore(checkpoint.path, model, optimizer)


def _check_same_model(checkpoint: Checkpoint, model: GPT) -> None:
    ours, theirs = dataclasses.asdict(model.config), dataclasses.asdict(checkpoint.model)
    # Dropout changes no tensor: a run may go on, or be fine-tuned, with another.
    differ = [k for k in ours if ours[k] != theirs[k] and k != "dropout"]
    if differ:
        words = ", ".join(f"{k} {theirs[k]} (here {ours[k]})" for k in differ)
        raise ValueError(f"{checkpoint.path}: holds another model: {words}")


def _check_adapters(checkpoint: Checkpoint, model: GPT) -> None:
    """Raises ValueError where a checkpoint's adapters are not those of the model, and for it."""
    here, there = lora.lora_config(model), checkpoint.lora
    if (here is None) != (there is None):
        kinds = {True: "all weights", False: "adapters"}
        raise ValueError(
            f"{checkpoint.path}: holds {kinds[there is None]}, but {kinds[here is None]} are "
            "trained here: use the lora_rank that it was trained with"
        )
    if here is None:
        return
    if (here.rank, here.alpha, here.layers) != (there.rank, there.alpha, there.layers):
        raise ValueError(f"{checkpoint.path}: holds other adapters: {there} (here {here})")
    ours, theirs = model.lora_base, checkpoint.base
    if ours["xxh3_128"] != theirs["xxh3_128"]:
        raise ValueError(
            f"{checkpoint.path}: adapters for another model: they were trained on {theirs['path']} "
            f"with weights of hash {theirs['xxh3_128']}, but {ours['path']} has {ours['xxh3_128']}"
        )


def _make_tokenizer(checkpoint: Checkpoint) -> tokenizer.Tokenizer:
    try:
        return tokenizer.from_dict(checkpoint.tokenizer)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path / META}: {error}") from error


def _sign(meta: dict) -> str:
    """meta as JSON with its own hash, so that a change of any of its bytes is noticed."""
    import xxhash

    meta = {key: value for key, value in meta.items() if key != "xxh3_128"}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(meta).encode())
    return json.dumps({**meta, "xxh3_128": digest}, indent=2)


def _describe_file(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "xxh3_128": _hash(path)}


def _hash(path: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _point_latest_at(folder: Path) -> None:
    """Moves the link at once: it never points at nothing."""
    temporary = folder.with_name(".latest.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
        os.replace(temporary, folder.with_name("latest"))
    except OSError:  # a file system without links: nothing here reads it
        temporary.unlink(missing_ok=True)


def _hidden(folder: Path, end: str) -> Path:
    return folder.with_name(f".{folder.name}.{end}")


def _named(folder: Path, pattern: str) -> dict[tuple[int, str], Path]:
    """What has such a name in a folder, by (step, step_<digits>)."""
    if not folder.is_dir():
        return {}
    found = [(re.fullmatch(pattern, path.name), path) for path in folder.iterdir()]
    return {(int(match[2]), match[1]): path for match, path in found if match}


def _tidy(folder: Path) -> None:
    """Removes what a crash left of writing or deleting; the one that was being replaced returns."""
    for end in ("old", "tmp"):
        for (_, name), path in _named(folder, rf"\.(step_([0-9]+))\.{end}").items():
            if end == "old" and not (folder / name).exists():
                os.rename(path, folder / name)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
