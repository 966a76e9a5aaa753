"""Which tensors of a file are the network, whatever trainers wrapped around their names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gwp_edge.errors import SpecError

# Put in front of a name by trainers, wrappers and containers; stripped in any combination.
_WRAPPERS = frozenset(
    [
        "model",
        "module",
        "state_dict",
        "model_state_dict",
        "transformer",
        "net",
        "network",
        "params",
        "weights",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_forward_module",
    ]
)
_EMA = frozenset(
    [
        "ema",
        "ema_model",
        "model_ema",
        "ema_state_dict",
        "ema_params",
        "ema_weights",
        "ema_transformer",
        "transformer_ema",
        "module_ema",
    ]
)
# torch.compile, FSDP and activation checkpointing also wrap inner modules.
_INNER = frozenset(
    ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"]
)
_TRAINING = frozenset(
    [
        "optimizer",
        "optimizers",
        "optimizer_state_dict",
        "optimizer_states",
        "lr_scheduler",
        "lr_schedulers",
        "scheduler",
        "scheduler_state_dict",
        "grad_scaler",
        "scaler",
        "rng_state",
        "rng_states",
        "random_rng_state",
        "random_states",
        "sampler",
        "data_sampler",
        "random_ltd",
        "n_averaged",
        "decay",
        "step",
        "global_step",
        "epoch",
    ]
)
_OTHER_MODULES = frozenset(
    ["vae", "text_encoder", "image_encoder", "text_encoder_2", "teacher", "loss"]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The network's tensors in a container.

    Attributes:
        originals: name in the container by name without prefixes.
        dropped: reason by name in the container, for every tensor that is not taken.
        is_ema: the moving average was taken.
    """

    originals: dict[str, str]
    dropped: dict[str, str]
    is_ema: bool


def select_names(names: Iterable[str], *, use_ema: bool) -> Selection:
    """Strip prefixes, and choose between plain weights and their moving average.

    Raises:
        SpecError: two tensors have the same name once stripped, or ``use_ema`` finds no average.
    """
    plain: list[tuple[str, str]] = []
    ema: list[tuple[str, str]] = []
    dropped: dict[str, str] = {}
    for original in names:
        clean, is_ema = _strip(original)
        root = clean.partition(".")[0]
        if root in _TRAINING:
            dropped[original] = "training state"
        elif root in _OTHER_MODULES:
            dropped[original] = f"belongs to another module, {root}"
        elif root == "rope":
            dropped[original] = "position table, computed here"
        else:
            (ema if is_ema else plain).append((clean, original))
    if use_ema and not ema:
        raise SpecError("an EMA copy was asked for, but the checkpoint has none")
    take_ema = use_ema or not plain
    chosen, rest = (ema, plain) if take_ema else (plain, ema)
    reason = "the EMA copy is used" if take_ema else "an EMA copy; the plain weights are used"
    dropped.update((original, reason) for _, original in rest)
    originals: dict[str, str] = {}
    twice = []
    for clean, original in chosen:
        if clean in originals:
            twice.append(f"{originals[clean]} and {original}")
        originals.setdefault(clean, original)
    if twice:
        raise SpecError(
            f"{len(twice)} tensors are there twice once prefixes are removed, first: {twice[0]}; "
            "save one copy of the network alone"
        )
    return Selection(originals=originals, dropped=dropped, is_ema=take_ema and bool(ema))


def _strip(name: str) -> tuple[str, bool]:
    parts = name.split(".")
    is_ema = False
    start = 0
    while start < len(parts) - 1 and (parts[start] in _WRAPPERS or parts[start] in _EMA):
        is_ema |= parts[start] in _EMA
        start += 1
    return ".".join(p for p in parts[start:] if p not in _INNER), is_ema
