"""Two of our networks again, in plain PyTorch, with their losses: what `against_torch.py` times.

Panoptic K-Net on ResNet-50 with a feature pyramid by configs/coco_panoptic.py, and semantic K-Net with
UPerNet on ResNet-50-C by configs/ade20k_semantic.py:uper,wide. Modules have the names of ours, so that
`take_weights` gives them our weights. Written as one writes PyTorch: the 1x1 convolution of a round is
applied to the map, losses look at the kernels that have a target only, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

NUM_PROPOSALS, NUM_THINGS, NUM_STUFF = 100, 80, 53
NUM_CLASSES = 150
"""Of the semantic network."""
DEPTHS = (3, 4, 6, 3)
POOLING = (1, 2, 3, 6)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
DROPOUT = 0.1
GROUP_NORM = partial(nn.GroupNorm, 32)

upsample2x = partial(F.interpolate, scale_factor=2, mode="bilinear")


def add(module: nn.Module, **children: nn.Module) -> None:
    """Gives a module several others by name."""
    for name, child in children.items():
        module.add_module(name, child)


# Backbone and necks.


class ConvNormRelu(nn.Module):
    """Convolution without bias, norm, ReLU."""

    def __init__(self, inputs: int, channels: int, size: int, stride: int = 1, norm=GROUP_NORM):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, size, stride, size // 2, bias=False)
        self.norm = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


decoder_block = partial(ConvNormRelu, norm=nn.BatchNorm2d)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut_conv = None
        if inputs != outputs or stride != 1:
            self.shortcut_conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        y = self.norm3(self.conv3(y))
        if self.shortcut_conv:
            x = self.shortcut_norm(self.shortcut_conv(x))
        return F.relu(x + y, inplace=True)


class ResNet(nn.Module):
    """ResNet-50. Image [b, 3, H, W] -> maps at strides 4, 8, 16, 32."""

    def __init__(self, deep_stem: bool):
        super().__init__()
        stem = {"": (3, 64, 7, 2)}
        if deep_stem:
            stem = {"1": (3, 32, 3, 2), "2": (32, 32, 3, 1), "3": (32, 64, 3, 1)}
        self.stem = [*stem]
        for number, (inputs, channels, size, stride) in stem.items():
            conv = nn.Conv2d(inputs, channels, size, stride, size // 2, bias=False)
            norm = nn.BatchNorm2d(channels)
            add(self, **{f"stem_conv{number}": conv, f"stem_norm{number}": norm})
        inputs = 64
        for i, depth in enumerate(DEPTHS):
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                add(self, **{f"layer{i + 1}_block{j}": Bottleneck(inputs, 64 * 2**i, stride)})
                inputs = 4 * 64 * 2**i

    def forward(self, x: Tensor) -> list[Tensor]:
        for number in self.stem:
            conv, norm = getattr(self, f"stem_conv{number}"), getattr(self, f"stem_norm{number}")
            x = F.relu(norm(conv(x)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        levels = []
        for i, depth in enumerate(DEPTHS):
            for j in range(depth):
                x = getattr(self, f"layer{i + 1}_block{j}")(x)
            levels.append(x)
        return levels


LEVELS = (256, 512, 1024, 2048)
"""Channels of the maps of ResNet-50."""


class FPN(nn.Module):
    """Feature pyramid with nearest upsampling."""

    def __init__(self, channels: int):
        super().__init__()
        for i, inputs in enumerate(LEVELS):
            add(self, **{f"lateral{i}": nn.Conv2d(inputs, channels, 1)})
            add(self, **{f"output{i}": nn.Conv2d(channels, channels, 3, padding=1)})

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        maps = [getattr(self, f"lateral{i}")(x) for i, x in enumerate(levels)]
        for i in (2, 1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], scale_factor=2)
        return [getattr(self, f"output{i}")(x) for i, x in enumerate(maps)]


class SemanticFPN(nn.Module):
    """Levels of a feature pyramid, brought to stride 8 and summed -> two maps."""

    def __init__(self, channels: int):
        super().__init__()
        block = partial(ConvNormRelu, channels, channels)
        self.fpn = FPN(channels)
        self.level0_conv0 = block(3, 2)
        for i in (1, 2, 3):
            add(self, **{f"level{i}_conv{j}": block(3) for j in range(i)})
        add(self, localization=block(1), semantic=block(1))

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        levels = self.fpn(levels)
        levels[3] = levels[3] + sine_encoding(*levels[3].shape[1:])
        x = self.level0_conv0(levels[0])
        for i in (1, 2, 3):
            y = levels[i]
            for j in range(i):
                y = getattr(self, f"level{i}_conv{j}")(y)
                if j < i - 1:
                    y = upsample2x(y)
            x = x + y
        return self.localization(x), self.semantic(x)


@lru_cache
def sine_encoding(channels: int, height: int, width: int) -> Tensor:
    """Sine and cosine of normalized positions, the first half for rows. [channels, h, w]."""
    features = channels // 2
    wavelength = 10000.0 ** (2 * (torch.arange(features) // 2) / features)

    def encode(size: int) -> Tensor:
        position = torch.arange(1.0, size + 1)
        angle = (position / (size + 1e-6) * 2 * torch.pi)[:, None] / wavelength
        return torch.where(torch.arange(features) % 2 == 0, angle.sin(), angle.cos()).T

    rows = encode(height)[:, :, None].expand(-1, -1, width)
    columns = encode(width)[:, None].expand(-1, height, -1)
    return torch.cat([rows, columns])


class PSP(nn.Module):
    """Pyramid pooling of the coarsest level."""

    def __init__(self, channels: int):
        super().__init__()
        for i in range(len(POOLING)):
            add(self, **{f"pool{i}": decoder_block(LEVELS[-1], channels, 1)})
        self.bottleneck = decoder_block(LEVELS[-1] + len(POOLING) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for i, scale in enumerate(POOLING):
            pooled = getattr(self, f"pool{i}")(F.adaptive_avg_pool2d(x, scale))
            maps.append(resize(pooled, x.shape[2:]))
        return self.bottleneck(torch.cat(maps, 1))


class UPer(nn.Module):
    """Pyramid pooling on the coarsest level of a feature pyramid -> a map at stride 4."""

    def __init__(self, channels: int):
        super().__init__()
        for i, inputs in enumerate(LEVELS[:-1]):
            add(self, **{f"lateral{i}": decoder_block(inputs, channels, 1)})
            add(self, **{f"output{i}": decoder_block(channels, channels, 3)})
        self.psp = PSP(channels)
        self.pyramid = decoder_block(len(LEVELS) * channels, channels, 3)

    def forward(self, levels: list[Tensor]) -> Tensor:
        maps = [getattr(self, f"lateral{i}")(x) for i, x in enumerate(levels[:-1])]
        maps.append(self.psp(levels[-1]))
        for i in (2, 1, 0):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i].shape[2:])
        maps[:-1] = [getattr(self, f"output{i}")(x) for i, x in enumerate(maps[:-1])]
        return self.pyramid(torch.cat([resize(x, maps[0].shape[2:]) for x in maps], 1))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, half-pixel centers."""
    return F.interpolate(x, tuple(size), mode="bilinear")


# Kernels.


def draw(kernels: Tensor, feats: Tensor) -> Tensor:
    """Convolves feats [b, c, h, w] with kernels [b, n, c] or [n, c] -> [b, n, h, w]."""
    return torch.einsum("nc,bchw->bnhw" if kernels.ndim == 2 else "bnc,bchw->bnhw", kernels, feats)


def gather(claims: Tensor, feats: Tensor) -> Tensor:
    """Sums the features of the pixels that each mask claims, [b, n, c]."""
    return torch.einsum("bnhw,bchw->bnc", claims.to(feats.dtype), feats)


class AdaptiveUpdate(nn.Module):
    """Mixes each kernel with its own pixels, in parts of 256 channels."""

    def __init__(self, channels: int = 256):
        super().__init__()
        self.from_pixels = nn.Linear(channels, 2 * channels)
        self.from_kernel = nn.Linear(channels, 2 * channels)
        for name in ("kernel_gate", "pixel_gate", "output"):
            add(self, **{name: nn.Linear(channels, channels)})
        for name in ("kernel_gate", "pixel_gate", "pixel", "kernel", "output"):
            add(self, **{f"{name}_norm": nn.LayerNorm(channels)})
        self.channels = channels

    def forward(self, kernels: Tensor, pooled: Tensor) -> Tensor:
        shape = kernels.shape
        kernels, pooled = (x.reshape(shape[0], -1, self.channels) for x in (kernels, pooled))
        pixel_in, pixel_out = self.from_pixels(pooled).chunk(2, -1)
        kernel_in, kernel_out = self.from_kernel(kernels).chunk(2, -1)
        gate = kernel_in * pixel_in
        kernel_gate = self.kernel_gate_norm(self.kernel_gate(gate)).sigmoid()
        pixel_gate = self.pixel_gate_norm(self.pixel_gate(gate)).sigmoid()
        updated = pixel_gate * self.pixel_norm(pixel_out)
        updated = updated + kernel_gate * self.kernel_norm(kernel_out)
        return F.relu(self.output_norm(self.output(updated))).reshape(shape)


class Attention(nn.Module):
    """Self-attention of eight heads."""

    def __init__(self, channels: int):
        super().__init__()
        add(self, **{name: nn.Linear(channels, channels) for name in ("query", "key", "value")})
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = (f(x).unflatten(2, (8, -1)) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
        return self.out(attended.transpose(1, 2).flatten(2))


class Interaction(nn.Module):
    """Kernels attend to each other: self-attention, then a feed-forward network."""

    def __init__(self, channels: int):
        super().__init__()
        self.attention = Attention(channels)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.ffn_hidden, self.ffn_output = nn.Linear(channels, 2048), nn.Linear(2048, channels)

    def forward(self, kernels: Tensor) -> Tensor:
        kernels = self.attention_norm(kernels + self.attention(kernels))
        fed = self.ffn_output(F.relu(self.ffn_hidden(kernels)))
        return self.ffn_norm(kernels + fed)


class Head(nn.Module):
    """Linear layer, LayerNorm, ReLU, linear layer."""

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.hidden = nn.Linear(channels, channels, bias=False)
        self.norm, self.output = nn.LayerNorm(channels), nn.Linear(channels, features)

    def forward(self, kernels: Tensor) -> Tensor:
        return self.output(F.relu(self.norm(self.hidden(kernels))))


class Stage(NamedTuple):
    """What a round makes."""

    kernels: Tensor
    masks: Tensor
    logits: Tensor | None = None


class KernelUpdate(nn.Module):
    """One round; without classes pixels are shared by softmax, else masks claim them."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.transform = nn.Conv2d(channels, channels, 1)
        self.update, self.interaction = AdaptiveUpdate(), Interaction(channels)
        self.class_head = Head(channels, num_classes) if num_classes else None
        self.mask_head = Head(channels, channels)

    def forward(self, feats: Tensor, stage: Stage) -> Stage:
        feats = self.transform(feats)
        claims = stage.masks > 0 if self.class_head else stage.masks.softmax(1)
        kernels = self.interaction(self.update(stage.kernels, gather(claims, feats)))
        logits = self.class_head(kernels) if self.class_head else None
        return Stage(kernels, draw(self.mask_head(kernels), feats), logits)


class PanopticKernels(nn.Module):
    """Stage 0 of proposals and stuff -> (feats, stage, dense class logits)."""

    def __init__(self, channels: int):
        super().__init__()
        add(self, localization=ConvNormRelu(channels, channels, 1))
        add(self, semantic=ConvNormRelu(channels, channels, 1))
        num_classes = NUM_THINGS + NUM_STUFF
        self.proposals = nn.Parameter(torch.randn(NUM_PROPOSALS, channels))
        self.class_kernels = nn.Parameter(0.01 * torch.randn(num_classes, channels))
        self.class_bias = nn.Parameter(torch.full((num_classes,), -np.log(99)))

    def forward(self, features: tuple[Tensor, Tensor]) -> tuple[Tensor, Stage, Tensor]:
        localization, semantic = self.localization(features[0]), self.semantic(features[1])
        feats = localization + semantic
        proposal_masks = draw(self.proposals, localization)
        dense = draw(self.class_kernels, semantic) + self.class_bias[:, None, None]
        proposals = self.proposals + gather(proposal_masks > 0, feats)
        stuff = self.class_kernels[NUM_THINGS:].expand(len(feats), -1, -1)
        masks = torch.cat([proposal_masks, dense[:, NUM_THINGS:]], 1)
        return feats, Stage(torch.cat([proposals, stuff], 1), masks), dense


class ClassKernels(nn.Module):
    """The rows of a pixel classifier -> (feats, stage 0, None)."""

    def __init__(self, channels: int):
        super().__init__()
        self.class_kernels = nn.Parameter(0.01 * torch.randn(NUM_CLASSES, channels))
        self.class_bias = nn.Parameter(torch.zeros(NUM_CLASSES))
        self.dropout = nn.Dropout2d(DROPOUT)

    def forward(self, feats: Tensor) -> tuple[Tensor, Stage, None]:
        masks = draw(self.class_kernels, self.dropout(feats)) + self.class_bias[:, None, None]
        return feats, Stage(self.class_kernels.expand(len(feats), -1, -1), masks), None


class AuxiliaryHead(nn.Module):
    """A classifier of pixels on C4."""

    def __init__(self):
        super().__init__()
        self.conv, self.dropout = decoder_block(LEVELS[2], 256, 3), nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(256, NUM_CLASSES, 1)

    def forward(self, level: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.conv(level)))


class KNet(nn.Module):
    """uint8 pictures [b, H, W, 3] -> (stages, dense class logits)."""

    def __init__(self, task: str):
        super().__init__()
        if task == "panoptic":
            channels, num_classes = 256, NUM_THINGS + NUM_STUFF
            self.neck, self.initial = SemanticFPN(channels), PanopticKernels(channels)
            self.auxiliary = None
        else:
            channels, num_classes = 512, 0
            self.neck, self.initial = UPer(channels), ClassKernels(channels)
            self.auxiliary = AuxiliaryHead()
        self.backbone = ResNet(deep_stem=task != "panoptic")
        for i in (1, 2, 3):
            add(self, **{f"stage{i}": KernelUpdate(channels, num_classes)})

    def forward(self, pictures: Tensor) -> tuple[list[Stage], Tensor | None]:
        x = (pictures.float() - torch.tensor(MEAN)) / torch.tensor(STD)
        levels = self.backbone(x.permute(0, 3, 1, 2))  # channels stay last in memory
        feats, stage, dense = self.initial(self.neck(levels))
        stages = [stage]
        for i in (1, 2, 3):
            stages.append(getattr(self, f"stage{i}")(feats, stages[-1]))
        if self.auxiliary and self.training:
            dense = self.auxiliary(levels[-2])
        return stages, dense


LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
"""Names of ours that PyTorch calls otherwise."""


def take_weights(network: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Gives a network our weights, by names as "neck/fpn/lateral0/kernel".

    Raises:
        ValueError: the two do not have the same parameters, by name or shape.
    """
    wanted = {k: v for k, v in network.state_dict().items() if "num_batches_tracked" not in k}
    given = {}
    for path, array in arrays.items():
        *parents, leaf = path.replace("transform_", "transform/").split("/")
        if leaf == "kernel" and array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        elif leaf == "kernel":  # of attention with an axis for the heads
            rows = -1 if parents[-1] == "out" else array.shape[0]
            columns = array.shape[-1] if parents[-1] == "out" else -1
            array = array.reshape(rows, columns).T
        given[".".join([*parents, LEAVES.get(leaf, leaf)])] = torch.tensor(array)
    if given.keys() != wanted.keys():
        raise ValueError(f"parameters of one network only: {sorted(given.keys() ^ wanted.keys())}")
    for name, tensor in wanted.items():
        if given[name].numel() != tensor.numel():
            raise ValueError(f"{name} has the shapes {given[name].shape} and {tensor.shape}")
        tensor.copy_(given[name].reshape(tensor.shape))


# Losses of things and stuff: `knet_jax/objectives.py`, `losses.py` and `matching.py`.


class Picture(NamedTuple):
    """Segments of a picture that are there, at stride 4: things, then stuff."""

    masks: Tensor
    labels: Tensor
    num_things: int


def unpack(segment_map: Tensor, labels: Tensor, stuff_labels: Tensor) -> Picture:
    """The segments of one picture, from the map of the pixels that stride 4 averages."""
    slots = torch.cat([labels, stuff_labels])
    [present] = torch.where(slots >= 0)
    own = segment_map == (1 + present)[:, None, None]
    num_things = int((labels >= 0).sum())
    return Picture(F.avg_pool2d(own.float()[None], 2)[0], slots[present], num_things)


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid focal loss, element by element; targets are true or false."""
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    wrong = torch.where(targets, 1 - p, p)
    return torch.where(targets, 0.25, 0.75) * wrong**2 * cross_entropy


@torch.no_grad()
def match(masks: Tensor, logits: Tensor | None, picture: Picture) -> Tensor:
    """The kernel that answers for each segment of a picture."""
    m = picture.num_things
    p, t = masks[:NUM_PROPOSALS].sigmoid().flatten(1), picture.masks[:m].flatten(1)
    overlap = p @ t.T
    agreement = 2 * overlap - p.sum(1)[:, None] - t.sum(1) + p.shape[1]
    dice = 2 * overlap / ((p**2).sum(1)[:, None] + (t**2).sum(1) + 2e-3)
    cost = -WEIGHTS["mask"] * agreement / p.shape[1] - WEIGHTS["dice"] * dice
    if logits is not None:
        q = logits[:NUM_PROPOSALS].sigmoid()
        right, wrong = (1 - q) ** 2 * -(q + 1e-12).log(), q**2 * -(1 - q + 1e-12).log()
        cost = cost + WEIGHTS["label"] * (0.25 * right - 0.75 * wrong)[:, picture.labels[:m]]
    proposals, things = linear_sum_assignment(cost.numpy())
    kernels = torch.empty(m, dtype=torch.long)
    kernels[things] = torch.from_numpy(proposals)
    return torch.cat([kernels, NUM_PROPOSALS - NUM_THINGS + picture.labels[m:]])


def paint(picture: Picture, values: Tensor, order: Sequence[int]) -> Tensor:
    """A map of the values of segments, of which later ones lie above; -1 where there is none."""
    painted = torch.full(picture.masks.shape[1:], -1)
    for segment in order:
        painted[picture.masks[segment] > 0] = values[segment]
    return painted


WEIGHTS = {"mask": 1.0, "dice": 4.0, "label": 2.0, "rank": 0.1, "dense": 1.0}
SEMANTIC_WEIGHTS = {"mask": 1.0, "dense": 0.4}


def kernel_loss(stages: list[Stage], dense: Tensor, pictures: list[Picture]) -> Tensor:
    """Every loss term of things and stuff, weighted and added."""
    upsampled = [upsample2x(stage.masks) for stage in stages]
    matched = [
        [match(masks[i], None if logits is None else logits[i], p) for i, p in enumerate(pictures)]
        for masks, (_, _, logits) in zip(upsampled[:-1], stages)
    ]
    num_things = max(1, sum(p.num_things for p in pictures))
    num_segments = max(1, sum(len(p.labels) for p in pictures))
    total = torch.zeros(())

    rounds = zip(upsampled, stages, [matched[0], *matched])
    for number, (masks, (_, _, logits), kernels) in enumerate(rounds):
        which = torch.cat([torch.full_like(k, i) for i, k in enumerate(kernels)])
        own, wanted = torch.cat(kernels), torch.cat([p.masks for p in pictures])
        count = num_segments
        if number == 0:  # proposals alone
            masks, count = masks[:, :NUM_PROPOSALS], num_things
            things = own < NUM_PROPOSALS
            which, own, wanted = which[things], own[things], wanted[things]
        judged = masks[which, own]
        entropy = F.binary_cross_entropy_with_logits(judged, wanted, reduction="none")
        p = judged.sigmoid()
        areas = (p**2).sum((1, 2)) + (wanted**2).sum((1, 2)) + 2e-3
        dice = 1 - 2 * (p * wanted).sum((1, 2)) / areas
        total = total + WEIGHTS["mask"] * entropy.mean((1, 2)).sum() / count
        total = total + WEIGHTS["dice"] * dice.sum() / count

        owners = torch.stack([paint(p, k, k.argsort()) for p, k in zip(pictures, kernels)])
        if number == 0:
            things = [(p, k, k.argsort()[: p.num_things]) for p, k in zip(pictures, kernels)]
            owners = torch.stack([paint(*each) for each in things])
        rank = F.cross_entropy(masks, owners, ignore_index=-1, reduction="sum")
        total = total + WEIGHTS["rank"] * rank / owners.numel()

        if logits is not None:
            right = torch.zeros_like(logits, dtype=torch.bool)
            right[which, own, torch.cat([p.labels for p in pictures])] = True
            label = focal(
                logits[:, :NUM_PROPOSALS, :NUM_THINGS], right[:, :NUM_PROPOSALS, :NUM_THINGS]
            )
            label_of_stuff = focal(
                *(
                    x[:, NUM_PROPOSALS:, NUM_THINGS:].diagonal(dim1=1, dim2=2)
                    for x in (logits, right)
                )
            )
            label = label.sum() + label_of_stuff.sum()
            total = total + WEIGHTS["label"] * label / num_segments

    # Things lie above stuff.
    orders = [(k + 1000 * (k < NUM_PROPOSALS)).argsort() for k in matched[0]]
    classes = torch.stack([paint(p, p.labels, o) for p, o in zip(pictures, orders)])
    index = torch.arange(dense.shape[1])[:, None, None]
    each = focal(upsample2x(dense), classes[:, None] == index)
    return total + WEIGHTS["dense"] * each.sum() / max(1, int((classes >= 0).sum()))


def semantic_loss(stages: list[Stage], dense: Tensor, label_map: Tensor) -> Tensor:
    """Cross-entropy of the masks of every stage and of the auxiliary head, at full size."""
    labels = label_map.long() - 1
    total = torch.zeros(())
    weighed = [(SEMANTIC_WEIGHTS["mask"], stage.masks) for stage in stages]
    for weight, logits in [*weighed, (SEMANTIC_WEIGHTS["dense"], dense)]:
        full = resize(logits, labels.shape[1:])
        loss = F.cross_entropy(full, labels, ignore_index=-1, reduction="sum")
        total = total + weight * loss / labels.numel()
    return total


# What is timed.


def make_network(task: str, weights: Mapping[str, np.ndarray] | None) -> KNet:
    """The network of a task in the layout that is fast on CPUs, channels last."""
    network = KNet(task)
    if weights is not None:
        take_weights(network, weights)
    return network.to(memory_format=torch.channels_last)


def forward(network: KNet, pictures: np.ndarray) -> Callable[[], Tensor]:
    """A function that gives the masks of the last round."""
    network.eval()
    images = torch.from_numpy(pictures)

    @torch.inference_mode()
    def run() -> Tensor:
        stages, _ = network(images)
        return stages[-1].masks

    return run


def train(network: KNet, task: str, batch: Mapping[str, np.ndarray]) -> Callable[[], Tensor]:
    """A function that takes a training step and gives the loss before it."""
    images = torch.from_numpy(batch["image"])
    if task == "panoptic":  # statistics of the norms, the stem and the first stage are frozen
        network.eval()
        parts = (torch.from_numpy(batch[key]) for key in ("segment_map", "labels", "stuff_labels"))
        loss = partial(kernel_loss, pictures=[unpack(*each) for each in zip(*parts)])
        frozen, factor, decay = ("backbone.stem", "backbone.layer1"), 0.25, 0.05
    else:
        network.train()
        loss = partial(semantic_loss, label_map=torch.from_numpy(batch["label_map"]))
        frozen, factor, decay = (), 1.0, 5e-4
    backbone, head = [], []
    for name, parameter in network.named_parameters():
        if frozen and name.startswith(frozen):
            parameter.requires_grad_(False)
        else:
            (backbone if name.startswith("backbone.") else head).append(parameter)
    rate = 1e-7  # of the first step of the warm-up
    groups = [{"params": head}, {"params": backbone, "lr": factor * rate}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=True)

    def run() -> Tensor:
        optimizer.zero_grad()
        value = loss(*network(images))
        value.backward()
        nn.utils.clip_grad_norm_([*backbone, *head], 1.0)
        optimizer.step()
        return value.detach()

    return run
