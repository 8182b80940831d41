#!/bin/sh
# Installs the packages of /tmp/packages.txt, and no others, into /opt/perigee.
set -eu
# Roots of a proxy that opens TLS, where there is one.
[ ! -f /run/secrets/ca ] || export SSL_CERT_FILE=/run/secrets/ca
uv venv --quiet --python /usr/bin/python3 /opt/perigee
uv pip install --quiet --python /opt/perigee/bin/python --no-deps --compile-bytecode -r /tmp/packages.txt
