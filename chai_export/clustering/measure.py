"""What a budget minimises."""

from __future__ import annotations

from chai_export.choice import Choice


class Measure(Choice):
    """The error curves, or the divergence that each layer alone causes in the model's logits."""

    ERROR = "error"
    KL = "kl"
