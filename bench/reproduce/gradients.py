"""Measures how sure the direction of an update is with and without negative gradients, on responses of a model.

    python -m bench.reproduce.gradients MODEL PROMPTS [--problems 24] [--seed 0]

ReST and mirror descent estimate the same gradient from a group of K responses: (1/K) sum_j (r_j - b) grad log pi(y_j),
with b = 0 and with b = the mean reward. Signal is the squared norm of an estimate's mean over groups, noise the mean
squared distance of a group's estimate from it; the direction of n groups is at a cosine of about
1 / sqrt(1 + noise / (n * signal)) from the true one. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from perigee.files import read_lines

GROUP_SIZE, MAX_TOKENS = 8, 112


@dataclass(frozen=True)
class Sample:
    """A response of a group: its reward, and the gradient of log pi of all its tokens by the W weights."""

    reward: float
    gradient_W: torch.Tensor

    @property
    def squared_norm(self) -> float:
        """Squared norm of its gradient."""
        return float((self.gradient_W**2).sum())


class Policy:
    """A model of a Hugging Face folder that samples at temperature 1."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def sample(self, prompt: str, answer: str) -> Iterator[Sample]:
        """Yields the responses of a group; a response is right when the answer follows its `#`."""
        prompt_T = torch.tensor(self.tokenizer.encode(prompt))
        ids_KT = self.model.generate(
            prompt_T[None], do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=GROUP_SIZE, max_new_tokens=MAX_TOKENS, pad_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        for ids_T in ids_KT:
            response_T = self._until_end(ids_T[len(prompt_T) :])
            text = self.tokenizer.decode(response_T, skip_special_tokens=True)
            yield Sample(float(text.rpartition("#")[2].strip() == answer), self._gradient(prompt_T, response_T))

    def _until_end(self, response_T: torch.Tensor) -> torch.Tensor:
        ends = (response_T == self.tokenizer.eos_token_id).nonzero()
        return response_T[: int(ends[0]) + 1] if len(ends) else response_T

    def _gradient(self, prompt_T: torch.Tensor, response_T: torch.Tensor) -> torch.Tensor:
        logits_TV = self.model(torch.cat([prompt_T, response_T])[None]).logits[0, len(prompt_T) - 1 : -1]
        logprobs_T = logits_TV.log_softmax(-1).gather(1, response_T[:, None])[:, 0]
        gradients = torch.autograd.grad(logprobs_T.sum(), list(self.model.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])


def estimate(group: Sequence[Sample], baseline: float) -> torch.Tensor:
    """Returns a group's estimate of the gradient of the expected reward against a baseline."""
    return torch.stack([(one.reward - baseline) * one.gradient_W for one in group]).mean(0)


def mean_reward(group: Sequence[Sample]) -> float:
    """Returns the mean reward of a group."""
    return fmean(one.reward for one in group)


def signal_and_noise(estimates_PW: torch.Tensor) -> dict[str, float]:
    """Returns the squared norm of the mean over groups, and their mean squared distance from it, without bias."""
    groups = len(estimates_PW)
    squared = float((estimates_PW**2).sum()) / groups
    signal = (float((estimates_PW.sum(0) ** 2).sum()) - groups * squared) / (groups * (groups - 1))
    return {"signal": signal, "noise": squared - signal}


def main() -> None:
    """Samples, measures and prints."""
    parser = argparse.ArgumentParser(description="Compares the gradients of ReST and mirror descent on a model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    policy = Policy(arguments.model)
    rest, mirror_descent = [], []
    squared_norms: dict[float, list[float]] = {0.0: [], 1.0: []}
    for line in read_lines(arguments.prompts)[: arguments.problems]:
        group = list(policy.sample(line["prompt"], line["answer"]))
        rest.append(estimate(group, 0.0))
        mirror_descent.append(estimate(group, mean_reward(group)))
        for one in group:
            squared_norms[one.reward].append(one.squared_norm)
    measured = {
        "wrong": fmean(squared_norms[0.0]),
        "right": fmean(squared_norms[1.0]),
        "accuracy": len(squared_norms[1.0]) / (len(rest) * GROUP_SIZE),
        "rest": signal_and_noise(torch.stack(rest)),
        "mirror_descent": signal_and_noise(torch.stack(mirror_descent)),
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
