"""Says which rank is missing when a collective fails.

A failed collective names an address at best. So a thread of each rank writes, once a second, the
step that it is at into the store that torchrun keeps for its processes; after a failure the others
read who has stopped beating (killed, frozen, cut off), or who stands at an earlier step (hung).
"""

import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist

PERIOD_S = 1.0


class Heartbeat:
    """Of this process; the attribute `step` is what it tells."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size, self.step = rank, world_size, -1
        # Other attempts of a restarted group share the store.
        self.prefix = f"heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self._stop = threading.Event()
        if world_size > 1:
            self._store = self._connect()
            threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def diagnose(self) -> str:
        """Which ranks are missing, in words; takes three periods."""
        try:
            store = self._connect()
            first = self._read(store)
            time.sleep(3 * PERIOD_S)
            second = self._read(store)
        except RuntimeError:
            return "the host that keeps the ranks' store is gone"
        silent = [r for r in range(self.world_size) if first[r] == second[r] and r != self.rank]
        if silent:
            at = ", ".join(f"rank {r} (last heard of at step {_step(second[r])})" for r in silent)
            return f"lost {at}: killed, frozen or cut off"
        steps = [_step(beat) for beat in second]
        behind = [f"rank {r}" for r, step in enumerate(steps) if step < max(steps)]
        if behind:
            return f"{', '.join(behind)} did not come beyond step {min(steps)}, others did"
        return "every rank still beats: see the other ranks' messages"

    def _connect(self) -> dist.TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))

    def _read(self, store: dist.TCPStore) -> list[bytes]:
        keys = [f"{self.prefix}/{rank}" for rank in range(self.world_size)]
        return [store.get(key) if store.check([key]) else b"" for key in keys]

    def _run(self) -> None:
        beat = 0
        while not self._stop.wait(PERIOD_S if beat else 0):
            beat += 1
            try:
                self._store.set(f"{self.prefix}/{self.rank}", f"{beat} {self.step}")
            except RuntimeError:  # the store is gone, and so is the run
                return


def _step(beat: bytes) -> int:
    return int(beat.split()[1]) if beat else -1
