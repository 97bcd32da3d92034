"""The report of a run, on one page: RUN/report.md, RUN/report.html and RUN/loss.png.

It is drawn from the run folder alone (config.yaml, receipt.json, metrics.jsonl), whatever of them
can be read, so it can be drawn of a run that was killed. The HTML page is the Markdown one with the
curve inside, and needs no other file. Text of others is escaped, so that it is shown as it is.

Set beside GPT-2's figures is only what was measured in the same way; where it was not, the page
says why. Sources: https://github.com/karpathy/nanoGPT, README (OpenWebText);
https://github.com/karpathy/build-nanogpt, play.ipynb (FineWeb, HellaSwag).
"""

import base64
import html
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median_high

from gpt2.cli import printable
from gpt2.storage import write_whole
from gpt2.train.metrics import draw_curve, duration, points, read_log
from gpt2.train.receipt import commit_of, read_receipt

OPENWEBTEXT = {"124M": 3.12, "350M": 2.84, "774M": 2.67, "1558M": 2.54}
FINEWEB = {"124M": 3.2924}
FINEWEB_VAL_TOKENS = 10_485_760  # the first of the validation shard, by custom
HELLASWAG = {"124M": "29.45%", "350M": "37.52%", "774M": "43.20%", "1558M": "48.89%"}
MOST_EVENTS = 20  # rows of the table of skipped steps
MOST_SAMPLES = 4
CURVE = "![loss curve](loss.png)"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56em; margin: 2em auto; padding: 0 1em; }
th, td { text-align: left; vertical-align: top; padding: .25em 1em .25em 0; font-weight: normal;
         border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
td:first-child { min-width: 6em; }
pre { background: #f4f4f2; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; }
"""


def write_report(folder: str | Path, *, gpu_hour_price: float = 0.0) -> None:
    """Draws the report of a run folder; without matplotlib, or where the curve fails, without it.

    gpu_hour_price: of one GPU; 0: not known.
    Raises OSError where it cannot be written, ImportError for report.html without markdown-it-py.
    """
    folder = Path(folder)
    lines, receipt, config, notes = _read(folder)
    title, picture = str(config.get("run_name", folder.name)), folder / "loss.png"
    curve = CURVE
    if points(lines, "train/loss") + points(lines, "val/loss"):
        try:
            draw_curve(lines, picture, title, str(receipt.get("unit", "nats per token")))
        except (ImportError, ValueError) as error:
            curve = escape(f"No curve: {error}.")
    else:
        curve = "No loss was logged."
    body = describe(lines, receipt, config, gpu_hour_price)
    markdown = "\n\n".join([f"# {escape(title)}", curve, *map(escape, notes), body]) + "\n"
    write_whole(folder / "report.md", markdown)
    write_whole(folder / "report.html", _to_html(title, markdown, picture))


def _read(folder: Path) -> tuple[list[dict], dict, dict, list[str]]:
    """Log, receipt and config, as far as they can be read; and what is wrong with them."""
    import yaml

    lines, damage = read_log(folder / "metrics.jsonl")
    notes, found = [f"{damage}."] if damage else [], []
    for name, read in (
        ("receipt.json", lambda: read_receipt(folder)),
        ("config.yaml", lambda: dict(yaml.safe_load((folder / "config.yaml").read_bytes()))),
    ):
        try:
            found.append(read() or {})
        except Exception as error:  # whatever it holds
            found.append({})
            notes.append(f"{name} cannot be read: {error}.")
    return lines, {"launches": []} | found[0], found[1], notes


def _to_html(title: str, markdown: str, picture: Path) -> str:
    """The page with its picture inside."""
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ImportError("report.html needs markdown-it-py: pip install -e '.[train]'") from error
    if CURVE in markdown:
        data = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        markdown = markdown.replace(CURVE, CURVE.replace(picture.name, data), 1)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><style>{STYLE}</style>'
        f"<title>{html.escape(printable(title))}</title></head>\n<body>\n{body}</body></html>\n"
    )


def describe(lines: list[dict], receipt: dict, config: dict, price: float = 0.0) -> str:
    """The sections of the page as Markdown; those without content are left out.

    lines: of metrics.jsonl; receipt: of receipt.json, with its launches; config: of config.yaml;
    price: of a GPU hour. A section that cannot be made of what they hold says so.
    """
    parts = []
    for title, make in (
        ("", lambda: _table(_summary(lines, receipt, config))),
        ("Against GPT-2", lambda: "\n\n".join(_against_gpt2(lines, receipt, config))),
        ("Speed and cost", lambda: _table(_speed_and_cost(lines, receipt["launches"], price))),
        ("Samples", lambda: _samples(lines)),
        ("Skipped steps", lambda: _events(lines)),
        ("Launches", lambda: _launches(receipt["launches"])),
        ("Data", lambda: _table(_data(receipt))),
        ("Software and machine", lambda: _machine(receipt["launches"])),
    ):
        try:
            text = make()
        except Exception as error:  # what these files hold may be of another version, or edited
            text = escape(f"This cannot be told: the run's files are not as expected ({error!r}).")
        if text:
            parts += [f"## {title}", text] if title else [text]
    return "\n\n".join(parts)


def escape(text: str) -> str:
    """Markdown on one line that shows a text as it is."""
    return re.sub(r"([\\`*_<>|\[\]&$~#!])", r"\\\1", printable(text)).replace("\n", " ")


def _verbatim(text: str) -> str:
    """Markdown of a text whose spaces and lines are kept."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}text\n{printable(text)}\n{fence}"


def _table(rows: Iterable[tuple], head: tuple[str, ...] = ()) -> str:
    rows = list(rows)
    if not rows:
        return ""
    lines = [head or ("",) * len(rows[0]), ("---",) * len(rows[0]), *rows]
    return "\n".join(f"| {' | '.join(map(escape, map(str, line)))} |" for line in lines)


def _summary(lines: list[dict], receipt: dict, config: dict) -> Iterator[tuple[str, str]]:
    done = max((step for step, _ in points(lines, "train/loss")), default=0)
    most, launch = config.get("max_steps", done), (receipt["launches"] or [{}])[-1]
    state = f"step {done:,} of {most:,}"
    if done >= most > 0:
        state = "finished"
    elif launch.get("end") == "running":  # or killed since: nobody was there to write it
        state += f" when this was drawn, {launch['stop']}"
    elif launch:
        state = f"stopped at {state}: {launch['end']}"
    yield "state", state
    if model := receipt.get("model"):
        yield "model", ", ".join(f"{key} {value}" for key, value in model.items())
    if size := config.get("tokens_per_step"):
        yield "trained", f"{done:,} steps of {size:,} tokens, {done * size:,} in all"
    if "data" in config:
        yield "data", config["data"]
    for name in ("train", "val"):
        if found := points(lines, f"{name}/loss"):
            (at, last), (step, best) = found[-1], min(found, key=lambda point: point[1])
            yield f"{name} loss", f"{last:.4f} at step {at:,}; lowest {best:.4f} at step {step:,}"


def _against_gpt2(lines: list[dict], receipt: dict, config: dict) -> Iterator[str]:
    if val := points(lines, "val/loss"):
        anchors, note = comparable_losses(receipt, config)
        if anchors:
            rows = {"this run": f"{val[-1][1]:.4f}"} | anchors
            yield _table(rows.items(), ("GPT-2", "val loss"))
        yield escape(note)
    if swag := points(lines, "eval/hellaswag"):
        rows = {"this run": f"{swag[-1][1]:.2%}"} | HELLASWAG
        yield _table(rows.items(), ("GPT-2", "HellaSwag, acc_norm"))
        yield (
            "GPT-2's figures are build-nanogpt's for all 10,042 validation examples, each ending "
            "scored by its mean loss; lm-eval's harness gives others (31.14% for 124M)."
        )


def comparable_losses(receipt: dict, config: dict) -> tuple[dict[str, float], str]:
    """GPT-2's losses on this run's validation data, where they are the same measure; and a note.

    A loss depends on the text, the tokenizer, the context and, on FineWeb, on which tokens of the
    validation shard are read.
    """
    data = receipt.get("data", [])
    source = str(data[0].get("source")) if len(data) == 1 else "a mixture, or not known"
    tokenizer = data[0].get("tokenizer") if data else "not known"
    context = config.get("block_size") or receipt.get("model", {}).get("block_size")
    read = config.get("eval_steps", 0) * config.get("tokens_per_step", 0)
    name = source.split("/")[-1].lower()
    is_fineweb = name in ("fineweb", "fineweb10b-gpt2")
    part = f"the first {FINEWEB_VAL_TOKENS:,}"
    is_same = {
        f"the text is another ({source})": is_fineweb or name == "openwebtext",
        f"the tokenizer is {tokenizer}, so that a token is another unit": tokenizer == "gpt2",
        f"the context is {context}, not 1024": context == 1024,
        "attention stays inside documents (doc_mask)": not config.get("doc_mask"),
        f"{f'{read:,}' if read else 'all'} validation tokens are read, not {part}": not is_fineweb
        or read == FINEWEB_VAL_TOKENS,
    }
    if wrong := [why for why, holds in is_same.items() if not holds]:
        return {}, f"GPT-2's validation losses are not comparable here: {'; '.join(wrong)}."
    if is_fineweb:
        return FINEWEB, f"Both on {part} tokens of FineWeb's validation shard."
    return OPENWEBTEXT, "nanoGPT's figures, on other documents than those held out here."


def _speed_and_cost(lines: list[dict], launches: list[dict], price: float) -> Iterator[tuple]:
    for key, name, form in (
        ("train/step_ms", "a step", "{:,.1f} ms"),
        ("train/tokens_per_s", "tokens", "{:,.0f} a second"),
        ("train/mfu", "MFU", "{:.1%}"),
        ("train/data_ms", "waiting for data", "{:.2f} ms a step"),
        ("checkpoint/held_ms", "held by a checkpoint", "{:,.1f} ms"),
        ("checkpoint/write_ms", "writing a checkpoint", "{:,.0f} ms"),
    ):
        if values := [value for _, value in points(lines, key)]:
            yield name, f"{form.format(median_high(values))} (median of {len(values)})"
    if not launches:
        return
    steps = [value for _, value in points(lines, "train/step_ms")]
    if steps and (least := launches[-1]["predicted"].get("step_ms")):
        times = f"it took {median_high(steps) / least:.2f} times that"
        what = "each part at the ceilings measured before the first one"
        yield "predicted", f"at least {least:,.1f} ms a step, {what}; {times}"
    gpus = [x["seconds"] / 3600 * x["world_size"] for x in launches if x["device"] == "cuda"]
    yield "GPU hours", f"{sum(gpus):.3f}" if gpus else "0, on a CPU"
    if price and gpus:
        yield "cost", f"{sum(gpus) * price:,.2f}, at {price:g} a GPU hour"
    if any(launch["end"] == "running" for launch in launches[:-1]):
        yield "not counted", "what killed launches did after their last checkpoint"


def _samples(lines: list[dict]) -> str:
    """The first, the last, and some between them."""
    found = [(line["step"], str(line["sample"])) for line in lines if "sample" in line]
    n = min(len(found), MOST_SAMPLES)
    samples = [found[i * (len(found) - 1) // max(n - 1, 1)] for i in range(n)]
    return "\n\n".join(f"Step {step:,}:\n\n{_verbatim(text)}" for step, text in samples)


def _events(lines: list[dict]) -> str:
    events = [line for line in lines if any(key.startswith("guard/") for key in line)]
    rows = [
        (e["step"], ", ".join(f"{k[6:]} {v}" for k, v in e.items() if k.startswith("guard/")))
        for e in events[:MOST_EVENTS]
    ]
    skipped = sum(int(line.get("guard/skipped") or 0) for line in events)
    note = f"{skipped} steps were skipped in {len(events)} events; at most {MOST_EVENTS} are shown."
    return f"{note}\n\n{_table(rows, ('step', 'what'))}" if events else ""


def _launches(launches: list[dict]) -> str:
    rows = []
    for launch in launches:
        is_killed = launch["end"] == "running" and launch is not launches[-1]
        rows.append((
            launch["start"], f"{launch['first_step']:,} to {launch['last_step']:,}",
            duration(launch["seconds"]), launch["world_size"], commit_of(launch["git"]),
            "killed" if is_killed else launch["end"],
        ))  # fmt: skip
    return _table(rows, ("start", "steps", "time", "ranks", "commit", "end"))


def _data(receipt: dict) -> Iterator[tuple[str, str]]:
    for entry in receipt.get("data", []):
        facts = (f"{key} {value}" for key, value in entry.items() if value and key != "path")
        yield entry.get("path", ""), "; ".join(facts)


def _machine(launches: list[dict]) -> str:
    if not launches:
        return ""
    launch = launches[-1]
    rows = [(name, value) for name, value in launch["hardware"].items() if value is not None]
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in launch["versions"].items() if v)))
    return f"{_table(rows)}\n\nCommand:\n\n{_verbatim(str(launch['command']))}"
