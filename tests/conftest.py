"""Kernels run through Triton's interpreter; Triton reads this when it is imported.

Tests marked gpu need compiled kernels: TRITON_INTERPRET=0 pytest -m gpu.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
