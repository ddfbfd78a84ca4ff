"""How attention is computed, where that is a setting of the process."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel


def plain_attention() -> AbstractContextManager[None]:
    """Compute attention by its formula within the context, which may be entered again and on several threads.

    The fused kernels have no second derivative and can't be vectorised by ``torch.func``, and those that
    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` call in eval mode have no derivative at all.
    """
    return _PLAIN


class _Plain(AbstractContextManager[None]):
    """Settings of the process, changed when the first thread enters and put back when the last one leaves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before.enter_context(sdpa_kernel(SDPBackend.MATH))
                self.before.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
                mha.set_fastpath_enabled(False)
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.before.close()


_PLAIN = _Plain()


def vectorised_masks() -> None:
    """Let ``torch.func`` vectorise the attention masks of Hugging Face's networks, where these are loaded.

    The library leaves a mask out where nothing is padded, which is a look at values that ``vmap`` can't take,
    and for which a GPU is waited for. Within :func:`plain_attention`, and only there, it is always made, for
    the same attention.
    """
    library: Any = sys.modules.get("transformers.masking_utils")
    if library is None:
        return
    table = library.ALL_MASK_ATTENTION_FUNCTIONS
    for name in ("sdpa", "eager"):
        if not isinstance(table[name], _Whole):
            table.register(name, _Whole(table[name]))


class _Whole:
    """A function of masks, which does not look whether there need be one within :func:`plain_attention`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _PLAIN.inside:
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return self.function(*args, **kwargs)
