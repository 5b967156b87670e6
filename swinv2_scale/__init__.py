"""swinv2-scale: train Swin Transformer V2, from 28 million parameters on a laptop to 3 billion on a cluster."""

from swinv2_scale import ops
from swinv2_scale.models import create_model, load_checkpoint

__all__ = ["create_model", "load_checkpoint", "ops"]
__version__ = "0.1.0"
