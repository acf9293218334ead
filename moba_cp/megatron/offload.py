"""Layer inputs in host memory between forward and backward, copied beside the computation.

A layer's input leaves on a side stream during its forward pass, into a pinned buffer that later steps use again. In backward
it comes back while the layer behind it is computed.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import torch
from torch import Tensor

_Shape = tuple[torch.Size, torch.dtype]


class HostInputs:
    """Inputs of the layers of one process on the host.

    Args:
        device: where the layers are. On CPU the copies are plain clones.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: defaultdict[_Shape, list[Tensor]] = defaultdict(list)
        self._latest: weakref.ref[HostInput] | None = None
        self.bytes = 0
        """Bytes of all buffers, in use or not."""

    def put(self, x: Tensor, layer_number: int) -> HostInput:
        """Start copying a layer's input to the host; the device's memory is free when the copy is done and nobody else has it."""
        earlier = self._latest() if self._latest is not None else None
        if earlier is not None and earlier.layer_number != layer_number - 1:
            earlier = None
        kept = HostInput(self, x.detach(), layer_number, earlier)
        self._latest = weakref.ref(kept)
        return kept

    def take_buffer(self, x: Tensor) -> Tensor:
        """A buffer for a tensor; what the stream does with it comes after all that it did with it before."""
        free = self._buffers[x.shape, x.dtype]
        if free:
            return free.pop()
        self.bytes += x.numel() * x.element_size()
        return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=self.stream is not None)

    def give_buffer(self, buffer: Tensor) -> None:
        """Back for later inputs."""
        self._buffers[buffer.shape, buffer.dtype].append(buffer)


class HostInput:
    """One layer's input; a `recompute.Source`. Its host copy is gone after one backward pass."""

    def __init__(self, inputs: HostInputs, x: Tensor, layer_number: int, earlier: HostInput | None) -> None:
        self.layer_number = layer_number
        self._inputs = inputs
        self._earlier = weakref.ref(earlier) if earlier is not None else None
        self._device = x.device
        self._on_device: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._buffer: Tensor | None = inputs.take_buffer(x)
        stream = inputs.stream
        if stream is None:
            self._buffer.copy_(x)
            return
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self._buffer.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not given to others before the copy is done

    def get(self) -> Tensor:
        """The input on the device, and the start of the copy of the layer before, which backward needs next.

        Raises:
            RuntimeError: its backward pass is over.
        """
        self.fetch()
        assert self._on_device is not None
        if self._arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrived)
            self._arrived = None
        earlier = self._earlier() if self._earlier is not None else None
        if earlier is not None and earlier._buffer is not None:
            earlier.fetch()
        return self._on_device

    def fetch(self) -> None:
        """Start the copy to the device, unless it was started."""
        if self._on_device is not None:
            return
        if self._buffer is None:
            raise RuntimeError(
                f"layer {self.layer_number}: the input on the host is gone after one backward pass; turn offloading off to run "
                "backward again"
            )
        stream = self._inputs.stream
        self._on_device = torch.empty_like(self._buffer, device=self._device, pin_memory=False)
        if stream is None:
            self._on_device.copy_(self._buffer)
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))  # whatever used this memory before is done
        with torch.cuda.stream(stream):
            self._on_device.copy_(self._buffer, non_blocking=True)
            self._arrived = stream.record_event()
        self._on_device.record_stream(stream)

    def release(self) -> None:
        """The layer's backward pass is over: the buffer serves another input."""
        self._on_device = self._arrived = None
        if self._buffer is not None:
            self._inputs.give_buffer(self._buffer)
            self._buffer = None

    def __del__(self) -> None:
        self.release()


_of_device: dict[torch.device, HostInputs] = {}


def host_inputs(device: torch.device) -> HostInputs:
    """The process's inputs on the host for a device."""
    if device not in _of_device:
        _of_device[device] = HostInputs(device)
    return _of_device[device]
