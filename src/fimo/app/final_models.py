"""How a run's final models are made: its own, those from scratch of other seeds, those of other labels."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf
from torch.nn.modules.batchnorm import _BatchNorm

from fimo.app.build import build_final_model, build_module, trained_by_itself
from fimo.app.trainers import build_trainer, not_retraced, training_code, training_settings
from fimo.cost import Cost
from fimo.data.datamodule import InstancesModule
from fimo.engine.protocol import Protocol
from fimo.models.final_model import FinalModel
from fimo.models.training import train_final_model
from fimo.store.files import Store


@dataclass(frozen=True)
class FinalModels:
    """Makes final models as one configuration says.

    Args:
        config: of the run.
    """

    config: DictConfig

    @property
    def trained_here(self) -> bool:
        """Whether the final model is trained, and not read from a checkpoint."""
        return self.config.model.checkpoint is None

    def trained(self, data: InstancesModule, store: Store, cost: Cost) -> FinalModel:
        """Return a final model that is trained on a data set's training instances."""
        module = build_module(self.config, data)
        settings, seed = training_settings(self.config), self.config.seed
        code = training_code(self.config)
        train_final_model(module, data, build_trainer(self.config), store, settings, seed, cost, code)
        return build_final_model(module, self.config)

    def initial(self, data: InstancesModule, seed: int) -> FinalModel:
        """Return an untrained one, with the initial parameters of a seed."""
        changes = {"seed": seed, "model": {"checkpoint": None, "accept_poor": True}}
        config = OmegaConf.merge(self.config, changes)
        assert isinstance(config, DictConfig)
        return build_final_model(build_module(config, data), config)

    def protocol(self, data: InstancesModule, further: Protocol) -> Protocol:
        """Return the protocol of a final model's training as the engine's, with the rule of leaving out."""
        model, trainer = self.config.model, self.config.trainer
        return Protocol(
            optimizer=model.optimizer,
            lr=model.lr,
            batch_size=data.batch_size,
            epochs=trainer.max_epochs,
            leave_out=further.leave_out,
            momentum=model.momentum,
            weight_decay=model.weight_decay,
            clip_norm=trainer.gradient_clip_val,
            dtype=further.dtype,
            evaluation_dtype=further.evaluation_dtype,
        )

    def why_not_from_scratch(self, data: InstancesModule) -> str | None:
        """Return why the engine can't train such models from scratch, or None."""
        if (reason := not_retraced(self.config)) is not None:
            return reason
        network = self.initial(data, self.config.seed).network
        if trained_by_itself(network, self.config.model.training):
            return "the network trains by its own training_step, which the engine does not follow"
        if any(isinstance(m, _BatchNorm) and m.track_running_stats for m in network.modules()):
            return "batch normalisation can't be trained from scratch: its statistics stay fixed"
        if self.config.trainer.max_epochs < 1:
            return "needs trainer.max_epochs of at least 1"
        return None
