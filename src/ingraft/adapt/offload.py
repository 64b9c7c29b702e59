"""Weights that accelerate keeps elsewhere.

Offloading (`cpu_offload`, a `device_map` with "cpu" or "disk") leaves parameters on the meta device and puts a hook on every module that owns
some; the hook brings them in for the length of that module's own forward call. An adapter's part is read by its host and never called, so
nobody would run its hook; and a part that is made looks at its module's weights outside any forward. Both say so with `present`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ingraft.methods.contract import Part


@contextmanager
def present(*modules: nn.Module) -> Iterator[None]:
    """For the length of the block, have the parameters of these modules at hand if they are offloaded: a part's all, others' own."""
    with ExitStack() as stack:
        for module in (inner for outer in modules for inner in _read_by(outer)):
            if is_offloaded(module):  # a module named twice is present by then
                hook = module.__dict__["_hf_hook"]
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, ())
        yield


def _read_by(module: nn.Module) -> Iterator[nn.Module]:
    """A part is read with what it is made of and with what all sites share; nothing else is reached into."""
    yield module
    if isinstance(module, Part) and (module._modules or module.bank):
        for root in (*module.children(), *module.bank):
            yield from root.modules()


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook keeps this module's own parameters elsewhere."""
    return "_hf_hook" in module.__dict__ and any(p is not None and p.is_meta for p in module._parameters.values())


def first_owner(module: nn.Module) -> nn.Module:
    """The first module at or below this one that owns parameters: where those lie tells the device of all."""
    return next((inner for inner in module.modules() if any(p is not None for p in inner._parameters.values())), module)
