#!/usr/bin/env bash
# Scores answers and judges a program over HTTP. Addresses are those of the services' HTTP ports.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A file, since every user of the machine can read a command line.
printf 'Authorization: Bearer %s\n' "$PERIGEE_TOKEN" >"$work/headers"

# call URL: posts standard input and prints the answer. 429 and 503 are tried again after the time in Retry-After, which
# curl honours; any other error prints its body, {"error": {...}}, and ends the script.
call() {
  curl --silent --show-error --fail-with-body --retry 8 --retry-connrefused --max-time 300 --cacert "$PERIGEE_CA_FILE" \
    --header "@$work/headers" --json @- --output "$work/answer" "$1" || { cat "$work/answer" >&2; return 1; }
  cat "$work/answer"
}

call "https://$PERIGEE_REWARD_HTTP/v1/score/collected" <<'END'
{"items": [
  {"id": "a", "response": "1/2 + 1/3 is \\boxed{5/6}", "math": {"reference": "5/6"}},
  {"id": "b", "response": "1/2 + 1/3 is \\boxed{2/5}", "math": {"reference": "5/6"}}]}
END
echo
call "https://$PERIGEE_SANDBOX_HTTP/v1/judge" <<'END'
{"language": "python", "source": "n = int(input())\nprint(n * n)",
 "tests": [{"stdio": {"stdin": "2", "expected_stdout": "4"}}, {"stdio": {"stdin": "3", "expected_stdout": "9"}}]}
END
echo
