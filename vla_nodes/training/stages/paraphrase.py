"""Stage 1, from words alone: the role queries learn many more wordings than there are images to ask about.

What a sentence means is already known to the eyes by what they are asked with plain words. Here each wording of a task
learns to ask the same: its thing's query is the sum of a colour's part and a kind's part, both fitted to the queries of
plain sentences, so that a colour and a kind that were never seen together are asked for rightly too; its summary is
that of the plain sentence. Half of the sentences name something of a kind nobody knows, so that a colour is learnt by
itself. No image is looked at, and nothing in envs/tabletop/held_out.py is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_nodes.envs.tabletop import held_out, instructions, vocabulary
from vla_nodes.envs.tabletop.grounding_dataset import imagined
from vla_nodes.envs.tabletop.scene import COLORS, GRASPABLE
from vla_nodes.envs.tabletop.tasks import NOTHING, Task, kind_of
from vla_nodes.policy.modeling import Instruction, VlaPolicy
from vla_nodes.training import losses_grounding
from vla_nodes.training.config import WordsSettings
from vla_nodes.training.initialize import begin
from vla_nodes.training.trainer import Terms, to_device

AXES = ("pairs", "phrasings", "synonyms")  # of held_out.AXES, those that are a matter of words
STRANGE = 0.5  # share of sentences that name something of an unknown kind
PLAIN = 3000  # sentences that say what the eyes understand
TOGETHER = 32  # sentences of like length read at once
NOISE = 0.6  # of a token's spread at most: some sentences are clear, others like words that were never heard
WEIGHTS = {"queries": 1.0, "summary": 1.0, "steps": 0.5}
UNKNOWN = "unknown"

Said = tuple[str, Task | None]


def _parts(step: Task, at: int) -> tuple[tuple[str, ...], ...]:
    """What the thing's query, the goal's, the free ones and the summary of a step are each made of."""
    thing, goal = _known(step.thing), _known(step.goal)
    like = "block" if thing[1] == UNKNOWN else thing[1], "bowl" if goal[1] == UNKNOWN else goal[1]
    what = f"{step.verb} {like[0]} {step.relation} {like[1]}"
    free = (what, f"thing {thing[0]}", f"goal {goal[0]}")
    return (f"color {thing[0]}", thing[1]), (f"color {goal[0]}", goal[1]), free, (f"{at} {what}",)


def _known(name: str) -> tuple[str, str]:
    """Colour and kind of a name; UNKNOWN for a kind that no simulation has."""
    color, _, kind = name.rpartition(" ")
    return color, UNKNOWN if kind in vocabulary.OTHER_KINDS else kind


class Batch(NamedTuple):
    """Sentences in groups of like length, and what each of their steps means."""

    groups: list[tuple[Tensor, Tensor]]  # ids (B, T) and mask (B, T), see InstructionEncoder
    row: Tensor  # (N,) sentence of a step
    step: Tensor  # (N,) which of its steps
    queries: Tensor  # (N, R, C)
    summary: Tensor  # (N, W)
    steps: Tensor  # (B,) how many there are
    noise: int  # seed of it


class Meaning:
    """What a model understands by plain sentences, as parts that add up."""

    def __init__(self, model: VlaPolicy, said: list[Said]) -> None:
        asked = losses_grounding.understand(model, [text for text, _ in said])
        row, at, steps = _numbered(said)
        queries, summary = asked.queries[row, at], asked.summary[row, at]
        made = list(zip(*(_parts(step, k) for step, k in steps), strict=True))
        free = queries[:, 2:].flatten(1)
        self.parts, explained = [], []
        for words, values in zip(made, (queries[:, 0], queries[:, 1], free, summary), strict=True):
            part, share = _fit(words, values)
            self.parts.append(part)
            explained.append(share)
        half = queries.shape[2] // 2
        for role in (0, 1):  # what is of no known kind looks like all of its colour, in a shape that is nowhere
            part = self.parts[role]
            colors, kinds = ([part[name] for name in names]
                             for names in ([f"color {color}" for color in COLORS], GRASPABLE))  # fmt: skip
            nowhere = part["color "] + part[""] - sum(colors) / len(colors)
            part[UNKNOWN] = torch.cat([(sum(kinds) / len(kinds))[:half], nowhere[half:]])
        self.explained = dict(zip(("thing", "goal", "free", "summary"), explained, strict=True))
        self.spread = {"queries": queries.var(0), "summary": summary.var(0)}
        self.shape = queries.shape[1:]

    def of(self, steps: Iterable[tuple[Task, int]]) -> tuple[Tensor, Tensor]:
        """(N, R, C) queries and (N, W) summaries that steps ask with, each with its place in its sentence.

        KeyError for a step that no plain sentence had the parts of.
        """
        made = zip(*(_parts(step, at) for step, at in steps), strict=True)
        thing, goal, free, summary = (torch.stack([sum(part[word] for word in words) for words in rows])
                                      for part, rows in zip(self.parts, made, strict=True))  # fmt: skip
        free = free.unflatten(1, (self.shape[0] - 2, self.shape[1]))
        return torch.cat([thing.unsqueeze(1), goal.unsqueeze(1), free], 1), summary

    def knows(self, step: Task, at: int) -> bool:
        return all(word in part for part, words in zip(self.parts, _parts(step, at), strict=True) for word in words)


def _steps(task: Task | None) -> list[Task]:
    return list(task.steps) if task else [NOTHING]


def _numbered(said: list[Said]) -> tuple[Tensor, Tensor, list[tuple[Task, int]]]:
    """(N,) sentence and (N,) place in it of every step that is said, and the steps with their places."""
    rows = [(row, at, step) for row, (_, task) in enumerate(said) for at, step in enumerate(_steps(task))]
    row, at, _ = zip(*rows, strict=True)
    return torch.tensor(row), torch.tensor(at), [(step, at) for _, at, step in rows]


def _fit(words: Iterable[tuple[str, ...]], values: Tensor) -> tuple[dict[str, Tensor], float]:
    """Parts whose sums are nearest to (N, D) values, and the share of their variance that they explain."""
    words = list(words)
    names = sorted({name for row in words for name in row})
    index = {name: k for k, name in enumerate(names)}
    made = torch.zeros(len(words), len(names), dtype=torch.float64)
    for row, parts in enumerate(words):
        for name in parts:
            made[row, index[name]] += 1
    found = torch.linalg.pinv(made) @ values.double()
    share = 1 - (made @ found - values).square().sum() / (values - values.mean(0)).square().sum().clamp(min=1e-9)
    return dict(zip(names, found.float(), strict=True)), float(share)


def plain_sentences(rng: np.random.Generator, count: int) -> list[Said]:
    """Tasks in plain words, and small talk."""
    found: list[Said] = []
    for _ in range(count):
        _, task = imagined(rng)
        found.append((instructions.plain(task), task) if task else (str(rng.choice(vocabulary.SMALL_TALK)), None))
    return found


def wide(rng: np.random.Generator) -> Said:
    """A sentence to learn from."""
    text, task = imagined(rng)
    if task is None or rng.random() > STRANGE:
        return text, task
    named = [role for role in ("thing", "goal") if kind_of(getattr(task, role)) in GRASPABLE]
    if not named:
        return text, task
    color, kind = str(rng.choice(list(COLORS))), str(rng.choice(vocabulary.OTHER_KINDS))
    task = replace(task, **{str(rng.choice(named)): f"{color} {kind}"})
    return instructions.phrase(task, rng), task


def held_out_sentences(axis: str, rng: np.random.Generator, count: int) -> list[Said]:
    """Tasks in words that training never says, or about pairs that it never names. ``axis``: one of AXES."""
    found: list[Said] = []
    while len(found) < count:
        _, task = imagined(rng)
        if task is None:
            continue
        if axis == "pairs":
            kind, color = sorted(held_out.PAIRS)[rng.integers(len(held_out.PAIRS))]
            if kind_of(task.thing) not in GRASPABLE or f"{color} {kind}" == task.goal:
                continue
            task = Task(task.verb, f"{color} {kind}", task.goal, task.relation)
        found.append((instructions.phrase(task, rng, axis), task))
    return found


class Objective(nn.Module):
    """The role queries, behind words."""

    def __init__(self, model: VlaPolicy, meaning: Meaning) -> None:
        super().__init__()
        self.model, self.meaning = model, meaning
        for name, spread in meaning.spread.items():
            self.register_buffer(f"{name}_spread", spread.mean() + 1e-6)
        names = [f"{c} {k}" for c in COLORS for k in GRASPABLE] + ["bowl", "tray"]
        places = [Task("place", "red block", name) for name in names]
        things = [Task("pick", name) for name in names[:-2]]
        self.register_buffer("things", meaning.of([(step, 0) for step in things])[0][:, 0])
        self.register_buffer("goals", torch.stack([sum(meaning.parts[1][w] for w in _parts(p, 0)[1]) for p in places]))

    def forward(self, batch: Batch) -> Terms:
        random = torch.Generator().manual_seed(batch.noise) if batch.noise else None
        asked = [self._ask(*group, random) for group in batch.groups]
        asked = Instruction(*(torch.cat(part) for part in zip(*asked, strict=True)))
        queries, summary = asked.queries[batch.row, batch.step], asked.summary[batch.row, batch.step]
        later = torch.arange(1, asked.wanted.shape[1])
        answer = (later < batch.steps[:, None]).float()
        gap = (queries - batch.queries).square()
        terms = {"queries": gap.mean() / self.queries_spread,
                 "summary": (summary - batch.summary).square().mean() / self.summary_spread,
                 "steps": F.binary_cross_entropy_with_logits(asked.wanted[:, 1:], answer)}  # fmt: skip
        report = {"steps right": float(((asked.wanted[:, 1:] > 0) == (answer > 0)).all(1).float().mean())}
        for role, (name, known) in enumerate((("thing", self.things), ("goal", self.goals))):
            report[f"{name} right"] = _right(queries[:, role], batch.queries[:, role], known)
            report[f"{name} off"] = float((gap[:, role].mean() / self.queries_spread).detach())
        return sum(WEIGHTS[name] * term for name, term in terms.items()), terms, report

    def _ask(self, ids: Tensor, mask: Tensor, random: torch.Generator | None) -> Instruction:
        with torch.no_grad():
            text = self.model.language(ids, mask)
            if random is not None:
                noise = torch.randn(text.tokens.shape, generator=random, device="cpu").to(text.tokens.device)
                level = NOISE * torch.rand(len(noise), 1, 1, generator=random).to(noise.device)
                text = text._replace(tokens=text.tokens + level * noise * mask.unsqueeze(-1))
        return self.model.prepare(text)


def _right(asked: Tensor, meant: Tensor, known: Tensor) -> float:
    """Share of those steps that mean one of the ``known`` whose query is nearest to it."""

    def gaps(queries: Tensor) -> Tensor:
        return torch.cdist(queries, known, compute_mode="donot_use_mm_for_euclid_dist")

    gap, which = gaps(meant).min(1)
    counted = gap < 1e-3
    return float((gaps(asked).argmin(1) == which)[counted].float().mean()) if counted.any() else 1.0


class WordsStage:
    """As the loop sees it."""

    def __init__(self, model: VlaPolicy, settings: WordsSettings, say: Callable[[str], None] = print) -> None:
        self.model, self.settings = model, settings
        model.eval().requires_grad_(False)
        # What is meant must not come from a reading that goes on learning, or its mistakes become what is meant.
        eyes = model if settings.meaning is None else begin(replace(settings, start=settings.meaning), say).model
        with torch.no_grad():
            self.meaning = Meaning(eyes.eval(), plain_sentences(np.random.default_rng([settings.seed, 11]), PLAIN))
        explained = ", ".join(f"{name} {share:.1%}" for name, share in self.meaning.explained.items())
        say(f"parts that add up explain, of what {PLAIN} plain sentences ask with: {explained}")
        model.roles.requires_grad_(True)
        self.objective = Objective(model, self.meaning)
        self.trained = [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]
        self.data = {"plain sentences": PLAIN}
        rng = np.random.default_rng([settings.seed, 12])
        draws = {"": [wide(rng) for _ in range(300)],
                 **{f"{axis}: ": held_out_sentences(axis, rng, 300) for axis in AXES}}  # fmt: skip
        self.held = {name: self._batch(said, 0) for name, said in draws.items()}

    def _batch(self, said: list[Said], noise: int) -> Batch:
        said = [(text, task) for text, task in said if not self.model.language.check(text)
                and all(self.meaning.knows(step, at) for at, step in enumerate(_steps(task)))]  # fmt: skip
        ids, mask = self.model.language.tokenize([text for text, _ in said])
        order = mask.sum(1).argsort()
        said, groups = [said[row] for row in order.tolist()], []
        for rows in order.split(TOGETHER):  # padding costs as much as words
            longest = int(mask[rows[-1]].sum())
            groups.append((ids[rows, :longest], mask[rows, :longest]))
        row, at, meant = _numbered(said)
        queries, summary = self.meaning.of(meant)
        steps = torch.tensor([len(_steps(task)) for _, task in said])
        return Batch(groups, row, at, queries, summary, steps, noise)

    def batch(self, step: int, rank: int) -> Batch:
        rng = np.random.default_rng([self.settings.seed, step, rank, 13])
        return self._batch([wide(rng) for _ in range(self.settings.batch)], int(rng.integers(1, 2**62)))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """On wordings of training, and on AXES."""
        found = {}
        for name, batch in self.held.items():
            report = self.objective(to_device(batch, self.model.kind.device))[2]
            found |= {f"{name}{key}": value for key, value in report.items()}
        return found

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()
