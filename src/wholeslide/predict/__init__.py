"""A trained run on slides: the numbers of its test split, and slides that were never seen before."""

from wholeslide.predict.evaluation import evaluate_run
from wholeslide.predict.external import evaluate_external
from wholeslide.predict.new_slides import PredictResult, predict
from wholeslide.predict.ranks import FailedElsewhereError

__all__ = ["FailedElsewhereError", "PredictResult", "evaluate_external", "evaluate_run", "predict"]
