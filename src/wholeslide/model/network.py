"""The network that is trained: a frozen stem, K gradient-isolated stages, their classifiers and their decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wholeslide.geometry import Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.heads import AttentionClassifier, auxiliary_classifier, final_classifier
from wholeslide.model.locality import Locality, Sampling, compose
from wholeslide.model.reconstruction import FeatureReconstruction
from wholeslide.model.staged import StagedNetwork
from wholeslide.model.stages import Stage, cut_into_stages
from wholeslide.model.tracing import trace
from wholeslide.model.weights import LITE0, create_backbone, load_weights

#: logits (classes,) and the label's index to a scalar.
ClassificationLoss = Callable[[Tensor, int], Tensor]
#: a reconstruction and its target, both (C, h, w), to the mean over their cells.
ReconstructionLoss = Callable[[Tensor, Tensor], Tensor]


class CrossEntropy(nn.Module):
    """Cross entropy of one slide, times its class's weight (equation 1 of the paper has all weights at one)."""

    def __init__(self, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights)

    def forward(self, logits: Tensor, label: int) -> Tensor:
        loss = F.cross_entropy(logits[None], torch.tensor([label], device=logits.device))
        weights = self.class_weights
        return loss if weights is None else loss * weights[label]  # type: ignore[index]


class LocalNetwork(StagedNetwork):
    """F_1 … F_K of the paper, with A_1 … A_{K−1}, H, and R_1 … R_{K−1}. ``stages[0]`` is F_1.

    Args:
        stem: the frozen layers before the first stage.
        stages: the K stages.
        heads: a classifier for each stage; the last one is the final classifier.
        decoders: a decoder for each stage but the last, or none to train without reconstruction.
        pixel_mean: mean of the training tissue's pixels in [0, 1], for red, green and blue.
        pixel_std: their standard deviation.
        config: what the user chose.
        classification_loss: replaces cross entropy.
        reconstruction_loss: replaces the mean absolute difference.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        stem: Stage,
        stages: Sequence[Stage],
        heads: Sequence[AttentionClassifier],
        decoders: Sequence[FeatureReconstruction],
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        config: ModelConfig,
        classification_loss: ClassificationLoss | None = None,
        reconstruction_loss: ReconstructionLoss | None = None,
    ) -> None:
        super().__init__()
        assert len(heads) == len(stages)
        assert len(decoders) in (0, len(stages) - 1)
        self.config = config
        self.stem = stem.requires_grad_(False)
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        self.decoders = nn.ModuleList(decoders)
        self.classification_loss = classification_loss or CrossEntropy()
        self.reconstruction_loss = reconstruction_loss or nn.L1Loss()
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean), dtype=torch.float32))
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std), dtype=torch.float32))
        if config.frozen:
            self.stages.requires_grad_(False)
        if config.freeze_norm_affine:
            for module in self.stages.modules():
                if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                    module.requires_grad_(False)

    @property
    def depth(self) -> int:
        """The number K of stages."""
        return len(self.stages)

    def stage(self, number: int) -> Stage:
        """F_k, counted from 1."""
        stage = self.stages[number - 1]
        assert isinstance(stage, Stage)
        return stage

    def head(self, number: int) -> AttentionClassifier:
        """A_k, and H for the last stage, counted from 1."""
        head = self.heads[number - 1]
        assert isinstance(head, AttentionClassifier)
        return head

    def decoder(self, number: int) -> FeatureReconstruction | None:
        """R_k, counted from 1; ``None`` for the last stage and where there is no reconstruction."""
        if number > len(self.decoders):
            return None
        decoder = self.decoders[number - 1]
        assert isinstance(decoder, FeatureReconstruction)
        return decoder

    def reconstructs(self, stage: int) -> bool:
        """Whether the stage, counted from 1, is trained to reconstruct its input too."""
        return self.decoder(stage) is not None

    def backbone_parameters(self, stage: int | None = None) -> list[nn.Parameter]:
        """What the loss of ``stage`` (counted from 1), or of any stage, trains in the backbone."""
        numbers = range(1, self.depth + 1) if stage is None else [stage]
        return [p for number in numbers for p in self.stage(number).parameters() if p.requires_grad]

    def head_parameters(self, stage: int | None = None) -> list[nn.Parameter]:
        """The parameters that start at random: those of the stage's classifier and decoder."""
        numbers = range(1, self.depth + 1) if stage is None else [stage]
        modules = [
            module for number in numbers for module in (self.head(number), self.decoder(number)) if module is not None
        ]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def normalise_by(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        self.pixel_mean.copy_(torch.tensor(list(pixel_mean)))
        self.pixel_std.copy_(torch.tensor(list(pixel_std)))

    def to_input(self, pixels_hwc: np.ndarray) -> Tensor:
        """Pixels, (h, w, 3), normalised by the training tissue: (1, 3, h, w), channels last in memory.

        Args:
            pixels_hwc: uint8, or floating-point numbers in [0, 1].
        """
        pixels = torch.from_numpy(np.ascontiguousarray(pixels_hwc)).to(self.pixel_mean.device)
        white = 255 if pixels.dtype == torch.uint8 else 1
        return pixels.sub(white * self.pixel_mean).div_(white * self.pixel_std)[None].permute(0, 3, 1, 2)

    def reach(self, number: int) -> Locality:
        """Which pixels a cell of x_k depends on; ``number`` 0 is the stem's output."""
        return compose([self.stem.locality, *(self.stage(k).locality for k in range(1, number + 1))])

    def classifier_reach(self, number: int) -> Locality:
        """Which pixels a cell of the grid of stage ``number``'s classifier depends on.

        All that follows on the grid takes its cells as a set: what lies farther apart than this is related by nothing.
        """
        kernel = self.head(number).kernel
        return self.reach(number).then(Sampling(kernel, kernel), Sampling(kernel, kernel))

    def feature_size(self, view_size: Size, number: int) -> Size:
        """Cells of x_k for a view of this many pixels; ``number`` 0 is the stem's output."""
        size = self.stem.locality.output_size(view_size)
        for stage in list(self.stages)[:number]:
            assert isinstance(stage, Stage)
            size = stage.locality.output_size(size)
        return size

    def padded_size(self, size: Size) -> Size:
        """The size to which a view is padded with background, never cropped.

        Every grid needs two cells, or its norm is undefined. EfficientNet-Lite0 wants sides ≡ 1 modulo 32, where its
        symmetric padding equals the one it was trained with.
        """
        while not self._grids_suffice(size):
            size = self._grown(size)
        if self.config.backbone.partition(".")[0] == LITE0:
            size = Size(size.width + (1 - size.width) % 32, size.height + (1 - size.height) % 32)
        return size

    def _grown(self, size: Size) -> Size:
        """A pixel more on the axis that gives no cell at all, else on the longer one."""
        cells = self.feature_size(size, self.depth)
        wider = cells.width == 0 or (cells.height > 0 and size.width >= size.height)
        return Size(size.width + wider, size.height + (not wider))

    def _grids_suffice(self, size: Size) -> bool:
        for number in range(1, self.depth + 1):
            cells, head = self.feature_size(size, number), self.head(number)
            if head.grid_length(cells.width) * head.grid_length(cells.height) < 2:
                return False
        return True


def build_network(
    config: ModelConfig,
    *,
    classes: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    seed: int,
    class_weights: Sequence[float] | None = None,
    pretrained: bool = True,
) -> LocalNetwork:
    """A network ready to train.

    Args:
        config: what the user chose.
        classes: number of classes, two or more.
        pixel_mean: mean of the training tissue in [0, 1], three numbers.
        pixel_std: its standard deviation, three numbers.
        seed: decides every random initial weight; the global generator is left as it was.
        class_weights: a factor on the loss of each class.
        pretrained: ``False`` builds the structure only, for a checkpoint that follows.

    Raises:
        ModelError: unknown or non-local backbone, weights that are not found or do not fit, more stages than blocks.
    """
    name = config.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = create_backbone(name)
        set_first_stride(backbone, first_stride_of(config))
        stem, stages = cut_into_stages(trace(backbone, name), config.stages, name=name)
        load_weights(backbone, name, config.weights if pretrained else "random")
        heads = [
            auxiliary_classifier(s.out_channels, s.stride, classes=classes, dropout=config.attention_dropout)
            for s in stages[:-1]
        ]
        heads.append(final_classifier(stages[-1].out_channels, classes=classes, dropout=config.attention_dropout))
        decoders = [
            FeatureReconstruction(s.out_channels, s.in_channels, stride=s.locality.stride)
            for s in (stages[:-1] if config.reconstruction else [])
        ]
    return LocalNetwork(
        stem,
        stages,
        heads,
        decoders,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        config=config,
        classification_loss=CrossEntropy(class_weights),
    )


def first_stride_of(config: ModelConfig) -> int | None:
    """The stride that the first convolution is given: the user's, else 3 for ResNets, else ``None`` for its own."""
    if config.first_stride is not None:
        return config.first_stride
    return 3 if config.backbone.startswith("resnet") else None


def set_first_stride(backbone: nn.Module, stride: int | None) -> None:
    """Give the first convolution this stride; leave it as it is where there is none."""
    if stride is None:
        return
    first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    first.stride = (stride, stride)
