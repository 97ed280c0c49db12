"""What likelihoods made of another one take from it."""

from __future__ import annotations

from torch.distributions import Distribution

from bnnflow.model.likelihood import Likelihood

__all__ = ["Based"]


class Based(Likelihood):
    """A likelihood made of another one, with the parameters and closed forms of that."""

    base: Likelihood

    @property
    def parameters(self) -> dict[str, Distribution]:
        """Those of the base."""
        return self.base.parameters

    @property
    def is_bounded(self) -> bool:
        """Whether that of the base is."""
        return self.base.is_bounded

    @property
    def has_fisher_factor(self) -> bool:
        """Whether the base has one."""
        return self.base.has_fisher_factor

    @property
    def has_whitened_score(self) -> bool:
        """Whether the base has one."""
        return self.base.has_whitened_score
