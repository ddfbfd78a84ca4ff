"""K-FAC and EK-FAC against dense Kronecker products, and where theory says they are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.kronecker import KroneckerFactors, fit_factors
from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy, language_modelling, mean_squared_error
from fimo.testing.cases import Transformer
from tests.cases import CASES
from tests.reference import attribution as dense


def as_matrix(factors: KroneckerFactors) -> Tensor:
    """Return the matrix C that the factors stand for, from its inverse with a damping of 1."""
    p = sum(s.numel() for s in factors.shapes.values())
    eye = torch.eye(p, dtype=torch.float64)
    return torch.linalg.inv(factors.solve(eye, torch.tensor([1.0]))[0]) - eye


def block(model: FinalModel, matrix: Tensor, *names: str) -> Tensor:
    """Return the dense block of the named parameters."""
    owner = [n for n, p in model.parameters().items() for _ in range(p.numel())]
    index = torch.tensor([k for k, n in enumerate(owner) if n in names])
    return matrix[index][:, index]


def test_one_linear_layer_of_a_regression_is_exact() -> None:
    """One output: B is a number, so that the Kronecker product is the whole Gauss-Newton matrix."""
    case = CASES["mlp_regression"]()
    for bias in (True, False):
        model = FinalModel(nn.Sequential(nn.Linear(4, 1, bias=bias)).double(), mean_squared_error)
        truth = dense.gauss_newton(model, case.train)
        for corrected in (True, False):
            factors = fit_factors(InstanceGradients(model), case.train, corrected)
            torch.testing.assert_close(as_matrix(factors), truth)
            assert factors.coverage == 1


@pytest.mark.parametrize("corrected", [True, False])
def test_a_softmax_layer_on_kronecker_structured_data_is_exact(corrected: bool) -> None:
    """Zero weights: diag(p) - p p^T is the same for all instances, so that A and B factor exactly."""
    case = CASES["mlp_classification"]()
    layer = nn.Linear(4, 3).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    model = FinalModel(nn.Sequential(layer), cross_entropy)
    factors = fit_factors(InstanceGradients(model), case.train, corrected)
    torch.testing.assert_close(as_matrix(factors), dense.gauss_newton(model, case.train))


@pytest.mark.parametrize("name", CASES)
def test_second_moments_along_the_eigenvectors_are_exact(name: str) -> None:
    """EK-FAC's matrix and the Gauss-Newton matrix have the same diagonal in EK-FAC's eigenbasis."""
    case = CASES[name]()
    factors = fit_factors(InstanceGradients(case.final_model), case.train, fisher="exact")
    truth, matrix = dense.gauss_newton(case.final_model, case.train), as_matrix(factors)
    for b in factors.blocks:
        found, expected = (block(case.final_model, m, *b.names) for m in (matrix, truth))
        torch.testing.assert_close(found.trace(), expected.trace())
        values, vectors = torch.linalg.eigh(found)
        if b.kind == "dense":
            torch.testing.assert_close(found, expected)
        elif b.values.unique().numel() == b.values.numel():
            torch.testing.assert_close(
                (vectors.T @ expected @ vectors).diagonal(), values, rtol=1e-5, atol=1e-8
            )


@pytest.mark.parametrize("name", ["mlp_regression", "mlp_classification"])
def test_kfac_is_the_kronecker_product_of_the_factors(name: str) -> None:
    case = CASES[name]()
    matrix = as_matrix(fit_factors(InstanceGradients(case.final_model), case.train, corrected=False))
    network = case.final_model.network
    x = network[:2](case.train.inputs).detach()  # enters layer 2
    a = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda z: network[3:](z), network[2](h)) for h in x]
    )
    curved = dense.output_hessians(case.final_model, case.train)
    b_factor = torch.einsum("ndo,nde,nep->op", jacobian, curved, jacobian) / len(x)
    a_factor = a.T @ a / len(x)
    expected = torch.kron(
        b_factor.contiguous(), a_factor.contiguous()
    )  # of [W, b] with the bias as the last column
    out, width = b_factor.shape[0], a_factor.shape[0]
    order = torch.arange(out * width).view(out, width)
    flat = torch.cat([order[:, :-1].flatten(), order[:, -1]])  # weight, then bias
    found = block(case.final_model, matrix, "2.weight", "2.bias")
    torch.testing.assert_close(found, expected[flat][:, flat])


def test_hooks_and_factored_layers_give_the_same_factors() -> None:
    case = CASES["mlp_classification"]()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = case.final_model.network

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = FinalModel(Wrapped(), cross_entropy)
    for corrected in (True, False):
        direct = fit_factors(InstanceGradients(case.final_model), case.train, corrected)
        hooked = fit_factors(InstanceGradients(model), case.train, corrected)
        torch.testing.assert_close(as_matrix(hooked), as_matrix(direct))
    assert not any(m._forward_hooks for m in model.network.modules())


def test_a_bias_is_a_weight_on_a_constant_input() -> None:
    case = CASES["mlp_classification"]()
    with_bias = nn.Linear(4, 3).double()
    without = nn.Linear(5, 3, bias=False).double()
    without.weight.data = torch.cat([with_bias.weight, with_bias.bias[:, None]], 1).detach()
    widened = Instances(
        torch.cat([case.train.inputs, torch.ones(len(case.train), 1).double()], 1), case.train.targets
    )
    a = fit_factors(InstanceGradients(FinalModel(nn.Sequential(with_bias), cross_entropy)), case.train)
    b = fit_factors(InstanceGradients(FinalModel(nn.Sequential(without), cross_entropy)), widened)
    torch.testing.assert_close(a.blocks[0].values, b.blocks[0].values)


@pytest.mark.parametrize("corrected", [True, False])
def test_an_axis_of_length_one_changes_nothing(corrected: bool) -> None:
    case = CASES["mlp_classification"]()

    class Squeezed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).flatten(1)

    model = FinalModel(Squeezed(case.final_model.network), cross_entropy)
    longer = Instances(case.train.inputs[:, None], case.train.targets)
    flat, deep = (fit_factors(InstanceGradients(model), d, corrected) for d in (case.train, longer))
    torch.testing.assert_close(as_matrix(flat), as_matrix(deep))


class Tagger(nn.Module):
    """Predicts each token's class from itself: ``[n, T] -> [n, T, V]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(6, 4), nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(self.embedding(input_ids))))


@pytest.mark.parametrize("corrected", [True, False])
def test_masked_padding_equals_removed_tokens(corrected: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, 6, (9, 3))
    targets = torch.randint(6, (9, 3))
    model = FinalModel(Tagger().double(), language_modelling)
    short = Instances({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets)
    pad = torch.zeros(9, 2, dtype=torch.int64)
    padded = Instances(
        {
            "input_ids": torch.cat([ids, pad], 1),
            "attention_mask": torch.cat([torch.ones_like(ids), pad], 1),
        },
        torch.cat([targets, pad - 100], 1),
    )
    a, b = (fit_factors(InstanceGradients(model), d, corrected, fisher="empirical") for d in (short, padded))
    torch.testing.assert_close(as_matrix(a), as_matrix(b))


def test_coverage_is_reported_and_what_is_not_covered_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["transformer"]()
    monkeypatch.setattr("fimo.curvature.kronecker.MAX_DENSE", 10)
    factors = fit_factors(InstanceGradients(case.final_model), case.train)
    assert factors.uncovered == ["position"]  # a parameter of no known module; LayerNorms are dense blocks
    assert factors.coverage == 1 - 20 / case.final_model.size
    covered = [n for b in factors.blocks for n in b.names]
    assert sorted(covered) == sorted(case.final_model.parameters())


def test_sampled_targets_approach_the_exact_factors() -> None:
    case = CASES["mlp_classification"]()
    gradients = InstanceGradients(case.final_model)
    exact = as_matrix(fit_factors(gradients, case.train, corrected=False, fisher="exact"))
    sampled = as_matrix(fit_factors(gradients, case.train, corrected=False, fisher="sampled", samples=500))
    assert (sampled - exact).norm() < 0.05 * exact.norm()


def test_dead_units_give_finite_solutions() -> None:
    case = CASES["mlp_classification"]()
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    nn.init.constant_(network[0].bias, -100.0)
    model = FinalModel(network, cross_entropy)
    factors = fit_factors(InstanceGradients(model), case.train)
    solved = factors.solve(torch.ones(model.size, 1, dtype=torch.float64), torch.tensor([0.1]), relative=True)
    assert solved.isfinite().all()


def test_fused_attention_allows_second_derivatives() -> None:
    assert isinstance(CASES["transformer"]().final_model.network, Transformer)
    fit_factors(InstanceGradients(CASES["transformer"]().final_model), CASES["transformer"]().train)


def patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Return what each output position of a convolution sees, [n, positions, channels·kh·kw], by slicing."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    ph, pw = conv.padding  # type: ignore[misc]
    x = nn.functional.pad(x, (pw, pw, ph, ph))  # type: ignore[list-item]
    down, along = x.shape[2] - (kh - 1) * dh, x.shape[3] - (kw - 1) * dw
    found = [
        x[:, :, i : i + kh * dh : dh, j : j + kw * dw : dw].flatten(1)
        for i in range(0, down, sh)
        for j in range(0, along, sw)
    ]
    return torch.stack(found, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((3, 2), (1, 1), (0, 0), (1, 1)), ((3, 3), (2, 1), (1, 2), (1, 1)), ((2, 2), (1, 2), (1, 0), (2, 2))],
)
def test_factors_of_a_convolution_are_those_of_its_patches(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    bias: bool,
) -> None:
    """A is a mean over instances and positions, B a sum over positions (Grosse and Martens, 2016)."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, kernel, stride, padding, dilation, bias=bias)
    head = nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    network = nn.Sequential(conv, *head).double()
    conv, head = network[0], network[1:]
    model = FinalModel(network, cross_entropy)
    train = Instances(torch.randn(9, 2, 6, 5).double(), torch.randint(3, (9,)))
    seen = patches(train.inputs, conv)
    before = conv(train.inputs).detach()
    torch.testing.assert_close(  # the patches are right: they give the convolution
        (seen @ conv.weight.flatten(1).T + (conv.bias if bias else 0)).transpose(1, 2).reshape(before.shape),
        before,
    )
    a = torch.cat([seen, torch.ones_like(seen[..., :1])], -1) if bias else seen
    hessians = dense.output_hessians(model, train)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda z: head(z[None])[0], z).flatten(2) for z in before]
    )  # [n, D, out, positions]
    b_factor = torch.einsum("ndot,nde,nept->op", jacobian, hessians, jacobian).contiguous() / len(train)
    a_factor = torch.einsum("nti,ntj->ij", a, a).contiguous() / (a.shape[0] * a.shape[1])
    names = ["0.weight", "0.bias"] if bias else ["0.weight"]
    out, width = len(b_factor), len(a_factor)
    order = torch.arange(out * width).view(out, width)
    inputs = width - bias
    flat = torch.cat([order[:, :inputs].flatten(), order[:, inputs:].flatten()])  # weight, then bias
    kfac = as_matrix(fit_factors(InstanceGradients(model), train, corrected=False, fisher="exact"))
    expected = torch.kron(b_factor, a_factor)[flat][:, flat]
    torch.testing.assert_close(block(model, kfac, *names), expected)
    # EK-FAC: the true matrix's diagonal along the same eigenvectors
    truth = block(model, dense.gauss_newton(model, train), *names)
    vectors = torch.kron(
        torch.linalg.eigh(b_factor)[1].contiguous(), torch.linalg.eigh(a_factor)[1].contiguous()
    )[flat]
    ekfac = as_matrix(fit_factors(InstanceGradients(model), train, corrected=True, fisher="exact"))
    along = (vectors.T @ truth @ vectors).diagonal()
    torch.testing.assert_close(
        block(model, ekfac, *names), (vectors * along) @ vectors.T, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("corrected", [True, False])
def test_a_convolution_along_one_axis_is_one_over_images_of_one_row(corrected: bool) -> None:
    torch.manual_seed(0)
    along = nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2).double()
    over = nn.Conv2d(2, 3, (1, 3), stride=(1, 2), padding=(0, 2), dilation=(1, 2)).double()
    over.weight.data, over.bias.data = along.weight.detach()[:, :, None], along.bias.detach()
    head = nn.Linear(3 * 4, 3).double()
    inputs, targets = torch.randn(9, 2, 8).double(), torch.randint(3, (9,))
    found = []
    for first, x in ((along, inputs), (over, inputs[:, :, None])):
        model = FinalModel(nn.Sequential(first, nn.Tanh(), nn.Flatten(), head), cross_entropy)
        found.append(as_matrix(fit_factors(InstanceGradients(model), Instances(x, targets), corrected)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("outputs", "fisher"), [(16, "exact"), (17, "sampled")])
def test_the_fisher_is_exact_up_to_sixteen_outputs_and_sampled_beyond(outputs: int, fisher: str) -> None:
    torch.manual_seed(0)
    model = FinalModel(nn.Sequential(nn.Linear(2, outputs)).double(), cross_entropy)
    train = Instances(torch.randn(9, 2).double(), torch.randint(outputs, (9,)))
    of = {f: fit_factors(InstanceGradients(model), train, fisher=f) for f in ("auto", "exact", "sampled")}
    assert not torch.equal(of["exact"].blocks[0].values, of["sampled"].blocks[0].values)
    assert torch.equal(of["auto"].blocks[0].values, of[fisher].blocks[0].values)
