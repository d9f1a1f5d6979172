"""CUDA graph replay against eager calls of each row alone, with other data than was captured. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from bidispatch.verify.compare import Tally
from bidispatch.verify.report import Check
from bidispatch.verify.subject import Subject, Trial, tally_trial

__all__ = ["check_graphs"]


def check_graphs(subject: Subject, groups: Iterable[Sequence[Trial]], binding: str = "") -> Check:
    """Capture the first trial of each group; replay the graph with the data of every trial of the group.

    The trials of a group have tensors of the same shapes. binding: how the subject is bound, where that tells it apart.
    """
    tally = Tally("CUDA graph replay" + (f", {binding}" if binding else ""), subject.output_names)
    for trials in groups:
        _replay(subject, trials, tally)
    return tally.check()


def _replay(subject: Subject, trials: Sequence[Trial], tally: Tally) -> None:
    first = trials[0]
    buffers = [None if tensor is None else tensor.clone() for tensor in first.arguments]
    canvas = subject.canvas(first)
    stream = torch.cuda.Stream(subject.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(subject.device))
    with torch.cuda.stream(stream):
        subject.call(buffers, canvas.outputs)  # kernels compile and load here, which a capture does not allow
    torch.cuda.current_stream(subject.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        subject.call(buffers, canvas.outputs)
    for trial in [*trials[1:], first]:
        for buffer, tensor in zip(buffers, trial.arguments, strict=True):
            if buffer is not None and tensor is not None:
                buffer.copy_(tensor)
        canvas.repaint()
        graph.replay()
        tally_trial(tally, canvas, trial)
