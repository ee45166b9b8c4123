"""Train a small image model of diffusers, Flux's architecture, with every attention through anyattn.

    python examples/diffusers_image_model.py
    python examples/diffusers_image_model.py --attention native

It takes a GPU where there is one; else it runs on the CPU, with a smaller model. The images are drawn: a coloured shape
on a dark ground, and its caption, of two to five words. Captions are padded to one length, so every layer gets a mask,
which also hides padding in the middle of a sequence: text comes first, then the image.

anyattn is in two places, marked (1) and (2). Any backend of diffusers that takes masks prints the same losses, but for
rounding.
"""

import argparse
import time
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

import anyattn

COLOURS = {"red": (1.0, -0.6, -0.6), "green": (-0.6, 1.0, -0.6), "blue": (-0.6, -0.6, 1.0)}
SHAPES, SIDES, SIZES = ("square", "disc"), ("left", "right"), ("small", "large")
WORDS = ("", *COLOURS, *SHAPES, "on", "the", *SIDES, *SIZES)
LONGEST = 6


class Sizes(NamedTuple):
    """Of the model, the images and a batch."""

    image: int
    layers: int
    heads: int
    head_dim: int
    batch: int


ON_CPU = Sizes(image=16, layers=2, heads=4, head_dim=32, batch=8)
ON_GPU = Sizes(image=64, layers=8, heads=12, head_dim=64, batch=32)


class Batch(NamedTuple):
    """Images with their captions; every patch of 2 x 2 pixels is a token."""

    patches: Tensor  # float (batch, patches, 12)
    words: Tensor  # int64 (batch, LONGEST): 0 is padding
    places: Tensor  # float (patches, 3): 0, row and column


def draw(size: int, choice: torch.Generator) -> tuple[Tensor, list[str]]:
    """An image (3, size, size) in [-1, 1], and its caption."""

    def pick(names: tuple[str, ...]) -> str:
        return names[int(torch.randint(len(names), (), generator=choice))]

    colour, shape, side, big = pick(tuple(COLOURS)), pick(SHAPES), pick(SIDES), pick(SIZES)
    radius = size / 4 if big == "large" else size / 8
    row, column = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    down, across = row - size / 2, column - size * (0.3 if side == "left" else 0.7)
    inside = (down.abs() < radius) & (across.abs() < radius)
    if shape == "disc":
        inside = down.square() + across.square() < radius**2
    image = torch.where(inside, torch.tensor(COLOURS[colour])[:, None, None], torch.tensor(-0.9))
    caption = [colour, shape] if side == "left" else [colour, shape, "on", "the", side]
    return image, ([big] if big == "large" else []) + caption


def make_batch(sizes: Sizes, step: int, device: torch.device) -> Batch:
    """The batch of a step: the same on every machine."""
    choice = torch.Generator().manual_seed(step)
    drawn = [draw(sizes.image, choice) for _ in range(sizes.batch)]
    images = torch.stack([image for image, _ in drawn])
    words = torch.zeros(sizes.batch, LONGEST, dtype=torch.int64)
    for row, (_, caption) in zip(words, drawn, strict=True):
        row[: len(caption)] = torch.tensor([WORDS.index(word) for word in caption])
    side = torch.arange(sizes.image // 2, dtype=torch.float32)
    places = torch.cartesian_prod(torch.zeros(1), side, side)
    return Batch(F.unfold(images, 2, stride=2).mT.to(device), words.to(device), places.to(device))


class Painter(torch.nn.Module):
    """From noisy patches and a caption to the direction from image to noise."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.dim = sizes.heads * sizes.head_dim
        half = sizes.head_dim // 2 - 4
        self.words = torch.nn.Embedding(len(WORDS), self.dim)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=12,
            num_layers=sizes.layers,
            num_single_layers=sizes.layers,
            attention_head_dim=sizes.head_dim,
            num_attention_heads=sizes.heads,
            joint_attention_dim=self.dim,
            pooled_projection_dim=self.dim,
            axes_dims_rope=(8, half, half),
        )

    def forward(self, noisy: Tensor, time: Tensor, batch: Batch) -> Tensor:
        """(batch, patches, 12); time is (batch,), from 0 for images to 1 for noise."""
        text = self.words(batch.words)
        real = batch.words != 0
        pooled = (text * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        image = torch.ones(noisy.shape[:2], dtype=torch.bool, device=noisy.device)
        # (2) Which words are real. All layers get this one mask, and anyattn reads it once.
        mask = torch.cat([real, image], dim=1)
        found = self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time,
            img_ids=batch.places,
            txt_ids=batch.places.new_zeros(LONGEST, 3),
            joint_attention_kwargs={"attention_mask": mask},
            return_dict=False,
        )
        return found[0]  # type: ignore[no-any-return]


def train(sizes: Sizes, device: torch.device, options: argparse.Namespace) -> None:
    """The loop."""
    torch.manual_seed(0)
    model = Painter(sizes).to(device)
    # (1) One line makes the name known to diffusers, one takes it.
    anyattn.integrations.diffusers.register()
    model.transformer.set_attention_backend(options.attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95))
    for step in range(1, options.steps + 1):
        begin = time.perf_counter()
        batch = make_batch(sizes, step, device)
        random = torch.Generator().manual_seed(-step)
        noise = torch.randn(batch.patches.shape, generator=random).to(device)
        moment = torch.rand(sizes.batch, generator=random).to(device)
        noisy = torch.lerp(batch.patches, noise, moment[:, None, None])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = model(noisy, moment, batch)
        loss = F.mse_loss(predicted.float(), noise - batch.patches)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % options.every == 0 or step == options.steps:
            value, seconds = loss.item(), time.perf_counter() - begin
            print(f"step {step:4}  loss {value:.5f}  {sizes.batch / seconds:7.0f} images/s", flush=True)


def main() -> None:
    """Options and device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=20, help="steps between two lines")
    parser.add_argument("--attention", default="anyattn", help="anyattn, anyattn:torch, ..., or one of diffusers' own")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train(ON_GPU if device.type == "cuda" else ON_CPU, device, options)


if __name__ == "__main__":
    main()
