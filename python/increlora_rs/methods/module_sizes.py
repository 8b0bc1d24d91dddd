"""Sizes of the adapted modules in the configuration, for parameters that do not tell them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..contract.config import MethodConfig
from ..contract.structure import SizeMismatchError
from ..support.sites import Site


@dataclass
class SizedConfig(MethodConfig):
    """A configuration that keeps the sizes of the adapted modules.

    Args:
        module_sizes: Kept by the library, for what reads a saved adapter: out and in, by full module name.

    Raises:
        ValueError, TypeError: as :class:`MethodConfig` does.
    """

    module_sizes: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Kept by the library: out and in of the modules."}
    )

    def check(self) -> None:
        """Checks ``module_sizes``."""
        if not isinstance(self.module_sizes, dict):
            raise TypeError(f"module_sizes={self.module_sizes!r} must be a dictionary; leave it out.")
        for name, sizes in self.module_sizes.items():
            if not isinstance(sizes, (list, tuple)) or [type(size) for size in sizes] != [int, int]:
                raise ValueError(
                    f"module_sizes[{name!r}]={sizes!r} must be two numbers, out and in; leave it out: the "
                    "library keeps it."
                )

    def check_rank(self, site: Site, rank: int) -> None:
        """Refuses a module that is not the one of a saved adapter, whose parameters may fit all the same.

        Raises:
            SizeMismatchError: the adapter was saved from a module of another size.
        """
        size = [site.out, site.features]
        known = list(self.module_sizes.get(site.name, size))
        if known != size:
            raise SizeMismatchError(
                f"size mismatch: the module {site.name!r} is {size[0]} by {size[1]}, and module_sizes has "
                f"{known[0]} by {known[1]}; the adapter was saved from another base model. For a fresh one, "
                "leave module_sizes out."
            )

    def note(self, sites: Iterable[Site], **beside: Any) -> None:
        """Takes down the sizes, too."""
        sites = list(sites)
        super().note(sites, **beside)
        self.module_sizes = {site.name: [site.out, site.features] for site in sites}

    def size_of(self, module: str) -> tuple[int, int]:
        """Out and in of a module of a saved adapter, by its full name.

        Raises:
            ValueError: the configuration has none.
        """
        if module not in self.module_sizes:
            raise ValueError(
                f"model_or_adapter_dir: the configuration has no module_sizes of module {module!r}, without "
                "which its update is not known; load the adapter into its base model, and save it."
            )
        out, features = self.module_sizes[module]
        return out, features
