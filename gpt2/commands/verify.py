"""Repeats steps of a run from a checkpoint, and compares the losses with its log.

    gpt2-triton verify runs/shakespeare_char                      # from the last but one
    gpt2-triton verify runs/shakespeare_char --checkpoint step_00000500 --steps 100
    torchrun --nproc-per-node 2 -m gpt2 verify runs/mine         # of a run on 2 ranks

First the data is compared with the hashes in the run's receipt. Then the trainer itself trains on
with the stored options, in a temporary folder: the run's own is only read. The exit status is 0
where everything agrees, and 1 where it does not.
"""

import sys

from gpt2.cli import parse, starting
from gpt2.options import VerifyConfig


def main() -> None:
    with starting():
        options = parse(VerifyConfig, __doc__)
        from gpt2.train.verify import verify_run
    if not verify_run(options):
        sys.exit(1)
