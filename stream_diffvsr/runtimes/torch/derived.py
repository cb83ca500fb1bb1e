"""Derived forms of weights, computed once and kept for as long as the layer exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn


class Derived:
    """Caches what `make` computes from layers' weights; a result is recomputed if its weight changes."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self.make = make
        self._kept: WeakKeyDictionary[nn.Module, _Of] = WeakKeyDictionary()

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._kept

    def __call__(self, layer: nn.Linear | nn.Conv2d) -> Tensor:
        """Return a layer's derived weight.

        The layer's own weight must not be an inference tensor, because changes to it could not be detected.
        """
        kept = self._kept.get(layer)
        if kept is None or not kept.is_of(layer.weight):
            kept = self._kept[layer] = _Of(layer.weight, self.make(layer.weight))
        return kept.made

    def bytes_beside(self, layers: Iterable[nn.Linear | nn.Conv2d], share: float) -> tuple[int, int]:
        """Return how many bytes are already kept for these layers, and how many the next frame will add.

        `share` is the size of a derived weight relative to the original weight.
        """
        have = to_come = 0
        for layer in layers:
            size = round(layer.weight.nbytes * share)
            have, to_come = (have + size, to_come) if layer in self else (have, to_come + size)
        return have, to_come


class _Of:
    """A derived weight, with the identity of the weight from which it was computed."""

    def __init__(self, weight: Tensor, made: Tensor) -> None:
        self.weight, self.at, self.version = ref(weight), weight.data_ptr(), weight._version
        self.made = made

    def is_of(self, weight: Tensor) -> bool:
        unchanged = (self.at, self.version) == (weight.data_ptr(), weight._version)
        return self.weight() is weight and unchanged
