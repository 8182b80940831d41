#!/usr/bin/env bash
# Installs the Debian packages that the services use, or says in one line which are missing.
set -euo pipefail
packages=(crun libibverbs1)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
else
  echo "setup: not installed: ${missing[*]}; install them with your package manager (crun isolates sandboxed code, libibverbs1 serves weight transfer)" >&2
fi
