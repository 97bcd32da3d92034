"""The results as a table, beside what was published of GPT-2 and GPT-3.

Percent for accuracies. Sizes as their authors name them; None: not published, or not known here.
"""

import textwrap
from dataclasses import dataclass
from functools import partial

GPT2_SIZES = ("124M", "350M", "774M", "1558M")
GPT3_SIZES = ("125M", "350M", "760M", "1.3B")

GPT2_PAPER = (
    "Radford et al. (2019), table 3: zero-shot, with the paper's own invertible detokenizers"
)
BUILD_NANOGPT = "karpathy/build-nanogpt, play.ipynb and hellaswag.py, completion style as here"


@dataclass(frozen=True)
class Published:
    """One measure, for the four sizes of GPT-2 and the first four of GPT-3."""

    gpt2: tuple[float | None, ...]
    gpt3: tuple[float | None, ...]
    source: str


NONE = (None,) * 4
PUBLISHED: dict[tuple[str, str], Published] = {
    ("hellaswag", "acc_norm"): Published(
        (29.45, 37.52, 43.20, 48.89), (33.7, 43.6, 51.0, 54.7),
        f"{BUILD_NANOGPT}; GPT-3's from the same notebook, whose protocol may differ",
    ),
    ("hellaswag", "acc"): Published((28.59, None, None, 38.42), NONE, BUILD_NANOGPT),
    ("wikitext2", "word_perplexity"): Published(
        (29.41, 22.76, 19.93, 18.34), NONE,
        f"{GPT2_PAPER}; lm-eval's wikitext task gives 37.37 for 124M (workofart/ml-by-hand)",
    ),
    ("wikitext103", "word_perplexity"): Published(
        (37.50, 26.37, 22.05, 17.48), NONE,
        f"{GPT2_PAPER}; the raw test text is WikiText-2's, so this model's figures are equal, "
        "which the paper's are not",
    ),
    ("lambada", "acc"): Published(
        (45.99, 55.48, 60.12, 63.24), NONE,
        f"{GPT2_PAPER}, and a stop-word filter that is not applied here; lm-eval, without it, "
        "gives 32.56 for 124M (workofart/ml-by-hand)",
    ),
    ("lambada", "perplexity"): Published((35.13, 15.60, 10.87, 8.63), NONE, GPT2_PAPER),
}  # fmt: skip
# What the table shows of each task, and how: a percentage or a number.
SHOWN = {
    ("hellaswag", "acc_norm"): "%", ("hellaswag", "acc"): "%",
    ("wikitext2", "word_perplexity"): "", ("wikitext2", "token_perplexity"): "",
    ("wikitext2", "bits_per_byte"): "",
    ("wikitext103", "word_perplexity"): "", ("wikitext103", "token_perplexity"): "",
    ("wikitext103", "bits_per_byte"): "",
    ("lambada", "acc"): "%", ("lambada", "perplexity"): "",
    ("val", "loss"): "", ("val", "perplexity"): "",
}  # fmt: skip


def table(name: str, results: dict[str, dict]) -> str:
    """The results beside GPT-2's and GPT-3's, with the sources below."""

    def line(label: str, mine: str, published: list[str]) -> str:
        return f"{label:<30}{mine:>11}{''.join(f'{value:>8}' for value in published)}"

    def number(value: float | None, unit: str) -> str:
        if value is None:
            return "-"
        return f"{value:,.2f}" if unit or value < 1e6 else f"{value:.2e}"

    lines = [
        f"{name:<44}{'GPT-2, published':<32}GPT-3, published",
        line("", "this model", [*GPT2_SIZES, *GPT3_SIZES]),
    ]
    sources = []
    for (task, key), unit in SHOWN.items():
        if task in results:
            label = " ".join([task, *key.split("_"), *unit])
            known = PUBLISHED.get((task, key), Published(NONE, NONE, ""))
            mine = number(results[task][key] * (100 if unit else 1), unit)
            lines.append(line(label, mine, [number(v, unit) for v in known.gpt2 + known.gpt3]))
            sources += [f"{label}: {known.source}."] if known.source else []
    wrap = partial(textwrap.fill, width=105, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join([*lines, *map(wrap, sources)])
