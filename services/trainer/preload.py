"""Imports Megatron, without torch's compiler where no GPU would run what it compiles: loading it takes seconds."""

import torch

compile_function = torch.compile
if not torch.cuda.is_available():
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # type: ignore[assignment]
try:
    import megatron.core  # noqa: F401  # its fusions are compiled when they are defined
finally:
    torch.compile = compile_function
