"""Kills and damages training runs, and counts what is lost. `make chaos` runs it all.

    python tests/chaos.py                            # everything, about 20 minutes on 2 CPU cores
    python tests/chaos.py kill term --count 10       # only these, with so many attempts each
    python tests/chaos.py --seed 7 --out chaos.json

Each attempt is a fresh process forked from one that has imported torch already, so that hundreds
fit; the tests under torchrun start it as a user would. Random moments come from the printed seed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# What a run imports on its way, once, here, so that attempts are spent on running.
import matplotlib.backends.backend_agg  # noqa: E402, F401
import torch._dynamo  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from gpt2 import checkpoint  # noqa: E402
from gpt2.cli import run_script  # noqa: E402
from gpt2.config import TrainConfig  # noqa: E402
from gpt2.data.prepare import prepare  # noqa: E402
from gpt2.options import PrepareConfig  # noqa: E402
from gpt2.train.metrics import Metrics, read_metrics  # noqa: E402
from gpt2.train.pretrain import pretrain  # noqa: E402
from tests.conftest import command_line  # noqa: E402

torch.set_num_threads(1)
Result = tuple[int, int, str]  # how many attempts succeeded, of how many, and what to say


def small_run(work: Path) -> TrainConfig:
    """40 steps of some milliseconds; a checkpoint every 4."""
    data = work / "data"
    if not data.exists():
        prepare(PrepareConfig(name="shakespeare_char", out=str(data)))
    return TrainConfig(
        preset="char", n_layer=2, n_head=2, n_embd=64, block_size=32, data=str(data), dropout=0.1,
        tokens_per_step=256, micro_batch_size=4, max_steps=40, warmup_steps=2, lr=1e-2,
        eval_every=8, eval_steps=1, save_every=4, log_every=1, out_dir=str(work / "runs"),
        device="cpu", resume="auto", timeout_s=60,
    )  # fmt: skip


# Processes


def spawn(config: TrainConfig, ranks: int, log: Path) -> list[int]:
    """Forks the ranks of a run; returns their process ids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port, pids = s.getsockname()[1], []
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(out, stream)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            code = 1
            try:
                run_script(lambda: pretrain(config))
                code = 0
            except SystemExit as left:
                code = int(left.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        pids.append(pid)
    return pids


def is_running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def reap(pids: list[int], patience_s: float = 120.0) -> list[int]:
    """Exit statuses; once one has failed the others are killed, as torchrun does."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + patience_s
    while left := [pid for pid in pids if pid not in codes]:
        for pid in left:
            if not is_running(pid):
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            elif set(codes.values()) - {0, 75} or time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def log_of(config: TrainConfig) -> list[dict]:
    return read_metrics(config.folder / "metrics.jsonl")


def good_one(config: TrainConfig, say=lambda text: None) -> checkpoint.Checkpoint | None:
    return checkpoint.newest_good(config.folder, say=say)


def names(config: TrainConfig) -> list[str]:
    """What is in the folder of a run's checkpoints."""
    return [path.name for path in (config.folder / "checkpoints").glob("*")]


def outcome(config: TrainConfig) -> dict:
    """The losses by step and key, and the weights and moments of the last checkpoint."""
    keys = ("train/loss", "val/loss", "train/grad_norm")
    losses = {(x["step"], key): x[key] for x in log_of(config) for key in keys if key in x}
    path = checkpoint.list_checkpoints(config.folder)[-1]
    tensors = load_file(path / checkpoint.MODEL) | load_file(path / checkpoint.OPTIMIZER)
    return {key: torch.tensor(loss, dtype=torch.float64) for key, loss in losses.items()} | tensors


def is_outcome(config: TrainConfig, expected: dict) -> bool:
    """Bit for bit."""
    found = outcome(config)
    is_same = (torch.equal(found[key], expected[key]) for key in found)
    return found.keys() == expected.keys() and all(is_same)


def uninterrupted(config: TrainConfig, ranks: int, log: Path) -> tuple[dict, float]:
    """The outcome of a run that nobody disturbs, and its seconds."""
    whole = replace(config, run_name=f"whole_{ranks}_{config.max_steps}")
    started = time.monotonic()
    assert set(reap(spawn(whole, ranks, log))) == {0}, log.read_text()[-2000:]
    return outcome(whole), time.monotonic() - started


# The attempts


def kill(work: Path, rng: random.Random, count: int) -> Result:
    """kill -9 at random moments of runs on 1 and 2 ranks, every second one aimed at a save."""
    config, log = small_run(work), work / "kill.log"
    good = in_save = runs = 0
    for ranks, share in ((1, count - count // 3), (2, count // 3)):
        expected, seconds = uninterrupted(config, ranks, log)
        done = 0
        while done < share:
            runs, before, is_cut = runs + 1, done, True
            cut = replace(config, run_name=f"cut_{ranks}_{runs}")
            while is_cut:
                pids, is_cut = spawn(cut, ranks, log), False
                if done < share:
                    aimed = done % 2 == 0
                    hit = aimed and wait_for_save(cut, pids, rng)
                    if not aimed:
                        time.sleep(rng.random() * seconds)
                    if is_cut := is_running(victim := rng.choice(pids)):
                        os.kill(victim, signal.SIGKILL)
                        done, in_save = done + 1, in_save + hit
                reap(pids)
            good += (done - before) * is_outcome(cut, expected)
            shutil.rmtree(cut.folder)
    words = f"{runs} runs, {in_save} of {count} kills while a checkpoint was being written"
    return good, count, f"losses, weights and moments bit-identical; {words}"


def wait_for_save(config: TrainConfig, pids: list[int], rng: random.Random) -> bool:
    """Until a checkpoint is being written, and then a moment; whether that was seen."""
    before, skip = None, rng.randrange(4)
    while all(map(is_running, pids)):
        writing = next((n for n in names(config) if n.startswith(".step_")), None)
        if writing and writing != before:
            before, skip = writing, skip - 1
            if skip < 0:
                time.sleep(rng.random() * 0.01)
                return True
    return False


def term(work: Path, rng: random.Random, count: int) -> Result:
    """SIGTERM at random moments: the checkpoint of the last finished step is there."""
    config, log, good, before = small_run(work), work / "term.log", 0, 0
    config = replace(config, save_every=0, eval_every=0, keep_last=1, max_steps=300)
    _, seconds = uninterrupted(replace(config, run_name="warm"), 1, log)
    for n in range(count):
        cut = replace(config, run_name=f"term_{n}")
        (pid,) = spawn(cut, 1, log)
        time.sleep(rng.random() * seconds)
        os.kill(pid, signal.SIGTERM)
        (code,) = reap([pid])
        steps = [line["step"] for line in log_of(cut) if "train/loss" in line]
        found = good_one(cut)
        if not steps:  # it came before the first step, and nothing was lost
            good, before = good + (found is None), before + 1
        else:
            status = 0 if steps[-1] == cut.max_steps else 75
            good += found is not None and found.step == steps[-1] and code == status
    return good, count, f"exit status 75; {before} before the first step had begun"


def flip(work: Path, rng: random.Random, count: int) -> Result:
    """One flipped bit or a truncation in a random file of the newest checkpoint."""
    config, good, truncated = replace(small_run(work), keep_last=2, run_name="flips"), 0, 0
    assert reap(spawn(config, 1, work / "flip.log")) == [0]
    before, newest = checkpoint.list_checkpoints(config.folder)[-2:]
    for _ in range(count):
        file, said = rng.choice(sorted(newest.iterdir())), []
        content = file.read_bytes()
        if rng.random() < 0.1:
            changed, truncated = content[: rng.randrange(len(content))], truncated + 1
        else:
            changed = bytearray(content)
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        found = good_one(config, said.append)
        good += found is not None and found.path == before and file.name in said[0]
        file.write_bytes(content)
    assert good_one(config).path == newest
    return good, count, f"{truncated} truncations; the file is named, the checkpoint before is used"


def lost(work: Path, rng: random.Random, count: int) -> Result:
    """A rank killed or frozen, also the one that keeps the store: the other one names it."""
    good, longest = 0, 0.0
    for n in range(count):
        log, victim = work / f"lost_{n}.log", n // 2 % 2
        config = replace(small_run(work), run_name=f"lost_{n}", max_steps=10_000, timeout_s=8)
        pids = spawn(config, 2, log)
        while not names(config):
            time.sleep(0.01)
        os.kill(pids[victim], signal.SIGKILL if n % 2 == 0 else signal.SIGSTOP)
        started = time.monotonic()
        _, status = os.waitpid(pids[1 - victim], 0)
        longest = max(longest, time.monotonic() - started)
        if n % 2:
            os.kill(pids[victim], signal.SIGKILL)
        os.waitpid(pids[victim], 0)
        said = f"error (rank {1 - victim}): step " in (text := log.read_text())
        good += said and f"lost rank {victim} " in text and os.waitstatus_to_exitcode(status) == 1
    words = f"the longest wait {longest:.0f} s: 8 for the rank, up to 10 to find out which"
    return good, count, f"half killed, half frozen; {words}"


def torchrun_and_kill(config: TrainConfig, rng: random.Random, kills: int, launches: list) -> bool:
    """Whether a run ends well, though ranks are killed, each after two more checkpoints.

    launches: of each host what to put before the command, and the options of torchrun.
    """
    script, at = ["--max-restarts=3", f"{ROOT}/scripts/train_gpt2.py", *command_line(config)], 0
    with open(config.folder.parent.parent / "torchrun.log", "ab") as log:
        hosts = [
            subprocess.Popen([*prefix, sys.executable, "-m", "torch.distributed.run", *options,
                              *script], stdout=log, stderr=log)
            for prefix, options in launches
        ]  # fmt: skip
    while kills and all(host.poll() is None for host in hosts):
        steps = [int(n[5:]) for n in names(config) if n.startswith("step_")]
        if max(steps, default=0) >= at + 8:
            time.sleep(rng.random() * 0.5)
            ranks = f"-u {ROOT}/scripts/train_gpt2.py .*--run_name={config.run_name}( |$)"
            found = subprocess.run(["pgrep", "-f", "--", ranks], capture_output=True, text=True)
            if found.stdout:
                os.kill(int(rng.choice(found.stdout.split())), signal.SIGKILL)
                kills, at = kills - 1, max(steps)
        time.sleep(0.05)
    return {host.wait(300) for host in hosts} == {0} and kills == 0


def restart(work: Path, rng: random.Random, count: int) -> Result:
    """A rank killed under torchrun --max-restarts, on one host."""
    config, good = replace(small_run(work), max_steps=120), 0
    expected, _ = uninterrupted(config, 2, work / "restart.log")
    for n in range(count):
        cut = replace(config, run_name=f"restart_{n}")
        launches = [([], ["--standalone", "--nproc-per-node=2"])]
        good += torchrun_and_kill(cut, rng, 2, launches) and is_outcome(cut, expected)
    return good, count, "2 kills each, 2 ranks, bit-identical"


def hosts(work: Path, rng: random.Random, count: int) -> Result:
    """The same on two hosts, which are network namespaces; c10d rendezvous."""
    config, good = replace(small_run(work), max_steps=120), 0
    expected, _ = uninterrupted(config, 2, work / "hosts.log")
    for n in range(count):
        cut = replace(config, run_name=f"hosts_{n}")
        options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
                   "--rdzv-endpoint=10.77.0.1:29400", f"--rdzv-id={n}"]  # fmt: skip
        with two_hosts() as prefixes:
            launches = [
                (prefix, [*options, f"--local-addr=10.77.0.{i}", f"--rdzv-conf=is_host={i % 2}"])
                for i, prefix in enumerate(prefixes, 1)
            ]
            good += torchrun_and_kill(cut, rng, 1, launches) and is_outcome(cut, expected)
    return good, count, "1 kill each, 1 rank a host, bit-identical"


@contextmanager
def two_hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable between them; yields what to put before a command."""

    def ip(words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words.split()], check=check, capture_output=True)

    spaces = ("gpt2-a", "gpt2-b")
    try:
        for space in spaces:
            ip(f"netns add {space}")
        ip("link add gpt2-a0 netns gpt2-a type veth peer name gpt2-b0 netns gpt2-b")
        for i, space in enumerate(spaces, 1):
            ip(f"-n {space} addr add 10.77.0.{i}/24 dev {space}0")
            ip(f"-n {space} link set {space}0 up")
            ip(f"-n {space} link set lo up")
        yield [["ip", "netns", "exec", s, "env", f"GLOO_SOCKET_IFNAME={s}0"] for s in spaces]
    finally:
        for space in spaces:
            ip(f"netns del {space}", check=False)


def overhead(work: Path, rng: random.Random, count: int) -> Result:
    """The CPU recipe's wall time with save_every=50, against the same run without a save.

    One run saves every 100 steps, so that 50 steps with a save and 50 without come in turns and
    meet the same machine; `count` such pairs.
    """
    config = replace(
        small_run(work), n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0,
        tokens_per_step=768, micro_batch_size=12, max_steps=100 * (count + 2), eval_every=0,
        save_every=100, run_name="overhead",
    )  # fmt: skip
    real = Metrics.log
    Metrics.log = lambda self, step, values: real(self, step, values | {"at": time.monotonic()})
    assert reap(spawn(config, 1, work / "overhead.log"), 600) == [0]
    Metrics.log = real
    lines = log_of(config)
    at = {line["step"]: line["at"] for line in lines if "train/loss" in line}
    held, write = (
        statistics.median(line[key] for line in lines if key in line)
        for key in ("checkpoint/held_ms", "checkpoint/write_ms")
    )
    starts = range(100, 100 * (count + 1), 100)  # the line of step 100 n is logged before its save
    pairs = [(at[n + 50] - at[n], at[n + 100] - at[n + 50]) for n in starts]
    ratio = statistics.median(a / b for a, b in pairs) - 1
    total = sum(a for a, _ in pairs) / sum(b for _, b in pairs) - 1
    step_ms = 20 * statistics.median(b for _, b in pairs)
    return int(ratio < 0.02), 1, (
        f"wall time {ratio:+.2%} (median of {count} pairs of 50 steps of {step_ms:.1f} ms; their "
        f"sums {total:+.2%}); a save holds training for {held:.1f} ms and is "
        f"written in {write:.0f} ms"
    )  # fmt: skip


ATTEMPTS = {  # of each the full number
    kill: 100, term: 50, flip: 1000, lost: 6, restart: 5, hosts: 3, overhead: 20,
}  # fmt: skip


def main() -> int:
    by_name = {attempt.__name__: attempt for attempt in ATTEMPTS}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", choices=[*by_name, []], help="default: all")
    parser.add_argument("--count", type=int, help="attempts of each; default: the full number")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    options, table = parser.parse_args(), {}
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="chaos") as work:
        for name in options.names or by_name:
            attempt, started = by_name[name], time.monotonic()
            count, rng = options.count or ATTEMPTS[attempt], random.Random(options.seed)
            good, of, words = attempt(Path(work), rng, count)
            seconds = time.monotonic() - started
            table[name] = dict(what=attempt.__doc__.split("\n")[0], good=good, of=of, note=words,
                               seconds=round(seconds, 1))  # fmt: skip
            print(f"{name:<9} {good:>4} of {of:<4} {words} ({seconds:.0f} s)", flush=True)
    if options.out:
        facts = {"seed": options.seed, "torch": torch.__version__, "cpus": os.cpu_count()}
        options.out.write_text(json.dumps(facts | {"results": table}, indent=2) + "\n")
    return int(any(row["good"] < row["of"] for row in table.values()))


if __name__ == "__main__":
    sys.exit(main())
