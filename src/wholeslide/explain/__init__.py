"""What a trained run looked at: maps of each slide, as numbers, pictures, overlays and regions."""

from wholeslide.explain.slides import Explained, ExplainResult, explain, explain_cohort, explanations_of

__all__ = ["ExplainResult", "Explained", "explain", "explain_cohort", "explanations_of"]
