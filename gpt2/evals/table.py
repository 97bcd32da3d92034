"""The results as a table, beside what was published of GPT-2 and GPT-3.

Percent for accuracies. Sizes as their authors name them; None: not published, or not known here.
"""

import textwrap

SIZES = ("124M", "350M", "774M", "1558M", "125M", "350M", "760M", "1.3B")  # 4 of GPT-2, 4 of GPT-3
GPT2_PAPER = (
    "Radford et al. (2019), table 3: zero-shot, with the paper's own invertible detokenizers"
)
BUILD_NANOGPT = "karpathy/build-nanogpt, play.ipynb and hellaswag.py, completion style as here"
# (task, measure): values for SIZES, as many as are known, and their source.
PUBLISHED: dict[tuple[str, str], tuple[tuple[float | None, ...], str]] = {
    ("hellaswag", "acc_norm"): (
        (29.45, 37.52, 43.20, 48.89, 33.7, 43.6, 51.0, 54.7),
        f"{BUILD_NANOGPT}; GPT-3's from the same notebook, whose protocol may differ",
    ),
    ("hellaswag", "acc"): ((28.59, None, None, 38.42), BUILD_NANOGPT),
    ("wikitext2", "word_perplexity"): (
        (29.41, 22.76, 19.93, 18.34),
        f"{GPT2_PAPER}; lm-eval's wikitext task gives 37.37 for 124M (workofart/ml-by-hand)",
    ),
    ("wikitext103", "word_perplexity"): (
        (37.50, 26.37, 22.05, 17.48),
        f"{GPT2_PAPER}; the raw test text is WikiText-2's, so this model's figures are equal, "
        "which the paper's are not",
    ),
    ("lambada", "acc"): (
        (45.99, 55.48, 60.12, 63.24),
        f"{GPT2_PAPER}, and a stop-word filter that is not applied here; lm-eval, without it, "
        "gives 32.56 for 124M (workofart/ml-by-hand)",
    ),
    ("lambada", "perplexity"): ((35.13, 15.60, 10.87, 8.63), GPT2_PAPER),
}  # fmt: skip
_TEXT = {"word_perplexity": "", "token_perplexity": "", "bits_per_byte": ""}
# What the table shows of each task, and how: a percentage or a number.
SHOWN = {
    "hellaswag": {"acc_norm": "%", "acc_norm_characters": "%", "acc": "%"},
    "wikitext2": _TEXT, "wikitext103": _TEXT,
    "lambada": {"acc": "%", "perplexity": ""}, "val": {"loss": "", "perplexity": ""},
}  # fmt: skip
# What acc_norm is divided by: build-nanogpt and llm.c count tokens, lm-eval characters.
NAMES = {"acc_norm": "acc norm tokens", "acc_norm_characters": "acc norm chars"}


def table(name: str, results: dict[str, dict]) -> str:
    """The results beside GPT-2's and GPT-3's, with the sources below."""

    def number(value: float | None, unit: str = "%") -> str:
        if value is None:
            return "-"
        return f"{value:,.2f}" if unit or value < 1e6 else f"{value:.2e}"

    rows, sources = [("", "this model", SIZES)], []
    for task, key, unit in [(t, *s) for t in SHOWN if t in results for s in SHOWN[t].items()]:
        label = " ".join([task, NAMES.get(key, key.replace("_", " ")), *unit])
        values, source = PUBLISHED.get((task, key), ((), ""))
        published = [number(v, unit) for v in (*values, *[None] * (len(SIZES) - len(values)))]
        rows.append((label, number(results[task][key] * (100 if unit else 1), unit), published))
        sources += [f"{label}: {source}."] if source else []
    return "\n".join([
        f"{name:<43}{'GPT-2, published':<28}GPT-3, published",
        *(f"{a:<28}{b:>12}{''.join(f'{value:>7}' for value in c)}" for a, b, c in rows),
        *(textwrap.fill(s, 96, subsequent_indent="    ", break_on_hyphens=False) for s in sources),
    ])  # fmt: skip
