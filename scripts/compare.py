"""The same prompts through several models, side by side, as Markdown and as one HTML file.

    python scripts/compare.py --models runs/base runs/alpaca gpt2 --prompts prompts.txt

A prompts file is UTF-8, one prompt a line; where a blank line stands between two texts, each block
of lines between blank lines is one prompt. A model that was fine-tuned on conversations gets a
prompt as a question in its template, another one as text to continue. Decoding is greedy unless
--temperature is given; then prompt number i has the seed SEED + i with every model.
"""

import html
from pathlib import Path

from gpt2.assistant import Assistant, load_assistant
from gpt2.cli import parse, run_script
from gpt2.generate import complete
from gpt2.options import CompareConfig
from gpt2.text import RowTexts, read_prompts


def main() -> None:
    config = parse(CompareConfig, __doc__)
    prompts = read_prompts(config.prompts)
    paths = [Path(f"{config.out}.{kind}") for kind in ("md", "html")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    columns, about = [], []
    for name in config.models:
        assistant = load_assistant(name, device=config.device, kernels=config.kernels)
        columns.append(answers(assistant, prompts, config))
        about.append(f"template {assistant.template}" if assistant.template else "no template")
        print(f"{name}: {len(prompts)} prompts, {about[-1]}", flush=True)
    rows = list(zip(prompts, *columns, strict=True))
    paths[0].write_text(as_markdown(config, about, rows), encoding="utf-8")
    paths[1].write_text(as_html(config, about, rows), encoding="utf-8")
    print(f"written: {paths[0]} and {paths[1]}")


def answers(assistant: Assistant, prompts: list[str], config: CompareConfig) -> list[str]:
    # All are encoded first, so that one that does not fit is found before any work.
    encoded = [assistant.encode(prompt, config.system) for prompt in prompts]
    found = []
    for first in range(0, len(prompts), config.batch_size):
        batch = encoded[first : first + config.batch_size]
        texts = RowTexts(assistant.tokenizer)
        seeds = [config.seed + first + i for i in range(len(batch))]
        rows = complete(
            assistant.model, batch, max_new_tokens=config.max_new_tokens,
            sampling=config.sampling(), stop_tokens=assistant.stop_tokens, stop=texts,
            window=True, seed=seeds,
        )  # fmt: skip
        texts.finish()
        for row, text in zip(rows, texts.texts(len(rows)), strict=True):
            cut = f" [cut after {config.max_new_tokens} tokens]" if row.reason == "length" else ""
            found.append(text.strip() + cut)
    return found


def settings(config: CompareConfig) -> str:
    if config.temperature == 0:
        return f"greedy, at most {config.max_new_tokens} tokens"
    return (
        f"temperature {config.temperature}, seed {config.seed}, at most {config.max_new_tokens} "
        "tokens"
    )


def as_markdown(config: CompareConfig, about: list[str], rows: list[tuple[str, ...]]) -> str:
    def cell(text: str) -> str:
        # Escaped as HTML, which Markdown lets through, and for the signs that Markdown reads.
        text = html.escape(text, quote=False)
        for sign in "\\`*_|[]~":
            text = text.replace(sign, f"&#{ord(sign)};")
        return "<br>".join(text.splitlines()) or " "

    names = [f"{n} ({a})" for n, a in zip(config.models, about, strict=True)]
    lines = [["prompt", *names], ["---"] * (len(names) + 1), *rows]
    table = [
        f"| {' | '.join(cell(c) if i != 1 else c for c in line)} |" for i, line in enumerate(lines)
    ]
    return "\n".join([f"{config.prompts}: {settings(config)}", "", *table, ""])


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { border: 1px solid #ccc; padding: 0.6em; text-align: left; vertical-align: top; }
th { background: #f0f2f4; position: sticky; top: 0; overflow-wrap: anywhere; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
td:first-child { background: #f8f9fa; font-weight: 600; }
small { font-weight: normal; color: #666; display: block; }
"""


def as_html(config: CompareConfig, about: list[str], rows: list[tuple[str, ...]]) -> str:
    heads = "".join(
        f"<th>{html.escape(name)}<small>{html.escape(what)}</small></th>"
        for name, what in zip(config.models, about, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    title = html.escape(f"{config.prompts}: {settings(config)}")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n<p>{title}</p>\n<table>\n<tr><th>prompt</th>{heads}</tr>\n"
        f"{body}\n</table>\n</html>\n"
    )


if __name__ == "__main__":
    run_script(main)
