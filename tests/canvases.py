"Random canvases"

import torch
from hypothesis import strategies as st

from streaming_pathology.engine.canvas import Canvas

pick = st.sampled_from


@st.composite
def canvases(draw, channels):
    "Patches anywhere: at the edge, over each other, touching, a pixel wide, or none."
    H, W = draw(st.integers(1, 160)), draw(st.integers(1, 160))
    g, patches = torch.Generator().manual_seed(draw(st.integers(0, 2**31))), []
    for _ in range(draw(pick([0, 1, 1, 2, 2, 3, 6]))):
        h, w = draw(st.integers(1, max(1, min(H, 40)))), draw(st.integers(1, max(1, min(W, 40))))
        patches.append(
            (
                draw(st.integers(0, H - h)),
                draw(st.integers(0, W - w)),
                torch.randn(
                    channels,
                    h,
                    w,
                    dtype=torch.double,
                    generator=g,
                    requires_grad=draw(pick([True, True, False])),
                ),
            )
        )
    return Canvas((H, W), torch.randn(channels, generator=g).tolist(), patches, torch.double)
