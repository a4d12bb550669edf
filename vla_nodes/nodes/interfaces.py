"""What each topic, service and action of the nodes is for, in a sentence: the reference pages are generated from this.

``tools/reference`` configures every node, takes types, directions and QoS from what they really create, and fails
where a name stands here that no node uses, or the other way round. Relative names, as the nodes write them.
"""

from __future__ import annotations

TOPICS: dict[str, str] = {
    "camera/color/image_raw": "The colour picture; camera_node publishes rgb8.",
    "camera/color/camera_info": "Calibration of the colour camera.",
    "camera/aligned_depth_to_color/image_raw": "Depth in the colour camera's pixels, 32FC1 [m] or 16UC1 [mm].",
    "camera/aligned_depth_to_color/camera_info": "Calibration of the depth picture: the colour camera's.",
    "camera/pose": "Pose of the colour optical frame in the robot's base frame.",
    "joint_states": "Positions and velocities of the joints, matched by name.",
    "instruction": "What the robot is to do, in words. A new text replaces the one in force.",
    "vla/active_instruction": "The instruction in force, empty for none.",
    "vla/last_instruction": "The instruction that was in force last, kept for a policy_node that is restarted.",
    "vla/action_chunk": "The actions that the policy wants carried out, with the stamp of the exposure.",
    "vla/status": "State, reason for holding, latency and counters of the policy.",
    "vla/heartbeat": "Five times a second, the name, lifecycle state and process identity of each node.",
    "vla/deadman": "True while somebody holds the deadman switch (parameter deadman_timeout).",
    "vla/preview/arm_controller/joint_trajectory": "With dry_run: the trajectory that the arm would have been sent.",
    "vla/preview/gripper_controller/joint_trajectory": "The same for the gripper's joint.",
    "arm_controller/joint_trajectory": "One timed trajectory that ends at rest, for joint_trajectory_controller.",
    "arm_controller/commands": "With output: forward_positions, joint positions at command_rate.",
    "gripper_controller/joint_trajectory": "The same for the gripper's joint.",
    "gripper_controller/commands": "The same for the gripper's joint.",
    "estop": "True stops the arm at once; false lets vla/resume release it.",
    "sim/scene": "The simulated scene as JSON; camera_node builds the world that it renders from it.",
    "sim/state": "State of the simulated world; no policy reads it.",
    "sim/task_status": "What the simulator's own judge says about the instruction, as JSON.",
    "/clock": "Simulated or recorded time.",
    "/diagnostics": "State of each node in words and numbers, once a second.",
    "/tf": "Transforms, from which the pose of a moving camera is taken (camera_pose_source: tf).",
    "/tf_static": "Transforms that do not change, the camera's pose among them (where tf2_msgs is installed).",
}

SERVICES: dict[str, str] = {
    "vla/stop": "Stop the arm and hold it until vla/resume.",
    "vla/resume": "Go on after a stop, an emergency stop or a held fault, with the next chunk.",
    "vla/record/start": "Begin an episode.",
    "vla/record/stop": "End the episode.",
    "vla/record/success": "Mark the episode a success.",
    "vla/record/failure": "Mark the episode a failure.",
    "vla/record/discard": "Mark the episode as not to be used.",
    "sim/reset": "Put the simulated scene back to where it began, or to another seed and scene if these changed.",
    "~/progress": "How far the node is, for a player in lock step; with data true it does what is due.",
}

ACTIONS: dict[str, str] = {
    "arm_controller/follow_joint_trajectory": "With output: follow_joint_trajectory, goals in place of the topic.",
    "gripper_controller/follow_joint_trajectory": "The same for the gripper's joint.",
}
