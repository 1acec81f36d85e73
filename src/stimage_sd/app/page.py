"""Page that Streamlit runs for every session and every click, started by ``stimage-sd app``.

Heavy modules are imported where they are needed, so that the page appears before they are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from stimage_sd.app import _example, _genes, _results, _sections, _settings, _uploads
from stimage_sd.app._guard import visitor_cookie
from stimage_sd.app._results import escaped
from stimage_sd.app._session import Session, shared_once

EXAMPLE, GIVEN, UPLOAD = "Bundled example", "Section of the server", "Upload an image"
MODEL_EXAMPLE, MODEL_GIVEN, MODEL_UPLOAD = "Example's model", "Model of the server", "Upload a model"


# --------------------------------------------------------------------------------------------------
# state of a session, and state that all sessions share


@st.cache_resource(scope="session", show_spinner=False, on_release=Session.close)
def session() -> Session:
    """Return the visitor's session. Its files are deleted when the session ends."""
    mark = st.context.cookies.get(visitor_cookie(int(st.get_option("server.port"))))
    return Session.open(_settings.chosen().root, mark)


def _section_path(slide: str) -> Path:
    given = _settings.chosen().data
    return given if slide == GIVEN and given is not None else _example_folder() / _example.SECTION


def _model_path(model: str) -> Path:
    given = _settings.chosen().model
    return given if model == MODEL_GIVEN and given is not None else _example.MODEL


def _example_folder() -> Path:
    return shared_once(
        "example", lambda: _example.make_example(_say), visitor=session().visitor, name="the bundled example", say=_say
    )


def _say(message: str) -> None:
    """Show the visitor the current step, or nothing for an empty message."""
    placeholder = st.session_state.get("said")
    if placeholder is None:
        return
    if message:
        placeholder.caption(escaped(message) + " ...")
    else:
        placeholder.empty()


# --------------------------------------------------------------------------------------------------
# choices


def choose_section() -> tuple[str, dict[str, Any] | None]:
    """Let the visitor choose a section. The image is `None` until an upload is complete."""
    settings = _settings.chosen()
    options = [EXAMPLE, *([GIVEN] if settings.data is not None else []), UPLOAD]
    choice = st.radio("Slide", options, index=1 if settings.data is not None else 0, key="slide")
    if choice == EXAMPLE:
        st.caption(
            "A synthetic section, painted by the package, not from a patient. It is made on first use, in about ten "
            "seconds, and kept on this computer."
        )
    if choice == GIVEN and settings.data is not None:
        st.caption(f"Chosen by whoever started the app: {escaped(settings.data.name)}")
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
    with st.spinner("Reading the header ..."), session().calculating("an upload", _say):
        header = session().once(("header", sent.file_id), lambda: _uploads.check_image(path))
        stated = session().once(("mpp", sent.file_id), lambda: _sections.stated_mpp(path))
    st.caption(f"{escaped(name)}: {header.width:,} x {header.height:,} px")
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
        st.caption(f"Chosen by whoever started the app: {escaped(settings.model.name)}")
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
    st.caption(escaped(_uploads.display_name(sent.name)))
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
        return shared_once(
            (section_path, model_path), predict, visitor=session().visitor, name="the prediction", say=_say
        )
    key = ("prediction", slide, *image.values(), model, options.get("id"))
    return session().calculated(key, predict, name="the prediction", say=_say)


def show(prediction: _sections.Prediction, key: str) -> None:
    """Show a prediction: its model, a gene's maps, and the chosen tile."""
    _results.show_model(prediction)
    orders = session().once(("orders", key), lambda: _genes.gene_orders(prediction))
    gene = _results.choose_gene(prediction, orders)
    frame = prediction.of_gene(gene)
    tile, layer = _results.choose_tile_and_layer(frame)
    _results.show_maps(session(), prediction, frame, gene=gene, tile=tile, layer=layer, key=key)
    if tile is None:
        st.info("Click on a tile to see which of its nuclei support the gene.")
        return
    st.session_state["said"] = st.empty()
    _results.show_tile(session(), prediction, frame, gene, tile, key, _say)
    st.session_state.pop("said").empty()


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
        with st.spinner("Opening the section ..."):
            prediction = predicted(slide, image, model, options)
        st.session_state["said"].empty()
        show(prediction, key=f"{slide}-{sorted(image.items())}-{model}-{options.get('id')}")
    except _uploads.UploadError as error:
        st.error(escaped(error))


if __name__ == "__main__":
    main()
