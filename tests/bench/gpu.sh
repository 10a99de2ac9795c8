#!/usr/bin/env bash
# Measure everything that needs a GPU, the most valuable first, and write it to a folder:
#
#     bash tests/bench/gpu.sh OUT [MINUTES]
#
# Needs no network: the package with its `dev` extra must be installed. Stops before MINUTES (25 by default) are over; a
# part that fails or runs out of time is noted in OUT/summary.txt, and the next one is begun.
set -uo pipefail
out=${1:?usage: gpu.sh OUT [MINUTES]}
minutes=${2:-25}
cd "$(dirname "$0")/../.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD NO_ALBUMENTATIONS_UPDATE=1 HF_HUB_OFFLINE=1
ends=$(($(date +%s) + minutes * 60))

part() { # NAME SECONDS COMMAND...
    local name=$1 most=$2 left=$((ends - $(date +%s)))
    shift 2
    if ((left < 20)); then
        echo "$name: no time left" | tee -a "$out/summary.txt"
        return
    fi
    echo "== $name"
    local began=$SECONDS
    timeout $((most < left ? most : left)) "$@" >"$out/$name.txt" 2>&1
    echo "$name: exit code $? after $((SECONDS - began)) s" | tee -a "$out/summary.txt"
    tail -n 15 "$out/$name.txt"
}

python -c 'import torch; assert torch.cuda.is_available(), "torch finds no CUDA device"' || exit 7
{ nvidia-smi; python -m rtdetr_cli doctor; } >"$out/machine.txt" 2>&1

part tests 420 python -m pytest -q -m gpu -p no:cacheprovider
part end-to-end 300 bash -ec '
    rm -rf "$0/run" && mkdir -p "$0/run" && cd "$0/run"
    python - <<PY
from rtdetr_cli.datasets.generate import generate_dataset
from pathlib import Path
generate_dataset(Path("data"), train=64, val=16, imgsz=(480, 640), seed=0)
PY
    rtdetr="python -m rtdetr_cli"
    $rtdetr train data --preset r18 --weights none --epochs 2 --effective-batch 16 --name gpu
    $rtdetr eval runs/gpu
    $rtdetr predict data/images --weights runs/gpu --no-save
    $rtdetr export runs/gpu --onnx
' "$out"
part steps 240 python -m tests.bench.speed --device cuda --imgsz 640 --batch 16 --only step-default step predict-torch \
    --json "$out/steps.json"
part idle 300 python -m tests.bench.speed.gpu --json "$out/idle.json"
cat "$out/summary.txt"
