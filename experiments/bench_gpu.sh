#!/usr/bin/env bash
# What README's planned figures are on a real card: LoRA of rank 16 on SDXL at 1024 px, beside the same under autocast with float32
# factors, as diffusers' training scripts run it; with and without gradient checkpointing; on an int8 base; DoRA; an average.
#     bash experiments/bench_gpu.sh SDXL_FOLDER_OR_ID PHOTOS > bench.txt
set -euo pipefail
model=$1 photos=$2
bench() { echo "== $*"; python -m dreambooth_lab.tools.bench --steps 20 "$@" model=sdxl model.pretrained="$model" \
    dataset=folder dataset.path="$photos" "dataset.instance_prompt=a photo of ohwx dog" adapter.rank=16 || echo "(failed)"; }
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
for rows in 1 4 8; do
    bench --against-autocast dataset.batch_size=$rows model.gradient_checkpointing=false
    bench --against-autocast dataset.batch_size=$rows model.gradient_checkpointing=true
    bench dataset.batch_size=$rows model.gradient_checkpointing=true quant=int8
done
bench dataset.batch_size=1 adapter=dora
for rows in 1 4; do
    python -m dreambooth_lab.tools.bench --plan model=sdxl model.pretrained="$model" adapter.rank=16 dataset.batch_size=$rows
done
