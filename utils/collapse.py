"""Whether the features still tell images apart."""

import torch

# of 1 / sqrt(dim), the standard deviation of features that are spread evenly over the sphere
COLLAPSED = 0.1


@torch.no_grad()
def similarity_figures(
    queries: tuple[torch.Tensor, ...],
    keys: tuple[torch.Tensor, ...],
    queues: tuple[torch.Tensor, ...],
) -> dict[str, torch.Tensor]:
    """How far the unit features of a batch lie apart.

    Args:
        queries: q1 and q2, (B, dim) each.
        keys: k1 and k2, (B, dim) each.
        queues: queue1 and queue2, (dim, K) each; none if the method has no queue.

    Returns:
        scalars on the device: ``negative``, the mean similarity of a query and the queue of its
        keys, or without one the keys of other images; and ``feature_std``, the standard deviation
        of the queries over the batch, averaged over the dimensions. Only what B allows: both but
        the former of a queue need two images.
    """
    figures = {}
    images = queries[0].shape[0]
    pairs = list(zip(queries, reversed(keys), strict=True))
    if queues:
        # a mean of products is the product of the means: no B x K matrix
        parts = [q.mean(0) @ n.mean(1) for q, n in zip(queries, reversed(queues), strict=True)]
        figures["negative"] = torch.stack(parts).mean()
    elif images > 1:
        parts = [(q.sum(0) @ k.sum(0) - (q * k).sum()) / (images**2 - images) for q, k in pairs]
        figures["negative"] = torch.stack(parts).mean()
    if images > 1:
        figures["feature_std"] = torch.stack([q.std(0).mean() for q in queries]).mean()
    return figures


@torch.no_grad()
def queue_spread(queues: tuple[torch.Tensor, ...]) -> float:
    """The standard deviation over the keys of a queue, (dim, K) each, averaged over dimensions."""
    return float(torch.stack([queue.std(1).mean() for queue in queues]).mean())


def collapsed(feature_std: float, dim: int) -> bool:
    """Whether features of ``dim`` dimensions are nearly the same for all images."""
    return feature_std < COLLAPSED / dim**0.5
