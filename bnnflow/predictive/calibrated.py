"""Class probabilities that are as sure as rows that were left out say."""

from __future__ import annotations

from dataclasses import replace

import torch

from bnnflow import diagnostics
from bnnflow.arguments import checked
from bnnflow.calibration import Calibration
from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.predictive.average import TINY, predict

__all__ = ["calibrate"]

_ROWS = 2000  # that are left out in turn, at most


@checked
def calibrate(model: BayesianModel, draws: Draws) -> Draws:
    """Return draws of a classifier whose predictions are as sure as leave-one-out says.

    A posterior average over many separating planes is often right more often than it says. How
    often it is right on rows that it has not seen is known: from draws that are weighed as if a row
    had been left out (Vehtari, Gelman & Gabry 2017), each row in turn, or 2,000 of them.

    Args:
        model: the classifier.
        draws: of its posterior, without weights.

    Returns:
        The draws with a ``calibration``, or without, where it would not win clearly.
    """
    rows = model.some_rows(_ROWS)
    plain = replace(draws, calibration=None)
    prediction = predict(model, plain, model.x[rows])
    labels = model.y[rows]
    index = labels.expand(1, -1).unsqueeze(-1)
    seen = torch.cat(
        [
            probs.gather(-1, index.expand(len(probs), -1, -1)).squeeze(-1)
            for probs in prediction.functions()
        ]
    )
    raw = -seen.clamp(min=TINY).log().T.cpu().numpy()  # (n, draws)
    raw = raw * model.powers_of(rows).cpu().numpy()[:, None]
    weights = torch.from_numpy(diagnostics.psis_of_rows(raw)[0]).exp()
    left_out, start = torch.zeros((), dtype=torch.float64), 0
    for probs in prediction.functions():
        part = weights[:, start : start + len(probs)].to(probs)
        left_out = left_out + torch.einsum("ns,snc->nc", part, probs)
        start += len(probs)
    log_probs = left_out.clamp(min=TINY).log()
    calibration = Calibration.learned(log_probs.cpu(), labels.cpu())
    said = str(calibration or "none: leave-one-out sees no clear gain")
    return replace(draws, calibration=calibration, info=draws.info | {"calibration": said})
