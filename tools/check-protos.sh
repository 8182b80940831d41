#!/usr/bin/env bash
# Checks the style of the protos, and that nothing in them breaks callers of the last release (protos/baseline.binpb).
set -euo pipefail
cd "$(dirname "$0")/.."
buf=${VENV:-.venv}/bin/buf
"$buf" lint
"$buf" breaking --against protos/baseline.binpb
