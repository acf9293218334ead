"""GPTs with a loss in one pass over the logits, and with logits that never exist for all tokens."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from moba_cp.parallel.layout_input import positive

from . import fused
from .recompute import InChunks


class FusedLossGPT(GPTModel):
    """Megatron's ``GPTModel`` whose cross entropy reads the logits once in each direction, on GPUs.

    Megatron's own makes half a dozen fp32 copies of the logits and three collectives. It still computes the loss where the
    vocabulary is split over tensor-parallel ranks, on the CPU, and where ``cross_entropy_loss_fusion`` asks for another.
    """

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses ``[b, s]`` in fp32 of labels ``[b, s]`` and logits ``[s, b, vocabulary]``."""
        whole = self.pg_collection.tp.size() == 1 and not self.config.cross_entropy_loss_fusion
        if not whole or not fused.runs_kernels(logits):
            return super().compute_language_model_loss(labels, logits)
        return fused.cross_entropy(logits, labels.t()).t().contiguous()


class ChunkedLossGPT(FusedLossGPT):
    """Megatron's ``GPTModel`` with logits of ``loss_chunk`` tokens at a time, forward and again in backward.

    Where labels are given, the output layer runs inside the loss: a chunk's logits are made, reduced to losses and dropped, and
    made again for their gradients. Without labels (inference) it is Megatron's model. Parameters and their names are the same.

    Args:
        loss_chunk: sequence positions of a chunk of the residual stream (with sequence parallelism of this rank's part).
        others: as Megatron's model takes them.

    Raises:
        TypeError: a chunk that is no integer.
        ValueError: a chunk below 1, multi-token prediction, or MuP, which scales logits.
    """

    def __init__(self, *args: Any, loss_chunk: int, **kwargs: Any) -> None:
        positive("loss_chunk", loss_chunk)
        super().__init__(*args, **kwargs)
        self.loss_chunk = loss_chunk
        self._deferred: tuple[Tensor, Tensor | None] | None = (
            None  # output layer's arguments, between its call and the loss
        )
        self._with_labels = False
        for name in ("mtp_num_layers", "use_mup"):
            if value := getattr(self.config, name, None):
                raise ValueError(f"{name}={value} is not supported with logits in chunks")
        if self.post_process:
            self._output = self.output_layer.forward
            self.output_layer.__dict__["forward"] = self._output_or_defer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Megatron's: losses ``[b, s]`` if ``labels=`` is given, else logits or hidden states."""
        self._with_labels = kwargs.get("labels") is not None
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._with_labels, self._deferred = False, None

    def _output_or_defer(self, hidden: Tensor, weight: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Any]:
        """Stands for the output layer's forward: with labels it passes the hidden states on."""
        if not self._with_labels:
            logits, bias = self._output(hidden, weight=weight, **kwargs)
            return logits, bias
        self._deferred = (hidden, weight)
        return hidden, None

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses ``[b, s]`` of labels ``[b, s]``.

        Args:
            labels: ``[b, s]``.
            logits: logits, or the hidden states that the output layer passed on.
        """
        if self._deferred is None:
            return super().compute_language_model_loss(labels, logits)
        hidden, weight = self._deferred
        # With sequence parallelism a rank's chunk is gathered with those of the others, which lie len(hidden) rows apart.
        shards = labels.size(1) // len(hidden)
        labels_csb = labels.t().unflatten(0, (shards, -1)).transpose(0, 1)
        whole = self.output_layer.weight if weight is None else weight

        def losses(hidden: Tensor, labels_csb: Tensor) -> Tensor:
            logits, _ = self._output(hidden, weight=weight)
            labels = labels_csb.transpose(0, 1).flatten(0, 1).t()
            loss = super(ChunkedLossGPT, self).compute_language_model_loss(labels, logits)
            return loss.t().unflatten(0, (shards, -1)).transpose(0, 1)

        loss_csb = InChunks(losses, self.loss_chunk)([hidden, labels_csb], [whole])
        return loss_csb.transpose(0, 1).flatten(0, 1).t()
