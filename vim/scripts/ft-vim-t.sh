#!/usr/bin/env bash
# Fine-tune Vim-Tiny with patches 8 pixels apart (Vim-Tiny+), from a CHECKPOINT of pt-vim-t.sh.
set -euo pipefail

usage="[NGPUS=8] [DRY_RUN=1] $0 DATA OUTPUT CHECKPOINT [further flags of main.py]"
case ${1-} in -h | --help) echo "usage: $usage" && exit ;; esac
if [ $# -lt 3 ]; then
    echo "usage: $usage" >&2
    exit 2
fi
data=$1 output=$2 checkpoint=$3
shift 3

exec bash "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh" \
    --model vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --data-path "$data" --output_dir "$output" --num_workers 25 --no_amp \
    --batch-size 128 --epochs 30 --lr 5e-6 --min-lr 1e-5 --warmup-lr 1e-5 --drop-path 0.0 --weight-decay 1e-8 \
    --finetune "$checkpoint" --pos-embed-resize upstream \
    "$@"
