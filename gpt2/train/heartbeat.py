"""Says which rank is missing when a collective fails.

A failed collective names an address at best. So a thread of each rank writes, once a second, the
step that it is at into the store that torchrun keeps for its processes; after a failure the others
read who has stopped beating (killed, frozen, cut off), or who stands at an earlier step (hung).
"""

import os
import threading
import time

import torch.distributed as dist

from gpt2.train.distributed import Distributed

PERIOD_S = 1.0
PATIENCE_S = 10.0  # with a store that does not answer, since its host is frozen or cut off


class Heartbeat:
    """Of this process; the attribute `step` is what it tells."""

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
        silent = [
            r
            for r in range(self.group.world_size)
            if first[r] == second[r] and r != self.group.rank
        ]
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
