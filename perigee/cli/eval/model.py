"""Models that answer: any OpenAI-compatible endpoint, and a vLLM server of its own for local weights."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from perigee.chat import Asked, ChatMessage, read_question
from perigee.cli.choose import find_checkpoint
from perigee.cli.run_folder import find_run
from perigee.cli.stack import HOST, START_TIMEOUT_S, pick_ports, start_guarded
from perigee.config import read_yaml
from perigee.errors import FailedPreconditionError, InternalError, InvalidArgumentError, UnavailableError
from perigee.image_sources import ImageStore
from perigee.images import ImageInfo
from perigee.trainer.v1 import trainer_pb2
from services.kit.chat import PromptEncoder, ask_with_images, open_encoder
from services.kit.hf import HUB_NAME, fetch_model, open_model_folder
from services.kit.storage import is_url

SERVED_NAME = "policy"
POLL_S = 0.5
ATTEMPTS = 6
# Servers answer with these what may pass, and what every other request would meet, too.
PASSING_STATUS, FATAL_STATUS = (408, 409, 429), (401, 403, 404, 412)
# Errors of one request, beside which others are answered.
REQUEST_ERRORS = (InternalError, InvalidArgumentError)
# Begins the address of an image in a request that waits: its media type and digest follow.
STORED = "stored:"
# What a model's generation_config.json would change about a stated sampling, in vLLM's words.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass(frozen=True)
class Completion:
    """Response of a model; `tokens` is None where the endpoint does not count them."""

    text: str
    tokens: int | None
    truncated: bool


@dataclass(frozen=True)
class WrittenPrompt:
    """Part of a request that asks; images have addresses that begin with STORED."""

    body: Mapping[str, Any]
    tokens: int = 0
    """Of the prompt, those of its images included; 0 where the endpoint alone knows."""


@dataclass(frozen=True)
class Endpoint:
    """OpenAI-compatible endpoint; without `chat` the model continues what the user said last.

    With an `encoder` it is asked by token ids, into which that writes the chat; by messages where these have images.
    `extra` is added to every request, `images` are where those of requests are.
    """

    url: str
    model: str
    chat: bool = True
    encoder: PromptEncoder | None = None
    api_key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 3600.0
    images: ImageStore | None = None

    def make_client(self, concurrency: int) -> httpx.AsyncClient:
        """Returns a client for as many requests at once."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=concurrency)
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=self.timeout_s)

    def write_prompts(
        self, asked: Sequence[Asked], places: Sequence[str], images: Sequence[Sequence[ImageInfo]]
    ) -> list[WrittenPrompt]:
        """Returns the part of a request that asks each; `images` are those of the problems.

        Raises InvalidArgumentError when a chat template fails, and for images that cannot be shown.
        """
        return [self._write(*each) for each in zip(asked, places, images, strict=True)]

    def _write(self, asked: Asked, place: str, images: Sequence[ImageInfo]) -> WrittenPrompt:
        if images and not (self.chat and (self.encoder is None or self.encoder.uses_template(asked))):
            raise InvalidArgumentError.for_field(place, "has images, which only a chat shows: ask by a chat template")
        if self.encoder is None and self.chat:
            messages = [ask_with_images(asked, images)] if isinstance(asked, str) else list(asked)
            return WrittenPrompt({"messages": [_write_message(message) for message in messages]})
        if not self.chat and not isinstance(asked, str):
            asked = read_question(asked)
        if self.encoder is None:
            return WrittenPrompt({"prompt": asked})
        [token_ids] = self.encoder.encode([asked], [place], images=[images])
        if not images:
            return WrittenPrompt({"prompt": token_ids}, len(token_ids))
        body = {"messages": [_write_message(message) for message in self.encoder.compose(asked, images)]}
        return WrittenPrompt(body, len(self.encoder.expand(token_ids, images, place)))

    def make_request(self, prompt: WrittenPrompt, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the body of a request for one response, which is no longer than a local model's context allows."""
        body = {"model": self.model, **prompt.body, **sampling, **self.extra}
        if self.encoder is not None:
            room = self.encoder.model.context_tokens - prompt.tokens
            body["max_tokens"] = max(1, min(body["max_tokens"], room))
        return body

    def _show(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns a request with its images as data URLs."""
        if self.images is None or STORED not in json.dumps(body.get("messages")):
            return body
        shown = [{**message, "content": _show_content(message["content"], self.images)} for message in body["messages"]]
        return {**body, "messages": shown}

    async def complete(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Completion:
        """Returns the response to a request; what may pass is tried again.

        Raises UnavailableError when the endpoint stays away, FailedPreconditionError when it takes no requests from
        here, and one of REQUEST_ERRORS when it does not answer this one.
        """
        url = f"{self.url.rstrip('/')}/{'chat/completions' if 'messages' in body else 'completions'}"
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((UnavailableError, InternalError)),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential_jitter(initial=1, max=30),
            reraise=True,
        )
        shown = await asyncio.to_thread(self._show, body)
        return read_completion(await retrying(_post, client, url, shown), url)


def _write_message(message: ChatMessage) -> dict[str, Any]:
    """Returns a message of OpenAI's API, its images by media type and digest."""
    if isinstance(message["content"], str):
        return dict(message)
    parts = [
        {"type": "text", "text": part["text"]}
        if part["type"] == "text"
        else {"type": "image_url", "image_url": {"url": f"{STORED}{part['image'].media_type};{part['image'].digest}"}}
        for part in message["content"]
    ]
    return {"role": message["role"], "content": parts}


def _show_content(content: str | list[dict[str, Any]], images: ImageStore) -> str | list[dict[str, Any]]:
    """Returns a message's content with its images as data URLs."""
    if isinstance(content, str):
        return content
    shown = []
    for part in content:
        if part["type"] == "image_url":
            media_type, _, digest = part["image_url"]["url"].removeprefix(STORED).partition(";")
            data = base64.b64encode(images.path(digest).read_bytes()).decode()
            part = {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}}
        shown.append(part)
    return shown


async def fix_version(endpoint: Endpoint) -> Endpoint:
    """Returns an endpoint that answers by the policy version that it has now, where it has versions, as workers do."""
    async with endpoint.make_client(1) as client:
        try:
            models = (await client.get(f"{endpoint.url.rstrip('/')}/models")).json()["data"]
            versions = [each["policy_version"] for each in models if each["id"] == endpoint.model]
        except httpx.TransportError as error:
            raise UnavailableError(f"{endpoint.url} does not answer: {error or type(error).__name__}") from error
        except (ValueError, LookupError, TypeError):  # it has no versions
            return endpoint
    return replace(endpoint, extra={**endpoint.extra, "policy_version": versions[0]}) if versions else endpoint


async def _post(client: httpx.AsyncClient, url: str, body: Mapping[str, Any]) -> httpx.Response:
    try:
        response = await client.post(url, json=body)
    except httpx.TransportError as error:
        raise UnavailableError(f"{url} does not answer: {error or type(error).__name__}") from error
    if response.is_success:
        return response
    words = f"{url} answered {response.status_code}: {' '.join(response.text.split())[:300]}"
    if response.status_code >= 500 or response.status_code in PASSING_STATUS:
        raise InternalError(words)
    if response.status_code < 400 or response.status_code in FATAL_STATUS:
        raise FailedPreconditionError(words)
    raise InvalidArgumentError(words)


def read_completion(response: httpx.Response, url: str) -> Completion:
    """Returns the first choice of an answer.

    Raises InternalError when it has none, InvalidArgumentError when the model was kept from answering in text.
    """
    try:
        values = response.json()
        choice = values["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        tokens = (values.get("usage") or {}).get("completion_tokens")
        end = choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InternalError(f"{url} gave no completion: {response.text[:300]!r}") from error
    if text is None and end not in ("stop", "length"):  # a reasoning model may end before its answer
        raise InvalidArgumentError(f"{url} gave no text: the response ended by {end}")
    return Completion(text or "", None if tokens is None else int(tokens), end == "length")


def find_model(name: str, runs_path: Path) -> tuple[Path, Mapping[str, Any] | None]:
    """Returns the model folder or URL that `name` is, or what the run of this name exported, with the run's settings.

    RUN@VERSION is the checkpoint of a policy version. Raises InvalidArgumentError when there is neither, NotFoundError
    when the run has no such checkpoint.
    """
    if is_url(name):
        return Path(fetch_model(name, "MODEL", weights=True)), None
    if (folder := Path(name) / "config.json").is_file():
        return folder.parent.absolute(), None
    if Path(name).is_dir() and not (Path(name) / "recipe.yaml").is_file():
        raise InvalidArgumentError.for_field(name, "is neither a model folder (no config.json) nor a run")
    if HUB_NAME.fullmatch(name) and not Path(name).exists():
        raise InvalidArgumentError.for_field(
            name, f"is neither a folder nor a run here; a model on the Hugging Face Hub is hf://{name}"
        )
    of_run, _, version = name.rpartition("@")
    if of_run and version.isdecimal():
        run = find_run(runs_path, of_run)
        return find_checkpoint(run, int(version)), read_yaml(run.recipe_path).get("run") or {}
    run = find_run(runs_path, name)
    summary = run.path / "summary.json"
    exported = Path(json.loads(summary.read_text())["model"]) if summary.is_file() else run.path / "model"
    if not (exported / "config.json").is_file():
        raise InvalidArgumentError.for_field(
            name, f"has no exported model at {exported}; a run exports it when it has finished"
        )
    return exported, read_yaml(run.recipe_path).get("run") or {}


def local_endpoint(folder: Path, chat: bool, run: Mapping[str, Any] | None = None) -> Endpoint:
    """Returns the endpoint of a model folder, without the URL that it gets once it is served.

    It asks by chat where the model has a template, or as a `run` of these settings asked. Raises InvalidArgumentError
    when the folder is no model's.
    """
    encoder = open_encoder(open_model_folder(folder, "MODEL"))
    if run is not None:
        texts = {key: run.get(key) or "" for key in ("system_prompt", "instruction")}
        settings = trainer_pb2.ChatSettings(mode=run.get("chat") or "auto", **texts)
    else:
        chat = chat and encoder.template is not None
        settings = trainer_pb2.ChatSettings(mode="always" if chat else "never")
    return Endpoint("", SERVED_NAME, chat, replace(encoder, settings=settings), extra=NEUTRAL)


def identify_weights(folder: Path) -> str:
    """Returns what tells the weights of a model folder from others: path, size and time of each file of them."""
    files = sorted(folder.glob("*.safetensors"))
    return f"{folder}:" + ",".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)


@asynccontextmanager
async def serving_model(
    folder: Path, log_path: Path, concurrency: int, max_model_len: int, dtype: str, note: Callable[[str], None]
) -> AsyncIterator[str]:
    """Serves a model folder with vLLM on this machine while the block runs; yields the URL.

    `max_model_len` bounds a prompt with its response, for which the cache must have room.

    Raises UnavailableError when the server does not start, and in the place of the block's error when it has ended.
    """
    [port] = pick_ports(1)
    arguments = {
        "model": str(folder),
        "served-model-name": SERVED_NAME,
        "host": HOST,
        "port": str(port),
        "dtype": dtype,
        "max-num-seqs": str(concurrency),
        "max-model-len": str(max_model_len),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [word for name, value in arguments.items() for word in (f"--{name}", value)]
    environment = ENVIRONMENT
    if not _has_gpu():
        # vLLM's own default takes nine tenths of the memory, and compiling costs more than it gains here. A prompt that
        # is read in parts has vLLM rewind the generator of its seed, which one on a CPU does not do: the engine ends.
        command += ["--kv-cache-memory-bytes", str(1 << 30), "--block-size", "32", "--enforce-eager"]
        command += ["--no-enable-chunked-prefill"]
        environment = {**environment, "TORCHDYNAMO_DISABLE": "1"}
    note(f"starting vLLM with {folder} (log: {log_path})")
    server = await start_guarded("vllm", command, log_path, environment)
    ended = asyncio.create_task(server.wait())
    try:
        try:
            async with asyncio.timeout(START_TIMEOUT_S), httpx.AsyncClient() as client:
                while not await _is_healthy(client, f"http://{HOST}:{port}/health"):
                    if ended.done():
                        raise UnavailableError(server.describe_end(ended.result()))
                    await asyncio.wait([ended], timeout=POLL_S)
        except TimeoutError as error:
            raise UnavailableError(f"vLLM was not ready after {START_TIMEOUT_S:g} s (log: {log_path})") from error
        try:
            yield f"http://{HOST}:{port}/v1"
        except Exception as error:
            if not ended.done():
                raise
            raise UnavailableError(server.describe_end(ended.result())) from error
    finally:
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)
        await server.stop()


async def _is_healthy(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).is_success
    except httpx.TransportError:
        return False


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
