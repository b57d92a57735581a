"""The model: weights, forward passes, decoding and steering hooks.

At its import bitsandbytes asks torch to compile four functions, and importing the compiler takes seconds. peft imports
bitsandbytes in every process. So it is imported here first, and the four functions stay uncompiled. They are fallbacks:
of 4-bit weights of an odd width on a CPU, and of devices without kernels of their own.
"""

import torch


def _uncompiled(function=None, **_options):
    return function or (lambda later: later)


_compile, torch.compile = torch.compile, _uncompiled
try:
    import bitsandbytes  # noqa: F401
finally:
    torch.compile = _compile
