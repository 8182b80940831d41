#!/usr/bin/env bash
# Runs the checks and, beside them, every test. What the checks print comes first, then what the tests print, so that
# their summary is the last line. Fails when either fails.
set -uo pipefail
cd "$(dirname "$0")/.."
# Hundreds of processes import the same modules, so each is compiled once, whatever the caller's environment says.
unset PYTHONDONTWRITEBYTECODE
log=$(mktemp)
HYPOTHESIS_PROFILE=${HYPOTHESIS_PROFILE:-ci} "${VENV:-.venv}"/bin/python -m pytest -n "${TEST_PROCESSES:-5}" "$@" >"$log" 2>&1 &
tests=$!
trap 'kill $tests 2>/dev/null; rm -f "$log"' EXIT
trap 'exit 130' INT TERM
nice make --no-print-directory lint
checked=$?
[ $checked -eq 0 ] || echo "make lint failed: see above; the tests go on" >&2
tail -n +1 -f -s 0.2 --pid=$tests "$log"
wait $tests
tested=$?
exit $((tested ? tested : checked))
