"""Which modules of a model an adapter adapts. The rules are PEFT's.

target_modules        names or dotted tails of names; or one pattern of the whole name
exclude_modules       likewise: not these
layers_to_transform   only in these layers (layers_pattern: what stands before their number)
modules_to_save       trained whole, and so never adapted
ensure_weight_tying   a tied embedding and head: both, if one of them
"""

from dataclasses import dataclass

from minillama.name_patterns import matches, matches_tail

PAIR = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class TargetRule:
    """Which modules an adapter adapts."""

    targets: tuple[str, ...]  # empty: the file does not say
    excluded: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()  # empty: all
    layer_patterns: tuple[str, ...] = ()  # of what stands before a layer's number; empty: any name
    modules_to_save: tuple[str, ...] = ()
    ties_pair: bool = False  # embedding and head have factors both, or neither

    def includes(self, module: str) -> bool:
        """Tell whether the module of this name has factors."""
        if self.ties_pair and module in PAIR:
            return any(self._includes(name) for name in PAIR)
        return self._includes(module)

    def _includes(self, module: str) -> bool:
        if any(is_named(module, name) for name in self.excluded):
            return False
        if any(f".{name}." in f".{module}." for name in self.modules_to_save):
            return False
        if not any(is_named(module, name) for name in self.targets):
            return False
        return not self.layers or self._layer_of(module) in self.layers

    def _layer_of(self, module: str) -> int | None:
        """The first number among the dotted parts of a name, behind one of `layer_patterns`."""
        parts = module.split(".")
        for index in range(1, len(parts) - 1):
            if not parts[index].isdecimal():
                continue
            before = ".".join(parts[:index])
            if self.layer_patterns:
                is_layer = any(matches_tail(name, before) for name in self.layer_patterns)
            else:
                is_layer = index >= 2
            if is_layer:
                return int(parts[index])
        return None


def is_named(module: str, target: str) -> bool:
    """PEFT's rule: a target is the name or a dotted tail of it.

    A pattern, which is written `re:…` here, must match the whole name.
    """
    if target.startswith("re:"):
        return matches(target[3:], module)
    return module == target or module.endswith(f".{target}")
