"""Entries of torch.hub."""

from torch import nn

from shared.networks.weights import safe_load

from . import backbones, pretrained


def entry(arch: str, weights: bool, **options) -> nn.Module:
    """A network behind the Sobel filter, without a top layer."""
    path = pretrained.fetch(arch) if weights else None
    network = backbones.build_network(arch, **{"sobel": True} | options)
    if path is not None:
        backbones.fill_network(network, safe_load(path), arch, str(path))
    return network


def deepcluster_alexnet(pretrained: bool = True, **kwargs) -> nn.Module:
    """DeepCluster: AlexNet behind a Sobel filter, 4096 dimensions (72.0 mAP on VOC 2007, fc6-8)."""
    return entry("alexnet", pretrained, **kwargs)


def deepcluster_vgg16(pretrained: bool = True, **kwargs) -> nn.Module:
    """DeepCluster: VGG16 behind a Sobel filter, 4096 dimensions."""
    return entry("vgg16", pretrained, **kwargs)


ENTRIES = {function.__name__: function for function in (deepcluster_alexnet, deepcluster_vgg16)}
