"""Packed sequences from a folder of text: an index, streams of documents, a loader.

Documents are dealt to a fixed number of streams in a seeded order, new in each epoch. A stream is
cut into sequences of seq_len tokens. A stream's place is three numbers, so a run can go on where it
was, over any number of ranks and workers. The workers of a DataLoader tokenize, pack and plan.
"""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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


class Documents:
    """Where the documents of a folder begin and end.

    A line of a file *.jsonl is a document: a JSON object whose ``key`` is its text. Every other
    file is one document, in UTF-8.
    """

    def __init__(self, folder: str, key: str = "text") -> None:
        """Read where the lines are.

        Raises:
            ValueError: the folder does not exist, or holds no document.
        """
        root = Path(folder)
        if not folder or not root.exists():
            raise ValueError(f"{folder or repr(folder)} does not exist")
        files = sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]
        self._files, self._key = files, key
        found = [(n, *span) for n, file in enumerate(files) for span in _spans(file)]
        if not found:
            raise ValueError(f"{folder} holds no document")
        self._spans = np.array(found, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._spans)

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
            if file.suffix != ".jsonl":
                return content.decode()
            text = json.loads(content)[self._key]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, document at byte {start}: {error!r}") from error
        if not isinstance(text, str):
            raise ValueError(
                f"{file}, document at byte {start}: {self._key!r} must be a text, got "
                f"{type(text).__name__}"
            )
        return text


def _spans(file: Path) -> Iterator[tuple[int, int]]:
    """(start, length) in bytes of a file's documents."""
    if file.suffix != ".jsonl":
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
            ValueError: no document of the stream has two tokens.
        """
        tokens: list[int] = []
        labels: list[int] = []
        offsets = [0]
        barren = 0  # documents in a row without a token to predict
        while len(tokens) < length:
            document = self._document()
            start = self.place.token
            stop = min(len(document), start + length - len(tokens))
            if len(document) >= 2:
                barren = 0
                tokens += document[start:stop]
                labels += [*document[start + 1 : stop + 1], *([IGNORED] * (stop == len(document)))]
                offsets.append(len(tokens))
            elif (barren := barren + 1) >= len(self._order):
                raise ValueError("the documents hold no token to predict: each has less than two")
            if stop == len(document):
                self.place = Place(self.place.epoch, self.place.number + 1)
            else:
                self.place = self.place._replace(token=stop)
        return tokens, labels, offsets

    def _document(self) -> list[int]:
        """The tokens of the document at the place."""
        if self._epoch != self.place.epoch:
            self._draw_order()
        if self.place.number == len(self._order):
            self.place = Place(self.place.epoch + 1)
            self._draw_order()
        at = self.place.epoch, self.place.number
        if self._at != at:
            text = self._documents.text(int(self._order[self.place.number]))
            self._tokens, self._at = self._tokenize(text), at
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
        num_tokens, num_labels: of the whole sequence.
        blueprint: of the group's plan. Its cp_size says how large the group is.
    """

    stream: int
    place: Place
    tokens: Tensor
    labels: Tensor
    num_tokens: int
    num_labels: int
    blueprint: CPBlueprint

    def pin_memory(self) -> PackedSequence:
        """For DataLoader(pin_memory=True)."""
        return replace(self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory())


def deal(lengths: Sequence[int], cp_size: int, pairs_per_token: float) -> list[list[int]]:
    """Which group of ranks runs which documents, the groups as small as balance lets them be.

    Attention costs a document length² / 2 pairs (query, key), and all other layers cost each of its
    tokens as much as ``pairs_per_token`` of them. Groups of one size run side by side. Their
    busiest may have :data:`UNEVEN` times the mean's work, and as many times its tokens.

    Returns:
        The numbers of the documents of each group. All ``cp_size`` ranks are one group in the end.
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
            pairs_per_token: as in :func:`deal`; None: all cp_size ranks run each sequence.
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
            groups = deal([hi - lo for lo, hi in spans], cp_size, self._pairs_per_token)
            cp_size //= len(groups)
            own = [spans[n] for n in groups[rank // cp_size]]
            rank %= cp_size
            tokens, labels = ([x for lo, hi in own for x in xs[lo:hi]] for xs in (tokens, labels))
            offsets = [0, *itertools.accumulate(hi - lo for lo, hi in own)]
        blueprint = make_cp_blueprint(
            len(tokens), cp_size=cp_size, rank=rank, cu_seqlens=offsets, windows=self._windows
        )
        return PackedSequence(
            number, stream.place, torch.tensor(tokens), torch.tensor(labels), self._seq_len,
            num_labels, blueprint,
        )  # fmt: skip


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
        worker_init_fn=leave_ctrl_c_alone,
    )


def leave_ctrl_c_alone(worker: int) -> None:
    """The training loop ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
