"""The source of a flow: the law at t = 0, and the coordinates in which it is N(0, I)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnflow.arguments import Positive, Share, checked, shaped
from bnnflow.model import BayesianModel
from bnnflow.model.priors import FlatPrior
from bnnflow.weights import NO_SYMMETRY, Symmetries

__all__ = ["Source"]


@checked
class Source:
    """The law N(loc, root root^T) in the standard normal coordinates z of the prior.

    By default the prior itself.

    A flow lives in the coordinates x in which its source is N(0, I): theta <-> z by the prior,
    elementwise, and z = loc + root x.

    Args:
        prior: the model's prior along the flat weights.
        loc: mean in the prior's coordinates, ``(dim,)``; zero if None.
        root: a number, or a symmetric positive definite matrix ``(dim, dim)``; the identity if
            None.

    Raises:
        ValueError: if the prior has no normal coordinates, or ``root`` is neither.
    """

    def __init__(
        self,
        prior: FlatPrior,
        loc: Tensor | None = None,
        root: Tensor | float | None = None,
    ) -> None:
        prior.require_coordinates()
        self.prior, self.dim = prior, prior.dim
        like = {"device": prior.device, "dtype": prior.dtype}
        self.loc = None if loc is None else loc.to(**like)
        self.root = None if root is None else torch.as_tensor(root, **like)
        if self.loc is not None and self.loc.shape != (self.dim,):
            raise ValueError(f"loc must be ({self.dim},), got {tuple(self.loc.shape)}")
        self._inverse: Tensor | None = None
        self._log_det = 0.0
        self.precision_shift: Tensor | None = None
        if self.root is None:
            return
        if self.root.dim() == 0 and float(self.root) > 0:
            self._inverse, self._log_det = (
                1 / self.root,
                self.dim * float(self.root.double().log()),
            )
            self.precision_shift = self.root.square() - 1
        elif self.root.shape == (self.dim, self.dim):
            exact = self.root.double()
            self._inverse = torch.linalg.inv(exact).to(self.root)
            self._log_det = float(torch.linalg.cholesky(exact).diagonal().log().sum() * 2)
            eye = torch.eye(self.dim, dtype=torch.float64, device=exact.device)
            self.precision_shift = (exact @ exact - eye).to(self.root)
        else:
            raise ValueError(f"root must be a positive number or ({self.dim}, {self.dim})")

    @classmethod
    @checked
    def scaled(cls, model: BayesianModel, scale: Positive) -> Source:
        """Return the prior made ``scale`` times as wide in its normal coordinates.

        Keeps the prior's symmetries.
        """
        return cls(model.flat_prior, root=scale)

    @classmethod
    @checked
    def gaussian(
        cls, model: BayesianModel, theta: Tensor, shrinkage: Share = 0.05
    ) -> Source:
        """Return a Gaussian with mean and covariance of weights ``(n, dim)``, in the prior's normal
        coordinates.

        It keeps no symmetry: align the weights first, so that they are unimodal.

        Args:
            model: gives the coordinates.
            theta: weights.
            shrinkage: share of the prior's covariance that is mixed in, which keeps the source wide
                enough.
        """
        if len(shaped("theta", theta, None, model.dim)) < 2:
            raise ValueError("theta must be two draws or more")
        z = model.flat_prior.to_normal(theta.to(model.device, model.dtype)).double()
        covariance = torch.cov(z.T).reshape(model.dim, model.dim)
        eye = torch.eye(model.dim, dtype=torch.float64, device=z.device)
        values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * eye)
        return cls(
            model.flat_prior, z.mean(0), vectors * values.clamp(min=1e-8).sqrt() @ vectors.T
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self.prior.dtype

    @property
    def is_prior(self) -> bool:
        """Whether this is the prior itself."""
        return self.loc is None and self.root is None

    @property
    def exchangeable(self) -> bool:
        """Whether the law is the same in every coordinate, up to what the prior makes of it."""
        return self.loc is None and (self.root is None or self.root.dim() == 0)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Source:
        """Return the same source elsewhere."""
        return Source(self.prior.to(device, dtype), self.loc, self.root)

    def on(self, model: BayesianModel) -> Source:
        """Return the same source over the prior of another model."""
        return Source(model.flat_prior, self.loc, self.root)

    def symmetries(self, model: BayesianModel) -> Symmetries:
        """Return the symmetries of the network's function that leave this law invariant."""
        return model.symmetries() if self.exchangeable else NO_SYMMETRY

    # ---------------------------------------- coordinates

    def to_prior(self, x: Tensor) -> Tensor:
        """Map the flow's coordinates to the normal coordinates of the prior, ``(..., dim)``."""
        z = self.vjp(x)
        return z if self.loc is None else self.loc + z

    def to_normal(self, theta: Tensor) -> Tensor:
        """Map weights to the flow's coordinates, ``(..., dim)``."""
        z = self.prior.to_normal(theta)
        z = z if self.loc is None else z - self.loc
        return z if self._inverse is None else _apply(self._inverse, z)

    def from_normal(self, x: Tensor) -> Tensor:
        """Map the flow's coordinates to weights, ``(..., dim)``."""
        return self.prior.from_normal(self.to_prior(x))

    def log_jacobian(self, theta: Tensor) -> Tensor:
        """Return log |d to_normal / d theta|, ``(..., dim) -> (...)`` in float64."""
        return self.prior.log_jacobian(theta) - self._log_det

    def vjp(self, v: Tensor) -> Tensor:
        """Apply the root, which is symmetric, to vectors ``(..., dim)``."""
        return v if self.root is None else _apply(self.root, v)

    # ---------------------------------------- storage

    def describe(self) -> dict[str, Any]:
        """Return plain values from which, with `arrays`, the source is rebuilt."""
        return {"prior": self.prior.describe(), "arrays": sorted(self.arrays())}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return loc and root where there are any."""
        given = {"source/loc": self.loc, "source/root": self.root}
        return {
            name: value.cpu().numpy() for name, value in given.items() if value is not None
        }

    @classmethod
    def from_description(
        cls,
        plain: dict[str, Any],
        arrays: dict[str, np.ndarray],
        dtype: torch.dtype,
        model: BayesianModel | None,
    ) -> Source:
        """Rebuild a source; the prior is the model's own where it has inferred parameters.

        Raises:
            ValueError: if such a source has no model.
        """
        values = {
            name.removeprefix("source/"): torch.from_numpy(arrays[name])
            for name in plain["arrays"]
        }
        if all("start" in block for block in plain["prior"]):
            return cls(FlatPrior.from_description(plain["prior"], dtype), **values)
        if model is None or model.flat_prior.describe() != plain["prior"]:
            raise ValueError(
                "a flow from a prior with inferred parameters needs its model: load(path, model)"
            )
        return cls(model.flat_prior, **values)


def _apply(matrix: Tensor, v: Tensor) -> Tensor:
    return matrix * v if matrix.dim() == 0 else v @ matrix
