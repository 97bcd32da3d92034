"""scripts/evaluate.py as a user runs it, on made-up data of the real forms."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

from gpt2 import hf
from gpt2.checkpoint import load_model, save_checkpoint
from gpt2.config import GPTConfig
from gpt2.data import write_shard
from gpt2.evals.files import FILES, find_file, read_examples, read_text
from gpt2.evals.table import PUBLISHED, SHOWN, table
from gpt2.model import GPT
from gpt2.options import Task
from gpt2.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from gpt2.train.pretrain import pretrain

from . import test_scripts
from .conftest import losses
from .test_scripts import SCRIPTS, one_line_error

script = test_scripts.script  # the fixture
TASKS = get_args(Task)

CPU = ("--device", "cpu")
ENDINGS = ["runs.", "sleeps well.", "eats an apple.", "reads the paper."]


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Files under the names that evaluate looks for, in the shapes that it accepts."""
    folder = tmp_path / "eval"
    (folder / "wikitext2").mkdir(parents=True)
    (folder / "lambada").mkdir()
    rows = [
        {"ctx": f"The man number {i} wakes up and", "endings": ENDINGS, "label": i % 4}
        for i in range(30)
    ]
    (folder / "hellaswag_val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [{"context": f"no. {i} " * (i % 7 + 1), "continuation": "word"} for i in range(20)]
    (folder / "lambada" / "lambada_openai.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    text = " = Title = \n" + " It cost 1 @,@ 000 , he said . \n" * 40
    (folder / "wikitext2" / "wiki.test.raw").write_text(text)
    return folder


def make_run(folder: Path, tokenizer, **shape) -> Path:
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.vocab_size, **shape)
    save_checkpoint(
        folder, 7, GPT(config, "torch"), tokenizer=tokenizer.to_dict(),
        train={"data": str(folder / "data")},
    )  # fmt: skip
    make_data(folder / "data", np.arange(500) % tokenizer.vocab_size, tokenizer)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run", ByteTokenizer(), block_size=64)


def make_data(folder: Path, tokens: np.ndarray, tokenizer) -> str:
    folder.mkdir()
    for split in ("train", "val"):
        write_shard(folder / f"{split}_000000.bin", tokens)
    manifest = {"tokenizer": tokenizer.to_dict()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def test_every_task_table_and_json(script, run, tmp_path, data_dir):
    status, out, err = script(
        "evaluate", run, "--tasks", *TASKS, "--data_dir", data_dir, "--device", "cpu",
        "--samples", tmp_path / "s.jsonl",
    )  # fmt: skip
    assert status == 0, err
    written = json.loads((run / "evaluation_step_00000007.json").read_text())
    results = written["results"]
    assert written["step"] == 7 and written["tokenizer"] == "byte" and written["ranks"] == 1
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    lines = {task: [x for x in lines if x["task"] == task] for task in ("hellaswag", "lambada")}
    assert [x["number"] for x in lines["hellaswag"]] == [*range(30)]
    for task, rows in lines.items():
        for key in results[task].keys() & {"acc", "acc_norm", "acc_norm_characters"}:
            assert results[task][key] == pytest.approx(sum(x[key] for x in rows) / len(rows))
    assert results["hellaswag"]["examples"] == 30 and results["lambada"]["examples"] == 20
    # The raw test texts of both WikiTexts are one.
    wikitext = [{**results[t], "seconds": 0} for t in ("wikitext2", "wikitext103")]
    assert wikitext[0] == wikitext[1] and wikitext[0]["words"] == 3 + 40 * 9
    assert results["val"]["tokens"] == 7 * 64
    shown = table(str(run), results)
    assert out.endswith(f"\n{shown}\nresults: {run / 'evaluation_step_00000007.json'}\n"
                        f"samples: {tmp_path / 's.jsonl'}, 50 examples\n")  # fmt: skip
    assert "GPT-3, published" in shown and "Radford et al. (2019), table 3" in shown

    raw = script(
        "evaluate", run / "checkpoints" / "step_00000007", "--tasks", "wikitext2", "--data_dir",
        data_dir, "--detokenize", "False", "--limit", "2", "--stride", "5", "--dtype", "bfloat16",
        "--out", tmp_path / "raw.json", "--device", "cpu",
    )  # fmt: skip
    assert raw[0] == 0, raw
    result = json.loads((tmp_path / "raw.json").read_text())["results"]["wikitext2"]
    n = len(" = Title = \n It cost 1 @,@ 000 , he said . \n")
    assert result["bytes"] == result["tokens"] == n
    assert result["stride"] == 5 and result["detokenized"] is False


def test_a_hugging_face_folder(script, tmp_path, data_dir, monkeypatch):
    shape = dict(n_layer=1, n_head=2, n_embd=16, block_size=64)
    tasks = ("--tasks", "hellaswag", "--data_dir", data_dir, "--limit", "8", *CPU)
    hf.export_hf(GPT(GPTConfig(**shape), "torch"), tmp_path / "hf", GPT2Tokenizer())
    monkeypatch.chdir(tmp_path)
    status, out, err = script("evaluate", tmp_path / "hf", *tasks)
    assert status == 0, err
    written = json.loads((tmp_path / "evaluation_hf.json").read_text())
    assert written["results"]["hellaswag"]["examples"] == 8 and written["step"] is None
    hf.export_hf(GPT(GPTConfig(**shape, vocab_size=99), "torch"), tmp_path / "small")
    message = one_line_error(script("evaluate", tmp_path / "small", *tasks))
    assert "its vocabulary of 99 is not GPT-2's of 50257" in message


@pytest.mark.parametrize(
    "data, options",
    [("a", {"doc_mask": True}), ("mixture", {}), ("mixture", {"block_size": 16, "doc_mask": True})],
)
def test_val_is_what_training_logged(script, train_config, tmp_path, data, options):
    rng = np.random.default_rng(0)
    for name, size in (("a", 900), ("b", 400)):  # documents of 7 tokens on average
        tokens = np.where(rng.random(size) < 1 / 7, 256, rng.integers(97, 110, size))
        make_data(tmp_path / name, tokens, ByteTokenizer())
    sources = f'"{tmp_path / "a"}":0.7,"{tmp_path / "b"}":0.3'
    config = replace(
        train_config, data=sources if data == "mixture" else str(tmp_path / data), eval_steps=0,
        eval_every=6, save_every=6, **options,
    )  # fmt: skip
    pretrain(config)
    run = Path(config.out_dir) / "run"
    status, out, err = script("evaluate", run, "--tasks", "val", "--device", "cpu")
    assert status == 0, err
    [path] = run.glob("evaluation_*.json")
    found = json.loads(path.read_text())["results"]["val"]
    assert found["loss"] == pytest.approx(losses(run, "val/loss")[-1], rel=1e-6)


def test_a_character_model_is_evaluated_as_far_as_its_characters_go(script, tmp_path, data_dir):
    text = (data_dir / "wikitext2" / "wiki.test.raw").read_text()
    run = make_run(tmp_path / "run", CharTokenizer(text + "\n"), block_size=16)
    options = (run, "--data_dir", data_dir, *CPU)
    status, out, err = script("evaluate", *options, "--tasks", "wikitext2", "val")
    assert status == 0, err
    result = json.loads((run / "evaluation_step_00000007.json").read_text())["results"]
    assert result["wikitext2"]["block_size"] == 16
    message = one_line_error(script("evaluate", *options, "--tasks", "hellaswag"))
    assert "hellaswag_val.jsonl: line 1: character" in message and "does not occur" in message


def test_a_model_of_nan_is_an_error(script, run, data_dir, monkeypatch):
    model = load_model(run)
    model.transformer.h[0].mlp.c_fc.weight.data.fill_(float("nan"))  # no checkpoint would hold it
    monkeypatch.setattr("gpt2.checkpoint.load_model", lambda *_: model)
    for task in ("hellaswag", "lambada", "wikitext2"):
        result = script("evaluate", run, "--tasks", task, "--data_dir", data_dir)
        assert f"{task}: the losses of" in (message := one_line_error(result)), message
        assert "are not numbers (NaN)" in message
    assert not list(run.rglob("evaluation_*"))


GOOD = json.dumps({"ctx": "c", "endings": ENDINGS, "label": 0}) + "\n"


@pytest.mark.parametrize(
    "content, message",
    [
        ("\n", "hellaswag_val.jsonl: empty"),
        (GOOD + '{"ctx": "cut sh', "hellaswag_val.jsonl: line 2 is not UTF-8 JSON"),
        (GOOD * 2 + '{"ctx": "c", "endings": ["a"]}', "line 3: 'endings' must be 4 texts"),
        ('{"endings": []}', "line 1: needs a context"),
        (GOOD + GOOD.replace('"label": 0', '"label": 4'), "line 2: 'label' must be 0 to 3, got 4"),
        (GOOD + "7\n", "line 2 is a int, not an object"),
        (GOOD.replace("runs.", "r" * 80), "line 1: 81 tokens to be predicted do not fit the model"),
    ],
)
def test_bad_lines(script, run, data_dir, content, message):
    (data_dir / "hellaswag_val.jsonl").write_text(content)
    result = script("evaluate", run, "--tasks", "hellaswag", "--data_dir", data_dir)
    assert message in one_line_error(result)


def test_bad_options(script, run, tmp_path, data_dir):
    def error(task: str, *options) -> str:
        return one_line_error(script("evaluate", run, "--tasks", task, *options))

    where = ("--data_dir", data_dir)
    assert "block_size) of 64, got 65" in error("wikitext2", *where, "--stride", "65")
    (data_dir / "lambada" / "lambada_openai.jsonl").write_text('{"text": "oneword"}')
    assert "line 1: needs a passage of several words" in error("lambada", *where)
    assert "--tasks 1: must be one of hellaswag, wikitext2" in error("squad")
    assert "no val shards" in error("val", "--data", data_dir)
    assert "samples are of the tasks" in error("val", "--samples", "x")
    text = data_dir / "wikitext2" / "wiki.test.raw"
    assert "wiki.test.raw is a file: --data takes a folder" in error("val", "--data", text)
    other = make_run(tmp_path / "other", CharTokenizer("abc"), block_size=8)
    message = error("val", "--data", other / "data")
    assert "was made with the char tokenizer" in message and "byte tokenizer of 257" in message


def test_a_missing_file_that_cannot_be_fetched_names_its_place(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("gpt2.evals.files.train_extra", offline)
    for task, (folders, names, *_) in FILES.items():
        with pytest.raises(OSError, match="network is unreachable") as caught:
            find_file(task, tmp_path)
        expected = tmp_path / folders[0] / names[0]
        assert caught.value.filename == str(expected) and "--data_dir" in caught.value.strerror
        expected.write_text("x")
        assert find_file(task, tmp_path) == expected
        expected.unlink()


def test_a_download_becomes_the_file_only_when_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(b'{"a": 1}\n'))
    assert read_examples(find_file("hellaswag", tmp_path), lambda *found: found) == [({"a": 1}, 0)]
    rows = [{"text": "= T = \n"}, {"text": " text \n"}]
    hub = SimpleNamespace(load_dataset=lambda *_, **__: rows)
    monkeypatch.setattr("gpt2.evals.files.train_extra", lambda *_: hub)
    assert read_text(find_file("wikitext2", tmp_path)) == "= T = \n text \n"
    assert not list(tmp_path.rglob("*.partial"))


def test_what_is_published_is_shown_and_every_column_lines_up():
    shown = {(task, key) for task, keys in SHOWN.items() for key in keys}
    assert PUBLISHED.keys() <= shown and SHOWN.keys() == set(TASKS)
    lines = table("m", {task: dict.fromkeys(keys, 0.5) for task, keys in SHOWN.items()}).split("\n")
    rows = lines[2 : 2 + len(shown)]
    assert len({len(row) for row in lines[1 : 2 + len(shown)]}) == 1 and len(rows[0]) <= 110
    assert any(row.startswith("hellaswag acc norm chars %") for row in rows)
    [row] = [row for row in rows if row.startswith("hellaswag acc norm tokens %")]
    assert row.split()[5:] == "50.00 29.45 37.52 43.20 48.89 33.70 43.60 51.00 54.70".split()


@pytest.mark.ddp
def test_two_ranks_give_exactly_the_counts_of_one(script, run, tmp_path, data_dir, free_port):
    options = [run, "--tasks", *TASKS, "--data_dir", data_dir, *CPU, "--tokens_per_batch", "600"]
    options += ["--samples", tmp_path / "samples.jsonl", "--out"]
    assert script("evaluate", *options, tmp_path / "1.json")[0] == 0
    samples = (tmp_path / "samples.jsonl").read_text()
    torchrun = "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port)
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, SCRIPTS / "evaluate.py", *options, tmp_path / "2.json"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results: ") == 1
    assert done.stdout.count("samples.jsonl, 50 examples") == 1
    assert (tmp_path / "samples.jsonl").read_text() == samples
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    # Of val there is one batch: the second rank runs along and counts nothing.
    assert (one["ranks"], two["ranks"], one["results"]["val"]["tokens"]) == (1, 2, 7 * 64)
    for task in TASKS:
        for key, value in one["results"][task].items():
            exact = key.startswith("acc") or not isinstance(value, float)
            same = value if exact else pytest.approx(value, rel=1e-12)
            assert key == "seconds" or two["results"][task][key] == same, (task, key)
