"""Gradients of several processes, summed in few calls: an adapter has hundreds of small ones."""

from collections.abc import Callable, Collection, Iterator
from itertools import groupby

import torch
from torch import Tensor, nn

BUCKET = 2**25  # bytes of gradients that are summed in one call


def add_up(parameters: Collection[nn.Parameter], reduce: Callable[[Tensor], Tensor]) -> None:
    """Sum the gradients over processes, whose one may have none where another has.

    Args:
        reduce: sums a tensor over the processes.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in buckets([parameter.grad for parameter in parameters], BUCKET):
        summed = reduce(torch.cat([gradient.flatten() for gradient in bucket]))
        parts = summed.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def buckets(tensors: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Tensors of one dtype that follow each other, up to `size` bytes together, a larger one alone."""
    for _, alike in groupby(tensors, key=lambda tensor: tensor.dtype):
        bucket: list[Tensor] = []
        for tensor in alike:
            if bucket and sum(each.nbytes for each in bucket) + tensor.nbytes > size:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket
