"""Sizes of a policy, by preset name or by hand. What a robot and its data fix lives in the checkpoint, not here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace

from vla_nodes.policy.language import LanguageConfig

PRIMITIVES = ("reach", "grasp", "lift", "move", "place", "open", "close", "hold")
MOST = {"n_layer": 512, "vision_blocks": 64, "free_roles": 64, "steps": 8}  # a forged config must not build for hours
CELL = 4  # pixels of the image per cell of the feature map


@dataclass(frozen=True)
class PolicyConfig:
    """Everything needed to build the network."""

    preset: str = "nano"  # which of PRESETS these sizes are, or began as
    image_size: int = 224  # square RGB-D input, pixels
    vision_widths: tuple[int, int, int, int] = (16, 32, 64, 128)  # channels at strides 2, 4, 8, 16
    vision_blocks: int = 1  # residual blocks at strides 8 and 16
    feature_width: int = 64  # channels of the feature map the roles look at, half of them look and half shape
    free_roles: int = 2  # visual tokens beside "thing" and "goal"
    steps: int = 2  # things an instruction may ask for, one after the other
    mixer: str = "mamba2"  # mamba2, mamba1, or attention (the twin, for comparison)
    twin_of: str = "mamba2"  # what an attention core stands in for: it gets as many parameters as that one
    memory: bool = True  # carry the core's state from tick to tick; False to see what that is good for
    d_model: int = 128  # width of the core
    n_layer: int = 4  # blocks of the core
    d_state: int = 32  # state of a head, per channel
    headdim: int = 32  # channels of a head
    expand: int = 2  # inner width of a block over d_model
    head_width: int = 256
    horizon: int = 16  # rows of an action chunk
    action_dim: int = 7
    joints: int = 7
    language: LanguageConfig = field(default_factory=LanguageConfig)

    @property
    def cells(self) -> int:
        """Side of the square feature map."""
        return self.image_size // CELL

    @property
    def half_width(self) -> int:
        """Channels of the feature map that are look; as many are shape."""
        return self.feature_width // 2

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
            widths = values["vision_widths"] = tuple(values["vision_widths"])
            if len(widths) != 4 or not all(type(w) is int and 0 < w <= 1 << 14 for w in widths):
                raise ValueError(f"policy config: vision_widths = {widths!r} must be 4 integers between 1 and 16384")
        if type(values.get("memory", True)) is not bool:
            raise ValueError(f"policy config: memory = {values['memory']!r} must be true or false")
        config = cls(**values)
        for name, value in asdict(config).items():
            least, most = (0 if name in ("free_roles", "vision_blocks") else 1), MOST.get(name, 1 << 16)
            if type(getattr(cls, name, None)) is int and (type(value) is not int or not least <= value <= most):
                raise ValueError(f"policy config: {name} = {value!r} must be an integer between {least} and {most}")
        if config.feature_width % 2 or any(width % 2 for width in config.vision_widths):
            raise ValueError(f"policy config: feature_width = {config.feature_width} and vision_widths = "
                             f"{config.vision_widths} must be even: look and shape share them")  # fmt: skip
        if config.language.n_layer > MOST["n_layer"]:
            raise ValueError(f"policy config: language n_layer = {config.language.n_layer}, at most {MOST['n_layer']}")
        return config


_LARGE_LANGUAGE = LanguageConfig(embedding=512, d_model=768, n_layer=6, d_state=64, headdim=64)

PRESETS: dict[str, PolicyConfig] = {
    # The shipped one: real time on two CPU cores.
    "nano": PolicyConfig(),
    # AnoleVLA's scale (arXiv 2603.15046): the Mamba-370M core, a vision tower of about 97 M, chunks of 50 rows.
    "anole-370m": PolicyConfig(
        preset="anole-370m", vision_widths=(104, 208, 416, 832), vision_blocks=6, feature_width=256, free_roles=6,
        mixer="mamba1", d_model=1024, n_layer=48, d_state=16, headdim=64, head_width=1024, horizon=50,
        language=LanguageConfig(embedding=384, d_model=512, n_layer=4, d_state=64, headdim=64)),
    # About 2.1 billion parameters in all.
    "anole-2b": PolicyConfig(
        preset="anole-2b", vision_widths=(112, 224, 448, 896), vision_blocks=6, feature_width=384, free_roles=6,
        d_model=2560, n_layer=48, d_state=128, headdim=64, head_width=2048, horizon=50, language=_LARGE_LANGUAGE),
    # About 3 billion; the core is mamba2-2.7b's, so that backbone's public weights fit (ssm_weights.py).
    "poke-3b": PolicyConfig(
        preset="poke-3b", vision_widths=(160, 320, 640, 1280), vision_blocks=8, feature_width=512, free_roles=6,
        d_model=2560, n_layer=64, d_state=128, headdim=64, head_width=2560, horizon=50,
        language=LanguageConfig(embedding=768, d_model=1024, n_layer=6, d_state=64, headdim=64)),
}  # fmt: skip


def preset(name: str, mixer: str | None = None) -> PolicyConfig:
    """A preset, with its core's mixer replaced when asked ("attention" gives the transformer twin)."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    if mixer is None or mixer == chosen.mixer:
        return chosen
    return replace(chosen, mixer=mixer, twin_of=chosen.mixer if mixer == "attention" else chosen.twin_of)
