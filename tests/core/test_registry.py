"""Methods by name, and the options that choose them."""

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from head_pruning import (
    HeadPruningError,
    Pruner,
    build_pruner,
    choose_method,
    choose_methods,
    methods,
    register_pruner,
    registry,
)
from head_pruning.choosing import CommandLine
from head_pruning.options import underscored
from head_pruning.registry import get_method, option_fields


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def given(**options) -> SimpleNamespace:
    """All options at their defaults but these, as a host's parsed command line has them."""
    return SimpleNamespace(**{**{name: f.default for name, f in option_fields().items()}, **options})


def config(**fields) -> type:
    return dataclasses.make_dataclass("Config", [(name, kind, value) for name, (kind, value) in fields.items()])


def test_a_method_registers_with_one_call_and_is_found():
    @dataclass
    class Fresh:
        shine: float = field(default=0.5, metadata={"help": "how much it shines, 0 to 1"})

    class FreshPruner(Pruner):
        name = "fresh"

    before = set(methods())
    register_pruner(name="fresh", config=Fresh, pruner=FreshPruner, selected_by=lambda options: options.shine > 0.5)
    assert set(methods()) == before | {"fresh"} and "shine" in option_fields()
    method = choose_method(given(shine=0.9))
    pruner = build_pruner(method, given(shine=0.9))
    assert isinstance(pruner, FreshPruner) and pruner.config == Fresh(shine=0.9)
    assert build_pruner(get_method("fresh"), SimpleNamespace()).config.shine == 0.5


def test_a_name_is_taken_once():
    with pytest.raises(HeadPruningError, match="The pruner dsp is registered twice"):
        register_pruner(name="dsp", config=config(), pruner=Pruner)


def test_an_option_needs_help():
    bare = config(shine=(float, field(default=1.0)))
    with pytest.raises(HeadPruningError, match="option shine of the pruner fresh has no help"):
        register_pruner(name="fresh", config=bare, pruner=Pruner)
    assert "fresh" not in methods()


@pytest.mark.parametrize("kind, default", [(float, 0.5), (int, 0.2)])
def test_an_option_means_the_same_everywhere(kind, default):
    twin = config(pruning_lr=(kind, field(default=default, metadata={"help": "a rate"})))
    with pytest.raises(HeadPruningError, match="option pruning_lr of the pruner fresh differs from that of"):
        register_pruner(name="fresh", config=twin, pruner=Pruner)
    assert "fresh" not in methods()


def test_every_shipped_option_has_help_and_a_default():
    assert {"dsp", "ste", "voita", "random"} <= set(methods())
    for name, option in option_fields().items():
        assert len(option.metadata["help"].split()) > 3, name
        assert option.default is not dataclasses.MISSING, name


@pytest.mark.parametrize("options, name", [
    ({}, None),
    ({"num_of_heads": 4}, "head_sensitivity"),
    ({"num_of_heads": 4, "joint_pruning": True, "min_heads_per_layer": 1}, "head_sensitivity"),
    ({"num_of_heads": 4, "annealing": True}, "dsp"),
    ({"num_of_heads": 4, "pruning_lr": 0.5}, "dsp"),
    ({"num_of_heads": 4, "use_ste": True}, "ste"),
    ({"l0_penalty": 200.0}, "voita"),
    ({"l0_penalty": 200.0, "num_of_heads": 4}, "voita"),
])  # fmt: skip
def test_options_imply_their_method(options, name):
    method = choose_method(given(**options))
    assert (method.name if method else None) == name


def test_what_was_set_counts_whatever_its_value():
    for rate in (0.2, 0.3, 0.5):  # 0.2 is the default
        assert [method.name for method in choose_methods({"num_of_heads": 4, "pruning_lr": rate})] == ["dsp"]
    switched_off = {"num_of_heads": 4, "annealing": False, "initial_temperature": None}
    assert [method.name for method in choose_methods(switched_off)] == ["head_sensitivity"]


def test_a_named_method_wins_over_implied_ones():
    assert choose_method(given(num_of_heads=4), "random").name == "random"
    with pytest.raises(
        HeadPruningError,
        match="There is no pruner dps; choose one of dsp, given, gpp, head_sensitivity, random",
    ):
        choose_method(given(num_of_heads=4), "dps")


def test_options_that_a_host_does_not_have_count_as_unset():
    assert choose_method(SimpleNamespace(num_of_heads=4)).name == "head_sensitivity"
    assert choose_method(SimpleNamespace()) is None


def test_several_implied_methods_are_refused():
    with pytest.raises(HeadPruningError, match=r"fit several pruners \(.*ste.*voita.*|.*voita.*ste.*\)") as error:
        choose_method(given(use_ste=True, l0_penalty=1.0, num_of_heads=4))
    assert "ste" in str(error.value) and "voita" in str(error.value)


@pytest.mark.parametrize("options, pruner, words", [
    ({"annealing": True}, None, "--annealing belongs to dsp, but no pruner is chosen"),
    ({"num_of_heads": 4, "use_ste": True, "cooldown_steps": 9}, None, "--cooldown-steps belongs to dsp, but .* ste"),
    ({"num_of_heads": 4, "pruning_lr": 0.5}, "random", "--pruning-lr belongs to .*dsp.* but the pruner is random"),
    ({"num_of_heads": 4, "random_heads_seed": 3}, None, "--random-heads-seed belongs to random"),
    # The default where it has the option, else the first that has it.
    ({"count_schedule": "0:0.5"}, None, "but no pruner is chosen; drop it or add --pruner head_sensitivity.$"),
    ({"num_of_heads": 4, "count_schedule": "0:0.5"}, "random", "is random; drop it or choose --pruner head_sensitivi"),
    ({"num_of_heads": 4, "pruning_lr": 0.5}, "head_sensitivity", "head_sensitivity; drop it or choose --pruner dsp"),
])  # fmt: skip
def test_foreign_options_are_refused(options, pruner, words):
    with pytest.raises(HeadPruningError, match=words):
        choose_method(given(**options), pruner)


# -- all kinds -----------------------------------------------------------------------------------------------------


class Teaching(Pruner):
    kind = "distils"


class Rounding(Pruner):
    kind = "quantizes"


@pytest.fixture
def more_kinds(own_registry):
    """Two distillers and a quantizer, with one option in common."""
    for name, pruner in (("answers", Teaching), ("states", Teaching), ("int8", Rounding)):
        more = {name: (float, field(default=1.0, metadata={"help": "an option of its own"}))}
        both = {"softness": (float, field(default=2.0, metadata={"help": "how soft the targets are"}))}
        register_pruner(name=name, config=config(**more, **(both if pruner is Teaching else {})), pruner=pruner)


@pytest.mark.parametrize("options, names", [
    ({"weight_pruner": "Platon", "beta1": 0.5, "pruner": "ste", "num_of_heads": 3}, ["ste", "platon"]),
    ({"num_of_heads": 3, "distill": "states, answers", "softness": 3.0}, ["head_sensitivity", "states", "answers"]),
    ({"quantizer": "int8", "weight_pruner": "lock", "distill": "answers"}, ["lock", "answers", "int8"]),
    ({"pruner": None, "beta1": None, "use_ste": False}, []),  # switched off
])  # fmt: skip
def test_a_run_has_methods_of_every_kind(more_kinds, options, names):
    assert [method.name for method in choose_methods(options)] == names


@pytest.mark.parametrize("options, sentence", [
    ({"states": 2.0}, "--states belongs to states, but no distiller is chosen; drop it or add --distill states."),
    ({"distill": "answers", "states": 2.0},
     "--states belongs to states, but the distiller is answers; drop it or choose --distill states."),
    ({"softness": 1.0}, "--softness belongs to answers, states, but no distiller is chosen; drop it or add --distill "
     "answers."),
    ({"beta1": 0.5}, "--beta1 belongs to platon, sensitivity, but no pruner of weights is chosen; drop it or add "
     "--weight-pruner platon."),
    ({"prune_biases": False}, "--prune-biases belongs to custom_mask, gradual_magnitude, lock, magnitude, movement, "
     "neural_wiring, one_shot_magnitude, platon, random_weights, sensitivity, but no pruner of "
     "weights is chosen; drop it or add --weight-pruner platon."),
    ({"quantizer": "int8,answers"}, "answers is none of the methods that quantize; choose it with --distill answers."),
    ({"weight_pruner": "lock,platon"}, "--weight-pruner platon and lock both prune weights, of which a run takes one; "
     "choose one of them."),
    ({"pruner": "sensitivity"}, "sensitivity is none of the methods that prune heads; choose it with --weight-pruner "
     "sensitivity, or take head_sensitivity, which is one."),
    ({"distill": "int4"}, "There is no distiller int4; choose one of answers, dfd, logits, spd, states."),
])  # fmt: skip
def test_what_is_not_chosen_is_refused_with_one_sentence(more_kinds, options, sentence):
    with pytest.raises(HeadPruningError) as refused:
        choose_methods(options)
    assert str(refused.value) == sentence


def test_a_command_that_is_bound_to_methods():
    line = CommandLine(underscored, {"pruner": ("heads",)}, ("dsp", "ste"), "run_all")
    assert [method.name for method in choose_methods({"use_ste": True}, line=line)] == ["ste"]
    assert [method.name for method in choose_methods({}, line=line)] == ["dsp"]
    for options, cure in (({"use_ste": True, "annealing": True}, "leave out --use_ste"),
                          ({"l0_penalty": 1.0}, "choose run_all --pruner voita")):  # fmt: skip
        with pytest.raises(HeadPruningError, match=f"; drop it or {cure}.$"):
            choose_methods(options, line=line)


def test_what_does_not_fit_is_not_registered():
    known = {"help": "an option"}
    with pytest.raises(HeadPruningError, match="fresh is registered for weights and its class says heads; give both"):
        register_pruner(name="fresh", config=config(), pruner=Pruner, prunes="weights")
    with pytest.raises(HeadPruningError, match="The example of the pruner fresh sets glow, which is none of its opti"):
        shine = config(shine=(float, field(default=1.0, metadata=known)))
        register_pruner(name="fresh", config=shine, pruner=Pruner, example={"glow": 1})
    assert "fresh" not in methods(None)
