#!/usr/bin/env bash
# What the recipes beside this share: launch.sh FLAGS... trains with main.py on the GPUs of this machine.
#
#   NGPUS=N     one process for each of N GPUs (default: 8, as the published weights were trained)
#   DRY_RUN=1   print the command instead of running it
set -euo pipefail

vim=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# --standalone: a free port of its own, so that two runs on one machine do not meet.
command=(torchrun --nproc_per_node="${NGPUS:-8}" --standalone "$vim/main.py" "$@")

if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
if ! command -v torchrun >/dev/null; then
    echo "error: torchrun is not on the path: activate the environment first, as in '. .venv/bin/activate'." >&2
    exit 2
fi
exec "${command[@]}"
