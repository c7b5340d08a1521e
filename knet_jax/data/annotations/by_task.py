"""The annotations of each task."""

from __future__ import annotations

from knet_jax.data.annotations.instance import InstanceKind
from knet_jax.data.annotations.panoptic import PanopticKind
from knet_jax.data.annotations.semantic import SemanticKind

KINDS = {"panoptic": PanopticKind, "instance": InstanceKind, "semantic": SemanticKind}
"""By the name of the task, `config.task`."""
