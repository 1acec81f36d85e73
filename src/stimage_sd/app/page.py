"""Page that Streamlit runs for every session and every click, started by ``stimage-sd app``.

Heavy modules are imported where they are needed, so that the page appears before they are loaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from stimage_sd.app import _example, _figures, _sections, _settings, _uploads
from stimage_sd.app._session import Session, others_calculate, shared_once

EXAMPLE, GIVEN, UPLOAD = "Bundled example", "Section of the server", "Upload an image"
MODEL_EXAMPLE, MODEL_GIVEN, MODEL_UPLOAD = "Example's model", "Model of the server", "Upload a model"
MOST_ROWS = 200


# --------------------------------------------------------------------------------------------------
# state of a session, and state that all sessions share


@st.cache_resource(scope="session", show_spinner=False, on_release=Session.close)
def session() -> Session:
    """Return the visitor's session. Its files are deleted when the session ends."""
    return Session.open(_settings.chosen().root)


def _section_path(slide: str) -> Path:
    given = _settings.chosen().data
    return given if slide == GIVEN and given is not None else _example_folder() / _example.SECTION


def _model_path(model: str) -> Path:
    given = _settings.chosen().model
    return given if model == MODEL_GIVEN and given is not None else _example_folder() / _example.MODEL


def _example_folder() -> Path:
    return shared_once("example", lambda: _example.make_example(_say))


def _say(message: str) -> None:
    """Show the visitor the current step."""
    placeholder = st.session_state.get("said")
    if placeholder is not None:
        placeholder.caption(_escaped(message) + " ...")


def _escaped(text: object) -> str:
    """Escape text from a file, so that Markdown shows it literally."""
    return re.sub(r"([\\`*_{}\[\]()#+.!$:|<>~-])", r"\\\1", str(text))


# --------------------------------------------------------------------------------------------------
# choices


def choose_section() -> tuple[str, dict[str, Any] | None]:
    """Let the visitor choose a section. The image is `None` until an upload is complete."""
    settings = _settings.chosen()
    options = [EXAMPLE, *([GIVEN] if settings.data is not None else []), UPLOAD]
    choice = st.radio("Slide", options, index=1 if settings.data is not None else 0, key="slide")
    if choice == EXAMPLE:
        st.caption(
            "A synthetic section, painted by the package, not from a patient. The section and its small model are made "
            "on first use, in about a minute, and kept on this computer."
        )
    if choice == GIVEN and settings.data is not None:
        st.caption(f"Chosen by whoever started the app: {_escaped(settings.data.name)}")
    return choice, upload_image(settings.upload_mb) if choice == UPLOAD else {}


def upload_image(upload_mb: int) -> dict[str, Any] | None:
    """Store an uploaded image and ask for missing values. Return `None` until all values are given."""
    sent = st.file_uploader(
        "A tile, a piece of a slide, or a slide (PNG, JPEG, TIFF, SVS)", type=list(_uploads.IMAGE_TYPES), key="image"
    )
    if sent is None:
        return None
    name = _uploads.display_name(sent.name)

    def store() -> Path:
        return _uploads.store_image(sent.getbuffer(), session().new_folder(), most_bytes=upload_mb << 20)

    path = session().once(("image", sent.file_id), store)
    with st.spinner("Reading the header ..."), session().calculating():
        header = session().once(("header", sent.file_id), lambda: _uploads.check_image(path))
        stated = session().once(("mpp", sent.file_id), lambda: _sections.stated_mpp(path))
    st.caption(f"{_escaped(name)}: {header.width:,} x {header.height:,} px")
    mpp = st.number_input(
        "Micrometers per pixel" + ("" if stated is None else f" (the file states {stated:.4g})"),
        min_value=0.05, max_value=10.0, value=stated, step=0.01, format="%.4f", key=f"mpp-{sent.file_id}",
        help="About 0.5 for a 20x scan and 0.25 for a 40x scan. The app does not guess this value.",
    )  # fmt: skip
    all_tissue = st.checkbox("It is tissue all over: a tile cut from a slide", key=f"tissue-{sent.file_id}")
    if mpp is None:
        st.info("How large is a pixel? Enter the micrometers per pixel of this image.")
        return None
    return {"id": sent.file_id, "path": path, "name": name, "mpp": float(mpp), "all_tissue": all_tissue}


def choose_model() -> tuple[str, dict[str, Any] | None]:
    """Let the visitor choose a model. The model is `None` until an upload is complete."""
    settings = _settings.chosen()
    options = [*([MODEL_GIVEN] if settings.model is not None else []), MODEL_EXAMPLE, MODEL_UPLOAD]
    choice = st.radio("Model", options, key="model")
    if choice == MODEL_GIVEN and settings.model is not None:
        st.caption(f"Chosen by whoever started the app: {_escaped(settings.model.name)}")
    if choice == MODEL_EXAMPLE:
        st.caption("Trained on two synthetic sections. Its predictions on real tissue mean nothing.")
    if choice != MODEL_UPLOAD:
        return choice, {}
    sent = st.file_uploader("A model, as `stimage-sd train` writes it (.stimage)", type=["stimage"], key="model-file")
    if sent is None:
        return choice, None

    def store() -> Path:
        return _uploads.store_model(sent.getbuffer(), session().new_folder(), most_bytes=settings.upload_mb << 20)

    path = session().once(("model", sent.file_id), store)
    st.caption(_escaped(_uploads.display_name(sent.name)))
    return choice, {"id": sent.file_id, "path": path}


def predicted(slide: str, image: dict[str, Any], model: str, options: dict[str, Any]) -> _sections.Prediction:
    """Return the predictions for the choices, computed once, and shared by all sessions without an upload."""
    model_path = options["path"] if model == MODEL_UPLOAD else _model_path(model)
    if slide == UPLOAD:

        def open_section() -> Any:
            return _sections.open_image(
                image["path"], mpp=image["mpp"], name=image["name"], all_tissue=image["all_tissue"]
            )
    else:
        section_path = _section_path(slide)

        def open_section() -> Any:
            return _sections.open_store(section_path)

    def predict() -> _sections.Prediction:
        return _sections.predict(open_section(), _uploads.load_model(model_path), say=_say)

    if slide != UPLOAD and model != MODEL_UPLOAD:
        return shared_once((section_path, model_path), predict)

    def predict_own() -> _sections.Prediction:
        with session().calculating():
            return predict()

    return session().once(("prediction", slide, *image.values(), model, options.get("id")), predict_own)


# --------------------------------------------------------------------------------------------------
# results


def show_maps(prediction: _sections.Prediction, frame: pd.DataFrame, tile: int | None, key: str) -> None:
    """Show clickable maps of the predicted mean and its uncertainty over the H&E."""
    background = session().once(("background", key), lambda: _figures.Background(prediction))
    kinds = {label.removeprefix("standard deviation: "): name for name, label in _figures.LABELS.items() if
             name != "mean"}  # fmt: skip
    kind = st.radio("Uncertainty", list(kinds), horizontal=True, key="uncertainty")
    with st.container(horizontal=True, key="maps"):
        for value in ("mean", kinds[kind]):
            name = f"map-{'mean' if value == 'mean' else 'doubt'}"
            st.altair_chart(
                _figures.map_chart(background, frame, value=value, tile=tile),
                key=name,
                on_select=lambda name=name: _clicked(name),
                selection_mode=_figures.CLICKED,
                width="content",
                theme=None,
            )


def _clicked(name: str) -> None:
    points = st.session_state[name].selection.get(_figures.CLICKED, [])
    if points:
        st.session_state["tile"] = int(points[0]["tile"])


def choose_tile(frame: pd.DataFrame) -> int | None:
    """Let the visitor choose a tile by its number, as an alternative to a click on a map."""
    order = frame.sort_values("mean", ascending=False, kind="stable").set_index("tile")
    tiles = [int(tile) for tile in order.index]
    if st.session_state.get("tile") not in tiles:
        st.session_state["tile"] = tiles[0] if len(tiles) == 1 else None
    return st.selectbox(
        "Tile: click on a map, or choose from the list (highest prediction first)",
        tiles,
        index=None,
        key="tile",
        placeholder="none chosen yet",
        format_func=lambda tile: f"{tile} (mean {order.loc[tile, 'mean']:.3g})",
    )


def show_tile(prediction: _sections.Prediction, frame: pd.DataFrame, gene: str, tile: int, key: str) -> None:
    """Show a tile's nuclei by LIME, its predicted distribution, and the downloads."""
    row = frame[frame["tile"] == tile].iloc[0]
    n_samples = st.select_slider(
        "Perturbed copies of the tile (more copies are slower and give steadier scores)", [100, 300, 500, 1000, 2000],
        value=_sections.N_SAMPLES, key="n_samples",
    )  # fmt: skip

    def compute() -> _sections.Explanation:
        with session().calculating():
            return _sections.explain(prediction, gene, tile, n_samples=n_samples)

    waiting = "Waiting for another visitor's calculation ..." if others_calculate() else ""
    with st.spinner(waiting or f"Explaining tile {tile}: {n_samples} perturbed copies are predicted ..."):
        explanation = session().once(("explanation", key, gene, tile, n_samples), compute)
        counts = _sections.distribution(prediction, gene, tile)
    st.subheader(f"Tile {tile}, {_escaped(gene)}", anchor=False)
    with st.container(horizontal=True, key="pictures"):
        for figure in (_figures.tile_figure(explanation, gene, tile), _figures.distribution_figure(counts, row, gene)):
            st.image(_figures.data_url(_figures.png(figure), "image/png"), width=480)
    column = list(prediction.model.genes).index(gene)
    floor = float(prediction.model.floor[0, column])
    strange = "farther out than 95 % of the training tiles" if row["ood_score"] > 1 else "like the training tiles"
    st.write(
        f"Mean **{row['mean']:.3g}**, 90 % interval {row['lower']:.0f} to {row['upper']:.0f}. Mean of the training "
        f"tiles {floor:.3g}. Strangeness {row['ood_score']:.2f}: {strange}. Red nuclei raise the prediction, blue "
        f"nuclei lower it. LIME's linear model: R² {explanation.r2:.2f}, stability {explanation.stability:.2f} "
        "(correlation of the scores between two halves of the copies)."
    )
    show_downloads(prediction, frame, gene, tile, explanation, counts)


def show_downloads(
    prediction: _sections.Prediction,
    frame: pd.DataFrame,
    gene: str,
    tile: int,
    explanation: _sections.Explanation,
    counts: pd.DataFrame,
) -> None:
    """Show the table of nuclei, and download buttons for the tables and the figure."""
    table = _sections.segment_table(explanation)
    st.dataframe(table.head(MOST_ROWS), hide_index=True, height=240, key="nuclei")
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


def main() -> None:
    """Draw the page from top to bottom."""
    st.set_page_config(page_title="stimage-sd", layout="wide")
    st.title("Gene expression from H&E", anchor=False)
    st.caption(
        "Predicted by a model on this computer. No data leave this computer. Only you can see your uploads, and they "
        "are deleted when you leave. For research, not for diagnosis."
    )
    left, right = st.columns(2, gap="large")
    try:
        with left:
            slide, image = choose_section()
        with right:
            model, options = choose_model()
        if image is None or options is None:
            st.info("Choose a slide and a model, or upload them.")
            return
        st.session_state["said"] = st.empty()
        with st.spinner("Another visitor's calculation first ..." if others_calculate() else "Opening the section ..."):
            prediction = predicted(slide, image, model, options)
        st.session_state.pop("said").empty()
        key = f"{slide}-{sorted(image.items())}-{model}-{options.get('id')}"
        gene = st.selectbox("Gene", list(prediction.model.genes), key="gene")
        frame = prediction.of_gene(gene)
        tile = choose_tile(frame)
        show_maps(prediction, frame, tile, key)
        if tile is None:
            st.info("Click on a tile to see which of its nuclei speak for the gene.")
        else:
            show_tile(prediction, frame, gene, tile, key)
    except _uploads.UploadError as error:
        st.error(_escaped(error))


if __name__ == "__main__":
    main()
