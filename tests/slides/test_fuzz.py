"Slides with random damage, the first of those that `python tests/fuzz_slides.py` has by thousands."

from collections import Counter

import fuzz_slides
import pytest


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    return list(fuzz_slides.run(range(200), tmp_path_factory.mktemp('fuzz')))


def test_nothing_crashes_or_hangs_and_every_refusal_is_a_sentence(results):
    assert not [each for each in results if each.verdict in fuzz_slides.FAULTS]


def test_what_a_checksum_covers_is_never_read_wrong(results):
    silent = [each for each in results if each.verdict == fuzz_slides.DIFFERENT]
    assert not [each for each in silent if each.has_checksum]
    assert not [each for each in silent if each.damage == 'cut short']


def test_damage_is_of_every_kind_and_is_seen(results):
    assert len({each.name for each in results}) == len(fuzz_slides.made.FORMATS)
    assert len({each.damage for each in results}) == len(fuzz_slides.DAMAGES)
    refused = Counter(each.verdict for each in results)[fuzz_slides.REFUSED]
    assert refused > 80, 'damage does not damage'
