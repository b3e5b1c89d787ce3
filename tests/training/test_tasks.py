"Losses are those of the formulas, and labels that do not fit a task are refused."

import math

import pytest
import torch
from torch import nn

from streaming_pathology.core import InputError
from streaming_pathology.training.tasks import (
    Binary,
    Multiclass,
    Multilabel,
    Ordinal,
    Regression,
    Survival,
    balanced_weights,
    joint_gradient,
    make_task,
    task_of,
)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.double)


# ---- losses


def test_class_weights_multiply_the_loss_of_a_slide(rng):
    logits, labels = normal(rng, 7, 1), torch.tensor([0.0, 1, 1, 0, 1, 1, 1])
    probability = logits[:, 0].sigmoid()
    costs = torch.where(labels == 1, -3.0 * probability.log(), -(1 - probability).log())
    torch.testing.assert_close(Binary((1.0, 3.0)).loss(logits, labels), costs.sum() / 7)


def test_balanced_weights_have_mean_one():
    labels = [0, 1, 2, 0, 1, 1, 2]
    weights = balanced_weights(labels, 3)
    assert sum(weights[label] for label in labels) / 7 == pytest.approx(1)


def test_grades_have_probabilities(rng):
    probabilities = Ordinal(6).predicted(5 * normal(rng, 50, 5))
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(50, dtype=torch.double))


def test_the_probability_of_a_grade_is_the_formula(rng):
    outputs = normal(rng, 1, 5)
    steps = outputs[0].sigmoid()
    expected = torch.stack(
        [
            1 - steps[0],
            steps[0] * (1 - steps[1]),
            steps[:2].prod() * (1 - steps[2]),
            steps[:3].prod() * (1 - steps[3]),
            steps[:4].prod() * (1 - steps[4]),
            steps.prod(),
        ]
    )
    torch.testing.assert_close(Ordinal(6).predicted(outputs)[0], expected)
    loss = Ordinal(6).losses(outputs, torch.tensor([3.0]))
    torch.testing.assert_close(loss, -expected[3:4].log())


def test_a_grade_far_off_has_a_finite_loss():
    loss = Ordinal(6).losses(torch.full((1, 5), 900.0), torch.tensor([0.0]))
    assert loss.isfinite()


# ---- survival, with ties and censored slides

TIME = torch.tensor([5.0, 3, 3, 8, 1, 9])
EVENT = torch.tensor([1.0, 1, 1, 0, 0, 1])
LABELS = torch.stack([TIME, EVENT], 1)


def test_cox_is_the_formula_term_by_term(rng):
    risk = normal(rng, 6, 1)
    terms = []
    for i in range(6):
        if EVENT[i]:
            at_risk = [j for j in range(6) if TIME[j] >= TIME[i]]
            terms.append(risk[i, 0] - risk[at_risk, 0].exp().sum().log())
    torch.testing.assert_close(Survival().loss(risk, LABELS), -sum(terms) / 4)


def test_without_an_event_nothing_is_learnt(rng):
    labels = torch.stack([TIME, 0 * EVENT], 1)
    assert Survival().loss(normal(rng, 6, 1), labels).item() == 0.0


def test_large_risks_have_a_finite_loss(rng):
    assert Survival().loss(1e4 * normal(rng, 6, 1), LABELS).isfinite()


def test_slide_after_slide_has_the_gradient_of_the_mini_batch(rng):
    net, slides = nn.Linear(4, 1).double(), normal(rng, 6, 4)
    whole = torch.autograd.grad(Survival().loss(net(slides), LABELS), net.parameters())
    with torch.no_grad():
        risks = torch.cat([net(slide[None]) for slide in slides])
    _, gradients = joint_gradient(Survival(), risks, LABELS)
    for slide, gradient in zip(slides, gradients, strict=True):
        net(slide[None]).backward(gradient[None])
    for expected, parameter in zip(whole, net.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-12)


# ---- by name


def test_a_task_has_what_the_labels_say():
    assert make_task('ordinal', [0, 5, 2, 3, 1, 4]).n_out == 5
    assert make_task('multiclass', [0, 2, 1]).n_out == 3
    assert make_task('binary', [0, 1, 1], balanced=True).weights == (1.5, 0.75)
    assert vars(make_task('regression', [1.0, 3.0])) == dict(mean=2.0, std=1.0)
    assert make_task('survival', [[3, 1]]).columns == 2


@pytest.mark.parametrize(
    'task',
    [
        Binary((1.0, 2.0)),
        Multiclass(3),
        Multilabel(2),
        Ordinal(4),
        Regression(2, 3),
        Survival(),
    ],
    ids=repr,
)
def test_settings_make_the_same_task(task):
    assert repr(task_of(task.settings())) == repr(task)
    reported = task.predicted(torch.zeros(1, task.n_out))
    assert len(task.named(['a', 'b'])) == reported.numel()


@pytest.mark.parametrize(
    'name, labels, balanced, problem',
    [
        ('grades', [0], False, 'binary, multiclass'),
        ('binary', [0, 2], False, 'label 2 is none of 0 to 1'),
        ('multiclass', [0.5], False, 'label 0.5'),
        ('survival', [[0.0, 1]], False, 'time 0'),
        ('survival', [1, 0], False, 'several numbers'),
        ('binary', [[0, 1]], False, 'one number'),
        ('regression', [2.0, 2.0], False, 'have to differ'),
        ('multilabel', [[0, 3]], False, 'label 3'),
        ('binary', [math.nan], False, 'label nan'),
        ('survival', [[1, 0], [2, 0]], False, 'no slide has an event'),
        ('survival', [[1, 0, 1]], False, 'not 3'),
        ('regression', [1.0, 2.0], True, 'no classes'),
        ('ordinal', [0, 2], True, 'class 1'),
        ('survival', [[1, 1]], True, 'no classes'),
    ],
)
def test_labels_that_do_not_fit_are_refused(name, labels, balanced, problem):
    with pytest.raises(InputError, match=problem):
        make_task(name, labels, balanced)


def test_unknown_settings_are_refused():
    with pytest.raises(InputError, match='does not say'):
        task_of(dict(name='grades'))
