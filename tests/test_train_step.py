"""benchmarks/train_step.py and the recipe's plan: small, on a CPU."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import train_step
from benchmarks.baseline import PlainGPT, Setup, make, write_data
from benchmarks.train_step import KINDS, floors_ms, kind_of, summarize
from gpt2.config import PRESETS
from gpt2.device import Execution
from gpt2.model import GPT

ROOT = Path(__file__).parent.parent
CEILINGS = {"bf16_flops_per_s": 790e12, "copy_bytes_per_s": 4.3e12}


@pytest.fixture
def setup(tmp_path) -> Setup:
    write_data(tmp_path / "data", 65, 5000)
    return Setup("char", 2, 2, "cpu", "float32", False, "torch", str(tmp_path / "data"), "")


def test_the_baseline_is_the_same_model():
    """Same weights, same loss and gradients: its time is that of the same work."""
    config = replace(PRESETS["char"], bias=True)
    ours, plain = GPT(config, "torch"), PlainGPT(config)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in ours.parameters())
    names = {
        "transformer.h.": "blocks.", "attn.c_attn": "attn_in", "attn.c_proj": "attn_out",
        "mlp.c_fc": "mlp_in", "mlp.c_proj": "mlp_out", "transformer.": "",
    }  # fmt: skip
    state = {}
    for name, value in ours.state_dict().items():
        for mine, theirs in names.items():
            name = name.replace(mine, theirs)
        state[name] = value
    plain.load_state_dict(state)
    idx, targets = torch.randint(0, 65, (2, 2, 64))
    logits = ours.lm_head(ours.hidden(idx))  # with the 7 rows of padding, as the baseline's
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    _, loss = plain(idx, targets)
    for value in (expected, loss):
        value.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = plain.wte.weight.grad, ours.lm_head.weight.grad
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["trainer", "pytorch"])
def test_a_contestant_trains_and_is_measured(setup, name):
    record = train_step.measure(name, setup, 3, True, time.time() - 1.0)
    assert len(record["step_ms"]) == 3 and min(record["step_ms"]) > 0
    assert record["launch_to_first_step_s"] > 1.0 and 0 <= record["data_wait_share"] < 1
    assert 3.5 < record["last_loss"] < 5.0 and record["peak_bytes"] > 1 << 26
    ms = record["profile"]["ms"]
    assert set(ms) == set(KINDS) and min(ms["GEMM"], ms["attention"], ms["optimizer"]) > 0


def test_the_trainer_is_the_real_one(setup):
    contestant = make("trainer", replace(setup, options=("grad_clip=0.5", "exact_reduction=true")))
    config, weight = contestant.trainer.config, contestant.trainer.model.lm_head.weight
    assert type(contestant.trainer).__module__ == "gpt2.train.trainer"
    assert (config.grad_clip, config.exact_reduction, config.tokens_per_step) == (0.5, True, 256)
    before = weight.detach().clone()
    contestant.step()
    contestant.step()
    contestant.close()
    assert contestant.trainer.step == 2 and not weight.equal(before)
    with pytest.raises(ValueError, match="unknown key 'gradclip': did you mean 'grad_clip'"):
        make("trainer", replace(setup, options=("gradclip=1",)))
    with pytest.raises(OSError, match="no model.py of nanoGPT here"):
        make("nanogpt", setup)


def test_kernels_are_sorted_by_their_names():
    kinds = {
        "nvjet_hsh_192x192_64x4_2x1_v_bz_coopB_NTN": "GEMM",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "GEMM",
        "_attention_fwd_kernel": "attention",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "_layer_norm_bwd_kernel": "norm",
        "triton_per_fused_add_native_layer_norm_3": "norm",
        "triton_red_fused__log_softmax_nll_loss_forward_7": "loss",
        "_cross_entropy_fwd_kernel": "loss",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>": "optimizer",
        "triton_poi_fused_gelu_4": "other",
    }
    assert {name: kind_of(name) for name in kinds} == kinds


def test_idle_is_what_no_kernel_covers():
    events = [
        {"name": "gemm", "ts": 100.0, "dur": 50.0},
        {"name": "gemm", "ts": 120.0, "dur": 10.0},  # inside the first, on another stream
        {"name": "flash", "ts": 160.0, "dur": 20.0},  # 10 after it
        {"name": "gelu", "ts": 200.0, "dur": 40.0},  # 20 after it
    ]
    found = summarize(events, steps=2)
    expected = {"GEMM": 30.0, "attention": 10.0, "other": 20.0, "idle": 15.0}
    assert found["ms"] == pytest.approx({kind: expected.get(kind, 0.0) / 1e3 for kind in KINDS})
    assert found["largest_other"] == pytest.approx({"gelu": 0.02})


def test_floors_of_the_124m_model_are_the_known_ones():
    """At 790 TFLOP/s and 4.3 TB/s, 32 rows: 30.8 ms of GEMM and 1.5 ms of loss, as computed by hand
    for that GPU; attention counts 3.5 x the causal forward pass.
    """
    floors = floors_ms(PRESETS["gpt2"], 32, 1, 124_439_808, CEILINGS)
    assert floors["GEMM"] == pytest.approx(30.8, abs=0.1)
    assert floors["attention"] == pytest.approx(3.5 * 2 * 32 * 12 * 1024**2 * 768 / 790e9)
    assert floors["loss"] == pytest.approx(1.53, abs=0.01)
    assert floors["optimizer"] == pytest.approx(0.93, abs=0.01)
    twice = floors_ms(PRESETS["gpt2"], 32, 2, 124_439_808, CEILINGS)
    assert twice["GEMM"] == 2 * floors["GEMM"] and twice["optimizer"] == floors["optimizer"]


def test_the_report_says_which_bars_are_met(monkeypatch):
    """Of what processes on a GPU would leave; the times are made up."""
    setup = Setup("gpt2", 64, 4, "cuda", "bfloat16", True, "auto", "data", "")
    contestants = {"trainer": {}, "pytorch": {}, "nanogpt": {"error": "it broke"}}
    for name, ms, peak in (("trainer", 400.0, 10e9), ("pytorch", 480.0, 20e9)):
        for cold in (True, False):
            train_step.add(contestants[name], {
                "launch_to_first_step_s": 20.0, "step_ms": [ms, ms, 9 * ms], "peak_bytes": peak,
                "data_wait_share": 0.002, "profile": {"ms": dict.fromkeys(KINDS, 1.0)},
            }, cold)  # fmt: skip
    monkeypatch.setattr(Execution, "peak_flops", 989.4e12)
    result = train_step.conclude(setup, contestants, CEILINGS)
    ours = result["contestants"]["trainer"]
    assert ours["tokens_per_s"] == pytest.approx(262_144 / 0.4)
    assert ours["mfu"] == pytest.approx(262_144 / 0.4 * 855_166_464 / 989.4e12)
    text = train_step.report([result])
    for line in (
        "gpt2: tokens/s 655,360, bar >= 600,000: met",
        "gpt2: times the 490,000 tokens/s of modded-nanogpt's one H200 1.34, bar >= 1.00: met",
        "gpt2: times the fastest other 1.20, bar >= 1.25: NOT met",
        "gpt2: of the least other peak 0.50, bar <= 0.60: met",
        "gpt2: data wait 0.20%, bar <= 1.00%: met",
        "gpt2: first step warm, s 20.0, bar <= 15.0: NOT met",
        "it broke",
    ):  # fmt: skip
        assert line in text, text


def test_one_call_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Two processes of the trainer alone, and everything that is written."""
    options = (
        "--model char --alone --rows 2 --accum 1 --steps 2 --rounds 1 --device cpu --tokens 5000"
    )
    monkeypatch.setattr(sys, "argv", ["train_step", *options.split(), "--out", str(tmp_path)])
    train_step.main()
    shown = capsys.readouterr().out
    assert "on a CPU: MFU, idle time, floors and bars are not applicable" in shown
    assert "MFU = tokens/s x (6 N + 12 L C T) / peak" in shown and "failed" not in shown
    content = json.loads((tmp_path / "train_step.json").read_text())
    ours = content["results"][0]["contestants"]["trainer"]
    assert len(ours["rounds_ms"]) == 1 and ours["mfu"] is None and "commit" in content
    assert len(ours["cold_first_step_s"]) == len(ours["warm_first_step_s"]) == 1
    assert (tmp_path / "train_step.png").exists() and (tmp_path / "train_step.md").exists()


@pytest.mark.parametrize(
    "options, code, words",
    [
        ("--plan --tokens_per_s 500000 --price 3", 0, [
            "tokens    9,999,745,024 = 19,073 steps x 524,288",
            "step      8 GPUs x 1 micro steps x 64 x 1024", "FLOPs     8.551e+18",
            "hours     0.69 on 8 GPUs, 5.6 GPU hours: a projection",
            "cost      16.67 at 3 a GPU hour: a projection",
        ]),
        ("--plan --gpus 4", 0, ["4 GPUs x 2 micro steps"]),
        ("--plan --gpus 3", 1, ["error: tokens_per_step 524288 does not divide"]),
        ("--gpu 4", 2, ["unknown option --gpu"]),
        ("--gpus", 1, ["--gpus needs a value"]),
        ("--help", 0, ["--plan"]),
    ],
)  # fmt: skip
def test_the_recipes_script_plans_and_refuses(options, code, words):
    command = ["bash", ROOT / "scripts" / "reproduce_124m.sh", *options.split()]
    env = {"PYTHON": sys.executable, "PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == code, done.stderr
    assert all(line in done.stdout + done.stderr for line in words), done.stdout
    assert ("a projection" in done.stdout) == ("tokens_per_s" in options)


def test_a_failing_parity_test_fails_make(tmp_path):
    """Though its output goes through tee."""
    command = ["make", "gpu-tests", "PYTHON=false", f"OUT={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode and (tmp_path / "tests.log").exists()
