#!/usr/bin/env bash
# A whole road, from text to a model that takes orders, with the commands that the README tells:
#
#     bash tests/road.sh              each stage on its default data -> out, and a table, out/road.md
#     bash tests/road.sh poems        Chinese poems (data/poems.py says how to get them) -> out/poems
#
# STEPS=4 bash tests/road.sh takes four steps a stage: a trial; in one of poems, which writes few and no good ones,
# real poems stand in for the model's own. SEED=2 OUT=out/again bash tests/road.sh poems repeats it with other random
# numbers. After each of its stages stand the marks of what it writes, beside those of real poems; the end is a page.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() {
    echo "road.sh: $*" >&2
    exit 2
}

run() {                             # say a command and run it
    printf '\n$ python %s\n' "$*" >&2
    python "$@"
}

train() {                           # run a stage, in a trial for STEPS steps
    local trial=()
    if [ -n "${STEPS:-}" ]; then trial=(--epochs=0 --max_iters="$STEPS" --eval_interval="$STEPS"); fi
    run "$@" ${trial[@]+"${trial[@]}"}
}

stage() {                           # stage WORDS KEY RUN SCRIPT OPTIONS...: train, and note its KEY before and after
    local began=$SECONDS few=()
    if [ -n "${STEPS:-}" ] && grep -q ^report_size "$4"; then few=(--report_size=4); fi
    train "${@:4}" ${few[@]+"${few[@]}"} | tee out/stage.log
    python - "$@" $((SECONDS - began)) >> out/road.part <<'PYTHON'
import json, shlex, sys
words, key, run, *command, seconds = sys.argv[1:]
found = [row[key] for row in map(json.loads, open(f'{run}/metrics.jsonl')) if key in row]
marks = ' held-out answers: ', 'test  accuracy', 'naive Bayes', ' well-formed '
said = [line.strip() for line in open('out/stage.log') if any(mark in line for mark in marks)]
print(f"| `python {shlex.join(command)}` | {int(seconds) // 60}:{int(seconds) % 60:02} | {words} | {found[0]:.3f} "
      f"| {found[-1]:.3f} | {'; '.join(said)} |")
PYTHON
}

default() {
    mkdir -p out
    trap 'rm -f out/stage.log out/road.part' EXIT
    printf '%s\n' "| command | time | figure | before | after | answers |" "|---|---|---|---|---|---|" > out/road.part
    stage "bits per byte" val_bits_per_byte out/pretrain pretrain.py
    run sample.py --start="def is_" --max_new_tokens=60
    stage "accuracy on val" val_accuracy out/finetune_cls finetune_cls.py
    stage "loss of answers" val_loss out/sft sft.py
    stage "pairs told apart" val_accuracy out/dpo dpo.py
    stage "loss of answers" val_loss out/lora lora.py
    stage "loss of answers" val_loss out/distill distill.py
    stage "loss of answers" val_loss out/reason distill.py config/reason.py
    echo "Which word comes next?" | run sample.py --out_dir=out/dpo --chat
    mv out/road.part out/road.md
    printf '\n' && cat out/road.md
}

write() {                           # write RUN OPTIONS...: what a run writes, and its marks
    printf '\n$ python sample.py --out_dir=%s %s > %s/samples.txt\n' "$1" "${*:2}" "$1"
    python sample.py --out_dir="$1" "${@:2}" > "$1/samples.txt" 2> "$1/samples.log" ||
        { cat "$1/samples.log" >&2; exit 1; }           # else it holds a line of speed for each text
    run data/poems.py --judge="$1/samples.txt"
}

obey() {                            # obey RUN poems|ci N: the same held-out orders for each run, N poems to each
    head -n "$orders" data/raw/"$2"_orders.txt | write "$1" --chat --lines --num_samples="$3" --max_new_tokens=100
}

era() {                             # era RUN OPTIONS...: Tang or Song
    train finetune_cls.py --init_from="$out/pretrain" --dataset=poems_cls --block_size=128 --learning_rate=8e-3 \
        --eval_interval=50 --out_dir="$out/$1" "${@:2}"
}

ci() {                              # ci STAGE OPTIONS...
    train "$1.py" --init_from="$out/sft" --dataset=ci_sft --max_iters=400 --batch_size=8 --eval_interval=400 \
        --report_size=0 --out_dir="$out/ci_$1" "${@:2}"
    obey "$out/ci_$1" ci 2
}

student() {                         # student NAME TEACHER DATASET
    train distill.py --teacher="$2" --dataset="$3" --max_iters=120 --batch_size=16 --report_size=0 --out_dir="$out/$1"
    obey "$out/$1" poems 2
}

poems() {
    out=${OUT:-out/poems} seed=${SEED:-1337} orders=200 own=poems_own taught=poems_taught
    if [ -n "${STEPS:-}" ]; then orders=4 own=poems_dpo taught=poems_sft; fi
    [ -f data/raw/poems_practice.txt ] || run data/poems.py
    run train_tokenizer.py --input=data/raw/poems.jsonl --split_han --out_dir="$out/tokenizer"
    rm -rf data/poems data/poems_cls data/poems_sft data/ci_sft     # each stage prepares its own, by this tokenizer

    train pretrain.py --dataset=poems --tokenizer="$out/tokenizer" --prompt=《 --max_iters=480 --eval_interval=480 \
        --seed="$seed" --out_dir="$out/pretrain"
    obey "$out/pretrain" poems 1
    printf '《\n%.0s' $(seq $((2 * orders))) | write "$out/pretrain" --start=- --lines --max_new_tokens=100
    era cls
    era cls_random --random_weights

    train sft.py --init_from="$out/pretrain" --dataset=poems_sft --max_iters=320 --eval_interval=320 \
        --report_size=0 --seed="$seed" --out_dir="$out/sft"
    obey "$out/sft" poems 8

    if [ -z "${STEPS:-}" ]; then
        run sample.py --out_dir="$out/sft" --chat --lines --num_samples=8 --max_new_tokens=100 --temperature=0.8 \
            < data/raw/poems_practice.txt > "$out/practice.txt"
        run data/poems.py --pairs="$out/practice.txt"
    fi
    run prepare.py --input="data/raw/$own.jsonl" --dataset=poems_own --tokenizer="$out/tokenizer"
    train dpo.py --init_from="$out/sft" --dataset=poems_own --block_size=128 --batch_size=16 --epochs=2 \
        --learning_rate=1e-4 --seed="$seed" --out_dir="$out/dpo"
    obey "$out/dpo" poems 8

    ci lora --rank=32 --alpha=64 --learning_rate=1e-2
    ci sft

    run prepare.py --input="data/raw/$taught.jsonl" --dataset=poems_taught --tokenizer="$out/tokenizer"
    student student "$out/sft" poems_sft
    student alone '' poems_sft
    student taught '' poems_taught
    run data/poems_page.py "$out"
}

[[ ${STEPS:-1} =~ ^[1-9][0-9]{0,8}$ ]] || refuse "STEPS=$STEPS: give a whole number from 1 up"
[[ ${SEED:-1} =~ ^(0|[1-9][0-9]{0,17})$ ]] || refuse "SEED=$SEED: give a whole number from 0 up"
case "$*" in
    "") [ -z "${SEED:-}${OUT:-}" ] || refuse "SEED and OUT are for poems, as in SEED=2 OUT=out/again bash tests/road.sh poems"
        default ;;
    poems) poems ;;
    *) refuse "$*: give nothing, or poems" ;;
esac
