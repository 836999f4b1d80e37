"""How A and B start: random, from the weight, from activations or from gradients. `start` is the only entry."""

from veneer.adapter.init.start import DATA_DRIVEN, Start, blank, start

__all__ = ["DATA_DRIVEN", "Start", "blank", "start"]
