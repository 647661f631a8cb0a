"""Mixed precision as ``AMP_OPT_LEVEL`` asks for it."""

import torch


class Precision:
    """Autocast and, for float16 only, loss scaling.

    O0 is float32. O1 and O2 are autocast to bfloat16 where the device computes in it, else to
    float16 with a GradScaler.

    Attributes:
        scaler: a GradScaler, disabled unless the type is float16.
        emulated: whether this processor computes bfloat16 by other means, slower than float32.
    """

    def __init__(self, level: str, device: torch.device) -> None:
        if level not in ("O0", "O1", "O2"):
            raise ValueError(f"level must be O0, O1 or O2, got {level!r}")
        self.device_type = device.type
        self.enabled = level != "O0"
        bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtype = torch.bfloat16 if bfloat16 else torch.float16
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.enabled and self.dtype == torch.float16
        )

        known: dict[str, bool] = (
            getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        )
        kinds = [known[name] for name in ("avx512_bf16", "amx_bf16") if name in known]
        self.emulated = self.enabled and bool(kinds) and not any(kinds)

    def autocast(self) -> torch.autocast:
        """The context for a forward pass."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled)
