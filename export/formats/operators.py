"""Operators of TensorFlow that tf2onnx lacks, composed of operators of ONNX; importing this module registers them."""

from __future__ import annotations

from typing import Any

import numpy as np
from tf2onnx import utils
from tf2onnx.graph import Graph, Node
from tf2onnx.handler import tf_op


@tf_op("Erfc")  # the exact GELU consists of it
class _Erfc:
    @classmethod
    def version_9(cls, ctx: Graph, node: Node, **_: Any) -> None:
        _replace(ctx, node, "Sub", _make_one(ctx, node), _apply(ctx, node, "Erf"))


@tf_op("Expm1")  # CELU consists of it
class _Expm1:
    @classmethod
    def version_7(cls, ctx: Graph, node: Node, **_: Any) -> None:
        _replace(ctx, node, "Sub", _apply(ctx, node, "Exp"), _make_one(ctx, node))


def _make_one(ctx: Graph, node: Node) -> str:
    """Add the number 1, in the type of the node; return its name."""
    one = np.array(1, utils.map_onnx_to_numpy_type(node.output_dtypes[0]))
    return str(ctx.make_const(f"{node.name}/one", one).output[0])


def _apply(ctx: Graph, node: Node, operator: str) -> str:
    """Apply an operator of ONNX to the input of a node; return the name of the result."""
    made = ctx.make_node(operator, node.input, dtypes=node.output_dtypes, shapes=node.output_shapes)
    return str(made.output[0])


def _replace(ctx: Graph, node: Node, operator: str, *inputs: str) -> None:
    """Put an operator of ONNX in the place of a node."""
    dtypes, shapes, outputs = node.output_dtypes, node.output_shapes, node.output
    ctx.remove_node(node.name)
    ctx.make_node(operator, inputs, name=node.name, outputs=outputs, dtypes=dtypes, shapes=shapes)
