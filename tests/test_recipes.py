"""The recipes in configs/: each parses, builds and fits, and its comment and docs are right."""

import json
import math
import re
import shlex
from distutils.core import run_setup
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.recipes import compare, read_curve
from gpt2.cli import parse
from gpt2.config import DPOConfig, FineTuneConfig, SFTConfig, TrainConfig
from gpt2.data import prepare as preparing
from gpt2.data.conversations import CHAT_DATASETS
from gpt2.data.datasets import DATASETS
from gpt2.data.sft import ConversationLoader, load_conversations
from gpt2.model import GPT
from gpt2.options import PrepareConfig
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.train.preflight import KEPT_FREE, _estimated

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").iterdir())
COST = re.compile(
    r"([\d,]+) steps x ([\d,]+) tokens = ([\d.]+)([MB]) tokens.*?, ([\d.]+e\d+) FLOPs"
)
UNITS = {"M": 1e6, "B": 1e9}
RANKS = (1, 2, 4, 8)

each = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def read(path: Path):
    kinds = {"sft": SFTConfig, "dpo": DPOConfig}
    return parse(kinds.get(path.name[:3], TrainConfig), "", [str(path)])


def comment(path: Path) -> str:
    """The lines at the head of a recipe as one."""
    lines = path.read_text().splitlines()
    return " ".join(line[2:] for line in lines if line.startswith("# "))


@cache
def build(config) -> GPT:
    vocab_size = 65 if config.data.endswith("_char") else None  # tiny Shakespeare's characters
    with torch.device("meta"):
        return GPT(config.model_config(vocab_size), "torch", "meta")


def row(config) -> int:
    """Tokens; of DPO a row is a pair, two halves of block_size."""
    length = config.block_size or build(config).config.block_size
    return length * (2 if isinstance(config, DPOConfig) else 1)


def n_steps(config, text: str) -> int:
    """Those of the config, or as many as epochs of the comment's packed rows need."""
    if config.max_steps:
        return config.max_steps
    rows = int(re.search(r"([\d,]+) rows", text)[1].replace(",", ""))
    return math.ceil(config.epochs * rows / (config.tokens_per_step // row(config)))


def has_no_shape(path: Path) -> bool:
    return read(path).preset == "auto"


@each
def test_the_cost_in_the_comment_is_the_recipes(path):
    config, text = read(path), comment(path)
    if has_no_shape(path):
        assert config.max_minutes and f"in {config.max_minutes:g} minutes" in text
        assert not COST.search(text)
        return
    steps, step_tokens, tokens, unit, flops = COST.search(text).groups()
    model, total = build(config), n_steps(config, text) * config.tokens_per_step
    assert steps == f"{n_steps(config, text):,}" and step_tokens == f"{config.tokens_per_step:,}"
    assert len(tokens.replace(".", "")) >= 2 and len(flops.partition("e")[0]) >= 3
    assert tokens == f"{total / UNITS[unit]:.{len(tokens.partition('.')[2])}f}"
    assert flops == f"{total * model.flops_per_token():.1e}".replace("e+", "e")


@each
def test_the_step_divides_and_a_micro_batch_fits_a_gpu_of_80_gb(path):
    config = read(path)
    if has_no_shape(path):
        return
    model = build(config)
    for ranks in RANKS if config.tokens_per_step >= 1 << 16 else (1,):
        assert config.tokens_per_step % (row(config) * ranks) == 0
        if config.micro_batch_size != "auto":
            assert config.grad_accum_steps(row(config), ranks) >= 1
    if config.micro_batch_size != "auto":
        # Weights, gradients and moments of one rank, unsharded; DPO's reference; bfloat16.
        per_parameter = 20 if isinstance(config, DPOConfig) else 16
        passes = _estimated(config, model.config, row(config), 2, config.micro_batch_size)
        needed = per_parameter * model.n_params() + sum(passes.values())
        assert needed <= 80e9 * (1 - KEPT_FREE)


@each
def test_a_recipe_names_its_run_like_its_file_and_the_data_that_is_prepared(
    path, tmp_path, monkeypatch
):
    config, text, made = read(path), comment(path), []
    assert config.run_name == path.stem
    if isinstance(config, DPOConfig):
        [fetched] = re.findall(r"--local-dir (\S+)", text)
        assert config.data.startswith(f"{fetched}/") and config.val_data.startswith(f"{fetched}/")
        assert config.init_from in {f"runs/{path.stem}" for path in RECIPES}
    elif isinstance(config, FineTuneConfig):
        assert config.data in CHAT_DATASETS
    elif Path(config.data).name in DATASETS:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(preparing, "_check_room", lambda out, needed: made.append(out) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preparing.prepare(PrepareConfig(name=Path(config.data).name))
        assert made == [Path(config.data)]
    else:
        [words] = re.findall(r"gpt2-triton prepare (.*?)  ", text)
        assert parse(PrepareConfig, "", shlex.split(words)).out == config.data


@each
def test_the_documentation_says_what_the_recipe_does(path):
    page = (ROOT / "docs" / "recipes.md").read_text()
    [line] = re.findall(rf"^\| \[{path.stem}\]\(../configs/{path.name}\).*$", page, re.M)
    cells, text = [cell.strip() for cell in line.split("|")[1:-1]], comment(path)
    config = read(path)
    name = config.data if isinstance(config, FineTuneConfig) else Path(config.data).name
    assert isinstance(config, FineTuneConfig) or cells[0].endswith(f"), {name}")
    if has_no_shape(path):
        return
    steps, step_tokens, tokens, unit, flops = COST.search(text).groups()
    i = cells.index(f"{steps} x {step_tokens}")
    assert cells[i + 1 : i + 3] == [tokens + unit, flops]
    if not isinstance(config, FineTuneConfig):
        loss = re.sub(r"\(http.*?\)", "", cells[i + 3])
        assert re.search("not measured|not published|[0-9]", loss)
        for figure in re.findall(r"\d\.\d+", loss):
            assert figure in text, f"{figure} is not in the recipe's comment"
        assert ("not measured" in text.lower()) == ("not measured" in loss)
    else:
        assert "not measured" in text


def test_every_recipe_is_in_the_wheel(monkeypatch):
    monkeypatch.chdir(ROOT)
    build = run_setup("setup.py", stop_after="init").get_command_obj("build_py")
    build.ensure_finalized()
    build.manifest_files = {}  # package_data alone
    found = {Path(name).name for name in build.find_data_files("gpt2", "gpt2")}
    assert {path.name for path in RECIPES} <= found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, file",
    [("sft_alpaca", "alpaca_data.json.xz"), ("sft_lima", "lima_train_llamafactory.jsonl.xz")],
)
def test_rows_counted_in_a_comment_are_those_of_the_real_data(name, file, shared_data):
    path = ROOT / "configs" / f"{name}.yaml"
    config, tokenizer = read(path), GPT2Tokenizer()
    train, _ = load_conversations(
        str(shared_data / "sft" / file), val_fraction=config.val_fraction, tokenizer=tokenizer,
        block_size=1024, template=config.template, limit=None, overlong=config.overlong,
        bad_rows=config.bad_rows,
    )  # fmt: skip
    rows = ConversationLoader(
        train, 1024, seed=config.seed, pad=tokenizer.eot, chat_template=config.template
    )
    assert f"{len(train):,} conversations" in comment(path)
    assert f"{rows.n_windows:,} rows" in comment(path)


def test_how_much_sooner_a_recipe_is(tmp_path):
    """One whose steps have half the tokens, take twice as long and do as much, and more."""
    for name, tokens, losses in (("base", 100, [9, 7, 5]), ("fast", 50, [9, 5, 3])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(f"tokens_per_step: {tokens}")
        log = [{"step": 10 * i, "val/loss": loss} for i, loss in enumerate(losses)]
        log.insert(1, {"step": 5, "train/step_ms": 1.0})
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
    curves = {name: [read_curve(tmp_path / name)] for name in ("base", "fast")}
    found = compare(curves, {"base": 0.1, "fast": 0.2})
    base, fast = found["base"], found["fast"]
    assert (base["loss"], fast["loss"]) == ([5.0], [3.0])
    assert base["equal tokens"] == [7.0] and fast["equal tokens"] == [3.0]  # after 1,000
    assert base["equal time"] == [5.0] and fast["equal time"] == [5.0]  # after 2 s
    assert fast["multiplier, tokens"] == [4.0] and fast["multiplier, time"] == [1.0]
    assert base["multiplier, tokens"] == base["multiplier, time"] == [1.0]
    slow = compare({"fast": curves["fast"], "base": curves["base"]}, {"base": 0.1, "fast": 0.1})
    assert slow["base"]["multiplier, tokens"] == [0.25]  # its end is the fast one's after 500
    (tmp_path / "base" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="needs two or more validations"):
        read_curve(tmp_path / "base")
