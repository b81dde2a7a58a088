"""Which device to compute on, and in which dtype it multiplies fastest."""

import torch


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device called `device`; "auto" is CUDA where there is one, else the processor.

    Apple's MPS is used only when it is asked for by name, since it lacks float64, in which
    metrics are summed.

    Raises:
        ValueError: The name means no device, or this machine or this build of torch lacks it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} is no device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."
        ) from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r} asks for a GPU, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} of them. Check the driver, or that torch was "
            "installed with CUDA; 'auto' falls back to the processor."
        )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={device!r} asks for Apple's MPS, which this machine lacks.")
    return resolved


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` has instructions that multiply it, else float32.

    That is AVX-512 BF16 or AMX on a processor, and compute capability 8.0 (Ampere) on a
    GPU. Elsewhere bfloat16 is emulated, and slower than float32.
    """
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
        )
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32
