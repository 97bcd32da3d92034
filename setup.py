"""Builds gpt2._token_loader from csrc/ and says what the project depends on; constraints.txt pins
it.

The extension is optional: without a C++ compiler the install goes on, and gpt2.data uses its numpy
twin.
"""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

TRAIN = ["datasets>=4", "wandb>=0.20", "matplotlib>=3.9", "rich>=13"]
DEV = [
    "pytest>=9",
    "pytest-timeout>=2.4",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "transformers>=5",
    "peft>=0.18",
    "pybind11>=3.0",
    "setuptools>=77",
]

setup(
    name="gpt2-triton",
    version="0.1.0",
    description="A fast, exact and readable trainer for GPT-2-class models",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["gpt2", "gpt2.*", "triton_kernels"]),
    package_data={"gpt2": ["assets/*"]},
    ext_modules=[
        Pybind11Extension(
            "gpt2._token_loader",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": build_ext},
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.8; platform_machine == 'x86_64' or platform_machine == 'aarch64'",
        "numpy>=2.1",
        "tiktoken>=0.8",
        "safetensors>=0.5",
        "tyro>=1.0",
        "pyyaml>=6",
        "xxhash>=3",
    ],
    extras_require={"train": TRAIN, "dev": TRAIN + DEV},
)
