"""Every tensor of a network: what must be there, what the action path does not need, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gwp_edge.errors import SpecError
from gwp_edge.export.sizes import NetworkSizes

if TYPE_CHECKING:
    from gwp_edge.export.checkpoint import Checkpoint

Shape = tuple[int, ...]

_PATCH_ELEMENTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """What becomes of every tensor of a checkpoint.

    Attributes:
        used: names that the action path reads, in the order of :func:`expected_tensors`.
        unused: reason by name, for tensors of the network that action-only inference leaves out.
        dropped: reason by name in the file, for tensors that are no part of the network.
    """

    used: tuple[str, ...]
    unused: dict[str, str]
    dropped: dict[str, str]


def expected_tensors(sizes: NetworkSizes) -> dict[str, Shape]:
    """Return the shape of every tensor of a network of these sizes, by name."""
    s = sizes
    D, E, A = s.visual_dim, s.action_dim, s.n_action_channels
    shapes: dict[str, Shape] = {
        "patch_embedding.weight": (D, s.latent_channels, 1, 2, 2),
        "patch_embedding.bias": (D,),
        "scale_shift_table": (1, 2, D),
        **_linear("proj_out", _PATCH_ELEMENTS * s.latent_channels, D),
        **_condition("condition_embedder", D, s),
        **_encoder("action_encoder", A, E, s),
        **_linear("action_decoder.in_proj", s.decoder_dims[0], E),
        **_linear("action_decoder.mid_proj", s.decoder_dims[1], s.decoder_dims[0]),
        "action_decoder.out_proj.weight": (s.n_embodiments, s.decoder_dims[1], A),
        "action_decoder.out_proj.bias": (s.n_embodiments, A),
    }
    if s.family == "gwp-0.5":
        shapes["action_scale_shift_table"] = (1, 2, E)
        shapes |= _condition("action_condition_embedder", E, s)
        shapes |= _encoder("state_encoder", A, E, s)
    for i in range(s.n_layers):
        if s.family == "gwp-0.5":
            shapes |= _block(f"blocks.{i}.visual_expert", D, D, s.visual_ffn_dim)
            shapes |= _block(f"blocks.{i}.action_expert", E, D, s.action_ffn_dim)
        else:
            shapes |= _block(f"blocks.{i}", D, D, s.visual_ffn_dim)
    return shapes


def unused_tensors(sizes: NetworkSizes) -> dict[str, str]:
    """Return the reason by name for every tensor that action-only inference leaves out."""
    head = "the visual output head predicts video, which actions never see"
    unused = {"proj_out.weight": head, "proj_out.bias": head}
    if sizes.family == "gwp-0":
        return unused  # one set of weights for all tokens, so actions need the rest
    unused["scale_shift_table"] = head
    last = f"blocks.{sizes.n_layers - 1}.visual_expert."
    why = "in the last block actions read only k and v of the visual tokens"
    for name in expected_tensors(sizes):
        tail = name.removeprefix(last)
        if tail != name and not tail.startswith(
            ("attn1.to_k.", "attn1.to_v.", "attn1.norm_k.", "scale_shift_table")
        ):
            unused[name] = why
        elif sizes.n_layers == 1 and name.startswith("condition_embedder.text_embedder."):
            unused[name] = "no visual token reads text in a network of one block"
    return unused


def account(checkpoint: Checkpoint, sizes: NetworkSizes) -> Accounting:
    """Match a checkpoint's tensors with what a network of these sizes has.

    Raises:
        SpecError: tensors are missing, unexpected or wrongly shaped; the message lists them all,
            one a line, after a line with the totals.
    """
    expected = expected_tensors(sizes)
    missing = [n for n in expected if n not in checkpoint]
    unexpected = [n for n in checkpoint.names() if n not in expected]
    misshapen = [n for n in expected if n in checkpoint and checkpoint.info(n).shape != expected[n]]
    if missing or unexpected or misshapen:
        lines = [
            f"{checkpoint.path}: does not fit a {sizes.family} network: {len(missing)} tensors "
            f"missing, {len(unexpected)} unexpected, {len(misshapen)} wrongly shaped"
        ]
        lines += [f"missing {n}: expected {expected[n]}, found nothing" for n in missing]
        lines += [
            f"unexpected {n}: expected nothing, found {checkpoint.info(n).shape}"
            for n in unexpected
        ]
        lines += [
            f"wrong shape {n}: expected {expected[n]}, found {checkpoint.info(n).shape}"
            for n in misshapen
        ]
        raise SpecError("\n".join(lines))
    unused = unused_tensors(sizes)
    return Accounting(
        used=tuple(n for n in expected if n not in unused),
        unused=unused,
        dropped=dict(checkpoint.dropped),
    )


def _linear(name: str, n_out: int, n_in: int) -> dict[str, Shape]:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def _encoder(name: str, n_in: int, n_out: int, s: NetworkSizes) -> dict[str, Shape]:
    first, second = s.encoder_dims
    return {
        f"{name}.in_proj.weight": (s.n_embodiments, n_in, first),
        f"{name}.in_proj.bias": (s.n_embodiments, first),
        **_linear(f"{name}.mid_proj", second, first),
        **_linear(f"{name}.out_proj", n_out, second),
    }


def _condition(name: str, width: int, s: NetworkSizes) -> dict[str, Shape]:
    return {
        **_linear(f"{name}.time_embedder.linear_1", width, s.freq_dim),
        **_linear(f"{name}.time_embedder.linear_2", width, width),
        **_linear(f"{name}.time_proj", 6 * width, width),
        **_linear(f"{name}.text_embedder.linear_1", width, s.text_dim),
        **_linear(f"{name}.text_embedder.linear_2", width, width),
    }


def _block(name: str, width: int, heads_width: int, ffn_dim: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.scale_shift_table": (1, 6, width)}
    for attention in ("attn1", "attn2"):
        for part in ("to_q", "to_k", "to_v"):
            shapes |= _linear(f"{name}.{attention}.{part}", heads_width, width)
        shapes |= _linear(f"{name}.{attention}.to_out.0", width, heads_width)
        for part in ("norm_q", "norm_k"):
            shapes[f"{name}.{attention}.{part}.weight"] = (heads_width,)
    shapes |= {f"{name}.norm2.weight": (width,), f"{name}.norm2.bias": (width,)}
    shapes |= _linear(f"{name}.ffn.net.0.proj", ffn_dim, width)
    shapes |= _linear(f"{name}.ffn.net.2", width, ffn_dim)
    return shapes
