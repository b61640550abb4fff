"""The meaning of class logits, on which losses, matching and post-processing depend."""

import torch
from torch import Tensor

from .dn_components import Assignment, focal_loss, focal_term, layers_of
from .options import LossOptions


class SigmoidClasses:
    """C logits, each the probability of a class by itself, trained by the focal loss."""

    is_mean = False

    def __init__(self, focal_alpha: float = 0.25):
        self.alpha = focal_alpha

    def loss(self, assignment: Assignment) -> Tensor:
        """(L,), summed over queries and classes."""
        return focal_loss(assignment, self.alpha)

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """Logits (L, B, Q, C), image and label of N targets (N,) -> matching costs (L, N, Q): the
        focal term of the label, positive minus negative."""
        logits = logits[:, image, :, labels].transpose(0, 1).float()
        return focal_term(-logits, self.alpha) - focal_term(logits, 1 - self.alpha)

    def best(self, logits: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, Q, C) -> scores, queries and labels (B, k) of the best `number` of all (query,
        class) pairs, best first."""
        num_classes, scores = logits.shape[-1], logits.sigmoid().flatten(1)
        scores, index = scores.topk(min(number, scores.shape[1]), dim=1)
        return scores, index // num_classes, index % num_classes

    def finds_object(self, logits: Tensor) -> Tensor:
        """Logits (..., C) -> (...), bool."""
        return logits.sigmoid().amax(-1) > 0.5


class SoftmaxClasses:
    """C + 1 logits, of the classes and, last, of no object (DETR, Carion et al. 2020, section 3.1),
    trained by the cross-entropy, in which a query without object has the given weight."""

    is_mean = True

    def __init__(self, no_object_weight: float = 0.1):
        self.no_object_weight = no_object_weight

    def loss(self, assignment: Assignment) -> Tensor:
        """(L,), the weighted mean over queries."""
        log_p, weight = assignment.pred_logits.float().log_softmax(-1), self.no_object_weight
        of_none, supervised = log_p[..., -1], assignment.supervised
        supervised = torch.ones_like(of_none[0]) if supervised is None else supervised.float()
        # All queries are without object, except for those that are assigned one.
        index = layers_of(log_p), *assignment.to_label
        labelled = log_p[(*index, assignment.labels)]
        found = torch.ones_like(labelled) if assignment.found is None else assignment.found
        total = weight * (of_none * supervised).sum((1, 2))
        total = total + ((labelled - weight * of_none[index]) * found).sum(1)
        weights = weight * supervised.sum() + (1 - weight) * found.sum(1)
        return -total / weights.clamp(min=torch.finfo(weights.dtype).tiny)  # 0 without queries

    def cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """As in `SigmoidClasses`: the negated probability of the label."""
        return -logits.float().softmax(-1)[:, image, :, labels].transpose(0, 1)

    def best(self, logits: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """As in `SigmoidClasses`, but of each query only the best class."""
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, query = scores.topk(min(number, scores.shape[1]), dim=1)
        return scores, query, labels.gather(1, query)

    def finds_object(self, logits: Tensor) -> Tensor:
        """As in `SigmoidClasses`."""
        return logits.argmax(-1) < logits.shape[-1] - 1


Classes = SigmoidClasses | SoftmaxClasses


def classes_of(options: LossOptions) -> Classes:
    if options.class_loss == "softmax":
        return SoftmaxClasses(options.eos_coef)
    return SigmoidClasses(options.focal_alpha)
