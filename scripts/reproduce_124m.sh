#!/usr/bin/env bash
# GPT-2 124M on 10B tokens of FineWeb: prepares, trains, evaluates. For 8 GPUs, or --gpus.
#
#   scripts/reproduce_124m.sh --plan --tokens_per_s 500000 --price 3   # trains nothing
#   scripts/reproduce_124m.sh --gpus 1 -- --micro_batch_size 32        # after --: for train_gpt2.py
#
# --tokens_per_s of one GPU, as benchmarks/train_step.py measures it, and --price of a GPU hour add
# hours and cost to the plan. The same command goes on where an interrupted one stopped. PYTHON
# names another Python.
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/gpt2_124m.yaml python=${PYTHON:-python}
gpus=8 tokens_per_s=0 price=0 plan=''
while (($#)); do
    case $1 in
        --gpus | --tokens_per_s | --price) printf -v "${1#--}" %s "${2:?$1 needs a value}"; shift 2 ;;
        --plan) plan=1; shift ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit ;;
        --) shift; break ;;
        *) echo "error: unknown option $1; -- precedes those of train_gpt2.py" >&2; exit 2 ;;
    esac
done

"$python" - "$config" "$gpus" "$tokens_per_s" "$price" <<'EOP'
import sys

import torch

from gpt2.cli import read_yaml, run_script
from gpt2.config import TrainConfig
from gpt2.model import GPT


def plan(path, gpus, tokens_per_s, price):
    config = TrainConfig(**read_yaml(TrainConfig, path))
    gpus, tokens_per_s, price = int(gpus), float(tokens_per_s), float(price)
    if gpus < 1:
        raise ValueError(f"gpus must be above 0, got {gpus}")
    with torch.device("meta"):
        model = GPT(config.model_config(), "torch", "meta")
    length = config.block_size or model.config.block_size
    micro = f"{config.grad_accum_steps(length, gpus)} micro steps x {config.micro_batch_size}"
    tokens, flops = config.max_steps * config.tokens_per_step, model.flops_per_token()
    print(f"tokens    {tokens:,} = {config.max_steps:,} steps x {config.tokens_per_step:,}")
    print(f"step      {gpus} GPUs x {micro} x {length}")
    print(f"FLOPs     {tokens * flops:.3e} = tokens x {flops:,} (6 N + 12 L C T)")
    if tokens_per_s:  # of steps alone, n GPUs n times as fast as one
        hours = tokens / tokens_per_s / 3600
        print(f"hours     {hours / gpus:.2f} on {gpus} GPUs, {hours:.1f} GPU hours: a projection")
        if price:
            print(f"cost      {hours * price:,.2f} at {price:g} a GPU hour: a projection")


run_script(lambda: plan(*sys.argv[1:]))
EOP
[[ -n $plan ]] && exit

[[ -e data/fineweb10B/manifest.json ]] || "$python" scripts/prepare_data.py fineweb10B
run() { "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" "$@"; }
run scripts/train_gpt2.py "$config" --resume auto "$@"
run scripts/evaluate.py runs/gpt2_124m --tasks hellaswag wikitext2 lambada val
