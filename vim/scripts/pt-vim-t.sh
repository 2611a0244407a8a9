#!/usr/bin/env bash
# Train Vim-Tiny on ImageNet-1K from scratch, 224 x 224 pixels, as its published weights were.
set -euo pipefail

usage="[NGPUS=8] [DRY_RUN=1] $0 DATA OUTPUT [further flags of main.py]"
case ${1-} in -h | --help) echo "usage: $usage" && exit ;; esac
if [ $# -lt 2 ]; then
    echo "usage: $usage" >&2
    exit 2
fi
data=$1 output=$2
shift 2

exec bash "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh" \
    --model vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --data-path "$data" --output_dir "$output" --num_workers 25 --no_amp \
    --batch-size 128 --epochs 300 --lr 5e-4 --min-lr 1e-5 --warmup-lr 1e-6 --drop-path 0.0 --weight-decay 0.1 \
    "$@"
