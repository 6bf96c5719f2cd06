"""Traced operations with the samples last in memory: the same results, where a network is narrow in less time.

Of a matrix of samples by features, products are slow where the features are few or no multiple of what a processor
takes at a time, and the log-softmax works through them one by one. With the features first and the samples last both
are fast: ten outputs of 512 samples take a fifth of the time. The result of a product is the transpose of another one.
That transposition is moved on through what is done to each entry, until it meets a product, which takes it for
nothing, or a sum, which goes along the other dimension then. What is combined entry by entry is turned together, and
where any of it comes from or goes to something else, not at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

FEW_CLASSES = 64
"""With the samples last the log-softmax is four times as fast on ten classes. Up to how many is chosen."""

_aten = torch.ops.aten
_PRODUCTS = (_aten.bmm.default, _aten.baddbmm.default)
_OVER_DIMENSIONS = (_aten.sum.dim_IntList, _aten.mean.dim)
_OVER_ALL = (_aten.sum.default, _aten.mean.default)
_LOG_SOFTMAX: dict[Any, int] = {_aten._log_softmax.default: 1, _aten._log_softmax_backward_data.default: 2}
"""With how many of its arguments are tensors."""
_TAKE_IT_TURNED = {
    *_PRODUCTS,
    *_OVER_DIMENSIONS,
    *_OVER_ALL,
    *_LOG_SOFTMAX,
    _aten.gather.default,
}
"""Operations on what is turned that are as fast as on what is not, and whose results lie in memory as before."""


def turn(graph: Graph) -> None:
    """Exchange the last two dimensions wherever that is of use; on the CPU alone."""
    data = made_of_data(graph)
    chosen = _chosen(graph, data)
    for node in list(graph.nodes):
        if not _is_on_the_cpu(node):
            continue
        with graph.inserting_before(node):
            turned = _turned(node, chosen, data)
            found = _back_again(node) or _along_the_other(node) or (transposed(turned) if turned else None)
            if turned and found and node not in chosen:
                node.replace_all_uses_with(found, _takes_it_turned)
                found = _contiguous(found)  # some operations take for granted how a tensor lies in memory
        if found is not None:
            node.replace_all_uses_with(found)
            graph.erase_node(node)


def transposed(node: Node) -> Node:
    """With the last two dimensions exchanged."""
    before = _before_transposition(node)
    if before is not None:
        return before
    last = node.meta["val"].dim() - 1
    return _called(node.graph, node.meta["val"].mT, _aten.transpose.int, node, last - 1, last)


def made_of_data(graph: Graph) -> set[Node]:
    """What depends on the inputs after the first alone."""
    found = set([node for node in graph.nodes if node.op == "placeholder"][1:])
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr") and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _chosen(graph: Graph, data: set[Node]) -> set[Node]:
    """Products, and what is made of them entry by entry, that are turned together or not at all."""
    together: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        if _is_on_the_cpu(node) and node not in data:
            group = {node}.union(*(together.get(each, {each}) for each in _of_its_shape(node, data)))
            together.update(dict.fromkeys(group, group))
    groups = {id(group): group for group in together.values()}.values()
    return set().union(*(group for group in groups if all(_may_be_turned(node, group, data) for node in group)))


def _of_its_shape(node: Node, data: set[Node]) -> list[Node]:
    """What it is made of entry by entry."""
    if not (_is_by_entry(node) or node.target in _LOG_SOFTMAX):
        return []
    shape = node.meta["val"].shape
    return [each for each in node.all_input_nodes if each not in data and each.meta["val"].shape == shape]


def _may_be_turned(node: Node, group: set[Node], data: set[Node]) -> bool:
    """Whether it is a product to be turned, or made of such ones, and goes to where it is as well turned."""
    shape = node.meta["val"].shape
    if node.target in _PRODUCTS:
        *_, left, _right = node.args
        may_be = shape[-2] > max(shape[-1], left.meta["val"].shape[-1])  # type: ignore[union-attr]
    elif node.target in _LOG_SOFTMAX:
        may_be = _is_short(node)
    else:
        values = [each.meta["val"] for each in node.all_input_nodes if each not in group and each not in data]
        may_be = _is_by_entry(node) and all(value.dim() < 2 or 1 in value.shape[-2:] for value in values)
    in_any_order = shape[-1:] == (1,) or all(user in group or _takes_it_turned(user) for user in node.users)
    return len(shape) > 1 and may_be and in_any_order


def _takes_it_turned(user: Node) -> bool:
    return user.target in _TAKE_IT_TURNED or _before_transposition(user) is not None


def _turned(node: Node, chosen: set[Node], data: set[Node]) -> Node | None:
    """What the node is the transpose of."""
    if node.target in _LOG_SOFTMAX:
        return _log_softmax(node)
    if node.target is _aten.gather.default:
        return _gather(node, data)
    if node not in chosen:
        return None
    return _product(node) if node.target in _PRODUCTS else _by_entry(node, data)


def _product(node: Node) -> Node:
    *added, left, right = (_turned_to_combine(each) for each in node.args)  # type: ignore[arg-type]
    if not added and left.meta["val"].shape[-2] == 1:
        return _called(node.graph, node.meta["val"].mT.contiguous(), _aten.mul.Tensor, right, left)
    return _like(node, *added, right, left)


def _is_short(node: Node) -> bool:
    """Whether it runs along a short last dimension."""
    dim: Any = node.args[_LOG_SOFTMAX[node.target]]
    shape = node.meta["val"].shape
    return len(shape) > 1 and dim % len(shape) == len(shape) - 1 and shape[-1] <= FEW_CLASSES


def _log_softmax(node: Node) -> Node | None:
    if not _is_short(node):
        return None
    tensors = _LOG_SOFTMAX[node.target]
    given: Any = [_contiguous(transposed(each)) for each in node.args[:tensors]]  # type: ignore[arg-type]
    return _like(node, *given, node.meta["val"].dim() - 2, *node.args[tensors + 1 :])


def _gather(node: Node, data: set[Node]) -> Node | None:
    values, dim, index = node.args
    before = _before_transposition(values)
    if before is None or index not in data:
        return None
    turned = _other(int(dim), node.meta["val"].dim())  # type: ignore[arg-type]
    return _like(node, before, turned, _contiguous(transposed(index)))  # type: ignore[arg-type]


def _by_entry(node: Node, data: set[Node]) -> Node:
    turned: dict[Any, Node] = {}
    for each in node.all_input_nodes:
        given = _turned_to_combine(each)
        turned[each] = _contiguous(given) if each in data else given
    return _like(node, *(turned.get(argument, argument) for argument in node.args))


def _turned_to_combine(node: Node) -> Node:
    """With what is turned, by the rules for tensors of fewer dimensions."""
    value = node.meta["val"]
    if value.dim() == 0:
        return node
    if value.dim() == 1:
        return _called(node.graph, value.unsqueeze(1), _aten.unsqueeze.default, node, 1)
    return transposed(node)


def _back_again(node: Node) -> Node | None:
    """What is transposed a second time."""
    return _before_transposition(_before_transposition(node))


def _along_the_other(node: Node) -> Node | None:
    """A sum over one of the last two dimensions, or both, of what is turned, of what it is the transpose of."""
    if node.target not in (*_OVER_DIMENSIONS, *_OVER_ALL):
        return None
    before = _before_transposition(node.args[0])
    if before is None:
        return None
    if node.target in _OVER_ALL:
        return _called(node.graph, node.meta["val"], node.target, before, **node.kwargs)
    dims: Any = node.args[1]
    if not dims or node.args[2:] not in ((), (False,)):
        return None
    count = before.meta["val"].dim()
    along = sorted(_other(dim, count) for dim in dims)
    if along[-1] < count - 2:
        return None
    return _called(node.graph, node.meta["val"], node.target, before, along, **node.kwargs)


def _is_on_the_cpu(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, Tensor) and value.device.type == "cpu"


def _is_by_entry(node: Node) -> bool:
    if node.target is _aten._to_copy.default:
        return "memory_format" not in node.kwargs
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    plain = not any(isinstance(argument, (list, tuple)) for argument in node.args)
    return pointwise and plain and not any(isinstance(option, Node) for option in node.kwargs.values())


def _other(dim: int, count: int) -> int:
    """The dimension that stands in its place where the last two are exchanged."""
    return {count - 1: count - 2, count - 2: count - 1}.get(dim % count, dim % count)


def _before_transposition(node: Any) -> Node | None:
    """What it exchanges the last two dimensions of."""
    if not isinstance(node, Node) or node.target not in (_aten.transpose.int, _aten.permute.default):
        return None
    count = node.meta["val"].dim()
    if count < 2:
        return None
    given: Any
    of, *given = node.args
    if node.target is _aten.transpose.int:
        same = {dim % count for dim in given} == {count - 2, count - 1}
    else:
        same = [dim % count for dim in given[0]] == [*range(count - 2), count - 1, count - 2]
    return of if same else None  # type: ignore[return-value]


def _contiguous(node: Node) -> Node:
    value = node.meta["val"]
    if value.is_contiguous():
        return node
    form = torch.contiguous_format
    return _called(node.graph, value.contiguous(), _aten.clone.default, node, memory_format=form)


def _like(node: Node, *arguments: Any) -> Node:
    """The same of arguments that are turned."""
    return _called(node.graph, node.meta["val"].mT.contiguous(), node.target, *arguments, **node.kwargs)


def _called(graph: Graph, value: Tensor, target: Any, /, *arguments: Any, **options: Any) -> Node:
    made = graph.call_function(target, arguments, options)
    made.meta = {"val": value}
    return made
