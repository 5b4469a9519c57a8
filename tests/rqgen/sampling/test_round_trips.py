"""Results of `generate` and `edit` go into `edit` and `encode`: one range of images for both systems. And the types
that arguments may have."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from rqgen.data import to_uint8
from rqgen.models import (
    RQTransformer,
)
from rqgen.sampling import edit, generate

K, CLASSES = 12, 3
LABELS = torch.tensor([0, 2, 1, 0, 2])
AUTOENCODER: dict[str, Any] = {"channel_multipliers": [1, 1], "z_channels": 6}


class System(NamedTuple):
    prior: Any
    vae: Any


def stacks() -> System:
    vae = tiny.rqvae(**AUTOENCODER, embed_dim=6)
    return System(tiny.rq_prior(vae, num_classes=CLASSES), vae)


def scales() -> System:
    vae = tiny.multiscale_vqvae(**AUTOENCODER)
    return System(tiny.var(vae, layers=1, num_classes=CLASSES), vae)


@pytest.fixture(scope="module", params=[stacks, scales], ids=["RQ", "VAR"])
def system(request: pytest.FixtureRequest) -> System:
    torch.manual_seed(1)
    prior, vae = request.param()
    # What is decoded leaves the range, far on both sides.
    vae.decoder.conv_out.weight.data.mul_(4)
    return System(prior.eval(), vae.eval())


def decoded(vae: Any, codes: Any) -> Tensor:
    """Images as the decoder gives them, one by one as on a CPU."""
    count = len(codes) if isinstance(codes, Tensor) else len(codes[0])
    rows = [slice(i, i + 1) for i in range(count)]
    some = [codes[row] if isinstance(codes, Tensor) else [maps[row] for maps in codes] for row in rows]
    with torch.no_grad():
        return torch.cat([vae.decode_latents(vae.quantizer.decode(part)) for part in some])


def lower_half() -> Tensor:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[4:] = True
    return mask


@pytest.mark.parametrize("cfg_scale", [None, 1.0])
def test_images_are_what_is_decoded_within_the_range(system: System, cfg_scale: float | None) -> None:
    drawn = generate(*system, LABELS, seed=3, cfg_scale=cfg_scale, batch_size=2)
    plain = decoded(system.vae, drawn.codes)
    assert plain.min() < -1.5 and plain.max() > 1.5
    assert torch.equal(drawn.images, plain.clamp(-1, 1))


def test_what_is_drawn_is_edited_and_edited_again(system: System) -> None:
    drawn = generate(*system, LABELS, seed=3)
    first = edit(*system, drawn.images, lower_half(), LABELS.flip(0), seed=4)
    second = edit(*system, first.images, lower_half(), LABELS, seed=5)
    for before, after in ((drawn.images, first), (first.images, second)):
        assert torch.equal(after.images[:, :, :4], before[:, :, :4])
        assert not torch.equal(after.images[:, :, 4:], before[:, :, 4:])
        assert after.decoded.abs().max() == 1 and after.images.abs().max() <= 1
    edit(*system, second.decoded, lower_half(), LABELS)
    encoded = system.vae.encode(second.images)
    shapes = [tuple(maps.shape) for maps in ([encoded] if isinstance(encoded, Tensor) else encoded)]
    assert shapes == [tuple(maps.shape) for maps in ([drawn.codes] if isinstance(encoded, Tensor) else drawn.codes)]


def test_smooth_images_are_in_the_range() -> None:
    torch.manual_seed(1)
    prior, vae = (model.eval() for model in scales())
    vae.decoder.conv_out.weight.data.mul_(4)
    drawn = generate(prior, vae, LABELS, smooth=True, seed=3)
    assert drawn.images.abs().max() == 1
    edit(prior, vae, drawn.images, lower_half(), LABELS)


def test_reconstructions_are_not_cut(system: System) -> None:
    """A loss must see by how much they are off."""
    images = generate(*system, LABELS, seed=3).images
    with torch.no_grad():
        assert system.vae(images).reconstruction.abs().max() > 1.5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_no_image(system: System, value: float) -> None:
    prior, vae = system.prior, copy.deepcopy(system.vae)
    drawn = generate(*system, LABELS, seed=3)

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output.clone().index_fill_(3, torch.tensor(2), value)

    vae.decoder.conv_out.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="vae: expected finite images, got NaN or infinity in image 40"):
        generate(prior, vae, LABELS, seed=3, offset=40)
    with pytest.raises(ValueError, match="vae: expected finite images, got NaN or infinity in image 40"):
        edit(prior, vae, drawn.images, lower_half(), LABELS, offset=40)


def test_images_are_those_of_the_tokenizer_as_it_is(system: System) -> None:
    """Hooks on its parts, and a method of its own."""
    vae = copy.deepcopy(system.vae)
    vae.decoder.register_forward_hook(lambda module, inputs, output: 0.1 * output)
    drawn = generate(system.prior, vae, LABELS, seed=3)
    assert torch.equal(drawn.images, decoded(vae, drawn.codes).clamp(-1, 1)) and drawn.images.abs().max() < 1
    decode = vae.decode
    vae.decode = lambda codes: -decode(codes)
    assert torch.equal(generate(system.prior, vae, LABELS, seed=3).images, -drawn.images)


def test_logits_that_are_not_numbers_are_no_codes(system: System) -> None:
    prior = copy.deepcopy(system.prior)
    table = prior.condition_embedding if isinstance(prior, RQTransformer) else prior.class_embedding
    table.weight.data[1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        generate(prior, system.vae, LABELS)


def test_images_out_of_range_are_named(system: System) -> None:
    images = generate(*system, LABELS).images
    for wrong, got in ((images * 1.5, r"-1\.5 \.\. 1\.5 where"), (to_uint8(images).float(), r"0 \.\. 255; convert")):
        with pytest.raises(ValueError, match=rf"images: expected values in \[-1, 1\], got {got}"):
            edit(*system, wrong, lower_half(), LABELS)
    spoiled = images.clone()
    spoiled[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"images: expected values in \[-1, 1\], got nan"):
        edit(*system, spoiled, lower_half(), LABELS)


def test_images_a_little_out_of_range_are_named(system: System) -> None:
    """Kept pixels come back as they are, and the result is within [-1, 1]."""
    images = generate(*system, LABELS).images
    images[0, 0, 0, 0] = 1.01
    with pytest.raises(ValueError, match=r"got -1 \.\. 1\.01 where the mask is False; clamp them by images\.clamp"):
        edit(*system, images, lower_half(), LABELS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 300.0])
def test_pixels_under_the_mask_may_be_anything(system: System, value: float) -> None:
    images = generate(*system, LABELS).images
    hidden = torch.where(lower_half(), value, images)
    expected, found = (edit(*system, some, lower_half(), LABELS, seed=2) for some in (images, hidden))
    assert torch.equal(found.images, expected.images) and found.images.abs().max() <= 1


# --- forms of arguments


@pytest.mark.parametrize(
    "condition",
    [
        (0, 2, 1, 0, 2),
        LABELS.int(),
        LABELS.to(torch.uint8),
        LABELS[:, None].short(),
        LABELS.numpy(),
        LABELS.numpy().astype(np.uint16),
        LABELS.numpy().astype(np.uint64),
        LABELS.numpy()[::-1][::-1],
        np.flip(LABELS.flip(0).numpy()),
        [np.int32(label) for label in LABELS.tolist()],
        list(LABELS),
        range(0, 1),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_conditions_of_every_integer_kind(system: System, condition: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = generate(*system, condition, seed=3).images
    assert torch.equal(drawn, generate(*system, LABELS[: len(drawn)], seed=3).images)


def test_a_condition_that_may_not_be_written_to(system: System) -> None:
    labels = LABELS.numpy().copy()
    labels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(*system, labels)


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "condition: expected int64, got torch.float32"),
        (np.array([0.7]), TypeError, "condition: expected int64, got torch.float64"),
        ([True, False], TypeError, "condition: expected int64, got torch.bool"),
        (np.array([True]), TypeError, "condition: expected int64, got torch.bool"),
        (np.array(["x"]), ValueError, "condition: "),
        ([None], TypeError, "condition: expected a tensor or a list of integers"),
        ([2**70], TypeError, "condition: expected a tensor or a list of integers"),
        (np.array([2**64 - 1], dtype=np.uint64), IndexError, r"condition: expected values in \[0, 3\), got -1"),
        (np.int64(1), ValueError, r"condition: expected at least one row, got shape \(\)"),
        (np.zeros((2, 2), dtype=np.int64), ValueError, r"condition: expected shape \(2,\) or \(2, 1\)"),
        ([[0], [1, 2]], TypeError, "condition: expected a tensor or a list of integers"),
    ],
    ids=str,
)
def test_conditions_of_other_kinds(system: System, condition: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate(*system, condition)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"seed": np.int64(5)}, {"seed": 5}),
        ({"seed": np.uint64(2**64 - 1)}, {"seed": 2**64 - 1}),
        ({"seed": torch.tensor(5)}, {"seed": 5}),
        ({"offset": np.int32(7)}, {"offset": 7}),
        ({"batch_size": np.int8(2)}, {}),
        ({"batch_size": torch.tensor(2)}, {}),
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"temperature": torch.tensor(0.5)}, {"temperature": 0.5}),
        ({"temperature": np.int64(0)}, {"temperature": 0.0}),
        ({"top_p": np.float16(0.5)}, {"top_p": 0.5}),
        ({"top_p": torch.tensor(0.5, requires_grad=True)}, {"top_p": 0.5}),
        ({"top_k": np.int16(3)}, {"top_k": 3}),
        ({"top_k": torch.tensor(3)}, {"top_k": 3}),
        ({"top_k": 2**70}, {}),
        ({"cfg_scale": np.float64(1.5)}, {"cfg_scale": 1.5}),
        ({"cfg_scale": torch.tensor(1.5)}, {"cfg_scale": 1.5}),
    ],
    ids=str,
)
def test_numbers_of_every_kind(system: System, given: dict[str, Any], plain: dict[str, Any]) -> None:
    drawn = generate(*system, LABELS, **{"seed": 3, **given})
    assert torch.equal(drawn.images, generate(*system, LABELS, **{"seed": 3, **plain}).images)


def test_one_number_for_each_entry(system: System) -> None:
    entries = 2 if isinstance(system.prior, RQTransformer) else 3
    values = torch.linspace(0.2, 1, entries)
    plain = generate(*system, LABELS, temperature=values.tolist(), top_p=values.tolist()).images
    for given in (values, values.numpy(), tuple(values), list(values.numpy())):
        assert torch.equal(generate(*system, LABELS, temperature=given, top_p=given).images, plain)
    assert torch.equal(generate(*system, num=np.int64(2)).images, generate(*system, num=2).images)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"seed": torch.tensor(5.0)}, TypeError, r"seed: expected an integer, got tensor\(5\.\)"),
        ({"seed": torch.tensor([5])}, TypeError, r"seed: expected an integer, got tensor\(\[5\]\)"),
        ({"seed": np.bool_(True)}, TypeError, "seed: expected an integer"),
        ({"seed": torch.tensor(True)}, TypeError, "seed: expected an integer"),
        ({"seed": "5"}, TypeError, "seed: expected an integer, got '5'"),
        ({"seed": np.int64(-1)}, ValueError, "seed: expected an integer in"),
        ({"temperature": 10**400}, ValueError, "temperature: expected a finite number >= 0, got inf"),
        ({"temperature": 1j}, TypeError, "temperature: expected a number, got 1j"),
        ({"temperature": torch.tensor(True)}, TypeError, "temperature: expected a number"),
        ({"temperature": torch.ones(1)}, ValueError, "temperature: expected one value, or"),
        ({"temperature": torch.ones(2, 2)}, (TypeError, ValueError), "temperature"),
        ({"top_p": np.nan}, ValueError, r"top_p: expected a number in \(0, 1\], got nan"),
        ({"top_k": np.float32(3)}, TypeError, "top_k: expected an integer"),
        ({"cfg_scale": torch.ones(2)}, TypeError, "cfg_scale: expected a number or None"),
        ({"cfg_scale": np.inf}, ValueError, "cfg_scale: expected a finite number >= 0, got inf"),
        ({"smooth": "no"}, TypeError, "smooth: expected True or False, got 'no'"),
        ({"smooth": 1}, TypeError, "smooth: expected True or False, got 1"),
        ({"progress": "yes"}, TypeError, "progress: expected True or False, got 'yes'"),
        ({"condition": None, "num": 0}, ValueError, "num: expected an integer >= 1, got 0"),
        ({"condition": None, "num": np.float64(2)}, TypeError, "num: expected an integer"),
        ({"condition": None, "num": True}, TypeError, "num: expected an integer, got True"),
    ],
    ids=str,
)
def test_numbers_of_other_kinds(system: System, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate(*system, **{"condition": LABELS, **given})
