"""Adapted layers: a frozen module and the factors of every adapter on it, one file per kind of module."""

from veneer.adapter.layers.attention import AdaptedAttention
from veneer.adapter.layers.base import TABLES, AdaptedModule, Options, Routing, Stream, plain
from veneer.adapter.layers.conv import AdaptedConv
from veneer.adapter.layers.embedding import AdaptedEmbedding, TiedHead
from veneer.adapter.layers.experts import AdaptedExperts, AdaptedParameters, ParameterFactors, container_for
from veneer.adapter.layers.linear import AdaptedLinear
from veneer.adapter.layers.tokens import TrainedTokens, TrainedTokensHead, TrainedTokensTwin

KINDS: dict[str, type[AdaptedModule]] = {
    layer.kind: layer for layer in (AdaptedLinear, AdaptedConv, AdaptedEmbedding, AdaptedAttention)
}

__all__ = [
    "KINDS",
    "TABLES",
    "AdaptedAttention",
    "AdaptedConv",
    "AdaptedEmbedding",
    "AdaptedExperts",
    "AdaptedLinear",
    "AdaptedModule",
    "AdaptedParameters",
    "Options",
    "ParameterFactors",
    "Routing",
    "Stream",
    "TiedHead",
    "TrainedTokens",
    "TrainedTokensHead",
    "TrainedTokensTwin",
    "container_for",
    "plain",
]
