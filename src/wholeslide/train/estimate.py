"""What a run will take: time, memory and disk, as lines to print."""

from __future__ import annotations

from torch import nn

from wholeslide.cohort.config import SPLITS
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.planner import memory_limit, process_bytes
from wholeslide.train.config import TrainConfig
from wholeslide.train.fitting import candidate_lines
from wholeslide.train.setup import Prepared, prefetch_limit
from wholeslide.train.survey import augmented_megapixels, megapixels
from wholeslide.train.tables import amount, clock, plan_lines


def describe(prepared: Prepared) -> list[str]:
    """The cohort, the plan, and the estimates."""
    lines = cohort_lines(prepared)
    if prepared.plan is None:
        return [*lines, *patch_lines(prepared)]
    if prepared.candidates:
        lines += candidate_lines(prepared.candidates, prepared.config.depth, prepared.plan.largest)
    return [*lines, *field_lines(prepared), *plan_lines(prepared.plan), *estimate_lines(prepared, prepared.plan)]


def cohort_lines(prepared: Prepared) -> list[str]:
    """Slides, classes and splits."""
    table, classes = prepared.cohort.table, prepared.cohort.classes
    lines = [f"{len(table)} files of {table['slide'].nunique()} slides of {table['patient'].nunique()} patients"]
    for split in SPLITS:
        rows = prepared.cohort.split(split)
        counts = ", ".join(f"{name} {int((rows['label'] == name).sum())}" for name in classes)
        lines.append(f"  {split}: {len(rows)} files ({counts})")
    if len(prepared.excluded):
        lines.append(f"  left out, unreadable: {', '.join(prepared.excluded['file'])}")
    if prepared.bags:
        patches = [bag.patches for bag in prepared.bags.values()]
        lines.append(f"{min(patches)} to {max(patches)} patches a slide, of {prepared.feature_width} features each")
        return lines
    sizes = sorted((fact.size for fact in prepared.facts.values()), key=lambda size: size.area)
    tissue = sum(fact.tissue_fraction for fact in prepared.facts.values()) / len(prepared.facts)
    lines.append(f"working sizes {sizes[0]} to {sizes[-1]} px, {tissue:.0%} of it tissue on average")
    return lines


def field_lines(prepared: Prepared) -> list[str]:
    """How far apart a slide's parts may lie for the stages' classifiers to relate them."""
    network = prepared.network
    assert isinstance(network, LocalNetwork)
    fields = [str(network.classifier_reach(stage).x.field) for stage in range(1, network.depth + 1)]
    return [f"receptive field of the stages' classifiers: {', '.join(fields)} px"]


def patch_lines(prepared: Prepared) -> list[str]:
    """What a method of patches takes."""
    config, network = prepared.config, prepared.network
    disk = 3 * checkpoint_bytes(network)
    lines = [f"disk: at most about {amount(disk)} for checkpoints in {config.out}"]
    if config.memory is not None:
        lines.append(f"memory: --memory {config.memory} plans stages, and bounds nothing with --method {config.method}")
    if prepared.facts:
        tissue = sum(fact.size.area * fact.tissue_fraction for fact in prepared.facts.values())
        patches = max(len(prepared.facts), round(tissue / config.patch**2))
        lines.insert(0, f"about {patches} patches of {config.patch} px, in {config.precision}")
    return lines


def estimate_lines(prepared: Prepared, plan: Plan) -> list[str]:
    """Time, memory and disk."""
    config, network = prepared.config, prepared.network
    assert isinstance(network, LocalNetwork)
    train, valid = prepared.facts_of_split("train"), prepared.facts_of_split("valid")
    train_seconds = augmented_megapixels(train, config.augmentation_config()) * plan.seconds_per_megapixel
    valid_seconds = megapixels(valid) * plan.inference_seconds_per_megapixel
    epochs = total_epochs(config)
    epoch_seconds = train_seconds + valid_seconds
    largest_bytes = max(3 * fact.size.area for fact in prepared.facts.values())
    ahead = 2 * largest_bytes if largest_bytes <= prefetch_limit(config, prepared.device) else 0
    held = process_bytes(network, prepared.device, training=True)
    disk = 3 * checkpoint_bytes(network)
    return [
        f"time: about {train_seconds / max(1, len(train)):.1f} s a slide, {clock(epoch_seconds)} an epoch, "
        f"{clock(epochs * epoch_seconds)} for {epochs} epochs, reading of slides not counted",
        f"memory: about {amount(held + plan.predicted_peak_bytes + ahead)} at most, of {_limit(prepared)}: "
        f"{amount(held)} for the program, the weights and the optimiser, {amount(plan.predicted_peak_bytes)} for a step, "
        f"{amount(ahead)} for reading ahead",
        f"disk: at most about {amount(disk)} for checkpoints in {config.out}; {amount(plan.disk_bytes)} of features are written "
        "for the largest slide",
    ]


def _limit(prepared: Prepared) -> str:
    config, device = prepared.config, prepared.device
    limit = amount(memory_limit(config.streaming_config(), device))
    if config.memory not in (None, "smallest"):
        return f"the {limit} of --memory"
    return f"{limit} that {'the GPU has free' if device.type == 'cuda' else 'this machine has'}"


def total_epochs(config: TrainConfig) -> int:
    """Epochs of a run that does not stop early."""
    return sum(config.recipe(stage).epochs for stage in range(1, config.depth + 1 if config.in_turn else 2))


def checkpoint_bytes(network: nn.Module) -> int:
    """One checkpoint: the weights, and two moments for what is trained."""
    weights = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    return int(weights + 2 * trained)
