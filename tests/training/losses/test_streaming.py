"""The losses in tiles against the full matrices: values, gradients, several processes, every edge.

Run as a program (RANK OUT RENDEZVOUS) it is one of two processes that share the rows.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from eval.base.processes import leave_group
from training.losses import PairedLosses, clip_loss, crd_loss, paired_losses
from training.pca import pca_factors

CLIP, CRD = 0.8, 1.5
TILE = (8, 11)
DIFFUSE, SHARP, EXTREME = 13.0, 100.0, 10000.0  # at 10,000 no single exponent serves all rows


@dataclass
class Pair:
    """Student and two teachers of widths 8 and 12."""

    image: Tensor
    text: Tensor
    scale: Tensor
    teacher_image: Tensor
    teacher_text: Tensor
    teacher_scale: tuple[float, float]
    widths: tuple[int, int] = (8, 12)
    groups: Tensor | None = None
    smoothing: float = 0.1

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.image, self.text, self.scale

    def full(self, clip_weight: float, crd_weight: float) -> Tensor:
        image, text, scale = self.leaves
        clip = clip_loss(image, text, scale, label_smoothing=self.smoothing, caption_groups=self.groups)
        teachers = self.teacher_image, self.teacher_text, scale, self.teacher_scale
        return clip_weight * clip + crd_weight * crd_loss(image, text, *teachers, teacher_widths=self.widths)

    def tiled(
        self,
        clip_weight: float,
        crd_weight: float,
        *,
        tile: tuple[int, int] | None = TILE,
        share: tuple[int, int] = (0, 1),
    ) -> PairedLosses:
        return paired_losses(
            *self.leaves,
            self.teacher_image,
            self.teacher_text,
            self.teacher_scale,
            clip_weight=clip_weight,
            crd_weight=crd_weight,
            label_smoothing=self.smoothing,
            caption_groups=self.groups,
            teacher_widths=self.widths,
            share=share,
            tile=tile,
        )


def make_pair(count: int, scale: float, dtype: torch.dtype = torch.float64, *, grouped: bool = False) -> Pair:
    """Random unit rows; student texts resemble their images, so that gradients are not all of one size."""
    generator = torch.Generator().manual_seed(count)

    def rows(width: int, common: Tensor | float = 0.0) -> Tensor:
        x = torch.randn(count, width, generator=generator, dtype=torch.float64)
        return normalize(x + common, dim=-1).to(dtype)

    image = rows(16)
    leaves = image, rows(16, 4 * image.double()), torch.tensor(scale, dtype=dtype)
    teacher = [torch.cat([rows(8), rows(12)], dim=1) for _ in range(2)]
    groups = torch.randint(0, 9, (count,), generator=generator) * 10**12 if grouped else None
    pair = Pair(*(leaf.requires_grad_() for leaf in leaves), *teacher, (scale, scale / 2), groups=groups)
    if grouped:
        assert groups is not None and len(groups.unique()) < count
    return pair


def assert_equal(pair: Pair, losses: PairedLosses, reference: Tensor, *, tolerance: float) -> None:
    """Values relatively, gradients relative to the largest entry of each."""
    torch.testing.assert_close(losses.total, reference, rtol=tolerance, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(losses.total, pair.leaves), torch.autograd.grad(reference, pair.leaves), strict=True
    ):
        assert theirs.abs().max() > 1e-8
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("scale", [DIFFUSE, SHARP, EXTREME])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("weights", [(CLIP, CRD), (1.0, 0.0), (0.0, 1.0)])
def test_equals_the_full_matrices(weights: tuple[float, float], grouped: bool, scale: float) -> None:
    """37 rows in tiles of 8 x 11: neither divides."""
    pair = make_pair(37, scale, grouped=grouped)
    losses = pair.tiled(*weights)
    assert_equal(pair, losses, pair.full(*weights), tolerance=1e-12)
    for value, lone in ((losses.clip, (1.0, 0.0)), (losses.crd, (0.0, 1.0))):
        if weights[lone.index(1.0)] == 0:
            assert value is None
        else:
            assert value is not None and not value.requires_grad
            torch.testing.assert_close(value, pair.full(*lone).detach(), rtol=1e-12, atol=0)


def assert_single_equals_double(pair: Pair, *, tile: tuple[int, int] | None) -> None:
    """The stated tolerance of float32 against the full matrices in float64."""
    image, text, scale = (leaf.detach().double().requires_grad_() for leaf in pair.leaves)
    teacher = pair.teacher_image.double(), pair.teacher_text.double()
    exact = Pair(image, text, scale, *teacher, pair.teacher_scale)
    losses, reference = pair.tiled(CLIP, CRD, tile=tile), exact.full(CLIP, CRD)
    torch.testing.assert_close(losses.total.double(), reference, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(losses.total, pair.leaves), torch.autograd.grad(reference, exact.leaves)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("scale", [DIFFUSE, SHARP])
def test_float32_equals_float64_to_1e5(scale: float) -> None:
    assert_single_equals_double(make_pair(1300, scale, torch.float32), tile=None)


def test_gradient_equals_finite_differences() -> None:
    pair = make_pair(7, DIFFUSE, grouped=True)

    def total(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        pair.image, pair.text, pair.scale = image, text, scale
        return pair.tiled(CLIP, CRD, tile=(3, 4)).total

    assert torch.autograd.gradcheck(total, pair.leaves)


def test_pca_factors_give_the_same_losses() -> None:
    generator = torch.Generator().manual_seed(5)
    image, text, teacher_image, teacher_text = (
        torch.randn(40, 24, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    image, factors = pca_factors(normalize(image + 1, dim=-1), 4)  # not unit-norm
    parts = [pca_factors(part, 4) for part in normalize(teacher_image, dim=-1).split((10, 14), dim=1)]
    text, teacher_text = normalize(text, dim=-1), normalize(teacher_text, dim=-1)
    scale = torch.tensor(SHARP, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (image, text, scale)]
    teacher = torch.cat([part for part, _ in parts], dim=1), teacher_text, 50.0
    assert factors is not None
    results = []
    for named in (
        {"student_factors": factors, "teacher_factors": [f for _, f in parts if f is not None]},
        {"student_factors": None, "teacher_factors": None},
    ):
        losses = paired_losses(
            *leaves, *teacher, clip_weight=CLIP, crd_weight=CRD, teacher_widths=(10, 14), tile=TILE, **named
        )
        results.append([losses.total.detach(), *torch.autograd.grad(losses.total, leaves)])
    reference = CLIP * clip_loss(*leaves) + CRD * crd_loss(
        *leaves[:2], *teacher[:2], scale, 50.0, teacher_widths=(10, 14)
    )
    results.append([reference.detach(), *torch.autograd.grad(reference, leaves)])
    for ours, dense, full in zip(*results, strict=True):
        torch.testing.assert_close(dense, full, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours, full, rtol=1e-10, atol=1e-12)


def test_scales_the_gradient_by_what_comes_from_above() -> None:
    pair = make_pair(9, DIFFUSE)
    one = torch.autograd.grad(pair.tiled(CLIP, CRD).total, pair.leaves)
    scaled = torch.autograd.grad(65536 * pair.tiled(CLIP, CRD).total, pair.leaves)
    for a, b in zip(one, scaled, strict=True):
        torch.testing.assert_close(65536 * a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["identical rows", "zeros", "far apart", "far apart both ways"])
def test_degenerate_features(name: str) -> None:
    pair = make_pair(20, SHARP, torch.float32)
    with torch.no_grad():
        if name == "identical rows":
            pair.image.copy_(pair.image[:1].expand(20, -1).clone())
            pair.text[5:] = pair.text[4]
        elif name == "zeros":
            pair.image.zero_()
        else:  # a picture that opposes every text: float32 cannot hold its exponentials beside the others'
            centre = normalize(torch.ones(16), dim=0)
            pair.text.copy_(normalize(pair.text + 2 * centre, dim=1))
            pair.image.copy_(normalize(pair.image + centre, dim=1))
            pair.image[7] = -centre
            assert (pair.image[7] @ pair.text.T).max() < -0.5
            if name == "far apart both ways":  # a text that opposes every picture but that one
                pair.text[3] = -centre
                assert (pair.text[3] @ pair.image.T).sort().values[-2] < -0.3
    assert_single_equals_double(pair, tile=TILE)


@pytest.mark.parametrize("side", ["image", "text", "teacher_image"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_features_give_a_nan_loss(side: str, value: float) -> None:
    pair = make_pair(20, SHARP, torch.float32)
    with torch.no_grad():
        getattr(pair, side)[3, 2] = value
    losses = pair.tiled(CLIP, CRD)
    assert losses.total.isnan()
    losses.total.backward()
    assert losses.clip is not None
    assert losses.clip.isnan() == (side != "teacher_image")


def test_without_gradient() -> None:
    pair = make_pair(20, DIFFUSE)
    with torch.no_grad():
        losses = pair.tiled(CLIP, CRD)
    assert not losses.total.requires_grad
    torch.testing.assert_close(losses.total, pair.full(CLIP, CRD).detach(), rtol=1e-12, atol=0)
    pair.teacher_image.requires_grad_()
    pair.tiled(CLIP, CRD).total.backward()
    assert pair.teacher_image.grad is None


def test_autocast_does_not_lower_the_precision() -> None:
    pair = make_pair(64, SHARP, torch.float32)
    plain = pair.tiled(CLIP, CRD).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = pair.tiled(CLIP, CRD).total
    assert cast.dtype == torch.float32
    assert cast.item() == plain.item()


def test_what_cannot_be_computed_is_refused() -> None:
    pair = make_pair(9, DIFFUSE)
    with pytest.raises(ValueError, match="nor both 0"):
        pair.tiled(0.0, 0.0)
    with pytest.raises(ValueError, match="teacher's features"):
        paired_losses(*pair.leaves, clip_weight=1.0, crd_weight=1.0)
    pair.widths = (8, 8)
    with pytest.raises(ValueError, match="do not fill features of width 20"):
        pair.tiled(CLIP, CRD)
    pair.widths, pair.teacher_scale = (8, 12), (1.0,)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="2 teachers need as many logit scales"):
        pair.tiled(CLIP, CRD)


def computed(share: tuple[int, int]) -> list[list[Tensor]]:
    """Losses and gradients of three problems, of which this process takes its share."""
    results = []
    for scale in (DIFFUSE, SHARP, EXTREME):
        pair = make_pair(29, scale, grouped=True)
        losses = pair.tiled(CLIP, CRD, tile=(4, 7), share=share)
        assert losses.clip is not None and losses.crd is not None
        values = [losses.total.detach(), losses.clip, losses.crd]
        results.append([*values, *torch.autograd.grad(losses.total, pair.leaves)])
    return results


def test_two_processes_share_the_rows(tmp_path: Path) -> None:
    """Each ends with the whole losses and gradients of one process, which are those of the full matrices."""
    outputs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(out), str(tmp_path / "rendezvous")])
        for rank, out in enumerate(outputs)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    expected = computed((0, 1))
    for out in outputs:
        for shared, alone in zip(torch.load(out, weights_only=True), expected, strict=True):
            for a, b in zip(shared, alone, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * b.abs().max().item())


def main() -> None:
    rank, out, rendezvous = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.save(computed((rank, 2)), out)
    dist.barrier()
    leave_group()


if __name__ == "__main__":
    main()
