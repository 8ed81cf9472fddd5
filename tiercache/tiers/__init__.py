"""The tiers: host memory, and above it a device's."""

import torch

from tiercache.errors import ConfigError
from tiercache.level import Level
from tiercache.tiers.cpu import CpuTier
from tiercache.tiers.device import Device, StreamTier
from tiercache.tiers.host import HostTier

DeviceTier = CpuTier | StreamTier


def open_device_tier(name: str, level: Level, host: HostTier, most: int, device: Device | None = None) -> DeviceTier:
    """The tier above the host's, on a torch device by name; `device` in its place where that is given.

    ConfigError where the name is no device, or this machine cannot serve it: the message says what is missing.
    """
    if device is not None:
        return StreamTier(level, host, most, device)
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'device.device = {name!r}: allowed are "cuda", "cuda:1" and so on, and "cpu"') from error
    if wanted.type == "cpu":
        return CpuTier(level, host, most)
    if wanted.type != "cuda":
        raise ConfigError(f'device.device = {name!r}: allowed are "cuda", "cuda:1" and so on, and "cpu"')
    from tiercache.tiers.cuda import CudaDevice, require_cuda

    require_cuda(wanted)
    return StreamTier(level, host, most, CudaDevice(wanted))
