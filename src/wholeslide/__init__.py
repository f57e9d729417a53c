"""Train, evaluate and run classifiers that see an entire gigapixel slide at once.

What the command line does, from Python::

    import wholeslide

    run = wholeslide.train_run(wholeslide.TrainConfig(manifest=..., slides=..., out=...))
    numbers = wholeslide.evaluate_run(run.path)
    rows = wholeslide.predict_slides(run.path, [new_slide]).rows

and the parts that it is made of: `open_slide` and `open_working_slide` read pixels at a resolution, `read_cohort`,
`split_cohort` and `audit` look after the table of slides, `build_network`, `make_plan` and `StreamingEngine` train a
network on a slide of any size. `build_encoder`, `extract_features` and `read_bag` make and read patch features.

Names are imported when they are first used: importing `wholeslide` imports neither torch nor pandas.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wholeslide.baselines.bag import Bag
    from wholeslide.baselines.config import EncoderConfig
    from wholeslide.baselines.encoder import PatchEncoder, build_encoder
    from wholeslide.baselines.extraction import bag_of, extract_features
    from wholeslide.baselines.feature_files import read_bag
    from wholeslide.cohort.audit import audit
    from wholeslide.cohort.manifest import Cohort, cohort_from_files, read_cohort
    from wholeslide.cohort.splits import fold_cohort, split_cohort, write_split
    from wholeslide.compare.config import CompareConfig
    from wholeslide.compare.harness import compare as compare_methods
    from wholeslide.draws import Draws
    from wholeslide.errors import Problem, WholeslideError
    from wholeslide.geometry import Box, Mpp, Size
    from wholeslide.metrics import evaluate as score_predictions
    from wholeslide.model.config import ModelConfig
    from wholeslide.model.network import LocalNetwork, build_network
    from wholeslide.predict import PredictResult, evaluate_external, evaluate_run
    from wholeslide.predict import predict as predict_slides
    from wholeslide.slides.config import AugmentationConfig, SlideConfig
    from wholeslide.slides.inspect import inspect_slide, write_overlay
    from wholeslide.slides.opening import open_slide
    from wholeslide.slides.readers import SlideReader
    from wholeslide.slides.view import SlideView, make_view
    from wholeslide.slides.working import WorkingSlide, open_working_slide
    from wholeslide.streaming.config import StreamingConfig
    from wholeslide.streaming.engine import StreamingEngine
    from wholeslide.streaming.plan import Plan
    from wholeslide.streaming.planner import make_plan
    from wholeslide.streaming.step import StepResult
    from wholeslide.train.config import TrainConfig
    from wholeslide.train.loop import dry_run
    from wholeslide.train.loop import train as train_run
    from wholeslide.train.run import Run

__version__ = "0.1.0"

_HOMES = {
    "AugmentationConfig": "slides.config",
    "Bag": "baselines.bag",
    "Box": "geometry",
    "Cohort": "cohort.manifest",
    "CompareConfig": "compare.config",
    "Draws": "draws",
    "EncoderConfig": "baselines.config",
    "LocalNetwork": "model.network",
    "ModelConfig": "model.config",
    "Mpp": "geometry",
    "PatchEncoder": "baselines.encoder",
    "Plan": "streaming.plan",
    "PredictResult": "predict",
    "Problem": "errors",
    "Run": "train.run",
    "Size": "geometry",
    "SlideConfig": "slides.config",
    "SlideReader": "slides.readers",
    "SlideView": "slides.view",
    "StepResult": "streaming.step",
    "StreamingConfig": "streaming.config",
    "StreamingEngine": "streaming.engine",
    "TrainConfig": "train.config",
    "WholeslideError": "errors",
    "WorkingSlide": "slides.working",
    "audit": "cohort.audit",
    "bag_of": "baselines.extraction",
    "build_encoder": "baselines.encoder",
    "build_network": "model.network",
    "cohort_from_files": "cohort.manifest",
    "compare_methods": "compare.harness:compare",
    "dry_run": "train.loop",
    "evaluate_external": "predict",
    "evaluate_run": "predict",
    "extract_features": "baselines.extraction",
    "fold_cohort": "cohort.splits",
    "inspect_slide": "slides.inspect",
    "make_plan": "streaming.planner",
    "make_view": "slides.view",
    "open_slide": "slides.opening",
    "open_working_slide": "slides.working",
    "predict_slides": "predict:predict",
    "read_bag": "baselines.feature_files",
    "read_cohort": "cohort.manifest",
    "score_predictions": "metrics:evaluate",
    "split_cohort": "cohort.splits",
    "train_run": "train.loop:train",
    "write_overlay": "slides.inspect",
    "write_split": "cohort.splits",
}
"""Where each public name lives: ``module``, or ``module:name`` where a folder of ours has that name already."""

__all__ = [
    "AugmentationConfig",
    "Bag",
    "Box",
    "Cohort",
    "CompareConfig",
    "Draws",
    "EncoderConfig",
    "LocalNetwork",
    "ModelConfig",
    "Mpp",
    "PatchEncoder",
    "Plan",
    "PredictResult",
    "Problem",
    "Run",
    "Size",
    "SlideConfig",
    "SlideReader",
    "SlideView",
    "StepResult",
    "StreamingConfig",
    "StreamingEngine",
    "TrainConfig",
    "WholeslideError",
    "WorkingSlide",
    "__version__",
    "audit",
    "bag_of",
    "build_encoder",
    "build_network",
    "cohort_from_files",
    "compare_methods",
    "dry_run",
    "evaluate_external",
    "evaluate_run",
    "extract_features",
    "fold_cohort",
    "inspect_slide",
    "make_plan",
    "make_view",
    "open_slide",
    "open_working_slide",
    "predict_slides",
    "read_bag",
    "read_cohort",
    "score_predictions",
    "split_cohort",
    "train_run",
    "write_overlay",
    "write_split",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wholeslide' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"wholeslide.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
