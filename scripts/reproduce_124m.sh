#!/usr/bin/env bash
# GPT-2 124M on 10B tokens of FineWeb: prepares, trains, evaluates. For 8 GPUs, or --gpus.
#
#   scripts/reproduce_124m.sh --plan                           # tokens, steps, FLOPs; trains nothing
#   scripts/reproduce_124m.sh --plan --tokens_per_s 500000 --price 3   # and hours and cost
#   scripts/reproduce_124m.sh                                  # the plan, then the run
#   scripts/reproduce_124m.sh --gpus 1 -- --micro_batch_size 32        # after --: for train_gpt2.py
#
# --tokens_per_s  of one GPU; default: what benchmarks/train_step.py measured here, if it did
# --price         of a GPU hour, in whatever currency
#
# The same command goes on where an interrupted one stopped. PYTHON names another Python.
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/gpt2_124m.yaml
python=${PYTHON:-python}
gpus=8 tokens_per_s='' price='' plan=''

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

while (($#)); do
    case $1 in
        --gpus | --tokens_per_s | --price)
            (($# > 1)) || { echo "error: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --plan) plan=1; shift ;;
        -h | --help) usage; exit ;;
        --) shift; break ;;
        *) echo "error: unknown option $1; --help lists them, -- precedes those of train_gpt2.py" >&2
           exit 2 ;;
    esac
done

"$python" benchmarks/projection.py "$config" --gpus "$gpus" \
    ${tokens_per_s:+--tokens_per_s "$tokens_per_s"} ${price:+--price "$price"}
[[ -n $plan ]] && exit

[[ -e data/fineweb10B/manifest.json ]] || "$python" scripts/prepare_data.py fineweb10B
run() { "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" "$@"; }
run scripts/train_gpt2.py "$config" --resume auto "$@"
run scripts/evaluate.py runs/gpt2_124m --tasks hellaswag wikitext2 lambada val
