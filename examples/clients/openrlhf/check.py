"""Shows before a run that a remote reward URL can judge a data set, with calls as OpenRLHF makes them.

    python check.py --url 'http://HOST:PORT/v1/compat/openrlhf?verifier=math' --data train.jsonl [--label-key answer]

Each label is given as the answer of a response and has to have the reward 1. Labels that are a verifier's fields are
left out: what answers them is not known. The exit code is 1 when some label does not have the reward 1.
"""

import argparse
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

CALLS_AT_ONCE = 8


def read_lines(path: Path, input_key: str, label_key: str) -> list[tuple[str, str]]:
    """Prompts and labels of JSON Lines."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = [(str(line[input_key]), str(line[label_key])) for line in lines]
    return [(prompt, label) for prompt, label in pairs if not label.lstrip().startswith("{")]


def fetch_reward(url: str, prompt: str, label: str) -> float | str:
    """The reward of a response that gives the label as the answer, or why there is none."""
    options = parse_qs(urlsplit(url).query)
    marker, end = options.get("answer_marker", [""])[0], options.get("end", [""])[0]
    query = f"{prompt}The answer is {marker} {label}{end}"
    body = json.dumps({"query": [query], "prompts": [prompt], "labels": [label]}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=180) as response:
            return float(json.load(response)["rewards"][0])
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()}"


def main() -> None:
    """Reads the command line, and names the labels that do not have the reward 1."""
    parser = argparse.ArgumentParser(description="Whether a remote reward URL can judge a data set.")
    parser.add_argument("--url", required=True, help="what --reward.remote_url will be")
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines")
    parser.add_argument("--input-key", default="input")
    parser.add_argument("--label-key", default="answer")
    arguments = parser.parse_args()
    pairs = read_lines(arguments.data, arguments.input_key, arguments.label_key)
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        rewards = list(pool.map(lambda pair: fetch_reward(arguments.url, *pair), pairs))
    missed = [(*pair, reward) for pair, reward in zip(pairs, rewards, strict=True) if reward != 1.0]
    for prompt, label, reward in missed:
        print(f"{prompt!r}: {label!r}: {reward}")
    print(f"{len(pairs) - len(missed)} of {len(pairs)} labels have the reward 1")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
