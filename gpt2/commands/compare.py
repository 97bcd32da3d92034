"""Answers of several models to the same prompts, side by side, as Markdown and HTML.

    gpt2-triton compare --models runs/base runs/alpaca gpt2 --prompts prompts.txt

A prompts file is UTF-8, one prompt a line; where a blank line stands between two texts, each block
of lines between blank lines is one prompt. A model that was fine-tuned on conversations gets a
prompt as a question in its template, another one as text to continue. Decoding is greedy unless
--temperature is given; then prompt number i has the seed SEED + i with every model.
"""

import html
import re
from pathlib import Path

from gpt2.cli import parse, printable, starting
from gpt2.options import CompareConfig
from gpt2.text import RowTexts, read_prompts

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { border: 1px solid #ccc; padding: 0.6em; text-align: left; vertical-align: top;
         white-space: pre-wrap; overflow-wrap: anywhere; }
th { background: #f0f2f4; position: sticky; top: 0; }
"""


def main() -> None:
    with starting():
        config = parse(CompareConfig, __doc__)
        from gpt2.assistant import load_assistant
        from gpt2.storage import check_writable
    prompts = read_prompts(config.prompts)
    for ending in ("md", "html"):
        check_writable(Path(f"{config.out}.{ending}"))
    heads, columns = ["prompt"], [prompts]
    assistants = [load_assistant(n, device=config.device, kernels=config.kernels,
                                 dtype=config.dtype)
                  for n in config.models]  # fmt: skip
    # What is wrong with a prompt is known before any model is loaded, and of the models each is
    # loaded when the one before has gone: together they may not fit the memory.
    tokens = [[assistant.encode(p, config.system) for p in prompts] for assistant in assistants]
    for assistant, encoded in zip(assistants, tokens, strict=True):
        template = f"template {assistant.template}" if assistant.template else "no template"
        heads.append(f"{assistant.name} ({template})")
        columns.append(answers(assistant, encoded, config))
        print(f"{printable(assistant.name)}: {len(prompts)} prompts, {template}", flush=True)
        del assistant.model
    how = "greedy" if config.greedy else f"temperature {config.temperature}, seed {config.seed}"
    title = f"{config.prompts}: {how}, at most {config.max_new_tokens} tokens"
    markdown = as_markdown(title, heads, list(zip(*columns, strict=True)))
    for ending, text in (("md", markdown), ("html", as_html(title, markdown))):
        Path(f"{config.out}.{ending}").write_text(text, "utf-8", errors="backslashreplace")
    print(f"written: {config.out}.md and {config.out}.html")


def answers(assistant, prompts: list[list[int]], config: CompareConfig) -> list[str]:
    assistant.check_room(max(prompts, key=len), "the longest prompt")
    found = []
    for first in range(0, len(prompts), config.batch_size):
        batch = prompts[first : first + config.batch_size]
        texts = RowTexts(assistant.tokenizer)
        rows = assistant.complete(
            batch, max_new_tokens=config.max_new_tokens, sampling=config, stop=texts, window=True,
            seed=config.seed + first,
        )  # fmt: skip
        texts.finish()
        for row, text in zip(rows, texts.texts(len(rows)), strict=True):
            cut = f" [cut after {config.max_new_tokens} tokens]" if row.reason == "length" else ""
            found.append(text.strip() + cut)
    return found


def as_markdown(title: str, heads: list[str], rows: list[tuple[str, ...]]) -> str:
    def cell(text: str) -> str:
        """text as it is: escaped for HTML, which Markdown lets through, and for Markdown."""
        text = re.sub(r"[\\`*_|[\]~]", lambda sign: f"&#{ord(sign[0])};",
                      html.escape(printable(text), quote=False))  # fmt: skip
        return text.replace("\n", "<br>") or " "

    lines = [[*map(cell, heads)], ["---"] * len(heads), *([*map(cell, row)] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{cell(title)}\n\n{table}\n"


def as_html(title: str, markdown: str) -> str:
    from markdown_it import MarkdownIt

    # Only the line breaks are tags there; as characters they need no HTML to be let through.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(
        markdown.replace("<br>", "&#10;")
    )  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{html.escape(printable(title))}</title>\n<style>{STYLE}</style>\n{body}</html>\n"
    )
