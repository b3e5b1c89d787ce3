"A training learns: that all parts work does not show that they work together."

import csv

import pytest

from streaming_pathology.cli.commands import sp_train
from streaming_pathology.evaluation.auc import auc
from streaming_pathology.evaluation.evaluation import read_predictions
from streaming_pathology.io import write_csv
from streaming_pathology.slides.readers import write_tiff
from streaming_pathology.slides.synthetic import paint_biopsy

SPACING = 4.0  # microns per pixel: coarse, so that a slide takes little time
TRAIN, TUNING, TEST = 96, 40, 4  # slides
TRAINING = (
    '--epochs 6 --optimizer adamw --lr 1e-3 --batch-size 4 --cosine --strip 64 --heatmaps 0 '
    '--cache-gb 0.1 --no-memory-check'
)


def paint_cohort(folder):
    "A manifest of small biopsies, every other one with tumour nearly everywhere."
    splits = ['train'] * TRAIN + ['tuning'] * TUNING + ['test'] * TEST
    rows = []
    for number, split in enumerate(splits):
        label = number % 2
        share = 0.9 * label
        biopsy = paint_biopsy((64, 128), SPACING, share, seed=number, crowded_fraction=0.0)
        path = folder / f's{number:03d}.tiff'
        write_tiff(biopsy.image, path, SPACING)
        rows.append(dict(slide_id=path.stem, label=label, path=path.name, split=split))
    return write_csv(folder / 'manifest.csv', rows)


@pytest.mark.usefixtures('small_resnet')
def test_a_network_learns_from_labels_of_slides(tmp_path):
    """From random weights to an AUC on 40 tuning slides. Guessing has 0.5 with a standard deviation
    of 0.09; with this seed it is 0.94."""
    manifest, run = paint_cohort(tmp_path), tmp_path / 'run'
    options = ['--spacing', str(SPACING), *TRAINING.split()]
    assert sp_train([str(manifest), str(run), *options]) == 0
    with open(run / 'log.csv', newline='') as file:
        losses = [float(row['train_loss']) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0] - 0.1
    tuning = [row for row in read_predictions(run / 'predictions.csv') if row.split == 'tuning']
    assert len(tuning) == TUNING
    assert auc([row.label for row in tuning], [row.probability for row in tuning]) > 0.8
