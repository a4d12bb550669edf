"""The vision-language-action model: RGB-D, proprioception and an instruction in, an action chunk out, history in a
state.

Every control tick becomes a few tokens, in AnoleVLA's order (arXiv 2603.15046): the robot's state, its change, what is
at the tool, what each role sees, and the instruction last, from whose output the chunk is read. The selective state
space core carries its state from tick to tick, so a tick costs the same however long the robot has been running.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vla_nodes.policy.configuration import PolicyConfig
from vla_nodes.policy.geometry import WORKSPACE_CENTRE, WORKSPACE_SIZE, centred
from vla_nodes.policy.head import ChunkHead, Judge
from vla_nodes.policy.language import EncodedText, InstructionEncoder
from vla_nodes.policy.mamba.mixers import SequenceCore
from vla_nodes.policy.vision import TOOL_PROBES, RoleQueries, Scan, Vision, unit

NEARBY = 0.10  # m; distances to the roles enter in this unit
FINE = 0.03  # m; "next to" changes sides within a centimetre
FAITH = 20.0  # the odds that a role found something, as the hand takes them, to those that its attention gives
MOVE_SCALE, TURN_SCALE = 0.016, 0.05  # m and rad per row that a normalised action of 1 stands for
STATE_WIDTH = 17  # tool position 3, rotation 6 (its first two columns), gripper 1, joints 7
CHANGE_WIDTH = 11  # tool velocity 3, gripper rate 1, joint velocities 7


class Prepared(NamedTuple):
    """One step of an instruction, encoded once and used at every tick."""

    queries: Tensor  # (B, R, C)
    summary: Tensor  # (B, W)


class Instruction(NamedTuple):
    """All an instruction asks for, one step after the other."""

    queries: Tensor  # (B, K, R, C)
    summary: Tensor  # (B, K, W)
    wanted: Tensor  # (B, K) logit that there is such a step; the first always is

    def at(self, step: int | Tensor) -> Prepared:
        """The given step of every row; a tensor (B,) takes each row's own."""
        rows = torch.arange(len(self.queries), device=self.queries.device)
        return Prepared(self.queries[rows, step], self.summary[rows, step])


class Proprioception(NamedTuple):
    """The robot's own state: the raw vectors that tokens are made of."""

    state: Tensor  # (..., STATE_WIDTH)
    change: Tensor  # (..., CHANGE_WIDTH)


def proprioception(ee_pose: Tensor, gripper: Tensor, joints: Tensor, joint_velocities: Tensor, tool_velocity: Tensor,
                   gripper_rate: Tensor) -> Proprioception:  # fmt: skip
    """ee_pose (..., 4, 4), gripper (...) 0..1, joints (..., 7) rad, velocities m/s, rad/s, 1/s."""
    position = centred(ee_pose[..., :3, 3])
    rotation = ee_pose[..., :3, :2].transpose(-1, -2).flatten(-2)
    state = torch.cat([position, rotation, 2 * gripper.unsqueeze(-1) - 1, joints / 2], -1)
    change = torch.cat([tool_velocity / 0.2, gripper_rate.unsqueeze(-1) / 4, joint_velocities], -1)
    return Proprioception(state, change)


class TickOutput(NamedTuple):
    """What a tick gives: in normalised units inside the model, see `physical`."""

    actions: Tensor  # (..., H, A)
    primitive: Tensor  # (..., P) logits
    grounding: Tensor  # (...,) logit that all the instruction names is in view and understood
    target: Tensor  # (..., 3) where the thing's middle is, m in base
    done: Tensor  # (...,) logit that the current step is done and the hand clear of it


class VisualTokens(NamedTuple):
    """The compressed view of one tick; small enough to cache, so the core can be trained without the images."""

    features: Tensor  # (..., R, C)
    points: Tensor  # (..., R, 3) m in base, corrected from the visible surface to the middle
    mass: Tensor  # (..., R)
    spread: Tensor  # (..., R)
    tool: Tensor  # (..., T)
    aim: Tensor  # (..., 3) where the thing is to be put, m in base
    grounding: Tensor  # (...,) logit


def shape_of(features: Tensor) -> Tensor:
    """The half of features of the map (..., C) that does not come of colours (`RgbdEncoder`): (..., C / 2)."""
    return features.chunk(2, -1)[1]


class VlaPolicy(nn.Module):
    def __init__(self, config: PolicyConfig, tokenizer=None) -> None:
        super().__init__()
        self.config = config
        width, d = config.feature_width, config.d_model
        self.language = InstructionEncoder(config.language, tokenizer)
        self.roles = RoleQueries(config)
        self.vision = Vision(config)
        self.middle = nn.Linear(width, 3)  # from a visible surface to the middle of the thing, m
        nn.init.zeros_(self.middle.weight)
        # From the goal to where the thing's middle goes: the relation in space that the words name.
        self.offset = nn.Sequential(
            nn.Linear(config.language.d_model + 3, 128), nn.SiLU(),
            nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 3))  # fmt: skip
        self.judge = Judge(config)
        self.embed_state, self.embed_change = nn.Linear(STATE_WIDTH, d), nn.Linear(CHANGE_WIDTH, d)
        # Colours have done their work when a thing is found: to move it, only shapes count (see `shape_of`). A thing of
        # a colour that its kind never had is then moved like any other.
        self.embed_tool = nn.Linear(len(TOOL_PROBES) * config.half_width, d)
        self.embed_view = nn.Linear(config.half_width + 8, d)
        self.embed_summary = nn.Linear(config.language.d_model + 6, d)
        self.kind = nn.Parameter(torch.randn(self.tokens, d) * 0.02)
        self.core = SequenceCore(d, config.n_layer, config.mixer, config.d_state, config.headdim, config.expand,
                                 twin_of=config.twin_of)  # fmt: skip
        self.head = ChunkHead(config, geometry=3 * 3 + 2 + 4 + CHANGE_WIDTH)

    @property
    def tokens(self) -> int:
        """Tokens of one tick."""
        return 4 + 2 + self.config.free_roles

    # -- once per instruction --------------------------------------------------------------------------------------
    def prepare(self, text: EncodedText) -> Instruction:
        return Instruction(*self.roles(text))

    # -- once per image ---------------------------------------------------------------------------------------------
    def look(self, color: Tensor, depth: Tensor, intrinsics: Tensor, camera_pose: Tensor, tool: Tensor,
             prepared: Prepared) -> tuple[VisualTokens, Scan]:  # fmt: skip
        """One image a row: color (B, 3, S, S) 0..1, depth (B, S, S) m with 0 = invalid, tool (B, 3) m in base."""
        scan = self.vision(color, depth, intrinsics, camera_pose, tool, prepared.queries)
        points = scan.points + self.middle(scan.seen)
        grounding = self.judge(self.evidence(scan, points, prepared.summary)).squeeze(-1)
        aim = self.aim(points[:, 1], prepared.summary)
        return VisualTokens(scan.seen, points, scan.mass, scan.spread, scan.tool, aim, grounding), scan

    def evidence(self, scan: Scan, points: Tensor, summary: Tensor) -> Tensor:
        """What is judged by (B, J): of thing and goal what was found, what was asked for and how they agree, first the
        look of each and then its shape; how much was found and where; and what the step says.
        """
        seen = unit(scan.seen, 2)
        named = torch.stack([seen, scan.queries, seen * scan.queries], 2)[:, :2]  # (B, role, 3, C)
        halves = named.unflatten(3, (2, -1)).transpose(2, 3)  # (B, role, half, 3, C / 2)
        fine = centred(points, FINE)  # a drawer is open or shut by where its handle is
        found = torch.cat([scan.mass.unsqueeze(-1), fine], -1)[:, :2]
        return torch.cat([halves.flatten(1), found.flatten(1), summary], -1)

    def aim(self, goal: Tensor, summary: Tensor) -> Tensor:
        """Where the thing's middle goes, m in base (..., 3), for a goal at (..., 3) and what the step says (..., W)."""
        return goal + NEARBY * self.offset(self.placing(goal, summary))

    @staticmethod
    def placing(goal: Tensor, summary: Tensor) -> Tensor:
        """What `aim` goes by (..., W + 3)."""
        return torch.cat([summary, centred(goal, FINE)], -1)

    # -- once per tick, or a whole history at once -------------------------------------------------------------
    def think(self, body: Proprioception, view: VisualTokens, summary: Tensor, state: tuple | None
              ) -> tuple[TickOutput, tuple]:  # fmt: skip
        """T ticks of B streams, everything (B, T, ...); summary (B, T, W), or (B, W) the same at all ticks.

        Equal to T calls with T = 1.
        """
        batch, ticks = body.state.shape[:2]
        position = body.state[..., None, :3] * WORKSPACE_SIZE + body.state.new_tensor(WORKSPACE_CENTRE)
        relative = (view.points - position) / NEARBY
        place = centred(view.points)
        trust = FAITH / (1 + (FAITH - 1) * view.mass.unsqueeze(-1))
        found = trust * view.mass.unsqueeze(-1)
        seen = torch.cat([trust * shape_of(view.features), relative.clamp(-4, 4) * found, place * found, found,
                          view.spread.unsqueeze(-1) / NEARBY], -1)  # fmt: skip
        to_aim = ((view.aim - position.squeeze(2)) / NEARBY).clamp(-4, 4) * found[..., 1, :]
        aim = centred(view.aim) * found[..., 1, :]
        summary = summary if summary.dim() == 3 else summary.unsqueeze(1).expand(-1, ticks, -1)
        tokens = torch.cat([
            self.embed_state(body.state).unsqueeze(2), self.embed_change(body.change).unsqueeze(2),
            self.embed_tool(shape_of(view.tool)).unsqueeze(2), self.embed_view(seen),
            self.embed_summary(torch.cat([summary, to_aim, aim], -1)).unsqueeze(2)], 2) + self.kind  # fmt: skip
        # Without memory every tick is a sequence of its own.
        rows, state = (tokens.flatten(1, 2), state) if self.config.memory else (tokens.flatten(0, 1), None)
        out, state = self.core(rows.to(self.core.norm_f.weight.dtype), state)  # may be bf16 on a GPU
        last = out.reshape(batch, ticks, self.tokens, -1)[:, :, -1].to(tokens.dtype)
        near = torch.cat([relative[..., :2, :].clamp(-4, 4) * found[..., :2, :], found[..., :2, :]], -1).flatten(2)
        geometry = torch.cat([near, to_aim, body.state[..., :3], body.state[..., 9:10], body.change], -1)
        actions, primitive, done = self.head(last, geometry)
        return TickOutput(actions, primitive, view.grounding, view.points[..., 0, :], done), state

    def physical(self, actions: Tensor) -> Tensor:
        """Normalised actions (..., 7) to ee_delta rows: m, rad, gripper opening 0..1."""
        scale = actions.new_tensor([MOVE_SCALE] * 3 + [TURN_SCALE] * 3)
        return torch.cat([actions[..., :6] * scale, actions[..., 6:].sigmoid()], -1)

    def normalised(self, actions: Tensor) -> Tensor:
        """ee_delta rows to what the head regresses; the gripper stays 0..1, a target for its logit."""
        scale = actions.new_tensor([MOVE_SCALE] * 3 + [TURN_SCALE] * 3)
        return torch.cat([actions[..., :6] / scale, actions[..., 6:]], -1)
