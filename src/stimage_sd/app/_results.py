"""Show the results of a section on the page: gene, maps, tile and downloads."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import streamlit as st

from stimage_sd.app import _about_model, _figures, _genes, _sections, _uploads
from stimage_sd.app._slides import Slide
from stimage_sd.app._viewer import CHOSEN, VIEWER, Map, color_range, show_slide

if TYPE_CHECKING:
    from stimage_sd.app._session import Say, Session

MOST_ROWS = 200
#: width of a picture, px; three stand side by side in a window of 1280 px
WIDTH = 360
#: layers of the right map
LAYERS = {
    "measured_at_depth": "measured count",
    "sd": "uncertainty: total",
    "aleatoric_sd": "uncertainty: count noise",
    "epistemic_sd": "uncertainty: disagreement of members",
    "ood_score": "distance from the training tiles",
}


def escaped(text: object) -> str:
    """Escape text from a file, so that Markdown shows it literally."""
    return re.sub(r"([\\`*_{}\[\]()#+.!$:|<>~-])", r"\\\1", str(text))


def show_model(prediction: _sections.Prediction) -> None:
    """Show what the model was trained on, and how many tiles are unlike its training tiles."""
    certificate = getattr(prediction.model, "certificate", None)
    with st.container(key="certificate"):
        if certificate is None:
            st.caption("The model has no certificate, so it is unknown which of its genes it predicts in new sections.")
        else:
            st.caption("Certificate: " + escaped(" ".join(_about_model.certificate_words(certificate))))
    with st.expander("About the model: training data, certificate, features, versions", key="about-model"):
        table = _about_model.about_model(prediction.model)
        st.table(table.assign(value=table["value"].map(escaped)).set_index("what"))
        if certificate is not None:
            _show_certificate(certificate)
    words, is_warning = _about_model.outside_words(prediction.is_outside)
    with st.container(key="outside"):
        (st.warning if is_warning else st.caption)(words)


def _show_certificate(certificate: Any) -> None:
    """Show the genes and tested sections of a certificate. Tables show text from a model file literally."""
    genes, sections = _about_model.certificate_tables(certificate)
    st.markdown("**Certificate**: sections that the model had not seen, and its genes")
    st.dataframe(sections, hide_index=True)
    st.dataframe(genes, hide_index=True, height=240)
    st.download_button("Certificate (HTML)", lambda: _about_model.certificate_page(certificate), "certificate.html",
                       "text/html", on_click="ignore", key="html-certificate")  # fmt: skip


def choose_gene(prediction: _sections.Prediction, orders: dict[str, pd.Series]) -> str:
    """Let the visitor choose a gene, in a chosen order."""
    with st.container(horizontal=True, key="genes"):
        order = _choose("Order of the genes", {name: _genes.ORDERS[name] for name in orders}, key="order")
        # the first order says how well genes are predicted, or how high
        words = next(iter(orders.values()))
        genes = list(orders[order].index)
        # keeps the gene when the order changes; without this the browser would show an old label
        kept = st.session_state.get("gene")
        st.session_state["gene"] = kept if kept in genes else genes[0]
        gene = st.selectbox(
            "Gene", genes, key="gene", format_func=lambda name: f"{name} ({words[name]})" if words[name] else name
        )
    if order == "section" and not isinstance(prediction.measured, str) and prediction.measured.was_trained_on:
        st.caption(
            "The model was trained on this section. Correlations with its counts are too high for other sections."
        )
    doubt = _genes.doubt_about(str(gene), prediction)
    if doubt:
        st.warning(doubt)
    return str(gene)


def _choose(label: str, options: dict[str, str], *, key: str) -> str:
    """Let the visitor choose one of several options, which another section may not have."""
    if st.session_state.get(key) not in options:
        st.session_state[key] = next(iter(options))
    return str(st.selectbox(label, list(options), key=key, format_func=lambda name: options[name]))


def choose_tile_and_layer(frame: pd.DataFrame) -> tuple[int | None, str]:
    """Let the visitor choose a tile by its number, as an alternative to a click on a map, and the right map."""
    with st.container(horizontal=True, key="views"):
        tile = _choose_tile(frame)
        layers = {name: words for name, words in LAYERS.items() if name in frame}
        return tile, _choose("Map on the right", layers, key="layer")


def _choose_tile(frame: pd.DataFrame) -> int | None:
    order = frame.sort_values("mean", ascending=False, kind="stable").set_index("tile")
    tiles = [int(tile) for tile in order.index]
    kept = st.session_state.get("tile")
    # without this the browser would show the mean of another gene
    st.session_state["tile"] = kept if kept in tiles else tiles[0] if len(tiles) == 1 else None
    return st.selectbox(
        "Tile: click on a map, or choose here (highest prediction first)",
        tiles,
        index=None,
        key="tile",
        placeholder="none chosen yet",
        format_func=lambda tile: f"{tile} (mean {order.loc[tile, 'mean']:.3g})",
    )


def show_maps(
    session: Session,
    prediction: _sections.Prediction,
    frame: pd.DataFrame,
    *,
    gene: str,
    tile: int | None,
    layer: str,
    key: str,
) -> None:
    """Show clickable maps of the predicted mean and another layer over the H&E."""
    slide = session.once(("slide", key), lambda: Slide(prediction.sdata))
    outside = prediction.is_outside
    gray = outside.any() and st.checkbox("Show tiles unlike the training tiles in gray", value=True, key="gray")
    maps = (_mean_map(frame, gene), _layer_map(prediction, frame, gene, layer))
    tiles = frame[["tile", "x", "y"]].assign(words=_words(frame))
    show_slide(slide, tiles, prediction.side, maps, chosen=tile, outside=outside if gray else None, on_choice=_clicked)
    st.caption(
        "Turn the wheel to zoom, and drag to move. Both maps move together. "
        + ("" if slide.mpp is not None else "There is no scale bar, because the micrometers per pixel are unknown. ")
        + (prediction.measured if isinstance(prediction.measured, str) else "")
    )


def _clicked() -> None:
    tile = st.session_state[VIEWER].get(CHOSEN)
    if tile is not None:
        st.session_state["tile"] = int(tile)


def _mean_map(frame: pd.DataFrame, gene: str) -> Map:
    low, high = _count_range(frame)
    return Map(f"{gene}: predicted mean count", "counts", frame["mean"].to_numpy(), low, high, True, "magma")


def _count_range(frame: pd.DataFrame) -> tuple[float, float]:
    """Return the color range that predicted means and measured counts share."""
    both = [frame[name].to_numpy() for name in ("mean", "measured_at_depth") if name in frame]
    return color_range(*both)


def _layer_map(prediction: _sections.Prediction, frame: pd.DataFrame, gene: str, layer: str) -> Map:
    values, title = frame[layer].to_numpy(), f"{gene}: {LAYERS[layer]}"
    if layer == "measured_at_depth" and not isinstance(prediction.measured, str):
        unit = f"counts, {prediction.measured.depth_words}; colors as on the left"
        return Map(title, unit, values, *_count_range(frame), True, "magma", masked=False)
    if layer == "ood_score":
        high = max(2.0, float(np.nanmax(values)))
        unit = "multiples of the distance within which 95 % of the training tiles lie"
        return Map("Distance from the training tiles", unit, values, 0.0, high, False, "cividis", masked=False)
    return Map(title, "standard deviation, counts", values, *color_range(values))


def _words(frame: pd.DataFrame) -> list[str]:
    """Return the words under the pointer for each tile."""
    words = []
    for row in frame.to_dict("records"):
        lines = [
            f"tile {row['tile']}",
            f"predicted {row['mean']:.3g} ± {row['sd']:.2g}",
            f"distance from training {row['ood_score']:.2f}" + (" (unlike)" if row["ood_score"] > 1 else ""),
        ]
        if np.isfinite(row.get("measured", np.nan)):
            lines.insert(2, f"measured {row['measured']:.0f}")
        words.append("\n".join(lines))
    return words


def show_tile(
    session: Session, prediction: _sections.Prediction, frame: pd.DataFrame, gene: str, tile: int, key: str, say: Say
) -> None:
    """Show a tile as it is, its nuclei by LIME, its predicted distribution, and the downloads."""
    row = frame[frame["tile"] == tile].iloc[0]
    n_samples = st.select_slider(
        "At most so many perturbed copies of the tile (fewer are made if the scores of the nuclei are stable before)",
        [100, 300, 500, 1000, 2000], value=_sections.N_SAMPLES, key="n_samples",
    )  # fmt: skip
    with st.spinner(f"Explaining tile {tile}: up to {n_samples} perturbed copies are predicted ..."):
        explanation = session.calculated(
            ("explanation", key, gene, tile, n_samples),
            lambda: _sections.explain(prediction, gene, tile, n_samples=n_samples),
            name=f"tile {tile}, {gene}", say=say,
        )  # fmt: skip
        counts = _sections.distribution(prediction, gene, tile)
    st.subheader(f"Tile {tile}, {escaped(gene)}", anchor=False)
    figures = {
        _figures.tile_figure(prediction, explanation, gene, tile): 2 * WIDTH,
        _figures.distribution_figure(counts, row, gene): WIDTH,
    }
    with st.container(horizontal=True, key="pictures"):
        for figure, width in figures.items():
            st.image(_figures.data_url(_figures.png(figure), "image/png"), width=width)
    _show_words(prediction, row, gene, explanation)
    _show_downloads(prediction, frame, gene, tile, explanation, counts)


def _show_words(
    prediction: _sections.Prediction, row: pd.Series, gene: str, explanation: _sections.Explanation
) -> None:
    if row["ood_score"] > 1:
        st.warning(
            f"This tile is unlike the training tiles: its distance is {row['ood_score']:.2f} times that within which "
            "95 % of them lie. Its prediction has no support in the training data."
        )
    if explanation.doubt:
        st.warning(
            f"The scores of single nuclei are not to be read ({explanation.doubt}), so the nuclei are gray. More "
            "copies can make the scores stable."
        )
    floor = float(prediction.model.floor[0, list(prediction.model.genes).index(gene)])
    measured = f"Measured **{row['measured']:.0f}**. " if np.isfinite(row.get("measured", np.nan)) else ""
    # fewer than three nuclei have no stability
    stability = (
        "."
        if np.isnan(explanation.stability)
        else (
            f", stability {explanation.stability:.2f} (correlation of the scores with those of infinitely many copies)."
        )
    )
    st.write(
        f"Predicted mean **{row['mean']:.3g}**, 90 % interval {row['lower']:.0f} to {row['upper']:.0f}. {measured}Mean "
        f"of the training tiles {floor:.3g}. Red nuclei raise the prediction, blue nuclei lower it. LIME's linear "
        f"model, from {explanation.n_copies:,} copies: R² {explanation.r2:.2f} on copies that it was not fitted to"
        + stability
    )


def _show_downloads(
    prediction: _sections.Prediction,
    frame: pd.DataFrame,
    gene: str,
    tile: int,
    explanation: _sections.Explanation,
    counts: pd.DataFrame,
) -> None:
    """Show the table of nuclei, and download buttons for the tables and the figure."""
    table = _sections.segment_table(explanation)
    with st.container(key="nuclei"):
        st.dataframe(table.head(MOST_ROWS), hide_index=True, height=240)
    safe = _uploads.display_name(gene)
    with st.container(horizontal=True, key="downloads"):
        st.download_button("Nuclei of the tile (CSV)", lambda: table.to_csv(index=False), f"nuclei_{tile}_{safe}.csv",
                           "text/csv", on_click="ignore", key="csv-nuclei")  # fmt: skip
        st.download_button("Tiles of the section (CSV)", lambda: frame.to_csv(index=False), f"tiles_{safe}.csv",
                           "text/csv", on_click="ignore", key="csv-tiles")  # fmt: skip
        st.download_button(
            "Figure (PNG)", lambda: _figures.whole_figure(prediction, gene, tile, explanation, counts),
            f"tile_{tile}_{safe}.png", "image/png", on_click="ignore", key="png",
        )  # fmt: skip
