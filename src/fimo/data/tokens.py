"""Texts to token indices: a model's own tokenizer, or bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from fimo.data.hub import model_source
from fimo.errors import InputError
from fimo.extras import TEXT, require

KEY = "dataset.tokenizer"
BYTES = "bytes"


class Tokens(ABC):
    """Turns texts into lists of token indices and back.

    Attributes:
        vocabulary: number of token indices.
        padding: the index that fills short instances.
        longest: most tokens that the model takes, or None where the tokenizer does not say.
    """

    vocabulary: int
    padding: int
    longest: int | None = None

    @abstractmethod
    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Return the token indices of each text, with the model's special tokens around them if wanted."""

    @abstractmethod
    def decode(self, indices: Sequence[int]) -> str:
        """Return the text of token indices, without special tokens."""


class ByteTokens(Tokens):
    """UTF-8 bytes as tokens, an end-of-text token and padding: works for any text, offline."""

    end, padding, vocabulary = 256, 257, 258

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        return [[*text.encode(), *([self.end] if special else [])] for text in texts]

    def decode(self, indices: Sequence[int]) -> str:
        return bytes(i for i in indices if i < 256).decode(errors="replace")


class ModelTokens(Tokens):
    """The tokenizer that a Hugging Face model folder, package or hub name comes with."""

    def __init__(self, path: str) -> None:
        require(KEY, TEXT)
        source = model_source(path, KEY)
        try:
            from transformers import AutoConfig, AutoTokenizer

            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
            config: Any = AutoConfig.from_pretrained(source)
        except Exception as error:  # a folder without a tokenizer fails in many ways
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(KEY, f"{path} has no tokenizer that can be read: {reason}") from None
        self.vocabulary = len(self.tokenizer)
        end = self.tokenizer.eos_token_id
        padding = self.tokenizer.pad_token_id
        self.padding = int(padding if padding is not None else end if end is not None else 0)
        limits = [
            int(n)
            for n in (self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
            if isinstance(n, int) and n < 10**6  # tokenizers say 10^30 for "no limit"
        ]
        self.longest = min(limits) if limits else None

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)
        indices: list[list[int]] = encoded["input_ids"]
        return indices

    def decode(self, indices: Sequence[int]) -> str:
        return str(self.tokenizer.decode(indices, skip_special_tokens=True))


def make_tokens(name: str | None) -> Tokens:
    """Return a configuration's tokenizer: ``bytes``, or a model's (:func:`fimo.data.hub.model_source`).

    Raises:
        InputError: none is given, or it can't be read.
    """
    if name is None:
        raise InputError(
            KEY, "must be given; a text model such as model=minilm or model=bert brings its own, or say bytes"
        )
    return ByteTokens() if name == BYTES else ModelTokens(name)
