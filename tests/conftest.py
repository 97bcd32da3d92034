"""Kernels run through Triton's interpreter where there is no GPU; Triton reads this when it is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
