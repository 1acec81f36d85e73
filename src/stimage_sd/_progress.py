"""Progress bars, which `stimage_sd.settings` switches off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm import auto

from stimage_sd._settings import settings

if TYPE_CHECKING:
    from tqdm.auto import tqdm
else:

    class tqdm(auto.tqdm):
        """A bar of tqdm, of the notebook or the terminal. Bars inside another bar disappear when they are complete."""

        def __init__(self, *args: Any, **options: Any) -> None:
            # without the option, tqdm goes by `TQDM_DISABLE`
            super().__init__(*args, **options if settings.progress else options | {"disable": True})
            # tqdm gives an inner bar the next free line
            if "leave" not in options and getattr(self, "pos", 0):
                self.leave = False
