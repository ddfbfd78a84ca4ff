"""Arguments of a target are held against its signature before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fimo.app.arguments import check_arguments
from fimo.app.values import NOT_ARGUMENTS
from fimo.errors import InputError

CONF = Path(__file__).parents[1] / "conf"


def node(**values: Any) -> Any:
    return OmegaConf.create(values)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hidden": 8}, "n.hidden: expected a list but got 8"),
        ({"dropout": "high"}, "n.dropout: expected a number but got 'high'"),
        ({"inputs": 2.5}, "n.inputs: expected a whole number but got 2.5"),
        ({"inputs": True}, "n.inputs: expected a whole number but got True"),
        ({"activation": [1]}, "n.activation: expected a text but got [1]"),
        ({"widht": 3}, "n.widht: unknown argument; "),
    ],
)
def test_what_does_not_fit_is_named_with_its_key(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_arguments(node(_target_="fimo.models.mlp.mlp", **arguments), "n")
    assert said in str(caught.value)


def test_what_the_caller_replaces_is_not_looked_at() -> None:
    check_arguments(node(_target_="fimo.models.mlp.mlp", inputs="auto", hidden=[]), "n", ["inputs"])


def test_nodes_inside_are_checked_too() -> None:
    inner = {"_target_": "torch.nn.Linear", "in_feature": 3}
    with pytest.raises(
        InputError, match=r"n\.network\.in_feature: unknown argument; did you mean in_features"
    ):
        check_arguments(node(_target_="fimo.models.adapted.Adapted", network=inner), "n")


@pytest.mark.parametrize("name", ["no_such_module.Thing", "fimo.models.mlp.mpl", "Thing"])
def test_a_target_that_can_not_be_imported_is_one_line_with_the_reason(name: str) -> None:
    with pytest.raises(InputError, match="can't be imported: ") as caught:
        check_arguments(node(_target_=name), "model.network")
    assert "\n" not in str(caught.value)
    assert caught.value.key == "model.network._target_"


def shipped() -> list[tuple[str, Any]]:
    """Every node with a target in the configuration, with its name."""
    found = []
    for file in sorted(CONF.rglob("*.yaml")):
        content = OmegaConf.load(file)
        for name, value in [("", content), *((str(k), content._get_node(k)) for k in content)]:
            if OmegaConf.is_dict(value) and str(value.get("_target_", "")).startswith("fimo."):
                found.append((f"{file.stem} {name}", value))
    return found


@pytest.mark.parametrize(("name", "target"), [pytest.param(*x, id=x[0]) for x in shipped()])
def test_what_is_shipped_fits_its_own_signatures(name: str, target: Any) -> None:
    open_ones = {
        k for k in target if OmegaConf.is_missing(target, k) or OmegaConf.is_interpolation(target, k)
    }
    closed = [k for k in target if k not in NOT_ARGUMENTS and k not in open_ones]
    values = {k: target._get_node(k) for k in closed}
    check_arguments(OmegaConf.create(values), name, ["inputs", "outputs", "classes"])
