"""Tiny model folders as transformers saves them: a word tokenizer and a two-layer BERT or GPT-2."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ("good", "bad", "film", "a", "the", "very", "dull", "bright")


def save_tokenizer(folder: Path, words: tuple[str, ...] = WORDS, longest: int = 12) -> None:
    """Save a tokenizer with one index per word and BERT's special tokens around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocabulary = {word: k for k, word in enumerate((*special, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=longest,
    ).save_pretrained(folder)  # fmt: skip


def save_bert(folder: Path, classes: int | None = None, vocabulary: int = 12) -> Path:
    """Save a tiny BERT (with a classification head where ``classes`` is given) and its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16, num_labels=classes or 2,
    )  # fmt: skip
    model = BertModel(config) if classes is None else BertForSequenceClassification(config)
    for parameter in model.parameters():  # the usual initial scale gives nearly constant outputs
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
