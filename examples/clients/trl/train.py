"""GRPO with TRL on rewards of a Perigee reward service.

    python train.py --reward HOST:PORT [--model NAME] [--data FILE] [--steps N] [--out DIR]

Without a model it makes a tiny random one, which shows that all parts fit and learns nothing worth having. The data
are JSON Lines of {"prompt", "answer"}; an answer may be any ground truth that the adapter reads.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

from perigee.reward.adapters.blocking import GroundTruthOptions
from perigee.reward.adapters.trl import PerigeeReward

CHARACTERS = "0123456789+-*/=();#abcdefghijklmnopqrstuvwxyz "


def make_tiny_model() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random model of two layers with one token per character."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {character: 2 + i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.15,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    return Qwen2ForCausalLM(config), fast


def train(arguments: argparse.Namespace) -> None:
    """Trains for some steps and prints each step's log."""
    set_seed(arguments.seed)
    if arguments.model is None:
        model, tokenizer = make_tiny_model()
    else:
        model, tokenizer = arguments.model, None
    if arguments.data is None:
        rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
        dataset = Dataset.from_list(rows)
    else:
        dataset = Dataset.from_json(str(arguments.data))
    config = GRPOConfig(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=arguments.tokens,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=arguments.cpu,
        bf16=not arguments.cpu,
        seed=arguments.seed,
    )
    reward = PerigeeReward(
        arguments.reward, column="answer", options=GroundTruthOptions("math", arguments.answer_marker)
    )
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description="GRPO with TRL on rewards of a Perigee reward service.")
    parser.add_argument("--reward", help="host:port of the reward service; PERIGEE_REWARD_ADDRESS by default")
    parser.add_argument("--model", help="model name or folder; a tiny random one by default")
    parser.add_argument("--data", type=Path, help="JSON Lines of prompt and answer; sums by default")
    parser.add_argument("--answer-marker", default="", help="what the answer follows in a completion")
    parser.add_argument("--tokens", type=int, default=4, help="tokens of a completion")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    parser.add_argument("--out", type=Path, default=Path("trl-run"))
    train(parser.parse_args())


if __name__ == "__main__":
    main()
