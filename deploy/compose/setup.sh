#!/bin/sh
# Makes .env and the secrets, once; what is there already stays as it is.
set -eu
cd "$(dirname "$0")"
[ -f .env ] || cp .env.example .env
# The folder is closed to other users of this machine; its files are open to the users of the containers.
mkdir -p -m 700 secrets
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
[ -f secrets/token ] || random >secrets/token
if [ ! -f secrets/valkey.conf ]; then
  password=$(random)
  echo "requirepass $password" >secrets/valkey.conf
  printf 'redis://:%s@valkey:6379/0' "$password" >secrets/redis_url
fi
[ -f secrets/grafana_password ] || random >secrets/grafana_password
chmod 444 secrets/*
