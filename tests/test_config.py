import dataclasses
from pathlib import Path

import pytest

from gpt2.cli import parse
from gpt2.config import PRESETS, DPOConfig, Sampling, SFTConfig, TrainConfig
from gpt2.options import SampleConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_order_defaults_preset_yaml_command_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("preset: tinytiny\nlr: 1e-3\nn_layer: 3\ncompile: off\nbias: false\n")
    config = parse(TrainConfig, "", [str(path), "--n_layer", "2", "--warmup-steps", "5"])
    assert (config.lr, config.warmup_steps, config.compile, config.beta2) == (1e-3, 5, "off", 0.95)
    model = config.model_config()
    assert (model.n_layer, model.n_embd, model.bias) == (2, PRESETS["tinytiny"].n_embd, False)


def test_first_word_is_the_first_field():
    assert parse(TrainConfig, "", ["gpt2-xl"]).preset == "gpt2-xl"
    config = parse(SampleConfig, "", ["runs/a", "--prompt", "x", "y", "--top_k", "5"])
    assert (config.model, config.prompt, config.top_k) == ("runs/a", ("x", "y"), 5)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs(path):
    kinds = {"sft": SFTConfig, "dpo": DPOConfig}
    config = parse(kinds.get(path.name[:3], TrainConfig), "", [str(path)])
    # A row of DPO is a pair, two halves of block_size.
    row = config.model_config().block_size * (2 if isinstance(config, DPOConfig) else 1)
    few = {"char": (1,)}.get(config.preset, (1, 2, 4, 8))
    for world_size in (1, 2) if isinstance(config, SFTConfig) else few:
        assert config.grad_accum_steps(row, world_size) >= 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate: 1", "unknown key 'learning_rate'"),
        ("warmup_step: 1", "did you mean 'warmup_steps'"),
        ("lr: fast", "lr: must be float"),
        ("max_steps: 1.5", "max_steps: must be int"),
        ("bias: 1", "bias: must be bool"),
        ("schedule: step", "must be one of cosine"),
        ("- lr", "expected `key: value`"),
        ("lr: [1", "not valid YAML"),
        ("preset: gpt3", "unknown preset 'gpt3': did you mean 'gpt2'"),
        ("preset: xyz", "known are auto, char"),
        ("kind: dpo\nlr: 1e-3", "its kind is 'dpo', for scripts/dpo.py"),
        ("verify: open", "verify is no option any more, leave it out: shards are always checked"),
        ("lr: .nan", "lr must be a finite number"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(TrainConfig, "", [str(path)])


def test_unknown_option_suggests_and_exits(capsys):
    with pytest.raises(SystemExit) as error:
        parse(TrainConfig, "", ["--n_layers", "3"])
    assert error.value.code == 2 and "--n-layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (TrainConfig(), dict(lr=0.0), "lr must be above 0"),
        (TrainConfig(), dict(min_lr=1.0), "min_lr 1.0 must not be above lr"),
        (TrainConfig(), dict(warmup_steps=10**6), "must not be above max_steps"),
        (TrainConfig(), dict(beta2=1.0), r"beta2 must lie in \[0, 1\)"),
        (TrainConfig(), dict(run_name="a/b"), "plain folder name"),
        (TrainConfig(), dict(lr=float("nan")), "lr must be a finite number"),
        (TrainConfig(), dict(grad_clip=float("inf")), "grad_clip must be a finite number"),
        (TrainConfig(), dict(save_every=-1), "save_every must not be negative"),
        (PRESETS["gpt2"], dict(n_embd=100), "the nearest are 96 and 108"),
        (PRESETS["gpt2"], dict(n_layer=0), "n_layer must be at least 1"),
        (PRESETS["gpt2"], dict(dropout=1.0), r"dropout must lie in \[0, 1\)"),
        (Sampling(), dict(temperature=-0.1), "temperature must not be negative"),
        (Sampling(), dict(temperature=float("inf")), "temperature must be a finite number"),
    ],
)
def test_bad_values(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_grad_accum_is_derived_or_refused_with_the_nearest():
    config = TrainConfig(tokens_per_step=524288, micro_batch_size=16)
    assert [config.grad_accum_steps(1024, w) for w in (1, 2, 4, 8)] == [32, 16, 8, 4]
    config = dataclasses.replace(config, tokens_per_step=500000)
    with pytest.raises(ValueError, match="nearest valid tokens_per_step are 491520 and 507904"):
        config.grad_accum_steps(1024, 1)


def test_vocabulary_padding():
    assert PRESETS["gpt2"].padded_vocab_size == 50304
    assert PRESETS["char"].padded_vocab_size == 72
    assert TrainConfig(preset="char").model_config(vocab_size=80).vocab_size == 80
