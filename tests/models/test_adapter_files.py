"""Adapters in the layout of PEFT: read by the formula, checked, written and read again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fimo.errors import InputError
from fimo.models.adapter_files import CONFIG, WEIGHTS, AdapterFiles, write_adapters
from fimo.models.lora import LowRankAdapter, add_adapters
from tests.models.folders import save_bert

LAYERS = ("0.query", "1.query")


def network() -> nn.Module:
    torch.manual_seed(0)
    block = [nn.ModuleDict({"query": nn.Linear(4, 4), "out": nn.Linear(4, 3)}) for _ in range(2)]
    return nn.ModuleDict({"encoder": nn.ModuleList(block), "head": nn.Linear(3, 2)}).double()


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    """Write adapters of rank 2 on queries, as PEFT does, of a model that has blocks at its root."""
    torch.manual_seed(1)
    found = {}
    for layer in LAYERS:
        found[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(2, 4)
        found[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(4, 2)
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": "some/model",
        "r": 2, "lora_alpha": 6, "target_modules": ["query"], "bias": "none",
        "use_rslora": False, "use_dora": False, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_file({**found, **(tensors or {})}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (3.0, 3.0)),
        ({"use_rslora": True}, (6 / math.sqrt(2), 6 / math.sqrt(2))),
        ({"alpha_pattern": {"1.query": 4}}, (3.0, 2.0)),
        ({"alpha_pattern": {r"\d.query": 4}}, (2.0, 2.0)),
    ],
)
def test_a_layer_becomes_what_the_formula_says(
    tmp_path: Path, settings: dict[str, Any], scales: tuple[float, float]
) -> None:
    adapted, plain, x = network(), network(), torch.randn(5, 4).double()
    files = AdapterFiles.read(write(tmp_path, **settings))
    assert files.add_to(adapted) == ["encoder.0.query", "encoder.1.query"]
    for name, scale in zip(("0", "1"), scales, strict=True):
        a, b = (files.down[f"{name}.query"].double(), files.up[f"{name}.query"].double())
        layer = plain.get_submodule(f"encoder.{name}.query")
        expected = layer(x) + scale * x @ a.T @ b.T
        torch.testing.assert_close(adapted.get_submodule(f"encoder.{name}.query")(x), expected)


def test_modules_that_were_trained_whole_are_filled_in(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    adapted = network()
    folder = write(tmp_path, {"base_model.model.0.out.weight": weight}, modules_to_save=["out"])
    AdapterFiles.read(folder).add_to(adapted)
    assert torch.equal(adapted.get_parameter("encoder.0.out.weight"), weight.double())
    folder = write(tmp_path, {"base_model.model.score.weight": weight}, modules_to_save=["score"])
    with pytest.raises(InputError, match=r"holds score.weight \(modules_to_save\), which this network lacks"):
        AdapterFiles.read(folder).add_to(network())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA but got IA3"),
        ({"bias": "lora_only"}, "bias: expected none but got lora_only"),
        ({"use_dora": True}, "use_dora: expected nothing but got True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication: expected nothing"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4 changes the base"),
        ({"r": 3}, "0.query has rank 2, not 3"),
    ],
)
def test_what_fimo_does_not_have_is_refused_by_its_name(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"model.network.adapters.*{message}"):
        AdapterFiles.read(write(tmp_path, **settings)).add_to(network())


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no adapter_config.json"):
        AdapterFiles.read(tmp_path)
    wrong = {"base_model.model.0.query.lora_A.weight": torch.randn(2, 5)}
    with pytest.raises(InputError, match=r"0.query: expected shape \(2, 4\) but got \(2, 5\)"):
        AdapterFiles.read(write(tmp_path, wrong)).add_to(network())
    other = {
        "base_model.model.h.lora_A.weight": torch.ones(2, 4),
        "base_model.model.h.lora_B.weight": torch.ones(4, 2),
    }
    with pytest.raises(InputError, match=r"of some/model, which are no layers of this network"):
        AdapterFiles.read(write(tmp_path, other)).add_to(network())
    half = {"base_model.model.h.lora_A.weight": torch.ones(2, 4)}
    with pytest.raises(InputError, match=r"expected lora_A and lora_B of each layer but h"):
        AdapterFiles.read(write(tmp_path, half))
    more = {"base_model.model.0.query.lora_magnitude_vector": torch.ones(4)}
    with pytest.raises(InputError, match=r"lora_magnitude_vector belong to no low-rank adapter"):
        AdapterFiles.read(write(tmp_path, more))
    with pytest.raises(InputError, match=r"NaN"):
        AdapterFiles.read(
            write(tmp_path, {"base_model.model.0.query.lora_A.weight": torch.full((2, 4), torch.nan)})
        )


def test_adapters_are_written_and_read_again(tmp_path: Path) -> None:
    adapted, x = network(), torch.randn(5, 4).double()
    add_adapters(adapted, ["encoder.0.query"], rank=3, alpha=2.0)
    add_adapters(adapted, ["encoder.1.query"], rank=2, alpha=5.0)
    for adapter in (m for m in adapted.modules() if isinstance(m, LowRankAdapter)):
        nn.init.normal_(adapter.up.weight)
    write_adapters(adapted, tmp_path, "some/model", "encoder")
    again = network()
    AdapterFiles.read(tmp_path).add_to(again)
    for name in ("encoder.0.query", "encoder.1.query"):
        torch.testing.assert_close(adapted.get_submodule(name)(x), again.get_submodule(name)(x))
    with pytest.raises(InputError, match="has no low-rank adapters"):
        write_adapters(network(), tmp_path)


def classifier(folder: Path, adapters: Any, head: str = "own") -> nn.Module:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from fimo.models.huggingface import text_classifier

    return text_classifier(str(folder), 12, 3, head=head, adapters=adapters, dropout=None)


def test_a_classifier_takes_a_folder_and_trains_the_rest_of_it_only(tmp_path: Path) -> None:
    new = {"rank": 2, "alpha": 3.0, "layers": ["*query"]}
    bert = save_bert(tmp_path / "bert", classes=3)
    adapted = classifier(bert, new)
    nn.init.normal_(adapted.get_submodule("model.bert.encoder.layer.1.attention.self.query").up.weight)
    write_adapters(adapted, tmp_path / "adapters", "bert")
    inputs = {"input_ids": torch.randint(4, 12, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    again = classifier(bert, str(tmp_path / "adapters"))
    torch.testing.assert_close(again.eval()(**inputs), adapted.eval()(**inputs))
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained
    assert all(".up." in n or ".down." in n for n in trained)
    names = [
        n
        for n, m in classifier(bert, str(tmp_path / "adapters"), "new").named_modules()
        if isinstance(m, LowRankAdapter)
    ]
    assert names == [f"encoder.encoder.layer.{k}.attention.self.query" for k in (0, 1)]


def test_files_are_those_of_peft_itself(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForSequenceClassification

    bert = save_bert(tmp_path / "bert", classes=3)
    inputs = {"input_ids": torch.randint(4, 12, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    for k, more in enumerate(
        ({}, {"use_rslora": True, "task_type": "SEQ_CLS", "rank_pattern": {"value": 3}})
    ):
        theirs = AutoModelForSequenceClassification.from_pretrained(bert, attn_implementation="eager")
        config = peft.LoraConfig(
            r=2, lora_alpha=5, target_modules=["query", "value"], lora_dropout=0.1, **more
        )
        model = peft.get_peft_model(theirs, config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    nn.init.normal_(p)
        model.save_pretrained(tmp_path / f"theirs{k}")
        ours = classifier(bert, str(tmp_path / f"theirs{k}")).eval()
        torch.testing.assert_close(ours(**inputs), model(**inputs).logits)
        if k == 0:
            write_adapters(ours, tmp_path / "ours", str(bert))
            theirs = AutoModelForSequenceClassification.from_pretrained(bert, attn_implementation="eager")
            again = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
            torch.testing.assert_close(again(**inputs).logits, ours(**inputs))
            assert (
                load_file(tmp_path / "ours" / WEIGHTS).keys()
                == load_file(tmp_path / "theirs0" / WEIGHTS).keys()
            )
