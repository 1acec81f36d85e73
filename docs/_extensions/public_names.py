"""References by the names that users know.

Sphinx names a type by the module that defines it, such as `anndata._core.anndata.AnnData`. Pages and inventories have
the public name, `anndata.AnnData`. Docstrings name calls without the package, such as `tl.predict`, and arguments, such
as `genes`. This extension looks up the public name, and shows arguments as code.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.inspect import TypeAliasForwardRef

#: public names of other packages' types that are not the name without private modules
OTHERS = {
    "anndata._core.anndata.AnnData": "anndata.AnnData",
    "AnnData": "anndata.AnnData",
    "Path": "pathlib.Path",
    "SpatialData": "spatialdata.SpatialData",
    "da.Array": "dask.array.Array",
    "np.ndarray": "numpy.ndarray",
    "ImageContainer": "squidpy.im.ImageContainer",
    "dask.array.core.Array": "dask.array.Array",
    "flax.nnx.module.Module": "flax.nnx.Module",
    "jax.jaxlib._jax.Array": "jax.Array",
    "jaxlib._jax.Array": "jax.Array",
    "pandas.core.frame.DataFrame": "pandas.DataFrame",
    "pandas.core.indexes.base.Index": "pandas.Index",
    "pandas.core.series.Series": "pandas.Series",
    "spatialdata._core.spatialdata.SpatialData": "spatialdata.SpatialData",
}


def public_name(name: str) -> str:
    """Return the name without the private modules of its path."""
    if name in OTHERS:
        return OTHERS[name]
    *modules, last = name.split(".")
    return ".".join([each for each in modules if not each.startswith("_")] + [last])


def find_public(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> Any:
    """Resolve a missing reference by its public name, here or, after this handler, in an inventory."""
    if node.get("refdomain") != "py" or not node.get("reftarget"):
        return None
    is_code = node["reftype"] == "obj" and "." not in node["reftarget"]
    name = node["reftarget"] = public_name(node["reftarget"])
    # an inventory may have a type as data, a class or an attribute
    node["reftype"] = "obj"
    domain = env.get_domain("py")
    for target in (name, f"stimage_sd.{name}", *(f"stimage_sd.{part}.{name}" for part in ("models", "baselines"))):
        reference = domain.resolve_xref(env, node.get("refdoc", ""), app.builder, "obj", target, node, contnode)
        if reference is not None:
            return reference
    # a name in single backticks without a dot is an argument or a value, where it is no public name
    return contnode if is_code and name not in OTHERS.values() else None


def setup(app: Sphinx) -> dict[str, bool]:
    # in a union, an alias of `autodoc_type_aliases` is shown by its repr
    TypeAliasForwardRef.__repr__ = lambda alias: alias.name
    # before intersphinx, whose priority is 500
    app.connect("missing-reference", find_public, priority=400)
    return {"parallel_read_safe": True}
