"""The gold standard by a plain PyTorch loop: one run at a time, torch.optim, plain modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.engine.protocol import DTYPES, Protocol
from fimo.models.final_model import FinalModel, apply


def plain_run(
    final_model: FinalModel,
    train: Instances,
    test: Instances,
    protocol: Protocol,
    seed: int,
    left_out: Sequence[int] = (),
    weight: float = 0.0,
    kept_in_eval: Sequence[str] = (),
) -> tuple[Tensor, Tensor, nn.Module]:
    """Continue training once.

    Args:
        left_out: training indices without which to train.
        weight: w of left-out instances: under ``mask``, what their losses are multiplied with; under
            ``every_batch``, (w - 1) / N times their losses is added.
        kept_in_eval: names of modules that stay in eval mode, besides batch normalisation.

    Returns:
        Test losses ``[E, J]`` (float64), distances ``[E]`` from the final model, and the network.
    """
    if protocol.leave_out == "with_duplicates":
        left_out = [i for i in range(len(train)) if any(same(train, i, k) for k in left_out)]
    device = train.targets.device
    network = copy.deepcopy(final_model.network).to(DTYPES[protocol.dtype]).train()
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or name in kept_in_eval:
            module.training = False
    train = train.to(dtype=DTYPES[protocol.dtype])
    test = test.to(dtype=DTYPES[protocol.evaluation_dtype])
    names = list(final_model.parameters())
    for name, p in network.named_parameters():
        p.requires_grad_(name in names)
    trained = [p for p in network.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    optimizer = make_optimizer(trained, protocol)
    n, size = len(train), protocol.batch_size
    horizon = protocol.total_steps(n)
    generator = torch.Generator().manual_seed(seed)
    losses, distances, step, epoch = [], [], 0, 0
    while True:
        order = torch.randperm(n, generator=generator).tolist()
        if protocol.leave_out == "shift":
            order = [i for i in order if i not in left_out]
        for first in range(0, len(order), size):
            index = order[first : first + size]
            batch = train[torch.tensor(index, device=device)]
            for group in optimizer.param_groups:
                group["lr"] = protocol.learning_rate(step, horizon)
            optimizer.zero_grad()
            torch.manual_seed((seed * 1_000_003 + step) * 2)
            each = final_model.loss(apply(network, batch.inputs), batch.targets)
            if protocol.leave_out in ("mask", "with_duplicates"):
                each = each * torch.tensor(
                    [weight if i in left_out else 1.0 for i in index], dtype=each.dtype
                )
            loss = each.sum() / len(index)
            stay = n
            if protocol.leave_out == "reweighted":
                stay = n - (1 - weight) * len(left_out)
                loss = loss * n / stay
            if protocol.leave_out in ("every_batch", "reweighted") and left_out:
                torch.manual_seed((seed * 1_000_003 + step) * 2 + 1)
                out = train[torch.tensor(list(left_out), device=device)]
                loss = (
                    loss
                    + (weight - 1) * final_model.loss(apply(network, out.inputs), out.targets).sum() / stay
                )
            loss.backward()
            if protocol.clip_norm is not None:
                nn.utils.clip_grad_norm_(trained, protocol.clip_norm)
            optimizer.step()
            step += 1
            at_end = first + size >= len(order)
            last = (
                step == horizon if protocol.steps is not None or protocol.evaluate_every != "epoch" else False
            )
            every = protocol.evaluate_every
            if last or (at_end if every == "epoch" else step % int(every) == 0):
                losses.append(test_losses(final_model, network, test, protocol))
                distances.append(
                    sum((p - q).detach().double().square().sum() for p, q in zip(trained, start, strict=True))
                )
            if last:
                break
        epoch += 1
        if step >= horizon or (protocol.evaluate_every == "epoch" and epoch == protocol.epochs):
            return torch.stack(losses), torch.stack(distances).sqrt(), network


def same(train: Instances, i: int, k: int) -> bool:
    """Whether two instances have the same inputs and target."""
    return all(torch.equal(tensor[i], tensor[k]) for tensor in train.tensors().values())


def make_optimizer(parameters: list[nn.Parameter], protocol: Protocol) -> torch.optim.Optimizer:
    """Return torch's own optimizer of a protocol."""
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            protocol.lr,
            momentum=protocol.momentum,
            nesterov=protocol.nesterov,
            weight_decay=protocol.weight_decay,
        )
    if protocol.optimizer == "lion":
        return PlainLion(parameters, protocol.lr, protocol.betas, protocol.weight_decay)
    kind = torch.optim.Adam if protocol.optimizer == "adam" else torch.optim.AdamW
    return kind(
        parameters, protocol.lr, betas=protocol.betas, eps=protocol.eps, weight_decay=protocol.weight_decay
    )


class PlainLion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. (2023), line by line."""

    def __init__(self, parameters, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for theta in group["params"]:
                g = torch.zeros_like(theta) if theta.grad is None else theta.grad
                m = self.state[theta].get("m", torch.zeros_like(theta))
                c = beta1 * m + (1 - beta1) * g
                theta.copy_(theta - lr * (torch.sign(c) + decay * theta))
                self.state[theta]["m"] = beta2 * m + (1 - beta2) * g


@torch.no_grad()
def test_losses(final_model: FinalModel, network: nn.Module, test: Instances, protocol: Protocol) -> Tensor:
    """Return the losses ``[J]`` of a network in eval mode, in the evaluation dtype."""
    wide = copy.deepcopy(network).to(DTYPES[protocol.evaluation_dtype]).eval()
    measurement = final_model.measurement or final_model.loss
    return measurement(apply(wide, test.inputs), test.targets).double()


test_losses.__test__ = False  # type: ignore[attr-defined]


def plain_sensitivity(
    final_model: FinalModel,
    train: Instances,
    test: Instances,
    protocol: Protocol,
    seeds: Sequence[int],
    units: Sequence[Sequence[int]],
) -> dict[str, Tensor]:
    """Return ``raw [S, E, J, L]``, ``full_losses``, ``distance_full`` and ``distance``, in float64."""
    raw, full_losses, distance_full, distance = [], [], [], []
    for seed in seeds:
        full, d, _ = plain_run(final_model, train, test, protocol, seed)
        runs = [plain_run(final_model, train, test, protocol, seed, unit) for unit in units]
        raw.append(torch.stack([losses - full for losses, _, _ in runs], -1))
        distance.append(torch.stack([di for _, di, _ in runs], -1))
        full_losses.append(full)
        distance_full.append(d)
    return {
        "raw": torch.stack(raw),
        "full_losses": torch.stack(full_losses),
        "distance_full": torch.stack(distance_full),
        "distance": torch.stack(distance),
    }
