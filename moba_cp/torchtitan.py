"""MoBA in a torchtitan model: the inner attention of its layers swapped, after torchtitan has parallelized them.

Written for torchtitan 0.3.0, and imports nothing of it: what counts is that `model.layers` are blocks with an
`attention.inner_attention`, which is called with q, k, v of shape `[B, L, heads, head size]`. docs/fsdp.md has the steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .config import MoBAConfig
from .module import MoBAAttention
from .parallel.layout import SequenceLayout
from .parallel.outside_graphs import outside_graphs


class TitanAttention(MoBAAttention):
    """`MoBAAttention` with the arguments of torchtitan's inner attention modules. Grouped heads need no flag."""

    def forward(  # type: ignore[override]
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Any = None,
        scale: float | None = None,
        is_causal: bool = True,
        enable_gqa: bool = False,
        **other: Any,
    ) -> Tensor:
        """Attention of this rank's tokens.

        Args:
            q_BLNH: `[B, L, Hq, D]`.
            k_BLNH, v_BLNH: `[B, L, Hkv, D]`, `[B, L, Hkv, Dv]`.
            attention_masks: None, for sequences that are a document each; or torchtitan's `VarlenMetadata` on one rank, whose
                `cu_seq_q` gives the documents. Where the module has a layout, the layout alone says what the documents are,
                and any mask stands for the same.
            scale: factor on the scores; None for the configuration's.
            is_causal: True.
            enable_gqa: whatever it is, q heads may be a multiple of kv heads.
            **other: None each.

        Returns:
            `[B, L, Hq, Dv]` in the dtype of `q_BLNH`.

        Raises:
            TypeError, ValueError: an argument asks for what MoBA does not do, or is refused as by `MoBAAttention.forward`; on
                every rank.
        """
        if torch.compiler.is_compiling() and not self._asks_plainly(attention_masks, scale, is_causal, other):
            return _forward_outside_the_graph(
                self, q_BLNH, k_BLNH, v_BLNH, attention_masks=attention_masks, scale=scale, is_causal=is_causal, **other
            )
        try:
            config, layout = self._asked(attention_masks, scale, is_causal, other)
        except (TypeError, ValueError) as error:
            self._tell(error, q_BLNH, k_BLNH, v_BLNH)
            raise
        return self._forward(q_BLNH, k_BLNH, v_BLNH, config, layout)

    def _asks_plainly(self, masks: Any, scale: float | None, is_causal: bool, other: dict[str, Any]) -> bool:
        """Whether `_asked` will accept the arguments without reading documents. What it refuses, it refuses outside of the graph,
        where the other ranks learn of it."""
        own = self.config.softmax_scale
        return (
            is_causal
            and (scale is None or isinstance(scale, (int, float)))
            and all(value is None for value in other.values())
            and (scale is None or own is None or scale == own)
            and (masks is None or self.layout is not None)
        )

    def _asked(
        self, masks: Any, scale: float | None, is_causal: bool, other: dict[str, Any]
    ) -> tuple[MoBAConfig, SequenceLayout | None]:
        for name, value in other.items():
            if value is not None:
                raise ValueError(f"MoBA attention has no {name}, got {value!r}")
        if not is_causal:
            raise ValueError("MoBA attention is causal, got is_causal=False")
        layout = self.layout if masks is None else self._of_documents(masks)
        config = self.config
        if scale is not None and scale != config.softmax_scale:
            if config.softmax_scale is not None:
                raise ValueError(
                    f"the model's scale is {scale}, but the configuration's softmax_scale is {config.softmax_scale}"
                )
            config = replace(config, softmax_scale=scale)
        return config, layout

    def _of_documents(self, masks: Any) -> SequenceLayout:
        if self.layout is not None:
            return self.layout
        if not hasattr(masks, "cu_seq_q"):
            raise ValueError(
                f"attention_masks must be None or VarlenMetadata, got {type(masks).__name__}: MoBA takes no masks, so the "
                "documents must come from a layout (moba_cp.set_layout)"
            )
        if self.cp_size > 1:
            raise ValueError(
                f"packed documents over {self.cp_size} ranks need a layout (moba_cp.set_layout), not attention_masks"
            )
        of_keys = getattr(masks, "cu_seq_k", None)
        if of_keys is not None and of_keys is not masks.cu_seq_q and not torch.equal(of_keys, masks.cu_seq_q):
            raise ValueError(
                "queries and keys must be the same documents, got cu_seq_q "
                f"{masks.cu_seq_q.tolist()}, cu_seq_k {of_keys.tolist()}"
            )
        host = getattr(masks, "cu_seq_q_host", None)
        return SequenceLayout.contiguous(masks.cu_seq_q.cpu() if host is None else host, 1)


_forward_outside_the_graph = outside_graphs(TitanAttention.forward)


def swap_attention(
    model: nn.Module,
    config: MoBAConfig,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    comm: str = "auto",
    layers: Iterable[str | int] | None = None,
) -> list[str]:
    """Put MoBA in the place of the inner attention of a torchtitan model's layers.

    Call it after torchtitan's `parallelize` function, which wraps the attention that it finds for torch's own context
    parallelism. Inputs stay as torchtitan shards them, by the head-tail load balancer. There are no parameters, so FSDP2,
    activation checkpointing, `torch.compile` and checkpoints are as before.

    Args:
        model: has `layers`, a dict or list of blocks with `attention.inner_attention`.
        config: of MoBA.
        group: the context-parallel mesh, `parallel_dims.get_mesh("cp")`; None where context parallelism is off.
        comm: as for `moba_attention`.
        layers: names or numbers of the layers to swap; None for all. Published models keep full attention in the last ones.

    Returns:
        Names of the layers that were swapped.

    Raises:
        TypeError: `layers` are no names or numbers.
        ValueError: there is no such layer, or a layer has no `attention.inner_attention`.
    """
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, (nn.ModuleDict, nn.ModuleList)):
        raise ValueError(f"{type(model).__name__} has no layers as torchtitan's models have")
    named = dict(blocks.named_children())
    if isinstance(layers, str) or not (layers is None or isinstance(layers, Iterable)):
        raise TypeError(f"layers must be names or numbers of layers, got {layers!r}")
    wanted = list(named) if layers is None else list(dict.fromkeys(str(layer) for layer in layers))
    if missing := [layer for layer in wanted if layer not in named]:
        raise ValueError(f"layers must be among {', '.join(named)}; got {', '.join(missing)}")
    for layer in wanted:
        if not isinstance(getattr(getattr(named[layer], "attention", None), "inner_attention", None), nn.Module):
            raise ValueError(f"layer {layer} has no attention.inner_attention")
    for layer in wanted:
        named[layer].attention.inner_attention = TitanAttention(config, group=group, comm=comm)  # type: ignore[union-attr]
    return wanted
