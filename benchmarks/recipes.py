"""Which of two or more training recipes is better, by how much, and whether that is noise.

    python benchmarks/recipes.py --common "configs/shakespeare_char.yaml --eval_every 50" \\
        --recipe "adamw" --recipe "muon: --optimizer muon" --seeds 1 2 3 --out results/muon_char

Each recipe is a name and options of scripts/train_gpt2.py, which come after those in common; it
trains once with each seed (weights, data order), in turns. The first recipe is what the others are
compared with. The table has, with mean and range over the seeds,

    loss            validation loss at the end
    equal tokens    validation loss where the shortest recipe ends
    equal time      validation loss after the time that the fastest recipe takes, by a step of each
                    recipe, timed in turns at the end; validation and saving are not counted
    multiplier      how much sooner it reaches the end of the first recipe, in tokens and in time:
                    that recipe's whole length over where this one's curve has its final loss, or
                    1 over it where this one ends above. It is a lower bound where lr falls: a run
                    laid out for fewer steps would be lower there.

Runs lie in out/runs; one that was interrupted goes on, one that is done is read. Writes recipes.md,
.json and .png under --out. Threads: OMP_NUM_THREADS.
"""

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from gpt2.config import TrainConfig  # noqa: E402

TRAIN = Path(__file__).resolve().parent.parent / "scripts" / "train_gpt2.py"
ROUNDS = 3  # of timing, each of some steps
SHORT = ["--max_steps", "16", "--warmup_steps", "0", "--max_minutes", "0", "--log_every", "4",
         "--eval_every", "0", "--save_every", "0"]  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """Validation losses of a run: after `steps`, which are `tokens`, `loss`."""

    steps: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray


def read_curve(folder: Path) -> Curve:
    """The curve of a finished run.

    Raises ValueError where it has fewer than two validations, or a loss that is not finite.
    """
    n = yaml.safe_load((folder / "config.yaml").read_text())["tokens_per_step"]
    points = [(line["step"], line["val/loss"]) for line in read_log(folder) if "val/loss" in line]
    if len(points) < 2 or None in (loss for _, loss in points):
        raise ValueError(f"{folder}: needs two or more validations with finite losses: {points}")
    steps, losses = map(np.array, zip(*points, strict=True))
    return Curve(steps, steps * n, losses)


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reached(x: np.ndarray, loss: np.ndarray, target: float) -> float | None:
    """Where a curve first comes down to target, straight between its points; None: never."""
    for i in np.flatnonzero(loss <= target):
        if i == 0:
            return float(x[0])
        share = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
        return float(x[i - 1] + share * (x[i] - x[i - 1]))
    return None


def multiplier(x: np.ndarray, loss: np.ndarray, base_x: np.ndarray, base: np.ndarray) -> float:
    """How much sooner a curve reaches the end of another; below 1, how much later."""
    if (at := reached(x, loss, base[-1])) is not None:
        return float(base_x[-1] / at)
    return reached(base_x, base, loss[-1]) / float(x[-1])


def train(words: list[str], out_dir: Path, run_name: str) -> Path:
    """Runs train_gpt2.py, or what is left of the run, and returns its folder."""
    words = [*words, "--run_name", run_name, "--out_dir", str(out_dir), "--resume", "auto"]
    done = subprocess.run([sys.executable, TRAIN, *words], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(f"{run_name}: train_gpt2.py ended with status {done.returncode}")
    return out_dir / run_name


def time_steps(recipes: dict[str, list[str]]) -> dict[str, float]:
    """Seconds of a step of each recipe: the fastest of some, since other work only adds to them."""
    found: dict[str, list[float]] = {name: [] for name in recipes}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(ROUNDS):
            for name, words in recipes.items():
                done = train([*words, *SHORT], Path(folder), f"{name}_{i}")
                found[name] += [x["train/step_ms"] for x in read_log(done) if "train/step_ms" in x]
    return {name: min(times) / 1e3 for name, times in found.items()}


def compare(
    curves: dict[str, list[Curve]], step_s: dict[str, float]
) -> dict[str, dict[str, list[float]]]:
    """The figures of the table: for each recipe and column one number a seed."""
    tokens = min(c.tokens[-1] for runs in curves.values() for c in runs)
    time = {name: [c.steps * step_s[name] for c in runs] for name, runs in curves.items()}
    seconds = min(t[-1] for times in time.values() for t in times)
    first, found = next(iter(curves)), {}
    for name, runs in curves.items():
        of_all = list(zip(runs, time[name], curves[first], time[first], strict=True))
        found[name] = {
            "loss": [float(c.loss[-1]) for c in runs],
            "equal tokens": [float(np.interp(tokens, c.tokens, c.loss)) for c in runs],
            "equal time": [float(np.interp(seconds, t, c.loss)) for c, t, *_ in of_all],
            "multiplier, tokens": [
                multiplier(c.tokens, c.loss, base.tokens, base.loss) for c, _, base, _ in of_all
            ],
            "multiplier, time": [multiplier(t, c.loss, bt, b.loss) for c, t, b, bt in of_all],
            "step ms": [step_s[name] * 1e3],
        }
    return found


def table(found: dict[str, dict[str, list[float]]], options: dict[str, str]) -> str:
    def cell(column: str, values: list[float]) -> str:
        digits = {"l": 4, "e": 4, "m": 2, "s": 1}[column[0]]
        text = f"{statistics.mean(values):.{digits}f}"
        if len(values) > 1:
            text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
        return text

    columns = list(next(iter(found.values())))
    rows = [[name, *(cell(c, row[c]) for c in columns)] for name, row in found.items()]
    lines = [f"- {name}: `{words or 'as in common'}`" for name, words in options.items()]
    return common.markdown_table(["recipe", *columns], rows) + "\n\n" + "\n".join(lines)


def draw(path: Path, curves: dict[str, list[Curve]], step_s: dict[str, float]) -> None:
    """Mean loss of each recipe against tokens and time, shaded from lowest to highest seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    last = [c.loss[-1] for runs in curves.values() for c in runs]
    for one, label in zip(axes, ("tokens", "seconds of training steps"), strict=True):
        for name, runs in curves.items():
            at = runs[0].tokens if label == "tokens" else runs[0].steps * step_s[name]
            losses = np.array([c.loss for c in runs])
            (line,) = one.plot(at, losses.mean(0), label=name)
            one.fill_between(at, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.25)
        one.set(xlabel=label, ylim=(min(last) - 0.1, max(last) + 0.8))
        one.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss")
    axes[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--common", default="", help="options of train_gpt2.py for all recipes")
    parser.add_argument("--recipe", action="append", required=True, help='"NAME: OPTIONS"')
    parser.add_argument("--seeds", type=int, nargs="+", default=[TrainConfig.seed])
    args = parser.parse_args()
    recipes = {name.strip(): words for name, _, words in (r.partition(":") for r in args.recipe)}
    if len(recipes) < len(args.recipe):
        parser.error("two recipes have one name")
    all_words = {name: shlex.split(f"{args.common} {words}") for name, words in recipes.items()}
    curves: dict[str, list[Curve]] = {name: [] for name in recipes}
    for seed in args.seeds:
        for name, words in all_words.items():
            run = train([*words, "--seed", str(seed)], args.out / "runs", f"{name}_{seed}")
            curves[name].append(curve := read_curve(run))
            print(f"{name}, seed {seed}: {curve.loss[-1]:.4f}", flush=True)
    found = compare(curves, step_s := time_steps(all_words))
    text = f"`{args.common}`\n\n" + table(found, recipes)
    print(f"\n{text}")
    raw = {name: [[c.tokens.tolist(), c.loss.tolist()] for c in runs]
           for name, runs in curves.items()}  # fmt: skip
    common.write_results(args.out, "recipes", text, {"found": found, "curves": raw})
    draw(args.out / "recipes.png", curves, step_s)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
