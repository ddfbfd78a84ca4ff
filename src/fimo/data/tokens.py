"""Texts to token indices: a model's own tokenizer, words, or bytes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fimo.data.hub import model_source
from fimo.errors import InputError
from fimo.extras import TEXT, require

KEY = "dataset.tokenizer"
BYTES = "bytes"
WORDS = "words"
WITHOUT_TEXT = "¶"
"""What is shown of a token that stands for no text, such as a text's end."""

INCOMPLETE = "\ufffd"
"""That a text ends with whose last character's bytes are not all there."""


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

    def pieces(self, indices: Sequence[int]) -> list[str]:
        """Return each token's own part of the text; a character of several tokens goes with its last."""
        found, shown = [], ""
        for k in range(len(indices)):
            text = self.decode(indices[: k + 1])
            if text.endswith(INCOMPLETE) and k + 1 < len(indices):
                found.append("")
                continue
            found.append(text[len(shown) :] if len(text) > len(shown) else WITHOUT_TEXT)
            shown = text
        return found


class ByteTokens(Tokens):
    """UTF-8 bytes as tokens, an end-of-text token and padding: works for any text, offline."""

    end, padding, vocabulary = 256, 257, 258

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        return [[*text.encode(), *([self.end] if special else [])] for text in texts]

    def decode(self, indices: Sequence[int]) -> str:
        return bytes(i for i in indices if i < 256).decode(errors="replace")


class WordTokens(Tokens):
    """Words and punctuation marks of given texts as tokens, the most frequent first.

    Words that these texts lack, or that are too rare, are one unknown token.

    Args:
        texts: whose words are known.
        most: words that are known; all when None.
    """

    unknown, end, padding = 0, 1, 2
    special = ("<unk>", "<end>", "<pad>")
    pattern = re.compile(r"<\w+>|\w+(?:['\u2019]\w+)*|[^\w\s]")

    def __init__(self, texts: Sequence[str], most: int | None = None) -> None:
        if most is not None and most < 1:
            raise InputError("dataset.vocabulary", f"expected at least 1 but got {most}")
        count = Counter(word for text in texts for word in self.pattern.findall(text))
        for name in self.special:
            count.pop(name, None)
        by_frequency = sorted(count, key=lambda word: (-count[word], word))[:most]
        self.words = [*self.special, *by_frequency]
        self._index = {word: k for k, word in enumerate(self.words)}
        self.vocabulary = len(self.words)

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        ends = [self.end] if special else []
        return [
            [*(self._index.get(word, self.unknown) for word in self.pattern.findall(text)), *ends]
            for text in texts
        ]

    def decode(self, indices: Sequence[int]) -> str:
        text = " ".join(self.words[i] for i in indices if i not in (self.end, self.padding))
        return re.sub(r" ([.,;:!?)\]])", r"\1", text)


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


def make_tokens(name: str | None, texts: Sequence[str] = (), most: int | None = None) -> Tokens:
    """Return a configuration's tokenizer.

    Args:
        name: ``bytes``, ``words``, or a model's (:func:`fimo.data.hub.model_source`).
        texts: whose words ``words`` knows, and ``most`` of them.

    Raises:
        InputError: none is given, or it can't be read.
    """
    if name is None:
        raise InputError(
            KEY, "must be given; a text model such as model=minilm or model=bert brings its own, or say bytes"
        )
    if name == WORDS:
        return WordTokens(texts, most)
    return ByteTokens() if name == BYTES else ModelTokens(name)
