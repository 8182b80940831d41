#!/usr/bin/env bash
# Writes the bill of materials of images, made in the image itself: IMAGE.python.cdx.json, the Python packages with their
# licences in CycloneDX's format, by cyclonedx-bom; IMAGE.debian.tsv, the Debian packages.
#   deploy/images/sbom.sh FOLDER [control] [reward] [trainer] [rollout] [sandbox] [sandbox-full]
# ENGINE, PREFIX, TAG as for build.sh; needs uv.
set -euo pipefail
: "${ENGINE:=$(command -v docker || command -v podman)}" "${PREFIX:=localhost/perigee}" "${TAG:=latest}"
[ $# -gt 0 ] || { sed -n 's/^# \?//p' "$0" | sed -n 1,5p >&2; exit 2; }
out=$1
shift
[ $# -gt 0 ] || set -- control reward trainer rollout sandbox sandbox-full
mkdir -p "$out"
tool=$(mktemp -d)
trap 'rm -rf "$tool"' EXIT
uv pip install --quiet --python-version 3.11 --target "$tool" cyclonedx-bom==7.5.0
chmod -R a+rX "$tool"
for target in "$@"; do
  run=("$ENGINE" run --rm --network none --user 10001:10001 --volume "$tool:/tool:ro" "$PREFIX/$target:$TAG")
  # The tool is out of sight of the interpreter that it lists.
  "${run[@]}" python -c 'import sys; sys.path.insert(0, "/tool"); from cyclonedx_py.__main__ import main; main()' \
    environment --output-reproducible /opt/perigee/bin/python >"$out/$target.python.cdx.json"
  "${run[@]}" dpkg-query -W -f '${Package}\t${Version}\n' >"$out/$target.debian.tsv"
  echo "$out/$target: $(grep -c '"bom-ref"' "$out/$target.python.cdx.json") Python, $(wc -l <"$out/$target.debian.tsv") Debian packages"
done
