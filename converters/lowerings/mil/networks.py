"""MIL rules: products with matrices, convolutions, norms, resampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from edgedit.converters.lowerings.driver import NodeInfo, Static, dense, is_static
from edgedit.converters.lowerings.mil.builder import MilBuilder, Pending, rules, shape_of
from edgedit.converters.lowerings.mil.tokens import channels_first, has_tokens, norm, tokens

__all__: list[str] = []


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)


@rules("MatMul")
def matmul(b: MilBuilder, node: NodeInfo, x: Any, y: Any) -> Any:
    """A product; one with a weight waits for a bias."""
    rank = len(shape_of(x))
    if is_static(y) and len(shape_of(y)) == 2 and rank <= 3 and not is_static(x):
        return _linear(b, node, x, y)
    real = b.real(node, *(value for value in (x, y) if is_static(value)))
    if getattr(y, "name", None) in b.codes:
        weight = b.kernel(y, real, _transposed, "T")
        return b.mb.matmul(x=b.input_of(y, b.var(x, real)), y=weight, transpose_y=True, name=b.name(node.name))
    return b.mb.matmul(x=b.var(x, real), y=b.var(y, real), name=b.name(node.name))


def _linear(b: MilBuilder, node: NodeInfo, x: Any, weight: Static) -> Pending:
    real = b.real(node, weight)

    def matrix() -> Any:
        return b.kernel(weight, real, _transposed, "T")

    shape = (*shape_of(x)[:-1], shape_of(weight)[1])

    def fits(bias: Static) -> bool:
        return not (b.half and real == "fp16" and b.overflows(bias))

    if b.neural and len(shape) in (2, 3):
        return _pointwise(b, node, x, weight, real, shape, fits)

    def source() -> Any:
        return b.input_of(weight, b.var(x, real))

    def write() -> Any:
        return b.mb.linear(x=source(), weight=matrix(), name=b.name(node.name))

    def with_bias(bias: Static) -> Any:
        if not fits(bias):
            return None
        return b.mb.linear(x=source(), weight=matrix(), bias=b.constant(bias, real), name=b.name(node.name))

    return Pending("product", shape, x, write, detail=with_bias)


def _pointwise(
    b: MilBuilder,
    node: NodeInfo,
    x: Any,
    weight: Static,
    real: str,
    shape: tuple[int, ...],
    fits: Callable[[Static], bool],
) -> Pending:
    """A layer of tokens as a 1×1 convolution, which waits for its bias too."""

    def convolved(bias: Static | None = None) -> Any:
        extra = {} if bias is None else {"bias": b.constant(bias, real)}
        source = b.input_of(weight, channels_first(b, node.name, x, real))
        kernel = b.kernel(weight, real, _as_kernel, "T11")
        return b.mb.conv(x=source, weight=kernel, pad_type="valid", name=b.name(node.name), **extra)

    def with_bias(bias: Static) -> Any:
        return tokens(b, node.name, shape, lambda: convolved(bias)) if fits(bias) else None

    plain = tokens(b, node.name, shape, convolved)
    return Pending("product", shape, None, plain.write, plain.first, with_bias)


def _as_kernel(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)[:, :, None, None]


@rules("Conv")
def conv(b: MilBuilder, node: NodeInfo, x: Any, weight: Any, bias: Any = None) -> Any:
    """A convolution. ONNX lists the paddings of all beginnings and then of all ends, MIL axis by axis."""
    if not is_static(weight):
        raise ValueError("a kernel that is computed while the model runs")
    real = b.real(node, weight, bias)
    extra = {} if bias is None else {"bias": b.constant(bias, real)}
    spatial = len(shape_of(x)) - 2
    return b.mb.conv(
        x=b.var(x, real),
        weight=b.kernel(weight, real),
        strides=_per_axis(node, "strides", spatial),
        dilations=_per_axis(node, "dilations", spatial),
        groups=int(node.get("group", 1)),
        pad_type="custom",
        pad=_pairs(node, spatial),
        name=b.name(node.name),
        **extra,
    )


@rules("ConvTranspose")
def conv_transpose(b: MilBuilder, node: NodeInfo, x: Any, weight: Any, bias: Any = None) -> Any:
    """A transposed convolution without padding of its output."""
    spatial = len(shape_of(x)) - 2
    if any(node.get("output_padding", [0])) or "output_shape" in node.attributes or not is_static(weight):
        raise ValueError("output_padding, output_shape or a kernel that is computed while the model runs")
    real = b.real(node, weight, bias)
    extra = {} if bias is None else {"bias": b.constant(bias, real)}
    return b.mb.conv_transpose(
        x=b.var(x, real),
        weight=b.constant(weight, real),
        strides=_per_axis(node, "strides", spatial),
        dilations=_per_axis(node, "dilations", spatial),
        groups=int(node.get("group", 1)),
        pad_type="custom",
        pad=_pairs(node, spatial),
        name=b.name(node.name),
        **extra,
    )


def _per_axis(node: NodeInfo, name: str, spatial: int) -> list[int]:
    return [int(v) for v in node.get(name, [1] * spatial)]


def _pairs(node: NodeInfo, spatial: int) -> list[int]:
    if str(node.get("auto_pad", "NOTSET")) not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad {node.attributes['auto_pad']}; state the paddings")
    pads = [int(v) for v in node.get("pads", [0] * (2 * spatial))]
    return [pads[i + side * spatial] for i in range(spatial) for side in (0, 1)]


def _scale(b: MilBuilder, value: Any) -> Any:
    """A norm's weight in float32; None for one of ones."""
    if isinstance(value, np.ndarray) and bool(np.all(value == 1)):
        return None
    return b.var(value, "fp32")


@rules("LayerNormalization")
def layer_norm(b: MilBuilder, node: NodeInfo, x: Any, scale: Any, bias: Any = None) -> Any:
    """Over the last axis, in float32: a sum of squares passes float16's range at values of a few hundred."""
    _last_axis(node, x)
    if b.neural and (has_tokens(x) or len(shape_of(x)) == 3):
        return _token_norm(b, node, x, scale, bias, centred=True)
    extra: dict[str, Any] = {}
    if (gamma := _scale(b, scale)) is not None:
        extra["gamma"] = gamma
    if bias is not None:
        extra["beta"] = b.var(bias, "fp32")
    epsilon = np.float32(node.get("epsilon", 1e-5))
    y = b.mb.layer_norm(x=b.var(x, "fp32"), axes=[-1], epsilon=epsilon, name=b.name(node.name), **extra)
    return b.cast(y, _norm_type(b, node))


def _token_norm(b: MilBuilder, node: NodeInfo, x: Any, scale: Any, bias: Any, *, centred: bool) -> Pending:
    real, epsilon = b.real(node), float(node.get("epsilon", 1e-5))

    def first() -> Any:
        value = channels_first(b, node.name, x, real)
        return norm(b, node.name, value, scale, bias, epsilon, real, centred=centred)

    return tokens(b, node.name, shape_of(x), first)


def _norm_type(b: MilBuilder, node: NodeInfo) -> str:
    real = b.real(node)
    if real == "fp16":
        b.norms[node.name] = "variance of a norm"
    return real


def _last_axis(node: NodeInfo, x: Any) -> None:
    rank = len(shape_of(x))
    if int(node.get("axis", -1)) % rank != rank - 1 or len(node.outputs) > 1:
        raise ValueError("a norm over more than the last axis, or one that returns its statistics")


@rules("RMSNormalization")
def rms_norm(b: MilBuilder, node: NodeInfo, x: Any, scale: Any) -> Any:
    """x / sqrt(mean(x²) + epsilon) * scale over the last axis, in float32; MIL has no operator for it."""
    _last_axis(node, x)
    if b.neural and (has_tokens(x) or len(shape_of(x)) == 3):
        return _token_norm(b, node, x, scale, None, centred=False)
    value = b.var(x, "fp32")
    mean = b.mb.reduce_mean(x=b.mb.square(x=value, name=b.name(node.name)), axes=[-1], keep_dims=True)
    inverse = b.mb.rsqrt(x=mean, epsilon=np.float32(node.get("epsilon", 1e-5)), name=b.name(node.name))
    y = b.mb.mul(x=value, y=inverse, name=b.name(node.name))
    if (gamma := _scale(b, scale)) is not None:
        y = b.mb.mul(x=y, y=gamma, name=b.name(node.name))
    return b.cast(y, _norm_type(b, node))


@rules("GroupNormalization")
def group_norm(b: MilBuilder, node: NodeInfo, x: Any, scale: Any, bias: Any) -> Any:
    """Statistics over the channels of a group and all places, in float32."""
    n, channels, *places = shape_of(x)
    groups = int(node.attributes["num_groups"])
    inner = [channels // groups, *places]
    if b.neural:  # four axes at most, none of them longer than it must be
        inner = [inner[0] * int(np.prod(places[:-1])), places[-1]]
    value = b.mb.reshape(x=b.var(x, "fp32"), shape=[n, groups, *inner], name=b.name(node.name))
    axes = list(range(2, 2 + len(inner)))
    mean = b.mb.reduce_mean(x=value, axes=axes, keep_dims=True, name=b.name(node.name))
    centred = b.mb.sub(x=value, y=mean, name=b.name(node.name))
    variance = b.mb.reduce_mean(x=b.mb.square(x=centred, name=b.name(node.name)), axes=axes, keep_dims=True)
    inverse = b.mb.rsqrt(x=variance, epsilon=np.float32(node.get("epsilon", 1e-5)), name=b.name(node.name))
    y = b.mb.mul(x=centred, y=inverse, name=b.name(node.name))
    y = b.mb.reshape(x=y, shape=[n, channels, *places], name=b.name(node.name))
    shape = [1, channels, *[1] * len(places)]
    y = b.mb.mul(x=y, y=b.constant(scale, "fp32", lambda a: a.reshape(shape), "channels"), name=b.name(node.name))
    y = b.mb.add(x=y, y=b.constant(bias, "fp32", lambda a: a.reshape(shape), "channels"), name=b.name(node.name))
    return b.cast(y, _norm_type(b, node))


@rules("Resize")
def resize(b: MilBuilder, node: NodeInfo, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    """Nearest by whole factors; anything smoother as a product with its matrix along each axis, exact at the edges."""
    if scales is None or sizes is not None or len(shape_of(x)) != 4:
        raise ValueError("a Resize to sizes, or of anything but a map")
    factors = [float(v) for v in dense(scales)]
    if factors[:2] != [1.0, 1.0]:
        raise ValueError(f"a Resize by {factors}; batch and channels must stay")
    mode = str(node.get("mode", "nearest"))
    floor = str(node.get("nearest_mode", "round_prefer_floor")) == "floor"
    asymmetric = str(node.get("coordinate_transformation_mode", "half_pixel")) == "asymmetric"
    if mode == "nearest" and floor and asymmetric and all(f == int(f) for f in factors):
        return b.mb.upsample_nearest_neighbor(
            x=b.var(x),
            scale_factor_height=int(factors[2]),
            scale_factor_width=int(factors[3]),
            name=b.name(node.name),
        )
    real = b.real(node)
    rows, columns = (_resize_matrix(node, shape_of(x)[axis], factors[axis]) for axis in (2, 3))
    y = b.mb.matmul(x=b.constant(rows, real), y=b.var(x, real), name=b.name(node.name))
    return b.mb.matmul(x=y, y=b.constant(_transposed(columns), real), name=b.name(node.name))


def _resize_matrix(node: NodeInfo, size: int, factor: float) -> np.ndarray:
    """[new, old]: what the ONNX reference makes of each unit vector along one axis."""
    scales = onnx.numpy_helper.from_array(np.array([1, 1, factor, 1], np.float32), "scales")
    resized = onnx.helper.make_node("Resize", ["x", "", "scales"], ["y"], **dict(node.attributes))
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([resized], "resize", [value], [out], [scales])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    units = np.eye(size, dtype=np.float32).reshape(size, 1, size, 1)
    result = np.asarray(next(iter(ReferenceEvaluator(model).run(None, {"x": units}))))
    return np.ascontiguousarray(result.reshape(size, -1).T)
