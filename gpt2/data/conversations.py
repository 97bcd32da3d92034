"""Where conversations come from: known data sets, files of one's own, trees of messages.

Every row is either a conversation, or is left out and counted under what is wrong with it, or ends
the run: nothing is left out silently.
"""

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gpt2.config import suggest
from gpt2.data.chat import ChatError, Message, messages_from_row
from gpt2.data.readers import JSON_SUFFIXES, HubRows, JsonRows, ParquetRows, find_files

TREE_FIELDS = {"message_id", "parent_id", "role", "text"}


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
        "Stanford Alpaca, 52,002 instructions", "tatsu-lab/alpaca", "CC BY-NC 4.0"
    ),
    "dolly": ChatDataset(
        "Dolly, 15,011 instructions", "databricks/databricks-dolly-15k", "CC BY-SA 3.0"
    ),
    "tulu2": ChatDataset(
        "Tulu v2 mixture, 326,154 conversations", "allenai/tulu-v2-sft-mixture", "ODC-By 1.0"
    ),
    "lima": ChatDataset("LIMA, 1,030 conversations", "GAIR/lima", "CC BY-NC-SA", gated=True),
    "oasst1": ChatDataset(
        "OpenAssistant, of each English tree the best-ranked thread", "OpenAssistant/oasst1",
        "Apache-2.0", lang="en",
    ),
    "gsm8k": ChatDataset("GSM8K, 7,473 problems", "openai/gsm8k", "MIT", config="main"),
}  # fmt: skip


@dataclass
class Counts:
    """What became of the rows. left_out: what is wrong -> (how many, the first of them)."""

    rows: int = 0
    used: int = 0
    cut: int = 0  # those that were cut to fit; they are used
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)

    def leave_out(self, kind: str, text: str) -> None:
        n, first = self.left_out.get(kind, (0, text))
        self.left_out[kind] = n + 1, first

    def lines(self, what: str = "conversations") -> list[str]:
        """For the log: one line for each reason."""
        found = [f"left out {n:,}: {kind}, first {text}" for kind, (n, text) in
                 self.left_out.items()]  # fmt: skip
        return found + ([f"cut {self.cut:,} {what} to fit block_size"] if self.cut else [])


def listing() -> str:
    """The known data sets as a table for people."""
    return "\n".join(
        f"    {name:<10}{d.licence:<15}{d.summary}{' (gated)' if d.gated else ''}"
        for name, d in CHAT_DATASETS.items()
    )


def read_conversations(
    data: str, counts: Counts, *, bad_rows: str = "error"
) -> Iterator[tuple[str, list[Message]]]:
    """(where it stands, the conversation) of each row, in the order of the files.

    data: names of known data sets, files or folders (.jsonl, .json, .parquet, compressed or not),
    one or several with commas between; what lies on disk comes before a name.
    bad_rows: "error" ends at a row that is none; "skip" counts it in counts.
    What the messages hold is for encode_chat to check. Raises ValueError and OSError, each with the
    place; ImportError for a missing package.
    """
    for name in data.split(","):
        rows, lang = _open(name.strip())
        for where, row in _without_trees(rows, lang, counts):
            counts.rows += 1
            try:
                messages = messages_from_row(row)
            except ChatError as error:
                refuse(error, where, counts, bad_rows)
                continue
            yield where, messages


def refuse(error: ChatError, where: str, counts: Counts, bad_rows: str) -> None:
    """Counts a row that cannot be used, or raises ValueError with its place, as configured."""
    if bad_rows == "error":
        raise ValueError(
            f"{where}: {error}; --bad_rows skip leaves such rows out, and counts them"
        ) from error
    counts.leave_out(error.kind, f"{where}: {error}")


def _open(name: str) -> tuple[Iterator[tuple[str, object]], str]:
    """The rows of a file, a folder or a known data set; the language to keep."""
    known = CHAT_DATASETS.get(name)
    if Path(name).exists():
        return local_rows(name), ""
    if known is None:
        raise OSError(
            errno.ENOENT,
            "no such file or folder, and no known data set of conversations: "
            + suggest(name, CHAT_DATASETS),
            name,
        )
    if known.gated:
        local = Path("data") / name
        if local.exists():
            return local_rows(str(local)), known.lang
        raise OSError(
            errno.ENOENT,
            f"{known.repo} is gated: accept its licence ({known.licence}) at "
            f"https://huggingface.co/datasets/{known.repo}, then fetch it with `hf auth login` and "
            f"`hf download {known.repo} train.jsonl --repo-type dataset --local-dir {local}`, or "
            "name the folder that holds its train.jsonl as --data",
            str(local),
        )
    return HubRows(known.repo, known.config).objects(), known.lang


def local_rows(name: str) -> Iterator[tuple[str, object]]:
    """(where it stands, the row) of a file, or of the files in a folder. Raises OSError."""
    parquet = ".parquet" in Path(name).suffixes
    if Path(name).is_dir():
        try:
            return JsonRows(find_files(name, JSON_SUFFIXES, "JSON")).objects()
        except OSError:
            parquet = True
    if parquet:
        return ParquetRows(find_files(name, (".parquet",), "JSON or parquet")).objects()
    return JsonRows(find_files(name, JSON_SUFFIXES, "JSON")).objects()


def _without_trees(
    rows: Iterable[tuple[str, object]], lang: str, counts: Counts
) -> Iterator[tuple[str, object]]:
    """Rows as they are; single messages of trees (OpenAssistant) as their trees' best threads."""
    messages: list[tuple[str, dict]] = []
    for where, row in rows:
        if isinstance(row, dict) and TREE_FIELDS <= row.keys():
            messages.append((where, row))
        else:
            yield where, row
    if messages:
        yield from best_threads(messages, lang, counts)


def best_threads(
    rows: list[tuple[str, dict]], lang: str, counts: Counts
) -> Iterator[tuple[str, dict]]:
    """Of each tree the thread that goes on with the best-ranked reply, up to its last answer.

    rows: OpenAssistant's messages, message_id and parent_id make the trees. Deleted messages end a
    thread. Replies without a rank come last; of equals the first in the file. A tree whose question
    is deleted, is not among rows, or is in another language than lang, if one is given, is counted
    as left out.
    """
    replies: dict[str | None, list[tuple[str, dict]]] = {}
    known = {None, *(row["message_id"] for _, row in rows)}
    for where, row in rows:
        if row["parent_id"] not in known:
            counts.rows += 1
            counts.leave_out("what it replies to is missing", where)
        if not row.get("deleted") or row["parent_id"] is None:
            replies.setdefault(row["parent_id"], []).append((where, row))

    def best(parent: str) -> tuple[str, dict] | None:
        def rank(reply):
            value = reply[1].get("rank")
            return (value is None, value or 0)

        return min(replies.get(parent, ()), key=rank, default=None)

    for where, root in replies.get(None, ()):
        other_language = lang and root.get("lang", lang) != lang
        if root.get("deleted") or other_language:
            counts.rows += 1
            if other_language:
                counts.leave_out(f"language is not {lang}", f"{where}: {root['lang']}")
            else:
                counts.leave_out("deleted question", where)
            continue
        thread, seen, reply = [root], {root["message_id"]}, best(root["message_id"])
        while reply is not None and reply[1]["message_id"] not in seen:
            thread.append(reply[1])
            seen.add(reply[1]["message_id"])
            reply = best(reply[1]["message_id"])
        if len(thread) > 1 and thread[-1]["role"] == "prompter":
            thread.pop()
        yield where, {"messages": [{"role": m["role"], "content": m["text"]} for m in thread]}
