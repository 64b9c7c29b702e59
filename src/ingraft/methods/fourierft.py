"""FourierFT: a few coefficients of the change's discrete Fourier transform, at places drawn once.

    W' = W + s Re(IDFT2(F)),    F (out, in) holds c_1 ... c_n at n places and zero elsewhere

Paper: Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", ICML 2024 (arXiv:2405.03003), equations 2-4.
Read against: Hugging Face PEFT's `fourierft` (places, their order, scale).
What differs: c starts at zero, so that a fresh adapter is the identity (PEFT's default start is random); linear layers transform the input, mix a
quarter of the frequencies and transform back, instead of building the change; where it is built, from half of a Hermitian spectrum.

Legend: O out, I in, N places, K = O // 2 + 1 and J = I // 2 + 1 frequencies of a real transform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Method, PeftLayout, ShortcutPart, Site, SiteFacts, fresh
from ingraft.methods.pattern import PatternedConfig
from ingraft.methods.pieces import recomputed, used


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(PatternedConfig):
    """FourierFT's hyperparameters.

    Attributes:
        n_frequency: how many coefficients a layer has, at most out x in.
        n_frequency_pattern: other numbers by the end of the module's path (a regular expression), the first that matches.
        scaling: factor on the change.
        random_loc_seed: seed of the places; layers of one shape share them.
        init_weights: True: coefficients zero; False: standard normal.
    """

    method: ClassVar[str] = "fourierft"
    patterns: ClassVar[Mapping[str, str]] = {"n_frequency_pattern": "n_frequency"}

    n_frequency: int = 1000
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    scaling: float = 150.0
    random_loc_seed: int = 777
    init_weights: bool = True

    def problems(self) -> list[str]:
        return super().problems() + self.below_one("n_frequency_pattern")


class FourierFT(ShortcutPart):
    """See the file's header."""

    additive = True
    kinds = frozenset({"linear", "conv1d-transposed"})

    places: Tensor
    """Row and column of every coefficient, (2, N)."""

    def __init__(self, config: FourierFTConfig, facts: SiteFacts) -> None:
        super().__init__()
        W_OI = facts.matrix()
        self.shape, self.scale = W_OI.shape, config.scaling
        generator = torch.Generator().manual_seed(config.random_loc_seed)
        chosen_N = torch.randperm(W_OI.numel(), generator=generator)[: config.n_frequency]
        places = torch.stack([chosen_N // W_OI.shape[1], chosen_N % W_OI.shape[1]]).to(W_OI.device)
        self.register_buffer("places", places, persistent=False)
        self.fourierft_spectrum = fresh(config.n_frequency, like=W_OI)
        (nn.init.zeros_ if config.init_weights else nn.init.normal_)(self.fourierft_spectrum)

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # The real part of a transform is the transform of the Hermitian half: every coefficient in halves, at its place and at the opposite one.
        (high, wide), (i_N, j_N) = self.shape, self.places
        c_N = 0.5 * self.scale * used(self.fourierft_spectrum, W.dtype)
        rows, columns = torch.cat([i_N, -i_N % high]), torch.cat([j_N, -j_N % wide])
        kept = columns <= wide // 2
        half_OJ = c_N.new_zeros(high, wide // 2 + 1).index_put(
            (rows[kept], columns[kept]), c_N.repeat(2)[kept], accumulate=True
        )
        return (W.float() + torch.fft.irfft2(half_OJ.to(torch.complex64), s=(high, wide))).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if not x.numel():  # no transform takes an empty batch
            return y + 0 * self.fourierft_spectrum.sum().to(y.dtype)
        return y + recomputed(self._branch, x, self.fourierft_spectrum).to(y.dtype)

    def _branch(self, x: Tensor, spectrum_N: Tensor) -> Tensor:
        """The change times x: cosines of x to cosines of y, sines to sines, each frequency folded onto its real half."""
        (high, wide), (i_N, j_N) = self.shape, self.places
        c_N = self.scale / wide * used(spectrum_N, x.dtype)
        alone = (i_N == 0) | (2 * i_N == high)  # frequencies that are their own mirror image
        c_N = torch.where(alone, c_N, 0.5 * c_N)
        turned = torch.where((2 * i_N > high) == (2 * j_N > wide), -1.0, 1.0)
        rows_K, rows_J = torch.minimum(i_N, high - i_N), torch.minimum(j_N, wide - j_N)
        with torch.autocast(x.device.type, enabled=False):  # transforms know float32 alone
            # A row for every frequency, so that picking and adding move whole rows; cosines and sines lie side by side in the last dimension.
            x_JX = torch.fft.rfft(x.float().reshape(-1, wide)).T.contiguous()
            picked_NX2 = (
                torch.view_as_real(x_JX).index_select(0, rows_J) * torch.stack([c_N, turned * c_N], -1)[:, None]
            )
            y_KX2 = picked_NX2.new_zeros(high // 2 + 1, *picked_NX2.shape[1:]).index_add(0, rows_K, picked_NX2)
            y_XO = torch.fft.irfft(torch.view_as_complex(y_KX2).T, n=high)
        return y_XO.reshape(*x.shape[:-1], high)


def refuses(config: FourierFTConfig, facts: SiteFacts) -> str | None:
    """More coefficients than the weight has."""
    size = facts.shape[0] * facts.shape[1]
    if config.n_frequency <= size:
        return None
    return f"fourierft: {facts.path}: n_frequency = {config.n_frequency}, but the layer has {size} frequencies. Lower it, or name this module in n_frequency_pattern."


def count(config: FourierFTConfig, _: SiteFacts) -> int:
    """n_frequency."""
    return config.n_frequency


METHOD = Method(
    name="fourierft",
    config=FourierFTConfig,
    part=FourierFT,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=PeftLayout(
        peft_type="FOURIERFT",
        kinds=frozenset({"linear", "conv1d-transposed"}),
        accepted={"bias": ("none",)},
        written={"bias": "none"},
        transposed_field="fan_in_fan_out",
    ),
)
