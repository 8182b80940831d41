#!/usr/bin/env bash
# Regenerates the gRPC stubs under perigee/ (or under the folder given) from protos/, and the OpenAPI documents.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
bin=$(realpath "${VENV:-.venv}")/bin
export PATH="$bin:$PATH"
find protos -name '*.proto' -print0 | sort -z | xargs -0 "$bin/python" -m grpc_tools.protoc -Iprotos \
  --python_out="$out" --mypy_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out"
# The stubs in a folder of their own are for comparison; the documents describe those of the repository.
if [ "$out" = . ]; then "$bin/python" -m tools.openapi; fi
