"""Imports Megatron without what it loads and nobody uses: trackers and, where no GPU is, torch's compiler."""

import sys

import torch

UNUSED = [name for name in ("wandb", "torch.utils.tensorboard") if name not in sys.modules]

compile_function = torch.compile
if not torch.cuda.is_available():
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # type: ignore[assignment]
# As if they were not installed.
sys.modules |= dict.fromkeys(UNUSED)  # type: ignore[arg-type]
try:
    import megatron.core  # noqa: F401  # its fusions are compiled when they are defined
finally:
    torch.compile = compile_function
    for name in UNUSED:
        del sys.modules[name]
