"""The tokens that a run names, as one loader: a data folder or a mixture, and a split of it."""

from pathlib import Path

from gpt2 import tokenizer
from gpt2.config import data_sources
from gpt2.data.loader import TokenLoader
from gpt2.data.mixture import Mixture
from gpt2.data.shards import find_shards, read_manifest


def find_tokenizer(data: str) -> tokenizer.Tokenizer:
    """The tokenizer of the data that a config names; GPT-2's where no manifest says.

    Raises ValueError where the folders of a mixture differ in it, and for a damaged manifest.
    """
    found = {}
    for source in data_sources(data):
        manifest = read_manifest(source.path)
        found[source.path] = manifest["tokenizer"] if manifest else {"name": "gpt2"}
    first, description = next(iter(found.items()))
    for path, other in found.items():
        if other != description:
            names = [d.get("name") if isinstance(d, dict) else d for d in (description, other)]
            which = " and ".join(names) if names[0] != names[1] else f"{names[0]}, but another one"
            raise ValueError(
                f"{first} and {path} were made with different tokenizers ({which}): the folders of "
                "a mixture need the same; prepare one of them again"
            )
    try:
        return tokenizer.from_dict(description)
    except ValueError as error:
        raise ValueError(f"{Path(first) / 'manifest.json'}: {error}") from error


def open_split(
    data: str,
    split: str,
    block_size: int,
    *,
    seed: int = 1337,
    doc_mask: bool = False,
    share: tuple[int, int] = (0, 1),
) -> TokenLoader | Mixture:
    """The loader of a split ("train" or "val"): shuffled for training, in order for validation.

    Validation keeps the first weights of a mixture, so that its losses can be compared.
    share: (rank, world size), by which the checking of hashes is divided.
    Raises as TokenLoader does.
    """
    sources = data_sources(data)
    if split == "val":
        sources = tuple(s for s in sources if s.from_step == 0)
    data_tokenizer = find_tokenizer(data)
    loaders = {
        path: TokenLoader(
            find_shards(path, split), block_size, seed, split == "train",
            vocab_size=data_tokenizer.vocab_size, eot=data_tokenizer.eot, doc_mask=doc_mask,
            verify="background", verify_share=share,
        )
        for path in dict.fromkeys(s.path for s in sources)
    }  # fmt: skip
    return Mixture(sources, loaders) if len(sources) > 1 else next(iter(loaders.values()))
