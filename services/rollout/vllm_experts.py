"""Experts that vLLM's routers choose: recorded on a CPU as vLLM records them on GPUs, and packed for the buffer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

# Numbers of experts, one byte each up to 256 of them, else two.
Rows = npt.NDArray[np.unsignedinteger[Any]]


def take_rows(chunks: list[Rows], tokens: int) -> Rows | None:
    """Takes the rows [tokens, layers, experts per token] out of those that vLLM keeps until a request ends.

    Returns None where it records none.
    """
    if not chunks:
        return None
    rows_TLK = np.concatenate(chunks)
    chunks[:] = [rows_TLK[tokens:]]
    return rows_TLK[:tokens]


def pack_rows(rows_TLK: Rows, tokens: int) -> list[bytes]:
    """Returns the packed choices of each token; none where vLLM has not recorded those of all of them."""
    if len(rows_TLK) < tokens:
        return []
    packed_TLK = rows_TLK.astype(rows_TLK.dtype.newbyteorder("<"), copy=False)
    return [row_LK.tobytes() for row_LK in packed_TLK[:tokens]]


def record_experts(runner: Any, config: Any) -> None:
    """Has the model runner of a CPU record experts, where the configuration asks for it; both are vLLM's classes.

    vLLM's connector needs no GPU. It is called by a newer runner only, which needs Triton, and so the configuration
    refuses all others.
    """
    from vllm.distributed.aux_output_connector.worker import get_aux_output_connector

    initialize, execute, sample = runner.initialize_kv_cache, runner.execute_model, runner.sample_tokens
    runner.expert_connector = runner.step_experts = None

    def initialize_and_connect(self: Any, kv_cache_config: Any, *arguments: Any, **options: Any) -> None:
        initialize(self, kv_cache_config, *arguments, **options)
        if self.vllm_config.aux_output_config.enabled:
            self.expert_connector = get_aux_output_connector(self.model, self.vllm_config, kv_cache_config)

    def execute_and_record(self: Any, scheduled: Any, *arguments: Any, **options: Any) -> Any:
        if self.expert_connector is not None:
            self.expert_connector.begin_step(scheduled.aux_output_connector_metadata)
        found = execute(self, scheduled, *arguments, **options)
        if self.expert_connector is not None and scheduled.total_num_scheduled_tokens:
            batch = SimpleNamespace(
                req_ids=self.input_batch.req_ids,
                query_start_loc_np=self.query_start_loc.np,
                num_computed_tokens_np=self.input_batch.num_computed_tokens_cpu[: self.input_batch.num_reqs].copy(),
            )
            self.step_experts = self.expert_connector.prepare_output(batch)
        return found

    def sample_and_attach(self: Any, *arguments: Any, **options: Any) -> Any:
        output = sample(self, *arguments, **options)
        recorded, self.step_experts = self.step_experts, None
        if recorded is not None:
            # A request whose prompt is not read to its end draws a token that is dropped.
            drawn = ~self.discard_request_mask.np[: len(recorded.request_ids)]
            recorded.enqueue_cpu_copy(drawn.astype(np.int32), np.zeros(len(drawn), np.int32))
            output.aux_output_connector_output = recorded.process_output()
        return output

    runner.initialize_kv_cache = initialize_and_connect
    runner.execute_model, runner.sample_tokens = execute_and_record, sample_and_attach
    config._verify_aux_output_compatibility = lambda _: None
