"""Prints the margin of held-out pairs before and after DPO: how far it moved chosen from rejected responses.

    python margin.py BASE TRAINED PAIRS

The margin is beta times the difference, of chosen and rejected, of log pi / log pi_0, with pi_0 the base: 0 before.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BETA = 0.1


@torch.no_grad()
def sum_logprob(model, tokenizer, question: str, response: str) -> float:
    """Returns the log-probability, in nats, of a response and its end."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    asked, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, prompt + response))
    ids_1T = torch.tensor([[*whole, tokenizer.eos_token_id]])
    logprobs_1TV = model(ids_1T).logits[:, len(asked) - 1 : -1].log_softmax(-1)
    return float(logprobs_1TV.gather(-1, ids_1T[:, len(asked) :, None]).sum())


def main() -> None:
    """Reads the command line and prints both margins."""
    parser = argparse.ArgumentParser(description="Prints the margin of pairs before and after DPO.")
    parser.add_argument("base", help="model folder before training")
    parser.add_argument("trained", help="model folder after training")
    parser.add_argument("pairs", type=Path, help="held-out pairs")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    pairs = [json.loads(line) for line in arguments.pairs.read_text(encoding="utf-8").splitlines()]
    gaps: list[list[float]] = []
    for path in (arguments.base, arguments.trained):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        gaps.append(
            [
                sum_logprob(model, tokenizer, pair["prompt"], pair["chosen"])
                - sum_logprob(model, tokenizer, pair["prompt"], pair["rejected"])
                for pair in pairs
            ]
        )
    margins = [BETA * (after - before) for before, after in zip(*gaps, strict=True)]
    error = statistics.stdev(margins) / len(margins) ** 0.5
    right = [statistics.fmean(gap > 0 for gap in each) for each in gaps]
    moved = statistics.fmean(margin > 0 for margin in margins)
    print(f"before: margin 0, {right[0]:.0%} of {len(pairs)} pairs in order")
    print(f"after: margin {statistics.fmean(margins):.3f} (standard error {error:.3f}), {right[1]:.0%} in order")
    print(f"{moved:.0%} of the pairs moved towards the chosen response")


if __name__ == "__main__":
    main()
