"""Progress of a long preparation: a live bar in a terminal, else a line now and then."""

import sys
import time

LINE_S = 10.0  # seconds between lines where there is no terminal


class Progress:
    """documents, tokens, tokens/s and the time left, on stderr; use it in a `with` block."""

    def __init__(self, title: str):
        self.title = title
        self._start = self._shown = time.monotonic()
        # What a run that goes on skipped says nothing about the time left: it counts from its first
        # tokens on.
        self._first: tuple[float, float] | None = None
        self._bar = _live_bar(title) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, documents: int, tokens: int, new_tokens: int, fraction: float | None) -> None:
        """new_tokens: of this run, for the speed; fraction: done of all, None where not known."""
        now = time.monotonic()
        seconds = now - self._start
        if self._first is None and fraction is not None:
            self._first = now, fraction
        if self._bar is None and now - self._shown < LINE_S:
            return
        self._shown = now
        speed = new_tokens / max(seconds, 1e-9)
        text = f"{documents:,} documents, {tokens:,} tokens, {speed:,.0f}/s"
        if fraction is not None:
            since, first = self._first
            text += f", {fraction:.1%}"
            if fraction > first:
                text += f", ETA {_clock((now - since) * (1 - fraction) / (fraction - first))}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=fraction or 0.0, text=text)
        else:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)


def _live_bar(title: str):
    """rich's display, or None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    bar = Bar(
        TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[text]}"),
        console=Console(stderr=True), refresh_per_second=4, transient=True,
    )  # fmt: skip
    bar.add_task(title, total=1.0, text="")
    return bar


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
