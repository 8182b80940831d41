#!/bin/sh
# Writes what an image holds, at the versions of the lock: lock.sh IMAGE EXTRA... writes /locks/IMAGE.txt.
set -eu
image=$1
shift
# Roots of a proxy that opens TLS, where there is one.
[ ! -f /run/secrets/ca ] || export SSL_CERT_FILE=/run/secrets/ca
if [ "$ACCELERATOR" = cuda ]; then
  lock=deploy/images/constraints-cuda.txt
  grep -v triton tools/unneeded.txt >/tmp/unneeded.txt
else
  lock=constraints.txt
  cp tools/unneeded.txt /tmp/unneeded.txt
fi
mkdir -p /locks
extras=$(printf -- '--extra %s ' "$@")
# shellcheck disable=SC2086
uv pip compile --quiet --python /usr/bin/python3 -c $lock --excludes /tmp/unneeded.txt --no-header --no-annotate \
  --no-emit-find-links $extras pyproject.toml services/pyproject.toml >"/locks/$image.txt"
