"Small trainings, and how to compare what two of them came to"

import copy
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from streaming_pathology.core import InputError
from streaming_pathology.slides.datasets import slide_loader
from streaming_pathology.training.callbacks import EMA, Cosine, EarlyStopping
from streaming_pathology.training.loop import Callback, TinyNet, fit, synth_slides


def complaint(function, *args, **options):
    "What a function says when it refuses something."
    try:
        function(*args, **options)
    except InputError as e:
        return str(e)
    raise AssertionError('it was not refused')


class DropoutNet(TinyNet):
    "With dropout before its linear layer."

    def forward(self, x):
        return self.head(F.dropout(self.pooled(x), 0.5, self.training))


class NanNet(TinyNet):
    "Gives nan for images of 99 rows."

    def forward(self, x):
        logits = super().forward(x)
        return logits * float('nan') if x.shape[2] == 99 else logits


class KeptStates(Callback):
    "Keeps a copy of every state that a checkpoint could hold."

    def __init__(self):
        self.all = []

    def at_rest(self, state):
        self.all.append(copy.deepcopy(state.state_dict()))


class ListDataset(Dataset):
    "A list as a dataset that `slide_loader` takes."

    def __init__(self, items):
        self.items = items
        self.cases = [
            SimpleNamespace(slide_id=item['slide_id'], label=item['label'].item()) for item in items
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        index, _epoch = key
        return self.items[index]


def shuffled_by_torch():
    "A network, slides that torch's generator shuffles, and tuning slides."
    torch.manual_seed(0)
    loader = DataLoader(synth_slides(7), batch_size=None, shuffle=True)
    return DropoutNet(), loader, synth_slides(4, 1)


def in_slide_loaders():
    "A network, and slides in loaders of this package."
    torch.manual_seed(0)
    return (
        DropoutNet(),
        slide_loader(ListDataset(synth_slides(7)), True),
        slide_loader(ListDataset(synth_slides(4, 1))),
    )


def timed_slides():
    "Slides of one size, labelled with a time and whether there was an event."
    items = []
    for i, item in enumerate(synth_slides(7, 3)):
        label = torch.tensor([5.0 - i % 4, float(i % 3 > 0)])
        items.append(item | dict(image=item['image'][:, :24, :24], label=label))
    return items


def with_survival():
    "A network, and slides with a time as label."
    torch.manual_seed(0)
    slides = timed_slides()
    return DropoutNet(), slides, slides[:4]


def without_times(history):
    "The rows of a history without what is never twice the same."
    return [
        {name: value for name, value in row.items() if name not in ('seconds', 'peak_mb')}
        for row in history
    ]


def assert_same(model, history, other_model, other_history):
    "Two trainings came to the same weights and losses, bit by bit."
    assert without_times(history) == without_times(other_history)
    weights = other_model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def resumed_from_each(make, **options):
    """Train once, and once more from each state that a checkpoint could hold, with early stopping,
    a learning rate schedule and an average of the weights; how many states there were."""

    def run(*more, resume=None):
        model, train, tuning = make()
        callbacks = [EarlyStopping(5), Cosine(), EMA(0.9), *more]
        history = fit(
            model, train, tuning, callbacks=callbacks, resume=resume, progress=False, **options
        )
        return model, history

    kept = KeptStates()
    model, history = run(kept)
    for state in kept.all:
        assert_same(model, history, *run(resume=state))
    return len(kept.all)
