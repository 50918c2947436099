"""Which tensors of a model are pruned, by the unit map's sites or by patterns of names, and how they are laid out."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any, Iterable, Iterator, Optional

import torch

from ...errors import HeadPruningError
from ...unit_map import UnitMap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """One pruned parameter.

    Args:
        name: its dotted name in the model.
        parameter: itself.
        layout: the dimensions of its outputs and of its inputs, which are summed over; None for biases, and where
            they are not known.
    """

    name: str
    parameter: torch.nn.Parameter
    layout: Optional[tuple[int, int]] = None

    def by_outputs(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape as a view ``[..., outputs, inputs]``; :meth:`back` is the inverse."""
        assert self.layout is not None  # as Selection.check makes sure
        return tensor.movedim(self.layout, (-2, -1))

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor ``[..., outputs, inputs]`` as a view of the parameter's shape."""
        assert self.layout is not None
        return tensor.movedim((-2, -1), self.layout)


@dataclass(frozen=True)
class Targets:
    """What of a model is pruned, and what is not.

    Args:
        chosen: the pruned parameters, in the model's order, each once.
        left: names and sizes of the matrices that stay dense, but for embeddings.
        overlooked: those of them that lie in a layer of the unit map, and were neither excluded nor are routers.
        outside: names of the chosen ones that lie outside of the unit map's sites.
    """

    chosen: list[Target]
    left: dict[str, int]
    overlooked: list[str]
    outside: set[str]


def weight_targets(
    model: torch.nn.Module,
    unit_map: Optional[UnitMap],
    *,
    include: Optional[str] = None,
    exclude: Optional[str] = None,
    biases: bool = True,
) -> list[Target]:
    """The parameters to prune; see :func:`find_targets`, whose arguments and errors it has."""
    return find_targets(model, unit_map, include=include, exclude=exclude, biases=biases).chosen


def find_targets(
    model: torch.nn.Module,
    unit_map: Optional[UnitMap],
    *,
    include: Optional[str] = None,
    exclude: Optional[str] = None,
    biases: bool = True,
    frozen: bool = False,
    everywhere: bool = False,
) -> Targets:
    """The parameters to prune, and the matrices that stay dense.

    Without ``include`` these are the weights of the unit map's sites: query, key, value and output of each attention,
    all projections of each feed-forward block, all tensors of experts. On BERT with ``biases`` that is what the
    published PLATON selects by name (85 017 600 scalars of BERT-base). Weights of normalisations and embeddings are
    never among them, also not by a pattern, and also not where another module shares them (a tied output layer).
    Matrices of adapters are among them by a pattern alone: their zeros make no weight of the model zero.

    Args:
        model: the model.
        unit_map: its sites; None where ``include`` is given.
        include: regular expression searched in parameter names; replaces the choice by sites.
        exclude: regular expression of names to leave out.
        biases: also the biases of the chosen modules.
        frozen: also those that are not trained.
        everywhere: without ``include`` also those of linear layers and convolutions outside of the sites.

    Raises:
        HeadPruningError: nothing is left to prune, a pattern is no regular expression, or a parameter is sharded.
    """
    wanted, unwanted = name_pattern(include, "--weights-include"), name_pattern(exclude, "--weights-exclude")
    if wanted is None and unit_map is None:
        raise HeadPruningError("Without a unit map the weights to prune must be named; add --weights-include.")
    protected = {id(parameter) for module in model.modules() if is_protected(module) for parameter in _own(module)}
    by_sites = unit_map if wanted is None else None
    places = () if by_sites is None else tuple(_places(by_sites))
    layers = () if by_sites is None else tuple(f"{layer}." for layer in by_sites.layers)
    experts = {name: site.transposed for site in (unit_map.experts if unit_map else ()) for name in site.weights}
    owners = {id(parameter): module for module in model.modules() for parameter in _own(module)}
    adapters = of_adapters(model)
    found, kept_frozen, adapted = Targets([], {}, [], set()), [], 0
    for name, parameter in model.named_parameters():
        if id(parameter) in protected or not parameter.is_floating_point():
            continue
        if id(parameter) in adapters and wanted is None or _is_cut_out(owners[id(parameter)], parameter):
            continue
        bias = parameter.dim() < 2 or name.endswith("bias")
        outside = wanted is None and not f"{name}.".startswith(places)
        fits = wanted.search(name) is not None if wanted is not None else not outside
        fits = fits or everywhere and outside and _projects(owners[id(parameter)])
        excluded = unwanted is not None and bool(unwanted.search(name))
        trained = parameter.requires_grad or frozen
        if fits and not excluded and trained and (biases or not bias):
            require_whole(name, parameter)
            layout = None if bias else _layout(owners[id(parameter)], name, parameter, experts.get(name))
            found.chosen.append(Target(name, parameter, layout))
            adapted += id(parameter) in adapters
            if outside:
                found.outside.add(name)
            continue
        if fits and not excluded and not trained:
            kept_frozen.append(name)
        if not bias:
            found.left[name] = parameter.numel()
            router = any("router" in type(module).__name__.lower() for module in _around(model, name))
            if name.startswith(layers) and not (fits or excluded or router) and parameter.requires_grad:
                found.overlooked.append(name)
    if not found.chosen and adapters and wanted is None:
        raise HeadPruningError(
            "No trainable weight is left to prune: the model's own weights are frozen under adapters; merge the "
            "adapters into it and unfreeze it first (merge_and_unload, requires_grad_), or prune their matrices by "
            "name (--weights-include lora_), whose zeros make no weight of the model zero."
        )
    if kept_frozen:
        logger.warning("%d frozen parameters are not pruned: %s", len(kept_frozen), shortened(kept_frozen))
    if adapted:
        logger.warning(
            "%d of %d pruned tensors are of adapters: their zeros make no weight of the model zero",
            adapted,
            len(found.chosen),
        )
    if not found.chosen:
        raise HeadPruningError(
            "No trainable weight is left to prune; correct --weights-include and --weights-exclude, or unfreeze the "
            "model."
        )
    return found


def of_adapters(model: torch.nn.Module) -> set[int]:
    """The parameters that adapters of PEFT have beside the layers that they are on."""
    found: set[int] = set()
    for module in model.modules():
        base_layer: Any = getattr(module, "get_base_layer", None)
        if base_layer is not None:
            found |= {id(each) for each in module.parameters()} - {id(each) for each in base_layer().parameters()}
    return found


def _projects(owner: torch.nn.Module) -> bool:
    """Whether a module multiplies with a matrix: a linear layer, a convolution, a Conv1D of transformers."""
    return isinstance(owner, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)) or hasattr(owner, "nf")


def _layout(
    owner: torch.nn.Module, name: str, parameter: torch.Tensor, transposed: Optional[bool]
) -> Optional[tuple[int, int]]:
    """The dimensions of a matrix's outputs and inputs; None where they are not known."""
    if isinstance(owner, torch.nn.modules.conv._ConvNd):
        return (1, 0) if owner.transposed else (0, 1)
    if parameter.dim() == 2 and hasattr(owner, "nf"):  # a Conv1D of transformers keeps its weight as [in, out]
        return 1, 0
    widths = getattr(owner, "out_features", None), getattr(owner, "in_features", None)
    if tuple(parameter.shape) == widths:
        return 0, 1
    if parameter.dim() == 3:
        told = getattr(owner, "is_transposed", transposed)
        return None if told is None else ((2, 1) if told else (1, 2))
    return None


def _around(model: torch.nn.Module, name: str) -> Iterator[torch.nn.Module]:
    """The modules that hold a parameter, but for the model itself."""
    while name := name.rpartition(".")[0]:
        yield model.get_submodule(name)


def _is_cut_out(owner: torch.nn.Module, parameter: torch.Tensor) -> bool:
    """Whether a parameter is of a layer that no head is left of: empty, and no shard, which would be flat."""
    weight = owner._parameters.get("weight")
    return parameter.numel() == 0 and weight is not None and weight.dim() > 1


def require_whole(name: str, parameter: torch.Tensor) -> None:
    """Raise HeadPruningError for a parameter of which it is not known which part this process holds."""
    if parameter.numel() == 0 or hasattr(parameter, "ds_id"):
        raise HeadPruningError(
            f"{name} is sharded or empty in this process; prune weights with plain data parallelism (DDP) or FSDP2 "
            "instead of FSDP1 or DeepSpeed ZeRO-3."
        )


def shortened(names: list[str]) -> str:
    """At most four of the names, for a message."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def numbered(names: Iterable[str]) -> str:
    """Names for a message, those that differ in their numbers alone as one, with ``*`` in place of these."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return ", ".join(group[0] if len(group) == 1 else pattern for pattern, group in groups.items())


def name_pattern(text: Optional[str], flag: str) -> Optional[re.Pattern]:
    """The regular expression that ``flag`` gave, if any. Raises HeadPruningError when it is none."""
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise HeadPruningError(f"{flag} {text!r} is no regular expression ({error}); correct it.") from error


def _places(unit_map: UnitMap) -> Iterator[str]:
    """The modules and parameters of the sites, each with a dot behind it."""
    for site in unit_map.attention:
        yield from (f"{name}." for name in (*site.projections, site.out_proj))
    for block in unit_map.feed_forward:
        yield from (f"{name}." for name in (block.in_proj, *block.gates, block.out_proj))
    for experts in unit_map.experts:
        yield from (f"{name}." for name in (*experts.weights, *experts.biases))


def is_protected(module: torch.nn.Module) -> bool:
    """Whether a module's weights are never pruned: those of embeddings and normalisations."""
    return isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) or "norm" in type(module).__name__.lower()


def _own(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    return module.parameters(recurse=False)
