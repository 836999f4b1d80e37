"""How A and B start: random, from the weight, from activations or from gradients. `start` is the only entry
that computes."""

from veneer.adapter.init.start import COMPUTED, DATA_DRIVEN, Start, blank, check, start

__all__ = ["COMPUTED", "DATA_DRIVEN", "Start", "blank", "check", "start"]
