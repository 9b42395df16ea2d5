#!/usr/bin/env bash
# What a GPU proves, in one command and at most eight minutes: `bash benchmarks/gpu.sh`. Without a GPU, or with
# `--dry-run`, a rehearsal on the CPU. PYTHON names another interpreter than that of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-.venv/bin/python}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" benchmarks/gpu.py "$@"
