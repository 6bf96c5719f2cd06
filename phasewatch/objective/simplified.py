"""Traced operations without what need not be run at every call: the same results, in fewer and cheaper operations.

What depends on the data alone is computed once. What changes nothing is left out, and what was computed already is not
computed again. A few operations are replaced by others that are faster on small tensors. Small networks are all
overhead: of the hundred and fifty operations of a divergence and its gradient some sixty are left.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from phasewatch.objective.turned import made_of_data, transposed, turn

MOST_KEPT = 2**22
"""Bytes of what is computed once, for one evaluation; views of the data take none. Chosen."""

_aten = torch.ops.aten
_FILLED: dict[Any, Callable[[Node], Any]] = {
    _aten.ones_like.default: lambda node: 1,
    _aten.zeros_like.default: lambda node: 0,
    _aten.full_like.default: lambda node: node.args[1],
    _aten.new_ones.default: lambda node: 1,
    _aten.new_zeros.default: lambda node: 0,
    _aten.new_full.default: lambda node: node.args[2],
}
"""Operations that depend on the shape of a tensor alone, with the number that they fill another one with."""
_BY_STRIDES = (_aten.as_strided.default, _aten._reshape_alias.default)
"""Operations that take for granted how a tensor lies in memory."""
_ARITHMETIC = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)
_DIRECT: dict[Any, Any] = {
    _aten._log_softmax.default: torch._log_softmax,
    _aten._to_copy.default: torch.Tensor.to,
    _aten._unsafe_view.default: torch.Tensor.reshape,
    _aten.add.Tensor: torch.add,
    _aten.baddbmm.default: torch.baddbmm,
    _aten.bmm.default: torch.bmm,
    _aten.cat.default: torch.cat,
    _aten.div.Tensor: torch.div,
    _aten.expand.default: torch.Tensor.expand,
    _aten.gather.default: torch.gather,
    _aten.mul.Scalar: torch.mul,
    _aten.mul.Tensor: torch.mul,
    _aten.neg.default: torch.neg,
    _aten.relu.default: torch.relu,
    _aten.split_with_sizes.default: torch.split_with_sizes,
    _aten.squeeze.dims: torch.squeeze,
    _aten.sub.Tensor: torch.sub,
    _aten.sum.default: torch.sum,
    _aten.sum.dim_IntList: torch.sum,
    _aten.tanh.default: torch.tanh,
    _aten.transpose.int: torch.transpose,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: torch.Tensor.reshape,
    _aten.where.self: torch.where,
}
"""The same by PyTorch's own bindings: a call of an overload by its name costs twice that of a small operation."""


@dataclass(frozen=True)
class Simplified:
    """A function of something that varies and of tensors that stay, in two steps.

    Attributes:
        once: Of the tensors that stay, what of them the second step is given.
        each: Of what varies and what the first step made, the results; none of them shares memory with its arguments.
    """

    once: Callable[..., tuple[Tensor, ...]]
    each: Callable[..., tuple[Tensor, ...]]


def simplified(traced: GraphModule) -> Simplified:
    """Divide and simplify.

    Args:
        traced: What ``make_fx`` has traced of a function of several tensors, the first of which varies. The function
            draws no random numbers.
    """
    graph = traced.graph
    if any(_writes(node) or node.target in _BY_STRIDES for node in graph.nodes):
        return Simplified(lambda *given: given, lambda *given: tuple(found.clone() for found in traced.forward(*given)))
    _fill_without_a_pattern(graph)
    _leave_out_what_changes_nothing(graph)
    _share(graph)
    _fuse_products(graph)
    turn(graph)
    _leave_out_what_changes_nothing(graph)
    _share(graph)
    graph.eliminate_dead_code()
    _in_one_type(graph)
    _share(graph)
    fixed = _fixed(graph)
    once, each = _divided(graph, fixed)
    return Simplified(GraphModule(traced, once).forward, GraphModule(traced, each).forward)


def _fill_without_a_pattern(graph: Graph) -> None:
    for node in list(graph.nodes):
        if node.target in _FILLED:
            value = _value(node)
            if value is None:
                continue
            with graph.inserting_before(node):
                full = graph.call_function(
                    torch.full,
                    (list(value.shape), _FILLED[node.target](node)),
                    {"dtype": value.dtype, "device": value.device},
                )
            full.meta = node.meta
            node.replace_all_uses_with(full)
            graph.erase_node(node)


def _leave_out_what_changes_nothing(graph: Graph) -> None:
    for node in list(graph.nodes):
        before = _before_both(node)
        if before is None and _changes_nothing(node):
            before = node.args[0]
        if before is not None:
            node.replace_all_uses_with(before)
            graph.erase_node(node)


def _before_both(node: Node) -> Node | None:
    """What two operations, of which this is the second, make the same of again, or one without the other."""
    first = node.args[0] if node.args else None
    if not isinstance(first, Node):
        return None
    if node.target is _aten.transpose.int and first.target is _aten.transpose.int:
        count = max(len(_shape(node)), 1)
        dims = [{int(dim) % count for dim in both.args[1:]} for both in (node, first)]  # type: ignore[arg-type]
        return first.args[0] if dims[0] == dims[1] else None  # type: ignore[return-value]
    if node.target is _aten.view.default and first.target is _aten.sum.dim_IntList and first.args[2:] == (True,):
        count = len(_shape(first))
        along: Any = first.args[1] or range(count)
        kept = [n for k, n in enumerate(_shape(first)) if k not in along and k - count not in along]
        if kept == list(_shape(node)) and len(first.users) == 1:
            first.args = first.args[:2]
            first.meta = node.meta
            return first
    return None


def _changes_nothing(node: Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target in (_aten.detach.default, _aten.alias.default):
        return True
    before, after = _value(node.args[0]), _value(node)
    if before is None or after is None or before.shape != after.shape or before.dtype != after.dtype:
        return False
    if node.target in (_aten.view.default, _aten._unsafe_view.default, _aten.expand.default):
        return True
    if node.target is _aten._to_copy.default:
        return before.device == after.device and "memory_format" not in node.kwargs
    if node.target is _aten.permute.default:
        return list(node.args[1]) == list(range(len(before.shape)))  # type: ignore[arg-type]
    return node.target is _aten.mul.Scalar and bool(node.args[1] == 1)


def _share(graph: Graph) -> None:
    """Keep the first of operations that are alike."""
    seen: dict[tuple[Any, str, str], Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            key = (node.target, repr(node.args), repr(node.kwargs))
            if key in seen:
                node.replace_all_uses_with(seen[key])
                graph.erase_node(node)
            else:
                seen[key] = node


def _fuse_products(graph: Graph) -> None:
    """A sum with a product is one operation; the transpose of a product is one of the factors' transposes."""
    for node in list(graph.nodes):
        fused = _sum_with_product(graph, node) or _transposed_product(graph, node)
        if fused is not None:
            fused.meta = node.meta
            node.replace_all_uses_with(fused)
            graph.erase_node(node)


def _sum_with_product(graph: Graph, node: Node) -> Node | None:
    value = _value(node)
    if node.target is not _aten.add.Tensor or node.kwargs or value is None or value.dim() != 3:
        return None
    for product, other in (node.args, node.args[::-1]):
        if (factors := _factors(product, node)) and _fits(other, product, value):
            with graph.inserting_before(node):
                return graph.call_function(_aten.baddbmm.default, (other, *factors))
    return None


def _transposed_product(graph: Graph, node: Node) -> Node | None:
    turned = node.args[0] if node.args else None
    if node.target is not _aten.clone.default or node.kwargs.get("memory_format") is not torch.contiguous_format:
        return None
    if not isinstance(turned, Node) or turned.target is not _aten.transpose.int or {*turned.args[1:]} != {1, 2}:
        return None
    if len(turned.users) > 1 or not (factors := _factors(turned.args[0], turned)):
        return None
    with graph.inserting_before(node):
        left, right = (transposed(factor) for factor in factors)
        return graph.call_function(_aten.bmm.default, (right, left))


def _factors(node: Any, user: Node) -> tuple[Node, ...]:
    """Of a product of matrices that is used there alone."""
    is_product = isinstance(node, Node) and node.target is _aten.bmm.default and set(node.users) == {user}
    return node.args if is_product else ()


def _fits(other: Any, product: Any, value: Tensor) -> bool:
    """Whether it can be added to the product with that result as it is."""
    added, made = _value(other) if isinstance(other, Node) else None, _value(product)
    if added is None or made is None or made.shape != value.shape or made.dtype != value.dtype:
        return False
    return added.dim() == 3 and added.dtype == value.dtype and added.device == value.device


def _fixed(graph: Graph) -> set[Node]:
    """What depends on the inputs after the first alone, as far as it is to be kept."""
    fixed = made_of_data(graph)
    while True:
        kept = {_owner(node) for node in fixed if not fixed.issuperset(node.users)}
        sizes = {node: _bytes(node) for node in kept if node.op == "call_function"}
        if sum(sizes.values()) <= MOST_KEPT:
            return fixed
        left_out = [max(sizes, key=lambda node: sizes[node])]
        while left_out:
            node = left_out.pop()
            if node in fixed:
                fixed.remove(node)
                left_out += node.users


def _in_one_type(graph: Graph) -> None:
    """What is made of the data, in the type of what it is combined with: arithmetic on two types is slow."""
    data = made_of_data(graph)
    for node in list(graph.nodes):
        value = _value(node)
        if node in data or node.target not in _ARITHMETIC or value is None:
            continue
        for other in node.all_input_nodes:
            given = _value(other)
            if other in data and given is not None and given.dtype != value.dtype:
                with graph.inserting_after(other):
                    cast = graph.call_function(_aten._to_copy.default, (other,), {"dtype": value.dtype})
                cast.meta = {"val": given.to(value.dtype)}
                node.replace_input_with(other, cast)


def _divided(graph: Graph, fixed: set[Node]) -> tuple[Graph, Graph]:
    """What is fixed, and what is made of it and of the first input."""
    varying, *inputs = [node for node in graph.nodes if node.op == "placeholder"]
    (results,) = next(node for node in graph.nodes if node.op == "output").args
    handed_over = [
        node for node in graph.nodes if node in fixed and (node in results or not fixed.issuperset(node.users))
    ]
    once, each = Graph(), Graph()
    in_once: dict[Node, Node] = {node: once.placeholder(f"given_{k}") for k, node in enumerate(inputs)}
    in_each = {varying: each.placeholder("vectors")}
    in_each |= {node: each.placeholder(f"kept_{k}") for k, node in enumerate(handed_over)}
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            here, known = (once, in_once) if node in fixed else (each, in_each)
            known[node] = _copied(here, node, known)
    once.output(tuple(in_once[node] for node in handed_over))
    given = fixed | {varying}
    each.output(
        tuple(
            each.call_function(torch.clone, (in_each[node],)) if _owner(node) in given else in_each[node]
            for node in results
        )
    )
    return once, each


def _copied(graph: Graph, node: Node, known: dict[Node, Node]) -> Node:
    copy = graph.node_copy(node, known.__getitem__)
    if not node.args or isinstance(node.args[0], (int, float, bool)):
        return copy  # a number where the bindings want a tensor
    if node.target is _aten._to_copy.default:
        if set(node.kwargs) <= {"dtype", "layout", "device"}:
            copy.target = torch.Tensor.to
            copy.kwargs = {name: value for name, value in node.kwargs.items() if name != "layout"}
    else:
        copy.target = _DIRECT.get(node.target, node.target)
    return copy


def _owner(node: Node) -> Node:
    """Whose memory it is in."""
    while _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_view(node: Node) -> bool:
    return node.target is operator.getitem or bool(getattr(node.target, "is_view", False))


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _value(node: Node) -> Tensor | None:
    """A tensor of the shape, strides and type of the result, without its numbers."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _shape(node: Node) -> tuple[int, ...]:
    value = _value(node)
    return () if value is None else tuple(value.shape)


def _bytes(node: Node) -> float:
    value = _value(node)
    return math.inf if value is None else value.numel() * value.element_size()
