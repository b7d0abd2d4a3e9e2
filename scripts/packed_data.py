"""Packed sequences from a folder of text: an index, streams of documents, a loader.

Each epoch assigns the documents to a fixed number of streams, in a new seeded order. A stream is
cut into sequences of seq_len tokens. A stream's place is three numbers, so a run can go on where it
was, over any number of ranks and workers. The workers of a DataLoader tokenize, pack and plan.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from magi_sink_cp import CPBlueprint, make_cp_blueprint

IGNORED = -100  # label of a document's last token, and of padding
# A group of ranks may have so much more work, or tokens, than the mean.
UNEVEN = 1.1
Tokenize = Callable[[str], list[int]]
NO_TEXT = (
    ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".parquet", ".arrow", ".bin", ".pt", ".npy",
    ".npz", ".safetensors", ".pdf",
)  # fmt: skip


class Documents:
    """Where the documents of a folder begin and end.

    A line of a file *.jsonl is a document: a JSON object whose ``key`` is its text. Every other
    file is one document, in UTF-8. Files and folders whose names begin with a dot are left out.
    """

    def __init__(self, folder: str, key: str = "text") -> None:
        """Read where the lines are.

        Raises:
            ValueError: the folder does not exist, holds no document, or a file that is no text.
        """
        root = Path(folder)
        if not folder or not root.exists():
            raise ValueError(f"{folder or repr(folder)} does not exist")
        files = [root]
        if root.is_dir():
            files = sorted(f for f in root.rglob("*") if f.is_file() and not _is_hidden(f, root))
        for file in files:
            if file.suffix.lower() in NO_TEXT:
                raise ValueError(f"{file} is no text: give *.jsonl files and text files alone")
        self._root, self._files, self._key = root, files, key
        found = [(n, *span) for n, file in enumerate(files) for span in _spans(file)]
        if not found:
            raise ValueError(f"{folder} holds no document")
        self._spans = np.array(found, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._spans)

    def fingerprint(self) -> str:
        """Of names, sizes, and where the documents are: a resumed run must have the same ones."""
        names = [(str(f.relative_to(self._root)), f.stat().st_size) for f in self._files]
        found = hashlib.sha256(repr((names, self._key)).encode())
        found.update(self._spans.tobytes())
        return found.hexdigest()[:16]

    def where(self, number: int) -> str:
        """A document's file and first byte."""
        n, start, _ = self._spans[number].tolist()
        return f"{self._files[n]}, document at byte {start}"

    def text(self, number: int) -> str:
        """The text of a document.

        Raises:
            ValueError: it is no UTF-8, or no JSON object with a text.
        """
        n, start, length = self._spans[number].tolist()
        file = self._files[n]
        with file.open("rb") as opened:
            opened.seek(start)
            content = opened.read(length)
        try:
            if file.suffix.lower() != ".jsonl":
                return content.decode()
            text = json.loads(content)[self._key]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.where(number)}: {error!r}") from error
        if not isinstance(text, str):
            raise ValueError(
                f"{self.where(number)}: {self._key!r} must be a text, got {type(text).__name__}"
            )
        return text


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _spans(file: Path) -> Iterator[tuple[int, int]]:
    """(start, length) in bytes of a file's documents."""
    if file.suffix.lower() != ".jsonl":
        if size := file.stat().st_size:
            yield 0, size
        return
    start = 0
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield start, len(line)
            start += len(line)


class Place(NamedTuple):
    """Where a stream goes on: which of its documents, of which epoch, at which token."""

    epoch: int = 0
    number: int = 0
    token: int = 0


class Stream:
    """Documents ``index``, ``index + count``, … of each epoch's order, cut into sequences."""

    def __init__(
        self,
        documents: Documents,
        tokenize: Tokenize,
        index: int,
        count: int,
        seed: int,
        place: Place,
    ) -> None:
        self._documents, self._tokenize = documents, tokenize
        self._index, self._count, self._seed = index, count, seed
        self.place = place
        self._epoch = -1  # whose order is known
        self._order: np.ndarray = np.empty(0, np.int64)
        self._tokens: list[int] = []  # of the document at the place
        self._at: tuple[int, int] | None = None  # whose tokens those are

    def sequence(self, length: int) -> tuple[list[int], list[int], list[int]]:
        """(tokens, labels, offsets of the documents) of the next ``length`` tokens.

        Raises:
            ValueError: no document of the stream has two tokens; a document cannot be read; the
                place is none of these documents.
        """
        tokens: list[int] = []
        labels: list[int] = []
        offsets = [0]
        skipped = 0  # documents in a row without a token to predict
        while len(tokens) < length:
            document = self._document()
            start = self.place.token
            stop = min(len(document), start + length - len(tokens))
            if start >= max(1, len(document)):
                raise ValueError(f"{self.place} is behind the document's {len(document)} tokens")
            if len(document) >= 2:
                skipped = 0
                tokens += document[start:stop]
                labels += [*document[start + 1 : stop + 1], *([IGNORED] * (stop == len(document)))]
                offsets.append(len(tokens))
            elif (skipped := skipped + 1) >= len(self._order):
                raise ValueError(
                    f"the {len(self._order)} documents of stream {self._index} of {self._count} "
                    "hold no token to predict: each has less than two. Give more documents, or "
                    "take fewer sequences a step"
                )
            if stop == len(document):
                self.place = Place(self.place.epoch, self.place.number + 1)
            else:
                self.place = self.place._replace(token=stop)
        return tokens, labels, offsets

    def _document(self) -> list[int]:
        """The tokens of the document at the place."""
        if self._epoch != self.place.epoch:
            self._draw_order()
        if self.place.number >= len(self._order):
            self.place = Place(self.place.epoch + 1)
            self._draw_order()
        at = self.place.epoch, self.place.number
        if self._at != at:
            number = int(self._order[self.place.number])
            text = self._documents.text(number)
            try:
                self._tokens, self._at = self._tokenize(text), at
            except Exception as error:
                raise ValueError(f"{self._documents.where(number)}: {error!r}") from error
        return self._tokens

    def _draw_order(self) -> None:
        self._epoch = self.place.epoch
        order = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._documents))
        self._order = order[self._index :: self._count]


@dataclass(frozen=True)
class PackedSequence:
    """What one rank needs of a sequence.

    Attributes:
        stream, place: where it comes from, and where the stream goes on.
        tokens, labels: int64, of the group of ranks that this rank is in.
        num_labels: of the whole sequence.
        blueprint: of the group's plan. Its cp_size says how large the group is.
    """

    stream: int
    place: Place
    tokens: Tensor
    labels: Tensor
    num_labels: int
    blueprint: CPBlueprint

    def pin_memory(self) -> PackedSequence:
        """For DataLoader(pin_memory=True)."""
        return replace(self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory())


def assign(lengths: Sequence[int], cp_size: int, pairs_per_token: float) -> list[list[int]]:
    """Which group of ranks runs which documents, the groups as small as balance lets them be.

    Attention costs a document length² / 2 pairs (query, key), and all other layers cost each of its
    tokens as much as ``pairs_per_token`` of them. Groups of one size run side by side. Their
    busiest may have :data:`UNEVEN` times the mean's work, and as many times its tokens.

    Returns:
        The numbers of the documents of each group. One group of all ``cp_size`` ranks is always
        possible.
    """
    work = [n * (pairs_per_token + n / 2) for n in lengths]
    longest_first = sorted(range(len(lengths)), key=lambda n: -work[n])
    for size in (s for s in range(1, cp_size + 1) if cp_size % s == 0):
        groups: list[list[int]] = [[] for _ in range(cp_size // size)]
        loads = [0.0] * len(groups)
        if len(groups) > len(lengths):
            continue
        for n in longest_first:
            idlest = loads.index(min(loads))
            groups[idlest].append(n)
            loads[idlest] += work[n]
        tokens = [sum(lengths[n] for n in group) for group in groups]
        if all(max(x) * len(x) <= UNEVEN * sum(x) for x in (loads, tokens)):
            break
    return [sorted(group) for group in groups]


class PackedSequences(IterableDataset[PackedSequence]):
    """The sequences of some streams, one of each in turn, without an end."""

    def __init__(
        self,
        streams: Sequence[Stream],
        numbers: Sequence[int],
        seq_len: int,
        cp_size: int,
        cp_rank: int,
        windows: Sequence[tuple[int, int]],
        pairs_per_token: float | None,
    ) -> None:
        """Set up.

        Args:
            numbers: of the streams, among those of all ranks.
            cp_size, cp_rank: ranks that share the sequences, and this one's place among them.
            windows: of the model's layers.
            pairs_per_token: as in :func:`assign`; None: all cp_size ranks run each sequence.
        """
        self._streams, self._numbers, self._seq_len = streams, numbers, seq_len
        self._cp_size, self._cp_rank = cp_size, cp_rank
        self._windows, self._pairs_per_token = windows, pairs_per_token

    def __iter__(self) -> Iterator[PackedSequence]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        own = list(zip(self._numbers, self._streams, strict=True))[first::step]
        for number, stream in itertools.cycle(own):
            yield self._next(number, stream)

    def _next(self, number: int, stream: Stream) -> PackedSequence:
        tokens, labels, offsets = stream.sequence(self._seq_len)
        num_labels = sum(label != IGNORED for label in labels)
        cp_size, rank = self._cp_size, self._cp_rank
        if self._pairs_per_token is not None:
            spans = list(itertools.pairwise(offsets))
            groups = assign([hi - lo for lo, hi in spans], cp_size, self._pairs_per_token)
            cp_size //= len(groups)
            own = [spans[n] for n in groups[rank // cp_size]]
            rank %= cp_size
            tokens, labels = ([x for lo, hi in own for x in xs[lo:hi]] for xs in (tokens, labels))
            offsets = [0, *itertools.accumulate(hi - lo for lo, hi in own)]
        blueprint = make_cp_blueprint(
            len(tokens), cp_size=cp_size, rank=rank, cu_seqlens=offsets, windows=self._windows
        )
        return PackedSequence(
            number, stream.place, torch.tensor(tokens), torch.tensor(labels), num_labels, blueprint
        )


def make_loader(
    sequences: PackedSequences, num_streams: int, workers: int, pin_memory: bool
) -> DataLoader[PackedSequence]:
    """A loader of single sequences, in one order for any number of ``workers``.

    That order needs a number of workers that divides ``num_streams``: the largest is taken.
    """
    workers = next((n for n in range(min(workers, num_streams), 0, -1) if num_streams % n == 0), 0)
    return DataLoader(
        sequences,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_use_one_thread,
    )


def _use_one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def start(loader: DataLoader[PackedSequence]) -> Iterator[PackedSequence]:
    """Begin an iteration whose workers leave Ctrl-C and SIGTERM to this process, which ends them.

    Both are blocked while the workers start, which then have them blocked for good; one that comes
    meanwhile reaches this process after that.
    """
    signals = {signal.SIGINT, signal.SIGTERM}
    with contextlib.suppress(AttributeError):  # as it unblocks them when it starts
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
