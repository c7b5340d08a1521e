#!/usr/bin/env bash
# Times K-Net on one GPU in eight minutes: benchmarks/gpu.sh [flags of gpu.py]. Wheels that the machine
# lacks are installed from benchmarks/wheels/, where there is one. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -d benchmarks/wheels ]; then
    "$python" -m pip install --quiet --no-index --find-links benchmarks/wheels --editable '.' 'jax[cuda12]'
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "no NVIDIA GPU"
# Memory is taken as it is needed, so that its peak can be read.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
"$python" benchmarks/gpu.py --output benchmarks/results/gpu.json "$@"
