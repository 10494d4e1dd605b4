"""ResUNet30, the separation network of AudioSep: the mixture's STFT and a query's embedding in, the target's STFT out.

Parameter names and shapes are those of the released checkpoint: they are a file format. Upstream takes waveforms and
keeps its STFT inside; here the STFT comes from a shard, and everything between the transforms is the same function."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from audiosep.stft import MAGNITUDE_FLOOR


@dataclass(frozen=True)
class ResUNetConfig:
    """The released model by default; narrower, shallower or with several window lengths otherwise."""

    window_lengths: Annotated[
        tuple[Annotated[int, Field(gt=0, multiple_of=2)], ...],
        Field(min_length=1, description="STFT windows it takes, samples: one trunk, an input normalisation for each"),
    ] = (2048,)
    widths: Annotated[
        tuple[Annotated[int, Field(gt=0)], ...],
        Field(min_length=1, description="feature maps of each encoder block, from the input inwards"),
    ] = (32, 64, 128, 256, 384, 384)
    condition_size: Annotated[int, Field(gt=0, description="values in a query's embedding")] = 512
    num_channels: Annotated[int, Field(gt=0, description="audio channels of mixture and estimate")] = 1
    norm_momentum: Annotated[
        float,
        Field(gt=0, le=1, description="weight of a batch in the running statistics; runs below 1000 steps need more"),
    ] = 0.01

    def __post_init__(self) -> None:
        for window_length in self.window_lengths:
            if window_length // 2 % 2 ** len(self.widths):
                raise ValueError(
                    f"A window of {window_length} samples has {window_length // 2} frequency bins above 0 Hz, which "
                    f"{len(self.widths)} encoder blocks cannot halve. Use a multiple of {2 ** (len(self.widths) + 1)} "
                    "samples or fewer widths."
                )


class ResUNet30(nn.Module):
    """Estimates the described sound by a mask on the mixture's magnitude and, for complex input, a turn of its phase.

    {"stft_mixture": [B, C, T, F], "condition": [B, D]} -> {"stft_waveform": [B, C, T, F]}, magnitudes for magnitudes
    (any float type; float16 as stored is fine) and complex values for complex ones. F tells the window length."""

    def __init__(self, config: ResUNetConfig) -> None:
        super().__init__()
        self.config = config
        self.base = UNet(config)
        self.film = FiLM(self.base, config.condition_size)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.momentum = config.norm_momentum
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        last = self.base.after_conv  # for each channel: magnitude mask, real and imaginary part of the phase mask
        assert last.bias is not None
        with torch.no_grad():  # training starts with the mixture's phase; upstream's starts with a random one
            last.weight.unflatten(0, (-1, 3))[:, 1:] = 0
            last.bias.unflatten(0, (-1, 3))[:, 1] = 1
        for tensor in self.unused_parameters().values():
            tensor.requires_grad_(False)  # or DDP would wait for gradients that never come

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mixture = batch["stft_mixture"]
        film = self.film(batch["condition"].to(self.base.pre_conv.weight.dtype))
        logits = self.base(mixture.abs() if mixture.is_complex() else mixture, film)
        mask, real, imaginary = logits.unbind(2)
        mask = torch.sigmoid(mask)
        if mixture.is_complex():
            real, imaginary = torch.tanh(real), torch.tanh(imaginary)
            norm = (real.square() + imaginary.square()).clamp(min=1e-20).sqrt()
            mask = torch.complex(mask * real / norm, mask * imaginary / norm)
        return {"stft_waveform": mixture * mask}

    def unused_parameters(self) -> dict[str, nn.Parameter]:
        """What the released model carries but never uses: `bn2` of each decoder block and the FiLM layer for it."""
        unused = [f"base.decoder_block{i}.bn2" for i in range(1, len(self.config.widths) + 1)]
        unused += [f"film.decoder_block{i}->beta2" for i in range(1, len(self.config.widths) + 1)]
        return {name: tensor for name, tensor in self.named_parameters() if name.rpartition(".")[0] in unused}


class UNet(nn.Module):
    """Magnitudes [B, C, T, F] and FiLM offsets to logits [B, C, 3, T, F]: magnitude mask, real and imaginary part of
    the phase mask. Each encoder block halves frames and bins (the innermost only bins); decoder blocks double them."""

    def __init__(self, config: ResUNetConfig) -> None:
        super().__init__()
        self.depth = len(config.widths)
        self.window_lengths = config.window_lengths
        for window_length in config.window_lengths:
            norm = nn.BatchNorm1d(window_length // 2 + 1)
            self.add_module(self.input_norm_name(window_length), norm)
        outer, inner = config.widths[0], config.widths[-1]
        self.pre_conv = nn.Conv2d(config.num_channels, outer, 1)
        for i, (in_width, out_width) in enumerate(zip((outer, *config.widths), config.widths), 1):
            self.add_module(f"encoder_block{i}", EncoderBlock(in_width, out_width, _scale(i, self.depth)))
        self.add_module(f"conv_block{self.depth + 1}a", EncoderBlock(inner, inner, scale=(1, 1)))
        for i, (in_width, out_width) in enumerate(zip((inner, *config.widths[::-1]), config.widths[::-1]), 1):
            scale = _scale(self.depth + 1 - i, self.depth)
            self.add_module(f"decoder_block{i}", DecoderBlock(in_width, out_width, scale))
        self.after_conv = nn.Conv2d(outer, config.num_channels * 3, 1)

    def forward(self, magnitude: Tensor, film: Mapping[str, Tensor]) -> Tensor:
        num_frames = magnitude.shape[-2]
        x = self.normalise(magnitude)
        # The last bin is dropped and frames are added, so that both halve evenly on the way in.
        x = self.pre_conv(F.pad(x, (0, -1, 0, -num_frames % 2 ** (self.depth - 1))))
        skips = []
        for i in range(1, self.depth + 1):
            x, skip = self.get_submodule(f"encoder_block{i}")(x, film, f"encoder_block{i}")
            skips.append(skip)
        centre = f"conv_block{self.depth + 1}a"
        x, _ = self.get_submodule(centre)(x, film, centre)
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"decoder_block{i}")(x, skips.pop(), film, f"decoder_block{i}")
        logits = F.pad(self.after_conv(x)[:, :, :num_frames], (0, 1))
        return logits.to(self.pre_conv.weight.dtype).unflatten(1, (-1, 3))

    def input_norm_name(self, window_length: int) -> str:
        """`bn0`, the released name, for the first window length; the others carry their window."""
        return "bn0" if window_length == self.window_lengths[0] else f"bn0_{window_length}"

    def normalise(self, magnitude: Tensor) -> Tensor:
        """Each frequency bin to zero mean and unit variance by the normalisation of the window that has F bins."""
        window_length = 2 * (magnitude.shape[-1] - 1)
        if window_length not in self.window_lengths:
            raise ValueError(
                f"The mixture has {magnitude.shape[-1]} bins, that is a window of {window_length} samples; this model "
                f"was made for {self.window_lengths}. Give one of these windows, or train a model with this one."
            )
        x = magnitude.to(self.pre_conv.weight.dtype).clamp(min=MAGNITUDE_FLOOR)
        x = self.get_submodule(self.input_norm_name(window_length))(x.flatten(0, 2)).view(x.shape)
        if self.training:  # the other windows' parameters get zero gradients, or DDP would wait for theirs
            for other in set(self.window_lengths) - {window_length}:
                unused = self.get_submodule(self.input_norm_name(other))
                x = x + 0 * torch.cat(list(unused.parameters())).sum()
        return x


def _scale(level: int, depth: int) -> tuple[int, int]:
    """Frames and bins that become one between this encoder level and the next: the innermost keeps its frames."""
    return (1, 2) if level == depth else (2, 2)


class EncoderBlock(nn.Module):
    """Features to pooled features for the next block, and unpooled ones for the decoder block on the same level."""

    def __init__(self, in_width: int, out_width: int, scale: tuple[int, int]) -> None:
        super().__init__()
        self.conv_block1 = ConvBlock(in_width, out_width)
        self.scale = scale

    def forward(self, x: Tensor, film: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        x = self.conv_block1(x, film, f"{name}->conv_block1")
        return F.avg_pool2d(x, self.scale), x


class DecoderBlock(nn.Module):
    """Features from one level further in, upsampled and joined with the encoder's of this level."""

    def __init__(self, in_width: int, out_width: int, scale: tuple[int, int]) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.bn2 = nn.BatchNorm2d(in_width)  # in the released checkpoint, but never used
        self.conv1 = nn.ConvTranspose2d(in_width, out_width, scale, stride=scale, bias=False)
        self.conv_block2 = ConvBlock(2 * out_width, out_width)

    def forward(self, x: Tensor, skip: Tensor, film: Mapping[str, Tensor], name: str) -> Tensor:
        x = self.conv1(_activate(self.bn1(x), film[f"{name}->beta1"]))
        return self.conv_block2(torch.cat((x, skip), dim=1), film, f"{name}->conv_block2")


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation, FiLM and leaky ReLU, around a shortcut."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        if in_width != out_width:
            self.shortcut = nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor, film: Mapping[str, Tensor], name: str) -> Tensor:
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        x = self.conv1(_activate(self.bn1(x), film[f"{name}->beta1"]))
        x = self.conv2(_activate(self.bn2(x), film[f"{name}->beta2"]))
        return shortcut + x


def _activate(normalised: Tensor, beta: Tensor) -> Tensor:
    return F.leaky_relu_(normalised + beta, negative_slope=0.01)


class FiLM(nn.ModuleDict):
    """Query embeddings [B, D] to an offset [B, width, 1, 1] for each batch norm of the trunk, by the norm's place:
    `encoder_block1.conv_block1.bn1` gets `encoder_block1->conv_block1->beta1`."""

    def __init__(self, trunk: nn.Module, condition_size: int) -> None:
        norms = {name: norm for name, norm in trunk.named_modules() if isinstance(norm, nn.BatchNorm2d)}
        layers = {name: nn.Linear(condition_size, norm.num_features) for name, norm in norms.items()}
        super().__init__({name.replace(".", "->").replace("bn", "beta"): layer for name, layer in layers.items()})

    def forward(self, condition: Tensor) -> dict[str, Tensor]:
        return {name: layer(condition)[:, :, None, None] for name, layer in self.items()}
