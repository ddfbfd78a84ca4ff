"""The kernel of scaled dot-product attention, which is a setting of the process."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel


def plain_attention() -> AbstractContextManager[None]:
    """Compute attention by its formula within the context.

    The fused kernels have no second derivative and can't be vectorised by ``torch.func``. Threads must not
    change the setting under each other: whoever starts them enters the context around all of them.
    """
    kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return kernel
