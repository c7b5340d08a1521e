"""Backbones and necks by their classes' names, whose fields that are not given have usual values."""

from functools import partial

from knet_jax.config import schema
from knet_jax.nn import necks, resnet, swin


def _values(*tables):
    return {name.rpartition(".")[2]: key.default for table in tables for name, key in table.items()}


def _make(module, usual, *args, **kwargs):
    names = [name for name in module.__dataclass_fields__ if name not in ("parent", "name")]
    usual = {"remat": False, "dtype": "float32"} | usual | dict(zip(names, args)) | kwargs
    return module(**{name: usual[name] for name in names}, name=kwargs.get("name"))


_DECODER = _values(schema.DECODER, schema.POOLING, schema.DILATED) | {"channels": 512}

ResNet = partial(_make, resnet.ResNet, _values(schema.RESNET))
Swin = partial(_make, swin.Swin, _values(schema.SWIN))
SemanticFPN = partial(_make, necks.SemanticFPN, _values(schema.SEMANTIC_FPN))
FCN = partial(_make, necks.FCN, _DECODER)
PSP = partial(_make, necks.PSP, _DECODER)
ASPP = partial(_make, necks.ASPP, _DECODER)
UPer = partial(_make, necks.UPer, _DECODER)
AuxiliaryHead = partial(_make, necks.AuxiliaryHead, _DECODER | {"channels": 256, "dropout": 0.1})
