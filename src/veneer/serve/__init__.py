"""Serve many adapters on one frozen base: continuous batching, every row its own adapter, stack of adapters or none.

`request` says what is asked and how it is answered, `registry` which adapters there are, `engine` runs them.
"""

from importlib import import_module

_WHERE = {
    "Sampling": "request",
    "Request": "request",
    "Piece": "request",
    "TokenLogprob": "request",
    "Usage": "request",
    "Ticket": "request",
    "Registry": "registry",
    "AdapterInfo": "registry",
    "Engine": "engine",
    "ServeError": "errors",
    "Overloaded": "errors",
    "UnknownAdapter": "errors",
    "PromptTooLong": "errors",
    "AdapterRefused": "errors",
    "AdapterExists": "errors",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    """Import on first use: the command line asks for names here before it needs torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'veneer.serve' has no attribute {name!r}")
    return getattr(import_module(f"veneer.serve.{_WHERE[name]}"), name)
