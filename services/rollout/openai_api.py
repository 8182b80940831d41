"""OpenAI's chat and completion interface to the policy that the worker holds, over HTTP.

A response goes the way of a Generate call. It survives a weight commit, as a segment does: its earlier tokens stay, the
engine recomputes their keys and values, and `policy_versions` says which tokens each version generated.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from perigee.buffer.packing import pack_token_ids, unpack_logprobs, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.chat import ReadImage, find_images, read_messages
from perigee.errors import InvalidArgumentError, NotFoundError, PerigeeError, ResourceExhaustedError, UnavailableError
from perigee.image_sources import ImageReader, find_source
from perigee.images import Image, decode_image
from perigee.json_codec import dump_json
from perigee.rollout.v1 import rollout_pb2 as pb
from services.kit.chat import PromptEncoder
from services.kit.http import EVENTS, CompatRouter, StreamResponse, write_error
from services.rollout.engine import EngineDiedError, EngineRequest, PromptScore
from services.rollout.generate import check_items, generate
from services.rollout.model import PolicyModel
from services.rollout.segment import NEUTRAL, Emit, SegmentSettings, check_sampling, merge, slice_spans
from services.rollout.worker import Worker

MODEL = "policy"
VERSION_HEADER = "x-perigee-policy-version"
# Tokens of an event of a stream, and between two looks for a stop string.
STRIDE_TOKENS = 8
MAX_STOPS = 16
# OpenAI's default of a completion; a chat may fill the context.
COMPLETION_TOKENS = 16
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class TokenDecoder:
    """Text that each token adds to those before it; empty for one that only begins a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)

    def decode(self, token_id: int) -> str:
        """Returns the text of the next token."""
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # the library raises bare Exception after bytes that are no character, whose text is lost
            self._stream = DecodeStream(skip_special_tokens=False)
            return self._stream.step(self._tokenizer, token_id) or ""


@dataclass(frozen=True, slots=True)
class Token:
    """Token of a response, or of a prompt that is echoed, with the text that it adds."""

    id: int
    logprob: float | None
    text: str
    offset: int
    """Characters before it."""
    best: dict[str, float] | None = None
    """The likeliest token there and the token itself, by text; of a prompt's tokens."""


@dataclass(frozen=True)
class Part:
    """What a choice has gained: all of it, or an event's."""

    index: int
    is_first: bool
    prompt: list[int]
    echo: list[Token]
    """Tokens of the prompt, of the first part where the call asks for them."""
    text: str
    tokens: list[Token]
    versions: list[buffer_pb2.VersionSpan]
    """Spans over `tokens`."""
    finish: Literal["stop", "length"] | None


@dataclass(eq=False)
class Choice:
    """One response on its way."""

    index: int
    prompt: list[int]
    request: pb.GenerateRequest
    stops: Sequence[str]
    tokenizer: Tokenizer
    images: Sequence[Image] = ()
    prompt_tokens: int = 0
    """Those of the prompt's images included."""
    echo: list[Token] = field(default_factory=list)
    is_scored: bool = False
    """Whether the echoed tokens get their log-probabilities."""
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    versions: list[buffer_pb2.VersionSpan] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    _taken: tuple[int, int, bool] = (0, 0, False)
    """Characters and tokens that were taken, and whether the end was."""

    def __post_init__(self) -> None:
        self._decoder = TokenDecoder(self.tokenizer)

    def add(self, chunk: pb.GenerateResponse) -> None:
        """Adds the tokens of a chunk, up to the one that completes a stop string."""
        token_ids = list(unpack_token_ids(chunk.token_ids))
        stops = chunk.end_reason == buffer_pb2.END_REASON_STOP
        begin = self.echo[-1].offset + len(self.echo[-1].text) if self.echo else 0
        for count, (token_id, logprob) in enumerate(zip(token_ids, unpack_logprobs(chunk.logprobs), strict=True), 1):
            # The token that ends a response is none of its text.
            is_text = not (stops and count == len(token_ids))
            text = self._decoder.decode(token_id) if is_text else ""
            self.tokens.append(Token(token_id, logprob, text, begin + len(self.text)))
            if self._append(text):
                break
        self.versions = slice_spans([*self.versions, *chunk.versions], 0, len(self.tokens))
        if chunk.end_reason and self.finish is None:
            self._append(self._broken_character(stops))
            self.finish = self.finish or ("stop" if stops else "length")

    def take(self) -> Part | None:
        """Returns what was not taken yet, without text that may become a stop string; None when there is nothing."""
        characters, tokens, ended = self._taken
        withheld = 0 if self.finish else max((len(stop) - 1 for stop in self.stops), default=0)
        end = max(characters, len(self.text) - withheld)
        if end == characters and len(self.tokens) == tokens and (self.finish is None or ended):
            return None
        self._taken = end, len(self.tokens), self.finish is not None
        return Part(
            index=self.index,
            is_first=tokens == 0,
            prompt=self.prompt,
            echo=[] if tokens else self.echo,
            text=self.text[characters:end],
            tokens=self.tokens[tokens:],
            versions=slice_spans(self.versions, tokens, len(self.tokens)),
            finish=self.finish,
        )

    def score_prompt(self, scores: Sequence[PromptScore]) -> None:
        """Gives the echoed tokens after the first their log-probabilities."""
        for place, score in enumerate(scores, 1):
            token = self.echo[place]
            best = self.tokenizer.decode([score.best_token_id], skip_special_tokens=False)
            tops = {token.text: score.logprob, best: score.best_logprob}
            self.echo[place] = replace(token, logprob=score.logprob, best=tops)

    def _append(self, text: str) -> bool:
        """Adds text, up to the first stop string that it completes; returns whether there is one."""
        before, self.text = len(self.text), self.text + text
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stops]
        if ends := [end for end in found if end >= 0]:
            self.text, self.finish = self.text[: min(ends)], "stop"
        return bool(ends)

    def _broken_character(self, stops: bool) -> str:
        """Returns the text of last tokens that never became a whole character."""
        ids = [token.id for token in self.tokens]
        whole = self.tokenizer.decode(ids[:-1] if stops else ids, skip_special_tokens=False)
        return whole.removeprefix(self.text) if whole.startswith(self.text) else ""


class Prompt(NamedTuple):
    """Token ids of a prompt, one for each of its images."""

    token_ids: list[int]
    images: tuple[Image, ...] = ()
    echo: list[Token] = []


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False


class SampledCall(BaseModel, ABC):
    """What both calls take; keys that are not here are refused."""

    model_config = ConfigDict(extra="forbid")
    prompt_key: ClassVar[str]
    kind: ClassVar[str]
    stream_kind: ClassVar[str]

    model: str = MODEL
    max_tokens: int | None = Field(None, ge=1, le=(1 << 32) - 1)
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(None, ge=0, lt=1 << 64)
    n: int = Field(1, ge=1)
    stop: list[str] = Field([], max_length=MAX_STOPS)
    stop_token_ids: list[int] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    prompt_token_ids: list[int] = []
    """Prompt as token ids, instead of text or messages."""
    return_token_ids: bool = False
    policy_version: int | None = Field(None, ge=0, lt=1 << 64)
    """Refused with 412 when the worker holds another version."""
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}

    @field_validator("stop", mode="before")
    @classmethod
    def _make_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _refuse_empty(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("a stop string is empty")
        return stop

    def read_prompts(self, encoder: PromptEncoder, read_image: ReadImage | None) -> list[Prompt]:
        """Returns each prompt; raises InvalidArgumentError."""
        given = getattr(self, self.prompt_key)
        if not given and not self.prompt_token_ids:
            raise InvalidArgumentError.for_field(self.prompt_key, "is empty; give it or prompt_token_ids")
        if given and self.prompt_token_ids:
            message = f"stands beside {self.prompt_key}: give one of them"
            raise InvalidArgumentError.for_field("prompt_token_ids", message)
        return self.encode(encoder, read_image) if given else [Prompt(self.prompt_token_ids)]

    @abstractmethod
    def encode(self, encoder: PromptEncoder, read_image: ReadImage | None) -> list[Prompt]:
        """Returns each prompt that is no list of ids yet; raises InvalidArgumentError."""

    @abstractmethod
    def limit(self, context_tokens: int) -> int:
        """Returns the largest number of tokens of a response."""

    @abstractmethod
    def describe(self, part: Part) -> dict[str, Any]:
        """Returns what a choice of this call alone has: its text and log-probabilities."""


class ChatCall(SampledCall):
    """Body of a chat call."""

    prompt_key = "messages"
    kind = "chat.completion"
    stream_kind = "chat.completion.chunk"

    messages: list[dict[str, Any]] = []
    max_completion_tokens: int | None = Field(None, ge=1, le=(1 << 32) - 1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=0)
    """The engine gives the log-probability of the sampled token only."""

    def encode(self, encoder: PromptEncoder, read_image: ReadImage | None) -> list[Prompt]:
        """Returns the token ids that the chat template makes of the messages, and the images in these."""
        messages = read_messages(self.messages, read_image)
        [token_ids] = encoder.encode([messages], [""])
        return [Prompt(token_ids, tuple(each for each in find_images(messages) if isinstance(each, Image)))]

    def limit(self, context_tokens: int) -> int:
        """Returns the limit given, else the context."""
        return self.max_completion_tokens or self.max_tokens or context_tokens

    def describe(self, part: Part) -> dict[str, Any]:
        """Returns a message, or what is added to one; only its beginning has the role, as clients join them."""
        role = {"role": "assistant"} if part.is_first else {}
        content = [
            {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode()), "top_logprobs": []}
            for token in part.tokens
        ]
        return {
            "delta" if self.stream else "message": {**role, "content": part.text},
            "logprobs": {"content": content} if self.logprobs else None,
        }


class CompletionCall(SampledCall):
    """Body of a completion call."""

    prompt_key = "prompt"
    kind = stream_kind = "text_completion"

    prompt: Any = None
    """A text, several, a list of token ids, or several."""
    logprobs: int | None = Field(None, ge=0, le=1)
    echo: bool = False
    """Whether the response begins with the prompt, with its log-probabilities where `logprobs` is given."""

    @model_validator(mode="after")
    def _score_once(self) -> CompletionCall:
        if self.echo and self.logprobs is not None and self.n > 1:
            raise ValueError("n has to be 1 where echo and logprobs ask for the prompt's log-probabilities")
        return self

    def encode(self, encoder: PromptEncoder, read_image: ReadImage | None) -> list[Prompt]:
        """Returns the token ids of one text, several texts, one list of ids or several."""
        prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if all(isinstance(each, str) for each in prompts):
            return [Prompt(ids) for ids in encoder.encode(prompts, [""] * len(prompts))]
        lists = [prompts] if all(isinstance(each, int) for each in prompts) else prompts
        if all(isinstance(ids, list) and all(type(each) is int for each in ids) for ids in lists):
            return [Prompt(ids) for ids in lists]
        message = "must be a text, a list of texts, a list of token ids, or several"
        raise InvalidArgumentError.for_field("prompt", message)

    def limit(self, context_tokens: int) -> int:
        """Returns the limit given, else OpenAI's."""
        return self.max_tokens or COMPLETION_TOKENS

    def describe(self, part: Part) -> dict[str, Any]:
        """Returns the text."""
        prompt = {"prompt_token_ids": part.prompt} if self.return_token_ids and part.is_first else {}
        tokens = [*part.echo, *part.tokens]
        logprobs = {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [token.best for token in tokens] if self.echo else None,
            "text_offset": [token.offset for token in tokens],
        }
        text = "".join(token.text for token in part.echo) + part.text
        return {"text": text, "logprobs": None if self.logprobs is None else logprobs, **prompt}


class Endpoint:
    """Calls to one worker's policy, with a bounded number of responses under way."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._running = 0

    async def respond(self, call: SampledCall) -> Response:
        """Returns the response to a call, or the stream that becomes it."""
        self._check_room(call.n)  # before a long text takes a tokenizer seconds
        sampling = self._read_sampling(call)
        prompts = await asyncio.to_thread(self._read_prompts, call)
        self._check_room(len(prompts) * call.n)
        choices = self._plan(call, prompts, sampling)
        self._worker.check_ready("", call.policy_version)
        head = self._head(call)
        headers = {VERSION_HEADER: str(self._worker.policy_version), "cache-control": "no-store"}
        prompt = {"prompt_token_ids": choices[0].prompt} if call.return_token_ids and isinstance(call, ChatCall) else {}
        if call.stream:
            return StreamResponse(self._write_events(call, choices, head, prompt), EVENTS, headers)
        async with aclosing(self._sample(call, choices)) as grown:
            async for _ in grown:
                pass
        described = [describe(call, part) for choice in choices if (part := choice.take())]
        body = head | prompt | {"choices": described, "usage": count_usage(call, choices)}
        return Response(dump_json(body), headers=headers, media_type="application/json")

    def _read_sampling(self, call: SampledCall) -> pb.Sampling:
        """Returns the settings of a call for the policy; raises NotFoundError and InvalidArgumentError."""
        if call.model != MODEL:
            raise NotFoundError(f"model: {call.model!r} is not served here; use {MODEL!r}.")
        sampling = pb.Sampling(temperature=call.temperature, seed=call.seed)
        for name in NEUTRAL:
            if (value := getattr(call, name)) is not None:
                setattr(sampling, name, value)
        check_sampling(sampling, trained_on=False)
        check_vocabulary("stop_token_ids", call.stop_token_ids, self._worker.model)
        return sampling

    def _read_prompts(self, call: SampledCall) -> list[Prompt]:
        """Returns the call's prompts, their images looked at to the last pixel; raises InvalidArgumentError."""
        model, numbers = self._worker.model, itertools.count(1)

        def read_image(value: object, field: str) -> Image:
            # Before they are decoded: a small body may hold hundreds of large ones.
            if (number := next(numbers)) > self._worker.config.images.max_per_prompt:
                reason = f"{number} images are more than rollout.images.max_per_prompt allows"
                raise InvalidArgumentError.for_field(field, reason)
            return self._read_image(value, field)

        prompts = call.read_prompts(model.encoder, read_image if model.vision else None)
        for prompt in prompts:
            check_vocabulary("prompt_token_ids", prompt.token_ids, model)
        if not isinstance(call, CompletionCall) or not call.echo:
            return prompts
        # One that is too long is refused before its texts are needed.
        shown = [prompt.token_ids[: model.context_tokens] for prompt in prompts]
        return [
            prompt._replace(echo=split_text(ids, model.tokenizer)) for prompt, ids in zip(prompts, shown, strict=True)
        ]

    def _read_image(self, value: object, field: str) -> Image:
        """Returns the image of a message's part: a data URL, or an address where `images.allow_urls` is set."""
        source = find_source(value)[1]
        if not isinstance(source, str) or not source.startswith(("data:", "http://", "https://")):
            raise InvalidArgumentError.for_field(field, "must be a data URL: data:image/png;base64,...")
        config = self._worker.config.images
        if not source.startswith("data:") and not config.allow_urls:
            reason = "is an address of the web: give a data URL, or have rollout.images.allow_urls set"
            raise InvalidArgumentError.for_field(field, reason)
        reader = ImageReader(limits=self._worker.images.limits, allow_urls=config.allow_urls)
        image = reader.load(value, field)
        decode_image(image, field)
        return image

    def _plan(self, call: SampledCall, prompts: Sequence[Prompt], sampling: pb.Sampling) -> list[Choice]:
        """Returns a choice for each response; raises InvalidArgumentError and ResourceExhaustedError."""
        model, images = self._worker.model, self._worker.images
        choices = []
        for index, prompt in enumerate(each for each in prompts for _ in range(call.n)):
            item = pb.GenerateItem(
                id=str(index),
                prompt_token_ids=pack_token_ids(prompt.token_ids),
                max_tokens=call.limit(model.context_tokens),
                image_digests=[image.digest for image in prompt.images],
            )
            images.add(prompt.images)
            check_items([item], self._worker)
            request = pb.GenerateRequest(items=[item], sampling=sampling, policy_version=call.policy_version)
            choice = Choice(index, prompt.token_ids, request, call.stop, model.tokenizer, prompt.images)
            choice.prompt_tokens = len(model.encoder.expand(prompt.token_ids, prompt.images, ""))
            if isinstance(call, CompletionCall) and call.echo:
                choice.echo, choice.is_scored = list(prompt.echo), call.logprobs is not None
            choices.append(choice)
        return choices

    def _check_room(self, sequences: int) -> None:
        """Raises ResourceExhaustedError when so many more sequences are too many."""
        limit = self._worker.config.http.max_sequences
        if self._running + sequences > limit:
            message = f"{self._running} of at most {limit} responses are under way, and {sequences} more are asked for."
            raise ResourceExhaustedError(message, retry_after_s=1.0)

    @contextmanager
    def _admit(self, sequences: int) -> Iterator[None]:
        """Counts sequences for the block; raises ResourceExhaustedError when there are too many."""
        self._check_room(sequences)
        self._running += sequences
        try:
            yield
        finally:
            self._running -= sequences

    async def _sample(self, call: SampledCall, choices: Sequence[Choice]) -> AsyncGenerator[Choice, None]:
        """Yields a choice whenever it has grown."""
        settings = SegmentSettings(
            sampling=choices[0].request.sampling,
            repetition_stop=pb.RepetitionStop(),
            stop_token_ids=(*self._worker.model.stop_token_ids, *call.stop_token_ids),
            chunk_tokens=STRIDE_TOKENS if call.stream or call.stop else self._worker.config.chunk_tokens,
            cache_salt=self._worker.prefix_salt,
        )
        with self._admit(len(choices)):
            producers = [partial(self._sample_one, settings, choice) for choice in choices]
            async with aclosing(merge(producers)) as batches:
                async for batch in batches:
                    for choice in batch:
                        yield choice

    async def _sample_one(self, settings: SegmentSettings, choice: Choice, emit: Emit[Choice]) -> None:
        """Samples one response; a stop string takes it out of the engine."""
        if choice.is_scored:
            with self._worker.admit(1):
                scores = await self._score(choice.prompt)
            choice.score_prompt(scores)
        # Others may have made room for theirs meanwhile.
        self._worker.images.add(choice.images)
        async with aclosing(generate(self._worker, choice.request, settings)) as chunks:
            async for chunk in chunks:
                choice.add(chunk)
                await emit(choice)
                if choice.finish:
                    return

    async def _score(self, prompt: Sequence[int]) -> Sequence[PromptScore]:
        """Returns the log-probabilities of a prompt under one policy version.

        Raises UnavailableError when the engine dies, or gets new weights meanwhile.
        """
        version = self._worker.policy_version
        request = EngineRequest(
            request_id=f"score-{uuid.uuid4().hex}",
            token_ids=prompt,
            max_tokens=1,
            temperature=0.0,
            seed=None,
            stop_token_ids=(),
            stride_tokens=1,
            score_prompt=True,
        )
        try:
            async with aclosing(self._worker.engine.generate(request)) as outputs:
                output = await anext(outputs)
        except EngineDiedError as error:
            raise UnavailableError(f"The engine died and is restarted: {error}", retry_after_s=10.0) from error
        if output.versions[0].policy_version != version:
            raise UnavailableError("New weights came while the prompt was scored: call again.", retry_after_s=1.0)
        return output.prompt_scores

    def _head(self, call: SampledCall) -> dict[str, Any]:
        """Returns what the response and each event of a stream begin with."""
        worker = self._worker
        return {
            "id": f"perigee-{uuid.uuid4().hex}",
            "object": call.stream_kind if call.stream else call.kind,
            "created": int(time.time()),
            "model": MODEL,
            "system_fingerprint": f"{worker.run_id}-{worker.policy_version}",
            "policy_version": worker.policy_version,
        }

    async def _write_events(
        self, call: SampledCall, choices: Sequence[Choice], head: dict[str, Any], prompt: dict[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        """Yields the events of a stream; the first one has the prompt's ids."""
        async with aclosing(self._sample(call, choices)) as grown:
            async for choice in grown:
                if part := choice.take():
                    yield write_event(head | prompt | {"choices": [describe(call, part)]})
                    prompt = {}
        if call.stream_options.include_usage:
            yield write_event(head | {"choices": [], "usage": count_usage(call, choices)})
        yield b"data: [DONE]\n\n"


def check_vocabulary(field: str, token_ids: Sequence[int], model: PolicyModel) -> None:
    """Raises InvalidArgumentError for a token id that the model does not have."""
    wrong = next((each for each in token_ids if not 0 <= each < model.vocabulary_size), None)
    if wrong is not None:
        message = f"{wrong} is not in the vocabulary of {model.vocabulary_size}"
        raise InvalidArgumentError.for_field(field, message)


def split_text(prompt: Sequence[int], tokenizer: Tokenizer) -> list[Token]:
    """Returns the tokens of a prompt with their texts."""
    decoder, offset = TokenDecoder(tokenizer), 0
    tokens = []
    for token_id in prompt:
        text = decoder.decode(token_id)
        tokens.append(Token(token_id, None, text, offset))
        offset += len(text)
    return tokens


def describe(call: SampledCall, part: Part) -> dict[str, Any]:
    """Returns a choice, or what is added to it, in OpenAI's form."""
    ids = {"token_ids": [token.id for token in part.tokens]} if call.return_token_ids else {}
    versions = [{"policy_version": span.policy_version, "tokens": span.tokens} for span in part.versions]
    described = {"index": part.index, "finish_reason": part.finish, "policy_versions": versions}
    return described | call.describe(part) | ids


def count_usage(call: SampledCall, choices: Sequence[Choice]) -> dict[str, int]:
    """Returns the tokens of a call; a prompt counts once, not for each of its n responses."""
    prompt = sum(choice.prompt_tokens for choice in choices[:: call.n])
    completion = sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def write_event(event: dict[str, Any]) -> bytes:
    """Returns an event as a stream has it."""
    return b"data: " + dump_json(event) + b"\n\n"


def write_openai_error(error: PerigeeError) -> tuple[int, Any]:
    """Returns the status and OpenAI's form of an error; its fields are the call's, not those of a GenerateRequest."""
    status, _ = write_error(error)
    violations = error.violations if isinstance(error, InvalidArgumentError) else ()
    texts = [error.message, *(each.field for each in violations)]
    message, *fields = [text.replace("sampling.", "").replace("items[0].", "") for text in texts]
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = fields[0] if fields else None
    return status, {"error": {"message": message, "type": kind, "param": param, "code": error.code.name.lower()}}


def compat_routers(worker: Worker) -> tuple[CompatRouter, ...]:
    """Returns OpenAI's interface to a worker."""
    router = APIRouter()
    endpoint = Endpoint(worker)

    @router.get("/v1/models", summary="The policy, with the version that the worker holds.")
    async def list_models() -> dict[str, Any]:
        model = {
            "id": MODEL,
            "object": "model",
            "created": 0,
            "owned_by": "perigee",
            "max_model_len": worker.model.context_tokens,
            "run_id": worker.run_id,
            "policy_version": worker.policy_version,
        }
        return {"object": "list", "data": [model]}

    @router.post("/v1/chat/completions", summary="OpenAI's chat completions.", response_class=Response)
    async def complete_chat(call: ChatCall) -> Response:
        return await endpoint.respond(call)

    @router.post("/v1/completions", summary="OpenAI's completions.", response_class=Response)
    async def complete(call: CompletionCall) -> Response:
        return await endpoint.respond(call)

    return (CompatRouter(router, write_openai_error),)
