#!/bin/sh
# Installs what the named extras need into /opt/perigee, at the versions of the lock.
# install.sh cpu|cuda EXTRA...
set -eu
accelerator=$1
shift
# Roots of a proxy that opens TLS, where there is one.
[ ! -f /run/secrets/ca ] || export SSL_CERT_FILE=/run/secrets/ca
if [ "$accelerator" = cuda ]; then
  lock=deploy/images/constraints-cuda.txt
  grep -v triton tools/unneeded.txt >/tmp/unneeded.txt
else
  lock=constraints.txt
  cp tools/unneeded.txt /tmp/unneeded.txt
fi
extras=$(printf -- '--extra %s ' "$@")
# shellcheck disable=SC2086
uv pip compile --quiet --python /opt/perigee/bin/python -c $lock --excludes /tmp/unneeded.txt --no-header --no-annotate \
  $extras pyproject.toml services/pyproject.toml >/tmp/packages.txt
uv pip install --quiet --python /opt/perigee/bin/python --no-deps --compile-bytecode -r /tmp/packages.txt
