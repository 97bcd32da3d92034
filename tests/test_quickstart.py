"""docs/quickstart.ipynb: its cells run as they stand, in order; for that no Jupyter is needed."""

import inspect
import json
import re
from pathlib import Path

import pytest

from gpt2.generate import complete, generate
from gpt2.model import GPT
from gpt2.train.metrics import points, read_metrics

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "quickstart.ipynb").read_text()
CELLS = json.loads(TEXT)["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_its_cells_run_and_what_was_taught_comes_back_and_again_from_what_is_there(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", plt.close)
    for steps_are_taken in (True, False):
        names = {}
        for cell in CODE:
            exec(source(cell), names)
        out = capsys.readouterr().out
        assert ("step      1/" in out) == steps_are_taken
        assert out.endswith(
            "> Who wrote Hamlet?\nWilliam Shakespeare.\n"
            "> Say good night.\nGood night, good night!\n"
        )
    for name in ("base", "assistant"):
        lines = read_metrics(tmp_path / "quickstart" / name / "metrics.jsonl")
        losses = [loss for _, loss in points(lines, "train/loss")]
        assert losses[-1] < losses[0] - 1


def test_its_outputs_are_those_of_one_run_from_the_top_without_paths():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr|Users)\b", TEXT)
    # What a cell prints of its own options, it was run with.
    for cell in CODE:
        for steps in re.findall(r"max_steps=(\d+)", source(cell)):
            assert f"done: {steps} steps" in json.dumps(cell["outputs"])


def test_its_table_of_transformers_arguments_is_what_generate_answers(tiny):
    """Each is an argument of ours, or is refused in words that name what the table names."""
    [table] = re.findall(r"^\| transformers \|.*(?:\n\|.*)+", "\n".join(map(source, CELLS)), re.M)
    ours, model = {*inspect.signature(generate).parameters}, GPT(tiny, "torch")
    ours |= {*inspect.signature(complete).parameters}
    for line in table.splitlines()[2:]:
        theirs, here = line.strip("| ").split(" | ")
        for name in re.findall(r"`(\w+)", theirs):
            if here == "the same":
                assert name in ours
                continue
            with pytest.raises(TypeError, match=f"generate has no {name}: ") as error:
                generate(model, [[1]], max_new_tokens=1, **{name: None})
            assert not re.search("known are|did you mean", str(error.value))
            for word in re.findall(r"`(\w+)", here):
                assert word in str(error.value) and word in ours
