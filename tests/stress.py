"""Random cases without end, on whatever hardware is there, against the fp64 reference.

    python -m tests.stress --minutes 10           # or: make stress MINUTES=10
    python -m tests.stress --only "ranks 3 seed 1234"

One device and several ranks take turns. A failure ends the run with exit code 1 and prints the one
line that reproduces it.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import sys
import time
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are decorated

from magi_sink_cp import attention_with_sink
from tests.support.cases import (
    Case,
    assert_close,
    assert_within_plain,
    errors,
    make_case,
    run,
    truth,
)
from tests.support.ranks import MAX_RANKS, close_pools, gpu_ranks, run_on_ranks


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to draw")
    parser.add_argument("--seed", type=int, help="of the first case (default: the clock)")
    parser.add_argument("--only", help="one case, as a failure prints it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    first = int(time.time()) if args.seed is None else args.seed
    cases = [args.only] if args.only else draw_names(first)
    until, count = time.monotonic() + 60 * args.minutes, 0
    try:
        for name in cases:
            if time.monotonic() > until:
                break
            if not passes(name):
                return 1
            count += 1
    except KeyboardInterrupt:
        print("stopped")
    finally:
        close_pools()
    print(f"{count} cases passed")
    return 0


def passes(name: str) -> bool:
    """Run one case; say how to run it again if it fails."""
    try:
        run_case(name)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        print(f"reproduce: python -m tests.stress --only {shlex.quote(name)}")
        return False
    return True


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def draw_names(first: int) -> Iterator[str]:
    """Names of cases, without end: "one seed S" and "ranks N seed S"."""
    most = min(gpu_ranks(), MAX_RANKS) if device_type() == "cuda" else MAX_RANKS
    seed = first
    while True:
        yield f"one seed {seed}"
        if most > 1:
            yield f"ranks {random.Random(seed).randint(1, most)} seed {seed}"
        seed += 1


def run_case(name: str) -> None:
    kind, *words = name.split()
    if kind == "one":
        one_device(int(words[-1]))
        return
    arguments = {"seeds": [int(words[-1])]}
    if device_type() == "cuda":
        from tests.gpu.test_ranks import near_one_device

        arguments |= {"dtype": torch.bfloat16, "check": near_one_device, "longest": 600}
    from tests.distributed.test_cp_attention import body_random

    run_on_ranks(int(words[0]), body_random, device_type(), **arguments)


def one_device(seed: int) -> None:
    """Packed documents with more or fewer keys than rows, and every option."""
    draw, on_gpu = random.Random(seed), device_type() == "cuda"
    longest = 400 if on_gpu else 60
    documents = draw.randint(1, 5)
    heads_kv = draw.randint(1, 3)
    case = make_case(
        [draw.randint(0, longest) for _ in range(documents)],
        [draw.randint(0, longest) for _ in range(documents)],
        heads=heads_kv * draw.randint(1, 4),
        heads_kv=heads_kv,
        head_dim=draw.choice([64, 128]) if on_gpu else draw.choice([4, 8, 16, 40]),
        s_sink=draw.randint(1, 4),
        sink_layout=draw.choice(["sh", "ssh"]),
        sink_scale=draw.choice([1.0, 1.0, 30.0]),
        with_dlse=draw.random() < 0.5,
        causal=draw.random() < 0.5,
        window_size=draw.choice([(-1, -1), (draw.randint(-1, longest), draw.randint(-1, longest))]),
        dtype=torch.bfloat16 if on_gpu else draw.choice([torch.float32, torch.float64]),
        device=device_type(),
        seed=seed,
    )
    if not case.q.numel() or not case.k.numel():
        return
    options = lengths_of(case)
    if not on_gpu:
        assert_close(run(attention_with_sink, case, **options), truth(case), 1e-5)
        return
    plain_case = Case(**{**vars(case), "sink": None, "dlse": None})
    plain = errors(run(attention_with_sink, plain_case, **options), truth(plain_case))
    floor = {name: max(error, 2e-3) for name, error in plain.items()}  # rows that see few keys
    assert_within_plain(run(attention_with_sink, case, **options), truth(case), floor)


def lengths_of(case: Case) -> dict[str, torch.Tensor]:
    return {
        f"cu_seqlens_{which}": torch.tensor(offsets, dtype=torch.int32, device=case.q.device)
        for which, offsets in (("q", case.cu_seqlens_q), ("k", case.cu_seqlens_k))
    }


if __name__ == "__main__":
    sys.exit(main())
