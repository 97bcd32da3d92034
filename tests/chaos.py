"""Kills, poisons and damages training runs, and counts what is lost. `make chaos` runs it all.

    python tests/chaos.py                            # everything, about 20 minutes on 2 CPU cores
    python tests/chaos.py kill term --count 10       # only these, with so many attempts each
    python tests/chaos.py --seed 7 --out chaos.json

Each attempt is a fresh process forked from one that has imported torch already, so that hundreds
fit; the tests under torchrun start it as a user would. Random moments come from the printed seed.
"""

import argparse
import importlib
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
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from gpt2 import checkpoint  # noqa: E402
from gpt2.cli import run_script  # noqa: E402
from gpt2.config import TrainConfig  # noqa: E402
from gpt2.data.prepare import prepare  # noqa: E402
from gpt2.options import PrepareConfig  # noqa: E402
from gpt2.train.metrics import Metrics, read_metrics  # noqa: E402
from gpt2.train.objectives import LanguageModeling  # noqa: E402
from gpt2.train.pretrain import open_data, pretrain  # noqa: E402

torch.set_num_threads(1)
# What a run imports on its way, once, here, so that attempts are spent on running.
for name in ("torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "yaml",
             "safetensors.torch", "triton_kernels"):  # fmt: skip
    importlib.import_module(name)


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
    port, pids = free_port(), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
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


def reap(pids: list[int], patience_s: float = 120.0) -> list[int]:
    """Exit statuses; once one has failed the others are killed, as torchrun does."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + patience_s
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if any(code not in (0, 75) for code in codes.values()) or time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_of(config: TrainConfig) -> Path:
    return Path(config.out_dir) / config.run_name


def outcome(config: TrainConfig) -> tuple[dict, dict]:
    """The losses by step and key, and the weights and moments of the last checkpoint."""
    run = run_of(config)
    losses = {
        (line["step"], key): line[key]
        for line in read_metrics(run / "metrics.jsonl")
        for key in ("train/loss", "val/loss", "train/grad_norm")
        if key in line
    }
    path = checkpoint.list_checkpoints(run)[-1]
    tensors = {}
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        tensors |= load_file(path / name)
    return losses, tensors


def same(a: tuple[dict, dict], b: tuple[dict, dict]) -> bool:
    """Bit for bit."""
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(
        torch.equal(a[1][name], b[1][name]) for name in a[1]
    )


def uninterrupted(config: TrainConfig, ranks: int, log: Path) -> tuple[tuple, float]:
    whole = replace(config, run_name=f"whole_{ranks}")
    started = time.monotonic()
    assert set(reap(spawn(whole, ranks, log))) == {0}, log.read_text()[-2000:]
    return outcome(whole), time.monotonic() - started


# The attempts. Each returns (how many succeeded, of how many, what to say).


def kill(work: Path, rng: random.Random, count: int) -> tuple[int, int, str]:
    """kill -9 at random moments of runs on 1 and 2 ranks, every second one aimed at a save."""
    config, log = small_run(work), work / "kill.log"
    good = kills = in_save = runs = 0
    for ranks, share in ((1, count - count // 3), (2, count // 3)):
        expected, seconds = uninterrupted(config, ranks, log)
        done = 0
        while done < share:
            runs += 1
            cut = replace(config, run_name=f"cut_{ranks}_{runs}")
            here, finished = 0, False
            while not finished:
                pids = spawn(cut, ranks, log)
                if done + here < share:
                    aimed = (done + here) % 2 == 0
                    hit = wait_for_save(cut, pids, rng) if aimed else False
                    if not aimed:
                        time.sleep(rng.random() * seconds)
                    victim = rng.choice(pids)
                    if os.waitpid(victim, os.WNOHANG) == (0, 0):
                        os.kill(victim, signal.SIGKILL)
                        here, in_save = here + 1, in_save + hit
                        reap(pids)
                        continue
                    pids.remove(victim)
                    reap(pids)
                else:
                    reap(pids)
                finished = True
            right = same(outcome(cut), expected)
            kills, done, good = kills + here, done + here, good + (here if right else 0)
            shutil.rmtree(run_of(cut))
    words = f"{runs} runs, {in_save} of {kills} kills while a checkpoint was being written"
    return good, kills, f"losses, weights and moments bit-identical; {words}"


def wait_for_save(config: TrainConfig, pids: list[int], rng: random.Random) -> bool:
    """Until a checkpoint is being written, and then a moment; whether that was seen."""
    folder, skip = run_of(config) / "checkpoints", rng.randrange(4)
    before = None
    while all(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for p in pids):
        writing = next((n for n in names(folder) if n.startswith(".step_")), None)
        if writing and writing != before:
            before, skip = writing, skip - 1
            if skip < 0:
                time.sleep(rng.random() * 0.01)
                return True
    return False


def names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def term(work: Path, rng: random.Random, count: int) -> tuple[int, int, str]:
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
        lines = read_metrics(run_of(cut) / "metrics.jsonl")
        steps = [line["step"] for line in lines if "train/loss" in line]
        found = checkpoint.newest_good(run_of(cut), say=lambda text: None)
        if not steps:  # it came before the first step, and nothing was lost
            good, before = good + (found is None), before + 1
        else:
            status = 0 if steps[-1] == cut.max_steps else 75
            good += found is not None and found.step == steps[-1] and code == status
    return good, count, f"exit status 75; {before} before the first step had begun"


def disk(work: Path, rng: random.Random, count: int) -> tuple[int, int, str]:
    """A disk that fills up, met by the check before a save and in the middle of writing."""
    log, good = work / "disk.log", 0
    for blind in (False, True):
        for policy in ("continue", "stop"):
            with small_disk(work, 3.2 if blind else 32) as (folder, how):
                config = replace(
                    small_run(work), out_dir=str(folder), on_save_error=policy, keep_last=0,
                    save_every=20, eval_every=0, max_steps=200, run_name="full",
                )  # fmt: skip
                (pid,) = spawn_blind(config, log) if blind else spawn(config, 1, log)
                if not blind:  # otherwise the pre-flight would refuse to start
                    fill(folder, config)
                (code,) = reap([pid])
                found = checkpoint.newest_good(run_of(config), say=lambda text: None)
                hidden = [n for n in names(run_of(config) / "checkpoints") if n.startswith(".")]
                text = log.read_text()
                said = ("No space left" in text if blind else "does not fit" in text)
                steps = [x["step"] for x in read_metrics(run_of(config) / "metrics.jsonl")]
                went_on = steps[-1] == config.max_steps
                right = said and code == 1 and not hidden and went_on == (policy == "continue")
                good += found is not None and right
                log.unlink()
    return good, 4, f"{how}; the checkpoints before load, nothing half written stays"


def spawn_blind(config: TrainConfig, log: Path) -> list[int]:
    """A run that believes there is room."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage("/")._replace(free=1 << 60)
    try:
        return spawn(config, 1, log)
    finally:
        shutil.disk_usage = usage


def fill(folder: Path, config: TrainConfig) -> None:
    """Leaves room for half a checkpoint once there is one."""
    while not any(n.startswith("step_") for n in names(run_of(config) / "checkpoints")):
        time.sleep(0.001)
    (first,) = checkpoint.list_checkpoints(run_of(config))[:1]
    size = sum(file.stat().st_size for file in first.iterdir())
    (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - size // 2))


@contextmanager
def small_disk(work: Path, megabytes: float):
    """A file system of its own, where we may mount one."""
    folder = work / "small"
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes * 1000:.0f}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise SystemExit("disk: mounting a tmpfs needs root; the default tests use RLIMIT_FSIZE")
    try:
        yield folder, "tmpfs"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def flip(work: Path, rng: random.Random, count: int) -> tuple[int, int, str]:
    """One flipped bit or a truncation in a random file of the newest checkpoint."""
    config, log, good = replace(small_run(work), keep_last=2), work / "flip.log", 0
    assert reap(spawn(replace(config, run_name="flips"), 1, log)) == [0]
    run = run_of(replace(config, run_name="flips"))
    before, newest = checkpoint.list_checkpoints(run)
    truncated = 0
    for _ in range(count):
        file = rng.choice(sorted(newest.iterdir()))
        content = file.read_bytes()
        if rng.random() < 0.1:
            changed, truncated = content[: rng.randrange(len(content))], truncated + 1
        else:
            changed = bytearray(content)
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        said = []
        found = checkpoint.newest_good(run, say=said.append)
        good += found is not None and found.path == before and file.name in said[0]
        file.write_bytes(content)
    assert checkpoint.newest_good(run).path == newest
    return good, count, f"{truncated} truncations; the file is named, the checkpoint before is used"


class Poisoned(LanguageModeling):
    """NaN where a batch holds a certain row."""

    row: torch.Tensor

    def forward(self, batch):
        loss_sum, metrics = super().forward(batch)
        bad = (batch["idx"] == self.row).all(1).any()
        return loss_sum * (float("nan") if bad else 1.0), metrics


def nan(work: Path, rng: random.Random, count: int) -> tuple[int, int, str]:
    """NaN in the loss and gradients of one row, on 1 and 2 ranks."""
    log, good = work / "nan.log", 0
    config = replace(small_run(work), eval_every=0, save_every=1, keep_last=0)
    data = open_data(config, "train", config.block_size)
    rows = config.tokens_per_step // config.block_size
    import gpt2.train.pretrain as module

    for n in range(count):
        bad = replace(config, run_name=f"nan_{n}", max_steps=12)
        step, row = rng.randrange(1, 11), rng.randrange(rows)
        Poisoned.row = data.batch(step, rows)[0][row].clone()
        module.LanguageModeling = Poisoned
        try:
            codes = reap(spawn(bad, 1 + n % 2, log))
        finally:
            module.LanguageModeling = LanguageModeling
        paths = checkpoint.list_checkpoints(run_of(bad))
        untouched = all(
            torch.equal(x, load_file(paths[step] / file)[name])
            for file in (checkpoint.MODEL, checkpoint.OPTIMIZER)
            for name, x in load_file(paths[step - 1] / file).items()
        )
        lines = read_metrics(run_of(bad) / "metrics.jsonl")
        events = [line for line in lines if "guard/skipped" in line]
        place = data.provenance(step, row, rows)
        named = len(events) == 1 and any(
            r["row"] == row and r["documents"][0].startswith(f"{place.shard} token {place.offset} ")
            for r in events[0]["guard/rows"]
        )
        finite = all(v.isfinite().all() for v in outcome(bad)[1].values())
        good += set(codes) == {0} and untouched and named and finite and len(paths) == 12
    return good, count, "weights and moments untouched, the document named, one step lost"


def lost(work: Path, rng: random.Random, count: int) -> tuple[int, int, str]:
    """A rank killed or frozen, also the one that keeps the store: the other one names it."""
    good, longest = 0, 0.0
    for n in range(count):
        log, victim = work / f"lost_{n}.log", n // 2 % 2
        config = replace(small_run(work), run_name=f"lost_{n}", max_steps=10_000, timeout_s=8)
        pids = spawn(config, 2, log)
        while not names(run_of(config) / "checkpoints"):
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


def torchrun(config: TrainConfig, *options: str, prefix: tuple = ()) -> subprocess.Popen:
    words = [f"--{k}={v}" for k, v in asdict(config).items() if v is not None and v != ""]
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *options,
               str(ROOT / "scripts/train_gpt2.py"), *words]  # fmt: skip
    log = open(Path(config.out_dir).parent / "torchrun.log", "ab")
    return subprocess.Popen(command, stdout=log, stderr=log)


def workers(config: TrainConfig) -> list[int]:
    """Process ids of the ranks of a run under torchrun."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environ = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = f"--run_name={config.run_name}".encode() in words
            if ours and any(word.startswith(b"RANK=") for word in environ):
                found.append(int(entry.name))
    return found


def kill_workers(config: TrainConfig, attempts: int, rng: random.Random, alive) -> int:
    """kill -9 of a random rank, `attempts` times, each after two more checkpoints."""
    kills, at = 0, 0
    while kills < attempts and alive():
        steps = [int(n[5:]) for n in names(run_of(config) / "checkpoints") if n[:5] == "step_"]
        if steps and max(steps) >= at + 8:
            time.sleep(rng.random() * 0.5)
            ranks = workers(config)
            if ranks:
                os.kill(rng.choice(ranks), signal.SIGKILL)
                kills, at = kills + 1, max(steps)
        time.sleep(0.05)
    return kills


def restart(work: Path, rng: random.Random, count: int) -> tuple[int, int, str]:
    """A rank killed under torchrun --max-restarts, on one host."""
    config = replace(small_run(work), max_steps=120)
    expected, _ = uninterrupted(config, 2, work / "restart.log")
    good = 0
    for n in range(count):
        cut = replace(config, run_name=f"restart_{n}")
        started = torchrun(cut, "--standalone", "--nproc-per-node=2", "--max-restarts=3")
        kills = kill_workers(cut, 2, rng, lambda p=started: p.poll() is None)
        code = started.wait(300)
        good += code == 0 and kills == 2 and same(outcome(cut), expected)
    return good, count, "2 kills each, 2 ranks, bit-identical"


def hosts(work: Path, rng: random.Random, count: int) -> tuple[int, int, str]:
    """The same on two hosts, which are network namespaces; c10d rendezvous."""
    config = replace(small_run(work), max_steps=120)
    expected, _ = uninterrupted(config, 2, work / "hosts.log")
    good = 0
    for n in range(count):
        cut = replace(config, run_name=f"hosts_{n}")
        with two_hosts() as prefixes:
            options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3",
                       "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400",
                       f"--rdzv-id={n}"]  # fmt: skip
            started = [
                torchrun(
                    cut, *options, f"--local-addr=10.77.0.{i + 1}",
                    f"--rdzv-conf=is_host={int(i == 0)}", prefix=prefix,
                )
                for i, prefix in enumerate(prefixes)
            ]  # fmt: skip
            alive = lambda ps=started: all(p.poll() is None for p in ps)  # noqa: E731
            kills = kill_workers(cut, 1, rng, alive)
            codes = [p.wait(300) for p in started]
        good += codes == [0, 0] and kills == 1 and same(outcome(cut), expected)
    return good, count, "1 kill each, 1 rank a host, bit-identical"


@contextmanager
def two_hosts():
    """Two network namespaces with a cable between them; yields what to put before a command."""

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)

    spaces = ("gpt2-a", "gpt2-b")
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", "gpt2-a0", "netns", spaces[0], "type", "veth", "peer", "name", "gpt2-b0",
           "netns", spaces[1])  # fmt: skip
        for i, space in enumerate(spaces):
            device = f"{space}0"
            ip("-n", space, "addr", "add", f"10.77.0.{i + 1}/24", "dev", device)
            for name in (device, "lo"):
                ip("-n", space, "link", "set", name, "up")
        yield [
            ("ip", "netns", "exec", space, "env", f"GLOO_SOCKET_IFNAME={space}0")
            for space in spaces
        ]
    finally:
        for space in spaces:
            ip("netns", "del", space, check=False)


def overhead(work: Path, rng: random.Random, count: int) -> tuple[int, int, str]:
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
    try:
        assert reap(spawn(config, 1, work / "overhead.log"), 600) == [0]
    finally:
        Metrics.log = real
    lines = read_metrics(run_of(config) / "metrics.jsonl")
    at = {line["step"]: line["at"] for line in lines if "train/loss" in line}
    held = [line["checkpoint/held_ms"] for line in lines if "checkpoint/held_ms" in line]
    write = [line["checkpoint/write_ms"] for line in lines if "checkpoint/write_ms" in line]
    starts = range(100, 100 * (count + 1), 100)  # the line of step 100 n is logged before its save
    pairs = [(at[n + 50] - at[n], at[n + 100] - at[n + 50]) for n in starts]
    ratio = statistics.median(a / b for a, b in pairs) - 1
    total = sum(a for a, _ in pairs) / sum(b for _, b in pairs) - 1
    step_ms = 20 * statistics.median(b for _, b in pairs)
    words = (
        f"wall time {ratio:+.2%} (median of {count} pairs of 50 steps of {step_ms:.1f} ms; their "
        f"sums {total:+.2%}); a save holds training for {statistics.median(held):.1f} ms and is "
        f"written in {statistics.median(write):.0f} ms"
    )
    return int(ratio < 0.02), 1, words


ATTEMPTS = {  # name: (function, attempts)
    "kill": (kill, 100), "term": (term, 50), "disk": (disk, 4), "flip": (flip, 1000),
    "nan": (nan, 10), "lost": (lost, 6), "restart": (restart, 5), "hosts": (hosts, 3),
    "overhead": (overhead, 20),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", choices=[*ATTEMPTS, []], help="default: all")
    parser.add_argument("--count", type=int, help="attempts of each; default: the full number")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    options = parser.parse_args()
    table, failed = {}, False
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="chaos") as work:
        for name in options.names or ATTEMPTS:
            attempt, count = ATTEMPTS[name]
            started = time.monotonic()
            good, of, words = attempt(
                Path(work), random.Random(options.seed), options.count or count
            )
            seconds = time.monotonic() - started
            table[name] = dict(what=attempt.__doc__.split("\n")[0], good=good, of=of, note=words,
                               seconds=round(seconds, 1))  # fmt: skip
            failed |= good < of
            print(f"{name:<9} {good:>4} of {of:<4} {words} ({seconds:.0f} s)", flush=True)
    if options.out:
        facts = {"seed": options.seed, "torch": torch.__version__, "cpus": os.cpu_count()}
        options.out.write_text(json.dumps(facts | {"results": table}, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
