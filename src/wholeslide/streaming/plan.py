"""How a network is streamed: fixed before the first step, stored with the run, so that a resumed run repeats it bit by bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from wholeslide.errors import RunError
from wholeslide.geometry import Size
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.needs import StageNeeds, TileChoice


@dataclass(frozen=True)
class Plan:
    """Everything that decides a step's arithmetic and memory.

    ``tile_px`` has the side of a tile in input pixels, and ``kept_px`` how many pixels the windows may have together whose graphs
    are kept between the two passes, both for the stem and for each stage (the stem has no graph). ``elide`` says that background
    is computed once and not wherever it is. ``predicted_peak_bytes`` is what a step on ``largest`` is expected to hold above what
    the process held before it; another view of no larger area may take more, but never more than the memory that was named.
    ``needs`` are what the plan was made from.
    """

    execution: Execution
    store: Literal["device", "host", "disk"]
    tile_px: tuple[int, ...]
    kept_px: tuple[int, ...]
    largest: Size
    elide: bool = True
    predicted_peak_bytes: int = 0
    seconds_per_megapixel: float = 0.0
    inference_seconds_per_megapixel: float = 0.0
    needs: tuple[StageNeeds, ...] = ()

    @classmethod
    def of(
        cls,
        needs: Sequence[StageNeeds],
        choices: Sequence[TileChoice],
        *,
        execution: Execution,
        store: Literal["device", "host", "disk"],
        elide: bool = True,
    ) -> Plan:
        """A plan of these tiles, and what they are expected to cost."""
        largest = needs[0].view
        pairs = list(zip(needs, choices, strict=True))
        seconds = sum(stage.training_seconds(choice) for stage, choice in pairs)
        inference_seconds = sum(stage.inference_seconds(choice) for stage, choice in pairs)
        return cls(
            execution=execution,
            store=store,
            tile_px=tuple(choice.side_px for choice in choices),
            kept_px=tuple(choice.kept_px for choice in choices),
            largest=largest,
            elide=elide,
            predicted_peak_bytes=max(stage.peak_bytes(choice) for stage, choice in pairs),
            seconds_per_megapixel=seconds / (largest.area / 1e6),
            inference_seconds_per_megapixel=inference_seconds / (largest.area / 1e6),
            needs=tuple(needs),
        )

    @property
    def choices(self) -> list[TileChoice]:
        """The tiles of the stem and of each stage."""
        return [TileChoice(side, kept) for side, kept in zip(self.tile_px, self.kept_px, strict=True)]

    def tile_bytes(self, number: int) -> int:
        """What a tile of stage ``number``, or of the stem (0), may take where it finds nothing freed that fits."""
        return self.needs[number].tile_bytes(self.choices[number]) if self.needs else 0

    def decoder_bytes(self, number: int) -> int:
        """What the reconstruction of stage ``number`` may take."""
        return self.needs[number].decoder_bytes if self.needs else 0

    @property
    def disk_bytes(self) -> int:
        """Of features, written for the largest view."""
        return sum(stage.features_bytes for stage in self.needs) if self.store == "disk" else 0

    @property
    def smaller(self) -> Plan | None:
        """The same arithmetic in less memory: no graph kept, and tiles halved until the predicted peak is lower.

        As long as there are any, tiles that are not nearly all halo. Nothing where these tiles are the smallest.
        """
        choices, found = self.choices, None
        while (fewer := self._halved(choices)) != choices:
            choices = fewer
            found = Plan.of(
                self.needs,
                choices,
                execution=self.execution,
                store=self.store,
                elide=self.elide,
            )
            if found.predicted_peak_bytes < self.predicted_peak_bytes:
                break
        return found

    def _halved(self, choices: list[TileChoice]) -> list[TileChoice]:
        pairs = list(zip(self.needs, choices, strict=True)) if self.needs else []
        halved = [stage.halved(choice, economical=True) for stage, choice in pairs]
        if halved == choices:
            halved = [stage.halved(choice, economical=False) for stage, choice in pairs]
        return halved or choices

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_dict`.

        Raises:
            RunError: the values are not those of a plan.
        """
        try:
            return cls(
                **{
                    **values,
                    "execution": Execution(**values["execution"]),
                    "tile_px": tuple(values["tile_px"]),
                    "kept_px": tuple(values["kept_px"]),
                    "largest": Size(**values["largest"]),
                    "needs": tuple(StageNeeds.from_dict(stage) for stage in values.get("needs", ())),
                }
            )
        except (KeyError, TypeError) as error:
            raise RunError.single(
                "not a plan",
                where="plan.json",
                remedy="start a new run; the file was damaged or written by another version",
            ) from error
