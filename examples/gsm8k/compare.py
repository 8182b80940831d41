"""Says whether a trained model still answers other questions as its base does.

    python compare.py BASE TRAINED

The base answers 30 questions greedily; the log-likelihood per token of its answers under both models is compared. Exit
code 1 when the trained model's is lower by more than 0.1 nats.
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    *(f"What is the capital of {country}?" for country in ("France", "Japan", "Egypt", "Peru", "Norway", "Kenya")),
    *(f"Explain in one sentence what {thing} is." for thing in ("gravity", "a volcano", "inflation", "DNA", "a verb")),
    *(f"Write a short poem about {topic}." for topic in ("rain", "the sea", "a cat", "autumn", "friendship")),
    *(f"Translate into French: {text}." for text in ("Good morning", "Thank you", "I am hungry", "See you soon")),
    *(f"Name three {things}." for things in ("fruits", "planets", "musical instruments", "European rivers")),
    *(f"Who wrote {book}?" for book in ("Hamlet", "Don Quixote", "War and Peace")),
    *(f"Give me advice on how to {do}." for do in ("sleep better", "learn a language", "cook rice")),
]
MOST_LOWER = 0.1
NEW_TOKENS = 64


@torch.no_grad()
def mean_logprob(model: AutoModelForCausalLM, ids_1T: torch.Tensor, prompt_tokens: int) -> float:
    """Returns the mean log-probability, in nats, of the tokens behind the prompt."""
    logprobs_1TV = model(ids_1T).logits[:, prompt_tokens - 1 : -1].log_softmax(-1)
    return float(logprobs_1TV.gather(-1, ids_1T[:, prompt_tokens:, None]).mean())


def main() -> int:
    """Reads the command line and compares the models."""
    parser = argparse.ArgumentParser(description="Compares answers to questions that were not trained on.")
    parser.add_argument("base", help="model folder before training")
    parser.add_argument("trained", help="model folder after training")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    base, trained = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (arguments.base, arguments.trained)
    )
    differences = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_1T = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        answer_1T = base.generate(prompt_1T, max_new_tokens=NEW_TOKENS, do_sample=False)
        before, after = (mean_logprob(model, answer_1T, prompt_1T.shape[1]) for model in (base, trained))
        differences.append(after - before)
        print(f"{before:8.3f} {after:8.3f}  {question}")
    mean = sum(differences) / len(differences)
    print(f"{len(differences)} questions: {mean:+.3f} nats per token")
    return 1 if mean < -MOST_LOWER else 0


if __name__ == "__main__":
    sys.exit(main())
