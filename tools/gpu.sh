#!/usr/bin/env bash
# What can be measured on a GPU only, in ten minutes at most. It needs requirements-dev.txt and no network.
#
#     bash tools/gpu.sh FOLDER
#
# FOLDER, a new one, gets all that is printed (all.txt) and the times as JSON. More words are options of tools.bench.
set -u
out=${1:?give a folder for the results}
shift
mkdir -p "$out"

within() {  # SECONDS COMMAND: run it, and say how it ended if not well
    echo "== $*"
    timeout "$@" || echo "== exit code $? (124: out of time)"
}

{
    # Steps beside transformers and peft, and peak memory.
    within 150 python -m tools.bench --batch-size 32 128 --json "$out/bench.json" "$@"
    within 240 python -m tools.bench --compile --rows lora houlsby_par full_ft --json "$out/compiled.json" "$@"

    # One fold of a miniature of ESC-50, made here, from sounds to an answer.
    PYTHONPATH=tests python -c "from pathlib import Path; from helpers import make_esc50
make_esc50(Path('$out/ESC-50'), takes=4, seconds=5)"
    within 90 python train.py --dataset esc50 --data-dir "$out/ESC-50" --weights random:base --folds 1 --epochs 3 \
        --out "$out/runs" --cache-dir "$out/cache"
    within 30 python -m tools.predict "$out/runs/esc50/houlsby_par/seed0" "$out"/ESC-50/audio/1-*A-0.wav

    within 80 python -m tools.check --cache-dir "$out/cache"
} 2>&1 | tee "$out/all.txt"
