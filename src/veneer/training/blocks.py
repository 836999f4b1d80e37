"""A model's repeated blocks; they live with the adapter, as a plan needs them too."""

from veneer.adapter.blocks import repeated_blocks

__all__ = ["repeated_blocks"]
