"""From pictures on their canvases to results: what evaluation and prediction share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp

from knet_jax.inference.multiscale import Pair, canvas_of, cut, join
from knet_jax.inference.resampling import ResultCanvas
from knet_jax.kernels import claim_hard
from knet_jax.knet import KNet, normalize
from knet_jax.structs import Batch, Output, Pass, Sizes, Stage


def run_rounds(
    variables: Any, batch: Batch, *, model: KNet, stages: Sequence[int] = (-1,)
) -> tuple[Stage, ...]:
    """Runs the network once on a batch of one device and returns some of its stages, or the last."""
    image = normalize(batch.image, batch.size, model.backbone.dtype)
    output = model.apply(variables, image)
    return tuple(stage_of(output, stage, model.sizes) for stage in stages)


def run_windows(
    variables: Any,
    batch: Batch,
    *,
    model: KNet,
    stages: Sequence[int] = (-1,),
    window: Pair | tuple[()] = (),
    step: Pair | tuple[()] = (),
) -> tuple[Stage, ...]:
    """Runs the network on a batch of one device, on whole pictures or window by window.

    Args:
        stages: after how many updates masks are taken; -1 is the last.
        window: height and width of a window; () shows the pictures whole.
        step: from one window to the next.

    Returns:
        Stages with the masks of whole pictures.
    """
    network = partial(run_rounds, variables, model=model, stages=stages)
    if not window:
        return network(batch)
    # One after the other: the program holds the network once, and the memory one window.
    windows = jax.tree.map(lambda *parts: jnp.stack(parts), *cut(batch, window, step))
    rounds = jax.lax.map(lambda part: [stage.masks for stage in network(part)], windows)
    whole = partial(join, canvas=batch.image.shape[1:3], window=window, step=step)
    return tuple(whole([Stage(None, each, None) for each in masks]) for masks in rounds)


def predict(
    variables: Any,
    batches: Sequence[Batch],
    mirrored: Sequence[jax.Array],
    original_size: jax.Array,
    thresholds: Mapping[str, jax.Array],
    *,
    model: KNet,
    results: Callable[..., Any],
    canvas: ResultCanvas,
    window: Pair | tuple[()] = (),
    step: Pair | tuple[()] = (),
) -> Any:
    """Computes the results of some pictures at their own size, all of it in one program.

    Args:
        batches: the same pictures in every pass, at its scale.
        mirrored: bool [b] of every pass, whether it shows them left for right.
        original_size: int32 [b, 2], height and width of the pictures, at most those of the canvas.
        thresholds: keywords of `results` that may differ from call to call.
        results: `predict` of the task; called with the passes, `original_size`, the canvas and the
            thresholds.
        canvas: static, of the results.

    Returns:
        What `results` gives: arrays with a leading axis of pictures.
    """
    passes = [
        Pass(
            *run_windows(variables, batch, model=model, window=window, step=step),
            batch.size,
            canvas_of(batch),
            flags,
        )
        for batch, flags in zip(batches, mirrored)
    ]
    return results(passes, original_size, canvas=canvas, **thresholds)


def with_kernels(results: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `predict` of a task give also the kernels of things, as the last update left them.

    Returns:
        A function of the same arguments, which gives the results and kernels [b, r, c], in the order
        of the results' `labels` [b, r].
    """

    def both(passes: Sequence[Pass], *args: Any, **options: Any) -> tuple[Any, jax.Array]:
        found = results(passes, *args, **options)
        [seen] = passes
        return found, jnp.take_along_axis(seen.stage.kernels, found.kernels[:, :, None], axis=1)

    return both


def lookahead(items: Iterable[Any]) -> Iterator[Any]:
    """Yields the same items, each after the next one has been drawn.

    What drawing an item starts, on the device or in a worker, goes on while the one before is used.
    """
    iterator = iter(items)
    drawn = list(islice(iterator, 1))
    for item in iterator:
        yield drawn.pop()
        drawn.append(item)
    yield from drawn


def stage_of(output: Output, index: int, sizes: Sizes) -> Stage:
    """Returns a stage of an output, with class logits where the task has any.

    Before the first update kernels have none: there a kernel gets the mean of the dense classes over
    the pixels that its mask claims.
    """
    stage = output.stages[index]
    if stage.logits is not None or not sizes.num_proposals:
        return stage
    classes = jax.nn.sigmoid(output.dense)
    claims = claim_hard(stage.masks).astype(classes.dtype)
    area = claims.sum((2, 3))[:, :, None]
    probs = jnp.einsum("bnhw,bkhw->bnk", claims, classes) / jnp.maximum(area, 1)
    tiny = jnp.finfo(probs.dtype).tiny
    return stage._replace(logits=jnp.log(probs + tiny) - jnp.log1p(-probs))
