"""Dense, plain references of attribution: autograd one instance at a time, P x P matrices, direct solves.

Everything here is slow and obviously right; it shares no code with ``fimo.curvature``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel, functional_apply
from fimo.models.losses import Loss
from tests.cases import Case


def flat_parameters(model: FinalModel) -> Tensor:
    """[P], in the order of ``FinalModel.parameters()``."""
    return torch.cat([p.flatten() for p in model.parameters().values()])


def outputs_of(model: FinalModel, flat: Tensor, instances: Instances) -> Tensor:
    """Outputs [n, D] as a function of a flat parameter vector."""
    parameters, start = {}, 0
    for name, p in model.parameters().items():
        parameters[name] = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    with sdpa_kernel(SDPBackend.MATH):
        return functional_apply(model.network, {**model.buffers(), **parameters}, instances.inputs)


def instance_gradients(model: FinalModel, instances: Instances, loss: Loss | None = None) -> Tensor:
    """[n, P], by one backward pass per instance."""
    loss = loss or model.loss
    rows = []
    for i in range(len(instances)):
        flat = flat_parameters(model).requires_grad_()
        one = instances[i : i + 1]
        rows.append(torch.autograd.grad(loss(outputs_of(model, flat, one), one.targets)[0], flat)[0])
    return torch.stack(rows)


def jacobians(model: FinalModel, instances: Instances) -> Tensor:
    """[n, D, P], by one backward pass per instance and output."""
    found = []
    for i in range(len(instances)):
        flat = flat_parameters(model).requires_grad_()
        outputs = outputs_of(model, flat, instances[i : i + 1])[0].flatten()
        rows = [torch.autograd.grad(o, flat, retain_graph=True)[0] for o in outputs]
        found.append(torch.stack(rows))
    return torch.stack(found)


def output_hessians(model: FinalModel, instances: Instances) -> Tensor:
    """[n, D, D], by autograd in the outputs."""
    outputs = model.outputs(instances)
    found = []
    for i in range(len(instances)):
        target = instances.targets[i : i + 1]
        shape = outputs[i : i + 1].shape
        found.append(
            torch.autograd.functional.hessian(
                lambda o, shape=shape, target=target: model.loss(o.view(shape), target)[0],
                outputs[i].flatten(),
            )
        )
    return torch.stack(found)


def gauss_newton(model: FinalModel, train: Instances) -> Tensor:
    """[P, P], of the mean training loss."""
    j, h = jacobians(model, train), output_hessians(model, train)
    return torch.einsum("ndp,nde,neq->pq", j, h, j) / len(train)


def hessian(model: FinalModel, train: Instances) -> Tensor:
    """[P, P], of the mean training loss, by autograd twice."""

    def mean_loss(flat: Tensor) -> Tensor:
        return model.loss(outputs_of(model, flat, train), train.targets).mean()

    return torch.autograd.functional.hessian(mean_loss, flat_parameters(model))


def empirical_fisher(model: FinalModel, train: Instances) -> Tensor:
    """[P, P], the mean outer product of training gradients."""
    g = instance_gradients(model, train)
    return g.T @ g / len(train)


def influence(case: Case, curvature: Tensor, damping: float) -> Tensor:
    """[J, N]: (1/N) g_j^T (C + damping)^-1 g_i by a dense solve; positive where removal raises the loss."""
    test = instance_gradients(case.final_model, case.test)
    train = instance_gradients(case.final_model, case.train)
    damped = curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)
    return test @ torch.linalg.solve(damped, train.T) / len(case.train)
