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
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median_high

from gpt2.cli import printable
from gpt2.train.metrics import draw_curve, duration, points, read_log
from gpt2.train.receipt import read_receipt, write_whole

SIZES = ("124M", "350M", "774M", "1558M")
OPENWEBTEXT = dict(zip(SIZES, (3.12, 2.84, 2.67, 2.54), strict=True))
FINEWEB = {"124M": 3.2924}
FINEWEB_VAL_TOKENS = 10_485_760  # the first of the validation shard, by custom
HELLASWAG = dict(zip(SIZES, (29.45, 37.52, 43.20, 48.89), strict=True))
MOST_EVENTS = 20  # rows of the table of skipped steps
PNG_AGE_S = 600.0  # drawing the PNG takes a second, so not at each checkpoint
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56em; margin: 2em auto; padding: 0 1em; }
h2 { font-size: 1.15em; margin-top: 1.8em; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .25em 1em .25em 0; font-weight: normal;
         border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
th, td:first-child { color: #666; min-width: 6em; }
pre { background: #f4f4f2; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere; }
object { max-width: 100%; }
"""


def write_report(folder: str | Path, *, gpu_hour_price: float = 0.0, png: bool = True) -> None:
    """Draws the report of a run folder; without matplotlib, or where the curve fails, without it.

    gpu_hour_price: of one GPU; 0: not known. png: False, at checkpoints, draws loss.png again only
    where the launch and the file are older than PNG_AGE_S.
    Raises OSError where it cannot be written, ImportError for report.html without markdown-it-py,
    ValueError where that fails.
    """
    folder = Path(folder)
    lines, receipt, config, notes = _read(folder)
    title, picture = str(config.get("run_name", folder.name)), folder / "loss.png"
    curve = "![loss curve](loss.png)"
    if not points(lines, "train/loss") + points(lines, "val/loss"):
        curve = "No loss was logged."
    elif png or _is_old(picture, receipt):
        try:
            draw_curve(lines, picture, title, str(receipt.get("unit", "nats per token")))
        except (ImportError, ValueError) as error:
            curve = escape(f"No curve: {error}.")
    elif not picture.exists():
        curve = "The curve follows."
    body = describe(lines, receipt, config, gpu_hour_price)
    markdown = "\n\n".join([f"# {escape(title)}", curve, *map(escape, notes), body]) + "\n"
    write_whole(folder / "report.md", markdown)
    write_whole(folder / "report.html", _to_html(title, markdown, picture))


def _read(folder: Path) -> tuple[list[dict], dict, dict, list[str]]:
    """Log, receipt and config, as far as they can be read; and what is wrong with them."""
    import yaml

    lines, damage = read_log(folder / "metrics.jsonl")
    notes, receipt, config = [f"{damage}."] if damage else [], {}, {}
    try:
        receipt = read_receipt(folder) or {}
    except (OSError, ValueError) as error:
        notes.append(f"{error}.")
    path = folder / "config.yaml"
    try:
        config = dict(yaml.safe_load(path.read_bytes()) or {}) if path.exists() else {}
    except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        notes.append(f"{path} cannot be read: {error}.")
    return lines, {"launches": []} | receipt, config, notes


def _is_old(picture: Path, receipt: dict) -> bool:
    age = time.time() - picture.stat().st_mtime if picture.exists() else PNG_AGE_S
    running = receipt["launches"][-1].get("seconds") if receipt["launches"] else PNG_AGE_S
    return isinstance(running, int | float) and min(age, running) >= PNG_AGE_S


def _to_html(title: str, markdown: str, picture: Path) -> str:
    """The page with its picture inside."""
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise ImportError("report.html needs markdown-it-py: pip install -e '.[train]'") from error
    try:
        body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    except Exception as error:
        raise ValueError(f"report.html cannot be drawn: {error!r}") from error
    if (link := '<img src="loss.png" alt="loss curve" />') in body:
        data = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        body = body.replace(link, f'<object type="image/png" data="{data}">loss curve</object>', 1)
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
        ("Speed and cost", lambda: _table([*_speed(lines, receipt), *_cost(receipt, price)])),
        ("Samples", lambda: _samples(lines)),
        ("Skipped steps", lambda: _events(lines)),
        ("Launches", lambda: _launches(receipt)),
        ("Data", lambda: _table(_data(receipt))),
        ("Software and machine", lambda: _machine(receipt)),
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


def _table(rows: list[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    if not rows:
        return ""
    lines = [head or ("",) * len(rows[0]), ("---",) * len(rows[0]), *rows]
    return "\n".join(f"| {' | '.join(map(escape, map(str, line)))} |" for line in lines)


def _summary(lines: list[dict], receipt: dict, config: dict) -> list[tuple[str, str]]:
    launches = receipt["launches"]
    done = max((step for step, _ in points(lines, "train/loss")), default=0)
    most = config.get("max_steps", done)
    rows = [("state", _state(done, most, launches[-1] if launches else None))]
    if m := receipt.get("model"):
        rows.append((
            "model",
            f"{m['n_params']:,} parameters: {m['n_layer']} layers, {m['n_head']} heads, "
            f"{m['n_embd']} wide, context {m['block_size']}, vocabulary {m['vocab_size']}; "
            f"{m['kernels']} kernels",
        ))  # fmt: skip
    if size := config.get("tokens_per_step"):
        rows.append(("trained", f"{done:,} steps of {size:,} tokens, {done * size:,} in all"))
    if "data" in config:
        rows.append(("data", config["data"]))
    for key, name in (("train/loss", "train loss"), ("val/loss", "val loss")):
        if found := points(lines, key):
            step, best = min(found, key=lambda point: point[1])
            last = f"{found[-1][1]:.4f} at step {found[-1][0]:,}"
            rows.append((name, f"{last}; lowest {best:.4f} at step {step:,}"))
    return rows


def _state(done: int, most: int, launch: dict | None) -> str:
    if done >= most > 0:
        return "finished"
    where = f"step {done:,} of {most:,}"
    if launch is None:
        return where
    if launch["end"] == "running":  # or killed since: nobody was there to write it
        return f"{where} when this was drawn, {launch['stop']}"
    return f"stopped at {where}: {launch['end']}"


def _against_gpt2(lines: list[dict], receipt: dict, config: dict) -> Iterator[str]:
    if val := points(lines, "val/loss"):
        anchors, note = comparable_losses(receipt, config)
        if anchors:
            rows = [("this run", f"{val[-1][1]:.4f}")]
            rows += [(f"GPT-2 {name}", f"{loss}") for name, loss in anchors.items()]
            yield _table(rows, ("", "val loss"))
        yield escape(note)
    if swag := points(lines, "eval/hellaswag"):
        rows = [("this run", f"{swag[-1][1]:.2%}")]
        rows += [(f"GPT-2 {name}", f"{value:.2f}%") for name, value in HELLASWAG.items()]
        yield _table(rows, ("", "HellaSwag, acc_norm"))
        yield (
            "GPT-2's figures are build-nanogpt's for all 10,042 validation examples, each ending "
            "scored by its mean loss; a part of them, or lm-eval's harness (31.14% for 124M), "
            "gives other figures."
        )


def comparable_losses(receipt: dict, config: dict) -> tuple[dict[str, float], str]:
    """GPT-2's losses on this run's validation data, where they are the same measure; and a note.

    A loss depends on the text, the tokenizer, the context and, on FineWeb, on which tokens of the
    validation shard are read.
    """
    data = receipt.get("data", [])
    if len(data) != 1:
        why = "the text is a mixture" if data else "the text is not known"
        return {}, f"GPT-2's validation losses are not comparable here: {why}."
    source, tokenizer = str(data[0].get("source")), data[0].get("tokenizer")
    context = config.get("block_size") or receipt.get("model", {}).get("block_size")
    name = source.split("/")[-1].lower()
    is_fineweb = name in ("fineweb", "fineweb10b-gpt2")
    read = config.get("eval_steps", 0) * config.get("tokens_per_step", 0)
    checks = {
        f"the tokenizer is {tokenizer}, so that a token is another unit": tokenizer == "gpt2",
        f"the context is {context}, not 1024": context == 1024,
        "attention stays inside documents (doc_mask)": not config.get("doc_mask"),
        f"{f'{read:,}' if read else 'all'} validation tokens are read, not the first "
        f"{FINEWEB_VAL_TOKENS:,}": not is_fineweb or read == FINEWEB_VAL_TOKENS,
        f"the text is another ({source})": is_fineweb or name == "openwebtext",
    }
    wrong = [why for why, is_same in checks.items() if not is_same]
    if wrong:
        return {}, f"GPT-2's validation losses are not comparable here: {'; '.join(wrong)}."
    if is_fineweb:
        return FINEWEB, (
            f"Both on the first {FINEWEB_VAL_TOKENS:,} tokens of FineWeb's validation shard; "
            "losses on FineWeb-Edu are others."
        )
    return OPENWEBTEXT, (
        "OpenWebText is like what GPT-2 was trained on, but not the same; other documents of it "
        "are held out here than in nanoGPT, whose figures these are."
    )


def _speed(lines: list[dict], receipt: dict) -> Iterator[tuple[str, str]]:
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
    steps = [value for _, value in points(lines, "train/step_ms")]
    predicted = [launch["predicted"].get("step_ms") for launch in receipt["launches"]]
    if steps and predicted and predicted[-1]:
        yield (
            "predicted",
            f"at least {predicted[-1]:,.1f} ms a step, each part at the ceilings measured before "
            f"the first one; it took {median_high(steps) / predicted[-1]:.2f} times that",
        )


def _cost(receipt: dict, gpu_hour_price: float) -> Iterator[tuple[str, str]]:
    launches = receipt["launches"]
    if not launches:
        return
    hours = {"cuda": 0.0, "cpu": 0.0}
    for launch in launches:
        hours[launch["device"]] += launch["seconds"] / 3600 * launch["world_size"]
    yield "GPU hours", f"{hours['cuda']:.3f}" if hours["cuda"] else "0, on a CPU"
    if hours["cpu"]:
        yield "process hours", f"{hours['cpu']:.3f}"
    if gpu_hour_price and hours["cuda"]:
        yield "cost", f"{hours['cuda'] * gpu_hour_price:,.2f}, at {gpu_hour_price:g} a GPU hour"
    if any(launch["end"] == "running" for launch in launches[:-1]):
        yield "not counted", "what killed launches did after their last checkpoint"


def _samples(lines: list[dict]) -> str:
    samples = [(line["step"], str(line["sample"])) for line in lines if "sample" in line][-3:]
    return "\n\n".join(f"Step {step:,}:\n\n{_verbatim(text)}" for step, text in samples)


def _events(lines: list[dict]) -> str:
    events = [line for line in lines if any(key.startswith("guard/") for key in line)]
    rows = []
    for line in events[:MOST_EVENTS]:
        values = {k.removeprefix("guard/"): v for k, v in line.items() if k.startswith("guard/")}
        reason = values.pop("reason", "")
        rows.append((line["step"], reason, ", ".join(f"{k} {v}" for k, v in values.items())))
    skipped = sum(int(line.get("guard/skipped") or 0) for line in events)
    note = f"{skipped} steps were skipped in {len(events)} events."
    note += f" The first {MOST_EVENTS}:" if len(events) > MOST_EVENTS else ""
    return f"{note}\n\n{_table(rows, ('step', 'reason', 'what'))}" if events else ""


def _launches(receipt: dict) -> str:
    launches, rows = receipt["launches"], []
    for launch in launches:
        git, end = launch["git"], launch["end"]
        commit = (git["commit"] or "not known")[:10] + (" with changes" if git["dirty"] else "")
        if end == "running" and launch is not launches[-1]:
            end = "killed"
        rows.append((
            launch["start"], f"{launch['first_step']:,} to {launch['last_step']:,}",
            duration(launch["seconds"]), launch["world_size"], commit, end,
        ))  # fmt: skip
    if not rows:
        return ""
    n = len(rows) - 1
    note = f"Restarted {n} time{'s' if n > 1 else ''}." if n else "Never restarted."
    return f"{note}\n\n{_table(rows, ('start', 'steps', 'time', 'ranks', 'commit', 'end'))}"


def _data(receipt: dict) -> list[tuple[str, str]]:
    rows = []
    for entry in receipt.get("data", []):
        known = [f"{entry['tokens']:,} tokens"] if entry.get("tokens") else []
        for key, name in (("hash", "hash"), ("manifest_sha256", "SHA-256 of its manifest")):
            known += [f"{name} {entry[key]}"] if entry.get(key) else []
        rows.append((entry.get("path", ""), "; ".join(known) or "nothing is known of it"))
    return rows


def _machine(receipt: dict) -> str:
    if not receipt["launches"]:
        return ""
    launch = receipt["launches"][-1]
    rows = [(name, value) for name, value in launch["hardware"].items() if value is not None]
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in launch["versions"].items() if v)))
    return f"{_table(rows)}\n\nCommand:\n\n{_verbatim(str(launch['command']))}"
