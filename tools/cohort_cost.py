"""What sp_check, sp_trim, sp_predict and sp_heatmap take of a slide, in processor seconds and bytes: the figures of nbs/tutorials/many_slides.ipynb.

OMP_NUM_THREADS=1 VIPS_CONCURRENCY=1 python tools/cohort_cost.py nbs/results/cohort-cpu.json

One thread and no GPU, on painted biopsies; processor seconds do not depend on what else the machine does, as long as it does not run out of memory. The bytes of an image depend on its tissue, so those of the real slide that ships with the package are measured too."""

import json
import sys
import tempfile
from pathlib import Path

import torch

from streaming_pathology.bench.processes import processor_seconds
from streaming_pathology.evaluation.predict import load_model, predict_table
from streaming_pathology.io import write_whole
from streaming_pathology.runs.maps import MapRun
from streaming_pathology.runs.records import environment
from streaming_pathology.runs.settings import HeatmapSettings
from streaming_pathology.slides.check import check_slides
from streaming_pathology.slides.cohorts import Case, read_manifest
from streaming_pathology.slides.readers import sample_slide
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.synthetic import write_cohort
from streaming_pathology.slides.trim import Trim, trim_slides
from streaming_pathology.training.checkpoints import save_checkpoint
from streaming_pathology.training.models import StreamingClassifier

SIZE, NATIVE, SPACING, N_SLIDES = (8192, 8192), 0.48, 0.96, 4
NETWORK = dict(arch='resnet34', n_out=1, strip=256)


def bytes_in(place):
    "Bytes of a file, or of all files in a folder."
    files = [place] if place.is_file() else place.rglob('*')
    return sum(path.stat().st_size for path in files if path.is_file())


def megapixels(cases):
    "Of all slides at full resolution."
    total = 0.0
    for case in cases:
        with Slide(case.path, case.spacing, warn=False) as slide:
            height, width = slide.size
        total += height * width / 1e6
    return total


class Costs:
    "Measured steps."

    def __init__(self):
        self.steps = []

    def measure(self, name, cases, work, out=None):
        "Do the work on all cases, and note what it took of one."
        start = processor_seconds()
        work()
        seconds = processor_seconds() - start
        n_bytes = 0 if out is None else bytes_in(out)
        step = dict(
            step=name,
            slides=len(cases),
            megapixels=megapixels(cases) / len(cases),
            cpu_seconds=seconds / len(cases),
            bytes=n_bytes / len(cases),
        )
        self.steps.append(step)
        print(step, flush=True)


def network(folder):
    "The checkpoint of a network of random weights."
    torch.manual_seed(0)
    card = dict(model=NETWORK, spacing=SPACING, size=None, amp=None)
    weights = dict(StreamingClassifier(**NETWORK).state_dict())
    return save_checkpoint(folder / 'best.pt', model=weights, settings=card, epoch=1, history=[])


def measured(folder):
    "All steps, one after the other, on what the one before has written."
    trim = Trim(spacing=SPACING)
    real, real_trimmed = [Case('CMU-1-Small-Region', None, sample_slide())], folder / 'real'
    # once before anything is counted, as the first slide loads libraries
    list(check_slides(real))
    trim_slides(real, folder / 'first', trim, progress=False)

    costs = Costs()
    cases = read_manifest(write_cohort(folder / 'painted', N_SLIDES, SIZE, NATIVE, progress=False))
    costs.measure('check', cases, lambda: list(check_slides(cases)))

    trimmed = folder / 'trimmed'
    costs.measure('trim', cases, lambda: trim_slides(cases, trimmed, trim, progress=False), trimmed)
    biopsies = read_manifest(trimmed / 'manifest.csv')

    best, table = network(folder), folder / 'predictions.csv'
    model, card = load_model(best)
    costs.measure(
        'predict',
        biopsies,
        lambda: predict_table(model, card, biopsies, table, progress=False),
        table,
    )
    maps = folder / 'maps'
    settings = HeatmapSettings(
        checkpoint=str(best),
        slides=(str(trimmed / 'manifest.csv'),),
        out=str(maps),
        method='activation',
        device='cpu',
    )
    costs.measure('heatmap', biopsies, lambda: MapRun(settings).draw(), maps)

    costs.measure(
        'trim, a real slide',
        real,
        lambda: trim_slides(real, real_trimmed, trim, progress=False),
        real_trimmed,
    )
    return costs.steps


def main(out):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        steps = measured(Path(folder))
    found = dict(
        machine=environment(),
        seed=0,
        size=SIZE,
        native_spacing=NATIVE,
        spacing=SPACING,
        network=NETWORK,
        steps=steps,
    )
    write_whole(out, json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main(sys.argv[1])
