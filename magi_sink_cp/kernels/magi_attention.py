"""MagiAttention, where it is installed: whether it can be used, masks as its slices, its backward.

Nothing of it is imported before it is asked for: the import takes seconds and writes to its cache.
Interfaces and facts are those of v1.1.1; features are checked, not versions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from magi_sink_cp.kernels.protocol import NotUsableError

GUIDE = "https://github.com/SandAI-org/MagiAttention says how to build it"
# What this package calls of magi_attention.api.
_NAMES = (
    "AttnOverlapMode",
    "AttnRanges",
    "DistAttnRuntimeKey",
    "calc_attn",
    "dispatch",
    "flex_flash_attn_func",
    "magi_attn_flex_key",
    "make_flex_key_for_new_mask_after_dispatch",
)
DEVICE_TYPE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)
# The numbers of its mask types.
FULL, CAUSAL, INV_CAUSAL, BI_CAUSAL = range(4)


def load() -> Any:
    """The module magi_attention.api.

    Raises:
        NotUsableError: it is not installed, or not whole. The text says why.
    """
    api = _load()
    if isinstance(api, str):
        raise NotUsableError(api)
    return api


@functools.cache
def _load() -> Any:
    """The module, or why there is none."""
    try:
        if importlib.util.find_spec("magi_attention") is None:
            return f"magi_attention is not installed: {GUIDE}"
        # Without its extension some versions import, and fail in the first call.
        importlib.import_module("magi_attention.magi_attn_ext")
        api = importlib.import_module("magi_attention.api")
    except Exception as error:  # whatever an install that is not whole does
        return (
            "magi_attention is installed, and does not load with its compiled extension: "
            f"{type(error).__name__}: {error}. The registry's magi-attention 0.0.1 is an empty "
            f"placeholder; {GUIDE}"
        )
    if missing := [name for name in _NAMES if not hasattr(api, name)]:
        return f"magi_attention.api has no {missing[0]}, which is needed; {GUIDE}"
    return api


def missing_gpu() -> str | None:
    """Why its kernels have no GPU to run on, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"its kernels need sm_90, and this GPU is sm_{capability[0]}{capability[1]}"
    return None


def unsupported(q: Tensor) -> str | None:
    """Why its kernels cannot run on this q, or None."""
    if q.device.type != DEVICE_TYPE:
        return f"it runs on CUDA tensors, and q is on {q.device}"
    if q.dtype not in DTYPES:
        return f"it takes {' or '.join(map(str, DTYPES))}, and q is {q.dtype}"
    if q.shape[-1] % 8 or not 0 < q.shape[-1] <= 128:
        return (
            "it takes a head_dim that is a multiple of 8, at most 128; that of q, or of v if it is "
            f"larger, is {q.shape[-1]}"
        )
    return None


# --- Masks --------------------------------------------------------------------------------------

Array = TypeVar("Array", Tensor, Any)  # NumPy's too


class Rectangles(NamedTuple):
    """Slices [q_lo, q_hi) × [k_lo, k_hi) of one type: CAUSAL, INV_CAUSAL, …"""

    q_lo: Any
    q_hi: Any
    k_lo: Any
    k_hi: Any
    kind: Any


def rectangles_of_bands(
    q_lo: Array, q_hi: Array, k_lo: Array, k_hi: Array, lo: Array, hi: Array
) -> tuple[Rectangles, Rectangles, Rectangles]:
    """Bands, in which query q sees key k if lo <= k - q <= hi, as three slices each.

    Some of the slices are empty. In a band the first rows reach its first key, so the limit ``lo``
    hides nothing; the last ones reach its last key, so ``hi`` hides nothing:

        x x . . . .  causal
        x x x . . .
        . x x x . .  bi_causal: both limits (full where the others overlap)
        . . x x x .
        . . . x x x  inv_causal
        . . . . x x

    Args:
        q_lo, …, hi: int64 of one shape, NumPy's or torch's.
    """
    first = (k_lo - hi).clip(q_lo, q_hi)  # rows above and below see nothing
    last = (k_hi - lo).clip(first, q_hi)
    left = (k_lo - lo).clip(first, last)  # from this row on lo hides keys
    right = (k_hi - hi).clip(first, last)  # up to this row hi does
    a, b = left.clip(None, right), left.clip(right, None)
    both = left < right
    empty = a >= b
    return (
        Rectangles(first, a, k_lo + 0 * a, _where(first < a, a + hi, k_lo), CAUSAL + 0 * a),
        Rectangles(
            a,
            b,
            _where(both, a + lo, k_lo),
            _where(empty, _where(both, a + lo, k_lo), _where(both, b + hi, k_hi)),
            _where(both, BI_CAUSAL + 0 * a, FULL + 0 * a),
        ),
        Rectangles(b, last, _where(b < last, b + lo, k_hi), k_hi + 0 * b, INV_CAUSAL + 0 * b),
    )


def _where(condition: Array, one: Array, other: Array) -> Array:
    """Both are int64 of one shape."""
    chosen: Array = condition * one + ~condition * other
    return chosen


# --- Backward -----------------------------------------------------------------------------------

# Functions of MagiAttention that were seen to save k and v as one tensor.
_joining: set[object] = set()


class Backward:
    """The backward of one of MagiAttention's autograd functions, for an out and lse of ours.

    Its backward computes P = exp(S - lse) and delta = Σ_d dout·out from the out and lse that its
    forward has saved, and drops a gradient that reaches lse. With the out and lse that hold the
    sink, and no sink of its own, it gives exactly the dq, dk and dv of attention with the sink. So
    it is run on those. What it saves is found out from one forward, and must be tensors that are
    known here.
    """

    def __init__(
        self, out: Tensor, known: Mapping[str, Tensor], objects: Collection[str] = ()
    ) -> None:
        """Learn from a forward.

        Args:
            out: the result, which requires a gradient.
            known: the forward's tensors by name: q, k, v, out, lse, and others.
            objects: attributes of its context that may be more than numbers and names, as they
                stay right for other tensors.

        Raises:
            NotUsableError: it keeps something else for its backward.
        """
        node: Any = out.grad_fn
        self._name = type(node).__name__
        try:
            self._run = node._forward_cls.backward
            self._attributes = dict(vars(node))
            saved = node.saved_tensors
        except AttributeError as error:
            raise NotUsableError(f"{self._name} is no torch.autograd.Function: {error}") from error
        for name, value in self._attributes.items():
            if name not in objects and not _is_plain(value):
                raise NotUsableError(
                    f"{self._name} of this magi_attention keeps {name}, a {type(value).__name__}, "
                    "that is not known here: unset the MAGI_ATTENTION_… variables that change its "
                    "kernels"
                )
        self._layout = self._names_of(saved, dict(known))

    def _names_of(
        self, saved: tuple[Tensor | None, ...], known: dict[str, Tensor]
    ) -> tuple[str | None, ...]:
        names: list[str | None] = []
        for x in saved:
            name = None if x is None else self._name_of(x, known)
            names.append(name)
            for taken in ("k", "v") if name == "kv" else (name,):
                known.pop(str(taken), None)
        if known:
            raise NotUsableError(
                f"{self._name} of this magi_attention does not save {', '.join(known)}"
            )
        return tuple(names)

    def _name_of(self, x: Tensor, known: Mapping[str, Tensor]) -> str:
        for name, other in known.items():
            if x.shape == other.shape and x.data_ptr() == other.data_ptr():
                return name
        if "k" in known and "v" in known:
            k, v = known["k"], known["v"]
            if x.shape == (len(k) + len(v), *k.shape[1:]) and self._is_joined(x, k, v):
                return "kv"
        raise NotUsableError(
            f"{self._name} of this magi_attention saves a {x.dtype} {tuple(x.shape)} that is not "
            "known here: unset the MAGI_ATTENTION_… variables that change its backward"
        )

    def _is_joined(self, x: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether x is k and v, bit by bit; looked at once for a function."""
        if self._run not in _joining:
            both = torch.cat([k, v])
            if not torch.equal(x.contiguous().view(torch.uint8), both.view(torch.uint8)):
                return False
            _joining.add(self._run)
        return True

    def __call__(self, dout: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """dq, dk and dv, in the dtypes of q, k and v.

        ``tensors``: as ``known``; q, k, v, out and lse may be others of the same shapes.
        """
        if "kv" in self._layout:
            tensors = {**tensors, "kv": torch.cat([tensors["k"], tensors["v"]])}
        saved = tuple(None if name is None else tensors[name] for name in self._layout)
        context = SimpleNamespace(**self._attributes, saved_tensors=saved)
        grads = self._run(context, dout, None, None)[:3]
        inputs = tensors["q"], tensors["k"], tensors["v"]
        return tuple(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))


def _is_plain(value: object) -> bool:
    """Whether a value says the same for every call: a number, a name, a dtype, or several."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
