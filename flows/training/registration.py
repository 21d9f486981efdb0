"""Watches what modules register while they are built."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

OnTensor = Callable[[nn.Module, str, Tensor | None], None]
OnModule = Callable[[nn.Module, str, nn.Module | None], None]


@contextlib.contextmanager
def watching(mode: TorchFunctionMode, on_tensor: OnTensor, on_module: OnModule) -> Iterator[None]:
    """Call these for each parameter or buffer and each module that is registered; `mode` sees all calls of torch.

    Modules of other threads are seen, too.
    """
    hooks = [
        register_module_parameter_registration_hook(on_tensor),
        register_module_buffer_registration_hook(on_tensor),
        register_module_module_registration_hook(on_module),
    ]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()
