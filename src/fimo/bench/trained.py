"""A setting's final model with its data, ready for further training."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fimo.app.build import LOSS_OF_TASK
from fimo.app.experiment import prepare, refuse_poor, with_final_model
from fimo.app.journal import Journal
from fimo.app.run import Run
from fimo.app.summary import dataset_facts, quality_facts
from fimo.bench.gold_standard import DATA, MODEL, write_data
from fimo.cost import Cost
from fimo.models.frozen import split
from fimo.store.files import write_tensors


@dataclass(frozen=True)
class Trained:
    """A final model that was trained, and what can be said of it.

    Args:
        whole: the run as it is configured.
        run: of what further training moves, where the final model's first layers are frozen.
        trained_part: whether that is less than the whole.
        model: what builds the network and its loss again, as ``about.json`` has it.
        data: of the data set.
        quality: losses and accuracies.
        cost: of training.
    """

    whole: Run
    run: Run
    trained_part: bool
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    quality: Mapping[str, Any]
    cost: Cost

    @classmethod
    def of(cls, config: DictConfig) -> Trained:
        """Read the data and train the final model that a configuration describes, or take it from the store.

        Raises:
            InputError: naming the key at fault; or the final model predicts worse than a constant.
        """
        with tempfile.TemporaryDirectory() as scratch:
            journal = Journal(Path(scratch))
            prepared = prepare(config, journal)
            whole, quality = with_final_model(prepared, config, journal)
        if not config.model.accept_poor:
            refuse_poor(whole.final_model, whole.data)
        known = split(whole.final_model.network, whole.final_model.parameters()) is not None
        run = whole.of_trained_part() if known else whole  # what its parameters alone can be read into again
        cut = run.final_model is not whole.final_model
        said = dict(prepared.module.hparams["description"])
        network = said.pop("network") | said  # what said auto, as the data set filled it in
        loss = LOSS_OF_TASK[whole.data.task] if config.model.loss == "auto" else config.model.loss
        model = {
            "network": network,
            "loss": OmegaConf.to_container(loss) if OmegaConf.is_config(loss) else loss,
            "measurement": OmegaConf.to_container(config.model)["measurement"],  # type: ignore[index, call-overload]
            "trainable": list(config.model.trainable),
            "trained_part": cut,
            "epochs": config.trainer.max_epochs,
            "parameters": run.final_model.size,
        }
        judged = dataclasses.replace(run.final_model, accept_poor=True)  # not judged again
        run = dataclasses.replace(run, final_model=judged).with_description()
        facts = dataset_facts(whole.data), quality_facts(quality)
        return cls(whole, run, cut, model, *facts, journal.costs[0])

    def write(self, folder: Path) -> None:
        """Write parameters into a final model's folder, and data beside it where all of them share it."""
        data = self.run.data
        place = folder if self.trained_part else folder.parent
        write_data(place / DATA, data.train, data.test[self.run.plan.test])
        write_tensors(folder / MODEL, self.run.final_model.state())
