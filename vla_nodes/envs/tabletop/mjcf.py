"""From a Scene to a MuJoCo model: the suite's own URDF plus a table, its objects and a cabinet with a drawer."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence

import mujoco
import numpy as np

from vla_nodes.envs.tabletop import scene as sc
from vla_nodes.share import share_path

TIMESTEP = 0.002  # s
ARM_JOINTS = tuple(f"panda_joint{i}" for i in range(1, 8))
FINGER_JOINTS = ("panda_finger_joint1", "panda_finger_joint2")
READY = (0.0, -0.40, 0.0, -2.30, 0.0, 1.90, 0.7853981633974483)  # tool about 0.4 m ahead, pointing down
FINGER_OPEN = 0.04  # m, travel of one finger
# Joint servo, as stiff as the real arm's position interface feels from outside.
ARM_KP, ARM_KV = (
    (4500.0, 4500.0, 3500.0, 3500.0, 2000.0, 2000.0, 2000.0),
    (450.0, 450.0, 350.0, 350.0, 200.0, 200.0, 200.0),
)
ARM_FORCE = (87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0)  # N m, the published efforts
FINGER_KP, FINGER_KV, FINGER_FORCE = 600.0, 30.0, 25.0  # N/m, N s/m, N a finger

_ROBOT, _OBJECT = 2, 1  # collision groups: robot parts never collide with each other, objects with everything


def _robot_spec() -> mujoco.MjSpec:
    """The URDF as a spec. MuJoCo drops visuals and mimic joints on import unless told, so both are handled here."""
    root = ElementTree.fromstring(share_path("config/panda/panda.urdf").read_text())
    for i, shape in enumerate([*root.iter("visual"), *root.iter("collision")]):
        shape.set("name", f"{shape.tag}{i}")
    extension = ElementTree.SubElement(root, "mujoco")
    ElementTree.SubElement(extension, "compiler", discardvisual="false", fusestatic="false")
    spec = mujoco.MjSpec.from_string(ElementTree.tostring(root, encoding="unicode"))
    for geom in spec.geoms:
        visual = geom.name.startswith("visual")
        geom.group = 1 if visual else 3
        geom.contype, geom.conaffinity = (0, 0) if visual else (_ROBOT, _OBJECT)
        if not visual:
            geom.friction, geom.condim = [1.2, 0.02, 0.0005], 4
    for body in spec.bodies:
        if body.name != "world":
            body.gravcomp = 1.0  # the arm's own controller compensates gravity
    for name in ARM_JOINTS:
        joint = spec.joint(name)
        joint.armature, joint.damping = 0.1, 1.0
    for name in FINGER_JOINTS:
        joint = spec.joint(name)
        joint.armature, joint.damping = 0.1, 5.0
    for i, name in enumerate(ARM_JOINTS):
        _servo(spec, name, ARM_KP[i], ARM_KV[i], ARM_FORCE[i])
    for name in FINGER_JOINTS:
        _servo(spec, name, FINGER_KP, FINGER_KV, FINGER_FORCE)
    equal = spec.add_equality(type=mujoco.mjtEq.mjEQ_JOINT, name1=FINGER_JOINTS[1], name2=FINGER_JOINTS[0])
    equal.data[:5] = [0, 1, 0, 0, 0]
    return spec


def _servo(spec: mujoco.MjSpec, joint: str, kp: float, kv: float, force: float) -> None:
    servo = spec.add_actuator(name=joint, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    servo.gainprm[0] = kp
    servo.biastype, servo.biasprm[:3] = mujoco.mjtBias.mjBIAS_AFFINE, [0, -kp, -kv]
    servo.forcelimited, servo.forcerange = True, [-force, force]


def build(scene: sc.Scene) -> mujoco.MjModel:
    """Compile a scene. Objects become free bodies named as people call them."""
    spec = _robot_spec()
    spec.modelname = f"vla_nodes scene {scene.seed}"
    option = spec.option
    option.timestep, option.integrator = TIMESTEP, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    option.cone, option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 10
    visual = spec.visual
    visual.quality.offsamples = 0  # software rendering: anti-aliasing doubles the cost
    visual.headlight.ambient = [0.38 * scene.brightness] * 3
    visual.headlight.diffuse = [0.25 * scene.brightness] * 3
    visual.headlight.specular = [0.0] * 3
    visual.map.znear, visual.map.zfar = 0.05, 10.0
    world = spec.worldbody
    world.add_light(
        pos=list(scene.light),
        dir=list(np.array([0.45, 0, 0]) - np.array(scene.light)),
        diffuse=[0.55 * scene.brightness] * 3,
        specular=[0.1] * 3,
        castshadow=False,
    )
    _box(world, "table", [0.40, 0.0, -0.02], [0.60, 0.65, 0.02], scene.table_rgb)
    _box(world, "floor", [0.4, 0.0, -0.80], [4.0, 4.0, 0.01], (0.33, 0.36, 0.40))
    _cabinet(world)
    for thing in scene.things:
        _BUILDERS.get(thing.kind, _shape)(_free_body(world, thing), thing)
    model = spec.compile()
    return model


def _box(
    body: mujoco.MjsBody,
    name: str | None,
    position: Sequence[float],
    half: Sequence[float],
    rgb: Sequence[float],
    mass: float | None = None,
    quat: np.ndarray | None = None,
) -> mujoco.MjsGeom:
    geom = body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=list(position), size=list(half), rgba=[*rgb, 1.0])
    return _finish(geom, name, mass, quat)


def _cylinder(
    body: mujoco.MjsBody,
    name: str | None,
    position: Sequence[float],
    radius: float,
    half_height: float,
    rgb: Sequence[float],
    mass: float | None = None,
) -> mujoco.MjsGeom:
    size = [radius, half_height, 0]
    geom = body.add_geom(type=mujoco.mjtGeom.mjGEOM_CYLINDER, pos=list(position), size=size, rgba=[*rgb, 1.0])
    return _finish(geom, name, mass, None)


def _finish(geom: mujoco.MjsGeom, name: str | None, mass: float | None, quat: np.ndarray | None) -> mujoco.MjsGeom:
    if name:
        geom.name = name
    if mass is not None:
        geom.mass = mass
    if quat is not None:
        geom.quat = list(quat)
    geom.contype, geom.conaffinity = _OBJECT, _OBJECT | _ROBOT
    geom.friction, geom.condim = [1.0, 0.02, 0.0005], 4
    return geom


def _free_body(world: mujoco.MjsBody, thing: sc.Thing) -> mujoco.MjsBody:
    height = sc.HALF_HEIGHT.get(thing.kind, 0.0) + 0.0005
    quat = [np.cos(thing.yaw / 2), 0, 0, np.sin(thing.yaw / 2)]
    body = world.add_body(name=thing.name, pos=[thing.x, thing.y, height], quat=quat)
    body.add_freejoint(name=thing.name)
    return body


def _block(body: mujoco.MjsBody, thing: sc.Thing) -> None:
    half = sc.BLOCK_SIZE / 2
    _box(body, None, (0, 0, 0), (half, half, half), thing.rgb, mass=0.05)


def _can(body: mujoco.MjsBody, thing: sc.Thing) -> None:
    _cylinder(body, None, (0, 0, 0), sc.CAN_RADIUS, sc.CAN_HEIGHT / 2, thing.rgb, mass=0.06)


def _shape(body: mujoco.MjsBody, thing: sc.Thing) -> None:
    geom, size, _ = sc.SHAPES[thing.kind]
    kind = getattr(mujoco.mjtGeom, f"mjGEOM_{geom.upper()}")
    _finish(body.add_geom(type=kind, size=list(size), rgba=[*thing.rgb, 1.0]), None, 0.05, None)


def _bowl(body: mujoco.MjsBody, thing: sc.Thing, sides: int = 14) -> None:
    """A floor and a ring of slabs leaning outward."""
    disc = _cylinder(body, None, (0, 0, 0.004), sc.BOWL_RADIUS - 0.010, 0.004, thing.rgb, mass=0.0)
    disc.contype = disc.conaffinity = 0  # seen only; flat boxes make steadier contacts than a thin cylinder
    half = (sc.BOWL_RADIUS - 0.010) * 0.75
    _box(body, None, (0, 0, 0.004), (half, half, 0.004), thing.rgb, mass=0.35)
    lean = 0.35
    half_width = sc.BOWL_RADIUS * np.tan(np.pi / sides) * 1.08
    for i in range(sides):
        angle = 2 * np.pi * i / sides
        spin, tilt = np.zeros(4), np.zeros(4)
        mujoco.mju_axisAngle2Quat(spin, np.array([0, 0, 1.0]), angle)
        mujoco.mju_axisAngle2Quat(tilt, np.array([0, 1.0, 0]), lean)
        quat = np.zeros(4)
        mujoco.mju_mulQuat(quat, spin, tilt)
        radius = sc.BOWL_RADIUS - 0.006
        position = (
            radius * np.cos(angle),
            radius * np.sin(angle),
            sc.BOWL_HEIGHT / 2 + 0.006,
        )  # only the floor touches
        _box(body, None, position, (0.003, half_width, sc.BOWL_HEIGHT / 2), thing.rgb, mass=0.015, quat=quat)


def _tray(body: mujoco.MjsBody, thing: sc.Thing) -> None:
    half_x, half_y = sc.TRAY_SIZE[0] / 2, sc.TRAY_SIZE[1] / 2
    rim = tuple(0.8 * c for c in thing.rgb)
    _box(body, None, (0, 0, 0.003), (half_x, half_y, 0.003), thing.rgb, mass=0.5)
    middle, half_z = sc.TRAY_HEIGHT / 2 + 0.001, sc.TRAY_HEIGHT / 2  # the rims stand clear of the table
    for sign in (-1, 1):
        _box(body, None, (sign * (half_x - 0.004), 0, middle), (0.004, half_y, half_z), rim, mass=0.05)
        _box(body, None, (0, sign * (half_y - 0.004), middle), (half_x, 0.004, half_z), rim, mass=0.05)


Builder = Callable[[mujoco.MjsBody, sc.Thing], None]
_BUILDERS: dict[str, Builder] = {"block": _block, "can": _can, "bowl": _bowl, "tray": _tray}

WALL = 0.008


def _cabinet(world: mujoco.MjsBody) -> None:
    """An open-fronted box on the table with one drawer that slides toward the robot; its handle is an upright fin."""
    size_x, size_y, size_z = sc.CABINET_SIZE
    x, y = sc.CABINET_POSITION
    wood, front, metal = (0.56, 0.40, 0.26), (0.66, 0.50, 0.34), (0.75, 0.76, 0.78)
    body = world.add_body(name="cabinet", pos=[x, y, 0])
    _box(body, None, (0, 0, size_z - WALL / 2), (size_x / 2, size_y / 2, WALL / 2), wood)
    _box(body, None, (size_x / 2 - WALL / 2, 0, size_z / 2), (WALL / 2, size_y / 2, size_z / 2), wood)
    for sign in (-1, 1):
        _box(body, None, (0, sign * (size_y / 2 - WALL / 2), size_z / 2), (size_x / 2, WALL / 2, size_z / 2), wood)
    drawer = body.add_body(name="drawer", pos=[0, 0, 0])
    drawer.add_joint(
        name="drawer",
        type=mujoco.mjtJoint.mjJNT_SLIDE,
        axis=[-1, 0, 0],
        range=[0, sc.DRAWER_TRAVEL],
        limited=True,
        damping=4.0,
        frictionloss=1.0,
    )
    inner_x, inner_y, height = size_x - 2 * WALL - 0.004, size_y - 2 * WALL - 0.006, size_z - WALL - 0.012
    shift = -0.004
    _box(drawer, None, (shift, 0, 0.008), (inner_x / 2, inner_y / 2, 0.004), front, mass=0.2)
    _box(
        drawer,
        "drawer front",
        (-size_x / 2 - WALL / 2, 0, height / 2 + 0.005),
        (WALL / 2, size_y / 2 - 0.002, height / 2),
        front,
        mass=0.1,
    )
    _box(drawer, None, (inner_x / 2 + shift - 0.003, 0, 0.03), (0.003, inner_y / 2, 0.022), front, mass=0.05)
    for sign in (-1, 1):
        _box(drawer, None, (shift, sign * (inner_y / 2 - 0.003), 0.03), (inner_x / 2, 0.003, 0.022), front, mass=0.05)
    _box(drawer, "drawer handle", handle_offset(), (0.022, 0.006, 0.025), metal, mass=0.03)


def handle_offset() -> tuple[float, float, float]:
    """The handle's middle relative to the cabinet's origin with the drawer shut."""
    return (-sc.CABINET_SIZE[0] / 2 - WALL - 0.022, 0.0, 0.062)
