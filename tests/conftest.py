"""Shared test set-up."""

import os

# Triton reads this when a kernel is decorated, so it must be set before triton_kernels is first
# imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
