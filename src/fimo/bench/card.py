"""A setting's card: what its gold standards are of, how they were made and how good they are."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fimo
from fimo.bench.gold_standard import ABOUT, CARD, README, file_hashes, final_model_folders
from fimo.store.files import written_aside

SHARED = ("data", "model", "protocol", "seeds", "followed_seeds", "left_out", "test", "step", "epoch")
"""What all final models of a setting have alike."""


def write_card(folder: Path, name: str, about: str) -> None:
    """Write ``card.json`` and ``README.md`` of a setting, from what is known of its final models.

    Args:
        name: of the setting.
        about: it, in one line.
    """
    card = card_of(name, about, [json.loads((f / ABOUT).read_text()) for f in final_model_folders(folder)])
    card["files"] = file_hashes(folder)
    for file, text in ((CARD, json.dumps(card, indent=1)), (README, readme(card))):
        with written_aside(folder / file) as aside:
            aside.write_text(text)


def card_of(name: str, about: str, final_models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a setting's card, but for the hashes of its files."""
    first = final_models[0]
    return {
        "setting": name,
        "about": about,
        "made": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "fimo": fimo.__version__,
        **{key: first[key] for key in SHARED},
        "config": {key: value for key, value in first["config"].items() if key != "seed"},
        "final_models": [{key: one[key] for key in ("seed", "quality", "cost")} for one in final_models],
        "ceilings": {
            metric: {end: means([one["ceilings"][metric][end] for one in final_models]) for end in both}
            for metric, both in first["ceilings"].items()
        },
        "cost": {
            "steps": sum(one["cost"]["steps"] for one in final_models),
            "gradient_evaluations": sum(one["cost"]["gradient_evaluations"] for one in final_models),
            "seconds": sum(sum(one["cost"]["seconds"].values()) for one in final_models),
        },
        "versions": first["versions"],
        "machine": first["machine"],
    }


def means(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over final models at each evaluation point."""
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


PURPOSE = """\
Gold standards of training-data attribution: how much the loss on each test instance changes when
training goes on from a final model without a training instance, rather than with it. Positive: removing
it raises the test loss."""

CEILINGS = """\
Lower and upper, of the mean over all seeds, itself a mean over final models. No prediction that knows
nothing of these seeds' noise shows more than the upper one; making the gold standard again with as many
other seeds shows the lower one."""

FILES = """\
`data.safetensors` holds the training and test instances (beside each final model where its frozen layers
computed the inputs), `final_model_SEED/model.safetensors` the parameters,
`final_model_SEED/sensitivity.safetensors` each seed's changes (`raw [S, E, J, L]`: seeds, evaluation
points, test and left-out instances), their mean over seeds minus its mean over left-out instances
(`sensitivity [E, J, L]`), and the axes."""


def readme(card: Mapping[str, Any]) -> str:
    """Return a card as people read it."""
    last = len(card["step"]) - 1
    ceilings = [
        [
            f"{card['step'][e]:,} steps",
            *(f"{c['lower'][e]:.3f} to {c['upper'][e]:.3f}" for c in card["ceilings"].values()),
        ]
        for e in sorted({0, last // 2, last})
    ]
    quality = [
        [str(one["seed"]), *(f"{value:.4g}" for value in one["quality"].values())]
        for one in card["final_models"]
    ]
    names = [name.replace("_", " ") for name in card["final_models"][0]["quality"]]
    parts = [
        f"# {card['setting']}\n{card['about']}.",
        PURPOSE,
        f"    gold = fimo.bench.load({card['setting']!r})",
        markdown(["", ""], [[name, text] for name, text in facts(card).items()]),
        f"## Noise ceilings\n{CEILINGS}",
        markdown(["after", *card["ceilings"]], ceilings),
        "## Final models",
        markdown(["seed", *names], quality),
        f"## Files\n{FILES}",
        markdown(
            ["file", "SHA-256"], [[f"`{path}`", f"`{digest}`"] for path, digest in card["files"].items()]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def facts(card: Mapping[str, Any]) -> dict[str, str]:
    """Return what a card says, in words, by subject."""
    data, model, protocol, cost = card["data"], card["model"], card["protocol"], card["cost"]
    config, versions, seeds = card["config"], card["versions"], card["seeds"]
    own = {k: v for k, v in config["dataset"].items() if k not in ("_target_", "name", "recommended")}
    amount = f"{protocol['epochs']} epochs" if protocol["epochs"] else f"{protocol['steps']} steps"
    part = " of the last layers, and what enters them as inputs" if model["trained_part"] else ""
    final_models = ", ".join(str(one["seed"]) for one in card["final_models"])
    counts = f"{data['train']:,} training and {data['test']:,} test instances"
    return {
        "data": f"{data['name']}, {data['task']}: {counts}",
        "prepared with": ", ".join(f"`{k}={v}`" for k, v in own.items() if v not in (None, [], 0)),
        "network": f"`{model['network']['_target_']}`, {model['parameters']:,} parameters{part}",
        "final models": f"seeds {final_models}: {config['model']['optimizer']}, learning rate "
        f"{config['model']['lr']:g}, {model['epochs']} epochs",
        "further training": f"{protocol['optimizer']}, learning rate {protocol['lr']:g}, "
        f"batches of {protocol['batch_size']}, {amount}",
        "left out": f"{card['left_out']} training instances, by the rule `{protocol['leave_out']}`",
        "explained": f"{card['test']} test instances",
        "seeds": f"{seeds[0]} to {seeds[-1]}, {len(seeds)} in all; methods follow others",
        "cost": f"{cost['steps']:,} optimizer steps, {cost['seconds']:,.0f} s",
        "made": f"{card['made']} on {card['machine']['device']} by fimo {card['fimo']}, "
        f"torch {versions['torch']}, numpy {versions['numpy']}, "
        f"scikit-learn {versions['scikit-learn']}, Python {versions['python']}",
    }  # fmt: skip


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
