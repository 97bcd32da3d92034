"""A page of paragraphs, tables and verbatim text, as Markdown and as one HTML file.

Whatever text comes in is shown as it is: marks of both languages are escaped.
"""

import html
from typing import NamedTuple


class Table(NamedTuple):
    """Rows of cells; without a head the first cell of each row names it."""

    rows: list[tuple[str, ...]]
    head: tuple[str, ...] = ()


class Verbatim(NamedTuple):
    """Text whose spaces and lines are kept."""

    text: str


Block = str | Table | Verbatim
Sections = list[tuple[str, list[Block]]]  # title, "" for none, and what stands under it


def to_markdown(title: str, curve: str, sections: Sections) -> str:
    """The page as Markdown; curve: a block of Markdown that stands under the title."""
    parts = [f"# {_escape(title)}", curve]
    for name, blocks in sections:
        parts += [f"## {_escape(name)}"] if name else []
        for block in blocks:
            if isinstance(block, Table):
                width = len(block.rows[0])
                lines = [block.head or ("",) * width, ("---",) * width, *block.rows]
                cells = [[c if i == 1 else _escape(c) for c in x] for i, x in enumerate(lines)]
                parts.append("\n".join("| " + " | ".join(line) + " |" for line in cells))
            elif isinstance(block, Verbatim):
                fence = "```"
                while fence in block.text:
                    fence += "`"
                parts.append(f"{fence}text\n{block.text}\n{fence}")
            else:
                parts.append(_escape(block))
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    for mark in "\\`*_<>|[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split("\n"))


def to_html(title: str, curve: str, sections: Sections) -> str:
    """The page as HTML; curve: SVG or HTML that stands under the title."""
    parts = [f"<h1>{html.escape(title)}</h1>", curve]
    for name, blocks in sections:
        parts += [f"<h2>{html.escape(name)}</h2>"] if name else []
        for block in blocks:
            if isinstance(block, Table):
                lines = [_row(block.head, len(block.head))] if block.head else []
                lines += [_row(row, 0 if block.head else 1) for row in block.rows]
                parts.append("<table>\n" + "\n".join(lines) + "\n</table>")
            elif isinstance(block, Verbatim):
                parts.append(f"<pre>{html.escape(block.text)}</pre>")
            else:
                parts.append(f"<p>{html.escape(block)}</p>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _row(cells: tuple[str, ...], names: int) -> str:
    """A table row; the first `names` cells name something."""
    tags = ["th"] * names + ["td"] * (len(cells) - names)
    inner = (f"<{t}>{html.escape(c)}</{t}>" for t, c in zip(tags, cells, strict=True))
    return f"<tr>{''.join(inner)}</tr>"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56em; margin: 2em auto; padding: 0 1em;
       color: #222; }
h1 { font-size: 1.6em; } h2 { font-size: 1.15em; margin-top: 1.8em; }
table { border-collapse: collapse; margin: .6em 0; }
th, td { text-align: left; vertical-align: top; padding: .25em 1em .25em 0;
         border-bottom: 1px solid #ddd; font-weight: normal; overflow-wrap: anywhere; }
th { color: #666; min-width: 6em; }
pre { background: #f4f4f2; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; }
"""
