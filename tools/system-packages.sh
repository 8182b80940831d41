#!/usr/bin/env bash
# Installs the Debian packages that the services use, or says in one line which are missing. A tool that is there already,
# wherever it came from, needs no package.
set -euo pipefail
missing=()
need() { # PACKAGE, then a command or a file that it brings
  command -v "$2" >/dev/null || [ -e "$2" ] || missing+=("$1")
}
need crun crun                            # containers of the sandbox
libraries=/usr/lib/$(uname -m)-linux-gnu
need libibverbs1 "$libraries/libibverbs.so.1" # weight transfer
need libcurl4 "$libraries/libcurl.so.4"       # weight transfer
need libnuma1 "$libraries/libnuma.so.1"       # weight transfer, vLLM
need libgomp1 "$libraries/libgomp.so.1"       # vLLM
need gcc gcc                              # C, and the init of the sandbox's boxes
need libc6-dev /usr/include/stdlib.h
need g++ g++                              # C++
need default-jdk-headless javac           # Java
need nodejs node                          # JavaScript
need perl perl
# Where systemd runs, Debian's packages would start servers.
[ -d /run/systemd/system ] || need prometheus promtool # tests of alerts and dashboards
[ -d /run/systemd/system ] || need etcd-server etcd     # tests of the directory in etcd
need iproute2 ip                          # tests across network namespaces
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "setup: not installed: ${missing[*]}; install them with your package manager (crun and gcc isolate sandboxed code, libibverbs1, libcurl4 and libnuma1 serve weight transfer and vLLM, prometheus tests alerts and dashboards, etcd-server the directory in etcd, iproute2 networks, the others are languages of the sandbox)" >&2
fi
