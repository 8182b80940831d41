#!/usr/bin/env bash
# Runs what only a GPU can show, with a line for each check: in at most five minutes, ten where there are several GPUs.
# Exit status: 0 when none failed, 1 when one did or time was up, 2 when there is no GPU and nothing was checked.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${VENV:-.venv}
python=$environment/bin/python
if ! { nvidia-smi -L && "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; } 2>/dev/null; then
  echo "gpu-check: nothing was checked: PyTorch of $environment sees no GPU; it needs the driver and CUDA's builds" >&2
  exit 2
fi
limit=300
[ "$(nvidia-smi -L | wc -l)" -lt 2 ] || limit=600
status=0
timeout --signal=INT --kill-after=20 $limit "$python" -m pytest -v -m gpu --tb=short -o addopts=--strict-markers tests/gpu || status=$?
[ $status -ne 124 ] || echo "gpu-check: not done after $limit seconds" >&2
exit $((status ? 1 : 0))
