"""Similarity of hidden representations."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fimo.data.instances import IGNORED, Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel, apply
from fimo.models.row_order import RowMoves


class EmbeddingSimilarity(AttributionMethod):
    """Similarity of a test and a training instance as the final model's last layer sees them (a baseline).

    score[j, i] = similarity(h_j, h_i), h the input of the network's last linear layer. Of a sequence it is
    the mean over positions that count (with a target, and left by an attention mask); lengths may differ.
    With ``signed`` a training instance with another class counts negatively (classification), so that the
    sign has the meaning of all methods: removing a near instance of one's own class hurts.

    Args:
        similarity: ``cosine``, ``dot`` or ``euclidean`` (minus the distance).
        signed: negative for another class; needs class indices as targets, ignored otherwise.
        layer: name of the module whose input is the representation; the last linear layer when None.
        batch_size: instances per forward pass.
    """

    needs = "a last linear layer"
    cost = "one pass"
    use = "a baseline: similar rows, not influential ones"

    def __init__(
        self,
        similarity: Literal["cosine", "dot", "euclidean"] = "cosine",
        signed: bool = False,
        layer: str | None = None,
        batch_size: int = 1024,
    ) -> None:
        if similarity not in ("cosine", "dot", "euclidean"):
            raise InputError("similarity", f"expected one of cosine, dot, euclidean but got {similarity!r}")
        self.similarity, self.signed, self.layer, self.batch_size = similarity, signed, layer, batch_size

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        return no_representation(final_model, self.layer)

    def scores(self, problem: AttributionProblem) -> Tensor:
        if reason := self.inapplicable(problem.final_model, problem.train):
            raise InputError("layer", reason)
        test, left_out = problem.test, problem.removed
        ours = representations(problem.final_model, test, self.layer, self.batch_size)
        theirs = representations(problem.final_model, left_out, self.layer, self.batch_size)
        if self.similarity == "euclidean":
            found = -torch.cdist(ours, theirs)
        else:
            found = ours @ theirs.T
            if self.similarity == "cosine":
                norms = ours.norm(dim=1)[:, None] * theirs.norm(dim=1)
                found = found / norms.where(norms > 0, 1)
        if self.signed and not test.targets.is_floating_point() and test.targets.dim() == 1:
            same = test.targets[:, None] == left_out.targets
            found = torch.where(same, found, -found)
        return found


def no_representation(final_model: FinalModel, layer: str | None = None) -> str | None:
    """Return why the network has no hidden representation, or None.

    Args:
        layer: name of the module whose input it would be; the last linear layer when None.
    """
    if layer is not None:
        found = dict(final_model.network.named_modules())
        return None if layer in found else f"the network has no module {layer!r}"
    linear = [m for m in final_model.network.modules() if isinstance(m, nn.Linear)]
    if not linear:
        return "the network has no linear layer, whose input would be the representation"
    only = (
        isinstance(final_model.network, nn.Sequential)
        and len(list(final_model.network.parameters())) <= 2
        and not any(isinstance(m, nn.Identity) for m in final_model.network)  # marks computed features
    )
    return "the network has no hidden representation" if only or final_model.network is linear[0] else None


@torch.no_grad()
def representations(
    final_model: FinalModel, instances: Instances, layer: str | None = None, batch_size: int = 1024
) -> Tensor:
    """Return ``[n, d]``: the input of a module (by default the last linear one) per instance.

    Of inputs ``[n, ..., d]`` it is the mean over all axes between, where padding doesn't count.
    """
    network = final_model.network
    if layer is not None:
        module = network.get_submodule(layer)
    else:
        module = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    found: list[Tensor] = []
    seen: list[Tensor] = []

    def entering(batch: Instances) -> tuple[Tensor, bool]:
        seen.clear()
        with RowMoves(network, batch.inputs) as moves:
            apply(network, batch.inputs)
        if not seen:
            raise InputError("layer", "the network does not use its last linear layer; name another")
        return seen[-1], moves.noted  # the last use, where there are several

    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for batch in instances.batches(batch_size):
            hidden, moved = entering(batch)
            if moved:  # rows may be in an order of the network's own
                found += [_pooled(entering(one)[0], one) for one in batch.batches(1)]
            else:
                found.append(_pooled(hidden, batch))
    finally:
        handle.remove()
    return torch.cat(found)


def _pooled(hidden: Tensor, batch: Instances) -> Tensor:
    """Return the mean ``[n, d]`` of ``hidden`` ``[n, ..., d]`` over positions that count."""
    if len(hidden) != len(batch):
        rows = f"{len(hidden)} rows of {len(batch)} instances enter it"
        raise InputError("layer", f"{rows}; expected one each: name another layer")
    if hidden.dim() == 2:
        return hidden
    counts = torch.ones(hidden.shape[:-1], dtype=hidden.dtype, device=hidden.device)
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
    targets = None if batch.targets.is_floating_point() else batch.targets != IGNORED
    for kept in (mask, targets):
        # longer where the network cut off what is padding in the whole batch
        if kept is not None and kept.dim() == 2 == counts.dim() and kept.shape[1] >= counts.shape[1]:
            counts = counts * kept[:, : counts.shape[1]].to(hidden.dtype)
    hidden, counts = hidden.flatten(1, -2), counts.flatten(1)[..., None]
    return (hidden * counts).sum(1) / counts.sum(1).clamp(min=1)
