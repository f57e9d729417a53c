"""Slides, one after another, from their files to folders of maps and pictures."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wholeslide.cohort.files import SlideFolder, is_feature_file, slide_stem
from wholeslide.errors import Problem, RunError, WholeslideError
from wholeslide.explain.maps import HeatMap, maps_of
from wholeslide.explain.output import Explanation, read_description, write_explanation
from wholeslide.predict.engine import device_of, open_run, plan_for, trained_engine
from wholeslide.predict.inputs import find_inputs
from wholeslide.slides.config import Decoders, SlideConfig
from wholeslide.slides.lock import alone_in
from wholeslide.slides.readers import slide_error, unreadable
from wholeslide.slides.working import WorkingSlide, open_working_slide
from wholeslide.streaming.recovery import SlideMemoryError, memory_for, take_smaller_plan
from wholeslide.train.learner import Learner, Source
from wholeslide.train.progress import memory_bytes, progress_bar, slide_note
from wholeslide.train.run import Run
from wholeslide.train.views import Entry, entries

EXPLANATIONS = "explanations"


@dataclass(frozen=True)
class Explained:
    """A slide's name, its folder, and what it was taken for; ``was_there``: nothing had to be done."""

    file: str
    folder: Path
    prediction: str
    was_there: bool = False


@dataclass(frozen=True)
class ExplainResult:
    """The slides that have a folder, and the problems of the others, both in the order of the inputs."""

    done: tuple[Explained, ...]
    errors: tuple[Problem, ...]


def explain(
    run_dir: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    slides: Path | None = None,
    mpp_override: float | None = None,
    decoders: Decoders | None = None,
    memory: str | None = None,
    resume: bool = False,
    on_error: Callable[[Problem], None] | None = None,
    quiet: bool = True,
) -> ExplainResult:
    """Write what the best checkpoint of a run looks at on slides, a folder a slide, as `wholeslide.explain.output` has it.

    Args:
        run_dir: The run.
        inputs: Slides, folders that are searched for slides, and manifests without need of labels; files of features where the
            run was trained on such.
        out: Folder of the slides' folders.
        slides: Folder of the slides that manifests name, left out: each manifest's own; of the slides that features were made of.
        mpp_override: Microns per stored pixel, for files whose scale is missing or wrong.
        decoders: Where files are decoded, as `SlideConfig` has it; left out: as in training.
        memory: Most memory to use, as ``"8GiB"``; left out: the run's own plan.
        resume: Keep what was made with this checkpoint; else a slide's folder that is there is an error.
        on_error: Is told of each problem of a slide as it is met; the others go on.
        quiet: No progress bar.

    Raises:
        RunError: no such run or checkpoint; folders of these slides are there; ``out`` cannot be written, or is being written.
        CohortError: a manifest that cannot be used; nothing to explain.
        ConfigError: ``mpp_override`` is no scale; nothing fits into ``memory``.
    """
    run = open_run(run_dir, decoders)
    slide_config = run.slide_config
    if mpp_override is not None:
        slide_config = replace(slide_config, mpp_override=mpp_override)
    found = find_inputs(inputs, slides=slides)
    asked, errors = entries(found.table), _Errors(on_error)
    for _, missing in found.missing:
        errors.note(missing)
    folders = [out / name for name in _folder_names(asked)]
    done = _explain(run, asked, folders, errors, slide_config, slides, memory=memory, resume=resume, quiet=quiet)
    return ExplainResult(done, tuple(errors.found))


def explain_cohort(
    run_dir: Path,
    files: Collection[str],
    *,
    slides: Path | None = None,
    pixels: Path | None = None,
    on_error: Callable[[Problem], None] | None = None,
    quiet: bool = True,
) -> ExplainResult:
    """Write what a run looks at on slides of its own cohort into the run, those that are there already aside.

    Args:
        run_dir: The run; its folder ``explanations`` gets a folder a slide.
        files: Which slides, as the cohort names them.
        slides: Folder of the run's slides; left out: where they were in training.
        pixels: Folder of the slides that features were made of, where the run was trained on such.
        on_error: Is told of each problem of a slide as it is met; the others go on.
        quiet: No progress bar.

    Raises:
        RunError: no such run or checkpoint; it cannot be written, or is being written.
        CohortError: the folder of the slides has none of the cohort's.
    """
    run = open_run(run_dir, None)
    cohort = entries(run.cohort(slides, keep_missing=True).table)
    places = zip(cohort, _folder_names(cohort), strict=True)  # a slide's folder is the same whichever others are asked
    wanted = [(entry, run_dir / EXPLANATIONS / name) for entry, name in places if entry.file in files]
    asked, folders = [entry for entry, _ in wanted], [folder for _, folder in wanted]
    errors = _Errors(on_error)
    done = _explain(run, asked, folders, errors, run.slide_config, pixels, memory=None, resume=True, quiet=quiet)
    return ExplainResult(done, tuple(errors.found))


def explanations_of(run_dir: Path) -> dict[str, Path]:
    """The folders that `explain_cohort` made with the run's best checkpoint, by the names of their slides.

    Raises:
        RunError: no such run or checkpoint.
    """
    checkpoint = Run.open(run_dir).checkpoints.pointer("best").sha256
    kept = run_dir / EXPLANATIONS
    folders = sorted(path for path in kept.iterdir() if path.is_dir()) if kept.is_dir() else []
    there = [(folder, read_description(folder)) for folder in folders]
    return {facts["file"]: folder for folder, facts in there if facts and facts["checkpoint"] == checkpoint}


class _Errors:
    """Problems of slides, told as they are met."""

    def __init__(self, told: Callable[[Problem], None] | None) -> None:
        self.found: list[Problem] = []
        self._told = told

    def note(self, error: WholeslideError) -> None:
        self.found.extend(error.problems)
        if self._told is not None:
            for problem in error.problems:
                self._told(problem)


def _explain(
    run: Run,
    asked: Sequence[Entry],
    folders: Sequence[Path],
    errors: _Errors,
    slide_config: SlideConfig,
    pixels: Path | None,
    *,
    memory: str | None,
    resume: bool,
    quiet: bool,
) -> tuple[Explained, ...]:
    if not folders:
        return ()
    checkpoint = run.checkpoints.pointer("best").sha256
    with alone_in(folders[0].parent):
        done = _kept(asked, folders, checkpoint, resume=resume)
        if any(one is None for one in done):
            device = device_of(run.config.accelerator)
            plan = plan_for(run, asked, slide_config, device, memory=memory)
            engine = trained_engine(run, plan, device, checkpoint=checkpoint)
            explainer = _Explainer(run, engine, slide_config, pixels, checkpoint)
            _explain_rest(explainer, asked, folders, done, errors.note, quiet=quiet)
    return tuple(one for one in done if one is not None)


def _explain_rest(
    explainer: _Explainer,
    asked: Sequence[Entry],
    folders: Sequence[Path],
    done: list[Explained | None],
    note: Callable[[WholeslideError], None],
    *,
    quiet: bool,
) -> None:
    """Fill in what is not done yet; problems of slides are passed on."""
    with progress_bar("explain", len(asked), completed=len(asked) - done.count(None), quiet=quiet) as progress:
        for position, (entry, folder) in enumerate(zip(asked, folders, strict=True)):
            if done[position] is not None:
                continue
            begun = time.perf_counter()
            try:
                done[position] = explainer.explain(entry, folder)
            except RunError:
                raise  # of the run or of the folder, not of this slide
            except WholeslideError as error:
                note(error)
            progress.advance(slide_note(time.perf_counter() - begun, explainer.used_bytes))


class _Explainer:
    """Explains slide after slide with one network.

    Args:
        run: the run.
        engine: of its best checkpoint.
        slide_config: how slides are read.
        slides: where the slides are that features were made of.
        checkpoint: the hash of the weights.
    """

    def __init__(
        self, run: Run, engine: Learner[Any], slide_config: SlideConfig, slides: Path | None, checkpoint: str
    ) -> None:
        # Slides that were prepared have no level 0: what is explained is read from the slides themselves.
        scanned = replace(run, config=replace(run.config, cache=None))
        self._source: Source[Any] = scanned.source_of_others(engine.network, slide_config)
        self._classes, self._checkpoint = tuple(run.classes), checkpoint
        self._engine, self._slide_config = engine, slide_config
        self._slides = None if slides is None else SlideFolder(slides)

    @property
    def used_bytes(self) -> int:
        """Memory in use."""
        return memory_bytes(self._engine.device)

    def explain(self, entry: Entry, folder: Path) -> Explained:
        """Write a slide's folder.

        Raises:
            SlideError: it cannot be read, or is too large for the smallest tiles.
            FeatureError: features that are of another width, or do not say where their patches lie.
            RunError: the folder cannot be written.
        """
        try:
            with closing(self._slide(entry)) as slide:
                explanation = self._explanation(entry)
                write_explanation(explanation, slide, folder)
        except OSError as error:
            raise unreadable(entry.path, error) from error
        return Explained(entry.file, folder, explanation.prediction)

    def _explanation(self, entry: Entry) -> Explanation:
        maps: list[HeatMap] = []
        rows: list[np.ndarray] = []
        with memory_for(entry.file), closing(self._source.open(entry)) as view:
            while True:
                try:
                    with memory_for(entry.file):
                        for heat in self._engine.explain(view):
                            rows.append(heat.probabilities_c)
                            maps += maps_of(heat, view, self._classes)
                    break
                except SlideMemoryError as error:
                    reason = error.reason
                maps.clear()
                rows.clear()
                take_smaller_plan(self._engine, entry.file, reason)
        if not np.isfinite(rows).all():
            remedy = "the weights have diverged: train again with a smaller --lr"
            raise slide_error("the network's answer is not a number", entry.path, remedy)
        return Explanation(entry.file, self._classes, np.stack(rows), tuple(maps), self._checkpoint)

    def _slide(self, entry: Entry) -> WorkingSlide:
        """The slide itself, whose pixels are shown."""
        path = entry.path
        if is_feature_file(path):
            found = () if self._slides is None else self._slides.find(slide_stem(path.name))
            if len(found) != 1:
                what = (
                    "no slide is found for these features"
                    if not found
                    else "several slides are found for these features"
                )
                remedy = "give the folder with the one slide that they were made of with --slides"
                raise slide_error(what, path, remedy)
            path = found[0]
        return open_working_slide(path, self._slide_config, mpp=entry.mpp)


def _kept(asked: Sequence[Entry], folders: Sequence[Path], checkpoint: str, *, resume: bool) -> list[Explained | None]:
    """Of each slide, what is there and stays.

    Raises:
        RunError: folders are there, and nothing is resumed.
    """
    kept: list[Explained | None] = []
    for entry, folder in zip(asked, folders, strict=True):
        there = read_description(folder) if resume else None
        same = there is not None and (there["file"], there["checkpoint"]) == (entry.file, checkpoint)
        kept.append(Explained(entry.file, folder, there["prediction"], was_there=True) if there and same else None)
    remedy = "give --resume to keep what this checkpoint has made and to replace the rest, or another --out"
    taken = [Problem("an explanation is there already", str(folder), remedy) for folder in folders if folder.exists()]
    if taken and not resume:
        raise RunError(taken)
    return kept


def _folder_names(asked: Sequence[Entry]) -> list[str]:
    """A name a slide, of letters that every file system takes; where two are alike, the later ones are numbered."""
    plain = [re.sub(r"[^\w.-]+", "_", slide_stem(Path(entry.file).name)).strip(".") or "slide" for entry in asked]
    seen: Counter[str] = Counter()
    names = []
    for name in plain:
        seen[name.casefold()] += 1
        names.append(name if seen[name.casefold()] == 1 else f"{name}-{seen[name.casefold()]}")
    return names
