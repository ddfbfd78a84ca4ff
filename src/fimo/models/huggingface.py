"""Networks of the transformers library: text classifiers and causal language models.

Attention is the plain ("eager") implementation: fused kernels have neither second derivatives nor rules for
``torch.func``, which replicas and per-instance gradients need.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fimo.data.hub import model_source
from fimo.errors import InputError, shortened
from fimo.extras import TEXT, require
from fimo.models.adapter_files import AdapterFiles
from fimo.models.frozen import remaining
from fimo.models.lora import add_adapters, leave_alone

log = logging.getLogger(__name__)

KEY = "model.network.path"
POOLINGS = ("first", "mean")


class TextClassifier(nn.Module):
    """An encoder's token representations, pooled, and a linear layer to the classes.

    Args:
        encoder: returns ``[n, T, d]`` (or an object with ``last_hidden_state``) for token indices.
        outputs: classes.
        pooling: ``first`` takes the first (classification) token, ``mean`` the mean over tokens.
    """

    def __init__(self, encoder: nn.Module, width: int, outputs: int, pooling: str = "first") -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise InputError("model.network.pooling", f"expected first or mean but got {pooling!r}")
        self.encoder, self.pooling, self.trims = encoder, pooling, True
        self.head = nn.Linear(width, outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits ``[n, C]`` of token indices ``[n, T]``, where the mask ``[n, T]`` is 1 for tokens."""
        if self.trims:
            input_ids, attention_mask = trimmed(input_ids, attention_mask)
        mask = additive(attention_mask, self.head.weight.dtype)
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        logits: Tensor = self.head(pooled(hidden, attention_mask, self.pooling))
        return logits

    def split(self, trainable: Collection[str]) -> tuple[nn.Module, nn.Module] | None:
        """Cut before the head, or before the first trained block of an encoder such as BERT's."""
        if not any(name.startswith("encoder.") for name in trainable):
            return Encoded(self.encoder, pooling=self.pooling), remaining(OrderedDict(head=self.head))
        blocks = getattr(getattr(self.encoder, "encoder", None), "layer", None)
        prefix = "encoder.encoder.layer."
        inside = [n.removeprefix(prefix) for n in trainable if n.startswith("encoder.")]
        if not isinstance(blocks, nn.ModuleList) or any(n.startswith("encoder.") for n in inside):
            return None
        first = min(int(name.split(".")[0]) for name in inside)
        return Encoded(self.encoder, blocks=first), LastBlocks(blocks, first, self.head, self.pooling)


class Encoded(nn.Module):
    """An encoder's pooled representation ``[n, d]``, or its tokens before one of its blocks.

    Args:
        pooling: what to return where ``blocks`` is None.
        blocks: how many are passed through; then ``hidden`` ``[n, T, d]`` with the mask is returned.
    """

    def __init__(self, encoder: nn.Module, pooling: str = "first", blocks: int | None = None) -> None:
        super().__init__()
        self.encoder, self.pooling, self.blocks = encoder, pooling, blocks

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | dict[str, Tensor]:
        if self.blocks is None:  # else tokens of all batches must be alike
            input_ids, attention_mask = trimmed(input_ids, attention_mask)
        mask = additive(attention_mask, next(self.encoder.parameters()).dtype)
        found = self.encoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True)
        if self.blocks is None:
            return pooled(found.last_hidden_state, attention_mask, self.pooling)
        return {"hidden": found.hidden_states[self.blocks], "attention_mask": attention_mask}


class LastBlocks(nn.Module):
    """The blocks of a text classifier from ``first`` on, with its head; parameters keep their names."""

    def __init__(self, blocks: nn.ModuleList, first: int, head: nn.Linear, pooling: str) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.encoder = nn.Module()
        kept = {str(k): block for k, block in enumerate(blocks) if k >= first}
        self.encoder.encoder.layer = nn.ModuleDict(kept)
        self.head, self.pooling, self.trims = head, pooling, True

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        if self.trims:
            hidden, attention_mask = trimmed(hidden, attention_mask)
        mask = additive(attention_mask, hidden.dtype)
        for block in self.encoder.encoder.layer.values():  # type: ignore[union-attr,operator]
            found = block(hidden, mask)
            hidden = found if isinstance(found, Tensor) else found[0]
        logits: Tensor = self.head(pooled(hidden, attention_mask, self.pooling))
        return logits


class Logits(nn.Module):
    """A whole transformers model as a network that returns its logits.

    Args:
        model: called by name with token indices (and a mask), returns an object with ``logits``.
        causal: the mask is left away: with padding on the right, no token sees it.
        order: of the model's classes, which of them each class of the data is; its own when None.
    """

    def __init__(self, model: nn.Module, causal: bool = False, order: Sequence[int] | None = None) -> None:
        super().__init__()
        self.model, self.causal, self.trims = model, causal, not causal
        self.order = None if order is None or list(order) == sorted(order) else list(order)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Return logits ``[n, C]``, or ``[n, T, V]`` of a language model.

        Args:
            segments: ``[n, T]``, of a language model's rows of several sequences, which one each token is of;
                see :func:`fimo.data.packing.packed`.
        """
        arguments: dict[str, Any] = {"input_ids": input_ids}
        if self.causal:
            arguments["use_cache"] = False
            if segments is not None:
                arguments |= apart(segments, next(self.model.parameters()).dtype)
            else:  # without a mask the library looks at positions' values, for which a GPU is waited for
                ones = torch.ones(input_ids.shape, dtype=torch.long, device=input_ids.device)
                arguments["attention_mask"] = ones
        elif attention_mask is not None:
            if self.trims:
                arguments["input_ids"], attention_mask = trimmed(input_ids, attention_mask)
            arguments["attention_mask"] = additive(attention_mask, next(self.model.parameters()).dtype)
        logits: Tensor = self.model(**arguments).logits
        return logits if self.order is None else logits[:, self.order]


def text_classifier(
    path: str,
    inputs: int,
    outputs: int,
    pooling: str = "first",
    head: str = "new",
    dropout: float | None = None,
    classes: Sequence[str] = (),
    adapters: Mapping[str, Any] | str | None = None,
) -> nn.Module:
    """Return a text classifier that starts from a pretrained model.

    Args:
        path: a local folder, ``package:NAME``, or a name on the hub (see
            :func:`~fimo.data.hub.model_source`).
        inputs: the tokenizer's vocabulary, checked against the model's.
        outputs: classes.
        pooling: of a new head: ``first`` or ``mean``.
        head: ``new`` puts a linear layer on the encoder; ``own`` keeps the model's classification head.
        dropout: every rate of the model; None keeps its configured ones.
        classes: names of the data set's classes in its order, by which an own head's outputs are found.
        adapters: arguments of :func:`~fimo.models.lora.add_adapters`, or a folder in the layout of PEFT
            (:mod:`fimo.models.adapter_files`); the encoder is then frozen in the final model's training, and
            ``model.trainable`` should name the adapters (``*.up.*``, ``*.down.*``).

    Raises:
        InputError: the model can't be read, or does not fit the tokenizer or the classes.
    """
    if head not in ("new", "own"):
        raise InputError("model.network.head", f"expected new or own but got {head!r}")
    require("model.network", TEXT)
    from transformers import AutoModel, AutoModelForSequenceClassification

    network: nn.Module
    if head == "own":
        model = _pretrained(AutoModelForSequenceClassification, path, inputs)
        if model.config.num_labels != outputs:
            raise InputError(
                KEY, f"{path} has {model.config.num_labels} classes but the data set has {outputs}"
            )
        network = Logits(model, order=order_of_classes(model.config.id2label, classes))
    else:
        model = _pretrained(AutoModel, path, inputs)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # unused: its parameters would have no gradient
        network = TextClassifier(model, model.config.hidden_size, outputs, pooling)
    _adapt(network, adapters, "encoder.*" if head == "new" else "model.*", path)
    if dropout is not None:
        set_dropout(network, dropout)
    return network.train()  # pretrained models come in eval mode, which the Trainer would keep


def order_of_classes(id2label: Mapping[int, str], classes: Sequence[str]) -> list[int]:
    """Return which of a model's outputs each class of the data set is, by name.

    Names are compared without regard to case. Where either side has numbers instead of names (0, 1, ..., or
    ``LABEL_0``), classes are taken by number.

    Args:
        id2label: the model's names by output.
        classes: the data set's, in its order.

    Raises:
        InputError: names that don't match.
    """
    names = {str(name).strip().lower(): int(k) for k, name in id2label.items()}
    wanted = [str(name).strip().lower() for name in classes]
    if not wanted:
        return list(range(len(names)))
    if len(names) == len(id2label) and sorted(wanted) == sorted(names):
        return [names[name] for name in wanted]
    numbers = [_number(name) for name in wanted]
    if sorted(n for n in numbers if n is not None) == list(range(len(id2label))):
        return [n for n in numbers if n is not None]
    if all(_number(name) == k for name, k in names.items()):
        log.warning(
            "the model does not name its classes (%s): they are taken in the data set's order, %s",
            shortened(list(id2label.values())),
            shortened(classes),
        )
        return list(range(len(names)))
    theirs = shortened(list(id2label.values()))
    raise InputError(
        "model.network.head",
        f"own has the classes {theirs} but the data set has {shortened(classes)}; "
        "rename the data's labels, or set dataset.class_names for labels 0, 1, ...",
    )


def _number(name: str) -> int | None:
    """Return the number of a class that has no other name: ``1`` or ``label_1``."""
    text = name.removeprefix("label_")
    return int(text) if text.isdecimal() else None


def causal_lm(
    inputs: int,
    path: str | None = None,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    positions: int = 256,
    dropout: float = 0.0,
    adapters: Mapping[str, Any] | str | None = None,
) -> nn.Module:
    """Return a causal language model: a new GPT-2 of a given size, or a pretrained model.

    Args:
        inputs: the tokenizer's vocabulary.
        path: of a pretrained model; the sizes below are then its own. Some models (Llama) normalise in
            float32 whatever their dtype, so their losses have its precision even where evaluated in float64.
        positions: longest sequence.
        dropout: every rate.
        adapters: as in :func:`text_classifier`.

    Raises:
        InputError: a bad size, or a model that can't be read.
    """
    require("model.network", TEXT)
    if path is not None:
        from transformers import AutoModelForCausalLM

        model = _pretrained(AutoModelForCausalLM, path, inputs)
    else:
        model = _new_language_model(inputs, width, layers, heads, positions)
    network = Logits(model, causal=True)
    _adapt(network, adapters, "model.*", path)
    set_dropout(network, dropout)
    return network.train()


def _adapt(
    network: nn.Module, adapters: Mapping[str, Any] | str | None, freeze: str, path: str | None
) -> None:
    """Put adapters on a network, in place: new ones, or those of a folder."""
    if isinstance(adapters, str):
        files = AdapterFiles.read(adapters)
        base = files.config.get("base_model_name_or_path")
        if base and path and base.rstrip("/").rpartition("/")[2] != path.rstrip("/").rpartition("/")[2]:
            log.warning("the adapters of %s are of %s; the model here is %s", adapters, base, path)
        leave_alone(network, freeze)
        files.add_to(network)
    elif adapters is not None:
        add_adapters(network, freeze=freeze, **adapters)


def pooled(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Return ``[n, d]`` of token representations ``[n, T, d]``: the first, or the mean over tokens."""
    if pooling == "first":
        return hidden[:, 0]
    share = attention_mask.to(hidden.dtype)[..., None]
    return (hidden * share).sum(1) / share.sum(1).clamp(min=1)


def trimmed(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cut off columns that are padding in every instance of a batch (padding is on the right).

    Left as they are under ``vmap`` over instances or batches, where lengths may differ.
    """
    try:
        longest = int(attention_mask.sum(1).max())
    except RuntimeError:  # vmap has no rule for a number that differs along its axis
        return input_ids, attention_mask
    longest = max(longest, 1)
    return input_ids[:, :longest], attention_mask[:, :longest]


def additive(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask ``[n, T]`` of ones and zeros as what is added to attention scores ``[n, 1, T, T]``.

    Made here since the library's own conversion looks at the mask's values, which ``vmap`` can't.
    """
    n, length = attention_mask.shape
    absent = (1 - attention_mask)[:, None, None, :].to(dtype)
    return (absent * torch.finfo(dtype).min).expand(n, 1, length, length)


def apart(segments: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the mask ``[n, 1, T, T]`` and the positions ``[n, T]`` of sequences that share a row."""
    order = torch.arange(segments.shape[1], device=segments.device)
    seen = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order)
    mask = (~seen).to(dtype) * torch.finfo(dtype).min
    return {"attention_mask": mask[:, None], "position_ids": seen.sum(-1) - 1}


def set_dropout(network: nn.Module, rate: float) -> None:
    """Set every dropout rate of a network, in place; transformers keep some outside ``nn.Dropout``."""
    if not 0 <= rate < 1:
        raise InputError("model.network.dropout", f"expected a rate in [0, 1) but got {rate}")
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name in ("attention_dropout", "dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from reporting each weight it reads; what matters here becomes an error."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def _pretrained(kind: Any, path: str, inputs: int) -> Any:
    source = model_source(path, KEY)
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                source, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(KEY, f"{path} can't be read as {kind.__name__}: {reason}") from None
    except Exception as error:  # damaged weights fail in their reader's own ways
        raise InputError(KEY, f"{path} can't be read ({type(error).__name__}: {error})") from None
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        raise InputError(KEY, f"{path} lacks the weights {shortened(missing, 3)}")
    known = model.get_input_embeddings().weight.shape[0]
    if inputs > known:
        raise InputError(
            KEY, f"the tokenizer has {inputs} tokens but {path} knows {known}: they don't belong together"
        )
    return model


def _new_language_model(inputs: int, width: int, layers: int, heads: int, positions: int) -> Any:
    if heads < 1 or width < heads or width % heads:
        raise InputError("model.network.heads", f"expected heads that divide width={width} but got {heads}")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=inputs, n_embd=width, n_layer=layers, n_head=heads, n_positions=positions,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config)
