"""Sizes of a policy, by preset name or by hand. What a robot and its data fix is in the contract (contract.py)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from vla_nodes.policy.language import LanguageConfig

PRIMITIVES = ("reach", "grasp", "lift", "move", "place", "open", "close", "hold")
MOST = {"n_layer": 512, "vision_blocks": 64, "free_queries": 64, "steps": 8}  # a forged config must not build for hours
LEAST = {"free_queries": 0, "vision_blocks": 0}
CELL = 4  # pixels of the image per cell of the feature map
GROUNDINGS = ("targets", "none")


@dataclass(frozen=True)
class SpaceConfig:
    """The places and distances of a task family, so that what enters the network is of order one. m, base frame."""

    center: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of where the robot works
    size: float = 0.25  # of it; positions enter as (position - center) / size
    ground_height: float | None = None  # z where a pixel without depth is taken to lie; None: nowhere
    ray_length: float = 3.0  # longest ray to that ground
    height_scale: float = 0.05  # heights that tell one object from another
    near: float = 0.10  # unit of distances from the tool
    fine: float = 0.03  # unit in which places are told apart
    tool_probes: tuple[tuple[float, float, float], ...] = ((0.0, 0.0, 0.0),)  # added to the tool point: looked at

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SpaceConfig:
        """ValueError names an entry that is unknown or not made of numbers."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"policy config: space: unknown entry {unknown[0]!r}, known are {', '.join(sorted(known))}"
            )
        made: dict[str, Any] = {}
        try:
            for name, value in values.items():
                if name == "center":
                    made[name] = _point(value)
                elif name == "tool_probes":
                    made[name] = tuple(_point(point) for point in value)
                else:
                    made[name] = None if value is None and name == "ground_height" else float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"policy config: space: {error}") from None
        space = cls(**made)
        if min(space.size, space.ray_length, space.height_scale, space.near, space.fine) <= 0:
            raise ValueError("policy config: space: every length must be above 0")
        if len(space.tool_probes) > 16:
            raise ValueError(f"policy config: space: {len(space.tool_probes)} tool_probes, at most 16")
        return space


def _point(values: Any) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z


@dataclass(frozen=True)
class PolicyConfig:
    """Everything needed to build the network, beside the contract."""

    preset: str = "nano"  # which of PRESETS these sizes are, or began as
    image_size: int = 224  # square RGB-D input, pixels
    vision_widths: tuple[int, int, int, int] = (16, 32, 64, 128)  # channels at strides 2, 4, 8, 16
    vision_blocks: int = 1  # residual blocks at strides 8 and 16
    feature_width: int = 64  # channels of the feature map, half of them appearance and half category
    grounding: str = "targets"  # targets: a target and a reference object that words name (see modeling.py); none
    free_queries: int = 2  # image tokens whose queries come from the whole sentence; the shipped policy's are untrained
    steps: int = 2  # things an instruction may ask for, one after the other
    primitives: tuple[str, ...] = PRIMITIVES  # of motion, whose decoders the chunk head mixes; () where none are named
    visibility_odds: float = 20.0  # what a query found counts by these odds more than its attention says
    mixer: str = "mamba2"  # mamba2, mamba1, or attention (the twin, for comparison)
    twin_of: str = "mamba2"  # what an attention core stands in for: it gets as many parameters as that one
    memory: bool = True  # carry the core's state from tick to tick; False to see what that is good for
    d_model: int = 128  # width of the core
    n_layer: int = 4  # blocks of the core
    d_state: int = 32  # state of a head, per channel
    headdim: int = 32  # channels of a head
    expand: int = 2  # inner width of a block over d_model
    head_width: int = 256  # of the chunk head's layers
    space: SpaceConfig = field(default_factory=SpaceConfig)  # places and distances of the tasks
    language: LanguageConfig = field(default_factory=LanguageConfig)  # the instruction encoder

    @property
    def cells(self) -> int:
        """Side of the square feature map."""
        return self.image_size // CELL

    @property
    def half_width(self) -> int:
        """Channels of the feature map that are appearance; as many are category."""
        return self.feature_width // 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PolicyConfig:
        """ValueError names an unknown entry or one of the wrong type."""
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"policy config: unknown entry {unknown[0]!r}, known are {', '.join(sorted(known))}")
        values = dict(values)
        if "language" in values:
            values["language"] = LanguageConfig.from_dict(values["language"])
        if "space" in values:
            values["space"] = SpaceConfig.from_dict(values["space"])
        if "vision_widths" in values:
            widths = values["vision_widths"] = tuple(values["vision_widths"])
            if len(widths) != 4 or not all(type(w) is int and 0 < w <= 1 << 14 for w in widths):
                raise ValueError(f"policy config: vision_widths = {widths!r} must be 4 integers between 1 and 16384")
        if "primitives" in values:
            names = values["primitives"] = tuple(values["primitives"])
            if len(names) > 64 or not all(type(name) is str and 0 < len(name) <= 64 for name in names):
                raise ValueError("policy config: primitives must be at most 64 names")
        if type(values.get("memory", True)) is not bool:
            raise ValueError(f"policy config: memory = {values['memory']!r} must be true or false")
        odds = values.get("visibility_odds", 1.0)
        if type(odds) not in (int, float) or not 0 < odds <= 1e6:
            raise ValueError(f"policy config: visibility_odds = {odds!r} must be a number above 0")
        config = cls(**values)
        if config.grounding not in GROUNDINGS:
            raise ValueError(f"policy config: grounding = {config.grounding!r} is none of {', '.join(GROUNDINGS)}")
        for name, value in asdict(config).items():
            least, most = LEAST.get(name, 1), MOST.get(name, 1 << 16)
            if type(getattr(cls, name, None)) is int and (type(value) is not int or not least <= value <= most):
                raise ValueError(f"policy config: {name} = {value!r} must be an integer between {least} and {most}")
        if config.grounding == "none" and not config.free_queries:
            raise ValueError("policy config: without a grounding, free_queries must be at least 1")
        if config.feature_width % 2 or any(width % 2 for width in config.vision_widths):
            raise ValueError(f"policy config: feature_width = {config.feature_width} and vision_widths = "
                             f"{config.vision_widths} must be even: appearance and category share them")  # fmt: skip
        if config.language.n_layer > MOST["n_layer"]:
            raise ValueError(f"policy config: language n_layer = {config.language.n_layer}, at most {MOST['n_layer']}")
        return config


_LARGE_LANGUAGE = LanguageConfig(embedding=512, d_model=768, n_layer=6, d_state=64, headdim=64)

PRESETS: dict[str, PolicyConfig] = {
    # The shipped one: real time on two CPU cores.
    "nano": PolicyConfig(),
    # The same for any arm, cameras and task that somebody demonstrates: nothing has to be named or labelled.
    "nano-general": PolicyConfig(preset="nano-general", grounding="none", free_queries=6, steps=1, primitives=()),
    # AnoleVLA's scale (arXiv 2603.15046): the Mamba-370M core and a vision tower of about 97 M.
    "mamba1-370m": PolicyConfig(
        preset="mamba1-370m", vision_widths=(104, 208, 416, 832), vision_blocks=6, feature_width=256, free_queries=6,
        mixer="mamba1", d_model=1024, n_layer=48, d_state=16, headdim=64, head_width=1024,
        language=LanguageConfig(embedding=384, d_model=512, n_layer=4, d_state=64, headdim=64)),
    # About 2.1 billion parameters in all.
    "mamba2-2b": PolicyConfig(
        preset="mamba2-2b", vision_widths=(112, 224, 448, 896), vision_blocks=6, feature_width=384, free_queries=6,
        d_model=2560, n_layer=48, d_state=128, headdim=64, head_width=2048, language=_LARGE_LANGUAGE),
    # About 3 billion; the core is mamba2-2.7b's, so that backbone's public weights fit (mamba/pretrained.py).
    "mamba2-3b": PolicyConfig(
        preset="mamba2-3b", vision_widths=(160, 320, 640, 1280), vision_blocks=8, feature_width=512, free_queries=6,
        d_model=2560, n_layer=64, d_state=128, headdim=64, head_width=2560,
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
