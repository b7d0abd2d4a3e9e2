"""Where each rank writes in its peers' buffers, for transports that write there themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from magi_sink_cp.dist.planning.exchange import Exchange, Route, Schedule


def add_routes(schedules: Sequence[Schedule], rank: int) -> Schedule:
    """The schedule of ``rank`` with routes, from the schedules of all ranks.

    A stage's buffer lies beside that of the stage before, which may still be read. So do the
    gradients of two stages.
    """
    travelling = [n for n, stage in enumerate(schedules[rank].stages) if not stage.local]
    slots = min(2, len(travelling))
    parts: list[int] = []
    for kind in ("cast", "reduce"):
        sizes = (getattr(s.stages[n], kind).buffer_tokens for s in schedules for n in travelling)
        parts += [max(sizes, default=0)] * slots

    def routed(number: int, kind: str) -> Exchange:
        exchange: Exchange = getattr(schedules[rank].stages[number], kind)
        waiting: dict[int, list[int]] = {}
        for peer in {message.peer for message in exchange.sends}:
            theirs = getattr(schedules[peer].stages[number], kind).receives
            waiting[peer] = [m.tokens[0] for m in theirs if m.peer == rank]
        places = tuple(waiting[message.peer].pop(0) for message in exchange.sends)
        part = travelling.index(number) % slots + (0 if kind == "cast" else slots)
        return replace(exchange, route=Route(places, tuple(parts), part))

    stages = list(schedules[rank].stages)
    for n in travelling:
        stages[n] = replace(stages[n], cast=routed(n, "cast"), reduce=routed(n, "reduce"))
    return Schedule(tuple(stages))
