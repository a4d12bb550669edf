"""Sizes of a policy, by preset name or by hand. What a robot and its data fix lives in the checkpoint, not here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace

from .language import LanguageConfig

PRIMITIVES = ("reach", "grasp", "lift", "move", "place", "open", "close", "hold")
CELL = 4  # pixels of the image per cell of the feature map


@dataclass(frozen=True)
class PolicyConfig:
    """Everything needed to build the network."""

    preset: str = "nano"
    image_size: int = 224  # square RGB-D input, pixels
    vision_widths: tuple[int, int, int, int] = (16, 32, 64, 128)  # channels at strides 2, 4, 8, 16
    vision_blocks: int = 1  # residual blocks at strides 8 and 16
    feature_width: int = 64  # channels of the feature map the roles look at
    free_roles: int = 2  # visual tokens beside "thing" and "goal"
    mixer: str = "mamba2"  # mamba2, mamba1, or attention (the twin, for comparison)
    d_model: int = 128
    n_layer: int = 4
    d_state: int = 32
    headdim: int = 32
    expand: int = 2
    head_width: int = 256
    horizon: int = 16  # rows of an action chunk
    action_dim: int = 7
    joints: int = 7
    language: LanguageConfig = field(default_factory=LanguageConfig)

    @property
    def cells(self) -> int:
        """Side of the square feature map."""
        return self.image_size // CELL

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> PolicyConfig:
        """ValueError names an unknown entry or one of the wrong type."""
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"policy config: unknown entry {unknown[0]!r}, known are {', '.join(sorted(known))}")
        values = dict(values)
        if "language" in values:
            values["language"] = LanguageConfig.from_dict(values["language"])
        if "vision_widths" in values:
            values["vision_widths"] = tuple(values["vision_widths"])
        config = cls(**values)
        for name, value in asdict(config).items():
            if isinstance(getattr(cls, name, None), int) and (not isinstance(value, int) or not 0 <= value <= 1 << 16):
                raise ValueError(f"policy config: {name} = {value!r} must be an integer between 0 and 65536")
        return config


PRESETS: dict[str, PolicyConfig] = {"nano": PolicyConfig()}


def preset(name: str, mixer: str | None = None) -> PolicyConfig:
    """A preset, with its core's mixer replaced when asked ("attention" gives the transformer twin)."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name] if mixer is None else replace(PRESETS[name], mixer=mixer)
