"""The whole policy: streaming equals the whole history, states are values, and the runtime's judgement."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_tiny import CONFIG, CONTRACT, observation, robot, tiny_model, write_tokenizer

from vla_nodes.policy.inference import engine as engines
from vla_nodes.policy.inference.engine import example, example_instruction, one_tick
from vla_nodes.policy.language import EncodedText, load_tokenizer
from vla_nodes.policy.mamba import mixers
from vla_nodes.policy.runtime import PolicyRuntime

GATE = CONTRACT.thresholds
MODELS = {mixer: tiny_model(dataclasses.replace(CONFIG, mixer=mixer)) for mixer in ("mamba2", "mamba1", "attention")}


@torch.no_grad()
def history(model, ticks):
    """State and visual tokens over `ticks` ticks, (1, T, ...), and the instruction's summary."""
    step = example_instruction(model)
    views, states = [], []
    for tick in range(ticks):
        images, tool, state = example(model, tick)
        views.append(one_tick(model.encode_observation(images, tool, step)[0]))
        states.append(state)
    return together(states), together(views), step.summary


def together(parts):
    """Ticks (1, 1, ...) after each other."""
    tensors = [engines.flatten(part) for part in parts]
    return engines.unflatten([torch.cat(same, 1) for same in zip(*tensors, strict=True)], parts[0])


def part(values, begin, end):
    return mixers.map_state(lambda v: v[:, begin:end], values)


def changed(values, function):
    return mixers.map_state(function, values)


def error(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))


@settings(max_examples=10, deadline=None)
@given(mixer=st.sampled_from(sorted(MODELS)), cuts=st.lists(st.integers(1, 8), max_size=5))
@torch.no_grad()
def test_streaming_equals_the_whole_history(mixer, cuts):
    """However the ticks are grouped, with another future tried from every cut."""
    model, ticks = MODELS[mixer], 9
    body, view, summary = history(model, ticks)
    whole, after = model(body, view, summary, None)
    begin, state, actions, primitives = 0, None, [], []
    for end in [*sorted(set(cuts)), ticks]:
        now = part(body, begin, end), part(view, begin, end)
        if state is not None:
            model(changed(now[0], lambda x: x + 1), now[1], summary, state)  # another future leaves the state alone
        out, state = model(*now, summary, state)
        actions.append(out.actions)
        primitives.append(out.primitive)
        begin = end
    assert error(torch.cat(actions, 1), whole.actions) <= 1e-4
    assert error(torch.cat(primitives, 1), whole.primitive) <= 1e-4
    found, wanted = [], []
    mixers.map_state(lambda t: found.append(t) or t, state)
    mixers.map_state(lambda t: wanted.append(t) or t, after)
    assert all(error(a, b) <= 1e-4 for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
def test_history_and_instruction_matter():
    """Or the test above could pass with a core that ignores both."""
    model = MODELS["mamba2"]
    body, view, summary = history(model, 4)
    whole, _ = model(body, view, summary, None)
    last, _ = model(part(body, 3, 4), part(view, 3, 4), summary, None)
    other, _ = model(body, view, -summary, None)
    assert error(last.actions[:, 0], whole.actions[:, 3]) > 1e-3
    assert error(other.actions, whole.actions) > 1e-3


@torch.no_grad()
def test_batched_streams_are_independent():
    model = MODELS["mamba2"]
    body, view, summary = history(model, 3)
    both = changed((body, view), lambda x: torch.cat([x, x + 0.1]))
    pair, _ = model(*both, summary.expand(2, -1), None)
    alone, _ = model(body, view, summary, None)
    assert error(pair.actions[:1], alone.actions) <= 1e-5


def test_physical_and_normalised_are_inverse():
    model = MODELS["mamba2"]
    rows = model.denormalize(torch.randn(5, CONTRACT.actions.horizon, 7))
    again = model.normalize(rows)
    again = torch.cat([again[..., :6], again[..., 6:].logit()], -1)
    assert torch.allclose(model.denormalize(again), rows, atol=1e-6)
    assert 0 <= float(rows[..., 6].min()) and float(rows[..., 6].max()) <= 1


# -- runtime ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    write_tokenizer(path)
    return load_tokenizer(path, CONFIG.language)


@pytest.fixture
def runtime(words):
    return PolicyRuntime(tiny_model(tokenizer=words), robot())


class Certain:
    """Stands before the real engine and overrides only how sure vision is."""

    def __init__(self, engine, probabilities):
        self.engine, self.rest = engine, list(probabilities)
        self.forward = engine.forward

    def encode_observation(self, *inputs):
        p = self.rest.pop(0) if len(self.rest) > 1 else self.rest[0]
        return self.engine.encode_observation(*inputs)._replace(feasibility=torch.logit(torch.tensor([float(p)])))


def test_without_instruction_it_holds(runtime):
    out = runtime.step(observation(0))
    assert out.actions is None and "no instruction" in out.hold_reason


@pytest.mark.parametrize("text, reason", [("", "empty"), ("   \n", "empty"), ("x " * 200, "400 characters"),
                                          ("red " * 60, "62 tokens"), ("qwertz !!", "no word")])  # fmt: skip
def test_refused_instructions_change_nothing(runtime, text, reason):
    runtime.set_instruction("pick up the red block")
    assert reason in runtime.check_instruction(text)
    with pytest.raises(ValueError, match=reason):
        runtime.set_instruction(text)
    assert runtime.instruction == "pick up the red block"


def test_it_decides_after_a_few_looks_and_then_acts(runtime):
    runtime.engine = Certain(runtime.engine, [0.9])
    runtime.set_instruction("pick up the red block")
    outs = [runtime.step(observation(i)) for i in range(5)]
    waiting = GATE.start_observations - 1
    assert all(o.actions is None and "looking" in o.hold_reason for o in outs[:waiting])
    assert all(o.actions is not None and o.hold_reason == "" for o in outs[waiting:])
    assert outs[-1].actions.shape == (CONTRACT.actions.horizon, 7) and np.isfinite(outs[-1].actions).all()
    assert outs[-1].feasibility == pytest.approx(0.9, abs=1e-5)
    assert set(outs[-1].timings) >= {"vision", "core", "total"}


def test_what_is_not_there_is_refused_until_it_comes_into_view(runtime):
    runtime.engine = Certain(runtime.engine, [0.1] * 25 + [0.95])
    runtime.set_instruction("open the drawer")
    outs = [runtime.step(observation(i)) for i in range(25 + GATE.lost_observations + 5)]
    assert all(o.actions is None for o in outs[:26])
    assert '"open the drawer"' in outs[10].hold_reason and "certainty 0.10" in outs[10].hold_reason
    assert outs[-1].actions is not None


@pytest.mark.parametrize("opening", [0.0, 1.0])
def test_what_gets_lost_is_given_up(runtime, opening):
    runtime.engine = Certain(runtime.engine, [0.9] * 5 + [0.01])
    runtime.set_instruction("pick up the cube")
    runtime.steps = 1  # whatever these untrained weights make of the sentence
    outs = [
        runtime.step(dataclasses.replace(observation(i), grippers=np.array([opening])))
        for i in range(6 + GATE.lost_observations)
    ]
    assert outs[10].actions is not None  # a short occlusion is carried through
    assert (
        outs[4 + GATE.lost_observations].actions is None
        and "lost sight" in outs[4 + GATE.lost_observations].hold_reason
    )


def test_what_is_in_hand_may_hide_behind_the_hand(runtime):
    runtime.engine = Certain(runtime.engine, [0.9] * 5 + [0.01])
    runtime.set_instruction("pick up the cube")
    runtime.steps = 1  # whatever these untrained weights make of the sentence
    count = 3 * GATE.lost_observations
    outs = [runtime.step(dataclasses.replace(observation(i), grippers=np.array([0.5]))) for i in range(count)]
    assert all(out.actions is not None for out in outs[5:])
    then = range(count, count + GATE.lost_observations)
    dropped = [runtime.step(dataclasses.replace(observation(i), grippers=np.array([0.0]))) for i in then]
    assert dropped[-1].actions is None and "lost sight" in dropped[-1].hold_reason


def test_reset_and_a_new_instruction_forget_the_history(words):
    def run(r, ticks):
        r.engine = Certain(r.engine, [0.9])
        return [r.step(observation(i)).actions for i in ticks]

    def fresh(text):
        r = PolicyRuntime(tiny_model(tokenizer=words), robot())
        r.set_instruction(text)
        return r

    r = fresh("pick up the cube")
    first = run(r, range(6))[-1]
    r.reset()
    assert np.array_equal(run(r, range(6))[-1], first)
    r.set_instruction("open the drawer")
    assert np.array_equal(run(r, range(6))[-1], run(fresh("open the drawer"), range(6))[-1])
    r = fresh("pick up the cube")
    run(r, range(20, 40))
    assert not np.array_equal(run(r, range(6))[-1], first)


def image(seen, **changes):
    """The observation with another image of its camera."""
    return dataclasses.replace(seen, cameras={"camera": dataclasses.replace(seen.cameras["camera"], **changes)})


def test_no_depth_runs_and_differs(runtime):
    runtime.engine = Certain(runtime.engine, [0.9])
    runtime.set_instruction("pick up the cube")
    runtime.steps = 1  # whatever these untrained weights make of the sentence

    def last(**changes):
        runtime.reset()
        return [runtime.step(image(observation(i), **changes)).actions for i in range(4)][-1]

    with_depth, without, empty = last(), last(depth=None), last(depth=np.full((64, 64), np.nan, np.float32))
    assert np.isfinite(without).all() and not np.allclose(without, with_depth)
    assert np.array_equal(without, empty)


def test_any_camera_size_and_bad_images(runtime):
    runtime.engine = Certain(runtime.engine, [0.9])
    runtime.set_instruction("pick up the cube")
    runtime.steps = 1  # whatever these untrained weights make of the sentence
    wide = observation(0, size=64)
    color, depth = np.zeros((96, 128, 3), np.uint8), np.ones((96, 128), np.float32)
    runtime.step(image(wide, color=color, depth=depth))
    with pytest.raises(ValueError, match="uint8"):
        runtime.step(image(wide, color=color.astype(np.float32)))
    with pytest.raises(ValueError, match="not aligned"):
        runtime.step(image(wide, color=color, depth=depth[:50]))


@torch.no_grad()
def test_the_category_of_a_cell_does_not_depend_on_its_colour():
    """With depth. Without, brightness takes its place, so that a can is still told from a block."""
    model, half = tiny_model(), CONFIG.half_width
    g = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, 1, 3, 64, 64, generator=g)
    depth, place = 0.5 + torch.rand(1, 1, 64, 64, generator=g), torch.rand(1, 4, 16, 16, generator=g)

    def seen(color, depth):
        return model.vision.encoder(color, depth, place).split(half, 1)

    (look, shape), (other_look, other_shape) = seen(one, depth), seen(other, depth)
    assert torch.equal(shape, other_shape) and not torch.allclose(look, other_look, atol=1e-3)
    assert not torch.allclose(seen(one, 0 * depth)[1], seen(other, 0 * depth)[1], atol=1e-4)
    same = one.flip(1)  # as bright everywhere, in other colours
    torch.testing.assert_close(seen(one, 0 * depth)[1], seen(same, 0 * depth)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", MODELS)
@torch.no_grad()
def test_the_hand_goes_by_categories_and_not_by_colours(mixer):
    """Other appearances of target, reference and what is at the tool change no action, other categories do."""
    model = MODELS[mixer]
    body, view, summary = history(model, 4)
    plain = model(body, view, summary, None)[0]
    for at, same in ((0, True), (1, False)):
        swapped = {}
        for name in ("features", "tool"):
            halves = list(getattr(view, name).chunk(2, -1))
            halves[at] = halves[at].flip(1) + 1.0
            swapped[name] = torch.cat(halves, -1)
        other = model(body, view._replace(**swapped), summary, None)[0]
        assert torch.equal(other.actions, plain.actions) == torch.equal(other.done, plain.done) == same


@torch.no_grad()
def test_the_hand_trusts_what_is_found_with_little_attention():
    """A target and a reference seen with a third of the attention are nearly as there; seen with none, they are not."""
    model = MODELS["mamba2"]
    body, view, summary = history(model, 4)

    def actions(visibility):
        features = view.features / view.visibility.unsqueeze(-1) * visibility
        seen = view._replace(visibility=torch.full_like(view.visibility, visibility), features=features)
        return model(body, seen, summary, None)[0].actions

    whole = actions(1.0)
    assert error(actions(1 / 3), whole) < 0.25 * error(actions(0.0), whole)


@torch.no_grad()
def test_a_colour_is_looked_up_in_the_appearance_and_a_category_in_its_own_half():

    class At(torch.nn.Module):
        """Points at the same two words for every role and step."""

        def __init__(self, color, kind):
            super().__init__()
            self.color, self.kind = color, kind

        def forward(self, tokens):
            logits = torch.full((*tokens.shape[:2], roles.steps * roles.NAMED * 2), -1e4)
            logits[:, self.color, 0::2] = logits[:, self.kind, 1::2] = 0.0
            return logits

    roles = tiny_model().queries
    roles.point_nowhere.weight.zero_()
    roles.point_nowhere.bias.fill_(-1e4)
    tokens = torch.randn(1, 6, roles.role.shape[1], generator=torch.Generator().manual_seed(0))
    text = EncodedText(tokens, torch.ones(1, 6, dtype=torch.bool), tokens[:, 0])

    def asked(color, kind):
        roles.point = At(color, kind)
        return roles(text)[0][:, :, : roles.NAMED]

    red_block, blue_block, red_can = asked(1, 3), asked(2, 3), asked(1, 4)
    (look, shape), (blue_look, same_shape), (same_look, can_shape) = (
        query.chunk(2, -1) for query in (red_block, blue_block, red_can)
    )
    assert torch.equal(shape, same_shape) and torch.equal(look, same_look)
    assert not torch.allclose(look, blue_look, atol=1e-2) and not torch.allclose(shape, can_shape, atol=1e-2)


@torch.no_grad()
def test_appearance_and_category_are_judged_without_each_other():
    """What a look adds to the doubt is the same in every shape, so a pair needs not to have been seen together."""
    judge = tiny_model().feasibility_head.double()
    one, other = torch.randn(2, sum(judge.sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def doubt(look, shape):
        parts = list(one.split(judge.sizes))
        parts[0], parts[1] = look.split(judge.sizes)[0], shape.split(judge.sizes)[1]
        return torch.exp(-judge(torch.cat(parts)))

    assert torch.allclose(doubt(one, one) - doubt(other, one), doubt(one, other) - doubt(other, other))
    assert all(not torch.allclose(doubt(one, one), doubt(*other_one)) for other_one in ((other, one), (one, other)))
    surest = [-torch.log(doubt(a, b)) for a in (one, other) for b in (one, other)]
    for part, seen in zip(judge.parts[2:], one.split(judge.sizes)[2:], strict=True):
        assert all(logit < part(seen) for logit in surest)  # no surer than any part
