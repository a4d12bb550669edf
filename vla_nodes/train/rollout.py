"""Executes chunks in the simulated world without ROS."""
import mujoco
import numpy as np

from vla_nodes.sim import builder


class Rollout:
    def __init__(s, world):
        s.w = world
        s.m = world.model
        s.d = mujoco.MjData(s.m)
        s.tool = s.m.body("panda_hand_tcp").id
        s.qi = world._qpos[:7]
        s.vi = world._dof[:7]
        s._sync()

    def _sync(s):
        s.q = s.w.data.qpos[s.qi].copy()
        s.finger = float(s.w.data.qpos[s.w._qpos[7]])
        s.ref = s.w.tool_pose()[:3, 3].copy()
        s.velocity = np.zeros(3)

    def _ik(s, p, q, iters):
        s.d.qpos[:] = s.w.data.qpos
        for _ in range(iters):
            s.d.qpos[s.qi] = q
            mujoco.mj_kinematics(s.m, s.d)
            mujoco.mj_comPos(s.m, s.d)
            J = np.zeros((6, s.m.nv))
            mujoco.mj_jacBody(s.m, s.d, J[:3], J[3:], s.tool)
            J = J[:, s.vi]
            D = np.diag([1, -1, -1.0]) @ s.d.xmat[s.tool].reshape(3, 3).T
            w = np.array([D[2, 1] - D[1, 2], D[0, 2] - D[2, 0], D[1, 0] - D[0, 1]]) / 2
            e = np.r_[p - s.d.xpos[s.tool], w]
            n = np.eye(7) - J.T @ np.linalg.solve(J @ J.T + 1e-6 * np.eye(6), J)
            q = q + J.T @ np.linalg.solve(J @ J.T + 1e-4 * np.eye(6), e) + 0.02 * n @ (np.array(builder.READY) - q)
        return q

    def place(s, p, opening):
        q = s._ik(np.asarray(p), np.array(builder.READY), 60)
        s.w.place_robot(q, opening * builder.FINGER_OPEN)
        s._sync()

    def execute(s, chunk, duration, dt=0.01, period=0.05):
        p0 = s.w.tool_pose()[:3, 3]
        rows = np.vstack([p0, p0 + np.cumsum(chunk[:, :3], 0)])
        off = s.ref - p0
        n = int(round(duration / dt))
        for i in range(1, n + 1):
            t = i * dt
            k = min(int(t / period), len(rows) - 2)
            f = t / period - k
            p = rows[k] * (1 - f) + rows[k + 1] * f + off * max(0, 1 - t / 0.2)
            p[2] = max(p[2], 0.008)
            s.velocity = (p - s.ref) / dt
            s.ref = p
            q = s._ik(p, s.q, 2)
            qd = np.clip((q - s.q) / dt, -2.0, 2.0)
            s.q = s.q + qd * dt
            g = chunk[min(k, len(chunk) - 1), 6] * 0.04
            s.finger += np.clip(g - s.finger, -0.2 * dt, 0.2 * dt)
            s.w.set_reference(s.q, qd, s.finger)
            s.w.advance(dt)
