"""The report of a run, on one page: RUN/report.md, RUN/report.html and RUN/loss.png.

It is drawn from the run folder alone (config.yaml, receipt.json, metrics.jsonl), whatever of them
is there, so it can be drawn of a run that was killed. The HTML page needs no other file: the curve
is SVG inside of it.

Set beside GPT-2's figures is only what was measured in the same way; where it was not, the page
says why. Sources: https://github.com/karpathy/nanoGPT, README (OpenWebText);
https://github.com/karpathy/build-nanogpt, play.ipynb (FineWeb, HellaSwag).
"""

import time
from pathlib import Path

from gpt2.train.curve import curve_svg
from gpt2.train.metrics import draw_curve, duration, read_metrics
from gpt2.train.page import Block, Table, Verbatim, to_html, to_markdown
from gpt2.train.receipt import read_receipt, write_whole

SIZES = ("124M", "350M", "774M", "1558M")
OPENWEBTEXT = dict(zip(SIZES, (3.12, 2.84, 2.67, 2.54), strict=True))
FINEWEB = {"124M": 3.2924}
FINEWEB_VAL_TOKENS = 10_485_760  # the first of the validation shard, by custom
HELLASWAG = dict(zip(SIZES, (29.45, 37.52, 43.20, 48.89), strict=True))
MOST_EVENTS = 20  # rows of the table of skipped steps
PNG_AGE_S = 600.0  # drawing the PNG takes a second, so not at each checkpoint


def write_report(folder: str | Path, *, gpu_hour_price: float = 0.0, png: bool = True) -> None:
    """Draws the report of a run folder.

    gpu_hour_price: of one GPU; 0: not known. png: False, at checkpoints, draws loss.png again only
    where the launch and the file are older than PNG_AGE_S.
    Raises OSError where it cannot be written, ImportError without matplotlib.
    """
    import yaml

    folder = Path(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    receipt = read_receipt(folder) or {"launches": []}
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text()) if path.exists() else {}
    title = str(config.get("run_name", folder.name))
    sections = describe(lines, receipt, config, gpu_hour_price)
    picture, unit = folder / "loss.png", receipt.get("unit", "nats per token")
    if png or _is_old(picture, receipt):
        draw_curve(lines, picture, title, unit)
    curve = "![loss curve](loss.png)" if picture.exists() else "The curve is in report.html."
    write_whole(folder / "report.md", to_markdown(title, curve, sections))
    write_whole(folder / "report.html", to_html(title, curve_svg(lines, unit), sections))


def _is_old(picture: Path, receipt: dict) -> bool:
    age = time.time() - picture.stat().st_mtime if picture.exists() else PNG_AGE_S
    running = receipt["launches"][-1]["seconds"] if receipt["launches"] else PNG_AGE_S
    return min(age, running) >= PNG_AGE_S


def describe(lines: list[dict], receipt: dict, config: dict, gpu_hour_price: float = 0.0) -> list:
    """The sections of the page, in gpt2.train.page's blocks; those without content are left out.

    lines: of metrics.jsonl; receipt: of receipt.json; config: of config.yaml. Any may be empty.
    """
    sections = [
        ("", _summary(lines, receipt, config)),
        ("Against GPT-2", _against_gpt2(lines, receipt, config)),
        ("Speed and cost", _table(_speed(lines, receipt) + _cost(receipt, gpu_hour_price))),
        ("Samples", _samples(lines)),
        ("Skipped steps", _events(lines)),
        ("Launches", _launches(receipt)),
        ("Data", _table(_data(receipt))),
        ("Software and machine", _machine(receipt)),
    ]
    return [(title, blocks) for title, blocks in sections if blocks]


def _table(rows: list[tuple[str, ...]], head: tuple[str, ...] = ()) -> list[Block]:
    return [Table(rows, head)] if rows else []


def _summary(lines: list[dict], receipt: dict, config: dict) -> list[Block]:
    launches = receipt["launches"]
    done = max((step for step, _ in points(lines, "train/loss")), default=0)
    most = config.get("max_steps", done)
    rows = [("state", _state(done, most, launches[-1] if launches else None))]
    model = receipt.get("model")
    if model:
        rows.append((
            "model",
            f"{model['n_params']:,} parameters: {model['n_layer']} layers, {model['n_head']} "
            f"heads, {model['n_embd']} wide, context {model['block_size']}, vocabulary "
            f"{model['vocab_size']}; {model['kernels']} kernels",
        ))  # fmt: skip
    if config:
        size = config["tokens_per_step"]
        rows.append(("trained", f"{done:,} steps of {size:,} tokens, {done * size:,} in all"))
        rows.append(("data", str(config["data"])))
    for key, name in (("train/loss", "train loss"), ("val/loss", "val loss")):
        found = points(lines, key)
        if found:
            step, best = min(found, key=lambda point: point[1])
            last = f"{found[-1][1]:.4f} at step {found[-1][0]:,}"
            rows.append((name, f"{last}; lowest {best:.4f} at step {step:,}"))
    return [Table(rows)]


def _state(done: int, most: int, launch: dict | None) -> str:
    if done >= most > 0:
        return "finished"
    where = f"step {done:,} of {most:,}"
    if launch is None:
        return where
    if launch["end"] == "running":  # or killed since: nobody was there to write it
        return f"{where} when this was drawn, {launch['stop']}"
    return f"stopped at {where}: {launch['end']}"


def _against_gpt2(lines: list[dict], receipt: dict, config: dict) -> list[Block]:
    blocks: list[Block] = []
    val, swag = points(lines, "val/loss"), points(lines, "eval/hellaswag")
    if val:
        anchors, note = comparable_losses(receipt, config)
        if anchors:
            rows = [("this run", f"{val[-1][1]:.4f}")]
            rows += [(f"GPT-2 {name}", f"{loss}") for name, loss in anchors.items()]
            blocks.append(Table(rows, ("", "val loss")))
        blocks.append(note)
    if swag:
        rows = [("this run", f"{swag[-1][1]:.2%}")]
        rows += [(f"GPT-2 {name}", f"{value:.2f}%") for name, value in HELLASWAG.items()]
        blocks += [
            Table(rows, ("", "HellaSwag, acc_norm")),
            "GPT-2's figures are build-nanogpt's for all 10,042 validation examples, each ending "
            "scored by its mean loss; a part of them, or lm-eval's harness (31.14% for 124M), "
            "gives other figures.",
        ]
    return blocks


def comparable_losses(receipt: dict, config: dict) -> tuple[dict[str, float], str]:
    """GPT-2's losses on this run's validation data, where they are the same measure; and a note.

    A loss depends on the text, the tokenizer, the context and, on FineWeb, on which tokens of the
    validation shard are read.
    """
    data = receipt.get("data", [])
    if len(data) != 1:
        return {}, "GPT-2's validation losses are not comparable here: the text is a mixture."
    source, tokenizer = str(data[0].get("source")), data[0].get("tokenizer")
    wrong = []
    if tokenizer != "gpt2":
        wrong.append(f"the tokenizer is {tokenizer}, so that a token is another unit")
    context = config.get("block_size") or receipt.get("model", {}).get("block_size")
    if context != 1024:
        wrong.append(f"the context is {context}, not 1024")
    if config.get("doc_mask"):
        wrong.append("attention stays inside documents (doc_mask)")
    name = source.split("/")[-1].lower()
    is_fineweb = name in ("fineweb", "fineweb10b-gpt2")
    if is_fineweb:
        read = config.get("eval_steps", 0) * config.get("tokens_per_step", 0)
        if read != FINEWEB_VAL_TOKENS:
            how_many = f"{read:,}" if read else "all"
            wrong.append(
                f"{how_many} validation tokens are read, not the first {FINEWEB_VAL_TOKENS:,}"
            )
    elif name != "openwebtext":
        wrong.append(f"the text is another ({source})")
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


def _speed(lines: list[dict], receipt: dict) -> list[tuple[str, str]]:
    rows = []
    for key, name, form in (
        ("train/step_ms", "a step", "{:,.1f} ms"),
        ("train/tokens_per_s", "tokens", "{:,.0f} a second"),
        ("train/mfu", "MFU", "{:.1%}"),
        ("train/data_ms", "waiting for data", "{:.2f} ms a step"),
        ("checkpoint/held_ms", "held by a checkpoint", "{:,.1f} ms"),
        ("checkpoint/write_ms", "writing a checkpoint", "{:,.0f} ms"),
    ):
        values = [value for _, value in points(lines, key)]
        if values:
            rows.append((name, f"{form.format(median(values))} (median of {len(values)})"))
    steps = [value for _, value in points(lines, "train/step_ms")]
    predicted = [launch["predicted"].get("step_ms") for launch in receipt["launches"]]
    if steps and predicted and predicted[-1]:
        rows.append((
            "predicted",
            f"at least {predicted[-1]:,.1f} ms a step, each part at the ceilings measured before "
            f"the first one; it took {median(steps) / predicted[-1]:.2f} times that",
        ))  # fmt: skip
    return rows


def _cost(receipt: dict, gpu_hour_price: float) -> list[tuple[str, str]]:
    launches = receipt["launches"]
    if not launches:
        return []
    hours = {"cuda": 0.0, "cpu": 0.0}
    for launch in launches:
        hours[launch["device"]] += launch["seconds"] / 3600 * launch["world_size"]
    rows = [("GPU hours", f"{hours['cuda']:.3f}" if hours["cuda"] else "0, on a CPU")]
    if hours["cpu"]:
        rows.append(("process hours", f"{hours['cpu']:.3f}"))
    if gpu_hour_price and hours["cuda"]:
        cost = hours["cuda"] * gpu_hour_price
        rows.append(("cost", f"{cost:,.2f}, at {gpu_hour_price:g} a GPU hour"))
    if any(launch["end"] == "running" for launch in launches[:-1]):
        rows.append(("not counted", "what killed launches did after their last checkpoint"))
    return rows


def _samples(lines: list[dict]) -> list[Block]:
    samples = [(line["step"], line["sample"]) for line in lines if "sample" in line][-3:]
    return [b for step, text in samples for b in (f"Step {step:,}:", Verbatim(str(text)))]


def _events(lines: list[dict]) -> list[Block]:
    events = [line for line in lines if any(k.startswith("guard/") for k in line)]
    if not events:
        return []
    rows = []
    for line in events[:MOST_EVENTS]:
        values = {k.removeprefix("guard/"): v for k, v in line.items() if k.startswith("guard/")}
        reason = str(values.pop("reason", ""))
        rest = ", ".join(f"{k} {v}" for k, v in values.items())
        rows.append((f"{line['step']:,}", reason, rest))
    skipped = sum(int(line.get("guard/skipped") or 0) for line in events)
    note = f"{skipped} steps were skipped in {len(events)} events."
    note += f" The first {MOST_EVENTS}:" if len(events) > MOST_EVENTS else ""
    return [note, Table(rows, ("step", "reason", "what"))]


def _launches(receipt: dict) -> list[Block]:
    launches, rows = receipt["launches"], []
    for launch in launches:
        git, end = launch["git"], launch["end"]
        commit = (git["commit"] or "not known")[:10] + (" with changes" if git["dirty"] else "")
        if end == "running" and launch is not launches[-1]:
            end = "killed"
        rows.append((
            launch["start"], f"{launch['first_step']:,} to {launch['last_step']:,}",
            duration(launch["seconds"]), str(launch["world_size"]), commit, end,
        ))  # fmt: skip
    if not rows:
        return []
    n = len(rows) - 1
    note = f"Restarted {n} time{'s' if n > 1 else ''}." if n else "Never restarted."
    return [note, Table(rows, ("start", "steps", "time", "ranks", "commit", "end"))]


def _data(receipt: dict) -> list[tuple[str, str]]:
    rows = []
    for folder in receipt.get("data", []):
        known = folder["manifest_sha256"]
        hashes = f"SHA-256 of its manifest {known}" if known else "no manifest, so no hashes"
        rows.append((folder["path"], f"{len(folder['shards'])} shards; {hashes}"))
    return rows


def _machine(receipt: dict) -> list[Block]:
    if not receipt["launches"]:
        return []
    launch = receipt["launches"][-1]
    h, v = launch["hardware"], launch["versions"]
    memory = f"{h['memory_bytes'] / 1e9:.0f} GB"
    rows = [("CPU", f"{h['cpu']}, {h['cpus']} usable, {h['threads']} threads a rank, {memory}")]
    if h["gpu"]:
        rows.append((
            "GPU",
            f"{h['gpu']}, {h['gpu_memory_bytes'] / 1e9:.0f} GB, {h['gpus']} in this host, driver "
            f"{h['driver'] or 'not known'}; {launch['world_size']} ranks",
        ))  # fmt: skip
    rows.append(("host", f"{h['host']}, {h['system']}"))
    rows.append(("versions", ", ".join(f"{name} {value}" for name, value in v.items() if value)))
    return [Table(rows), "Command:", Verbatim(launch["command"])]


def points(lines: list[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have a number under key."""
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]


def median(values: list[float]) -> float:
    """The middle value; of two, the upper one."""
    return sorted(values)[len(values) // 2]
