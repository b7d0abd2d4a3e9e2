"""torchtitan: gpt_oss with sinks, packed documents and windows under context parallelism.

A converter gives the model's layers this attention. The keys that travel are those that some query
of another rank sees; torchtitan's own attention gathers all of them on every rank:

    from torchtitan.models.gpt_oss import model_registry
    from magi_sink_cp.integrations.torchtitan import SinkAttentionConverter

    model_spec = model_registry("20b", converters=[SinkAttentionConverter.Config()])

torchtitan shards batches, sums gradients and losses, and logs, as it does for its own attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import spmd_types
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torchtitan.config.override import derive
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.decoder_sharding import dense_activation_placement
from torchtitan.models.gpt_oss.model import Attention, GptOssModel
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig

from magi_sink_cp.attention import attention_with_sink
from magi_sink_cp.cp_attention import cp_attention_with_sink
from magi_sink_cp.dist.guard.watchdog import Communication
from magi_sink_cp.dist.make_plan import make_cp_plan
from magi_sink_cp.dist.plan import CPPlan

# parallelism.context_parallel_load_balancer, and the layout that has its order.
_LAYOUTS = {"headtail": "zigzag", None: "contiguous"}


class SinkAttentionConverter(ModelConfigConverter):
    """Gives each layer of a gpt_oss configuration :class:`SinkAttention`."""

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        """backend, deterministic: as in :func:`magi_sink_cp.cp_attention_with_sink`."""

        backend: str = "auto"
        deterministic: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model_config: Any) -> Any:
        """The configuration with this attention.

        Raises:
            TypeError: it is of another model than gpt_oss.
        """
        if not isinstance(model_config, GptOssModel.Config):
            raise TypeError(
                "SinkAttentionConverter is for the gpt_oss model, got "
                f"{type(model_config).__qualname__}"
            )
        layers = []
        for layer in model_config.layers:
            size = layer.attention.sliding_window_size
            inner = SinkAttention.Config(
                window_size=(-1 if size is None else size - 1, 0),
                backend=self.config.backend,
                deterministic=self.config.deterministic,
            )
            attention = dataclasses.replace(layer.attention, inner_attention=inner)
            layers.append(dataclasses.replace(layer, attention=attention))
        return derive(model_config, SinkGptOssModel.Config, layers=layers)


class Documents:
    """The documents of a batch, in the place of attention masks; every layer uses their plans.

    Args:
        positions: int (batch, local tokens). A document begins where they are 0.
        layout: of the sequences over the cp group.
    """

    def __init__(self, positions: Tensor, layout: str) -> None:
        self._positions, self._layout = positions, layout
        self._offsets: Tensor | None = None
        self._plans: list[CPPlan] | None = None

    def offsets(self) -> Tensor:
        """int32, of the documents of the whole batch as one sequence, on one device."""
        if self._offsets is None:
            starts = _starts(self._positions).flatten().nonzero().flatten().to(torch.int32)
            total = starts.new_tensor([self._positions.numel()])
            self._offsets = torch.cat([starts, total])
        return self._offsets

    def plans(self, group: ProcessGroup) -> list[CPPlan]:
        """The plan of each sample. The positions of all ranks are gathered, and read on the host,
        once a batch.
        """
        if self._plans is None:
            total = self._positions.shape[1] * dist.get_world_size(group)
            made: dict[tuple[int, ...], CPPlan] = {}
            self._plans = []
            for starts in _starts(self._whole_positions(group)).cpu():
                offsets = (*starts.nonzero().flatten().tolist(), total)
                if offsets not in made:
                    made[offsets] = make_cp_plan(
                        total, group=group, cu_seqlens=offsets, layout=self._layout
                    )
                self._plans.append(made[offsets])
        return self._plans

    def _whole_positions(self, group: ProcessGroup) -> Tensor:
        """(batch, tokens), in the order of the sequence."""
        own = self._positions.contiguous()
        parts = own.new_empty(dist.get_world_size(group) * own.shape[0], own.shape[1])
        gather = Communication(
            "torchtitan's positions: all-gather over the cp group",
            group,
            own.is_cuda,
            lambda: [dist.all_gather_into_tensor(parts, own, group=group, async_op=True)],
        )
        gather.wait()
        chunks = list(parts.split(own.shape[0]))
        if self._layout == "zigzag":
            halves = [chunk.chunk(2, dim=1) for chunk in chunks]
            chunks = [head for head, _ in halves] + [tail for _, tail in reversed(halves)]
        return torch.cat(chunks, dim=1)


def _starts(positions: Tensor) -> Tensor:
    """bool, where documents begin."""
    starts = positions == 0
    starts[:, 0] = True
    return starts


class SinkAttention(Module):
    """torchtitan's inner_attention, with the sinks of the gpt_oss layer around it."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """window_size: (left, right) keys that a query sees beside its own; -1 is unlimited."""

        window_size: tuple[int, int] = (-1, 0)
        backend: str = "auto"
        deterministic: bool = False

    def __init__(self, config: Config) -> None:
        torch.nn.Module.__init__(self)  # a subclass has a second base with arguments of its own
        self.options: dict[str, Any] = {
            "causal": True,
            "window_size": config.window_size,
            "backend": config.backend,
            "deterministic": config.deterministic,
        }
        self.group: ProcessGroup | None = None

    def parallelize(self, parallel_dims: Any) -> None:
        """Take the cp group."""
        mesh = parallel_dims.get_optional_mesh("cp")
        self.group = None if mesh is None else mesh.get_group()
        super().parallelize(parallel_dims)

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Documents,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """What a layer calls; torchtitan names the arguments.

        Args:
            q_BLNH, k_BLNH, v_BLNH: (batch, local tokens, heads, head_dim), plain tensors, or
                DTensors of the cp mesh.
            attention_masks: of :class:`SinkGptOssModel`.
            scale: softmax_scale.
            enable_gqa: not looked at: the heads tell.
            out_transform: the layer's own puts its sinks in. Another one is called with out and
                lse (batch, local tokens, heads), and there is no sink then.
        """
        q, k, v, group = q_BLNH, k_BLNH, v_BLNH, self.group
        if isinstance(q, DTensor):
            group = q.device_mesh.get_group()
            q, k, v = (x.to_local() for x in (q, k, v))  # type: ignore[attr-defined]
        sink, transform = _sink_of(out_transform)
        options = self.options | {"softmax_scale": scale, "return_lse": True}
        if group is None or dist.get_world_size(group) == 1:
            out, lse = _attend(q, k, v, sink, attention_masks.offsets(), options)
        else:
            out, lse = _attend_across(q, k, v, sink, attention_masks.plans(group), options)
        return out if transform is None else transform(out, lse.transpose(1, 2))


class SinkAttentionInDTensors(SinkAttention, ScaledDotProductAttention):
    """For spmd_backend="partial_dtensor", whose context parallelism gives to this kind of attention
    alone keys that are not gathered, in DTensors of the cp mesh.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(SinkAttention.Config):
        """As of SinkAttention."""

    forward = SinkAttention.forward


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, offsets: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(out, lse (batch, heads, tokens)) on one device."""
    samples = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = attention_with_sink(
        q, k, v, sink, cu_seqlens_q=offsets, cu_seqlens_k=offsets, **options
    )
    return out.unflatten(0, samples), lse.unflatten(1, samples).transpose(0, 1)


def _attend_across(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    plans: list[CPPlan],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(out, lse (batch, heads, local tokens)); one call if all samples have the same documents."""
    if all(plan is plans[0] for plan in plans):
        out, lse = cp_attention_with_sink(q, k, v, sink, plan=plans[0], **options)
        return out, lse
    parts = [
        cp_attention_with_sink(q_, k_, v_, sink, plan=plan, **options)
        for q_, k_, v_, plan in zip(q, k, v, plans, strict=True)
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.stack(outs), torch.stack(lses)


def _sink_of(
    out_transform: Callable[[Tensor, Tensor], Tensor] | None,
) -> tuple[Tensor | None, Callable[[Tensor, Tensor], Tensor] | None]:
    """The sinks that gpt_oss would put in behind the attention; or a transform of another kind."""
    if getattr(out_transform, "__func__", None) is not Attention._apply_sinks:
        return None, out_transform
    sinks = out_transform.__self__.sinks  # type: ignore[union-attr]
    if isinstance(
        sinks, DTensor
    ):  # of this rank's heads; each rank's gradient is a part of the sum
        sinks = sinks.to_local(grad_placements=sinks.placements)
    return sinks, None


class SinkGptOssModel(GptOssModel):
    """gpt_oss whose layers get the batch's documents in the place of masks."""

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssModel.Config):
        """layout: set by update_from_config."""

        layout: str = "zigzag"

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Take what the job says of context parallelism.

            Raises:
                ValueError: the load balancer, or CUDA graphs, cannot be honoured.
            """
            GptOssModel.Config.update_from_config(self, config=config, **kwargs)
            parallelism = config.parallelism
            balancer = parallelism.context_parallel_load_balancer
            if balancer not in _LAYOUTS:
                raise ValueError(
                    "parallelism.context_parallel_load_balancer must be 'headtail' or None with "
                    f"SinkAttentionConverter, got {balancer!r}"
                )
            if not config.training.disable_cuda_graphs:
                raise ValueError(
                    "training.disable_cuda_graphs must be True with SinkAttentionConverter: the "
                    "documents of a batch are read on the host"
                )
            self.layout = _LAYOUTS[balancer]
            in_dtensors = parallelism.spmd_backend == "partial_dtensor"
            kind = SinkAttentionInDTensors if in_dtensors else SinkAttention
            # q, k and v alike: sharded by tokens over cp, by heads over tp.
            own = dense_activation_placement(tp=spmd_types.S(2))
            named = {"q_BLNH": own, "k_BLNH": own, "v_BLNH": own}
            sharding = ShardingConfig(
                in_src_shardings=named,
                in_dst_shardings=named,
                out_src_shardings=own,
                local_map=LocalMapConfig(in_grad_placements=(own, own, own)),
            )
            for layer in self.layers:
                layer.attention.inner_attention = derive(
                    layer.attention.inner_attention, kind.Config, sharding_config=sharding
                )

    def forward(
        self, tokens: Tensor, positions: Tensor, attention_masks: Documents | None = None
    ) -> Tensor:
        """As of GptOssModel. positions (batch, local tokens) say where documents begin."""
        if attention_masks is None:
            local = positions.to_local() if isinstance(positions, DTensor) else positions
            attention_masks = Documents(local, self.config.layout)
        out: Tensor = super().forward(tokens, positions, attention_masks)
        return out
