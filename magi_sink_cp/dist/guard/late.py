"""Comparisons that do not hold the host up: one digest per rank, read when it has arrived.

A comparison makes the host wait until the GPU has come that far. Where documents change, every plan
is new, so each step would wait several times. Mistakes, however, stand at a job's start: the first
comparisons of a kind (:data:`AT_ONCE` plans) are read at once, and show who was given what. Later
ones are gathered in the same way, as 64 bytes per rank, and are read from pinned memory:

- at the next comparison or backward after they have arrived, without waiting, and
- in the last backward of a plan's forwards so far and in the next make_cp_plan, with waiting. By
  then the GPU is past them.

So a rank that makes other plans or calls than the others, or in another order, is named before the
optimizer step. The transfers between may have moved wrong keys, or hang, in which case the watchdog
names them. After a difference everything is read at once again.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist.bookkeeping import plain_tensors, upload
from magi_sink_cp.dist.guard.agreement import (
    GroupRef,
    Signature,
    agree,
    all_gather,
    group_device,
)
from magi_sink_cp.kernels.caching import BoundedCache

# So many comparisons of a kind, one after the other without a difference, are read at once.
AT_ONCE = 8
_DIGEST_BYTES, _HEADER_BYTES = 32, 64
_FAILED, _READ_AT_ONCE, _READ_LATE = range(3)


@dataclass
class _Gathered:
    """The headers of all ranks, on their way to the host."""

    what: str
    headers: Tensor  # uint8 (ranks, _HEADER_BYTES), of the CPU
    arrival: torch.cuda.Event | None

    def has_come(self) -> bool:
        return self.arrival is None or self.arrival.query()

    def read(self) -> tuple[list[bytes], list[int]]:
        """Every rank's digest and how it reads; waits for them."""
        if self.arrival is not None:
            self.arrival.synchronize()
        raw = [row.tobytes() for row in self.headers.numpy()]
        return [row[:_DIGEST_BYTES] for row in raw], [row[_DIGEST_BYTES] for row in raw]


class GroupAgreement:
    """What the ranks of one group have compared, over all its plans."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = GroupRef(group)
        self._compared: BoundedCache[str, int] = BoundedCache(1024)
        self._pending: deque[_Gathered] = deque()

    def compare(
        self, record: Mapping[str, object], kind: str, what: str, at_once: bool = False
    ) -> None:
        """Compare ``record`` over the ranks. Every rank must call this, or :meth:`fail`.

        Args:
            kind: comparisons of one kind become late ones after AT_ONCE.
            what: the call, for errors.
            at_once: read this one now.

        Raises:
            ValueError: the ranks differ, or one failed, here or in an earlier late comparison.
        """
        times = self._compared.get(kind, 0)
        late = not at_once and times >= AT_ONCE and not _is_capturing()
        digest = hashlib.sha256(repr((what, list(record.items()))).encode()).digest()
        gathered = self._gather(digest, what, _READ_LATE if late else _READ_AT_ONCE)
        if late:
            self._pending.append(gathered)
            self.read(wait=False)
            return
        self.read(wait=True)
        digests, modes = gathered.read()
        if len(set(digests)) == 1 and _FAILED not in modes:
            self._compared[kind] = times + 1
            return
        self.forget()
        if _READ_LATE not in modes:
            agree(record, self._group(), what)
        raise _difference(what, digests, modes)

    def fail(self, error: Exception, what: str) -> None:
        """Tell the other ranks, in place of a comparison, before the caller raises ``error``."""
        _, modes = self._gather(bytes(_DIGEST_BYTES), what, _FAILED).read()
        self.forget()
        if _READ_LATE not in modes:
            agree(error, self._group(), what)

    def read(self, wait: bool) -> None:
        """Read what has arrived, or, with ``wait``, all that is under way.

        Raises:
            ValueError: the ranks differed there, or one failed.
        """
        while self._pending and (wait or self._pending[0].has_come()):
            gathered = self._pending.popleft()
            digests, modes = gathered.read()
            if len(set(digests)) > 1 or _FAILED in modes:
                self.forget()
                raise _difference(gathered.what, digests, modes)

    def forget(self) -> None:
        """Read everything at once again, from the first comparison on."""
        self._compared.clear()
        self._pending.clear()

    def _gather(self, digest: bytes, what: str, mode: int) -> _Gathered:
        group = self._group()
        device = group_device(group)
        with plain_tensors():
            header = bytearray((digest + bytes([mode])).ljust(_HEADER_BYTES, b"\0"))
            mine = upload(torch.frombuffer(header, dtype=torch.uint8), device)
            gathered = all_gather(mine, group, f"{what}: comparing arguments over the cp group")
            if device.type != "cuda":
                return _Gathered(what, gathered, None)
            headers = torch.empty(gathered.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
            headers.copy_(gathered, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record()
            return _Gathered(what, headers, arrival)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _difference(what: str, digests: list[bytes], modes: list[int]) -> ValueError:
    """Who differs. What each rank was given is not known here."""
    failed = [rank for rank, mode in enumerate(modes) if mode == _FAILED]
    if failed:
        return ValueError(
            f"{what}: cp rank {failed[0]} was given something invalid, so no rank goes on; its own "
            "error says what"
        )
    (most, _), *_ = Counter(digests).most_common()
    others = [rank for rank, digest in enumerate(digests) if digest != most]
    return ValueError(
        f"{what}: all ranks of the cp group must make the same plans and calls in the same order, "
        f"and cp ranks {others} made others than cp rank {digests.index(most)}. "
        'checks="always" shows in which argument'
    )


_agreements: weakref.WeakKeyDictionary[ProcessGroup, GroupAgreement] = weakref.WeakKeyDictionary()


def group_agreement(group: ProcessGroup) -> GroupAgreement:
    """The group's own :class:`GroupAgreement`."""
    found = _agreements.get(group)
    if found is None:
        found = _agreements[group] = GroupAgreement(group)
    return found


def agree_outside_plans(
    record: Mapping[str, object] | Exception,
    group: ProcessGroup,
    what: str,
    kind: str,
    at_once: bool = False,
) -> None:
    """Compare what belongs to no plan yet, or make the other ranks raise too.

    The arguments are those of :meth:`GroupAgreement.compare`, or of :meth:`GroupAgreement.fail`.
    """
    if group_device(group).type == "cpu":
        agree(record, group, what)
        return
    agreement = group_agreement(group)
    if isinstance(record, Exception):
        agreement.fail(record, what)
    else:
        agreement.read(wait=True)
        agreement.compare(record, kind, what, at_once)


class Agreement:
    """Compares the calls of one plan over its ranks, and remembers what they have agreed on.

    On a CPU group every call is compared. On GPUs a signature is compared when the plan first sees
    it, or in every call if ``always``.
    """

    def __init__(
        self, group: GroupRef | None, device: torch.device, digest: str, at_once: bool = False
    ) -> None:
        """``digest`` tells this plan from others; ``at_once``: read no comparison late."""
        self._group = group
        self._device = device
        self._digest, self._at_once = digest, at_once
        self.in_every_call = device.type == "cpu"
        self._agreed: set[str] = set()
        self.backwards_to_come = 0  # of forwards so far

    def compares_always(self, always: bool) -> bool:
        """Whether every call is compared."""
        return self._group is not None and (always or self.in_every_call)

    def compare(self, signature: Signature, what: str, always: bool = False) -> None:
        """Raise on every rank unless all ranks have this signature."""
        if self._group is None:
            return
        key, record = signature.key, {"plan (sha256)": self._digest, **signature.content}
        if self.compares_always(always):
            with self._on_device():
                agree(record, self._group(), what)
        elif key not in self._agreed:
            with self._on_device():
                group_agreement(self._group()).compare(record, key, what, self._at_once)
        else:
            return
        self._agreed.add(key)

    def report_error(self, error: Exception, what: str, always: bool = False) -> None:
        """Make the other ranks raise too, before the caller raises ``error``.

        On GPUs only while the ranks have agreed on nothing yet, unless ``always``: after that the
        others may be past this comparison.
        """
        if self._group is None:
            return
        with self._on_device():
            if self.compares_always(always):
                agree(error, self._group(), what)
            elif not self._agreed:
                group_agreement(self._group()).fail(error, what)

    def read_late(self) -> None:
        """In a backward: read what is compared late, and in the plan's last one wait for it."""
        self.backwards_to_come -= 1
        if self._group is not None and not self.in_every_call:
            group_agreement(self._group()).read(wait=self.backwards_to_come <= 0)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """The plan's own device, even if the current device is another one."""
        on_gpu = self._device.type == "cuda"
        return torch.cuda.device(self._device) if on_gpu else contextlib.nullcontext()
