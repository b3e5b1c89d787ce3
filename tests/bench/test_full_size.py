"The whole chain at the paper's size, small: a painted biopsy, random weights."

import json
import sys
from pathlib import Path

from PIL import Image

from streaming_pathology.slides.cohorts import Case
from streaming_pathology.slides.synthetic import paint_biopsy

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools'))
import full_size
from full_size import Chain, run


def here(function, *arguments):
    "A part in this process, where one of its own takes seconds to start."
    return function(*arguments)


def test_all_parts_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(full_size, 'fresh', here)
    monkeypatch.setattr(full_size, 'lean_memory', lambda: None)
    chain = Chain(size=512, spacing=8.0, arch='squeezenet1_1', weights=None, copies=1)
    path = tmp_path / 'slide.png'
    Image.fromarray(paint_biopsy((384, 448), chain.spacing, 0.3, 1).image).save(path)
    told = []
    result = run(chain, Case('slide', None, path, spacing=chain.spacing), told.append)
    assert told == result['parts'] and json.loads(json.dumps(result)) == result
    names = [found['part'] for found in told]
    assert names[:2] == ['check', 'trim'] and names[-1] == 'SmoothGrad, canvas'
    assert all(found['peak'] >= found['above'] >= 0 and found['seconds'] > 0 for found in told)
    (step,) = (found for found in told if 'plans' in found)
    assert step['plans']['canvas']['flops'] <= step['plans']['dense']['flops']
    (canvas,) = (found for found in told if found['part'] == 'augment, canvas')
    assert canvas['size'] == [512, 512]
