"""Operations that write their result over what they read, in a traced graph."""

from __future__ import annotations

from torch import fx, nn

_OPERATORS = frozenset({"iadd", "isub", "imul", "itruediv", "ipow", "imatmul"})


def in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node writes its result over its first argument."""
    if node.op == "call_module":
        return getattr(root.get_submodule(str(node.target)), "inplace", False) is True
    name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method") or name == "setitem":
        return False
    if name in _OPERATORS or node.kwargs.get("inplace") is True:
        return True
    return name.endswith("_") and not name.endswith("__") and not name.startswith("_")


def follow_in_place(graph: fx.Graph, root: nn.Module) -> None:
    """What comes after an operation in place sees its result, under whichever name."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.all_input_nodes and in_place(node, root):
            before = node.args[0] if node.args else None
            if isinstance(before, fx.Node) and before.op != "get_attr":

                def later(user: fx.Node, at: int = order[node]) -> bool:
                    return order[user] > at

                before.replace_all_uses_with(node, delete_user_cb=later)


__all__ = ["follow_in_place", "in_place"]
