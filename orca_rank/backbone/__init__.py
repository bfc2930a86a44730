"""A timm vision transformer as embedder | body | predictor."""

from orca_rank.backbone.create import create_model, create_timm, source_model, weights_hash
from orca_rank.backbone.embedder import Embedder
from orca_rank.backbone.families import body_of, stages_of
from orca_rank.backbone.model import OrcaModel

__all__ = [
    "Embedder",
    "OrcaModel",
    "body_of",
    "create_model",
    "create_timm",
    "source_model",
    "stages_of",
    "weights_hash",
]
