"""What a trained run looked at: maps of each slide, as numbers, pictures, overlays and regions."""

from wholeslide.explain.slides import Explained, ExplainResult, explain, explain_cohort, explanations_of
from wholeslide.explain.stored import StoredExplanation, StoredMap

__all__ = [
    "ExplainResult",
    "Explained",
    "StoredExplanation",
    "StoredMap",
    "explain",
    "explain_cohort",
    "explanations_of",
]
