"Writes the simulated tables of slides that reference.R and test_reference.py read."

from pathlib import Path

import numpy as np

from streaming_pathology.io import write_csv

HERE = Path(__file__).parent


def survival(rng):
    "40 patients with one to four slides each, whose log risks have a weak effect."
    rows = []
    for patient in range(40):
        risk = rng.normal()
        event_at = rng.exponential(20 * np.exp(-0.5 * risk)) + 0.1
        seen_until = rng.uniform(6, 40)
        for _ in range(rng.integers(1, 5)):
            rows.append(
                dict(
                    slide_id=f's{len(rows)}',
                    months=round(min(event_at, seen_until), 2),
                    event=int(event_at <= seen_until),
                    split='test',
                    log_risk=round(risk + rng.normal(0, 0.6), 4),
                    patient_id=f'p{patient}',
                )
            )
    return rows


def aucs(rng):
    "Sets of two classes: plain, of patients with several slides, and without an error."

    def of_set(name, labels, scores, patients):
        return [
            dict(set=name, label=int(label), score=round(float(score), 4), patient_id=int(patient))
            for label, score, patient in zip(labels, scores, patients, strict=True)
        ]

    labels = np.arange(50) % 2
    rows = of_set('plain', labels, rng.normal(1.2 * labels, 1), range(50))
    patients = np.sort(rng.integers(0, 24, 70))
    labels = patients % 2
    noise = rng.normal(0, 1, 24)[patients] + rng.normal(0, 0.7, 70)
    rows += of_set('clustered', labels, 1.5 * labels + noise, patients)
    labels = np.repeat([0, 1], 8)
    rows += of_set('separated', labels, labels + rng.random(16) / 2, range(16))
    labels = np.repeat([0, 1], [19, 1])
    rows += of_set('one positive', labels, np.r_[rng.random(19), 0.9], range(20))
    labels = np.arange(40) % 2
    return rows + of_set('swapped', labels, rng.normal(-1.5 * labels, 1), range(40))


def classes(rng):
    "80 slides of four diagnoses, of which the first is often called the last."
    labels = np.arange(80) % 4
    logits = rng.normal(0, 1, (80, 4)) + 2.2 * np.eye(4)[labels]
    logits[labels == 0, 3] += 2.5
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return [
        dict(slide_id=f's{number}', diagnosis=int(label), split='test')
        | {f'probability_{each}': round(float(share), 4) for each, share in enumerate(row)}
        for number, (label, row) in enumerate(zip(labels, shares, strict=True))
    ]


if __name__ == '__main__':
    for make in (survival, aucs, classes):
        write_csv(HERE / f'{make.__name__}.csv', make(np.random.default_rng(7)))
