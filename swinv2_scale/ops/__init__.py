"""Operators: the window geometry and the cosine window attention that every model here is built on."""

from swinv2_scale.ops.cosine_window_attention import cosine_window_attention

__all__ = ["cosine_window_attention"]
