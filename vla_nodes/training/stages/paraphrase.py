"""Stage 1, from sentences alone: the role queries learn many more wordings than there are images to ask about.

What a sentence means is already known to the eyes by what they are asked with plain words. Here each wording of a step
learns to ask the same: its target's query is the sum of an appearance's part and a category's part, both fitted to the
queries of plain sentences, so that an appearance and a category that were never seen together are asked for rightly
too; its summary is that of the plain sentence. Many of the sentences name something of a category nobody knows, so that
an appearance is learnt by itself. No image is looked at, and nothing that the environment holds out is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_nodes.envs import base as envs
from vla_nodes.envs.base import Grounding, Sentence, Step
from vla_nodes.policy.modeling import Instruction, VlaPolicy
from vla_nodes.training import losses_grounding
from vla_nodes.training.config import ParaphraseSettings
from vla_nodes.training.initialize import begin
from vla_nodes.training.trainer import Terms, to_device

PLAIN = 3000  # sentences that say what the eyes understand
TOGETHER = 32  # sentences of like length read at once
HELD_OUT = 300  # sentences measured on, of each kind
NOISE = 0.6  # of a token's spread at most: some sentences are clear, others like words that were never heard
WEIGHTS = {"queries": 1.0, "summary": 1.0, "steps": 0.5}
UNKNOWN = "unknown"  # in place of a category that the environment has no name for


class Nothing(NamedTuple):
    """The one step of a sentence that asks for nothing."""

    verb: str = ""
    target: str = ""
    reference: str = ""
    relation: str = ""


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

    def __init__(self, model: VlaPolicy, grounding: Grounding, said: list[Sentence]) -> None:
        self.grounding = grounding
        asked = losses_grounding.understand(model, [text for text, _ in said])
        row, at, steps = _numbered(said)
        queries, summary = asked.queries[row, at], asked.summary[row, at]
        made = list(zip(*(self._parts(step, k) for step, k in steps), strict=True))
        free = queries[:, 2:].flatten(1)
        self.parts, explained = [], []
        for words, values in zip(made, (queries[:, 0], queries[:, 1], free, summary), strict=True):
            part, share = _fit(words, values)
            self.parts.append(part)
            explained.append(share)
        half = queries.shape[2] // 2
        named = [f"appearance {name}" for name in grounding.appearances if name]
        for part in self.parts[:2]:  # of no known category: all of its appearance, in a shape that is nowhere
            appearances, categories = ([part[name] for name in names] for names in (named, grounding.movable))
            nowhere = part["appearance "] + part[""] - sum(appearances) / len(appearances)
            part[UNKNOWN] = torch.cat([(sum(categories) / len(categories))[:half], nowhere[half:]])
        self.explained = dict(zip(("target", "reference", "free", "summary"), explained, strict=True))
        self.spread = {"queries": queries.var(0), "summary": summary.var(0)}
        self.shape = queries.shape[1:]

    def _parts(self, step: Step, at: int) -> tuple[tuple[str, ...], ...]:
        """What the target's query, the reference's, the free ones and the summary of a step are each made of."""
        target, reference = self._known(step.target), self._known(step.reference)
        moved = target[1] if target[1] != UNKNOWN else self.grounding.movable[0]
        at_what = reference[1] if reference[1] != UNKNOWN else self.grounding.containers[0]
        what = f"{step.verb} {moved} {step.relation} {at_what}"
        free = (what, f"target {target[0]}", f"reference {reference[0]}")
        return _named(*target), _named(*reference), free, (f"{at} {what}",)

    def _known(self, name: str) -> tuple[str, str]:
        """Appearance and category of a name; UNKNOWN for a category that the environment does not have."""
        appearance, category = self.grounding.describe(name)
        return appearance, category if category in self.grounding.categories else UNKNOWN

    def query(self, role: int, appearance: str, category: str) -> Tensor:
        """(C,) what asks for such an object, as a target (0) or a reference (1)."""
        return sum(self.parts[role][word] for word in _named(appearance, category))

    def of(self, steps: Iterable[tuple[Step, int]]) -> tuple[Tensor, Tensor]:
        """(N, R, C) queries and (N, W) summaries that steps ask with, each with its place in its sentence.

        KeyError for a step that no plain sentence had the parts of.
        """
        made = zip(*(self._parts(step, at) for step, at in steps), strict=True)
        target, reference, free, summary = (torch.stack([sum(part[word] for word in words) for words in rows])
                                      for part, rows in zip(self.parts, made, strict=True))  # fmt: skip
        free = free.unflatten(1, (self.shape[0] - 2, self.shape[1]))
        return torch.cat([target.unsqueeze(1), reference.unsqueeze(1), free], 1), summary

    def knows(self, step: Step, at: int) -> bool:
        made = self._parts(step, at)
        return all(word in part for part, words in zip(self.parts, made, strict=True) for word in words)


def _named(appearance: str, category: str) -> tuple[str, str]:
    return f"appearance {appearance}", category


def _steps(sentence: Sentence) -> tuple[Step, ...]:
    return sentence.steps or (Nothing(),)


def _numbered(said: list[Sentence]) -> tuple[Tensor, Tensor, list[tuple[Step, int]]]:
    """(N,) sentence and (N,) place in it of every step that is said, and the steps with their places."""
    rows = [(row, at, step) for row, sentence in enumerate(said) for at, step in enumerate(_steps(sentence))]
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


class Objective(nn.Module):
    """The role queries, behind words."""

    def __init__(self, model: VlaPolicy, meaning: Meaning) -> None:
        super().__init__()
        self.model, self.meaning = model, meaning
        for name, spread in meaning.spread.items():
            self.register_buffer(f"{name}_spread", spread.mean() + 1e-6)
        grounding = meaning.grounding
        movable = [(a, c) for a in grounding.appearances if a for c in grounding.movable]
        containers = [("", category) for category in grounding.containers]
        self.register_buffer("targets", torch.stack([meaning.query(0, *names) for names in movable]))
        self.register_buffer("references", torch.stack([meaning.query(1, *names) for names in movable + containers]))

    def forward(self, batch: Batch) -> Terms:
        random = torch.Generator().manual_seed(batch.noise) if batch.noise else None
        asked = [self._ask(*group, random) for group in batch.groups]
        asked = Instruction(*(torch.cat(part) for part in zip(*asked, strict=True)))
        queries, summary = asked.queries[batch.row, batch.step], asked.summary[batch.row, batch.step]
        later = torch.arange(1, asked.step_present.shape[1])
        answer = (later < batch.steps[:, None]).float()
        gap = (queries - batch.queries).square()
        terms = {"queries": gap.mean() / self.queries_spread,
                 "summary": (summary - batch.summary).square().mean() / self.summary_spread,
                 "steps": F.binary_cross_entropy_with_logits(asked.step_present[:, 1:], answer)}  # fmt: skip
        report = {"steps right": float(((asked.step_present[:, 1:] > 0) == (answer > 0)).all(1).float().mean())}
        for role, (name, known) in enumerate((("target", self.targets), ("reference", self.references))):
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
        return self.model.encode_instruction(text)


def _right(asked: Tensor, meant: Tensor, known: Tensor) -> float:
    """Share of those steps that mean one of the ``known`` whose query is nearest to it."""

    def gaps(queries: Tensor) -> Tensor:
        return torch.cdist(queries, known, compute_mode="donot_use_mm_for_euclid_dist")

    gap, which = gaps(meant).min(1)
    counted = gap < 1e-3
    return float((gaps(asked).argmin(1) == which)[counted].float().mean()) if counted.any() else 1.0


class ParaphraseStage:
    """As the loop sees it."""

    def __init__(self, model: VlaPolicy, settings: ParaphraseSettings, say: Callable[[str], None] = print) -> None:
        self.model, self.settings = model, settings
        model.eval().requires_grad_(False)
        self.grounding = grounding = envs.grounding(settings.env)
        # What is meant must not come from a reading that goes on learning, or its mistakes become what is meant.
        eyes = model if settings.meaning is None else begin(replace(settings, start=settings.meaning), say).model
        with torch.no_grad():
            rng = np.random.default_rng([settings.seed, 11])
            self.meaning = Meaning(eyes.eval(), grounding, [grounding.plain(rng) for _ in range(PLAIN)])
        explained = ", ".join(f"{name} {share:.1%}" for name, share in self.meaning.explained.items())
        say(f"parts that add up explain, of what {PLAIN} plain sentences ask with: {explained}")
        model.queries.requires_grad_(True)
        self.objective = Objective(model, self.meaning)
        self.trained = [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]
        self.data = {"plain sentences": PLAIN}
        rng = np.random.default_rng([settings.seed, 12])
        draws = {"": [grounding.unusual(rng) for _ in range(HELD_OUT)]}
        for axis in grounding.held_out_axes:
            draws[f"{axis}: "] = [grounding.held_out(axis, rng) for _ in range(HELD_OUT)]
        self.held = {name: self._batch(said, 0) for name, said in draws.items()}

    def _batch(self, said: list[Sentence], noise: int) -> Batch:
        said = [sentence for sentence in said if not self.model.language.check(sentence.text)
                and all(self.meaning.knows(step, at) for at, step in enumerate(_steps(sentence)))]  # fmt: skip
        ids, mask = self.model.language.tokenize([text for text, _ in said])
        order = mask.sum(1).argsort()
        said, groups = [said[row] for row in order.tolist()], []
        for rows in order.split(TOGETHER):  # padding costs as much as words
            longest = int(mask[rows[-1]].sum())
            groups.append((ids[rows, :longest], mask[rows, :longest]))
        row, at, meant = _numbered(said)
        queries, summary = self.meaning.of(meant)
        steps = torch.tensor([len(_steps(sentence)) for sentence in said])
        return Batch(groups, row, at, queries, summary, steps, noise)

    def batch(self, step: int, rank: int) -> Batch:
        rng = np.random.default_rng([self.settings.seed, step, rank, 13])
        said = [self.grounding.unusual(rng) for _ in range(self.settings.batch)]
        return self._batch(said, int(rng.integers(1, 2**62)))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """On wordings of training, and on those that are held out."""
        found = {}
        for name, batch in self.held.items():
            report = self.objective(to_device(batch, self.model.token_type.device))[2]
            found |= {f"{name}{key}": value for key, value in report.items()}
        return found

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()
