#!/usr/bin/env bash
# A whole road, from text to a model that takes orders, with the commands that the README tells:
#
#     bash tests/road.sh poems        Chinese poems (data/poems.py says how to get them) -> out/poems
#
# After each stage stand the marks of what it writes, beside those of real poems; the end is a page of poems.
# SEED=2 OUT=out/again bash tests/road.sh poems repeats it with other random numbers.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/poems} seed=${SEED:-1337}

run() {                             # say a command and run it
    printf '\n$ python %s\n' "$*" >&2
    python "$@"
}

write() {                           # write RUN OPTIONS...: what a run writes, and its marks
    printf '\n$ python sample.py --out_dir=%s %s > %s/samples.txt\n' "$1" "${*:2}" "$1"
    python sample.py --out_dir="$1" "${@:2}" > "$1/samples.txt" 2> "$1/samples.log" ||
        { cat "$1/samples.log" >&2; exit 1; }           # else it holds a line of speed for each text
    run data/poems.py --judge="$1/samples.txt"
}

obey() {                            # obey RUN: the same held-out orders for each run, two poems to each
    head -n 100 data/raw/poems_orders.txt | write "$1" --chat --num_samples=2 --max_new_tokens=100
}

poems() {
    [ -f data/raw/poems_practice.txt ] || run data/poems.py
    run train_tokenizer.py --input=data/raw/poems.jsonl --split_han --out_dir="$out/tokenizer"

    run pretrain.py --dataset=poems --tokenizer="$out/tokenizer" --prompt=《 --max_iters=480 --eval_interval=240 \
        --seed="$seed" --out_dir="$out/pretrain"
    obey "$out/pretrain"
    write "$out/pretrain" --start=《 --num_samples=200 --max_new_tokens=100
    run finetune_cls.py --init_from="$out/pretrain" --dataset=poems_cls --block_size=128 --out_dir="$out/cls"
    run finetune_cls.py --init_from="$out/pretrain" --dataset=poems_cls --block_size=128 --out_dir="$out/cls_random" \
        --random_weights

    run sft.py --init_from="$out/pretrain" --dataset=poems_sft --max_iters=320 --eval_interval=160 \
        --report_size=0 --seed="$seed" --out_dir="$out/sft"
    obey "$out/sft"

    run sample.py --out_dir="$out/sft" --chat --num_samples=8 --max_new_tokens=100 --temperature=0.8 \
        < data/raw/poems_practice.txt > "$out/practice.txt"
    run data/poems.py --pairs="$out/practice.txt"
    run prepare.py --input=data/raw/poems_own.jsonl --tokenizer="$out/tokenizer"
    run dpo.py --init_from="$out/sft" --dataset=poems_own --block_size=128 --batch_size=16 --epochs=2 \
        --learning_rate=1e-4 --seed="$seed" --out_dir="$out/dpo"
    obey "$out/dpo"

    run lora.py --init_from="$out/sft" --dataset=ci_sft --report_size=100 --max_new_tokens=100 --out_dir="$out/lora"
    run data/poems.py --judge="$out/lora/report.json"
    run sft.py --init_from="$out/sft" --dataset=ci_sft --max_iters=150 --report_size=100 --max_new_tokens=100 \
        --out_dir="$out/ci"
    run data/poems.py --judge="$out/ci/report.json"

    run prepare.py --input=data/raw/poems_taught.jsonl --tokenizer="$out/tokenizer"
    for how in "student $out/sft poems_sft" "alone '' poems_sft" "taught '' poems_taught"; do
        set -- $how
        run distill.py --teacher="${2//\'/}" --dataset="$3" --max_iters=120 --batch_size=16 --report_size=0 \
            --out_dir="$out/$1"
        obey "$out/$1"
    done
    run data/poems_page.py "$out"
}

case "$*" in
    poems) poems ;;
    *) echo "road.sh: give the road: poems" >&2; exit 2 ;;
esac
