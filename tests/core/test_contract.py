"""The contract between session and host, in a loop of one's own."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from head_pruning import (
    AttentionSite,
    FeedForwardSite,
    HeadPruningError,
    Pruner,
    PruningSession,
    UnitMap,
    build_pruner,
    methods,
    register_pruner,
)
from head_pruning.outputs import Recorder, logits_of
from tests.contract import FACTORS, SECOND, UPDATE, UPDATES, Probe, ProbeConfig, expected, watching

WIDTH, HEADS = 8, 2


class Attention(nn.Module):
    """Eager attention, which gives its probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        probabilities = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((probabilities @ v).transpose(1, 2).flatten(2)), probabilities


class Layer(nn.Module):
    """One layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.down = Attention(), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x):
        x = x + self.attention(x)[0]
        return (x + self.down(torch.tanh(self.up(x))),)


class Classifier(nn.Module):
    """Three layers and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)
        self.reentrant = None

    def forward(self, ids, skip=()):
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            if number in skip:
                continue
            if self.reentrant is None:
                x = layer(x)[0]
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)[0]
        return self.head(x[:, 0])


def site(number: int) -> AttentionSite:
    name = f"layers.{number}"
    parts = tuple(f"{name}.attention.{part}" for part in "qkv")
    return AttentionSite(
        f"{name}.attention", "encoder_self", name, HEADS, WIDTH // HEADS, f"{name}.attention.out", parts
    )


def block(number: int) -> FeedForwardSite:
    name = f"layers.{number}"
    return FeedForwardSite(f"{name}.ffn", name, 12, f"{name}.up", f"{name}.down")


MAP = UnitMap(tuple(map(site, range(3))), tuple(map(block, range(3))))


def make(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier()


def batch(number: int):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(20, (4, 5), generator=generator), torch.randint(3, (4,), generator=generator)


def task_loss(model, number: int):
    ids, labels = batch(number)
    return nn.functional.cross_entropy(model(ids), labels) / 2


def gates():
    """Joint DSP beside the probe."""
    given = {"num_of_heads": 3, "joint_pruning": True, "annealing": True, "initial_temperature": 1.0}
    return build_pruner(methods()["dsp"], type("Given", (), {**given, "cooldown_steps": 4}))


class Run:
    """The plain loop of the session's docstring, with two micro-batches per update."""

    def __init__(self, seed=0):
        self.model, self.probe = make(seed), Probe()
        self.session = PruningSession(self.model, MAP, [gates(), self.probe], total_steps=UPDATES).attach()
        self.step, self.rates = 0, []
        self.build()

    def build(self):
        self.optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=0.01)
        begin, end = self.session.schedule_span(self.step)
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1.0, 0.1, total_iters=(end or UPDATES) - begin
        )

    def to(self, last):
        while self.step < last:
            if self.session.enter_phase(self.step):
                self.build()
            self.session.before_update(self.step)
            self.optimizer.zero_grad()
            for number in (0, 1):
                self.session.loss(task_loss(self.model, 2 * self.step + number), weight=0.5).backward()
            self.session.after_backward()
            self.session.before_step(self.optimizer)
            self.optimizer.step()
            self.session.after_step()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.schedule.step()
            self.step += 1
        return self

    def state(self):
        parts = self.model, self.optimizer, self.schedule, self.session
        return copy.deepcopy([part.state_dict() for part in parts])

    def resume(self, state):
        model, optimizer, schedule, session = state
        self.session.load_state_dict(session)
        self.model.load_state_dict(model)
        self.step = self.session.step + 1
        self.session.enter_phase(self.session.step)
        self.build()
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(schedule)
        return self


def test_hooks_in_order():
    run = Run()
    with watching(run.probe):
        run.to(UPDATES)
    assert run.probe.seen == expected()


def test_learning_rate_is_scaled_for_the_step_alone():
    run = Run()
    with watching(run.probe):
        run.to(UPDATES)
    np.testing.assert_allclose(run.probe.rates, np.multiply(run.rates, FACTORS), rtol=1e-12)
    assert run.rates[0] == run.rates[SECOND] == 0.01  # each phase has its own schedule
    np.testing.assert_allclose(run.rates[1:SECOND], run.rates[SECOND + 1 :], rtol=1e-12)
    assert run.session.metrics()["lr_factor"] == FACTORS[-1]


@pytest.mark.parametrize("stop", [SECOND - 1, SECOND, SECOND + 1])
def test_resumed_in_either_phase(stop):
    whole, parts = Run().to(UPDATES), Run().to(stop)
    again = Run(seed=1).resume(parts.state())
    with watching(again.probe):
        again.to(UPDATES)
    assert again.probe.seen == expected(stop)
    for ours, theirs in zip(again.model.state_dict().values(), whole.model.state_dict().values()):
        assert torch.equal(ours, theirs)
    ours, theirs = again.session.state_dict(), whole.session.state_dict()
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert again.probe.calls == 2 * UPDATES


def test_two_micro_batches_add_up_to_one():
    """The weight of a term makes its sum over the micro-batches what one batch of both gives."""
    gradients = []
    for parts in ((0,), (0, 0)):
        model, probe = make(), Probe()
        session = PruningSession(model, MAP, [probe]).attach()
        session.before_update(0)
        for number in parts:
            ids, labels = batch(number)
            loss = nn.functional.cross_entropy(model(ids), labels) / len(parts)
            session.loss(loss, weight=1 / len(parts)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two)


def test_what_the_loss_is_given():
    given = []

    class Looks(Probe):
        def loss(self, loss, inputs, outputs):
            given.append((inputs, outputs))
            return loss

    model = make()
    session = PruningSession(model, MAP, [Looks()]).attach()
    session.before_update(0)
    ids, _ = batch(0)
    mask = ids != 0
    loss = model(ids).sum()
    assert session.loss(loss, "the batch", masks={"encoder": mask}) is loss
    (inputs, outputs), x = given[0], model.embed(ids)
    assert (
        inputs == "the batch" and torch.equal(outputs.raw, model(ids)) and torch.equal(outputs.logits[0], model(ids))
    )
    states, attentions = [x], []
    for layer in model.layers:
        attentions.append(layer.attention(x)[1])
        x = layer(x)[0]
        states.append(x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs.hidden_states, states, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs.attentions, attentions, strict=True))
    assert len(outputs.masks) == 4 and all(each is mask for each in outputs.masks)
    # A teacher sees the same batch, and its layers are read as the student's are.
    teacher = make(1)
    recorder = Recorder(teacher, MAP, {"hidden_states"})
    recorder.attach()
    with torch.no_grad():
        assert torch.equal(outputs.call(teacher), teacher(ids))
        theirs = recorder.take()
    assert torch.equal(theirs.hidden_states[0], teacher.embed(ids)) and not theirs.attentions
    recorder.detach()
    session.detach()
    for module in (*model.modules(), *teacher.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant):
    model, probe = make().train(), Probe()
    session = PruningSession(model, MAP, [probe]).attach()
    session.before_update(0)
    model.reentrant = reentrant
    if reentrant:
        with pytest.raises(HeadPruningError, match="layers.0.attention gave carries no gradient.*use_reentrant=False"):
            session.loss(task_loss(model, 0))
        return
    for number in (0, 1):
        session.loss(task_loss(model, number)).backward()  # layers run again here, which no loss must see
    plain = make().train()
    other = PruningSession(plain, MAP, [Probe()]).attach()
    other.before_update(0)
    for number in (0, 1):
        other.loss(task_loss(plain, number)).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


def test_nothing_is_kept_outside_of_updates_or_by_copies():
    model = make()
    session = PruningSession(model, MAP, [Probe()]).attach()
    model(batch(0)[0])
    assert session._recorder._call.raw is None and not session._recorder._call.layers
    session.before_update(0)
    task_loss(model, 0)
    task_loss(copy.deepcopy(model), 1)
    task_loss(model, 1)
    assert all(len(runs) == 1 for runs in session._recorder._call.layers.values())  # the last call alone
    session.after_backward()
    assert session._recorder._call.raw is None
    model(batch(0)[0])
    assert session._recorder._call.raw is None


def test_methods_that_ask_for_nothing_leave_the_model_without_hooks():
    model = make()
    session = PruningSession(model, MAP, [gates()]).attach()
    assert not session.changes_loss and not session.steers_host
    assert not any(module._forward_hooks for module in model.modules())
    loss = torch.tensor(1.0)
    assert session.loss(loss) is loss


class Skipped:
    """An update that is given up after any of its hooks."""

    def __init__(self):
        self.model = make()
        options = {"target_sparsity": 0.5, "pruning_frequency": 1, "policy_end_step": 1}
        weights = build_pruner(methods("weights")["gradual_magnitude"], type("Given", (), options))
        self.gates = gates()
        self.session = PruningSession(self.model, MAP, [self.gates, weights, Probe()], total_steps=UPDATES).attach()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.update(0, UPDATE)

    def update(self, step, hooks):
        session = self.session
        for hook in hooks:
            if hook == "before_update":
                session.before_update(step)
                self.optimizer.zero_grad()
            elif hook == "loss":
                session.loss(task_loss(self.model, step)).backward()
            elif hook == "before_step":
                session.before_step(self.optimizer)
            elif hook == "optimizer":
                self.optimizer.step()
            else:
                getattr(session, hook)()

    def bits(self):
        state = {**self.session.state_dict(), **self.session.tensor_state(), **self.model.state_dict()}
        return {name: torch.as_tensor(value).clone() for name, value in state.items()}


@pytest.mark.parametrize("hooks", [UPDATE[:1], UPDATE[:2], UPDATE[:4], UPDATE[:5]], ids=lambda hooks: hooks[-1])
def test_a_skipped_update_leaves_no_trace(hooks):
    run, twin = Skipped(), Skipped()
    before = run.bits()
    run.update(1, hooks)
    run.session.skip_update()
    after = run.bits()
    for name in before.keys() - {"step", "dsp.schedule", "probe.calls"}:
        assert torch.equal(before[name], after[name]), name
    assert run.optimizer.param_groups[0]["lr"] == 0.1 and run.gates.gradient is None
    run.update(1, UPDATE)
    twin.update(1, UPDATE)
    ours, theirs = run.bits(), twin.bits()
    for name in ours.keys() - {"probe.calls"}:
        assert torch.equal(ours[name], theirs[name]), name


def test_an_overflow_is_no_failure_of_the_gates(caplog):
    run = Skipped()
    run.update(1, UPDATE[:3])
    run.session.gates.gradients.fill_(np.inf)
    run.session.after_backward()
    run.session.before_step(run.optimizer)
    run.session.skip_update()
    assert not caplog.messages and run.session.metrics()["gate_skip"] == 0 and run.session.metrics()["gate_norm"] == 0


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_changed_learning_rate_needs_the_optimizer():
    session = PruningSession(make(), MAP, [Probe()]).attach()
    session.before_update(1)
    with pytest.raises(HeadPruningError, match=r"must be given the optimizer"):
        session.before_step()


def test_a_phase_must_be_entered():
    session = PruningSession(make(), MAP, [Probe()]).attach()
    assert not session.enter_phase(0)
    with pytest.raises(HeadPruningError, match=f"new phase of probe begins with update {SECOND}; call session.enter"):
        session.before_update(SECOND)
    assert session.enter_phase(SECOND) and not session.enter_phase(SECOND + 1)
    session.before_update(SECOND)


def test_needs_and_kinds_are_known_ones():
    probe = Probe()
    probe.needs = frozenset({"gradients"})
    with pytest.raises(HeadPruningError, match="probe needs gradients, which no host has"):
        PruningSession(make(), MAP, [probe])
    probe = Probe()
    probe.kind = "grows"
    with pytest.raises(HeadPruningError, match="of the kind 'grows'; the kinds are heads, units"):
        PruningSession(make(), MAP, [probe])
    with pytest.raises(HeadPruningError, match="found by the model's unit map"):
        PruningSession(make(), None, [Probe()])
    with pytest.raises(HeadPruningError, match="is registered for weights and its class says distils"):
        register_pruner(name="probe", config=ProbeConfig, pruner=Probe, prunes="weights")


def test_a_model_that_was_not_called_or_gave_too_little():
    model = make()
    session = PruningSession(model, MAP, [Probe()]).attach()
    session.before_update(0)
    with pytest.raises(HeadPruningError, match="the model was not called since"):
        session.loss(model.head(torch.zeros(1, WIDTH)).sum())
    loss = model(batch(0)[0], skip=(1,)).sum()
    with pytest.raises(HeadPruningError, match="layer layers.1 did not run"):
        session.loss(loss)
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda module, args, output: (output[0], None), prepend=True)
    with pytest.raises(HeadPruningError, match="layers.0.attention gave no attention probabilities.*eager"):
        session.loss(task_loss(model, 0))


def test_pipelined_heads_go_with_nothing_that_changes_the_model():
    pipelined = build_pruner(methods()["ste"], type("Given", (), {"num_of_heads": 3}))
    model = make()
    with pytest.raises(HeadPruningError, match="so probe cannot change them in the same run; add --joint-pruning"):
        PruningSession(model, MAP, [pipelined, Probe()]).attach()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_logits_among_outputs():
    one, two, loss = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor(1.0)
    assert logits_of(one) == (one,)
    assert logits_of({"loss": loss, "start_logits": one, "end_logits": two}) == (one, two)
    assert logits_of((loss, one, two)) == (one,) and logits_of((one, {"attn": None})) == (one,)
    with pytest.raises(HeadPruningError, match="gave no logits"):
        logits_of({"loss": loss})


# -- layers of a unit map ---------------------------------------------------------------------------------------------


def test_layers_of_a_map():
    assert MAP.layers == ("layers.0", "layers.1", "layers.2") and "layers" not in MAP.to_dict()
    named = UnitMap(MAP.attention[::2], (), MAP.layers)  # all heads of layer 1 are gone
    assert named.layers == MAP.layers and UnitMap.from_dict(named.to_dict()) == named
    stored = {name: named.to_dict()[name] for name in ("attention", "feed_forward")}  # of an older version
    assert UnitMap.from_dict(stored).layers == ("layers.0", "layers.2")


def test_the_same_hook_for_all_kinds():
    """A session takes any number of pruners of the kinds without gates."""

    class Other(Probe):
        name, kind = "other", "quantizes"

    class Third(Pruner):
        name, kind = "third", "distils"

    session = PruningSession(make(), MAP, [Probe(), Other(), Third(ProbeConfig()), gates()]).attach()
    assert [pruner.name for pruner in session.of_kind("distils")] == ["probe", "third"]
    assert [pruner.name for pruner in session.of_kind("quantizes", "heads")] == ["other", "dsp"]
    assert session.head_mask().kept == 3 and session.weight_masks() == {}
    assert {name.partition(".")[0] for name in session.state_dict()} == {"step", "probe", "other", "dsp"}
    twice = PruningSession(make(), MAP, [Probe(), Probe()])
    with pytest.raises(HeadPruningError, match="Two pruners are called probe"):
        twice.attach()
