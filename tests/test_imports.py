"""The architecture, held: imports point only down, and importing does no work."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the ground up; a module imports only from lower layers, or from its own package.
LAYERS = [
    ["triton_kernels.launch", "triton_kernels.reference"],
    ["triton_kernels.attention", "triton_kernels.layer_norm", "triton_kernels.cross_entropy"],
    ["triton_kernels.linear_cross_entropy"],
    ["triton_kernels"],  # the package's own face
    ["gpt2.config", "gpt2.tokenizer", "gpt2._token_loader", "gpt2._cpu_kernels"],
    ["gpt2.options", "gpt2.device", "gpt2.storage"],
    ["gpt2.cli", "gpt2.dist"],
    ["gpt2.cpu", "gpt2.data"],
    ["gpt2.ops"],
    ["gpt2.model"],
    ["gpt2.foreign"],
    ["gpt2.generate", "gpt2.text", "gpt2.hf", "gpt2.lora"],
    ["gpt2.state"],
    ["gpt2.checkpoint"],
    ["gpt2"],
    ["gpt2.evals"],
    ["gpt2.train"],
    ["gpt2.assistant", "gpt2.export"],
    ["gpt2.commands"],
    ["gpt2.__main__"],
    ["benchmarks.common"],
    ["benchmarks.baseline", "benchmarks.kernels"],
    ["benchmarks.train_step"],
    ["scripts", "benchmarks"],
]  # fmt: skip
HEAVY = {
    "datasets", "wandb", "tensorboard", "transformers", "matplotlib", "rich", "tiktoken", "tyro",
    "yaml",
}  # fmt: skip


def layer(module: str) -> int:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        for i, names in enumerate(LAYERS):
            if ".".join(parts[:end]) in names:
                return i
    raise AssertionError(f"{module} has no layer in tests/test_imports.py")


def files():
    for folder in ("triton_kernels", "gpt2", "scripts", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(p for p in parts if p != "__init__"), ast.parse(path.read_text())


def imported(node) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return names if node.module in ("gpt2", "benchmarks") else [node.module or ""]
    return []


def imports():
    """(module, what it imports), wherever in the module that stands."""
    for module, tree in files():
        for node in ast.walk(tree):
            for name in imported(node):
                yield module, name


def test_imports_point_down():
    wrong = []
    for module, name in imports():
        if name.split(".")[0] in ("gpt2", "triton_kernels", "scripts", "benchmarks"):
            own = ".".join(module.split(".")[:2])
            same = own.startswith("gpt2.") and f"{name}.".startswith(f"{own}.")
            if not same and layer(name) >= layer(module):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_only_one_importer_of_kernels_and_of_each_cpp_module():
    found = {"triton_kernels": set(), "gpt2._token_loader": set(), "gpt2._cpu_kernels": set()}
    for module, name in imports():
        for start in found:
            if name.startswith(start) and module.startswith("gpt2"):
                found[start].add(module)
    assert list(found.values()) == [{"gpt2.ops", "gpt2.cpu"}, {"gpt2.data.loader"}, {"gpt2.cpu"}]


def test_heavy_imports_happen_inside_functions():
    wrong = [
        f"{module}: {name}"
        for module, tree in files()
        if not module.startswith("benchmarks")
        for node in tree.body
        for name in imported(node)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong


def test_importing_the_package_and_its_command_lines_loads_no_torch():
    code = "import sys, gpt2.cli, gpt2.config, gpt2.options; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_model_on_a_cpu_loads_no_triton():
    code = "import sys, gpt2; gpt2.GPT(gpt2.PRESETS['char'], {!r}); print('triton' in sys.modules)"
    for kernels in ("auto", "torch"):
        words = [sys.executable, "-c", code.format(kernels)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout == "False\n", kernels


def test_nothing_is_printed_or_read_at_import():
    code = "import gpt2, gpt2.train.pretrain, gpt2.data.datasets"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""
