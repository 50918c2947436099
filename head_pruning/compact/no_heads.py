"""What an attention module becomes when no head is left."""

import ast
import inspect
import re
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import nn

from .returned import parsed_forward, placed, return_options, returned_values


class ConfigView:
    """A module's configuration with some values of its own; all else is read from the model's."""

    def __init__(self, config: Any) -> None:
        self.__dict__["_config"] = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)


# Arguments with the sequence that is attended to, where it is another.
OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states", "key")


def bare() -> "NoHeads":
    """One without any attribute, for copies."""
    return NoHeads.__new__(NoHeads)


class NoHeads(nn.Module):
    """What attention without heads is: the output projection's bias, or, inside, nothing for it to read.

    An attention module becomes one by a change of its class; its attributes stay. Options (``_no_heads``):

    - ``inputs``: name and position of the argument whose shape each of its constants has; usually one.
    - ``out``: name of the output projection within the module; null: it is outside and gets an input of width 0.
    - ``after``: what runs on the output projection's output: names of modules, or of attributes that say a dropout's
      probability.
    - ``residual``: name and position of the argument that is added then, or null; ``norm``: the module that follows.
    - ``returns``: what it returns after the constants: name and position of an argument, or null for None; null: the
      bare tensor; ``list``: true where it returns a list instead of a tuple.
    - ``attentions``: name and position of the argument that asks for attentions, or null, and how many values more it
      returns then; ``weights``: the places of attentions among what it returns after the constants, where they are
      those of no head: ``[examples, 0, queries, keys]``.
    - ``drop``: names of its modules and parameters that are no longer needed.
    - ``cache``: name and position of the argument with keys and values of earlier tokens, and the attribute that says
      which of its layers this is, and whether they are those of another sequence; or null. ``tokens_first``: true
      where the input has the tokens before the examples; ``streams``: the attribute that says how many streams of the
      same tokens come behind the first in the input, which are not kept.
    - ``bias``: name and position of the argument with the position bias that it hands on to the layers to come, with
      their heads; it makes the bias where it gets none, with its own class's ``compute_bias``.
    - ``versions``: true where positions and what it returns are those of one version of transformers, and are read
      anew from the class's source when the recipe is applied.

    To ``isinstance`` it is of the class that it was, too: transformers looks for modules of that class to collect the
    attentions of, one entry for each layer.

    I-BERT's attention keeps a silent head instead: its output projection, once quantized, fails without inputs.
    """

    _no_heads: Mapping[str, Any]
    _no_heads_class: Any

    @property
    def __class__(self) -> type:
        return vars(self).get("_no_heads_class", NoHeads)

    @__class__.setter
    def __class__(self, kind: type) -> None:  # a host has a class of its own for it
        object.__dict__["__class__"].__set__(self, kind)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return bare, (), vars(self)  # pickle would look for an object of the class that it pretends to be

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The constant, in the shape of the input."""
        options = self._no_heads
        given = [_argument(where, args, kwargs) for where in options["inputs"]]
        constants = [None if each is None else self.constant(each, args, kwargs) for each in given]
        made = options.get("bias") and _argument(options["bias"], args, kwargs) is None
        seen: Any = 0
        keys: Optional[int] = None
        if options.get("cache"):
            name, position, layer, cross = options["cache"]
            cache = _argument((name, position), args, kwargs)
            hidden = self.examples_first(given[0])
            if options.get("streams"):
                hidden = hidden[:, : hidden.shape[1] // (1 + getattr(self, options["streams"]))]
            if made and cache is not None:
                seen = cache.get_seq_length(getattr(self, layer))
                seen = seen.clone() if isinstance(seen, torch.Tensor) else seen  # counted on in place
            keys = count_tokens(cache, hidden, getattr(self, layer), cross, kwargs.get("cache_position"))
        if options["returns"] is None:
            return constants[0]
        where, more = options["attentions"]
        if not _argument((where or ("output_attentions", None)), args, kwargs):
            more = 0
        passed = [None if where is None else _argument(where, args, kwargs) for where in options["returns"]]
        passed += [None] * more
        if self.collects(args, kwargs):
            for place in options.get("weights", ()):
                if place < len(passed):
                    passed[place] = self.no_weights(given[0], keys, kwargs)
        if made:
            keys = given[0].shape[1] if keys is None else keys
            bias = self.position_bias(given[0], keys, seen, args, kwargs)
            for place, where in enumerate(options["returns"]):
                if where == options["bias"]:
                    passed[place] = bias
        returned = (*constants, *passed)
        return list(returned) if options.get("list") else returned

    def examples_first(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[examples, tokens, features]``, whatever the order that the module's class has."""
        return hidden.transpose(0, 1) if self._no_heads.get("tokens_first") else hidden

    def collects(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        """Whether layers with heads return attentions now: when asked to, and where no fused kernel is at work."""
        where, _ = self._no_heads["attentions"]
        config = getattr(self, "config", None)
        eager = getattr(config, "_attn_implementation", "eager") == "eager"
        return eager or bool(_argument((where or ("output_attentions", None)), args, kwargs))

    def no_weights(self, hidden: torch.Tensor, keys: Optional[int], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The attentions of no head, ``[examples, 0, queries, keys]``."""
        hidden = self.examples_first(hidden)
        other = next((kwargs[name] for name in OTHER_SEQUENCE if isinstance(kwargs.get(name), torch.Tensor)), None)
        if keys is None:
            keys = hidden.shape[1] if other is None else self.examples_first(other).shape[1]
        return hidden.new_zeros(hidden.shape[0], 0, hidden.shape[1], keys)

    def position_bias(self, hidden: torch.Tensor, keys: int, seen: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        """What the module's class says of the positions of queries and keys, for all heads of the original.

        Args:
            hidden: the queries' input, ``[examples, tokens, features]``.
            keys: number of keys.
            seen: number of earlier tokens.
            args: of the forward.
            kwargs: of the forward.

        Returns:
            ``[1 or examples, heads, tokens, keys]``, with the mask where this version of transformers adds it here; in
            blocks as the class has them.
        """
        kind, here = self._no_heads_class, self._no_heads["bias_maker"]
        original: Any = kind.__new__(kind)  # this module as it was: its methods call each other
        object.__setattr__(original, "__dict__", self.__dict__)
        known = {"query_length": hidden.shape[1], "key_length": keys, "device": hidden.device}
        known |= {"past_seen_tokens": seen, "cache_position": kwargs.get("cache_position")}
        known["block_length"] = getattr(self, "block_len", None)
        bias = original.compute_bias(**{name: known[name] for name in here["arguments"]})
        mask = here["mask"] and _argument(here["mask"], args, kwargs)
        if mask is None:
            return bias
        if known["block_length"] is not None:
            return bias + torch.where(mask > 0, 0.0, -1e10).transpose(1, 2)
        return bias + mask[:, :, :, :keys]

    def constant(self, like: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """What the attention of queries in the shape of ``like`` has become."""
        options = self._no_heads
        output = like.new_zeros(*like.shape[:-1], 0)
        if not options.get("out"):
            return output
        out: Any = self.get_submodule(options["out"])
        if hasattr(out, "nf"):  # GPT-2's Conv1D cannot read nothing
            output = like.new_zeros(*like.shape[:-1], out.nf) + out.bias
        else:
            output = out(output)
        for name in options["after"]:
            step = getattr(self, name)
            if isinstance(step, nn.Module):
                output = step(output)
            else:
                output = nn.functional.dropout(output, step, self.training)
        if options.get("residual"):
            output = _argument(options["residual"], args, kwargs) + output
        return self.get_submodule(options["norm"])(output) if options.get("norm") else output


def _argument(where: Sequence, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    name, position = where
    if name in kwargs:
        return kwargs[name]
    return args[position] if position is not None and len(args) > position else None


def bias_maker(kind: type) -> Optional[dict[str, Any]]:
    """How a class makes its position bias: the arguments of its ``compute_bias``, and where the mask is that it adds.

    The mask is null where it adds none, as newer transformers do. None where something of this is not known.
    """
    parameters, tree = parsed_forward(kind)
    if tree is None or not hasattr(kind, "compute_bias"):
        return None
    arguments = list(inspect.signature(kind.compute_bias).parameters)[1:]
    added = re.findall(r"position_bias = position_bias \+ (.*)", ast.unparse(tree))
    known = {"query_length", "key_length", "device", "past_seen_tokens", "cache_position", "block_length"}
    if not set(arguments) <= known or not set(added) <= {"causal_mask", "mask.transpose(1, 2)"}:
        return None
    return {"arguments": arguments, "mask": placed(["mask"], parameters) if added else None}


def of_this_version(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of :class:`NoHeads`, for the forward that a class has in this version of transformers.

    Raises ValueError when it is not known how the class makes its position bias.
    """
    if not options.get("versions"):
        return dict(options)
    parameters, tree = parsed_forward(kind)
    now = {**options, "inputs": [placed(where, parameters) for where in options["inputs"]]}
    for name in ("residual", "cache", "bias"):
        if options.get(name):
            now[name] = placed(options[name], parameters)
    returned = None if tree is None else returned_values(tree)
    if returned is not None:
        now.pop("list", None)
        now.update(return_options(parameters, returned, len(now["inputs"])))
    if options.get("bias"):
        now["bias_maker"] = bias_maker(kind)
        if now["bias_maker"] is None or now["bias"] not in (now["returns"] or ()):
            raise ValueError(f"it is not known how {kind.__name__} makes its position bias")
    return now


def count_tokens(
    cache: Any, hidden: torch.Tensor, layer: int, cross: bool, where: Optional[torch.Tensor]
) -> Optional[int]:
    """Fill the place that a layer without keys has in a cache: positions are read off the length of its entries.

    Args:
        cache: of transformers, or None.
        hidden: the queries' input, ``[examples, tokens, features]``.
        layer: the layer's number in the cache.
        cross: whether its keys are those of another sequence.
        where: the tokens' positions, where the caller knows them; older caches need to be told.

    Returns:
        How many keys layers with heads have: tokens so far, or places in a cache of fixed size; None without a cache,
        and for those of another sequence.
    """
    # Ones: some caches count the keys that are not zero.
    nothing = hidden.new_ones(hidden.shape[0], 1, 1 if cross else hidden.shape[1], 1)
    if cross:
        if hasattr(cache, "cross_attention_cache") and not cache.is_updated.get(layer):
            cache.cross_attention_cache.update(nothing, nothing, layer)
            cache.is_updated[layer] = True
        return None
    cache = getattr(cache, "self_attention_cache", cache)
    if not hasattr(cache, "update"):
        return None
    keys, _ = cache.update(nothing, nothing, layer, *([] if where is None else [{"cache_position": where}]))
    return keys.shape[-2]
