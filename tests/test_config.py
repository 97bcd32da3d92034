import dataclasses
import os

import pytest

from gpt2.cli import parse
from gpt2.config import (
    OTHER_NAMES,
    PRESETS,
    DPOConfig,
    Sampling,
    SFTConfig,
    TrainConfig,
    suggest,
)
from gpt2.options import (
    ChatConfig,
    CompareConfig,
    EvaluateConfig,
    ExportConfig,
    SampleConfig,
    ShowBatchConfig,
)

EVERY = (
    TrainConfig, SFTConfig, DPOConfig, SampleConfig, ChatConfig, CompareConfig, EvaluateConfig,
    ExportConfig,
)  # fmt: skip


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


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate: 1", "unknown key 'learning_rate': here it is lr"),
        ("warmup_step: 1", "did you mean 'warmup_steps'"),
        ("lr: fast", "lr: must be a number, got 'fast'"),
        ("max_steps: 1.5", "max_steps: must be a whole number, got '1.5'"),
        ("bias: 1", "bias: must be True or False, got '1'"),
        ("schedule: step", "must be one of cosine"),
        ("- lr", "expected `key: value`"),
        ("lr: [1", "not valid YAML"),
        ("preset: gpt3", "unknown preset 'gpt3': did you mean 'gpt2'"),
        ("preset: xyz", "known are auto, char"),
        ("kind: dpo\nlr: 1e-3", "its kind is 'dpo', for `gpt2-triton dpo`"),
        ("verify: open", "verify is no option any more, leave it out: shards are always checked"),
        ("lr: nan", "lr must be a finite number"),
        ("lr: 1:30.5", "lr: must be a number, got '1:30.5'"),
        ("seed: 190:20:30", "seed: must be a whole number, got '190:20:30'"),
        ("lr: 1\nseed: 2\nlr: 3", "not valid YAML: 'lr' stands twice: leave one out"),
        ("data: [{path: a, weight: 1, weight: 2}]", "'weight' stands twice"),
        ("kind: [1]", r"its kind is \['1'\]"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(TrainConfig, "", [str(path)])


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("seed: 010", "seed", 10),
        ("run_name: 2024-01-01", "run_name", "2024-01-01"),
        ("run_name: on", "run_name", "on"),
        ("compile: no", "compile", "off"),
        ("doc_mask: yes", "doc_mask", True),
        ("lr: ~", "lr", 6e-4),
    ],
)
def test_a_value_in_yaml_means_what_it_means_on_the_command_line(tmp_path, text, name, value):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert getattr(parse(TrainConfig, "", [str(path)]), name) == value


def test_a_recipe_that_is_no_file_is_refused_without_being_read(tmp_path):
    path = tmp_path / "a.yaml"
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a file"):
        parse(TrainConfig, "", [str(path)])


@pytest.mark.parametrize(
    "line, message",
    [
        ("8M", "unknown preset '8M': here it is tinystories-8m"),
        ("GPT2-XXL", "did you mean 'gpt2-xl'"),
        ("--n_layers 3", "unknown option --n_layers: did you mean '--n_layer'"),
        ("--learning-rate=1", "unknown option --learning_rate: here it is --lr$"),
        ("--num_train_epochs 3", r"here it is --max_steps \(of tokens_per_step tokens\)$"),
        ("--cfg_param 3", "unknown option --cfg_param: known are --activation_checkpointing, --b"),
        ("--verify open", "--verify is no option any more, leave it out: shards are always"),
        ("-b 64", "unknown option -b: options begin with --"),
        ("--lr --seed 3", "--lr needs a value"),
        ("--lr 1 2", "--lr takes one value, got 1 2"),
        ("--lr fast", "--lr: must be a number, got 'fast'"),
        ("--max_steps 1.5", "--max_steps: must be a whole number, got '1.5'"),
        ("--micro_batch_size x", "--micro_batch_size: must be auto or a whole number, got 'x'"),
        ("--doc_mask perhaps", "--doc_mask: must be True or False, got 'perhaps'"),
        ("--compile maybe", "--compile: must be one of auto, on, off, got 'maybe'"),
        ("a.yaml --lr 1 b.yaml", "a.yaml and b.yaml: give one recipe"),
    ],
)
def test_bad_command_lines(line, message):
    with pytest.raises(ValueError, match=message):
        parse(TrainConfig, "", line.split())


def test_a_missing_value_is_named():
    with pytest.raises(ValueError, match="--model is missing"):
        parse(SampleConfig, "", [])


def test_each_name_of_others_leads_to_a_name_of_ours():
    """And none of them is ours already, in the same place."""
    places = [PRESETS, *({f.name for f in dataclasses.fields(c)} for c in EVERY)]
    for ours, names in OTHER_NAMES.items():
        found = [place for place in places if ours.split()[0] in place]
        assert found, ours
        for name in names.split():
            for place in found:
                assert name in place or suggest(name, place).startswith("here it is "), name


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("--max_steps 1e3", "max_steps", 1000),
        ("--warmup_steps 0 --max_steps 20000.0", "max_steps", 20000),
        ("--seed 9007199254740993", "seed", 9007199254740993),  # no float64 is
        ("--lr=3e-4", "lr", 3e-4),
        ("--lr 1 --lr 2", "lr", 2.0),
        ("--doc_mask --lr 1", "doc_mask", True),
        ("--doc-mask false", "doc_mask", False),
        ("--bias", "bias", True),
        ("--compile", "compile", "on"),
        ("--compile False", "compile", "off"),
        ("--n_layer None", "n_layer", None),
        ("--wandb_project=", "wandb_project", ""),
        ("--out_dir a.yaml", "out_dir", "a.yaml"),
        ("--lr 1 RECIPE --seed 5", "beta1", 0.5),
        ("--doc_mask RECIPE", "beta1", 0.5),
        ("--lr 1e-3 RECIPE", "lr", 1e-3),
        ("RECIPE", "max_steps", 2000),
    ],
)
def test_words_of_a_command_line(tmp_path, line, name, value):
    (tmp_path / "a.yaml").write_text("beta1: 0.5\nlr: 1\nmax_steps: 2e3\n")
    words = line.replace("RECIPE", str(tmp_path / "a.yaml")).split()
    found = getattr(parse(TrainConfig, "", words), name)
    assert (type(found), found) == (type(value), value)


def test_an_option_with_several_values_ends_at_a_recipe(tmp_path):
    (tmp_path / "a.yaml").write_text("lora_rank: 4")
    words = ["runs/a", "--lora_targets", "c_attn", "c_fc", str(tmp_path / "a.yaml")]
    config = parse(SFTConfig, "", words)
    assert (config.init_from, config.lora_targets) == ("runs/a", ("c_attn", "c_fc"))
    assert config.lora_rank == 4
    assert parse(SampleConfig, "", ["m", "--prompt", "a", "b.yaml"]).prompt == ("a", "b.yaml")


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (TrainConfig(), dict(lr=0.0), "lr must be above 0"),
        (TrainConfig(), dict(min_lr=1.0), "min_lr 1.0 must not be above lr"),
        (TrainConfig(), dict(warmup_steps=10**6), "must not be above max_steps"),
        (TrainConfig(), dict(beta2=1.0), r"beta2 must lie in \[0, 1\)"),
        (TrainConfig(), dict(run_name="a/b"), "plain folder name"),
        (TrainConfig(), dict(exact_reduction=True), "of one micro_batch_size: give it as a number"),
        (TrainConfig(), dict(lr=float("nan")), "lr must be a finite number"),
        (TrainConfig(), dict(grad_clip=float("inf")), "grad_clip must be a finite number"),
        (TrainConfig(), dict(save_every=-1), "save_every must not be negative"),
        (TrainConfig(), dict(run_name=".."), "plain folder name"),
        (TrainConfig(), dict(seed=2**63), r"seed must be below 2\*\*63, got 9223372036854775808"),
        (TrainConfig(), dict(lr_range_test=True, resume="runs/a"), "as init_from, not as resume"),
        (TrainConfig(preset="auto", max_minutes=1.0), dict(init_from="a"), "'a' has a size"),
        (SampleConfig(model="m"), dict(prompt=()), "prompt is empty"),
        (SampleConfig(model="m"), dict(num_samples=10**9), r"num_samples must lie in \[1, 65536\]"),
        (ShowBatchConfig(run="a"), dict(step=-1), "step must not be negative"),
        (ShowBatchConfig(run="a"), dict(rows=0), "rows must be at least 1"),
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
    with pytest.raises(ValueError, match="use --tokens_per_step 491520 or 507904"):
        config.grad_accum_steps(1024, 1)
    config = dataclasses.replace(config, tokens_per_step=20480)
    with pytest.raises(ValueError, match="tokens_per_step 16384 or 32768, or --micro_batch_size a"):
        config.grad_accum_steps(1024, 1)


@pytest.mark.parametrize(
    "preset, tokens",
    [
        ("gpt2", 524288), ("gpt2-xl", 524288), ("tinytiny", 131072), ("tinystories-28m", 131072),
        ("tinystories-8m", 32768), ("tinystories-1m", 8192), ("char", 4096),
    ],
)  # fmt: skip
def test_a_step_is_of_the_size_of_the_model(preset, tokens):
    shape = PRESETS[preset]
    assert TrainConfig(preset=preset).sized(shape, shape.block_size, 1).tokens_per_step == tokens


def test_a_step_that_was_not_given_is_whole_micro_steps():
    small, three = PRESETS["tinystories-1m"], TrainConfig(micro_batch_size=3)
    assert three.sized(small, 500, 4).tokens_per_step == 3 * 500 * 4  # near 8000
    assert three.sized(small, 500, 4).grad_accum_steps(500, 4) == 1
    assert TrainConfig().sized(small, 500, 4).tokens_per_step == 8000
    assert TrainConfig().sized(small, 512, 64).tokens_per_step == 512 * 64
    assert SFTConfig().sized(small, 1000, 1).tokens_per_step == 16000
    assert DPOConfig().sized(small, 2048, 1).tokens_per_step == 65536
    given = dataclasses.replace(three, tokens_per_step=7)
    assert given.sized(small, 500, 4) is given


def test_vocabulary_padding():
    assert PRESETS["gpt2"].padded_vocab_size == 50304
    assert PRESETS["char"].padded_vocab_size == 72
    assert TrainConfig(preset="char").model_config(vocab_size=80).vocab_size == 80
