"""What Veneer raises for a user's mistake: one line that says what is wrong and how to fix it.

Each class is a `VeneerError` and also a `ValueError` or `RuntimeError`, so that code which knows nothing of Veneer
still catches it. The command line prints the message and exits with code 2, without a traceback.
"""


class VeneerError(Exception):
    """Base of every error that Veneer raises on purpose."""


class ConfigError(VeneerError, ValueError):
    """A configuration key or value is unknown, of the wrong type or out of range."""


class TargetError(VeneerError, ValueError):
    """A target module, or a pattern over module names, matches nothing or something that cannot be adapted."""


class DataError(VeneerError, ValueError):
    """Training or evaluation data is missing, malformed or leaves nothing to learn from."""


class TemplateError(DataError):
    """The chat template refuses a conversation, or its rendered text cannot be masked exactly."""


class BaseModelError(VeneerError, RuntimeError):
    """A base model cannot be found, fetched, verified or loaded."""


class AdapterFormatError(VeneerError, ValueError):
    """An adapter's files are damaged, or their tensors do not fit the model."""


class WrongBaseError(VeneerError, ValueError):
    """An adapter was trained on another base model than the one it is being loaded onto."""


class AdapterStateError(VeneerError, RuntimeError):
    """An operation does not fit the adapters now on the model (name taken, none attached, …)."""


class RunError(VeneerError, RuntimeError):
    """A run directory cannot be created, continued or written."""


class PlanError(VeneerError, ValueError):
    """No setting fits a memory budget."""


class TrainingDiverged(VeneerError, RuntimeError):
    """The loss became NaN or infinite."""
