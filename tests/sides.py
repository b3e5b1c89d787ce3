"Made-up sides of a comparison."

from pathlib import Path

import numpy as np

from streaming_pathology.evaluation.comparison import Side
from streaming_pathology.evaluation.evaluation import Prediction

NOISE = np.random.default_rng(0).normal(0, 1, 120)  # what makes a slide difficult for any model


def toy_side(name, skill, seed):
    "Predictions of 120 slides, every second one positive; the first 40 are of the split tuning."
    rng = np.random.default_rng(seed)
    side = Side(name, Path('p.csv'))
    for i, noise in enumerate(NOISE):
        label = float(i % 2)
        logit = skill * (2 * label - 1) + noise + rng.normal(0, 0.5)
        probability = float(1 / (1 + np.exp(-logit)))
        split = 'tuning' if i < 40 else 'test'
        side.predictions[f's{i:03}'] = Prediction(f's{i:03}', label, split, probability)
    return side
