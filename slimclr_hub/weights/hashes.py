"""Hashes by which a network is recognised, whatever file its tensors came from."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn


def state_hash(model: nn.Module) -> str:
    """Hash of all tensors of a network, buffers included; it changes if and only if one of them does."""
    return tensors_hash(model.state_dict())


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
