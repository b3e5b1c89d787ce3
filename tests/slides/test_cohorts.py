"From cohorts as they are published to a training; and what becomes of workers."

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Small

from streaming_pathology.engine.canvas import Canvas
from streaming_pathology.slides.augment import Augmentation
from streaming_pathology.slides.cohorts import (
    Case,
    leaks,
    read_camelyon16,
    read_camelyon17,
    read_manifest,
    read_panda,
    resolve_splits,
    split_cohort,
    tiny_cohort,
)
from streaming_pathology.slides.datasets import SlideDataset, check_cohort, slide_loader
from streaming_pathology.slides.readers import write_tiff
from streaming_pathology.slides.synthetic import paint_biopsy
from streaming_pathology.slides.trim import Trim, trim_slides
from streaming_pathology.training.loop import fit
from streaming_pathology.training.models import StreamingClassifier


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 12),
            st.sampled_from([None, 0.0, 0.0, 1.0, 1.0, 2.0]),
            st.sampled_from(['', '3', '4']),
        ),
        min_size=1,
        max_size=60,
    ),
    st.tuples(st.floats(0.1, 1), st.floats(0, 1), st.floats(0, 1)),
    st.integers(0, 9),
    st.sampled_from(['label', 'grade']),
)
def test_splits_never_leak_a_patient(rows, fractions, seed, by):
    "Whatever the patients, labels and shares: every labelled slide is in one split, every patient too, and the order of rows does not matter."
    cases = [
        Case(f's{i}', label, Path('x'), f'p{p}', grade=grade)
        for i, (p, label, grade) in enumerate(rows)
    ]
    if all(c.label is None for c in cases):
        return
    parts = split_cohort(cases, fractions, seed, by)
    assert leaks(parts) == [] and [c.slide_id for c in parts] == [c.slide_id for c in cases]
    assert all((c.split in ('train', 'tuning', 'test')) == (c.label is not None) for c in parts)
    assert {c.slide_id: c.split for c in split_cohort(cases[::-1], fractions, seed, by)} == {
        c.slide_id: c.split for c in parts
    }


def published(folder, slides):
    "Painted slides under the names of a published cohort: {path: tumour fraction}."
    for k, (name, tumour) in enumerate(slides.items()):
        b, path = paint_biopsy((300, 520), 2.0, tumour, seed=k), folder / name
        write_tiff(b.image, path, 2.0, 'jpeg')
        if 'train_images' in name:
            write_tiff(
                b.mask, folder / 'train_label_masks' / f'{path.stem}_mask.tiff', 2.0, nearest=True
            )
    return folder


def test_panda(tmp_path):
    "As Kaggle gives it: read, split by grade, trimmed by the masks that come with it, and read again."
    scores = ['negative', '0+0', '3+3', '3+4', '4+3', '5+4']
    panda = published(
        tmp_path / 'panda', {f'train_images/i{i}.tiff': 0.5 * (i > 1) for i in range(6)}
    )
    (panda / 'train.csv').write_text(
        'image_id,data_provider,isup_grade,gleason_score\n'
        + ''.join(f'i{i},radboud,{g},{scores[i]}\n' for i, g in enumerate([0, 0, 1, 2, 3, 5]))
    )
    cases = read_panda(panda, providers='radboud')
    assert [c.label for c in cases] == [0, 0, 1, 1, 1, 1] and all(c.mask.exists() for c in cases)
    said = trim_slides(
        split_cohort(cases, by='grade'),
        tmp_path / 'out',
        Trim(spacing=4.0, least=0.01),
        progress=False,
    )
    assert said['slides'] == 6 and not said['failed'] and not said['warnings']
    trimmed = read_manifest(tmp_path / 'out/manifest.csv')
    assert (
        leaks(trimmed) == []
        and {c.grade for c in trimmed} == {'', '3', '4', '5'}
        and len(trimmed) == said['biopsies']
    )
    data = check_cohort(trimmed, 4.0, progress=False)
    assert len(data) == len(trimmed) and data[0]['image'].dtype.itemsize == 1


def test_camelyon(tmp_path):
    c16 = published(
        tmp_path / '16',
        {
            f'training/{k}/{k}_{i:03}.tif': 0.4 * (k == 'tumor')
            for k in ('normal', 'tumor')
            for i in range(4)
        }
        | {'testing/images/test_001.tif': 0.4, 'testing/images/test_002.tif': 0.0},
    )
    (c16 / 'testing/reference.csv').write_text(
        'test_001,Tumor,IDC,Macro\ntest_002,Normal,None,None\n'
    )
    with pytest.warns(UserWarning, match='of the 8 slides of train are taken'):
        cases = resolve_splits(read_camelyon16(c16))
    assert {
        s: {c.label for c in cases if c.split == s} for s in ('train', 'tuning', 'test')
    } == dict.fromkeys(('train', 'tuning', 'test'), {0, 1})
    assert len(check_cohort(cases, 4.0, progress=False)) == 10
    c17 = published(
        tmp_path / '17',
        {
            f'training/patient_{p:03}_node_{n}.tif': 0.4 * (n == 1)
            for p in range(6)
            for n in range(2)
        },
    )
    (c17 / 'stage_labels.csv').write_text(
        'patient,stage\n'
        + ''.join(
            f'patient_{p:03}.zip,pN1\n'
            + ''.join(f'patient_{p:03}_node_{n}.tif,{("negative", "macro")[n]}\n' for n in range(2))
            for p in range(6)
        )
    )
    cases = resolve_splits(read_camelyon17(c17))
    assert (
        len(cases) == 12
        and leaks(cases) == []
        and len({c.patient_id for c in cases}) == 6
        and len(check_cohort(cases, 4.0, progress=False)) == 12
    )


WAITS = """
import sys, time
from streaming_pathology.slides.trim import each_apart
if __name__ == '__main__':
    for t, value, e in each_apart(eval, ['__import__("os").getpid()', '__import__("os").getpid()', *['__import__("time").sleep(600)']*4], workers=2): print(value, flush=True)
"""


def test_workers_end_with_their_parent(tmp_path):
    "Also where it is killed and can tell them nothing."
    (tmp_path / 'waits.py').write_text(WAITS)
    p = subprocess.Popen([sys.executable, tmp_path / 'waits.py'], stdout=subprocess.PIPE, text=True)
    for _ in range(2):
        p.stdout.readline()
    children = psutil.Process(p.pid).children(recursive=True)
    assert len(children) >= 2
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]


@pytest.mark.parametrize('augment', [None, Augmentation(stain=0.05)])
def test_canvases_train_as_images_do(tmp_path, augment, monkeypatch):
    "Losses and weights of a training on canvases are those on the same pixels as tensors, also from workers."
    monkeypatch.setattr('torchvision.models.resnet18', Small)
    cases = read_manifest(tiny_cohort(tmp_path / 'cohort', n=4, splits=False))
    results = []
    for canvas, workers in ((False, 0), (True, 0), (True, 1)):
        torch.manual_seed(0)
        model = StreamingClassifier(
            'resnet18', strip=64
        ).double()  # a maximum over background is reached in many places
        data = SlideDataset(cases, 4.0, (128, 192), augment, canvas=canvas, clean=30.0)
        assert isinstance(data[0]['image'], Canvas) == canvas
        rows = fit(
            model,
            slide_loader(data, train=True, workers=workers),
            slide_loader(data),
            epochs=2,
            lr=1e-3,
            batch=2,
            progress=False,
        )
        results.append(
            (
                [r[k] for r in rows for k in ('train_loss', 'tuning_loss')],
                torch.cat([p.detach().reshape(-1) for p in model.parameters()]),
            )
        )
    (losses, weights), *others = results
    assert len(set(losses)) == 4
    for l, w in others:
        np.testing.assert_allclose(l, losses, rtol=1e-5)
        assert (w - weights).abs().max() < 1e-6 * weights.abs().max()
