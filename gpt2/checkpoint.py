"""Checkpoints: one format, one way out (save_checkpoint), one way in (load_model).

RUN/checkpoints/step_00001000/
    checkpoint.json         format, step, model shape, tokenizer, chat template of a fine-tuned
                            model, training options, the trainer's state, the size and xxh3-128 hash
                            of each file, and its own hash
    model.safetensors       float32 weights under Hugging Face's names, without padding
    optimizer.safetensors   AdamW's moments and step, as <parameter>/<state>
    adapter_model.safetensors, adapter_config.json
                            instead of model.safetensors where LoRA adapters are trained: these in
                            peft's layout; checkpoint.json then names the base model and its hash
RUN/checkpoints/latest      a link to the newest one

A folder is written beside its final name, synced, then renamed: one that exists is complete. It
holds no random state, because that is a function of (seed, step). Nothing is pickled. Any change of
any byte is noticed when it is read; newest_good then takes the checkpoint before.
"""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt2 import hf, lora, tokenizer
from gpt2.cli import coerce
from gpt2.config import GPTConfig, LoRAConfig
from gpt2.model import GPT

FORMAT = 1
META, MODEL, OPTIMIZER = "checkpoint.json", "model.safetensors", "optimizer.safetensors"
MOMENTS, STEP = ("exp_avg", "exp_avg_sq"), "step"  # AdamW's names of its state
Tensors = dict[str, dict[str, Tensor]]  # file name -> tensor name -> tensor in host memory


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


def save_checkpoint(
    run: str | Path,
    step: int,
    model: GPT,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    tokenizer: dict,
    train: dict,
    state: dict | None = None,
    chat_template: str | None = None,
    keep_last: int = 0,
    keep_every: int = 0,
) -> Path:
    """Writes RUN/checkpoints/step_<step> and returns its path; see write_checkpoint."""
    meta = describe(
        model, tokenizer=tokenizer, train=train, state=state, chat_template=chat_template
    )
    tensors = snapshot(model, optimizer)
    return write_checkpoint(run, step, tensors, meta, keep_last=keep_last, keep_every=keep_every)


def describe(
    model: GPT,
    *,
    tokenizer: dict,
    train: dict,
    state: dict | None = None,
    chat_template: str | None = None,
) -> dict:
    """What write_checkpoint writes beside the tensors."""
    shape = dataclasses.asdict(model.config)
    meta = {"model": shape, "tokenizer": tokenizer, "train": train, "state": state or {}}
    if chat_template is not None:
        meta["chat_template"] = chat_template
    if lora.lora_config(model) is not None:
        if model.lora_base is None:
            raise ValueError("a checkpoint of adapters names their base: give it to add_lora")
        meta |= {"lora": dataclasses.asdict(model.lora), "base": model.lora_base}
    return meta


@torch.no_grad()
def snapshot(
    model: GPT,
    optimizer: torch.optim.Optimizer | None = None,
    out: Tensors | None = None,
    *,
    keep: bool = True,
) -> Tensors:
    """Copies of a model's weights and an optimizer's moments in host memory.

    Where ranks share these out (gpt2.train.parallel) all must call it; each tensor is gathered for
    itself, and copied only where keep is True.
    out: an earlier snapshot of the same model, which is written over and returned: its memory, for
    a GPU page-locked, is allocated only once.
    """
    sources = {_weights_file(model): _model_tensors(model)}
    if optimizer is not None:
        sources[OPTIMIZER] = _optimizer_tensors(model, optimizer)
    out = {} if out is None else out
    for file, tensors in sources.items():
        memory = out.setdefault(file, {})
        for name, tensor in tensors:
            if not keep:
                continue
            if name not in memory:
                memory[name] = host_memory(tensor)
            memory[name].copy_(tensor, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return out


def write_checkpoint(
    run: str | Path,
    step: int,
    tensors: Tensors,
    meta: dict,
    *,
    keep_last: int = 0,
    keep_every: int = 0,
) -> Path:
    """Writes a snapshot as RUN/checkpoints/step_<step>; returns its path.

    Then deletes all but the newest keep_last (0 keeps all) and those at multiples of keep_every.
    Raises OSError where there is no room or it cannot be written; what was there before stays.
    """
    folder = Path(run) / "checkpoints" / f"step_{step:08d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".*.tmp"):
        _delete(leftover)
    needed = sum(t.nbytes for group in tensors.values() for t in group.values()) + (1 << 20)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint of {needed / 1e6:.0f} MB does not fit the {free / 1e6:.0f} MB that are "
            "free; earlier checkpoints are untouched. Free room, or lower keep_last",
            str(folder.parent),
        )
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        temporary.mkdir()
        files = {name: _write_tensors(temporary / name, group) for name, group in tensors.items()}
        if "lora" in meta:
            config = LoRAConfig(**meta["lora"])
            files[lora.CONFIG] = _write_adapter_config(temporary, config, meta["base"])
        with open(temporary / META, "w") as file:
            file.write(_sign({"format": FORMAT, "step": step, **meta, "files": files}))
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(temporary)
        if folder.exists():  # the same step again
            _delete(folder)
        os.rename(temporary, folder)
        _point_latest_at(folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep_last:
        for old in list_checkpoints(run)[:-keep_last]:
            if not keep_every or _step_of(old) % keep_every:
                _delete(old)
    return folder


def list_checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    return sorted(p.parent for p in Path(run).glob(f"checkpoints/step_*/{META}"))


def newest_good(run: str | Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint of a run whose every byte is as it was written; None without any.

    say is told of each damaged one. Raises ValueError where there are only damaged ones.
    """
    found = list_checkpoints(run)
    for path in reversed(found):
        try:
            checkpoint = read_checkpoint(path)
            verify(checkpoint)
            return checkpoint
        except (ValueError, OSError) as error:
            say(f"a checkpoint is damaged, trying the one before it: {error}")
    if found:
        raise ValueError(f"{run}: all {len(found)} checkpoints are damaged")
    return None


def verify(checkpoint: Checkpoint) -> None:
    """Raises ValueError where a file's content is not what was written, OSError if unreadable."""
    for name, file in checkpoint.files.items():
        if _hash(checkpoint.path / name) != file["xxh3_128"]:
            raise ValueError(
                f"{checkpoint.path / name}: its content changed since it was written; use another "
                "checkpoint"
            )


def set_aside(run: str | Path, after_step: int) -> list[Path]:
    """Renames a run's checkpoints of later steps, which a run that goes on from there would meet.

    They are damaged, or belong to a continuation that was left. Returns their new paths.
    """
    moved = []
    for path in list_checkpoints(run):
        if _step_of(path) > after_step:
            target, n = path.with_name(f"aside_{path.name}"), 1
            while target.exists():
                target, n = path.with_name(f"aside_{path.name}.{n}"), n + 1
            moved.append(path.rename(target))
    good = list_checkpoints(run)
    if moved and good:
        _point_latest_at(good[-1])
    return moved


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
        text = (path / META).read_text()
        meta = json.loads(text)
        number = meta["format"]
        if isinstance(number, int) and number > FORMAT:
            raise ValueError(
                f"{path}: checkpoint format {number}, this version reads up to {FORMAT}: "
                "update gpt2-triton"
            )
        del meta["xxh3_128"]
        if _sign(meta) != text:
            raise ValueError(
                f"{path / META}: its content changed since it was written: damaged; "
                "use another checkpoint"
            )
        model = GPTConfig(**coerce(GPTConfig, meta["model"], f"{path / META}: model"))
        adapters = None
        if "lora" in meta:
            adapters = LoRAConfig(**coerce(LoRAConfig, meta["lora"], f"{path / META}: lora"))
        for name, file in meta["files"].items():
            size = (path / name).stat().st_size if (path / name).exists() else -1
            if size != file["bytes"]:
                found = "is missing" if size < 0 else f"has {size} bytes"
                raise ValueError(
                    f"{path / name}: {found}, should have {file['bytes']}: damaged; use another "
                    "checkpoint"
                )
        return Checkpoint(
            path, meta["step"], model, meta["tokenizer"], meta["train"], meta["state"],
            meta["files"], meta.get("chat_template"), adapters, meta.get("base"),
        )  # fmt: skip
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / META}: damaged ({error!r}); use another checkpoint") from error


def load_model(path_or_name: str | Path, device="cpu", kernels="auto") -> GPT:
    """A model from a checkpoint or run folder of ours, a Hugging Face folder, or its name there.

    A checkpoint or a folder of peft that holds adapters gives its base model with them merged in.
    Raises OSError (nothing there), ValueError (damaged, not a GPT-2, or adapters whose base has
    other weights), ImportError (a name without huggingface_hub).
    """
    path = Path(path_or_name)
    if _is_hf_folder(path):
        return hf.load_hf(path, device, kernels)
    if _is_ours(path):
        checkpoint = read_checkpoint(path)
        if checkpoint.lora is not None:
            return lora.merge(_load_with_adapters(checkpoint, device, kernels))
        model = GPT(checkpoint.model, kernels, device)
        load_training_state(checkpoint, model)
        return model
    if (path / lora.CONFIG).exists():
        base = _find_base(lora.base_name(path), path)
        return lora.merge(lora.load_adapters(load_model(base, device, kernels), path))
    if str(path_or_name) in hf.HUB_NAMES or not path.exists() and _may_be_hub_name(path_or_name):
        return hf.load_hf(hf.download(str(path_or_name)), device, kernels)
    raise OSError(
        errno.ENOENT,
        "no checkpoint, run or Hugging Face folder, and no name of the hub "
        f"({', '.join(hf.HUB_NAMES)}, or owner/name)",
        str(path_or_name),
    )


def describe_base(name: str | Path, model: GPT) -> dict:
    """What a checkpoint of adapters says of the model they are for: {"path", "xxh3_128"}.

    model: what load_model(name) gave, before it gets adapters. Where that came from adapters too,
    the hash is of hashes, since how the sums of merging are rounded differs between devices.
    """
    if not _is_ours(Path(name)):
        return {"path": str(name), "xxh3_128": lora.weights_hash(model)}
    found = read_checkpoint(name)
    if found.base is None:
        return {"path": str(found.path), "xxh3_128": lora.weights_hash(model)}
    import xxhash

    parts = found.base["xxh3_128"] + found.files[lora.TENSORS]["xxh3_128"]
    return {"path": str(found.path), "xxh3_128": xxhash.xxh3_128_hexdigest(parts.encode())}


def _load_with_adapters(checkpoint: Checkpoint, device, kernels) -> GPT:
    base = _find_base(checkpoint.base["path"], checkpoint.path)
    model = load_model(base, device, kernels)
    lora.add_lora(model, checkpoint.lora, describe_base(base, model))
    load_training_state(checkpoint, model)
    return model


def _find_base(name: str, adapters: Path) -> str | Path:
    """A base model by its name in a checkpoint: a path from here, or from above the checkpoint, as
    when a folder with runs has moved; else a name of the hub. Raises OSError."""
    for folder in (Path(), *adapters.resolve().parents):
        if _is_ours(folder / name) or _is_hf_folder(folder / name):
            return folder / name
    if name in hf.HUB_NAMES or _may_be_hub_name(name) and not name.startswith((".", "/")):
        return name
    raise OSError(
        errno.ENOENT,
        f"holds adapters for {name}, which is neither here nor in a folder above them: put the "
        "base model back there",
        str(adapters),
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

    Where ranks share these out each takes its part.
    Raises ValueError for a model of another shape, damaged files, or a checkpoint without optimizer
    state.
    """
    if checkpoint.model != model.config:
        ours, theirs = dataclasses.asdict(model.config), dataclasses.asdict(checkpoint.model)
        differ = [f"{k} {theirs[k]} (here {ours[k]})" for k in ours if ours[k] != theirs[k]]
        # Dropout changes no tensor: a run may go on, or be fine-tuned, with another.
        if [d for d in differ if not d.startswith("dropout")]:
            raise ValueError(f"{checkpoint.path}: holds another model: {', '.join(differ)}")
    if optimizer is not None and OPTIMIZER not in checkpoint.files:
        raise ValueError(f"{checkpoint.path}: holds no optimizer state, so it cannot be resumed")
    _check_adapters(checkpoint, model)
    verify(checkpoint)
    weights, prefix, saved = _weights_file(model), _prefix(model), _saved_parameters(model)
    files = (weights,) if optimizer is None else (weights, OPTIMIZER)
    stored = {name: _read_tensors(checkpoint.path / name) for name in files}
    for name, parameter in saved.items():
        parameter.copy_(_placed(stored[weights][prefix + name], parameter))
    if optimizer is None:
        return
    own = {p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in saved.items():
        if parameter not in own:
            continue
        state = optimizer.state[parameter]
        for key in MOMENTS:
            value = _placed(stored[OPTIMIZER][f"{name}/{key}"], parameter)
            state[key] = torch.zeros_like(parameter).copy_(value)
        # Fused AdamW wants its step where the parameter is. A copy: it counts in place.
        state[STEP] = stored[OPTIMIZER][f"{name}/{STEP}"].to(parameter.device, copy=True)


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """value with the padding of a parameter; of one that ranks share out, this rank's part."""
    whole = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    whole[: len(value)] = value
    if not _is_shared_out(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _is_shared_out(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor; importing that takes long


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
    shape = [(c.rank, c.alpha, c.layers) for c in (there, here)]
    if shape[0] != shape[1]:
        raise ValueError(f"{checkpoint.path}: holds other adapters: {there} (here {here})")
    if model.lora_base["xxh3_128"] != checkpoint.base["xxh3_128"]:
        raise ValueError(
            f"{checkpoint.path}: adapters for another model: they were trained on "
            f"{checkpoint.base['path']} with weights of hash {checkpoint.base['xxh3_128']}, but "
            f"{model.lora_base['path']} has {model.lora_base['xxh3_128']}"
        )


def _weights_file(model: GPT) -> str:
    return MODEL if lora.lora_config(model) is None else lora.TENSORS


def _prefix(model: GPT) -> str:
    return "" if lora.lora_config(model) is None else lora.PREFIX


def _saved_parameters(model: GPT) -> dict[str, torch.nn.Parameter]:
    """Those that a checkpoint holds: of a model with adapters only these."""
    if lora.lora_config(model) is not None:
        return lora.adapter_parameters(model)
    return dict(model.named_parameters())


def _model_tensors(model: GPT):
    for name, parameter in _saved_parameters(model).items():
        yield _prefix(model) + name, _whole(name, parameter.detach(), model.config)


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer):
    # An optimizer whose state lies on other ranks as well has a way to get it.
    moments = getattr(optimizer, "moments", optimizer.state.__getitem__)
    for name, parameter in _saved_parameters(model).items():
        for key, value in moments(parameter).items():
            yield f"{name}/{key}", _whole(name, value, model.config)


def _whole(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    if _is_shared_out(tensor):
        tensor = tensor.full_tensor()
    return _without_padding(name, tensor, config)


def _without_padding(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    if name == "transformer.wte.weight" and tensor.dim() == 2:
        tensor = tensor[: config.vocab_size]
    return tensor


def host_memory(like: Tensor) -> Tensor:
    """Memory for a copy of a tensor, page-locked where that tensor is on a GPU."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")


def _sign(meta: dict) -> str:
    """meta as JSON with its own hash, so that a change of any of its bytes is noticed."""
    import xxhash

    digest = xxhash.xxh3_128_hexdigest(json.dumps(meta).encode())
    return json.dumps({**meta, "xxh3_128": digest}, indent=2)


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


def _write_adapter_config(folder: Path, config: LoRAConfig, base: dict) -> dict:
    path = folder / lora.CONFIG
    with open(path, "w") as file:
        json.dump(lora.adapter_config(config, base["path"]), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": _hash(path)}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

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


def _point_latest_at(folder: Path) -> None:
    """Moves the link at once: it never points at nothing."""
    temporary = folder.with_name(".latest.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
        os.replace(temporary, folder.with_name("latest"))
    except OSError:  # a file system without links: nothing here reads it
        temporary.unlink(missing_ok=True)


def _delete(folder: Path) -> None:
    """Out of sight first, so that a half deleted checkpoint is never seen."""
    hidden = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.old.tmp")
    if hidden != folder:
        os.rename(folder, hidden)
    if hidden.is_dir() and not hidden.is_symlink():
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        hidden.unlink(missing_ok=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _is_hf_folder(path: Path) -> bool:
    return (path / "config.json").exists() and not (path / META).exists()


def _is_ours(path: Path) -> bool:
    return (path / META).exists() or (path / "checkpoints").is_dir()


def _may_be_hub_name(name: str | Path) -> bool:
    owner_and_name = str(name).split("/")
    return len(owner_and_name) == 2 and all(owner_and_name)
