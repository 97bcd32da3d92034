"""JSON and safetensors files: checked before they are believed, whole or on the disk once written.

They may come from anywhere. Nothing is unpickled. Whatever is wrong is a ValueError of one line
with the path and the key; a file that is missing, or cannot be read or written, is an OSError.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

MAX_JSON = 1 << 26  # bytes
MAX_SIZE, MAX_LAYERS = 1 << 24, 1 << 12  # of a model: far beyond any, and cheap to describe
FLOATS = ("F32", "F16", "BF16")  # what float32 represents exactly, as safetensors names them
Shapes = dict[str, tuple[int, ...]]
Found = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


def read_json(path: Path) -> dict:
    """The object that a JSON file holds."""
    if not path.is_file():
        raise OSError(errno.ENOENT, "no such file", str(path))
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: more than {MAX_JSON >> 20} MB: not a description of a model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({str(error)[:100]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object {{...}}, holds a {type(content).__name__}")
    return content


def make(cls, values, where):
    """The dataclass cls of a model's description, from plain values in a sane range."""
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    values = values if isinstance(values, dict) else {"it": values}
    values = {key: tuple(v) if type(v) is list else v for key, v in values.items()}
    for key, value in values.items():
        kind, most = kinds.get(key), MAX_LAYERS if key == "n_layer" else MAX_SIZE
        right = type(value) is getattr(kind, "__origin__", kind)
        if kind in (int, float):  # a float is neither NaN nor huge
            right = type(value) in (int, kind) and (1 if kind is int else -most) <= value <= most
        if not right:
            limits = f" (a whole number from 1 to {most})" if kind is int else ""
            raise ValueError(f"{where}: {key} cannot be {value!r:.40}{limits}")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:  # TypeError: a field is missing, or another type
        words = str(error).removeprefix(f"{cls.__name__}.__init__() ")
        raise ValueError(f"{where}: {words}") from error


def read_shapes(path: Path) -> Found:
    """What a safetensors file holds, from its header; no tensor is read."""
    with _reading(path), safe_open(path, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in CPU memory; their values must be finite."""
    with _reading(path):
        tensors = load_file(path)
    check_finite(tensors, path)
    return tensors


def read_checked(path: Path, wanted: Shapes, dtypes=FLOATS) -> dict[str, Tensor]:
    """The tensors of a file that holds exactly what is wanted."""
    check_shapes(read_shapes(path), wanted, path, dtypes)
    return read_tensors(path)


@contextlib.contextmanager
def _reading(path: Path):
    if not path.is_file():
        raise OSError(errno.ENOENT, "no such file", str(path))
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut short, or not safetensors ({error})") from error
    except RuntimeError as error:  # of torch, where the file has gone since
        raise OSError(errno.EIO, str(error), str(path)) from error


def check_shapes(found: Found, wanted: Shapes, where, dtypes=FLOATS) -> None:
    """Raises ValueError where found is not exactly what is wanted: copying would broadcast."""
    if wanted.keys() != found.keys():
        missing, unknown = sorted(wanted.keys() - found.keys())[:3], sorted(found.keys() - wanted)
        words = f"missing {missing}, unknown {unknown[:3]}"
        raise ValueError(f"{where}: not the tensors of this model: {words}")
    for name, (dtype, shape) in found.items():
        if shape != wanted[name] or dtype not in dtypes:
            words = f"has shape {shape}, dtype {dtype}, must have {wanted[name]}"
            raise ValueError(f"{where}: {name} {words}, {' or '.join(dtypes)}")


def check_finite(tensors: dict[str, Tensor], where) -> None:
    """Raises ValueError for the first tensor with a value that is NaN or infinite."""
    for name, tensor in tensors.items():
        # A sum needs no memory; where it is not finite it may have overflowed.
        if not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {name} holds values that are not finite")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, str(error), str(path)) from error
    sync(path)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Brings a file's content, or a folder's list of files, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems: of folders
            raise
    finally:
        os.close(fd)


def finite(value):
    """A value of JSON with None for each number that is not finite, which strict JSON lacks."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value, indent: int | None = None) -> str:
    """Strict JSON; what JSON lacks as null or its text."""
    return json.dumps(finite(value), indent=indent, default=str, allow_nan=False)


def write_whole(path: Path, text: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(text.encode() if isinstance(text, str) else text)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a full disk what it holds is wanted back
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(path: Path) -> None:
    """Makes the folder of a file that is to be written; before the work for it is done. Raises
    OSError where it cannot be written."""
    if path.is_dir():
        raise OSError(errno.EISDIR, "a folder: name a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def set_aside(path: Path, why: str) -> str:
    """Renames what cannot be used to NAME.damaged, or .damaged.1 and so on; says so."""
    names = (f"{path.name}.damaged{f'.{n}' * (n > 0)}" for n in range(1 << 30))
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    try:
        path.rename(target)
    except OSError as error:
        return f"{why}; it cannot be set aside either: {error.strerror}"
    return f"{why}; set aside as {target.name}"
