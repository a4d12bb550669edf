"""A six-axis arm of the kind UR builds, written by hand: six revolute joints, no redundancy, no gripper, capsule-like
collision shapes. Lengths are those UR publishes for the UR5e's DH parameters (d1 0.1625, a2 -0.425, a3 -0.3922,
d4 0.1333, d5 0.0997, d6 0.0996 m), https://www.universal-robots.com/articles/ur/application-installation/dh-parameters."""

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3")
LIMITS = {
    "joints": {f"{name}_joint": {"acceleration": 14.0, "jerk": 700.0} for name in JOINTS},
    "tool_speed": 1.0,
    "rest": [0.0, -1.8, 1.9, -1.67, -1.57, 0.0],
}
_ORIGINS = ("0 0 0.1625", "0 0 0", "-0.425 0 0", "-0.3922 0 0.1333", "0 -0.0997 0", "0 0.0996 0")
_TURNS = ("0 0 0", "1.5707963267948966 0 0", "0 0 0", "0 0 0", "1.5707963267948966 0 0", "-1.5707963267948966 0 0")
_SHAPES = (
    '<origin xyz="0 0 -0.02"/><geometry><cylinder radius="0.06" length="0.12"/></geometry>',
    '<origin xyz="-0.2125 0 0.13" rpy="0 1.5708 0"/><geometry><cylinder radius="0.05" length="0.5"/></geometry>',
    '<origin xyz="-0.196 0 0.02" rpy="0 1.5708 0"/><geometry><cylinder radius="0.045" length="0.45"/></geometry>',
    '<geometry><sphere radius="0.04"/></geometry>',
    '<geometry><sphere radius="0.04"/></geometry>',
    '<geometry><cylinder radius="0.035" length="0.06"/></geometry>',
)


def urdf() -> str:
    """The description, as a latched robot_description would carry it."""
    text = '<robot name="six"><link name="base_link"/>'
    parent = "base_link"
    for name, origin, turn, shape in zip(JOINTS, _ORIGINS, _TURNS, _SHAPES, strict=True):
        link = f"{name}_link"
        text += (
            f'<link name="{link}"><collision>{shape}</collision></link>'
            f'<joint name="{name}_joint" type="revolute"><parent link="{parent}"/><child link="{link}"/>'
            f'<origin xyz="{origin}" rpy="{turn}"/><axis xyz="0 0 1"/>'
            '<limit lower="-6.2832" upper="6.2832" velocity="3.1416" effort="150"/></joint>'
        )
        parent = link
    return text + (
        f'<link name="tool0"/><joint name="tool" type="fixed"><parent link="{parent}"/><child link="tool0"/>'
        '<origin xyz="0 0 0"/></joint></robot>'
    )
