"""Engine outputs that gather in vLLM's engine process until a caller is to see them.

vLLM sends every token of every request to the service on its own. Packing and unpacking one costs more than drawing it
does with a small model, and a caller sees tokens in strides, or the last output alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists

# Name of the method of vLLM's engine core that ends requests with the tokens that they have.
END_REQUESTS = "end_requests"


def hold_outputs(core_class: Any, scheduler_class: Any) -> None:
    """Has the scheduler hold a request's outputs until they fill its stride or it ends.

    Before weights change what is held is sent on, since a message names one version.
    """
    update, finish = scheduler_class.update_from_output, scheduler_class.finish_requests
    set_version = core_class.set_weight_version

    def update_and_hold(self: Any, *arguments: Any) -> dict[int, EngineCoreOutputs]:
        found: dict[int, EngineCoreOutputs] = update(self, *arguments)
        for outputs in found.values():
            outputs.outputs = [merged for each in outputs.outputs if (merged := _hold(self, each)) is not None]
        return found

    def finish_and_drop(self: Any, request_ids: Any, status: Any) -> Any:
        finished = finish(self, request_ids, status)
        for request in finished:
            _gathered(self).pop(request.request_id, None)
        return finished

    def send_and_set_version(self: Any, version: str) -> None:
        _send(self, [(name, merge(parts)) for name, parts in _gathered(self.scheduler).items()])
        _gathered(self.scheduler).clear()
        set_version(self, version)

    def end_requests(self: Any, request_ids: list[str]) -> None:
        ended = []
        for request_id in request_ids:
            if request_id in self.scheduler.requests:
                last = EngineCoreOutput(request_id, [], finish_reason=FinishReason.ABORT)
                ended.append((request_id, merge([*_gathered(self.scheduler).get(request_id, []), last])))
        _send(self, ended)
        self.abort_requests(request_ids)

    scheduler_class.update_from_output, scheduler_class.finish_requests = update_and_hold, finish_and_drop
    core_class.set_weight_version = send_and_set_version
    setattr(core_class, END_REQUESTS, end_requests)


def merge(parts: list[EngineCoreOutput]) -> EngineCoreOutput:
    """Returns the outputs of one request, in their order, as one."""
    first, last = parts[0], parts[-1]
    if first is last:
        return last
    last.new_token_ids = [token for part in parts for token in part.new_token_ids]
    logprobs = [part.new_logprobs for part in parts if part.new_logprobs is not None]
    if logprobs:
        last.new_logprobs = LogprobsLists(
            np.concatenate([each.logprob_token_ids for each in logprobs]),
            np.concatenate([each.logprobs for each in logprobs]),
            np.concatenate([each.sampled_token_ranks for each in logprobs]),
        )
    experts = [part.routed_experts for part in parts if part.routed_experts is not None]
    if experts:
        last.routed_experts = np.concatenate(experts)
    last.prefill_stats = first.prefill_stats
    return last


def _gathered(scheduler: Any) -> dict[str, list[EngineCoreOutput]]:
    """Returns the outputs that a scheduler holds, by request."""
    gathered: dict[str, list[EngineCoreOutput]] = scheduler.__dict__.setdefault("gathered_outputs", {})
    return gathered


def _hold(scheduler: Any, output: EngineCoreOutput) -> EngineCoreOutput | None:
    """Adds an output to those held; returns them as one when they are to be sent, else None."""
    gathered = _gathered(scheduler)
    parts = gathered.setdefault(output.request_id, [])
    parts.append(output)
    request = scheduler.requests.get(output.request_id)
    # Every output has a token, and most have one.
    if output.finish_reason is None and request is not None and len(parts) < _stride(request.sampling_params):
        return None
    del gathered[output.request_id]
    return merge(parts)


def _stride(params: Any) -> int:
    """Returns how many outputs of a request may gather."""
    if params is None or params.prompt_logprobs is not None:
        return 1
    stride: int = (
        params.max_tokens if params.output_kind == RequestOutputKind.FINAL_ONLY else params.stream_interval or 1
    )
    return stride


def _send(core: Any, outputs: list[tuple[str, EngineCoreOutput]]) -> None:
    """Puts outputs of live requests, by their ids, into the queue of what is sent to the clients."""
    by_client: dict[int, list[EngineCoreOutput]] = {}
    for request_id, output in outputs:
        by_client.setdefault(core.scheduler.requests[request_id].client_index, []).append(output)
    for client, some in by_client.items():
        message = EngineCoreOutputs(outputs=some, weight_version=core._weight_version)
        core.output_queue.put_nowait((client, message))
