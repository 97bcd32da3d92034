"""Which processes take part, on which device each; sums over them, and what they agree on."""

import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from gpt2.device import select_device

T = TypeVar("T")
PERIOD_S = 1.0  # between two heartbeats
PATIENCE_S = 10.0  # with a store that does not answer, since its host is frozen or cut off


@dataclass(frozen=True)
class Distributed:
    """This process among those that torchrun started; by default it is alone, on the CPU.

    control: a gloo group over CPU memory, for what is agreed without waiting for a GPU.
    store: torchrun's, with what this attempt of the group writes apart from earlier ones'.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    control: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """value added up over all processes."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; all must ask."""
        return self.vote(lambda: flag)()

    def vote(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """Starts what any() does; the function that is returned waits for the result."""
        if self.world_size == 1:
            return flag
        ballot = torch.tensor(int(flag()))
        work = dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self.control, async_op=True)

        def result() -> bool:
            work.wait()
            return bool(ballot)

        return result

    def gather(self, value) -> list:
        """Every process's value, in the order of ranks, on all of them."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value):
        """The main process's value, on all."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """What work() gives on the main process, which alone runs it, or its error, on all."""
        found = error = None
        if self.is_main:
            try:
                found = work()
            except (ValueError, OSError, ImportError) as raised:
                error = raised
        found, error = self.broadcast((found, error))
        if error is not None:
            raise error
        return found

    def agree(self, facts: dict, error: Exception | None = None) -> None:
        """Returns where every process has the same facts (by name) and none of them an error.

        Raises this process's error, or ValueError that names the process that differs, and in what.
        """
        every = self.gather((facts, None if error is None else str(error)))
        if error is not None:
            raise error
        for rank, (theirs, problem) in enumerate(every):
            if problem is not None:
                raise ValueError(f"rank {rank} cannot start: {problem}")
            for name, value in every[0][0].items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"rank {rank} differs from rank 0: {name} is {theirs.get(name)!r:.200} "
                        f"there and {value!r:.200} on rank 0; start all ranks with the same "
                        "options, data and versions"
                    )

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.control)


def start(device: str = "auto", timeout_s: float = 600.0) -> Distributed:
    """Joins torchrun's other processes, if there are any, and picks this one's device.

    timeout_s: how long a collective, and the start, wait for a rank before they fail.
    Raises ValueError for a device that is not there, ConnectionError where the ranks do not meet.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = select_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if world_size == 1:
        return Distributed(rank, world_size, chosen)
    # Gloo's connections are made when first used; without that some runs abort when they end.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    timeout = timedelta(seconds=timeout_s)
    store = _meet(rank, world_size, timeout_s)
    backend = dict(backend="gloo")
    if chosen.type == "cuda":
        backend = dict(backend="nccl", device_id=chosen)
    dist.init_process_group(
        store=store, rank=rank, world_size=world_size, timeout=timeout, **backend
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Distributed(rank, world_size, chosen, control, store)


def _meet(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """The store of all ranks, in a thread: a port that somebody else holds may never answer."""
    found: list = []

    def meet() -> None:
        try:
            store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
            prefix = _agree_on_attempt(store, rank, world_size, timeout_s)
            found.append(dist.PrefixStore(prefix, store))
        except (RuntimeError, OSError, ValueError) as error:  # DistError is a RuntimeError
            found.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(timeout_s + PATIENCE_S)
    if found and isinstance(found[0], dist.Store):
        return found[0]
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = str(found[0]).split("\n")[0] if found else "no answer"
    raise ConnectionError(
        f"rank {rank} did not meet the {world_size - 1} others at {address} in {timeout_s:.0f} s "
        f"({reason:.200}): is another program on that port, or a rank missing?"
    )


def _agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A prefix for the store's keys that no earlier attempt of the same torchrun has used.

    A restarted group finds the addresses of its predecessors in the store and would connect to
    them. torchrun's restart count is no help: on several hosts each has its own. So rank 0 counts
    attempts, and answers each of the others by the name that it chose for itself just now.
    """
    if rank:
        name = uuid.uuid4().hex
        store.set(f"hello/{rank}", name)
        attempt = store.get(f"answer/{name}").decode()  # waits
        store.add(f"heard/{attempt}", 1)
        return f"attempt/{attempt}"
    attempt, answered = str(store.add("attempts", 1)), set()
    deadline = time.monotonic() + timeout_s
    while store.add(f"heard/{attempt}", 0) < world_size - 1:
        for other in range(1, world_size):
            name = store.get(f"hello/{other}").decode() if store.check([f"hello/{other}"]) else ""
            if name and name not in answered:
                store.set(f"answer/{name}", attempt)
                answered.add(name)
        if time.monotonic() > deadline:
            raise ConnectionError(f"not all of {world_size} ranks came within {timeout_s:.0f} s")
        time.sleep(0.01)
    return f"attempt/{attempt}"


def stop(group: Distributed) -> None:
    """Leaves the group, all processes together."""
    if group.world_size > 1:
        group.barrier()
        dist.destroy_process_group()


class Heartbeat:
    """Says which rank is missing when a collective fails, which by itself names an address at best.

    A thread of each rank writes, once a second, the step that it is at (the attribute `step`) into
    the store that torchrun keeps for its processes. After a failure the others read who has stopped
    beating (killed, frozen, cut off), or who stands at an earlier step (hung).
    """

    def __init__(self, group: Distributed):
        self.group, self.step = group, -1
        self._stop = threading.Event()
        if group.store is not None:
            # A connection of its own: the other one may be waiting for something.
            self._store = group.store.clone()
            threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def diagnose(self) -> str:
        """Which ranks are missing, in words; takes three periods, or PATIENCE_S."""
        found: list[list[bytes]] = []
        # In a thread, since a store whose host is frozen never answers, whatever its timeout.
        reader = threading.Thread(target=self._read_twice, args=(found,), daemon=True)
        reader.start()
        reader.join(PATIENCE_S)
        if len(found) < 2:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                return "lost the host on which torchrun keeps the ranks' store"
            return "lost rank 0 (it keeps the ranks' store): killed, frozen or cut off"
        first, second = found
        others = set(range(self.group.world_size)) - {self.group.rank}
        silent = [r for r in sorted(others) if first[r] == second[r]]
        if silent:
            at = ", ".join(f"rank {r} (last heard of {_place(second[r])})" for r in silent)
            return f"lost {at}: killed, frozen or cut off"
        steps = [_step(beat) for beat in second]
        behind = [f"rank {r}" for r, step in enumerate(steps) if step < max(steps)]
        if behind:
            return f"{', '.join(behind)} did not come beyond step {min(steps)}, others did"
        return "every rank still beats: see the other ranks' messages"

    def _read_twice(self, found: list[list[bytes]]) -> None:
        try:
            store = self.group.store.clone()
            found.append(self._read(store))
            time.sleep(3 * PERIOD_S)
            found.append(self._read(store))
        except RuntimeError:  # it is gone
            pass

    def _read(self, store: dist.Store) -> list[bytes]:
        keys = [f"heartbeat/{rank}" for rank in range(self.group.world_size)]
        return [store.get(key) if store.check([key]) else b"" for key in keys]

    def _run(self) -> None:
        beat = 0
        while not self._stop.wait(PERIOD_S if beat else 0):
            beat += 1
            try:
                self._store.set(f"heartbeat/{self.group.rank}", f"{beat} {self.step}")
            except RuntimeError:  # the store is gone, and so is the run
                return


def _place(beat: bytes) -> str:
    return f"at step {_step(beat)}" if _step(beat) >= 0 else "before its first step"


def _step(beat: bytes) -> int:
    return int(beat.split()[1]) if beat else -1
