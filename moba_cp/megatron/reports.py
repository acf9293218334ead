"""Routing and traffic reports of a model's attention layers, made on request for single forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moba_cp import MoBAReport, SequenceLayout

from .core_attention import MoBACoreAttention
from .schedule import moba_layers


@dataclass(frozen=True)
class LayerReport:
    """What one layer routed and moved in one call, and the arguments that the functions of ``moba_cp.diagnostics`` take."""

    layer_number: int
    report: MoBAReport
    layout: SequenceLayout
    group: dist.ProcessGroup | None


@contextmanager
def collect_reports(model: torch.nn.Module | Iterable[torch.nn.Module]) -> Iterator[list[LayerReport]]:
    """Collect a report of every MoBA layer and micro-batch that runs inside the ``with`` block; of nested blocks, each collects.

    A layer that Megatron recomputes in a backward pass inside the block reports that pass too.

    Making a report involves the whole context-parallel group, so all of its ranks must enter the block together.

    Args:
        model: a model, or the list of model chunks that Megatron's virtual pipeline makes.

    Example::

        with collect_reports(model) as reports, torch.no_grad():
            model(tokens, position_ids, None)
        print(diagnostics.format_report(reports[-1].report))
    """
    reports: list[LayerReport] = []

    def receive(
        core: MoBACoreAttention, report: MoBAReport, layout: SequenceLayout, group: dist.ProcessGroup | None
    ) -> None:
        reports.append(LayerReport(core.layer_number, report, layout, group))
        if (outer := before[core]) is not None:
            outer(core, report, layout, group)

    before = {layer: layer.report_to for layer in moba_layers(model)}
    for layer in before:
        layer.report_to = receive
    try:
        yield reports
    finally:
        for layer, outer in before.items():
            layer.report_to = outer
