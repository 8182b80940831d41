#!/usr/bin/env bash
# Builds images, all of them unless some are named, one after the other, and prints their sizes:
#   deploy/images/build.sh [control] [reward] [trainer] [rollout] [sandbox] [sandbox-full]
# ENGINE, PREFIX, TAG, ACCELERATOR (cpu or cuda) and CA_FILE (roots of a proxy that opens TLS) in the environment;
# UV_EXTRA_INDEX_URL, UV_INDEX_STRATEGY and UV_FIND_LINKS reach uv. A folder of wheels needs podman, which mounts it.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${ENGINE:=$(command -v docker || command -v podman)}" "${PREFIX:=localhost/perigee}" "${TAG:=latest}" "${ACCELERATOR:=cpu}"
[ $# -gt 0 ] || set -- control reward trainer rollout sandbox sandbox-full
options=(--build-arg "ACCELERATOR=$ACCELERATOR")
for name in UV_EXTRA_INDEX_URL UV_INDEX_STRATEGY UV_FIND_LINKS BASE; do
  [ -z "${!name:-}" ] || options+=(--build-arg "$name=${!name}")
done
[ -z "${CA_FILE:-}" ] || options+=(--secret "id=ca,src=$CA_FILE")
[ ! -d "${UV_FIND_LINKS:-}" ] || options+=(--volume "$UV_FIND_LINKS:$UV_FIND_LINKS:ro")
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' perigee/__init__.py)
for target in "$@"; do
  started=$SECONDS
  "$ENGINE" build -f deploy/images/Dockerfile --target "$target" -t "$PREFIX/$target:$TAG" "${options[@]}" \
    --label "org.opencontainers.image.revision=$revision" --label "org.opencontainers.image.version=$version" .
  size=$("$ENGINE" image inspect --format '{{.Size}}' "$PREFIX/$target:$TAG")
  echo "$PREFIX/$target:$TAG $((size / 1000000)) MB, built in $((SECONDS - started)) s"
done
