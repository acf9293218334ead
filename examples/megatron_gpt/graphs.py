"""Forward and backward over a micro-batch as one CUDA graph: the host launches it once, in place of a thousand kernels.

With short micro-batches the GPU waits for the host. A graph holds every kernel of both passes, with its addresses and sizes.
It serves micro-batches of one shape and one layout, on one process. Routing is part of it: a replay selects blocks of its own.
Losses and gradients have the bits of the passes without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from .batches import MicroBatch

Passes = Callable[[Iterator[MicroBatch], int], Tensor]
"""Forward and backward over so many micro-batches: sum of losses and number of tokens, fp64 `[2]`. Where
`TransformerConfig.finalize_model_grads_func` is set, it also divides the gradients by the number of tokens."""


class MicroBatchGraph:
    """The graph of a model's passes, and the memory that it works in, which stays allocated.

    The first global batch runs without it, which compiles kernels and plans the layout. The second one captures it.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def building(self) -> Iterator[None]:
        """Where Megatron's `DistributedDataParallel` is made: gradients are added to its buffers on the stream of that moment,
        which must be the one that captures."""
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    def run(
        self,
        passes: Passes,
        model: DistributedDataParallel,
        config: TransformerConfig,
        batches: Iterator[MicroBatch],
        count: int,
    ) -> Tensor:
        """What `passes` gives for the next `count` micro-batches, with the same gradients in the model's buffers.

        Args:
            passes: the passes.
            model: of them.
            config: of the model.
            batches: micro-batches of one shape, without `packed` and `counts`.
            count: micro-batches of a global batch.
        """
        if not self._is_warm:
            self._is_warm = True
            return passes(batches, count)
        first = next(batches)
        finalize = config.finalize_model_grads_func
        graph = self._graph
        if graph is None:
            config.finalize_model_grads_func = None  # once per global batch, behind the replays
            try:
                graph = self._graph = self._capture(passes, first)
            finally:
                config.finalize_model_grads_func = finalize
        total = torch.zeros_like(self._sums)
        for number in range(count):
            self._read(first if number == 0 else next(batches))
            graph.replay()
            total += self._sums
        finalize([model], total[1].int())
        return total

    def _capture(self, passes: Passes, batch: MicroBatch) -> torch.cuda.CUDAGraph:
        """Record the passes over a copy of `batch`; nothing runs yet."""
        self._batch = MicroBatch(*(x.clone() for x in (batch.tokens, batch.labels, batch.position_ids)))
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on: the one that reads text allocates pinned memory.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._sums = passes(iter([self._batch]), 1)
        return graph

    def _read(self, batch: MicroBatch) -> None:
        for name in ("tokens", "labels", "position_ids"):
            getattr(self._batch, name).copy_(getattr(batch, name))
