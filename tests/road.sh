#!/usr/bin/env bash
# A whole road, from text to a model that takes orders, with the commands that the README tells:
#
#     bash tests/road.sh poems        Chinese poems (data/poems.py says how to get them) -> out/poems
#
# Each stage prints its figures; the end is a table of all, and a page with the poems of each stage.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

run() {                             # say a command and run it; a run of training keeps its lines in its folder
    printf '\n$ python %s\n' "$*"
    "$python" "$@"
}

samples() {                         # samples RUN TEXT...: what a run writes, for the judge and the page
    local run=$1
    shift
    printf '\n$ python sample.py --out_dir=%s %s > %s/samples.txt\n' "$run" "$*" "$run"
    "$python" sample.py --out_dir="$run" "$@" > "$run/samples.txt"
}

poems() {
    local out=out/poems
    [ -f data/raw/poems_orders.txt ] || run data/poems.py
    run train_tokenizer.py --input=data/raw/poems.jsonl --split_han --out_dir=$out/tokenizer
    run pretrain.py --dataset=poems --tokenizer=$out/tokenizer --prompt=《 --max_iters=480 --eval_interval=240 \
        --out_dir=$out/1-pretrain
    samples $out/1-pretrain --start=《 --num_samples=200 --max_new_tokens=100
    run sft.py --init_from=$out/1-pretrain --dataset=poems_sft --max_iters=320 --eval_interval=160 \
        --report_size=0 --out_dir=$out/2-sft
}
