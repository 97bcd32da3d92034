"""The loss curve as SVG, for a page that needs no other file."""

import math

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 360, 60, 15, 15, 45
MOST_POINTS = 800  # of a line: more than there are pixels tell nothing
SERIES = (("train/loss", "train", "#8aa4bb", 1.2), ("val/loss", "val", "#c33", 2.2))


def curve_svg(lines: list[dict], unit: str = "nats per token") -> str:
    """Training and validation loss of metrics.jsonl's lines over steps; a note where none is."""
    series = []
    for key, name, color, width in SERIES:
        points = [(line["step"], line[key]) for line in lines if key in line]
        points = thin([(x, y) for x, y in points if math.isfinite(y)])
        if points:
            series.append((name, color, width, points))
    if not series:
        return "<p>No loss was logged.</p>"
    everything = [point for *_, points in series for point in points]
    last = max(x for x, _ in everything) or 1
    losses = sorted(y for _, y in everything)
    ticks = nice_ticks(losses[0], losses[-1])
    low, high = min(losses[0], ticks[0]), max(losses[-1], ticks[-1])

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high - loss) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="loss over steps" font-size="12" '
        'font-family="system-ui, sans-serif" fill="#444">'
    ]
    for tick in ticks:
        parts.append(
            f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in nice_ticks(0, last):
        if tick <= last:
            parts.append(
                f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                f"{tick:,.10g}</text>"
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    turn = f"rotate(-90 14 {(HEIGHT - BOTTOM) / 2})"
    parts.append(
        f'<text x="14" y="{(HEIGHT - BOTTOM) / 2}" text-anchor="middle" transform="{turn}">'
        f"loss ({unit})</text>"
    )
    for i, (name, color, width, points) in enumerate(series):
        line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="{width}"/>'
        )
        if len(points) <= 60:
            dots = (f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5"/>' for a, b in points)
            parts.append(f'<g fill="{color}">{"".join(dots)}</g>')
        parts.append(
            f'<text x="{WIDTH - RIGHT - 8}" y="{TOP + 16 + 18 * i}" text-anchor="end" '
            f'fill="{color}">{name}, last {points[-1][1]:.4f}</text>'
        )
    return "\n".join(parts) + "\n</svg>"


def thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS of them, the means of neighbours; the last stays as it is."""
    if len(points) <= MOST_POINTS:
        return points
    size = -(-len(points) // (MOST_POINTS - 1))
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]
    return [*means, points[-1]]


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers around low and high."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 8)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]
