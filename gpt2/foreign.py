"""Models in the files of other trainers: nanoGPT's ckpt.pt, build-nanogpt's model_*.pt, llm.c's
model .bin, and the pickles that torch.save writes, of which nothing but tensors is built.

Names and orientation of the weights are ours. Two things are not. nanoGPT has computed the exact
GELU since May 2023, where GPT-2, build-nanogpt and llm.c approximate it by tanh (exact_gelu). And
a checkpoint without model_args["bias"] is older than that: of January 2023 or before.

Sources: https://github.com/karpathy/nanoGPT, train.py and model.py; build-nanogpt, train_gpt2.py;
llm.c, train_gpt2.py (write_model).
"""

import errno
import math
import re
import struct
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from gpt2 import storage, tokenizer
from gpt2.config import GPTConfig
from gpt2.data.shards import folder_tokenizer
from gpt2.model import GPT, parameter_shapes

HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"
GPT2_ROWS = range(tokenizer.GPT2Tokenizer.vocab_size, GPTConfig(1, 1, 1).padded_vocab_size + 1)
LLMC_MAGIC, LLMC_HEADER = 20240326, 1024  # bytes
LLMC_VERSIONS = {3: torch.float32, 5: torch.bfloat16}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
KNOWN = ("nanoGPT's ckpt.pt, build-nanogpt's model_*.pt and llm.c's model .bin are known; of "
         "Hugging Face's weights name the folder, which has a config.json")  # fmt: skip


@torch.no_grad()
def load_file(path: Path, device="cpu", kernels="auto") -> GPT:
    """The model in a file, in float32. Raises OSError for a file of another kind, ValueError for
    one that is damaged or no GPT-2 as it is computed here."""
    config, tensors = _read(path)
    wanted = parameter_shapes(config)
    wanted |= {HEAD: wanted[TABLE]} if HEAD in tensors else {}
    storage.check_shapes(shapes(tensors), wanted, path)
    storage.check_finite(tensors, path)
    check_tied(tensors, path)
    model = GPT(config, kernels, device)
    for name, parameter in model.named_parameters():
        parameter[: len(tensors[name])] = tensors[name]
    with suppress(ValueError):  # without a known tokenizer each row is a token
        model.n_tokens = min(file_tokenizer(path).vocab_size, config.vocab_size)
    return model


def file_tokenizer(path: Path) -> tokenizer.Tokenizer:
    """GPT-2's, or the characters of the meta.pkl beside a file or in nanoGPT's data/<dataset>.
    Raises as load_file does, and ValueError where neither fits the model."""
    rows = _read(path)[0].vocab_size
    if rows in GPT2_ROWS:
        return tokenizer.GPT2Tokenizer()
    content = read_pickle(path) if _is_pickle(path) else {}
    options = content["config"] if type(content.get("config")) is dict else {}
    folders = [path.parent, Path("data", str(options.get("dataset")))]
    metas = [folder for folder in folders if (folder / "meta.pkl").exists()]
    found = tokenizer.from_dict(folder_tokenizer(metas[0])) if metas else None
    if found is None or found.vocab_size != rows:
        words = f"that of {metas[0]} has {found.vocab_size}" if found else "there is no meta.pkl"
        raise ValueError(
            f"{path}: its vocabulary of {rows} is not GPT-2's of {GPT2_ROWS[0]}, and {words}: put "
            "the meta.pkl of its data (nanoGPT's characters) beside it"
        )
    return found


def read_pickle(path: Path) -> dict:
    """What torch.save wrote: tensors in a map of the file, plain values, build-nanogpt's GPTConfig
    as a Plain. Raises ValueError for a pickle that names anything else, and for a damaged one."""
    allowed = [(Plain, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2")]
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"  # else of torch before 1.6, which cannot be mapped
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, "cpu", weights_only=True, mmap=is_zip or None)
    except Exception as error:  # torch and pickle raise whatever a damaged file leads them to
        named = re.search(r"(?:GLOBAL|type) ([\w.<>]+)", str(error))
        if named and "nsupported" in str(error):
            raise ValueError(
                f"{path}: a pickle that names {named[1]}, which is neither a tensor nor a plain "
                "value, and could run code: save it again without that, where it was made"
            ) from error
        reason = str(error).rpartition("error:")[2].strip().split("\n")[0][:100]
        words = "damaged or cut short, or not of torch.save"
        raise ValueError(f"{path}: {words} ({reason}): copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, no names of tensors: {KNOWN}")
    return content


def weights(content: dict, path: Path) -> dict[str, Tensor]:
    """The tensors of a state_dict. Raises ValueError for other values, and where they say that
    they are more than the file can hold (rows of one stored number, shared memory)."""
    found, nbytes = {}, 0
    for name, value in content.items():
        name = str(name).removeprefix("_orig_mod.")
        is_plain = isinstance(value, Tensor) and value.layout == torch.strided
        if not is_plain or value.is_nested or value.is_meta:
            raise ValueError(f"{path}: {name:.60} is a {type(value).__name__}, not a dense tensor")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask
            found[name] = value
            nbytes += value.nbytes * (HEAD not in name)
    if nbytes > (size := path.stat().st_size):
        raise ValueError(f"{path}: {nbytes} bytes of tensors in a file of {size}: damaged")
    return found


def shapes(tensors: dict[str, Tensor]) -> storage.Found:
    """As storage.read_shapes has them."""
    return {n: (DTYPES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for n, t in tensors.items()}


def check_tied(tensors: dict[str, Tensor], where) -> None:
    """Raises ValueError for a head that is not the embedding."""
    if HEAD in tensors and not torch.equal(tensors[HEAD].float(), tensors[TABLE].float()):
        words = "is a head of its own; GPT-2 here has the embedding as its head"
        raise ValueError(f"{where}: {HEAD} {words}")


class Plain:
    """An object of which only the fields are read."""


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80"))


def _read(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """A file's shape and its tensors."""
    with open(path, "rb") as file:
        head = file.read(LLMC_HEADER)
    if head[:4] == LLMC_MAGIC.to_bytes(4, "little"):
        return _read_llmc(path, head)
    if not _is_pickle(path):
        words = f"a file of an unknown kind (it begins with {head[:8]!r}): {KNOWN}"
        raise OSError(errno.EINVAL, words, str(path))
    content = read_pickle(path)
    shape, config = content.get("model_args"), content.get("config")
    shape = vars(config) if isinstance(config, Plain) else shape
    if not isinstance(shape, dict) or not isinstance(content.get("model"), dict):
        keys = ", ".join(map(repr, list(content)[:4]))
        words = f"a pickle of an unknown kind (it holds {keys}; needed are model and model_args)"
        raise OSError(errno.EINVAL, f"{words}: {KNOWN}", str(path))
    shape = shape | {"exact_gelu": "model_args" in content and "bias" in shape}
    return storage.make(GPTConfig, shape, path), weights(content["model"], path)


def _read_llmc(path: Path, head: bytes) -> tuple[GPTConfig, dict[str, Tensor]]:
    _, version, *sizes, rows = struct.unpack("<8i", head[:32].ljust(32, b"\0"))
    if (dtype := LLMC_VERSIONS.get(version)) is None:
        words = "3 (float32) and 5 (bfloat16) are read: write it again with llm.c's train_gpt2.py"
        raise ValueError(f"{path}: version {version} of llm.c's models; {words}")
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    config = storage.make(GPTConfig, dict(zip(names, sizes, strict=True)), path)
    if rows < config.vocab_size:
        raise ValueError(f"{path}: {rows} padded rows for a vocabulary of {config.vocab_size}")
    wanted = parameter_shapes(config) | {TABLE: (rows, config.n_embd)}
    kinds = dict.fromkeys(re.sub(r"\.h\.\d+\.", ".h.{}.", name) for name in wanted)
    layers = {kind: range(config.n_layer if "{}" in kind else 1) for kind in kinds}
    # All layers of one kind, then the next kind.
    names = [kind.format(layer) for kind in kinds for layer in layers[kind]]
    counts = [math.prod(wanted[name]) for name in names]
    skip, size = LLMC_HEADER // dtype.itemsize, path.stat().st_size
    total = skip + sum(counts)
    if size != total * dtype.itemsize:
        words = f"the header promises {total * dtype.itemsize} bytes, the file has {size}"
        raise ValueError(f"{path}: {words}: cut short or damaged, copy it again")
    parts = torch.from_file(str(path), size=total, dtype=dtype)[skip:].split(counts)
    tensors = {n: part.view(wanted[n]) for n, part in zip(names, parts, strict=True)}
    tensors[TABLE] = tensors[TABLE][: config.vocab_size]
    return config, tensors
