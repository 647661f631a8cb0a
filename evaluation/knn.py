"""Weighted k-nearest-neighbour classification of features."""

import torch


@torch.inference_mode()
def knn_classify(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    ks: list[int],
    temperature: float,
    num_classes: int,
    chunk: int | None = None,
) -> dict[int, torch.Tensor]:
    """The five best classes of each test feature, for every k from one pass of similarities.

    The k nearest neighbours by cosine similarity vote with weight exp(similarity / temperature).
    It works on the device of ``train_features``, with room for ``chunk`` x N similarities there.

    Args:
        train_features: N x F, L2-normalised.
        train_labels: N, from 0 to ``num_classes`` - 1.
        test_features: M x F, L2-normalised.
        ks: numbers of neighbours, each from 1 to N.
        temperature: divides the similarities.
        num_classes: number of classes.
        chunk: test features at a time, by default as many as give 256 MiB of similarities, or of
            votes if there are more classes than training features.

    Returns:
        for each k the classes in falling order of votes, M x min(5, k, num_classes), on the CPU.

    Source: InstDisc (arXiv 1805.01978), section 3.4, as in DINO (arXiv 2104.14294).
    """
    count = len(train_features)
    keys = train_features.T  # FxN
    chunk = chunk or max(1, 2**26 // max(count, num_classes))
    ranked: dict[int, list[torch.Tensor]] = {k: [] for k in ks}
    for queries in test_features.split(chunk):
        similarity = queries.to(keys.device) @ keys  # mxN
        best, index = similarity.topk(max(ks), dim=1)  # sorted: the first k serve a smaller k
        labels = train_labels[index]  # mxk
        # relative to the nearest: the order stays, and no temperature overflows
        weights = ((best - best[:, :1]) / temperature).exp()
        for k in ks:
            votes = weights.new_zeros(len(queries), num_classes)
            votes.scatter_add_(1, labels[:, :k], weights[:, :k])
            # equal votes, also those of zero, rank by class number
            order = votes.sort(dim=1, descending=True, stable=True).indices
            ranked[k].append(order[:, : min(5, k, num_classes)].cpu())
    return {k: torch.cat(parts) for k, parts in ranked.items()}
