"""Both training stages learn: on a batch small enough to know by heart the loss falls, and its answers come true."""

import numpy as np
import pytest
import torch
from policy_tiny import CONFIG, contract
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from vla_nodes.envs import base as envs
from vla_nodes.envs.base import Sentence
from vla_nodes.envs.tabletop import held_out
from vla_nodes.envs.tabletop.camera import optical_pose
from vla_nodes.envs.tabletop.scene import Scene, View
from vla_nodes.envs.tabletop.tasks import Task
from vla_nodes.envs.tabletop.world import World
from vla_nodes.policy.configuration import PolicyConfig
from vla_nodes.policy.language import LanguageConfig
from vla_nodes.policy.modeling import VlaPolicy
from vla_nodes.training import losses_action, losses_grounding
from vla_nodes.training.grounding_data import Frame, Names

torch.set_num_threads(1)
SIZE, CELLS = 64, 16
LABELS = envs.grounding("tabletop")
NAMES = Names(LABELS)
WORDS = "[PAD] [UNK] ? grab put the red blue block in bowl sing".split()


@pytest.fixture
def model():
    torch.manual_seed(0)
    language = LanguageConfig(vocabulary=16, embedding=8, d_model=16, n_layer=1, d_state=8, headdim=8, sentence=12)
    config = PolicyConfig(image_size=SIZE, vision_widths=(8, 8, 16, 16), feature_width=16, d_model=32, n_layer=1,
                          d_state=8, headdim=16, head_width=32, space=CONFIG.space, language=language)  # fmt: skip
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return VlaPolicy(config, contract(horizon=16), tokenizer)


def sentence(text: str, task: Task) -> Sentence:
    return Sentence(text, tuple(task.steps))


def frame(text: str, thing: int | None, goal: int | None, wanted: tuple, present: tuple) -> Frame:
    """A grey table with bright patches at columns ``thing`` and ``goal`` of the cells, the thing the higher one."""
    rng = np.random.default_rng(3)
    color = np.full((SIZE, SIZE, 3), 90, np.uint8) + rng.integers(0, 20, (SIZE, SIZE, 3), dtype=np.uint8)
    cells, middle = np.zeros((CELLS, CELLS), np.uint8), np.zeros((2, 3), np.float32)
    shown = np.tile(np.array(NAMES.nothing, np.uint8)[:, None, None], (1, CELLS, CELLS))
    centre = np.zeros((3, CELLS, CELLS), np.float32)
    depth = np.full((SIZE, SIZE), 0.95, np.float32)
    for role, (column, rgb, height) in enumerate(((thing, (220, 30, 30), 0.06), (goal, (30, 30, 220), 0.03))):
        if column is not None:
            cells[6:8, column : column + 2] = role + 1
            color[24:32, 4 * column : 4 * column + 8] = rgb
            depth[24:32, 4 * column : 4 * column + 8] -= height
            middle[role] = [0.5, 0.02 * (column - 8), 0.02]
            shown[:, cells == role + 1] = np.array(NAMES.of(("red block", "bowl")[role]))[:, None]
            centre[:, cells == role + 1] = middle[role][:, None]
    pose = optical_pose(View()).astype(np.float32)
    k = np.array([[70, 0, 31.5], [0, 70, 31.5], [0, 0, 1]], np.float32)
    tool = np.array([0.45, 0, 0.3], np.float32)
    grounded = any(wanted) and wanted == present
    aim = middle[1] + np.float32([0, 0, 0.05]) if goal is not None else np.full(3, np.nan, np.float32)
    said = np.array(wanted), np.array(present)
    return Frame(0, color, depth, k, pose, tool, text, 0, 1, cells, shown, centre, *said, middle, aim, grounded)


FRAMES = [
    frame("grab the red block", 3, 12, (True, False), (True, False)),
    frame("put the red block in the bowl", 11, 4, (True, True), (True, True)),
    frame("grab the blue block", None, None, (True, False), (False, False)),
    frame("sing", None, None, (False, False), (False, False)),
]


def descend(model, step, parameters, count, rate):
    optimiser = torch.optim.AdamW(parameters, lr=rate)
    history = []
    for _ in range(count):
        terms, report = step()
        total = sum(terms.values())
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        assert torch.isfinite(total)
        history.append({k: float(v.detach()) for k, v in terms.items()})
    return history, report


def test_grounding_learns_a_batch_by_heart(model):
    # FRAMES[0] shows a blue patch that its sentence does not name: attending to any patch is not enough.
    batch = losses_grounding.collate(FRAMES, None)
    batch["cells"][0][batch["cells"][0] == 2] = 0
    parameters = [p for name in losses_grounding.TRAINED for p in getattr(model, name).parameters()]
    frozen = {k: v.clone() for k, v in model.language.state_dict().items()}
    history, report = descend(model, lambda: losses_grounding.losses(model.train(), batch), parameters, 150, 5e-3)
    first, last = history[0], history[-1]
    assert set(last) == set(losses_grounding.WEIGHTS) - {"words", "where", "cells", "centers"}
    assert sum(last.values()) < 0.4 * sum(first.values())
    for name in ("target mask", "reference mask", "grounding", "place position"):
        assert last[name] < 0.7 * first[name], name
    assert report["target found"] == 1.0 and report["grounded yes"] == 1.0 and report["grounded no"] == 1.0
    assert all(torch.equal(v, frozen[k]) for k, v in model.language.state_dict().items())


def test_eyes_learn_what_stands_where_with_nothing_asked(model):
    batch = losses_grounding.collate(FRAMES[:2], None)
    reader = losses_grounding.Cells(model, LABELS)
    seeing = [p for name in losses_grounding.SEEING for p in model.get_submodule(name).parameters()]

    def step():
        (feature_map,) = model.train().vision.feature_maps(losses_grounding.images(batch))
        return reader.loss(model, feature_map, batch)

    history, report = descend(model, step, [*seeing, *reader.parameters()], 120, 5e-3)
    assert history[-1]["cells"] < 0.2 * history[0]["cells"] and history[-1]["centers"] < history[0]["centers"]
    assert report["cells right"] > 0.95 and report["background right"] > 0.95


def test_the_map_is_read_from_tables_without_a_thing(model):
    batch = losses_grounding.collate(FRAMES[2:], None)
    (survey,) = model.vision.feature_maps(losses_grounding.images(batch))
    terms, _ = losses_grounding.Cells(model, LABELS).loss(model, survey, batch)
    assert all(float(t.detach()) == 0.0 for t in terms.values())


def test_questions_that_share_an_image_get_the_answers_of_questions_with_their_own(model):
    asked = [FRAMES[0], FRAMES[0]._replace(text="grab the blue block"), FRAMES[1], FRAMES[1]._replace(text="sing")]
    shared, own = losses_grounding.collate(asked, None, questions=2), losses_grounding.collate(asked, None)
    assert len(shared["color"]) == 2 and len(own["color"]) == 4
    with torch.no_grad():
        terms = [losses_grounding.losses(model.eval(), batch)[0] for batch in (shared, own)]
    assert terms[0].keys() == terms[1].keys()
    for name in terms[0]:
        torch.testing.assert_close(terms[0][name], terms[1][name], rtol=1e-4, atol=1e-5)


def test_where_things_go_is_learnt_from_words_and_made_up_places(model):
    """Also "next to", which changes sides in the middle of the table."""
    said = [sentence("put the red block in the bowl", Task("place", "red block", "bowl")),
            sentence("grab the red block", Task("pick", "red block")),
            sentence("put red block in the blue block", Task("place", "red block", "blue block", "beside")),
            ]  # fmt: skip
    rng = np.random.default_rng(0)
    assert losses_grounding.spots(said, LABELS, rng).row.tolist() == [0, 2]
    asked = losses_grounding.understand(model.eval(), [text for text, _ in said])
    asked = type(asked)(*(part.detach() for part in asked))

    def step():
        loss, _ = losses_grounding.where(model, asked, losses_grounding.spots(said, LABELS, rng))
        return {"where": loss}, {}

    history, _ = descend(model, step, list(model.placement_head.parameters()), 400, 5e-3)
    assert history[-1]["where"] < 0.2 * history[0]["where"]
    assert losses_grounding.where(model, asked, losses_grounding.spots(said, LABELS, rng))[1] < 1.5  # cm
    assert losses_grounding.where(model, asked, losses_grounding.spots(said[1:2], LABELS, rng))[1] == 0.0


def test_the_drawer_is_where_the_world_has_it():
    world = World(Scene.demo(3))
    places = losses_grounding.spots(
        [sentence("", Task("place", "red block", "drawer"))], LABELS, np.random.default_rng(0)
    ).reference[0]
    shut = world.handle_position()
    assert np.allclose(places[:, 1:], shut[1:], atol=1e-3) and (places[:, 0] <= shut[0] + 1e-3).all()


def test_sentences_are_understood_alike_in_whatever_company(model):
    texts = ["put the red block in the bowl", "grab the blue block", "sing"] * 9
    together = losses_grounding.understand(model.eval(), texts)
    for i in (0, 1, 2, 26):
        alone = losses_grounding.understand(model, texts[i : i + 1])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-4, atol=1e-5)


def test_the_words_alone_teach_who_does_what_in_which_step(model):
    pick, place = Task("pick", "red block"), Task("place", "blue block", "bowl")
    said = [sentence("grab the red block", pick), sentence("put the blue block in the bowl", place),
            sentence("grab the red block in the bowl", Task("place", "red block", "bowl"))]  # fmt: skip
    words = losses_grounding.Words(model, LABELS)
    history, _ = descend(model, lambda: ({"words": words.loss(model.train(), said)[0]}, {}),
                         [*model.queries.parameters(), *words.parameters()], 120, 1e-2)  # fmt: skip
    assert history[-1]["words"] < 0.2 * history[0]["words"]
    assert words.loss(model.eval(), said)[1] == 1.0


def test_sentences_never_say_what_is_held_out():
    for text, steps in losses_grounding.sentences(LABELS, np.random.default_rng(0), 300):
        assert not any((n.split()[-1], n.split()[0]) in held_out.PAIRS for n in steps[0].names), text
        assert not set(text.replace(",", " ").split()) & set(held_out.SYNONYMS.values()), text


def test_grounding_loss_is_finite_when_everything_named_is_hidden(model):
    hidden = [frame("grab the red block", None, None, (True, False), (True, False))] * 2
    terms, _ = losses_grounding.losses(model, losses_grounding.collate(hidden, None))
    assert all(torch.isfinite(t) for t in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_grounding_counts_a_sentence_nobody_can_read_as_ungrounded(model):
    terms, _ = losses_grounding.losses(
        model, losses_grounding.collate([FRAMES[3]._replace(text="x" * 300), FRAMES[1]], None)
    )
    assert all(torch.isfinite(t) for t in terms.values())


def test_collate_augments_only_when_asked():
    plain = losses_grounding.collate(FRAMES, None)
    assert plain["color"].shape == (4, 3, SIZE, SIZE) and plain["grounded"].tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(plain["color"][0].permute(1, 2, 0).numpy(), FRAMES[0].color / 255, atol=1e-6)
    noisy = losses_grounding.collate(FRAMES, np.random.default_rng(0))
    assert not torch.equal(noisy["color"], plain["color"]) and torch.equal(noisy["cells"], plain["cells"])


def episode(model, ticks: int, seed: int) -> dict[str, torch.Tensor]:
    """Random cached tokens; the primitive and the actions follow from nothing, so they can only be learnt by heart."""
    g = torch.Generator().manual_seed(seed)
    config = model.config
    roles, width = 2 + config.free_queries, config.feature_width
    shapes = {"features": (roles, width), "points": (roles, 3), "visibility": (roles,), "attention_std": (roles,),
              "tool": (len(config.space.tool_probes) * width,), "place_position": (3,), "feasibility": ()}  # fmt: skip
    tokens = {f"view_{name}": torch.rand(ticks, *shapes[name], generator=g) for name in shapes}
    actions = 0.3 * torch.randn(ticks, 1, 7, generator=g).expand(ticks, model.contract.actions.horizon, 7).clone()
    actions[..., 6] = (actions[..., 6] > 0).float()
    state = {
        f"state_{token}": 0.3 * torch.randn(ticks, size, generator=g) for token, size in model.layout.sizes.items()
    }
    return {**tokens, **state, "actions": actions,
            "summary": torch.randn(3, config.steps, config.language.d_model, generator=g),
            "step": (torch.arange(ticks) > ticks // 2).long(), "done": (torch.arange(ticks) == ticks // 2).float(),
            "primitive": torch.randint(0, 8, (ticks,), generator=g)}  # fmt: skip


def trained(model):
    parts = [getattr(model, name) for name in losses_action.TRAINED]
    return [p for part in parts for p in ([part] if isinstance(part, torch.nn.Parameter) else part.parameters())]


def test_acting_learns_a_batch_by_heart(model):
    rows = [{**t, "summary": t["summary"][:1]} for t in (episode(model, 6, 0), episode(model, 3, 1))]
    rng = np.random.default_rng(0)
    batch = losses_action.stack([{**losses_action.window(t, 6, rng)} for t in rows])
    history, report = descend(model, lambda: losses_action.losses(model.train(), batch), trained(model), 120, 1e-2)
    first, last = history[0], history[-1]
    assert sum(last.values()) < 0.6 * sum(first.values())
    assert all(last[k] < first[k] for k in ("velocity", "gripper", "primitive", "lead", "done"))
    assert report["primitive right"] > 0.8 and report["gripper right"] > 0.8


def test_padding_of_a_window_changes_nothing(model):
    tokens, rng = episode(model, 5, 0), np.random.default_rng(0)
    tokens["summary"] = tokens["summary"][:1]
    cuts = [losses_action.window(tokens, length, _Start()) for length in (5, 9)]
    assert cuts[1]["weight"].tolist() == [1.0] * 5 + [0.0] * 4
    model.eval()
    with torch.no_grad():
        short, padded = (losses_action.losses(model, losses_action.stack([c]))[0] for c in cuts)
    for name in short:
        assert float(short[name]) == pytest.approx(float(padded[name]), rel=1e-4, abs=1e-5), name
    cut = losses_action.window(episode(model, 40, 1), 12, rng)
    assert cut["weight"].sum() == 12 and cut["state_position"].shape == (12, 17)


class _Start:
    """A generator that always starts a window at tick 0."""

    def random(self) -> float:
        return 0.9

    def integers(self, *_: int) -> int:
        return 0


def test_noise_touches_inputs_only(model):
    batch = losses_action.stack([losses_action.window(episode(model, 6, 0), 6, np.random.default_rng(0))])
    other = losses_action.noisy(batch, torch.Generator().manual_seed(0))
    changed = {k for k in batch if not torch.equal(batch[k], other[k])}
    assert changed == {"view_points", "view_features", "view_tool", "view_place_position", "state_position",
                       "state_velocity"}  # fmt: skip
    assert (other["view_points"] - batch["view_points"]).abs().max() < 0.012  # m


def test_a_role_that_is_mistaken_for_another_is_so_for_a_while_and_faintly(model):
    """Only what the thing or the goal sees, in some windows, never at their beginning; the labels stay."""
    rng, ticks = np.random.default_rng(0), 30
    batch = losses_action.stack([losses_action.window(episode(model, ticks, seed), ticks, rng) for seed in range(200)])
    other = losses_action.mistaken(batch, torch.Generator().manual_seed(0))
    changed = {k for k in batch if not torch.equal(batch[k], other[k])}
    assert changed == {"view_points", "view_features", "view_visibility", "view_attention_std", "view_place_position"}
    where = (other["view_points"] != batch["view_points"]).any(-1)  # (B, T, R)
    assert not where[:, : losses_action.SURE].any() and not where[..., 2:].any()
    assert not (where[..., 0].any(1) & where[..., 1].any(1)).any()  # one of them at a time
    assert torch.equal(
        (other["view_place_position"] != batch["view_place_position"]).any(-1), where[..., 1]
    )  # it follows from the goal
    begins = where.any(-1).int().diff(dim=1, prepend=torch.zeros(200, 1, dtype=torch.int32)) == 1
    assert (begins.sum(1) <= 1).all() and 0.15 < float(begins.any(1).float().mean()) < 0.45
    assert other["view_visibility"][where].max() <= losses_action.FAINT
    points = {tuple(p) for p in batch["view_points"][:, :, :2].flatten(0, 2).tolist()}
    assert all(tuple(p) in points for p in other["view_points"][where].tolist())


def test_labels_that_are_not_there_do_not_count(model):
    """Half the ticks without labels: the terms are those of the other half; without any they are zero, not NaN."""
    tokens = {**episode(model, 6, 0)}
    tokens["primitive"][3:], tokens["done"][3:] = -1, float("nan")
    model.eval()
    with torch.no_grad():
        some = losses_action.losses(model, losses_action.stack([losses_action.window(tokens, 6, _Start())]))
        half = {k: v if k == "summary" else v[:3] for k, v in tokens.items()}
        known = losses_action.losses(model, losses_action.stack([losses_action.window(half, 3, _Start())]))
        tokens["primitive"][:], tokens["done"][:] = -1, float("nan")
        none = losses_action.losses(model, losses_action.stack([losses_action.window(tokens, 6, _Start())]))
    for name in ("primitive", "done"):
        assert float(some[0][name]) == pytest.approx(float(known[0][name]), rel=1e-4), name
        assert float(none[0][name]) == 0.0 and float(known[0][name]) > 0.0
        assert some[1][f"{name} right"] == pytest.approx(known[1][f"{name} right"])
    assert all(torch.isfinite(t) for t in (*some[0].values(), *none[0].values()))


def test_normalised_actions_are_the_inverse_of_physical(model):
    rows = torch.rand(4, 16, 7) * 0.01
    logits = model.normalize(rows)
    logits[..., 6] = torch.logit(rows[..., 6].clamp(1e-4, 1))
    torch.testing.assert_close(model.denormalize(logits), rows, atol=1e-4, rtol=0)
