"Random labels and scores, ties included."

import numpy as np
from hypothesis import strategies as st


def cohort(seed, n, levels):
    "Labels, of which both occur, and scores of so many levels, of `n` slides."
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    labels[:2] = 0, 1
    return labels, rng.integers(0, levels, n) / levels


cohorts = st.builds(
    cohort, st.integers(0, 2**32 - 1), st.integers(2, 80), st.sampled_from([1, 2, 5, 50, 10**6])
)
