"""What `cg` costs at the size of the FICO data: 8,900 rows, two classes, an MLP 23-128-128-2.

    python benchmarks/conjugate_gradients.py [--damping time_matched 10x] [--epochs 200] [--lr .001]

prints CPU seconds of one thread for 50 left-out and 50 test instances, and how far scores are from those by
the same Krylov space in float64 and parameter space. Data are drawn: labels by a logistic model of the
features and a product of two of them.
"""

from __future__ import annotations

import argparse
import logging
import time

import torch

import fimo
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.krylov_inverses import ParameterInverse
from fimo.curvature.operators import RowsOperator
from fimo.data.instances import Instances
from fimo.methods.cg import ConjugateGradients
from fimo.models.final_model import FinalModel
from fimo.models.mlp import mlp

N, SOME, FEATURES = 8900, 50, 23


def problem() -> tuple[FinalModel, Instances, Instances]:
    torch.manual_seed(0)
    x = torch.randn(N + SOME, FEATURES) * torch.linspace(1.5, 0.4, FEATURES)
    logits = 0.3 * x @ torch.randn(FEATURES) + 0.5 * (x[:, 0] * x[:, 1]).sin()
    y = (torch.rand(N + SOME) < logits.sigmoid()).long()
    network = mlp(FEATURES, 2, (128, 128))
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for _ in range(20):
        for batch in torch.randperm(N).split(128):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    model = FinalModel(network, "cross_entropy", accept_poor=True)
    return model, Instances(x[:N], y[:N]), Instances(x[N:], y[N:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--damping", nargs="+", default=["time_matched", "10x"])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.001)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    model, train, test = problem()
    training = fimo.Protocol(lr=args.lr, batch_size=128, epochs=args.epochs)
    gradients = InstanceGradients(model)
    left = gradients.measurements(test).to(torch.float64)
    right = gradients.losses(train[:: N // SOME][:SOME]).to(torch.float64)
    exact = ParameterInverse(RowsOperator(gradients.gauss_newton(train).to(torch.float64)), left, right)
    for damping in args.damping:
        method = ConjugateGradients(damping)
        start = time.process_time()
        scores = fimo.attribute(
            model,
            train,
            test,
            method,
            left_out=list(range(0, N, N // SOME))[:SOME],
            further_training=training,
        )
        seconds = time.process_time() - start
        given = fimo.api.followed(model, train, training, 1) if damping == "time_matched" else None
        values = method.dampings(method.fit(model, train), given).tolist()
        exact.grow(values, 1e-9, 1000, 5000)
        expected = exact.products(values)[..., 0] / N
        found = scores.values.double().view(expected.shape)
        error = ((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()
        print(
            f"{damping}: {seconds:.2f} s, {len(values)} dampings of {min(values):.3g} and more, "
            f"{scores.notes[0]}; differs from float64 by {error:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
