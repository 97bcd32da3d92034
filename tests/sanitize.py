"""Runs the tests of csrc/ on a build of it with AddressSanitizer and UBSan; any finding fails.

    python tests/sanitize.py [pytest arguments]

Builds into a temporary folder; needs a compiler with its sanitizer libraries (GCC or Clang on
Linux). The sanitizers' runtimes must be there before Python is: they are preloaded.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11

from gpt2 import _token_loader

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["test_loader.py", "test_shards.py", "test_mixture.py", "test_fuzz.py", "test_cpu.py"]
MODULES = {
    "_token_loader": ["bindings.cpp", "token_loader.cpp"],
    "_cpu_kernels": [f"{name}.cpp" for name in (
        "cpu_bindings", "cpu_kernels", "cpu_attention", "decode",
    )],
}  # fmt: skip
# Training on the sanitized interpreter takes minutes and tests nothing of csrc/; bus errors of
# others go to the sanitizers here, and memory is theirs.
LEAVE_OUT = "not training and not bus_errors and not no_memory"
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


# Tests and their child processes import gpt2 from ROOT; this puts the other build first.
USE = """
import importlib.machinery, importlib.util, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if path := {modules!r}.get(name):
            loader = importlib.machinery.ExtensionFileLoader(name, path)
            return importlib.util.spec_from_file_location(name, path, loader=loader)

sys.meta_path.insert(0, Finder)
"""


def main() -> int:
    compiler = os.environ.get("CXX", "g++")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            compiler, "-std=c++17", "-O1", "-g", "-shared", "-fPIC", *FLAGS, *includes,
            f'-DSOURCES="{_token_loader.sources}"',
        ]  # fmt: skip
        modules = {}
        for name, sources in MODULES.items():
            path = f"{folder}/{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
            modules[f"gpt2.{name}"] = path
            sources = [str(ROOT / "csrc" / source) for source in sources]
            subprocess.run([*command, *sources, "-o", path], check=True)
        (Path(folder) / "sitecustomize.py").write_text(USE.format(modules=modules))
        runtimes = [
            subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        if not all(map(os.path.isabs, runtimes)):
            raise SystemExit(f"error: {compiler} has no sanitizer libraries: install them")
        environment = os.environ | {
            "LD_PRELOAD": " ".join(runtimes),
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT)]),
            # Python and torch keep much until the process ends, which counts as leaks.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
        arguments = sys.argv[1:] or ["-q", "-k", LEAVE_OUT, *(f"tests/{name}" for name in TESTS)]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys"]
        return subprocess.run([*command, *arguments], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
