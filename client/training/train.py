"""Training and scoring as functions: a recipe, weights and rows in, an update or counts out. No I/O, nothing changed.

A site calls them once a round; whoever has many sites at hand may map them, or do the same for all at once.
"""

from __future__ import annotations

import math

import numpy as np

from client.data import Dataset
from client.training import plain
from client.training.augment import Augmenter
from client.training.kernel import exact_counts
from client.training.recipe import Recipe, Scoring
from common.document.schema import Schema
from common.model import mlp, objective
from common.model.scores import COUNT_UNIT, Counts, count_sensitivity
from common.model.update import Update
from common.model.weights import Weights
from common.privacy.noise import NoiseSource


def train(recipe: Recipe, weights: Weights, dataset: Dataset, *, noise: NoiseSource) -> Update:
    """Trains from `weights` on the training rows.

    Raises:
        ValueError: the recipe names an optimizer or a loss that is not known, or exact arithmetic for another model.
    """
    federation = recipe.federation
    model = mlp.frozen(mlp.with_weights(federation, weights), federation).to(dataset.x.device)
    loss, augmenter = None, Augmenter.of(federation)
    if recipe.private is None:
        loss = plain.fit(
            model,
            dataset.x,
            dataset.y,
            training=federation.training,
            loss=federation.loss,
            steps=recipe.steps,
            noise=noise,
            proximal_mu=recipe.proximal_mu,
            learning_rate=recipe.learning_rate,
            augmenter=augmenter,
        )
    else:
        from client.training import dpsgd  # Opacus takes a second to import, which not every client needs

        dpsgd.fit_privately(
            model,
            dataset.x,
            dataset.y,
            training=federation.training,
            loss=federation.loss,
            dpsgd=recipe.private,
            noise=noise,
            proximal_mu=recipe.proximal_mu,
            learning_rate=recipe.learning_rate,
            augmenter=augmenter,
            ids=dataset.ids,
        )
    return Update(weights=mlp.weights_of(model), weight=recipe.weight, loss=loss)


def evaluate(scoring: Scoring, weights: Weights, dataset: Dataset, *, noise: NoiseSource) -> Counts:
    """Scores `weights` on the validation rows."""
    federation = scoring.federation
    schema, loss = federation.data_schema, federation.loss
    model = mlp.with_weights(federation, weights).to(dataset.x.device)
    x, y = dataset.validation_x, dataset.validation_y
    exact = scoring.noise_multiplier is not None and scoring.arithmetic == "exact"
    counts = (exact_counts if exact else objective.score)(
        model, x, y, schema=schema, loss=loss, group=dataset.validation_group
    )
    if scoring.noise_multiplier is None:
        return counts
    return noisy_counts(counts, schema, scoring.noise_multiplier, noise)


def noisy_counts(total: Counts, schema: Schema, noise_multiplier: float, noise: NoiseSource) -> Counts:
    """Counts that are multiples of `COUNT_UNIT`, with Gaussian noise on that grid: `noise_multiplier` is its standard
    deviation over the counts' sensitivity, at least 2^-8."""
    whole = np.rint(total / COUNT_UNIT).astype(np.int64)
    tau = math.nextafter(noise_multiplier * count_sensitivity(schema) / COUNT_UNIT, math.inf)
    noisy = whole + noise.rounded_normal(len(whole), tau)
    return noisy.astype(np.float64) * COUNT_UNIT
