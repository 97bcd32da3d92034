import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.checkpoint import list_checkpoints, load_model, read_checkpoint
from gpt2.cli import parse, read_config
from gpt2.config import TrainConfig
from gpt2.cpu import PRODUCTS
from gpt2.data import write_shard
from gpt2.data.prepare import prepare
from gpt2.model import LayerNorm
from gpt2.options import PrepareConfig, VerifyConfig
from gpt2.tokenizer import ByteTokenizer
from gpt2.train.between import learning_rate
from gpt2.train.metrics import read_metrics
from gpt2.train.objectives import LanguageModeling
from gpt2.train.optim import make_optimizer
from gpt2.train.pretrain import pretrain
from gpt2.train.receipt import read_receipt
from gpt2.train.trainer import Trainer
from gpt2.train.verify import verify_run

from .conftest import losses

NO_WEIGHTS = dict(init_from="nowhere/at/all", n_layer=None, n_head=None, n_embd=None)
LR = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)


def test_learning_rate_schedules():
    assert learning_rate(0, LR) == pytest.approx(0.1)
    assert learning_rate(9, LR) == learning_rate(10, LR) == 1.0
    assert learning_rate(60, LR) == pytest.approx(0.55)
    assert learning_rate(110, LR) == learning_rate(999, LR) == pytest.approx(0.1)
    linear = replace(LR, schedule="linear")
    assert learning_rate(35, linear) == pytest.approx(0.775)
    assert {learning_rate(s, replace(LR, schedule="constant")) for s in (10, 60, 999)} == {1.0}
    wsd = replace(LR, schedule="wsd")
    assert learning_rate(88, wsd) == 1.0 > learning_rate(89, wsd)
    assert learning_rate(110, wsd) == pytest.approx(0.1)
    assert learning_rate(0, replace(LR, warmup_steps=0)) == 1.0


def test_only_matrices_decay(tiny):
    from gpt2.model import GPT

    model = GPT(tiny, "torch")
    decayed, plain = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_learns(train_config):
    config = replace(train_config, max_steps=150, eval_every=50, save_every=0, log_every=10)
    pretrain(config)
    run = Path(config.out_dir) / config.run_name
    train, val = losses(run), losses(run, "val/loss")
    assert train[0] == pytest.approx(math.log(65), abs=0.15)
    assert len(val) == 3 and val[-1] < val[0] and val[-1] < 3.25
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    keys = {k for line in read_metrics(run / "metrics.jsonl") for k in line}
    assert keys == {
        "step", "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s", "train/step_ms",
        "train/data_ms", "val/loss", "checkpoint/held_ms", "checkpoint/write_ms",
        "sample",
    }  # fmt: skip
    assert parse(TrainConfig, "", [str(run / "config.yaml")]) == config


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    model = load_model(run / "checkpoints" / f"step_{step:08d}", kernels="torch")
    return dict(model.named_parameters())


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2}, {"optimizer": "muon"}])
def test_resume_continues_bit_for_bit(train_config, changes):
    whole = replace(train_config, run_name="whole", **changes)
    pretrain(whole)
    # The same run, interrupted after the checkpoint of step 3: the schedule must not know.
    cut = replace(whole, run_name="cut")
    run = Path(cut.out_dir) / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2.train.trainer.Trainer.train_step", interrupted_at(4))
        with pytest.raises(KeyboardInterrupt):
            pretrain(cut)
    assert [p.name for p in list_checkpoints(run)] == ["step_00000003"]
    pretrain(replace(cut, resume="auto"))
    a, b = weights(Path(cut.out_dir) / "whole", 6), weights(run, 6)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert losses(run) == losses(Path(cut.out_dir) / "whole")
    assert losses(run, "val/loss") == losses(Path(cut.out_dir) / "whole", "val/loss")


def interrupted_at(stop: int):
    from gpt2.train.trainer import Trainer

    real = Trainer.train_step

    def train_step(self, step):
        if step == stop:
            raise KeyboardInterrupt
        return real(self, step)

    return train_step


def test_a_finished_run_resumes_to_nothing(train_config, capsys):
    pretrain(train_config)
    before = losses(Path(train_config.out_dir) / "run")
    pretrain(replace(train_config, resume="auto", lr=2e-2))
    assert losses(Path(train_config.out_dir) / "run") == before
    out = capsys.readouterr().out
    assert "changed since the checkpoint: lr was 0.01, is 0.02" in out
    assert "from step 6" in out


@pytest.mark.parametrize("before, now", [("adamw", "muon"), ("muon", "adamw")])
def test_resume_with_another_optimizer(train_config, before, now):
    pretrain(replace(train_config, optimizer=before, max_steps=3))
    with pytest.raises(ValueError, match=f"moments of optimizer {before}, not {now}: resume with"):
        pretrain(replace(train_config, optimizer=now, resume="auto"))
    pretrain(replace(train_config, optimizer=before, resume="auto"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_do_not_change_the_result(train_config, optimizer):
    train_config = replace(train_config, optimizer=optimizer)
    for rows in (1, 2, 8):
        pretrain(replace(train_config, micro_batch_size=rows, run_name=f"rows{rows}"))
    runs = [losses(Path(train_config.out_dir) / f"rows{rows}") for rows in (1, 2, 8)]
    assert runs[0] == pytest.approx(runs[2], rel=1e-5)
    assert runs[1] == pytest.approx(runs[2], rel=1e-5)
    vals = [losses(Path(train_config.out_dir) / f"rows{rows}", "val/loss") for rows in (1, 8)]
    assert vals[0] == pytest.approx(vals[1], rel=1e-5)


def test_a_run_keeps_the_matrix_products_that_it_chose(train_config, monkeypatch, capsys):
    """Whatever is faster by the time that it goes on, or is verified."""
    chosen = {f"{shape} {kind}": "onednn" for shape in ("96x32", "128x32") for kind in PRODUCTS}
    monkeypatch.setattr("gpt2.train.trainer.choose", lambda model, rows: chosen)
    pretrain(replace(train_config, max_steps=3))
    assert "of 6 kinds of matrix products 6 by oneDNN" in capsys.readouterr().out
    monkeypatch.setattr("gpt2.train.trainer.choose", lambda model, rows: {"32x32 dx": "onednn"})
    pretrain(replace(train_config, resume="auto"))
    saved = [read_checkpoint(path) for path in list_checkpoints(train_config.folder)]
    assert [checkpoint.state["products"] for checkpoint in saved] == [chosen, chosen]
    assert read_receipt(train_config.folder)["products"] == chosen
    taken = []
    monkeypatch.setattr(Trainer, "take_products", lambda self, found: taken.append(found))
    verify_run(VerifyConfig(str(train_config.folder), checkpoint="start"))
    assert taken == [chosen]


def test_whole_val_split_counts_every_token_once(train_config, shakespeare):
    from gpt2.data import TokenLoader, find_shards

    config = replace(train_config, max_steps=1, warmup_steps=0, eval_steps=0, eval_every=1)
    pretrain(config)
    run = Path(config.out_dir) / "run"
    model = load_model(run, kernels="torch")
    data = TokenLoader(find_shards(shakespeare, "val"), 32, shuffle=False)
    idx, targets = data.batch(0, data.n_windows)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    assert losses(run, "val/loss") == [pytest.approx(expected.item(), rel=1e-5)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's own compiler
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_compiled_training_gives_the_same_losses(train_config, optimizer):
    config = replace(train_config, optimizer=optimizer, max_steps=3, eval_every=0, save_every=0)
    pretrain(replace(config, run_name="eager"))
    pretrain(replace(config, run_name="compiled", compile="on"))
    runs = [losses(Path(config.out_dir) / name) for name in ("eager", "compiled")]
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_bf16_autocast_trains(train_config):
    pretrain(replace(train_config, dtype="bfloat16", run_name="bf16"))
    pretrain(replace(train_config, run_name="fp32"))
    runs = [losses(Path(train_config.out_dir) / name) for name in ("bf16", "fp32")]
    assert runs[0] != runs[1] and runs[0] == pytest.approx(runs[1], rel=2e-2)


def test_init_from_a_checkpoint(train_config):
    pretrain(train_config)
    first = Path(train_config.out_dir) / "run"
    config = TrainConfig(**dataclasses.asdict(train_config) | dict(
        init_from=str(first), run_name="second", n_layer=None, n_head=None, n_embd=None,
        block_size=16, dropout=0.1, max_steps=2, lr=1e-9,
    ))  # fmt: skip
    pretrain(config)
    second = losses(Path(config.out_dir) / "second")
    assert second[0] == pytest.approx(losses(first)[-1], abs=0.3)
    with pytest.raises(ValueError, match="n_embd comes from init_from"):
        pretrain(replace(config, n_embd=64, run_name="third"))


@pytest.mark.parametrize(
    "n_val, words",
    [
        (0, "no val split, so nothing is validated"),
        (20, "few val tokens, so validation is in rows of 19"),
        (2, "few val tokens, so validation is in rows of 1"),
    ],
)
def test_little_or_no_validation_data(train_config, tmp_path, capsys, n_val, words):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "manifest.json").write_text('{"tokenizer": {"name": "byte"}}')
    write_shard(tmp_path / "few" / "train_000000.bin", np.arange(600) % 256)
    if n_val:
        write_shard(tmp_path / "few" / "val_000000.bin", np.arange(n_val))
    config = replace(train_config, data=str(tmp_path / "few"), eval_steps=0)
    pretrain(config)
    assert words in capsys.readouterr().out
    val = losses(config.folder, "val/loss")
    assert len(val) == 2 * bool(n_val) and all(map(math.isfinite, val))
    pretrain(replace(config, resume="auto", max_steps=7))
    assert len(losses(config.folder)) == 7


def test_a_run_of_one_option(train_config, capsys):
    """The size of a step and of its micro batches follow; a resumed run keeps them."""
    config = replace(train_config, tokens_per_step=None, micro_batch_size="auto", max_steps=2)
    pretrain(config)
    assert "step                  512 tokens = 1 ranks x 1 micro steps x 16 rows x 32" in (
        capsys.readouterr().out
    )
    saved = read_config(config.folder / "config.yaml", TrainConfig)
    assert (saved.tokens_per_step, saved.micro_batch_size) == (512, 16)
    pretrain(replace(config, resume="auto", max_steps=3))
    assert "changed since the checkpoint: tokens_per_step" not in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:  # of a version with another rule
        patch.setattr(TrainConfig, "STEP_TOKENS", 64)
        pretrain(replace(config, resume="auto", max_steps=4))
    assert "512 tokens = 1 ranks" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_residual_stream_is_in_the_precision_that_was_asked_for(
    train_config, monkeypatch, dtype
):
    seen, norm = [], LayerNorm.forward

    def forward(self, x, residual=None):
        if torch.is_autocast_enabled("cpu"):
            seen.append((x if residual is None else residual).dtype)
        return norm(self, x, residual)

    monkeypatch.setattr(LayerNorm, "forward", forward)
    config = replace(train_config, dtype="bfloat16", sample_every=2)
    pretrain(replace(config, stream=dtype))
    assert set(seen) == {getattr(torch, dtype)}
    pretrain(replace(config, run_name="plain"))
    again = losses(Path(config.out_dir) / "plain")
    assert losses(Path(config.out_dir) / "run") == pytest.approx(again, rel=5e-3)


def test_a_sample_that_cannot_be_drawn_does_not_end_training(train_config, monkeypatch, capsys):
    def broken(_):
        raise ValueError("the model's logits are not finite numbers")

    monkeypatch.setattr(Trainer, "sample", broken)
    pretrain(replace(train_config, max_steps=2, sample_every=1, eval_every=0))
    assert capsys.readouterr().out.count("sample: \"(none: the model's logits are not") == 2
    assert list_checkpoints(train_config.folder)[-1].name == "step_00000002"


def test_samples_while_training(train_config, capsys):
    pretrain(replace(train_config, sample_every=2))
    assert capsys.readouterr().out.count("sample: ") == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tokens_per_step=250), "use --tokens_per_step 128 or 256"),
        (dict(device="cuda:99"), "cuda"),
        (dict(stream="bfloat16", dtype="float32"), "stream bfloat16 needs matmuls in bfloat16"),
        (dict(device="tpu"), "unknown device 'tpu'"),
        (dict(device="mps"), "summed in float64, which Apple's GPUs have not.* --device cpu"),
        (dict(resume="nowhere"), "no checkpoint"),
        (
            dict(init_from="nowhere/at/all", n_layer=None, n_head=None, n_embd=None),
            "no such folder",
        ),
        (dict(data="nowhere"), "gpt2-triton prepare"),
    ],
)
def test_bad_input_ends_before_anything_is_written(train_config, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        pretrain(replace(train_config, **changes))
    assert not Path(train_config.out_dir).exists()


def test_a_run_is_not_overwritten(train_config):
    pretrain(train_config)
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume auto"):
        pretrain(train_config)


def test_resume_with_another_model(train_config):
    pretrain(train_config)
    with pytest.raises(ValueError, match=r"another model: n_embd 32 \(here 64\)"):
        pretrain(replace(train_config, n_embd=64, resume="auto"))


def test_damaged_data_during_training(train_config, counting):
    (counting / "manifest.json").write_text('{"tokenizer": {"name": "byte"}}')
    config = replace(train_config, data=str(counting), eval_every=0)
    with pytest.raises(ValueError, match="vocabulary has 257 entries"):
        pretrain(config)


def test_doc_mask_keeps_attention_inside_documents(train_config, tmp_path):
    text = "\n".join("ab" * 7 for _ in range(60))
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text[i:])
    data = tmp_path / "documents"
    prepare(PrepareConfig(text=str(tmp_path / "texts"), tokenizer="byte", out=str(data)))
    config = replace(train_config, data=str(data), max_steps=3, tokens_per_step=4096)
    seen = []

    class Spy(LanguageModeling):
        def forward(self, batch):
            seen.append(batch)
            return super().forward(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2.train.pretrain.LanguageModeling", Spy)
        pretrain(replace(config, run_name="plain"))
        assert all("doc_start" not in batch for batch in seen)
        seen.clear()
        pretrain(replace(config, run_name="masked", doc_mask=True))
    for batch in seen:
        starts = torch.where(batch["idx"] == ByteTokenizer.eot, torch.arange(32), 0)
        starts = starts.cummax(1).values
        assert torch.equal(batch["doc_start"], starts.int())
    assert any(batch["doc_start"].any() for batch in seen)
    runs = Path(config.out_dir)
    assert losses(runs / "plain") != losses(runs / "masked")
    assert losses(runs / "plain", "val/loss") != losses(runs / "masked", "val/loss")


def test_doc_mask_needs_an_end_of_text(train_config):
    with pytest.raises(ValueError, match="doc_mask needs an end-of-text token"):
        pretrain(replace(train_config, doc_mask=True))
