"""The pictures of README.md and of the site, from the scanned slide that ships and from the demo's painted biopsies.

python tools/pictures.py                 # nbs/images/strips.jpg
python tools/pictures.py demo            # also heatmap.jpg and demo_report.png, from what sp_demo wrote
python tools/pictures.py report          # report.png, report_slides.jpg and report_slide.jpg
"""

import sys
import tempfile
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from check_site import FLAGS, find_chromium
from matplotlib.patches import Circle, Patch, Rectangle
from PIL import Image
from playwright.sync_api import sync_playwright
from torch import nn

from streaming_pathology.engine.graph import ImageSpec, trace
from streaming_pathology.engine.program import Program
from streaming_pathology.engine.schedule import Schedule
from streaming_pathology.evaluation.evaluation import read_predictions
from streaming_pathology.evaluation.gradients import smoothgrad
from streaming_pathology.evaluation.heatmaps import Grid, overlay, pool_map
from streaming_pathology.evaluation.predict import dataset, load_model
from streaming_pathology.evaluation.qupath import field_of
from streaming_pathology.evaluation.report import write_report
from streaming_pathology.evaluation.report_inputs import toy_run
from streaming_pathology.slides.cohorts import read_manifest
from streaming_pathology.slides.masks import class_numbers
from streaming_pathology.slides.readers import sample_slide
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.synthetic import TUMOUR

IMAGES = Path(__file__).resolve().parent.parent / 'nbs' / 'images'
KEPT, KEPT_TEXT, NOW, OUTLINE = '#ff9500', '#b36200', '#5b2a86', '#d6002a'
plt.rcParams.update({'font.size': 9, 'font.family': 'sans-serif'})


def save(fig, name):
    "A figure as a JPEG of about 1400 pixels a row."
    fig.savefig(IMAGES / name, dpi=200, pil_kwargs=dict(quality=82, optimize=True))
    plt.close(fig)
    print(f'{name}: {(IMAGES / name).stat().st_size / 1000:.0f} kB')


# ---- strips and line buffers


def layers():
    "A small network, and what it computes for tissue of the sample slide: (schedule, image, maps)."
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.ReLU(),
    )
    image = Slide(sample_slide()).read(spacing=5.0)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    cpu = torch.device('cpu')
    program = Program(trace(network, ImageSpec(tuple(x.shape), torch.float32, cpu)), cpu)
    maps = []
    with torch.no_grad():
        for layer in network:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps.append(x[0].std(0).numpy())
    return Schedule(program, strip=48), image, maps


def draw_map(ax, picture, buffer, stride, size):
    "A map over the rows of the image: what is let go, kept, computed now, and still to come."
    height, width = size
    if picture.ndim == 2:
        low, high = np.percentile(picture, [2, 99])
        picture = np.clip((picture - low) / (high - low), 0, 1)
    ax.imshow(picture, cmap='bone', extent=(0, picture.shape[1] * stride, len(picture) * stride, 0))
    first, start, stop = (rows * stride for rows in (buffer.first, buffer.start, buffer.stop))
    ax.add_patch(Rectangle((0, 0), width, first, facecolor='white', alpha=0.65, lw=0))
    if picture.ndim == 2:  # the rest of the map does not exist yet
        ax.add_patch(Rectangle((0, stop), width, height - stop, facecolor='white', lw=0))
    ax.add_patch(Rectangle((0, first), width, start - first, facecolor=KEPT, lw=0))
    ax.add_patch(Rectangle((0, start), width, stop - start, facecolor=NOW, alpha=0.2, lw=0))
    ax.add_patch(Rectangle((0, start), width, stop - start, fill=False, edgecolor=NOW, lw=1.5))
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(color='#bbb', lw=0.6)


def draw_strips():
    "A strip on its way through a network, with the rows that each layer has kept."
    schedule, image, maps = layers()
    k = 3  # this strip is shown
    buffers, operations = schedule.buffers(k), schedule.program.operations
    convolutions = [o for o in operations if o.value.name.endswith('conv2d')]
    shown = [(operations[0], image), *zip(convolutions, maps)]
    titles = ['slide, in strips', 'convolution 1', 'convolution 2', 'convolution 3']

    fig, axes = plt.subplots(
        1, 5, figsize=(7, 2.85), gridspec_kw=dict(width_ratios=[1, 1, 1, 1, 0.62])
    )
    fig.subplots_adjust(left=0.045, right=0.99, top=0.9, bottom=0.2, wspace=0.28)
    for ax, (operation, picture), title in zip(axes, shown, titles):
        number = operation.number
        draw_map(ax, picture, buffers[number], float(schedule.strides[number]), image.shape[:2])
        ax.set_title(title, fontsize=9)
        kept = f'keeps {buffers[number].old} rows'
        if number == convolutions[-1].number:  # its rows are added to the sum
            kept = 'keeps none'
        ax.set_xlabel(kept, color=KEPT_TEXT, fontsize=9)
    for number, cut in enumerate(schedule.cuts[:-1], 1):
        axes[0].axhline(cut, color='#444', lw=0.5, ls=(0, (4, 3)))
        middle = cut + schedule.strip / 2
        if middle < schedule.cuts[-1]:
            axes[0].text(-8, middle, number, ha='right', va='center', fontsize=8)
    for ax in axes[1:]:
        ax.annotate(
            '',
            (-0.03, 0.5),
            (-0.24, 0.5),
            xycoords='axes fraction',
            arrowprops=dict(arrowstyle='->', color='#555'),
        )
    end = axes[-1]
    end.set(xlim=(0, 1), ylim=(0, 2), aspect='equal', title='pooling')
    end.title.set_fontsize(9)
    end.axis('off')
    end.add_patch(Circle((0.5, 1), 0.33, facecolor='#f08c0044', edgecolor=KEPT, lw=1.5))
    end.text(0.5, 1, 'sum', ha='center', va='center')
    end.annotate('', (0.5, 0.22), (0.5, 0.62), arrowprops=dict(arrowstyle='->', color='#555'))
    end.text(0.5, 0.12, 'one logit', ha='center', va='top', weight='bold')
    fig.legend(
        handles=[
            Patch(color=KEPT, label='rows kept for the next strip: the line buffers'),
            Patch(facecolor=NOW + '40', edgecolor=NOW, label='computed now, each row once'),
            Patch(facecolor='#ddd', label='let go'),
        ],
        loc='lower center',
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
    )
    save(fig, 'strips.jpg')


# ---- heatmaps


def chosen(folder):
    "Of the slides of a demo to test on that have a heatmap: the first with tumour, the first without."
    cases = read_manifest(folder / 'cohort/manifest.csv', labels=(0, 1), annotation='truth')
    drawn = {path.stem for path in (folder / 'heatmaps').glob('*.npy')}
    tested = [case for case in cases if case.split == 'test' and case.slide_id in drawn]
    return [next(case for case in tested if case.label == label) for label in (1, 0)]


def tumour_of(data, index, shape):
    "The painted tumour as the network's image has it, bool (height, width)."
    case = data.cases[index]
    field = field_of(data, index, Grid.over(shape, shape))
    numbers = class_numbers(case.annotation, case.spacing, field.size)
    margin = 64  # the image may reach beyond the slide
    mask = np.pad(numbers == TUMOUR, margin)
    top, left = (round(position) + margin for position in field.origin)
    return mask[top : top + shape[0], left : left + shape[1]]


def draw_heatmaps(folder):
    "Two painted biopsies with the SmoothGrad of the demo's network."
    model, card = load_model(folder / 'checkpoints/best.pt')
    data = dataset(card, chosen(folder))
    predicted = {
        row.slide_id: row.probability for row in read_predictions(folder / 'predictions.csv')
    }
    images = [data.image(index) for index in range(len(data))]
    heats = [pool_map(smoothgrad(model, image, n=25), 8) for image in images]
    full = np.percentile(heats[0], 99.5)

    fig, axes = plt.subplots(2, 2, figsize=(7, 3.15))
    fig.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.01, wspace=0.03, hspace=0.12)
    for index, (row, image, heat) in enumerate(zip(axes, images, heats)):
        case = data.cases[index]
        rgb = image.permute(1, 2, 0).numpy()
        row[0].imshow(rgb)
        grid = Grid.of_cells(rgb.shape[:2], heat.shape, step=8)
        row[1].imshow(overlay(rgb, heat, vmax=full, grid=grid))
        what = 'with tumour' if case.label else 'without tumour'
        row[0].set_title(f'synthetic biopsy {what}', fontsize=9)
        row[1].set_title(f'predicted {predicted[case.slide_id]:.2f}', fontsize=9)
        for ax in row:
            if case.label:
                tumour = tumour_of(data, index, rgb.shape[:2])
                ax.contour(tumour, [0.5], colors=OUTLINE, linewidths=1)
            ax.axis('off')
    save(fig, 'heatmap.jpg')


# ---- the reports


@contextmanager
def browser_page(width=960, height=1200):
    "A page of a browser without a window."
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        yield browser.new_page(viewport=dict(width=width, height=height))
        browser.close()


def photograph(page, name, box):
    "A part of what a page shows, (x, y, width, height), as a PNG of 128 colours or a JPEG."
    x, y, width, height = box
    shown = page.screenshot(clip=dict(x=x, y=y, width=width, height=height), full_page=True)
    picture = Image.open(BytesIO(shown)).convert('RGB')
    if name.endswith('.png'):
        picture = picture.quantize(128, dither=Image.Dither.NONE)
        picture.save(IMAGES / name, optimize=True)
    else:
        picture.save(IMAGES / name, quality=85, optimize=True)
    print(f'{name}: {(IMAGES / name).stat().st_size / 1000:.0f} kB')


def photograph_demo(folder):
    "The top of the report of a demo, up to the note on what it is made of."
    with browser_page() as page:
        page.goto((folder / 'report/index.html').resolve().as_uri())
        last = page.get_by_text('Synthetic cohort.').locator('..').bounding_box()
        photograph(page, 'demo_report.png', (0, 0, 960, last['y'] + last['height'] + 15))


def photograph_report():
    "Top, gallery and the page of a slide, of a report of made-up predictions."
    with tempfile.TemporaryDirectory() as temporary:
        report = write_report(toy_run(Path(temporary) / 'toy-run', n=39))
        with browser_page() as page:
            page.goto(report.as_uri())
            below = page.locator('section').nth(1).bounding_box()
            photograph(page, 'report.png', (0, 0, 960, below['y']))
            cards = page.locator('#labelled .card')
            first, third_row = cards.nth(0).bounding_box(), cards.nth(8).bounding_box()
            left, top = first['x'] - 8, first['y'] - 8
            photograph(page, 'report_slides.jpg', (left, top, 960 - 2 * left, third_row['y'] - top))
            cards.nth(2).locator('a.view').click()
            page.get_by_label('outline').first.check()
            page.wait_for_timeout(2000)  # until the tiles are drawn
            verdict = page.get_by_text('false negative').first.bounding_box()
            bottom = verdict['y'] + verdict['height'] + 8
            photograph(page, 'report_slide.jpg', (0, 0, 960, bottom))


if __name__ == '__main__':
    if sys.argv[1:] == ['report']:
        photograph_report()
    else:
        draw_strips()
        for demo in map(Path, sys.argv[1:]):
            draw_heatmaps(demo)
            photograph_demo(demo)
