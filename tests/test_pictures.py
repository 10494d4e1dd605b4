"""Any caption makes a title, and any waveform a picture."""

import io
import warnings

import numpy as np
import pytest

from audiosep.pictures import spectrogram_figure


@pytest.mark.parametrize(
    "title", ["a dog", r"$\frac$", "from $5 to $x_$", "100 % _ ^ {", "two\nlines\n" * 20, "long " * 3000, ""]
)
def test_any_caption_is_a_title(title: str) -> None:
    waveforms = {"mixture": np.sin(np.arange(8000) / 9), "estimate": np.zeros(8000)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout without room for the spectrograms
        figure = spectrogram_figure(waveforms, 8000, title)
        figure.savefig(picture := io.BytesIO())
    assert picture.getvalue().startswith(b"\x89PNG")
    assert figure.get_suptitle().split()[:2] == title.split()[:2]
