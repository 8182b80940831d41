#!/usr/bin/env bash
# Installs the Debian packages that the services use, or says in one line which are missing. A tool that is there already,
# wherever it came from, needs no package.
set -euo pipefail
missing=()
need() { # PACKAGE, then a command or a file that it brings
  command -v "$2" >/dev/null || [ -e "$2" ] || missing+=("$1")
}
need crun crun                            # containers of the sandbox
need libibverbs1 "/usr/lib/$(uname -m)-linux-gnu/libibverbs.so.1" # weight transfer
need gcc gcc                              # C, and the init of the sandbox's boxes
need libc6-dev /usr/include/stdlib.h
need g++ g++                              # C++
need default-jdk-headless javac           # Java
need nodejs node                          # JavaScript
need perl perl
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "setup: not installed: ${missing[*]}; install them with your package manager (crun and gcc isolate sandboxed code, libibverbs1 serves weight transfer, the others are languages of the sandbox)" >&2
fi
