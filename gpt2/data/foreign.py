"""Data in the files of other programs: folders of datasets' save_to_disk, Megatron's .idx and .bin.

Source of the latter: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gpt2.data import files
from gpt2.data.readers import LocalFiles, Row, no_field

EOT = 50256  # GPT-2's end of text, its last token
MEGATRON_MAGIC, MEGATRON_DTYPES = b"MMIDIDX\0\0", {4: "<i4", 8: "<u2"}
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, documents and 1


class SavedRows(LocalFiles):
    """The rows of a folder of save_to_disk, whose .arrow files are files."""

    def _rows(
        self, skip: int = 0, columns: list[str] | None = None
    ) -> Iterator[tuple[str, object]]:
        hub, folder = files.train_extra("datasets", "folders of save_to_disk"), self.files[0].parent
        with _reading(folder):
            data = hub.load_from_disk(str(folder))
        for name in set(columns or ()) - set(data.column_names):
            raise ValueError(no_field(name, data.column_names, folder))
        data = data.select_columns(columns) if columns else data
        for start in range(skip, len(data), 256):
            with _reading(folder):
                rows = data[start : start + 256]
            self.bytes_in_file = self.bytes * start // len(data)
            for number, values in enumerate(zip(*rows.values(), strict=True), start + 1):
                yield f"{folder}: row {number}", dict(zip(rows, values, strict=True))


@contextmanager
def _reading(folder: Path):
    try:
        yield
    except Exception as error:  # whatever pyarrow and datasets raise for what is damaged
        words = f"not a folder of save_to_disk that is read ({' '.join(str(error).split())[:200]})"
        raise ValueError(f"{folder}: {words}: copy the whole folder, or save it, again") from error


def is_saved(name: str) -> bool:
    """Whether a name is a folder that save_to_disk wrote."""
    return any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json") if name)


def saved_rows(name: str, split: str, field: str) -> SavedRows:
    """A split of such a folder; of one without splits, train. Raises ValueError."""
    folder, known = Path(name), ["train"]
    if (folder / "dataset_dict.json").exists():
        known = sorted(path.parent.name for path in folder.glob("*/state.json"))
        folder = folder / split
    if split not in known:
        raise ValueError(f"{name}: no split {split!r}; it has {', '.join(known) or 'none'}")
    found = sorted(folder.glob("*.arrow"))
    if not found:
        raise ValueError(f"{folder}: its .arrow files are missing: copy the whole folder again")
    return SavedRows(found, field)


class MegatronDocuments(LocalFiles):
    """The documents of NAME.idx and NAME.bin, which are files; a text's characters are GPT-2's
    tokens, without the end of text that may stand after each document."""

    def read(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[Row]:
        path = self.files[1]
        lengths, places, documents, kind = read_megatron_index(*self.files)
        content = np.memmap(path, "u1", "r") if path.stat().st_size else np.empty(0, "u1")
        for number in range(skip, len(documents) - 1):
            parts = [np.empty(0, kind)]
            for i in range(documents[number], documents[number + 1]):
                parts.append(content[places[i] :][: lengths[i] * kind.itemsize].view(kind))
            tokens, where = np.concatenate(parts), f"{path}: document {number + 1}"
            if len(other := tokens[(tokens < 0) | (tokens > EOT)]):
                raise ValueError(
                    f"{where} holds the token {other[0]}, GPT-2's are 0 to {EOT}: it was made with "
                    "another tokenizer; prepare the text itself"
                )
            tokens = tokens[:-1] if len(tokens) and tokens[-1] == EOT else tokens
            self.bytes_in_file = self.bytes * number // (len(documents) - 1)
            yield Row(tokens.astype("<u2").tobytes().decode("utf-16-le"), where=where)


def read_megatron_index(path: Path, data: Path):
    """What an .idx says of its .bin: lengths (tokens) and places (bytes) of the sequences; where
    documents begin among them, and their end; the dtype. Raises ValueError where that cannot be."""
    with open(path, "rb") as file:
        head = file.read(HEADER.size).ljust(HEADER.size, b"\0")
    magic, version, code, n, n_documents = HEADER.unpack(head)
    if magic != MEGATRON_MAGIC or version != 1:
        words = f"it begins with {magic!r} and version {version}, not {MEGATRON_MAGIC!r} and 1"
        raise ValueError(f"{path}: not an index of Megatron: {words}")
    if code not in MEGATRON_DTYPES:
        known = ", ".join(f"{code} ({kind})" for code, kind in MEGATRON_DTYPES.items())
        raise ValueError(f"{path}: tokens of the dtype code {code}; those read are {known}")
    if not n or n_documents < 2:
        raise ValueError(f"{path}: {n} sequences, {max(n_documents, 1) - 1} documents: too few")
    size, needed = path.stat().st_size, HEADER.size + 12 * n + 8 * n_documents
    if size != needed:
        words = f"{n} sequences and {n_documents - 1} documents need {needed} bytes, it has {size}"
        raise ValueError(f"{path}: {words}: damaged, or not of text alone; copy it again")
    lengths = np.memmap(path, "<i4", "r", HEADER.size, (n,))
    places = np.memmap(path, "<i8", "r", HEADER.size + 4 * n, (n,))
    documents = np.memmap(path, "<i8", "r", HEADER.size + 12 * n, (n_documents,))
    kind, size = np.dtype(MEGATRON_DTYPES[code]), data.stat().st_size
    outside = (lengths < 0) | (places < 0) | (places > size - lengths.astype("i8") * kind.itemsize)
    if outside.any():
        first = int(outside.argmax())
        words = f"sequence {first + 1} has {lengths[first]} tokens from byte {places[first]} on"
        raise ValueError(
            f"{path}: {words}, {data.name} has {size} bytes: cut short, or of another .idx; copy "
            "both again"
        )
    if documents[0] != 0 or documents[-1] != n or (np.diff(documents) < 0).any():
        raise ValueError(f"{path}: its documents are not made of {n} sequences: copy it again")
    return lengths, places, documents, kind


def megatron_files(name: str) -> list[Path]:
    """NAME.idx and NAME.bin, where NAME may be the name of one of them. Raises OSError."""
    stem = name.removesuffix(".idx").removesuffix(".bin")
    found = [Path(f"{stem}.idx"), Path(f"{stem}.bin")]
    for path in found:
        if not path.is_file():
            raise OSError(errno.ENOENT, "Megatron's data are NAME.idx and NAME.bin", str(path))
    return found
