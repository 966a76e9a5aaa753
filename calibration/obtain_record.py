"""The calibration record of an export: read where it exists and fits, else made and written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

import msgspec
import torch

from gwp_edge.calibration.collect import (
    CollectOptions,
    SampleSet,
    collect,
    load_set,
    quantizable_layers,
)
from gwp_edge.calibration.forward import Network, Progress
from gwp_edge.calibration.provenance import require_recorded
from gwp_edge.calibration.quantize_options import QuantizeOptions
from gwp_edge.calibration.record import CalibrationRecord, load_record, save_record
from gwp_edge.errors import SpecError
from gwp_edge.lerobot.dataset import LeRobotDataset
from gwp_edge.types import Float32Array

# Of the autoencoder both ends are read: another one has other values there.
_VAE_TENSORS = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight")


def fingerprint(network: Network) -> str:
    """Return a hash of all that ranges follow from: weights, statistics and canvas.

    Every weight of the layers counts: a merged adapter leaves biases and shapes as they were.
    Prompts do not: the bundle may hold others than those that calibration saw.
    """
    spec = network.spec
    sizes = msgspec.to_builtins(msgspec.structs.replace(spec.network, n_text_rows=1))
    parts = [sizes, msgspec.to_builtins(spec.statistics), msgspec.to_builtins(spec.canvas)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())

    def add(tensor: torch.Tensor) -> None:
        digest.update(str(tensor.dtype).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    for layer in quantizable_layers(network):
        add(network.weights.load(f"{layer}.weight"))
        add(network.weights.load(f"{layer}.bias"))
    if network.vae is not None:
        for name in _VAE_TENSORS:
            add(network.vae_weights.load(name))
    return digest.hexdigest()


def obtain_record(
    network: Network,
    dataset: LeRobotDataset | None,
    options: QuantizeOptions,
    known_prompts: Mapping[str, Float32Array],
    notes: list[str],
    progress: Progress | None,
) -> CalibrationRecord | None:
    """Return the record that there is, or the one of a new calibration; None without a dataset.

    Raises:
        SpecError: the record or the dataset does not fit.
    """
    if options.record is not None and options.record.exists():
        record = load_record(options.record)
        _check_record(network, record, options)
        if record.is_synthetic and not options.allow_synthetic:
            raise SpecError(
                f"{options.record}: was made on synthetic data; calibrate on recorded episodes, or "
                "pass --allow-synthetic and never run the bundle on a robot"
            )
    elif dataset is None:
        return None
    else:
        verdict = require_recorded(dataset, allow_synthetic=options.allow_synthetic)
        samples = load_set(
            network,
            dataset,
            options.collect,
            held_out=False,
            known_prompts=known_prompts,
            progress=progress,
        )
        record = collect(
            network,
            samples,
            options.collect,
            is_synthetic=verdict.is_synthetic,
            provenance={
                "dataset": dataset.name,
                "dataset_sha256": dataset.fingerprint(),
                "network": fingerprint(network),
                "smoothing": options.collect.smoothing,
            },
            progress=progress,
        )
        if options.record is not None:
            save_record(options.record, record)
    if record.is_synthetic:
        notes.append("calibrated on SYNTHETIC data: never run this bundle on a robot")
    return record


def as_recorded(collect: CollectOptions, record: CalibrationRecord) -> CollectOptions:
    """Return ``collect`` with the record's seed, from which its split of the dataset follows."""
    return replace(collect, seed=int(record.provenance["seed"]))


def check_unseen(held_out: SampleSet, record: CalibrationRecord | None) -> None:
    """Refuse samples that calibration has seen.

    Raises:
        SpecError: names the first.
    """
    seen = {ref.sha256 for ref in record.samples} if record is not None else set()
    known = [ref for ref in held_out.refs if ref.sha256 in seen]
    if known:
        raise SpecError(
            f"{known[0].dataset}: episode {known[0].episode}, frame {known[0].frame} was seen by "
            "calibration and cannot measure it; pass the dataset that the record was made from, "
            "or calibrate again"
        )


def _check_record(network: Network, record: CalibrationRecord, options: QuantizeOptions) -> None:
    given, path = record.provenance, options.record
    if given.get("network") != fingerprint(network):
        raise SpecError(
            f"{path}: was made from other weights, statistics or cameras; calibrate again"
        )
    made_with = {
        "samples": len(record.samples),
        "seed": given.get("seed"),
        "smoothing": given.get("smoothing"),
    }
    asked = {
        "samples": options.collect.n_samples,
        "seed": options.collect.seed,
        "smoothing": options.collect.smoothing,
    }
    for name in sorted(options.fixed):
        if made_with[name] != asked[name]:
            raise SpecError(
                f"{path}: was made with --{name} {made_with[name]}, not {asked[name]}; leave the "
                "flag out, or calibrate again"
            )
    if list(given.get("timesteps", ())) != list(network.spec.sampler.timesteps):
        raise SpecError(
            f"{path}: was made for {given.get('n_steps')} denoising steps of another schedule; "
            "calibrate again, or export with the same --steps"
        )
