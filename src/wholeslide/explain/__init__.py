"""What a trained run looked at: maps of each slide, as numbers, pictures, overlays and regions."""

from wholeslide.explain.slides import Explained, ExplainResult, explain

__all__ = ["ExplainResult", "Explained", "explain"]
