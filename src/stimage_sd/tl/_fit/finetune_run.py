"""Run fine-tuning: fit the head, train for epochs, stop early, and write a state to resume from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stimage_sd._progress import tqdm
from stimage_sd._settings import logger
from stimage_sd.likelihood import mean_only
from stimage_sd.likelihood.heads import HEADS
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._features import FeatureSpace, Standardize
from stimage_sd.models._split_network import Trained, features_by
from stimage_sd.tl._fit.checkpoint import read_named, read_tree, write_state
from stimage_sd.tl._fit.finetuning import Finetuning, PixelData, Scales, Settings
from stimage_sd.tl._fit.training import TrainingData, train, validation_loss

#: settings for the fit of the head before the network is trained, as in `fit_nb`
_START: dict[str, Any] = {"max_epochs": 100, "learning_rate": 0.03, "patience": 10}


class Run:
    """A training run, from the start or resumed from a checkpoint."""

    def __init__(
        self, network: Extractor, data: PixelData, settings: Settings, n_components: int, standardize: Standardize,
        checkpoint: Path | None,
    ) -> None:  # fmt: skip
        self._network, self._data, self._settings = network, data, settings
        self._n_components, self._standardize, self._checkpoint = n_components, standardize, checkpoint
        self._best_features: tuple[np.ndarray, Scales] | None = None
        self._watched = np.union1d(data.sample, np.flatnonzero(data.held_out))

    def start(self, fingerprint: dict[str, Any]) -> None:
        """Resume from the checkpoint, or fit the head to the pretrained network."""
        self._fingerprint = fingerprint
        kept = None if self._checkpoint is None else read_named(self._checkpoint, run=fingerprint)
        if kept is not None and self._checkpoint is not None:
            named, about = kept
            self.space = FeatureSpace.from_arrays(named, standardize=self._standardize)
            self.tuning = Finetuning(self._network, self.space, self._data, self._settings)
            head = {name.removeprefix("head."): array for name, array in named.items() if name.startswith("head.")}
            first = Trained(self.tuning.initial_network, {name: jnp.asarray(array) for name, array in head.items()})
            n_sections, n_features = int(self._data.section.max()) + 1, len(self.space.mean)
            blank = Scales(jnp.zeros((n_sections, n_features)), jnp.zeros((n_sections, n_features)))
            like = (first, self.tuning.optimizer_states(first), first, blank)
            self._trained, self._states, self.best, self._scales = read_tree(self._checkpoint, like)
            self._first_head = head
            self.history, self.best_epoch, self.best_loss = about["history"], about["best_epoch"], about["best_loss"]
            return
        self._fit_head()

    def _fit_head(self) -> None:
        data, settings = self._data, self._settings
        values = features_by(self._network, data.tiles.read, np.arange(len(data.tiles)), label="features before")
        sections = {str(number): values[data.section == number] for number in np.unique(data.section)}
        self.space = FeatureSpace.fit(
            sections, n_components=self._n_components, standardize=self._standardize, seed=settings.seed
        )
        self.tuning = Finetuning(self._network, self.space, data, settings)
        self._scales = self.tuning.scales(self._watched, values[self._watched])
        reduced = np.asarray(self.tuning.reduced(self._scales, data.section, values))
        held_out = data.held_out[None]
        weight = (~held_out).astype(np.float32)
        before = TrainingData(reduced, data.counts, data.size_factors, weight, held_out)
        floor = mean_only.floor(data.counts[~data.held_out], data.size_factors[~data.held_out])
        initial = HEADS[settings.head].initial(jax.random.key(settings.seed), floor[0], floor[1], 1, reduced.shape[1])
        parameters, _ = train(
            settings.head, initial, before, batch_size=settings.batch_size, weight_decay=settings.weight_decay,
            seed=settings.seed, **_START,
        )  # fmt: skip
        self._trained = self.best = Trained(self.tuning.initial_network, parameters)
        self._states = self.tuning.optimizer_states(self._trained)
        self._first_head = {name: np.asarray(array) for name, array in parameters.items()}
        seen = replace(before, held_out=~held_out)
        training = validation_loss(settings.head, parameters, seen, batch_size=settings.batch_size)[0]
        values = values[self._watched]
        scales, self.best_loss = self._judge(self._trained, values)
        self._best_features = values, scales
        self.best_epoch, self.history = 0, [_row(0, float(training), self.best_loss)]
        self._write()

    def _evaluate(self, trained: Trained) -> tuple[np.ndarray, Scales, float]:
        """Return features of the watched tiles, section scales, and the validation loss."""
        values = self.tuning.features(trained.network, self._watched, label="validating")
        return values, *self._judge(trained, values)

    def _judge(self, trained: Trained, values: np.ndarray) -> tuple[Scales, float]:
        data, settings = self._data, self._settings
        scales = self.tuning.scales(self._watched, values)
        held = np.flatnonzero(data.held_out)
        reduced = self.tuning.reduced(scales, data.section[held], values[np.searchsorted(self._watched, held)])
        everything = np.ones((1, len(held)), dtype=bool)
        on = TrainingData(
            np.asarray(reduced), data.counts[held], data.size_factors[held], everything.astype(np.float32), everything
        )
        loss = validation_loss(settings.head, trained.head, on, batch_size=settings.batch_size)[0]
        return scales, float(loss)

    def train(self, *, max_epochs: int, patience: int) -> None:
        """Train until the validation loss has not improved for `patience` epochs."""
        n_training = int((~self._data.held_out).sum())
        done = self.history[-1]["epoch"]
        logger.info("Fine-tuning on %d tiles, in at most %d epochs; %d are done.", n_training, max_epochs, done)
        with tqdm(total=max_epochs * n_training, initial=done * n_training, desc="fine-tuning", unit="tile") as bar:
            for epoch in range(done + 1, max_epochs + 1):
                if epoch - 1 - self.best_epoch >= patience:
                    break
                self._trained, self._states, training = self.tuning.run_epoch(
                    self._trained, self._states, self._scales, epoch=epoch, bar=bar
                )
                values, self._scales, loss = self._evaluate(self._trained)
                if loss < self.best_loss:
                    self.best, self.best_loss, self.best_epoch = self._trained, loss, epoch
                    self._best_features = values, self._scales
                self.history.append(_row(epoch, training, loss))
                bar.set_postfix(validation_nll=f"{self.best_loss:.4f}")
                self._write()

    def _write(self) -> None:
        if self._checkpoint is None:
            return
        head = {f"head.{name}": array for name, array in self._first_head.items()}
        about = {"history": self.history, "best_epoch": self.best_epoch, "best_loss": self.best_loss}
        tree = (self._trained, self._states, self.best, self._scales)
        write_state(self._checkpoint, tree, named={**self.space.arrays(), **head}, about=about, run=self._fingerprint)

    def final_features(self) -> tuple[np.ndarray, FeatureSpace]:
        """Return head inputs and the feature space of the best network.

        Rows other than held-out and sampled tiles are 0.
        """
        if self._best_features is None or self.best_epoch == 0:
            # also if the start is best, since features of the extractor may differ in the last digit
            self._best_features = self._evaluate(self.best)[:2]
        values, scales = self._best_features
        section = self._data.section
        reduced = np.zeros((len(section), self.space.components.shape[1]), dtype=np.float32)
        reduced[self._watched] = np.asarray(self.tuning.reduced(scales, section[self._watched], values))
        sections = {str(index): result for index, result in enumerate(self.tuning.sample(self._watched, values))}
        # mean, standard deviation and distances come from the best network, and the components stay fixed
        filled = FeatureSpace.fit(sections, n_components=1, standardize=self._standardize, seed=self._settings.seed)
        return reduced, replace(filled, components=self.space.components)


def _row(epoch: int, training: float, validation: float) -> dict[str, Any]:
    return {"epoch": epoch, "member": 0, "training_nll": training, "validation_nll": validation}
