"""What every registered method must do, whatever it is: on and off, exact counts, resume. A new one is picked up."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from head_pruning import HeadMask, HeadPruningError, PruningSession, UnitMap, build_pruner, methods
from head_pruning.weights import save_weight_masks, weight_targets
from tests.few import few
from tests.own_methods import registered

UPDATES = 10
with registered():  # the three of somebody else's too
    ALL = sorted(methods(None))
    OF_HEADS = sorted(methods("heads"))


@pytest.fixture(autouse=True)
def own_methods():
    with registered():
        yield


@pytest.fixture
def mask_file(toy, tmp_path):
    """What an option that names a file is given: a mask of five heads, and of half of the weights."""
    path = tmp_path / "masks.safetensors"
    model, unit_map = toy.make()
    masks = {target.name: target.parameter.detach() > 0 for target in weight_targets(model, unit_map, biases=False)}
    save_weight_masks(path, masks, HeadMask(unit_map, np.arange(12) % 5 < 2))
    return path


def build(toy, name: str, mask_file, seed: int = 0, **options):
    """Model, attached session and pruner, with the options of the method's example and joint training."""
    method = methods(None)[name]
    if method.kind == "quantizes":
        pytest.importorskip("torchao", reason="needs torchao")
    options = {**method.example, **options}
    for option, known in method.options.items():
        if known.metadata.get("by_content"):
            options[option] = str(mask_file)
    if "joint_pruning" in method.options:
        options["joint_pruning"] = True
    model, unit_map = toy.make(seed)
    if method.pruner.needs_trained_model:  # such as one whose weights were pruned
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[..., ::2] = 0.0
    pruner = build_pruner(method, SimpleNamespace(**options))

    def load_teacher(path, needs):
        return toy.make(5)[0].eval(), unit_map

    session = PruningSession(model, unit_map, [pruner], total_steps=UPDATES, load_teacher=load_teacher)
    return model, session.attach(), pruner


def update(toy, model, session, step: int, optimizer=None) -> None:
    session.before_update(step)
    model.zero_grad()
    session.loss(toy.loss(model, toy.batch(step))).backward()
    session.after_backward(denominator=24)
    session.before_step(optimizer)
    if optimizer is not None:
        optimizer.step()
    session.after_step()


def train(toy, name: str, mask_file, steps, resume_from=None):
    """Train model and pruner; what a checkpoint holds after it, the session, the pruner."""
    options = {}
    if "gate_clip_norm" in methods(None)[name].options:
        options["gate_clip_norm"] = 1e-3  # clips every step, so that the count of clipped steps is not 0
    model, session, pruner = build(toy, name, mask_file, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(11)
    if resume_from is not None:
        model.load_state_dict(resume_from["model"])
        session.load_state_dict(resume_from["session"])
        session.load_tensor_state(resume_from["tensors"])
        session.enter_phase(session.step)
        optimizer.load_state_dict(resume_from["optimizer"])
        torch.set_rng_state(resume_from["random"])
    for step in steps:
        session.enter_phase(step)
        update(toy, model, session, step, optimizer)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "session": session.state_dict(),
        "tensors": session.tensor_state(),
        "random": torch.get_rng_state(),
        "evaluation": session.gates.evaluation_values if session.gated else torch.empty(0),
        "at_target": session.at_target(),
    }
    return copy.deepcopy(state), session, pruner


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", ALL)
def test_attach_and_detach_leave_the_model_bit_for_bit(toy, mask_file, name):
    model, session, _ = build(toy, name, mask_file)
    session.detach()
    before = copy.deepcopy(model)
    session.attach()
    assert list(model.state_dict()) == list(before.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in before.named_parameters()]
    update(toy, model.eval(), session, 0)
    for parameter, keep in session.weight_masks().items():
        before.get_parameter(parameter).data[~keep] = 0.0  # what is pruned stays so
    session.detach()
    same(model.state_dict(), before.state_dict())
    assert hooks(model) == 0
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]


@pytest.mark.parametrize("stop", few([1, 6], 6))
@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_ends_bit_equal(toy, mask_file, name, stop):
    whole, session, _ = train(toy, name, mask_file, range(UPDATES))
    part, _, _ = train(toy, name, mask_file, range(stop))
    resumed, other, _ = train(toy, name, mask_file, range(stop, UPDATES), resume_from=part)
    assert all(value.dtype == np.float64 for value in whole["session"].values())
    for kept in ("session", "tensors", "model"):
        same(resumed[kept], whole[kept])
    assert whole["at_target"] == resumed["at_target"] and torch.equal(whole["evaluation"], resumed["evaluation"])
    assert session.head_mask() == other.head_mask()
    for one in (session, other):
        one.harden()
    assert session.head_mask() == other.head_mask()
    same(session.weight_masks(), other.weight_masks())
    assert not all(torch.equal(part["model"][key], value) for key, value in whole["model"].items())


def trained_seeded(toy, model, session) -> dict:
    """What a run ends with; draws of dropout are those of the update."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(UPDATES):
        session.enter_phase(step)
        torch.manual_seed(step)
        update(toy, model, session, step, optimizer)
    return {**model.state_dict(), **session.state_dict(), **session.tensor_state()}


@pytest.mark.parametrize("name", ALL)
def test_a_run_that_begins_anew_ends_as_a_first_one(toy, mask_file, name):
    model, session, _ = build(toy, name, mask_file)
    expected = trained_seeded(toy, model, session)
    model, session, _ = build(toy, name, mask_file)
    weights = copy.deepcopy(model.state_dict())
    for step in range(4):
        session.enter_phase(step)
        update(toy, model, session, step, torch.optim.SGD(model.parameters(), lr=0.1))
    model.load_state_dict(weights)
    session.begin_anew()
    same(trained_seeded(toy, model, session), expected)


def test_gated_and_quantized_layers_begin_anew_together(toy, mask_file):
    """The gates stay on the layers that the quantizer put in."""
    model, session, qat = build(toy, "qat", mask_file, quantization_begin=0)
    session.detach()
    gates = build_pruner(methods()["ste"], SimpleNamespace(num_of_heads=5, joint_pruning=True))
    for several in ([gates, qat], [qat, gates]):
        session = PruningSession(model, session.unit_map, several, total_steps=UPDATES).attach()
        for _ in range(2):
            update(toy, model, session, 0)
            session.begin_anew()
            assert not session.at_target() and not qat.state_dict()["ranges"].any()
        session.detach()
        assert hooks(model) == 0 and type(model.head) is torch.nn.Linear


@pytest.mark.parametrize("name", ALL)
def test_a_skipped_update_leaves_no_trace(toy, mask_file, name):
    model, session, _ = build(toy, name, mask_file)
    expected = trained_seeded(toy, model, session)
    model, session, _ = build(toy, name, mask_file)
    before = session.before_update

    def tried_before(step: int) -> None:
        before(step)
        session.loss(toy.loss(model, toy.batch(77))).backward()
        session.after_backward(denominator=24)
        session.before_step()
        session.skip_update()
        torch.manual_seed(step)
        before(step)

    session.before_update = tried_before
    same(trained_seeded(toy, model, session), expected)


@pytest.mark.parametrize("name", ALL)
def test_a_state_with_numbers_that_cannot_be_is_refused(toy, mask_file, name):
    state, session, pruner = train(toy, name, mask_file, range(3))
    good, tensors = state["session"], state["tensors"]
    huge = {key: np.full_like(value, 1e300) for key, value in good.items()}
    bad = [huge] if huge.keys() > {"step"} else []
    for key, value in good.items():
        if value.size:
            bad += [{**good, key: np.full_like(value, math.nan)}, {**good, key: value.astype(str)[:1] + "x"}]
        if key.partition(".")[2] in pruner.state_shapes:
            bad += [{**good, key: np.append(value, 7.5)}, {**good, key: value.reshape(1, -1)}]
    for each in bad:
        with pytest.raises(HeadPruningError):
            session.load_state_dict(each)
        assert session.step == int(good["step"][0])
    session.load_state_dict(good)
    for key, tensor in tensors.items():
        for broken in [tensor * math.nan] if tensor.is_floating_point() else [tensor[:-1], tensor.float()]:
            with pytest.raises(HeadPruningError):
                session.load_tensor_state({**tensors, key: broken})
    if tensors:
        with pytest.raises(HeadPruningError, match="lacks the"):
            session.load_tensor_state(dict(list(tensors.items())[1:]))
    session.load_tensor_state(tensors)
    same(session.state_dict(), good)


@pytest.mark.parametrize("name", ALL)
def test_the_outcome_has_the_count_that_was_asked_for(toy, mask_file, name):
    _, session, pruner = train(toy, name, mask_file, range(UPDATES))
    session.harden()
    mask, masks = session.head_mask(), session.weight_masks()
    assert (mask is not None) == (pruner.kind == "heads") and bool(masks) == (pruner.kind == "weights")
    wanted = getattr(pruner.config, "num_of_heads", None)
    assert mask is None or wanted is None or mask.kept == wanted
    parameters = dict(session.model.named_parameters())
    for tensor, keep in masks.items():
        assert not parameters[tensor][~keep].any(), tensor
    if masks:
        number = sum(keep.numel() for keep in masks.values())
        kept = sum(int(keep.sum()) for keep in masks.values())
        # Each tensor is cut to a whole number, and the weight at the threshold stays or goes.
        assert abs(kept - pruner.final_density() * number) <= 2 * len(masks)
    session.harden()
    assert session.head_mask() == mask
    same(session.weight_masks(), masks)


@pytest.mark.parametrize("name", OF_HEADS)
def test_a_hardened_state_stays_hard(toy, mask_file, name):
    model, session, _ = build(toy, name, mask_file)
    update(toy, model, session, 0)
    mask = session.harden()
    _, other, _ = build(toy, name, mask_file, seed=9)
    other.load_state_dict(session.state_dict())
    assert other.head_mask() == mask
    other.before_update(1)
    np.testing.assert_array_equal(other.gates.training_values.numpy(), mask.keep)
    np.testing.assert_array_equal(other.gates.evaluation_values.numpy(), mask.keep)


@pytest.mark.parametrize("name", OF_HEADS)
def test_the_state_of_a_model_with_other_heads_is_refused(toy, mask_file, name):
    model, session, pruner = build(toy, name, mask_file)
    state = session.state_dict()
    session.detach()
    smaller = UnitMap(session.unit_map.attention[:3])
    HeadMask(smaller, np.arange(9) < 4).save(mask_file)
    other = PruningSession(model, smaller, [pruner], total_steps=UPDATES).attach()
    with pytest.raises(HeadPruningError, match="12 heads but the model has 9"):
        other.load_state_dict(state)


@pytest.mark.parametrize("name", ["dsp", "ste", "voita"])
def test_a_loaded_run_counts_the_heads_that_it_kept(toy, mask_file, name):
    state, session, _ = train(toy, name, mask_file, range(8))
    _, loaded, _ = build(toy, name, mask_file)
    loaded.load_state_dict(state["session"])
    for number in ("heads_expected", "heads_kept"):
        assert loaded.metrics()[number] == pytest.approx(session.metrics()[number], abs=1e-6), number


@pytest.mark.parametrize("name", ALL)
def test_a_loaded_run_is_at_its_target_where_it_was(toy, mask_file, name):
    state, _, _ = train(toy, name, mask_file, range(UPDATES))
    model, loaded, _ = build(toy, name, mask_file)
    model.load_state_dict(state["model"])
    loaded.load_state_dict(state["session"])
    loaded.load_tensor_state(state["tensors"])
    assert loaded.at_target() == state["at_target"]
