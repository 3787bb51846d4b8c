"""Tables of relative positions of another window are resized when weights are loaded, as the libraries do it."""

from __future__ import annotations

import torch

from service.backbones.position_tables import fit_tables, resize_bicubic, resize_progression

NAME = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table"
# scipy.interpolate.RectBivariateSpline over mmpretrain's progression: 9x9 to 11x11, a row
ROW = (
    1.000000,
    0.706109,
    0.441010,
    0.220110,
    0.062500,
    -0.000000,
    0.062500,
    0.220110,
    0.441010,
    0.706109,
    1.000000,
)


def table(side: int) -> torch.Tensor:
    """The square of the distance to the right, over its largest: [1, side, side]."""
    places = torch.linspace(-1, 1, side)
    return (places**2).expand(1, side, side)


def test_a_progression_keeps_the_middle_and_the_ends() -> None:
    resized = resize_progression(table(9), 11)[0]
    assert resized.shape == (11, 11)
    torch.testing.assert_close(resized[5], torch.tensor(ROW), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(resized[0], resized[10])


def test_tables_of_another_window_are_resized_and_their_index_is_left_out() -> None:
    index = NAME.replace("bias_table", "index")
    state = {NAME: table(13).reshape(-1, 1), index: torch.zeros(49, 49), "other": torch.ones(3)}
    for resize in (resize_bicubic, resize_progression):
        fitted = fit_tables(state, 23**2, resize)
        assert fitted.keys() == {NAME, "other"}
        torch.testing.assert_close(fitted[NAME].reshape(1, 23, 23), resize(table(13), 23))


def test_what_ends_a_table_is_kept() -> None:
    state = {NAME: torch.cat((table(7).reshape(-1, 1), torch.tensor([[7.0], [8.0], [9.0]])))}
    fitted = fit_tables(state, 11**2 + 3, resize_progression, extra=3)[NAME]
    assert fitted.shape == (11**2 + 3, 1)
    assert fitted[-3:, 0].tolist() == [7, 8, 9]


def test_what_is_no_square_table_is_left_to_the_strict_load() -> None:
    for shape in ((170, 2), (9, 2), (2,)):
        state = {NAME: torch.zeros(shape)}
        assert fit_tables(state, 23**2, resize_progression)[NAME] is state[NAME]
    fits = {NAME: torch.zeros(23**2, 2), NAME.replace("bias_table", "index"): torch.zeros(1)}
    assert fit_tables(fits, 23**2, resize_progression) == fits
