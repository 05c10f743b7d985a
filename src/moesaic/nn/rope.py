"""Rotary position embedding (Su et al. 2021), half-split layout as in Llama and Hugging Face, and scalings for long contexts.

Legend: B batch, S positions, R width of what is turned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """How a model pre-trained on short contexts turns positions beyond them.

    Attributes:
        kind: "linear": all frequencies over ``factor`` (Chen et al. 2023). "dynamic": a base that grows with the length of the
            row (NTK-aware); beyond the old context a token decoded with a cache then differs from the same token in one
            forward, because the keys held were turned by the base of their time, as in Hugging Face. "yarn": only wavelengths
            that did not fit the old context, and a factor on cos and sin (Peng et al. 2023). "llama3": the same idea by
            wavelength bands (Llama 3.1).
        factor: new context over old.
        original_max_seq_len: the old context; needed by all but "linear".
        beta_fast, beta_slow, truncate: of "yarn", the turns over the old context above which a frequency stays and below which
            it is divided, and whether the bounds are rounded to whole dimensions.
        mscale, mscale_all_dim: of "yarn" in DeepSeek: cos and sin are scaled by ``m(mscale) / m(mscale_all_dim)`` with
            ``m(s) = 0.1 s ln(factor) + 1``, and attention scores by ``m(mscale_all_dim)^2`` (in latent attention).
        attention_factor: of "yarn", the factor on cos and sin; None is ``0.1 ln(factor) + 1``, or the above.
        low_freq_factor, high_freq_factor: of "llama3".
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float
    original_max_seq_len: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if not self.factor >= 1 or not math.isfinite(self.factor):
            raise ConfigError(f"rope_scaling.factor must be at least 1, not {self.factor}.")
        if self.kind != "linear" and (self.original_max_seq_len or 0) < 1:
            raise ConfigError(
                f'rope_scaling.kind="{self.kind}" needs original_max_seq_len, the context it was pre-trained with, '
                f"at least 1, not {self.original_max_seq_len}."
            )
        if self.kind == "yarn" and not self.beta_fast > self.beta_slow > 0:
            raise ConfigError(
                f"rope_scaling.beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}, and both above 0."
            )
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            raise ConfigError(
                f"rope_scaling.high_freq_factor={self.high_freq_factor} must be above low_freq_factor="
                f"{self.low_freq_factor}, and both above 0."
            )

        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ConfigError(f"rope_scaling.attention_factor must be above 0, not {self.attention_factor}.")
        try:
            usable = all(0 < scale < math.inf for scale in (self.table_scale, self.score_scale))
        except (OverflowError, ZeroDivisionError):
            usable = False
        if not usable:
            raise ConfigError(
                f"rope_scaling.mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim} must give factors above 0 that a "
                "number can hold; published ones are about 1."
            )

    def check(self, rope_dim: int, theta: float) -> None:
        """Raises ``ConfigError`` where the formula has no value for these frequencies."""
        if self.kind == "dynamic" and rope_dim <= 2:
            raise ConfigError(
                f'rope_scaling.kind="dynamic" needs more than {rope_dim} dimensions to turn; use "linear" or wider heads.'
            )
        if self.kind == "yarn" and not theta > 1:
            raise ConfigError(f'rope_scaling.kind="yarn" needs a rope_theta above 1, not {theta}.')

    @property
    def table_scale(self) -> float:
        """Factor on cos and sin."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    @property
    def score_scale(self) -> float:
        """Factor on the attention scores of latent attention."""
        return self._m(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _m(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0


def rope_frequencies(
    rope_dim: int, theta: float, scaling: RopeScaling | None, position_BS: Tensor, valid_BS: Tensor | None = None
) -> Tensor:
    """fp32 (R / 2,), or of "dynamic" (B, 1, R / 2): radians per position.

    Positions (padding aside, where ``valid_BS`` names it) only matter to "dynamic", whose base follows the longest of each row.

    The operations stand in the order Hugging Face has them, to the last bit: at position 100,000 that bit is a hundredth of a
    radian.
    """
    exponent = torch.arange(0, rope_dim, 2, device=position_BS.device, dtype=torch.float32) / rope_dim
    plain = 1.0 / theta**exponent
    if scaling is None:
        return plain
    scaling.check(rope_dim, theta)
    old, factor = scaling.original_max_seq_len or 1, scaling.factor
    if scaling.kind == "linear":
        return plain / factor
    if scaling.kind == "dynamic":
        if valid_BS is not None:
            position_BS = torch.where(valid_BS, position_BS, 0)
        length_B1 = (position_BS.amax(dim=1, keepdim=True) + 1).clamp(min=old)
        base_B1 = theta * (factor * length_B1 / old - (factor - 1)) ** (rope_dim / (rope_dim - 2))
        return 1.0 / base_B1[:, :, None] ** exponent
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / plain
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * plain / factor + smooth * plain
    # The dimension whose frequency makes so many turns over the old context.
    first, last = (
        rope_dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope_dim - 1)
    place = torch.arange(rope_dim // 2, device=position_BS.device, dtype=torch.float32)
    stays = 1 - ((place - first) / (last - first or 0.001)).clamp(0, 1)
    return 1.0 / (factor * theta**exponent) * (1 - stays) + plain * stays


def rope_tables(
    position_BS: Tensor,
    rope_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    valid_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 (B, 1, S, R), of angle ``position * frequency``; unscaled, ``theta^(-2i/R)`` for i in 0..R/2.

    The first half of sin is negative: ``rotate`` would otherwise negate half of every query and key in every layer.
    """
    angle_BSR = position_BS[:, :, None].float() * rope_frequencies(rope_dim, theta, scaling, position_BS, valid_BS)
    cos_BSR, sin_BSR = angle_BSR.cos(), angle_BSR.sin()
    if scaling is not None and scaling.table_scale != 1:
        cos_BSR, sin_BSR = cos_BSR * scaling.table_scale, sin_BSR * scaling.table_scale
    return torch.cat([cos_BSR, cos_BSR], dim=-1)[:, None], torch.cat([-sin_BSR, sin_BSR], dim=-1)[:, None]


def rotate(x_BHSR: Tensor, cos_B1SR: Tensor, sin_B1SR: Tensor) -> Tensor:
    """Rotate queries or keys (B, heads, S, R); computed in fp32, returned in the input's dtype."""
    wide = x_BHSR if x_BHSR.dtype == torch.float64 else x_BHSR.float()
    first, second = wide.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return (wide * cos_B1SR + swapped * sin_B1SR).type_as(x_BHSR)
