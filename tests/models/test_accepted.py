"""Networks of other libraries are taken as they are, or refused with what to pass."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.data.conversion import to_instances
from fimo.engine.context import Setting
from fimo.errors import InputError
from fimo.further_training import Protocol, further_train
from fimo.methods.graddot import GradDot
from fimo.models.adapted import Adapted
from fimo.models.final_model import FinalModel
from fimo.models.losses import binary_cross_entropy, cross_entropy, mean_squared_error
from fimo.store.description import describe
from tests.reference.further_training import plain_sensitivity

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def bert(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8, **settings,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


MASKS = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
ROWS = [
    {"input_ids": torch.randint(1, 20, (5,)), "attention_mask": MASKS[k % 2], "labels": k % 2}
    for k in range(12)
]


def test_a_hugging_face_classifier_is_taken_as_it_is() -> None:
    network = bert()
    implementation = network.config._attn_implementation  # type: ignore[union-attr]
    model, data = FinalModel(network), to_instances(ROWS)
    assert model.loss is cross_entropy
    with torch.no_grad():
        logits = network.eval()(**data.inputs).logits  # type: ignore[arg-type]
    torch.testing.assert_close(model.outputs(data), logits)
    assert network.config._attn_implementation == implementation  # type: ignore[union-attr]
    head = FinalModel(network, trainable=("classifier.*",))
    assert list(head.parameters()) == ["network.classifier.weight", "network.classifier.bias"]
    assert FinalModel(network, trainable="classifier.*").to(dtype=torch.float64).size == head.size
    found = further_train(head, data, data[:3], Protocol(lr=0.1, batch_size=4, epochs=1), 1, [0, 5])
    assert found.raw.abs().max() > 0


def test_what_a_data_parallel_wraps_is_used_without_it() -> None:
    network = nn.Linear(3, 2)
    model, x = FinalModel(nn.DataParallel(network), "cross_entropy"), torch.randn(5, 3)
    assert list(model.parameters()) == ["weight", "bias"]
    torch.testing.assert_close(model.network(x), network(x).detach())
    wrapped = FinalModel(nn.DataParallel(bert()), trainable="classifier.*")
    assert list(wrapped.parameters()) == ["network.classifier.weight", "network.classifier.bias"]


def test_gpt2s_activation_is_one_operation_in_the_copy_and_the_same_function() -> None:
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0
    )
    torch.manual_seed(0)
    network = transformers.GPT2LMHeadModel(config).double().eval()
    for p in network.parameters():
        nn.init.normal_(p, std=0.5)
    seen = []
    network.transformer.h[1].mlp.act.register_forward_hook(lambda *given: seen.append(given[0]))
    model = FinalModel(network, "language_modelling")
    kinds = [type(m) for m in model.network.modules()]
    assert kinds.count(nn.GELU) == 2
    assert type(network.transformer.h[0].mlp.act) is not nn.GELU
    ids = torch.randint(0, 20, (6, 5))
    found = model.network(input_ids=ids)
    assert len(seen) == 1  # hooks stay
    torch.testing.assert_close(found, network(ids).logits.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("inside", [False, True])
def test_a_hugging_face_network_with_gradient_checkpointing_trains_as_without(
    reentrant: bool, dropout: float, inside: bool
) -> None:
    network = bert(hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0, num_labels=2)
    whole = Adapted(network, "logits") if inside else network
    data = to_instances(ROWS)
    tested = data[:3]
    loss = cross_entropy if inside else None
    without = FinalModel(whole, loss, accept_poor=True)
    checkpointing(network, use_reentrant=reentrant)
    model = FinalModel(whole, loss, accept_poor=True)
    assert describe(model.network, "network") == describe(without.network, "network")
    protocol = Protocol(lr=0.2, batch_size=4, epochs=2, leave_out="mask", dtype="float64")
    assert Setting.build(model, data, tested, protocol).engine == "functional"
    found = further_train(model, data, tested, protocol, [3], [0, 5])
    assert torch.equal(found.raw, further_train(without, data, tested, protocol, [3], [0, 5]).raw)
    scores = [GradDot().attribute(one, data, tested).values for one in (model, without)]
    assert torch.equal(*scores)
    assert all(layer.gradient_checkpointing for layer in network.bert.encoder.layer)  # type: ignore[union-attr]
    assert network.bert.embeddings.word_embeddings._forward_hooks  # type: ignore[union-attr]
    plain = copy.copy(model)  # a plain loop over the network as it is
    object.__setattr__(plain, "network", Adapted(network, "logits"))
    expected = plain_sensitivity(plain, data, tested, protocol, [3], [[0], [5]])
    torch.testing.assert_close(found.full_losses, expected["full_losses"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.raw.double(), expected["raw"], rtol=0, atol=1e-7)


def checkpointing(network: nn.Module, **settings: object) -> None:
    """Switch it on, under the name that transformers has for it."""
    switch = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
    switch(settings)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"num_labels": 1}, mean_squared_error),
        ({"num_labels": 3}, cross_entropy),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, binary_cross_entropy),
        ({"num_labels": 2, "problem_type": "regression"}, mean_squared_error),
    ],
)
def test_the_head_of_a_hugging_face_network_says_its_loss(settings: dict, loss: object) -> None:
    assert FinalModel(bert(**settings)).loss is loss


def test_a_causal_language_model_is_asked_for_shifted_targets() -> None:
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    network = transformers.GPT2LMHeadModel(config)
    with pytest.raises(InputError, match=r"model\.loss: .* shifted already"):
        FinalModel(transformers.OPTForCausalLM(transformers.OPTConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8,
            max_position_embeddings=8, word_embed_proj_dim=8,
        )))  # fmt: skip
    with pytest.raises(InputError, match=r"model\.loss: can't be told from GPT2LMHeadModel"):
        FinalModel(network)
    ids = torch.randint(0, 20, (6, 5))
    model = FinalModel(network, "language_modelling")
    data = to_instances(({"input_ids": ids[:, :-1]}, ids[:, 1:]))
    with torch.no_grad():
        logits = network.eval()(ids).logits
        own = torch.stack([F.cross_entropy(z[:-1], i[1:]) for z, i in zip(logits, ids, strict=True)])
    torch.testing.assert_close(model.losses(data), own)


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion = nn.Linear(3, 1), nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_lightning_module_needs_a_loss_for_each_instance_and_is_told_which() -> None:
    with pytest.raises(InputError, match=r"Lit\.training_step .* criterion=MSELoss\(\) that is loss='mse'"):
        FinalModel(Lit())


def test_a_trained_lightning_module_leaves_its_trainer_behind() -> None:
    module, x = Lit(), torch.randn(8, 3)
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :1]), 4))
    model = FinalModel(module, "mse")
    assert model.network._trainer is None  # type: ignore[union-attr]
    assert module.trainer is trainer
    torch.testing.assert_close(model.outputs(to_instances((x, x[:, :1]))), module.eval()(x).detach())
