"""Names: every PyTorch layer and function that CKKS has an answer to, sorted by what the answer is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

LINEAR_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),  # with running statistics
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d),
    *(nn.CircularPad1d, nn.CircularPad2d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.Fold, nn.Unfold),
)
NORMS_WITH_STATISTICS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
#: Functions and methods that are linear in one operand, the others being constants.
MOVES = frozenset(
    {
        *("flatten", "view", "reshape", "view_as", "reshape_as", "contiguous", "clone", "detach", "identity"),
        *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "unsqueeze", "squeeze"),
        *("expand", "expand_as", "repeat", "tile", "repeat_interleave", "unflatten", "narrow", "select"),
        *("index_select", "chunk", "split", "tensor_split", "unbind", "flip", "fliplr", "flipud", "roll"),
        *(
            "diagonal",
            "positive",
            "to",
            "float",
            "double",
            "type_as",
            "cpu",
            "requires_grad",
            "data",
            "cuda",
            "type",
        ),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
        *("getitem", "T", "mT", "t", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
        "feature_alpha_dropout",
    }
)
LINEAR = MOVES | {
    *("neg", "negative", "mean", "sum", "cumsum", "diff", "linear", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "upsample"),
    *("pad", "matmul", "mm", "bmm", "mv", "einsum", "tensordot", "inner", "addmm", "baddbmm", "tril"),
    *("triu", "masked_fill", "unfold", "fold", "trace", "upsample_nearest", "upsample_bilinear"),
    *("constant_pad_nd", "gather", "take_along_dim", "rot90", "batch_norm"),
}
SUMS = frozenset(
    {
        *("add", "sub", "subtract", "rsub", "radd", "cat", "concat", "concatenate", "stack", "hstack"),
        *("column_stack", "dstack", "lerp"),
    }
)
DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"})
SMOOTH = frozenset(
    {"gelu", "silu", "swish", "mish", "hardswish", "softplus", "elu", "selu", "celu", "sigmoid", "tanh"}
)
ELEMENTWISE = SMOOTH | {
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "hardsigmoid", "hardtanh", "softsign", "tanhshrink"),
    *("softshrink", "hardshrink", "threshold", "logsigmoid", "exp", "exp2", "expm1", "log", "log2", "log10"),
    *("log1p", "sqrt", "rsqrt", "abs", "sign", "sgn", "sin", "cos", "tan", "sinh", "cosh", "asin", "acos"),
    *("atan", "erf", "erfc", "erfinv", "logit", "clamp", "clip", "clamp_min", "clamp_max", "minimum"),
    *("maximum", "fmin", "fmax", "reciprocal", "round", "floor", "ceil", "trunc", "frac", "heaviside"),
    *("absolute", "special_expit", "special_erf", "logaddexp", "expit", "nan_to_num", "softmin"),
}
#: Tensors of an activation's shape that do not depend on it; random ones; changes of type.
LIKE = frozenset(
    {
        *("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full"),
        *("new_empty", "new_tensor"),
    }
)
RANDOM = frozenset({"randn_like", "rand_like", "randint_like", "bernoulli", "multinomial", "rand", "randn"})
CASTS = frozenset({"to", "type", "float", "double", "type_as", "cpu", "cuda"})
ALONG = frozenset({"cumsum", "flip", "roll", "diff", "gather", "index_select", "take_along_dim"})
LAST_ONLY = frozenset(
    {
        *("softmax", "log_softmax", "softmin", "sigmoid", "logsigmoid", "special_expit", "expit", "argmax"),
        *("softmax2d", "topk", "argsort"),
    }
)
POOLS = frozenset({"max", "amax", "amin", "min", "logsumexp", "median"})
ATTENTION = "multiplies activations with each other and divides by a sum of exponentials"
EDGE: Mapping[str, str] = {
    "scaled_dot_product_attention": ATTENTION,
    "softmax": "divides by a sum of exponentials",
    "log_softmax": "takes logarithms of exponentials",
    "softmax2d": "divides by a sum of exponentials",
    "embedding": "looks a table up by the values of its input",
    "embeddingbag": "looks a table up by the values of its input",
    "grid_sample": "reads places that depend on an activation",
    "bilinear": "multiplies two activations",
    "cosine_similarity": "divides by norms of activations",
    "cdist": "takes roots of activations",
    "norm": "takes a root of activations",
    "std": "takes a root of activations",
    "std_mean": "takes a root of activations",
    "where": "chooses by comparing activations",
}
COMPARES = frozenset(
    {
        *("gt", "lt", "ge", "le", "eq", "ne", "argmax", "argmin", "topk", "sort", "argsort", "nonzero"),
        *(
            "unique",
            "isnan",
            "isinf",
            "isfinite",
            "bincount",
            "searchsorted",
            "bucketize",
            "one_hot",
            "cummax",
        ),
    }
)


MODULE_NAMES = {
    "LeakyReLU": "leaky_relu",
    "LogSoftmax": "log_softmax",
    "Softmax2d": "softmax2d",
    "SiLU": "silu",
    "CosineSimilarity": "cosine_similarity",
}
ALIASES = {
    "multiply": "mul",
    "true_divide": "truediv",
    "divide": "truediv",
    "div": "truediv",
    "rtruediv": "rdiv",
    "special_softmax": "softmax",
    "special_log_softmax": "log_softmax",
    "neg": "neg",
    "swish": "silu",
    "float_power": "pow",
    "rmul": "mul",
    "convolution": "conv2d",
    "scaled_dot_product": "bmm",
    "_native_multi_head_attention": "scaled_dot_product_attention",
    "sigmoid_function": "sigmoid",
}


def name_of(node: fx.Node) -> str:
    """A canonical name of a function or method: "relu" for F.relu, torch.relu_ and x.relu()."""
    target = node.target
    name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    if target is getattr:
        name = str(node.args[1])
    name = name.strip("_") if name.startswith("__") else name.rstrip("_")
    if name in ("iadd", "isub", "imul", "itruediv", "ipow", "imatmul"):
        name = name[1:]
    return ALIASES.get(name, name)


def layer_name(module: nn.Module) -> str:
    """The name of the function that a layer applies: "relu" for nn.ReLU."""
    kind = type(module).__name__
    return MODULE_NAMES.get(kind, kind.lower())
