"""YAML in which a name that comes twice is an error, not a silent loss."""

from __future__ import annotations

from typing import Any, Optional

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class UniqueLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a name that a mapping has twice: PyYAML keeps the last. What ``<<`` merges in may be overruled."""

    def compose_mapping_node(self, anchor: Optional[str]) -> yaml.MappingNode:
        """A mapping as it is written; later on what is merged into it has become a part of it."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if (key.tag, key.value) in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1} has {key.value:.80} for the second time")
            seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str, loader: type[UniqueLoader] = UniqueLoader) -> Any:
    """What a text of YAML says.

    Args:
        text: plain YAML; tags of Python are none.
        loader: how it is read; default: as YAML 1.1, without names that come twice.

    Raises:
        ValueError: it is none, or a mapping of it has a name twice.
    """
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
