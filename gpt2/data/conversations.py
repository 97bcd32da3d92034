"""Where rows come from: known data sets of conversations, files of one's own, trees of messages.

Every row is either used, or is left out and counted under what is wrong with it, or ends the run:
nothing is left out silently.
"""

import errno
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2.config import suggest
from gpt2.data.files import JSON_SUFFIXES, BadRow, LeftOut, find_files
from gpt2.data.readers import HubRows, JsonRows, ParquetRows

Refuse = Callable[[BadRow], object]


@dataclass(frozen=True)
class ChatDataset:
    """A known data set of conversations.

    repo: its name on the Hugging Face hub. gated: the hub gives it out only to those who accepted
    its licence, so it is read from a local folder. lang: of trees of messages, those kept.
    """

    summary: str
    repo: str
    licence: str
    config: str = ""
    gated: bool = False
    lang: str = ""


CHAT_DATASETS = {
    "alpaca": ChatDataset(
        "Stanford Alpaca, 52,002 instructions", "tatsu-lab/alpaca", "CC BY-NC 4.0"),
    "dolly": ChatDataset(
        "Dolly, 15,011 instructions", "databricks/databricks-dolly-15k", "CC BY-SA 3.0"),
    "tulu2": ChatDataset(
        "Tulu v2 mixture, 326,154 conversations", "allenai/tulu-v2-sft-mixture", "ODC-By 1.0"),
    "lima": ChatDataset("LIMA, 1,030 conversations", "GAIR/lima", "CC BY-NC-SA", gated=True),
    "oasst1": ChatDataset(
        "OpenAssistant, of each English tree the best-ranked thread", "OpenAssistant/oasst1",
        "Apache-2.0", lang="en"),
    "gsm8k": ChatDataset("GSM8K, 7,473 problems", "openai/gsm8k", "MIT", config="main"),
}  # fmt: skip


def listing() -> str:
    """The known data sets as a table for people."""
    return "\n".join(
        f"    {name:<10}{d.licence:<15}{d.summary}{' (gated)' if d.gated else ''}"
        for name, d in CHAT_DATASETS.items()
    )


def read_rows(
    data: str, left_out: LeftOut, refuse: Refuse | None = None,
    known: dict[str, ChatDataset] = CHAT_DATASETS,
) -> Iterator[tuple[str, object]]:  # fmt: skip
    """(where it stands, the row), in order; trees of messages as their best threads.

    data: names of known data sets, files or folders (.jsonl, .json, .parquet, compressed or not),
    one or several with commas between; what lies on disk comes before a name.
    refuse: given each line that is no JSON, not raised. left_out: counts what trees leave out.
    Raises ValueError and OSError, each with the place; ImportError for a missing package.
    """
    names = [data] if data and Path(data).exists() else data.split(",")
    for name in map(str.strip, names):
        if not name:
            raise ValueError(f"data {data!r} leaves a name empty: name a file or folder there")
        lang, messages = "", []
        if Path(name).exists():
            rows = _local_rows(name, refuse)
        elif name in known:
            rows, lang = _known_rows(name, known[name], refuse), known[name].lang
        else:
            others = f", and no known data set: {suggest(name, known)}" if known else ""
            raise OSError(errno.ENOENT, f"no such file or folder{others}", name)
        for where, row in rows:
            if _is_of_a_tree(row):
                messages.append((where, row))
            else:
                yield where, row
        yield from best_threads(messages, lang, left_out)


def _known_rows(
    name: str, dataset: ChatDataset, refuse: Refuse | None
) -> Iterator[tuple[str, object]]:
    if not dataset.gated:
        return HubRows(dataset.repo, dataset.config).objects()
    local = Path("data") / name
    if not local.exists():
        raise OSError(
            errno.ENOENT,
            f"{dataset.repo} is gated: accept its licence ({dataset.licence}) at "
            f"https://huggingface.co/datasets/{dataset.repo}, then fetch it with `hf auth login` "
            f"and `hf download {dataset.repo} train.jsonl --repo-type dataset --local-dir {local}`,"
            " or name the folder that holds its train.jsonl as --data",
            str(local),
        )
    return _local_rows(str(local), refuse)


def _local_rows(name: str, refuse: Refuse | None) -> Iterator[tuple[str, object]]:
    files = find_files(name, (*JSON_SUFFIXES, ".parquet"), "JSON or parquet")
    tables = [path for path in files if ".parquet" in path.suffixes]
    yield from JsonRows([path for path in files if path not in tables]).objects(refuse)
    yield from ParquetRows(tables).objects()


def _is_of_a_tree(row) -> bool:
    """Whether it is a single message of OpenAssistant's."""
    if not isinstance(row, dict) or not row.keys() >= {"message_id", "parent_id", "role", "text"}:
        return False
    return isinstance(row["message_id"], str) and isinstance(row["parent_id"], str | None)


def best_threads(
    rows: list[tuple[str, dict]], lang: str, left_out: LeftOut
) -> Iterator[tuple[str, dict]]:
    """Of each tree the thread that goes on with the best-ranked reply, up to its last answer.

    rows: OpenAssistant's messages, message_id and parent_id make the trees. Deleted messages end a
    thread. Replies without a rank come last; of equals the first in the file. A tree whose question
    is deleted, is not among rows, or is in another language than lang, if one is given, is counted
    as left out.
    """
    known, roots, replies = {row["message_id"] for _, row in rows}, [], {}
    for where, row in rows:
        if row["parent_id"] is None:
            roots.append((where, row))
        elif row["parent_id"] not in known:
            left_out.add("what it replies to is missing", where)
        elif not row.get("deleted"):
            replies.setdefault(row["parent_id"], []).append(row)

    def rank(reply: dict) -> float:
        value = reply.get("rank")
        return value if isinstance(value, int | float) else math.inf

    for where, root in roots:
        if lang and root.get("lang", lang) != lang:
            left_out.add(f"language is not {lang}", f"{where}: {root['lang']!r:.40}")
        elif root.get("deleted"):
            left_out.add("deleted question", where)
        else:
            thread = [root]
            while following := replies.pop(thread[-1]["message_id"], None):  # ends in any graph
                thread.append(min(following, key=rank))
            if len(thread) > 1 and thread[-1]["role"] == "prompter":
                thread.pop()
            yield where, {"messages": [{"role": m["role"], "content": m["text"]} for m in thread]}
