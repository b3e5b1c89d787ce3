"""Real prostate biopsies through checking, trimming and one training step: numbers, no pixels.

python tools/real_biopsies.py FOLDER nbs/results/real-cpu.json

FOLDER has folders of images without a spacing of their own, as JPEG at about 0.96 microns per pixel.
The largest image of the first folder, by pixels of its file, goes through one training step of
ResNet-34 as a canvas whose background is skipped, in a process of its own; what the dense image would
take is told by its plan.
The biopsies of the PANDA challenge may not be passed on under the licence of this package."""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from streaming_pathology.bench.measure import PeakMemory, fresh
from streaming_pathology.engine.plan import lean_memory, plan
from streaming_pathology.io import write_whole
from streaming_pathology.runs.records import environment
from streaming_pathology.slides.check import check_slides
from streaming_pathology.slides.cohorts import Case, read_manifest
from streaming_pathology.slides.datasets import SlideDataset
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.trim import Trim, trim_slides
from streaming_pathology.training.models import StreamingClassifier

SPACING = 0.96  # microns per pixel
SETS = 'panda_prostate_biopsies', 'panda_prostate_compact'
MEMORY = '4GB'


def cases_in(folder):
    "The images of a folder."
    paths = sorted((folder / 'images').glob('*.jpg'))
    return [Case(path.stem, None, path, spacing=SPACING) for path in paths]


def five_numbers(values):
    "Least, quartiles and largest."
    return [round(float(value), 4) for value in np.percentile(values, [0, 25, 50, 75, 100])]


def checked(cases):
    "What a check says of them."
    started = time.process_time()
    found = list(check_slides(cases))
    return dict(
        slides=len(found),
        ok=sum(not each.problem for each in found),
        tissue_mm2=five_numbers([each.tissue_mm2 or 0 for each in found]),
        cpu_seconds_a_slide=(time.process_time() - started) / len(found),
    )


def trimmed(cases):
    "What trimming makes of them."
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'trimmed'
        trim_slides(cases, out, Trim(spacing=SPACING), progress=False)
        biopsies = read_manifest(out / 'manifest.csv', need_label=False)
        bytes_written = sum(biopsy.path.stat().st_size for biopsy in biopsies)
        failed = len((out / 'failed.csv').read_text().splitlines()) - 1
    return dict(
        biopsies=len(biopsies),
        failed=failed,
        megabytes=bytes_written / 1e6,
        cpu_seconds_a_slide=(time.process_time() - started) / len(cases),
    )


def planned(network, image, memory=MEMORY):
    "What the plan of an image, or of a shape, says that a training step takes."
    found = plan(network, image, memory)
    return dict(seconds=found.seconds, peak_bytes=found.peak_bytes, flops=found.flops)


def step(path):
    "Time and memory of one training step on a biopsy on a canvas, in this process."
    lean_memory()
    torch.manual_seed(0)
    model = StreamingClassifier('resnet34', strip='auto', memory=MEMORY)
    with Slide(path, SPACING, warn=False) as slide:
        size = slide.size_at(SPACING)
    case = Case('slide', 1.0, path, spacing=SPACING)
    data = SlideDataset([case], SPACING, size=size, canvas=True)
    with PeakMemory(cuda=False) as reading:
        started = time.perf_counter()
        image = data[0]['image']
        read_seconds = time.perf_counter() - started
    network = model.whole().module
    plans = dict(canvas=planned(network, image), dense=planned(network, tuple(image.shape)))
    with PeakMemory(cuda=False) as memory:
        started, cpu = time.perf_counter(), time.process_time()
        torch.nn.functional.softplus(-model(image)).sum().backward()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients)
    return dict(
        size=[int(side) for side in image.shape[-2:]],
        memory=MEMORY,
        options={name: str(value) for name, value in model.whole().options.items()},
        read_seconds=read_seconds,
        read_above=reading.above,
        seconds=seconds,
        cpu=cpu_seconds,
        above=memory.above,
        peak=memory.peak,
        plans=plans,
        threads=torch.get_num_threads(),
    )


def largest(cases):
    "The case whose image has most pixels."

    def pixels(case):
        with Slide(case.path, case.spacing, warn=False) as slide:
            return slide.size[0] * slide.size[1]

    return max(cases, key=pixels)


def main(folder, out):
    result = dict(machine=environment(), spacing=SPACING, sets={})
    for name in SETS:
        cases = cases_in(folder / name)
        result['sets'][name] = found = dict(check=checked(cases), trim=trimmed(cases))
        print(name, found, flush=True)
    path = largest(cases_in(folder / SETS[0])).path
    result['step'] = fresh(step, path)
    print(result['step'], flush=True)
    write_whole(out, json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main(Path(sys.argv[1]), Path(sys.argv[2]))
