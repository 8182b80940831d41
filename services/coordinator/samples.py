"""Samples that a rollout phase or an evaluation keeps: candidates wait for their verdicts, then some are chosen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from perigee.buffer.v1 import buffer_pb2
from perigee.report.samples import Sample, choose, rank, shorten
from perigee.reward.scoring import read_reward
from perigee.reward.v1 import reward_pb2
from services.coordinator.prompts import Prompt
from services.coordinator.run_config import RunConfig

# Bytes at most of an extracted answer, and of a verifier's reason.
NOTE_BYTES = 1024


@dataclass
class SampleCollector:
    """Responses of one rollout phase or evaluation; of each kind at most as many as are kept in all."""

    prompts: Mapping[str, Prompt]
    tokenizer: Tokenizer
    config: RunConfig
    iteration: int
    evaluation: str = ""
    _waiting: dict[str, Sample] = field(default_factory=dict)
    _judged: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))

    def add(
        self,
        key: str,
        prompt: Prompt,
        response: str,
        tokens: int,
        versions: Iterable[int],
        reason: buffer_pb2.EndReason.ValueType,
    ) -> None:
        """Adds a response that goes to the reward service; `reason` is how it ended."""
        config = self.config.samples
        if not config.count:
            return
        self._waiting[key] = Sample(
            iteration=self.iteration,
            evaluation=self.evaluation,
            id=key,
            prompt_id=prompt.id,
            domain=prompt.domain,
            prompt="",
            response=shorten(response, config.max_text_bytes),
            tokens=tokens,
            policy_versions=sorted(versions),
            finish_reason=reason_name(reason),
            images=[image.digest for image in prompt.line.images],
        )

    def judge(self, outcomes: Iterable[reward_pb2.ScoreResponse]) -> None:
        """Takes the verdicts of responses, and lets go of those that cannot be chosen any more."""
        config = self.config
        for outcome in outcomes:
            sample = self._waiting.pop(outcome.id, None)
            if sample is None:
                continue
            sample.verdict = buffer_pb2.Verdict.Name(outcome.verdict).removeprefix("VERDICT_").lower()
            sample.reward = read_reward(outcome)
            sample.extracted_answer = shorten(outcome.extracted_answer, NOTE_BYTES)
            sample.reason = shorten(outcome.reason, NOTE_BYTES)
            same = self._judged[sample.kind]
            same.append(sample)
            same.sort(key=lambda sample: rank(sample, config.seed))
            del same[config.samples.count :]

    def chosen(self) -> list[Sample]:
        """Returns the samples to record."""
        config = self.config
        every = [sample for samples in self._judged.values() for sample in samples]
        found = choose(every, config.samples.count, config.seed)
        for sample in found:
            # As the model saw it, special tokens included: a template that is wrong shows.
            text = self.tokenizer.decode(list(self.prompts[sample.prompt_id].token_ids), skip_special_tokens=False)
            sample.prompt = shorten(text, config.samples.max_text_bytes)
        return found


def reason_name(reason: buffer_pb2.EndReason.ValueType) -> str:
    """Returns the name of an end reason in metrics and samples."""
    return buffer_pb2.EndReason.Name(reason).removeprefix("END_REASON_").lower()
