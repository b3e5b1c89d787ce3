"""Slides with random damage: what becomes of each, by its format and by how it was damaged.

    python tests/fuzz_slides.py nbs/results/fuzz-slides.json

damages 2,000 files, one after the other from a seed, and opens and reads each in a process of its
own with limits of time and memory."""

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import struct
import tempfile
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import made
import numpy as np
import openslide
import pydicom
import pyvips
import tifffile
from pydicom.dataelem import RawDataElement

from streaming_pathology.core import InputError
from streaming_pathology.slides.readers import slide_files
from streaming_pathology.slides.slides import Slide, area_average

SEED = 0
SECONDS = 60.0  # for one file
MEMORY = 3 * 2**30  # bytes of address space, beyond what the process has when it begins

# ---- where the numbers of a file are


class Number(NamedTuple):
    "A whole number in a file."

    at: int  # byte
    size: int  # bytes
    order: str = '<'
    is_place: bool = False  # where pixels are in the file, or how many bytes they have


PLACES = (273, 279, 324, 325, 330, 513, 514)  # offsets and lengths of strips, tiles, sub-images
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 7: 1, 9: 4, 11: 4, 12: 8, 16: 8, 18: 8}  # bytes, by type


def numbers_of_tag(tag: tifffile.TiffTag, order: str, wide: bool) -> Iterator[Number]:
    "Number, type, count and some of the values of a tag."
    yield Number(tag.offset, 2, order)
    yield Number(tag.offset + 2, 2, order)
    yield Number(tag.offset + 4, 8 if wide else 4, order)
    size = SIZES.get(int(tag.dtype), 1)
    n = min(tag.count, 32)
    for i in range(n):
        yield Number(tag.valueoffset + size * i, size, order, tag.code in PLACES)


def numbers_of_tiff(path: Path) -> Iterator[Number]:
    "Numbers in the directories of a TIFF."
    with tifffile.TiffFile(path) as file:
        order, wide = file.byteorder, file.is_bigtiff
        yield Number(8 if wide else 4, 8 if wide else 4, order, True)
        for page in file.pages:
            for each in (page, *(page.pages or ())):
                yield Number(each.offset, 8 if wide else 2, order)
                for tag in each.tags:
                    yield from numbers_of_tag(tag, order, wide)


def numbers_of_png(path: Path) -> Iterator[Number]:
    "Sizes in the header of a PNG, and the lengths of its parts."
    data = path.read_bytes()
    for at in (16, 20):
        yield Number(at, 4, '>')
    for at in range(24, 29):
        yield Number(at, 1, '>')
    at = 8
    while at < len(data):
        (length,) = struct.unpack_from('>I', data, at)
        yield Number(at, 4, '>', True)
        at += length + 12


def numbers_of_jpeg(path: Path) -> Iterator[Number]:
    "Lengths and contents of the segments of a JPEG before its scan."
    data = path.read_bytes()
    at = 2
    while data[at + 1] != 0xDA:
        (length,) = struct.unpack_from('>H', data, at + 2)
        yield Number(at + 2, 2, '>', True)
        for place in range(at + 4, at + 2 + min(length, 24)):
            yield Number(place, 1, '>')
        at += 2 + length


def numbers_of_webp(path: Path) -> Iterator[Number]:
    "The lengths in a WebP, and its first bits."
    yield Number(4, 4, '<', True)
    yield Number(16, 4, '<', True)
    for at in range(20, 26):
        yield Number(at, 1)


def numbers_of_dicom(path: Path) -> Iterator[Number]:
    "Lengths and values of the elements of a DICOM file, and the lengths of its tiles."
    dataset = pydicom.dcmread(path)
    for tag in list(dataset.keys()):
        element = dataset.get_item(tag)
        if isinstance(element, RawDataElement):  # no sequence
            at, length = element.value_tell, element.length
            yield Number(at - 2, 2, '<', True)
            if length in (2, 4, 8):
                yield Number(at, length)
    data = path.read_bytes()
    at = data.find(b'\xfe\xff\x00\xe0')
    while at >= 0:
        yield Number(at + 4, 4, '<', True)
        at = data.find(b'\xfe\xff\x00\xe0', at + 4)


def numbers_of_index(path: Path) -> Iterator[Number]:
    "The numbers in the index of a MIRAX slide."
    for at in range(37, path.stat().st_size - 3, 4):
        yield Number(at, 4, '<', True)


def numbers_of_text(path: Path) -> Iterator[Number]:
    "The digits of a text, as numbers of a byte."
    for at, byte in enumerate(path.read_bytes()):
        if 48 <= byte <= 57:
            yield Number(at, 1)


FINDERS: dict[str, Callable[[Path], Iterator[Number]]] = {
    '.png': numbers_of_png,
    '.jpg': numbers_of_jpeg,
    '.mrxs': numbers_of_jpeg,
    '.webp': numbers_of_webp,
    '.dcm': numbers_of_dicom,
    '.ini': numbers_of_text,
    '.vms': numbers_of_text,
    '.dat': numbers_of_index,
}


@cache
def numbers_in(path: Path) -> list[Number]:
    "Where the numbers of a file are; none in the pixels of a MIRAX slide."
    if path.name.startswith('Data'):
        return []
    return list(FINDERS.get(path.suffix, numbers_of_tiff)(path))


# ---- damage


def flip(rng: np.random.Generator, data: bytearray, path: Path, reach: int | None = None) -> None:
    "Change one to eight bytes, anywhere or within the first so many."
    for at in rng.integers(0, min(reach or len(data), len(data)), rng.integers(1, 9)):
        data[at] ^= int(rng.integers(1, 256))


def flip_start(rng: np.random.Generator, data: bytearray, path: Path) -> None:
    "Change bytes within the first 512."
    flip(rng, data, path, 512)


def cut(rng: np.random.Generator, data: bytearray, path: Path) -> None:
    "Leave the end out."
    del data[int(rng.integers(1, len(data))) :]


def fill(rng: np.random.Generator, data: bytearray, path: Path) -> None:
    "Fill up to 4,096 bytes with zeros, ones or noise, as where a sector of a disk is lost."
    at, n = int(rng.integers(0, len(data))), int(rng.integers(16, 4097))
    n = min(n, len(data) - at)
    noise = rng.bytes(n)
    data[at : at + n] = (bytes(n), b'\xff' * n, noise)[rng.integers(3)]


def shift(rng: np.random.Generator, data: bytearray, path: Path) -> None:
    "Leave up to 64 bytes out, or put some in."
    at, n = int(rng.integers(0, len(data))), int(rng.integers(1, 65))
    noise = rng.bytes(n)
    if rng.random() < 0.5:
        del data[at : at + n]
    else:
        data[at:at] = noise


def other_value(rng: np.random.Generator, old: int, bits: int, n_bytes: int) -> int:
    "Another value for a number: a neighbour, a limit, the length of the file, or any."
    anything = int.from_bytes(rng.bytes(bits // 8), 'little')
    values = [0, 1, 2, old + 1, old - 1, old * 2, old // 2, 2**bits - 1, 2 ** (bits - 1), n_bytes]
    values = [value % 2**bits for value in (*values, anything)]
    values = [value for value in values if value != old]
    return values[rng.integers(len(values))]


def put(rng: np.random.Generator, data: bytearray, number: Number) -> None:
    "Give a number another value."
    kind = 'little' if number.order == '<' else 'big'
    old = int.from_bytes(data[number.at : number.at + number.size], kind)
    value = other_value(rng, old, 8 * number.size, len(data))
    data[number.at : number.at + number.size] = value.to_bytes(number.size, kind)


def change(rng: np.random.Generator, data: bytearray, path: Path, are_places: bool = False) -> None:
    "Change one or two numbers of the header, or bytes where there are none."
    numbers = [each for each in numbers_in(path) if each.is_place == are_places]
    if not numbers:
        flip(rng, data, path)
        return
    for i in rng.integers(0, len(numbers), rng.integers(1, 3)):
        put(rng, data, numbers[i])
    if path.suffix == '.png':
        data[29:33] = struct.pack('>I', zlib.crc32(data[12:29]))  # or it is refused for this


def change_places(rng: np.random.Generator, data: bytearray, path: Path) -> None:
    "Change offsets and lengths."
    change(rng, data, path, are_places=True)


Damage = Callable[[np.random.Generator, bytearray, Path], None]
DAMAGES: dict[str, Damage] = {
    'bytes changed': flip,
    'first bytes changed': flip_start,
    'cut short': cut,
    'bytes overwritten': fill,
    'bytes left out or put in': shift,
    'numbers of the header changed': change,
    'offsets or lengths changed': change_places,
}


class Plan(NamedTuple):
    "What is damaged, and how."

    number: int
    name: str  # of a slide of `made.every_format`
    damage: str


def plan_of(number: int) -> Plan:
    "The damage with a number: formats take turns, and so do the ways of damaging."
    name = list(made.FORMATS)[number % len(made.FORMATS)]
    damage = list(DAMAGES)[(number // len(made.FORMATS)) % len(DAMAGES)]
    return Plan(number, name, damage)


def files_of(slide: Path) -> list[Path]:
    "The files of a slide that may be damaged."
    return [file for file in slide_files(slide) if file.stem not in ('label', 'overview')]


def damaged_slide(plan: Plan, slide: Path, folder: Path) -> tuple[Path, list[int] | None]:
    """A damaged copy of a slide in a folder.

    Also the bytes that differ, or None where the length does."""
    rng = np.random.default_rng([SEED, plan.number])
    files = files_of(slide)
    victim = files[rng.integers(len(files))]
    for file in slide_files(slide):
        copy = folder / file.relative_to(slide.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file != victim:
            shutil.copyfile(file, copy)
    original = victim.read_bytes()
    data = bytearray(original)
    DAMAGES[plan.damage](rng, data, victim)
    (folder / victim.relative_to(slide.parent)).write_bytes(data)
    differ = None
    if len(data) == len(original):
        changed = np.frombuffer(data, np.uint8) != np.frombuffer(original, np.uint8)
        differ = np.flatnonzero(changed).tolist()
    return folder / slide.name, differ


# ---- what the pixels have


def has_checksum(slide: Path, differ: list[int] | None) -> bool:
    "Whether all bytes that differ are covered by a checksum: of deflate, or of a PNG."
    if not differ:
        return False
    if slide.suffix == '.png':
        return not set(differ) & {29, 30, 31, 32}
    covered = deflated(slide)
    return all(any(begin <= at < end for begin, end in covered) for at in differ)


@cache
def deflated(slide: Path) -> list[tuple[int, int]]:
    "(first byte, byte after the last) of what is deflated in a TIFF."
    if slide.is_dir() or slide.suffix not in ('.tif', '.tiff'):
        return []
    found = []
    with tifffile.TiffFile(slide) as file:
        for page in file.pages:
            for each in (page, *(page.pages or ())):
                if each.compression in (8, 32946):
                    found += zip(each.dataoffsets, each.databytecounts, strict=True)
    return [(begin, begin + length) for begin, length in found]


class Truth(NamedTuple):
    "What a slide shows."

    size: tuple[int, int]
    spacing: float
    pixels: np.ndarray
    half: np.ndarray  # at twice the spacing


def opened(path: Path) -> Slide:
    "A slide, with the spacing that flat files need."
    return Slide(path, spacing=None if made.FORMATS[path.name].gives_spacing else made.SPACING)


@cache
def truth_of(path: Path) -> Truth:
    "What a slide shows before it is damaged."
    with warnings.catch_warnings(), opened(path) as slide:
        warnings.simplefilter('ignore')
        return Truth(
            slide.size, slide.spacing, slide.read(slide.spacing), slide.read(2 * slide.spacing)
        )


def halved(pixels: np.ndarray) -> np.ndarray:
    "Means of 2 x 2 pixels."
    height, width = (max(1, round(side / 2)) for side in pixels.shape[:2])
    return area_average(area_average(pixels, 0, 2, height), 0, 2, width, axis=1)


def differences(slide: Slide, truth: Truth) -> list[str]:
    "What a slide shows otherwise: its size, spacing, pixels, or pixels of a coarser level."
    if slide.size != truth.size:
        slide.thumbnail(512)
        return ['size']
    found = []
    if abs(slide.spacing / truth.spacing - 1) > 1e-3:
        found.append('spacing')
    pixels = slide.read(slide.spacing)
    if (pixels != truth.pixels).any():
        found.append('pixels')
    half = slide.read(2 * slide.spacing)
    is_mean = abs(half - halved(pixels)).max() <= 1  # where a level is not used
    if not is_mean and (half != truth.half).any():
        found.append('coarser level')
    slide.thumbnail(128)
    slide.associated()
    return found


# ---- what becomes of a slide


class Outcome(NamedTuple):
    "What became of a damaged slide."

    verdict: str
    says: str = ''  # how it was refused, or what differs


EQUAL = 'read, with the same pixels'
REFUSED = 'refused in one sentence'
TOLD = 'read with other pixels, and told'
DIFFERENT = 'read with other pixels or another spacing'
NO_SENTENCE = 'refused, but not in one sentence'
RAISED = 'exception'
CRASHED = 'process ended'
HUNG = 'time limit'
VERDICTS = (EQUAL, REFUSED, TOLD, DIFFERENT, NO_SENTENCE, RAISED, CRASHED, HUNG)
FAULTS = (NO_SENTENCE, RAISED, CRASHED, HUNG)
WHOLE = 'its pixels are whole'  # says a note of a flaw of the header


def is_sentence(text: str, folder: Path) -> bool:
    "Whether a message is one line that names a file in a folder."
    is_line = '\n' not in text and len(text) < 1000
    return is_line and str(folder) in text and 'Traceback' not in text


def outcome_of(path: Path, truth: Truth) -> Outcome:
    "What becomes of a slide that should show what `truth` has."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        try:
            with opened(path) as slide:
                differ = differences(slide, truth)
        except InputError as e:
            text = str(e)
            says = text.replace(f'{path.parent}/', '')
            return Outcome(REFUSED if is_sentence(text, path.parent) else NO_SENTENCE, says)
        except Exception as e:
            return Outcome(RAISED, f'{type(e).__name__}: {e}')
    if not differ:
        return Outcome(EQUAL)
    told = [str(warning.message) for warning in seen]
    of_slide = [text for text in told if str(path.parent) in text and WHOLE not in text]
    return Outcome(TOLD if of_slide else DIFFERENT, ', '.join(differ))


@dataclass(frozen=True)
class Result:
    "A damage and what became of it."

    number: int
    name: str
    damage: str
    has_checksum: bool  # of all that was changed
    verdict: str
    says: str


def limit_memory() -> None:
    "Let this process have only so much more memory."
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def examine(plan: Plan, originals: Path, folder: Path) -> Result:
    "Damage a slide, and see what becomes of it."
    slide = originals / plan.name
    truth = truth_of(slide)
    path, differ = damaged_slide(plan, slide, folder)
    outcome = outcome_of(path, truth)
    return Result(*plan, has_checksum(slide, differ), *outcome)


def work(pipe: Connection, originals: Path, folder: Path) -> None:
    "Examine what is asked for; a process of its own, which first says that it is ready."
    pyvips.cache_set_max(0)
    for name in made.FORMATS:
        truth_of(originals / name)
    limit_memory()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(None)
    while True:
        plan = pipe.recv()
        place = folder / str(plan.number)
        try:
            pipe.send(examine(plan, originals, place))
        finally:
            shutil.rmtree(place, ignore_errors=True)


class Child:
    "A process that examines one slide after another."

    def __init__(self, originals: Path, folder: Path) -> None:
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, originals, folder), daemon=True)
        self.process.start()
        other.close()
        self.pipe.recv()

    def ask(self, plan: Plan) -> Result:
        "What becomes of a damaged slide. The process has ended after one that crashed or hung."
        self.pipe.send(plan)
        if not self.pipe.poll(SECONDS):
            self.end()
            return Result(*plan, False, HUNG, f'more than {SECONDS:g} seconds')
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return Result(*plan, False, CRASHED, f'exit status {self.process.exitcode}')

    def end(self) -> None:
        "End the process."
        self.process.kill()
        self.process.join()


class Children:
    "A process for each thread, which is started anew where it has ended."

    def __init__(self, originals: Path, folder: Path) -> None:
        self.arguments = originals, folder
        self.own = threading.local()
        self.all: list[Child] = []

    def one(self) -> Child:
        "The process of this thread."
        child = getattr(self.own, 'child', None)
        if child is None or not child.process.is_alive():
            child = self.own.child = Child(*self.arguments)
            self.all.append(child)
        return child

    def ask(self, number: int) -> Result:
        "What becomes of the damaged slide with a number; once more in a fresh process if it fails."
        plan = plan_of(number)
        result = self.one().ask(plan)
        if result.verdict in (CRASHED, HUNG):
            result = self.one().ask(plan)
        return result

    def end(self) -> None:
        "End all processes."
        for child in self.all:
            child.end()


def run(numbers: Iterable[int], folder: Path, workers: int = 1) -> Iterator[Result]:
    "Damage slides and see what becomes of each, in the order of their numbers."
    originals = folder / 'originals'
    made.every_format(originals)
    children = Children(originals, folder)
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(children.ask, numbers)
    finally:
        children.end()


# ---- the results


def counts(results: Iterable[Result]) -> dict[str, int]:
    "How often each verdict was given."
    found = Counter(each.verdict for each in results)
    return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}


def by(results: list[Result], key: str) -> dict[str, dict[str, int]]:
    "The counts of verdicts by format or by damage."
    values = sorted({getattr(each, key) for each in results})
    return {
        value: counts(each for each in results if getattr(each, key) == value) for value in values
    }


def versions() -> dict[str, str]:
    "Versions of the libraries that read."
    return {
        'libvips': '.'.join(str(pyvips.version(i)) for i in range(3)),
        'openslide': openslide.__library_version__,
        'tifffile': tifffile.__version__,
        'pydicom': pydicom.__version__,
        'imagecodecs': 'installed' if importlib.util.find_spec('imagecodecs') else 'not installed',
    }


def summary(results: list[Result]) -> dict:
    "The results as they are saved."
    from streaming_pathology.runs.records import environment  # loads torch

    silent = [each for each in results if each.verdict == DIFFERENT]
    return {
        'machine': environment(),
        'libraries': versions(),
        'seed': SEED,
        'files': len(results),
        'seconds_per_file': SECONDS,
        'bytes_of_memory': MEMORY,
        'verdicts': counts(results),
        'by_format': by(results, 'name'),
        'by_damage': by(results, 'damage'),
        'silent': [asdict(each) for each in silent],
        'faults': [asdict(each) for each in results if each.verdict in FAULTS],
        'silent_in_spite_of_a_checksum': sum(each.has_checksum for each in silent),
    }


def saved_results(journal: Path) -> list[Result]:
    "What a former run has done."
    if not journal.exists():
        return []
    return [Result(**json.loads(line)) for line in journal.read_text().splitlines()]


def main() -> None:
    "Damage slides, print what became of them, and save it."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help='JSON file for the results')
    parser.add_argument('--n', type=int, default=2000, help='number of damaged files')
    parser.add_argument(
        '--journal',
        type=Path,
        default=Path(tempfile.gettempdir()) / 'fuzz-slides.jsonl',
        help='what is done so far, from which a run that was broken off goes on; without it, '
        'it begins anew',
    )
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    results = saved_results(options.journal)
    numbers = range(len(results), options.n)
    with tempfile.TemporaryDirectory() as folder, open(options.journal, 'a') as journal:
        for result in run(numbers, Path(folder), options.workers):
            journal.write(json.dumps(asdict(result)) + '\n')
            journal.flush()
            results.append(result)
    found = summary(results)
    options.out.write_text(json.dumps(found, indent=1) + '\n')
    for key in ('verdicts', 'by_format', 'by_damage', 'faults'):
        print(json.dumps(found[key], indent=1))


if __name__ == '__main__':
    main()
