"""Progress of a long preparation on stderr: a line, rewritten in a terminal, else now and then."""

import sys
import time


class Progress:
    """documents, tokens, tokens/s and the time left."""

    def __init__(self, title: str):
        self._title, self._start = title, time.monotonic()
        self._live = sys.stderr.isatty()
        self._next = self._start + (0.0 if self._live else 10.0)
        # What a run that goes on skipped says nothing about the time left, nor about the speed.
        self._first: tuple[float, float] | None = None

    def update(self, documents: int, tokens: int, new_tokens: int, fraction: float | None) -> None:
        """new_tokens: of this run; fraction: done of all, None where not known."""
        now = time.monotonic()
        if self._first is None and fraction is not None:
            self._first = now, fraction
        if now < self._next:
            return
        self._next = now + (0.25 if self._live else 10.0)
        speed = new_tokens / max(now - self._start, 1e-9)
        text = f"{self._title}: {documents:,} documents, {tokens:,} tokens, {speed:,.0f}/s"
        if fraction is not None:
            since, first = self._first
            text += f", {fraction:.1%}"
            if fraction > first:
                left = int((now - since) * (1 - fraction) / (fraction - first))
                text += f", ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        print(f"\r{text}\x1b[K" if self._live else text, end="" if self._live else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    def close(self) -> None:
        """Takes the live line away."""
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
